"""The daemon on a virtual supply with a recorded load: leases, power, flights, and everything that can break.

The supply runs in a process of its own and is asked through a plain socket, never through hil.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
import tty
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host import Host

from hil.bench.journal import read_events
from hil.client import Bench, Lease, attach
from hil.client.flight import Flight
from hil.client.http import DaemonGone, Http
from hil.errors import BenchError, BoardError, HilError, UsageError
from hil.inventory import load_bench
from hil.mission import timeline_file
from hil.model import LinkState

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 20.0

SUPPLY = """
import asyncio, sys
from hil.virtual.supply import RecordedLoad, serve_supply
loads = {n: RecordedLoad(((0.0, 12.0),), undervoltage_lockout_v=10.0) for n in (1, 2)}
ready = lambda supply: print(supply.port, flush=True)
asyncio.run(serve_supply("rigol-dp800", "127.0.0.1", int(sys.argv[1]), loads, ready=ready))
"""

BOARD_TYPE = """
schema: 1
name: recorded
title: A recorded load
arch: aarch64
hardware: virtual
supply: {voltage_min_v: 11, voltage_nominal_v: 15, voltage_max_v: 19, undervoltage_lockout_v: 10, current_max_a: 2.5,
  power_max_w: 30, overvoltage_protection_v: 20, overcurrent_protection_a: 2.8, inrush_s: 0.1, off_dwell_s: 0.1}
power: {idle_w: 5, inference_w: 12, source: recorded}
"""

BENCH = """
schema: 1
name: recorded
board_types: {types}
supplies:
  psu1: {{driver: scpi, dialect: rigol-dp800, address: "tcp://127.0.0.1:{port}"}}
boards:
  b1: {{type: recorded, power: [{{supply: psu1, channel: 1}}], on_lease_end: "off"}}
  b2: {{type: recorded, power: [{{supply: psu1, channel: 2}}], on_lease_end: hold}}
"""


def until(condition: Callable[[], object], timeout_s: float = 30.0, what: str = "") -> float:
    """Seconds until `condition` holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, f"waited {timeout_s} s in vain {what}"
        time.sleep(0.01)
    return time.monotonic() - start


class SupplyProcess:
    """The virtual supply, and a plain socket to ask it."""

    def __init__(self, port: int = 0) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SUPPLY, str(port)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def ask(self, *lines: str) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
            sock.sendall("".join(f"{line}\n" for line in lines).encode())
            return sock.makefile().readline().strip()

    def volts(self, channel: int = 1) -> float:
        return float(self.ask(f":MEAS:VOLT? CH{channel}"))

    def is_on(self, channel: int = 1) -> bool:
        return self.ask(f":OUTP? CH{channel}") == "ON"

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


class Lab:
    """A bench file on a running supply, and the daemon that clients start for it."""

    def __init__(self, directory: Path) -> None:
        (directory / "types").mkdir()
        (directory / "types/recorded.yaml").write_text(BOARD_TYPE)
        self.supply = SupplyProcess()
        self.path = directory / "bench.yaml"
        self.path.write_text(BENCH.format(types=directory / "types", port=self.supply.port))
        self.bench = load_bench(self.path)
        self.run = directory / "runs/run"

    def attach(self, start: bool = True) -> Bench:
        return attach(self.bench, start=start)

    def close(self) -> None:
        """Stop the daemon, whoever started it. One that does not end, or ends late, fails the test that left it so.

        A client that was killed while it started a daemon leaves one that comes up later, also after another was
        stopped: so processes are looked for, not answers.
        """
        try:
            self._stop_daemons()
        finally:
            self.supply.kill()

    def _stop_daemons(self) -> None:
        stopped: set[int] = set()
        began, quiet = time.monotonic(), 0
        while quiet < 2:  # one look may miss a process that another is just becoming
            running = self.daemons()
            quiet = 0 if running else quiet + 1
            if time.monotonic() - began > STOP_S:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                pytest.fail(f"daemon {running} did not end within {STOP_S:g} s; its last words:\n{self.log()[-3000:]}")
            for pid in running - stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                stopped.add(pid)
            time.sleep(0.05)

    def daemons(self) -> set[int]:
        """Processes that are this bench's daemon, or on their way to start one."""
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes()
                if b"hil.bench.daemon" in words and os.fsencode(self.path) in words:
                    found.add(int(process.name))
        return found

    def log(self) -> str:
        path = self.bench.state_dir / "daemon.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def _shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("shared"))
    yield lab
    lab.close()


