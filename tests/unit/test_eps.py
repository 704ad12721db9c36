"""The electrical power system: energy conservation, the battery against a fine integration, collapse, charge limits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission.battery import NMC_OCV
from hil.mission.clock import MissionClock
from hil.mission.eps import ConverterLoss, EpsConfig, EpsModel, ShedConfig
from hil.mission.solar_array import SasCurve

DEMO = EpsConfig(capacity_ah=0.70, resistance_ohm=0.3, charge_max_c=2.0, platform_w=6.0)

configs = st.builds(
    EpsConfig,
    capacity_ah=st.floats(0.2, 50),
    cells_series=st.integers(1, 8),
    resistance_ohm=st.floats(0, 0.5),
    polarization_ohm=st.one_of(st.just(0.0), st.floats(0.001, 0.5)),
    polarization_s=st.floats(0.1, 600),
    direct=st.one_of(st.none(), st.sampled_from([SasCurve(20, 2, 17, 1.8), SasCurve(40, 3, 35, 2.8)])),
    charge_max_c=st.floats(0.1, 5),
    charge_efficiency=st.floats(0.8, 1.0),
    charge_cell_v=st.floats(3.9, 4.25),
    mppt_efficiency=st.floats(0.8, 1.0),
    platform_w=st.floats(0, 20),
    initial_soc=st.floats(0, 1),
    regulated_bus_v=st.one_of(st.none(), st.floats(5, 30)),
    converter=st.builds(ConverterLoss, st.floats(0, 3), st.floats(0, 0.2), st.floats(0, 0.01)),
)
loads = st.lists(st.tuples(st.floats(0, 400), st.floats(0, 60), st.floats(0, 80)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(configs, loads)
def test_energy_is_conserved_and_states_stay_physical(
    config: EpsConfig, steps: list[tuple[float, float, float]]
) -> None:
    model = EpsModel(config)
    start_j = model.battery.energy_j(config.initial_soc)
    generated_j = 0.0
    for dt_s, board_w, array_w in steps:
        state = model.step(dt_s, board_w, array_w)
        generated_j += dt_s * array_w
        assert 0 <= state.soc <= 1
        assert math.isfinite(state.bus_voltage_v)
        assert 0 <= state.array_used_w <= state.array_available_w == array_w
        parts = (state.array_used_w, state.curtailed_w, state.mismatch_w)
        assert sum(parts) == pytest.approx(array_w, abs=1e-9)
        assert min(parts) >= -1e-9
        assert state.load_w == pytest.approx(board_w + config.platform_w)
        if not state.collapsed and state.curtailed_w > 1e-6:
            assert state.battery_current_a <= 1e-9  # nothing is thrown away while the battery discharges
        if config.direct is None:
            assert state.mismatch_w == 0.0
    ledger = model.ledger
    assert ledger.generated_j == pytest.approx(generated_j)
    full_j = model.battery.energy_j(1.0)
    stored_j = model.battery.energy_j(model.state.soc) - start_j
    assert ledger.stored_j >= stored_j - 1e-9 * full_j  # the rest is what the polarization holds
    if config.polarization_ohm == 0.0:
        assert ledger.stored_j == pytest.approx(stored_j, abs=1e-9 * full_j)
    # the charge's own rounding, 1e-16 of the capacity each step, is no loss
    assert abs(ledger.residual_j) <= 1e-9 * ledger.throughput_j + 1e-12 * full_j
    losses = (ledger.mppt_loss_j, ledger.mismatch_loss_j, ledger.resistance_loss_j, ledger.charge_loss_j)
    assert min(*losses, ledger.bus_loss_j, ledger.curtailed_j) >= -1e-9


def test_ledger_terms_by_hand() -> None:
    """One ohm-less hour at noon: every term has a value that can be worked out on paper."""
    config = EpsConfig(10.0, resistance_ohm=0.0, charge_efficiency=0.9, mppt_efficiency=0.8, initial_soc=0.5)
    model = EpsModel(config)
    model.step(3_600.0, 20.0, 50.0)
    ledger = model.ledger
    assert ledger.generated_j == pytest.approx(50 * 3600)
    assert ledger.mppt_loss_j == pytest.approx(10 * 3600)
    assert ledger.delivered_j == pytest.approx(20 * 3600)
    assert ledger.charge_loss_j == pytest.approx(2 * 3600)
    assert ledger.stored_j == pytest.approx(18 * 3600)
    assert ledger.curtailed_j == pytest.approx(0, abs=1e-6)


def test_discharge_agrees_with_a_fine_integration() -> None:
    """dSOC/dt = -I/C with I from the constant-power quadratic, by Runge-Kutta at 0.25 s with its own interpolation."""
    soc_table, volt_table = (np.array(column) for column in zip(*NMC_OCV, strict=True))
    power_w, charge_c = 21.0, 0.70 * 3_600

    def slope(soc: float) -> float:
        ocv = 4 * float(np.interp(soc, soc_table, volt_table))
        return -(ocv - math.sqrt(ocv**2 - 4 * 0.3 * power_w)) / (2 * 0.3) / charge_c

    soc, h = 1.0, 0.25
    for _ in range(int(1_200 / h)):
        k1 = slope(soc)
        k2 = slope(soc + h / 2 * k1)
        k3 = slope(soc + h / 2 * k2)
        soc += h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(soc + h * k3))
    model = EpsModel(DEMO)
    state = model.step(1_200.0, 15.0, 0.0)
    assert state.soc == pytest.approx(soc, abs=2e-6)
    ocv = 4 * float(np.interp(soc, soc_table, volt_table))
    current = (ocv - math.sqrt(ocv**2 - 4 * 0.3 * power_w)) / 0.6
    assert state.battery_current_a == pytest.approx(current, rel=1e-3)
    assert state.bus_voltage_v == pytest.approx(ocv - 0.3 * current, abs=5e-3)
    assert state.battery_power_w == pytest.approx(power_w, rel=1e-9)


def test_charge_is_constant_current_then_constant_voltage() -> None:
    model = EpsModel(replace(DEMO, initial_soc=0.1))
    rows = [model.step(5.0, 0.0, 60.0) for _ in range(900)]
    currents = np.array([-row.battery_current_a for row in rows])
    volts = np.array([row.bus_voltage_v for row in rows])
    assert currents.max() == pytest.approx(1.4)  # 2 C
    assert volts.max() <= 4 * 4.2 + 1e-6
    constant = currents > 1.4 - 1e-9
    assert constant[0]
    assert not constant[-1]
    change = int(np.nonzero(~constant)[0][0])
    assert constant[:change].all()
    assert not constant[change:].any()
    assert volts[change + 1 :] == pytest.approx(16.8, abs=1e-6)
    assert (np.diff(currents[change:]) <= 1e-12).all()
    assert rows[-1].soc == pytest.approx(1.0, abs=1e-3)
    assert rows[-1].curtailed_w > 50


def test_a_lower_end_voltage_leaves_the_battery_below_full() -> None:
    model = EpsModel(replace(DEMO, initial_soc=0.5, charge_cell_v=4.1))
    state = model.step(20_000.0, 0.0, 60.0)
    assert state.soc == pytest.approx(model.battery.soc_at(4 * 4.1), abs=1e-4)


def test_surplus_limits_the_charge() -> None:
    model = EpsModel(replace(DEMO, initial_soc=0.5))
    state = model.step(1.0, 5.0, 20.0)
    assert state.battery_power_w == pytest.approx(-(20.0 * 0.97 - 11.0))
    assert state.curtailed_w == pytest.approx(0.0, abs=1e-9)


def test_voltage_falls_monotonically_with_load() -> None:
    volts = [EpsModel(DEMO).step(1.0, board_w, 0.0).bus_voltage_v for board_w in np.linspace(0, 150, 40)]
    assert (np.diff(volts) < 0).all()


def test_beyond_the_fold_the_bus_collapses_as_an_event() -> None:
    config = EpsConfig(5.0, resistance_ohm=2.8)
    fold_w = 16.8**2 / 4 / 2.8  # 25.2 W
    assert not EpsModel(config).step(0.01, fold_w - 0.1, 0.0).collapsed
    model = EpsModel(config)
    state = model.step(1.0, fold_w + 0.1, 0.0)
    assert state.collapsed
    assert (state.bus_voltage_v, state.battery_current_a) == (0.0, 0.0)
    assert model.ledger.unserved_j == pytest.approx(fold_w + 0.1)
    assert model.ledger.delivered_j == 0.0
    assert not model.step(1.0, 5.0, 0.0).collapsed  # a load that fits is carried again


def test_an_empty_battery_collapses_and_recovers_in_sunlight() -> None:
    model = EpsModel(DEMO)
    state = model.step(3_600.0, 15.0, 0.0)
    assert state.collapsed
    assert state.soc == pytest.approx(0.0, abs=0.01)
    state = model.step(600.0, 0.0, 35.5)
    assert not state.collapsed
    assert state.soc > 0.25
    assert abs(model.ledger.residual_j) < 1e-6 * model.ledger.throughput_j


def test_the_array_charges_a_collapsed_bus() -> None:
    model = EpsModel(replace(DEMO, initial_soc=0.0))
    state = model.step(60.0, 100.0, 20.0)
    assert state.array_used_w > 0
    assert state.soc > 0


def test_regulated_bus_holds_its_voltage_and_pays_for_it() -> None:
    model = EpsModel(replace(DEMO, regulated_bus_v=12.0, converter=ConverterLoss(k1=1 / 9)))
    state = model.step(100.0, 12.0, 0.0)
    assert state.bus_voltage_v == 12.0
    assert state.battery_power_w == pytest.approx(20.0)
    assert model.ledger.bus_loss_j == pytest.approx(200.0)
    assert model.gain(12.0) == 0.0


@pytest.mark.parametrize(
    ("resistance", "expected"), [(0.05, 0.004), (0.2, 0.018), (1.0, 0.109), (2.0, 0.299), (2.8, 0.836)]
)
def test_gain_matches_the_reference_table(resistance: float, expected: float) -> None:
    """4S at 16.8 V open-circuit, 25 W (reference/power.md, 4.3)."""
    model = EpsModel(EpsConfig(50.0, resistance_ohm=resistance))
    model.step(0.001, 25.0, 0.0)
    assert model.gain(25.0) == pytest.approx(expected, abs=6e-4)
    assert model.gain(15.0, voltage_v=13.2) == pytest.approx(resistance * 15 / 13.2**2)


def test_gain_is_the_slope_of_the_loop() -> None:
    """R P / V^2 is what one turn of measure-and-program does to a disturbance of the current."""
    model = EpsModel(DEMO)
    volts = model.step(0.01, 15.0, 0.0).bus_voltage_v
    amps = 21.0 / volts
    ocv = volts + 0.3 * amps
    nudged = 21.0 / (ocv - 0.3 * (amps + 1e-6))
    assert (nudged - amps) / 1e-6 == pytest.approx(model.gain(21.0), rel=1e-3)


def test_halving_the_step_changes_little() -> None:
    results = []
    for substep in (8.0, 4.0, 2.0):
        model = EpsModel(replace(DEMO, max_substep_s=substep, initial_soc=0.6))
        for board_w, array_w in ((15.0, 0.0), (5.0, 35.5), (15.0, 10.0)):
            model.step(800.0, board_w, array_w)
        results.append(model.state.soc)
    assert abs(results[0] - results[2]) < 1e-4
    assert abs(results[1] - results[2]) < 5e-5


@settings(max_examples=15, deadline=None)
@given(configs, st.floats(1, 15), st.floats(0, 30))
def test_halving_the_step_changes_the_charge_in_proportion(config: EpsConfig, board_w: float, array_w: float) -> None:
    """For every kind of battery, bus and array: O(dt).

    Left out: a collapse, and a battery without resistance, whose charge ends at once: both are switches, not slopes.
    """
    config = replace(
        config, initial_soc=0.7, capacity_ah=config.capacity_ah + 3, resistance_ohm=0.02 + config.resistance_ohm
    )
    ends = []
    for substep_s in (4.0, 2.0, 1.0):
        model = EpsModel(replace(config, max_substep_s=substep_s))
        if model.step(600.0, board_w, array_w).collapsed:
            return
        ends.append(model.state.soc)
    assert abs(ends[1] - ends[2]) <= 0.75 * abs(ends[0] - ends[1]) + 2e-6


def orbit_array_w(mission_s: float) -> float:
    """Two orbits that begin with 34 minutes of eclipse, penumbra ramps of ten seconds."""
    phase = mission_s % 5_724.0
    return 35.53 * max(0.0, min(1.0, (phase - 2_060.0) / 10.0, (5_724.0 - phase) / 10.0))


ARRAY_EDGES_S = [orbit * 5_724.0 + edge for orbit in (0, 1) for edge in (2_060.0, 2_070.0, 5_714.0, 5_724.0)]


@pytest.mark.parametrize("rate", [10.0, 60.0])
def test_time_compression_keeps_the_charge_trajectory(rate: float) -> None:
    """A loop of 0.1 wall seconds at k, and one at k = 1: the same charge over mission time. Both stop at edges."""
    stops = sorted({float(t) for t in range(600, 11_400, 600)} | {t for t in ARRAY_EDGES_S if t < 11_400})

    def trajectory(k: float, tick_s: float) -> list[float]:
        clock, model, wall, seen = MissionClock(0.0, 50.0, k), EpsModel(DEMO), 50.0, []
        for mark in stops:
            while (now := clock.mission_s(wall)) < mark - 1e-9:
                wall = min(wall + tick_s, clock.wall_s(mark))
                until = clock.mission_s(wall)
                model.step(until - now, 9.0, 0.5 * (orbit_array_w(now) + orbit_array_w(until)))
            seen.append(model.state.soc)
        return seen

    assert trajectory(rate, 0.1) == pytest.approx(trajectory(1.0, 1.0), abs=3e-5)


def test_time_compression_with_equal_mission_steps_is_exact() -> None:
    """A loop that ticks k times faster at the clock's rate k sees the very same battery."""

    def lowest(k: float) -> tuple[float, float]:
        clock, model, seen, ticks = MissionClock(0.0, 50.0, k), EpsModel(DEMO), 1.0, 1_908
        for tick in range(ticks):
            now, until = (clock.mission_s(50.0 + n * 6.0 / k) for n in (tick, tick + 1))
            seen = min(seen, model.step(until - now, 9.0, orbit_array_w(0.5 * (now + until))).soc)
        return seen, model.state.soc

    slow = lowest(1.0)
    assert 0.05 < slow[0] < 0.9
    for rate in (10.0, 60.0):
        assert lowest(rate) == pytest.approx(slow, abs=1e-9)


