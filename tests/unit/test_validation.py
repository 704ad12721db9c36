"""Twelve orbits of different kinds against Skyfield and DE421, and what holds for any orbit.

`tests/benchmarks/validate_mission.py` does the same over whole days and writes docs/validation.md.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbit_oracle import Case, cases, residuals

from hil.mission.elements import impossible, kozai_rev_day
from hil.mission.frames import Station
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.passes import find_passes
from hil.mission.radio import SPEED_OF_LIGHT_M_S, one_way_delay_s
from hil.mission.shadow import find_eclipses, sunlit_fraction

pytest.importorskip("skyfield_data", reason="the oracle ephemeris (skyfield-data) is not installed")
START = datetime(2026, 3, 20, tzinfo=UTC)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_engine_agrees_with_skyfield_and_de421(case: Case) -> None:
    """Pass edges 0.5 s, eclipse edges 1 s, range 200 m, elevation 0.02 deg, delay (with light time) 1 us."""
    found = residuals(case, hours=14.0, step_s=150.0)
    assert found.missed() == [], found
    assert found.pass_edges >= 2, found
    assert found.eclipse_edges >= 2 or "Molniya" in case.name, found


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mean_anomaly_deg": 0.06}, "pass_edge_s"),  # 0.9 s late
        ({"raan_deg": 0.1}, "elevation_deg"),
    ],
)
def test_the_oracle_notices_an_orbit_that_is_slightly_wrong(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, float], says: str
) -> None:
    case = next(case for case in cases() if case.name.startswith("polar"))
    name, by = next(iter(values.items()))
    wrong = replace(case.orbit, **{name: getattr(case.orbit, name) + by})
    monkeypatch.setattr("orbit_oracle.Ephemeris", lambda orbit, start: Ephemeris(wrong, start))
    assert any(says in line for line in residuals(case, hours=3.0, step_s=150.0).missed())


@st.composite
def orbits(draw: st.DrawFn) -> Orbit:
    """From circles of 300 km to ellipses that reach geostationary height, in any direction."""
    perigee = draw(st.floats(300, 3_000))
    eccentricity = draw(st.sampled_from([0.0, 1e-4, 0.01, 0.2, 0.7]))
    axis = (6_378.137 + perigee) / (1 - eccentricity)
    inclination = draw(st.floats(0, 180))
    assert impossible(kozai_rev_day(axis, inclination, eccentricity), eccentricity) is None
    angle = st.floats(0, 359.9)
    return Orbit.kepler(
        START,
        semi_major_axis_km=axis,
        inclination_deg=inclination,
        eccentricity=eccentricity,
        raan_deg=draw(angle),
        argument_of_perigee_deg=draw(angle),
        mean_anomaly_deg=draw(angle),
    )


@settings(max_examples=15, deadline=None)
@given(orbits())
def test_eclipse_edges_of_any_orbit_alternate(orbit: Orbit) -> None:
    e = Ephemeris(orbit, START)
    eclipses = find_eclipses(e, 0.0, 2.0 * orbit.period_s)
    edges = [
        t
        for item in eclipses
        for t in (item.penumbra_entry_s, item.umbra_entry_s, item.umbra_exit_s, item.penumbra_exit_s)
        if t is not None
    ]
    assert edges == sorted(edges)
    middles = np.array([0.5 * (item.penumbra_entry_s + item.penumbra_exit_s) for item in eclipses])
    gaps = np.array([0.5 * (a.penumbra_exit_s + b.penumbra_entry_s) for a, b in pairwise(eclipses)])
    if middles.size:
        assert (sunlit_fraction(e, middles) < 1).all()
    if gaps.size:
        assert (sunlit_fraction(e, gaps) == 1).all()


@settings(max_examples=15, deadline=None)
@given(orbits(), st.floats(-90, 90), st.floats(-180, 180), st.floats(0, 40))
def test_aos_comes_before_los_and_delay_is_continuous(
    orbit: Orbit, latitude: float, longitude: float, mask: float
) -> None:
    e = Ephemeris(orbit, START)
    station = Station("x", latitude, longitude, mask_deg=mask)
    passes = find_passes(e, station, 0.0, max(1.0 * orbit.period_s, 20_000.0))
    assert all(item.aos_s < item.los_s for item in passes)
    assert all(a.los_s < b.aos_s for a, b in pairwise(passes))
    for item in passes:
        t_s = np.linspace(item.aos_s, item.los_s, 400)
        ranges = e.look(station, t_s).range_m
        delay = np.array([one_way_delay_s(r) for r in ranges])
        _, velocity = e.teme_km(t_s)
        fastest = 1_000 * np.linalg.norm(velocity, axis=1).max() + 500.0  # and the Earth turns
        assert np.abs(np.diff(delay)).max() <= fastest / SPEED_OF_LIGHT_M_S * (t_s[1] - t_s[0])
        assert delay.min() > 300e3 / SPEED_OF_LIGHT_M_S * 0.9