@pytest.fixture
def shared(_shared_lab: Lab, tmp_path: Path) -> Iterator[Lab]:
    """A lab for tests that leave it as they found it: nothing leased, everything off."""
    _shared_lab.run = tmp_path / "run"
    yield _shared_lab
    with _shared_lab.attach() as daemon:
        assert daemon.leases() == []
    assert not _shared_lab.supply.is_on(1)
    assert not _shared_lab.supply.is_on(2)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A lab of its own, for tests that break something."""
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_board_is_powered_under_a_lease_and_off_when_it_is_released(shared: Lab) -> None:
    with shared.attach() as daemon, daemon.lease(["b1"]) as lease:
        board = daemon.board("b1", lease)
        reading = board.power.on()
        assert reading.output_on
        assert 14.9 < reading.voltage_v < 15.1
        assert shared.supply.is_on()
        until(lambda: 11 < daemon.board("b1").power.read().power_w < 13)
        status = daemon.status()
        assert status["boards"]["b1"]["lease"]["holder"].endswith(lease_name())
        assert status["deadman"] == {"alive": True, "armed": True, "pid": status["deadman"]["pid"]}
        lease.release()
        assert not shared.supply.is_on()
        assert shared.supply.volts() < 0.6
        assert daemon.status()["boards"]["b1"]["state"] == "off"
        with pytest.raises(BenchError, match="was released"):
            board.power.on()


def lease_name() -> str:
    return Path(sys.argv[0]).name


def test_what_needs_a_lease_says_so_and_what_is_not_wired_too(shared: Lab) -> None:
    with shared.attach() as daemon:
        watcher = daemon.board("b1")
        assert watcher.power.read().output_on is False
        with pytest.raises(BenchError, match="only under a lease"):
            watcher.power.on()
        with pytest.raises(BenchError, match="under a lease"):
            daemon.http.call("POST", "/v1/boards/b1/power", {"action": "on"}, token=None)
        with pytest.raises(UsageError, match="no link emulator"):
            watcher.link.state()
        with pytest.raises(UsageError, match="no board 'b9'"):
            daemon.http.get("/v1/boards/b9/power")
        with pytest.raises(UsageError, match="extra"):
            daemon.http.call("POST", "/v1/stop", {"extra": 1})
        with daemon.lease(["b1"]) as lease:
            board = daemon.board("b1", lease)
            with pytest.raises(UsageError, match="no link emulator"):
                board.link.set(LinkState(delay_s=0.01))
            with pytest.raises(UsageError, match="has no console"):
                board.console.mark()
            with pytest.raises(BenchError, match="25 V is outside"):
                board.power.on(25.0)
            with pytest.raises(BenchError, match="not for board b2"):
                daemon.http.call("POST", "/v1/boards/b2/power", {"action": "on"}, token=lease.token)
        assert not shared.supply.is_on()


def test_a_request_whose_body_has_no_bounds_is_refused(shared: Lab) -> None:
    with shared.attach() as daemon:
        for _ in range(2):  # the connection stays usable
            with pytest.raises(UsageError, match=r"/power: a body of 7\d{4} bytes is too long, at most 65536"):
                daemon.http.call("POST", "/v1/boards/b1/power", "x" * 70_000)
            assert daemon.status()["bench"] == "recorded"
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(os.fspath(shared.bench.api_socket))
        raw.sendall(b"POST /v1/stop HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = raw.makefile("rb")
        assert b" 411 " in answer.readline()
        head = list(iter(answer.readline, b"\r\n"))
        assert len(head) > 1
        assert b"a body without Content-Length is not taken" in answer.read1()


def test_a_second_client_waits_its_turn_and_gets_the_board_quickly(shared: Lab) -> None:
    with shared.attach() as daemon:
        first = daemon.lease(["b1", "b2"])
        with pytest.raises(BenchError, match="board b1 is leased by"):
            daemon.lease(["b1"])
        got: list[float] = []

        def wait() -> None:
            with shared.attach() as other, other.lease(["b2"], wait_s=60):
                got.append(time.monotonic())

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: daemon.http.get("/v1/leases"))
        time.sleep(0.2)  # the waiter is in line by then; the assertion below holds in either case
        released = time.monotonic()
        first.release()
        thread.join(timeout=60)
        assert got
        assert got[0] - released < 10.0  # it is told, and does not wait until its time is up


HOLDER = """
import sys, time
from pathlib import Path
from hil.client import attach
from hil.inventory import load_bench
daemon = attach(load_bench(Path(sys.argv[1])))
lease = daemon.lease([sys.argv[2]])
daemon.board(sys.argv[2], lease).power.on()
print(daemon.status()["pid"], flush=True)
time.sleep(600)
"""


def holder(lab: Lab, board: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lab.path), board], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize(("board", "channel", "stays"), [("b1", 1, False), ("b2", 2, True)], ids=["off", "hold"])
def test_a_killed_holder_leaves_the_board_as_on_lease_end_says(
    shared: Lab, board: str, channel: int, stays: bool
) -> None:
    process = holder(shared, board)
    assert shared.supply.is_on(channel)
    process.kill()
    process.communicate()
    with shared.attach(start=False) as daemon:
        until(lambda: not daemon.leases(), 20.0, "for the daemon to see the death, long before the lease runs out")
        if stays:
            until(lambda: f"board {board}: lease" in shared.log())
            assert shared.supply.is_on(channel)
        else:
            until(lambda: not shared.supply.is_on(channel))
        with daemon.lease([board]) as lease:  # the board can be had again at once
            daemon.board(board, lease).power.off()
            assert not shared.supply.is_on(channel)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_daemon_leaves_the_outputs_off_and_the_next_knows_the_leases(lab: Lab, host: Host, number: int) -> None:
    daemon = lab.attach()
    lease = daemon.lease(["b1"], ttl_s=60)
    daemon.board("b1", lease).power.on()
    pid = daemon.status()["pid"]
    killed = time.monotonic()
    os.kill(pid, number)
    until(lambda: not lab.supply.is_on() and lab.supply.volts() < 0.6, 8.0)
    host.excuses("off and below 0.6 V", time.monotonic() - killed, 2.0)
    until(lambda: gone(pid))
    daemon.http.close()
    again = lab.attach()
    assert again.status()["pid"] != pid
    assert [(item["lease"], item["boards"]) for item in again.leases()] == [(lease.id, ["b1"])]
    with pytest.raises(BenchError, match="leased"):
        again.lease(["b1"])
    # The client that had it goes on with the same token.
    daemon.board("b1", lease).power.on()
    assert lab.supply.is_on()
    lease.release()
    assert not lab.supply.is_on()
    again.close()
    daemon.close()


def test_an_output_left_on_by_a_dead_run_is_switched_off_before_anything_else(lab: Lab) -> None:
    from hil.bench.safety import Intent, IntentJournal

    lab.supply.ask(":APPL CH1,15,2", ":OUTP CH1,ON", ":OUTP? CH1")
    assert lab.supply.is_on()
    address = f"tcp://127.0.0.1:{lab.supply.port}"
    IntentJournal(lab.bench.state_dir / "intent.jsonl").opened(Intent("b1", address, "rigol-dp800", 1, 0.6))
    with lab.attach() as daemon:
        assert not lab.supply.is_on()
        assert "leftover of a dead run" in lab.log()
        assert daemon.status()["boards"]["b1"]["state"] == "off"


def test_an_output_that_somebody_else_switched_on_is_not_taken_over(lab: Lab) -> None:
    lab.supply.ask(":APPL CH1,5,1", ":OUTP CH1,ON", ":OUTP? CH1")
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        with pytest.raises(BenchError, match="this bench did not switch it on"):
            daemon.board("b1", lease).power.on()
        assert lab.supply.is_on()
        # Who has the lease and says off means it.
        assert not daemon.board("b1", lease).power.off().output_on
        assert not lab.supply.is_on()
        lease.release()
        lab.supply.ask(":OUTP CH1,ON", ":OUTP? CH1")
        with daemon.lease(["b1"]) as fresh:
            assert lab.supply.is_on()
            assert not daemon.board("b1", fresh).power.off().output_on
            assert not lab.supply.is_on()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_daemon_reaches_the_safe_state_first(lab: Lab, number: int) -> None:
    with lab.attach() as daemon:
        lease = daemon.lease(["b1"])
        daemon.board("b1", lease).power.on()
        with pytest.raises(BenchError, match="b1 leased by"):
            daemon.stop()
        pid = daemon.status()["pid"]
        deadman = daemon.status()["deadman"]["pid"]
        os.kill(pid, number)
        until(lambda: gone(pid))
    assert not lab.supply.is_on()
    assert "safe state reached" in lab.log()
    assert gone(deadman)
    assert not lab.bench.api_socket.exists()
    with pytest.raises(DaemonGone):
        lab.attach(start=False)


def test_a_dead_deadman_means_safe_state_and_a_new_one(lab: Lab, host: Host) -> None:
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        board = daemon.board("b1", lease)
        board.power.on()
        os.kill(daemon.status()["deadman"]["pid"], signal.SIGKILL)
        off_s = until(lambda: not lab.supply.is_on())
        until(lambda: daemon.status()["deadman"]["alive"])
        assert "dead-man process is gone" in daemon.status()["boards"]["b1"]["fault"]
        board.power.on()
        assert lab.supply.is_on()
        os.kill(daemon.status()["deadman"]["pid"], signal.SIGKILL)
        until(lambda: daemon.status()["boards"]["b1"]["fault"])
    with lab.attach() as daemon, daemon.lease(["b1"]):
        assert daemon.status()["boards"]["b1"]["fault"] == ""  # its former holder's
    host.excuses("off", off_s, 2.0)


def test_an_output_whose_dead_man_died_is_off_before_another_goes_on(lab: Lab) -> None:
    with lab.attach() as daemon, daemon.lease(["b1", "b2"]) as lease:
        first, second = daemon.board("b1", lease), daemon.board("b2", lease)
        first.power.on()
        os.kill(daemon.status()["deadman"]["pid"], signal.SIGKILL)
        with contextlib.suppress(BenchError):  # refused when it comes in the moment of the death
            second.power.on()
        if not lab.supply.is_on(2):
            until(lambda: daemon.status()["deadman"]["alive"])
            second.power.on()
        assert lab.supply.is_on(2)
        assert not lab.supply.is_on(1)
        assert daemon.status()["deadman"]["alive"]


def test_a_hung_dead_man_that_wakes_up_again_ends_nobody(lab: Lab) -> None:
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        board = daemon.board("b1", lease)
        board.power.on()
        pid, old = daemon.status()["pid"], daemon.status()["deadman"]["pid"]
        os.kill(old, signal.SIGSTOP)
        until(lambda: daemon.status()["deadman"]["pid"] not in (old, None))
        assert not lab.supply.is_on()
        if not gone(old):
            os.kill(old, signal.SIGCONT)
        board.power.on()
        time.sleep(1.5)
        assert daemon.status()["pid"] == pid
        assert lab.supply.is_on()


def test_a_lease_that_ends_while_something_begins_leaves_nothing_on(lab: Lab) -> None:
    def quietly(act: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(HilError):
            act(*arguments)

    with lab.attach() as daemon:
        for delay_s in (0.02, 0.1, 0.3):
            lease = daemon.lease(["b1"])
            board = daemon.board("b1", lease)
            board.power.on()
            begun = [
                threading.Thread(target=quietly, args=(board.power.cycle,)),
                threading.Thread(target=quietly, args=(fly, lab, daemon, lease)),
            ]
            for thread in begun:
                thread.start()
            time.sleep(delay_s)
            lease.release()
            for thread in begun:
                thread.join(30)
            assert not lab.supply.is_on()
            flight = daemon.http.get("/v1/flight")
            assert flight is None or flight["state"] == "ended"
            assert daemon.leases() == []


def test_many_clients_start_one_daemon(shared: Lab) -> None:
    pids: list[int] = []

    def start() -> None:
        with shared.attach() as daemon:
            pids.append(daemon.status()["pid"])

    threads = [threading.Thread(target=start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 5
    assert len(set(pids)) == 1


def test_a_second_bench_file_cannot_drive_the_same_instrument(lab: Lab, tmp_path: Path) -> None:
    with lab.attach():
        other = tmp_path / "other.yaml"
        other.write_text(lab.path.read_text().replace("name: recorded", "name: thief"))
        with pytest.raises(BenchError, match=r"(?s)ended at once.*another process on this host drives the instrument"):
            attach(load_bench(other))


def test_a_changed_bench_file_is_noticed(lab: Lab) -> None:
    with lab.attach():
        lab.path.write_text(lab.path.read_text() + "# moved a wire\n")
        with pytest.raises(BenchError, match="older version"):
            lab.attach()
        lab.path.write_text(lab.path.read_text().replace("# moved a wire\n", ""))


def test_it_ends_by_itself_when_idle_but_not_under_a_lease(lab: Lab) -> None:
    process = subprocess.Popen([sys.executable, "-m", "hil.bench.daemon", str(lab.path), "--idle-s", "3.0"])
    lock = lab.bench.runtime_dir / "daemon.lock"
    until(lambda: lock.exists() and lock.read_text() == f"{process.pid}\n")
    with lab.attach() as daemon, daemon.lease(["b1"]):
        assert daemon.status()["pid"] == process.pid  # attached to it while it started, and did not start another
        time.sleep(3.5)  # more than the idle time
        assert process.poll() is None
    assert process.wait(timeout=30) == 0


def test_metrics_exist_from_the_start_at_zero_and_only_on_loopback(lab: Lab) -> None:
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        address = daemon.status()["metrics"]
        assert address.startswith("http://127.0.0.1:")
        before = scrape(address)
        assert before['hil_board_energy_joules_total{board="b1",phase="umbra"}'] == 0
        assert before['hil_inference_output_tokens_total{board="b1",phase="sunlit"}'] == 0
        assert before["hil_deadman_alive"] == 1
        assert before["hil_leases"] == 1
        daemon.board("b1", lease).power.on()
        key = 'hil_board_energy_joules_total{board="b1",phase="none"}'
        until(lambda: scrape(address)[key] > 1)
        now = scrape(address)
        assert 11 < now['hil_board_power_watts{board="b1"}'] < 13
        assert now['hil_board_power_commanded{board="b1"}'] == 1
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address.replace("/metrics", "/v1/status"))


def scrape(address: str) -> dict[str, float]:
    with urllib.request.urlopen(address) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


# ------------------------------------------------------------------------------------------------------- flights
MISSION = ROOT / "fixtures/missions/short.yaml"


def fly(lab: Lab, daemon: Bench, lease: Lease, start_s: float = 0.0, mission: Path = MISSION) -> Flight:
    """Begin a flight, as soon as the host is not too busy for the mission's loop."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return daemon.flight("b1", mission, lab.run, lease, start_s)
        except UsageError as error:
            if "the supply allows a loop of" not in error.message or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def rows(lab: Lab, query: str) -> list[tuple[float, ...]]:
    with sqlite3.connect(lab.run / "telemetry.sqlite") as database:
        return database.execute(query).fetchall()


