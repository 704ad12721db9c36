"""The programs that shipped missions run on a board, run here at a small size."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hil.campaign.program import read_reports

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "fixtures/programs"


def run(name: str, *arguments: object) -> dict[str, Any]:
    argv = [sys.executable, PROGRAMS / name, *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return {report.name: report.value for report in read_reports(done.stdout)}


def test_training_that_was_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    argv = [sys.executable, PROGRAMS / "train_char.py", "--dir", tmp_path, "--steps", "200", "--every", "20"]
    for _ in range(3):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        kept = tmp_path / "checkpoint.json"
        before = kept.stat().st_mtime_ns if kept.exists() else 0
        while process.poll() is None and not (kept.exists() and kept.stat().st_mtime_ns > before):
            time.sleep(0.005)
        process.kill()
        process.wait()
    told = run("train_char.py", "--dir", tmp_path, "--steps", 200, "--every", 20)
    assert told["resumed_exactly"] is True
    assert told["val_loss_difference"] == 0.0
    assert told["resumes"] == 3
    assert 0 <= told["lost_steps"] <= 20
    assert told["val_loss"] < run("train_char.py", "--dir", tmp_path / "fresh", "--steps", 20)["val_loss"]


def test_a_checkpoint_without_the_generator_is_noticed(tmp_path: Path) -> None:
    """What a resumption must not forget: with another generator state the weights differ."""
    run("train_char.py", "--dir", tmp_path, "--steps", 20, "--every", 10)
    kept = json.loads((tmp_path / "checkpoint.json").read_text())
    kept["chance"][1][0] ^= 1
    kept["chance"][1][-1] = 624
    (tmp_path / "checkpoint.json").write_text(json.dumps(kept))
    assert run("train_char.py", "--dir", tmp_path, "--steps", 40, "--every", 10)["resumed_exactly"] is False


def test_every_planted_target_is_found_and_no_other() -> None:
    told = run("tile_frame.py", "--side", 2000, "--targets", 12)
    assert (told["detections"], told["wrong_detections"]) == (12.0, 0.0)
    assert told["product_share"] < 0.01
    assert told["detections_sha256"] == run("tile_frame.py", "--side", 2000, "--targets", 12)["detections_sha256"]


def test_no_damaged_file_is_activated(tmp_path: Path) -> None:
    arguments = ["--dir", tmp_path, "--trials", 60, "--size", 4096]
    told = run("activation_trials.py", "--onboard", ROOT / "hil/inference/onboard.py", *arguments)
    assert (told["activation_trials"], told["wrong_activations"]) == (60.0, 0.0)
    assert told["old_model_kept"] is True
    assert told["right_file_activated"] is True


def test_an_activation_that_does_not_look_is_caught(tmp_path: Path) -> None:
    careless = tmp_path / "onboard.py"
    careless.write_text("import os\ndef activate(part, final, sha256):\n    os.replace(part, final)\n")
    told = run("activation_trials.py", "--onboard", careless, "--dir", tmp_path, "--trials", 12, "--size", 4096)
    assert told["wrong_activations"] == 12.0
    assert told["old_model_kept"] is False


def test_flipped_bits_are_flagged() -> None:
    told = run("golden.py", "--flips", 45, "--width", 24)
    assert told["harmful_flips"] > 10
    assert told["unflagged_wrong_answers"] == 0.0


@pytest.mark.parametrize("path", sorted(PROGRAMS.glob("*.py")), ids=lambda path: path.stem)
def test_programs_need_nothing_but_the_standard_library(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = [item.name for node in ast.walk(tree) if isinstance(node, ast.Import) for item in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
