"""Does the energy add up? Flying a timeline's power system ahead, the eclipse budget, the balance of one orbit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from hil.errors import UsageError
from hil.mission.battery import Battery
from hil.mission.environment import MissionEnvironment, PowerEnvironment
from hil.mission.eps import EpsConfig, EpsModel
from hil.mission.frames import Floats
from hil.mission.orbit import Caution, Ephemeris
from hil.mission.shadow import Eclipse, find_eclipses, sunlit_fraction
from hil.mission.shedding import ShedSwitch
from hil.mission.timeline import Timeline

_WH_J = 3_600.0
_SAMPLES = 1_201  # per eclipse or orbit: the integral is good to 1e-4 of it


class EclipseBudget(NamedTuple):
    """Watt-hours the battery must give in the mission's longest eclipse, and what it has for that.

    `idle_wh`, `full_wh` with the board idle and under full inference, platform included; `usable_wh` from full charge
    down to the shed voltage (without shedding: to collapse) under full load. All at the battery's terminals.
    """

    idle_wh: float
    full_wh: float
    usable_wh: float


@dataclass(frozen=True, slots=True)
class OrbitBalance:
    """One orbit that contains the longest eclipse: what the array can bring to the bus and what is needed, Wh.

    `needed_wh` contains the load, the battery's losses on what it must carry, and the bus converter's.
    """

    available_wh: float
    needed_wh: float
    eclipse_s: float
    message: str

    @property
    def margin_wh(self) -> float:
        return self.available_wh - self.needed_wh

    @property
    def closes(self) -> bool:
        return self.margin_wh >= 0


@dataclass(frozen=True, eq=False)
class Flight:
    """The power system flown over a timeline: columns of shape (n,), and the first instant below the shed voltage."""

    t_s: Floats
    soc: Floats
    bus_voltage_v: Floats
    battery_current_a: Floats
    shed_s: float | None
    model: EpsModel


def fly(
    timeline: Timeline,
    board_w: float | Callable[[float], float],
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    initial_soc: float | None = None,
) -> Flight:
    """Step the power system through the timeline with a board load, constant or a function of mission seconds.

    Nothing is shed: `shed_s` says when it would be. Array power is the mean over each row of the timeline.
    """
    power = _power(timeline.environment)
    model = EpsModel(power.eps if initial_soc is None else replace(power.eps, initial_soc=initial_soc))
    end_s = timeline.duration_s if end_s is None else end_s
    inner = timeline.t_s[(timeline.t_s > start_s) & (timeline.t_s < end_s)]
    t_s = np.concatenate([[start_s], inner, [end_s]])
    array_w = np.interp(t_s, timeline.t_s, timeline.array_w)
    rows = [(model.state.soc, model.state.bus_voltage_v, 0.0)]
    shed_s = None
    for index in range(1, len(t_s)):
        now_s = float(t_s[index - 1])
        load_w = board_w(now_s) if callable(board_w) else board_w
        state = model.step(float(t_s[index]) - now_s, load_w, 0.5 * float(array_w[index - 1] + array_w[index]))
        rows.append((state.soc, state.bus_voltage_v, state.battery_current_a))
        if shed_s is None and power.shed is not None and state.watched_v < power.shed.shed_v:
            shed_s = float(t_s[index])
    soc, volts, amps = np.array(rows).T
    return Flight(t_s, soc, volts, amps, shed_s, model)


def eclipse_budget(
    mission: Timeline | MissionEnvironment, *, idle_w: float | None = None, full_w: float | None = None
) -> EclipseBudget:
    """The battery against the longest eclipse. Board watts default to the environment's expectation.

    Raises UsageError when the mission has no power side. Without an eclipse the two needs are zero.
    """
    environment, ephemeris, eclipse = _longest_eclipse(mission)
    power = _power(environment)
    idle_w = power.board_idle_w if idle_w is None else idle_w
    full_w = power.board_full_w if full_w is None else full_w
    if eclipse is None:
        return EclipseBudget(0.0, 0.0, usable_wh(power, full_w))
    idle, full = (
        _battery_j(power, ephemeris, board_w, eclipse.penumbra_entry_s, eclipse.penumbra_exit_s) / _WH_J
        for board_w in (idle_w, full_w)
    )
    return EclipseBudget(idle, full, usable_wh(power, full_w))


@dataclass(frozen=True, slots=True)
class ShedForecast:
    """What load shedding does in the longest eclipse when the board runs at full load from its beginning.

    Seconds since that eclipse's first contact. `shed_s` None: never shed. `restored_s` None: not within an orbit.
    `platform_lost`: the battery could not even carry the platform until sunrise; raise the shed voltage.
    """

    shed_s: float | None
    lowest_soc: float
    platform_lost: bool
    restored_s: float | None


def shed_forecast(mission: Timeline | MissionEnvironment, *, full_w: float | None = None) -> ShedForecast | None:
    """Fly one orbit from the longest eclipse's beginning, fully charged, with the shed rule; None without an eclipse.

    Wall-clock dwell is not modelled: it depends on the clock's rate. Raises UsageError without power or shed section.
    """
    environment, ephemeris, eclipse = _longest_eclipse(mission)
    power = _power(environment)
    if power.shed is None:
        raise UsageError(f"mission {environment.name} has no shed section", hint="add shed_v and restore_v to power")
    if eclipse is None:
        return None
    full_w = power.board_full_w if full_w is None else full_w
    model = EpsModel(power.eps)
    model.reset(model.battery.soc_at(power.eps.charge_cell_v * power.eps.cells_series))
    start_s, step_s = eclipse.penumbra_entry_s, 1.0
    t_s = np.arange(start_s, start_s + environment.orbit.period_s, step_s)
    array_w = power.array.power_w(sunlit_fraction(ephemeris, t_s), ephemeris.sun_km(t_s)).tolist()
    switch, lowest, lost = ShedSwitch(power.shed), 1.0, False
    shed_s: float | None = None
    for index, available_w in enumerate(array_w):
        state = model.step(step_s, 0.0 if switch.open else full_w, available_w)
        now_s = (index + 1) * step_s
        lowest, lost = min(lowest, state.soc), lost or (switch.open and state.collapsed)
        switch.see(now_s, step_s, state)
        if switch.open and shed_s is None:
            shed_s = now_s
        elif shed_s is not None and not switch.open:
            return ShedForecast(shed_s, lowest, lost, now_s)
    return ShedForecast(shed_s, lowest, lost, None)


def usable_wh(power: PowerEnvironment, board_w: float) -> float:
    """Energy delivered at the battery's terminals from full charge down to the shed voltage at a constant load, Wh."""
    model = EpsModel(power.eps)
    battery = model.battery
    full_soc = battery.soc_at(power.eps.charge_cell_v * power.eps.cells_series)
    model.reset(full_soc)
    load_w = board_w + power.eps.platform_w
    if load_w <= 0:
        raise UsageError("the usable energy depends on the load, which is zero", hint="give board or platform watts")
    step_s = battery.energy_j(full_soc) / load_w / 4_000.0
    shed_v = power.shed.shed_v if power.shed is not None else 0.0
    delivered_j = 0.0
    while True:
        state = model.step(step_s, board_w, 0.0)
        if state.collapsed or state.watched_v < shed_v:
            return delivered_j / _WH_J
        delivered_j += state.battery_power_w * step_s


