"""Fixtures of bench tests: one virtual bench and one short flight shared by all who ask.

Tests that power an emulated board carry a group, so that at most two boards are up at once: `flight` (the shared
flight) or `boards` (all others, one after the other). `pytest -n 3 --dist loadgroup` gives a group to one worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus
import pytest
from benches import SHORT, Airborne, Flown, Fly, bench_up, write_bench
from matrix import SAFETY_ROWS, Lab, MakeLab, write_table

from hil import paths
from hil.inventory import Bench
from hil.virtual.images import ensure_prometheus

FLIGHT_S = 480.0  # three times what it takes on two idle cores
SAFETY_PAGE = Path(__file__).resolve().parents[2] / "docs/safety.md"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-safety-table", action="store_true", help="put this fault matrix into docs/safety.md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SAFETY_ROWS] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """The table is written whole or not at all: a row that failed has no figure."""
    if session.config.getoption("--write-safety-table") and exitstatus == 0:
        write_table(SAFETY_PAGE, session.config.stash[SAFETY_ROWS])


@pytest.fixture(scope="session", autouse=True)
def _groups_hold(request: pytest.FixtureRequest) -> None:
    """Refuse to run where groups fall apart in silence: each worker would fly a flight of its own."""
    grouped = [item.nodeid for item in request.session.items if item.get_closest_marker("xdist_group")]
    if getattr(request.config.option, "loadgroup", False) and not all("@" in nodeid for nodeid in grouped):
        pytest.fail("this pytest-xdist does not keep groups together with this pytest; pyproject.toml says which does")


@pytest.fixture(scope="session", autouse=True)
def _private(own_directories: None) -> None:
    """State and sockets of these tests are their own."""


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A virtual bench for tests that share it and leave it as they found it. Group `boards`."""
    with bench_up(write_bench(tmp_path_factory.mktemp("lab"), "lab")) as bench:
        yield bench


@pytest.fixture(scope="session")
def airborne(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airborne]:
    """The shared flight, begun and not waited for. Group `flight`; these tests come before those that use `flown`."""
    directory = tmp_path_factory.mktemp("flight")
    binary = ensure_prometheus(paths.cache_dir(), lambda line: None)
    with bench_up(write_bench(directory, "flight")) as bench, prometheus.running(binary, directory / "prom") as server:
        server.scrape(f"127.0.0.1:{bench.file.metrics_port}", bench=bench.name)
        with Fly(bench, SHORT, directory / "runs") as fly:
            yield Airborne(bench, fly, server)


@pytest.fixture(scope="session")
def flown(airborne: Airborne) -> Flown:
    """The shared flight at its end. Group `flight`."""
    fly = airborne.fly
    exit_code = fly.wait(FLIGHT_S)
    return Flown(airborne.bench, fly.run, exit_code, fly.said, airborne.server, fly.began_s, time.time())


@pytest.fixture
def make_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLab]:
    """Benches without an emulated board, each behind a supply whose terminals are watched."""
    labs: list[Lab] = []

    def make(**options: Any) -> Lab:
        labs.append(Lab(tmp_path, monkeypatch, **options))
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()
