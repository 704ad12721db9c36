"""The recorder: batches, readers while writing, and a disk that refuses."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from hil.bench.recorder import TABLES, Recorder
from hil.errors import BenchError


def test_rows_come_back_as_given(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    errors: list[BenchError] = []
    recorder = Recorder(path, on_error=errors.append)
    recorder.put("tokens", {"t_mono": 1.5, "board": "vb1", "query": "q1", "n": 2, "plane": "payload"})
    recorder.put("meta", {"key": "bench", "value": "virtual"})
    recorder.put("meta", {"key": "bench", "value": "other"})
    recorder.close()
    database = sqlite3.connect(path)
    assert database.execute("SELECT * FROM tokens").fetchall() == [(1.5, None, None, "vb1", "q1", 2, "payload")]
    assert database.execute("SELECT * FROM meta").fetchall() == [("bench", "other")]
    assert not errors


def test_a_reader_sees_rows_while_the_recorder_runs(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    recorder = Recorder(path, on_error=lambda _: None, batch_s=3600)
    for n in range(1000):
        recorder.put("progress", {"t_mono": float(n), "kind": "upload_bytes", "value": n})
    recorder.flush()  # does not wait for the batch period
    assert sqlite3.connect(path).execute("SELECT count(*), max(value) FROM progress").fetchone() == (1000, 999)
    recorder.close()


@pytest.mark.parametrize(("table", "row"), [("nothing", {}), ("power", {"volts": 1.0})])
def test_an_unknown_name_is_refused(tmp_path: Path, table: str, row: dict[str, float]) -> None:
    recorder = Recorder(tmp_path / "telemetry.sqlite", on_error=lambda _: None)
    with pytest.raises(ValueError, match=r"nothing|volts"):
        recorder.put(table, row)
    recorder.close()


def test_a_closed_recorder_refuses(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "telemetry.sqlite", on_error=lambda _: None)
    recorder.close()
    with pytest.raises(BenchError, match="closed"):
        recorder.put("meta", {"key": "a", "value": 1})


def test_a_disk_that_cannot_follow_is_an_error(tmp_path: Path) -> None:
    errors: list[BenchError] = []
    recorder = Recorder(tmp_path / "telemetry.sqlite", on_error=errors.append, batch_s=3600, backlog=10)
    for n in range(10):
        recorder.put("meta", {"key": n, "value": n})
    with pytest.raises(BenchError, match="cannot follow"):
        recorder.put("meta", {"key": "one too many", "value": 0})
    assert len(errors) == 1


def test_a_directory_that_cannot_be_made_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot record"):
        Recorder(tmp_path / "file" / "telemetry.sqlite", on_error=lambda _: None)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from hil.bench.recorder import Recorder
from hil.errors import BenchError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, 256 * 1024))
errors = []
recorder = Recorder(Path(sys.argv[1]), on_error=errors.append, batch_s=0.01)
try:
    for n in range(2_000_000):
        recorder.put("meta", {"key": n, "value": "x" * 100})
        if n % 1000 == 0:
            recorder.flush()  # or the backlog is full before the disk is
    recorder.close()
except BenchError as error:
    print("raised:", error)
print("told:", len(errors), errors[0].hint)
"""


def test_a_full_disk_is_told_once_and_raised(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "telemetry.sqlite")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "raised: cannot record to" in done.stdout, done
    assert "told: 1 free disk space" in done.stdout, done


def test_the_power_table_has_two_energies() -> None:
    assert {"energy_j", "mission_energy_j"} <= set(TABLES["power"])
