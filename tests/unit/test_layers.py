"""The layers import downwards only, and nothing heavy is imported at start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "hil"

BASE = {"errors", "model", "paths"}
ALLOWED = {
    "errors": set(),
    "model": set(),
    "paths": {"errors"},
    "mission": {"errors", "model"},
    # environment.py turns a mission file into what the engine compiles
    "inventory": BASE | {"mission"},
    "drivers": {"errors", "model"},
    "bench": BASE | {"inventory", "mission", "drivers"},
    # bench.journal and bench.sockets: file and wire formats that both ends of the daemon's API share
    "client": BASE | {"inventory", "drivers", "bench"},
    "inference": BASE,
    "firmware": BASE | {"inventory", "client"},
    "campaign": BASE | {"inventory", "mission", "drivers", "client", "inference", "firmware", "bench"},
    # QEMU boards are played to the daemon over wires; only file formats and process helpers are shared
    "virtual": BASE | {"inventory", "drivers", "inference"},
    "dashboards": {"errors"},
    "pytest_plugin": BASE | {"campaign", "client", "inventory", "mission"},
}
# campaign and client may use only what both ends of the daemon's API share
BENCH_SHARED = {"hil.bench.journal", "hil.bench.sockets"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hil":
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module.count(".") < 2 else {node.module}
            )
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "hil"}
    return names


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    relative = path.relative_to(ROOT)
    layer = relative.parts[0].removesuffix(".py")
    if layer in {"__init__", "cli"}:
        return
    for module in imports(path):
        target = layer_of(module)
        assert target in {layer, ""} | ALLOWED[layer], f"{layer} imports {module}"
        if layer in {"campaign", "client"} and target == "bench":
            assert any(module.startswith(shared) for shared in BENCH_SHARED), f"{layer} imports {module}"


@pytest.mark.parametrize("module", ["hil", "hil.cli", "hil.pytest_plugin"])
def test_start_is_light(module: str) -> None:
    heavy = ["numpy", "paramiko", "fastapi", "pydantic", "sgp4", "serial", "httpx", "prometheus_client"]
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
