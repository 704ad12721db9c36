"""The satellite's electrical power system: array, battery, bus, energy ledger.

Sign convention: battery current and power are positive while discharging. The array reaches the battery through a
maximum-power-point tracker, or directly: then the battery's voltage decides where on its I-V curve the array works, and
a shunt burns what nobody takes. The load draws constant power, so a load beyond what the battery's resistance can pass
is a *collapse* of the bus: an event in the state, never a math error. Charging is CC/CV: limited by the surplus, by a
C-rate and by the end voltage, at which the current tapers off.

Each sub-step uses the mean open-circuit voltage over the charge it moves (a discrete gradient) and the mean of the
polarization, so that the ledger `generated = stored + delivered + losses + curtailed` closes to rounding for any step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from hil.errors import UsageError
from hil.mission.battery import NMC_OCV, Battery, Polarization, Source
from hil.mission.solar_array import ArrayCurrent, SasCurve

#: Loop gain above which a supply that follows this model does not settle well enough to be flown.
GAIN_LIMIT = 0.5
_SOLVER_STEPS = 60
_SOLVER_A = 1e-13
_SOLVER_W = 1e-9  # the ledger does not see it: what the array gives is booked as what the bus takes


@dataclass(frozen=True, slots=True)
class ConverterLoss:
    """A converter's losses at output power P: p0_w + k1 P + k2_per_w P^2."""

    p0_w: float = 0.0
    k1: float = 0.0
    k2_per_w: float = 0.0

    def __post_init__(self) -> None:
        _within("converter", self, p0_w=(0.0, 1e7), k1=(0.0, 10.0), k2_per_w=(0.0, 1e3))

    def input_w(self, output_w: float) -> float:
        """What it draws to give `output_w`."""
        return output_w + self.p0_w + (self.k1 + self.k2_per_w * output_w) * output_w