def orbit_balance(mission: Timeline | MissionEnvironment, *, board_w: float | None = None) -> OrbitBalance:
    """Whether the array feeds the load over one orbit; the message says by how many Wh per orbit it does not.

    `board_w` defaults to the idle board. Counts the tracker (or where direct transfer puts the array on its curve),
    converter, charge efficiency and the battery's resistance at the mean current; a charge limit that is too low shows
    in `fly`, not here. Without a battery only the sunlit load counts: the rest of the orbit the bus is off.
    """
    environment, ephemeris, eclipse = _longest_eclipse(mission)
    power = _power(environment)
    board_w = power.board_idle_w if board_w is None else board_w
    config = power.eps
    period_s = environment.orbit.period_s
    start_s = eclipse.penumbra_entry_s if eclipse is not None else 0.0
    eclipse_s = eclipse.duration_s if eclipse is not None else 0.0
    available_wh = _brought_j(power, ephemeris, start_s, start_s + period_s) / _WH_J
    load_w = _terminal_w(power, board_w)
    if config.capacity_ah == 0:
        needed_wh = load_w * (period_s - eclipse_s) / _WH_J
        dark = f"no battery: the bus is off for {eclipse_s / 60.0:.1f} min of eclipse"
    else:
        carried_j = _battery_j(power, ephemeris, board_w, start_s, start_s + period_s)
        volts = _middle_v(config)
        resistance = config.resistance_ohm + config.polarization_ohm
        drop = resistance * load_w / volts**2  # share lost in the resistance, each way
        storage_j = carried_j * ((1.0 + drop) * (1.0 + drop) / config.charge_efficiency - 1.0)
        needed_wh = (load_w * period_s + storage_j) / _WH_J
        dark = f"{eclipse_s / 60.0:.1f} min eclipse"
    margin = available_wh - needed_wh
    verdict = f"{margin:.2f} Wh to spare" if margin >= 0 else f"{-margin:.2f} Wh short"
    message = (
        f"per orbit with the board at {board_w:g} W the array brings {available_wh:.2f} Wh to the bus and "
        f"{needed_wh:.2f} Wh are needed: {verdict} ({dark})"
    )
    return OrbitBalance(available_wh, needed_wh, eclipse_s, message)


