"""Writes a compiled timeline to a file in the format that its name ends with.

`hil.mission.exports.write(timeline, path)` is the one door; `SUFFIXES` lists the formats. docs/missions.md describes
every column.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

from hil.errors import UsageError
from hil.mission.timeline import Timeline


def write(timeline: Timeline, path: Path) -> None:
    """Write `timeline` to `path`. Raises UsageError for a suffix that no format has, or a file that cannot be written.

    The longest suffix of `SUFFIXES` that the name ends with decides: `day.edges.csv` is a list of edges.
    """
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            try:
                if suffix == ".npz":
                    timeline.save(path)
                else:
                    path.write_text(_TEXTS[suffix](timeline), encoding="utf-8")
            except OSError as error:
                raise UsageError(f"cannot write {path}: {error.strerror}") from error
            return
    raise UsageError(f"{path}: unknown format", hint=f"end the name with one of {', '.join(SUFFIXES)}")


def edges_csv(timeline: Timeline) -> str:
    """Every edge as CSV: `utc`, `t_s`, `kind`, `detail`."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("utc", "t_s", "kind", "detail"))
    for edge in timeline.edges:
        rows.writerow((timeline.utc(edge.t_s), f"{edge.t_s:.6f}", edge.kind, edge.detail))
    return text.getvalue()


_TEXTS: dict[str, Callable[[Timeline], str]] = {
    ".csv": Timeline.to_csv,
    ".edges.csv": edges_csv,
}
SUFFIXES = (".npz", *_TEXTS)
