"""The pytest plugin, by running pytest on small test files: arms of errors, benches that must be named, marks."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

# Loaded here, or each run of pytest below would import it all anew.
import hil.client
import hil.inventory  # noqa: F401

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
VIRTUAL = ROOT / "fixtures/benches/virtual.yaml"
OURS = ("-p", "hil.pytest_plugin", "-p", "no:cacheprovider")

# A bench whose daemon is not needed: it leases what it is asked for and remembers it.
FAKE_BENCH = """
import contextlib
from types import SimpleNamespace
import pytest
from hil.errors import BenchError
from hil.inventory import load_bench
from pathlib import Path

busy = set()
asked = []

class FakeBench:
    def __init__(self, inventory):
        self.inventory = inventory

    @contextlib.contextmanager
    def _leased(self, names):
        yield SimpleNamespace(boards=tuple(names))

    def lease(self, any_of, wait_s, priority, reason):
        asked.append({"any_of": any_of, "wait_s": wait_s, "priority": priority, "reason": reason})
        for names in any_of:
            if not busy & set(names):
                return self._leased(sorted(names))
        raise BenchError("leased by another")

    def board(self, name, lease):
        assert name in lease.boards
        return SimpleNamespace(name=name)

@pytest.fixture(scope="session")
def bench(pytestconfig):
    return FakeBench(load_bench(Path(pytestconfig.getoption("--bench"))))
"""

TWO_KINDS = """
schema: 1
name: two
board_types: {types}
supplies:
  psu1: {{driver: scpi, dialect: rigol-dp800, address: "tcp://127.0.0.1:1"}}
boards:
  jetson: {{type: jetson-orin-nano, power: [{{supply: psu1, channel: 1}}]}}
  virtual: {{type: virtual-arm64, power: [{{supply: psu1, channel: 2}}], features: [isl]}}
