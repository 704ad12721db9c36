"""Serial ports: pyserial on a thread of its own for each port, replies handed to the event loop.

A serial port takes one owner: it is opened exclusively, and a second opener is told so. It has no end-of-file worth
the name either: an instrument that is switched off is simply silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from hil.drivers.codec import LINE, Frame, InstrumentClosed
from hil.drivers.mailbox import Mailbox

T = TypeVar("T")


class SerialPipe:
    """A port for a caller without an event loop; `InstrumentClosed` when it cannot be opened or has gone."""

    def __init__(self, device: str, baud: int) -> None:
        import serial

        try:
            self._port = serial.Serial(device, baud, timeout=0, write_timeout=1.0, exclusive=True)
        except (serial.SerialException, OSError, ValueError) as error:
            raise InstrumentClosed(
                f"cannot open {device}: {error}",
                hint="is the adapter plugged in, may this user read it (group dialout), does nobody else hold it?",
            ) from error
        self._failure = (serial.SerialException, OSError, TypeError)  # TypeError: closed by another thread meanwhile
        self.device = device

    def send(self, data: bytes) -> None:
        try:
            self._port.write(data)
        except self._failure as error:
            raise InstrumentClosed(f"{self.device} is gone: {error}") from error

    def receive(self, timeout_s: float) -> bytes:
        try:
            if self._port.timeout != timeout_s:
                self._port.timeout = timeout_s
            first = self._port.read(1)
            return first + self._port.read(self._port.in_waiting) if first else b""
        except self._failure as error:
            raise InstrumentClosed(f"{self.device} is gone: {error}") from error

    def cancel(self) -> None:
        """Wake a thread that waits in `receive`."""
        with contextlib.suppress(OSError):
            self._port.cancel_read()

    def close(self) -> None:
        self._port.close()


class SerialTransport:
    """A serial line to one instrument."""

    def __init__(self, device: str, baud: int, terminator: str = "\n") -> None:
        self.device = device
        self._baud = baud
        self._terminator = terminator.encode()
        self._pipe: SerialPipe | None = None
        self._mail: Mailbox | None = None
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    async def connect(self, deadline_s: float) -> None:
        """Open the port, dropping an old opening; InstrumentClosed when it is not there or held by another."""
        self.close()
        if self._thread is not None:  # the port is locked until the last reader has left it
            await asyncio.to_thread(self._thread.join, max(0.0, deadline_s - time.monotonic()))
        pipe = SerialPipe(self.device, self._baud)
        pipe.receive(0.0)  # what an earlier question left in the driver's buffer
        mail, stop = Mailbox(self.device, self._terminator), threading.Event()
        loop = asyncio.get_running_loop()
        thread = self._thread = threading.Thread(
            target=_pump, args=(pipe, mail, loop, stop), name=f"serial {self.device}", daemon=True
        )
        thread.start()
        self._pipe, self._mail, self._stop = pipe, mail, stop

    def alive(self) -> bool:
        return self._mail is not None and self._mail.end is None

    def write(self, data: bytes) -> None:
        """Messages are a few bytes and the port's buffer holds thousands: this does not block the loop."""
        if self._pipe is None:
            raise InstrumentClosed(f"{self.device} is not open")
        self._pipe.send(data)

    async def read(self, deadline_s: float, frame: Frame = LINE) -> str:
        if self._mail is None:
            raise InstrumentClosed(f"{self.device} is not open")
        return await self._mail.read(deadline_s, frame)

    def unread(self) -> int:
        return 0 if self._mail is None else len(self._mail.inbox)

    def drop(self, count: int) -> None:
        if self._mail is not None:
            self._mail.inbox.drop(count)

    def close(self) -> None:
        if self._stop is not None:
            self._stop.set()
        if self._pipe is not None:
            self._pipe.cancel()
        self._pipe = self._mail = self._stop = None


def _pump(pipe: SerialPipe, mail: Mailbox, loop: asyncio.AbstractEventLoop, stop: threading.Event) -> None:
    """Bytes from the port to the loop, until the port is closed or goes away."""
    try:
        while not stop.is_set():
            if data := pipe.receive(0.05):
                _hand_over(loop, mail.feed, data)
    except InstrumentClosed as error:
        if not stop.is_set():
            _hand_over(loop, mail.finish, error)
    finally:
        pipe.close()


def _hand_over(loop: asyncio.AbstractEventLoop, action: Callable[[T], None], value: T) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who waited
        loop.call_soon_threadsafe(action, value)
