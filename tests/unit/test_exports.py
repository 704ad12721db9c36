"""A timeline's files: every format read back by a reader of its own and held against the timeline."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from bisect import bisect_right
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hil.errors import UsageError
from hil.mission import exports, timeline_file
from hil.mission.bursts import Bursts, RandomOutages
from hil.mission.compile import compile_timeline
from hil.mission.constellation import Constellation
from hil.mission.environment import MissionEnvironment, PowerEnvironment
from hil.mission.eps import EpsConfig
from hil.mission.faults import FaultPlan, FaultRate
from hil.mission.frames import Station
from hil.mission.isl import IslConfig, IslOutage
from hil.mission.orbit import Orbit
from hil.mission.radio import DIRECTIONS, Channel, LinkBudget, LinkEnvironment, LinkWindow
from hil.mission.relay import Relay
from hil.mission.solar_array import ArrayConfig, SasCurve
from hil.mission.timeline import Timeline
from hil.model import Span

TLE = (Path(__file__).parents[2] / "fixtures" / "tle" / "ref_qwen3_535_ltdn1030.tle").read_text()
START = datetime(2026, 1, 1, 2, tzinfo=UTC)
STATIONS = (Station("miyun", 40.45, 116.86), Station("kashgar", 39.50, 75.93), Station("sanya", 18.31, 109.31))
BUDGET = LinkBudget(8.2e9, eirp_dbw=10.0, g_over_t_db_k=25.0, bandwidth_hz=60e6, atmosphere_zenith_db=0.2)
ENVIRONMENT = MissionEnvironment(
    name="exports",
    orbit=Orbit.from_tle(TLE),
    stations=STATIONS,
    start=START,
    duration_s=30_000.0,
    link=LinkEnvironment(
        Channel(300e3, loss=0.001),
        Channel(budget=BUDGET, bursts=Bursts(60.0, 1.0)),
        acquisition_s=15.0,
        jitter_s=1e-4,
        processing_s=0.002,
        outages=(Span(2_000.0, 2_500.5),),
        random_outages=RandomOutages(50.0, 200.0),
    ),
    seed=3,
    faults=FaultPlan((FaultRate("sefi", 3.0),), acceleration=2_000.0),
    power=PowerEnvironment(ArrayConfig.of_curve(SasCurve(22.0, 2.1, 19.0, 2.0)), EpsConfig(0.7)),
)


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    return compile_timeline(ENVIRONMENT)


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_suffix_decides_and_the_longest_wins(timeline: Timeline, tmp_path: Path) -> None:
    for suffix in exports.SUFFIXES:
        path = tmp_path / f"day{suffix}"
        exports.write(timeline, path)
        assert path.stat().st_size > 500, suffix
    assert timeline_file.load(tmp_path / "day.npz").hash == timeline.hash
    assert (tmp_path / "day.csv").read_text() == exports.timeline_csv(timeline)
    assert (tmp_path / "day.edges.csv").read_text() == exports.edges_csv(timeline)
    with pytest.raises(UsageError, match="unknown format") as caught:
        exports.write(timeline, tmp_path / "day.parquet")
    assert ".ion.contactplan" in str(caught.value.hint)
    with pytest.raises(UsageError, match="cannot write"):
        exports.write(timeline, tmp_path / "absent" / "day.csv")


def test_edges_and_faults_are_rows_in_order(timeline: Timeline) -> None:
    rows = table(exports.edges_csv(timeline))
    assert len(timeline.faults) > 2
    assert len(rows) == len(timeline.edges) + len(timeline.faults)
    times = [float(row["t_s"]) for row in rows]
    assert times == sorted(times)
    assert {row["kind"] for row in rows} >= {"aos", "los", "rate", "burst_start", "outage_end", "fault"}
    assert sum(row["kind"] == "fault" and row["detail"].startswith("sefi") for row in rows) == len(timeline.faults)


def test_the_columns_hold_the_rates(timeline: Timeline) -> None:
    rows = table(exports.timeline_csv(timeline))
    for row in rows[:: len(rows) // 500]:
        t_s = float(row["t_s"])
        states = timeline.link_at(t_s + 1e-6)  # written to the microsecond: past the edge for sure
        for direction in DIRECTIONS:
            expected = 0.0 if states[direction].outage else states[direction].rate_bps
            assert float(row[f"{direction}_bps"]) == pytest.approx(expected, rel=1e-8), t_s


def test_the_trace_says_what_link_at_says(timeline: Timeline) -> None:
    rows = table(exports.trace_csv(timeline))
    times = [float(row["time_s"]) for row in rows]
    assert times[0] == 0.0
    assert times == sorted(times)
    index = 0
    for t_s in (k * 7.77 + 0.001 for k in range(3_800)):
        while index + 1 < len(times) and times[index + 1] <= t_s:
            index += 1
        row, states = rows[index], timeline.link_at(t_s)
        for direction in DIRECTIONS:
            state = states[direction]
            assert row[f"{direction}_up"] == str(int(not state.outage))
            assert float(row[f"{direction}_loss"]) == pytest.approx(state.effective_loss)
            assert float(row[f"{direction}_rate_bps"]) == pytest.approx(state.rate_bps, abs=1e-3)
            assert float(row[f"{direction}_delay_s"]) == pytest.approx(state.delay_s, abs=25e-6)
            assert float(row[f"{direction}_jitter_s"]) == state.jitter_s


def test_the_trace_of_a_relayed_link_jumps_where_its_way_does() -> None:
    relay = Relay(
        Constellation.ring(Orbit.from_tle(TLE), 12),
        IslConfig(2e6, outages=(IslOutage(7, 10_500.0, 11_100.0, other=6),)),
        5,
    )
    link = LinkEnvironment.fixed(300e3, 1e6, acquisition_s=15.0)
    ring = compile_timeline(
        replace(
            ENVIRONMENT, orbit=relay.orbit, relay=relay, link=link, start=datetime(2026, 1, 1, tzinfo=UTC), faults=None
        )
    )
    jumps = [edge.t_s for edge in ring.edges if edge.kind == "reroute"]
    assert jumps
    rows = table(exports.trace_csv(ring))
    times = [float(row["time_s"]) for row in rows]
    for jump_s in jumps:
        for t_s in (jump_s - 2e-6, jump_s + 2e-6):
            row = rows[bisect_right(times, t_s) - 1]
            state = ring.link_at(t_s)["uplink"]
            assert float(row["uplink_delay_s"]) == pytest.approx(state.delay_s, abs=25e-6)
            assert row["uplink_up"] == str(int(not state.outage))
    assert re.search(r"(?m)^a range \+\d+ \+\d+ 1 2 1$", exports.ion_contact_plan(ring))


def test_the_kernel_trace_is_in_its_units_and_lasts_as_long_as_the_mission(timeline: Timeline) -> None:
    for direction in DIRECTIONS:
        text = exports.theaterq(timeline, direction)
        rows = [[int(cell) for cell in line.split(",")] for line in text.splitlines() if line[0].isdigit()]
        assert sum(row[0] for row in rows) == round(timeline.duration_s * 1e6)
        at_us = 0
        carried = 0.0
        for keep_us, latency_ns, jitter_ns, rate_bps, loss, limit, dup, dup_delay, route in rows:
            assert keep_us > 0
            assert (dup, dup_delay, route) == (0, 0, 1)
            state = timeline.link_at((at_us + 1) / 1e6)[direction]
            assert latency_ns == pytest.approx(state.delay_s * 1e9, abs=100)
            assert jitter_ns == round(state.jitter_s * 1e9)
            assert loss == round(state.effective_loss * (2**32 - 1))
            assert limit >= 256
            if loss < 2**32 - 1:
                assert limit > rate_bps * latency_ns * 1e-9 / (8 * 1514)
                carried += rate_bps * keep_us / 1e6
            at_us += keep_us
        assert carried == pytest.approx(timeline.capacity_bits(direction, 0.0, timeline.duration_s), rel=1e-6)


def test_the_array_simulators_curve_follows_the_light(timeline: Timeline) -> None:
    rows = table(exports.sas_csv(timeline))
    assert len(rows) == len(timeline.t_s)
    full = max(rows, key=lambda row: float(row["isc_a"]))
    assert (float(full["voc_v"]), float(full["vmp_v"])) == (22.0, 19.0)
    dark = [row for row, sunlit in zip(rows, timeline.sunlit_fraction, strict=True) if sunlit == 0.0]
    assert dark
    assert all(float(row["isc_a"]) == 0.0 for row in dark)
    with pytest.raises(UsageError, match="no power section"):
        exports.sas_csv(replace(timeline, environment=replace(ENVIRONMENT, power=None)))


def test_a_contact_plan_knows_nothing_of_chance(timeline: Timeline) -> None:
    calm = replace(ENVIRONMENT.link, random_outages=None, downlink=replace(ENVIRONMENT.link.downlink, bursts=None))
    known = compile_timeline(replace(ENVIRONMENT, link=calm))
    assert exports.contact_plan(timeline) == exports.contact_plan(known)
    assert not [p for p in exports.contact_plan(timeline) if p.start_s < 2_500.5 and p.end_s > 2_000.0]
    for item in exports.contact_plan(timeline):
        for t_s in (item.start_s, item.end_s - 1e-6):
            state = known.link_at(t_s)[item.direction]
            assert not state.outage
            assert state.rate_bps == item.rate_bps
    planned = sum((p.end_s - p.start_s) * p.rate_bps for p in exports.contact_plan(timeline) if p.direction == "uplink")
    real = known.capacity_bits("uplink", 0.0, known.duration_s)
    assert 0.99 * real < planned <= real


def test_the_ion_plan_is_whole_seconds_bytes_and_never_overlaps(timeline: Timeline) -> None:
    text = exports.ion_contact_plan(timeline)
    assert "# @ 2026/01/01-02:00:00" in text
    assert "# node 2: miyun" in text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    busy: dict[tuple[str, str], int] = {}
    bits = 0
    for line in (line for line in lines if line.startswith("a contact")):
        match = re.fullmatch(r"a contact \+(\d+) \+(\d+) ([1-4]) ([1-4]) (\d+)", line)
        assert match, line
        start, end, rate = int(match[1]), int(match[2]), int(match[5])
        pair = (match[3], match[4])
        assert "1" in pair
        assert start < end
        assert start >= busy.get(pair, 0), "ION does not take overlapping contacts"
        busy[pair] = end
        bits += 8 * rate * (end - start) if match[4] == "1" else 0
    assert bits > 0
    ranges = [line for line in lines if line.startswith("a range")]
    assert len(ranges) == sum(len(contact.spans) for contact in timeline.contacts)
    assert all(re.fullmatch(r"a range \+\d+ \+\d+ 1 [2-4] 1", line) for line in ranges)
    assert len(lines) == len(ranges) + sum(line.startswith("a contact") for line in lines)
    uplink = [line for line in lines if re.fullmatch(r"a contact \S+ \S+ [2-4] 1 37500", line)]
    assert len(uplink) == sum(p.direction == "uplink" for p in exports.contact_plan(timeline))


def test_the_ud3tn_messages_are_dtn_seconds_and_each_end_is_told_its_own_direction(timeline: Timeline) -> None:
    told = json.loads(exports.ud3tn_json(timeline))
    plan = exports.contact_plan(timeline)
    assert {item["configure"] for item in told} == {"ipn:1.0", "ipn:2.0", "ipn:3.0", "ipn:4.0"}
    found = []
    for item in told:
        message = item["message"]
        assert message["command"] == "ADD"
        assert (item["configure"] == "ipn:1.0") != (message["node_id"] == "ipn:1.0")
        direction = "downlink" if item["configure"] == "ipn:1.0" else "uplink"
        node = message["node_id"] if direction == "downlink" else item["configure"]
        station = STATIONS[int(node[4]) - 2].name
        for contact in message["contact_list"]:
            # 2026-01-01T02:00:00Z is 26 years with 7 leap days after 2000-01-01
            start = contact["start"] - (26 * 365 + 7) * 86_400 - 7_200
            end = start + contact["end"] - contact["start"]
            found.append((start, end, station, direction, contact["data_rate"]))
    assert sorted(found) == sorted(
        (p.start_s, p.end_s, p.station, p.direction, math.floor(p.rate_bps / 8)) for p in plan
    )


def test_a_window_is_a_contact_with_one_far_node() -> None:
    link = LinkEnvironment(Channel(2e6), Channel(2e6), window=LinkWindow(7_200.0, 20_000.0, 1.3))
    text = exports.ion_contact_plan(compile_timeline(replace(ENVIRONMENT, link=link, stations=())))
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        "a contact +0 +7200 1 2 250000",
        "a contact +0 +7200 2 1 250000",
        "a contact +20000 +27200 1 2 250000",
        "a contact +20000 +27200 2 1 250000",
        "a range +0 +7200 1 2 2",
        "a range +20000 +27200 1 2 2",
    ]
