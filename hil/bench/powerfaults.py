"""Faults of power that a lab makes on purpose: dips of the bus and latch-up currents, within the board's envelope.

The power loop runs them: it owns the channel. What a supply cannot do as fast as asked is not hidden: every result
holds what was asked, what was reached and how long one exchange with the instrument took.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Literal

from hil.bench.powervalues import OnEvent
from hil.bench.safety import Envelope
from hil.drivers.codec import InstrumentError
from hil.drivers.scpi import Dip, Supply
from hil.errors import BenchError, SafetyError, UsageError
from hil.model import Reading, Setpoint

DIP_MIN_S = 0.01
DIP_MAX_S = 60.0
ONE_TURN_S = 0.5  # up to here nothing else is said to the supply meanwhile; longer dips are measured as they go
RESTORE_TRIES = 3
READY_S = 1.0  # how long the channels of one board wait for each other; no longer, for nothing is measured meanwhile

Sample = Callable[[], Awaitable[Reading | None]]


# --------------------------------------------------------------------------------------------------------- brown-out
@dataclass(frozen=True, slots=True)
class BrownOut:
    """A dip of the bus on one channel. Seconds and volts; `began_s` and `ended_s` are monotonic.

    `by` says who timed it. `list`: the instrument's own list, and `reached_s` is its dwell as read back before it was
    started. `writes`: we, and `reached_s` lies between the writing of the low voltage and of the old one; it is never
    less than `command_s`, the measured time of one exchange: the supply cannot have obeyed the second command before it
    had obeyed the first. `lowest_v` is the lowest measurement, None when the dip was too short for one. `output_on` is
    false when the output went off by itself, `trips` are the protections that did it. `lockout`: the dip went below the
    board's lock-out, so that its power counts as cut. `samples` measurements were taken in the dip: none in a short
    one, in which nothing is asked. `latch_up_judged`: whether a latch-up protection that was armed saw any of them,
    None when none was armed.
    """

    depth_v: float
    low_v: float
    asked_s: float
    reached_s: float
    began_s: float
    ended_s: float
    command_s: float
    lowest_v: float | None
    output_on: bool
    lockout: bool
    by: Literal["list", "writes"]
    trips: tuple[str, ...]
    samples: int
    latch_up_judged: bool | None


class DipFailed(BenchError):
    """A dip went wrong half-way; the old set point is in force again, read back."""


class NotTogether(DipFailed):
    """A dip that was not begun because another channel of the board could not begin it too. Nothing was changed."""


class CutFailed(SafetyError):
    """A cut in a dip did not switch the output off: no old set point may come back to what is latched up."""


class Together:
    """The channels of one board that dip at one moment: each power loop joins, and all begin when the last one has.

    Channels of one supply dip in one turn of it, one write apart; supplies beside each other. When one ends its dip
    early, all do.
    """

    def __init__(self, count: int = 1) -> None:
        self.over = False
        self.cut_told = False  # a dip below the lock-out is one cut, whatever it goes through
        self._barrier = asyncio.Barrier(count)
        self._dips: dict[Supply, dict[int, tuple[float, float]]] = {}
        self._turns: dict[Supply, asyncio.Task[dict[int, Dip]]] = {}

    async def begin(self, supply: Supply, channel: int, low_v: float, back_v: float) -> None:
        """Wait until every channel is ready. NotTogether when one is not in time, or has given up."""
        self._dips.setdefault(supply, {})[channel] = (low_v, back_v)
        try:
            async with asyncio.timeout(READY_S):
                await self._barrier.wait()
        except (TimeoutError, asyncio.BrokenBarrierError) as error:
            raise NotTogether("another of the board's channels could not begin the dip; nothing was changed") from error

    async def play(self, supply: Supply, channel: int, seconds: float) -> Dip:
        """A dip in one turn of the supply, with its other channels that have begun; `channel`'s own part of it."""
        if supply not in self._turns:
            self._turns[supply] = asyncio.create_task(supply.dip(self._dips[supply], seconds))
        # Shielded: whose loop is cancelled in the middle leaves the others theirs. It is over within ONE_TURN_S.
        return (await asyncio.shield(self._turns[supply]))[channel]

    async def give_up(self) -> None:
        """Nobody waits for this channel any more; what has begun ends early."""
        self.over = True
        await self._barrier.abort()


