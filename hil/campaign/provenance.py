"""What a run was made with, `provenance.json`: versions, hashes, host, so that a figure can be traced."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import hil
from hil.errors import BenchError
from hil.inventory import Bench, Mission

PACKAGES = ("numpy", "sgp4", "paramiko", "pydantic", "fastapi", "prometheus-client", "httpx", "pyserial")


def write_provenance(run: Path, bench: Bench, mission: Mission, board: str) -> None:
    """Write what is known before the flight. `add_provenance` puts in what the instruments say."""
    virtual = bench.file.virtual is not None
    content: dict[str, Any] = {
        "schema": 1,
        "hil": hil.__version__,
        "source": _commit(Path(hil.__file__).resolve().parent),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "host": {
            "kernel": f"{platform.system()} {platform.release()}",
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg(),
        },
        "mission": {
            "name": mission.name,
            "case": mission.file.case,
            "sha256": _sha256(mission.path),
            "seed": mission.file.seed,
        },
        "orbit": _orbit(mission),
        "bench": {"name": bench.name, "sha256": _sha256(bench.path), "virtual": virtual},
        "board": _board(bench, board),
        "model": {"title": mission.file.model.title, "sha256": mission.file.model.sha256},
    }
    _store(run, content)


def _orbit(mission: Mission) -> dict[str, Any]:
    from hil.inventory.environment import mission_orbit

    orbit = mission_orbit(mission)
    facts: dict[str, Any] = {"name": orbit.name, "epoch": orbit.epoch.isoformat()}
    if mission.orbit_path is None:
        return {**facts, "file": None, "age": "a design orbit does not age"}
    return {
        **facts,
        "file": mission.orbit_path.name,
        "elements_sha256": _sha256(mission.orbit_path),
        "elements_age_at_start_days": round(orbit.age_days(mission.start), 3),
    }


def _board(bench: Bench, board: str) -> dict[str, Any]:
    kind = bench.board(board)[2]
    facts = {
        "name": board,
        "type": kind.name,
        "hardware": kind.hardware,
        "features": sorted(bench.features(board)),
        "undervoltage_lockout_v": kind.supply.undervoltage_lockout_v,
    }
    if kind.modelled_power is not None:
        watts = kind.modelled_power
        facts["modelled_power"] = (
            f"{watts.idle_w:g} W idle to {watts.full_w:g} W at {watts.full_cpu_cores:g} host CPU core"
            f"{'' if watts.full_cpu_cores == 1 else 's'} used"
        )
    return facts


def add_provenance(run: Path, **facts: Any) -> None:
    """Add facts under new keys."""
    _store(run, {**json.loads((run / "provenance.json").read_text(encoding="utf-8")), **facts})


def _store(run: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a full disk must not cost what was known before."""
    part = run / ".provenance.json.part"
    try:
        part.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(part, run / "provenance.json")
    except OSError as error:
        raise BenchError(
            f"cannot write {run / 'provenance.json'}: {error.strerror}", hint="--runs DIR names another place"
        ) from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _commit(directory: Path) -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