def test_battery_energy_and_inverse() -> None:
    battery = EpsModel(DEMO).battery
    grid = np.linspace(0, 1, 2_001)
    volts = [battery.ocv_v(soc) for soc in grid]
    assert battery.energy_j(1.0) == pytest.approx(float(np.trapezoid(volts, grid)) * 0.70 * 3_600, rel=1e-6)
    assert [battery.soc_at(v) for v in volts] == pytest.approx(list(grid), abs=1e-9)
    assert (battery.soc_at(1.0), battery.soc_at(99.0)) == (0.0, 1.0)


def test_reset_begins_a_new_ledger() -> None:
    model = EpsModel(DEMO)
    model.step(100.0, 15.0, 0.0)
    model.reset(0.5)
    assert model.state.soc == 0.5
    assert model.ledger.throughput_j == 0.0
    with pytest.raises(UsageError):
        model.reset(1.5)


@pytest.mark.parametrize("arguments", [(-1.0, 5.0, 5.0), (1.0, -5.0, 5.0), (1.0, 5.0, float("nan"))])
def test_impossible_steps_are_refused(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError, match="power system step"):
        EpsModel(DEMO).step(*arguments)


@pytest.mark.parametrize(
    "values",
    [
        {"capacity_ah": -1.0},
        {"capacity_ah": float("nan")},
        {"resistance_ohm": -0.1},
        {"initial_soc": 1.2},
        {"ocv": ((0.0, 3.0), (0.5, 2.9), (1.0, 4.2))},
        {"ocv": ((0.1, 3.0), (1.0, 4.2))},
        {"charge_cell_v": 2.0},
        {"regulated_bus_v": 0.0},
    ],
)
def test_impossible_batteries_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        EpsConfig(**{"capacity_ah": 1.0, **values})  # type: ignore[arg-type]
    assert caught.value.hint


