"""docs/safety.md is what was measured: its table has a row for each row of the fault matrix, with figures."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/safety.md").read_text()
MATRIX = ROOT / "tests/bench/test_safety_matrix.py"


def rows_of_the_tests() -> dict[str, tuple[str, float]]:
    """`ROWS`, read without importing the tests: they need the directory of bench tests."""
    for node in ast.parse(MATRIX.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "ROWS":
            assert node.value is not None
            value: dict[str, tuple[str, float]] = ast.literal_eval(node.value)
            return value
    raise AssertionError("the fault matrix has no ROWS")


def rows_of_the_page() -> dict[str, tuple[str, str, float, float]]:
    table = PAGE.split("<!-- fault matrix: begin -->")[1].split("<!-- fault matrix: end -->")[0]
    found = re.findall(r"(?m)^\| `([a-z0-9-]+)` \| (.+?) \| (.*?) \| ([\d.]+) \| ([\d.]+) \|$", table)
    assert len(found) == len(table.strip().splitlines()) - 2, "a row of another form"
    return {row: (fault, cut_by, float(joules), float(seconds)) for row, fault, cut_by, joules, seconds in found}


def test_each_row_of_the_matrix_stands_in_the_table_and_no_other() -> None:
    tests, page = rows_of_the_tests(), rows_of_the_page()
    assert set(page) == set(tests)
    for row, (fault, cut_by, joules, seconds) in page.items():
        assert fault == tests[row][0], row
        assert cut_by, row
        assert 0 < seconds < tests[row][1], row
        assert joules >= 0, row


def test_the_page_names_every_key_of_the_envelope() -> None:
    from hil.bench.safety import Envelope

    for name in Envelope.__dataclass_fields__:
        assert f"`{name}`" in PAGE, name
