"""The compiled timeline: columns, edges, link states, hash, files; and the energy budget computed from it."""

from __future__ import annotations

import csv
import io
import timeit
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hil.errors import UsageError
from hil.mission import exports, timeline_file
from hil.mission.budget import balance_caution, eclipse_budget, fly, orbit_balance, shed_forecast, usable_wh
from hil.mission.compile import compile_timeline
from hil.mission.environment import MissionEnvironment, PowerEnvironment
from hil.mission.eps import EpsConfig, ShedConfig
from hil.mission.frames import Station
from hil.mission.linkplan import Edge
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.radio import SPEED_OF_LIGHT_M_S, Channel, LinkEnvironment
from hil.mission.shadow import sunlit_fraction
from hil.mission.solar_array import ArrayConfig
from hil.mission.timeline import COLUMNS, EDGE_KINDS, Timeline

TLE = (Path(__file__).parents[2] / "fixtures" / "tle" / "ref_qwen3_535_ltdn1030.tle").read_text()
START = datetime(2026, 1, 1, tzinfo=UTC)
STATIONS = (Station("miyun", 40.45, 116.86), Station("kashgar", 39.50, 75.93), Station("sanya", 18.31, 109.31))
POWER = PowerEnvironment(
    array=ArrayConfig(44.0, 0.85, 0.95),
    eps=EpsConfig(0.70, resistance_ohm=0.3, charge_max_c=2.0, platform_w=6.0),
    shed=ShedConfig(13.2, 2.0, 14.4, 0.3, 2.0),
    board_idle_w=5.0,
    board_full_w=15.0,
)
ENVIRONMENT = MissionEnvironment(
    name="star-compute",
    orbit=Orbit.from_tle(TLE),
    stations=STATIONS,
    start=START,
    duration_s=86_400.0,
    link=LinkEnvironment.fixed(300e3, 1e6, uplink_loss=0.001, processing_s=0.001, acquisition_s=15.0),
    power=POWER,
)


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    return compile_timeline(ENVIRONMENT)


def test_columns_are_immutable_and_cover_the_mission(timeline: Timeline) -> None:
    assert timeline.t_s[0] == 0.0
    assert timeline.t_s[-1] == 86_400.0
    assert (np.diff(timeline.t_s) > 0).all()
    assert np.diff(timeline.t_s).max() <= 10.0
    for name in COLUMNS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(timeline, name)[0] = 1.0
    with pytest.raises(AttributeError):
        timeline.t_s = timeline.t_s  # type: ignore[misc]


def test_edges_are_sorted_alternate_and_are_rows(timeline: Timeline) -> None:
    times = [edge.t_s for edge in timeline.edges]
    assert times == sorted(times)
    assert {edge.kind for edge in timeline.edges} <= set(EDGE_KINDS)
    assert np.abs(timeline.t_s[np.searchsorted(timeline.t_s, np.array(times) - 1e-6)] - times).max() < 1e-6
    radio = [edge.kind for edge in timeline.edges if edge.kind in ("aos", "los")]
    assert radio == ["aos", "los"] * len(timeline.contacts)
    order = ["penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit"]
    sun = [edge.kind for edge in timeline.edges if edge.kind in order]
    assert all(order[(order.index(a) + 1) % 4] == b for a, b in pairwise(sun))
    assert sun.count("umbra_entry") == 15


def test_sunlight_follows_the_disc_also_inside_the_penumbra(timeline: Timeline) -> None:
    ephemeris = Ephemeris(ENVIRONMENT.orbit, START)
    eclipse = timeline.eclipses[3]
    assert eclipse.umbra_entry_s is not None
    ramp = np.linspace(eclipse.penumbra_entry_s, eclipse.umbra_entry_s, 777)
    everywhere = np.linspace(0.0, 86_400.0, 4_001)
    for t_s in (ramp, everywhere):
        truth = sunlit_fraction(ephemeris, t_s)
        assert [timeline.sunlit_at(t) for t in t_s] == pytest.approx(list(truth), abs=1e-3)
        assert [timeline.array_power_w(t) for t in t_s] == pytest.approx(list(35.53 * truth), abs=0.04)
    assert timeline.array_w.max() == pytest.approx(44 * 0.85 * 0.95)


