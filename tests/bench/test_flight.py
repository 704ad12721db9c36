"""One short flight of the whole mission, shared by all tests here: watched while it flies, judged when it is over.

The first tests must come first: they look at the flight under way. The others wait for its end and read its record with
SQL and the standard library, not with the code that wrote or judged it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from contextlib import closing
from html.parser import HTMLParser
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import prometheus
import pytest
import yaml
from benches import HIL, SHORT, Airborne, Flown, ask_supply, assert_off, has_netem, is_on, until

from hil import dashboards
from hil.bench.journal import read_events
from hil.client import attach
from hil.errors import BenchError
from hil.mission import timeline_file
from hil.virtual import supervisor
from hil.virtual.config import virtual_bench

# The first test that needs the end of the flight waits for it.
pytestmark = [pytest.mark.xdist_group("flight"), pytest.mark.timeout(600)]

BOOT_S = 90.0
BANNER = rb"U-Boot 20\d\d\.\d\d"


# ---------------------------------------------------------------------------------------------- while it is under way
@pytest.fixture
def aloft(airborne: Airborne) -> Airborne:
    """The flight when every part of it runs, the board too."""
    airborne.fly.reaches("upload", BOOT_S)
    return airborne


def descendants(*roots: int) -> set[int]:
    """Processes and all that they started, by /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def test_every_listener_is_on_loopback_or_a_private_unix_socket(aloft: Airborne) -> None:
    bench = aloft.bench
    with attach(bench, start=False) as daemon:
        status = daemon.status()
    virtual = supervisor.status(virtual_bench(bench))
    ours = descendants(aloft.fly.process.pid, status["pid"], virtual["pid"])
    parts = {status["deadman"]["pid"], virtual["boards"]["vb1"]["pid"], virtual["parts"]["link_box"]["pid"]}
    assert parts <= ours
    assert len(ours) >= 7, "fly, daemon, dead-man, supervisor, broker, link box and board"

    rows = subprocess.run(["ss", "-lntupH"], capture_output=True, text=True, check=True).stdout.splitlines()
    listening = [row.split()[4] for row in rows if ours & {int(pid) for pid in re.findall(r"pid=(\d+)", row)}]
    hosts = {local.rpartition(":")[0] for local in listening}
    assert hosts == {"127.0.0.1"}, listening
    expected = {*virtual_bench(bench).ports(), bench.file.metrics_port}
    assert {int(local.rpartition(":")[2]) for local in listening} == expected

    # The payload network's own namespace has no listener at all, and no way out but the emulator.
    broker = virtual["parts"]["broker"]["pid"]
    assert os.readlink(f"/proc/{broker}/ns/net") != os.readlink("/proc/self/ns/net")
    for table in ("tcp", "tcp6"):
        states = [line.split()[3] for line in Path(f"/proc/{broker}/net/{table}").read_text().splitlines()[1:]]
        assert "0A" not in states, table
    sockets = [path for path in bench.runtime_dir.rglob("*") if path.is_socket()]
    assert {path.name for path in sockets} >= {"api.sock", "payload.sock", "console-vb1.sock"}
    assert bench.runtime_dir.stat().st_mode & 0o077 == 0


