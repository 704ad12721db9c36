"""The report of a (synthetic) run: self-contained, escaped, complete, and calm about records with holes."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import synthetic_run

from hil.campaign import plot, record, report, verdict
from hil.campaign.plot import Axis, Panel, Section, Series

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects tags and text, and notices tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] not in (["script"], ["style"]):
            self.text += data


@pytest.fixture(scope="module")
def flown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run.write(tmp_path_factory.mktemp("synthetic") / "run")


def page(run: Path) -> str:
    kept = record.read(run)
    report.write(run / "report.html", kept, verdict.evaluate(kept, verdict.mission_of(run).criteria))
    return (run / "report.html").read_text(encoding="utf-8")


def test_page_is_self_contained_and_small(flown: Path) -> None:
    text = page(flown)
    parsed = Page(text)
    assert len(text.encode()) < 2_000_000
    assert "$" not in text
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|@import|url\((?!#hatch)", text)
    assert [p.name for p in flown.iterdir() if p.name.endswith(".part")] == []


def test_page_tells_everything(flown: Path) -> None:
    parsed = Page(page(flown))
    mission = verdict.mission_of(flown)
    for item in (*mission.assumptions, *mission.sources, *(spec.name for spec in mission.criteria)):
        assert item in parsed.text
    for text in (
        "98.4MB",
        "13.19 V",
        "Synthetic",
        "1. Mercury",
        "identical to the answer before",
        "skipped in 9 jumps",
    ):
        assert text in parsed.text
    labels = [attributes.get("aria-label") for tag, attributes in parsed.tags if tag == "svg"]
    for wanted in (
        "Voltage, V",
        "Current, A",
        "Power, W",
        "State of charge, %",
        "Sunlight, % visible",
        "One-way delay, ms",
    ):
        assert wanted in labels
    assert "Link rate, scaled with the clock, Mbit/s" in labels
    assert "Tokens, since start" in labels
    assert ("div", {"class": "banner pass", "role": "status"}) in parsed.tags


def test_temperatures_are_plotted_where_the_mission_has_them(flown: Path, tmp_path: Path) -> None:
    assert "Temperature" not in page(flown)
    run = Path(shutil.copytree(flown, tmp_path / "run"))
    mission = run / "mission.yaml"
    mission.write_text(
        mission.read_text()
        + """
thermal:
  nodes: {chip: {heat_capacity_j_per_k: 20, board_share: 1}, case: {heat_capacity_j_per_k: 400}}
  couplings: [{between: [chip, case], conductance_w_per_k: 1}]
  cutoff: {node: chip, off_c: 61, on_c: 45}
"""
    )
    line = {
        "schema": 1,
        "t_mono": synthetic_run.MONO + 21.0,
        "t_wall": "2026-01-01T00:00:21.000Z",
        "source": "synthetic",
    }
    with (run / "events.jsonl").open("a") as journal:
        journal.write(json.dumps({**line, "kind": "thermal_cutoff", "nodes": {"chip": 61.2, "case": 30.0}}) + "\n")
    rows = [
        (synthetic_run.MONO + second, node, low + rise * min(second, 30) / 30)
        for second in range(60)
        for node, low, rise in (("chip", 20.0, 42.5), ("case", 20.0, 10.0))
    ]
    with closing(sqlite3.connect(run / "telemetry.sqlite")) as database, database:
        database.executemany("INSERT INTO thermal (t_mono, node, temperature_c, may_run) VALUES (?, ?, ?, 1)", rows)
    text = page(run)
    parsed = Page(text)
    assert "Temperature, modelled, °C" in [
        attributes.get("aria-label") for tag, attributes in parsed.tags if tag == "svg"
    ]
    plotted = text.split('aria-label="Temperature, modelled, °C"')[1].split("</svg>")[0]
    assert "chip: 20 to 62.5 °C" in plotted
    assert "case: 20 to 30 °C" in plotted
    assert "chip: stop 61 °C" in plotted
    assert "chip: go 45 °C" in plotted
    assert "Too hot: the work must rest (modelled: chip 61.2 °C, case 30.0 °C)" in parsed.text


def rows_of(text: str, section: str) -> list[list[str]]:
    """The cells of a section's table, row by row."""
    found = text.split(f'<section aria-labelledby="{section}">')[1].split("</section>")[0]
    return [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", found, re.S)[1:]
    ]


