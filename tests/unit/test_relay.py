"""A mission whose satellite is reached through a ring: contacts, delay, reroutes and rates of its timeline."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml

from hil.cli import run
from hil.errors import UsageError
from hil.inventory import load_mission
from hil.inventory.environment import constellation, environment
from hil.mission import timeline_file
from hil.mission.compile import compile_timeline
from hil.mission.constellation import Constellation, Fleet
from hil.mission.environment import MissionEnvironment
from hil.mission.frames import Station
from hil.mission.isl import IslConfig, IslOutage
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.radio import LinkBudget, LinkEnvironment
from hil.mission.relay import Relay, RelayPlan
from hil.mission.timeline import Timeline

FIXTURES = Path(__file__).parents[2] / "fixtures"
TLE = (FIXTURES / "tle" / "ref_qwen3_535_ltdn1030.tle").read_text()
START = datetime(2026, 1, 1, tzinfo=UTC)
STATIONS = (Station("miyun", 40.45, 116.86), Station("kashgar", 39.50, 75.93), Station("sanya", 18.31, 109.31))
LIGHT_KM_S = 299_792.458
RING = Constellation.ring(Orbit.from_tle(TLE), 12)
HOURS = 8.0


def ring_environment(**changes: object) -> MissionEnvironment:
    relay = Relay(RING, IslConfig(2e6, acquisition_s=15.0, outages=(IslOutage(7, 10_500.0, 11_100.0, other=6),)), 5)
    values = {
        "name": "ring",
        "orbit": relay.orbit,
        "stations": STATIONS,
        "start": START,
        "duration_s": HOURS * 3_600.0,
        "link": LinkEnvironment.fixed(300e3, 8e6, acquisition_s=15.0, processing_s=1e-3),
        "relay": relay,
    }
    return MissionEnvironment(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    return compile_timeline(ring_environment())


@pytest.fixture(scope="module")
def plan() -> RelayPlan:
    relay = ring_environment().relay
    assert relay is not None
    return relay.plan(STATIONS, START, HOURS * 3_600.0)


def test_delay_is_that_of_the_way(timeline: Timeline, plan: RelayPlan) -> None:
    """From scratch: SGP4 of every satellite on the way, straight lines, the speed of light."""
    longest = 0
    for span in plan.spans[::3]:
        t_s = 0.5 * (span.start_s + span.end_s)
        state = timeline.link_at(t_s)["uplink"]
        if state.outage:
            continue
        tracks = [Ephemeris(RING.orbits[k], START) for k in span.path]
        station = next(item for item in STATIONS if item.name == span.station)
        leg_km = tracks[0].look(station, np.array([t_s])).range_m[0] / 1e3
        where = [track.teme_km(np.array([t_s]))[0][0] for track in tracks]
        legs_km = sum(float(np.linalg.norm(a - b)) for a, b in pairwise(where))
        assert state.delay_s == pytest.approx((leg_km + legs_km) / LIGHT_KM_S + 1e-3, abs=1e-6)
        longest = max(longest, len(span.path))
    assert longest >= 4


def test_the_ring_is_reached_far_longer_than_the_satellite_alone(timeline: Timeline) -> None:
    alone = compile_timeline(ring_environment(relay=None))
    through, direct = (sum(item.duration_s for item in each.contacts) for each in (timeline, alone))
    assert through > 3 * direct > 0
    # eclipses belong to the satellite that carries the board, whichever way its bits take
    assert timeline.eclipses == alone.eclipses


def test_silence_after_every_change_of_the_access_satellite(timeline: Timeline, plan: RelayPlan) -> None:
    kinds = [edge.kind for edge in timeline.edges]
    assert kinds.count("handover") >= 5
    for edge in timeline.edges:
        if edge.kind in {"aos", "handover"} and timeline.link_at(edge.t_s + 20.0)["uplink"].rate_bps:
            assert timeline.link_at(edge.t_s + 1e-3)["uplink"].outage
            assert timeline.link_at(edge.t_s + 14.9)["uplink"].outage
            assert not timeline.link_at(edge.t_s + 15.1)["uplink"].outage


def test_a_change_of_the_way_between_satellites_jumps_and_does_not_silence(timeline: Timeline, plan: RelayPlan) -> None:
    reroutes = [edge.t_s for edge in timeline.edges if edge.kind == "reroute"]
    assert reroutes == list(plan.reroutes)
    assert reroutes, "the outage of link 6-7 must send traffic the other way round"
    for t_s in reroutes:
        before, after = (timeline.link_at(t_s + shift)["uplink"] for shift in (-1e-6, 0.0))
        if before.outage:
            continue
        assert not after.outage
        assert abs(after.delay_s - before.delay_s) > 1e-3
        exact = plan.isl_delay_s(np.array([t_s - 1e-6, t_s]))
        assert after.delay_s - before.delay_s == pytest.approx(exact[1] - exact[0], abs=1e-7)


def test_delay_is_continuous_between_edges(timeline: Timeline) -> None:
    instants = [edge.t_s for edge in timeline.edges]
    checked = 0
    for low, high in pairwise(instants):
        if timeline.link_at(low)["uplink"].outage or high - low < 5:
            continue
        delay = np.array([timeline.link_at(t)["uplink"].delay_s for t in np.linspace(low, high - 1e-6, 200)])
        drift = np.abs(np.diff(delay)) / ((high - low) / 199)
        assert drift.max() < 60e-6  # 25 us/s on the ground leg; the links between satellites breathe slowly
        checked += 1
    assert checked > 10


def test_rates_never_exceed_the_links_between_satellites(timeline: Timeline) -> None:
    assert timeline.uplink_bps.max() == 300e3
    assert timeline.downlink_bps.max() == 2e6  # 8 Mbit/s on the radio leg, 2 Mbit/s in the ring


def test_a_budget_looks_at_the_access_satellite(plan: RelayPlan) -> None:
    budget = LinkBudget(8.2e9, eirp_dbw=10.0, g_over_t_db_k=20.0, bandwidth_hz=20e6)
    base = ring_environment()
    link, relay = base.link, base.relay
    assert relay is not None
    relay = replace(relay, isl=replace(relay.isl, rate_bps=1e9))  # wider than any mode of the ladder
    downlink = replace(link.downlink, rate_bps=None, budget=budget)
    wide = replace(base, relay=relay, link=replace(link, downlink=downlink))
    timeline = compile_timeline(wide)
    steps = [edge for edge in timeline.edges if edge.kind == "rate" and "downlink" in edge.detail]
    assert len(steps) > 10
    for edge in steps[::5]:
        t_s = np.array([edge.t_s])
        span = next(s for s in plan.spans if s.start_s <= edge.t_s < s.end_s)
        station = next(item for item in STATIONS if item.name == span.station)
        seen = Ephemeris(RING.orbits[span.path[0]], START).look(station, t_s)
        signal_db = float(budget.es_n0_db(seen.range_m, seen.elevation_deg)[0])
        later = Ephemeris(RING.orbits[span.path[0]], START).look(station, t_s + 1.0)
        drift_db = float(budget.es_n0_db(later.range_m, later.elevation_deg)[0]) - signal_db
        before, after = (timeline.link_at(edge.t_s + shift)["downlink"].rate_bps for shift in (-0.01, 0.01))
        assert (after > before) == (drift_db > 0)


def test_timeline_with_a_relay_survives_files_and_json(timeline: Timeline, tmp_path: Path) -> None:
    timeline_file.save(timeline, tmp_path / "ring.npz")
    again = timeline_file.load(tmp_path / "ring.npz")
    assert again.hash == timeline.hash
    assert again.environment == timeline.environment
    at = timeline.contacts[0].aos_s + 30.0
    assert again.link_at(at) == timeline.link_at(at)
    relay = timeline.environment.relay
    assert relay is not None
    assert Relay.from_dict(json.loads(json.dumps(relay.as_dict()))) == relay


def test_the_same_ring_gives_the_same_hash(timeline: Timeline) -> None:
    assert compile_timeline(ring_environment()).hash == timeline.hash
    other = ring_environment()
    assert other.relay is not None
    other = replace(other, relay=replace(other.relay, isl=replace(other.relay.isl, processing_s=1e-3)))
    assert compile_timeline(other).hash != timeline.hash


def test_the_hash_survives_the_last_bits_of_another_machine(
    timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(7)
    exact_fleet, exact_orbit = Fleet.teme_km, Orbit.teme_km

    def shaken(values: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        position, velocity = (item * (1 + 2e-15 * rng.uniform(-1, 1, item.shape)) for item in values)
        return position, velocity

    monkeypatch.setattr(Fleet, "teme_km", lambda self, t_s: shaken(exact_fleet(self, t_s)))
    monkeypatch.setattr(Orbit, "teme_km", lambda self, day, fraction: shaken(exact_orbit(self, day, fraction)))
    again = compile_timeline(ring_environment())
    assert not np.array_equal(again.contact_range_m, timeline.contact_range_m)
    assert again.hash == timeline.hash


def test_the_orbit_must_be_the_targets() -> None:
    with pytest.raises(UsageError, match="not that of the satellite"):
        ring_environment(orbit=RING.orbits[4])
    with pytest.raises(UsageError, match="no satellite 12"):
        Relay(RING, IslConfig(1e9), 12)


def mission_file(tmp_path: Path, section: dict[str, object], **changes: object) -> Path:
    data = yaml.safe_load((FIXTURES / "missions" / "star-compute-qwen3.yaml").read_text())
    data["orbit"] = {"tle": str(FIXTURES / "tle" / "ref_qwen3_535_ltdn1030.tle")}
    data.update(duration_h=6, constellation=section, **changes)
    path = tmp_path / "ring.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_a_mission_file_flies_on_its_target(tmp_path: Path) -> None:
    from hil.inventory import load_board_type

    isl = {"rate_bps": 1e9, "acquisition_s": 15, "outages": [{"satellite": 3, "start_h": 1, "duration_h": 0.5}]}
    path = mission_file(tmp_path, {"satellites_per_plane": 12, "target": 5, "isl": isl})
    board = load_board_type(FIXTURES.parent / "boards" / "virtual-arm64.yaml")
    made = environment(load_mission(path), board)
    assert made.relay is not None
    assert made.relay.isl.outages == (IslOutage(3, 3_600.0, 5_400.0),)
    assert made.orbit == made.relay.constellation.orbits[5]
    assert made.orbit.mean_anomaly_deg == pytest.approx(150.0, abs=1e-6)
    assert len(compile_timeline(made).relay_t_s) > 1_000
    # without a target the board flies on the mission's own orbit and is reached directly
    path = mission_file(tmp_path, {"satellites_per_plane": 12, "isl": isl})
    assert environment(load_mission(path), board).relay is None
    network = constellation(load_mission(path))
    assert network is not None
    assert len(network.constellation) == 12
    assert constellation(load_mission(mission_file(tmp_path, {"satellites_per_plane": 12}))) is None


def test_a_mission_file_names_a_cluster(tmp_path: Path) -> None:
    cluster = str(FIXTURES / "omm" / "suncatcher-cluster-81.json")
    path = mission_file(tmp_path, {"omm": cluster, "isl": {"topology": "mesh", "rate_bps": 8e11, "max_range_km": 0.25}})
    network = constellation(load_mission(path))
    assert network is not None
    assert len(network.constellation) == 81


def test_a_cluster_years_from_the_mission_is_refused(tmp_path: Path) -> None:
    cluster = str(FIXTURES / "omm" / "suncatcher-cluster-81.json")
    section = {"omm": cluster, "isl": {"topology": "mesh", "rate_bps": 8e11, "max_range_km": 0.25}}
    path = mission_file(tmp_path, section, start="2040-01-01T00:00:00Z")
    data = yaml.safe_load(path.read_text())
    data["orbit"] = {"sso": {"altitude_km": 650, "ltan_h": 6}}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(UsageError, match=r"ring\.yaml:\d+: the elements of x\+0y\+0 .* years before"):
        constellation(load_mission(path))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"satellites_per_plane": 6, "isl": {"rate_bps": 1e9}}, "471 km below the limit of 80 km"),
        ({"planes": 3, "satellites_per_plane": 12, "phasing": 3}, "phasing must be below planes (3)"),
        ({"satellites_per_plane": 12, "target": 12, "isl": {"rate_bps": 1e9}}, "below the number of satellites (12)"),
        ({"satellites_per_plane": 12, "target": 1}, "add isl"),
        ({"satellites_per_plane": 12, "omm": "x.json"}, "exactly one of satellites_per_plane, omm"),
        ({"omm": "no.json", "isl": {"rate_bps": 1e9}}, "no.json cannot be read"),
        ({"satellites_per_plane": 12, "isl": {"rate_bps": 1e9, "topology": "mesh"}}, "a mesh needs max_range_km"),
        (
            {"satellites_per_plane": 12, "isl": {"rate_bps": 1e9, "outages": [{"satellite": 40}]}},
            "outage of satellite 40, but there are 12",
        ),
    ],
)
def test_a_mission_file_that_cannot_be_names_its_line(tmp_path: Path, section: dict[str, object], message: str) -> None:
    path = mission_file(tmp_path, section)
    with pytest.raises(UsageError) as caught:
        constellation(load_mission(path))
    assert message in str(caught.value)
    assert f"{path}:" in str(caught.value)
    line = int(str(caught.value).split(f"{path}:")[1].split(":")[0])
    text = path.read_text().splitlines()
    assert line >= text.index("constellation:") + 1


def routes_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["mission", "routes", *arguments, "--json"]) == 0
    return cast("dict[str, Any]", json.loads(capsys.readouterr().out))


def test_routes_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(mission_file(tmp_path, {"satellites_per_plane": 12, "isl": {"rate_bps": 1e9}}))
    told = routes_json(capsys, path, "--to", "5", "--contacts")
    assert told["neighbours"] == {"neighbour_m": 3578506, "one_way_s": 0.011937, "grazing_altitude_m": 299446}
    assert len(told["satellites"]) == 12
    ways = told["to"]["ways"]
    assert ways[0]["start"].startswith("2026-01-01T02:00:00")
    assert all(way["path"][-1] == 5 and way["hops"] == len(way["path"]) for way in ways)
    assert all(0.0017 < way["delay_s_start"] < 0.09 for way in ways)
    assert {item["from"] for item in told["contacts"] if isinstance(item["from"], str)} <= {"miyun", "kashgar", "sanya"}
    assert sum(isinstance(item["from"], int) for item in told["contacts"]) == 12
    table = tmp_path / "ways.csv"
    routes_json(capsys, path, "--to", "5", "--out", str(table))
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 6 * 60 + 1
    for row in rows:
        assert int(row["hops"]) == len(row["path"].split()) == (0 if not row["delay_s"] else len(row["path"].split()))
        assert bool(row["station"]) == bool(row["delay_s"])
    assert {row["path"].split()[-1] for row in rows if row["path"]} == {"5"}
    fewer = routes_json(capsys, path, "--station", "sanya")
    assert fewer["stations"] == ["sanya"]
    assert fewer["satellites"][5]["reachable_share"] < told["satellites"][5]["reachable_share"]
    assert run(["mission", "routes", path, "--to", "5"]) == 0
    text = capsys.readouterr().out
    assert "3,579 km, 11.94 ms one way, line of sight 299 km above the Earth" in text
    assert "> 5\n" in text


def test_routes_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(mission_file(tmp_path, {"satellites_per_plane": 12, "isl": {"rate_bps": 1e9}}))
    for arguments, message in (
        ([path, "--station", "nix"], "no station nix"),
        ([path, "--to", "12"], "no satellite 12"),
        ([path, "--out", str(tmp_path / "x.csv")], "name it with --to"),
        ([path, "--to", "1", "--out", str(tmp_path / "no" / "x.csv")], "cannot write"),
        ([str(FIXTURES / "missions" / "short.yaml")], "no inter-satellite links"),
    ):
        assert run(["mission", "routes", *arguments]) == 4
        assert message in capsys.readouterr().err
