"""What labs run, run as they run it: `pytest tests/campaigns --bench FILE` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from benches import ROOT, assert_off, has_netem

from hil.client import attach
from hil.inventory import Bench

pytestmark = pytest.mark.xdist_group("boards")


def campaign(lab: Bench, directory: Path, *words: str) -> dict[str, str | None]:
    """Run the campaigns on `lab`; what pytest counted."""
    junit = directory / "junit.xml"
    argv = [sys.executable, "-m", "pytest", ROOT / "tests/campaigns", "--bench", lab.path, f"--junitxml={junit}"]
    argv += ["-p", "no:cacheprovider", "--basetemp", directory / "base", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=180, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    suite = ET.parse(junit).getroot().find("testsuite")
    assert suite is not None
    return {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}


def assert_as_found(lab: Bench) -> None:
    assert_off(lab)
    assert not has_netem(lab)
    with attach(lab) as daemon:
        assert daemon.leases() == []


def test_a_smoke_test_passes_and_leaves_the_bench_as_it_found_it(lab: Bench, tmp_path: Path) -> None:
    counted = campaign(lab, tmp_path, "-k", "boots_and_answers_on_every_port")
    assert counted == {"tests": "1", "failures": "0", "errors": "0", "skipped": "0"}
    assert_as_found(lab)


@pytest.mark.soak
def test_the_whole_smoke_test_passes(lab: Bench, tmp_path: Path) -> None:
    assert campaign(lab, tmp_path) == {"tests": "2", "failures": "0", "errors": "0", "skipped": "0"}
    assert_as_found(lab)
