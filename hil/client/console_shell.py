"""A board's shell over its serial console, for boards without a management address: calls as of `hil.drivers.ssh`.

Slower than SSH and one call at a time, but exact: see `hil.client.console_frames`. The console stays readable for
everybody else meanwhile, and all of it is in the log.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import secrets
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hil.client.console import Console
from hil.client.console_frames import upload_line
from hil.drivers.ssh import Detached, ShellTimeout
from hil.errors import BenchError, BoardError
from hil.model import Completed

RELAY = Path(__file__).with_name("console_relay.py")
SEND_BYTES = 600
SEND_LINES = 3  # less than 4 KiB wait in the board's terminal
AGAIN_S = 1.0  # a frame that did not come within this is asked for
SMALL_BYTES = 4 << 20  # larger files are not for a console


class ConsoleShell:
    """Commands, files and connections over a console of its own, logged in at `connect`. Calls come one at a time.

    What a command writes to stderr comes among its stdout. A program in the foreground has no input.
    """

    def __init__(self, console: Console, python: str = "python3") -> None:
        self._console = console
        self._python = python
        self._lock = threading.RLock()
        self._relay_path: str | None = None
        self.name = f"console of {console.board}"
        self.alive = True

    @classmethod
    def connect(cls, console: Console, timeout_s: float, python: str = "python3") -> ConsoleShell:
        """Log in, or find the shell that is there. Raises BoardError."""
        console.login(timeout_s=timeout_s)
        return cls(console, python)

    def run(self, argv: Sequence[str], timeout_s: float, check: bool = False) -> Completed:
        """Run a command to its end. `check`: a status other than 0 raises BoardError.

        Past `timeout_s` it is interrupted and BoardError raised.
        """
        if not argv:
            raise ValueError("argv is empty")
        with self._alone(timeout_s):
            done = self._console.run(shlex.join(argv), timeout_s, check)
        return Completed(tuple(argv), done.stdout, "", done.returncode, done.duration_s)

    def start(self, argv: Sequence[str], timeout_s: float = 10.0) -> ConsoleProcess:
        """Start a command in the background; what it prints is kept on the board. Needs `setsid` or `python3` there."""
        if not argv:
            raise ValueError("argv is empty")
        directory = f"/tmp/hil-{secrets.token_hex(6)}"  # noqa: S108  (on the board, with a name nobody can guess)
        return ConsoleProcess(self, Detached.start(self, argv, directory, timeout_s))

    def boot_id(self, timeout_s: float = 10.0) -> str:
        """The kernel's id of this boot."""
        return self.run(["cat", "/proc/sys/kernel/random/boot_id"], timeout_s, check=True).stdout.strip()

    def put(self, source: Path, target: str, timeout_s: float = 300.0) -> None:
        """Copy a small file to the board, hash-checked. Raises BenchError above 4 MiB: that is not for a console."""
        if source.stat().st_size > SMALL_BYTES:
            raise BenchError(
                f"{source} is too large for the console of board {self._console.board}",
                hint="add `mgmt:` to the bench file, or bring it there over the payload link",
            )
        with self._alone(timeout_s):
            self._console.put(source, target, timeout_s)

    def get(self, path: str, timeout_s: float = 300.0) -> bytes:
        """A small file of the board, hash-checked."""
        with self._alone(timeout_s):
            return self._console.get(path, timeout_s)

    def forward(self, host: str, port: int, timeout_s: float = 10.0) -> Forward:
        """A byte stream to `host`:`port` as seen from the board, for HTTP and the like. Needs Python there.

        Socket-like: sendall, recv, settimeout, close. Until it is closed no other call has its turn.
        """
        if not self._lock.acquire(timeout=timeout_s):
            raise BoardError(f"{self.name} is busy with another call")
        try:
            with self._losing():
                return Forward(self._console, self._lock, self._relay(), self._python, host, port, timeout_s)
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        """Leave the console; the shell stays logged in there."""
        self.alive = False
        self._console.close()

    abort = close

    @contextlib.contextmanager
    def _alone(self, timeout_s: float) -> Iterator[None]:
        if not self._lock.acquire(timeout=timeout_s):
            raise BoardError(f"{self.name} is busy with another call")
        try:
            with self._losing():
                yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """A call that the bench broke ends the connection, as with SSH: the next one logs in again."""
        try:
            yield
        except BenchError:
            self.alive = False
            raise

    def _relay(self) -> str:
        if self._relay_path is None:
            program = RELAY.read_bytes()
            path = f"/tmp/hil-relay-{hashlib.sha256(program).hexdigest()[:12]}.py"  # noqa: S108
            self._console.put(program, path)
            self._relay_path = path
        return self._relay_path


