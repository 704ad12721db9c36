"""A second meter beside the supply's own: read now and then, compared with what the supply showed at that moment.

Two meters that disagree for longer than a load's steps could explain cannot both be right, and then the energy of the
run is worth nothing. The second one is the board's own sensor, read over its management port, or a channel of another
instrument that only measures.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hil.bench.powervalues import OnEvent
from hil.drivers.meters import BoardMeter, Comparison, find_rail
from hil.drivers.scpi import Supply
from hil.errors import HilError, UsageError
from hil.inventory.bench import MeterWire, SshWire
from hil.model import Reading

if TYPE_CHECKING:
    from hil.drivers.ssh import Shell

APART_MAX_S = 0.3
KEPT = 64  # supply samples, some seconds of them
READ_S = 5.0
Read = Callable[[], Awaitable[Reading]]


@dataclass(frozen=True, slots=True)
class MeterBounds:
    """How far apart two meters may be.

    `overhead_max` is the share of the supply's watts that may be lost before the second meter, `share` and `offset_w`
    what both may be wrong by. They must be further apart for `hold_s`, at every reading, one each `every_s`.
    """

    overhead_max: float = 0.35
    share: float = 0.03
    offset_w: float = 0.2
    hold_s: float = 3.0
    every_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two meters that were too far apart for `lasted_s`; `finding` says how."""

    finding: str
    supply_w: float
    board_w: float
    lasted_s: float


class CrossCheck:
    """One second meter. `supply` takes every sample of the power loop, `check` reads and compares."""

    def __init__(
        self, name: str, read: Read, bounds: MeterBounds | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.bounds = bounds or MeterBounds()
        self.compared = 0
        self._read = read
        self._clock = clock
        self._samples: deque[Reading] = deque(maxlen=KEPT)
        self._apart_since_s: float | None = None

    def supply(self, reading: Reading) -> None:
        """A sample of the supply, while its output is on."""
        self._samples.append(reading)

    def forget(self) -> None:
        """The output was switched: nothing from before can be compared with anything after."""
        self._samples.clear()
        self._apart_since_s = None

    async def check(self) -> Disagreement | None:
        """Read the second meter; a disagreement that has lasted, or None. Raises HilError when it does not answer."""
        async with asyncio.timeout(READ_S):
            reading = await self._read()
        nearest = min(self._samples, key=lambda sample: abs(sample.time_s - reading.time_s), default=None)
        if nearest is None or abs(nearest.time_s - reading.time_s) > APART_MAX_S:
            return None
        self.compared += 1
        bounds = self.bounds
        compared = Comparison(nearest.power_w, reading.power_w, bounds.overhead_max, bounds.share, bounds.offset_w)
        if not compared.finding:
            self._apart_since_s = None
            return None
        if self._apart_since_s is None:
            self._apart_since_s = reading.time_s
        lasted_s = reading.time_s - self._apart_since_s
        if lasted_s < bounds.hold_s:
            return None
        return Disagreement(compared.finding, compared.supply_w, compared.board_w, lasted_s)


async def hold_against(
    meter: CrossCheck,
    *,
    is_on: Callable[[], bool],
    may_ask: Callable[[], bool],
    tell: OnEvent,
    compared: Callable[[int], None],
    apart: Callable[[str, Disagreement], None],
) -> None:
    """Hold the second meter against the supply while the output is on, until cancelled. Its own failures are told.

    `compared` counts readings that were held against the supply's, `apart` gets each that was too far for too long.
    """
    lost = was_apart = False
    while True:
        await asyncio.sleep(meter.bounds.every_s)
        if not is_on():
            meter.forget()
            continue
        if not may_ask():
            continue
        before = meter.compared
        try:
            found = await meter.check()
        except (HilError, TimeoutError) as error:
            if not lost:
                lost = True
                tell("meter_lost", {"meter": meter.name, "error": str(error) or type(error).__name__})
            continue
        lost = False
        compared(meter.compared - before)
        if found is None or not is_on():
            was_apart = False
            continue
        cause = f"{meter.name}: {found.finding}, for {found.lasted_s:.1f} s"
        if not was_apart:
            was_apart = True
            tell("meters_disagree", {"meter": meter.name, "cause": cause})
        apart(cause, found)


def cross_check(wire: MeterWire, supply: Supply | None, mgmt: SshWire | None) -> CrossCheck:
    """The second meter that a bench file names: a channel of `supply`, or a rail of the board behind `mgmt`."""
    bounds = MeterBounds(wire.overhead_max, wire.share, wire.offset_w, wire.hold_s, wire.every_s)
    if supply is not None and wire.channel is not None:
        return CrossCheck(f"channel {wire.channel} of {wire.supply}", other_channel(supply, wire.channel), bounds)
    if mgmt is None:
        raise UsageError(
            "a meter that is a rail of the board is read over `mgmt`", hint="add `mgmt:` to the bench file"
        )
    rail = RailOfBoard(lambda: _connect(mgmt), wire.rail or "")
    return CrossCheck(f"rail {wire.rail}", rail.read, bounds)


def _connect(mgmt: SshWire) -> Shell:
    from hil.drivers.ssh import Login, Shell  # paramiko, only where it is needed

    jump = [Login(hop.address, hop.port, hop.user, hop.key, hop.known_hosts) for hop in mgmt.jump]
    return Shell.connect(
        mgmt.address, mgmt.port, mgmt.user, mgmt.key, mgmt.known_hosts, jump=jump, timeout_s=READ_S, python=None
    )


def other_channel(supply: Supply, channel: int) -> Read:
    """A channel of another instrument that only measures; its output is not touched."""

    async def read() -> Reading:
        await supply.open()
        return await supply.measure(channel)

    return read


class RailOfBoard:
    """The board's own sensor over its management port; a board that went down is reached again once it answers."""

    def __init__(self, connect: Callable[[], Shell], label: str) -> None:
        self._connect = connect
        self._label = label
        self._shell: Shell | None = None
        self._meter: BoardMeter | None = None

    async def read(self) -> Reading:
        """One sample, on a thread. Raises HilError."""
        return await asyncio.to_thread(self._measure)

    def _measure(self) -> Reading:
        try:
            if self._meter is None:
                shell = self._shell = self._connect()
                self._meter = BoardMeter(
                    lambda argv: shell.run(argv, timeout_s=READ_S).stdout,
                    find_rail(lambda argv: shell.run(argv, timeout_s=READ_S).stdout, self._label),
                )
            return self._meter.measure()
        except HilError:
            self.close()
            raise

    def close(self) -> None:
        """Drop the connection; the next reading opens it again."""
        shell, self._shell, self._meter = self._shell, None, None
        if shell is not None:
            shell.abort()
