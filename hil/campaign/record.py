"""A run directory as typed values: what verdict and report read, and nothing else of it.

Samples are columns (numpy arrays of equal length, NaN where the record has no value), in order of `t_mono`: monotonic
wall seconds of the bench host. Events are the journal's lines as they were written.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hil.bench import journal
from hil.errors import BenchError, UsageError

Floats = NDArray[np.float64]
Texts = NDArray[np.str_]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Power:
    """Every power sample; `voltage_v`, `current_a`, `power_w` are what the supply measured, the rest is modelled."""

    t_mono: Floats
    t_mission: Floats
    rate: Floats
    board: Texts
    state: Texts
    voltage_set_v: Floats
    current_limit_a: Floats
    voltage_v: Floats
    current_a: Floats
    power_w: Floats
    energy_j: Floats
    mission_energy_j: Floats
    soc: Floats
    bus_voltage_v: Floats
    array_w: Floats
    array_used_w: Floats
    battery_w: Floats
    sunlit: Floats
    lateness_s: Floats
    gain: Floats


@dataclass(frozen=True, slots=True)
class Link:
    """Every link state that was applied, one row a direction; `rate_bps` as applied (already scaled by the clock)."""

    t_mono: Floats
    t_mission: Floats
    rate: Floats
    board: Texts
    direction: Texts
    delay_s: Floats
    loss: Floats
    rate_bps: Floats
    outage: Floats
    scheduled_s: Floats
    sent_s: Floats
    acknowledged_s: Floats
    verified_s: Floats
    cause: Texts


@dataclass(frozen=True, slots=True)
class Qdisc:
    """Counters of the emulator's queues, as read from it."""

    t_mono: Floats
    t_mission: Floats
    board: Texts
    direction: Texts
    sent_bytes: Floats
    sent_packets: Floats
    dropped: Floats
    backlog_packets: Floats


@dataclass(frozen=True, slots=True)
class Tokens:
    """Content chunks as they arrived at the client."""

    t_mono: Floats
    t_mission: Floats
    rate: Floats
    board: Texts
    query: Texts
    n: Floats
    plane: Texts


@dataclass(frozen=True, slots=True)
class Progress:
    """Cumulative progress of a workload, e.g. upload bytes that the board has acknowledged."""

    t_mono: Floats
    t_mission: Floats
    rate: Floats
    board: Texts
    kind: Texts
    value: Floats


@dataclass(frozen=True, slots=True)
class Thermal:
    """The modelled temperature of each thermal node; `may_run` 0 while the model has the workload rest."""

    t_mono: Floats
    t_mission: Floats
    rate: Floats
    board: Texts
    node: Texts
    temperature_c: Floats
    may_run: Floats


@dataclass(frozen=True, slots=True)
class Clock:
    """Segments of the mission clock: from `wall_start_s` (monotonic) on, `rate` mission seconds a second."""

    wall_start_s: Floats
    mission_start_s: Floats
    rate: Floats
    kind: Texts
    cause: Texts


@dataclass(frozen=True, slots=True)
class Event:
    """One journal line; `event["name"]` reads a field, KeyError-free access by `get`."""

    t_mono: float
    t_wall: str
    t_mission: float | None
    rate: float | None
    source: str
    kind: str
    data: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.data.get(name, default)