def kinds(lab: Lab) -> list[str]:
    return [event["kind"] for event in read_events(lab.run / "events.jsonl")]


def measured(lab: Lab) -> tuple[float, ...]:
    """The flight's power record so far: ticks, watts at most, joules, seconds late at most."""
    columns = "count(*), max(power_w), max(energy_j) - min(energy_j), max(lateness_s)"
    return rows(lab, f"SELECT {columns} FROM power WHERE soc IS NOT NULL")[0]


def test_a_flight_follows_the_bus_skips_by_model_and_records_it_all(shared: Lab, host: Host) -> None:
    began = time.monotonic()
    with shared.attach() as daemon, daemon.lease(["b1"]) as lease:
        board = daemon.board("b1", lease)
        flight = fly(shared, daemon, lease)
        board.power.on()
        state = flight.state()
        assert state["state"] == "running"
        assert state["power"]["state"] == "on"
        bus_v = state["power"]["bus_voltage_v"]
        assert abs(board.power.read().voltage_v - bus_v) < 0.2
        assert bus_v > 15.5  # the battery's, not the board type's nominal 15 V
        flight.record_tokens("q1", 3, "payload")
        flight.progress("upload_bytes", 1000)
        flight.clock(60.0, cause="upload")
        until(lambda: flight.state()["t_mission"] > 60 and flight.state()["power"].get("power_w", 0) > 11)
        skipped = flight.skip_to(1000.0, cause="next contact")  # as the board draws now, in the sun throughout
        assert 0 < skipped["skipped_s"] < 940  # the clock ran on before, at 60 to 1, as long as the calls took
        assert skipped["t_mission"] >= 1000
        assert 11 < skipped["assumed_board_w"] < 13
        skipped = flight.skip_to(20000.0, assumed_board_w=5.0, cause="next contact")
        assert skipped["skipped_s"] > 18000
        assert skipped["assumed_board_w"] == 5.0
        assert flight.skip_to(100.0)["skipped_s"] == 0  # passed already
        with pytest.raises(UsageError, match="mission ends at"):
            flight.skip_to(1e9)
        flight.clock(1.0)
        assert flight.state()["t_mission"] > 20000
        with pytest.raises(BenchError, match="flight of board b1 is running"):
            fly(shared, daemon, lease)
        until(lambda: measured(shared)[0] > 10 and measured(shared)[2] > 5, what="for a record of ten ticks and 5 J")
        ended = flight.end()
        assert ended["state"] == "ended"
        host.valid(ended["invalid"])
        assert not shared.supply.is_on()
        assert flight.end() == {}
        assert daemon.http.get("/v1/flight")["tokens"] == 3
    assert rows(shared, "SELECT kind, rate, cause FROM clock ORDER BY wall_start_s, rowid") == [
        ("run", 1.0, "start"),
        ("run", 60.0, "upload"),
        ("skip", 60.0, "next contact"),
        ("skip", 60.0, "next contact"),
        ("run", 1.0, ""),
    ]
    assert rows(shared, "SELECT query, n, plane, board FROM tokens") == [("q1", 3, "payload", "b1")]
    assert rows(shared, "SELECT kind, value FROM progress") == [("upload_bytes", 1000)]
    count, power, energy, late = measured(shared)
    assert count > 10
    assert 11 < power < 13
    assert energy > 5
    assert 0 <= late < time.monotonic() - began
    for kind in ("flight_started", "board_on", "clock", "model_advanced", "board_off", "flight_ended"):
        assert kind in kinds(shared)
    assert (shared.run / "timeline.npz").exists()


