"""Passes against Skyfield, and the contact plan's handover rules."""

from __future__ import annotations

import importlib
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission.frames import Station
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.passes import Handover, contact_plan, find_passes
from hil.mission.radio import SPEED_OF_LIGHT_M_S, LinkEnvironment, one_way_delay_s

TLES = Path(__file__).parents[2] / "fixtures" / "tle"
START = datetime(2026, 1, 1, tzinfo=UTC)
STATIONS = (Station("miyun", 40.45, 116.86), Station("kashgar", 39.50, 75.93, 1_200.0), Station("sanya", 18.31, 109.31))
ORACLE_CASES = [
    ("ref_qwen3_535_ltdn1030", START),
    ("ref_suncatcher_650_ltan0600", datetime(2026, 1, 4, 5, tzinfo=UTC)),
    ("ref_mvp_525_ltan1000", datetime(2026, 1, 2, tzinfo=UTC)),
    ("ref_ai1_600_ltan1800", datetime(2026, 3, 20, tzinfo=UTC)),
    ("ref_ai1_600_30deg", datetime(2026, 6, 21, 13, tzinfo=UTC)),
    ("ref_pelican_500_ltan1030", datetime(2026, 9, 23, tzinfo=UTC)),
    ("ref_iss_415", START),
    ("ref_opssat_515_ltan0600", datetime(2026, 5, 5, tzinfo=UTC)),
    ("ref_kepler_600_ltan1800", datetime(2026, 11, 1, tzinfo=UTC)),
    ("starcloud1_flown_epoch_2026-07-26", datetime(2026, 7, 27, tzinfo=UTC)),
]


def ephemeris(name: str = "ref_qwen3_535_ltdn1030", start: datetime = START) -> Ephemeris:
    return Ephemeris(Orbit.from_tle((TLES / f"{name}.tle").read_text()), start)


@pytest.mark.parametrize(("name", "start"), ORACLE_CASES)
def test_agrees_with_skyfield(name: str, start: datetime) -> None:
    """Edges within 0.5 s, range within 200 m, elevation within 0.02 deg, delay within 1 us over a day."""
    api = importlib.import_module("skyfield.api")
    scale = api.load.timescale(builtin=True)
    e = ephemeris(name, start)
    satellite = api.EarthSatellite(e.orbit.line1, e.orbit.line2, None, scale)
    stations = (*STATIONS, Station("svalbard", 78.23, 15.4, 400.0, mask_deg=10.0))
    end_s = 86_400.0
    grid = np.arange(0.0, end_s, 97.0)
    times = scale.utc(start.year, start.month, start.day, start.hour, start.minute, grid)
    compared = 0
    for station in stations:
        site = api.wgs84.latlon(station.latitude_deg, station.longitude_deg, station.altitude_m)
        altitude, azimuth, distance = (satellite - site).at(times).altaz()
        ours = e.look(station, grid)
        assert np.abs(ours.range_m - distance.m).max() < 200
        assert np.abs(ours.range_m - distance.m).max() / SPEED_OF_LIGHT_M_S < 1e-6
        assert np.abs(ours.elevation_deg - altitude.degrees).max() < 0.02
        turn = (ours.azimuth_deg - azimuth.degrees + 180) % 360 - 180
        assert np.abs(turn * np.cos(np.radians(altitude.degrees))).max() < 0.02

        found = find_passes(e, station, 0.0, end_s)
        window = (scale.from_datetime(start), scale.from_datetime(start + timedelta(seconds=end_s)))
        when, kind = satellite.find_events(site, *window, altitude_degrees=station.mask_deg)
        oracle = np.array([(t.utc_datetime() - start).total_seconds() for t in when])
        for edge, code in (("aos_s", 0), ("los_s", 2)):
            inside = [getattr(item, edge) for item in found if 0 < getattr(item, edge) < end_s]
            assert inside == pytest.approx(list(oracle[kind == code]), abs=0.5)
            compared += len(inside)
    assert compared >= 8


