"""The electrical power system: energy conservation, the battery against a fine integration, collapse, charge limits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission.clock import MissionClock
from hil.mission.battery import NMC_OCV
from hil.mission.eps import ConverterLoss, EpsConfig, EpsModel, ShedConfig
from hil.mission.solar_array import ArrayConfig

DEMO = EpsConfig(capacity_ah=0.70, resistance_ohm=0.3, charge_max_c=2.0, platform_w=6.0)

configs = st.builds(
    EpsConfig,
    capacity_ah=st.floats(0.2, 50),
    cells_series=st.integers(1, 8),
    resistance_ohm=st.floats(0, 0.5),
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
        assert state.array_used_w + state.curtailed_w == pytest.approx(array_w, abs=1e-9)
        assert state.load_w == pytest.approx(board_w + config.platform_w)
        if not state.collapsed and state.array_used_w < array_w - 1e-6:
            assert state.battery_current_a <= 1e-9  # nothing is thrown away while the battery discharges
    ledger = model.ledger
    assert ledger.generated_j == pytest.approx(generated_j)
    assert ledger.stored_j == pytest.approx(model.battery.energy_j(model.state.soc) - start_j)
    assert abs(ledger.residual_j) <= 1e-6 * max(ledger.throughput_j, 1.0)
    assert min(ledger.mppt_loss_j, ledger.resistance_loss_j, ledger.charge_loss_j, ledger.curtailed_j) >= -1e-9


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


def test_impossible_arrays_and_shedding_are_refused() -> None:
    with pytest.raises(UsageError, match="degradation"):
        ArrayConfig(44.0, degradation=1.5)
    with pytest.raises(UsageError, match="restore_v"):
        ShedConfig(shed_v=13.2, restore_v=13.0)
    assert ArrayConfig(44.0, 0.85, 0.95).full_sun_w == pytest.approx(35.53)
