"""`hil lease release` when it does not go smoothly: the stored token outlives everything but its lease."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hil.cli
import hil.client
from hil.errors import BenchError
from hil.inventory import load_bench

BENCH = Path(__file__).resolve().parents[2] / "fixtures/benches/virtual.yaml"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `hil lease acquire vb1` left."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HIL_BENCH", str(BENCH))
    store: Path = load_bench(BENCH).state_dir / "lease-vb1.json"
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_text(json.dumps({"lease": "L1", "token": "t", "boards": ["vb1"], "ttl_s": 60}))
    return store


def daemon_that(renews: BenchError | None, holds: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*_: object, **__: object) -> None:
        if renews is not None:
            raise renews

    def status() -> dict[str, Any]:
        return {"boards": {"vb1": {"lease": None if holds is None else {"lease": holds}}}}

    @contextlib.contextmanager
    def attach(_: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(http=SimpleNamespace(call=call), status=status)

    monkeypatch.setattr(hil.client, "attach", attach)


def release() -> int:
    return hil.cli.run(["lease", "release", "vb1"])


def test_a_lease_that_is_released_is_forgotten(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon_that(None, "L1", monkeypatch)
    assert release() == 0
    assert not stored.exists()


@pytest.mark.parametrize(("holds", "kept"), [("L1", True), ("L2", False), (None, False)])
def test_a_token_is_kept_while_its_lease_lasts(
    stored: Path, holds: str | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon_that(BenchError("the bench daemon did not answer within 5 s"), holds, monkeypatch)
    assert release() == 3
    assert stored.exists() is kept


def test_a_token_is_kept_when_no_daemon_starts(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(_: object) -> None:
        raise BenchError("the bench daemon ended at once")

    monkeypatch.setattr(hil.client, "attach", attach)
    assert release() == 3
    assert stored.exists()