def test_impossible_shedding_is_refused() -> None:
    with pytest.raises(UsageError, match="restore_v"):
        ShedConfig(shed_v=13.2, restore_v=13.0)


# -- direct transfer


CURVE = SasCurve(20.0, 2.0, 17.0, 1.8)


def test_direct_transfer_works_where_the_bus_is_on_the_curve() -> None:
    """Below the knee the array gives its short-circuit current, not its power; worked out from the terminal voltage."""
    model = EpsModel(EpsConfig(10.0, direct=CURVE, initial_soc=0.5, charge_max_c=2.0))
    watts = CURVE.max_power()[2]
    state = model.step(1.0, 12.0, watts)
    volts = state.bus_voltage_v
    array_a = CURVE.current_a(volts)
    assert 14.0 < volts < 15.5
    assert state.array_used_w == pytest.approx(volts * array_a, rel=1e-4)
    assert state.mismatch_w == pytest.approx(watts - volts * array_a, rel=2e-3)
    assert -state.battery_current_a == pytest.approx(array_a - 12.0 / volts, rel=1e-3)
    assert state.curtailed_w == 0.0
    half = model.step(1.0, 12.0, 0.5 * watts)
    assert half.array_used_w == pytest.approx(half.bus_voltage_v * 0.5 * CURVE.current_a(half.bus_voltage_v), rel=1e-4)