def test_an_eclipse_sheds_the_load_at_clock_rate_one_and_restores_it_by_itself(shared: Lab, host: Host) -> None:
    with shared.attach() as daemon, daemon.lease(["b1"]) as lease:
        flight = fly(shared, daemon, lease)
        daemon.board("b1", lease).power.on()
        timeline = timeline_file.load(shared.run / "timeline.npz")
        assert timeline.environment.power is not None
        shed = timeline.environment.power.shed
        assert shed is not None
        flight.skip_to(timeline.eclipses[-1].umbra_entry_s, assumed_board_w=5.0, cause="eclipse")
        # Down to just above the shed voltage by model, the rest for real.
        while (left_v := flight.state()["power"]["bus_voltage_v"] - shed.shed_v) > 0.02:
            step_s = 60 if left_v > 0.5 else 2
            flight.skip_to(flight.state()["t_mission"] + step_s, assumed_board_w=12.0, cause="towards shedding")
        flight.clock(60.0, cause="eclipse")
        until(lambda: flight.state()["rate"] == 1.0, what="for the daemon to force real time")
        until(lambda: flight.state()["power"]["state"] == "shed", 60)
        assert not shared.supply.is_on()
        assert shared.supply.volts() < 0.6
        with pytest.raises(BenchError, match="shed by the mission's power system"):
            daemon.board("b1", lease).power.on()
        flight.clock(900.0, cause="recharge")
        until(lambda: flight.state()["power"]["state"] == "on", 60)
        assert shared.supply.is_on()
        assert flight.state()["rate"] == 1.0
        host.valid(flight.end()["invalid"])
    events = read_events(shared.run / "events.jsonl")
    order = [event["kind"] for event in events if event["kind"].startswith("load_")]
    assert order == ["load_shed", "load_restoring", "load_restored"]
    causes = [event["cause"] for event in events if event["kind"] == "clock" and not event["skipped_s"]]
    assert causes == ["eclipse", "load shedding", "recharge", "boot"]
    (cut,) = [event for event in events if event["kind"] == "load_shed"]
    assert cut["verified_v"] < 0.6
    assert cut["rate"] == 1.0
    ledger = events[-1]["ledger"]
    spent = sum(value for key, value in ledger.items() if key not in ("generated_j", "unserved_j"))
    assert abs(ledger["generated_j"] - spent) < 1e-6 * ledger["generated_j"]
    states = [state for (state,) in rows(shared, "SELECT state FROM power ORDER BY t_mono")]
    assert {"on", "shed"} <= set(states)