def check_dip(envelope: Envelope, present: Setpoint, depth_v: float, duration_s: float) -> float:
    """The voltage of a dip. UsageError, with nothing sent, when it is outside what the board may be fed."""
    if not (math.isfinite(duration_s) and DIP_MIN_S <= duration_s <= DIP_MAX_S):
        raise UsageError(f"a dip lasts {DIP_MIN_S:g} s to {DIP_MAX_S:g} s, not {duration_s:g} s")
    if not (math.isfinite(depth_v) and depth_v > 0):
        raise UsageError(f"a dip has a depth above 0 V, not {depth_v:g} V")
    low_v = present.voltage_v - depth_v
    if low_v < envelope.brownout_min_v - 1e-9:
        raise UsageError(
            f"a dip of {depth_v:g} V from {present.voltage_v:g} V ends at {low_v:g} V, below the board's "
            f"{envelope.brownout_min_v:g} V",
            hint="a shallower dip, or `brownout_min_v` in the board type; nothing was sent to the supply",
        )
    return low_v


async def brown_out(
    supply: Supply,
    channel: int,
    envelope: Envelope,
    present: Setpoint,
    depth_v: float,
    duration_s: float,
    together: Together,
    *,
    latch_up_armed: bool,
    begun: Callable[[], None],
    sample: Sample,
    nap: Callable[[float], Awaitable[None]],
    interrupted: Callable[[], bool],
    clock: Callable[[], float],
) -> BrownOut:
    """Lower a channel that is on for a while. Ends with the old set point, read back; early when `interrupted`.

    `begun` is called when all channels of the board are ready, before the first write. `sample` measures, and may cut
    the channel: its reading then says that the output is off. CutFailed, which `sample` raises when that fails, leaves
    the low set point. DipFailed when the dip was not as asked; SafetyError when the old set point cannot be verified
    either.
    """
    low_v = check_dip(envelope, present, depth_v, duration_s)
    lowest: float | None = None
    samples, output_on = 0, True
    by: Literal["list", "writes"] = "writes"
    try:
        asked = clock()
        await supply.setpoint(channel)  # two questions: what an exchange takes here and now
        command_s = (clock() - asked) / 2
        await together.begin(supply, channel, low_v, present.voltage_v)
        begun()
        if duration_s <= ONE_TURN_S:
            dip = await together.play(supply, channel, duration_s)
            began_s, lasted_s = dip.began_s, dip.lasted_s
            output_on, trips, by = dip.output_on, dip.trips, "list" if dip.by_list else "writes"
        else:
            low = await supply.program(channel, Setpoint(low_v, present.current_limit_a))
            began_s = low.acknowledged_s
            while (left := began_s + duration_s - clock() - command_s) > 0:
                reading = await sample()
                if reading is not None:
                    samples += 1
                    lowest = reading.voltage_v if lowest is None else min(lowest, reading.voltage_v)
                    output_on = reading.output_on
                if together.over or interrupted() or not output_on:
                    together.over = True
                    break
                await nap(min(0.05, max(0.0, left)))
            back = await supply.program(channel, present)
            lasted_s = back.acknowledged_s - began_s
            trips = () if output_on else await supply.tripped(channel)
    except CutFailed:
        raise
    except (InstrumentError, SafetyError) as error:
        await _restore(supply, channel, present, nap)
        raise DipFailed(f"the dip was not as asked: {error.message}; the old set point is in force again") from error
    return BrownOut(
        depth_v=depth_v,
        low_v=low_v,
        asked_s=duration_s,
        reached_s=lasted_s if by == "list" else max(lasted_s, command_s),
        began_s=began_s,
        ended_s=began_s + lasted_s,
        command_s=command_s,
        lowest_v=lowest,
        output_on=output_on,
        lockout=low_v < envelope.undervoltage_lockout_v,
        by=by,
        trips=trips,
        samples=samples,
        latch_up_judged=samples > 0 if latch_up_armed else None,
    )


async def _restore(supply: Supply, channel: int, present: Setpoint, nap: Callable[[float], Awaitable[None]]) -> None:
    """Bring the old set point back over a broken dialogue, or SafetyError: then the output must go off."""
    trouble: Exception | None = None
    for _ in range(RESTORE_TRIES):
        try:
            await supply.stop_list(channel)
            await supply.program(channel, present)
            return
        except (InstrumentError, SafetyError) as error:
            trouble = error
            await nap(0.05)
    raise SafetyError(f"after a dip the supply does not take {present.voltage_v:g} V again: {trouble}") from trouble


# ---------------------------------------------------------------------------------------------------------- latch-up
@dataclass(frozen=True, slots=True)
class LatchUpLimits:
    """A latch-up protection: a current above `threshold_a` for `hold_s` cuts. `added_a` is emulated, not drawn."""

    threshold_a: float
    hold_s: float
    added_a: float = 0.0

    def check(self, envelope: Envelope, of_input: str = "main") -> None:
        """UsageError for values that make no protection, and for a threshold above the limit of the board's input."""
        for name, value in (("hold_s", self.hold_s), ("added_a", self.added_a)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"latch-up `{name}` must be finite and not below 0, got {value!r}")
        if not (math.isfinite(self.threshold_a) and 0 < self.threshold_a <= envelope.current_max_a):
            raise UsageError(
                f"a latch-up threshold of {self.threshold_a:g} A is outside the 0 to {envelope.current_max_a:g} A of "
                f"the board's input {of_input}",
                hint="above its limit the supply limits the current first: a lower threshold, or the `input` that is "
                "meant; nothing was armed",
            )


