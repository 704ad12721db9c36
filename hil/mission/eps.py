"""The satellite's electrical power system: array behind an MPPT, battery with resistance, bus, energy ledger.

Sign convention: battery current and power are positive while discharging. The battery is OCV(SOC) behind one series
resistance; the load draws constant power, so a load beyond what the resistance can pass is a *collapse* of the bus: an
event in the state, never a math error. Charging is CC/CV: limited by the surplus, by a C-rate and by the end voltage.

Each sub-step uses the mean open-circuit voltage over the charge it moves (a discrete gradient), so that the ledger
`generated = stored + delivered + losses + curtailed` closes to rounding for any step length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise

from hil.errors import UsageError

# Open-circuit volts of one NMC cell against state of charge; textbook values, assumed (not a measured cell).
NMC_OCV = ((0.0, 3.0), (0.1, 3.4), (0.3, 3.6), (0.5, 3.7), (0.75, 3.9), (1.0, 4.2))

_SOLVER_STEPS = 60
_SOLVER_A = 1e-13


@dataclass(frozen=True, slots=True)
class ArrayConfig:
    """A solar array given by its begin-of-life power.

    `bol_w` at 1 AU, normal incidence, operating temperature; `degradation` is what is left of it (end of life 0.85);
    `pointing` the mean cosine. Output: bol_w x degradation x pointing x visible solar disc, and with
    `distance_scaling` the inverse square of the Sun's distance (+3.4 % in January, -3.3 % in July).
    """

    bol_w: float
    degradation: float = 1.0
    pointing: float = 1.0
    distance_scaling: bool = False

    def __post_init__(self) -> None:
        _within("array", self, bol_w=(0.0, 1e7), degradation=(0.0, 1.0), pointing=(0.0, 1.0))

    @property
    def full_sun_w(self) -> float:
        """Watts in full sunlight at 1 AU."""
        return self.bol_w * self.degradation * self.pointing


@dataclass(frozen=True, slots=True)
class EpsConfig:
    """Battery, MPPT and bus.

    `resistance_ohm` is the whole pack's; `ocv` rows (state of charge, volts per cell) rise strictly from 0 to 1.
    `charge_max_c` limits the charge current as a multiple of the capacity per hour. `charge_efficiency` is coulombic.
    `platform_w` is what the satellite draws besides the board. `regulated_bus_v`: None for a battery bus, else the
    constant bus voltage behind a converter of `bus_efficiency` (on a battery bus there is no converter).
    """

    capacity_ah: float
    cells_series: int = 4
    resistance_ohm: float = 0.1
    ocv: tuple[tuple[float, float], ...] = NMC_OCV
    charge_max_c: float = 1.0
    charge_efficiency: float = 0.99
    charge_cell_v: float = 4.2
    mppt_efficiency: float = 0.97
    platform_w: float = 0.0
    initial_soc: float = 1.0
    regulated_bus_v: float | None = None
    bus_efficiency: float = 1.0
    max_substep_s: float = 5.0

    def __post_init__(self) -> None:
        _within(
            "battery",
            self,
            capacity_ah=(1e-6, 1e6),
            cells_series=(1, 400),
            resistance_ohm=(0.0, 100.0),
            charge_max_c=(0.0, 100.0),
            charge_efficiency=(0.01, 1.0),
            mppt_efficiency=(0.01, 1.0),
            platform_w=(0.0, 1e7),
            initial_soc=(0.0, 1.0),
            bus_efficiency=(0.01, 1.0),
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
    """What the power system is doing. Array watts are at the array's terminals, before the MPPT.

    `load_w` is board and platform together, as asked for. `collapsed`: the battery cannot carry this load (empty, or
    beyond what its resistance passes); then nothing is delivered and `bus_voltage_v` is 0 until the load fits again.
    """

    soc: float
    bus_voltage_v: float
    battery_current_a: float
    battery_power_w: float
    array_available_w: float
    array_used_w: float
    curtailed_w: float
    load_w: float
    collapsed: bool


@dataclass(frozen=True, slots=True)
class EnergyLedger:
    """Where the energy went since the model began, joules of mission time.

    `stored_j` is the change of the battery's content (open-circuit energy) and may be negative; `unserved_j` is what
    the load asked for while the bus was collapsed, outside of the balance.
    """

    generated_j: float = 0.0
    stored_j: float = 0.0
    delivered_j: float = 0.0
    mppt_loss_j: float = 0.0
    resistance_loss_j: float = 0.0
    charge_loss_j: float = 0.0
    bus_loss_j: float = 0.0
    curtailed_j: float = 0.0
    unserved_j: float = 0.0

    @property
    def losses_j(self) -> float:
        return self.mppt_loss_j + self.resistance_loss_j + self.charge_loss_j + self.bus_loss_j

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
    resistance_loss_j: float = 0.0
    charge_loss_j: float = 0.0
    bus_loss_j: float = 0.0
    curtailed_j: float = 0.0
    unserved_j: float = 0.0


class Battery:
    """OCV table and energy content of a pack. Energies in joules, charge as state of charge 0..1."""

    def __init__(self, config: EpsConfig) -> None:
        self.charge_c = config.capacity_ah * 3_600.0
        self.soc = tuple(soc for soc, _ in config.ocv)
        self.volts = tuple(volt * config.cells_series for _, volt in config.ocv)
        joules = [0.0]
        for index in range(1, len(self.soc)):
            width = self.soc[index] - self.soc[index - 1]
            joules.append(joules[-1] + self.charge_c * width * 0.5 * (self.volts[index] + self.volts[index - 1]))
        self._joules = tuple(joules)

    def ocv_v(self, soc: float) -> float:
        """Open-circuit voltage of the pack."""
        index, share = self._place(soc)
        return self.volts[index] + share * (self.volts[index + 1] - self.volts[index])

    def energy_j(self, soc: float) -> float:
        """Open-circuit energy content: the integral of OCV over charge."""
        index, share = self._place(soc)
        low, high = self.volts[index], self.volts[index + 1]
        width_c = self.charge_c * (self.soc[index + 1] - self.soc[index])
        return self._joules[index] + width_c * share * (low + 0.5 * share * (high - low))

    def soc_at(self, ocv_v: float) -> float:
        """State of charge at an open-circuit voltage of the pack, held within 0..1."""
        if ocv_v <= self.volts[0]:
            return 0.0
        if ocv_v >= self.volts[-1]:
            return 1.0
        index = bisect_right(self.volts, ocv_v) - 1
        share = (ocv_v - self.volts[index]) / (self.volts[index + 1] - self.volts[index])
        return self.soc[index] + share * (self.soc[index + 1] - self.soc[index])

    def mean_ocv_v(self, soc_a: float, soc_b: float) -> float:
        """Mean open-circuit voltage between two states of charge: energy moved per charge moved."""
        if abs(soc_b - soc_a) < 1e-6:  # the difference quotient would lose its digits
            return self.ocv_v(0.5 * (soc_a + soc_b))
        return (self.energy_j(soc_b) - self.energy_j(soc_a)) / (self.charge_c * (soc_b - soc_a))

    def _place(self, soc: float) -> tuple[int, float]:
        index = min(max(bisect_right(self.soc, soc) - 1, 0), len(self.soc) - 2)
        return index, (soc - self.soc[index]) / (self.soc[index + 1] - self.soc[index])


@dataclass(frozen=True, slots=True)
class _Flow:
    """Constant flows over one sub-step: battery amperes (positive discharging), its mean OCV, terminal volts."""

    current_a: float
    ocv_v: float
    terminal_v: float
    collapsed: bool = False


class EpsModel:
    """The power system as a model that is stepped forward.

    >>> eps = EpsModel(EpsConfig(capacity_ah=0.66, platform_w=6.0))
    >>> state = eps.step(60.0, board_w=15.0, array_w=0.0)
    >>> 13 < state.bus_voltage_v < 16.8 and state.battery_current_a > 1
    True
    """

    def __init__(self, config: EpsConfig) -> None:
        self.config = config
        self.battery = Battery(config)
        self._soc = config.initial_soc
        self._sums = _Sums()
        self._origin_j = self.battery.energy_j(self._soc)
        self._state = self._describe(self._flow(0.0, 0.0, 0.0), 0.0, 0.0, 0.0)

    @property
    def state(self) -> EpsState:
        """The state after the last step; before the first, the battery at rest."""
        return self._state

    @property
    def ledger(self) -> EnergyLedger:
        """Energy since the model was made."""
        sums = {f.name: getattr(self._sums, f.name) for f in fields(_Sums)}
        return EnergyLedger(stored_j=self.battery.energy_j(self._soc) - self._origin_j, **sums)

    def step(self, dt_s: float, board_w: float, array_w: float) -> EpsState:
        """Advance by `dt_s` of mission time under a constant board load and array power; long steps are divided.

        Raises UsageError for a negative or non-finite argument.
        """
        for name, value in (("dt_s", dt_s), ("board_w", board_w), ("array_w", array_w)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"power system step: {name} is {value!r}", hint="zero or more, and finite")
        load_w = board_w + self.config.platform_w
        count = max(1, math.ceil(dt_s / self.config.max_substep_s))
        for _ in range(count):
            flow = self._flow(dt_s / count, load_w, array_w)
            self._move(flow, dt_s / count, load_w, array_w)
        self._state = self._describe(flow, load_w, array_w, dt_s / count)
        return self._state

    def gain(self, board_w: float, voltage_v: float | None = None) -> float:
        """Loop gain R P / V^2 against a constant-power board: how much the loop feeds its own error back.

        `voltage_v` defaults to the present bus voltage (open-circuit while collapsed). Zero on a regulated bus.
        """
        if self.config.regulated_bus_v is not None:
            return 0.0
        volts = voltage_v or self._state.bus_voltage_v or self.battery.ocv_v(self._soc)
        return self.config.resistance_ohm * board_w / (volts * volts)

    def reset(self, soc: float) -> None:
        """Put the battery at a state of charge and begin a new ledger."""
        if not 0 <= soc <= 1:
            raise UsageError(f"state of charge {soc!r} is impossible", hint="0..1")
        self._soc = soc
        self._sums = _Sums()
        self._origin_j = self.battery.energy_j(soc)
        self._state = self._describe(self._flow(0.0, 0.0, 0.0), 0.0, 0.0, 0.0)

    def _terminal_w(self, load_w: float) -> float:
        """What the load takes at the battery's terminals."""
        return load_w if self.config.regulated_bus_v is None else load_w / self.config.bus_efficiency

    def _flow(self, dt_s: float, load_w: float, array_w: float) -> _Flow:
        surplus_w = array_w * self.config.mppt_efficiency - self._terminal_w(load_w)
        if surplus_w < 0:
            flow = self._discharge(dt_s, -surplus_w)
            if not flow.collapsed:
                return flow
            # the load drops off; what the array still gives goes into the battery
            charge = self._charge(dt_s, array_w * self.config.mppt_efficiency)
            return _Flow(charge.current_a, charge.ocv_v, charge.terminal_v, collapsed=True)
        return self._charge(dt_s, surplus_w)

    def _discharge(self, dt_s: float, power_w: float) -> _Flow:
        resistance = self.config.resistance_ohm
        charge_c = self.battery.charge_c

        def wanted(ocv_v: float) -> float:
            root = ocv_v * ocv_v - 4.0 * resistance * power_w
            # 2 P / (OCV + root) is the textbook solution without its cancellation, and good for R = 0
            return 2.0 * power_w / (ocv_v + math.sqrt(root)) if root >= 0 else math.inf

        current = wanted(self.battery.ocv_v(self._soc))
        for _ in range(_SOLVER_STEPS):
            after = self._soc - current * dt_s / charge_c
            if not after >= 0.0:
                return _Flow(0.0, 0.0, 0.0, collapsed=True)
            better = wanted(self.battery.mean_ocv_v(self._soc, after))
            if math.isinf(better) or abs(better - current) <= _SOLVER_A * max(1.0, current):
                current = better
                break
            current = better
        if math.isinf(current) or self._soc - current * dt_s / charge_c < 0.0 or self._soc <= 0.0:
            return _Flow(0.0, 0.0, 0.0, collapsed=True)
        ocv = self.battery.mean_ocv_v(self._soc, self._soc - current * dt_s / charge_c)
        return _Flow(current, ocv, ocv - current * resistance)

    def _charge(self, dt_s: float, surplus_w: float) -> _Flow:
        config, resistance = self.config, self.config.resistance_ohm
        gained = config.charge_efficiency * dt_s / self.battery.charge_c  # state of charge per ampere
        end_v = config.charge_cell_v * config.cells_series

        def allowed(ocv_v: float) -> float:
            by_power = 2.0 * surplus_w / (ocv_v + math.sqrt(ocv_v * ocv_v + 4.0 * resistance * surplus_w))
            by_rate = config.charge_max_c * config.capacity_ah
            by_voltage = (end_v - ocv_v) / max(resistance, 1e-9)  # an ideal battery: charged until it is full
            by_room = (1.0 - self._soc) / gained if gained > 0 else math.inf
            return max(0.0, min(by_power, by_rate, by_voltage, by_room))

        def mean_v(current: float) -> float:
            return self.battery.mean_ocv_v(self._soc, min(self._soc + current * gained, 1.0))

        most = allowed(self.battery.ocv_v(self._soc))
        current = _falling_root(lambda amps: allowed(mean_v(amps)) - amps, most)
        ocv = mean_v(current)
        return _Flow(-current, ocv, ocv + current * resistance)

    def _move(self, flow: _Flow, dt_s: float, load_w: float, array_w: float) -> None:
        """Book one sub-step and move the charge."""
        config, sums = self.config, self._sums
        used_w, curtailed_w = self._array_split(flow, load_w, array_w)
        amps = flow.current_a
        resistance_w = config.resistance_ohm * amps * amps
        charge_w = -amps * flow.ocv_v * (1.0 - config.charge_efficiency) if amps < 0 else 0.0
        moved = amps if amps > 0 else amps * config.charge_efficiency
        self._soc = min(max(self._soc - moved * dt_s / self.battery.charge_c, 0.0), 1.0)
        sums.generated_j += array_w * dt_s
        sums.curtailed_j += curtailed_w * dt_s
        sums.mppt_loss_j += used_w * (1.0 - config.mppt_efficiency) * dt_s
        sums.resistance_loss_j += resistance_w * dt_s
        sums.charge_loss_j += charge_w * dt_s
        if flow.collapsed:
            sums.unserved_j += load_w * dt_s
        else:
            sums.delivered_j += load_w * dt_s
            sums.bus_loss_j += (self._terminal_w(load_w) - load_w) * dt_s

    def _array_split(self, flow: _Flow, load_w: float, array_w: float) -> tuple[float, float]:
        """(used, curtailed) at the array's terminals: what load and battery do not take stays in the cells."""
        load = 0.0 if flow.collapsed else self._terminal_w(load_w)
        if flow.current_a > 0:
            return array_w, 0.0
        taken = (load - flow.current_a * flow.terminal_v) / self.config.mppt_efficiency
        used = min(taken, array_w)
        return used, array_w - used

    def _describe(self, flow: _Flow, load_w: float, array_w: float, dt_s: float) -> EpsState:
        used_w, curtailed_w = self._array_split(flow, load_w, array_w)
        if flow.collapsed:
            bus_v = 0.0
        elif self.config.regulated_bus_v is not None:
            bus_v = self.config.regulated_bus_v
        else:
            bus_v = flow.terminal_v
        return EpsState(
            soc=self._soc,
            bus_voltage_v=bus_v,
            battery_current_a=flow.current_a,
            battery_power_w=flow.current_a * flow.terminal_v,
            array_available_w=array_w,
            array_used_w=used_w,
            curtailed_w=curtailed_w,
            load_w=load_w,
            collapsed=flow.collapsed,
        )


def _falling_root(function: Callable[[float], float], high: float) -> float:
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
        if abs(value) <= _SOLVER_A or high - low <= _SOLVER_A * max(1.0, high):
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
