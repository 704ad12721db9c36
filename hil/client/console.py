"""A board's console as a test holds it: expect, send, log in, run a command framed so that kernel logs cannot break it.

The stream begins where the console was first used or where the board's power was last switched on, whichever is
later: output of an earlier life of the board never satisfies an `expect`.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hil.bench.sockets import error_from
from hil.client.expect import Match, Pattern, Search
from hil.errors import BenchError, BoardError
from hil.model import Completed

__all__ = ["Console", "Match"]

CONNECT_S = 5.0
LOGIN_TRY_S = 8.0
RECEIVE_BYTES = 1 << 16
WATCH_S = 1.0  # how often a silent wait asks whether the board is still there to be waited for


class Console:
    """One client's view of a board's console. Not for several threads at once.

    `path` is the daemon's raw byte stream; `token` gives the lease's token or None for a reader. `guard` is asked
    before each call and after one that failed; it raises BenchError when the bench took the board away (`Board.check`).
    """

    def __init__(
        self,
        board: str,
        path: Path,
        token: Callable[[], str | None],
        death: Iterable[str] = (),
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.board = board
        self._guard = guard or (lambda: None)
        self._path = path
        self._token = token
        self._death = tuple(death)
        self._sock: socket.socket | None = None
        self._stream_end = 0
        self._position = 0
        # Bytes received beyond what was searched, from `_position` to `_stream_end`.
        self._held = bytearray()

    def mark(self) -> int:
        """The stream's present end, for `expect(since=…)`."""
        self._guard()
        self._connect(None)
        self._receive_ready()
        return self._stream_end

    def seek(self, offset: int) -> None:
        """The next `expect` begins at this stream offset."""
        begin = self._stream_end - len(self._held)
        if self._sock is not None and begin <= offset <= self._stream_end:
            del self._held[: offset - begin]
        else:
            self._disconnect()
            self._connect(offset)
        self._position = offset

    def expect(
        self, pattern: str, timeout_s: float, *, since: int | None = None, death: Iterable[str] | None = None
    ) -> Match:
        """Wait until the console has said `pattern` (a bounded regular expression over its UTF-8 bytes).

        The next call goes on behind the match. Raises BoardError quoting the last bytes after `timeout_s`, or when a
        death string (board type's `boot.death`, or `death`) comes first; UsageError for an unbounded pattern.
        """
        self._guard()
        wanted = Pattern(pattern)
        fatal = [Pattern(item) for item in (self._death if death is None else death)]
        if since is not None:
            self.seek(since)
        else:
            self._connect(None)
        search = Search(wanted, fatal, start=self._position)
        deadline = time.monotonic() + timeout_s
        search.feed(bytes(self._held))
        while True:
            try:
                match = search.found(time.monotonic())
            except BoardError as error:
                raise BoardError(f"board {self.board}: {error.message}") from None
            if match is not None:
                break
            left_s = deadline - time.monotonic()
            data = self._receive(min(left_s, WATCH_S)) if left_s > 0 else b""
            if not data:
                self._guard()  # a board whose power was cut is not to blame for its silence
            if left_s <= 0:
                what = f"{pattern!r} did not come within {timeout_s:.3g} s"
                raise BoardError(f"board {self.board}: {what}; last bytes:\n{search.last()}")
            search.feed(data)
        del self._held[: len(self._held) - (self._stream_end - match.offset)]
        self._position = match.offset
        return match

    def send(self, text: str, end: str = "\n") -> None:
        """Write to the board; needs a lease."""
        self.write((text + end).encode())

    def write(self, data: bytes) -> None:
        """Write raw bytes to the board; needs a lease."""
        self._guard()
        self._connect(None)
        if self._sock is None or self._token() is None:
            raise BenchError(f"board {self.board}: writing to the console needs a lease", hint="bench.lease([…])")
        try:
            self._sock.sendall(data)
        except OSError as error:
            self._disconnect()
            raise self._ended() from error

    def login(self, user: str = "root", password: str | None = None, timeout_s: float = 30.0) -> None:
        """Log in at a login prompt; a shell that is there already is left as it is. Raises BoardError.

        Tries again until a command answers: kernel messages may tear a prompt, and `login` drops what was typed
        before its shell runs.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                self._login_once(user, password, min(left_s, LOGIN_TRY_S))
                return
            except BoardError:
                if time.monotonic() + 0.5 > deadline:
                    raise

    def _login_once(self, user: str, password: str | None, timeout_s: float) -> None:
        self.send("")
        # A prompt is the last thing said: a '#' in the middle of a kernel message is none.
        if "login" in self.expect(r"login: ?|[#$] ?\Z", timeout_s).text:
            self.send(user)
            if password is not None:
                self.expect(r"[Pp]assword: ?", timeout_s)
                self.send(password)
            self.expect(r"[#$] ?\Z", timeout_s)
        self.run("true", timeout_s=timeout_s)

    def run(self, command: str, timeout_s: float = 30.0) -> Completed:
        """Run one shell line and return its output (stderr is mixed in, as on any terminal).

        The output stands between two marks that carry a fresh nonce; the echo of the command does not contain them
        (they are written with a quote inside), so neither echo nor kernel messages can be taken for the result.
        """
        nonce = secrets.token_hex(4)
        started = time.monotonic()
        self.send(f"echo H'IL'-{nonce}-B; {command}; echo H'IL'-{nonce}-E-$?")
        self.expect(rf"HIL-{nonce}-B\r?\n", timeout_s)
        done = self.expect(rf"HIL-{nonce}-E-(\d{{1,3}})\r?\n", max(timeout_s - (time.monotonic() - started), 0.01))
        output = done.before.replace("\r\n", "\n")
        return Completed((command,), output, "", int(done.groups[0] or 0), time.monotonic() - started)

    def read_available(self) -> bytes:
        """What has come since the last expect, without waiting; it is consumed."""
        self._guard()
        self._connect(None)
        self._receive_ready()
        data = bytes(self._held)
        self._held.clear()
        self._position = self._stream_end
        return data

    def close(self) -> None:
        self._disconnect()

    def _connect(self, since: int | None) -> None:
        if self._sock is not None:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONNECT_S)
            sock.connect(os.fspath(self._path))
            sock.sendall(json.dumps({"token": self._token(), "since": since}).encode() + b"\n")
            answer, rest = _read_line(sock)
        except (OSError, ValueError) as error:
            sock.close()
            raise BenchError(
                f"board {self.board}: no console stream at {self._path}: {error}",
                hint="is the daemon running, and does the bench file give the board a console?",
            ) from error
        if "offset" not in answer:
            sock.close()
            raise error_from(answer, f"console of board {self.board}")
        offset = int(answer["offset"])
        if since is not None and offset != since:
            sock.close()
            raise BenchError(
                f"board {self.board}: console bytes {since} to {offset} are no longer in the daemon's memory",
                hint="the console log has them; begin the expect later",
            )
        self._sock = sock
        self._position = offset
        self._held = bytearray(rest)
        self._stream_end = offset + len(rest)

    def _receive(self, timeout_s: float) -> bytes:
        """The next bytes, b"" after the time-out."""
        self._connect(None)
        sock = self._sock
        if sock is None:
            raise self._ended()
        try:
            if not select.select([sock], [], [], timeout_s)[0]:
                return b""
            data = sock.recv(RECEIVE_BYTES)
        except OSError:
            data = b""
        if not data:
            self._disconnect()
            raise self._ended()
        self._held += data
        self._stream_end += len(data)
        return data

    def _receive_ready(self) -> None:
        while self._receive(0):
            pass

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._held.clear()

    def _ended(self) -> BenchError:
        return BenchError(
            f"board {self.board}: the console stream ended",
            hint="the lease is over, the daemon is gone, or this client read too slowly",
        )


def _read_line(sock: socket.socket) -> tuple[dict[str, Any], bytes]:
    data = b""
    while b"\n" not in data:
        more = sock.recv(4096)
        if not more:
            raise ConnectionError("the daemon closed it")
        data += more
    line, _, rest = data.partition(b"\n")
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError("not a handshake")
    return answer, rest
