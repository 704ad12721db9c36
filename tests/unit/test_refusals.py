"""What `hil mission fly` and `hil virtual up` refuse before anything is touched: exit code 4, and what to do."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hil import cli, paths
from hil.errors import ExitCode
from hil.inventory import load_bench

ROOT = Path(__file__).parents[2]
SHORT = ROOT / "fixtures/missions/short.yaml"
TLE = ROOT / "fixtures/tle/ref_qwen3_535_ltdn1030.tle"
MODEL = b"not a model, but a file with a hash"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing but what a test puts there: no cache, no state, no sockets."""
    for variable in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_RUNTIME_DIR"):
        directory = tmp_path / variable
        directory.mkdir(mode=0o700)
        monkeypatch.setenv(variable, str(directory))
    monkeypatch.delenv("HIL_BENCH", raising=False)
    return tmp_path


def bench_file(home: Path) -> Path:
    text = (ROOT / "fixtures/benches/virtual.yaml").read_text()
    path = home / "bench.yaml"
    path.write_text(text.replace("name: virtual\n", f"name: virtual\nboard_types: {ROOT / 'boards'}\n", 1))
    return path


def mission_file(home: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    model = home / "model.gguf"
    model.write_bytes(MODEL)
    content = yaml.safe_load(SHORT.read_text())
    content["orbit"]["tle"] = str(TLE)
    content["model"] |= {"file": str(model), "sha256": hashlib.sha256(MODEL).hexdigest()}
    change(content)
    path = home / "mission.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def bad_tle(content: dict[str, Any], home: Path) -> None:
    line1 = next(line for line in TLE.read_text().splitlines() if line.startswith("1 "))
    bad = home / "bad.tle"
    bad.write_text(TLE.read_text().replace(line1, f"{line1[:-1]}{(int(line1[-1]) + 1) % 10}"))
    content["orbit"]["tle"] = str(bad)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda content, home: content["model"].update(sha256="0" * 64),
            [
                "mission.yaml: model file",
                "model.gguf has SHA-256",
                "the mission names 0000",
                "next: fly the right file",
            ],
        ),
        (
            lambda content, home: content["model"].update(file=str(home / "absent.gguf")),
            ["absent.gguf does not exist", "hil virtual images"],
        ),
        (bad_tle, ["bad.tle:4: checksum is", "the line adds up to", "next: a digit was altered or lost"]),
        (
            lambda content, home: content["criteria"].append({"name": "x", "measure": "boot.logins.max", "max": 1}),
            ["criterion x: no measure 'boot.logins.max'", "did you mean 'boot.login_s.max'?"],
        ),
        (
            lambda content, home: content["criteria"].append(
                {"name": "x", "measure": "power.max_w", "max": 1, "unit": "mW"}
            ),
            ["criterion x: power.max_w is a number in 'W', not mW", "write unit: 'W'"],
        ),
        (
            lambda content, home: content["orbit"].update(tle="absent.tle"),
            ["mission.yaml:", "no TLE file"],
        ),
    ],
    ids=["wrong-model", "no-model", "bad-tle", "unknown-measure", "wrong-unit", "no-tle"],
)
def test_a_mission_that_cannot_be_flown_touches_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any], Path], object], parts: list[str]
) -> None:
    bench = bench_file(home)
    mission = mission_file(home, lambda content: change(content, home))
    code = cli.run(["mission", "fly", str(mission), "--bench", str(bench), "--runs", str(home / "runs")])
    said = capsys.readouterr().err
    assert code == ExitCode.USAGE, said
    assert all(part in said for part in parts), said
    assert not (home / "runs").exists()
    found = load_bench(bench)
    assert list(found.runtime_dir.iterdir()) == []
    assert list(found.state_dir.iterdir()) == []


def test_a_run_directory_that_cannot_be_made(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the control of the test above: without its change, the mission gets this far."""
    mission = mission_file(home, lambda content: None)
    (home / "file").write_text("where a directory should be")
    runs = home / "file/runs"
    assert cli.run(["mission", "fly", str(mission), "--bench", str(bench_file(home)), "--runs", str(runs)]) == 4
    said = capsys.readouterr().err
    assert f"cannot create run directory {runs}" in said
    assert "Not a directory" in said
    assert "--runs DIR names another place" in said


def test_no_bench_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["mission", "fly", "short"]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "no bench named" in said
    assert "HIL_BENCH=" in said


def test_a_machine_without_qemu_is_told_the_package(home: Path) -> None:
    tools = home / "bin"
    tools.mkdir()
    for directory in (Path("/usr/bin"), Path("/bin")):
        for tool in directory.iterdir():
            if not tool.name.startswith("qemu-") and not (tools / tool.name).is_symlink():
                (tools / tool.name).symlink_to(tool)
    argv = [sys.executable, "-c", "from hil.cli import main; main()", "virtual", "up", str(bench_file(home))]
    environment = {**os.environ, "PATH": str(tools)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert "needs qemu-system-aarch64, qemu-system-x86_64" in done.stderr
    assert "apt-get install --no-install-recommends qemu-system-arm qemu-system-x86" in done.stderr
    assert list(paths.cache_dir().iterdir()) == [], "nothing is built for a bench that cannot run"
