"""Walker shells, rings and formations; which satellites are linked and when the Earth or the distance forbids it."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission.constellation import EARTH_KM, Constellation, Fleet, lattice_formation, mean_axis_km, ring_figures
from hil.mission.isl import IslConfig, IslOutage, check_outages, geometry, margin_km, pairs
from hil.mission.orbit import Ephemeris, Orbit

FIXTURES = Path(__file__).parents[2] / "fixtures"
RING_TLE = (FIXTURES / "tle" / "ref_qwen3_535_ltdn1030.tle").read_text()
CLUSTER = FIXTURES / "omm" / "suncatcher-cluster-81.json"
START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = np.arange(0.0, 86_400.0, 300.0)


def orbit_535() -> Orbit:
    return Orbit.from_tle(RING_TLE)


def distances_km(fleet: Fleet, t_s: np.ndarray) -> np.ndarray:
    position, _ = fleet.teme_km(t_s)
    return np.linalg.norm(position[:, np.newaxis] - position[np.newaxis], axis=-1)


def test_ring_figures_of_twelve_at_535_km() -> None:
    figures = ring_figures(EARTH_KM + 535.0, 12)
    assert round(figures.neighbour_km) == 3579
    assert round(1e3 * figures.one_way_s, 2) == 11.94
    assert round(figures.grazing_km) == 299


def test_22_satellites_at_550_km_and_the_longest_link() -> None:
    figures = ring_figures(EARTH_KM + 550.0, 22)
    assert figures.neighbour_km == pytest.approx(1972, abs=0.5)
    assert 1e3 * figures.one_way_s == pytest.approx(6.58, abs=0.005)
    # two satellites as far apart as a line 80 km above the ground allows
    half = math.acos((EARTH_KM + 80.0) / (EARTH_KM + 550.0))
    ends = (EARTH_KM + 550.0) * np.array(
        [[math.cos(half), math.sin(half), 0.0], [math.cos(half), -math.sin(half), 0.0]]
    )
    range_km, grazing_km = geometry(ends[0], ends[1])
    assert float(range_km) == pytest.approx(5017, abs=1)
    assert float(grazing_km) == pytest.approx(80.0, abs=1e-6)


def test_propagated_ring_keeps_its_figures() -> None:
    ring = Constellation.ring(orbit_535(), 12)
    position, _ = Fleet(ring, START).teme_km(DAY)
    range_km, grazing_km = geometry(position, np.roll(position, -1, axis=0))
    assert range_km.mean() == pytest.approx(3579, abs=5)
    assert np.ptp(range_km) < 15  # the Earth's flattening breathes through the ring
    assert grazing_km.min() > 275
    assert mean_axis_km(ring.orbits[0]) == pytest.approx(EARTH_KM + 535.0, abs=0.05)


def test_the_first_satellite_is_the_mission_orbit_and_sgp4_is_the_packages() -> None:
    ring = Constellation.ring(orbit_535(), 4)
    position, velocity = Fleet(ring, START).teme_km(DAY)
    expected, expected_v = Ephemeris(orbit_535(), START).teme_km(DAY)
    np.testing.assert_allclose(position[0], expected, atol=1e-6)
    np.testing.assert_allclose(velocity[0], expected_v, atol=1e-9)
    for index, orbit in enumerate(ring.orbits):
        np.testing.assert_allclose(position[index], Ephemeris(orbit, START).teme_km(DAY)[0], atol=1e-9)


def test_walker_delta_phases_and_planes() -> None:
    shell = Constellation.walker(orbit_535(), 4, 5, phasing=3)
    assert len(shell) == 20
    first = shell.orbits[0]
    plane2slot3 = shell.orbits[2 * 5 + 3]
    assert (plane2slot3.raan_deg - first.raan_deg) % 360 == pytest.approx(180.0)
    # F x 360 / T a plane, 360 / S a slot
    assert (plane2slot3.mean_anomaly_deg - first.mean_anomaly_deg) % 360 == pytest.approx(3 * 72.0 + 2 * 3 * 18.0 - 0.0)
    assert {orbit.inclination_deg for orbit in shell.orbits} == {first.inclination_deg}
    star = Constellation.walker(orbit_535(), 4, 5, raan_spread_deg=180.0)
    assert (star.orbits[5].raan_deg - star.orbits[0].raan_deg) % 360 == pytest.approx(45.0)
    assert shell.closed
    assert not star.closed


@pytest.mark.parametrize(("phasing", "planes"), [(4, 4), (5, 4), (-1, 4)])
def test_phasing_must_be_below_the_planes(phasing: int, planes: int) -> None:
    with pytest.raises(UsageError, match=rf"F = {phasing} with P = 4"):
        Constellation.walker(orbit_535(), planes, 5, phasing=phasing)


def test_two_satellites_in_one_place_are_named() -> None:
    ring = Constellation.ring(orbit_535(), 3)
    with pytest.raises(UsageError, match=r"satellites 1 \(p0s1\) and 3 \(p0s1\) are at the same place"):
        Fleet(Constellation.listed([*ring.orbits, ring.orbits[1]]), START)


@pytest.mark.parametrize(("satellites", "short_km", "enough"), [(6, 471, 9), (8, 71, 9)])
def test_a_ring_that_grazes_the_earth_says_by_how_much(satellites: int, short_km: int, enough: int) -> None:
    with pytest.raises(UsageError, match=rf"passes {short_km} km below the limit of 80 km") as caught:
        pairs(Constellation.ring(orbit_535(), satellites), IslConfig(1e9))
    assert caught.value.hint == f"{enough} satellites in the plane would do"
    assert len(pairs(Constellation.ring(orbit_535(), enough), IslConfig(1e9))) == enough
    assert (
        ring_figures(EARTH_KM + 535.0, enough).grazing_km > 80 > ring_figures(EARTH_KM + 535.0, enough - 1).grazing_km
    )


def test_a_ring_out_of_reach_says_how_many_would_do() -> None:
    with pytest.raises(UsageError, match="3579 km apart, 1579 km more than max_range_km 2000") as caught:
        pairs(Constellation.ring(orbit_535(), 12), IslConfig(1e9, max_range_km=2000))
    assert caught.value.hint.startswith("22 satellites")
    assert ring_figures(EARTH_KM + 535.0, 22).neighbour_km < 2000 < ring_figures(EARTH_KM + 535.0, 21).neighbour_km


def test_no_ring_below_the_grazing_limit() -> None:
    with pytest.raises(UsageError, match="no number of satellites"):
        pairs(Constellation.ring(orbit_535(), 12), IslConfig(1e9, grazing_altitude_km=600))


def test_ring_links_are_neighbours_each_once() -> None:
    links = pairs(Constellation.walker(orbit_535(), 2, 12), IslConfig(1e9))
    assert len(links) == 24
    assert [0, 1] in links.tolist()
    assert [0, 11] in links.tolist()
    assert not any((a < 12) != (b < 12) for a, b in links)


@settings(max_examples=15, deadline=None)
@given(
    planes=st.integers(3, 7),
    slots=st.integers(9, 14),
    phasing=st.integers(0, 6),
    spread=st.sampled_from([180.0, 360.0]),
    inclination=st.sampled_from([30.0, 53.0, 90.0, 97.5]),
)
def test_grid_gives_every_satellite_its_four_neighbours(
    planes: int, slots: int, phasing: int, spread: float, inclination: float
) -> None:
    orbit = Orbit.kepler(START, altitude_km=550.0, inclination_deg=inclination)
    shell = Constellation.walker(orbit, planes, slots, phasing=phasing % planes, raan_spread_deg=spread)
    links = pairs(shell, IslConfig(1e9, "grid"))
    degree = np.bincount(links.ravel(), minlength=len(shell))
    outer = np.arange(len(shell)) // slots
    at_seam = (outer == 0) | (outer == planes - 1)
    assert set(degree[at_seam]) == ({4} if spread == 360.0 else {3})
    assert set(degree[~at_seam]) == {4}
    assert len(np.unique(links, axis=0)) == len(links)


def test_grid_takes_the_nearest_satellite_of_the_next_plane() -> None:
    orbit = Orbit.kepler(START, altitude_km=550.0, inclination_deg=53.0)
    shell = Constellation.walker(orbit, 8, 12, phasing=5)
    links = pairs(shell, IslConfig(1e9, "grid"))
    far = distances_km(Fleet(shell, START), np.arange(0.0, 5_700.0, 60.0)) ** 2
    mean = far.mean(axis=-1)
    for a, b in links:
        if a // 12 != b // 12:
            plane = slice(b // 12 * 12, b // 12 * 12 + 12)
            assert mean[a, b] <= 1.001 * mean[a, plane].min()


def test_geometry_is_symmetric_and_lowest_inside() -> None:
    rng = np.random.default_rng(3)
    a, b = (EARTH_KM + 500.0) * rng.normal(size=(2, 50, 3))
    forth, back = geometry(a, b), geometry(b, a)
    np.testing.assert_allclose(forth, back, rtol=1e-12)
    shares = np.linspace(0.0, 1.0, 2001)[:, np.newaxis, np.newaxis]
    sampled = np.linalg.norm(a + shares * (b - a), axis=-1).min(axis=0) - EARTH_KM
    np.testing.assert_allclose(forth[1], sampled, atol=1.0)
    assert (forth[1] <= sampled + 1e-9).all()


def test_margin_is_the_smaller_of_height_and_reach() -> None:
    config = IslConfig(1e9, max_range_km=1000.0, grazing_altitude_km=80.0)
    assert margin_km(np.array([900.0, 900.0, 1001.0]), np.array([500.0, 100.0, 500.0]), config).tolist() == [
        100,
        20,
        -1,
    ]


def test_published_cluster_has_81_members_within_a_kilometre_and_neighbours_at_100_to_200_m() -> None:
    cluster = Constellation.from_omm(CLUSTER.read_text(), source=CLUSTER.name)
    assert len(cluster) == 81
    assert max(orbit.eccentricity for orbit in cluster.orbits) == pytest.approx(7.1e-5, abs=2e-6)
    t_s = np.arange(0.0, 86_400.0, 600.0)
    position, _ = Fleet(cluster, START).teme_km(t_s)
    assert np.linalg.norm(position - position[0], axis=-1).max() == pytest.approx(1.0, abs=0.03)
    far = distances_km(Fleet(cluster, START), t_s)
    far[np.arange(81), np.arange(81)] = np.inf
    nearest = far.min(axis=1)
    assert nearest.min() > 0.0995
    assert nearest.max() < 0.2015


def test_cluster_file_is_what_the_model_makes_and_needs_its_digits() -> None:
    cluster = lattice_formation(Orbit.sso(650.0, START, ltan_h=6.0))
    rows = json.loads(CLUSTER.read_text())
    for row, made in zip(rows, json.loads(cluster.to_omm()), strict=True):
        assert row == pytest.approx(made, rel=1e-12)  # another libm may differ in the last digit
    # what seven digits of eccentricity and four of an angle, as in a TLE, would make of it
    for row in rows:
        row["ECCENTRICITY"] = round(row["ECCENTRICITY"], 7)
        for key in ("ARG_OF_PERICENTER", "MEAN_ANOMALY"):
            row[key] = round(row[key], 4)
    coarse, _ = Fleet(Constellation.from_omm(json.dumps(rows)), START).teme_km(np.zeros(1))
    exact, _ = Fleet(cluster, START).teme_km(np.zeros(1))
    assert np.linalg.norm(coarse - exact, axis=-1).max() > 0.5e-3  # half a metre


def test_omm_round_trip_and_xml_of_many_segments() -> None:
    ring = Constellation.ring(orbit_535(), 3)
    again = Constellation.from_omm(ring.to_omm())
    assert [o.mean_anomaly_deg for o in again.orbits] == [o.mean_anomaly_deg for o in ring.orbits]
    segments = "".join(
        "<segment><metadata><OBJECT_NAME>{OBJECT_NAME}</OBJECT_NAME></metadata><data><meanElements>"
        "<EPOCH>{EPOCH}</EPOCH><MEAN_MOTION>{MEAN_MOTION}</MEAN_MOTION><ECCENTRICITY>{ECCENTRICITY}</ECCENTRICITY>"
        "<INCLINATION>{INCLINATION}</INCLINATION><RA_OF_ASC_NODE>{RA_OF_ASC_NODE}</RA_OF_ASC_NODE>"
        "<ARG_OF_PERICENTER>{ARG_OF_PERICENTER}</ARG_OF_PERICENTER><MEAN_ANOMALY>{MEAN_ANOMALY}</MEAN_ANOMALY>"
        "</meanElements></data></segment>".format(**row)
        for row in json.loads(ring.to_omm())
    )
    from_xml = Constellation.from_omm(f"<ndm>{segments}</ndm>")
    assert [o.raan_deg for o in from_xml.orbits] == [o.raan_deg for o in ring.orbits]
    rows = json.loads(ring.to_omm())
    rows[1]["ECCENTRICITY"] = "much"
    with pytest.raises(UsageError, match=r"cluster\.json: message 2: ECCENTRICITY"):
        Constellation.from_omm(json.dumps(rows), source="cluster.json")


def test_constellation_survives_json() -> None:
    shell = Constellation.walker(orbit_535(), 3, 4, phasing=1, raan_spread_deg=180.0)
    assert Constellation.from_dict(json.loads(json.dumps(shell.as_dict()))) == shell


@pytest.mark.parametrize(
    ("outage", "message"),
    [
        (IslOutage(12), "outage of satellite 12, but there are 12"),
        (IslOutage(0, other=5), "outage of the link 0-5"),
    ],
)
def test_outages_of_what_does_not_exist(outage: IslOutage, message: str) -> None:
    ring = Constellation.ring(orbit_535(), 12)
    config = IslConfig(1e9, outages=(outage,))
    with pytest.raises(UsageError, match=message):
        check_outages(ring, pairs(ring, config), config)


def test_config_refuses_nonsense() -> None:
    with pytest.raises(UsageError, match="mesh"):
        IslConfig(1e9, "mesh")
    with pytest.raises(UsageError, match="rate_bps"):
        IslConfig(0.0)
    with pytest.raises(UsageError, match="starts at or after"):
        IslConfig(1e9, outages=(IslOutage(1, 50.0, 50.0),))
    with pytest.raises(UsageError, match="use grid or ring above 500"):
        pairs(Constellation.walker(orbit_535(), 1, 501), IslConfig(1e9, "mesh", max_range_km=100))