@dataclass(frozen=True, slots=True)
class Record:
    """Everything a run directory holds that verdict and report use."""

    directory: Path
    events: tuple[Event, ...]
    power: Power
    link: Link
    qdisc: Qdisc
    tokens: Tokens
    progress: Progress
    thermal: Thermal
    clock: Clock
    meta: Mapping[str, str]
    provenance: Mapping[str, Any]

    def of(self, *kinds: str) -> list[Event]:
        """Events of these kinds, oldest first."""
        return [event for event in self.events if event.kind in kinds]

    def rates_between(self, start_s: float, end_s: float) -> tuple[float, float] | None:
        """Lowest and highest clock rate within [start_s, end_s] (monotonic), from the clock's segments.

        What began with a change of rate may carry its time stamp from just before: a millisecond is forgiven.
        """
        starts, rates = self.clock.wall_start_s, self.clock.rate
        start_s, end_s = start_s + 1e-3, max(end_s - 1e-3, start_s + 1e-3)
        if len(starts) == 0 or end_s < starts[0]:
            return None
        first = max(int(np.searchsorted(starts, start_s, side="right")) - 1, 0)
        last = int(np.searchsorted(starts, end_s, side="right"))
        inside = rates[first : max(last, first + 1)]
        return float(np.min(inside)), float(np.max(inside))


def read(directory: Path) -> Record:
    """Read a run directory. Raises UsageError when it is none, BenchError when its files are damaged.

    Missing tables and rows are not an error here: a measure without evidence is `missing`, which is never green.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such run directory", hint="give a directory such as runs/<id>")
    events = tuple(_event(line) for line in journal.read_events(directory / "events.jsonl"))
    path = directory / "telemetry.sqlite"
    if not events and not path.exists():
        raise UsageError(f"{directory} holds neither events.jsonl nor telemetry.sqlite", hint="is it a run directory?")
    try:
        # A copied or finished run has no writer: read-only needs no lock file next to it.
        with closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro" if path.exists() else ":memory:", uri=True)
        ) as db:
            return Record(
                directory=directory,
                events=tuple(sorted(events, key=lambda event: event.t_mono)),
                power=_table(db, "power", Power, "t_mono"),
                link=_table(db, "link", Link, "t_mono"),
                qdisc=_table(db, "qdisc", Qdisc, "t_mono"),
                tokens=_table(db, "tokens", Tokens, "t_mono"),
                progress=_table(db, "progress", Progress, "t_mono"),
                thermal=_table(db, "thermal", Thermal, "t_mono"),
                clock=_table(db, "clock", Clock, "wall_start_s"),
                meta=_meta(db),
                provenance=_json(directory / "provenance.json"),
            )
    except sqlite3.DatabaseError as error:
        raise BenchError(f"{path}: cannot be read: {error}") from None


def _event(line: Mapping[str, Any]) -> Event:
    own = {"schema", "t_mono", "t_wall", "t_mission", "rate", "source", "kind"}
    return Event(
        t_mono=float(line.get("t_mono") or 0.0),
        t_wall=str(line.get("t_wall", "")),
        t_mission=line.get("t_mission"),
        rate=line.get("rate"),
        source=str(line.get("source", "")),
        kind=str(line["kind"]),
        data={key: value for key, value in line.items() if key not in own},
    )


def _table(db: sqlite3.Connection, table: str, columns: type[T], order: str) -> T:
    """One table as columns; read a column at a time, so that a day of samples never is a list of Python rows."""
    present = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
    read: dict[str, Floats | Texts] = {}
    for item in fields(columns):  # type: ignore[arg-type]
        name, text = item.name, item.type == "Texts"
        # Names come from the dataclasses above, not from outside.
        query = f"SELECT {name if name in present else 'NULL'} FROM {table} ORDER BY {order}, rowid"  # noqa: S608
        values: Iterator[Any] = (row[0] for row in db.execute(query)) if present else iter(())
        if text:
            read[name] = np.array(["" if value is None else str(value) for value in values], dtype=np.str_)
        else:
            read[name] = np.fromiter((np.nan if value is None else value for value in values), dtype=np.float64)
    return columns(**read)


def _meta(db: sqlite3.Connection) -> dict[str, str]:
    if not list(db.execute("PRAGMA table_info(meta)")):
        return {}
    return {str(key): str(value) for key, value in db.execute("SELECT key, value FROM meta")}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BenchError(f"{path}: not valid JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def spans(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Index ranges [first, last] over which `flags` is true without a break."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        yield int(first), int(end) - 1
