"""Load shedding of a board in a flight: at the model's word every channel off in reverse order, and on again in order.

The power loop that leads the board asks at every tick; what is begun runs beside the ticks, so that what is on is
measured and judged meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hil.bench.powerflight import FlightPower
from hil.bench.powervalues import EpsStateLike, OnEvent

if TYPE_CHECKING:
    from hil.bench.powerloop import PowerLoop


@dataclass(frozen=True, slots=True)
class Others:
    """A board's channels besides the one that leads its flight: (seconds to wait, loop) in the order of switching on.

    Whoever switches the board holds `turn`. `delay_s` is waited before the leading channel goes on.
    """

    before: tuple[tuple[float, PowerLoop], ...] = ()
    after: tuple[tuple[float, PowerLoop], ...] = ()
    delay_s: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class LoadShedding:
    """Sheds and restores a board through the loop of its leading channel, `lead`. Of other loops it does nothing."""

    def __init__(self, lead: PowerLoop, tell: OnEvent) -> None:
        self.others: Others | None = None
        self._lead = lead
        self._tell = tell
        self._sequence: asyncio.Task[None] | None = None

    @property
    def leads(self) -> bool:
        """Whether a flight goes on that this loop leads."""
        return self.others is not None

    def judge(self, flown: FlightPower) -> None:
        """Begin what the model asks for."""
        if self._sequence is not None or self.others is None:
            return
        lead = self._lead
        if lead.state == "on" and (cause := flown.shed_cause(lead.board)):
            sequence = self._shed(flown, self.others, cause)
        elif lead.state == "shed" and (rested_s := lead.rested_s) is not None and flown.may_restore(rested_s):
            sequence = self._restore(flown.state, self.others, rested_s)
        else:
            return
        self._sequence = asyncio.create_task(sequence, name=f"sequence-{lead.board}")

    def check(self) -> None:
        """Whatever fails in a shed or a restore ends the leading loop, and with it the board's others."""
        if self._sequence is not None and self._sequence.done():
            done, self._sequence = self._sequence, None
            done.result()

    def cancel(self) -> None:
        """The leading loop has ended."""
        if self._sequence is not None:
            self._sequence.cancel()

    async def _shed(self, flown: FlightPower, others: Others, cause: str) -> None:
        """Every channel off, in reverse order."""
        state, rule, why = flown.state, flown.flight.shed, f"load shed: {cause}"
        async with _turn(others.turn) as mine:
            if not mine:
                return  # somebody switches the board at this moment: judged again at the next tick
            for _, loop in reversed(others.after):
                await _off(loop, why)
            off = await self._lead.request_shed(why)
            for _, loop in reversed(others.before):
                await _off(loop, why)
        if off is None:
            return  # it had gone by itself meanwhile, and that was told
        flown.switched()
        self._tell(
            "load_shed",
            {
                "cause": cause,
                "bus_voltage_v": state.bus_voltage_v,
                "watched_v": state.watched_v,
                "soc": state.soc,
                "shed_v": rule.shed_v if rule else None,
                "off_mono": off.off_s,
                "verified_mono": off.verified_s,
                "verified_v": off.reading.voltage_v,
            },
        )

    async def _restore(self, state: EpsStateLike, others: Others, rested_s: float) -> None:
        """Every channel on, in order."""
        told = {"bus_voltage_v": state.bus_voltage_v, "soc": state.soc, "rested_s": rested_s}
        async with _turn(others.turn) as mine:
            if not mine or self._lead.state != "shed":
                return
            self._tell("load_restoring", told)
            for delay_s, loop in others.before:
                await asyncio.sleep(delay_s)
                await loop.request_on()
            await asyncio.sleep(others.delay_s)
            on = await self._lead.request_restore()
            if on is None:  # an off overtook it
                for _, loop in reversed(others.before):
                    await _off(loop, "no longer shed")
                return
            for delay_s, loop in others.after:
                await asyncio.sleep(delay_s)
                await loop.request_on()
        if self._lead.energized:
            self._tell("load_restored", {**told, "on_mono": on.on_s, "peak_a": on.peak_a})


async def _off(loop: PowerLoop, why: str) -> None:
    """Off, if it is on."""
    if loop.state == "on":
        await loop.request_off(why)


@contextlib.asynccontextmanager
async def _turn(lock: asyncio.Lock) -> AsyncIterator[bool]:
    """Hold `lock` if it is free now. Waiting for it would be a deadlock: who has it may be waiting for this loop."""
    try:
        async with asyncio.timeout(0):
            await lock.acquire()
    except TimeoutError:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
