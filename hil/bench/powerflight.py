"""A flight behind the power loops of a board: the satellite's modelled power system, fed with what the board draws.

The loops of the board's channels share it. Each feeds what its channel draws; the one that leads asks whether the load
is to be shed and when it may come back. A channel that the bus does not feed hangs, in the model, on a converter of a
constant efficiency between the bus and it. The switching is the loops'.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from hil.bench.powervalues import EpsLike, EpsStateLike, Flight, OnEvent, PowerLedger
from hil.errors import UsageError
from hil.mission.eps import GAIN_LIMIT


def check_flight(board: str, flight: Flight, board_min_v: float, efficiency: float = 1.0) -> None:
    """UsageError when a mission cannot be flown on a board that is shed below `board_min_v`: a gain above 0.5.

    `efficiency` is the worst of the converters that the board hangs on: all of its load may be behind that one.
    """
    if flight.eps is None:
        return
    planned_w = flight.planned_w / efficiency
    floor_v = max(board_min_v, flight.shed.shed_v if flight.shed else 0.0)
    gain = max(flight.eps.gain(planned_w), flight.eps.gain(planned_w, floor_v))
    if not gain <= GAIN_LIMIT:
        raise UsageError(
            f"{board}: the power loop's gain would be {gain:.2f}, more than {GAIN_LIMIT}",
            hint="lower the battery's resistance or raise its voltage; a soft source needs a hardware simulator",
        )


class FlightPower:
    """One board's flight as its power loops see it: the model, how far it has come, and the flight's ledger.

    `board_min_v`: the bus voltage below which the board is shed, whatever the mission says.
    """

    def __init__(
        self, flight: Flight, board_min_v: float, *, tell: OnEvent, clock: Callable[[], float], meter: str = ""
    ) -> None:
        self.flight = flight
        self.board_min_v = board_min_v
        self.ledger = PowerLedger(meter=meter)
        self.gain = 0.0
        self.held = False  # the model advances by a skip: nothing else may step it
        self._draws: dict[str, _Draw] = {}
        self._tell = tell
        self._clock = clock
        self._mission_s = flight.clock.mission_s(clock())  # how far the model has come
        self._advanced_s = -math.inf  # wall time of the last skip's end
        self._low_since_s: float | None = None
        self._invalid: set[str] = set()

    @property
    def model(self) -> EpsLike:
        """The modelled power system. UsageError where a real one hangs on the channel."""
        if self.flight.eps is None:
            raise UsageError("behind an array there is a real battery, and no model of it")
        return self.flight.eps

    @property
    def state(self) -> EpsStateLike:
        """The model's last state."""
        return self.model.state

    # ------------------------------------------------------------------------------------------------- the model
    def feed(self, channel: str, board_w: float, now_s: float, efficiency: float = 1.0) -> EpsStateLike:
        """Let the battery feed the board up to the monotonic time `now_s`: `channel` with `board_w`, others as before.

        `efficiency` is of the modelled converter between bus and channel.
        """
        self._draws[channel] = _Draw(board_w, board_w / efficiency)
        dt_s = self.passed(now_s)
        fed_w = sum(draw.board_w for draw in self._draws.values())
        self.ledger.fed_j += fed_w * dt_s
        self.ledger.converter_j += (self.bus_w - fed_w) * dt_s
        return self.model.step(dt_s, self.bus_w, max(0.0, self.flight.array_w(self._mission_s)))

    def passed(self, now_s: float) -> float:
        """Come to the monotonic time `now_s`; the mission seconds since the last time."""
        dt_s = max(0.0, self.flight.clock.mission_s(now_s) - self._mission_s)
        self._mission_s += dt_s
        return dt_s

    @property
    def bus_w(self) -> float:
        """What the board draws from the bus now, over all its channels and their modelled converters."""
        return sum(draw.bus_w for draw in self._draws.values())

    @contextlib.asynccontextmanager
    async def advanced(self, until_s: float, assumed_board_w: float, step_s: float) -> AsyncIterator[None]:
        """Advance the battery to mission second `until_s` by model alone, and say so in a `model_advanced` event.

        The body moves the clock there, without an await. Days of it take seconds: they pass on a thread, and the ticks
        leave the model alone meanwhile, but not the board. A loop that stood still would be cut by the dead-man.
        """
        flight, before_s = self.flight, self._mission_s
        dt_s = until_s - before_s
        if not (math.isfinite(dt_s) and dt_s >= 0 and step_s > 0):
            raise UsageError(f"cannot advance the model by {dt_s!r} s in steps of {step_s!r} s")
        self.held = True
        try:
            board_w = sum(draw.board_w for draw in self._draws.values())
            assumed_bus_w = assumed_board_w * (self.bus_w / board_w if board_w > 0 else 1.0)
            lowest_v = await asyncio.to_thread(
                _advance, self.model, flight.array_w, before_s, dt_s, assumed_bus_w, step_s
            )
            self.ledger.assumed_j += assumed_board_w * dt_s
            self.ledger.converter_j += (assumed_bus_w - assumed_board_w) * dt_s
            self._mission_s = until_s
            self._low_since_s = None
            state = self.state
            self._tell(
                "model_advanced",
                {
                    "label": "modelled",
                    "dt_mission_s": dt_s,
                    "assumed_board_w": assumed_board_w,
                    "soc": state.soc,
                    "bus_voltage_v": state.bus_voltage_v,
                    "lowest_watched_v": lowest_v,
                },
            )
            yield
        finally:
            self.held, self._advanced_s = False, self._clock()

    def metered(self, joules: float, from_s: float, to_s: float) -> float:
        """Count wall joules that were measured between two wall times; what they are in mission time.

        A skip is the model's, not a measurement's, and so is what passes while the model advances by one.
        """
        since_s = max(from_s, self._advanced_s)
        mission_j = 0.0
        if since_s < to_s and not self.held:
            mission_j = joules * self.flight.clock.flown_s(since_s, to_s) / (to_s - from_s)
        self.ledger.metered_j += joules
        self.ledger.metered_mission_j += mission_j
        return mission_j

    def sampled(self, now_s: float) -> tuple[float | None, ...]:
        """What a sample says in a flight only, from `t_mission` on; None of what is not modelled behind an array."""
        flight = self.flight
        if flight.eps is None:
            at_s = self._mission_s
            return (at_s, flight.clock.rate, None, None, flight.array_w(at_s), None, None, flight.sunlit(at_s), None)
        state = self.state
        mission_s = flight.clock.mission_s(now_s) if self.held else self._mission_s
        return (
            mission_s,
            flight.clock.rate,
            state.soc,
            state.bus_voltage_v,
            flight.array_w(mission_s),
            state.array_used_w,
            state.battery_power_w,
            flight.sunlit(mission_s),
            self.gain,
        )

    # ------------------------------------------------------------------------------------------ shed and restore
    def shed_cause(self, who: str) -> str:
        """Why the load is to be cut off now, or an empty text."""
        state, rule = self.state, self.flight.shed
        if self.gain > GAIN_LIMIT:
            self.invalidate(who, "gain", "the power loop's gain is {:.2f}", self.gain, GAIN_LIMIT)
            return "loop gain"
        if state.collapsed:
            return "bus collapse"
        if state.bus_voltage_v < self.board_min_v:
            return "bus below the board's minimum"
        if rule is None or state.watched_v >= rule.shed_v:
            self._low_since_s = None
            return ""
        if self._low_since_s is None:
            self._low_since_s = self._mission_s
        return "bus below its shed voltage" if self._mission_s - self._low_since_s >= rule.hold_s else ""

    def switched(self) -> None:
        """The load went on or off: how long the voltage has been low is counted anew."""
        self._low_since_s = None

    def may_restore(self, rested_s: float) -> bool:
        """Whether a shed load may come back that has been verified off for `rested_s` wall seconds."""
        rule, state = self.flight.shed, self.state
        if rule is None or state.collapsed:
            return False
        return state.soc >= rule.restore_soc and state.watched_v >= rule.restore_v and rested_s >= rule.dwell_s

    # ----------------------------------------------------------------------------------- what makes it worthless
    def judge_timing(self, who: str, lateness_s: float, period_s: float) -> None:
        """A tick's set point was so late, and the supply allows this period. `who`: the channel's loop."""
        bounds = self.flight.bounds
        if lateness_s > bounds.lateness_s:
            self.invalidate(who, "late", "a set point was {:.2f} s late", lateness_s, bounds.lateness_s)
        if period_s > bounds.period_s:
            self.invalidate(who, "slow", "the supply allows a loop of {:.2f} s only", period_s, bounds.period_s)

    def judge_gap(self, who: str, gap_s: float) -> bool:
        """Samples of an output that is on are `gap_s` apart, or have been missing for so long; whether too far."""
        too_far = gap_s > self.flight.bounds.gap_s
        if too_far:
            self.invalidate(who, "stale", "no measurement for {:.2f} s", gap_s, self.flight.bounds.gap_s)
        return too_far

    def invalidate(self, who: str, what: str, cause: str, measured: float, limit: float) -> None:
        """The flight's record no longer shows the mission; each kind is told once a flight."""
        self.declare(who, what, f"{cause.format(measured)}, more than {limit:g}", measured=measured, limit=limit)

    def declare(self, who: str, what: str, cause: str, **data: float) -> None:
        """As `invalidate`, for what has no limit."""
        if what not in self._invalid:
            self._invalid.add(what)
            self._tell("run_invalid", {"what": what, "cause": f"{who}: {cause}", **data})


@dataclass(frozen=True, slots=True)
class _Draw:
    """What one channel draws: at its terminals, and from the bus. Watts."""

    board_w: float
    bus_w: float


def _advance(
    model: EpsLike,
    array_power_w: Callable[[float], float],
    before_s: float,
    dt_s: float,
    assumed_board_w: float,
    step_s: float,
) -> float:
    """Step the model through `dt_s` from mission second `before_s`; the lowest watched voltage on the way."""
    steps = max(1, math.ceil(dt_s / step_s))
    lowest_v = math.inf
    for index in range(steps):
        array_w = array_power_w(before_s + (index + 0.5) * dt_s / steps)
        lowest_v = min(lowest_v, model.step(dt_s / steps, assumed_board_w, array_w).watched_v)
    return lowest_v