@dataclass(frozen=True, slots=True)
class EpsConfig:
    """Battery, the array's way to it, and the bus.

    `resistance_ohm` is the whole pack's; `polarization_ohm` with its time constant `polarization_s` comes on top while
    a current lasts. `ocv` rows (state of charge, volts per cell) rise strictly from 0 to 1. `charge_max_c` limits the
    charge current as a multiple of the capacity per hour. `charge_efficiency` is coulombic. `platform_w` is what the
    satellite draws besides the board. `regulated_bus_v`: None for a battery bus, else the constant bus voltage behind
    `converter` (on a battery bus there is no converter). `direct`: the array's curve in full sun at its operating
    temperature when it feeds the battery directly; None for a maximum-power-point tracker. `capacity_ah` 0: no battery;
    that needs a regulated bus and a tracker; the bus collapses whenever the array does not carry the load, and comes
    back when it gives what that load asked for.
    """

    capacity_ah: float
    cells_series: int = 4
    resistance_ohm: float = 0.1
    polarization_ohm: float = 0.0
    polarization_s: float = 60.0
    ocv: tuple[tuple[float, float], ...] = NMC_OCV
    charge_max_c: float = 1.0
    charge_efficiency: float = 0.99
    charge_cell_v: float = 4.2
    mppt_efficiency: float = 0.97
    platform_w: float = 0.0
    initial_soc: float = 1.0
    regulated_bus_v: float | None = None
    converter: ConverterLoss = field(default_factory=ConverterLoss)
    direct: SasCurve | None = None
    max_substep_s: float = 5.0

    def __post_init__(self) -> None:
        _within(
            "battery",
            self,
            capacity_ah=(0.0, 1e6),
            cells_series=(1, 400),
            resistance_ohm=(0.0, 100.0),
            polarization_ohm=(0.0, 100.0),
            polarization_s=(1e-3, 1e6),
            charge_max_c=(0.0, 100.0),
            charge_efficiency=(0.01, 1.0),
            mppt_efficiency=(0.01, 1.0),
            platform_w=(0.0, 1e7),
            initial_soc=(0.0, 1.0),
            max_substep_s=(1e-3, 600.0),
        )
        socs = [soc for soc, _ in self.ocv]
        volts = [volt for _, volt in self.ocv]
        if len(socs) < 2 or socs[0] != 0.0 or socs[-1] != 1.0 or not _rising(socs) or not _rising(volts):
            raise UsageError(
                "battery ocv must rise strictly, in state of charge from 0 to 1 and in volts",
                hint="rows of [state of charge, volts per cell], for example [[0, 3.0], [0.5, 3.7], [1, 4.2]]",
            )
        if volts[0] <= 0 or self.charge_cell_v <= volts[0]:
            raise UsageError(
                f"battery charge_cell_v {self.charge_cell_v} V is not above the empty cell's {volts[0]} V",
                hint="a lithium-ion cell is charged to 4.1-4.2 V",
            )
        if self.regulated_bus_v is not None and not 0 < self.regulated_bus_v < 1e4:
            raise UsageError(
                f"regulated_bus_v is {self.regulated_bus_v} V", hint="a voltage above zero, or leave it out"
            )
        if self.capacity_ah == 0 and (self.regulated_bus_v is None or self.direct is not None):
            raise UsageError(
                "without a battery nothing holds the bus voltage",
                hint="give the battery a capacity, or the bus a regulated voltage behind a tracker",
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpsConfig:
        """Inverse of `dataclasses.asdict`, also after a round trip through JSON."""
        direct = values["direct"]
        return cls(
            **{
                **values,
                "ocv": tuple((float(soc), float(volts)) for soc, volts in values["ocv"]),
                "converter": ConverterLoss(**values["converter"]),
                "direct": direct and SasCurve(**direct),
            }
        )

    def terminal_w(self, load_w: float) -> float:
        """What a load takes at the battery's terminals."""
        return load_w if self.regulated_bus_v is None else self.converter.input_w(load_w)


@dataclass(frozen=True, slots=True)
class ShedConfig:
    """When the power system cuts the board off, and when it comes back. The executor is the bench's power loop.

    Shed after the bus stayed below `shed_v` for `hold_s` (mission time); restore when voltage and charge are above
    `restore_v` and `restore_soc` and the output was off for `dwell_s` (wall time: real capacitors discharge).
    """

    shed_v: float
    hold_s: float = 2.0
    restore_v: float = 0.0
    restore_soc: float = 0.0
    dwell_s: float = 2.0

    def __post_init__(self) -> None:
        _within(
            "shed",
            self,
            shed_v=(0.0, 1e4),
            hold_s=(0.0, 3_600.0),
            restore_v=(0.0, 1e4),
            restore_soc=(0.0, 1.0),
            dwell_s=(0.0, 3_600.0),
        )
        if self.restore_v and self.restore_v <= self.shed_v:
            raise UsageError(
                f"shed restore_v {self.restore_v} V is not above shed_v {self.shed_v} V",
                hint="without hysteresis the board would be cut and powered for ever",
            )


@dataclass(frozen=True, slots=True)
class EpsState:
    """What the power system is doing. Array watts are at the array's terminals.

    `array_available_w` is the array's maximum, `array_used_w` what battery and load take of it. `mismatch_w` is lost
    where the bus voltage is not the maximum-power voltage (direct transfer only); `curtailed_w` is the rest: left in
    the cells by a tracker, burnt in the shunt by direct transfer. `load_w` is board and platform together, as asked
    for. `collapsed`: the battery cannot carry this load (empty, or beyond what its resistance passes); then nothing is
    delivered and `bus_voltage_v` is 0 until the load fits again. `watched_v` is what load shedding goes by: the
    battery's terminals, the bus itself without a battery, 0 while collapsed.
    """

    soc: float
    bus_voltage_v: float
    watched_v: float
    battery_current_a: float
    battery_power_w: float
    array_available_w: float
    array_used_w: float
    curtailed_w: float
    mismatch_w: float
    load_w: float
    collapsed: bool


@dataclass(frozen=True, slots=True)
class EnergyLedger:
    """Where the energy went since the model began, joules of mission time.

    `generated_j` is what the array could give at its maximum. `stored_j` is the change of the battery's content
    (open-circuit energy and polarization) and may be negative; `resistance_loss_j` is the heat of its resistances;
    `unserved_j` is what the load asked for while the bus was collapsed, outside of the balance.
    """

    generated_j: float = 0.0
    stored_j: float = 0.0
    delivered_j: float = 0.0
    mppt_loss_j: float = 0.0
    mismatch_loss_j: float = 0.0
    resistance_loss_j: float = 0.0
    charge_loss_j: float = 0.0
    bus_loss_j: float = 0.0
    curtailed_j: float = 0.0
    unserved_j: float = 0.0

    @property
    def losses_j(self) -> float:
        return self.mppt_loss_j + self.mismatch_loss_j + self.resistance_loss_j + self.charge_loss_j + self.bus_loss_j

    @property
    def throughput_j(self) -> float:
        """Energy that went in or came out, the scale to judge `residual_j` by."""
        return max(self.generated_j, self.delivered_j + self.losses_j + self.curtailed_j)

    @property
    def residual_j(self) -> float:
        """generated - stored - delivered - losses - curtailed; zero but for rounding."""
        return self.generated_j - self.stored_j - self.delivered_j - self.losses_j - self.curtailed_j


@dataclass(slots=True)
class _Sums:
    """The ledger in the making."""

    generated_j: float = 0.0
    delivered_j: float = 0.0
    mppt_loss_j: float = 0.0
    mismatch_loss_j: float = 0.0
    resistance_loss_j: float = 0.0
    charge_loss_j: float = 0.0
    bus_loss_j: float = 0.0
    curtailed_j: float = 0.0
    unserved_j: float = 0.0


@dataclass(frozen=True, slots=True)
class _Flow:
    """Constant flows over one sub-step: battery amperes (positive discharging), its mean OCV, terminal volts."""

    current_a: float
    ocv_v: float
    terminal_v: float
    collapsed: bool = False


_COLLAPSED = _Flow(0.0, 0.0, 0.0, collapsed=True)


class EpsModel:
    """The power system as a model that is stepped forward.

    >>> eps = EpsModel(EpsConfig(capacity_ah=0.66, platform_w=6.0))
    >>> state = eps.step(60.0, board_w=15.0, array_w=0.0)
    >>> 13 < state.bus_voltage_v < 16.8 and state.battery_current_a > 1
    True
    """

    def __init__(self, config: EpsConfig) -> None:
        self.config = config
        self.battery = Battery(config.capacity_ah, config.cells_series, config.ocv)
        self._array = ArrayCurrent(config.direct) if config.direct is not None else None
        self._begin(config.initial_soc if config.capacity_ah > 0 else 0.0)

    @property
    def state(self) -> EpsState:
        """The state after the last step; before the first, the battery at rest."""
        return self._state

    @property
    def ledger(self) -> EnergyLedger:
        """Energy since the model was made."""
        sums = {f.name: getattr(self._sums, f.name) for f in fields(_Sums)}
        return EnergyLedger(stored_j=self._content_j() - self._origin_j, **sums)

    def step(self, dt_s: float, board_w: float, array_w: float) -> EpsState:
        """Advance by `dt_s` of mission time under a constant board load and array power; long steps are divided.

        `array_w` is the array's power at its maximum-power point. Raises UsageError for a negative or non-finite
        argument.
        """
        for name, value in (("dt_s", dt_s), ("board_w", board_w), ("array_w", array_w)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"power system step: {name} is {value!r}", hint="zero or more, and finite")
        load_w = board_w + self.config.platform_w
        count = max(1, math.ceil(dt_s / self.config.max_substep_s))
        part_s = dt_s / count
        for _ in range(count):
            source = self._polarization.source(part_s)
            flow = self._flow(part_s, source, load_w, array_w)
            split = self._array_split(flow, load_w, array_w)
            self._move(flow, source, split, part_s, load_w, array_w)
        self._state = self._describe(flow, split, load_w, array_w)
        return self._state

    def gain(self, board_w: float, voltage_v: float | None = None) -> float:
        """Loop gain R P / V^2 against a constant-power board: how much the loop feeds its own error back.

        R is the resistance that a lasting current meets. `voltage_v` defaults to the present bus voltage (open-circuit
        while collapsed). Zero on a regulated bus. An array that feeds the battery directly is in parallel to it and
        gives less the higher the voltage, so that the bus moves by R / (1 + R |dI/dV|) an ampere: never by more than R,
        left of the array's maximum too, where alone it would be a current source that no programmed supply can play.
        Without a battery to hold the bus `EpsConfig` refuses direct transfer.
        """
        if self.config.regulated_bus_v is not None:
            return 0.0
        volts = voltage_v or self._state.bus_voltage_v or self.battery.ocv_v(self._soc)
        return (self.config.resistance_ohm + self.config.polarization_ohm) * board_w / (volts * volts)

    def reset(self, soc: float) -> None:
        """Put the battery at rest at a state of charge and begin a new ledger."""
        if not 0 <= soc <= 1:
            raise UsageError(f"state of charge {soc!r} is impossible", hint="0..1")
        self._begin(soc)

    def _begin(self, soc: float) -> None:
        config = self.config
        self._soc = soc
        self._most_w = self._awaited_w = 0.0
        self._sums = _Sums()
        self._polarization = Polarization(config.resistance_ohm, config.polarization_ohm, config.polarization_s)
        self._origin_j = self._content_j()
        at_rest_v = self.battery.ocv_v(soc)
        self._state = self._describe(_Flow(0.0, at_rest_v, at_rest_v), (0.0, 0.0, 0.0), 0.0, 0.0)

    def _content_j(self) -> float:
        return self.battery.energy_j(self._soc) + self._polarization.energy_j

    def _flow(self, dt_s: float, source: Source, load_w: float, array_w: float) -> _Flow:
        need_w = self.config.terminal_w(load_w)
        if self.battery.charge_c == 0.0:
            return _Flow(0.0, 0.0, 0.0, collapsed=self._fails(need_w, array_w * self.config.mppt_efficiency))
        if self._array is not None and array_w > 0.0:
            flow = self._direct_flow(self._array, dt_s, source, need_w, array_w)
            return flow or _as_collapsed(self._direct_flow(self._array, dt_s, source, 0.0, array_w) or _COLLAPSED)
        surplus_w = array_w * self.config.mppt_efficiency - need_w
        if surplus_w >= 0:
            return self._charge(dt_s, source, surplus_w)
        # where the battery cannot, the load drops off; what the array still gives goes into the battery
        return self._discharge(dt_s, source, -surplus_w) or _as_collapsed(
            self._charge(dt_s, source, array_w * self.config.mppt_efficiency)
        )

    def _fails(self, need_w: float, given_w: float) -> bool:
        """Whether the bus is down without a battery. A load that was cut in twilight is not tried again in the dark."""
        self._most_w = max(self._most_w, given_w)
        if need_w > given_w:
            # more than the array ever gave cannot be waited for: such a load is tried, and fails, again and again
            self._awaited_w = min(need_w, self._most_w)
            return True
        if given_w < self._awaited_w:
            return True
        self._awaited_w = 0.0
        return given_w == 0.0

    def _discharge(self, dt_s: float, source: Source, power_w: float) -> _Flow | None:
        """The flow that gives `power_w` at the terminals; None when the battery cannot."""
        resistance = source.resistance_ohm
        charge_c = self.battery.charge_c

        def wanted(ocv_v: float) -> float:
            emf_v = ocv_v - source.drop_v
            root = emf_v * emf_v - 4.0 * resistance * power_w
            # 2 P / (emf + root) is the textbook solution without its cancellation, and good for R = 0
            return 2.0 * power_w / (emf_v + math.sqrt(root)) if root >= 0 and emf_v > 0 else math.inf

        current = wanted(self.battery.ocv_v(self._soc))
        for _ in range(_SOLVER_STEPS):
            after = self._soc - current * dt_s / charge_c
            if not after >= 0.0:
                return None
            better = wanted(self.battery.mean_ocv_v(self._soc, after))
            if math.isinf(better) or abs(better - current) <= _SOLVER_A * max(1.0, current):
                current = better
                break
            current = better
        if math.isinf(current) or self._soc - current * dt_s / charge_c < 0.0 or self._soc <= 0.0:
            return None
        ocv = self.battery.mean_ocv_v(self._soc, self._soc - current * dt_s / charge_c)
        return _Flow(current, ocv, ocv - source.drop_v - current * resistance)

    def _charge(self, dt_s: float, source: Source, surplus_w: float = math.inf) -> _Flow:
        """The charging flow that a surplus at the terminals allows; without one, what the battery itself allows."""
        config, resistance = self.config, source.resistance_ohm
        gained = config.charge_efficiency * dt_s / self.battery.charge_c  # state of charge per ampere
        end_v = config.charge_cell_v * config.cells_series
        by_rate = config.charge_max_c * config.capacity_ah
        by_room = (1.0 - self._soc) / gained if gained > 0 else math.inf

        def allowed(ocv_v: float) -> float:
            emf_v = ocv_v - source.drop_v
            if emf_v <= 0.0:
                return 0.0
            by_voltage = (end_v - emf_v) / max(resistance, 1e-9)  # an ideal battery: charged until it is full
            most = min(by_rate, by_voltage, by_room)
            if not math.isinf(surplus_w):
                root = math.sqrt(emf_v * emf_v + 4.0 * resistance * surplus_w)
                most = min(most, 2.0 * surplus_w / (emf_v + root))
            return max(0.0, most)

        def mean_v(current: float) -> float:
            return self.battery.mean_ocv_v(self._soc, min(self._soc + current * gained, 1.0))

        most = allowed(self.battery.ocv_v(self._soc))
        current = _falling_root(lambda amps: allowed(mean_v(amps)) - amps, most)
        ocv = mean_v(current)
        return _Flow(-current, ocv, ocv - source.drop_v + current * resistance)

    def _direct_flow(
        self, array: ArrayCurrent, dt_s: float, source: Source, need_w: float, array_w: float
    ) -> _Flow | None:
        """Array and battery on one bus: the highest voltage at which both together carry the load; None without one.

        The search begins where the battery charges as fast as it may, there the shunt takes what is left.
        """
        limit = self._charge(dt_s, source)
        emf_v = self.battery.ocv_v(self._soc) - source.drop_v
        if emf_v <= 0.0:
            return None
        charge_c, efficiency = self.battery.charge_c, self.config.charge_efficiency

        def mean_v(current: float) -> float:
            moved = current if current > 0 else current * efficiency
            return self.battery.mean_ocv_v(self._soc, min(max(self._soc - moved * dt_s / charge_c, 0.0), 1.0))

        def missing_w(more_a: float) -> float:
            current = limit.current_a + more_a
            volts = mean_v(current) - source.drop_v - source.resistance_ohm * current
            return need_w - volts * (array.at(volts, array_w) + current)

        if missing_w(0.0) <= 0.0:
            return limit
        # up to the fold, where more current gives no more power, up to the empty battery, or well past the load
        fold_a = emf_v / (2.0 * source.resistance_ohm) if source.resistance_ohm > 0 else math.inf
        empty_a = self._soc * charge_c / dt_s if dt_s > 0 else math.inf
        most_a = min(fold_a, empty_a, 4.0 * need_w / emf_v)
        if missing_w(most_a - limit.current_a) > 0.0:
            return None
        current = limit.current_a + _falling_root(missing_w, most_a - limit.current_a, _SOLVER_W)
        ocv = mean_v(current)
        return _Flow(current, ocv, ocv - source.drop_v - source.resistance_ohm * current)

    def _move(
        self, flow: _Flow, source: Source, split: tuple[float, float, float], dt_s: float, load_w: float, array_w: float
    ) -> None:
        """Book one sub-step and move the charge."""
        config, sums = self.config, self._sums
        used_w, curtailed_w, mismatch_w = split
        amps = flow.current_a
        if amps != 0.0:
            moved = amps if amps > 0 else amps * config.charge_efficiency
            self._soc = min(max(self._soc - moved * dt_s / self.battery.charge_c, 0.0), 1.0)
        sums.resistance_loss_j += self._polarization.move(source, amps, dt_s)
        sums.charge_loss_j += -amps * flow.ocv_v * (1.0 - config.charge_efficiency) * dt_s if amps < 0 else 0.0
        sums.generated_j += array_w * dt_s
        sums.curtailed_j += curtailed_w * dt_s
        sums.mismatch_loss_j += mismatch_w * dt_s
        if self._array is None:
            sums.mppt_loss_j += used_w * (1.0 - config.mppt_efficiency) * dt_s
        if flow.collapsed:
            sums.unserved_j += load_w * dt_s
        else:
            sums.delivered_j += load_w * dt_s
            sums.bus_loss_j += (config.terminal_w(load_w) - load_w) * dt_s

    def _array_split(self, flow: _Flow, load_w: float, array_w: float) -> tuple[float, float, float]:
        """(used, curtailed, mismatch) at the array's terminals."""
        need_w = 0.0 if flow.collapsed else self.config.terminal_w(load_w)
        taken_w = need_w - flow.current_a * flow.terminal_v
        if self._array is not None:
            used_w = min(max(taken_w, 0.0), array_w)
            at_bus_w = flow.terminal_v * self._array.at(flow.terminal_v, array_w)
            curtailed_w = min(max(at_bus_w - used_w, 0.0), array_w - used_w)
            return used_w, curtailed_w, array_w - used_w - curtailed_w
        if flow.current_a > 0:
            return array_w, 0.0, 0.0
        used_w = min(taken_w / self.config.mppt_efficiency, array_w)
        return used_w, array_w - used_w, 0.0

    def _describe(self, flow: _Flow, split: tuple[float, float, float], load_w: float, array_w: float) -> EpsState:
        used_w, curtailed_w, mismatch_w = split
        if flow.collapsed:
            bus_v = 0.0
        elif self.config.regulated_bus_v is not None:
            bus_v = self.config.regulated_bus_v
        else:
            bus_v = flow.terminal_v
        return EpsState(
            soc=self._soc,
            bus_voltage_v=bus_v,
            watched_v=flow.terminal_v if bus_v and self.battery.charge_c else bus_v,
            battery_current_a=flow.current_a,
            battery_power_w=flow.current_a * flow.terminal_v,
            array_available_w=array_w,
            array_used_w=used_w,
            curtailed_w=curtailed_w,
            mismatch_w=mismatch_w,
            load_w=load_w,
            collapsed=flow.collapsed,
        )


def _as_collapsed(flow: _Flow) -> _Flow:
    return replace(flow, collapsed=True)


def _falling_root(function: Callable[[float], float], high: float, near_zero: float = _SOLVER_A) -> float:
    """Root within [0, high] of a falling function with f(0) >= 0: false position, halving a stuck end (Illinois)."""
    low, at_low, at_high = 0.0, function(0.0), function(high)
    if at_high >= 0.0:
        return high
    if at_low <= 0.0:
        return 0.0
    side = 0
    middle = high
    for _ in range(_SOLVER_STEPS):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        value = function(middle)
        if abs(value) <= near_zero or high - low <= _SOLVER_A * max(1.0, high):
            break
        if value > 0:
            low, at_low = middle, value
            at_high = at_high / 2 if side == 1 else at_high
            side = 1
        else:
            high, at_high = middle, value
            at_low = at_low / 2 if side == -1 else at_low
            side = -1
    return middle


def _rising(values: list[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _within(owner: str, config: object, **bounds: tuple[float, float]) -> None:
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not low <= value <= high:  # also refuses nan
            raise UsageError(f"{owner}: {name} is {value}, must be within {low:g}..{high:g}", hint=f"correct {name}")
