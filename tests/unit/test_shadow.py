"""The Earth's shadow against an independent cone construction, the cylinder's closed form, and DE421 where present."""

from __future__ import annotations

import importlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.roots import positive_intervals, scan_grid
from hil.mission.shadow import (
    EARTH_RADIUS_KM,
    SUN_RADIUS_KM,
    beta_deg,
    find_eclipses,
    sunlit_fraction,
    visible_fraction,
)
from hil.mission.sun import AU_KM

Floats = npt.NDArray[np.float64]
TLES = Path(__file__).parents[2] / "fixtures" / "tle"
START = datetime(2026, 1, 1, tzinfo=UTC)
CASES = [
    ("ref_qwen3_535_ltdn1030", START),
    ("ref_ai1_600_30deg", datetime(2026, 3, 20, 7, tzinfo=UTC)),
    ("ref_iss_415", datetime(2026, 6, 21, tzinfo=UTC)),
    ("ref_opssat_515_ltan0600", START),
    ("starcloud1_flown_epoch_2026-07-26", datetime(2026, 7, 26, 12, tzinfo=UTC)),
]


def ephemeris(name: str, start: datetime = START) -> Ephemeris:
    return Ephemeris(Orbit.from_tle((TLES / f"{name}.tle").read_text()), start)


def cone_depth(satellite: Floats, sun: Floats, *, umbra: bool) -> Floats:
    """Distance (km) inside the shadow cone, built from its apex and axis instead of apparent discs."""
    distance = np.linalg.norm(sun, axis=1)
    axis = -sun / distance[:, None]
    along = (satellite * axis).sum(axis=1)
    off = np.linalg.norm(satellite - along[:, None] * axis, axis=1)
    sign = -1.0 if umbra else 1.0
    half = np.arcsin((SUN_RADIUS_KM + sign * EARTH_RADIUS_KM) / distance)
    radius = EARTH_RADIUS_KM / np.cos(half) + sign * along * np.tan(half)
    return np.where(along > 0, (radius - off) * np.cos(half), -1.0)


@pytest.mark.parametrize(("name", "start"), CASES)
def test_edges_agree_with_the_cone_construction(name: str, start: datetime) -> None:
    e = ephemeris(name, start)
    eclipses = find_eclipses(e, 0.0, 43_200.0)
    assert len(eclipses) in range(7, 10)
    for umbra, low, high in ((False, "penumbra_entry_s", "penumbra_exit_s"), (True, "umbra_entry_s", "umbra_exit_s")):
        ours = np.array([[getattr(item, low), getattr(item, high)] for item in eclipses])
        grid = scan_grid(ours.min() - 500, ours.max() + 500, 20.0)
        theirs = positive_intervals(lambda t, u=umbra: cone_depth(e.teme_km(t)[0], e.sun_km(t), umbra=u), grid)
        assert theirs.shape == ours.shape
        assert np.abs(theirs - ours).max() < 1e-3


@pytest.mark.parametrize(("name", "start"), CASES)
def test_edges_agree_with_de421(name: str, start: datetime) -> None:
    """Skyfield's positions, DE421's Sun: within one second. Needs the oracle package skyfield-data."""
    data = pytest.importorskip("skyfield_data", reason="the oracle ephemeris (skyfield-data) is not installed")
    api = importlib.import_module("skyfield.api")
    bodies = api.Loader(data.__path__[0] + "/data", verbose=False)("de421.bsp")
    scale = api.load.timescale(builtin=True)
    e = ephemeris(name, start)
    satellite = api.EarthSatellite(e.orbit.line1, e.orbit.line2, None, scale)

    def depth(t_s: Floats, sign: float) -> Floats:
        t = scale.utc(start.year, start.month, start.day, start.hour, start.minute, start.second + t_s)
        position = satellite.at(t).position.km.T
        to_sun = bodies["earth"].at(t).observe(bodies["sun"]).apparent().position.km.T - position
        far, near = np.linalg.norm(to_sun, axis=1), np.linalg.norm(position, axis=1)
        apart = np.arccos(-(to_sun * position).sum(axis=1) / far / near)
        return np.asarray(np.arcsin(EARTH_RADIUS_KM / near) + sign * np.arcsin(SUN_RADIUS_KM / far) - apart)

    found = find_eclipses(e, 0.0, 43_200.0)
    for sign, names in ((1.0, ("penumbra_entry_s", "penumbra_exit_s")), (-1.0, ("umbra_entry_s", "umbra_exit_s"))):
        edges = np.array([getattr(item, name) for item in found for name in names])
        before, after = depth(edges - 1.0, sign), depth(edges + 1.0, sign)
        assert (before * after < 0).all()  # the oracle's edge lies within one second of ours
        error = np.abs((before + after) / (after - before))  # its distance, linearised, s
        assert error.max() < 0.1