def test_direct_transfer_burns_the_excess_in_its_shunt() -> None:
    model = EpsModel(EpsConfig(1.0, direct=CURVE, initial_soc=0.99))
    for _ in range(2_000):
        state = model.step(5.0, 5.0, CURVE.max_power()[2])
    assert state.soc == pytest.approx(1.0, abs=1e-3)
    assert state.bus_voltage_v == pytest.approx(16.8, abs=1e-6)
    array_w = 16.8 * CURVE.current_a(16.8)
    assert state.curtailed_w == pytest.approx(array_w - state.array_used_w, rel=1e-3)
    assert state.array_used_w == pytest.approx(5.0, abs=0.1)
    assert model.ledger.mppt_loss_j == 0.0


@pytest.mark.parametrize("cells", [3, 4, 5])
@pytest.mark.parametrize("soc", [0.2, 0.5, 0.8])
def test_the_gain_bounds_the_loop_where_an_array_feeds_the_battery_directly(cells: int, soc: float) -> None:
    """Left of its maximum (17 V), at its knee and right of it the array only stiffens the bus. By differences."""
    config = EpsConfig(10.0, cells_series=cells, resistance_ohm=0.3, direct=CURVE, initial_soc=soc, charge_max_c=2.0)
    model, points = EpsModel(config), []
    for board_w in (25.0, 25.001):
        volts = model.step(0.0, board_w, CURVE.max_power()[2]).bus_voltage_v
        points.append((volts, board_w / volts))
    (before_v, before_a), (after_v, after_a) = points
    slope_ohm = (before_v - after_v) / (after_a - before_a)
    assert 0 < slope_ohm <= 0.3 * (1 + 1e-4)
    assert slope_ohm * 25.0 / after_v**2 <= model.gain(25.0) * (1 + 1e-4)
    step_v = 1e-3
    amps_per_v = (CURVE.current_a(after_v) - CURVE.current_a(after_v + step_v)) / step_v
    assert slope_ohm == pytest.approx(0.3 / (1 + 0.3 * amps_per_v), rel=0.01)


