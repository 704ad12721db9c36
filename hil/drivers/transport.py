"""Lines to instruments: what a transport is, how its address is written, and which one serves an address.

    tcp://HOST:PORT                 raw socket, IPv6 hosts in brackets
    serial:///dev/ttyUSB0?baud=9600 serial port; `baud` is optional, the dialect knows the usual one
    visa://USB0::0x2A8D::0x1202::MY1::0::INSTR    any PyVISA resource name (extra `visa`)

Two kinds: `Transport` for the daemon's event loop, `BlockingLine` for the dead-man, who has none. Both serve the same
dialogues.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import parse_qs, urlsplit

from hil.drivers.codec import (
    LINE,
    SILENCE,
    SILENCE_S,
    Frame,
    Inbox,
    InstrumentClosed,
    InstrumentTimeout,
)
from hil.errors import UsageError


class Transport(Protocol):
    """A duplex line to one instrument. Deadlines are `time.monotonic()` values."""

    async def connect(self, deadline_s: float) -> None: ...

    def alive(self) -> bool:
        """False once the other end has gone."""
        ...

    def write(self, data: bytes) -> None: ...

    async def read(self, deadline_s: float, frame: Frame = LINE) -> str: ...

    def unread(self) -> int:
        """How many bytes are there that nobody asked for."""
        ...

    def drop(self, count: int) -> None:
        """Forget up to `count` unread bytes."""
        ...

    def close(self) -> None: ...


# -------------------------------------------------------------------------------------------------------- addresses
@dataclass(frozen=True, slots=True)
class Address:
    """A checked instrument address. `target` is a host, a device path or a VISA resource name."""

    kind: Literal["tcp", "serial", "visa"]
    target: str
    port: int = 0
    baud: int = 0

    @property
    def local(self) -> bool:
        """True when no network lies between: waiting long for it to come back is pointless."""
        return self.kind == "serial" or self.target in ("localhost", "127.0.0.1", "::1")


def parse_any_address(address: str) -> Address:
    """The parts of an instrument address; UsageError when it is not understood."""
    parts = urlsplit(address)
    try:
        if parts.scheme == "tcp" and parts.hostname and parts.port and parts.path in ("", "/"):
            return Address("tcp", parts.hostname, parts.port)
        if parts.scheme == "serial" and not parts.netloc and len(parts.path) > 1:
            return Address("serial", parts.path, baud=int(parse_qs(parts.query).get("baud", ["0"])[0]))
    except ValueError:
        pass
    if address.startswith("visa://") and "::" in address:
        return Address("visa", address.removeprefix("visa://"))
    raise UsageError(
        f"supply address {address!r} is not understood",
        hint="write tcp://HOST:PORT, serial:///dev/NAME?baud=9600 or visa://RESOURCE",
    )


def parse_address(address: str) -> tuple[str, int]:
    """(host, port) of `tcp://HOST:PORT`, IPv6 hosts in brackets; UsageError otherwise."""
    parsed = parse_any_address(address)
    if parsed.kind != "tcp":
        raise UsageError(f"supply address {address!r} is not understood here", hint="write tcp://HOST:PORT")
    return parsed.target, parsed.port


def endpoint(address: str) -> str:
    """Where an address leads, so that two spellings of one instrument are the same text."""
    parsed = parse_any_address(address)
    if parsed.kind == "serial":
        return os.path.realpath(parsed.target)
    if parsed.kind == "visa":
        return parsed.target.upper()
    try:
        return f"{socket.getaddrinfo(parsed.target, None, type=socket.SOCK_STREAM)[0][4][0]} {parsed.port}"
    except OSError:  # a name that nobody knows leads nowhere yet
        return f"{parsed.target} {parsed.port}"


def transport_for(address: str, terminator: str, baud: int) -> Transport:
    """The transport that serves `address`; nothing is opened yet."""
    parsed = parse_any_address(address)
    if parsed.kind == "serial":
        from hil.drivers.transport_serial import SerialTransport

        return SerialTransport(parsed.target, parsed.baud or baud, terminator)
    if parsed.kind == "visa":
        from hil.drivers.transport_visa import VisaTransport

        return VisaTransport(parsed.target)
    from hil.drivers.transport_tcp import TcpTransport

    return TcpTransport(address, terminator)


def tune(sock: socket.socket) -> None:
    """No Nagle delay; notice a vanished peer within some ten seconds even when nobody writes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --------------------------------------------------------------------------------------------------- blocking lines
class BytePipe(Protocol):
    """Bytes to and from an instrument, blocking. `receive` returns nothing when `timeout_s` has passed."""

    def send(self, data: bytes) -> None: ...

    def receive(self, timeout_s: float) -> bytes: ...

    def close(self) -> None: ...


class BlockingLine:
    """Question and answer without an event loop, each within a deadline."""

    def __init__(self, pipe: BytePipe, terminator: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._pipe = pipe
        self._inbox = Inbox(terminator.encode())
        self._clock = clock

    def send(self, data: bytes) -> None:
        self._pipe.send(data)

    def read(self, deadline_s: float, frame: Frame = LINE) -> str:
        while (reply := None if frame is SILENCE else self._inbox.take(frame)) is None:
            left = deadline_s - self._clock()
            if left <= 0:
                raise InstrumentTimeout("no answer in time")
            quiet = frame is SILENCE and len(self._inbox) > 0
            data = self._pipe.receive(min(left, SILENCE_S) if quiet else left)
            if quiet and not data:
                return self._inbox.take(frame) or ""
            self._inbox.feed(data)
        return reply

    def drop(self, count: int) -> None:
        self._inbox.feed(self._pipe.receive(0.0))
        self._inbox.drop(count)

    def close(self) -> None:
        self._pipe.close()


def open_blocking(address: str, terminator: str, baud: int, timeout_s: float) -> BlockingLine:
    """Open an instrument for a caller without an event loop. Raises OSError or InstrumentError."""
    parsed = parse_any_address(address)
    if parsed.kind == "serial":
        from hil.drivers.transport_serial import SerialPipe

        return BlockingLine(SerialPipe(parsed.target, parsed.baud or baud), terminator)
    if parsed.kind == "visa":
        from hil.drivers.transport_visa import VisaPipe

        return BlockingLine(VisaPipe(parsed.target, timeout_s), terminator)
    return BlockingLine(_SocketPipe(parsed.target, parsed.port, timeout_s), terminator)


class _SocketPipe:
    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        tune(self._socket)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, timeout_s: float) -> bytes:
        self._socket.settimeout(max(timeout_s, 0.0))
        try:
            data = self._socket.recv(4096)
        except (TimeoutError, BlockingIOError):
            return b""
        if not data:
            raise InstrumentClosed("the instrument ended the connection")
        return data

    def close(self) -> None:
        self._socket.close()


__all__ = [
    "Address",
    "BlockingLine",
    "BytePipe",
    "Transport",
    "endpoint",
    "open_blocking",
    "parse_address",
    "parse_any_address",
    "transport_for",
    "tune",
]
