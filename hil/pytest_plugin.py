"""pytest plugin: boards of a bench as fixtures, one leased board a worker.

Which bench: `--bench FILE`, else HIL_BENCH. Without one, a test that asks for a board fails as an error with what to
write: a run with no bench must be loud, never silently green. Hardware is never driven implicitly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hil.errors import BoardError, HilError, UsageError

if TYPE_CHECKING:
    from hil.client import Bench, Board
    from hil.inventory import Mission

LEASE_WAIT_S = 300.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hil", "hardware in the loop, in orbit")
    group.addoption("--bench", metavar="FILE", default=None, help="bench file [env HIL_BENCH]")
    group.addoption("--board", metavar="NAME", default=None, help="use this board")
    group.addoption("--mission", metavar="FILE", default=None, help="mission file for the `mission` fixture")
    group.addoption("--runs", metavar="DIR", default="runs", help="where run directories go")
    group.addoption("--require-hardware", action="store_true", help="a virtual bench is an error")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "board(type=None, arch=None, features=()): the board this test needs")
    config.addinivalue_line("markers", "mission(name): the mission this test flies")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """A BoardError is a failure of the board under test, every other HilError an error of the lab.

    Wherever it was raised: a fixture that boots the board must not turn the board's fault into the lab's, and a test
    that loses its supply has not shown anything about the board. pytest and JUnit tell the two apart by the phase.
    """
    report: pytest.TestReport = yield  # type: ignore[misc,assignment]
    raised = call.excinfo.value if call.excinfo is not None else None
    if isinstance(raised, HilError) and call.when in ("setup", "call"):
        report.when = "call" if isinstance(raised, BoardError) else "setup"
        report.user_properties.append(("hil_error_arm", type(raised).__name__))
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Iterator[Bench]:
    """The bench's daemon, started when none runs."""
    from hil.client import attach
    from hil.inventory import load_bench

    file = pytestconfig.getoption("--bench") or os.environ.get("HIL_BENCH")
    if not file:
        raise UsageError("this test needs a bench and none was named", hint="pytest --bench FILE, or HIL_BENCH=FILE")
    found = load_bench(Path(file))
    if found.file.virtual is not None and pytestconfig.getoption("--require-hardware"):
        raise UsageError(f"{found.path} is a virtual bench and --require-hardware was given")
    with attach(found) as daemon:
        yield daemon


@pytest.fixture
def board(bench: Bench, request: pytest.FixtureRequest) -> Iterator[Board]:
    """A board of the bench under a lease: `--board NAME`, else the first free one that the `board` mark allows.

    Powered off at the end of the test by the end of the lease (`on_lease_end` in the bench file).
    """
    names = _candidates(bench, request)
    with bench.lease([names[0]], wait_s=LEASE_WAIT_S) if len(names) == 1 else _first_free(bench, names) as lease:
        yield bench.board(lease.boards[0], lease)


@pytest.fixture
def mission(request: pytest.FixtureRequest) -> Mission:
    """The mission of the `mission` mark, or of `--mission FILE`."""
    from hil.inventory import load_mission

    mark = request.node.get_closest_marker("mission")
    name = mark.args[0] if mark else request.config.getoption("--mission")
    if not name:
        raise UsageError("this test needs a mission", hint="pytest --mission FILE, or @pytest.mark.mission(FILE)")
    return load_mission(Path(name))


def _candidates(bench: Bench, request: pytest.FixtureRequest) -> list[str]:
    named = request.config.getoption("--board")
    boards = [bench.inventory.board(named)[0]] if named else list(bench.inventory.file.boards)
    mark = request.node.get_closest_marker("board")
    wanted: dict[str, Any] = dict(mark.kwargs) if mark else {}
    unknown = set(wanted) - {"type", "arch", "features"}
    if unknown:
        raise UsageError(f"mark `board` has no argument {', '.join(sorted(unknown))}", hint="type, arch, features")
    fits = []
    for name in boards:
        item = bench.inventory.file.boards[name]
        kind = bench.inventory.types[item.type]
        if (
            wanted.get("type") in (None, item.type)
            and wanted.get("arch") in (None, kind.arch)
            and set(wanted.get("features", ())) <= set(kind.features)
        ):
            fits.append(name)
    if not fits:
        told = ", ".join(f"{key} {value}" for key, value in wanted.items())
        raise UsageError(
            f"this test needs a board of {told}; bench {bench.inventory.name} offers {', '.join(boards)}",
            hint="name another with --board, or deselect the test" if named else "`hil board list` shows them",
        )
    return fits


def _first_free(bench: Bench, names: list[str]) -> Any:
    from hil.errors import BenchError

    for name in names[:-1]:
        try:
            return bench.lease([name])
        except BenchError:
            continue
    return bench.lease([names[-1]], wait_s=LEASE_WAIT_S)
