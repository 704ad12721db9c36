"""Where Ethernet frames come from and go to in user space: QEMU's stream sockets, TAP and TUN interfaces.

Written `listen:PATH` or `connect:PATH` (a unix socket, frames as QEMU's `-netdev stream` sends them: a 4-byte
big-endian length, then the frame), `tap:NAME`, `tun:NAME` (IP packets), or `broker:SOCKET:NAME` (the TAP that the
payload broker made).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Protocol

from hil.drivers import broker
from hil.errors import BenchError, UsageError

MAX_FRAME_BYTES = 65536
_AT_ONCE = 64  # frames read before anything else is looked at
_TUNSETIFF, _IFF_TUN, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0001, 0x0002, 0x1000
_BUFFER_BYTES = 4 << 20


class FramePort(Protocol):
    """A port of the emulator. Nothing blocks: frames that the other side does not take are dropped and counted."""

    dropped: int

    def descriptors(self) -> list[int]:
        """What to wait on for reading."""

    def read(self, descriptor: int) -> list[bytes]:
        """The frames that have come in there; fewer than there are, when there are many."""

    def write(self, frame: bytes) -> None:
        """Send a frame."""

    def close(self) -> None:
        """Give it up."""


class TapPort:
    """A TAP or TUN descriptor: a frame a read."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self.dropped = 0

    def descriptors(self) -> list[int]:
        return [self._descriptor]

    def read(self, descriptor: int) -> list[bytes]:
        frames: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while len(frames) < _AT_ONCE:
                frames.append(os.read(descriptor, MAX_FRAME_BYTES))
        return frames

    def write(self, frame: bytes) -> None:
        try:
            os.write(self._descriptor, frame)
        except OSError:  # the interface is down, or full
            self.dropped += 1

    def close(self) -> None:
        os.close(self._descriptor)


class StreamPort:
    """A unix stream socket with length-prefixed frames; as a listener it takes whoever came last, one at a time."""

    def __init__(self, listener: socket.socket | None, peer: socket.socket | None, path: Path) -> None:
        self._listener, self._path = listener, path
        self._peer: socket.socket | None = None
        self._buffer = bytearray()
        self._unsent = bytearray()
        self.dropped = 0
        if peer is not None:
            self._take(peer)

    @classmethod
    def listen(cls, path: Path) -> StreamPort:
        """Listen there, mode 0600; the file is removed at the end."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        path.unlink(missing_ok=True)
        try:
            listener.bind(os.fspath(path))
        except OSError as error:
            raise BenchError(f"cannot listen on {path}: {error}") from error
        path.chmod(0o600)
        listener.listen(4)
        return cls(listener, None, path)

    @classmethod
    def connect(cls, path: Path) -> StreamPort:
        """Connect to a listener. BenchError when nobody listens."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.connect(os.fspath(path))
        except OSError as error:
            raise BenchError(f"nobody listens on {path}: {error}") from error
        return cls(None, peer, path)

    def descriptors(self) -> list[int]:
        return [item.fileno() for item in (self._listener, self._peer) if item is not None]

    def read(self, descriptor: int) -> list[bytes]:
        if self._listener is not None and descriptor == self._listener.fileno():
            with contextlib.suppress(OSError):
                self._take(self._listener.accept()[0])
            return []
        if self._peer is None or descriptor != self._peer.fileno():
            return []
        try:
            data = self._peer.recv(1 << 18)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._forget()
            return []
        self._buffer += data
        return self._frames()

    def write(self, frame: bytes) -> None:
        if self._peer is None:
            self.dropped += 1
            return
        # The rest of a frame that was cut short goes first, or the other side reads nonsense from there on.
        if self._unsent and not self._push(b""):
            self.dropped += 1
            return
        self._push(struct.pack(">I", len(frame)) + frame)

    def close(self) -> None:
        self._forget()
        if self._listener is not None:
            self._listener.close()
            self._path.unlink(missing_ok=True)

    def _push(self, data: bytes) -> bool:
        """Send what is left over and `data`; whether nothing is left over now."""
        assert self._peer is not None
        self._unsent += data
        try:
            del self._unsent[: self._peer.send(self._unsent)]
        except BlockingIOError:
            if data and len(self._unsent) == len(data):  # nothing of it has left: the frame can be dropped whole
                self._unsent.clear()
                self.dropped += 1
        except OSError:
            self._forget()
            return False
        return not self._unsent

    def _frames(self) -> list[bytes]:
        frames: list[bytes] = []
        at, buffer = 0, self._buffer
        while len(buffer) - at >= 4:
            length = int.from_bytes(buffer[at : at + 4], "big")
            if not 0 < length <= MAX_FRAME_BYTES:
                self._forget()
                return frames
            if len(buffer) - at < 4 + length:
                break
            frames.append(bytes(buffer[at + 4 : at + 4 + length]))
            at += 4 + length
        del buffer[:at]
        return frames

    def _take(self, peer: socket.socket) -> None:
        self._forget()  # the killed emulator's end
        peer.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            peer.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._peer = peer

    def _forget(self) -> None:
        if self._peer is not None:
            self._peer.close()
        self._peer = None
        self._buffer.clear()
        self._unsent.clear()


def open_port(text: str) -> FramePort:
    """The port that a text names. Raises UsageError for another text, BenchError when it cannot be had."""
    kind, _, rest = text.partition(":")
    if kind == "listen" and rest:
        return StreamPort.listen(Path(rest))
    if kind == "connect" and rest:
        return StreamPort.connect(Path(rest))
    if kind in ("tap", "tun") and 0 < len(rest) < 16:
        return TapPort(_open_tun(rest, _IFF_TAP if kind == "tap" else _IFF_TUN))
    if kind == "broker" and ":" in rest:
        path, _, name = rest.rpartition(":")
        return TapPort(broker.open_tap(Path(path), name))
    raise UsageError(
        f"not a port of a user-space link: {text!r}",
        hint="listen:PATH, connect:PATH, tap:NAME, tun:NAME or broker:SOCKET:NAME",
    )


def _open_tun(name: str, flag: int) -> int:
    """A descriptor of a TAP or TUN interface, made when there is none. BenchError when that is not allowed."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise BenchError(f"/dev/net/tun: {error.strerror}", hint="sudo modprobe tun") from error
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flag | _IFF_NO_PI))
    except OSError as error:
        os.close(descriptor)
        hint = "another process holds it" if error.errno == errno.EBUSY else "run as root, or let root make it for you"
        raise BenchError(
            f"interface {name}: {error.strerror}", hint=f"{hint}: ip tuntap add dev {name} mode tap user $USER"
        ) from error
    return descriptor
