"""From a bench file to the virtual supply that powers its board: any maker's, on TCP or on a serial port."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hil.errors import UsageError
from hil.inventory import Bench, load_bench
from hil.virtual.config import virtual_bench
from hil.virtual.supervisor import VirtualBench
from hil.virtual.supply import MODELS

ROOT = Path(__file__).resolve().parents[2]


def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Bench:
    """The shipped virtual bench with other supply, virtual supply or channel."""
    for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    content = yaml.safe_load((ROOT / "fixtures/benches/virtual.yaml").read_text())
    content["board_types"] = str(ROOT / "boards")
    content["supplies"]["psu1"] |= changes.get("supply", {})
    content["virtual"]["supply"] |= changes.get("virtual", {})
    if "channel" in changes:
        content["boards"]["vb1"]["power"][0]["channel"] = changes["channel"]
        content["virtual"]["boards"]["vb1"]["channel"] = changes["channel"]
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_bench(path)


@pytest.mark.parametrize("name", MODELS)
def test_the_dialect_of_the_bench_file_is_what_is_played(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = 2 if name == "keysight-e36300" else 1  # its first gives 6 V
    found = virtual_bench(bench(tmp_path, monkeypatch, supply={"dialect": name}, channel=channel))
    assert (found.supply_model, found.supply_port, found.supply_tty) == (name, 15025, None)
    assert found.supply_address == "tcp://127.0.0.1:15025"


def test_a_model_may_be_told_apart_from_the_dialect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = virtual_bench(bench(tmp_path, monkeypatch, virtual={"model": "rigol-dp2000"}))
    assert found.supply_model == "rigol-dp2000"


def test_a_supply_on_a_serial_port_gets_a_link_to_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"serial://{tmp_path}/psu1.tty?baud=9600"
    found = virtual_bench(bench(tmp_path, monkeypatch, supply={"dialect": "korad-ka3005p", "address": address}))
    assert (found.supply_port, found.supply_tty) == (None, tmp_path / "psu1.tty")
    assert found.supply_address == f"serial://{tmp_path}/psu1.tty"
    assert "the supply" not in found.ports().values()
    assert VirtualBench.from_json(found.to_json()) == found


def test_a_channel_that_the_model_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="tti-cpx has no channel 3"):
        virtual_bench(bench(tmp_path, monkeypatch, supply={"dialect": "tti-cpx"}, channel=3))


def test_a_channel_that_cannot_feed_the_board_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"channel 1 .* gives at most 6\.18 V, but vb1 needs 15 V"):
        virtual_bench(bench(tmp_path, monkeypatch, supply={"dialect": "keysight-e36300"}))


def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no virtual supply model 'acme'"):
        virtual_bench(bench(tmp_path, monkeypatch, virtual={"model": "acme"}))


def test_a_supply_elsewhere_cannot_be_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="must name a supply at tcp://127"):
        virtual_bench(bench(tmp_path, monkeypatch, supply={"address": "tcp://192.0.2.1:5025"}))
