"""The journal: whole lines, two writers, a torn tail, a full disk."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from hil.bench.journal import Journal, read_events, utc_text
from hil.errors import BenchError


def test_an_event_carries_all_its_clocks(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Journal(path, "daemon", stamp=lambda: (12.5, 60.0), monotonic=lambda: 7.0, wall=lambda: 0.0) as journal:
        journal.write("load_shed", soc=0.3)
    assert json.loads(path.read_text()) == {
        "schema": 1,
        "t_mono": 7.0,
        "t_wall": "1970-01-01T00:00:00.000Z",
        "t_mission": 12.5,
        "rate": 60.0,
        "source": "daemon",
        "kind": "load_shed",
        "soc": 0.3,
    }


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "events.jsonl", "daemon") as journal, pytest.raises(ValueError, match="source"):
        journal.write("boot", source="me")


def test_two_writers_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    errors: list[BenchError] = []

    def fill(name: str) -> None:
        with Journal(path, name, on_error=errors.append) as journal:
            for number in range(200):
                journal.write("step", number=number, padding="x" * 300)

    threads = [threading.Thread(target=fill, args=(name,)) for name in ("daemon", "campaign")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = read_events(path)
    assert not errors
    for name in ("daemon", "campaign"):
        assert [event["number"] for event in events if event["source"] == name] == list(range(200))


def test_a_torn_last_line_is_left_out_and_closed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Journal(path, "daemon") as journal:
        journal.write("board_on")
    with path.open("ab") as file:
        file.write(b'{"schema":1,"kind":"bo')
    assert [event["kind"] for event in read_events(path)] == ["board_on"]
    with Journal(path, "daemon") as journal:
        journal.write("board_off")
    assert [event["kind"] for event in read_events(path)] == ["board_on", "torn", "board_off"]


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Journal(path, "daemon") as journal:
        journal.write("board_on")
    with path.open("ab") as file:
        file.write(b'garbage\n{"kind":"boot"}\n')
    with pytest.raises(BenchError, match=r"events\.jsonl:2"):
        read_events(path)


def test_an_absent_journal_is_empty(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none") == []


def test_a_full_disk_is_an_error_at_once(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(path, "daemon")
    with pytest.raises(BenchError, match="No space left"):
        journal.write("boot")
    with pytest.raises(BenchError, match="No space left"):
        journal.write("boot")
    with pytest.raises(BenchError, match="No space left"):
        journal.close()


def test_utc_text() -> None:
    assert utc_text(1_773_964_800.9994) == "2026-03-20T00:00:00.999Z"