def test_uploads_are_compared_by_protocol(flown: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(flown, tmp_path / "run"))
    # A record of an earlier version knows one protocol and nothing of the wire.
    assert rows_of(page(run), "uploads") == [["sftp", "4", "3", "98.36", "–", "–", "–", "–", "296.2", "98.7%"]]
    path, seen = run / "events.jsonl", 0
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event["kind"] == "upload_window":
            seen += 1
            sent = event["bytes_sent"]
            if seen <= 2:
                event.update(protocol="sftp", bytes_on_wire=int(sent * 1.06), bytes_resent=524_288, retransmissions=11)
            else:
                event.update(protocol="cfdp", bytes_on_wire=int(sent * 1.04), bytes_resent=2_766, retransmissions=2)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    text = page(run)
    first, second = rows_of(text, "uploads")
    # 58 % of 98 362 432 bytes in two contacts of 43 s x 0.27 and 43 s x 0.31; half a chunk lost by each of the cuts.
    assert first == ["sftp", "2", "2", "57.05", "61.58", "+7.9%", "1048.6", "22", "305.1", "101.7%"]
    assert second[:3] == ["cfdp", "2", "1"]
    assert (second[6], second[7]) == ("5.5", "4")
    assert "by sftp and cfdp in 4 contacts, 3 cut by loss of signal" in Page(text).text


def test_the_links_certificate_is_shown(flown: Path, tmp_path: Path) -> None:
    assert "Link certificate" not in page(flown)
    run = Path(shutil.copytree(flown, tmp_path / "run"))
    row = {"name": "delay 20 ms uplink", "verdict": "pass", "measured": 0.00094, "limit": "p99 5 ms", "unit": "s"}
    told = {"verdict": "pass", "backend": "netem over SSH", "far_end": "a process of this host", "criteria": [row]}
    (run / "certificate.json").write_text(json.dumps(told))
    text = page(run)
    assert rows_of(text, "certificate") == [
        ['<span class="tag pass">pass</span>', "delay 20 ms uplink", "0.00094", "p99 5 ms", "s", "", ""]
    ]
    assert "pass, by netem over SSH; at the far end a process of this host" in Page(text).text
    (run / "certificate.json").write_text(json.dumps(told)[:-9])
    assert "certificate.json cannot be read: JSONDecodeError" in Page(page(run)).text


def test_what_the_operator_asked_of_the_clock_is_told(flown: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(flown, tmp_path / "run"))
    assert "Asked for" not in Page(page(run)).text
    path = run / "provenance.json"
    asked = {"rate": 30.0, "contacts_only": True, "from_s": 7200.0, "from": "2026-01-01T04:00:00.000Z"}
    asked |= {"until_s": 90_000.0, "until": "2026-01-02T03:00:00.000Z"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "clock": asked}))
    text = Page(page(run)).text
    assert "steps that scale time at ×30 instead of their own rates, gaps skipped" in text
    assert "a flight from 2026-01-01T04:00:00.000Z on (2:00:00 of the mission)" in text
    assert "an end at 2026-01-02T03:00:00.000Z (25:00:00 of the mission); the mission's steps were over before" in text


def test_what_a_model_says_stays_text(flown: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(flown, tmp_path / "run"))
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">$title'
    path = run / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event["kind"] in ("query", "mailbox"):
            event["answer"] = event["prompt"] = evil
        if event["kind"] == "contact":
            event.update(kind="error", arm="bench", message=evil)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    text = page(run)
    parsed = Page(text)
    assert "alert(1)</script>" not in text
    assert [attributes for tag, attributes in parsed.tags if tag == "img"] == []
    assert sum(tag == "script" for tag, _ in parsed.tags) == 2
    assert evil in parsed.text