@pytest.mark.parametrize(("name", "start"), CASES)
def test_edges_are_ordered_and_alternate(name: str, start: datetime) -> None:
    eclipses = find_eclipses(ephemeris(name, start), 0.0, 86_400.0)
    times = [
        t
        for item in eclipses
        for t in (item.penumbra_entry_s, item.umbra_entry_s, item.umbra_exit_s, item.penumbra_exit_s)
        if t is not None
    ]
    assert times == sorted(times)
    e = ephemeris(name, start)
    for item in eclipses:
        inside = np.array([item.penumbra_entry_s + 0.01, item.penumbra_exit_s - 0.01])
        outside = np.array([item.penumbra_entry_s - 0.01, item.penumbra_exit_s + 0.01])
        assert (sunlit_fraction(e, inside) < 1).all()
        assert (sunlit_fraction(e, outside) == 1).all()
        if item.umbra_entry_s is not None and item.umbra_exit_s is not None:
            assert (sunlit_fraction(e, np.linspace(item.umbra_entry_s + 0.01, item.umbra_exit_s - 0.01, 9)) == 0).all()


def test_an_eclipse_under_way_keeps_its_true_edges() -> None:
    e = ephemeris("ref_qwen3_535_ltdn1030")
    whole = find_eclipses(e, 0.0, 20_000.0)[1]
    (cut,) = find_eclipses(e, whole.penumbra_entry_s + 600, whole.penumbra_exit_s - 600)
    assert cut.penumbra_entry_s == pytest.approx(whole.penumbra_entry_s, abs=1e-5)
    assert cut.penumbra_exit_s == pytest.approx(whole.penumbra_exit_s, abs=1e-5)


def test_mean_illumination_is_the_cylinders() -> None:
    """Ring at constant beta: the conical shadow darkens as much as the cylinder's closed form says."""
    for beta in (0.0, 25.0, 55.0):
        angle = np.linspace(0, 2 * np.pi, 20_001)[:-1]
        radius = EARTH_RADIUS_KM + 535.0
        b = np.radians(beta)
        ring = radius * np.column_stack([np.cos(angle) * np.cos(b), np.sin(angle), np.cos(angle) * np.sin(b)])
        sun = np.broadcast_to([AU_KM, 0.0, 0.0], ring.shape)
        h = 535.0
        dark = np.arccos(np.sqrt(h * h + 2 * EARTH_RADIUS_KM * h) / (radius * np.cos(b))) / np.pi
        assert visible_fraction(ring, np.array(sun)).mean() == pytest.approx(1 - dark, abs=1e-3)


def test_no_eclipse_exactly_when_beta_is_high() -> None:
    """Over a year of a dawn-dusk orbit: an eclipse on a day if and only if |beta| is below the critical angle."""
    e = ephemeris("ref_suncatcher_650_ltan0600")
    days = np.arange(0.0, 366.0, 6.0) * 86_400
    betas = beta_deg(e, days)
    radius = np.linalg.norm(e.teme_km(days)[0], axis=1).mean()
    critical = np.degrees(np.arcsin(EARTH_RADIUS_KM / radius))
    in_season = 0
    for day, beta in zip(days, betas, strict=True):
        if abs(abs(beta) - critical) < 1.0:
            continue  # at the very edge of the season the penumbra and the day's drift decide
        dark = bool(find_eclipses(e, day, day + e.orbit.period_s))
        assert dark == (abs(beta) < critical)
        in_season += dark
    assert 7 < in_season < 30  # "24 hours of sunlight" is false for a season of some three months