THERMAL = """\
thermal:
  nodes: {chip: {heat_capacity_j_per_k: 12, board_share: 0.5}}
  cutoff: {node: chip, off_c: 22, on_c: 19}

"""


def test_a_flight_warms_its_thermal_model_in_wall_time_and_says_when_to_rest(shared: Lab, tmp_path: Path) -> None:
    text = MISSION.read_text().replace("../tle", str(MISSION.parent.parent / "tle"))
    mission = tmp_path / "thermal.yaml"
    text = re.sub(r"(?ms)^thermal:.*?(?=^\w)", THERMAL, text)
    assert THERMAL in text
    mission.write_text(text)
    with shared.attach() as daemon, daemon.lease(["b1"]) as lease:
        flight = fly(shared, daemon, lease, mission=mission)
        assert flight.state()["thermal"] == {"nodes": {"chip": 20.0}, "may_run": True, "label": "modelled"}
        began = time.monotonic()
        daemon.board("b1", lease).power.on()
        flight.clock(60.0, cause="test")
        until(lambda: not flight.state()["thermal"]["may_run"], 60, "for 12 W to warm the chip by 2 K")
        assert time.monotonic() - began > 2  # in wall time: at the clock's rate it would be a fraction of a second
        with urllib.request.urlopen(daemon.status()["metrics"]) as answer:
            body = answer.read().decode()
        assert 'hil_thermal_node_celsius{board="b1",node="chip"} 2' in body
        flight.end()
    hot = rows(shared, "SELECT node, temperature_c, may_run FROM thermal ORDER BY t_mono DESC LIMIT 1")
    assert hot[0][0] == "chip"
    assert hot[0][1] >= 22
    assert hot[0][2] == 0
    energy = rows(shared, "SELECT max(energy_j) - min(energy_j) FROM power WHERE soc IS NOT NULL")[0][0]
    assert hot[0][1] - 20 == pytest.approx(0.5 * energy / 12, abs=1.1)
    events = read_events(shared.run / "events.jsonl")
    assert [event["kind"] for event in events if event["kind"].startswith("thermal_")] == ["thermal_cutoff"]
    assert events[-1]["heat_ledger"]["heat_j"] == pytest.approx(0.5 * energy, abs=13)