@dataclass(frozen=True, slots=True)
class LatchUp:
    """A cut by the latch-up protection: monotonic times, highest current and the energy above the threshold (J).

    `exceeded_s` is the first sample above the threshold, `cut_s` the off command, `verified_s` the measured proof.
    Currents and energy hold the emulated `added_a`; the times are as fine as the power loop's period.
    """

    exceeded_s: float
    cut_s: float
    verified_s: float
    peak_a: float
    energy_above_j: float
    added_a: float


class LatchUpWatch:
    """Judges the samples of one channel. No I/O: the power loop cuts when `due` says so."""

    def __init__(self, limits: LatchUpLimits) -> None:
        self.limits = limits
        self.exceeded_s: float | None = None
        self.peak_a = 0.0
        self.energy_above_j = 0.0
        self._last: tuple[float, float] | None = None

    def due(self, reading: Reading) -> bool:
        """Take one sample of an output that is on; whether the current has been too high for long enough."""
        current = reading.current_a + self.limits.added_a
        if current <= self.limits.threshold_a:
            self.exceeded_s, self.peak_a, self.energy_above_j, self._last = None, 0.0, 0.0, None
            return False
        excess_w = (current - self.limits.threshold_a) * reading.voltage_v
        if self.exceeded_s is None:
            self.exceeded_s = reading.time_s
        self.add(reading.time_s, excess_w)
        self.peak_a = max(self.peak_a, current)
        return reading.time_s - self.exceeded_s >= self.limits.hold_s

    def add(self, time_s: float, excess_w: float) -> None:
        """Energy above the threshold, by trapezoid."""
        if self._last is not None:
            self.energy_above_j += 0.5 * (excess_w + self._last[1]) * max(0.0, time_s - self._last[0])
        self._last = (time_s, excess_w)

    def done(self, cut_s: float, verified_s: float) -> LatchUp:
        """The cut was made; until then the current stayed what it was."""
        if self._last is not None:
            self.add(cut_s, self._last[1])
        began = cut_s if self.exceeded_s is None else self.exceeded_s
        return LatchUp(began, cut_s, verified_s, self.peak_a, self.energy_above_j, self.limits.added_a)


class LatchUpGuard:
    """The latch-up protection of one channel: armed by who waits for its cut, judged by the channel's power loop.

    `cut` switches the channel off: monotonic times of the command and of the measured proof.
    """

    def __init__(
        self, board: str, envelope: Envelope, cut: Callable[[str], Awaitable[tuple[float, float]]], tell: OnEvent
    ) -> None:
        self._board = board
        self._envelope = envelope
        self._cut = cut
        self._tell = tell
        self._watch: tuple[LatchUpWatch, asyncio.Future[LatchUp]] | None = None

    @property
    def armed(self) -> bool:
        """Whether somebody waits for a cut."""
        return self._watch is not None and not self._watch[1].done()

    def arm(self, limits: LatchUpLimits) -> asyncio.Future[LatchUp]:
        """Done with the cut. UsageError for limits that the channel cannot have, and when it is armed already."""
        limits.check(self._envelope)
        if self.armed:
            raise UsageError(f"{self._board}: a latch-up protection is armed already")
        future: asyncio.Future[LatchUp] = asyncio.get_running_loop().create_future()
        self._watch = (LatchUpWatch(limits), future)
        return future

    def restart(self) -> None:
        """The output was off: what it drew before belongs to no current of now. Armed it stays."""
        if self._watch is not None:
            watch, future = self._watch
            self._watch = (LatchUpWatch(watch.limits), future)

    def disarm(self) -> None:
        """Call it off; a cut that is under way goes on."""
        if self._watch is not None:
            (_, future), self._watch = self._watch, None
            future.cancel()

    async def judge(self, reading: Reading) -> None:
        """Take one sample of an output that is on, and cut when the current has been too high for long enough."""
        if self._watch is None:
            return
        watch, future = self._watch
        if future.done():
            self._watch = None
        elif watch.due(reading):
            self._watch = None
            limits = watch.limits
            done = watch.done(*await self._cut(f"latch-up: more than {limits.threshold_a:g} A"))
            self._tell("latch_up", {"threshold_a": limits.threshold_a, "hold_s": limits.hold_s, **asdict(done)})
            if not future.done():
                future.set_result(done)
