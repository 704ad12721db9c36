"""A flight behind a power loop: the satellite's modelled power system, fed with what the board draws.

The loop asks what the bus is at, whether the load is to be shed and when it may come back; the switching is the loop's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable

from hil.bench.powervalues import EpsStateLike, Flight, OnEvent, PowerLedger
from hil.bench.safety import Envelope
from hil.errors import UsageError
from hil.mission.eps import GAIN_LIMIT
from hil.model import Setpoint


def check_flight(board: str, flight: Flight, envelope: Envelope, period_s: float) -> None:
    """UsageError when it cannot be flown so: gain above 0.5, loop too slow. SafetyError: the bus leaves the envelope."""
    if flight.array_direct:
        raise UsageError(
            f"{board}: the mission's array feeds the bus directly: left of its point of maximum power it is a "
            "current source, which no supply that follows a program can play",
            hint="`conversion: mppt`; a hardware solar-array simulator plays the curve itself, but not in a flight",
        )
    floor_v = max(envelope.voltage_min_v, flight.shed.shed_v if flight.shed else 0.0)
    gain = max(flight.eps.gain(flight.planned_w), flight.eps.gain(flight.planned_w, floor_v))
    if not gain <= GAIN_LIMIT:
        raise UsageError(
            f"{board}: the power loop's gain would be {gain:.2f}, more than {GAIN_LIMIT}",
            hint="lower the battery's resistance or raise its voltage; a soft source needs a hardware simulator",
        )
    if period_s > flight.bounds.period_s:
        raise UsageError(
            f"{board}: the supply allows a loop of {period_s:.3f} s, the mission needs {flight.bounds.period_s:.3f} s",
            hint="use a faster supply, or fewer boards on it",
        )
    envelope.check(Setpoint(flight.eps.state.bus_voltage_v, flight.current_limit_a))


class FlightPower:
    """One board's flight as its power loop sees it: the model, how far it has come, and the flight's ledger."""

    def __init__(
        self, board: str, flight: Flight, *, tell: OnEvent, clock: Callable[[], float], meter: str = ""
    ) -> None:
        self.flight = flight
        self.ledger = PowerLedger(meter=meter)
        self.gain = 0.0
        self.held = False  # the model advances by a skip: nothing else may step it
        self._board = board
        self._tell = tell
        self._clock = clock
        self._mission_s = flight.clock.mission_s(clock())  # how far the model has come
        self._low_since_s: float | None = None
        self._invalid: set[str] = set()

    @property
    def state(self) -> EpsStateLike:
        """The model's last state."""
        return self.flight.eps.state

    # ------------------------------------------------------------------------------------------------- the model
    def feed(self, board_w: float, now_s: float) -> EpsStateLike:
        """Let the battery feed the board with `board_w` up to the monotonic time `now_s`."""
        flight, mission_s = self.flight, self.flight.clock.mission_s(now_s)
        dt_s = max(0.0, mission_s - self._mission_s)
        self._mission_s += dt_s
        self.ledger.fed_j += board_w * dt_s
        return flight.eps.step(dt_s, board_w, max(0.0, flight.array_w(mission_s)))

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
            lowest_v = await asyncio.to_thread(_advance, flight, before_s, dt_s, assumed_board_w, step_s)
            self.ledger.assumed_j += assumed_board_w * dt_s
            self._mission_s = until_s
            self._low_since_s = None
            state = flight.eps.state
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
            self.held = False

    def metered(self, joules: float) -> float:
        """Count wall joules of the supply's; what they are in mission time at the present rate.

        A skip is the model's, not a measurement's.
        """
        mission_j = joules * self.flight.clock.rate
        self.ledger.metered_j += joules
        self.ledger.metered_mission_j += mission_j
        return mission_j

    def sampled(self, now_s: float) -> tuple[float, ...]:
        """What a sample says in a flight only, from `t_mission` on."""
        flight, state = self.flight, self.state
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
    def shed_cause(self, board_min_v: float) -> str:
        """Why the load is to be cut off now, or an empty text."""
        state, rule = self.state, self.flight.shed
        if self.gain > GAIN_LIMIT:
            self.invalidate("gain", "the power loop's gain is {:.2f}", self.gain, GAIN_LIMIT)
            return "loop gain"
        if state.collapsed:
            return "bus collapse"
        if state.bus_voltage_v < board_min_v:
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
    def judge_timing(self, lateness_s: float, period_s: float) -> None:
        """A tick's set point was so late, and the supply allows this period."""
        bounds = self.flight.bounds
        if lateness_s > bounds.lateness_s:
            self.invalidate("late", "a set point was {:.2f} s late", lateness_s, bounds.lateness_s)
        if period_s > bounds.period_s:
            self.invalidate("slow", "the supply allows a loop of {:.2f} s only", period_s, bounds.period_s)

    def judge_gap(self, gap_s: float) -> bool:
        """Samples of an output that is on are `gap_s` apart, or have been missing for so long; whether too far."""
        too_far = gap_s > self.flight.bounds.gap_s
        if too_far:
            self.invalidate("stale", "no measurement for {:.2f} s", gap_s, self.flight.bounds.gap_s)
        return too_far

    def invalidate(self, what: str, cause: str, measured: float, limit: float) -> None:
        """The flight's record no longer shows the mission; each kind is told once a flight."""
        self.declare(what, f"{cause.format(measured)}, more than {limit:g}", measured=measured, limit=limit)

    def declare(self, what: str, cause: str, **data: float) -> None:
        """As `invalidate`, for what has no limit."""
        if what not in self._invalid:
            self._invalid.add(what)
            self._tell("run_invalid", {"what": what, "cause": f"{self._board}: {cause}", **data})


def _advance(flight: Flight, before_s: float, dt_s: float, assumed_board_w: float, step_s: float) -> float:
    """Step the model through `dt_s` from mission second `before_s`; the lowest watched voltage on the way."""
    steps = max(1, math.ceil(dt_s / step_s))
    lowest_v = math.inf
    for index in range(steps):
        array_w = flight.array_w(before_s + (index + 0.5) * dt_s / steps)
        lowest_v = min(lowest_v, flight.eps.step(dt_s / steps, assumed_board_w, array_w).watched_v)
    return lowest_v