def test_sun_distance_can_scale_the_array() -> None:
    power = replace(POWER, array=replace(POWER.array, distance_scaling=True))
    january = compile_timeline(replace(ENVIRONMENT, duration_s=6_000.0, power=power))
    assert january.array_w.max() == pytest.approx(35.53 / 0.98333**2, rel=1e-4)


def test_link_is_an_outage_outside_contacts_and_until_the_modem_locks(timeline: Timeline) -> None:
    contact = next(contact for contact in timeline.contacts if len(contact.spans) == 2)
    handover = contact.spans[1].start_s
    silent = [contact.aos_s - 0.01, contact.aos_s, contact.aos_s + 14.9, handover, handover + 14.9, contact.los_s]
    for t_s in silent:
        assert all(state.outage for state in timeline.link_at(t_s).values()), t_s
    for t_s in (contact.aos_s + 15.1, handover - 0.01, handover + 15.1, contact.los_s - 0.01):
        states = timeline.link_at(t_s)
        assert not states["uplink"].outage
        assert (states["uplink"].rate_bps, states["downlink"].rate_bps) == (300e3, 1e6)
        assert (states["uplink"].loss, states["downlink"].loss) == (0.001, 0.0)
    kinds = [(edge.kind, edge.detail) for edge in timeline.edges if contact.aos_s <= edge.t_s <= contact.los_s]
    first, second = (span.label for span in contact.spans)
    radio = [pair for pair in kinds if pair[1]]
    assert radio == [("aos", first), ("rate", first), ("handover", second), ("rate", second), ("los", second)]


def test_rate_scales_with_the_clock_but_delay_and_loss_do_not(timeline: Timeline) -> None:
    t_s = timeline.contacts[2].max_elevation_s
    real, fast = timeline.link_at(t_s), timeline.link_at(t_s, rate_scale=60.0)
    assert fast["uplink"].rate_bps == 18e6
    assert replace(fast["uplink"], rate_bps=300e3) == real["uplink"]


def test_delay_is_the_range_within_a_microsecond_and_continuous(timeline: Timeline) -> None:
    ephemeris = Ephemeris(ENVIRONMENT.orbit, START)
    by_name = {station.name: station for station in STATIONS}
    for contact in timeline.contacts:
        for span in contact.spans:
            t_s = np.linspace(span.start_s + 15.001, span.end_s - 1e-3, 1_000)
            truth = ephemeris.look(by_name[span.label], t_s).range_m / SPEED_OF_LIGHT_M_S + 0.001
            ours = np.array([timeline.link_at(t)["downlink"].delay_s for t in t_s])
            assert np.abs(ours - truth).max() < 1e-7
            assert np.abs(np.diff(ours) / np.diff(t_s)).max() < 25e-6  # the physical drift: no jump hides in it
            assert (ours > 0.0015).all()
            assert (ours < 0.0095).all()
            # what goes up meets the satellite where it is by then
            reached = ephemeris.look(by_name[span.label], t_s + truth).range_m / SPEED_OF_LIGHT_M_S + 0.001
            up = np.array([timeline.link_at(t)["uplink"].delay_s for t in t_s])
            assert np.abs(up - reached).max() < np.abs(up - truth).max() < 2.5e-7
            assert np.abs(up - reached).max() < 8e-8