def test_direct_transfer_above_open_circuit_gives_nothing() -> None:
    model = EpsModel(EpsConfig(1.0, cells_series=8, direct=CURVE, initial_soc=0.5))
    state = model.step(1.0, 5.0, 30.0)
    assert state.array_used_w == 0.0
    assert state.mismatch_w == pytest.approx(30.0)
    assert state.battery_power_w == pytest.approx(5.0)


def test_direct_transfer_carries_what_the_battery_alone_cannot() -> None:
    """A nearly empty battery behind 2.8 ohm collapses under 20 W at night; with the array on the bus it does not."""
    config = EpsConfig(5.0, resistance_ohm=2.8, direct=CURVE, initial_soc=0.5)
    assert EpsModel(config).step(1.0, 20.0, 0.0).collapsed
    state = EpsModel(config).step(1.0, 20.0, CURVE.max_power()[2])
    assert not state.collapsed
    assert state.array_used_w + state.battery_power_w == pytest.approx(20.0)
    over = EpsModel(config).step(1.0, 60.0, CURVE.max_power()[2])
    assert over.collapsed
    assert over.battery_current_a < 0  # the load is gone, the array charges


# -- polarization


def test_polarization_follows_its_exact_solution() -> None:
    """A step of nearly constant current: V1 = R1 I (1 - e^(-t/tau)), whatever the step, and it decays after."""
    for substep_s in (1.0, 60.0):
        config = EpsConfig(5_000.0, resistance_ohm=0.1, polarization_ohm=0.2, polarization_s=30.0, initial_soc=0.6)
        model = EpsModel(replace(config, max_substep_s=substep_s))
        state = model.step(60.0, 15.0, 0.0)
        ocv = model.battery.ocv_v(state.soc)
        amps = state.battery_current_a
        mean_s = substep_s  # the state tells the mean of its last sub-step
        start = 0.2 * amps * (1 - math.exp(-(60.0 - mean_s) / 30.0))
        share = (1 - math.exp(-mean_s / 30.0)) * 30.0 / mean_s
        mean_v1 = 0.2 * amps * (1 - share) + start * share
        assert ocv - state.bus_voltage_v - 0.1 * amps == pytest.approx(mean_v1, rel=5e-3)
    rest = model.step(300.0, 0.0, 0.0)
    assert rest.bus_voltage_v == pytest.approx(model.battery.ocv_v(rest.soc), abs=1e-3)
    assert abs(model.ledger.residual_j) < 1e-9 * model.ledger.throughput_j + 1e-12 * model.battery.energy_j(1.0)


