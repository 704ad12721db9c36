"""The solar array: its watts, its I-V curve against published values and an independent diode model, simulator rows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission.solar_array import ArrayConfig, ArrayCurrent, SasCurve, sas_rows

BIG = SasCurve(100.0, 5.0, 90.0, 4.5)
SMALL = SasCurve(20.0, 2.0, 17.0, 1.8)
CELL = SasCurve(2.72, 0.52, 2.41, 0.504)

shapes = st.builds(
    lambda voc, isc, v, i: SasCurve(voc, isc, v * voc, i * isc),
    st.floats(1, 200),
    st.floats(0.05, 20),
    st.floats(0.6, 0.95),
    st.floats(0.7, 0.98),
)


@pytest.mark.parametrize(
    ("curve", "series_ohm", "exponent", "above"),
    [(BIG, 2.222222, 39.645058, 0.00445), (SMALL, 1.66667, 31.99393, 0.00002), (CELL, 0.61508, 127.6819, 0.00196)],
)
def test_the_model_has_its_published_parameters(
    curve: SasCurve, series_ohm: float, exponent: float, above: float
) -> None:
    """reference/power.md, section 3: Rs, N and how far the true maximum lies above Vmp x Imp."""
    assert curve.series_ohm == pytest.approx(series_ohm, abs=5e-6)
    assert curve.exponent == pytest.approx(exponent, rel=1e-6)
    assert curve.max_power()[2] / (curve.vmp_v * curve.imp_a) - 1 == pytest.approx(above, abs=6e-6)


def test_the_true_maximum_of_the_big_curve() -> None:
    volts, amps, watts = BIG.max_power()
    assert watts == pytest.approx(406.8016, abs=5e-5)
    grid = np.linspace(0.0, 5.0, 4_001)
    assert (grid * np.array([BIG.voltage_v(i) for i in grid])).max() == pytest.approx(watts, rel=1e-6)
    assert volts * amps == watts


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_the_curve_goes_through_its_points_and_falls(curve: SasCurve) -> None:
    assert curve.voltage_v(0.0) == pytest.approx(curve.voc_v, rel=1e-9)
    assert curve.voltage_v(curve.imp_a) == pytest.approx(curve.vmp_v, rel=1e-9)
    assert curve.voltage_v(curve.isc_a) == pytest.approx(0.0, abs=1e-9 * curve.voc_v)
    amps = np.linspace(0.0, curve.isc_a, 300)
    volts = np.array([curve.voltage_v(i) for i in amps])
    assert (np.diff(volts) < 0).all()
    assert curve.currents_a(volts) == pytest.approx(amps, abs=1e-6 * curve.isc_a)
    watts = curve.max_power()[2]
    assert watts >= (volts * amps).max() * (1 - 1e-12)
    assert watts == pytest.approx((volts * amps).max(), rel=2e-3)
    fast = ArrayCurrent(curve)
    grid = np.linspace(0.0, 1.1 * curve.voc_v, 333)
    close = np.array([fast.at(v, 0.5 * watts) for v in grid])
    truth = 0.5 * curve.currents_a(grid)
    assert (close <= truth + 1e-9 * curve.isc_a).all()
    assert close == pytest.approx(truth, abs=2e-3 * curve.isc_a)
    assert (grid * close).max() <= 0.5 * watts * (1 + 1e-12)


@pytest.mark.parametrize("values", [(100, 5, 101, 4), (100, 5, 90, 5.5), (100, 5, -1, 4), (0, 0, 0, 0), (10, 5, 1, 1)])
def test_impossible_curves_are_refused(values: tuple[float, float, float, float]) -> None:
    with pytest.raises(UsageError) as caught:
        SasCurve(*values)
    assert caught.value.hint
    with pytest.raises(UsageError, match="cannot source"):
        BIG.voltage_v(5.1)


def test_watts_from_cells_pointing_age_and_temperature() -> None:
    """0.1 m2 of 30 % cells get 1361 W/m2 at 1 AU, not the 1367 W/m2 of their rating."""
    array = ArrayConfig.of_cells(0.1, 0.3)
    assert array.bol_w == pytest.approx(40.83)
    assert array.full_sun_w == pytest.approx(40.83)
    old = replace(array, degradation=0.85, pointing=0.95, temperature_c=78.0)
    assert old.full_sun_w == pytest.approx(40.83 * 0.85 * 0.95 * (1 - 0.0025 * 50))
    assert ArrayConfig.of_curve(BIG).bol_w == pytest.approx(406.8016, abs=5e-5)
    for bad in ({"bol_w": -1.0}, {"degradation": 1.5}, {"temperature_c": math.nan}, {"power_coefficient_per_k": 0.01}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            replace(array, **bad)


def test_a_configuration_survives_json() -> None:
    for array in (ArrayConfig(44.0, 0.85), ArrayConfig.of_curve(SMALL, temperature_c=60.0)):
        assert ArrayConfig.from_dict(json.loads(json.dumps(asdict(array)))) == array


def test_the_operating_curve_has_the_arrays_power() -> None:
    array = ArrayConfig.of_curve(SMALL, degradation=0.9, pointing=0.95, temperature_c=78.0)
    curve = array.operating_curve
    assert curve is not None
    assert curve.max_power()[2] == pytest.approx(array.full_sun_w, rel=1e-12)
    assert curve.voc_v / SMALL.voc_v == pytest.approx((1 - 0.0025 * 50) / (1 + 0.0005 * 50))
    assert curve.isc_a / SMALL.isc_a == pytest.approx(0.9 * 0.95 * (1 + 0.0005 * 50))
    assert ArrayConfig(44.0).operating_curve is None


def test_rows_for_a_simulator_carry_the_timelines_power() -> None:
    array = ArrayConfig.of_curve(SMALL, degradation=0.85, temperature_c=60.0)
    watts = array.full_sun_w * np.array([1.0, 0.25, 1e-4, 0.0])
    rows = sas_rows(array, watts)
    assert rows.shape == (4, 4)
    for row, expected in zip(rows[:3], watts[:3], strict=True):
        assert SasCurve(*row).max_power()[2] == pytest.approx(expected, rel=1e-9)
    assert rows[3].tolist() == [rows[0, 0], 0.0, rows[0, 2], 0.0]
    with pytest.raises(UsageError, match="no I-V curve"):
        sas_rows(ArrayConfig(44.0), watts)


def test_temperature_agrees_with_pvlib() -> None:
    pvlib = pytest.importorskip("pvlib")
    for cell_c in (-60.0, 28.0, 78.0):
        ours = ArrayConfig(44.0, temperature_c=cell_c).full_sun_w * 0.4
        theirs = pvlib.pvsystem.pvwatts_dc(0.4 * 1000.0, cell_c, 44.0, -0.0025, temp_ref=28.0)  # its full sun is 1000
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("knee_v", [0.075, 0.11])
def test_the_curve_against_a_triple_junction_cells_single_diode_curve(knee_v: float) -> None:
    """pvlib solves the diode equation for a cell; the four-point model goes through its points.

    The maximum agrees to 0.2 %, all below the maximum-power voltage to 1.5 % of it. Above that the model is lower: it
    falls nearly straight to Voc where the cell stays high and drops late.
    """
    pvlib = pytest.importorskip("pvlib")
    photo_a = 0.52
    dark_a = photo_a * math.exp(-2.72 / knee_v)
    cell = pvlib.pvsystem.singlediode(photo_a, dark_a, 0.05, 300.0, knee_v)
    curve = SasCurve(*(float(cell[name]) for name in ("v_oc", "i_sc", "v_mp", "i_mp")))
    assert curve.max_power()[2] == pytest.approx(float(cell["p_mp"]), rel=2e-3)
    volts = np.linspace(0.0, curve.voc_v, 80)
    theirs = pvlib.pvsystem.i_from_v(volts, photo_a, dark_a, 0.05, 300.0, knee_v)
    ours, below = curve.currents_a(volts), volts <= curve.vmp_v
    assert volts[below] * ours[below] == pytest.approx(volts[below] * theirs[below], abs=0.015 * float(cell["p_mp"]))
    assert (ours[~below] < theirs[~below] + 0.01 * photo_a).all()