def test_contacts_and_edges_can_be_asked_for(timeline: Timeline) -> None:
    first, second = timeline.contacts[:2]
    assert timeline.contact_at(first.aos_s - 1) is None
    assert timeline.contact_at(first.aos_s) is first
    assert timeline.contact_at(first.los_s) is None
    assert timeline.next_contact(0.0) is first
    assert timeline.next_contact(first.aos_s) is second
    assert timeline.next_contact(1e9) is None
    edge = timeline.next_edge(first.aos_s, {"los"})
    assert edge == Edge(first.los_s, "los", first.spans[-1].label)
    assert timeline.next_edge(-1.0) == timeline.edges[0]
    assert timeline.next_edge(1e9) is None
    with pytest.raises(UsageError, match="unknown edge kind"):
        timeline.next_edge(0.0, {"sunset"})


def test_lookups_are_fast_enough_for_the_loop(timeline: Timeline) -> None:
    t_s = timeline.contacts[2].max_elevation_s
    for call in (lambda: timeline.link_at(t_s, 60.0), lambda: timeline.sunlit_at(t_s)):
        best = min(timeit.repeat(call, number=200, repeat=7)) / 200
        assert best < 50e-6


def test_same_inputs_same_hash_and_any_change_another(timeline: Timeline) -> None:
    again = compile_timeline(MissionEnvironment.from_dict(ENVIRONMENT.as_dict()))
    assert again.hash == timeline.hash
    whole = replace(ENVIRONMENT, duration_s=86_400, start=START.astimezone(timezone(timedelta(hours=8))))
    assert compile_timeline(whole).hash == timeline.hash
    hashes = {timeline.hash}
    for change in (
        {"seed": 1},
        {"duration_s": 86_401.0},
        {"start": START + timedelta(seconds=1)},
        {"stations": STATIONS[:2]},
        {"link": replace(ENVIRONMENT.link, uplink=Channel(300_001.0, loss=0.001))},
        {"power": None},
    ):
        hashes.add(compile_timeline(replace(ENVIRONMENT, **change)).hash)  # type: ignore[arg-type]
    assert len(hashes) == 7


def test_hash_ignores_the_last_bits_but_sees_a_changed_result(timeline: Timeline) -> None:
    rng = np.random.default_rng(3)

    def rebuilt(scale: float, edge_s: float = 0.0) -> Timeline:
        columns = {
            name: getattr(timeline, name) * (1 + scale * rng.uniform(-1, 1, getattr(timeline, name).shape))
            for name in COLUMNS
        }
        edges = tuple(replace(edge, t_s=edge.t_s + edge_s) for edge in timeline.edges)
        return replace(timeline, edges=edges, **columns)

    assert rebuilt(1e-15).hash == timeline.hash
    assert rebuilt(0.0, edge_s=1e-9).hash == timeline.hash
    assert rebuilt(1e-3).hash != timeline.hash
    assert rebuilt(0.0, edge_s=1e-3).hash != timeline.hash


def test_a_saved_timeline_loads_equal(timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "mission.npz"
    timeline_file.save(timeline, path)
    loaded = timeline_file.load(path)
    assert loaded.hash == timeline.hash
    assert loaded.environment == ENVIRONMENT
    assert (loaded.edges, loaded.contacts, loaded.eclipses) == (timeline.edges, timeline.contacts, timeline.eclipses)
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(timeline, name))
    t_s = timeline.contacts[0].max_elevation_s
    assert loaded.link_at(t_s) == timeline.link_at(t_s)


