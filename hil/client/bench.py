"""A bench behind its daemon: leases, boards with power, console, link and shell."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hil.client.console import Console
from hil.client.faults import BrownOut, CutAt, LatchUp
from hil.client.flight import Flight
from hil.client.http import DaemonGone, Http
from hil.client.shell import KeptShell
from hil.client.shell import connect as connect_shell
from hil.client.watch import Watches
from hil.errors import BenchError, BoardError, HilError, UsageError
from hil.model import LinkState, Reading

if TYPE_CHECKING:
    from hil import inventory
    from hil.client.remote import StreamRelay
    from hil.client.shell import AnyShell
    from hil.drivers.ssh import Shell
    from hil.drivers.ssh.connection import Opener
    from hil.inventory.bench import BenchBoard, ConsoleWire, SshWire
    from hil.inventory.board_type import BoardType

POWER_TIMEOUT_S = 60.0
COMPILE_TIMEOUT_S = 180.0
CHECK_TIMEOUT_S = 10.0
STOP_S = 15.0
# An orderly shutdown, a flash section's grace and the switching itself, at their longest.
LEASE_END_S = 300.0 + 900.0 + POWER_TIMEOUT_S


class Lease:
    """Boards that are ours until `release`, the end of this process, or `ttl_s` without a renewal.

    A thread renews it. Made by `Bench.lease`, or from a stored token for a command that goes on with a lease of an
    earlier one (`Lease.stored`: not renewed by a thread, not released at exit).
    """

    def __init__(self, http: Http, granted: Mapping[str, Any], *, renew: bool = True) -> None:
        self._http = http
        self.id = str(granted["lease"])
        self.token = str(granted["token"])
        self.boards = tuple(granted["boards"])
        self.ttl_s = float(granted.get("ttl_s", 30.0))
        # Board -> the power epoch that this client knows of; absent until it first asks, or after its own doing.
        self.power_epochs: dict[str, int] = {}
        self._lost: HilError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if renew:
            self._thread = threading.Thread(target=self._renew, name=f"hil-lease-{self.id}", daemon=True)
            self._thread.start()

    @classmethod
    def stored(cls, http: Http, granted: Mapping[str, Any]) -> Lease:
        """A lease from the answer to an earlier acquisition."""
        return cls(http, granted, renew=False)

    def check(self, board: str | None = None) -> None:
        """Raises BenchError when the lease is known to be over, UsageError when it is for other boards."""
        if self._lost is not None:
            raise self._lost
        if self._stop.is_set():
            raise BenchError(f"lease {self.id} was released", hint="take a new one")
        if board is not None and board not in self.boards:
            raise UsageError(f"lease {self.id} is for {', '.join(self.boards)}, not for board {board}")

    def renew(self) -> None:
        """Extend it by its time to live. Raises BenchError when it is over."""
        self._http.call("POST", f"/v1/leases/{self.id}/renew", token=self.token)

    def release(self) -> None:
        """Give the boards back; the daemon brings them to their `on_lease_end` state before this returns."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None:
            self._http.call("DELETE", f"/v1/leases/{self.id}", token=self.token, timeout_s=LEASE_END_S)

    def _renew(self) -> None:
        while not self._stop.wait(self.ttl_s / 3):
            try:
                self.renew()
            except DaemonGone as error:
                # A daemon that is started again still knows the lease: keep trying while it may be valid.
                if self._stop.wait(self.ttl_s / 3):
                    return
                with contextlib.suppress(HilError):
                    self.renew()
                    continue
                self._lost = error
                return
            except HilError as error:
                self._lost = error
                return

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.release()
        except HilError:
            # The error that ended the test says more than the lease it lost with it.
            if error is None:
                raise


