"""The dead-man with real processes: whatever happens to the daemon, the supply says off within two seconds.

Three processes: a virtual supply, a stand-in daemon that holds an output on and beats, and the dead-man it spawned. The
test asks the supply through a plain socket and shares no code with the cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host

from hil.bench.deadman import ROUND_S, ArmedOutput, CutResult, Deadman, _Watchman
from hil.bench.safety import Intent, IntentJournal

ROOT = Path(__file__).parents[2]

SUPPLY = """
import asyncio
from hil.virtual.supply import RecordedLoad, VirtualSupply

async def main():
    supply = VirtualSupply(loads={1: RecordedLoad(((0.0, 6.0),))})
    await supply.start()
    print(supply.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

DAEMON = """
import asyncio, os, sys, time
from pathlib import Path
from hil.bench.deadman import ArmedOutput, Deadman
from hil.bench.safety import Envelope, Intent, IntentJournal, power_on
from hil.drivers.scpi import ScpiSupply
from hil.model import Setpoint

async def main():
    port, state, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    address = f"tcp://127.0.0.1:{port}"
    journal = IntentJournal(state / "intent.jsonl")
    deadman = Deadman(journal.path, silence_s=1.0, log=state / "deadman.log")
    await deadman.start()
    intent = Intent("vb1", address, "rigol-dp800", 1, 0.6)
    envelope = Envelope(9, 19, 2.5, 30, 20, 2.8, inrush_s=0.05, off_dwell_s=0.0)
    async def beats():
        while True:
            deadman.beat("vb1")
            await asyncio.sleep(0.1)
    beating = asyncio.create_task(beats())
    supply = ScpiSupply("rigol-dp800", address)
    await power_on(supply, 1, envelope, Setpoint(15, 2), journal, intent,
                   armed=lambda: deadman.set_outputs([ArmedOutput("vb1", intent)]))
    if mode == "fork":
        if os.fork() == 0:
            time.sleep(60)  # a child that inherited every descriptor, the heartbeat's too
            os._exit(0)
    print(deadman.pid, flush=True)
    if mode == "hang":
        await asyncio.sleep(0.3)
        time.sleep(60)  # the loop is stuck: alive, but no longer feeding the heartbeat
    if mode == "leave":
        return  # an end with an output that could not be verified off: the dead-man must live on
    await deadman.dead.wait()
    await supply.output(1, False)
    print("safe", flush=True)

asyncio.run(main())
"""


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, f"the process ended with {process.poll()}"
    return line


def end_session(process: subprocess.Popen[str]) -> None:
    """Kill what the test spawned, children included: each has a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    if process.stdout:
        process.stdout.close()


@pytest.fixture
def supply() -> Iterator[int]:
    process = spawn(SUPPLY)
    yield int(read_line(process))
    end_session(process)


class Bench:
    """The stand-in daemon with its output on, and the questions a person with a plain socket would ask."""

    def __init__(self, port: int, state: Path, mode: str = "run") -> None:
        self.port, self.state = port, state
        self.daemon = spawn(DAEMON, port, state, mode)
        self.deadman_pid = int(read_line(self.daemon))
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.lines = self.socket.makefile("rb")

    def ask(self, question: str) -> str:
        self.socket.sendall(question.encode() + b"\n")
        return self.lines.readline().decode().strip()

    def seconds_until_off(self, since: float, limit_s: float = 30.0) -> tuple[float, float]:
        """(output off, measured below 0.6 V), both since `since`."""
        off = None
        while time.monotonic() - since < limit_s:
            if off is None and self.ask(":OUTP? CH1") == "OFF":
                off = time.monotonic() - since
            if off is not None and float(self.ask(":MEAS:VOLT? CH1")) < 0.6:
                return off, time.monotonic() - since
            time.sleep(0.005)
        raise AssertionError(f"still on after {limit_s} s")

    def wait_for_exit(self, pid: int) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if (
                not Path(f"/proc/{pid}").exists()
                or Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"
            ):
                return
            time.sleep(0.01)
        raise AssertionError(f"process {pid} is still there")

    def close(self) -> None:
        self.lines.close()
        self.socket.close()
        end_session(self.daemon)
        # Its output is still armed and its supply about to vanish: it would go on trying for minutes.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.deadman_pid, signal.SIGKILL)


@pytest.fixture
def bench(request: pytest.FixtureRequest, supply: int, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(supply, tmp_path, getattr(request, "param", "run"))
    assert made.ask(":OUTP? CH1") == "ON"
    yield made
    made.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("seed", range(2))
def test_killed_or_stopped_at_a_random_moment_the_output_is_off_within_two_seconds(
    bench: Bench, host: Host, number: signal.Signals, seed: int
) -> None:
    time.sleep(random.Random(seed).uniform(0.0, 0.3))
    start = time.monotonic()
    os.kill(bench.daemon.pid, number)
    off, discharged = bench.seconds_until_off(start)
    host.excuses(f"off after {off:.3f} s, below 0.6 V", discharged, 2.0)
    assert bench.daemon.wait(20) == -signal.SIGKILL
    bench.wait_for_exit(bench.deadman_pid)
    assert IntentJournal(bench.state / "intent.jsonl").open_intents() == ()
    report = json.loads((bench.state / "deadman.log").read_text())
    assert report["off"] is True
    assert report["reason"].startswith("no heartbeat of vb1" if number == signal.SIGSTOP else "the daemon")
    if number == signal.SIGSTOP:
        assert re.search(
            r"; the daemon is in state T\b.*, ran 0 ms of its last \d+ ms and waited 0 ms", report["reason"]
        )


@pytest.mark.parametrize("bench", ["hang"], indirect=True)
def test_a_hung_event_loop_is_killed_and_cut(bench: Bench) -> None:
    bench.seconds_until_off(time.monotonic())
    assert bench.daemon.wait(20) == -signal.SIGKILL


@pytest.mark.parametrize("bench", ["fork"], indirect=True)
def test_a_child_that_inherited_everything_does_not_hide_the_death(bench: Bench, host: Host) -> None:
    start = time.monotonic()
    os.kill(bench.daemon.pid, signal.SIGKILL)
    _, discharged = bench.seconds_until_off(start)
    host.excuses("off", discharged, 2.0)
    bench.wait_for_exit(bench.deadman_pid)
    assert json.loads((bench.state / "deadman.log").read_text())["reason"] == "the daemon died"


def test_it_outlives_a_daemon_that_ends_in_order_with_an_output_armed(supply: int, tmp_path: Path) -> None:
    left = Bench(supply, tmp_path, "leave")
    try:
        left.daemon.wait(20)  # by itself, or by the dead-man that makes sure
        left.seconds_until_off(time.monotonic())
        left.wait_for_exit(left.deadman_pid)
        assert json.loads((tmp_path / "deadman.log").read_text())["off"] is True
    finally:
        left.close()


def test_a_dead_man_that_wakes_up_after_another_took_its_place_does_nothing(bench: Bench) -> None:
    async def body() -> None:
        deadman = Deadman(bench.state / "other.jsonl", silence_s=0.2)
        await deadman.start()
        address = f"tcp://127.0.0.1:{bench.port}"
        await deadman.set_outputs([ArmedOutput("vb1", Intent("vb1", address, "rigol-dp800", 1, 0.6))])
        os.kill(deadman.pid, signal.SIGSTOP)
        while not deadman.dead.is_set():
            deadman.beat("vb1")
            await asyncio.sleep(0.02)
        await deadman.kill()  # else it would take us for dead when it is continued
        with pytest.raises(ProcessLookupError):
            os.kill(deadman.pid, signal.SIGCONT)

    asyncio.run(body())
    assert bench.ask(":OUTP? CH1") == "ON"


def test_it_stops_trying_when_the_next_daemon_has_switched_off(tmp_path: Path) -> None:
    journal = IntentJournal(tmp_path / "intent.jsonl")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, not listening: refused, and nobody else gets the port
        intent = Intent("vb1", f"tcp://127.0.0.1:{nobody.getsockname()[1]}", "rigol-dp800", 1, 0.6)
        journal.opened(intent)
        watchman = object.__new__(_Watchman)
        watchman._journal = journal
        results: dict[tuple[str, str], CutResult] = {}
        cut = threading.Thread(
            target=watchman._cut_instrument,
            args=((intent.address, intent.dialect), [intent], time.monotonic(), results),
            daemon=True,
        )
        cut.start()
        time.sleep(0.5)
        assert cut.is_alive()
        journal.closed(intent, 0.1, "leftover of a dead run")
        cut.join(ROUND_S + 20)
        assert not cut.is_alive()
    assert sum(1 for line in journal.path.read_text().splitlines() if '"op":"off"' in line) == 1


def test_the_daemon_goes_safe_when_the_dead_man_dies(bench: Bench) -> None:
    os.kill(bench.deadman_pid, signal.SIGKILL)
    assert read_line(bench.daemon) == "safe"
    assert bench.ask(":OUTP? CH1") == "OFF"


def test_the_daemon_goes_safe_when_the_dead_man_is_stopped(bench: Bench) -> None:
    os.kill(bench.deadman_pid, signal.SIGSTOP)
    try:
        assert read_line(bench.daemon) == "safe"
        assert bench.ask(":OUTP? CH1") == "OFF"
    finally:
        os.kill(bench.deadman_pid, signal.SIGKILL)


def test_a_busy_processor_does_not_delay_it_where_that_may_be_asked_for(bench: Bench) -> None:
    ask = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    may = subprocess.run([sys.executable, "-c", ask], capture_output=True, check=False).returncode == 0
    policy = os.sched_getscheduler(bench.deadman_pid) & ~os.SCHED_RESET_ON_FORK
    assert policy == (os.SCHED_RR if may else os.SCHED_OTHER)
    assert os.sched_getscheduler(bench.daemon.pid) == os.SCHED_OTHER


def test_an_armed_dead_man_ignores_polite_signals(bench: Bench) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(bench.deadman_pid, number)
    start = time.monotonic()
    os.kill(bench.daemon.pid, signal.SIGKILL)
    bench.seconds_until_off(start)
    bench.wait_for_exit(bench.deadman_pid)
    assert json.loads((bench.state / "deadman.log").read_text())["off"] is True


def test_a_short_stop_of_the_dead_man_does_not_trip_it(bench: Bench) -> None:
    os.kill(bench.deadman_pid, signal.SIGSTOP)
    time.sleep(1.3)  # longer than the silence it tolerates, shorter than the daemon's patience with it
    os.kill(bench.deadman_pid, signal.SIGCONT)
    time.sleep(0.5)
    assert bench.ask(":OUTP? CH1") == "ON"
    assert not (bench.state / "deadman.log").exists()


def test_a_host_that_stood_still_does_not_trip_it_and_a_daemon_that_stands_still_afterwards_does(
    bench: Bench, host: Host
) -> None:
    """Both are stopped, as by a paused virtual machine; the dead-man, which has priority, runs again first."""
    for pid in (bench.daemon.pid, bench.deadman_pid):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(bench.deadman_pid, signal.SIGCONT)
    time.sleep(0.3)
    os.kill(bench.daemon.pid, signal.SIGCONT)
    time.sleep(1.0)
    assert bench.ask(":OUTP? CH1") == "ON"
    assert not (bench.state / "deadman.log").exists()
    start = time.monotonic()
    os.kill(bench.daemon.pid, signal.SIGSTOP)
    host.excuses("off", bench.seconds_until_off(start)[1], 2.0)


def test_silence_with_nothing_armed_is_no_reason(tmp_path: Path) -> None:
    async def body() -> int:
        deadman = Deadman(tmp_path / "intent.jsonl", silence_s=0.1)
        await deadman.start()
        await asyncio.sleep(0.5)
        assert deadman.alive
        await deadman.stop()
        return deadman.pid

    assert not Path(f"/proc/{asyncio.run(body())}").exists()


def test_one_source_does_not_beat_for_another(tmp_path: Path, supply: int) -> None:
    """Run in a process of its own: the cut kills it."""
    code = f"""
    import asyncio
    from pathlib import Path
    from hil.bench.deadman import ArmedOutput, Deadman
    from hil.bench.safety import Intent

    async def main():
        deadman = Deadman(Path({str(tmp_path / "intent.jsonl")!r}), silence_s=0.4, log=Path({str(tmp_path / "log")!r}))
        await deadman.start()
        address = "tcp://127.0.0.1:{supply}"
        await deadman.set_outputs(
            [ArmedOutput(f"vb{{n}}", Intent(f"vb{{n}}", address, "rigol-dp800", n, 0.6)) for n in (1, 2)]
        )
        while True:
            deadman.beat("vb1")
            await asyncio.sleep(0.05)

    asyncio.run(main())
    """
    process = spawn(code)
    try:
        assert process.wait(30) == -signal.SIGKILL
        deadline = time.monotonic() + 20
        while not (tmp_path / "log").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "no heartbeat of vb2" in (tmp_path / "log").read_text()
    finally:
        end_session(process)


def test_arming_needs_an_answer(tmp_path: Path) -> None:
    async def body() -> None:
        deadman = Deadman(tmp_path / "intent.jsonl", silence_s=0.2)
        await deadman.start()
        os.kill(deadman.pid, signal.SIGKILL)
        with pytest.raises(Exception, match="does not answer"):
            await deadman.set_outputs([ArmedOutput("x", Intent("x", "tcp://127.0.0.1:1", "rigol-dp800", 1, 0.6))])
        assert not deadman.alive
        await deadman.stop()

    asyncio.run(body())


def test_a_daemon_that_dies_with_a_word_unread_has_ended_like_any_other() -> None:
    ours, daemons = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        watchman = object.__new__(_Watchman)
        watchman._socket = ours
        ours.send(b"{}")
        daemons.close()  # the kernel tells it as a reset, not as an end
        assert watchman._read() == "the daemon closed its heartbeat"