def test_a_file_that_is_not_a_timeline_is_refused(timeline: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "mission.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(UsageError, match="not a timeline"):
        timeline_file.load(path)
    timeline_file.save(timeline, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UsageError, match="not a timeline"):
        timeline_file.load(path)
    with pytest.raises(UsageError, match="not a timeline"):
        timeline_file.load(tmp_path / "absent.npz")
    with np.load(_saved(timeline, path)) as file:
        content = dict(file)
    content["sunlit_fraction"] = 1.0 - content["sunlit_fraction"]
    with path.open("wb") as out:
        np.savez(out, **content)
    with pytest.raises(UsageError, match="altered"):
        timeline_file.load(path)


def _saved(timeline: Timeline, path: Path) -> Path:
    timeline_file.save(timeline, path)
    return path


def test_csv_has_one_row_per_sample(timeline: Timeline) -> None:
    rows = list(csv.DictReader(io.StringIO(exports.timeline_csv(timeline))))
    assert len(rows) == len(timeline.t_s)
    assert rows[0]["utc"] == "2026-01-01T00:00:00.000Z"
    assert rows[0]["delay_s"] == ""
    in_contact = [row for row in rows if row["delay_s"]]
    assert all(float(row["elevation_deg"]) > 4.99 for row in in_contact)
    assert float(rows[-1]["t_s"]) == 86_400.0


def test_a_mission_without_stations_or_power_compiles() -> None:
    bare = compile_timeline(replace(ENVIRONMENT, stations=(), power=None, duration_s=12_000.0))
    assert bare.contacts == ()
    assert bare.link_at(6_000.0)["uplink"].outage
    assert bare.array_power_w(8_000.0) == 0.0
    assert bare.sunlit_at(8_000.0) == 1.0
    with pytest.raises(UsageError, match="no power section"):
        eclipse_budget(bare)


def test_highest_handover_reaches_the_plan() -> None:
    link = replace(ENVIRONMENT.link, handover="highest")
    climbing = compile_timeline(replace(ENVIRONMENT, link=link, duration_s=20_000.0))
    assert any(edge.kind == "handover" for edge in climbing.edges)


@pytest.mark.parametrize("change", [{"duration_s": 0.0}, {"step_s": 0.0}, {"start": datetime(2026, 1, 1)}])
def test_impossible_environments_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        replace(ENVIRONMENT, **change)  # type: ignore[arg-type]


# -- the energy budget


def test_the_demo_battery_carries_idle_but_not_full(timeline: Timeline) -> None:
    idle, full, usable = eclipse_budget(timeline)
    assert eclipse_budget(ENVIRONMENT) == (idle, full, usable)
    dark_h = 2_063.2 / 3_600  # umbra and half of each penumbra
    assert idle == pytest.approx(11 * dark_h, rel=5e-3)
    assert full == pytest.approx(21 * dark_h, rel=5e-3)
    assert idle * 1.2 < usable < full * 0.8
    assert usable == pytest.approx(9.0, abs=0.15)


def test_usable_energy_without_shedding_is_nearly_the_batterys_content() -> None:
    power = replace(POWER, shed=None, eps=replace(POWER.eps, resistance_ohm=0.0))
    content_wh = 0.70 * 4 * (0.1 * 3.2 + 0.2 * 3.5 + 0.2 * 3.65 + 0.25 * 3.8 + 0.25 * 4.05)
    assert usable_wh(power, 15.0) == pytest.approx(content_wh, rel=1e-3)
    assert usable_wh(POWER, 15.0) < usable_wh(POWER, 1.0) < content_wh


def test_idle_survives_every_eclipse_and_recharges(timeline: Timeline) -> None:
    flight = fly(timeline, POWER.board_idle_w)
    assert flight.shed_s is None
    for eclipse in timeline.eclipses:
        if eclipse.penumbra_entry_s > 0:
            soc = float(np.interp(eclipse.penumbra_entry_s, flight.t_s, flight.soc))
            assert soc == pytest.approx(1.0, abs=0.01)
    assert abs(flight.model.ledger.residual_j) < 1e-6 * flight.model.ledger.throughput_j


def test_full_load_reaches_the_shed_voltage_inside_the_eclipse(timeline: Timeline) -> None:
    eclipse = timeline.eclipses[5]
    start_s = eclipse.penumbra_entry_s - 60
    flight = fly(timeline, 15.0, start_s=start_s, end_s=eclipse.penumbra_exit_s)
    assert flight.shed_s is not None
    assert eclipse.penumbra_entry_s + 1_300 < flight.shed_s < eclipse.penumbra_exit_s - 300
    later = fly(timeline, lambda t: 5.0 if t < start_s + 700 else 15.0, start_s=start_s, end_s=eclipse.penumbra_exit_s)
    assert later.shed_s is None or later.shed_s > flight.shed_s + 300


def test_shedding_leaves_the_platform_alive_and_comes_back(timeline: Timeline) -> None:
    forecast = shed_forecast(timeline)
    assert forecast is not None
    assert forecast.shed_s == pytest.approx(1_555, abs=10)
    assert not forecast.platform_lost
    assert 0.01 < forecast.lowest_soc < 0.05
    assert forecast.restored_s is not None
    assert 2_072 + 300 < forecast.restored_s < 2_072 + 600
    idle = shed_forecast(ENVIRONMENT, full_w=5.0)
    assert idle is not None
    assert idle.shed_s is None


def test_a_shed_voltage_that_is_too_low_loses_the_platform() -> None:
    """The same usable energy behind a third of the resistance: at 13.2 V hardly anything is left for the platform."""
    power = replace(POWER, eps=replace(POWER.eps, capacity_ah=0.66, resistance_ohm=0.1))
    forecast = shed_forecast(replace(ENVIRONMENT, power=power))
    assert forecast is not None
    assert forecast.platform_lost
    assert forecast.restored_s is not None
    with pytest.raises(UsageError, match="no shed section"):
        shed_forecast(replace(ENVIRONMENT, power=replace(POWER, shed=None)))


def test_balance_says_how_many_watt_hours_are_missing(timeline: Timeline) -> None:
    idle = orbit_balance(timeline)
    assert idle.closes
    assert idle.eclipse_s == pytest.approx(2_072.9, abs=0.2)
    assert idle.available_wh == pytest.approx(35.53 * 0.97 * (5_724.1 - 2_063.2) / 3_600, rel=2e-3)
    small = replace(ENVIRONMENT, power=replace(POWER, array=ArrayConfig(20.0, 0.85, 0.95)))
    short = orbit_balance(small)
    assert not short.closes
    assert f"{-short.margin_wh:.2f} Wh short" in short.message
    caution = balance_caution(small)
    assert caution is not None
    assert caution.code == "energy-balance"
    assert f"{-short.margin_wh:.2f} Wh short" in caution.message
    assert balance_caution(timeline) is None


def test_the_balance_agrees_with_the_model_flown() -> None:
    """An array that just closes keeps the charge over a day; one Wh per orbit less loses it."""
    low, high = 10.0, 44.0
    for _ in range(30):
        bol = 0.5 * (low + high)
        power = replace(POWER, array=ArrayConfig(bol, 0.85, 0.95))
        low, high = (low, bol) if orbit_balance(replace(ENVIRONMENT, power=power)).closes else (bol, high)
    ends = []
    for factor in (0.97, 1.03):
        power = replace(POWER, array=ArrayConfig(high * factor, 0.85, 0.95))
        short = compile_timeline(replace(ENVIRONMENT, power=power, stations=(), step_s=30.0, duration_s=30_000.0))
        entries = [e.penumbra_entry_s for e in short.eclipses if e.penumbra_entry_s > 0]
        flight = fly(short, POWER.board_idle_w, initial_soc=0.9)
        soc = np.interp(entries, flight.t_s, flight.soc)
        ends.append(soc[-1] - soc[0])
    assert ends[0] < -0.05
    assert ends[1] > -0.02


def test_no_eclipse_needs_no_battery() -> None:
    orbit = Orbit.sso(700, START, ltan_h=18.0)
    sunny = replace(ENVIRONMENT, orbit=orbit, start=datetime(2026, 3, 20, tzinfo=UTC), duration_s=12_000.0)
    budget = eclipse_budget(sunny)
    assert (budget.idle_wh, budget.full_wh) == (0.0, 0.0)
    assert budget.usable_wh > 8
    assert "0.0 min eclipse" in orbit_balance(sunny).message
