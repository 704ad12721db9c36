"""A power cut at a place in what a board says: a pattern on its console, or so many bytes into it.

The daemon watches and cuts, because the console and the supply are both its own: no client, no network and no polling
lies between the byte and the cut. What it took is in the result.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from hil.errors import HilError, UsageError

TAIL_BYTES = 4096  # a pattern may reach back this far into what was read before
TIMEOUT_MAX_S = 24 * 3600.0
DELAY_MAX_S = 60.0

State = Literal["armed", "cutting", "done", "failed", "disarmed"]


class Stream(Protocol):
    """The part of a console's ring that is read here."""

    @property
    def end(self) -> int: ...

    def since(self, offset: int) -> tuple[int, bytes]: ...


@dataclass(frozen=True, slots=True)
class CutPoint:
    """Where to cut: exactly one of a regular expression and a number of bytes counted from the arming.

    `delay_s` passes between the place and the cut. Nothing happens when the place does not come within `timeout_s`.
    """

    pattern: str | None = None
    byte_offset: int | None = None
    delay_s: float = 0.0
    timeout_s: float = 120.0

    def compiled(self) -> re.Pattern[bytes] | None:
        """The pattern, or None for a byte offset. UsageError for a cut point that makes no sense."""
        if (self.pattern is None) == (self.byte_offset is None):
            raise UsageError("a cut point is either `pattern` or `byte_offset`")
        if self.byte_offset is not None and self.byte_offset < 1:
            raise UsageError(f"a byte offset counts from 1, got {self.byte_offset}")
        for name, value, most in (("delay_s", self.delay_s, DELAY_MAX_S), ("timeout_s", self.timeout_s, TIMEOUT_MAX_S)):
            if not (math.isfinite(value) and 0 <= value <= most):
                raise UsageError(f"`{name}` of a cut point lies between 0 and {most:g} s, got {value!r}")
        if self.pattern is None:
            return None
        try:
            found = re.compile(self.pattern.encode())
        except re.error as error:
            raise UsageError(f"{self.pattern!r} is no regular expression: {error}") from None
        if found.match(b""):
            raise UsageError(f"{self.pattern!r} matches nothing at all: it would cut at once")
        return found


@dataclass(slots=True)
class CutReport:
    """What became of an armed cut. Times are monotonic seconds; offsets count bytes of the console since it began.

    `offset` is where the place ended, `seen_offset` how far the console had been read by then (what the board said
    beyond the place came in the same read). `latency_s` is from the reading of the place (after `delay_s`) to the
    supply's answer to the off command.
    """

    state: State = "armed"
    matched: str = ""
    offset: int | None = None
    seen_offset: int | None = None
    matched_s: float | None = None
    off_s: float | None = None
    verified_s: float | None = None
    latency_s: float | None = None
    trouble: str = ""


class ArmedCut:
    """One cut that waits for its place. `off` switches the board off and returns (command, verified) times."""

    def __init__(
        self,
        point: CutPoint,
        ring: Stream,
        beyond: Callable[[int, float], Awaitable[bool]],
        off: Callable[[str], Awaitable[tuple[float, float]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.report = CutReport()
        self._point = point
        self._pattern = point.compiled()
        self._ring = ring
        self._beyond = beyond
        self._off = off
        self._clock = clock
        self._start = ring.end
        self._settled = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="cut-point")

    @property
    def live(self) -> bool:
        """Whether it may still cut."""
        return not self._settled.is_set()

    async def wait(self, timeout_s: float) -> dict[str, Any]:
        """The report, at the latest after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        except TimeoutError:
            pass
        return asdict(self.report)

    async def disarm(self) -> dict[str, Any]:
        """Call it off, unless it is cutting already: then wait for that."""
        if self.report.state == "armed":
            self._task.cancel()
        await asyncio.wait((self._task,))
        if self.report.state == "armed":  # called off before it had begun
            self.report.state = "disarmed"
            self._settled.set()
        return asdict(self.report)

    async def _run(self) -> None:
        report = self.report
        try:
            if not await self._reached():
                report.state = "failed"
                report.trouble = f"its place did not come within {self._point.timeout_s:g} s"
                return
            await asyncio.sleep(self._point.delay_s)
            report.state = "cutting"
            asked_s = self._clock()
            report.off_s, report.verified_s = await self._off(f"cut at {self._where}")
            report.latency_s = report.off_s - asked_s
            report.state = "done"
        except asyncio.CancelledError:
            report.state = "disarmed"
        except HilError as error:
            report.state, report.trouble = "failed", error.message
        finally:
            self._settled.set()

    @property
    def _where(self) -> str:
        point = self._point
        return f"byte {point.byte_offset}" if point.pattern is None else f"{point.pattern!r} on the console"

    async def _reached(self) -> bool:
        deadline = self._clock() + self._point.timeout_s
        offset, tail = self._start, b""
        while (left := deadline - self._clock()) > 0:
            if not await self._beyond(offset, left):
                return False
            start, data = self._ring.since(offset)
            seen_s = self._clock()
            if start != offset:
                tail = b""  # the board said more than the ring holds while we were kept from reading
            offset = start + len(data)
            if self._found(tail + data, offset):
                self.report.seen_offset, self.report.matched_s = offset, seen_s
                return True
            tail = (tail + data)[-TAIL_BYTES:]
        return False

    def _found(self, text: bytes, end: int) -> bool:
        """`text` ends at stream offset `end`."""
        if self._pattern is None:
            target = self._start + (self._point.byte_offset or 0)
            if end < target:
                return False
            self.report.offset = target
            self.report.matched = text[: len(text) - (end - target)][-80:].decode("utf-8", "replace")
            return True
        match = self._pattern.search(text)
        if match is None:
            return False
        self.report.offset = end - len(text) + match.end()
        self.report.matched = match.group()[-200:].decode("utf-8", "replace")
        return True