def test_the_gain_counts_the_polarization() -> None:
    config = EpsConfig(50.0, resistance_ohm=0.1, polarization_ohm=0.3)
    assert EpsModel(config).gain(20.0, voltage_v=14.0) == pytest.approx(0.4 * 20 / 14**2)


@pytest.mark.parametrize("charging", [False, True])
def test_battery_agrees_with_an_independent_integration(charging: bool) -> None:
    """The same circuit written as a differential equation for scipy: constant power out, or a tracker's power in."""
    integrate = pytest.importorskip("scipy.integrate")
    soc_table, volt_table = (np.array(column) for column in zip(*NMC_OCV, strict=True))
    ohm, ohm_1, tau_s, charge_c = 0.1, 0.15, 40.0, 0.7 * 3_600
    watts = -12.0 if charging else 21.0

    def amps(soc: float, v1: float) -> float:
        emf = 4 * float(np.interp(soc, soc_table, volt_table)) - v1
        by_power = (emf - math.sqrt(emf**2 - 4 * ohm * watts)) / (2 * ohm)
        return max(by_power, (emf - 16.8) / ohm, -0.7) if charging else by_power

    def slope(_: float, state: list[float]) -> list[float]:
        current = amps(*state)
        return [-current * (0.98 if charging else 1.0) / charge_c, (ohm_1 * current - state[1]) / tau_s]

    start = 0.35 if charging else 1.0
    span_s = 3_000.0 if charging else 1_000.0
    truth = integrate.solve_ivp(slope, (0.0, span_s), [start, 0.0], rtol=1e-9, atol=1e-12, max_step=2.0).y[:, -1]
    model = EpsModel(
        EpsConfig(
            0.7,
            resistance_ohm=ohm,
            polarization_ohm=ohm_1,
            polarization_s=tau_s,
            charge_efficiency=0.98,
            mppt_efficiency=1.0,
            initial_soc=start,
            max_substep_s=0.5,
        )
    )
    state = model.step(span_s, 0.0, -watts) if charging else model.step(span_s, watts, 0.0)
    assert state.soc == pytest.approx(truth[0], abs=2e-5)
    assert state.battery_current_a == pytest.approx(amps(*truth), rel=2e-3)