class Bench:
    """A bench whose daemon runs. Close it, or use it as a context manager; leases are separate."""

    def __init__(self, bench: inventory.Bench, http: Http) -> None:
        self.inventory = bench
        self.http = http
        self._relays: dict[str, StreamRelay] = {}
        self._watches = None if bench.url else Watches(bench.runtime_dir / "streams.sock")

    def status(self) -> dict[str, Any]:
        """The daemon's own account: boards, leases, flight, dead-man."""
        value: dict[str, Any] = self.http.get("/v1/status")
        return value

    def doctor(self) -> list[dict[str, Any]]:
        """What the daemon finds of its fixtures: rows of fixture, what, ok (None: a remark), found."""
        value: list[dict[str, Any]] = self.http.get("/v1/doctor", timeout_s=POWER_TIMEOUT_S)["checks"]
        return value

    def leases(self) -> list[dict[str, Any]]:
        """Who holds which board, since when and until when."""
        value: list[dict[str, Any]] = self.http.get("/v1/leases")
        return value

    def waiting(self) -> list[dict[str, Any]]:
        """Who waits for which boards and why, in the order in which they will be served."""
        value: list[dict[str, Any]] = self.http.get("/v1/waiting")
        return value

    def lease(
        self,
        boards: Iterable[str] = (),
        *,
        any_of: Sequence[Sequence[str]] = (),
        priority: int = 0,
        ttl_s: float = 30.0,
        wait_s: float = 0.0,
        preempt: bool = False,
        reason: str = "",
        holder: str | None = None,
        pid: int | None = -1,
        renew: bool = True,
    ) -> Lease:
        """Lease all these boards or none, waiting up to `wait_s` for them; or the first set of `any_of` that is free.

        Who waits is served by `priority` (-10 to 10, one higher for each ten minutes of waiting), then in turn by
        user, then as they came. The lease ends with process `pid` (default: this one; None: only by its TTL). Raises
        BenchError naming who has the board, UsageError for a board that is not there.
        """
        granted = self.http.call(
            "POST",
            "/v1/leases",
            {
                "boards": list(boards),
                "any_of": [list(names) for names in any_of],
                "priority": priority,
                "user": _user(),
                "holder": holder or f"{_user()}@{socket.gethostname()} {Path(sys.argv[0] or 'python').name}",
                "pid": os.getpid() if pid == -1 else pid,
                "ttl_s": ttl_s,
                "wait_s": wait_s,
                "preempt": preempt,
                "reason": reason,
            },
            timeout_s=wait_s + LEASE_END_S,
        )
        return Lease(self.http, granted, renew=renew)

    def board(self, name: str | None = None, lease: Lease | None = None) -> Board:
        """A board (the only one without a name). Without a lease it may be watched, not driven."""
        name, wires, board_type = self.inventory.board(name)
        return Board(self, name, wires, board_type, lease)

    def flight(self, board: str, mission: Path, run_dir: Path, lease: Lease, start_s: float = 0.0) -> Flight:
        """Compile `mission` and start its clock at mission second `start_s`, rate 1. Ends with `Flight.end`."""
        lease.check(board)
        self.http.call(
            "POST",
            "/v1/flights",
            {
                "board": board,
                "mission_path": str(mission.resolve()),
                "run_dir": str(run_dir.resolve()),
                "start_s": start_s,
            },
            token=lease.token,
            timeout_s=COMPILE_TIMEOUT_S,
        )
        # Its end switches the board off, as the client wishes.
        return Flight(self.http, board, lease.token, on_end=lambda: lease.power_epochs.pop(board, None))

    def stop(self, force: bool = False) -> None:
        """Stop the daemon: all outputs off. Refused (BenchError) while boards are leased, unless `force`."""
        self.http.call("POST", "/v1/stop", {"force": force}, timeout_s=POWER_TIMEOUT_S)
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            try:
                self.http.get("/v1/status", timeout_s=1.0)
            except DaemonGone:
                self.http.close()
                return
            time.sleep(0.05)
        raise BenchError(f"the bench daemon did not stop within {STOP_S:g} s", hint="its log is in the state directory")

    def console_socket(self, board: str) -> Path:
        """The unix socket of a board's console: the daemon's own, or one here that leads to it."""
        if not self.inventory.url:
            return self.inventory.runtime_dir / f"console-{board}.sock"
        if board not in self._relays:
            from hil.client.remote import Address, StreamRelay

            self._relays[board] = StreamRelay(Address.of(self.inventory.url), "console", board)
        return self._relays[board].path

    def power_epoch(self, board: str, token: str, known: int | None) -> int:
        """The board's power epoch. Raises BenchError when `token` may not drive it, or `known` is another epoch.

        On this host it is asked once and then watched; over a network every time, because news could be late.
        """
        if self._watches is not None:
            with contextlib.suppress(OSError, ValueError):  # HTTP says it better
                return self._watches.power_epoch(board, token, known)
        path = f"/v1/boards/{board}/check{'' if known is None else f'?power_epoch={known}'}"
        return int(self.http.call("GET", path, token=token, timeout_s=CHECK_TIMEOUT_S)["power_epoch"])

    def close(self) -> None:
        self.http.close()
        if self._watches is not None:
            self._watches.close()
        for relay in self._relays.values():
            relay.close()
        self._relays.clear()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Board:
    """One board: `power`, `console`, `link`, `shell` (management port) and `payload_shell` (through the emulator)."""

    def __init__(self, bench: Bench, name: str, wires: BenchBoard, board_type: BoardType, lease: Lease | None) -> None:
        if lease is not None:
            lease.check(name)
        self.bench = bench
        self.name = name
        self.wires = wires
        self.type = board_type
        self.lease = lease
        self.power = Power(self)
        self.link = Link(self)
        self._console: Console | None = None
        self._kept = KeptShell(name, self._dial)

    @property
    def console(self) -> Console:
        """The serial console. Raises UsageError when the bench file gives the board none."""
        if self.wires.console is None:
            raise UsageError(f"board {self.name} has no console", hint="add `console:` to the bench file")
        if self._console is None:
            self._console = self._open_console(self.wires.console)
        return self._console

    def _open_console(self, wire: ConsoleWire) -> Console:
        return Console.served(
            self.name,
            self.bench.console_socket(self.name),
            self._token,
            self.type.boot.death,
            None if self.lease is None else self.check,
            pace_bytes=wire.pace_bytes,
            user=wire.user,
            password=wire.password,
        )

    @property
    def shell(self) -> AnyShell:
        """The shell over the management port, or over the serial console of a board that has none (`ConsoleShell`);
        connected at first use and again after it was lost.

        Raises Rebooted, once, when the board went through a reboot meanwhile that this client's power calls or
        `reconnect` did not announce.
        """
        self.check()
        return self._kept.get()

    def reconnect(self, timeout_s: float) -> AnyShell:
        """A new connection to the management port (or console), to whatever boot of the board, tried until it stands.

        Raises the last BoardError in the end.
        """
        self.check()
        return self._kept.reconnect(timeout_s)

    def payload_shell(self, timeout_s: float = 20.0) -> Shell:
        """A new connection through the emulated link; the caller closes it."""
        self.check()
        wire = self.wires.payload
        return self._connect("payload", wire, timeout_s, None if wire is None else wire.broker)

    def opener(self, plane: str) -> Opener | None:
        """What gives sockets to the board's plane, or its first jump host, when the bench is on another host; else
        None: they are dialled from here. The sockets end with the lease.
        """
        if not self.bench.inventory.url:
            return None
        from hil.client.remote import Address, ssh_stream

        address = Address.of(self.bench.inventory.url)
        return lambda timeout_s: ssh_stream(address, self.name, plane, self._driving(), timeout_s)

    def check(self) -> None:
        """Raises BenchError when the lease is over, or when the board lost power since this client knew it on, other
        than by the client's own power calls: the message says when and why. Every call of shell and console asks this.
        """
        token = self._driving()
        epochs = {} if self.lease is None else self.lease.power_epochs
        epochs.setdefault(self.name, self.bench.power_epoch(self.name, token, epochs.get(self.name)))

    def accept_power_cut(self) -> None:
        """Go on with the board after a power cut that was expected: a load shed in a flight, say."""
        self._driving()
        if self.lease is not None:
            self.lease.power_epochs.pop(self.name, None)
        self._kept.expect_boot()

    @contextlib.contextmanager
    def flash_section(self, grace_s: float = 120.0) -> Iterator[None]:
        """While firmware is written: an end of the lease that is not the holder's own doing cuts the power only after
        the section, at most `grace_s` (up to 900 s) later; until then this client may still drive the board.
        """
        self._call("POST", "flash", {"grace_s": grace_s})
        try:
            yield
        finally:
            self.bench.http.call(
                "DELETE", f"/v1/boards/{self.name}/flash", token=self._token(), timeout_s=POWER_TIMEOUT_S
            )

    def disconnect(self) -> None:
        """Drop the management connection without a farewell."""
        self._kept.drop()

    def _dial(self, timeout_s: float) -> AnyShell:
        """Over mgmt; without one, over a stream of its own of the console: others read on meanwhile."""
        if self.wires.mgmt is not None or self.wires.console is None:
            return self._connect("mgmt", self.wires.mgmt, timeout_s)
        from hil.client.console_shell import ConsoleShell

        return ConsoleShell.connect(self._open_console(self.wires.console), timeout_s, self.type.runtime_python)

    def _connect(self, plane: str, wire: SshWire | None, timeout_s: float, broker: Path | None = None) -> Shell:
        if wire is None:
            raise UsageError(f"board {self.name} has no {plane} port", hint=f"add `{plane}:` to the bench file")
        opener = self.opener(plane)
        broker = broker if opener is None else None  # it is a socket of the bench's host
        try:
            return connect_shell(wire, broker=broker, timeout_s=timeout_s, guard=self.check, opener=opener)
        except BoardError:
            self.check()  # a board without power does not answer, and is not to blame
            raise

    def _token(self) -> str | None:
        return None if self.lease is None else self.lease.token

    def _driving(self) -> str:
        if self.lease is None:
            raise BenchError(f"board {self.name} may be driven only under a lease", hint="bench.lease([…])")
        self.lease.check(self.name)
        return self.lease.token

    def press(self, line: str, hold_s: float = 0.2) -> None:
        """Assert a control line of the bench file (power-button, reset, recovery) for `hold_s` seconds."""
        self._line(line, "press", hold_s)

    def hold_line(self, line: str) -> None:
        """Assert a control line until `release_line` or the end of the lease."""
        self._line(line, "hold")

    def release_line(self, line: str) -> None:
        """Let go of a control line."""
        self._line(line, "release")

    def _line(self, line: str, action: str, hold_s: float = 0.2) -> None:
        self._call("POST", f"lines/{line}", {"action": action, "hold_s": hold_s})

    def _call(self, method: str, path: str, body: object = None, timeout_s: float = POWER_TIMEOUT_S) -> Any:
        return self.bench.http.call(
            method, f"/v1/boards/{self.name}/{path}", body, token=self._driving(), timeout_s=timeout_s
        )


