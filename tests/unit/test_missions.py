"""Missions as files: cases laid over a mission, and every mission that comes with hil."""

from __future__ import annotations

from pathlib import Path

import pytest

from hil.campaign import plan
from hil.campaign.check import Place, check_mission
from hil.campaign.measures_timeline import OF_TIMELINE
from hil.campaign.verdict import check_criteria
from hil.errors import UsageError
from hil.inventory import Mission, load_bench, load_mission
from hil.inventory.environment import environment
from hil.inventory.mission import read_mission_file
from hil.mission.compile import compile_timeline
from hil.mission.timeline import Timeline

ROOT = Path(__file__).resolve().parents[2]
SHORT = (ROOT / "fixtures/missions/short.yaml").read_text().replace("../tle", str(ROOT / "fixtures/tle"))
CASES = """
cases:
  slow:
    title: slow uplink
    link: {uplink: {rate_bps: 64000}}
  designed:
    orbit: {tle: null, sso: {altitude_km: 600, ltan_h: 6}}
  wrong:
    link: {uplink: {rate_bps: fast}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mission.yaml"
    path.write_text(SHORT + CASES)
    return path


def test_a_case_is_laid_over_the_mission(path: Path) -> None:
    plain, slow = load_mission(path), load_mission(path, "slow")
    assert plain.file.link.uplink.rate_bps == 300_000
    assert slow.file.link.uplink.rate_bps == 64_000
    assert slow.file.link.downlink == plain.file.link.downlink
    assert (slow.file.title, slow.file.steps) == ("slow uplink", plain.file.steps)
    designed = load_mission(path, "designed")
    assert designed.orbit_path is None
    assert designed.file.orbit.sso is not None


def test_a_case_travels_in_the_path(path: Path) -> None:
    """The daemon and the pytest mark name a mission by its path alone."""
    slow = load_mission(path, "slow")
    assert slow.reference.name == "mission.yaml#slow"
    again = load_mission(slow.reference)
    assert (again.path, again.file) == (slow.path, slow.file)
    assert load_mission(path).reference == path


def test_a_case_written_into_the_file_is_the_one_that_counts(path: Path) -> None:
    path.write_text(path.read_text() + "\ncase: slow\n")
    assert read_mission_file(path).link.uplink.rate_bps == 64_000
    assert load_mission(path).file.case == "slow"


def test_a_wrong_value_in_a_case_is_named_with_its_own_line(path: Path) -> None:
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "rate_bps: fast" in text)
    with pytest.raises(UsageError, match=rf"mission\.yaml:{line}: `link\.uplink\.rate_bps` must be a plain number"):
        load_mission(path, "wrong")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("slwo", "did you mean 'slow'"), ("zzzzzz", "its cases: slow, designed, wrong")],
)
def test_an_unknown_case_names_the_nearest(path: Path, wrong: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_mission(path, wrong)


def test_a_case_cannot_rename_the_mission(path: Path) -> None:
    path.write_text(SHORT + "\ncases:\n  other: {name: other}\n")
    with pytest.raises(UsageError, match="case other must not change name"):
        load_mission(path)


# --- every mission that comes with hil --------------------------------------------------------------------------------

SHIPPED = sorted((ROOT / "fixtures/missions").glob("*.yaml"))
SCENARIOS = {
    "qwen3-in-pass", "model-upload-43-passes", "three-body-ring", "suncatcher-cluster", "suncatcher-mvp-burst",
    "starcloud1-train", "ai1-mini", "pelican-detect", "yam9-vlm", "kepler-odc", "sbc2-trickle", "opssat-reload",
    "eac-12w",
}  # fmt: skip
BENCH = load_bench(ROOT / "fixtures/benches/virtual.yaml")
BOARD = BENCH.board()[2]
# What a plain bench does not have; a finding may fail for want of it and for no other reason.
EXCUSES = ("the bench has no", "does not exist", "the bench's emulator carries", "sha256 is not written down")


def unexcused(mission: Mission) -> list[str]:
    found = check_mission(mission, BOARD, Place.of(BENCH))
    return [
        f"{item.what}: {item.found}"
        for item in found
        if item.ok is False and not any(excuse in item.found for excuse in EXCUSES)
    ]


def test_all_scenarios_are_there() -> None:
    assert {path.stem for path in SHIPPED} >= SCENARIOS


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_mission_compiles_and_fits_the_virtual_bench(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")  # no model file: it would be hashed
    mission = load_mission(path)
    assert mission.name == path.stem
    assert unexcused(mission) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_mission_says_where_it_comes_from(path: Path) -> None:
    for case in (None, *load_mission(path).file.cases):
        file = load_mission(path, case).file
        assert file.sources
        assert file.assumptions
        assert path.stem not in SCENARIOS or file.unknown
        check_criteria(file.criteria, str(path), file.reports)
        kinds = [step.kind for step in file.steps]
        assert (kinds[0], kinds[-1]) == ("boot", "end")
        shipped = [name for step in file.steps if step.run for name in step.run.files if name.startswith("../")]
        assert all((path.parent / name).is_file() for name in shipped)
        lab = [step.run for step in file.steps if step.run and not step.run.requires]
        assert all(name.startswith("../programs/") for run in lab for name in run.files)


@pytest.mark.soak
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_case_of_a_shipped_mission_fits_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    for case in load_mission(path).file.cases:
        assert unexcused(load_mission(path, case)) == [], case


def sky(name: str, case: str | None = None) -> Timeline:
    return compile_timeline(environment(load_mission(ROOT / f"fixtures/missions/{name}.yaml", case), BOARD))


def test_claims_that_the_missions_must_not_repeat() -> None:
    """Facts that were told wrongly of the flown systems, as the engine finds them."""
    flown = sky("starcloud1-train").environment.orbit
    assert flown.inclination_deg == pytest.approx(45.40, abs=0.01)  # not dawn-dusk
    assert flown.perigee_km == pytest.approx(500, abs=30)  # never 325 km
    year = OF_TIMELINE["year.sunlit_share"][2]
    for name in ("ai1-mini", "kepler-odc", "suncatcher-cluster"):
        assert 0.94 < year(sky(name))[0] < 0.97, "a low dawn-dusk orbit has an eclipse season"
    assert year(sky("ai1-mini", "inclined-30"))[0] < 0.7, "at 30 degrees there is an eclipse every orbit"
    ring = load_mission(ROOT / "fixtures/missions/kepler-odc.yaml").file.constellation
    assert ring is not None
    assert ring.isl is not None
    assert ring.isl.rate_bps == 2.5e9  # not 100 Gbit/s


def test_the_eclipse_season_of_the_cluster_is_where_it_belongs() -> None:
    assert len(sky("suncatcher-cluster").eclipses) == 15
    assert sky("suncatcher-cluster", "out-of-season").eclipses == ()
    days = OF_TIMELINE["year.eclipse_days"][2]
    assert days(sky("suncatcher-cluster"))[0] == pytest.approx(89.3, abs=3)  # from the seasons' root-found edges
    assert days(sky("ai1-mini"))[0] == pytest.approx(96.3, abs=3)


def test_forty_three_passes_carry_every_file_of_the_table() -> None:
    path = ROOT / "fixtures/missions/model-upload-43-passes.yaml"
    for case in ("qwen3-0.6b-q8", "qwen3-8b-q4"):  # the ends of the table
        mission = load_mission(path, case)
        need = plan.upload(mission, sky("model-upload-43-passes", case))
        assert need is not None
        assert need.bytes == mission.file.model.size_bytes
        assert need.contacts is not None
        assert 20 < need.contacts <= 43
