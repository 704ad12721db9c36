"""docs/supplies.md says what the dialects say: its table is made from them and compared here.

`python tests/unit/test_supply_docs.py` writes it anew.
"""

from __future__ import annotations

from pathlib import Path

from hil.drivers.dialects import DIALECTS, Dialect

DOCUMENT = Path(__file__).parents[2] / "docs" / "supplies.md"
BEGIN, END = "<!-- table: made by tests/unit/test_supply_docs.py -->\n", "<!-- end of table -->\n"
HEAD = "| dialect | family | models known | OVP | OCP | own watchdog | dips by | array | gap | channels one lease | not from a manual |"  # noqa: E501


def table() -> str:
    """One row a dialect."""
    rows = [HEAD, "|" + "---|" * (HEAD.count("|") - 1), *(_row(speak) for speak in DIALECTS.values())]
    return "\n".join(rows) + "\n"


def _row(speak: Dialect) -> str:
    records = [record for _, record in speak.models]
    one = records[0]
    ocp = "at the current limit" if one.ocp_follows_limit else "yes"
    watchdog = f"{one.watchdog.delay_min_s:g} to {one.watchdog.delay_max_s:g} s" if one.watchdog else ""
    unknown, total = len(speak.unverified()), len(speak.commands)
    cells = (
        f"`{speak.name}`",
        speak.title,
        ", ".join(record.model for record in records),
        "yes" if one.ovp else "**none**",
        ocp if one.ocp else "**none**",
        watchdog,
        "its list" if speak.has("load_list") else "two writes",
        "yes" if one.solar_array else "",
        f"{speak.min_gap_s * 1000:g} ms" if speak.min_gap_s else "",
        "yes" if speak.lease_group else "",
        f"{unknown} of {total}" if unknown else "",
    )
    return "| " + " | ".join(cells) + " |"


def test_the_table_in_the_document_is_made_from_the_dialects() -> None:
    assert BEGIN + table() + END in DOCUMENT.read_text()


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
