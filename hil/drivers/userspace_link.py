"""A link emulator without netem: a process of its own that passes frames between two ports, late, slow or not at all.

For machines whose kernel has no netem and nobody wants QEMU, and as a cross-check of those that have it.

    python -m hil.drivers.userspace_link CONTROL --ground PORT --board PORT [--seed N] [--log FILE]

Ports are written as `hil.drivers.frame_ports` says. On the unix socket CONTROL: one JSON object a line, one answer a
line. Requests: `{"op": "apply", "states": {DIRECTION: STATE}}`, `{"op": "plan", "points": {DIRECTION: [[AT_S, STATE],
...]}}`, `{"op": "clear"}`, `{"op": "look"}`. Each is answered by the whole state. Times are of `time.monotonic()`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from hil.drivers.broker import die_with_parent
from hil.drivers.frame_ports import FramePort, open_port
from hil.drivers.link import DIRECTIONS, LinkCounters
from hil.drivers.prompt import raise_share
from hil.drivers.shaper import Packet, Point, Shaper
from hil.errors import BenchError, HilError
from hil.model import Applied, Direction, LinkState

SPIN_S = 150e-6
"""Before a packet is due we do not sleep: the kernel wakes nobody more punctually than this."""

_MAX_LINE = 1 << 22
_LOG_HEADER = "direction,number,bytes,fate,t_in,t_due,t_out\n"


# ---------------------------------------------------------------------------------------------------------------------
# The process


class Relay:
    """Passes frames between the two ports and answers on the control socket; one thread, until `stop`."""

    def __init__(
        self,
        ground: FramePort,
        board: FramePort,
        control: socket.socket,
        *,
        seed: int,
        log: TextIO | None = None,
    ) -> None:
        self.seed = seed
        self._log = log
        if log is not None:
            log.write(_LOG_HEADER)
        # The two directions do not lose alike.
        self._shapers: dict[Direction, Shaper] = {
            direction: Shaper(seed + index, lambda packet, d=direction: self._note(d, packet, None))  # type: ignore[misc]
            for index, direction in enumerate(DIRECTIONS)
        }
        self._shaped: dict[Direction, bool] = dict.fromkeys(DIRECTIONS, False)
        self._in: dict[Direction, FramePort] = {"uplink": ground, "downlink": board}
        self._out: dict[Direction, FramePort] = {"uplink": board, "downlink": ground}
        self._control = control
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        self._stopped = False
        self.worst_late_s = 0.0
        self.scheduling = "ordinary"

    def stop(self) -> None:
        """End `run` soon; safe in a signal handler."""
        self._stopped = True

    def run(self) -> None:
        """Pass frames until stopped."""
        while not self._stopped:
            self._wait()
            self._deliver()

    def _wait(self) -> None:
        """Sleep until a frame or a request comes or a packet is nearly due; take what has come."""
        owners: dict[int, Direction] = {fd: d for d in DIRECTIONS for fd in self._in[d].descriptors()}
        due = [at_s for shaper in self._shapers.values() if (at_s := shaper.next_due_s()) is not None]
        pause_s = max(0.0, min(due) - time.monotonic() - SPIN_S) if due else 1.0
        waiting = [*owners, self._control.fileno(), *self._clients]
        readable, _, _ = select.select(waiting, [], [], min(pause_s, 1.0))
        for descriptor in readable:
            direction = owners.get(descriptor)
            if direction is not None:
                shaper = self._shapers[direction]
                for frame in self._in[direction].read(descriptor):
                    shaper.offer(frame, time.monotonic())
            elif descriptor in self._clients:
                self._converse(descriptor)
            else:
                self._welcome()

    def _deliver(self) -> None:
        """Send what is due now or within the spin, of both directions in the order of their times."""
        while due := [(at_s, d) for d, shaper in self._shapers.items() if (at_s := shaper.next_due_s()) is not None]:
            due_s, direction = min(due)
            if due_s - time.monotonic() > SPIN_S:
                return
            while (now_s := time.monotonic()) < due_s:
                pass
            packet = self._shapers[direction].take(now_s)
            if packet is not None:
                self._out[direction].write(packet.frame)
                self.worst_late_s = max(self.worst_late_s, now_s - due_s)
                self._note(direction, packet, now_s)

    def _note(self, direction: Direction, packet: Packet, out_s: float | None) -> None:
        if self._log is not None:
            out = "" if out_s is None else f"{out_s:.6f}"
            due = "" if out_s is None else f"{packet.due_s:.6f}"
            size = len(packet.frame)
            self._log.write(f"{direction},{packet.number},{size},{packet.fate},{packet.in_s:.6f},{due},{out}\n")

    # ------------------------------------------------------------------------------------------------ its control
    def _welcome(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._control.accept()
            client.settimeout(1.0)
            self._clients[client.fileno()] = client, bytearray()

    def _converse(self, descriptor: int) -> None:
        client, buffer = self._clients[descriptor]
        try:
            data = client.recv(1 << 16)
            buffer += data
            while (end := buffer.find(b"\n")) >= 0:
                line = bytes(buffer[:end])
                del buffer[: end + 1]
                client.sendall(json.dumps(self.answer(line)).encode() + b"\n")
        except OSError:
            data = b""
        if not data or len(buffer) > _MAX_LINE:
            del self._clients[descriptor]
            client.close()

    def answer(self, line: bytes) -> dict[str, Any]:
        """Obey one request; the state of everything afterwards, or `{"error": text}`."""
        try:
            request = json.loads(line)
            match request["op"]:
                case "apply":
                    self._plan({d: [Point(0.0, LinkState(**s))] for d, s in request["states"].items()})
                case "plan":
                    points = request["points"].items()
                    self._plan({d: [Point(float(at), LinkState(**s)) for at, s in some] for d, some in points})
                case "clear":
                    for direction in DIRECTIONS:
                        self._shapers[direction].set(LinkState())
                        self._shaped[direction] = False
                case "look":
                    if self._log is not None:
                        self._log.flush()
                case other:
                    return {"error": f"unknown op {other!r}"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {"error": f"bad request: {error!r}"}
        return self._whole()

    def _plan(self, points: Mapping[str, Sequence[Point]]) -> None:
        """All directions or, with a ValueError, none."""
        if unknown := set(points) - set(DIRECTIONS):
            raise ValueError(f"no direction {sorted(unknown)}")
        for some in points.values():
            Shaper(0).plan(some)
        for direction in DIRECTIONS:
            if direction in points:
                self._shapers[direction].plan(points[direction])
                self._shaped[direction] = True

    def _whole(self) -> dict[str, Any]:
        at_s = time.monotonic()
        return {
            "at_s": at_s,
            "pid": os.getpid(),
            "seed": self.seed,
            "states": {d: asdict(s.state_at(at_s)) if self._shaped[d] else None for d, s in self._shapers.items()},
            "counters": {d: asdict(s.counters()) for d, s in self._shapers.items()},
            "refused_frames": {d: port.dropped for d, port in self._out.items()},
            "worst_late_s": self.worst_late_s,
            "scheduling": self.scheduling,
        }


def listen(path: Path) -> socket.socket:
    """The control socket, mode 0600. BenchError when it cannot be had."""
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path.unlink(missing_ok=True)
    try:
        control.bind(os.fspath(path))
    except OSError as error:
        raise BenchError(f"cannot listen on {path}: {error}", hint="a unix socket's path has 107 bytes") from error
    path.chmod(0o600)
    control.listen(8)
    return control


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m hil.drivers.userspace_link`: prints `ready` and serves until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m hil.drivers.userspace_link")
    parser.add_argument("control", type=Path)
    parser.add_argument("--ground", required=True, metavar="PORT")
    parser.add_argument("--board", required=True, metavar="PORT")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--with-parent", action="store_true", help="end when the process that started it does")
    parser.add_argument("--log", type=Path, help="a line for each packet: when it came, was due, left")
    parent = os.getppid()
    options = parser.parse_args(argv)
    if options.with_parent:
        die_with_parent(parent)()
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    try:
        with contextlib.ExitStack() as stack:
            ground, board = open_port(options.ground), open_port(options.board)
            stack.callback(ground.close)
            stack.callback(board.close)
            control = stack.enter_context(listen(options.control))
            stack.callback(lambda: options.control.unlink(missing_ok=True))
            log = stack.enter_context(options.log.open("w")) if options.log else None
            relay = Relay(ground, board, control, seed=seed, log=log)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: relay.stop())
            relay.scheduling = raise_share()
            gc.freeze()  # looking through all modules for garbage takes milliseconds
            print("ready", flush=True)
            relay.run()
    except HilError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Its clients


def start(
    control: Path,
    *,
    ground: str,
    board: str,
    seed: int | None = None,
    log: Path | None = None,
    with_parent: bool = False,
    timeout_s: float = 10.0,
) -> subprocess.Popen[bytes]:
    """Start the process and wait until it serves; it ends by SIGTERM, or `with_parent` when the calling thread does.

    Raises BenchError with its own words when it cannot work here.
    """
    argv = [sys.executable, "-m", "hil.drivers.userspace_link", str(control), "--ground", ground, "--board", board]
    argv += ["--seed", str(seed)] if seed is not None else []
    argv += ["--log", str(log)] if log is not None else []
    argv += ["--with-parent"] if with_parent else []
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    watchdog = threading.Timer(timeout_s, process.kill)
    watchdog.start()
    try:
        with process.stdout, process.stderr:
            if process.stdout.readline() == b"ready\n":
                return process
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip()
    finally:
        watchdog.cancel()
    process.wait()
    message, _, hint = said.partition("\n  next: ")
    raise BenchError(message or f"the user-space link did not start within {timeout_s:g} s", hint=hint)


class UserSpaceLink:
    """The driver of such a process, wherever it was started: a LinkEmulator on its control socket."""

    def __init__(self, name: str, control: Path, timeout_s: float = 5.0) -> None:
        self.name = name
        self._control, self._timeout_s = control, timeout_s
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def lead_s(self) -> float:
        """None: the process has a state some 0.4 ms after it was sent; who wants less plans ahead."""
        return 0.0

    def open(self) -> None:
        """Connect. BenchError when nobody listens."""
        self._ask({"op": "look"})

    def apply(self, states: Mapping[Direction, LinkState], scheduled_s: float) -> dict[Direction, Applied]:
        """Put complete states on the link; `acknowledged_s` is when the process had them, on the same clock."""
        sent_s = time.monotonic()
        answer = self._ask({"op": "apply", "states": {d: asdict(state) for d, state in states.items()}})
        for direction, state in states.items():
            if answer["states"][direction] != asdict(state):
                raise BenchError(
                    f"link {self.name}: {direction} reads back {answer['states'][direction]} instead of {asdict(state)}"
                )
        applied = Applied(scheduled_s, sent_s, answer["at_s"], time.monotonic())
        return dict.fromkeys(states, applied)

    def plan(self, points: Mapping[Direction, Sequence[Point]]) -> None:
        """States ahead of time, each from its instant on (`time.monotonic`): no edge is late, delays are interpolated.

        Replaced by the next `plan`, `apply` or `clear`.
        """
        wanted = {d: [[point.at_s, asdict(point.state)] for point in some] for d, some in points.items()}
        self._ask({"op": "plan", "points": wanted})

    def state(self) -> dict[Direction, LinkState | None]:
        """What each direction has now; None where hil has not shaped it."""
        states = self._ask({"op": "look"})["states"]
        return {d: None if states[d] is None else LinkState(**states[d]) for d in DIRECTIONS}

    def counters(self) -> dict[Direction, LinkCounters]:
        """Counters of each direction since the process began."""
        counters = self._ask({"op": "look"})["counters"]
        return {d: LinkCounters(**counters[d]) for d in DIRECTIONS}

    def clear(self) -> list[str]:
        """Let everything pass; returns the directions that were shaped."""
        shaped = [d for d, state in self.state().items() if state is not None]
        left = self._ask({"op": "clear"})["states"]
        if any(state is not None for state in left.values()):
            raise BenchError(f"link {self.name} is still shaped after clearing: {left}")
        return list(shaped)

    def preflight(self) -> dict[str, Any]:
        """Facts for the run's provenance: the process, its seed, how late its worst packet left; and `warnings`."""
        answer = self._ask({"op": "look"})
        warnings = []
        if (os.cpu_count() or 1) < 2:
            warnings.append("one processor: packets leave late whenever anything else runs")
        if answer["scheduling"] == "ordinary":
            warnings.append("no right to go first (CAP_SYS_NICE): packets leave late on a busy host")
        return {
            "backend": "user space",
            "kernel": os.uname().release,
            "netem": "not used",
            "pid": answer["pid"],
            "seed": answer["seed"],
            "worst_late_s": answer["worst_late_s"],
            "scheduling": answer["scheduling"],
            "refused_frames": answer["refused_frames"],
            "warnings": warnings,
        }

    def close(self) -> None:
        """Let go of it; the link stays as it is."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One exchange, on a fresh connection if the one we have turns out to be gone; once."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            for fresh in (self._socket is None, True):
                try:
                    answer = json.loads(self._exchange(line))
                    break
                except (OSError, ValueError) as error:
                    self._drop()
                    if fresh:
                        raise BenchError(
                            f"link {self.name}: the user-space link on {self._control} does not answer: {error}",
                            hint="on the virtual bench: `hil virtual status`; else start it: `hil link serve`",
                        ) from error
        if "error" in answer:
            raise BenchError(f"link {self.name}: the user-space link says: {answer['error']}")
        return dict(answer)

    def _exchange(self, line: bytes) -> bytes:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(self._timeout_s)
            self._socket.connect(os.fspath(self._control))
        self._socket.sendall(line)
        answer = b""
        while not answer.endswith(b"\n"):
            data = self._socket.recv(1 << 16)
            if not data:
                raise OSError("it ended")
            answer += data
        return answer


if __name__ == "__main__":
    sys.exit(main())
