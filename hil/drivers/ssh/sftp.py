"""SFTP as much as transfers need (draft-ietf-secsh-filexfer-02): many requests under way, counted in and out.

paramiko's own client keeps one request waiting for the last or reads ahead without bound; neither tells what is
confirmed, which is what resuming lives on.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hil.errors import BoardError

if TYPE_CHECKING:
    import paramiko

_INIT, _VERSION, _OPEN, _CLOSE, _READ, _WRITE, _FSTAT, _FSETSTAT = 1, 2, 3, 4, 5, 6, 8, 10
_STATUS, _HANDLE, _DATA, _ATTRS, _EXTENDED, _REPLY = 101, 102, 103, 105, 200, 201
_OK, _EOF = 0, 1
_FSYNC = b"fsync@openssh.com"  # OpenSSH's PROTOCOL file, section 4.4
_LIMITS = b"limits@openssh.com"  # section 4.8
_WRITE_BYTES = 32768  # what every server takes
_PIECE_BYTES = 32704  # of one channel packet, with what paramiko leaves for its header
_PF_READ, _PF_WRITE, _PF_CREAT, _ATTR_SIZE = 1, 2, 8, 1


class SftpError(BoardError):
    """The board's SFTP server refused: no space, no permission, a wrong path."""


def sftp_packet(kind: int, *fields: int | bytes | tuple[int]) -> bytes:
    """One SFTP packet: an int is a uint32, bytes a string, a 1-tuple of int a uint64."""
    body = [bytes([kind])]
    for item in fields:
        if isinstance(item, int):
            body.append(struct.pack(">I", item))
        elif isinstance(item, tuple):
            body.append(struct.pack(">Q", item[0]))
        else:
            body += struct.pack(">I", len(item)), item
    return b"".join((struct.pack(">I", sum(map(len, body))), *body))


class SftpDecoder:
    """Cuts a byte stream into (type, request id, rest of the packet); the rest of a large one is not copied again."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._needed = 4  # bytes of the packet that begins, its length included once it is known

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes | memoryview]]:
        """Add bytes and yield every packet that is whole."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size < self._needed:
            return
        stream, at = b"".join(self._pieces), 0
        try:
            while len(stream) >= at + 4:
                (length,) = struct.unpack_from(">I", stream, at)
                if not 5 <= length <= 1 << 20:
                    raise EOFError(f"not an SFTP stream (packet of {length} bytes)")
                if len(stream) < at + 4 + length:
                    self._needed = 4 + length
                    return
                kind, number = struct.unpack_from(">BI", stream, at + 4)
                body = memoryview(stream)[at + 9 : at + 4 + length]
                at += 4 + length
                self._needed = 4
                yield kind, number, body if kind == _DATA else bytes(body)
        finally:
            self._pieces, self._size = [stream[at:]], len(stream) - at


