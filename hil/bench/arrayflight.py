"""A channel that is the satellite's array: the curve of the moment, the dark, and a unit that asks for too much.

Behind it hangs a real power unit with its own battery, and the board behind that. So nothing of the satellite is
modelled but its array: the light scales the currents of one curve, the brightest of the flight, in steps of
`LIGHT_STEP`, and the instrument is told when another step is the nearest. Light that it cannot resolve is dark, and
dark is an output that is off: its lowest light would be power that no satellite has. Not run on hardware.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hil.bench.powervalues import OnEvent
from hil.bench.safety import Envelope
from hil.drivers import solar
from hil.drivers.scpi import ScpiSupply
from hil.errors import SafetyError, UsageError
from hil.mission.solar_array import sas_rows
from hil.mission.timeline import Timeline
from hil.model import Applied, Reading, Setpoint

LIGHT_STEP = 0.01
_STEPS = round(1 / LIGHT_STEP)
GoOn = Callable[[], object]
WRITE_EXCHANGES = 4.0  # a step of light with its read-back, in measurements: Chroma's 11 messages are the most


@dataclass(frozen=True, slots=True)
class ArrayPlan:
    """The mission's array as a simulator plays it: its brightest curve, and the share of its currents (0..1) over time.

    `light` is a function of mission seconds.
    """

    curve: solar.Curve
    light: Callable[[float], float]


def array_plan(timeline: Timeline) -> ArrayPlan:
    """The mission's array for a simulator. Raises UsageError for one without a curve, or without light."""
    power = timeline.environment.power
    if power is None:
        raise UsageError("the mission has no `power:`, hence no array")
    brightest_w = float(timeline.array_w.max())
    (row,) = sas_rows(power.array, np.array([brightest_w])).tolist()
    if not brightest_w > 0:
        raise UsageError("the mission's array is in the dark throughout", hint="a longer mission, or another array")
    return ArrayPlan(solar.Curve(*row), lambda mission_s: timeline.array_power_w(mission_s) / brightest_w)


