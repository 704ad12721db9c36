"""A virtual board on several channels: powered while all feed it, killed with the first that does not; its shares."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hil.errors import UsageError
from hil.inventory import load_bench
from hil.virtual.board import BoardConfig, VirtualBoard
from hil.virtual.config import virtual_bench
from hil.virtual.inputs import InputWire, power_inputs
from hil.virtual.supply import MODELS, Load
from hil.virtual.supply.instrument import Instrument

ROOT = Path(__file__).resolve().parents[2]
MAIN, RAIL = InputWire(1, 10.0, 0.8), InputWire(3, 4.0, 0.2)


class FakeBoard:
    """Draws 10 W while it is powered; remembers its edges."""

    def __init__(self) -> None:
        self.powered = False
        self.edges: list[bool] = []

    def set_powered(self, on: bool) -> None:
        if on != self.powered:
            self.edges.append(on)
        self.powered = on

    def power_w(self, now_s: float) -> float:
        return 10.0 if self.powered else 0.0


class Rig:
    """A board on channels 1 (15 V) and 3 (5 V) of a supply whose clock is wound by hand."""

    def __init__(self, board: Any = None) -> None:
        self.board = board or FakeBoard()
        self.now_s = 0.0
        loads: dict[int, Load] = dict(power_inputs(self.board, (MAIN, RAIL)))
        self.box = Instrument(MODELS["rigol-dp800"], loads, lambda: self.now_s)
        self.volts(1, 15.0)
        self.volts(3, 5.0)

    def volts(self, channel: int, volts: float) -> None:
        self.box.channels[channel].voltage_set_v = volts
        self.passes()

    def switch(self, channel: int, on: bool) -> None:
        self.box.channels[channel].switch(on, self.now_s)
        self.passes()

    def passes(self, seconds: float = 1.0) -> None:
        for _ in range(20):
            self.now_s += seconds / 20
            self.box.tick()

    def watts(self) -> tuple[float, float]:
        one, three = self.box.channels[1], self.box.channels[3]
        return one.terminal_v * one.current_a, three.terminal_v * three.current_a


@pytest.mark.parametrize("order", [(1, 3), (3, 1)])
def test_it_starts_with_the_last_input_and_each_carries_its_share(order: tuple[int, int]) -> None:
    rig = Rig()
    rig.switch(order[0], True)
    assert not rig.board.powered
    assert rig.watts() == (0.0, 0.0)
    rig.switch(order[1], True)
    assert rig.board.powered
    assert rig.watts() == (pytest.approx(8.0), pytest.approx(2.0))
    assert rig.board.edges == [True]


def breaks() -> list[tuple[str, Callable[[Rig], None], Callable[[Rig], None]]]:
    """What takes an input away, and what brings it back."""
    return [
        ("main off", lambda rig: rig.switch(1, False), lambda rig: rig.switch(1, True)),
        ("rail off", lambda rig: rig.switch(3, False), lambda rig: rig.switch(3, True)),
        ("main low", lambda rig: rig.volts(1, 9.0), lambda rig: rig.volts(1, 15.0)),
        ("rail low", lambda rig: rig.volts(3, 3.5), lambda rig: rig.volts(3, 5.0)),
    ]


@pytest.mark.parametrize(("take", "give"), [row[1:] for row in breaks()], ids=[row[0] for row in breaks()])
def test_it_dies_with_any_input_and_starts_anew_with_it(
    take: Callable[[Rig], None], give: Callable[[Rig], None]
) -> None:
    rig = Rig()
    for channel in (1, 3):
        rig.switch(channel, True)
    take(rig)
    assert rig.board.edges == [True, False]
    assert rig.watts() == (0.0, 0.0)
    give(rig)
    assert rig.board.edges == [True, False, True]
    assert sum(rig.watts()) == pytest.approx(10.0)


def test_a_trip_of_one_input_kills_the_emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process stands for QEMU: it must be gone by SIGKILL, while the other channel is still on."""
    monkeypatch.setattr("hil.virtual.board.qemu_argv", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    config = BoardConfig("vb1", tmp_path, tmp_path, tmp_path / "master", tmp_path / "flash", 15022)
    board = VirtualBoard(config, "bench")
    rig = Rig(board)
    try:
        rig.switch(1, True)
        assert board.pid is None
        rig.switch(3, True)
        process = board._process
        assert board.pid is not None
        assert process is not None
        rig.box.trip(3, "ovp")
        rig.passes()
        assert (board.powered, board.pid, rig.box.channels[1].output_on) == (False, None, True)
        assert process.wait(5) == -9
    finally:
        board.close()


# ------------------------------------------------------------------------------------------------- the bench file
def virtual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], object]) -> Any:
    """The shipped bench with a board of two inputs on channels 1 and 3; `change` alters the file's content."""
    for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    kind = yaml.safe_load((ROOT / "boards/virtual-arm64.yaml").read_text())
    rail = kind["supply"] | {"voltage_min_v": 4.75, "voltage_nominal_v": 5.0, "voltage_max_v": 5.25}
    rail |= {"undervoltage_lockout_v": 4.0, "overvoltage_protection_v": 5.4, "power_max_w": 10.0, "current_max_a": 2.0}
    (tmp_path / "two-inputs.yaml").write_text(yaml.safe_dump(kind | {"name": "two-inputs", "rails": {"io5v": rail}}))
    content = yaml.safe_load((ROOT / "fixtures/benches/virtual.yaml").read_text())
    content["board_types"] = str(tmp_path)
    content["boards"]["vb1"] |= {
        "type": "two-inputs",
        "power": [{"supply": "psu1", "channel": 1}, {"supply": "psu1", "channel": 3, "rail": "io5v"}],
    }
    content["virtual"]["boards"]["vb1"] = {}
    change(content)
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(content))
    return virtual_bench(load_bench(path))


def test_a_board_hangs_on_all_its_channels_with_the_limits_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = virtual(tmp_path, monkeypatch, lambda content: None)
    (board,) = found.boards
    assert board.inputs == (InputWire(1, 10.0, 0.75), InputWire(3, 4.0, 0.25))  # 30 W and 10 W


def test_a_board_may_hang_on_one_of_its_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (board,) = virtual(
        tmp_path, monkeypatch, lambda content: content["virtual"]["boards"]["vb1"].update(channel=1)
    ).boards
    assert board.inputs == (InputWire(1, 10.0, 1.0),)


def other_supply(content: dict[str, Any]) -> None:
    content["supplies"]["psu2"] = content["supplies"]["psu1"] | {"address": "tcp://127.0.0.1:15026"}
    content["boards"]["vb1"]["power"][1]["supply"] = "psu2"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda content: content["virtual"]["boards"]["vb1"].update(channel=2),
            "is 2, but the board's `power:` names 1, 3",
        ),
        (other_supply, "channel 3 of psu2 feeds vb1, but `hil virtual` plays psu1 alone"),
    ],
)
def test_channels_that_cannot_be_played_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        virtual(tmp_path, monkeypatch, change)
