"""The drawing of a mission: self-contained, true to the timeline, in three formats, calm where a part is missing."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_report import Page

from hil.campaign import forecast as forecast_module
from hil.campaign import mission_plot, world_map
from hil.campaign.forecast import forecast
from hil.errors import UsageError
from hil.inventory import Mission, load_board_type, load_mission
from hil.inventory.environment import environment
from hil.mission import budget
from hil.mission.compile import compile_timeline
from hil.mission.timeline import Timeline

ROOT = Path(__file__).resolve().parents[2]
FAULTS = "faults: {rates: {seu: {per_year: 8.8}}, acceleration: 2000}\n"


def made(path: Path, *changes: tuple[str, str]) -> tuple[Mission, Timeline]:
    """The short mission for 12 h, changed, and its timeline."""
    text = (ROOT / "fixtures/missions/short.yaml").read_text().replace("../tle", f"{ROOT}/fixtures/tle")
    for old, new in (("duration_h: 48", "duration_h: 12"), *changes):
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    mission = load_mission(path)
    return mission, compile_timeline(environment(mission, load_board_type(ROOT / "boards/virtual-arm64.yaml")))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mission, Timeline]:
    return made(tmp_path_factory.mktemp("m") / "short.yaml", ("model:\n", f"{FAULTS}model:\n"))


@pytest.fixture(scope="module")
def drawn(short: tuple[Mission, Timeline], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plot") / "plot.html"
    mission_plot.write(path, *short)
    return path.read_text(encoding="utf-8")


def data(text: str) -> dict[str, list[float | None]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found
    told = json.loads(found[1])
    series = {row["label"]: row["v"] for row in told["series"]}
    return {**series, "mission": told["mission"]}


def test_page_is_self_contained(drawn: str) -> None:
    parsed = Page(drawn)
    assert len(drawn.encode()) < 1_000_000
    assert "$" not in drawn
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "action"} & set(attributes), (tag, attributes)
    assert not re.search(r"https?://|@import|url\((?!#hatch|#earth)", drawn)


def test_page_says_whose_sky_it_is_and_that_nothing_was_measured(drawn: str, short: tuple[Mission, Timeline]) -> None:
    mission, timeline = short
    parsed = Page(drawn)
    wanted = ("535 km, 97.5°", "0.1 days old at the start", timeline.hash[:12], "nothing measured", mission.file.title)
    for text in (*wanted, *mission.file.assumptions, *(station.name for station in timeline.environment.stations)):
        assert text in parsed.text, text
    labels = [attributes.get("aria-label") for tag, attributes in parsed.tags if tag == "svg"]
    assert labels == [
        "Ground track", "Phases of the flight", "Sunlight, % visible", "Elevation of the satellite, °",
        "One-way delay, ms", "Link rate, Mbit/s", "Power, modelled, W", "State of charge, modelled, %",
        "Bus voltage, modelled, V", "Temperature of board, modelled, °C", "Mission time and UTC",
    ]  # fmt: skip


def test_what_the_cursor_reads_is_the_timeline(drawn: str, short: tuple[Mission, Timeline]) -> None:
    _, timeline = short
    told = data(drawn)
    t_s = np.array(told["mission"], dtype=float)
    assert len(t_s) > 900
    assert (t_s[0], t_s[-1]) == (pytest.approx(0, abs=60), pytest.approx(timeline.duration_s, abs=60))
    in_contact = [timeline.contact_at(t) is not None for t in t_s]
    shown = [value is not None for value in told["One-way delay, each way"]]
    assert np.mean(np.array(in_contact) == np.array(shown)) > 0.98, "only the columns that hold an edge may differ"
    for at in np.flatnonzero(np.array(in_contact) & np.array(shown))[::5]:
        near = np.abs(timeline.t_s - t_s[at]) < 60
        low, high = np.nanmin(1e3 * timeline.delay_s[near]), np.nanmax(1e3 * timeline.delay_s[near])
        assert low - 0.01 <= (told["One-way delay, each way"][at] or 0.0) <= high + 0.01
    up = [value for value in told["Link rate, uplink"] if value is not None]
    assert set(up) == {0.3}
    dark = [timeline.sunlit_at(t) < 0.01 for t in t_s]
    assert np.mean(np.array(told["Sunlight, of the solar disc"])[dark] < 50) > 0.95


def test_faults_and_sheds_are_drawn_one_by_one(drawn: str, short: tuple[Mission, Timeline]) -> None:
    _, timeline = short
    assert len(timeline.faults) > 5
    assert drawn.count('class="b-fault"') == len(timeline.faults)
    assert drawn.count('class="b-eclipse"') == len(timeline.eclipses)
    spans = sum(len(contact.spans) for contact in timeline.contacts)
    assert drawn.count('class="b-up"') == spans


def test_a_part_of_the_mission_can_be_drawn(short: tuple[Mission, Timeline], tmp_path: Path) -> None:
    mission_plot.write(tmp_path / "p.html", *short, start_s=7200.0, end_s=10_800.0)
    t_s = data((tmp_path / "p.html").read_text())["mission"]
    assert t_s[0] == pytest.approx(7200, abs=5)
    assert t_s[-1] == pytest.approx(10_800, abs=5)


def test_svg_needs_no_browser(short: tuple[Mission, Timeline], tmp_path: Path) -> None:
    mission_plot.write(tmp_path / "p.svg", *short)
    text = (tmp_path / "p.svg").read_text()
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in text, "few renderers know variables"
    assert "<script" not in text
    boxes = [(float(child.get("y", 0)), float(child.get("height", 0))) for child in root if child.tag.endswith("svg")]
    assert all(low + height <= after for (low, height), (after, _) in pairwise(boxes))
    assert boxes[-1][0] + boxes[-1][1] <= float(root.get("height", 0))


def test_png_is_rendered(short: tuple[Mission, Timeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(mission_plot, "PNG_ZOOM", 0.25)
    mission_plot.write(tmp_path / "p.png", *short)
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_png_without_its_package_says_what_to_do(
    short: tuple[Mission, Timeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UsageError, match="resvg_py") as caught:
        mission_plot.write(tmp_path / "p.png", *short)
    assert "pip install hil[plot]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["p.pdf", "p", "missing/p.html"])
def test_what_cannot_be_written_is_refused(short: tuple[Mission, Timeline], tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown format|there is no directory"):
        mission_plot.write(tmp_path / name, *short)


def test_a_window_of_the_link_has_no_station(tmp_path: Path) -> None:
    mission, timeline = made(
        tmp_path / "m.yaml",
        ("  acquisition_s: 15", "  window_h: 2\n  every_h: 5\n  one_way_delay_s: 0.3\n  acquisition_s: 15"),
    )
    assert timeline.contacts
    assert not len(timeline.contact_t_s)
    mission_plot.write(tmp_path / "p.html", mission, timeline)
    text = (tmp_path / "p.html").read_text()
    assert "Elevation" not in text
    assert max(v for v in data(text)["One-way delay, each way"] if v is not None) == pytest.approx(300.0)


def test_names_are_text_and_long_ones_are_cut(tmp_path: Path) -> None:
    mission, timeline = made(
        tmp_path / "m.yaml",
        ('title: "Short flight', 'title: "<b>$x</b> & flight'),
        ("miyun:", "a-very-long-station-name:"),
    )
    mission_plot.write(tmp_path / "p.html", mission, timeline)
    parsed = Page((tmp_path / "p.html").read_text())
    assert "<b>$x</b> & flight" in parsed.text
    assert "a-very-l…" in parsed.text
    mission_plot.write(tmp_path / "p.svg", mission, timeline)
    ET.parse(tmp_path / "p.svg")


# --- the map ---------------------------------------------------------------------------------------------------------


def points(path: str) -> list[tuple[str, float, float]]:
    return [(kind, float(x), float(y)) for kind, x, y in re.findall(r"([ML])(-?[\d.]+) (-?[\d.]+)", path)]


def jumps(path: str) -> Iterable[float]:
    steps = points(path)
    for (_, x, _), (kind, to_x, _) in pairwise(steps):
        if kind == "L":
            yield abs(to_x - x)


def test_no_line_crosses_the_whole_map(short: tuple[Mission, Timeline]) -> None:
    text = world_map.world(short[1], 0.0, 43_200.0)
    for kind in ("t-sun", "t-dark", "t-contact"):
        (path,) = re.findall(rf'<path class="{kind}" d="(M[^"]*L[^"]*)"', text)
        assert max(jumps(path)) < 160
    assert len(points(re.findall(r'<path class="t-sun" d="(M[^"]*)"', text)[-1])) > 200


@pytest.mark.parametrize("eastward", [True, False])
def test_a_line_over_the_date_line_leaves_and_comes_in(eastward: bool) -> None:
    longitude = np.array([178.0, -178.0, -174.0]) * (1 if eastward else -1)
    path = "".join(world_map._pieces(np.zeros(3), longitude, [True, True]))
    assert max(jumps(path)) < 12
    west, east = world_map._x(-180.0), world_map._x(180.0)
    xs = [x for _, x, _ in points(path)]
    assert min(xs) < west < max(xs)
    assert min(xs) < east < max(xs)
    assert points(path)[-1][1] == pytest.approx(world_map._x(longitude[-1]), abs=0.1)


def test_the_track_is_green_where_a_station_hears_it(short: tuple[Mission, Timeline]) -> None:
    _, timeline = short
    contact = timeline.contacts[0]
    text = world_map.world(timeline, contact.aos_s - 30, contact.los_s + 30)
    (heard,) = re.findall(r'<path class="t-contact" d="(M[^"]*L[^"]*)"', text)
    lines = [kind for kind, _, _ in points(heard)].count("L")
    assert lines == pytest.approx(contact.duration_s / world_map.STEP_S, abs=2)


def test_land_is_where_it_is() -> None:
    """Even-odd over the rings: a point on land is inside of one, the Caspian Sea is a hole in it."""
    rings = [
        np.array([tuple(map(float, point.split(","))) for point in line.split()])
        for line in world_map.text("coastlines.txt").splitlines()
    ]

    def inside(east: float, north: float) -> bool:
        crossings = 0
        for ring in rings:
            (x, y), (x2, y2) = ring.T, np.roll(ring, -1, axis=0).T
            hit = (y > north) != (y2 > north)
            crossings += int(np.sum(hit & (east < (x2 - x) * (north - y) / np.where(hit, y2 - y, 1.0) + x)))
        return crossings % 2 == 1

    for name, east, north in (("Xi'an", 109, 34), ("Munich", 11.6, 48.1), ("Brasilia", -48, -16), ("Perth", 117, -31),
                              ("Pole", 0, -85), ("Nairobi", 36.8, -1.3)):  # fmt: skip
        assert inside(east, north), name
    for name, east, north in (("Atlantic", -40, 30), ("Pacific", -140, 0), ("Caspian", 50.5, 42), ("Tasman", 160, -38)):
        assert not inside(east, north), name


# --- the forecast ----------------------------------------------------------------------------------------------------


def test_idle_is_flown_as_the_budget_flies_it(short: tuple[Mission, Timeline]) -> None:
    _, timeline = short
    power = timeline.environment.power
    assert power is not None
    told = forecast(timeline, "idle", power.board_idle_w)
    assert told.shed == ()
    ours, theirs = told.soc, budget.fly(timeline, power.board_idle_w)
    assert np.max(np.abs(np.interp(theirs.t_s, told.t_s, ours) - theirs.soc)) < 1e-9


def test_a_long_mission_is_flown_in_longer_steps_to_the_same_sheds(
    short: tuple[Mission, Timeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, timeline = short
    fine = forecast(timeline, "full", 15.0)
    monkeypatch.setattr(forecast_module, "MOST_STEPS", 500)
    coarse = forecast(timeline, "full", 15.0)
    assert len(coarse.t_s) < 550
    assert len(coarse.shed) == len(fine.shed)
    assert max(abs(a.start_s - b.start_s) for a, b in zip(coarse.shed, fine.shed, strict=True)) < 60
    assert abs(coarse.soc.min() - fine.soc.min()) < 0.01
    assert (coarse.collapsed, fine.collapsed) == (False, False)


def test_work_rests_while_the_thermal_model_forbids_it(tmp_path: Path) -> None:
    mission, timeline = made(
        tmp_path / "hot.yaml",
        ("heat_capacity_j_per_k: 100, initial_c: 20", "heat_capacity_j_per_k: 214, initial_c: 30"),
        ("area_m2: 0.013, sides: 2, emissivity: 0.9}", "area_m2: 0.015}\n  cutoff: {node: board, off_c: 60, on_c: 30}"),
    )
    told = forecast(timeline, "full", 15.0, 5.0)
    celsius = told.temperature_c["board"]
    assert len(told.rest) > 5
    for span in told.rest[:-1]:
        inside = (told.t_s >= span.start_s) & (told.t_s < span.end_s)
        assert set(told.load_w[inside]) <= {5.0 + 6.0, 6.0}, "idle, or shed as well"
        assert np.interp(span.start_s, told.t_s, celsius) == pytest.approx(60, abs=0.6)
        assert np.interp(span.end_s, told.t_s, celsius) == pytest.approx(30, abs=0.6)
    assert 59.5 < celsius.max() < 60.6
    mission_plot.write(tmp_path / "p.html", mission, timeline)
    text = (tmp_path / "p.html").read_text()
    assert "Temperature of board, modelled" in text
    assert "stop 60 °C" in text
    assert "too hot" in text
    shown = [v for v in data(text)["Temperature of board, modelled, board at full load"] if v is not None]
    assert max(shown) == pytest.approx(celsius.max(), abs=1)


def test_full_load_is_shed_and_restored_by_the_rule(short: tuple[Mission, Timeline]) -> None:
    _, timeline = short
    power = timeline.environment.power
    assert power is not None
    assert power.shed is not None
    told = forecast(timeline, "full", power.board_full_w)
    assert len(told.shed) >= 3
    for span in told.shed:
        at = int(np.flatnonzero(told.t_s == span.start_s)[0])
        assert told.bus_voltage_v[at] < power.shed.shed_v
        inside = (told.t_s >= span.start_s) & (told.t_s < span.end_s)
        assert set(told.load_w[inside]) == {power.eps.platform_w}
        if span.end_s < timeline.duration_s:
            back = int(np.flatnonzero(told.t_s == span.end_s)[0])
            assert told.bus_voltage_v[back] >= power.shed.restore_v
            assert told.soc[back] >= power.shed.restore_soc
    without = replace(timeline.environment, power=replace(power, shed=None))
    assert forecast(replace(timeline, environment=without), "full", power.board_full_w).collapsed
