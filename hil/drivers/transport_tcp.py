"""Raw sockets on the event loop: callbacks and one future an exchange instead of asyncio's streams.

The instrument's answers are small and come one at a time, so bytes land in one small buffer that lives as long as the
connection: asyncio's usual 256 KiB allocation for every read is dear beside such an exchange.
"""

from __future__ import annotations

import asyncio
import time

from hil.drivers.codec import LINE, Frame, InstrumentClosed, InstrumentTimeout
from hil.drivers.mailbox import Mailbox
from hil.drivers.transport import parse_address, tune


class _Line(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, address: str, terminator: bytes) -> None:
        self.mail = Mailbox(address, terminator)
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray(4096)
        self._view = memoryview(self._buffer)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"a stream transport was expected, got {type(transport).__name__}")
        self.transport = transport
        tune(transport.get_extra_info("socket"))

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.mail.feed(self._view[:nbytes])

    def connection_lost(self, exc: Exception | None) -> None:
        reason = str(exc) if exc else "it ended the connection"
        self.mail.finish(InstrumentClosed(f"{self.mail.address} is gone: {reason}"))


class TcpTransport:
    """A raw socket to one instrument."""

    def __init__(self, address: str, terminator: str = "\n") -> None:
        self.address = address
        self._host, self._port = parse_address(address)
        self._terminator = terminator.encode()
        self._line: _Line | None = None

    async def connect(self, deadline_s: float) -> None:
        """Open a new connection, dropping an old one; InstrumentTimeout or InstrumentClosed when there is none."""
        self.close()
        line = _Line(self.address, self._terminator)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                await loop.create_connection(lambda: line, self._host, self._port)
        except TimeoutError:
            raise InstrumentTimeout(
                f"no connection to {self.address} in time", hint="is the instrument on, and its cable in?"
            ) from None
        except OSError as error:
            raise InstrumentClosed(
                f"cannot connect to {self.address}: {error.strerror or error}",
                hint="check that the instrument is on, its LAN interface enabled, and nobody else holds its one socket",
            ) from error
        self._line = line

    def alive(self) -> bool:
        return self._line is not None and self._line.mail.end is None

    def write(self, data: bytes) -> None:
        line = self._living()
        if line.mail.end is not None:
            raise line.mail.end
        if line.transport is not None:
            line.transport.write(data)

    async def read(self, deadline_s: float, frame: Frame = LINE) -> str:
        return await self._living().mail.read(deadline_s, frame)

    def unread(self) -> int:
        return 0 if self._line is None else len(self._line.mail.inbox)

    def drop(self, count: int) -> None:
        if self._line is not None:
            self._line.mail.inbox.drop(count)

    def close(self) -> None:
        line, self._line = self._line, None
        if line is not None and line.transport is not None:
            line.transport.abort()

    def _living(self) -> _Line:
        if self._line is None:
            raise InstrumentClosed(f"not connected to {self.address}")
        return self._line