class ArraySource:
    """The array on one channel, for the power loop that owns it. A flight lasts from `prepare` to `leave`."""

    def __init__(self, supply: ScpiSupply, channel: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._supply = supply
        self._channel = channel
        self._clock = clock
        self._plan: ArrayPlan | None = None
        self._mission_s: Callable[[], float] = lambda: 0.0
        self._step = 0  # of the light that the instrument was told last; 0 is an output that is off
        self._sure = False  # whether that light was read back
        self._switched = True  # whether the last on or off was read back; a change of the light is none
        self._loaded = False  # the instrument has this flight's curve
        self._change_s = 0.0
        self._low_since_s: float | None = None
        self._collapsed = False

    # ------------------------------------------------------------------------------------------------- a flight
    async def prepare(
        self, plan: ArrayPlan, start_s: float, envelope: Envelope, board: str, go_on: GoOn = solar.unasked
    ) -> dict[str, float]:
        """Load the curve of a flight that is to begin at mission second `start_s`, with the output off; what is played.

        A table takes minutes: they pass before the mission's clock starts, and what `go_on` raises ends them.
        SafetyError, with nothing written, when the output is on. Raises UsageError as `check` does, and what `program`
        raises.
        """
        await self._refuse_live(board)
        self.check(plan, envelope, board)
        self._plan, self._mission_s = plan, lambda: start_s
        self._step, self._sure, self._switched, self._loaded = 0, False, True, False
        self._low_since_s, self._collapsed = None, False
        began_s = self._clock()
        await self.program(go_on)
        loaded_s = self._clock()
        await self.program()  # the curve is there by now: but a change of the light
        self._change_s = self._clock() - loaded_s
        return {"took_s": loaded_s - began_s, "change_s": self._change_s, **self.told()}

    def begin(self, mission_s: Callable[[], float]) -> float:
        """The mission's clock runs: `mission_s` is its time now. Seconds that a change of the light took."""
        if not self._loaded:
            raise UsageError("the channel is an array, and no mission says which", hint="begin a flight first")
        self._mission_s = mission_s
        return self._change_s

    def check(self, plan: ArrayPlan, envelope: Envelope, board: str) -> None:
        """UsageError when a curve leaves what the board type says of its input, or the channel's range."""
        curve = plan.curve
        curve.check()
        watts = curve.vmp_v * curve.imp_a
        if not envelope.voltage_min_v <= curve.voc_v <= envelope.voltage_max_v or curve.isc_a > envelope.current_max_a:
            raise UsageError(
                f"{board}: the mission's array has Voc {curve.voc_v:g} V and Isc {curve.isc_a:g} A at its brightest, "
                f"outside the input's {envelope.voltage_min_v:g} to {envelope.voltage_max_v:g} V and "
                f"{envelope.current_max_a:g} A",
                hint="the limits are those of the power unit's array input: correct the board type or the mission's "
                "power.array.curve",
            )
        if watts > envelope.power_max_w:
            raise UsageError(
                f"{board}: the mission's array gives {watts:.1f} W, its input takes {envelope.power_max_w:g} W",
                hint="correct the board type or the mission's power.array",
            )
        limits = self._supply.capabilities.channels[self._channel]
        if curve.voc_v > limits.voltage_max_v or curve.isc_a > limits.current_max_a:
            raise UsageError(
                f"{board}: Voc {curve.voc_v:g} V and Isc {curve.isc_a:g} A leave channel {self._channel}'s "
                f"{limits.voltage_max_v:g} V and {limits.current_max_a:g} A"
            )

    async def leave(self) -> None:
        """The flight is over and the output off: an ordinary supply again. Nothing happens without a flight."""
        if self._plan is None:
            return
        await solar.leave_array(self._supply, self._channel)
        self._plan, self._step, self._sure, self._loaded = None, 0, False, False

    # --------------------------------------------------------------------------------------------- its switching
    @property
    def lit(self) -> bool:
        """Whether the output is to be on, by the light that was programmed last."""
        return self._step > 0

    @property
    def expected(self) -> bool | None:
        """Whether the output should be on; None while a switching of it is not read back."""
        return self.lit if self._switched else None

    @property
    def setpoint(self) -> Setpoint:
        """Open-circuit voltage and short-circuit current of what is played; no current in the dark."""
        curve = self._flown.curve
        return Setpoint(curve.voc_v, curve.isc_a * self._step * LIGHT_STEP)

    async def program(self, go_on: GoOn = solar.unasked) -> None:
        """Be this moment's array, read back, with the output off. In the dark the least light is programmed."""
        curve, step = self._flown.curve, self._wanted()
        scale = max(step, self._least(), 1) * LIGHT_STEP
        self._sure = False
        # A table takes minutes: it is loaded once a flight, as long as the instrument stays in the mode.
        if self._loaded and await solar.plays_array(self._supply, self._channel):
            await solar.dim_array(self._supply, self._channel, curve, scale)
        else:
            await solar.play_array(self._supply, self._channel, curve, scale=scale, go_on=go_on)
        self._loaded = True
        if self._supply.capabilities.ocp_follows_limit:
            await solar.disarm_ocp(self._supply, self._channel)
        self._step, self._sure, self._switched = step, True, True

    def holds(self, reading: Reading, envelope: Envelope) -> bool:
        """Whether the unit behind it got its voltage at power on: anywhere on the curve above its least."""
        return reading.voltage_v >= envelope.voltage_min_v

    async def follow(self, due_s: float, tell: OnEvent) -> Applied | None:
        """Bring the instrument to this moment's light; None when it plays that already.

        InstrumentError: whether it arrived is unknown, and the next call says it again. SafetyError when it plays
        something else.
        """
        before, step = self._step, self._wanted()
        if self._switched and step == before and (self._sure or step == 0):
            return None
        # Without need an output that is off is not switched on: a trip, or whoever did that at the panel, would be
        # undone. An unanswered change of the light is no need.
        switch = not self._switched or (step == 0) != (before == 0)
        sent_s = acknowledged_s = self._clock()
        if step > 0:
            self._sure = False
            await solar.dim_array(self._supply, self._channel, self._flown.curve, step * LIGHT_STEP)
            acknowledged_s = self._clock()
        if switch:
            self._switched = False
            acknowledged_s = (await self._supply.output(self._channel, step > 0)).acknowledged_s
        self._step, self._sure, self._switched = step, True, True
        kind = "array_dark" if step == 0 else "array_lit" if before == 0 else "array_light"
        tell(kind, self.told())
        return Applied(due_s, sent_s, acknowledged_s, self._clock())

    def told(self) -> dict[str, float]:
        """The curve that is played, for the record."""
        curve, light = self._flown.curve, self._step * LIGHT_STEP
        return {
            "light": round(light, 4),
            "computed_light": round(self._light(), 6),
            "voc_v": curve.voc_v,
            "isc_a": curve.isc_a * light,
            "vmp_v": curve.vmp_v,
            "imp_a": curve.imp_a * light,
        }

    def judge(self, reading: Reading, least_v: float, hold_s: float, tell: OnEvent) -> None:
        """Tell when what hangs on the array asks for more than it has: then its voltage folds, left of its maximum."""
        low = self.expected is True and reading.output_on and reading.voltage_v < least_v
        if not low:
            self._low_since_s = None
            if self._collapsed and reading.output_on:
                self._collapsed = False
                tell("array_recovered", {"voltage_v": reading.voltage_v, "current_a": reading.current_a})
            return
        if self._low_since_s is None:
            self._low_since_s = reading.time_s
        if not self._collapsed and reading.time_s - self._low_since_s >= hold_s:
            self._collapsed = True
            drawn = {"voltage_v": reading.voltage_v, "current_a": reading.current_a, "least_v": least_v}
            tell("array_collapsed", {**drawn, **self.told(), "cause": "more asked than the array has in this light"})

    # --------------------------------------------------------------------------------------------------- helpers
    async def _refuse_live(self, board: str) -> None:
        await self._supply.open()
        if await self._supply.output_state(self._channel):
            raise SafetyError(
                f"{board}: channel {self._channel} of {self._supply.address} is on, and no flight switched it on: it "
                "would be another array under whatever hangs on it",
                hint="find out who did; switch it off at the instrument when nothing depends on it, then try again",
            )

    @property
    def _flown(self) -> ArrayPlan:
        if self._plan is None:
            raise UsageError("the channel is an array, and no mission says which", hint="begin a flight first")
        return self._plan

    def _light(self) -> float:
        return min(max(self._flown.light(self._mission_s()), 0.0), 1.0)

    def _wanted(self) -> int:
        step = round(self._light() * _STEPS)
        return step if step >= self._least() else 0

    def _least(self) -> int:
        """The least light in which the instrument still tells Isc from Imp; what is darker is dark."""
        limits = self._supply.capabilities.channels[self._channel]
        if self._supply.dialect.has("sas_scale"):
            return 1
        curve = self._flown.curve
        return max(1, math.ceil(_STEPS * 2 * limits.current_step_a / (curve.isc_a - curve.imp_a) - 1e-9))


def refuse_without_flight(board: str) -> UsageError:
    """For whoever switches such a board on by hand."""
    return UsageError(
        f"{board} hangs on an array: only a flight's mission says which curve it has",
        hint="begin a flight first: hil mission fly, or bench.flight(…) in a test",
    )


def refuse_fault(board: str, what: str) -> UsageError:
    """For faults that belong to a bus."""
    return UsageError(
        f"{board} hangs on an array, before a power unit with a battery: {what} there does not reach the board",
        hint="faults of its bus belong behind the power unit; nothing was sent to the supply",
    )
