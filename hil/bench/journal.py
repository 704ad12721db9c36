"""The journal of a run, `events.jsonl`: one JSON object a line, appended with one write and synced to the disk.

The daemon and the campaign append to the same file. O_APPEND makes each write land whole at the end; a crash can tear
only the last line, which `read_events` leaves out and the next `Journal` closes with a `torn` event.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hil.errors import BenchError

SCHEMA = 1
TORN = "torn"
_OWN_FIELDS = frozenset({"schema", "t_mono", "t_wall", "t_mission", "rate", "source", "kind"})


class Journal:
    """Appends events to one file. Safe to call from several threads.

    `stamp` returns (mission seconds, clock rate) of this moment, or None without a flight. With `on_error` the sync
    to disk runs on a thread of its own (an event loop must not wait for a disk) and a failure is handed to it as a
    BenchError; without it `write` returns only when the event is on the disk.
    """

    def __init__(
        self,
        path: Path,
        source: str,
        *,
        stamp: Callable[[], tuple[float, float] | None] | None = None,
        on_error: Callable[[BenchError], None] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self._source = source
        self._stamp = stamp or (lambda: None)
        self._on_error = on_error
        self._monotonic = monotonic
        self._wall = wall
        self._lock = threading.Lock()
        self._dirty = threading.Event()
        self._closing = False
        self._error: BenchError | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            torn = _ends_torn(self._fd)
        except OSError as error:
            raise _failed(path, error) from error
        self._thread: threading.Thread | None = None
        if on_error is not None:
            self._thread = threading.Thread(target=self._sync_forever, name="hil-journal", daemon=True)
            self._thread.start()
        if torn:
            # Close the torn line, and say that it is torn, so that a reader can tell a crash from a damaged file.
            self._append(b"\n")
            self.write(TORN)

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one event and return it. Raises BenchError when the disk refuses it, ValueError for reserved names.

        A caller that knows better than `stamp` when the event happened may give `t_mono`, `t_mission` and `rate`.
        """
        reserved = _OWN_FIELDS.difference(("t_mono", "t_mission", "rate")).intersection(fields)
        if reserved:
            raise ValueError(f"journal fields {sorted(reserved)} are written by the journal itself")
        if self._error is not None:
            raise self._error
        stamp = self._stamp()
        event: dict[str, Any] = {
            "schema": SCHEMA,
            "t_mono": self._monotonic(),
            "t_wall": utc_text(self._wall()),
            "t_mission": None if stamp is None else stamp[0],
            "rate": None if stamp is None else stamp[1],
            "source": self._source,
            "kind": kind,
        }
        event.update(fields)
        self._append(json.dumps(event, separators=(",", ":"), default=str).encode() + b"\n")
        if self._thread is None:
            self._sync()
        else:
            self._dirty.set()
        return event

    def close(self) -> None:
        """Sync and close. Raises BenchError when the last events could not be stored."""
        if self._fd < 0:
            return
        if self._thread is not None:
            self._closing = True
            self._dirty.set()
            self._thread.join()
        elif self._error is None:
            self._sync()
        fd, self._fd = self._fd, -1
        os.close(fd)
        if self._error is not None:
            raise self._error

    def _append(self, line: bytes) -> None:
        with self._lock:
            if self._fd < 0:
                raise BenchError(f"journal {self.path} is closed")
            try:
                written = os.write(self._fd, line)
            except OSError as error:
                self._error = _failed(self.path, error)
                raise self._error from error
            if written != len(line):
                self._error = BenchError(
                    f"journal {self.path}: only {written} of {len(line)} bytes were stored",
                    hint="the disk is full: free space and run again; this run is invalid",
                )
                raise self._error

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._error = _failed(self.path, error)
            raise self._error from error

    def _sync_forever(self) -> None:
        while True:
            self._dirty.wait()
            self._dirty.clear()
            closing = self._closing
            try:
                self._sync()
            except BenchError as error:
                if self._on_error is not None:
                    self._on_error(error)
                return
            if closing:
                return

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a journal, oldest first; an absent file is an empty journal.

    A torn last line is left out, as is one that a `torn` event follows. Any other broken line raises BenchError.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BenchError(f"cannot read journal {path}: {error.strerror}") from error
    events: list[dict[str, Any]] = []
    broken: int | None = None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        event = _parsed(line)
        if broken is not None and (event is None or event["kind"] != TORN):
            break
        broken = number if event is None else None
        if event is not None:
            events.append(event)
    if broken is not None and any(lines[broken:]):
        raise BenchError(f"{path}:{broken}: not a journal event", hint="the file was damaged after it was written")
    return events


def utc_text(wall_s: float) -> str:
    """Wall time as `2026-03-20T00:00:00.000Z`."""
    moment = datetime.fromtimestamp(wall_s, tz=UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event else None


def _ends_torn(fd: int) -> bool:
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, 1, size - 1) != b"\n"


def _failed(path: Path, error: OSError) -> BenchError:
    return BenchError(
        f"cannot write journal {path}: {error.strerror}", hint="free disk space and run again; this run is invalid"
    )