"""


@pytest.fixture(autouse=True)
def _no_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HIL_BENCH", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # no other plugin is in the way, nor to be loaded


def counted(file: Path) -> dict[str, int]:
    suite = ET.parse(file).getroot().find("testsuite")
    assert suite is not None
    return {name: int(suite.get(name, "-1")) for name in ("tests", "failures", "errors", "skipped")}


def test_without_a_bench_a_run_is_loud_and_never_green(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_board(board): pass\ndef test_bench(bench): pass")
    result = pytester.runpytest(*OURS)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        ["*this test needs a bench and none was named*", "*next: pytest --bench FILE, or HIL_BENCH=FILE*"]
    )


def test_a_bench_from_the_environment_counts_as_named(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIL_BENCH", "absent.yaml")
    pytester.makepyfile("def test_bench(bench): pass")
    result = pytester.runpytest(*OURS)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*absent.yaml*"])
    result.stdout.no_fnmatch_line("E *none was named*")


def test_a_virtual_bench_is_an_error_where_hardware_is_required(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_board(board): pass")
    result = pytester.runpytest(*OURS, f"--bench={VIRTUAL}", "--require-hardware")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*virtual.yaml is a virtual bench and --require-hardware was given*"])


@pytest.mark.parametrize("where", ["call", "setup"])
@pytest.mark.parametrize(
    ("error", "failures", "errors"),
    [("BoardError", 1, 0), ("BenchError", 0, 1), ("SafetyError", 0, 1), ("UsageError", 0, 1)],
)
def test_the_boards_fault_is_a_failure_and_the_labs_an_error(
    pytester: pytest.Pytester, where: str, error: str, failures: int, errors: int
) -> None:
    """Wherever it is raised: a fixture that boots the board must not turn the board's fault into the lab's."""
    body = {
        "call": f"def test_it(): raise {error}('what happened', hint='what to do')",
        "setup": f"@pytest.fixture\ndef boot(): raise {error}('what happened', hint='what to do')\n"
        "def test_it(boot): pass",
    }[where]
    pytester.makepyfile(f"import pytest\nfrom hil.errors import *\n{body}\ndef test_other(): pass")
    result = pytester.runpytest(*OURS, "--junitxml=junit.xml")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, failed=failures, errors=errors)
    found = counted(pytester.path / "junit.xml")
    assert found == {"tests": 2, "failures": failures, "errors": errors, "skipped": 0}
    result.stdout.fnmatch_lines(["*what happened*", "*next: what to do*"])


def test_other_failures_stay_what_they_are(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import pytest\n"
        "def test_assertion(): assert 1 == 2\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_fixture(broken): pass\n"
        "def test_skip(): pytest.skip('no')\n"
        "def test_pass(): pass\n"
    )
    result = pytester.runpytest(*OURS, "--junitxml=junit.xml")
    result.assert_outcomes(passed=1, failed=1, errors=1, skipped=1)
    assert counted(pytester.path / "junit.xml") == {"tests": 4, "failures": 1, "errors": 1, "skipped": 1}


def two_kinds(pytester: pytest.Pytester) -> Path:
    pytester.makeconftest(FAKE_BENCH)
    path = pytester.path / "two.yaml"
    path.write_text(TWO_KINDS.format(types=ROOT / "boards"))
    return path


@pytest.mark.parametrize(
    ("mark", "name"),
    [
        ("", "jetson"),
        ("@pytest.mark.board(type='virtual-arm64')", "virtual"),
        ("@pytest.mark.board(type='jetson-orin-nano')", "jetson"),
        ("@pytest.mark.board(arch='aarch64', features=['u-boot'])", "virtual"),
        ("@pytest.mark.board(features=['isl'])", "virtual"),
        ("@pytest.mark.board(name='virtual')", "virtual"),
    ],
)
def test_the_mark_chooses_the_board(pytester: pytest.Pytester, mark: str, name: str) -> None:
    bench = two_kinds(pytester)
    pytester.makepyfile(f"import pytest\n{mark}\ndef test_it(board): assert board.name == {name!r}")
    pytester.runpytest(*OURS, f"--bench={bench}").assert_outcomes(passed=1)


def test_a_board_that_is_taken_leaves_the_next_that_fits(pytester: pytest.Pytester) -> None:
    bench = two_kinds(pytester)
    pytester.makepyfile(
        "import conftest\nconftest.busy.add('jetson')\ndef test_it(board): assert board.name == 'virtual'"
    )
    pytester.runpytest(*OURS, f"--bench={bench}").assert_outcomes(passed=1)


def test_the_closest_mark_counts(pytester: pytest.Pytester) -> None:
    bench = two_kinds(pytester)
    pytester.makepyfile("""
        import pytest
        pytestmark = pytest.mark.board(type="jetson-orin-nano")
        def test_module(board): assert board.name == "jetson"
        @pytest.mark.board(type="virtual-arm64")
        def test_function(board): assert board.name == "virtual"
    """)
    pytester.runpytest(*OURS, f"--bench={bench}").assert_outcomes(passed=2)


def test_several_boards_come_at_once_each_as_its_mark_says(pytester: pytest.Pytester) -> None:
    bench = two_kinds(pytester)
    pytester.makepyfile("""
        import conftest, pytest
        names = lambda boards: [board.name for board in boards]
        def test_one(boards): assert names(boards) == ["jetson"]
        @pytest.mark.board()
        @pytest.mark.board(type="jetson-orin-nano")
        def test_any_and_jetson(boards):
            assert names(boards) == ["virtual", "jetson"]
            assert conftest.asked[-1]["any_of"] == [("virtual", "jetson")]
            assert conftest.asked[-1]["wait_s"] == 7 and conftest.asked[-1]["priority"] == 3
            assert conftest.asked[-1]["reason"].endswith("::test_any_and_jetson")
        @pytest.mark.board()
        @pytest.mark.board()
        @pytest.mark.board()
        def test_three(boards): pass
        @pytest.mark.board()
        @pytest.mark.board()
        def test_two_in_one(board): pass
    """)
    result = pytester.runpytest(*OURS, f"--bench={bench}", "--lease-wait-s=7", "--lease-priority=3", "--junitxml=j.xml")
    result.assert_outcomes(passed=2, errors=2)
    result.stdout.fnmatch_lines(["*needs 3 boards at once; bench two has not so many*", "*use the fixture `boards`*"])
    assert '<property name="hil_boards" value="virtual,jetson" />' in (pytester.path / "j.xml").read_text()


def test_the_option_names_the_board(pytester: pytest.Pytester) -> None:
    bench = two_kinds(pytester)
    pytester.makepyfile("def test_it(board): assert board.name == 'virtual'")
    pytester.runpytest(*OURS, f"--bench={bench}", "--board", "virtual").assert_outcomes(passed=1)
    both = ("--board", "jetson", "--board", "virtual")
    two = "import pytest\n@pytest.mark.board()\n@pytest.mark.board()\ndef test_it(boards): pass"
    pytester.makepyfile(test_both=two)
    pytester.runpytest(*OURS, f"--bench={bench}", *both, "test_both.py").assert_outcomes(passed=1)
    pytester.runpytest(*OURS, f"--bench={bench}", *both[:2], "test_both.py").assert_outcomes(errors=1)
    (pytester.path / "test_both.py").unlink()
    result = pytester.runpytest(*OURS, f"--bench={bench}", "--board", "venus")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*bench two has no board 'venus'*"])


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("type='agx'", "*needs a board of type agx; bench two offers jetson, virtual*"),
        ("features=['warp']", "*needs a board of features *warp*"),
        ("colour='red'", "*mark `board` has no argument colour*"),
    ],
)
def test_a_mark_that_no_board_fits_is_an_error_not_a_skip(pytester: pytest.Pytester, mark: str, says: str) -> None:
    bench = two_kinds(pytester)
    pytester.makepyfile(f"import pytest\n@pytest.mark.board({mark})\ndef test_it(board): pass")
    result = pytester.runpytest(*OURS, f"--bench={bench}")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([says])


def test_a_named_board_that_the_mark_excludes_is_an_error(pytester: pytest.Pytester) -> None:
    bench = two_kinds(pytester)
    pytester.makepyfile("import pytest\n@pytest.mark.board(type='jetson-orin-nano')\ndef test_it(board): pass")
    result = pytester.runpytest(*OURS, f"--bench={bench}", "--board", "virtual")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*needs a board of type jetson-orin-nano; bench two offers virtual*", "*next: name another with --board*"]
    )


def test_the_mission_comes_from_the_mark_or_the_option(pytester: pytest.Pytester) -> None:
    short = ROOT / "fixtures/missions/short.yaml"
    pytester.makepyfile(
        f"import pytest\n@pytest.mark.mission({str(short)!r})\ndef test_mark(mission): assert mission.name == 'short'\n"
        "def test_option(mission): assert mission.name == 'short'"
    )
    pytester.runpytest(*OURS, f"--mission={short}").assert_outcomes(passed=2)
    result = pytester.runpytest(*OURS)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*this test needs a mission*", "*pytest --mission FILE*"])