def test_edges_lie_on_the_mask_and_the_peak_is_the_highest() -> None:
    e = ephemeris()
    for item in find_passes(e, STATIONS[0], 0.0, 86_400.0):
        edges = e.look(STATIONS[0], np.array([item.aos_s, item.los_s])).elevation_deg
        assert edges == pytest.approx([5.0, 5.0], abs=1e-6)
        inside = e.look(STATIONS[0], np.linspace(item.aos_s, item.los_s, 500)).elevation_deg
        assert inside.min() >= 5.0 - 1e-6
        assert item.max_elevation_deg >= inside.max() - 1e-9
        assert item.max_elevation_deg == pytest.approx(inside.max(), abs=0.05)


def test_a_pass_shorter_than_the_scan_is_found() -> None:
    """Raise the mask to just below a pass's peak: what is left lasts a second or two."""
    e = ephemeris()
    low = find_passes(e, STATIONS[0], 0.0, 40_000.0)
    target = max(low, key=lambda item: item.max_elevation_deg)
    high = Station("miyun", 40.45, 116.86, mask_deg=target.max_elevation_deg - 1e-4)
    (short,) = find_passes(e, high, 0.0, 40_000.0)
    assert 0 < short.duration_s < 5
    assert short.aos_s < target.max_elevation_s < short.los_s


def test_a_pass_under_way_keeps_its_true_edges() -> None:
    e = ephemeris()
    whole = find_passes(e, STATIONS[0], 0.0, 20_000.0)[0]
    (cut,) = find_passes(e, STATIONS[0], whole.aos_s + 100, whole.los_s - 100)
    assert (cut.aos_s, cut.los_s) == pytest.approx((whole.aos_s, whole.los_s), abs=1e-5)


def test_azimuth_table_splits_a_pass() -> None:
    """A wall to the east: the satellite sets behind it and rises again."""
    e = ephemeris()
    plain = Station("x", 40.45, 116.86)
    item = find_passes(e, plain, 0.0, 20_000.0)[0]
    peak = e.look(plain, np.array([item.max_elevation_s])).azimuth_deg[0]
    rows = ((peak - 8) % 360, 5.0), ((peak - 7) % 360, 80.0), ((peak + 7) % 360, 80.0), ((peak + 8) % 360, 5.0)
    walled = Station("x", 40.45, 116.86, mask_table=rows)
    parts = [p for p in find_passes(e, walled, 0.0, 20_000.0) if item.aos_s - 1 <= p.aos_s <= item.los_s]
    assert len(parts) == 2
    assert parts[0].aos_s == pytest.approx(item.aos_s, abs=1e-5)
    assert parts[1].los_s == pytest.approx(item.los_s, abs=1e-5)
    assert parts[0].los_s < item.max_elevation_s < parts[1].aos_s


@pytest.mark.parametrize("rule", ["keep-current", "highest"])
def test_contacts_are_the_union_of_the_passes(rule: Handover) -> None:
    e = ephemeris()
    passes = [p for station in STATIONS for p in find_passes(e, station, 0.0, 86_400.0)]
    contacts = contact_plan(e, STATIONS, 0.0, 86_400.0, handover=rule)
    assert all(a.los_s < b.aos_s for a, b in pairwise(contacts))
    instants = np.arange(0.0, 86_400.0, 7.0)
    by_pass = np.array([any(p.aos_s <= t < p.los_s for p in passes) for t in instants])
    by_contact = np.array([any(c.aos_s <= t < c.los_s for c in contacts) for t in instants])
    assert (by_pass == by_contact).all()
    assert any(len(contact.spans) > 1 for contact in contacts)
    for contact in contacts:
        assert contact.station == contact.spans[0].label
        assert contact.spans[0].start_s == contact.aos_s
        assert contact.spans[-1].end_s == contact.los_s
        assert all(a.end_s == b.start_s and a.label != b.label for a, b in pairwise(contact.spans))
        for span in contact.spans:
            assert any(p.station == span.label and p.aos_s <= span.start_s < span.end_s <= p.los_s for p in passes)


