"""Replies that arrive on an event loop, and the one caller that waits for them, each within a deadline."""

from __future__ import annotations

import asyncio
import time

from hil.drivers.codec import LINE, SILENCE, SILENCE_S, Frame, Inbox, InstrumentError, InstrumentTimeout, ReplyError


class Mailbox:
    """One connection's replies. A new one is made for each reopening: late bytes of the old one reach nobody.

    One timer serves many exchanges: setting one for each would cost as much as the exchange itself.
    """

    def __init__(self, address: str, terminator: bytes) -> None:
        self.address = address
        self.inbox = Inbox(terminator)
        self.end: InstrumentError | None = None
        self._frame = LINE
        self._waiter: asyncio.Future[str | None] | None = None
        self._deadline_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def feed(self, data: bytes | memoryview) -> None:
        """Bytes from the instrument."""
        try:
            self.inbox.feed(data)
        except ReplyError as error:
            self.end = error
        self._serve()

    def finish(self, error: InstrumentError) -> None:
        """Nothing more will come. The first reason stays."""
        self.end = self.end or error
        self._serve()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def read(self, deadline_s: float, frame: Frame) -> str:
        """The next reply. Raises InstrumentTimeout, or the reason for which nothing more will come."""
        if frame is SILENCE:
            return await self._until_silent(deadline_s)
        reply = self.inbox.take(frame)
        if reply is None and self.end is None:
            reply = await self._wait(deadline_s, frame)
        if reply is not None:
            return reply
        raise self.end or self._late()

    async def _wait(self, deadline_s: float, frame: Frame) -> str | None:
        loop = asyncio.get_running_loop()
        self._frame, self._deadline_s = frame, deadline_s
        waiter: asyncio.Future[str | None] = loop.create_future()
        self._waiter = waiter
        if self._timer is None or self._timer.when() > deadline_s:
            self._arm(loop)
        try:
            return await waiter
        finally:
            self._waiter = None

    async def _until_silent(self, deadline_s: float) -> str:
        seen = 0
        while time.monotonic() < deadline_s:
            if self.end is not None:
                raise self.end
            if seen and seen == len(self.inbox):
                return self.inbox.take(SILENCE) or ""
            seen = len(self.inbox)
            await asyncio.sleep(SILENCE_S)
        raise self._late()

    def _late(self) -> InstrumentTimeout:
        return InstrumentTimeout(
            f"{self.address} did not answer in time", hint="is another client holding the instrument?"
        )

    def _serve(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        reply = self.inbox.take(self._frame)
        if reply is not None or self.end is not None:
            waiter.set_result(reply)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(max(0.0, self._deadline_s - time.monotonic()), self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if time.monotonic() < self._deadline_s:
            self._arm(loop)  # it was set for an earlier exchange
        else:
            waiter.set_result(None)
