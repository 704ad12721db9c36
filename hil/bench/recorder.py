"""Telemetry of a run in `telemetry.sqlite`: one thread writes what the daemon measured, in batches.

The event loop never waits for the disk. A disk that refuses rows ends the recording loudly: the error goes to
`on_error` once (the run becomes invalid) and every later `put` raises it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from hil.errors import BenchError

Value = float | int | str | None

TABLES: Mapping[str, tuple[str, ...]] = {
    "power": (
        "t_mono", "t_mission", "rate", "board", "state", "voltage_set_v", "current_limit_a", "voltage_v", "current_a",
        "power_w", "energy_j", "mission_energy_j", "soc", "bus_voltage_v", "array_w", "array_used_w", "battery_w",
        "sunlit", "lateness_s", "gain",
    ),
    "inputs": (
        "t_mono", "t_mission", "rate", "board", "input", "state", "voltage_set_v", "voltage_v", "current_a", "power_w",
        "energy_j", "lateness_s",
    ),
    "link": (
        "t_mono", "t_mission", "rate", "board", "direction", "delay_s", "loss", "rate_bps", "outage", "scheduled_s",
        "sent_s", "acknowledged_s", "verified_s", "cause",
    ),
    "qdisc": ("t_mono", "t_mission", "board", "direction", "sent_bytes", "sent_packets", "dropped", "backlog_packets"),
    "tokens": ("t_mono", "t_mission", "rate", "board", "query", "n", "plane"),
    "progress": ("t_mono", "t_mission", "rate", "board", "kind", "value"),
    "ledger": (
        "t_mono", "t_mission", "rate", "board", "generated_j", "stored_j", "delivered_j", "mppt_loss_j",
        "mismatch_loss_j", "resistance_loss_j", "charge_loss_j", "bus_loss_j", "curtailed_j", "unserved_j",
        "metered_j", "gap_j", "metered_mission_j", "fed_j", "converter_j", "assumed_j",
    ),
    "thermal": ("t_mono", "t_mission", "rate", "board", "node", "temperature_c", "may_run"),
    "clock": ("wall_start_s", "mission_start_s", "rate", "kind", "cause"),
    "meta": ("key", "value"),
}  # fmt: skip
_TEXT = frozenset({"board", "state", "direction", "cause", "query", "plane", "kind", "key", "value", "node", "input"})
_INTEGER = frozenset({"outage", "sent_bytes", "sent_packets", "dropped", "backlog_packets", "n", "may_run"})


class Recorder:
    """Writes rows to `path`; `put` from any thread, `close` once.

    `batch_s`: the longest time a row waits before it is written. `backlog`: rows that may wait; more means that the
    disk cannot follow, which is an error, never a silent loss. `on_error` is called from the writing thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        on_error: Callable[[BenchError], None],
        batch_s: float = 0.25,
        backlog: int = 200_000,
    ) -> None:
        self.path = path
        self._on_error = on_error
        self._batch_s = batch_s
        self._backlog = backlog
        self._rows: list[tuple[str, tuple[Value, ...]]] = []
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._flushed = threading.Condition(self._lock)
        self._given = 0
        self._stored = 0
        self._urgent = False
        self._closing = False
        self._error: BenchError | None = None
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="hil-recorder", daemon=True)
        self._thread.start()
        ready.wait()
        if self._error is not None:
            raise self._error

    @property
    def error(self) -> BenchError | None:
        """Why recording has ended, or None."""
        return self._error

    def put(self, table: str, row: Mapping[str, Value]) -> None:
        """Queue one row. Raises ValueError for an unknown table or column, BenchError when recording has ended."""
        columns = TABLES.get(table)
        if columns is None or not row.keys() <= set(columns):
            unknown = table if columns is None else f"{table}.{sorted(row.keys() - set(columns))}"
            raise ValueError(f"telemetry has no {unknown}")
        values = tuple(row.get(column) for column in columns)
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise BenchError(f"{self.path} is closed")
            if len(self._rows) < self._backlog:
                self._rows.append((table, values))
                self._given += 1
                if len(self._rows) == 1:  # the writer waits for a first row, then for its batch's time
                    self._wake.notify()
                return
        raise self._fail(BenchError(f"{self.path}: the disk cannot follow, {self._backlog} rows wait"))

    def flush(self, timeout_s: float = 5.0) -> None:
        """Return when every row given so far is in the database. Blocking: call it from a thread."""
        with self._lock:
            target = self._given
            self._urgent = True
            self._wake.notify()
            self._flushed.wait_for(lambda: self._stored >= target or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error
            if self._stored < target:
                raise BenchError(f"{self.path}: {target - self._stored} rows were not stored within {timeout_s} s")

    def close(self) -> None:
        """Store what waits, close the database. Raises BenchError when rows were lost."""
        with self._lock:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self, ready: threading.Event) -> None:
        try:
            database = _open(self.path)
        except (sqlite3.Error, OSError) as error:
            self._error = _refused(self.path, error)
            ready.set()
            return
        ready.set()
        try:
            while self._store_batch(database):
                pass
        except sqlite3.Error as error:
            self._fail(_refused(self.path, error))
        finally:
            with contextlib.suppress(sqlite3.Error):  # closing checkpoints the WAL: a full disk refuses that too
                database.execute("PRAGMA journal_mode=DELETE")  # a finished record is one file, to copy and to read
                database.close()

    def _store_batch(self, database: sqlite3.Connection) -> bool:
        with self._lock:
            self._wake.wait_for(lambda: self._rows or self._closing or self._urgent or self._error is not None)
            # Collect for one batch period: one transaction, one sync, however fast the rows come.
            self._wake.wait_for(lambda: self._closing or self._urgent or self._error is not None, self._batch_s)
            rows, self._rows = self._rows, []
            self._urgent = False
            ending = self._closing or self._error is not None
        groups: dict[str, list[tuple[Value, ...]]] = {}
        for table, values in rows:
            groups.setdefault(table, []).append(values)
        with database:
            for table, group in groups.items():
                database.executemany(_insert(table), group)
        with self._lock:
            self._stored += len(rows)
            self._flushed.notify_all()
        return not ending

    def _fail(self, error: BenchError) -> BenchError:
        """End the recording; tell the owner the first time. Call it without the lock: the owner may call back."""
        with self._lock:
            first = self._error is None
            self._error = error = self._error or error
            self._rows.clear()
            self._wake.notify_all()
            self._flushed.notify_all()
        if first:
            self._on_error(error)
        return error


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=5.0)
    database.execute("PRAGMA journal_mode=WAL")
    # NORMAL: a power cut of the host may cost the last batch, never the file; the journal is what is fsynced.
    database.execute("PRAGMA synchronous=NORMAL")
    with database:
        for table, columns in TABLES.items():
            key = " PRIMARY KEY" if table == "meta" else ""
            typed = ", ".join(f"{column} {_kind(column)}{key if column == 'key' else ''}" for column in columns)
            database.execute(f"CREATE TABLE IF NOT EXISTS {table} ({typed})")
    return database


def _insert(table: str) -> str:
    columns = TABLES[table]
    return f"INSERT OR REPLACE INTO {table} VALUES ({','.join('?' * len(columns))})"  # noqa: S608  (our own table names)


def _kind(column: str) -> str:
    if column in _TEXT:
        # `value` holds numbers in `progress` and text in `meta`: no affinity, SQLite keeps what it is given.
        return "" if column == "value" else "TEXT"
    return "INTEGER" if column in _INTEGER else "REAL"


def _refused(path: Path, error: Exception) -> BenchError:
    return BenchError(
        f"cannot record to {path}: {error}", hint="free disk space and run again; what was recorded is incomplete"
    )
