"""The link section of a mission file: what it becomes in the engine, and what is refused with file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hil.errors import UsageError
from hil.inventory import load_bench, load_mission
from hil.inventory.environment import environment
from hil.mission.bursts import Bursts, RandomOutages
from hil.mission.compile import compile_timeline
from hil.mission.radio import Channel, LinkBudget, LinkEnvironment, LinkWindow
from hil.model import Span

ROOT = Path(__file__).parents[2]
STAR = ROOT / "fixtures" / "missions" / "star-compute-qwen3.yaml"
BOARD = load_bench(ROOT / "fixtures" / "benches" / "virtual.yaml").board("vb1")[2]


def mission_with(tmp_path: Path, link: str, *, stations: bool = True) -> Path:
    """The star-compute mission with another link section, indented as a mapping."""
    text = STAR.read_text().replace("../tle", str(ROOT / "fixtures" / "tle"))
    text = re.sub(r"(?ms)^link:\n.*?(?=^\w)", f"link:\n{link}\n", text)
    if not stations:
        text = re.sub(r"(?ms)^stations:\n.*?(?=^\w)", "", text)
    path = tmp_path / "mission.yaml"
    path.write_text(text)
    return path


def link_of(path: Path) -> LinkEnvironment:
    return environment(load_mission(path), BOARD).link


def documented() -> str:
    """The example of docs/missions.md, so that it stays true."""
    text = (ROOT / "docs" / "missions.md").read_text()
    return re.search(r"## Links\n\n```yaml\nlink:\n(.*?)```", text, re.DOTALL)[1]  # type: ignore[index]


def test_every_key_reaches_the_engine_in_its_units(tmp_path: Path) -> None:
    assert link_of(mission_with(tmp_path, documented())) == LinkEnvironment(
        uplink=Channel(rate_bps=300e3, loss=0.001),
        downlink=Channel(
            budget=LinkBudget(8.2e9, 10.0, 25.0, 60e6, atmosphere_zenith_db=0.2),
            max_rate_bps=150e6,
            bursts=Bursts(60.0, 1.0, 1.0),
        ),
        acquisition_s=15.0,
        processing_s=0.002,
        outages=(Span(10_800.0, 11_400.0, "scheduled"),),
        random_outages=RandomOutages(4.0, 30.0),
    )


def test_the_rest_of_a_budget_reaches_it_too(tmp_path: Path) -> None:
    budget = (
        "{frequency_ghz: 2, eirp_dbw: 1, g_over_t_db_k: -2, bandwidth_hz: 3e6, rolloff: 0.35, pointing_loss_db: 4,"
        " atmosphere_zenith_db: 5, other_losses_db: 6, margin_db: 7, hysteresis_db: 8}"
    )
    link = f"  uplink: {{budget: {budget}}}\n  downlink: {{rate_bps: 1}}\n  jitter_s: 0.5\n  handover: highest\n"
    found = link_of(mission_with(tmp_path, link))
    assert found.uplink.budget == LinkBudget(2e9, 1.0, -2.0, 3e6, 0.35, 4.0, 5.0, 6.0, 7.0, 8.0)
    assert (found.jitter_s, found.handover) == (0.5, "highest")


WINDOW = "  uplink: {rate_bps: 2e6}\n  downlink: {rate_bps: 2e6}\n  window_h: 2\n  every_h: 168\n"


def test_a_window_needs_no_station(tmp_path: Path) -> None:
    path = mission_with(tmp_path, WINDOW + "  one_way_delay_s: 0.3\n", stations=False)
    made = environment(load_mission(path), BOARD)
    assert made.link.window == LinkWindow(7_200.0, 604_800.0, 0.3)
    assert [contact.station for contact in compile_timeline(made).contacts] == ["window"]


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("  uplink: {rate_bps: 1e6, max_rate_bps: 2e6}\n  downlink: {rate_bps: 1e6}\n", "max_rate_bps caps a budget"),
        ("  uplink: {loss: 0.1}\n  downlink: {rate_bps: 1e6}\n", "exactly one of rate_bps, budget"),
        (WINDOW, "window_h, every_h and one_way_delay_s go together"),
        (WINDOW.replace("168", "2") + "  one_way_delay_s: 0\n", "window_h 2 is not below every_h 2"),
        (
            "  uplink: {rate_bps: 1}\n  downlink: {rate_bps: 1}\n  outages: [{start_h: 48, duration_s: 1}]\n",
            "48 h is behind",
        ),
        (
            "  uplink: {rate_bps: 1, bursts: {good_mean_s: 0, bad_mean_s: 1}}\n  downlink: {rate_bps: 1}\n",
            "good_mean_s",
        ),
        (
            "  uplink: {rate_bps: 1}\n  downlink: {rate_bps: 1}\n  random_outages: {per_day: 1e9, mean_s: 1}\n",
            "per_day",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_file_and_line(tmp_path: Path, link: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load_mission(mission_with(tmp_path, link))
    assert re.search(r"mission\.yaml:\d+", caught.value.message)


def test_stations_are_needed_where_passes_decide(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs at least one, or a link with window_h"):
        load_mission(mission_with(tmp_path, documented(), stations=False))