# -- no battery


def test_without_a_battery_the_bus_lives_by_the_array() -> None:
    model = EpsModel(EpsConfig(0.0, regulated_bus_v=12.0, platform_w=2.0, converter=ConverterLoss(0.5, 0.1)))
    assert model.state.bus_voltage_v == 12.0
    need_w = 12.0 + 0.5 + 1.2
    assert model.step(1.0, 10.0, need_w / 0.97 + 0.01).bus_voltage_v == 12.0
    state = model.step(1.0, 10.0, need_w / 0.97 - 0.01)
    assert state.collapsed
    assert (state.soc, state.bus_voltage_v, state.array_used_w) == (0.0, 0.0, 0.0)
    assert model.ledger.unserved_j == pytest.approx(12.0)
    assert abs(model.ledger.residual_j) < 1e-9 * model.ledger.throughput_j
    for broken in ({}, {"regulated_bus_v": 12.0, "direct": CURVE}):
        with pytest.raises(UsageError, match="without a battery"):
            EpsConfig(0.0, **broken)  # type: ignore[arg-type]


def test_without_a_battery_a_cut_load_waits_for_the_light_that_it_lacked() -> None:
    """What sheds it and brings it back sees one eclipse as one collapse, twilight included."""
    model = EpsModel(EpsConfig(0.0, regulated_bus_v=12.0, mppt_efficiency=1.0))
    found, cut = [], False
    for array_w in (20, 16, 14, 6, 0, 0, 6, 14, 15, 20):
        state = model.step(1.0, 0.0 if cut else 15.0, array_w)
        cut = state.collapsed
        found.append(state.bus_voltage_v)
    assert found == [12, 12, 0, 0, 0, 0, 0, 0, 12, 12]
    # a load that no light carries is tried at full sun, not waited for
    assert model.step(1.0, 25.0, 20.0).collapsed
    assert model.step(1.0, 0.0, 19.0).collapsed
    assert not model.step(1.0, 0.0, 20.0).collapsed
    # and in the dark there is no bus, whatever is asked for
    model.reset(0.0)
    assert model.step(1.0, 0.0, 0.0).bus_voltage_v == 0


def test_a_converter_costs_what_its_terms_say() -> None:
    assert ConverterLoss(0.5, 0.02, 0.001).input_w(20.0) == pytest.approx(20 + 0.5 + 0.4 + 0.4)
    with pytest.raises(UsageError, match="k1"):
        ConverterLoss(k1=-0.1)


def test_a_configuration_survives_json() -> None:
    for config in (DEMO, replace(DEMO, direct=CURVE, regulated_bus_v=5.0, converter=ConverterLoss(1.0))):
        assert EpsConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