def test_metrics_answer_in_flight(aloft: Airborne) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{aloft.bench.file.metrics_port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    assert values['hil_board_power_commanded{board="vb1"}'] == 1
    assert 4 < values['hil_board_power_watts{board="vb1"}'] < 16
    assert values['hil_mission_time_seconds{board="vb1"}'] > 0
    assert values["hil_deadman_alive"] == 1
    assert values["hil_leases"] == 1
    assert [sample.value for sample in aloft.server.wait_for('up{bench="flight"}')] == [1.0]


def test_others_may_watch_a_flight_but_not_disturb_it(aloft: Airborne) -> None:
    with attach(aloft.bench, start=False) as daemon:
        assert daemon.status()["flight"]["state"] == "running"
        with pytest.raises(BenchError, match="leased by"):
            daemon.lease(["vb1"])
        with pytest.raises(BenchError, match="leased"):
            daemon.stop()
        with pytest.raises(BenchError, match="lease"):
            daemon.board("vb1").power.off()
    assert is_on(aloft.bench)


def test_progress_is_told_in_plain_lines(aloft: Airborne) -> None:
    line = until(lambda: re.search(r"^\[ *[\d.]+ s\]   mission .*x1 .*\(on\).*$", aloft.fly.said, re.M), 20, "progress")
    for word in ("phase sunlit, sun", "bus ", " V ", " A ", " W ", "charge ", "link ", "uploaded ", "tokens "):
        assert word in line[0]
    assert "\x1b" not in aloft.fly.said


# ----------------------------------------------------------------------------------------------------- when it is over
def rows(flown: Flown, query: str, *values: object) -> list[Any]:
    """Rows of telemetry.sqlite; plain values when the query has one column."""
    with closing(sqlite3.connect(f"file:{flown.run / 'telemetry.sqlite'}?mode=ro", uri=True)) as database:
        found = database.execute(query, values).fetchall()
    return [row[0] for row in found] if found and len(found[0]) == 1 else found


def events(flown: Flown, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(flown.run / "events.jsonl") if not kinds or event["kind"] in kinds]


def verdict(flown: Flown) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((flown.run / "verdict.json").read_text())
    return value


def mission(flown: Flown) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((flown.run / "mission.yaml").read_text())
    return value


def mean(values: Sequence[float]) -> float:
    assert values
    return sum(values) / len(values)


def test_passes(flown: Flown) -> None:
    assert verdict(flown)["verdict"] == "pass", flown.said
    assert flown.exit_code == 0
    assert re.search(r"^verdict: pass$", flown.said, re.M)
    assert f"run:     {flown.run}\n" in flown.said


def test_the_verdict_file_is_as_documented(flown: Flown) -> None:
    found = verdict(flown)
    assert list(found) == ["schema", "verdict", "criteria"]
    assert found["schema"] == 1
    names = [row["name"] for row in found["criteria"]]
    asked = mission(flown)["criteria"]
    assert names == [*(item["name"] for item in asked), "board-in-order", "bench-in-order"]
    for row in found["criteria"]:
        assert list(row) == ["name", "verdict", "measured", "limit", "unit", "clock_rate", "evidence"]
        assert row["verdict"] in ("pass", "fail", "invalid", "infra", "missing")
        assert row["limit"]
        assert row["evidence"]
        assert isinstance(row["measured"], bool | float)
        assert math.isfinite(row["measured"])
    told = dict(zip(names, found["criteria"], strict=True))
    assert all(told[item["name"]]["unit"] == item.get("unit", "") for item in asked)
    real_time = [item["name"] for item in asked if item.get("clock_rate") == 1]
    assert len(real_time) >= 2
    assert all(told[name]["clock_rate"] == 1.0 for name in real_time)


def test_the_journal_has_every_event_in_order(flown: Flown) -> None:
    found = events(flown)
    assert all(event["schema"] == 1 and event["source"] in ("daemon", "campaign") for event in found)
    assert not [event for event in found if event["kind"] in ("error", "invalid", "deadman", "torn", "tripped")]
    by_source = [[event["t_mono"] for event in found if event["source"] == source] for source in ("daemon", "campaign")]
    assert all(times == sorted(times) for times in by_source)
    missions = [event["t_mission"] for event in found if event["source"] == "daemon" and event["t_mission"] is not None]
    assert missions == sorted(missions), "mission time never runs backwards"

    steps = [next(iter(step)) for step in mission(flown)["steps"]]
    told = [(e["kind"], e["step"], e["index"]) for e in found if e["kind"].startswith("step_")]
    assert told == [(k, step, n) for n, step in enumerate(steps) for k in ("step_started", "step_finished")]

    order = [
        "doctor",
        "flight_started",
        "board_on",
        "boot",
        "upload_window",
        "upload_done",
        "activated",
        "serve_ready",
        "contact",
        "query",
        "mailbox",
        "load_shed",
        "inference_load",
        "load_restoring",
        "load_restored",
        "boot",
        "serve_ready",
        "query",
        "recovered",
        "board_off",
        "flight_ended",
    ]
    kinds = iter([event["kind"] for event in found])
    for kind in order:
        assert kind in kinds, f"{kind} is missing, or comes too early"


def test_the_upload_was_cut_resumed_and_activated_once(flown: Flown) -> None:
    windows, (done,) = events(flown, "upload_window"), events(flown, "upload_done")
    assert len(windows) >= 2
    assert windows[0]["cut_by_los"] is True
    model = mission(flown)["model"]
    for before, after in pairwise(windows):
        lost = before["bytes_acked_start"] + before["bytes_sent"] - after["bytes_acked_start"]
        assert 0 <= lost <= 1 << 20
        assert before["t_mission"] < after["t_mission"]
    assert windows[-1]["bytes_acked_end"] == done["size"]
    assert [event["sha256"] for event in events(flown, "activated")] == [model["sha256"]]


def test_queries_ran_at_real_time_inside_contacts(flown: Flown) -> None:
    timeline = timeline_file.load(flown.run / "timeline.npz")
    asked = events(flown, "query")
    assert [event["step"] for event in asked] == ["query", "check"]
    for event in asked:
        assert event["rate_min"] == event["rate_max"] == 1.0
        assert 0 < event["t_first_mono"] - event["t_send_mono"] <= event["t_last_mono"] - event["t_send_mono"] < 120
        assert event["tokens"] == event["server_tokens"]
        assert rows(flown, "SELECT sum(n) FROM tokens WHERE query = ?", event["id"]) == [event["tokens"]]
        assert timeline.contact_at(event["t_mission"]) is not None
    assert asked[0]["answer"] == asked[1]["answer"] != ""
    assert events(flown, "recovered")[0]["identical_answer"] is True
    (letter,) = events(flown, "mailbox")
    assert letter["silent_after_los"] is True
    assert letter["answer"]


def test_current_rises_with_inference(flown: Flown) -> None:
    """The acceptance of the whole chain, by SQL alone: CPU time -> supply -> SCPI -> record."""

    def amperes(start: float, end: float) -> list[float]:
        return rows(flown, "SELECT current_a FROM power WHERE state = 'on' AND t_mono BETWEEN ? AND ?", start, end)

    idle = [amperes(event["t_mono"] - event["wall_s"], event["t_mono"]) for event in events(flown, "idle")]
    busy = [amperes(event["t_send_mono"] + 1, event["t_last_mono"]) for event in events(flown, "query")]
    busy += [
        amperes(event["t_start_mono"] + 1, event["t_start_mono"] + event["wall_s"])
        for event in events(flown, "inference_load")
    ]
    assert len(idle) == 2
    assert len(busy) == 3
    assert all(len(samples) >= 5 for samples in (*idle, *busy))  # twenty in two idle seconds when the host is quiet
    assert min(map(mean, busy)) > 1.3 * max(map(mean, idle))
    volts = rows(flown, "SELECT voltage_v FROM power WHERE state = 'on'")
    assert len(set(volts)) > 20, "the bus follows the battery"


def test_traffic_crossed_netem_in_both_directions(flown: Flown) -> None:
    def passed(direction: str) -> int:
        """Bytes that left the queue, by tc's own counter; it starts anew where the queue was made anew."""
        counted = rows(flown, "SELECT sent_bytes FROM qdisc WHERE direction = ? ORDER BY t_mono, rowid", direction)
        assert len(counted) > 10
        return sum(now - before if now >= before else now for before, now in pairwise([0, *counted]))

    windows = events(flown, "upload_window")
    uploaded = sum(event["bytes_acked_end"] - event["bytes_acked_start"] for event in windows)
    assert uploaded > 5e6
    assert uploaded <= passed("uplink") < 1.5 * uploaded + 2e6
    # Every acknowledgement of a full segment is a packet down; answers come on top.
    assert passed("downlink") > uploaded / 1448 / 2 * 66 * 0.2
    assert passed("downlink") < 0.2 * passed("uplink")


def test_netem_held_the_upload_to_the_links_rate(flown: Flown) -> None:
    for event in events(flown, "upload_window"):
        bits = 8 * (event["bytes_acked_end"] - event["bytes_acked_start"])
        open_s = event["t_end_mono"] - event["t_start_mono"]
        assert 0 < bits <= 1.05 * event["rate_bps"] * event["clock_rate"] * open_s
    applied = set(rows(flown, "SELECT DISTINCT rate_bps FROM link WHERE direction = 'uplink' AND outage = 0"))
    assert applied == {300e3, 60 * 300e3}


def test_nothing_arrives_in_an_outage(flown: Flown) -> None:
    """Not one byte is acknowledged between a loss of signal and the next acquisition, handovers included."""
    states = rows(flown, "SELECT verified_s, outage FROM link WHERE direction = 'uplink' ORDER BY verified_s")
    outages = [(start, end) for (start, closed), (end, _) in pairwise(states) if closed]
    assert len(outages) >= 4
    for start, end in outages:
        # What was acknowledged before the edge may be counted a moment after it.
        assert rows(flown, "SELECT count(*) FROM progress WHERE t_mono BETWEEN ? AND ?", start + 0.05, end) == [0]


def test_edges_were_played_on_time_and_say_when(flown: Flown) -> None:
    edges = [event for event in events(flown, "edge_applied") if event["link"]]
    assert {"los", "rate"} <= {event["edge"] for event in edges}
    late = [event["lateness_s"] for event in edges]
    assert all(isinstance(value, float) and 0 <= value < 1 for value in late), late
    light = [event["edge"] for event in events(flown, "edge_applied") if not event["link"]]
    assert light == ["penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit"]
    applied = rows(flown, "SELECT scheduled_s, sent_s, acknowledged_s, verified_s FROM link")
    assert len(applied) > 20
    assert all(scheduled <= sent + 0.1 and sent <= done <= verified for scheduled, sent, done, verified in applied)
    assert {"uplink", "downlink"} == set(rows(flown, "SELECT DISTINCT direction FROM link"))
    ticks = rows(flown, "SELECT lateness_s FROM power")
    assert len(ticks) > 500
    assert all(value >= 0 for value in ticks)


def test_the_load_is_shed_once_and_restored_once(flown: Flown) -> None:
    told = rows(flown, "SELECT state, soc, sunlit, t_mono FROM power ORDER BY t_mono")
    lives = [(state, [soc for _, soc, _, _ in group]) for state, group in groupby(told, key=lambda row: row[0])]
    # Whether a sample falls between flight and power on, and between power off and the flight's end, is chance.
    lives = lives[lives[0][0] == "off" : -1 if lives[-1][0] == "off" else None]
    assert [state for state, _ in lives] == ["on", "shed", "on"]
    (shed,), (restored,) = events(flown, "load_shed"), events(flown, "load_restored")
    plan = mission(flown)["power"]["shed"]
    assert shed["bus_voltage_v"] < plan["voltage_v"]
    assert shed["verified_v"] < 0.6
    assert restored["soc"] >= plan["restore_soc"]
    assert restored["bus_voltage_v"] >= plan["restore_voltage_v"]
    assert restored["t_mono"] - shed["t_mono"] >= plan["dwell_s"]
    charge = lives[1][1]
    assert charge[-1] > charge[0] + 0.1, "it charges while the load is shed"
    # Only the flown eclipse: a slow host's upload reaches into contacts that lie in the dark too.
    (began,) = [event["t_mono"] for event in events(flown, "step_started") if event["step"] == "eclipse"]
    dark = [soc for state, soc, sunlit, t in told if state == "on" and sunlit == 0 and began + 1 < t < shed["t_mono"]]
    assert dark[0] - dark[-1] > 0.5, "the battery carries the load through the eclipse"
    assert dark == sorted(dark, reverse=True)
    cut = "SELECT max(current_a) FROM power WHERE state = 'shed' AND t_mono > ?"
    assert rows(flown, cut, shed["verified_mono"]) == [0.0]


def test_the_console_is_logged_from_the_first_byte_of_both_boots(flown: Flown) -> None:
    log = (flown.run / "console/vb1.log").read_bytes()
    banners = [match.start() for match in re.finditer(BANNER, log)]
    assert len(banners) == 2
    assert log[: banners[0]].strip(b"\r\n\0 ") == b"", log[: banners[0]]
    for begin, end in pairwise([*banners, len(log)]):
        assert re.search(rb"(?s)Starting kernel.*vb1 login:", log[begin:end])
    assert b"Starting kernel" not in log[: banners[0]]
    lines = [json.loads(line) for line in (flown.run / "console/vb1.lines.jsonl").read_text().splitlines()]
    assert sum(line["length"] for line in lines) == len(log)
    at = [line["t_mono"] for line in lines if line["offset"] in banners]
    on = [events(flown, kind)[0]["on_mono"] for kind in ("board_on", "load_restored")]
    assert len(at) == 2
    assert all(0 < line - switched < 5 for line, switched in zip(at, on, strict=True)), (at, on)
    told = [event["uboot_s"] for event in events(flown, "boot")]
    assert told == pytest.approx([line - switched for line, switched in zip(at, on, strict=True)], abs=0.3)


class Page(HTMLParser):
    """What a page would load from elsewhere, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""
        self.style = ""
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "data", "poster", "srcset", "action")
        self.loads += [
            f"{tag} {name}={value}"
            for name, value in attrs
            if name in names and not (value or "").startswith(("#", "data:"))
        ]
        self.style += " ".join(value or "" for name, value in attrs if name == "style")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style":
            self.style += data
        self.text += data


def test_the_report_opens_offline_and_says_what_was_not_measured(flown: Flown) -> None:
    text = (flown.run / "report.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert "script" not in page.tags or "fetch(" not in text
    assert not re.search(r"@import|url\((?!['\"]?(#|data:))", page.style)
    assert {"svg", "table"} <= set(page.tags)
    words = " ".join(page.text.split())
    for row in verdict(flown)["criteria"]:
        assert row["name"] in words
        assert " ".join(row["evidence"].split()) in words
    assert "verdict" in words.lower()
    for line in (*mission(flown)["assumptions"], *mission(flown)["sources"]):
        assert " ".join(line.split()) in words, line
    for label in ("modelled", "scaled", "assumed"):
        assert label in words.lower(), label
    for plot in ("voltage", "current", "power", "state of charge", "sunlight", "delay", "rate", "tokens"):
        assert plot in words.lower(), plot
    assert "nan" not in re.findall(
        r"\b\w+\b", " ".join(re.findall(r'(?:points|d|x|y|width|height)="([^"]*)"', text)).lower()
    )


def test_junit_counts_agree_with_the_verdict(flown: Flown) -> None:
    suite = ET.parse(flown.run / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    criteria = [case for case in cases if str(case.get("classname")).endswith(".criteria")]
    steps = [case for case in cases if str(case.get("classname")).endswith(".steps")]
    judged = verdict(flown)["criteria"]
    assert [case.get("name") for case in criteria] == [row["name"] for row in judged]
    assert len(steps) == len(mission(flown)["steps"])
    assert len(cases) == len(criteria) + len(steps) == int(suite.get("tests", "0"))
    failed = sum(row["verdict"] == "fail" for row in judged)
    broken = sum(row["verdict"] in ("invalid", "infra", "missing") for row in judged)
    assert len(suite.findall("testcase/failure")) == int(suite.get("failures", "-1")) == failed
    assert len(suite.findall("testcase/error")) == int(suite.get("errors", "-1")) == broken
    wall = events(flown)[-1]["t_mono"] - events(flown)[0]["t_mono"]
    assert sum(float(case.get("time", "0")) for case in steps) == pytest.approx(wall, rel=0.1)


def test_provenance_names_what_was_flown(flown: Flown) -> None:
    told = json.loads((flown.run / "provenance.json").read_text())

    def sha256(name: str) -> str:
        return hashlib.sha256((flown.run / name).read_bytes()).hexdigest()

    assert told["mission"]["sha256"] == sha256("mission.yaml") == hashlib.sha256(SHORT.read_bytes()).hexdigest()
    assert told["bench"]["sha256"] == sha256("bench.yaml")
    assert told["orbit"]["elements_sha256"] == sha256("orbit.tle")
    assert told["model"]["sha256"] == mission(flown)["model"]["sha256"]
    assert told["bench"]["virtual"] is True
    assert told["board"]["hardware"] == "virtual"
    assert told["mission"]["seed"] == mission(flown)["seed"]
    assert {"hil", "python", "packages", "host", "link_box"} <= set(told)
    assert told["link_box"]["kernel"]
    timeline = timeline_file.load(flown.run / "timeline.npz").hash
    assert rows(flown, "SELECT value FROM meta WHERE key = 'timeline_sha256'") == [timeline]
    assert events(flown, "flight_started")[0]["timeline_sha256"] == timeline


def test_afterwards_everything_is_off_cleared_and_released(flown: Flown) -> None:
    assert_off(flown.bench)
    assert ask_supply(flown.bench, ":OUTP? CH2", ":OUTP? CH3") == ["OFF", "OFF"]
    assert supervisor.status(virtual_bench(flown.bench))["boards"]["vb1"]["pid"] is None
    with attach(flown.bench) as daemon:
        assert daemon.leases() == []
        with daemon.lease(["vb1"]):
            assert daemon.status()["boards"]["vb1"]["state"] == "off"
    assert not has_netem(flown.bench)


def test_every_panel_shows_the_flight(flown: Flown) -> None:
    """Each query of the dashboard, as Grafana would draw it over the flight; and as it would show one moment of it."""
    start, end = (events(flown, kind)[0]["t_wall"] for kind in ("flight_started", "flight_ended"))
    dashboard = dashboards.mission_dashboard()
    found = prometheus.check_panels_over(flown.server, dashboard, "vb1", start, end)
    assert len(found) >= 20
    # Prometheus's eyes against the record's figures, as far as a scrape every two seconds can see them.
    highest = flown.server.query_range('max(hil_board_power_watts{board="vb1"})', start, end)
    measured = rows(flown, "SELECT max(power_w) FROM power")[0]
    assert max(highest[0].values) == pytest.approx(measured, rel=0.1)
    tokens = flown.server.query_range('sum(hil_inference_output_tokens_total{board="vb1"})', start, end)
    assert tokens[0].values[-1] <= rows(flown, "SELECT sum(n) FROM tokens")[0]
    phases = flown.server.query_range('hil_orbit_phase{board="vb1",phase="umbra"}', start, end)
    assert set(phases[0].values) == {0.0, 1.0}


def test_the_annotation_marks_the_power_cut(flown: Flown) -> None:
    start, end = (events(flown, kind)[0]["t_wall"] for kind in ("flight_started", "flight_ended"))
    (query,) = dashboards.annotation_queries(dashboards.mission_dashboard(), board="vb1", interval="6s")
    marks = flown.server.query_range(query, start, end)
    assert marks, "the load was shed: one mark at least"


@pytest.fixture
def copy(flown: Flown, tmp_path: Path) -> Path:
    directory = tmp_path / flown.run.name
    shutil.copytree(flown.run, directory)
    return directory


def report(run: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HIL, "campaign", "report", run], capture_output=True, text=True, timeout=60, check=False)


def test_the_record_gives_the_same_verdict_again(flown: Flown, copy: Path) -> None:
    before = (copy / "verdict.json").read_bytes()
    for derived in ("verdict.json", "junit.xml", "report.html"):
        (copy / derived).unlink()
    done = report(copy)
    assert done.returncode == flown.exit_code == 0, done.stderr
    assert (copy / "verdict.json").read_bytes() == before
    for derived in ("junit.xml", "report.html"):
        assert (copy / derived).stat().st_size > 1000


@pytest.mark.parametrize(
    ("damage", "verdict_", "code", "row"),
    [
        ("UPDATE power SET power_w = 5.0, current_a = 0.3", "fail", 1, "power-rises-with-inference"),
        ("UPDATE qdisc SET sent_bytes = 1000", "fail", 1, "crossed-netem"),
        ("DELETE FROM qdisc", "missing", 6, "crossed-netem"),
        ("UPDATE clock SET rate = 2.0", "invalid", 6, "answer-in-pass"),
        ("UPDATE power SET voltage_v = 9.0 WHERE state = 'on'", "fail", 1, "no-brown-out"),
    ],
)
def test_a_record_that_says_otherwise_does_not_pass(
    copy: Path, damage: str, verdict_: str, code: int, row: str
) -> None:
    with closing(sqlite3.connect(copy / "telemetry.sqlite")) as database, database:
        assert database.execute(damage).rowcount > 0
    assert report(copy).returncode == code
    found = json.loads((copy / "verdict.json").read_text())
    assert found["verdict"] == verdict_
    assert {item["name"]: item["verdict"] for item in found["criteria"]}[row] == verdict_


def test_a_journal_cut_short_does_not_pass(copy: Path) -> None:
    journal = copy / "events.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    (cut,) = [index for index, line in enumerate(lines) if json.loads(line)["kind"] == "flight_ended"]
    journal.write_bytes(b"".join(lines[:cut]) + lines[cut][:40])
    assert report(copy).returncode == 3
    assert json.loads((copy / "verdict.json").read_text())["verdict"] == "infra"
