"""`hil mission`: what is listed, shown and compiled, with stable JSON keys; warnings once; what is refused and how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import hil.cli
from hil.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def run(*arguments: str | Path) -> int:
    return hil.cli.run(["mission", *map(str, arguments)])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A mission that flies elements a month old, for six hours."""
    path = tmp_path / "old.yaml"
    text = (ROOT / "fixtures/missions/short.yaml").read_text().replace("../tle", f"{ROOT}/fixtures/tle")
    text = text.replace("start: 2026-01-01T02", "start: 2026-02-01T02").replace("duration_h: 48", "duration_h: 6")
    path.write_text(text.replace("${cache}", "/nowhere"))
    return path


def told(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_list_finds_what_comes_with_hil(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--json") == 0
    rows = {row["name"]: row for row in told(capsys)["missions"]}
    assert {"short", "star-compute-qwen3"} <= set(rows)
    row = rows["short"]
    assert list(row) == [
        "name", "title", "path", "orbit", "elements", "start", "duration_h", "stations", "steps", "cases", "model",
        "model_file", "model_present",
    ]  # fmt: skip
    assert row["orbit"] == "535 km, 97.5°"
    assert row["steps"][:2] == ["boot", "upload"]
    assert row["start"] == "2026-01-01T02:00:00.000Z"


def test_list_of_a_directory_shows_the_good_and_names_the_bad(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("schema: 1\nname: bad\n")
    (tmp_path / "notes.txt").write_text("no mission")
    assert run("list", tmp_path) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert "ABSENT" in out
    assert "31.1 days old at the start" in out
    assert "bad.yaml" in err
    assert run("list", tmp_path, "--json") == ExitCode.USAGE
    value = told(capsys)
    assert [row["name"] for row in value["missions"]] == ["short"]
    assert [Path(row["path"]).name for row in value["unreadable"]] == ["bad.yaml"]
    assert run("list", old) == 0


def test_show_has_the_files_keys_and_what_follows_from_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "short", "--json") == 0
    value = told(capsys)
    assert {"schema", "name", "title", "start", "steps", "criteria", "derived"} <= set(value)
    assert list(value["derived"]) == [
        "path", "end", "orbit", "elements", "elements_epoch", "elements_age_days", "model_present", "warnings", "plot",
    ]  # fmt: skip
    for text in (value["start"], value["derived"]["end"], value["derived"]["elements_epoch"]):
        assert UTC.fullmatch(text), text
    assert value["derived"]["elements_age_days"] == pytest.approx(0.08, abs=0.01)


@pytest.mark.parametrize("command", ["show", "compile", "check"])
def test_old_elements_are_warned_of_once_on_standard_error(
    old: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    run(command, old, "--json")
    out, err = capsys.readouterr()
    assert err.count("warning:") == 1
    assert "warning: old.yaml:11: elements-age: " in err
    assert "days old" in err
    value = json.loads(out)
    (warning,) = value["derived"]["warnings"] if command == "show" else value["warnings"]
    assert warning in err


def test_an_array_that_is_too_small_is_warned_of_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "fixtures/missions/short.yaml").read_text().replace("../tle", f"{ROOT}/fixtures/tle")
    text = text.replace("bol_w: 44", "bol_w: 12")
    path = tmp_path / "small.yaml"
    path.write_text(text)
    line = next(number for number, row in enumerate(text.splitlines(), 1) if "bol_w" in row)
    assert run("compile", path, "--json") == 0
    out, err = capsys.readouterr()
    (warning,) = json.loads(out)["warnings"]
    assert err == f"warning: {warning}\n"
    assert warning.startswith(f"small.yaml:{line}: energy-balance: the array cannot close the energy budget: ")
    assert re.search(r"8\.\d\d Wh short", warning)


def test_show_draws(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "short.svg"
    assert run("show", old, "--plot", plot, "--from", "2", "--until", "2026-02-01T07:00:00Z") == 0
    assert capsys.readouterr().out == f"wrote {plot}\n"
    assert "timeline" in plot.read_text()


def test_compile_tells_contacts_eclipses_and_where_it_wrote(
    old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "day.edges.csv"
    assert run("compile", old, "--out", out, "--json") == 0
    value = told(capsys)
    assert list(value) == [
        "mission", "hash", "start", "end", "orbit", "elements_age_days", "contacts", "eclipses", "edges", "warnings",
        "out",
    ]  # fmt: skip
    assert out.read_text().splitlines()[0].startswith("utc,t_s,kind")
    assert len(out.read_text().splitlines()) == value["edges"] + 1
    assert list(value["contacts"][0]) == ["aos", "los", "stations", "max_elevation_deg"]
    assert list(value["eclipses"][0]) == ["penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit"]
    for text in (value["start"], value["end"], value["contacts"][0]["aos"], value["eclipses"][0]["umbra_exit"]):
        assert UTC.fullmatch(text), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "shrt"), "did you mean short?"),
        (("show", "short#nonsense"), "no case 'nonsense'"),
        (("show", "short", "--case", "nonsense"), "no case 'nonsense'"),
        (("show", "nowhere/short.yaml"), "no mission nowhere/short.yaml"),
        (("show", "short", "--from", "3"), "add --plot FILE.html"),
        (("show", "short", "--plot", "p.pdf"), "end the name with one of .html, .svg, .png"),
        (("show", "short", "--plot", "p.html", "--from", "99"), "--from 99 is after the end"),
        (("show", "short", "--plot", "nowhere/p.html"), "there is no directory nowhere"),
        (("compile", "short", "--out", "x.txt"), "end the name with one of"),
        (("list", "nowhere"), "'nowhere' does not exist"),
        (("fly", "short", "--rate", "0"), "--rate 0 cannot be flown"),
        (("fly", "short", "--rate", "fast"), "'fast' is not a valid float"),
        (("fly", "short", "--until", "yesterday"), "is not a mission time"),
        (("fly", "short", "--from", "20", "--until", "10"), "--until 10 is not after --from 20"),
        (("fly", "short"), "no bench named"),
    ],
)
def test_what_is_refused_says_what_to_write(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("HIL_BENCH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == ExitCode.USAGE
    out, err = capsys.readouterr()
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == [], "refused before anything was written"


def test_fly_hands_its_wishes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hil.campaign.pace import Pace
    from hil.cli import flight_display

    seen: dict[str, Any] = {}

    class Finished:
        exit_code = ExitCode.INVALID

    def fly(bench: object, mission: Any, **asked: Any) -> Finished:
        seen.update(asked, mission=mission.name)
        return Finished()

    monkeypatch.setattr(flight_display, "fly_with_display", fly)
    bench = ROOT / "fixtures/benches/virtual.yaml"
    options = ("--rate", "20", "--contacts-only", "--from", "1h", "--until", "2026-01-01T08:00:00Z")
    assert run("fly", "short", "--bench", bench, "--runs", tmp_path, *options) == ExitCode.INVALID
    assert seen["pace"] == Pace(rate=20.0, contacts_only=True, start_s=3600.0, until_s=21_600.0)
    assert (seen["mission"], seen["runs"], seen["board_name"]) == ("short", tmp_path, None)


@pytest.mark.parametrize(
    ("key", "now", "place", "reason"),
    [
        ("seed: 535\n", "", 1, "`seed` is missing"),
        ("  tle: ", "  kepler: {altitude_km: 600, inclination_deg: 30, eccentricity: 1.2}  # ", 11, "less than 1"),
        ("  tle: ", "  kepler: {altitude_km: 20, inclination_deg: 30}  # ", 11, "greater than 60"),
        ("39.50", "93.5", 15, "less than or equal to 90"),
        ("75.93, mask_deg: 5", "75.93, mask_table: [[0, 5], [180, 95]]", 15, "elevation 95"),
        ("start: 2026", "start: 2035", 11, "up to 5 are accepted"),
    ],
)
def test_what_cannot_be_is_refused_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, now: str, place: int, reason: str
) -> None:
    text = (ROOT / "fixtures/missions/short.yaml").read_text().replace("../tle", f"{ROOT}/fixtures/tle")
    assert key in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(key, now))
    assert run("compile", path) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert f"bad.yaml:{place}: " in error
    assert reason in error
