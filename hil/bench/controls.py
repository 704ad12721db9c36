"""A board's control lines as the daemon drives them: pressed for a while, held, let go of; never left pressed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Mapping
from typing import Any

from hil.drivers.lines import Line, line_for
from hil.errors import HilError, UsageError

log = logging.getLogger("hil.lines")
PRESS_MAX_S = 30.0


class Controls:
    """The lines of one board by name. Calls for one board follow each other; the hardware is driven on a thread."""

    def __init__(self, board: str, addresses: Mapping[str, str]) -> None:
        self._board = board
        self._addresses = dict(addresses)
        self._lines: dict[str, Line] = {name: line_for(address) for name, address in addresses.items()}
        self._asserted: dict[str, bool] = {}  # as far as we were told to; a line cannot be asked
        self._turn = asyncio.Lock()

    def state(self) -> dict[str, Any]:
        """Each line's address and whether it is asserted; None before its first use."""
        return {
            name: {"address": address, "asserted": self._asserted.get(name)}
            for name, address in self._addresses.items()
        }

    async def set(self, name: str, active: bool) -> None:
        """Assert a line until told otherwise, or let go of it."""
        line = self._line(name)
        async with self._turn:
            await self._drive(name, line, active)

    async def press(self, name: str, hold_s: float) -> None:
        """Assert a line for `hold_s` seconds. It is let go of whatever happens to the caller."""
        if not (math.isfinite(hold_s) and 0 < hold_s <= PRESS_MAX_S):
            raise UsageError(f"a line is pressed for up to {PRESS_MAX_S:g} s, not {hold_s!r} s", hint="or hold it")
        line = self._line(name)
        async with self._turn:
            pressing = asyncio.ensure_future(self._drive(name, line, True))
            try:
                await asyncio.shield(pressing)
                await asyncio.sleep(hold_s)
            finally:
                letting_go = asyncio.ensure_future(self._let_go(name, line, pressing))
                while not letting_go.done():  # however often the caller is cancelled
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait((letting_go,))
                letting_go.result()

    async def release_all(self, *, close: bool = False) -> None:
        """Let go of every line that was used; all are tried, what fails is in the log."""
        async with self._turn:
            for name, line in self._lines.items():
                if self._asserted.get(name):
                    try:
                        await self._drive(name, line, False)
                    except HilError as error:
                        log.error("board %s: line %s may still be asserted: %s", self._board, name, error)
                if close and name in self._asserted:
                    with contextlib.suppress(HilError):
                        await asyncio.to_thread(line.close)

    def _line(self, name: str) -> Line:
        if name not in self._lines:
            known = ", ".join(self._lines) or "none; add `lines:` to the bench file"
            raise UsageError(f"board {self._board} has no line {name!r}", hint=f"its lines: {known}")
        return self._lines[name]

    async def _let_go(self, name: str, line: Line, pressing: asyncio.Future[None]) -> None:
        """A press that is still on its way through its thread comes first: it must not overtake its own release."""
        await asyncio.wait((pressing,))
        await self._drive(name, line, False)

    async def _drive(self, name: str, line: Line, active: bool) -> None:
        if active:
            self._asserted[name] = True  # whatever becomes of it: letting go is owed from here
        await asyncio.to_thread(line.set, active)
        self._asserted[name] = active