def test_a_full_disk_makes_the_flight_fail_and_end_safely(shared: Lab) -> None:
    (shared.run).mkdir(parents=True)
    (shared.run / "events.jsonl").symlink_to("/dev/full")
    with shared.attach() as daemon, daemon.lease(["b1"]) as lease:
        flight = fly(shared, daemon, lease)
        daemon.board("b1", lease).power.on()
        with pytest.raises(BenchError, match="No space left"):
            flight.state()
        assert "No space left" in flight.end()["invalid"][0]
        assert not shared.supply.is_on()


def test_metrics_of_a_flight(shared: Lab) -> None:
    with shared.attach() as daemon, daemon.lease(["b1"]) as lease:
        address = daemon.status()["metrics"]
        flight = fly(shared, daemon, lease)
        daemon.board("b1", lease).power.on()
        before = scrape(address)
        flight.record_tokens("q1", 5, "payload")
        flight.flush()
        now = scrape(address)
        label = flight.state()["phase"]["label"]
        assert now[f'hil_orbit_phase{{board="b1",phase="{label}"}}'] == 1
        assert sum(value for key, value in now.items() if key.startswith("hil_orbit_phase") and "b1" in key) == 1
        tokens = f'hil_inference_output_tokens_total{{board="b1",phase="{label}"}}'
        assert now[tokens] - before[tokens] == 5
        assert 0 < now['hil_battery_state_of_charge_ratio{board="b1"}'] <= 1
        assert now['hil_bus_voltage_volts{board="b1"}'] > 12
        assert now['hil_mission_clock_rate{board="b1"}'] == 1
        flight.end()