@pytest.mark.parametrize("table", ["power", "link", "clock", "tokens", "progress", "qdisc", "thermal"])
def test_record_without_a_table(flown: Path, tmp_path: Path, table: str) -> None:
    run = Path(shutil.copytree(flown, tmp_path / "run"))
    with closing(sqlite3.connect(run / "telemetry.sqlite")) as database, database:
        database.execute(f"DELETE FROM {table}")
    Page(page(run))


def test_flight_that_never_flew(flown: Path, tmp_path: Path) -> None:
    for name in ("mission.yaml", "provenance.json"):
        shutil.copy(flown / name, tmp_path / name)
    line = {"schema": 1, "t_mono": 5.0, "t_wall": "2026-01-01T00:00:00.000Z", "source": "campaign", "kind": "error"}
    (tmp_path / "events.jsonl").write_text(json.dumps({**line, "arm": "bench", "message": "no supply"}) + "\n")
    parsed = Page(page(tmp_path))
    assert ("div", {"class": "banner infra", "role": "status"}) in parsed.tags
    assert "no supply" in parsed.text
    assert "nan" not in parsed.text.lower().replace("finance", "")


def test_torn_run_still_has_a_report(flown: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(flown, tmp_path / "run"))
    lines = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(lines[: len(lines) // 2])
    parsed = Page(page(run))
    assert ("div", {"class": "banner infra", "role": "status"}) in parsed.tags


def axis() -> Axis:
    return Axis([Section(100, 110, 0, 1), Section(110, 120, 10, 60), Section(120, 130, 5_000, 1, skipped_s=4_390)])


@pytest.mark.parametrize(("seconds", "told"), [(119.96, "2 min 0 s"), (59.4, "0 min 59 s"), (5400, "1.5 h")])
def test_a_duration_never_has_sixty_seconds(seconds: float, told: str) -> None:
    assert report._clock(seconds) == told


def test_axis_runs_on_and_breaks_once() -> None:
    a = axis()
    xs = [a.x(t) for t in np.linspace(100, 130, 61)]
    assert xs == sorted(xs)
    assert xs[0] == plot.LEFT
    assert xs[-1] == pytest.approx(plot.WIDTH - plot.RIGHT)
    assert a.x(120 + 1e-9) - a.x(120 - 1e-9) == pytest.approx(plot.BREAK, abs=1e-3)
    assert a.x(110 + 1e-9) == pytest.approx(a.x(110 - 1e-9), abs=1e-3)
    assert a.mission_s(115) == 10 + 5 * 60
    assert a.mission_s(125) == 5_005
    assert list(a.runs()) == [(100, 120), (120, 130)]


def test_envelope_keeps_the_one_peak() -> None:
    t = np.linspace(100, 130, 30_001)
    value = np.zeros_like(t)
    value[12_345] = 99.0
    highest = max(np.nanmax(plot.envelope(Series("x", t, value, 1), part)[1]) for part in axis().columns())
    assert highest == 99.0
    drawn = plot.render(axis(), Panel("X", "V", (Series("x", t, value, 1),)), [], [])
    assert len(drawn) < 20_000
    assert "0 to 99 V" in drawn


def test_held_state_lasts_and_ends() -> None:
    series = Series("x", np.array([102.0, 112.0]), np.array([7.0, np.nan]), 1, held=True)
    low, _ = plot.envelope(series, np.linspace(100, 120, 21))
    assert np.isnan(low[:2]).all()
    assert (low[2:12] == 7.0).all()
    assert np.isnan(low[12:]).all()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (12.9, 16.7), (-3, 0.02), (5, 5), (0, 98.4e6)])
def test_ticks_enclose_and_are_few(low: float, high: float) -> None:
    ticks = plot.nice_ticks(low, high, 4)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 7


def test_cursor_reads_what_was_recorded(flown: Path) -> None:
    text = page(flown)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found
    data = json.loads(found[1])
    kept = record.read(flown)
    charge = next(item for item in data["series"] if item["label"].startswith("State of charge"))
    told = [value for value in charge["v"] if value is not None]
    assert min(told) == pytest.approx(100 * float(np.min(kept.power.soc)), abs=0.6)
    assert data["x"] == sorted(data["x"])
    assert all(len(item["v"]) == len(data["x"]) for item in data["series"])
