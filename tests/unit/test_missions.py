"""Missions as files: cases laid over a mission, and every mission that comes with hil."""

from __future__ import annotations

from pathlib import Path

import pytest

from hil.errors import UsageError
from hil.inventory import load_mission
from hil.inventory.mission import read_mission_file

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
