"""Time that runs fast while nothing is to be done, for tests of what waits much and works little.

`tests/conftest.py` puts `monotonic` in the place of `time.monotonic` before anything of hil is loaded; outside of `run`
it is the same clock. Inside, an event loop that waits for its next timer waits `SPEED` times less than it believes, and
the clock says so: periods, limits and dwells keep their lengths by the clock that all code in this process reads, work
takes the time that it takes. Only for what lives in one process and reads no other clock: the time of a thread, and of
the network, counts `SPEED` times while the loop waits for it.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

SPEED = 8

_real = time.monotonic
_ahead_s = 0.0

Result = TypeVar("Result")


class _Monotonic:
    """In place of `time.monotonic`. No function: pyserial makes the builtin an attribute of a class and calls it."""

    def __call__(self) -> float:
        return _real() + _ahead_s


monotonic = _Monotonic()


class _Selector(selectors.DefaultSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        global _ahead_s
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        began_s = _real()
        ready = super().select(timeout / SPEED)
        waited_s = _real() - began_s
        # Nothing came: exactly the wait was skipped, even where a poll cannot be shorter than a millisecond.
        passed_s = min(timeout, waited_s * SPEED) if ready else timeout
        _ahead_s += max(0.0, passed_s - waited_s)
        return ready


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run(main)` in fast time. Afterwards the clock is the host's again."""
    global _ahead_s
    assert time.monotonic is monotonic, "tests/conftest.py puts it there"
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Selector())) as runner:
            return runner.run(main)
    finally:
        _ahead_s = 0.0