def test_keep_current_stays_until_los_and_highest_follows_the_elevation() -> None:
    e = ephemeris()
    by_name = {station.name: station for station in STATIONS}
    kept = contact_plan(e, STATIONS, 0.0, 86_400.0)
    climbing = contact_plan(e, STATIONS, 0.0, 86_400.0, handover="highest")
    for contact in kept:
        for span in contact.spans[:-1]:
            low = e.look(by_name[span.label], np.array([span.end_s])).elevation_deg[0]
            assert low == pytest.approx(5.0, abs=1e-5)
    for contact in climbing:
        t_s = np.linspace(contact.aos_s, contact.los_s, 300)[1:-1]
        best = np.max([e.look(station, t_s).elevation_deg for station in STATIONS], axis=0)
        serving = [next(span.label for span in contact.spans if span.start_s <= t < span.end_s) for t in t_s]
        used = [e.look(by_name[name], np.array([t])).elevation_deg[0] for name, t in zip(serving, t_s, strict=True)]
        assert used == pytest.approx(best, abs=1e-6)
    assert sum(len(c.spans) for c in climbing) >= sum(len(c.spans) for c in kept)


def test_keep_current_is_not_lured_away_and_chooses_well_when_it_must() -> None:
    e = ephemeris()
    near = Station("near", 40.45, 116.86, mask_deg=25.0)  # rises high above a station that already serves
    stations = (
        *STATIONS,
        near,
        Station("urumqi", 43.8, 87.6),
        Station("harbin", 45.8, 126.5),
        Station("hanoi", 21, 105.8),
    )
    chosen_among_several = 0
    for contact in contact_plan(e, stations, 0.0, 86_400.0):
        for index, span in enumerate(contact.spans):
            at = np.array([span.start_s + 1e-3])
            seen = {station.name: e.look(station, at).elevation_deg[0] for station in stations}
            visible = [station.name for station in stations if seen[station.name] >= station.mask_deg]
            assert span.label == max(visible, key=lambda name: seen[name])
            chosen_among_several += len(visible) > 1
            if index:
                before = contact.spans[index - 1].label
                assert before not in visible
    assert chosen_among_several >= 3


def test_stations_that_share_a_name_are_refused() -> None:
    with pytest.raises(UsageError, match="share a name"):
        contact_plan(ephemeris(), (STATIONS[0], STATIONS[0]), 0.0, 100.0)


@settings(max_examples=15, deadline=None)
@given(st.floats(400, 1_200), st.floats(0, 23.99), st.floats(-80, 80), st.floats(-179, 179), st.floats(0, 30))
def test_passes_of_any_orbit_are_ordered(
    altitude_km: float, ltan_h: float, latitude: float, longitude: float, mask: float
) -> None:
    e = Ephemeris(Orbit.sso(altitude_km, START, ltan_h=ltan_h), START)
    station = Station("x", latitude, longitude, mask_deg=mask)
    passes = find_passes(e, station, 0.0, 20_000.0)
    times = [t for item in passes for t in (item.aos_s, item.max_elevation_s, item.los_s)]
    assert times == sorted(times)
    assert all(item.max_elevation_deg >= mask - 1e-6 for item in passes)
    middles = np.array([0.5 * (a.los_s + b.aos_s) for a, b in pairwise(passes)])
    if len(middles):
        assert (e.look(station, middles).elevation_deg < mask).all()


def test_delay_is_light_time_plus_processing() -> None:
    assert one_way_delay_s(299_792_458.0) == 1.0
    assert one_way_delay_s(0.0, 0.002) == 0.002


@pytest.mark.parametrize(
    "values",
    [
        {"uplink_bps": 0.0},
        {"downlink_bps": float("nan")},
        {"uplink_loss": 1.5},
        {"acquisition_s": -1.0},
        {"handover": "random"},
    ],
)
def test_link_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        LinkEnvironment.fixed(**{"uplink_bps": 1e5, "downlink_bps": 1e6, **values})  # type: ignore[arg-type]
