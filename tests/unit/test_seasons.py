"""Eclipse seasons over a year: what "24 hours of sunlight" really is, and the share of the time in the Sun."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from hil.errors import UsageError
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.seasons import sunlight
from hil.mission.shadow import EARTH_RADIUS_KM, beta_deg, find_eclipses, sunlit_fraction

MARCH = datetime(2026, 3, 1, tzinfo=UTC)  # the dawn-dusk season around June lies whole within the window
DAY = 86_400.0


def dawn_dusk(altitude_km: float) -> Ephemeris:
    return Ephemeris(Orbit.sso(altitude_km, MARCH, ltan_h=18.0), MARCH)


@pytest.mark.parametrize("altitude_km", [600.0, 650.0])
def test_dawn_dusk_has_a_season_so_24_hours_of_sunlight_is_false(altitude_km: float) -> None:
    e = dawn_dusk(altitude_km)
    view = sunlight(e, 200.0)
    (season,) = view.seasons
    assert 60 < (season.end_s - season.start_s) / DAY < 110
    assert 900 < season.longest_s < 1_500
    assert 0.9 < view.sunlit_fraction < 0.95
    critical = np.degrees(np.arcsin(EARTH_RADIUS_KM / (6_378.137 + altitude_km)))
    assert view.beta_min_deg < -critical or view.beta_max_deg > critical  # the rest of the year has none
    for edge_s in (season.start_s, season.end_s):  # the season is where beta falls below the critical angle
        assert abs(beta_deg(e, np.array([edge_s]))[0]) == pytest.approx(critical, abs=0.6)


def test_seasons_begin_and_end_where_the_eclipses_do() -> None:
    e = dawn_dusk(650.0)
    (season,) = sunlight(e, 200.0).seasons
    assert find_eclipses(e, 0.0, season.start_s - 1.0) == ()
    assert find_eclipses(e, season.end_s + 1.0, 200.0 * DAY) == ()
    inside = find_eclipses(e, season.start_s, season.end_s)
    assert len(inside) == season.eclipses
    longest = max(inside, key=lambda item: item.duration_s)
    assert (season.longest_s, season.longest_at_s) == pytest.approx((longest.duration_s, longest.penumbra_entry_s))


def test_30_degrees_has_an_eclipse_every_orbit() -> None:
    e = Ephemeris(Orbit.kepler(MARCH, altitude_km=600, inclination_deg=30.0), MARCH)
    view = sunlight(e, 60.0)
    (season,) = view.seasons
    assert (season.start_s, season.end_s) == (pytest.approx(0.0, abs=6_000), pytest.approx(60 * DAY, abs=6_000))
    assert season.eclipses == pytest.approx(60 * DAY / e.orbit.period_s, abs=3)
    assert 2_050 < season.longest_s < 2_200
    assert view.beta_max_deg - view.beta_min_deg > 60


def test_geostationary_seasons_are_around_the_equinoxes() -> None:
    start = datetime(2026, 2, 1, tzinfo=UTC)
    e = Ephemeris(Orbit.kepler(start, mean_motion_rev_day=1.0027, inclination_deg=0.05), start)
    view = sunlight(e, 100.0)
    (spring,) = view.seasons
    assert spring.start_s / DAY == pytest.approx(26, abs=3)  # 27 February to 13 April
    assert spring.end_s / DAY == pytest.approx(71, abs=3)
    assert spring.longest_s / 60 == pytest.approx(72, abs=2)
    assert spring.eclipses == pytest.approx(46, abs=3)


def test_a_high_dawn_dusk_orbit_has_no_season() -> None:
    view = sunlight(dawn_dusk(1_500.0), 180.0)
    assert view.seasons == ()
    assert view.sunlit_fraction == 1.0


@pytest.mark.parametrize(("altitude_km", "days"), [(650.0, 30.0), (400.0, 15.0)])
def test_sunlit_fraction_is_the_mean_of_the_disc(altitude_km: float, days: float) -> None:
    e = Ephemeris(dawn_dusk(altitude_km).orbit, MARCH + timedelta(days=60))
    sampled = sunlit_fraction(e, np.arange(0.0, days * DAY, 20.0)).mean()
    assert sampled < 1
    assert sunlight(e, days).sunlit_fraction == pytest.approx(sampled, abs=1e-4)


def test_empty_and_endless_years_are_refused() -> None:
    for days in (0.0, 401.0, float("nan")):
        with pytest.raises(UsageError, match="days of sunlight"):
            sunlight(dawn_dusk(650.0), days)
