"""The virtual bench for tests: its own ports, its own state, one board and one short flight shared by all who ask."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hil.inventory import Bench, load_bench
from hil.virtual import supervisor
from hil.virtual.config import virtual_bench

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def write_bench(directory: Path, name: str = "virtual") -> Path:
    """The shipped virtual bench with ports of its own."""
    text = (ROOT / "fixtures/benches/virtual.yaml").read_text()
    text = text.replace("name: virtual\n", f"name: {name}\nboard_types: {ROOT / 'boards'}\n", 1)
    for port in ("15025", "15122", "15022"):
        assert port in text
        text = text.replace(port, str(free_port()))
    path = directory / "bench.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leases, journals and the boards' disks of tests never mix with those of the person who runs them."""
    state = tmp_path_factory.mktemp("state")
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(state)
    yield
    shutil.rmtree(state, ignore_errors=True)
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@contextmanager
def bench_up(directory: Path, name: str) -> Iterator[Bench]:
    """A virtual bench that is up, and down again at the end whatever happened."""
    from hil.client import attach
    from hil.client.http import DaemonGone

    bench = load_bench(write_bench(directory, name))
    config = virtual_bench(bench)
    supervisor.up(config)
    try:
        yield bench
    finally:
        try:
            with attach(bench, start=False) as daemon:
                daemon.stop(force=True)
        except DaemonGone:
            pass
        supervisor.down(config)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A virtual bench for tests that share it and leave it as they found it."""
    with bench_up(tmp_path_factory.mktemp("lab"), "lab") as bench:
        yield bench


@dataclass(frozen=True)
class Flown:
    """The shared short flight: its bench, its run directory, its exit code and what Prometheus saw of it."""

    bench: Bench
    run: Path
    exit_code: int
    said: tuple[str, ...]