class RemoteFile:
    """A file on the board, open for reading or writing, with its requests counted in and out."""

    def __init__(self, channel: paramiko.Channel, path: str, timeout_s: float, *, write: bool) -> None:
        self._channel, self._path, self._timeout_s = channel, path, timeout_s
        self._decoder, self._ready = SftpDecoder(), deque[tuple[int, int, bytes | memoryview]]()
        self._next = 1
        self.received = 0  # bytes of answers so far, also of one that is not whole yet
        channel.settimeout(timeout_s)
        channel.sendall(sftp_packet(_INIT, 3))
        kind, _, version = self._receive()
        extensions = bytes(version)
        if kind != _VERSION:
            raise EOFError("the far end does not speak SFTP")
        self.can_sync = _FSYNC in extensions
        self.most_write_bytes = _WRITE_BYTES
        mode = _PF_WRITE | _PF_CREAT if write else _PF_READ
        limits = self._send(_EXTENDED, _LIMITS) if write and _LIMITS in extensions else None
        opening = self._send(_OPEN, path.encode(), mode, 0)
        if limits is not None:
            self.most_write_bytes = struct.unpack_from(">4Q", self._answer(limits, _REPLY))[2] or _WRITE_BYTES
        self._handle = self._string(self._answer(opening, _HANDLE))

    def size(self) -> int:
        """Bytes."""
        body = self._ask(_ATTRS, _FSTAT, self._handle)
        flags, size = struct.unpack_from(">IQ", body)
        if not flags & _ATTR_SIZE:
            raise SftpError(f"{self._path}: the server does not tell the file's size")
        return int(size)

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes."""
        self._ask(_STATUS, _FSETSTAT, self._handle, _ATTR_SIZE, (size,))

    def close(self) -> None:
        """Close the file on the board and hear that it did."""
        self._ask(_STATUS, _CLOSE, self._handle)

    def write(self, offset: int, data: bytes) -> int:
        """Send one write request of at most `most_write_bytes` without waiting; returns its number."""
        return self._send(_WRITE, self._handle, (offset,), data)

    def read(self, offset: int, length: int) -> int:
        """Send one read request without waiting; returns its number. The server may answer with fewer bytes."""
        return self._send(_READ, self._handle, (offset,), length)

    def sync(self) -> int:
        """Send one request to put on disk what was written, without waiting; returns its number."""
        return self._send(_EXTENDED, _FSYNC, self._handle)

    def acknowledged(self, wait_s: float) -> list[int]:
        """Numbers of the writes and syncs that the server has confirmed since, waiting for one at most `wait_s`."""
        return [number for number, _ in self._answers(_STATUS, wait_s)]

    def arrived(self, wait_s: float) -> list[tuple[int, bytes | memoryview]]:
        """Reads that the server has answered since: number and bytes, none at the end of the file. Waits likewise."""
        return self._answers(_DATA, wait_s)

    def _answers(self, expected: int, wait_s: float) -> list[tuple[int, bytes | memoryview]]:
        if not self._ready and (wait_s > 0 or self._channel.recv_ready()):
            self._channel.settimeout(max(wait_s, 0.001))
            try:
                self._fill()
            except TimeoutError:
                return []
            finally:
                self._channel.settimeout(self._timeout_s)
        found: list[tuple[int, bytes | memoryview]] = []
        while self._ready:
            kind, number, body = self._ready.popleft()
            if expected == _DATA and kind == _STATUS and body[:4] == struct.pack(">I", _EOF):
                found.append((number, b""))
                continue
            self._check(expected, kind, body)
            found.append((number, body[4:]))
        return found

    def _send(self, kind: int, *fields: int | bytes | tuple[int]) -> int:
        number = self._next
        self._next += 1
        packet = sftp_packet(kind, number, *fields)
        for at in range(0, len(packet), _PIECE_BYTES):  # left to `sendall`, each piece copies all that is behind it
            self._channel.sendall(packet[at : at + _PIECE_BYTES])
        return number

    def _ask(self, expected: int, kind: int, *fields: int | bytes | tuple[int]) -> bytes:
        return self._answer(self._send(kind, *fields), expected)

    def _answer(self, number: int, expected: int) -> bytes:
        kind, got, body = self._receive()
        if got != number:
            raise EOFError(f"SFTP answer {got} to request {number}")
        self._check(expected, kind, body)
        return bytes(body)

    def _receive(self) -> tuple[int, int, bytes | memoryview]:
        while not self._ready:
            self._fill()
        return self._ready.popleft()

    def _fill(self) -> None:
        data = self._channel.recv(1 << 18)
        if not data:
            raise EOFError("connection lost")
        self.received += len(data)
        self._ready.extend(self._decoder.feed(data))

    def _check(self, expected: int, kind: int, body: bytes | memoryview) -> None:
        if kind == _STATUS:
            (code,) = struct.unpack_from(">I", body)
            if code != _OK or expected != _STATUS:
                raise SftpError(
                    f"{self._path}: {self._string(bytes(body[4:])).decode(errors='replace')} (SFTP status {code})"
                )
        elif kind != expected:
            raise EOFError(f"SFTP answer of type {kind}")

    @staticmethod
    def _string(body: bytes) -> bytes:
        (length,) = struct.unpack_from(">I", body)
        return body[4 : 4 + length]
