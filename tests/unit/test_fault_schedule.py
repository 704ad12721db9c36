"""The fault schedule: counts against Poisson, bursts over the anomaly, and seeds that do not disturb one another."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from hil.errors import UsageError
from hil.mission.faults import (
    YEAR_S,
    Fault,
    FaultPlan,
    FaultRate,
    saa_time_share,
    saa_windows,
    schedule,
)
from hil.mission.frames import geodetic
from hil.mission.orbit import Ephemeris, Orbit

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
POLAR = Ephemeris(Orbit.sso(535, EPOCH, ltan_h=22.5), EPOCH)
DAY = 86_400.0
PINNED = [(4955.54, "sdc", True), (5080.071, "sdc", True), (5098.379, "sdc", True)]
PLAN = FaultPlan((FaultRate("sdc", 8.8), FaultRate("uecc", 3.4), FaultRate("latch-up", 0.5)), acceleration=1000)


def of(kind: str, faults: tuple[Fault, ...]) -> list[Fault]:
    return [fault for fault in faults if fault.kind == kind]


def test_counts_are_poisson_with_the_published_mean() -> None:
    """Mean and variance over 40 seeds of 10 days: both equal the rate, within four standard errors."""
    expected = 8.8 * 1000 * 10 * DAY / YEAR_S
    plan = FaultPlan((FaultRate("sdc", 8.8),), acceleration=1000)
    counts = np.array([len(schedule(plan, POLAR, 10 * DAY, seed)) for seed in range(40)])
    assert abs(counts.mean() - expected) < 4 * np.sqrt(expected / 40) + 0.01 * expected  # 10 days' share of the anomaly
    assert counts.var(ddof=1) == pytest.approx(expected, rel=4 * np.sqrt(2 / 39))


def test_faults_come_in_bursts_inside_the_anomaly() -> None:
    faults = schedule(PLAN, POLAR, 30 * DAY, 7)
    share = sum(fault.in_saa for fault in faults) / len(faults)
    assert share == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / len(faults)))
    windows = saa_windows(POLAR, 0.0, 30 * DAY)
    assert (windows[:, 1] - windows[:, 0]).max() < 20 * 60  # "less than 20 minutes an orbit"
    t_s = np.array([fault.t_s for fault in faults])
    row = np.searchsorted(windows[:, 0], t_s) - 1
    within = (row >= 0) & (t_s < windows[row, 1])
    assert (within == [fault.in_saa for fault in faults]).all()
    latitude, longitude, _ = geodetic(POLAR.itrf_m(t_s[within]))
    assert (latitude >= -50).all()
    assert (latitude <= 0).all()
    assert (longitude >= -90).all()
    assert (longitude <= 40).all()


def test_gaps_within_the_anomaly_are_exponential() -> None:
    """Kolmogorov-Smirnov on the time inside the anomaly only: the burst itself is a Poisson process."""
    faults = [fault.t_s for fault in schedule(PLAN, POLAR, 60 * DAY, 3) if fault.in_saa]
    windows = saa_windows(POLAR, 0.0, 60 * DAY)
    before = np.concatenate([[0.0], np.cumsum(windows[:, 1] - windows[:, 0])])
    row = np.searchsorted(windows[:, 0], faults) - 1
    inside_s = before[row] + np.array(faults) - windows[row, 0]
    gaps = np.sort(np.diff(inside_s))
    expected = 1 - np.exp(-gaps / gaps.mean())
    steps = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(steps - expected).max() < 1.63 / np.sqrt(len(gaps))  # 1 % level


def test_a_kind_has_a_stream_of_its_own_and_a_longer_mission_only_appends() -> None:
    faults = schedule(PLAN, POLAR, 5 * DAY, 7)
    assert faults == schedule(PLAN, POLAR, 5 * DAY, 7)
    assert faults != schedule(PLAN, POLAR, 5 * DAY, 8)
    more = replace(PLAN, rates=(FaultRate("sefi", 8.8), *PLAN.rates[::-1]))
    assert of("sdc", faults) == of("sdc", schedule(more, POLAR, 5 * DAY, 7))
    assert [fault.t_s for fault in of("sefi", schedule(more, POLAR, 5 * DAY, 7))] != [f.t_s for f in of("sdc", faults)]
    longer = schedule(PLAN, POLAR, 9 * DAY, 7)
    early = [fault for fault in longer if fault.t_s < 5 * DAY]
    assert [fault.kind for fault in early] == [fault.kind for fault in faults]
    assert [fault.t_s for fault in early] == pytest.approx([fault.t_s for fault in faults], abs=1e-3)
    assert [fault.t_s for fault in longer] == sorted(fault.t_s for fault in longer)


def test_the_schedule_of_a_seed_never_changes() -> None:
    """Pinned: another numpy, machine or refactoring must arrive at the same instants."""
    first = schedule(PLAN, POLAR, 2 * DAY, 42)[:3]
    assert [(round(fault.t_s, 3), fault.kind, fault.in_saa) for fault in first] == PINNED


def test_an_orbit_that_never_enters_has_the_mean_rate() -> None:
    equatorial = replace(POLAR.orbit, inclination_deg=1.0, raan_deg=0.0)
    high = Ephemeris(replace(POLAR.orbit, mean_motion_rev_day=2.0), EPOCH)
    assert saa_time_share(high) == 0
    assert saa_windows(high, 0.0, 10 * DAY).shape == (0, 2)
    faults = schedule(FaultPlan((FaultRate("sdc", 100.0),), acceleration=100), high, 20 * DAY, 1)
    expected = 1e4 * 20 * DAY / YEAR_S
    assert len(faults) == pytest.approx(expected, abs=4 * np.sqrt(expected))
    assert not any(fault.in_saa for fault in faults)
    assert 0 < saa_time_share(Ephemeris(equatorial, EPOCH)) < 0.05


@pytest.mark.parametrize("inclination", [30.0, 51.6, 97.5])
def test_long_run_share_of_time_is_the_ground_tracks(inclination: float) -> None:
    e = Ephemeris(replace(POLAR.orbit, inclination_deg=inclination), EPOCH)
    windows = saa_windows(e, 0.0, 20 * DAY)
    assert saa_time_share(e) == pytest.approx((windows[:, 1] - windows[:, 0]).sum() / (20 * DAY), rel=0.03)


def test_rates_from_cross_sections() -> None:
    """Orin NX at 15 W behind 10 mm of aluminium: 3.9e-9 cm2 x 1.19e9 particles per cm2 and year."""
    assert FaultRate.from_cross_section("seu", 3.9e-9, 1.19e9).per_year == pytest.approx(4.641)


def test_a_whole_share_leaves_nothing_outside() -> None:
    assert all(fault.in_saa for fault in schedule(replace(PLAN, saa_share=1.0), POLAR, 5 * DAY, 1))
    assert not any(fault.in_saa for fault in schedule(replace(PLAN, saa_share=0.0), POLAR, 5 * DAY, 1))
    assert schedule(FaultPlan((FaultRate("sdc", 0.0),)), POLAR, 5 * DAY, 1) == ()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FaultRate("sdc", -1.0), "per_year"),
        (lambda: FaultRate("sdc", float("nan")), "per_year"),
        (lambda: FaultPlan((FaultRate("a", 1.0), FaultRate("a", 2.0))), "twice"),
        (lambda: FaultPlan((), acceleration=0.0), "acceleration"),
        (lambda: FaultPlan((), saa_share=1.1), "saa_share"),
        (lambda: schedule(FaultPlan((FaultRate("a", 1e9),)), POLAR, DAY, 1), "arrivals"),
    ],
)
def test_impossible_plans_are_refused(make: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()  # type: ignore[operator]
