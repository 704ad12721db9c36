"""pytest plugin: boards of a bench as fixtures, one leased board a worker.

Which bench: `--bench FILE`, else HIL_BENCH. Without one, a test that asks for a board fails as an error with what to
write: a run with no bench must be loud, never silently green. Hardware is never driven implicitly.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hil.errors import BoardError, HilError, UsageError

if TYPE_CHECKING:
    from hil import inventory
    from hil.client import Bench, Board
    from hil.inventory import Mission

LEASE_WAIT_S = 300.0
MOST_SETS = 1000  # of boards that a request may name


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hil", "hardware in the loop, in orbit")
    group.addoption("--bench", metavar="FILE", default=None, help="bench file [env HIL_BENCH]")
    group.addoption(
        "--board", metavar="NAME", action="append", default=[], help="use this board; given several times: only these"
    )
    group.addoption(
        "--lease-wait-s", metavar="S", type=float, default=LEASE_WAIT_S, help="how long a test waits for its boards"
    )
    group.addoption(
        "--lease-priority", metavar="N", type=int, default=0, help="-10 to 10: who waits is served by it (default 0)"
    )
    group.addoption("--mission", metavar="FILE", default=None, help="mission file for the `mission` fixture")
    group.addoption("--runs", metavar="DIR", default="runs", help="where run directories go")
    group.addoption("--require-hardware", action="store_true", help="a virtual bench is an error")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "board(name=None, type=None, arch=None, features=()): the board this test needs; one mark for each of `boards`",
    )
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
    """The bench's daemon, started when none runs; `https://HOST:PORT#FINGERPRINT` for one on another host."""
    from hil.client import attach

    file = pytestconfig.getoption("--bench") or os.environ.get("HIL_BENCH")
    if not file:
        raise UsageError("this test needs a bench and none was named", hint="pytest --bench FILE, or HIL_BENCH=FILE")
    found = _load(file)
    if found.file.virtual is not None and pytestconfig.getoption("--require-hardware"):
        raise UsageError(f"{found.path} is a virtual bench and --require-hardware was given")
    with attach(found) as daemon:
        yield daemon


@pytest.fixture
def board(bench: Bench, request: pytest.FixtureRequest) -> Iterator[Board]:
    """A board of the bench under a lease: the first free one that the `board` mark and `--board` allow.

    The end of the test ends the lease: the board goes to its `on_lease_end` state, off unless the bench file says else.
    """
    needs = _needs(request)
    if len(needs) > 1:
        raise UsageError(f"this test has {len(needs)} `board` marks", hint="use the fixture `boards`")
    for (one,) in _boards(bench, request, needs):
        yield one


@pytest.fixture
def boards(bench: Bench, request: pytest.FixtureRequest) -> Iterator[list[Board]]:
    """A board for each `board` mark, in their order from the top, all leased at once or not at all."""
    yield from _boards(bench, request, _needs(request))


@pytest.fixture
def mission(request: pytest.FixtureRequest) -> Mission:
    """The mission of the `mission` mark, or of `--mission FILE`."""
    from hil.inventory import load_mission

    mark = request.node.get_closest_marker("mission")
    name = mark.args[0] if mark else request.config.getoption("--mission")
    if not name:
        raise UsageError("this test needs a mission", hint="pytest --mission FILE, or @pytest.mark.mission(FILE)")
    return load_mission(Path(name))


def _load(bench: str) -> inventory.Bench:
    from hil.client.remote import load_remote
    from hil.inventory import load_bench

    return load_remote(bench) if bench.startswith("https://") else load_bench(Path(bench))


def _boards(bench: Bench, request: pytest.FixtureRequest, needs: list[dict[str, Any]]) -> Iterator[list[Board]]:
    """A board for each need, all under one lease: of the sets that fit the first that is free."""
    sets = _sets([_candidates(bench, request, need) for need in needs])
    if not sets:
        raise UsageError(
            f"this test needs {len(needs)} boards at once; bench {bench.inventory.name} has not so many that fit",
            hint="`hil board list` shows them",
        )
    options = request.config
    with bench.lease(
        any_of=sets,
        wait_s=options.getoption("--lease-wait-s"),
        priority=options.getoption("--lease-priority"),
        reason=request.node.nodeid[-200:],
    ) as lease:
        # The daemon says which boards, not in which order they were asked for; boards that can only be leased together
        # may be more than that.
        names = next(names for names in sets if set(names) <= set(lease.boards))
        request.node.user_properties.append(("hil_boards", ",".join(names)))
        yield [bench.board(name, lease) for name in names]


def _sets(candidates: list[list[str]]) -> list[tuple[str, ...]]:
    """Every way to give each need a board of its own, in the bench file's order."""
    ways = (way for way in itertools.product(*candidates) if len(set(way)) == len(way))
    return list(itertools.islice(ways, MOST_SETS))


def _needs(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The arguments of the test's `board` marks, the topmost first; one board of any kind without a mark.

    Marks of the function take the place of its class's, and those of a class the place of its module's.
    """
    marks = list(request.node.iter_markers_with_node("board"))
    needs: list[dict[str, Any]] = []
    for mark in reversed([mark for node, mark in marks if node is marks[0][0]]):
        unknown = set(mark.kwargs) - {"type", "arch", "features", "name"}
        if unknown or mark.args:
            what = ", ".join(sorted(unknown)) if unknown else "without a name"
            raise UsageError(f"mark `board` has no argument {what}", hint="name, type, arch, features")
        needs.append(dict(mark.kwargs))
    if not needs:
        needs.append({})
    return needs


def _candidates(bench: Bench, request: pytest.FixtureRequest, wanted: dict[str, Any]) -> list[str]:
    named = request.config.getoption("--board")
    boards = [bench.inventory.board(name)[0] for name in named] if named else list(bench.inventory.file.boards)
    fits = []
    for name in boards:
        item = bench.inventory.file.boards[name]
        kind = bench.inventory.types[item.type]
        if (
            wanted.get("name") in (None, name)
            and wanted.get("type") in (None, item.type)
            and wanted.get("arch") in (None, kind.arch)
            and set(wanted.get("features", ())) <= bench.inventory.features(name)
        ):
            fits.append(name)
    if not fits:
        told = ", ".join(f"{key} {value}" for key, value in wanted.items())
        raise UsageError(
            f"this test needs a board of {told}; bench {bench.inventory.name} offers {', '.join(boards)}",
            hint="name another with --board, or deselect the test" if named else "`hil board list` shows them",
        )
    return fits
