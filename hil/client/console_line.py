"""What carries a console's bytes to its user: the daemon's stream of a leased board, or a port of one's own."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from hil.bench.sockets import error_from
from hil.client.handshake import ask
from hil.drivers.serial_port import Port
from hil.errors import BenchError

CONNECT_S = 5.0
WRITE_S = 5.0
RECEIVE_BYTES = 1 << 16


class Line(Protocol):
    """A byte stream with offsets. Every method raises BenchError when the line is not there."""

    @property
    def connected(self) -> bool: ...

    def connect(self, since: int | None) -> tuple[int, bytes]:
        """Begin at offset `since`, or now: the offset, and the bytes from there on that have come with the answer."""
        ...

    def receive(self, timeout_s: float) -> bytes:
        """The next bytes; b"" after the time-out."""
        ...

    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class DaemonLine:
    """The daemon's stream at `path`; `token` gives the lease's token, or None for a reader."""

    def __init__(self, board: str, path: Path, token: Callable[[], str | None]) -> None:
        self._board = board
        self._path = path
        self._token = token
        self._sock: socket.socket | None = None
        self._poll = select.poll()

    @property
    def connected(self) -> bool:
        return self._sock is not None

    def fileno(self) -> int:
        """To wait on beside others; -1 when it is not connected."""
        return -1 if self._sock is None else self._sock.fileno()

    def connect(self, since: int | None) -> tuple[int, bytes]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONNECT_S)
            sock.connect(os.fspath(self._path))
            answer, rest = ask(sock, {"token": self._token(), "since": since})
        except (OSError, ValueError) as error:
            sock.close()
            raise BenchError(
                f"board {self._board}: no console stream at {self._path}: {error}",
                hint="is the daemon running, and does the bench file give the board a console?",
            ) from error
        if "offset" not in answer:
            sock.close()
            raise error_from(answer, f"console of board {self._board}")
        offset = int(answer["offset"])
        if since is not None and offset != since:
            sock.close()
            raise BenchError(
                f"board {self._board}: console bytes {since} to {offset} are no longer in the daemon's memory",
                hint="the console log has them; begin the expect later",
            )
        self._sock = sock
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        return offset, rest

    def receive(self, timeout_s: float) -> bytes:
        sock = self._sock
        if sock is None:
            raise self._ended()
        try:
            if not self._poll.poll(max(timeout_s, 0.0) * 1000):
                return b""
            data = sock.recv(RECEIVE_BYTES)
        except OSError:
            data = b""
        if not data:
            self.close()
            raise self._ended()
        return data

    def write(self, data: bytes) -> None:
        if self._sock is None or self._token() is None:
            raise BenchError(f"board {self._board}: writing to the console needs a lease", hint="bench.lease([…])")
        try:
            self._sock.sendall(data)
        except OSError as error:
            self.close()
            raise self._ended() from error

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _ended(self) -> BenchError:
        return BenchError(
            f"board {self._board}: the console stream ended",
            hint="the lease is over, the daemon is gone, or this client read too slowly",
        )


class PortLine:
    """A port that this process owns, without a daemon: opened by `dial` when first used, and again after it was lost.

    Its offsets count from the first opening on; there is no way back to earlier bytes.
    """

    def __init__(self, board: str, dial: Callable[[], Port]) -> None:
        self._board = board
        self._dial = dial
        self._port: Port | None = None
        self._offset = 0
        self._poll = select.poll()

    @property
    def connected(self) -> bool:
        return self._port is not None

    def connect(self, since: int | None) -> tuple[int, bytes]:
        if since is not None and since != self._offset:
            raise BenchError(f"board {self._board}: a port of one's own cannot go back to byte {since} of the console")
        if self._port is None:
            try:
                self._port = self._dial()
            except OSError as error:
                raise BenchError(f"board {self._board}: its console is not there: {error.strerror or error}") from error
            self._poll = select.poll()
            self._poll.register(self._port.fileno(), select.POLLIN)
        return self._offset, b""

    def receive(self, timeout_s: float) -> bytes:
        port = self._port
        if port is None:
            raise BenchError(f"board {self._board}: its console is not open")
        try:
            if not self._poll.poll(max(timeout_s, 0.0) * 1000):
                return b""
            data = port.read()
        except OSError as error:
            self.close()
            raise BenchError(f"board {self._board}: its console went away: {error.strerror or error}") from error
        self._offset += len(data)
        return data

    def write(self, data: bytes) -> None:
        deadline = time.monotonic() + WRITE_S
        while data:
            port = self._port
            if port is None:
                raise BenchError(f"board {self._board}: its console is not open")
            try:
                taken = port.write(data)
            except OSError as error:
                self.close()
                raise BenchError(f"board {self._board}: its console went away: {error.strerror or error}") from error
            data = data[taken:]
            if data and taken == 0:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise BenchError(f"board {self._board}: its console takes no bytes, {len(data)} are left")
                writable = select.poll()
                writable.register(port.fileno(), select.POLLOUT)
                writable.poll(left_s * 1000)

    def close(self) -> None:
        if self._port is not None:
            self._port.close()
            self._port = None