def test_a_lost_supply_is_an_error_an_invalid_run_and_the_outputs_off(lab: Lab) -> None:
    with lab.attach() as daemon:
        lease = daemon.lease(["b1"])
        flight = fly(lab, daemon, lease)
        daemon.board("b1", lease).power.on()
        lab.supply.kill()  # the cable and the instrument at once: its outputs are off with it

        def failed() -> bool:
            try:
                flight.state()
            except BenchError as error:
                return "no measurement" in error.message or "is gone" in error.message or "connect" in error.message
            return False

        until(failed)
        lab.supply = SupplyProcess(lab.supply.port)
        assert not lab.supply.is_on()
    events = read_events(lab.run / "events.jsonl")
    assert [event["reason"] for event in events if event["kind"] == "invalid"]
    # The bench goes on when the supply is back: this daemon, or a new one when the dead-man had to end this one.
    with lab.attach() as daemon:
        daemon.board("b1", lease).power.on()
        assert lab.supply.is_on()
        lease.release()
        assert not lab.supply.is_on()


def test_a_killed_campaign_ends_the_flight_and_switches_off(shared: Lab) -> None:
    script = HOLDER.replace(
        "daemon.board(sys.argv[2], lease).power.on()\n",
        "flight = daemon.flight('b1', Path(sys.argv[3]), Path(sys.argv[4]), lease)\n"
        "daemon.board('b1', lease).power.on()\n",
    )
    argv = [sys.executable, "-c", script, str(shared.path), "b1", str(MISSION), str(shared.run)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    assert shared.supply.is_on()
    process.kill()
    process.communicate()
    until(lambda: not shared.supply.is_on())
    with shared.attach(start=False) as daemon:
        until(lambda: daemon.http.get("/v1/flight")["state"] == "ended")
        assert daemon.http.get("/v1/flight")["invalid"] == ["the lease ended: holder_died"]
    events = read_events(shared.run / "events.jsonl")
    assert [event["kind"] for event in events][-1] == "flight_ended"


def test_figures(shared: Lab, record_property: Callable[[str, object], None]) -> None:
    """Very loose bounds here; the figures themselves are for the report."""
    with shared.attach() as daemon:
        calls, leases = [], []
        for _ in range(50):
            start = time.perf_counter()
            daemon.http.get("/v1/leases")
            calls.append(time.perf_counter() - start)
        for _ in range(20):
            start = time.perf_counter()
            lease = daemon.lease(["b1"])
            leases.append(time.perf_counter() - start)
            lease.release()
        with daemon.lease(["b1"]) as lease:
            daemon.board("b1", lease).power.on()
            until(lambda: daemon.status()["boards"]["b1"]["power"])
            lateness = []
            for _ in range(20):
                lateness.append(daemon.status()["boards"]["b1"]["power"]["lateness_s"])
                time.sleep(0.1)
    figures = {
        "api_call_p50_ms": statistics.median(calls) * 1e3,
        "lease_acquire_p50_ms": statistics.median(leases) * 1e3,
        "power_loop_lateness_max_ms": max(lateness) * 1e3,
    }
    print(json.dumps(figures))
    for name, value in figures.items():
        record_property(name, round(value, 3))
    assert figures["api_call_p50_ms"] < 200
    assert figures["lease_acquire_p50_ms"] < 2000


def test_the_console_goes_through_the_daemon(lab: Lab, tmp_path: Path) -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    text = lab.path.read_text()
    lab.path.write_text(text.replace("b1: {", f"b1: {{console: {{port: {os.ttyname(slave)}}}, "))
    lab.bench = load_bench(lab.path)
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        board = daemon.board("b1", lease)
        watcher = daemon.board("b1")
        os.write(master, b"old life\r\nlogin: ")
        watcher.console.expect("login: ", 20, since=0)
        flight = fly(lab, daemon, lease)
        board.power.on()
        with pytest.raises(BoardError, match=r"(?s)did not come within.*nothing at all"):
            board.console.expect("login: ", 0.1)  # what it said before the power cycle does not count
        os.write(master, b"new life\r\nlogin: ")
        assert board.console.expect("login: ", 20).before == "new life\r\n"
        board.console.send("root")
        assert os.read(master, 100) == b"root\n"
        flight.end()
        assert daemon.status()["boards"]["b1"]["console"]["last_line"] == "login:"
        lease.release()
        with pytest.raises(BenchError, match="was released"):
            board.console.send("too late")
    assert (lab.run / "console/b1.log").read_bytes() == b"new life\r\nlogin: "
    assert (lab.bench.state_dir / "console/b1.log").read_bytes() == b"old life\r\nlogin: new life\r\nlogin: "
    os.close(master)
    os.close(slave)


def test_a_call_after_a_power_cut_that_was_not_the_clients_says_when_and_why(lab: Lab) -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    text = lab.path.read_text()
    lab.path.write_text(text.replace("b1: {", f"b1: {{console: {{port: {os.ttyname(slave)}}}, "))
    lab.bench = load_bench(lab.path)
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        board, same = daemon.board("b1", lease), daemon.board("b1", lease)
        for switch in (board.power.on, board.power.cycle, same.power.off, board.power.on):
            switch()
            board.console.read_available()  # its own doing is no surprise
        cuts = daemon.status()["boards"]["b1"]["power_epoch"]
        board.power.off()
        board.power.off()  # nothing to cut any more
        board.power.on()
        assert daemon.status()["boards"]["b1"]["power_epoch"] == cuts + 1
        # While it waits for the board, somebody pulls the output: the silence is not the board's fault.
        threading.Timer(0.3, lambda: lab.supply.ask(":OUTP CH1,OFF", ":OUTP? CH1")).start()
        with pytest.raises(BenchError, match=r"b1 was cut at 20\d\d-.*Z: tripped: the output went off by itself"):
            board.console.expect("never", 60)
        for call in (board.check, board.console.mark, lambda: board.console.send("x"), lambda: board.shell):
            with pytest.raises(BenchError, match="went off by itself"):
                call()
        board.accept_power_cut()
        board.console.mark()
        board.power.on()
        # A daemon that dies takes the power with it: the next one must not pass for the same.
        pid = daemon.status()["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: gone(pid))
        with pytest.raises(BenchError, match="dead-man has switched its outputs off"):
            until(lambda: board.console.mark() < 0)  # a dying process closes its sockets in its own time
        lab.attach().close()
        with pytest.raises(BenchError, match=r"was cut before .*: the daemon that knew this board then is gone"):
            board.check()
    os.close(master)
    os.close(slave)


def test_nobody_answers_without_a_daemon(lab: Lab) -> None:
    with pytest.raises(DaemonGone, match="no bench daemon answers"):
        Http(lab.bench.api_socket).get("/v1/status")
