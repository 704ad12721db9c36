"""Two meters on one board: what is held against what, and for how long they must be apart."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hil.bench.crosscheck import CrossCheck, Disagreement, MeterBounds, RailOfBoard, other_channel
from hil.drivers.scpi import ScpiSupply
from hil.errors import BoardError
from hil.model import Completed, Reading
from hil.virtual.supply import RecordedLoad, VirtualSupply

BOUNDS = MeterBounds(overhead_max=0.3, share=0.02, offset_w=0.1, hold_s=2.0)


def reading(time_s: float, watts: float) -> Reading:
    return Reading(time_s, 12.0, watts / 12.0, watts, True)


def compare(*pairs: tuple[float, float, float], bounds: MeterBounds = BOUNDS) -> list[Disagreement | None]:
    """(second, supply watts, board watts) after each other."""
    now = {"s": 0.0, "w": 0.0}

    async def read() -> Reading:
        return reading(now["s"], now["w"])

    check = CrossCheck("meter", read, bounds)
    found = []
    for at_s, supply_w, board_w in pairs:
        check.supply(reading(at_s - 0.1, supply_w))
        now.update(s=at_s, w=board_w)
        found.append(asyncio.run(check.check()))
    assert check.compared == len(pairs)
    return found


@pytest.mark.parametrize(
    ("board_w", "agrees"),
    [(10.0, True), (10.29, True), (10.31, False), (7.0, True), (6.77, True), (6.75, False), (0.0, False)],
)
def test_the_bounds_are_data(board_w: float, agrees: bool) -> None:
    """10 W at the supply: 2 % and 0.1 W of error above, 30 % of loss and the errors below."""
    found = compare((1.0, 10.0, board_w), (2.0, 10.0, board_w), (3.0, 10.0, board_w))
    assert found[:2] == [None, None]
    assert (found[2] is None) is agrees


def test_a_disagreement_must_last() -> None:
    found = compare((1, 10, 12), (2, 10, 12), (2.5, 10, 9), (3, 10, 12), (4, 10, 12), (5, 10, 12))
    assert found[:5] == [None] * 5
    assert found[5] is not None
    assert found[5].lasted_s == 2.0
    assert "12 W, more than the supply's 10 W" in found[5].finding


def test_samples_of_other_moments_are_not_compared() -> None:
    async def read() -> Reading:
        return reading(10.0, 99.0)

    check = CrossCheck("meter", read, MeterBounds(hold_s=0.0))
    assert asyncio.run(check.check()) is None
    check.supply(reading(9.6, 5.0))
    assert asyncio.run(check.check()) is None
    assert check.compared == 0
    check.supply(reading(9.8, 5.0))
    assert asyncio.run(check.check()) is not None
    check.forget()
    assert asyncio.run(check.check()) is None


def test_a_channel_of_another_supply_measures_and_nothing_else() -> None:
    async def steps() -> None:
        async with VirtualSupply(loads={2: RecordedLoad(((0.0, 6.0),))}) as virtual:
            supply = ScpiSupply("rigol-dp800", f"tcp://127.0.0.1:{virtual.port}")
            virtual.instrument.execute(":APPL CH2,15,1;:OUTP CH2,ON")
            read = other_channel(supply, 2)
            async with asyncio.timeout(20):
                while (await read()).power_w != pytest.approx(6.0, abs=0.1):  # noqa: ASYNC110  (what a supply does)
                    await asyncio.sleep(0.01)
            assert virtual.instrument.channels[2].output_on
            await supply.close()

    asyncio.run(steps())


class BoardShell:
    """Runs what would run on a board in a tree of files; can go down."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.down = False
        self.aborted = 0

    def run(self, argv: Sequence[str], timeout_s: float) -> Completed:
        if self.down:
            raise BoardError("gone")
        words = [word.replace("/sys/class/hwmon", str(self.root)) for word in argv]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return Completed(tuple(argv), done.stdout, done.stderr, done.returncode, 0.0)

    def abort(self) -> None:
        self.aborted += 1


def test_the_boards_own_rail_is_read_and_found_again_after_the_board_was_down(tmp_path: Path) -> None:
    made: list[BoardShell] = []
    sensor = tmp_path / "hwmon3"
    sensor.mkdir()
    for name, text in {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": "19152", "curr1_input": "260"}.items():
        (sensor / name).write_text(f"{text}\n")

    def connect() -> Any:
        made.append(BoardShell(tmp_path))
        return made[-1]

    rail = RailOfBoard(connect, "VDD_IN")
    assert asyncio.run(rail.read()).power_w == pytest.approx(19.152 * 0.26)
    asyncio.run(rail.read())
    assert len(made) == 1
    made[0].down = True
    with pytest.raises(BoardError):
        asyncio.run(rail.read())
    assert made[0].aborted == 1
    sensor.rename(tmp_path / "hwmon5")  # another number after the reboot
    assert asyncio.run(rail.read()).current_a == 0.26
    assert len(made) == 2