class Power:
    """The board's supply channels."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def on(self, voltage_v: float | None = None) -> Reading:
        """Output on through the safety sequence, at the board's nominal voltage or `voltage_v`; in a flight at the
        voltage of the bus. Raises SafetyError when a limit cannot be verified: the output is off then.
        """
        return self._act("on", voltage_v)

    def off(self) -> Reading:
        """Output off, verified by measurement. Raises SafetyError when the voltage stays."""
        return self._act("off", None)

    def off_timed(self) -> tuple[float, float]:
        """Off; monotonic seconds of the supply's answer to the command and of the measured proof."""
        self._board.accept_power_cut()
        answer = self._board._call("POST", "power", {"action": "off", "voltage_v": None})
        if self._board.lease is not None:
            self._board.lease.power_epochs[self._board.name] = answer["power_epoch"]
        return answer["off_s"], answer["verified_s"]

    def cycle(self, voltage_v: float | None = None) -> Reading:
        """Off, the board's off-dwell, and on again."""
        return self._act("cycle", voltage_v)

    def read(self) -> Reading:
        """The newest measurement; needs no lease."""
        return _reading(self._board.bench.http.get(f"/v1/boards/{self._board.name}/power"))

    def brown_out(self, depth_v: float, duration_s: float) -> BrownOut:
        """Lower the bus by `depth_v` for `duration_s` (10 ms to 60 s), as fast as the supply allows: the result says
        what was reached. Every input that the bus feeds dips, begun together (`others`). Raises UsageError, with
        nothing sent, outside the board's envelope.
        """
        self._board.accept_power_cut()
        answer = self._fault("brown-out", {"depth_v": depth_v, "duration_s": duration_s}, duration_s)
        return BrownOut.of(answer)

    def latch_up(
        self,
        threshold_a: float,
        hold_s: float,
        off_s: float,
        *,
        added_a: float = 0.0,
        wait_s: float = 60.0,
        input: str | None = None,
    ) -> LatchUp:
        """Cut the board when any of its inputs, or `input` alone, draws more than `threshold_a` for `hold_s`; rest for
        `off_s`, start it again.

        `added_a` is added to what is measured at `input` (else the leading one), so that a latch-up can be emulated
        without an electronic load. Raises UsageError for a threshold above an input's limit, BenchError when no current
        stayed above it within `wait_s`.
        """
        self._board.accept_power_cut()
        body: dict[str, Any] = {"threshold_a": threshold_a, "hold_s": hold_s, "off_s": off_s}
        body |= {"added_a": added_a, "wait_s": wait_s, "input": input}
        answer = self._fault("latch-up", body, wait_s + off_s)
        offset = answer.get("console_offset")
        if offset is not None:
            self._board.console.seek(offset)
        off_s = answer["on_s"] - answer["cut_s"]
        names = ("held_s", "peak_a", "energy_above_j", "added_a", "input")
        return LatchUp(**{name: answer[name] for name in names}, off_s=off_s)

    def cut_at(
        self,
        pattern: str | None = None,
        *,
        byte_offset: int | None = None,
        delay_s: float = 0.0,
        timeout_s: float = 120.0,
    ) -> CutAt:
        """Arm a power cut at a place on the console: a regular expression, or so many bytes from now on.

        The daemon watches and cuts; this returns at once. Raises UsageError for a board without a console.
        """
        body = {"pattern": pattern, "byte_offset": byte_offset, "delay_s": delay_s, "timeout_s": timeout_s}
        self._board._call("POST", "power/cut-at", body)

        def call(method: str, wait_s: float) -> Mapping[str, Any]:
            path = f"/v1/boards/{self._board.name}/power/cut-at"
            if method == "DELETE":
                answer: Mapping[str, Any] = self._board._call("DELETE", "power/cut-at")
                return answer
            answer = self._board.bench.http.get(f"{path}?wait_s={wait_s:g}", timeout_s=wait_s + POWER_TIMEOUT_S)
            return answer

        return CutAt(call, self._board.accept_power_cut, self._board.name)

    def outlet(self, on: bool | None = None) -> bool | None:
        """What the outlet behind the supply says, after switching it if asked to; None when it cannot say."""
        body = None if on is None else {"on": on}
        if body is None:
            answer = self._board.bench.http.get(f"/v1/boards/{self._board.name}/outlet")
        else:
            answer = self._board._call("POST", "outlet", body)
        value: bool | None = answer["on"]
        return value

    def _fault(self, path: str, body: object, lasts_s: float) -> dict[str, Any]:
        answer: dict[str, Any] = self._board._call("POST", f"power/{path}", body, POWER_TIMEOUT_S + lasts_s)
        if self._board.lease is not None:
            self._board.lease.power_epochs[self._board.name] = answer["power_epoch"]
        return answer

    def _act(self, action: str, voltage_v: float | None) -> Reading:
        self._board.accept_power_cut()  # also of a call that fails half-way: what it cut, the client cut
        answer = self._board._call("POST", "power", {"action": action, "voltage_v": voltage_v})
        if self._board.lease is not None:
            self._board.lease.power_epochs[self._board.name] = answer["power_epoch"]
        offset = answer.get("console_offset")
        if action != "off" and offset is not None:
            # What the board said in its earlier life must not satisfy the next expect.
            self._board.console.seek(offset)
        return _reading(answer)


class Link:
    """The emulator between ground and board. Without one in the bench file every call is a UsageError."""

    def __init__(self, board: Board) -> None:
        self._board = board

    def set(self, uplink: LinkState, downlink: LinkState | None = None) -> dict[str, Any]:
        """Apply both directions whole (`downlink` None: the same); returns their times, read back."""
        body = {"uplink": asdict(uplink), "downlink": asdict(uplink if downlink is None else downlink)}
        value: dict[str, Any] = self._board._call("PUT", "link", body)
        return value

    def clear(self) -> None:
        """Remove what hil added to the emulator, and nothing else."""
        self._board._call("DELETE", "link")

    def state(self) -> dict[str, Any]:
        """What is applied now; needs no lease."""
        value: dict[str, Any] = self._board.bench.http.get(f"/v1/boards/{self._board.name}/link")
        return value


def _reading(value: Mapping[str, Any]) -> Reading:
    names = ("time_s", "voltage_v", "current_a", "power_w", "output_on", "exchange_s")
    return Reading(**{name: value[name] for name in names})


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())