def test_grazing_eclipse_between_two_samples_is_found() -> None:
    """Partial eclipses of a few minutes at the season's edge: penumbra only, umbra None."""
    e = ephemeris("ref_suncatcher_650_ltan0600")
    days = np.arange(0.0, 366.0) * 86_400
    betas = beta_deg(e, days)
    critical = np.degrees(np.arcsin(EARTH_RADIUS_KM / np.linalg.norm(e.teme_km(days)[0], axis=1).mean()))
    edge_days = days[np.abs(np.abs(betas) - critical) < 0.5]
    season = [item for day in edge_days for item in find_eclipses(e, day, day + 5_800.0)]
    partial = [item for item in season if item.umbra_entry_s is None]
    assert partial
    assert min(item.duration_s for item in partial) < 120
    for item in partial:
        assert item.umbra_exit_s is None
        dark = sunlit_fraction(e, np.linspace(item.penumbra_entry_s, item.penumbra_exit_s, 201))
        assert 0 < dark.min() < 1


@settings(max_examples=60)
@given(st.floats(6_500, 60_000), st.floats(-0.99, 0.99))
def test_fraction_falls_monotonically_into_the_shadow(radius: float, tilt: float) -> None:
    angle = np.linspace(0, np.pi, 4_000)
    track = radius * np.column_stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)])
    sun = np.array([[AU_KM * np.sqrt(1 - tilt * tilt * 0.01), 0.0, AU_KM * tilt * 0.1]]).repeat(len(angle), axis=0)
    fraction = visible_fraction(track, sun)
    assert ((fraction >= 0) & (fraction <= 1)).all()
    assert fraction[0] == 1.0
    assert (np.diff(fraction) <= 1e-12).all()


def test_the_last_bits_of_a_position_move_neither_fraction_nor_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeline's hash lives by it. An umbra's brackets are results themselves: only the root must count."""
    may = datetime(2026, 5, 10, tzinfo=UTC)
    ephemeris = Ephemeris(Orbit.sso(600, may, ltan_h=18), may)
    exact = Orbit.teme_km

    def eclipses(seed: int) -> list[list[float | None]]:
        rng = np.random.default_rng(seed)
        monkeypatch.setattr(
            Orbit,
            "teme_km",
            lambda self, day, f: tuple(v * (1 + 2e-15 * rng.uniform(-1, 1, v.shape)) for v in exact(self, day, f)),
        )
        found = find_eclipses(ephemeris, 0.0, 43_200.0)
        return [[e.penumbra_entry_s, e.umbra_entry_s, e.umbra_exit_s, e.penumbra_exit_s] for e in found]

    assert np.abs(np.array(eclipses(1)) - np.array(eclipses(2))).max() < 1e-8
    monkeypatch.undo()
    first = find_eclipses(ephemeris, 0.0, 43_200.0)[0]
    assert first.umbra_entry_s is not None
    t_s = np.linspace(first.penumbra_entry_s, first.umbra_entry_s, 4_001)
    (position, _), sun = ephemeris.teme_km(t_s), ephemeris.sun_km(t_s)
    noise = 1 + 2e-16 * np.random.default_rng(1).uniform(-1, 1, position.shape)
    assert np.abs(visible_fraction(position * noise, sun) - visible_fraction(position, sun)).max() < 1e-11


def test_deep_space_sees_an_annular_sun() -> None:
    behind = np.array([[-3e6, 0.0, 0.0]])
    fraction = visible_fraction(behind, np.array([[AU_KM, 0.0, 0.0]]))[0]
    assert fraction == pytest.approx(1 - (EARTH_RADIUS_KM / 3e6 / (SUN_RADIUS_KM / (AU_KM + 3e6))) ** 2, rel=1e-4)
