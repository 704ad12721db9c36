"""PyVISA as an adapter for USBTMC, VXI-11, HiSLIP and GPIB (extra `visa`); raw sockets and serial ports do not need it.

PyVISA blocks, so each resource has one thread. It hands over whole messages and cannot tell what is still unread: after
a time-out the device is cleared, closed and opened again, as for every transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hil.drivers.codec import LINE, Frame, InstrumentClosed, InstrumentTimeout, ReplyError
from hil.errors import UsageError

T = TypeVar("T")
_TIMEOUT = -1073807339  # VI_ERROR_TMO


def _load() -> None:
    """Import PyVISA and the backend that looks for its drivers as it is imported, where they are."""
    for name in ("pyvisa", "pyvisa_py"):
        with contextlib.suppress(ImportError):  # told when it is needed
            importlib.import_module(name)


def _open(resource: str, timeout_s: float) -> tuple[Any, Any]:
    try:
        import pyvisa
    except ImportError as error:
        raise UsageError(
            f"visa://{resource} needs PyVISA", hint="pip install 'hil[visa]', and a backend such as pyvisa-py"
        ) from error
    try:
        manager = pyvisa.ResourceManager()
    except (OSError, ValueError):
        manager = pyvisa.ResourceManager("@py")
    try:
        device: Any = manager.open_resource(resource, open_timeout=max(1, int(timeout_s * 1000)))
    except Exception as error:  # backends raise whatever their system library raises
        manager.close()
        raise InstrumentClosed(
            f"cannot open visa://{resource}: {error}", hint="`pyvisa-info` lists backends, `pyvisa-shell` resources"
        ) from error
    if resource.upper().endswith("::SOCKET"):  # a byte stream, where only a terminator ends a message
        device.read_termination = "\n"
    return manager, device


class VisaPipe:
    """A VISA resource for a caller without an event loop."""

    def __init__(self, resource: str, timeout_s: float) -> None:
        self.resource = resource
        self._manager, self._device = _open(resource, timeout_s)

    def send(self, data: bytes) -> None:
        self._guarded(lambda: self._device.write_raw(data))

    def receive(self, timeout_s: float) -> bytes:
        """One message, or nothing when none came in time."""
        self._device.timeout = max(1.0, timeout_s * 1000)
        try:
            data = bytes(self._guarded(self._device.read_raw))
        except InstrumentTimeout:
            return b""
        return data if data.endswith(b"\n") else data + b"\n"

    def clear(self) -> None:
        """Device clear: throw away what is half said on either side."""
        self._guarded(self._device.clear)

    def close(self) -> None:
        for thing in (self._device, self._manager):
            with contextlib.suppress(Exception):  # it goes anyway, and backends raise what they like
                thing.close()

    def _guarded(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except Exception as error:
            if getattr(error, "error_code", None) == _TIMEOUT:
                raise InstrumentTimeout(f"visa://{self.resource} did not answer in time") from error
            raise InstrumentClosed(f"visa://{self.resource}: {error}") from error


class VisaTransport:
    """A VISA resource on a thread of its own."""

    def __init__(self, resource: str) -> None:
        self.resource = resource
        self._pipe: VisaPipe | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._dirty = False

    async def connect(self, deadline_s: float) -> None:
        """Open the resource anew; UsageError without PyVISA, InstrumentClosed when the resource is not there."""
        self.close()
        thread = self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"visa {self.resource}")
        loop, left_s = asyncio.get_running_loop(), deadline_s - time.monotonic()
        await loop.run_in_executor(thread, _load)  # seconds on a busy host: that is not the instrument's time
        try:
            async with asyncio.timeout(left_s):
                self._pipe = await loop.run_in_executor(thread, VisaPipe, self.resource, left_s)
        except TimeoutError:
            raise InstrumentTimeout(f"visa://{self.resource} did not open in time") from None
        if self._dirty:
            await loop.run_in_executor(thread, self._pipe.clear)
        self._dirty = True  # until closed in good order, the next opening clears the device

    def alive(self) -> bool:
        return self._pipe is not None

    def write(self, data: bytes) -> None:
        """Queued on the thread; a failure shows at the next read."""
        pipe, thread = self._living()
        thread.submit(pipe.send, data)

    async def read(self, deadline_s: float, frame: Frame = LINE) -> str:
        if frame.length:
            raise UsageError(f"visa://{self.resource}: this dialect's replies have no end; use its serial port")
        pipe, thread = self._living()
        loop = asyncio.get_running_loop()
        data = await loop.run_in_executor(thread, pipe.receive, max(0.001, deadline_s - time.monotonic()))
        if not data:
            raise InstrumentTimeout(f"visa://{self.resource} did not answer in time")
        line, end, rest = data.partition(b"\n")
        if not end or rest:
            raise ReplyError(f"visa://{self.resource} answered with more than one line")
        return line.decode("latin-1").strip()

    def unread(self) -> int:
        return 0

    def drop(self, count: int) -> None:
        """Messages are whole here: nothing strays."""

    def close(self) -> None:
        pipe, thread, self._pipe, self._thread = self._pipe, self._thread, None, None
        if thread is not None:
            if pipe is not None:
                thread.submit(pipe.close)
            thread.shutdown(wait=False)

    def _living(self) -> tuple[VisaPipe, ThreadPoolExecutor]:
        if self._pipe is None or self._thread is None:
            raise InstrumentClosed(f"visa://{self.resource} is not open")
        return self._pipe, self._thread
