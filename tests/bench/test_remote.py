"""Leases as other clients meet them: over TLS from another host, in line, in flash sections, at every mutating call."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_daemon import Lab, gone, until

from hil.bench.remote import Users
from hil.client import Bench, attach
from hil.client.http import DaemonGone
from hil.client.remote import Address, load_remote
from hil.errors import BenchError, HilError, UsageError
from hil.inventory import load_bench

HIL = [str(Path(sys.executable).parent / "hil")]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def changed(lab: Lab, old: str, new: str) -> None:
    text = lab.path.read_text()
    assert old in text
    lab.path.write_text(text.replace(old, new))
    lab.bench = load_bench(lab.path)


class Terminal:
    """A pseudo terminal in the place of a board's serial port."""

    def __init__(self, lab: Lab) -> None:
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave)
        changed(lab, "b1: {", f"b1: {{console: {{port: {os.ttyname(self.slave)}}}, ")

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


def opened(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `anna` in; her token is in the environment. Returns the bench's address."""
    changed(lab, "boards:\n", "remote: {port: 0}\nboards:\n")
    monkeypatch.setenv("HIL_BENCH_TOKEN", Users(lab.bench.state_dir).add("anna", time.time()))
    with lab.attach() as daemon:
        remote = daemon.status()["remote"]
    assert remote["listen"].startswith("127.0.0.1:")
    return f"https://{remote['listen']}#{remote['fingerprint']}"


def test_a_user_of_another_host_drives_a_board(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(lab)
    bench = load_remote(opened(lab, monkeypatch))
    assert list(bench.file.boards) == ["b1", "b2"]
    with attach(bench) as daemon, daemon.lease(["b1"], ttl_s=3.0) as lease:
        (held,) = daemon.leases()
        assert held["holder"].startswith("anna: ")
        assert held["pid"] is None
        board = daemon.board("b1", lease)
        assert 14.9 < board.power.on().voltage_v < 15.1
        assert lab.supply.is_on()
        watcher = daemon.board("b1")
        os.write(terminal.master, b"U-Boot\r\nlogin: ")
        assert board.console.expect("login: ", 5).before.endswith("U-Boot\r\n")
        os.write(terminal.master, bytes(range(32, 127)) * 3000 + b"\r\ndone\r\n")
        assert len(board.console.expect("done\r\n", 10).before) == 95 * 3000 + 2
        os.write(terminal.master, b"for all")
        watcher.console.expect("for all", 5, since=0)
        time.sleep(3.5)  # renewed meanwhile
        board.console.send("root")
        assert os.read(terminal.master, 100) == b"root\n"
        with pytest.raises(UsageError, match="/v1/stop is for the bench's own host"):
            daemon.stop(force=True)
        with pytest.raises(UsageError, match="own host"):
            daemon.flight("b1", lab.path, lab.run, lease)
        lease.release()
        assert not lab.supply.is_on()
        with pytest.raises(BenchError, match="was released"):
            board.console.send("late")
    terminal.close()


def test_only_the_right_bench_and_only_known_users(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(lab)
    url = opened(lab, monkeypatch)
    front, pinned = url.split("#")
    users = Users(lab.bench.state_dir)
    with pytest.raises(BenchError, match=f"another certificate.*{pinned}"):
        load_remote(f"{front}#{'0' * 64}")
    with pytest.raises(UsageError, match="does not say which certificate"):
        load_remote(front)
    bench = load_remote(url)
    with attach(bench) as daemon:
        daemon.status()
        users.remove("anna")
        with pytest.raises(UsageError, match="no such user token"):  # on a connection that stands, too
            daemon.status()
        with pytest.raises(UsageError, match="no such user token"):
            daemon.board("b1").console.expect("x", 1)
        assert users.list() == {}
        monkeypatch.setenv("HIL_BENCH_TOKEN", users.add("anna", time.time()))
    with attach(bench) as daemon:
        daemon.status()
        assert (lab.bench.state_dir / "users.json").stat().st_mode & 0o077 == 0
        assert (lab.bench.state_dir / "tls-key.pem").stat().st_mode & 0o077 == 0
        assert os.environ["HIL_BENCH_TOKEN"] not in (lab.bench.state_dir / "users.json").read_text()
    for old in (ssl.TLSVersion.TLSv1_2,):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, old
        address = Address.of(url)
        with socket.create_connection((address.host, address.port)) as raw, pytest.raises(ssl.SSLError):
            context.wrap_socket(raw)
    monkeypatch.delenv("HIL_BENCH_TOKEN")
    with pytest.raises(UsageError, match="no user token"):
        load_remote(url)
    terminal.close()


def test_a_user_who_is_removed_loses_the_lease_and_the_board_is_switched_off(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load_remote(opened(lab, monkeypatch))
    with lab.attach() as local, attach(bench) as daemon:
        lease = daemon.lease(["b1"], ttl_s=600.0, renew=False)
        daemon.board("b1", lease).power.on()
        assert lab.supply.is_on()
        users = Users(lab.bench.state_dir)
        monkeypatch.setenv("HIL_BENCH_TOKEN", users.add("bert", time.time()))
        with attach(bench) as other, other.lease(["b2"], ttl_s=600.0, renew=False):
            users.remove("anna")
            until(lambda: not lab.supply.is_on(), 10)
            until(lambda: [held["boards"] for held in local.leases()] == [["b2"]])
        with local.lease(["b1"], wait_s=10):  # free for the next one
            assert "user_removed" in lab.log()


def test_a_client_of_another_host_that_vanishes_keeps_its_board_until_the_ttl(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load_remote(opened(lab, monkeypatch))
    daemon = attach(bench)
    asked = time.monotonic()
    lease = daemon.lease(["b1"], ttl_s=3.0, renew=False)
    daemon.board("b1", lease).power.on()
    daemon.close()  # its connections; the process goes on, but nobody there could tell
    with lab.attach() as local:
        until(lambda: not lab.supply.is_on())
        assert time.monotonic() - asked > 2.9
        until(lambda: not local.leases())
    with attach(bench) as again, pytest.raises(BenchError, match=f"lease {lease.id} ran out"):
        again.board("b1", lease).power.on()


def listening(pid: int) -> set[str]:
    """Addresses, in the kernel's hexadecimal, on which a process takes TCP connections."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
        inodes |= {found.group(1)} if found else set()
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_nothing_listens_beyond_this_host_unless_the_bench_file_says_so(lab: Lab) -> None:
    with lab.attach() as daemon:
        status = daemon.status()
        assert status["remote"] is None
        assert listening(status["pid"]) == {"0100007F"}
        soft, hard = resource.prlimit(status["pid"], resource.RLIMIT_NOFILE)
        assert soft == (65536 if hard == resource.RLIM_INFINITY else min(hard, 65536))
        assert lab.bench.runtime_dir.stat().st_mode & 0o077 == 0
        assert lab.bench.api_socket.stat().st_mode & 0o077 == 0


def test_every_mutating_call_needs_the_lease(lab: Lab) -> None:
    """Found from the interface's own description, so that a new call cannot be forgotten."""
    free = {"/v1/leases", "/v1/stop"}  # asking for a lease; ending the daemon, which is refused while boards are leased
    bodies: dict[str, Any] = {
        "/v1/flights": {"board": "b1", "mission_path": "x", "run_dir": "x"},
        "/v1/flight/clock": {"rate": 1.0},
        "/v1/flight/record": {"table": "tokens", "rows": []},
        "/v1/flight/event": {"kind": "x"},
        "/v1/boards/{board}/power": {"action": "off"},
        "/v1/boards/{board}/flash": {"grace_s": 1.0},
        "/v1/boards/{board}/link": {"uplink": {}, "downlink": {}},
    }
    with lab.attach() as daemon:
        calls = [
            (method.upper(), path)
            for path, methods in daemon.http.get("/v1/openapi.json")["paths"].items()
            for method in methods
            if method != "get" and path not in free
        ]
        assert len(calls) > 10
        with daemon.lease(["b2"]) as other:
            for method, path in calls:
                for token in (None, "guess", other.token):
                    where = path.replace("{board}", "b1").replace("{lease}", "L1-abc").replace("{line}", "reset")
                    where = where.replace("{name}", "reset")
                    body = bodies.get(path, {} if method in ("POST", "PUT") else None)
                    with pytest.raises(HilError) as refused:
                        daemon.http.call(method, where, body, token=token)
                    said = str(refused.value)
                    known = r"lease|no flight is running|Field required|Input should|no line|missing"
                    assert re.search(known, said), f"{method} {path} said {said}"
            assert not lab.supply.is_on(1)


def test_the_line_is_told_and_served(lab: Lab) -> None:
    def hil(*words: str) -> str:
        done = subprocess.run([*HIL, *words, "--bench", str(lab.path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with lab.attach() as daemon:
        first = daemon.lease(["b1"], reason="soak test")
        order: list[str] = []

        def wait(name: str, priority: int) -> None:
            with lab.attach() as other, other.lease(["b1"], wait_s=200, priority=priority, holder=name):
                order.append(name)

        threads = []
        for place, (name, priority) in enumerate((("low", -1), ("high", 5))):
            threads.append(threading.Thread(target=wait, args=(name, priority)))
            threads[-1].start()
            until(lambda place=place: len(daemon.waiting()) == place + 1)
        text = hil("lease", "list")
        assert re.search(r"b1 .* since 20\d\d-.*Z  while process \d+ lives  soak test", text)
        assert re.search(r"1\. waits for b1: high .*priority 5.*\n   board b1 is leased by .*soak test", text)
        assert re.search(r"2\. waits for b1: low .*\n   board b1 is leased .*; high is ahead in the line for b1", text)
        rows = json.loads(hil("lease", "list", "--json"))
        assert [row["holder"] for row in rows["waiting"]] == ["high", "low"]
        assert rows["leases"][0]["since"] < rows["leases"][0]["until"]
        shown = json.loads(hil("board", "show", "b1", "--json"))
        assert shown["lease"]["reason"] == "soak test"
        assert shown["power"]["state"] == "off"
        assert shown["wiring"]["power"][0]["channel"] == 1
        first.release()
        for thread in threads:
            thread.join(60)
        assert order == ["high", "low"]


def test_a_flash_section_outlives_its_holder_for_its_grace(lab: Lab) -> None:
    script = """
import sys, time
from pathlib import Path
from hil.client import attach
from hil.inventory import load_bench
daemon = attach(load_bench(Path(sys.argv[1])))
lease = daemon.lease(["b1"])
board = daemon.board("b1", lease)
board.power.on()
with board.flash_section(grace_s=3.0):
    print("flashing", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(lab.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "flashing\n"
    killed = time.monotonic()
    process.kill()
    process.communicate()
    with lab.attach() as daemon:
        until(lambda: not daemon.leases())
        assert lab.supply.is_on()
        with daemon.lease(["b1"], wait_s=30):
            assert time.monotonic() - killed > 2.9
            assert not lab.supply.is_on()


def test_a_board_is_shut_down_before_it_is_switched_off(lab: Lab) -> None:
    changed(lab, '"off"}', "{shutdown_then_off: {timeout_s: 20}}}")
    terminal = Terminal(lab)
    heard: list[bytes] = []

    def board() -> None:
        heard.append(os.read(terminal.master, 100))
        time.sleep(0.5)
        heard.append(b"on" if lab.supply.is_on() else b"off")
        os.write(terminal.master, b"\r\n[  42.0] reboot: Power down\r\n")

    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        daemon.board("b1", lease).power.on()
        thread = threading.Thread(target=board)
        thread.start()
        lease.release()
        thread.join(30)
        assert not lab.supply.is_on()
    assert heard == [b"\x03\rpoweroff\r", b"on"]
    assert "shut down over its console" in lab.log()
    terminal.close()


def test_who_waits_is_told_that_the_daemon_ends(lab: Lab) -> None:
    with lab.attach() as daemon, lab.attach() as other:
        daemon.lease(["b1"], ttl_s=60)
        said: list[str] = []

        def ask() -> None:
            try:
                other.lease(["b1"], wait_s=20)
            except HilError as error:
                said.append(error.message)

        thread = threading.Thread(target=ask)
        thread.start()
        until(daemon.waiting)
        daemon.stop(force=True)
        thread.join(30)
        assert said == ["the bench daemon is ending"]


def test_who_waits_is_told_when_the_daemon_is_killed_and_who_holds_goes_on(lab: Lab) -> None:
    with lab.attach() as daemon:
        lease = daemon.lease(["b1"], ttl_s=60)
        pid = daemon.status()["pid"]

        def ask(bench: Bench) -> None:
            with pytest.raises((DaemonGone, BenchError)):
                bench.lease(["b1"], wait_s=20)

        with lab.attach() as other:
            thread = threading.Thread(target=ask, args=(other,))
            thread.start()
            until(lambda: daemon.waiting())
            os.kill(pid, signal.SIGKILL)
            thread.join(30)
            assert not thread.is_alive()
        until(lambda: gone(pid))
    with lab.attach() as again:
        assert [held["lease"] for held in again.leases()] == [lease.id]
        assert again.waiting() == []
    lease.release()


TESTS_OF_A_LAB = """
import os, pytest, time

def driven(board):
    # Whoever else drove this board at the same time would have the file.
    mark = os.open(os.path.join(os.environ["MARKS"], board.name), os.O_CREAT | os.O_EXCL)
    board.power.on()
    time.sleep(0.2)
    assert board.power.read().output_on
    os.close(mark)
    os.unlink(os.path.join(os.environ["MARKS"], board.name))
    print(os.environ["PYTEST_XDIST_WORKER"], board.name)

@pytest.mark.parametrize("n", range(4))
def test_one(board, n):
    driven(board)

@pytest.mark.board(name="b2")
@pytest.mark.board(name="b1")
def test_both(boards):
    assert [board.name for board in boards] == ["b2", "b1"]
    for board in boards:
        driven(board)
"""


def test_pytest_workers_share_the_boards(lab: Lab, tmp_path: Path) -> None:
    changed(lab, "on_lease_end: hold", 'on_lease_end: "off"')
    (tmp_path / "lab").mkdir()
    (tmp_path / "marks").mkdir()
    (tmp_path / "lab/test_lab.py").write_text(TESTS_OF_A_LAB)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-q", "-rP", "-p", "no:cacheprovider", f"--bench={lab.path}", "."],
        cwd=tmp_path / "lab",
        env={**os.environ, "MARKS": str(tmp_path / "marks")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "5 passed" in done.stdout, done.stdout + done.stderr
    used = {tuple(line.split()) for line in done.stdout.splitlines() if line.startswith("gw")}
    assert {board for _, board in used} == {"b1", "b2"}
    assert len({worker for worker, _ in used}) > 1
    assert not lab.supply.is_on(1)


def test_the_doctor_says_what_cannot_fly_and_exits_with_3(lab: Lab) -> None:
    def doctor() -> tuple[int, dict[tuple[str, str], tuple[bool | None, str]]]:
        words = [*HIL, "doctor", "--bench", str(lab.path), "--json"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        told = json.loads(done.stdout)
        assert told["can_fly"] is (done.returncode == 0), done.stdout
        return done.returncode, {(row["fixture"], row["what"]): (row["ok"], row["found"]) for row in told["checks"]}

    code, rows = doctor()
    assert code == 0, rows
    assert rows["psu1", "supply answers"][0] is True
    assert {("host", "versions"), ("host", "clock"), ("host", "disk space"), ("here", "disk space")} <= rows.keys()
    assert {("b1", "power"), ("b2", "power"), ("daemon", "answers")} <= rows.keys()
    with lab.attach() as daemon:
        daemon.stop()
    lab.supply.kill()
    code, rows = doctor()
    assert code == 3
    ok, why = rows["psu1", "supply answers"]
    assert ok is False
    assert "Connect call failed" in why
    with lab.attach() as daemon:
        daemon.stop()
    text = lab.path.read_text()
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        lab.path.write_text(f"{text}metrics_port: {squatter.getsockname()[1]}\n")
        code, rows = doctor()
    assert code == 3
    assert rows["daemon", "answers"][0] is False
    assert "in use" in rows["daemon", "answers"][1]
    assert ("host", "clock") in rows
