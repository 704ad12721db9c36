"""The fault matrix: whatever fails while a board is on and begins to draw too much, the output goes off, measured.

Each row of docs/safety.md is a test here. The board draws 12 W and, from the moment of the fault on, 35 W of the 30 W
that its type allows: so the joules beyond its envelope measure what each layer of safety lets through. A run with
`--write-safety-table` writes the table. Five rows are in `make test`; the others, some ten seconds each, in `make
soak`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from host import Host
from matrix import OVERLOAD_W, POWER_MAX_W, SAFETY_ROWS, Lab, MakeLab, Outcome, kill, until

from hil.client import attach
from hil.errors import HilError

#: What each row is: the fault, and how long off may take at most.
ROWS: dict[str, tuple[str, float]] = {
    "overload": ("nothing but the board's overload", 1.5),
    "kill-9": ("the daemon is killed with SIGKILL", 2.0),
    "sigstop": ("the daemon is stopped with SIGSTOP", 3.0),
    "out-of-memory": ("the kernel's out-of-memory killer takes the daemon (memory cgroup; from the request on)", 6.0),
    "memory-refused": ("every further allocation of the daemon fails (RLIMIT_AS)", 4.0),
    "deadman-killed": ("the dead-man is killed", 2.0),
    "deadman-stopped": ("the dead-man is stopped", 5.0),
    "unplugged": ("the supply's plug is pulled for 3 s: connections reset, then refused", 8.0),
    "black-hole": ("the network swallows everything for 3 s", 8.0),
    "black-hole-outlet": ("the network swallows everything for good; there is an outlet", 12.0),
    "black-hole-watchdog": ("the network swallows everything for good; the supply has a watchdog of 2 s", 6.0),
    "ignored-off-outlet": ("the supply ignores every off; there is an outlet", 15.0),
    "two-owners": ("a second bench wants the same supply", 1.5),
    "stranger": ("a stranger on the network sets 25 V", 1.5),
    "clock-step": ("the wall clock jumps a day ahead, then two back; then the daemon is killed", 2.0),
    "disk-full": ("the disk takes nothing more", 5.0),
    "disk-full-kill": ("the disk takes nothing more, and the daemon is killed", 2.0),
    "stale-output": ("daemon and dead-man are killed at once; the next client starts the bench", 8.0),
    "clear-after-trip": ("a protection trips on a supply whose clear restores the output", 1.0),
    "teardown-flight": ("the daemon ends; ending its flight raises", 6.0),
    "teardown-calm": ("the daemon ends; disarming raises", 6.0),
    "teardown-off": ("the daemon ends; switching the board off raises", 6.0),
    "teardown-power-off": ("the daemon ends; the off sequence itself raises", 8.0),
    "teardown-rest": ("the daemon ends; ending the power loop raises", 6.0),
    "teardown-link": ("the daemon ends; clearing the link raises", 6.0),
    "teardown-console": ("the daemon ends; closing the console raises", 6.0),
    "teardown-supply": ("the daemon ends; closing the supply raises", 6.0),
    "teardown-journal": ("the daemon ends; closing the intent raises", 8.0),
    "teardown-deadman": ("the daemon ends; stopping the dead-man raises", 6.0),
}
BROKEN = {
    "teardown-flight": "hil.bench.flight:FlightControl.end",
    "teardown-calm": "hil.bench.board:BoardOwner.calm",
    "teardown-off": "hil.bench.board:BoardOwner.off",
    "teardown-power-off": "hil.bench.safety:power_off",
    "teardown-rest": "hil.bench.board:BoardOwner.rest",
    "teardown-link": "hil.bench.player:LinkOwner.close",
    "teardown-console": "hil.bench.consoles:Console.stop",
    "teardown-supply": "hil.drivers.scpi:ScpiSupply.close",
    "teardown-journal": "hil.bench.safety:IntentJournal.closed",
    "teardown-deadman": "hil.bench.deadman:Deadman.stop",
}
MISSION = Path(__file__).resolve().parents[2] / "fixtures/missions/short.yaml"


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    return make_lab()


@pytest.fixture
def tell(host: Host, request: pytest.FixtureRequest) -> Callable[[str, Outcome, str], None]:
    """Judge a row by its limit, and keep it for the table."""

    def judge(row: str, outcome: Outcome, cut_by: str) -> None:
        fault, limit_s = ROWS[row]
        entry = {"row": row, "fault": fault, "joules": outcome.joules, "seconds": outcome.seconds, "cut_by": cut_by}
        request.config.stash[SAFETY_ROWS].append(entry)
        print(f"{row}: {outcome.seconds:.2f} s, {outcome.joules:.2f} J, {cut_by}")
        host.excuses(row, outcome.seconds, limit_s)
        # No more than the overload itself can have delivered, and a little for what the supply's meter adds.
        assert outcome.joules <= (OVERLOAD_W - POWER_MAX_W) * (outcome.seconds + 0.1) or row == "stranger"

    return judge


Tell = Callable[[str, Outcome, str], None]


# ------------------------------------------------------------------------------------------ daemon and dead-man die
def test_overload(lab: Lab, tell: Tell) -> None:
    with lab.powered():
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        tell("overload", meter.until_off(10), lab_closed(lab))
        assert "W measured, more than the board's 30 W" in lab.cut_by()


@pytest.mark.parametrize(("row", "number"), [("kill-9", signal.SIGKILL), ("sigstop", signal.SIGSTOP)])
def test_a_daemon_that_ends_or_hangs(lab: Lab, tell: Tell, row: str, number: signal.Signals) -> None:
    with lab.powered() as (daemon, _, _):
        pid, _ = lab.pids(daemon)
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        os.kill(pid, number)
        tell(row, meter.until_off(10), lab_closed(lab))
    assert lab.cut_by() == "dead-man"


@contextlib.contextmanager
def memory_group() -> Iterator[tuple[Path, Path]]:
    """A memory cgroup that this process and what it starts belong to, and the file that leads home.

    Skips where this host lets nobody make one.
    """
    root = Path("/sys/fs/cgroup/memory")
    mine = [line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
    home = root / (mine[0].strip("/") if mine else "") / "cgroup.procs"
    group = root / f"hil-matrix-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        pytest.skip(f"this host lets nobody make a memory cgroup: {error}")
    try:
        yield group, home
    finally:
        home.write_text(str(os.getpid()))
        until(lambda: not (group / "cgroup.procs").read_text().strip(), 15, "for the group to empty")
        group.rmdir()


def send_all_but_the_end(sock: socket.socket, daemon: Path) -> None:
    """The largest request there may be, without its last byte: the daemon keeps it in memory and waits."""
    sock.settimeout(5)
    with contextlib.suppress(OSError):  # it may be dead by now
        sock.connect(str(daemon))
        head = f"POST /v1/flight/record HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 20}\r\n\r\n"
        sock.sendall(head.encode() + b"x" * ((1 << 20) - 1))


@pytest.mark.soak
def test_out_of_memory(lab: Lab, tell: Tell) -> None:
    """Daemon and dead-man share what memory there is: the kernel must choose the daemon."""
    with memory_group() as (group, home), lab.powered() as (daemon, _, _):
        pid, deadman = lab.pids(daemon)
        home.write_text(str(os.getpid()))  # the rest of this test is not meant
        used = int((group / "memory.usage_in_bytes").read_text())
        (group / "memory.limit_in_bytes").write_text(str(used + (8 << 20)))
        with contextlib.suppress(OSError):  # no swap either, where that is accounted for
            (group / "memory.memsw.limit_in_bytes").write_text(str(used + (8 << 20)))
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            for _ in range(64):
                send_all_but_the_end(stack.enter_context(socket.socket(socket.AF_UNIX)), lab.bench.api_socket)
            until(lambda: not running(pid), 10, "for the kernel's killer")
        killed = (group / "memory.oom_control").read_text()
        tell("out-of-memory", meter.until_off(20, since_s=began), lab_closed(lab))
        assert "oom_kill 1" in killed.splitlines(), killed
        until(lambda: not running(deadman), 10, "for the dead-man to have done its work")


@pytest.mark.soak
def test_memory_refused(lab: Lab, tell: Tell) -> None:
    with lab.powered() as (daemon, _, _):
        pid, _ = lab.pids(daemon)
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        with contextlib.suppress(HilError):
            rows = [{"query": "x" * 100}] * 9000  # as much as a request may bring
            daemon.http.call("POST", "/v1/flight/record", {"table": "tokens", "rows": rows}, timeout_s=5)
        tell("memory-refused", meter.until_off(15), lab_closed(lab))
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.soak
@pytest.mark.parametrize(("row", "number"), [("deadman-killed", signal.SIGKILL), ("deadman-stopped", signal.SIGSTOP)])
def test_a_dead_man_that_ends_or_hangs(lab: Lab, tell: Tell, row: str, number: signal.Signals) -> None:
    with lab.powered() as (daemon, _, _):
        _, deadman = lab.pids(daemon)
        meter = lab.meter()  # without an overload: the loop would cut for that first
        os.kill(deadman, number)
        tell(row, meter.until_off(15), lab_closed(lab))
        assert "dead-man process is gone" in lab.cut_by()
        until(lambda: daemon.status()["deadman"]["alive"], 10, "for a new dead-man")


# ----------------------------------------------------------------------------------------------------- faulty wires
@pytest.mark.soak
@pytest.mark.parametrize("row", ["unplugged", "black-hole"])
def test_a_wire_that_comes_back(lab: Lab, tell: Tell, row: str) -> None:
    with lab.powered():
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        lab.proxy.cut() if row == "unplugged" else lab.proxy.swallow()
        time.sleep(3.0)
        assert lab.truth.is_on  # nothing could reach it
        lab.proxy.heal()
        tell(row, meter.until_off(20), lab_closed(lab))


@pytest.mark.soak
def test_a_black_hole_in_front_of_an_outlet(make_lab: MakeLab, tell: Tell) -> None:
    lab = make_lab(outlet=True)
    with lab.powered():
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        lab.proxy.swallow()
        tell("black-hole-outlet", meter.until_off(30), lab_closed(lab))
    assert lab.plug is not None
    assert not lab.plug.on
    assert "says off" in lab.cut_by()


@pytest.mark.soak
def test_a_black_hole_in_front_of_a_watchdog(make_lab: MakeLab, tell: Tell) -> None:
    lab = make_lab(model="keysight-n6700", more=", watchdog_s: 2, accept_level: A")
    with lab.powered():
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        lab.proxy.swallow()
        tell("black-hole-watchdog", meter.until_off(20), "the supply's watchdog")
    assert int(lab.ask("STAT:QUES:COND? (@1)")) & 2048


@pytest.mark.soak
def test_a_supply_that_ignores_off_in_front_of_an_outlet(make_lab: MakeLab, tell: Tell) -> None:
    lab = make_lab(outlet=True)
    with lab.powered():
        lab.truth.do("fault", kind="ignore", match="OUTP CH1,OFF", count=-1)
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        tell("ignored-off-outlet", meter.until_off(30), lab_closed(lab))
    assert "says off" in lab.cut_by()


# ------------------------------------------------------------------------------------------------------ two owners
@pytest.mark.soak
def test_two_owners(lab: Lab, tell: Tell) -> None:
    rival = lab.write_bench("rival", lab.proxy.port)
    with lab.powered() as (daemon, _, _):
        argv = [sys.executable, "-m", "hil.bench.daemon", str(rival)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
        # The daemon's own log says it; its exit code and that the board stays on are what is judged here.
        assert done.returncode == 3, done.stderr
        assert lab.truth.is_on
        assert daemon.status()["boards"]["b1"]["state"] == "on"
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        tell("two-owners", meter.until_off(10), lab_closed(lab))


@pytest.mark.soak
def test_a_stranger_on_the_network(lab: Lab, tell: Tell) -> None:
    with lab.powered() as (daemon, _, _):
        meter = lab.meter()
        lab.tell(":SOUR1:VOLT 25")
        tell("stranger", meter.until_off(10), lab_closed(lab))
        until(lambda: daemon.status()["boards"]["b1"]["state"] == "tripped")
    assert "ovp" in lab.cut_by()
    assert max(volts for _, volts, _, _ in meter.samples) < 21.0


# --------------------------------------------------------------------------------------------------- clock and disk
@pytest.mark.soak
def test_clock_step(make_lab: MakeLab, tell: Tell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    monkeypatch.setenv("MATRIX_CLOCK", str(clock))
    lab = make_lab()
    with lab.powered() as (daemon, lease, board):
        for step_s in (86_400, -172_800):
            clock.write_text(str(step_s))
            time.sleep(1.5)  # longer than any silence or staleness that is tolerated
            assert lab.truth.is_on
            lease.renew()
            assert board.power.read().output_on
        stepped = json.loads(lab.journal.read_text().splitlines()[-1])["t_wall"]
        assert abs(stepped - time.time()) < 600  # written before the step; the next one is not
        pid, _ = lab.pids(daemon)
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        os.kill(pid, signal.SIGKILL)
        tell("clock-step", meter.until_off(10), lab_closed(lab))
    last = json.loads(lab.journal.read_text().splitlines()[-1])
    assert last["t_wall"] < time.time() - 80_000  # the dead-man's wall clock was stepped too, and it did not matter
    assert last["how"] == "dead-man"


@pytest.mark.soak
@pytest.mark.parametrize("row", ["disk-full", "disk-full-kill"])
def test_a_full_disk(lab: Lab, tell: Tell, row: str) -> None:
    with lab.powered() as (daemon, _, _):
        pids = lab.pids(daemon)
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
        meter = lab.meter()
        lab.load(OVERLOAD_W)
        if row == "disk-full-kill":
            os.kill(pids[0], signal.SIGKILL)
        tell(row, meter.until_off(15), "dead-man" if row == "disk-full-kill" else "power loop")
    until(lambda: not any(map(running, pids)), 20, "for a daemon to end that cannot write its journal")
    assert lab.cut_by() == ""  # nobody could write it down: the next start finds the intent open
    attach(lab.bench).close()
    assert lab.cut_by() == "leftover of a dead run"


# ---------------------------------------------------------------------------------------------- what is left behind
def test_stale_output(lab: Lab, tell: Tell) -> None:
    with lab.powered() as (daemon, _, _):
        pid, deadman = lab.pids(daemon)
        os.kill(deadman, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        kill(deadman)
        time.sleep(1.5)
    assert lab.truth.is_on  # nobody is left
    meter = lab.meter()
    lab.load(OVERLOAD_W)
    with attach(lab.bench) as daemon:
        tell("stale-output", meter.until_off(20), lab_closed(lab))
        assert daemon.status()["boards"]["b1"]["state"] == "off"
    assert lab.cut_by() == "leftover of a dead run"


def test_clear_after_trip(make_lab: MakeLab, tell: Tell) -> None:
    lab = make_lab(model="keysight-n6700")
    with lab.powered() as (daemon, _, board):
        meter = lab.meter()
        lab.truth.do("trip", channel=1, kind="ovp")
        tell("clear-after-trip", meter.until_off(10), "the supply's protection")
        until(lambda: daemon.status()["boards"]["b1"]["state"] == "tripped")
        watch = lab.meter()
        began = time.monotonic()
        board.power.on()
        watch.stop()
        first_on = next(t for t, _, _, on in watch.samples if on)
        assert first_on - began >= 0.25  # not by the clear, but after the off dwell
        edges = [on for _, _, _, on in watch.samples]
        assert sum(a != b for a, b in itertools.pairwise(edges)) == 1
        assert board.power.read().output_on


# ----------------------------------------------------------------------------------------------- a broken teardown
@pytest.mark.soak
@pytest.mark.parametrize("row", sorted(BROKEN))
def test_an_exception_in_each_step_of_the_teardown(
    make_lab: MakeLab, tell: Tell, row: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MATRIX_BREAK", BROKEN[row])
    lab = make_lab(link=row == "teardown-link")
    with lab.powered() as (daemon, lease, _):
        pid, _ = lab.pids(daemon)
        if row == "teardown-flight":
            daemon.flight("b1", MISSION, tmp_path / "run", lease, 0.0)
        meter = lab.meter()
        os.kill(pid, signal.SIGTERM)
        tell(row, meter.until_off(30), lab_closed(lab))
        until(lambda: not running(pid), 20, "for the daemon to end")
    log = (lab.bench.state_dir / "daemon.log").read_text()
    assert "broken on purpose" in log, log[-2000:]


# ---------------------------------------------------------------------------------------------------------- helpers
def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] not in "ZX"
    return False


def lab_closed(lab: Lab) -> str:
    """Who closed the intent; the entry follows the measured volts by a write to the disk."""
    with contextlib.suppress(AssertionError):
        until(lab.cut_by, 20)
    return lab.cut_by()
