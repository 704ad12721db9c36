"""The commands: exit codes, JSON keys, and that help comes at once."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml
from test_omm import PLAIN

import hil.cli
import hil.client
from hil.errors import BenchError, BoardError, ExitCode, UsageError
from hil.inventory import load_board_type
from hil.mission import timeline_file

ROOT = Path(__file__).resolve().parents[2]
TLE = ROOT / "fixtures/tle/ref_qwen3_535_ltdn1030.tle"


def run(*arguments: str | Path) -> int:
    return hil.cli.run([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), ExitCode.USAGE),
        (BenchError("x"), ExitCode.BENCH),
        (BoardError("x"), ExitCode.FAIL),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (RuntimeError("a bug of ours"), ExitCode.BENCH),
    ],
)
def test_what_goes_wrong_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: ExitCode
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hil.cli.cli, "main", fail)
    assert run("doctor") == code
    assert capsys.readouterr().err


def test_a_wrong_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("orbit", "passes", "--nonsense") == ExitCode.USAGE
    assert "No such option" in capsys.readouterr().err


def test_no_bench_named_says_what_to_write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HIL_BENCH", raising=False)
    assert run("doctor") == ExitCode.USAGE
    assert "--bench FILE or HIL_BENCH=FILE" in capsys.readouterr().err


def test_every_command_of_the_list_can_be_loaded() -> None:
    context = click.Context(hil.cli.cli)
    for name in hil.cli.cli.list_commands(context):
        command = hil.cli.cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert command.help


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from hil.cli import run; run(['--help']); print('numpy' in sys.modules, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"


def test_eclipses_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("orbit", "eclipses", "--tle", TLE, "--start", "2026-01-01T01:00:00Z", "--hours", "1.5", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["eclipses"]
    assert [list(row) for row in rows] == [["penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit"]]
    assert rows[0]["penumbra_entry"].startswith("2026-01-01T01:24:0")
    assert rows[0]["penumbra_entry"].endswith("Z")


def test_passes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--tle",
        TLE,
        "--station",
        "40.45,116.86,0",
        "--start",
        "2026-01-01T00:00:00Z",
        "--hours",
        "3",
        "--json",
    )
    assert run("orbit", "passes", *arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["passes"]
    assert list(row) == ["aos", "los", "max_elevation_deg", "max_elevation_at"]
    assert row["aos"] < row["max_elevation_at"] < row["los"]


def test_track_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--tle",
        TLE,
        "--station",
        "40.45,116.86,0",
        "--start",
        "2026-01-01T02:12:00Z",
        "--seconds",
        "2",
        "--json",
    )
    assert run("orbit", "track", *arguments) == 0
    rows = json.loads(capsys.readouterr().out)["samples"]
    assert len(rows) == 3
    assert list(rows[0]) == ["time", "elevation_deg", "azimuth_deg", "range_m", "delay_s", "sunlit_fraction"]
    assert rows[0]["delay_s"] == pytest.approx(rows[0]["range_m"] / 299_792_458.0)


def test_seasons_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("orbit", "seasons", "--sso", "650,18", "--start", "2026-06-01T00:00:00Z", "--days", "3", "--json") == 0
    view = json.loads(capsys.readouterr().out)
    assert list(view) == ["seasons", "days", "sunlit_fraction", "beta_min_deg", "beta_max_deg"]
    (season,) = view["seasons"]
    assert list(season) == ["start", "end", "eclipses", "longest_s", "longest_at"]
    assert season["start"] < season["longest_at"] < season["end"] < "2026-06-04"
    assert 43 <= season["eclipses"] <= 46
    assert 0.7 < view["sunlit_fraction"] < 0.9
    assert run("orbit", "seasons", "--sso", "650,18", "--start", "2026-10-01T00:00:00Z", "--days", "3") == 0
    assert "no eclipse; in sunlight 100.00% of 3 days" in capsys.readouterr().out


def test_every_orbit_command_reads_a_message_and_a_design(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "sat.json"
    message.write_text(json.dumps([PLAIN]))
    common = ("--start", "2026-08-10T00:00:00Z", "--json")
    for command in (
        ("eclipses", "--hours", "1"),
        ("passes", "--station", "40,116,0", "--hours", "1"),
        ("track", "--station", "40,116,0", "--seconds", "1"),
        ("seasons", "--days", "0.1"),
    ):
        for source in (("--omm", message), ("--sso", "600,10.5")):
            assert run("orbit", *command, *source, *common) == 0
            said = capsys.readouterr()
            assert json.loads(said.out)
            assert ("STARCLOUD-1: the elements are 14." in said.err) == (source[0] == "--omm")
        assert run("orbit", *command, *common) == ExitCode.USAGE
        assert run("orbit", *command, "--omm", message, "--sso", "600,6", *common) == ExitCode.USAGE
        assert capsys.readouterr().err.count("exactly one of --tle FILE, --omm FILE, --sso ALT_KM,LTAN_H") == 2


def test_elements_years_old_are_refused_and_name_their_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("orbit", "eclipses", "--tle", TLE, "--start", "2032-01-01T00:00:00Z") == ExitCode.USAGE
    assert f"{TLE}: the elements of ref_qwen3" in capsys.readouterr().err


def test_a_tle_with_a_bad_checksum_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.tle"
    path.write_text(TLE.read_text().replace("0001000", "0001001"))
    assert run("orbit", "eclipses", "--tle", path, "--start", "2026-01-01T00:00:00Z") == ExitCode.USAGE
    error = capsys.readouterr().err
    assert "checksum" in error
    assert "bad.tle:" in error


@pytest.mark.parametrize("name", ["short", "star-compute-qwen3"])
def test_the_shipped_missions_close_their_energy(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("mission", "check", name, "--json")
    findings = json.loads(capsys.readouterr().out)["findings"]
    # The model file is only there where images were built; everything else must hold on every machine.
    bad = [item for item in findings if item["ok"] is False and "model" not in item["found"] + item["what"]]
    assert bad == []


def test_compile_writes_what_can_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    out = tmp_path / "short.npz"
    assert run("mission", "compile", "short", "--out", out, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert timeline_file.load(out).hash == summary["hash"]
    assert len(summary["contacts"]) > 10
    assert run("mission", "compile", "short", "--out", tmp_path / "short.txt") == ExitCode.USAGE


@pytest.mark.parametrize("what", ["board", "bench", "mission"])
def test_schemas_are_json_schema(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("schema", what) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["type"] == "object"
    assert told["additionalProperties"] is False  # an editor marks what is misspelt
    assert "2020-12" in told["$schema"]


def test_runs_are_listed_newest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, verdict in (("20260101-a", "pass"), ("20260102-b", "fail"), ("20260103-c", None)):
        (tmp_path / name).mkdir()
        if verdict:
            (tmp_path / name / "verdict.json").write_text(json.dumps({"verdict": verdict}))
    assert run("campaign", "list", "--runs", tmp_path, "--json") == 0
    told = json.loads(capsys.readouterr().out)["runs"]
    assert [(Path(row["run"]).name, row["verdict"]) for row in told] == [
        ("20260103-c", "unfinished"), ("20260102-b", "fail"), ("20260101-a", "pass"),
    ]  # fmt: skip
    assert run("campaign", "list", "--runs", tmp_path) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["unfinished", "fail", "pass"]


def test_runs_that_are_not_there_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("campaign", "list", "--runs", tmp_path / "missing") == ExitCode.USAGE
    assert f"no runs in {tmp_path}/missing: there is no such directory" in capsys.readouterr().err
    assert run("campaign", "list", "--runs", tmp_path) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert run("campaign", "list", "--runs", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_a_bench_file_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benches = ROOT / "fixtures/benches"
    for path, hint in (
        (tmp_path / "lab.yaml", f"YAML files in {tmp_path}: none"),
        (benches / "virtua.yaml", f"did you mean {benches}/virtual.yaml?"),
        (tmp_path / "gone/lab.yaml", f"the folder {tmp_path}/gone does not exist either"),
        (tmp_path, "; the virtual bench: "),
    ):
        assert run("doctor", "--bench", path) == ExitCode.USAGE
        said = capsys.readouterr().err
        assert f"no bench file at {path} (`--bench`, or HIL_BENCH)" in said
        assert hint in said


def test_a_board_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bench file and the board type say is read from them; only the daemon is not there."""
    content = yaml.safe_load((ROOT / "fixtures/benches/virtual.yaml").read_text())
    content["board_types"] = str(ROOT / "boards")
    content["boards"]["vb1"]["console"] |= {"user": "root", "password": "secret"}
    content["boards"]["vb1"]["lines"] = {"reset": "gpio:///dev/gpiochip0?line=17"}
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(content))
    sample = {"voltage_v": 12.002, "current_a": 0.5, "power_w": 6.001}
    state = {"state": "on", "fault": "", "power_epoch": 3, "power": sample, "link": None, "console": None}
    leases = [{"boards": ["vb1"], "holder": "ann@lab", "until": "2026-03-20T00:00:00.000Z", "reason": "soak"}]
    daemon = SimpleNamespace(status=lambda: {"boards": {"vb1": state}}, leases=lambda: leases)
    monkeypatch.setattr(hil.client, "attach", lambda bench: contextlib.nullcontext(daemon))

    assert run("board", "show", "vb1", "--bench", path, "--json") == 0
    told = capsys.readouterr().out
    shown = json.loads(told)
    assert list(shown) == ["name", "type", "features", "wiring", "limits", "lease", "power", "link", "console"]
    assert (shown["type"]["name"], shown["type"]["arch"]) == ("virtual-arm64", "aarch64")
    assert shown["wiring"]["power"][0] | {"supply": "psu1", "channel": 1} == shown["wiring"]["power"][0]
    assert (
        shown["limits"]["main"]["voltage_max_v"]
        == load_board_type(ROOT / "boards/virtual-arm64.yaml").supply.voltage_max_v
    )
    assert shown["lease"]["holder"] == "ann@lab"
    assert shown["power"] == {"state": "on", "fault": "", "power_epoch": 3, "sample": sample}
    assert "secret" not in told

    leases.clear()
    state |= {"fault": "did not go off", "power": None}
    assert run("board", "show", "--bench", path) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "fed by psu1 channel 1" in lines
    assert "lease free" in lines
    assert "power on, fault: did not go off" in lines
    assert "line reset: gpio:///dev/gpiochip0?line=17" in lines
    assert run("board", "show", "vb2", "--bench", path) == ExitCode.USAGE


def test_groups_are_listed_as_they_call_themselves() -> None:
    """The list stands apart from the modules, so that help imports none of them."""
    groups = {name: getattr(importlib.import_module(module), name) for name, (module, _) in hil.cli._COMMANDS.items()}
    told = {name: group.help for name, group in groups.items() if isinstance(group, click.Group)}
    assert len(told) >= 8
    assert told == {name: hil.cli._COMMANDS[name][1] for name in told}
