"""One output over time: voltage, current, regulation, protections and the load's edges. Time is a parameter.

What is modelled, and labelled so wherever it is reported. The source is ideal: constant voltage up to its current (or
power) limit, constant current beyond, or a solar array's curve. The terminal voltage follows with one time constant
while on (`RISE_TAU_S`) and decays through a bleeder when off (`DECAY_TAU_S` with nothing connected; a resistor or the
board's own capacitors change it). Capacitors at a load's input draw their charge at power on, which is the inrush, and
hold the load up after power off. Protections trip when their condition has held for their delay, and latch. A load is
told about its power at the edges: output off (or its capacitors empty), trip, or a voltage below its lock-out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hil.virtual.supply.loads import CapacitiveLoad, Load, OhmicLoad
from hil.virtual.supply.solar import Curve

RISE_TAU_S = 0.005  # terminal voltage towards a new set point, output on
DECAY_TAU_S = 0.050  # terminal voltage towards zero, output off, nothing connected
OUTPUT_CAPACITANCE_F = 470e-6
BLEEDER_OHM = DECAY_TAU_S / OUTPUT_CAPACITANCE_F
RETURN_MARGIN_V = 0.5  # a load starts only this far above its lock-out
RETURN_DWELL_S = 0.05  # power-good delay of a load after a brown-out, so that a weak source makes it hiccup
_SUBSTEP_S = 0.001
_MAX_SUBSTEPS = 2000  # a host that stood still for an hour is not simulated millisecond by millisecond
_SETTLED_V = 1e-4

Regulation = Literal["CV", "CC", "UR"]


@dataclass(frozen=True, slots=True)
class ChannelModel:
    """Limits of one channel: rated values, settable maxima (power: where the maker limits it), protection ranges."""

    rated_v: float
    rated_a: float
    max_v: float
    max_a: float
    max_ovp_v: float
    max_ocp_a: float
    max_power_w: float = math.inf


@dataclass(slots=True)
class Protection:
    """A latching trip: its level, whether it is armed, how long its condition must hold."""

    level: float
    enabled: bool = False
    delay_s: float = 0.0
    tripped: bool = False
    since_s: float | None = field(default=None, repr=False)

    def check(self, exceeded: bool, now_s: float) -> bool:
        """Whether it trips now."""
        if not (self.enabled and exceeded) or self.tripped:
            self.since_s = None
            return False
        if self.since_s is None:
            self.since_s = now_s
        self.tripped = now_s - self.since_s >= self.delay_s - 1e-9
        return self.tripped


class Channel:
    """One output. `keeps_enable`: after a trip it still says on, and a clear brings the output back by itself.
    `trips_in_cc`: over-current means "regulates current", with no level of its own.
    """

    def __init__(
        self,
        model: ChannelModel,
        load: Load | None,
        now_s: float,
        *,
        keeps_enable: bool = False,
        trips_in_cc: bool = False,
    ) -> None:
        self.model = model
        self.load = load
        self.keeps_enable = keeps_enable
        self.trips_in_cc = trips_in_cc
        self.enabled = False
        self.master = True
        self.shutdown: set[str] = set()
        self.output_on = False
        self.terminal_v = 0.0
        self.current_a = 0.0
        self.mode: Regulation = "CV"
        self.load_powered = False
        self.energy_j = 0.0
        self.peak_a = 0.0
        self._time_s = now_s
        self._restore = False
        self._return_s = now_s
        self.defaults()

    def defaults(self) -> None:
        """Settings as after a reset; the output itself is not touched."""
        model = self.model
        self.voltage_set_v = 0.0
        self.current_limit_a = model.rated_a
        self.power_limit_w = model.max_power_w
        self.ovp = Protection(model.max_ovp_v)
        self.ocp = Protection(model.max_ocp_a)
        self.opp = Protection(model.max_power_w)
        self.curve: Curve | None = None
        self._refresh()

    @property
    def load(self) -> Load | None:
        """What hangs on the output."""
        return self._load

    @load.setter
    def load(self, load: Load | None) -> None:
        self._load = load
        # asked once: a protocol's isinstance is too slow for every tick of many channels
        self._ohm = load.resistance_ohm if isinstance(load, OhmicLoad) else None
        self._farad = load.input_capacitance_f if isinstance(load, CapacitiveLoad) else 0.0

    # --- switching ---------------------------------------------------------------------------------------------------
    @property
    def tripped(self) -> bool:
        return self.ovp.tripped or self.ocp.tripped or self.opp.tripped or bool(self.shutdown)

    def switch(self, on: bool, now_s: float) -> None:
        """Turn the output on or off. A latched trip keeps it off until cleared."""
        self.advance(now_s)
        if on and self.tripped and not self.keeps_enable:
            return
        self.enabled = on
        self._restore = False
        self._refresh()
        self._settle(now_s)

    def set_master(self, on: bool, now_s: float) -> None:
        """The switch all channels of a supply have in common, where it has one."""
        self.advance(now_s)
        self.master = on
        self._refresh()
        self._settle(now_s)

    def trip(self, reason: str, now_s: float) -> None:
        """Shut down for a reason that is not measured here: watchdog, a linked fuse, a test."""
        self.advance(now_s)
        self.shutdown.add(reason)
        self._tripped()
        self._settle(now_s)

    def clear_trip(
        self, now_s: float, *, ovp: bool = False, ocp: bool = False, other: bool = False, restore: bool = False
    ) -> None:
        """Forget a latched trip. With `restore` the output returns to what it was before, if nobody switched since."""
        self.advance(now_s)
        for protection, wanted in ((self.ovp, ovp), (self.ocp, ocp), (self.opp, other)):
            if wanted:
                protection.tripped, protection.since_s = False, None
        if other:
            self.shutdown.clear()
        if restore and self._restore and not self.tripped:
            self.enabled, self._restore = True, False
        self._refresh()
        self._settle(now_s)

    def clear_all(self, now_s: float, *, restore: bool = False) -> None:
        """Forget every trip."""
        self.clear_trip(now_s, ovp=True, ocp=True, other=True, restore=restore)

    def _refresh(self) -> None:
        self.output_on = self.enabled and self.master and not self.tripped

    def _tripped(self) -> None:
        if not self.keeps_enable:
            self._restore = self._restore or self.enabled
            self.enabled = False
        self._refresh()

    # --- time --------------------------------------------------------------------------------------------------------
    def advance(self, now_s: float) -> None:
        """Move the terminal voltage to `now_s`, trip what must trip, tell the load about its edges."""
        if not self.output_on and self.terminal_v == 0.0 and not self.load_powered:
            self._time_s = max(now_s, self._time_s)
            return
        watts = self._demand_w(now_s)
        if self._stays(watts):
            self.current_a = watts / self.terminal_v
            self.peak_a = max(self.peak_a, self.current_a)
            self.energy_j += watts * (now_s - self._time_s)
            self._time_s = now_s
            return
        steps = 0
        while True:
            rest = now_s - self._time_s
            step_s = max(0.0, rest)
            if steps < _MAX_SUBSTEPS:
                step_s = min(step_s, self._step_s(watts))
            self._time_s = now_s if step_s >= rest else self._time_s + step_s
            powered = self.load_powered
            self._move(watts, step_s)
            self._settle(self._time_s)
            if self.load_powered != powered:
                watts = self._demand_w(now_s)
            steps += 1
            if self._time_s >= now_s:
                return

    def _demand_w(self, now_s: float) -> float:
        if self._load is None or not self.load_powered or self._ohm is not None:
            return 0.0
        return max(0.0, self._load.power_w(now_s))

    def _stays(self, watts: float) -> bool:
        """Whether nothing moves and nothing may trip: a settled board in constant voltage, the usual case by far."""
        volts = self.terminal_v
        return (
            self.output_on
            and self.load_powered
            and self._ohm is None
            and self.curve is None
            and self.mode == "CV"
            and volts == self.voltage_set_v
            and volts > 0.0
            and watts <= volts * self._limit_a()
            and not self.opp.enabled
            and (self.trips_in_cc or not self.ocp.enabled or watts <= volts * self.ocp.level)
            and (not self.ovp.enabled or volts <= self.ovp.level)
            and self._load is not None
            and volts >= self._load.undervoltage_lockout_v
            and self.ovp.since_s is None
            and self.ocp.since_s is None
        )

    def _step_s(self, watts: float) -> float:
        """How far time may go at once: everything is integrated exactly, but an edge may lie in between."""
        if not self.output_on:
            return _SUBSTEP_S if self.load_powered else math.inf
        target, _, mode = self._operating_point(watts)
        if mode != self.mode or abs(target - self.terminal_v) > _SETTLED_V:
            return _SUBSTEP_S
        pending = [
            p.since_s + p.delay_s - self._time_s for p in (self.ovp, self.ocp, self.opp) if p.since_s is not None
        ]
        if self._load is not None and not self.load_powered and self._return_s > self._time_s:
            pending.append(self._return_s - self._time_s)
        return max(_SUBSTEP_S, min(pending)) if pending else math.inf

    def _move(self, watts: float, step_s: float) -> None:
        """One step of the terminal voltage towards where the source and the load meet."""
        if not self.output_on:
            self._discharge(watts, step_s)
            return
        target, amperes, mode = self._operating_point(watts)
        change_v = (target - self.terminal_v) * (1.0 - math.exp(-step_s / RISE_TAU_S))
        if abs(target - self.terminal_v - change_v) < _SETTLED_V:
            change_v = target - self.terminal_v
        charge_f = self._farad
        if charge_f > 0.0 and step_s > 0.0 and self.curve is None:
            change_v, amperes, mode = self._charge(change_v, amperes, mode, watts, charge_f, step_s)
        self.terminal_v = max(0.0, self.terminal_v + change_v)
        self.current_a, self.mode = amperes, mode
        self.peak_a = max(self.peak_a, amperes)
        self.energy_j += self.terminal_v * amperes * step_s

    def _charge(
        self, change_v: float, amperes: float, mode: Regulation, watts: float, charge_f: float, step_s: float
    ) -> tuple[float, float, Regulation]:
        """The load's capacitors take what the limit leaves: an inrush, or a slower collapse."""
        limit = self._limit_a()
        if mode == "CC" and watts > 0.0:
            lacking_a = watts / max(self.terminal_v, 0.1) - limit
            return max(change_v, -lacking_a * step_s / (charge_f + OUTPUT_CAPACITANCE_F)), limit, mode
        inrush_a = charge_f * change_v / step_s
        if amperes + inrush_a > limit:
            return max(0.0, limit - amperes) * step_s / charge_f, limit, "CC"
        return change_v, max(0.0, amperes + inrush_a), mode

    def _discharge(self, watts: float, step_s: float) -> None:
        self.mode, self.current_a = "CV", 0.0
        farad = OUTPUT_CAPACITANCE_F + self._farad
        ohm = BLEEDER_OHM
        if self._ohm is not None:
            ohm = ohm * self._ohm / (ohm + self._ohm)
        energy_left = self.terminal_v**2 - 2.0 * watts * step_s / farad
        self.terminal_v = math.sqrt(max(0.0, energy_left)) * math.exp(-step_s / (ohm * farad))
        if self.terminal_v < _SETTLED_V:
            self.terminal_v = 0.0

    def _limit_a(self) -> float:
        power_w = min(self.power_limit_w, self.model.max_power_w)
        if power_w == math.inf:
            return self.current_limit_a
        return min(self.current_limit_a, power_w / max(self.terminal_v, 0.1))

    def _operating_point(self, watts: float) -> tuple[float, float, Regulation]:
        """(voltage the terminal tends to, load current, regulation).

        A constant-power load that wants more than the limit has no stable point on a current source: less voltage
        makes it draw more, so the voltage collapses until the load locks out.
        """
        if self.curve is not None:
            return self._on_the_curve(self.curve, watts)
        limit, wanted_v = self._limit_a(), self.voltage_set_v
        if self._ohm is not None:
            ohm = self._ohm
            if wanted_v / ohm <= limit:
                return wanted_v, self.terminal_v / ohm, "CV"
            return limit * ohm, min(limit, self.terminal_v / ohm), "CC"
        if watts <= 0.0:
            return wanted_v, 0.0, "CV"
        demand_a = watts / max(self.terminal_v, 0.1)
        if demand_a <= limit:
            return wanted_v, demand_a, "CV"
        return 0.0, limit, "CC"

    def _on_the_curve(self, curve: Curve, watts: float) -> tuple[float, float, Regulation]:
        if self._ohm is not None:
            ohm = self._ohm
            target = curve.meet(self.terminal_v, lambda v: v / ohm)
            amperes = min(self.terminal_v / ohm, curve.short_circuit_a)
        else:
            target = curve.meet(self.terminal_v, lambda v: watts / max(v, 0.1))
            amperes = min(watts / max(self.terminal_v, 0.1), curve.short_circuit_a)
        # Left of the maximum-power point an array is a current source, right of it a voltage source.
        return target, amperes, "CV" if self.terminal_v >= curve.best[1] else "CC"

    # --- edges -------------------------------------------------------------------------------------------------------
    def _settle(self, now_s: float) -> None:
        """Trips first, then the load's edges: what a real output stage would do before anybody can ask."""
        if self.output_on:
            over_a = self.mode == "CC" if self.trips_in_cc else self.current_a > self.ocp.level + 1e-9
            over_v = self.terminal_v > self.ovp.level + 1e-9
            over_w = self.opp.enabled and self.terminal_v * self.current_a > self.opp.level + 1e-9
            # all three are asked: each has a delay of its own that runs while its condition holds
            tripped = [p.check(o, now_s) for p, o in ((self.ovp, over_v), (self.ocp, over_a), (self.opp, over_w))]
            if any(tripped):
                self._tripped()
        else:
            self.ovp.since_s = self.ocp.since_s = self.opp.since_s = None
        if not self.output_on:
            self.current_a = 0.0
        if self._load is not None:
            self._feed(self._load, now_s)

    def _feed(self, load: Load, now_s: float) -> None:
        lockout = load.undervoltage_lockout_v
        starved = self.terminal_v < lockout or (not self.output_on and self._farad == 0.0)
        if self.load_powered and (starved or (self.terminal_v == 0.0 and not self.output_on)):
            self._return_s = now_s + RETURN_DWELL_S if self.output_on else now_s
            self._power_load(False)
        elif not self.load_powered and self.output_on and self.terminal_v > 0:
            # A margin, else the load would flutter at its lock-out.
            margin = RETURN_MARGIN_V if lockout > 0 else 0.0
            if self.terminal_v >= lockout + margin and now_s >= self._return_s:
                self._power_load(True)

    def _power_load(self, on: bool) -> None:
        self.load_powered = on
        if not on and self._ohm is None:
            self.current_a = 0.0
        if self._load is not None:
            self._load.set_powered(on)
