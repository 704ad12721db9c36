"""The dead-man: a process of its own that cuts the outputs when the bench daemon dies, hangs or is stopped.

It holds one end of a socket pair and a pidfd of the daemon. While outputs are armed, each source that armed one (a
board's power loop) must beat within `silence_s`; end-of-file, the daemon's death or silence of any source lead to the
cut: kill the daemon (a stopped one would hold the instrument's only connection), then open the instrument, switch off
and verify by measured volts. Where the instrument does not obey within `OUTLET_AFTER_S`, the outlet behind it is cut,
if it has one. The other way round it answers every beat, so that the daemon notices a dead-man that
died or hangs, and goes to its safe state.

With nothing armed it never trips. While something is armed it ignores SIGINT, SIGTERM and SIGHUP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hil.bench.levels import cut_outlet
from hil.bench.safety import Intent, IntentJournal
from hil.drivers.forced_off import ForcedOff, force_off
from hil.drivers.transport import parse_any_address
from hil.errors import BenchError, SafetyError

ROUND_S = 5.0  # one try at an instrument; rounds follow each other
OUTLET_AFTER_S = 2.0  # how long the instrument may take before the outlet behind it is cut
# A network that is out for a night must not leave a board on for the next day; after a while it is asked less often.
# What was reached on this host itself (the virtual bench, a serial bridge) is not behind a network.
EAGER_S = 60.0
PAUSE_S = 5.0
LATE_S = 0.1  # woken later than this, we were kept from running
GIVE_UP_S = 24 * 3600.0
GIVE_UP_LOCAL_S = 300.0
_QUIT = "the daemon asked to end with outputs on"
_PACKET = 1 << 16
_REAL_TIME_PRIORITY = 50  # what measures a link runs at 10
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])  # the child finds hil however the parent did


@dataclass(frozen=True, slots=True)
class ArmedOutput:
    """An output to cut, and the name of the source whose beats keep it alive."""

    source: str
    intent: Intent


# ------------------------------------------------------------------------------------------------------ parent side
class Deadman:
    """The daemon's hold on its dead-man. Use from one event loop.

    `dead` is set when the dead-man process ended or no longer answers: the daemon must then go to its safe state.
    """

    def __init__(
        self,
        journal: Path,
        *,
        silence_s: float = 1.0,
        log: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.silence_s = silence_s
        self.dead = asyncio.Event()
        self.pid = 0
        self._journal = journal
        self._log = log
        self._clock = clock
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = asyncio.Event()
        self._answers = asyncio.Event()
        self._sequence = 0
        self._first_unanswered_s: float | None = None
        self._outputs: tuple[ArmedOutput, ...] = ()
        self._acknowledged_outputs = 0
        self._outputs_sent = 0
        self._stopping = False

    @property
    def alive(self) -> bool:
        """True while the dead-man runs and answers."""
        return self._socket is not None and not self.dead.is_set()

    @property
    def armed(self) -> bool:
        """Whether an output is on its list."""
        return bool(self._outputs)

    async def start(self) -> None:
        """Spawn the process and wait for its first word. SafetyError when it does not come up."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        pidfd = os.pidfd_open(os.getpid())
        arguments = {
            "socket": theirs.fileno(),
            "pidfd": pidfd,
            "pid": os.getpid(),
            "silence_s": self.silence_s,
            "journal": str(self._journal),
            "log": str(self._log) if self._log else None,
        }
        try:
            process = self._process = _spawn(arguments, (theirs.fileno(), pidfd))
        finally:
            theirs.close()
            os.close(pidfd)
        self.pid = process.pid
        self._socket = ours
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._hear)
        watch = os.pidfd_open(self.pid)
        loop.add_reader(watch, self._reap, process, watch)
        await self.set_outputs(())

    def beat(self, source: str) -> None:
        """Tell that `source` lives. Never blocks; notices a dead-man that no longer answers (`dead`)."""
        self._sequence += 1
        self._send({"beat": self._sequence, "source": source})

    async def set_outputs(self, outputs: Sequence[ArmedOutput], timeout_s: float = 5.0) -> None:
        """Replace the list of armed outputs; returns when the dead-man has it. SafetyError when it does not answer.

        Arming counts as the source's first beat.
        """
        self._outputs = tuple(outputs)
        self._outputs_sent += 1
        mine = self._outputs_sent
        self._send({"outputs": mine, "armed": [asdict(output) for output in outputs]})
        end = self._clock() + timeout_s
        while self._acknowledged_outputs < mine:
            self._answers.clear()
            if self.dead.is_set() or self._clock() >= end:
                raise SafetyError(
                    "the dead-man does not answer", hint="see its log in the state directory; no output is switched on"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self._answers.wait()

    async def arm(self, output: ArmedOutput) -> None:
        """Add one output to the list, before it goes on; replaces an entry for the same channel."""
        await self.set_outputs((*self._without(output.intent), output))

    async def disarm(self, intent: Intent) -> None:
        """Take one output off the list, after it was verified off."""
        await self.set_outputs(self._without(intent))

    def _without(self, intent: Intent) -> tuple[ArmedOutput, ...]:
        return tuple(output for output in self._outputs if output.intent.key != intent.key)

    async def stop(self) -> None:
        """Disarm and let the process end. Call only with every output verified off."""
        self._stopping = True
        if self._socket is not None and self._process is not None:
            with contextlib.suppress(SafetyError):
                await self.set_outputs((), timeout_s=2.0)
            self._send({"quit": True})
            self._hang_up()
            try:
                async with asyncio.timeout(3.0):
                    await self._ended.wait()
            except TimeoutError:
                await self.kill()

    async def kill(self) -> None:
        """End it without a word. One that hung and wakes up later would take its silent daemon for dead and cut."""
        if self._process is not None:
            self._process.kill()  # does nothing to one that has ended
            await self._ended.wait()
        self._hang_up()

    def _hang_up(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is None or self.dead.is_set():
            return
        now = self._clock()
        if self._first_unanswered_s is None:
            self._first_unanswered_s = now
        elif now - self._first_unanswered_s > 2 * self.silence_s:
            # It runs but is deaf (stopped, swapped out): as good as dead. Drain first: the answer may lie waiting.
            self._hear()
            if self._first_unanswered_s is not None and now - self._first_unanswered_s > 2 * self.silence_s:
                self.dead.set()
                return
        try:
            self._socket.send(json.dumps(message).encode())
        except BlockingIOError:
            pass  # its queue is full: it does not read; the clock above decides
        except OSError:
            self.dead.set()

    def _hear(self) -> None:
        while self._socket is not None:
            try:
                data = self._socket.recv(_PACKET)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                asyncio.get_running_loop().remove_reader(self._socket.fileno())
                self.dead.set()
                self._answers.set()
                return
            self._first_unanswered_s = None
            self._acknowledged_outputs = max(self._acknowledged_outputs, json.loads(data).get("outputs", 0))
            self._answers.set()

    def _reap(self, process: subprocess.Popen[bytes], watch: int) -> None:
        asyncio.get_running_loop().remove_reader(watch)
        os.close(watch)
        process.wait()
        self._ended.set()
        if not self._stopping:
            self.dead.set()
            self._answers.set()


def _spawn(arguments: dict[str, Any], descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """The process. Not asyncio's subprocess: that kills its children when the loop ends, and this one outlives it."""
    search = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "hil.bench.deadman"],
        stdin=subprocess.PIPE,
        pass_fds=descriptors,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
    )
    if process.stdin is None:
        raise SafetyError("the dead-man has no standard input")
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # it ended at once: noticed by its silence
        pipe.write(json.dumps(arguments).encode() + b"\n")
    return process


# -------------------------------------------------------------------------------------------------- the process
@dataclass(frozen=True, slots=True)
class CutResult:
    """How the cut of one instrument went: its last round, what outlets said, and whether all is off."""

    forced: ForcedOff
    outlets: tuple[str, ...]
    off: bool


class _Watchman:
    """The dead-man's own side: plain blocking code, no event loop, nothing that could wait for the daemon."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._socket = socket.socket(fileno=arguments["socket"])
        self._socket.setblocking(False)
        self._pidfd = int(arguments["pidfd"])
        self._silence_s = float(arguments["silence_s"])
        self._journal = IntentJournal(Path(arguments["journal"]))
        self._log = Path(arguments["log"]) if arguments.get("log") else None
        self._armed: tuple[ArmedOutput, ...] = ()
        self._beats: dict[str, float] = {}
        self._quiet: _Seen | None = None  # the daemon as it was when a beat was first missed
        self._asked_to_end = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._signalled)
        for handle in (self._socket.fileno(), self._pidfd):
            os.set_inheritable(handle, False)

    def run(self) -> int:
        """Watch until told to quit; the exit code is 0 unless a cut could not be verified."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        while True:
            patience_ms, asked = self._patience_ms(), time.monotonic()
            ready = {handle for handle, _ in poll.poll(patience_ms)}
            self._forgive(time.monotonic() - asked - patience_ms / 1000)
            # Always read before judging silence: after a stop of this process the beats lie waiting.
            ended = self._read()
            if ended == _QUIT and not self._armed:
                return 0
            reason = ended or ("the daemon died" if self._pidfd in ready else self._silent())
            if reason and self._armed:
                return self._cut(reason)
            if ended or self._pidfd in ready or (self._asked_to_end and not self._armed):
                return 0

    def _signalled(self, number: int, frame: object) -> None:
        self._asked_to_end = True

    def _patience_ms(self) -> int:
        """Until the first armed source could become silent, at most a quarter of a second."""
        if not self._armed:
            return 250
        first = min(self._beats[output.source] for output in self._armed)
        return max(1, min(250, int((first + self._silence_s - time.monotonic()) * 1000) + 1))

    def _forgive(self, late_s: float) -> None:
        """Time in which this process itself could not run is no silence: the daemon could not run either.

        A host that stands still (a paused virtual machine, a stalled disk) wakes us first, ahead of the daemon's beat.
        """
        if late_s > LATE_S:
            for source in self._beats:
                self._beats[source] += late_s

    def _read(self) -> str:
        """Take every waiting message; why the daemon is gone, its wish to end, or an empty text."""
        while True:
            try:
                data = self._socket.recv(_PACKET)
            except BlockingIOError:
                return ""
            except ConnectionResetError:  # it died and left a word of ours unread
                data = b""
            except OSError as error:
                return f"the heartbeat broke: {error}"
            if not data:
                return "the daemon closed its heartbeat"
            message = json.loads(data)
            if message.get("quit"):
                return _QUIT
            if "beat" in message:
                self._beats[message["source"]] = time.monotonic()
                self._answer({"beat": message["beat"]})
            if "outputs" in message:
                self._arm(message["armed"])
                self._answer({"outputs": message["outputs"]})

    def _arm(self, entries: list[dict[str, Any]]) -> None:
        known = {output.source for output in self._armed}
        self._armed = tuple(ArmedOutput(entry["source"], Intent(**entry["intent"])) for entry in entries)
        now = time.monotonic()
        for output in self._armed:
            if output.source not in known:
                self._beats[output.source] = now

    def _answer(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps(message).encode())

    def _silent(self) -> str:
        now, quiet = time.monotonic(), False
        for output in self._armed:
            age = now - self._beats[output.source]
            if age > self._silence_s:
                return f"no heartbeat of {output.source} for {age:.2f} s; {self._what_it_did()}"
            quiet = quiet or age > self._silence_s / 3
        if not quiet:
            self._quiet = None
        elif self._quiet is None:
            self._quiet = _seen(self._pidfd)
        return ""

    def _what_it_did(self) -> str:
        """What the silent daemon did, for whoever asks in the morning: starved, hung or waiting for a disk."""
        seen = _seen(self._pidfd)
        if seen is None:
            return "nothing is known of the daemon"
        said = f"the daemon is in state {seen.state}"
        if self._quiet is not None:
            ran_ms, waited_ms = (
                (seen.ran_ns - self._quiet.ran_ns) / 1e6,
                (seen.waited_ns - self._quiet.waited_ns) / 1e6,
            )
            over_ms = 1000 * (seen.at_s - self._quiet.at_s)
            said += f", ran {ran_ms:.0f} ms of its last {over_ms:.0f} ms and waited {waited_ms:.0f} ms for a processor"
        return f"{said}; {_pressure()}"

    def _cut(self, reason: str) -> int:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        groups: dict[tuple[str, str], list[Intent]] = {}
        for output in self._armed:
            groups.setdefault((output.intent.address, output.intent.dialect), []).append(output.intent)
        results: dict[tuple[str, str], CutResult] = {}
        threads = [
            threading.Thread(target=self._cut_instrument, args=(key, intents, started, results))
            for key, intents in groups.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._report(reason, started, results)
        return 0 if all(result.off for result in results.values()) else 1

    def _cut_instrument(
        self,
        key: tuple[str, str],
        intents: list[Intent],
        started: float,
        results: dict[tuple[str, str], CutResult],
    ) -> None:
        address, dialect_name = key
        pending, outlets = list(intents), list[str]()
        channels = sorted({intent.channel for intent in intents})
        off_voltage_v = min(intent.off_voltage_v for intent in intents)
        local = parse_any_address(address).local
        give_up_s = GIVE_UP_LOCAL_S if local else GIVE_UP_S
        round_s = OUTLET_AFTER_S if any(intent.outlet for intent in intents) else ROUND_S
        while True:
            result = force_off(address, dialect_name, channels, off_voltage_v, round_s)
            results[key] = CutResult(result, tuple(outlets), result.off)
            tried_s = time.monotonic() - started
            if result.off or tried_s > give_up_s or self._done_by_another(pending):
                break
            if round_s == OUTLET_AFTER_S:
                round_s = ROUND_S
                pending, outlets = self._cut_outlets(pending)
                results[key] = CutResult(result, tuple(outlets), not pending)
                if not pending:
                    break
                continue
            if tried_s > EAGER_S:
                time.sleep(PAUSE_S)
                round_s = 1.0
        if result.off:
            for intent in intents:
                # A full disk must not end the process before the other instruments are cut.
                with contextlib.suppress(BenchError):
                    self._journal.closed(intent, result.voltages_v[intent.channel], "dead-man")

    def _cut_outlets(self, intents: list[Intent]) -> tuple[list[Intent], list[str]]:
        """The instrument did not obey: cut the outlets behind these. Those that may still be on, and what was said."""
        cuts = {intent.outlet: cut_outlet(intent.outlet) for intent in intents if intent.outlet}
        left = []
        for intent in intents:
            cut = cuts.get(intent.outlet)
            if cut is None or not cut.off:
                left.append(intent)
                continue
            with contextlib.suppress(BenchError):
                self._journal.closed(intent, None, f"dead-man: {cut.said}")
        return left, [cut.said for cut in cuts.values()]

    def _done_by_another(self, intents: list[Intent]) -> bool:
        """Whether all were verified off meanwhile: by the bench's next daemon, which may now use them."""
        with contextlib.suppress(BenchError):
            return not {intent.key for intent in intents} & {item.key for item in self._journal.open_intents()}
        return False

    def _report(self, reason: str, started: float, results: dict[tuple[str, str], CutResult]) -> None:
        if self._log is None:
            return
        lines = [
            json.dumps(
                {
                    "t_wall": time.time(),
                    "reason": reason,
                    "address": address,
                    "off": result.off,
                    "voltages_v": {str(ch): volts for ch, volts in result.forced.voltages_v.items()},
                    "attempts": result.forced.attempts,
                    "command_s": round(result.forced.command_s, 4),
                    "elapsed_s": round(time.monotonic() - started, 4),
                    "trouble": result.forced.trouble,
                    "outlets": list(result.outlets),
                }
            )
            for (address, _), result in results.items()
        ]
        with contextlib.suppress(OSError), self._log.open("a") as log:
            log.write("\n".join(lines) + "\n")


@dataclass(frozen=True, slots=True)
class _Seen:
    """The daemon's main thread at one moment: what it does, processor time it had and waited for so far."""

    at_s: float
    state: str
    ran_ns: int
    waited_ns: int


def _seen(pidfd: int) -> _Seen | None:
    """From proc(5): `stat`, `wchan`, `schedstat`."""
    try:
        told = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        process = Path("/proc") / next(line.split()[1] for line in told.splitlines() if line.startswith("Pid:"))
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        waits_in = (process / "wchan").read_text().strip("0\n")
        ran, waited = (int(word) for word in (process / "schedstat").read_text().split()[:2])
    except (OSError, StopIteration, ValueError):
        return None
    return _Seen(time.monotonic(), f"{state} ({waits_in})" if waits_in else state, ran, waited)


def _pressure() -> str:
    """The share of the last ten seconds in which somebody on this host waited for processor, disk and memory."""
    said = []
    for what in ("cpu", "io", "memory"):
        with contextlib.suppress(OSError, IndexError):
            said.append(f"{what} {Path(f'/proc/pressure/{what}').read_text().split('avg10=')[1].split()[0]} %")
    return f"host pressure: {', '.join(said) or 'unknown'}"


def _come_first() -> None:
    """Neither a busy processor nor full memory may delay the cut, as far as this user may ask for that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-900")
    try:
        # It sleeps nearly always, so that it takes nothing from anybody; ahead of what measures links, which may spin.
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(_REAL_TIME_PRIORITY))
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -10)


def main() -> int:
    """Read the arguments as one JSON object from standard input, then watch."""
    watchman = _Watchman(json.loads(sys.stdin.readline()))
    _come_first()
    return watchman.run()


if __name__ == "__main__":
    sys.exit(main())