def balance_caution(mission: Timeline | MissionEnvironment) -> Caution | None:
    """`energy-balance`, with the watt-hours that an orbit lacks, when the array cannot feed even the idle board."""
    balance = orbit_balance(mission)
    if balance.closes:
        return None
    return Caution("energy-balance", f"the array cannot close the energy budget: {balance.message}")


def _longest_eclipse(mission: Timeline | MissionEnvironment) -> tuple[MissionEnvironment, Ephemeris, Eclipse | None]:
    environment = mission.environment if isinstance(mission, Timeline) else mission
    ephemeris = Ephemeris(environment.orbit, environment.start)
    if isinstance(mission, Timeline):
        eclipses = mission.eclipses
    else:
        eclipses = find_eclipses(ephemeris, 0.0, environment.duration_s)
    return environment, ephemeris, max(eclipses, key=lambda item: item.duration_s, default=None)


def _power(environment: MissionEnvironment) -> PowerEnvironment:
    if environment.power is None:
        raise UsageError(f"mission {environment.name} has no power section", hint="add array and battery to it")
    return environment.power


def _terminal_w(power: PowerEnvironment, board_w: float) -> float:
    load_w = board_w + power.eps.platform_w
    return power.eps.terminal_w(load_w)


def _battery_j(power: PowerEnvironment, ephemeris: Ephemeris, board_w: float, start_s: float, end_s: float) -> float:
    """Energy the battery must give between two instants: load minus array wherever that is positive."""
    t_s = np.linspace(start_s, end_s, _SAMPLES)
    array_w = _bus_share(power) * power.array.power_w(sunlit_fraction(ephemeris, t_s), ephemeris.sun_km(t_s))
    return float(np.trapezoid(np.maximum(_terminal_w(power, board_w) - array_w, 0.0), t_s))


def _brought_j(power: PowerEnvironment, ephemeris: Ephemeris, start_s: float, end_s: float) -> float:
    """Energy the array can bring to the battery's terminals between two instants."""
    t_s = np.linspace(start_s, end_s, 4 * _SAMPLES)
    array_w = power.array.power_w(sunlit_fraction(ephemeris, t_s), ephemeris.sun_km(t_s))
    return _bus_share(power) * float(np.trapezoid(array_w, t_s))


def _bus_share(power: PowerEnvironment) -> float:
    """What of the array's maximum reaches the bus."""
    curve = power.eps.direct
    if curve is None:
        return power.eps.mppt_efficiency
    volts = _middle_v(power.eps)
    return volts * curve.current_a(volts) / curve.max_power()[2]


def _middle_v(config: EpsConfig) -> float:
    """The voltage that the battery has on the whole between sunrise and sunset."""
    return Battery(config.capacity_ah, config.cells_series, config.ocv).mean_ocv_v(0.2, 1.0)
