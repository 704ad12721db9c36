"""Dips and latch-ups of a board over all the channels that feed it, through their power loops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hil.bench.powerfaults import BrownOut, LatchUp, LatchUpLimits, NotTogether, Together
from hil.bench.powerloop import PowerLoop
from hil.bench.safety import Envelope
from hil.errors import BenchError, HilError, UsageError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FedInput:
    """An input of a board and the power loop of its channel. `on_bus`: the satellite's bus feeds it."""

    name: str
    envelope: Envelope
    on_bus: bool
    loop: PowerLoop
    task: asyncio.Task[None]


async def dip_together(inputs: Sequence[FedInput], depth_v: float, duration_s: float) -> dict[str, BrownOut]:
    """Dip every input that the bus feeds, begun at one moment; what was reached, by input.

    UsageError outside the envelope of one of them, or while one is not on: then none is dipped.
    """
    dipped = [item for item in inputs if item.on_bus]
    together = Together(len(dipped))
    asked = (ask(item.loop.request_dip(depth_v, duration_s, together), item.task) for item in dipped)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    if failures:  # the first one that is not about another channel
        raise min(failures, key=lambda failure: isinstance(failure, NotTogether))
    pairs = zip(dipped, answers, strict=True)
    return {item.name: answer for item, answer in pairs if isinstance(answer, BrownOut)}


def arm_latch_up(
    board: str, inputs: Sequence[FedInput], limits: LatchUpLimits, of_input: str | None
) -> dict[str, asyncio.Future[LatchUp]]:
    """A watch on every input, or on one: each done with its cut. UsageError, with none armed, when that cannot be.

    What is emulated is added to the one that is named, else to the first that the bus feeds.
    """
    watched = [item for item in inputs if of_input in (None, item.name)]
    if not watched:
        known = ", ".join(item.name for item in inputs)
        raise UsageError(f"board {board} has no input {of_input!r}", hint=f"it has {known}")
    for item in watched:
        limits.check(item.envelope, item.name)
    emulated = next((item for item in watched if item.on_bus), watched[0])
    cuts: dict[str, asyncio.Future[LatchUp]] = {}
    try:
        for item in watched:
            cuts[item.name] = item.loop.watch_latch_up(limits if item is emulated else replace(limits, added_a=0.0))
    except UsageError:
        _disarm(inputs, cuts)
        raise
    return cuts


async def wait_latch_up(
    board: str, inputs: Sequence[FedInput], cuts: dict[str, asyncio.Future[LatchUp]], wait_s: float
) -> tuple[str, LatchUp] | None:
    """The first input whose watch has cut, and its cut; None when none did within `wait_s`. Leaves none armed.

    BenchError when somebody else disarmed them, and the error that ended a power loop.
    """
    try:
        tasks = [item.task for item in inputs]
        either: tuple[asyncio.Future[Any], ...] = (*cuts.values(), *tasks)
        await asyncio.wait(either, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        called_off = any(cut.cancelled() for cut in cuts.values())
        _disarm(inputs, cuts)
        fired = [item for item in inputs if item.name in cuts and not cuts[item.name].cancelled()]
        if fired:  # each has cut, or is about to
            first = min(fired, key=lambda item: not cuts[item.name].done())
            return first.name, await ask(cuts[first.name], first.task)
        if called_off:
            raise BenchError(f"board {board}: its lease ended; the latch-up protection is disarmed")
        for task in tasks:
            raise_end(task)
        return None
    finally:
        for cut in cuts.values():
            cut.cancel()


def _disarm(inputs: Sequence[FedInput], cuts: dict[str, asyncio.Future[LatchUp]]) -> None:
    for item in inputs:
        if item.name in cuts:
            item.loop.disarm_latch_up()


# ------------------------------------------------------------------------------------------------ asking a power loop
async def ask(request: Awaitable[_T], task: asyncio.Task[None]) -> _T:
    """The answer of a power loop; when the loop ends instead, the error that ended it."""
    waiter = asyncio.ensure_future(request)
    try:
        await asyncio.wait((waiter, task), return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        waiter.cancel()
        raise
    if not waiter.done():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):  # the loop refuses what waits as its last act
                await asyncio.wait((waiter,))
    if task.done():
        with contextlib.suppress(asyncio.CancelledError, HilError):
            if not waiter.done():
                waiter.cancel()
            return await waiter
        raise_end(task)
    return await waiter


def raise_end(task: asyncio.Task[None]) -> None:
    """Raise the error that ended a power loop, if it has ended."""
    if not task.done():
        return
    error = None if task.cancelled() else task.exception()
    if isinstance(error, HilError):
        raise error
    raise BenchError(f"{task.get_name()} has ended: {error or 'cancelled'}")