class ConsoleProcess:
    """A command in the background of the board; it goes on when the console is left."""

    def __init__(self, shell: ConsoleShell, job: Detached) -> None:
        self._shell, self._job, self.argv = shell, job, job.argv

    @property
    def running(self) -> bool:
        return self._job.poll(self._shell) is None

    def wait(self, timeout_s: float) -> Completed:
        """Its output and status; past `timeout_s` it is killed and ShellTimeout (a BoardError) raised."""
        try:
            return self._job.wait(self._shell, timeout_s)
        except ShellTimeout:
            self.kill()
            raise

    def kill(self) -> None:
        """Kill it and what it started."""
        self._job.kill(self._shell)


class Forward:
    """One TCP connection of the board, carried over its console. Raises OSError as a socket does."""

    def __init__(
        self, console: Console, lock: threading.RLock, relay: str, python: str, host: str, port: int, timeout_s: float
    ) -> None:
        self._console = console
        self._lock = lock
        self._python = python
        self._nonce = secrets.token_hex(4)
        self._timeout_s: float | None = timeout_s
        self._data = bytearray()
        self._sent = self._taken = self._frame = 0
        self._ended = self._closed = False
        self._frames: dict[int, bytes] = {}
        console.type(f"{python} {relay} {self._nonce} {host} {port}")
        refused = self._opened(f"{host}:{port}", timeout_s)
        if refused is not None:
            self._closed = True
            console.write(b". . 0\n")
            raise BoardError(f"board {console.board}: {host}:{port}: {refused}")
        pattern = r"(A)-(\d{1,9})|(D)-(\d{1,9})-([A-Za-z0-9+/=]{0,700})-(\d{1,4})|(Z)-(\d{1,9})"
        self._pattern = rf"HIL-{self._nonce}-(?:{pattern})\."

    def settimeout(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s

    def sendall(self, data: bytes) -> None:
        """Send all of it; returns once the board's end has taken it."""
        pieces = [bytes(data[at : at + SEND_BYTES]) for at in range(0, len(data), SEND_BYTES)]
        first, deadline = self._taken, self._deadline()
        while self._taken < first + len(pieces):
            while self._sent < first + len(pieces) and self._sent - self._taken < SEND_LINES:
                self._console.write(upload_line(self._sent + 1, pieces[self._sent - first]))
                self._sent += 1
            if not self._hear(deadline):
                self._sent = self._taken  # an answer or a line was lost: from where the board says it is

    def recv(self, size: int) -> bytes:
        """Some bytes; b"" at the connection's end. Raises TimeoutError."""
        deadline = self._deadline()
        while not self._data:
            if self._ended:
                return b""
            self._hear(deadline)
        data = bytes(self._data[:size])
        del self._data[:size]
        return data

    def close(self) -> None:
        """End the connection and give the console free."""
        if self._closed:
            return
        self._closed = True
        try:
            with contextlib.suppress(BoardError, BenchError):
                self._console.write(b". . 0\n")
        finally:
            self._lock.release()

    def _opened(self, where: str, timeout_s: float) -> str | None:
        """Wait for the relay's first word, asked for again when it was torn: why it could not connect, if so."""
        deadline = time.monotonic() + timeout_s
        pattern = rf"HIL-{self._nonce}-(?:A-0|X-([A-Za-z0-9+/=]{{0,400}}))\."
        while (match := self._console.find(pattern, min(AGAIN_S, timeout_s))) is None:
            if time.monotonic() > deadline:
                raise BoardError(
                    f"board {self._console.board}: nothing that leads to {where} answered within {timeout_s:g} s",
                    hint=f"is {self._python} on the board? it carries connections over the console",
                )
            self._console.write(b"? 0 0\n")
        told = match.groups[0]
        return None if told is None else base64.b64decode(told).decode("utf-8", "replace")

    def _deadline(self) -> float:
        return time.monotonic() + (3600.0 if self._timeout_s is None else self._timeout_s)

    def _hear(self, deadline: float) -> bool:
        """Take one frame; False, and everything is asked for again, when none comes for a moment."""
        if self._closed:
            raise OSError("the forward is closed")
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        match = self._console.find(self._pattern, min(left_s, AGAIN_S))
        if match is None:
            self._console.write(b"? %d 0\n" % self._frame)
            return False
        kinds = match.groups
        if kinds[0] is not None:
            self._taken = max(self._taken, int(kinds[1] or 0))
        elif kinds[2] is not None:
            self._take(int(kinds[3] or 0), kinds[4] or "", int(kinds[5] or 0))
        elif int(kinds[7] or 0) == self._frame:
            self._ended = True
        else:
            self._console.write(b"? %d 0\n" % self._frame)
        return True

    def _take(self, number: int, text: str, length: int) -> None:
        if len(text) == length:
            self._frames[number] = base64.b64decode(text)
        if number > self._frame and self._frame not in self._frames:
            self._console.write(b"? %d 0\n" % self._frame)  # the one before was torn
        while self._frame in self._frames:
            self._data += self._frames.pop(self._frame)
            self._frame += 1
        for old in [number for number in self._frames if number < self._frame]:
            del self._frames[old]
