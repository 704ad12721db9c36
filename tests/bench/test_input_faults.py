"""Dips and latch-ups of a board on three channels, through client and daemon in a flight, seen at the terminals."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matrix import Truth
from test_daemon import BOARD_TYPE, SupplyProcess, fly, until
from test_daemon import Lab as DaemonLab
from test_two_inputs import RAILS

from hil.bench.journal import read_events
from hil.errors import UsageError
from hil.inventory import load_bench

SUPPLY = """
import asyncio, sys
from pathlib import Path
from hil.virtual.supply import RecordedLoad, serve_supply

class FileLoad:
    undervoltage_lockout_v = 4.0

    def __init__(self, path):
        self.path = path

    def power_w(self, now_s):
        return float(self.path.read_text() or 0)

    def set_powered(self, on):
        pass

loads = {1: RecordedLoad(((0.0, 8.0),), undervoltage_lockout_v=10.0),
         2: RecordedLoad(((0.0, 4.0),), undervoltage_lockout_v=10.0),
         3: FileLoad(Path(sys.argv[2]))}
ready = lambda supply: print(supply.port, flush=True)
asyncio.run(serve_supply("rigol-dp800", "127.0.0.1", 0, loads, ready=ready, control=Path(sys.argv[1])))
"""

BENCH = """
schema: 1
name: three-inputs
board_types: {types}
supplies:
  psu1: {{driver: scpi, dialect: rigol-dp800, address: "tcp://127.0.0.1:{port}"}}
boards:
  b1:
    type: recorded
    power:
      - {{supply: psu1, channel: 1}}
      - {{supply: psu1, channel: 2, on_delay_s: 0.1}}
      - {{supply: psu1, channel: 3, rail: io5v, on_delay_s: 0.1, converter_efficiency: 0.8}}
"""


class ThreeChannels(SupplyProcess):
    """A supply with a board on all its channels; what the third draws is in a file."""

    def __init__(self, control: Path, watts: Path) -> None:
        argv = [sys.executable, "-c", SUPPLY, str(control), str(watts)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())


class Lab(DaemonLab):
    """A bench whose one board hangs on three channels: two on the bus, one behind a converter."""

    def __init__(self, directory: Path, runtime: Path) -> None:
        (directory / "types").mkdir()
        (directory / "types/recorded.yaml").write_text(
            BOARD_TYPE + RAILS.replace("5.8", "5.4")
        )  # the most that channel 3 takes is 5.5 V
        self.watts = directory / "watts"
        self.load(2.0)
        self.control = runtime / "three.control"
        self.supply = ThreeChannels(self.control, self.watts)
        self.truth = Truth(self.control)
        self.path = directory / "bench.yaml"
        self.path.write_text(BENCH.format(types=directory / "types", port=self.supply.port))
        self.bench = load_bench(self.path)
        self.run = directory / "runs/run"

    def load(self, watts: float) -> None:
        """What the third channel's load draws from now on."""
        new = self.watts.with_name("watts.new")
        new.write_text(f"{watts:g}")
        new.replace(self.watts)

    def state(self) -> tuple[bool, ...]:
        channels = self.truth.do()["channels"]
        return tuple(bool(channels[number]["output_on"]) for number in "123")

    def close(self) -> None:
        self.truth.close()
        super().close()


class Terminals:
    """Volts at the three outputs as (seconds, V, V, V), and their switches, read on a thread of its own."""

    def __init__(self, control: Path) -> None:
        self._truth = Truth(control)
        self.rows: list[tuple[float, list[dict[str, Any]]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            channels = self._truth.do()["channels"]
            self.rows.append((time.monotonic(), [channels[number] for number in "123"]))
            time.sleep(0.002)

    def volts(self) -> list[list[float]]:
        return [[channel["voltage_v"] for channel in row] for _, row in self.rows]

    def switched(self) -> list[tuple[int, bool]]:
        """(channel, on) in the order seen."""
        found, before = [], [channel["output_on"] for channel in self.rows[0][1]]
        for _, row in self.rows:
            now = [channel["output_on"] for channel in row]
            found += [(index + 1, now[index]) for index in range(3) if now[index] != before[index]]
            before = now
        return found

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._truth.close()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    lab = Lab(tmp_path, Path(os.environ["XDG_RUNTIME_DIR"]))
    yield lab
    lab.close()


def test_a_board_on_three_channels_dips_on_the_bus_and_is_cut_by_a_latch_up_of_its_rail(lab: Lab) -> None:
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        board = daemon.board("b1", lease)
        flight = fly(lab, daemon, lease)
        board.power.on()
        assert lab.state() == (True, True, True)
        seen = Terminals(lab.control)
        dip = board.power.brown_out(2.0, 0.3)
        seen.stop()
        bus_v = dip.low_v + 2.0
        assert any(one < bus_v - 1.5 and two < bus_v - 1.5 for one, two, _ in seen.volts()), "never both low"
        assert min(three for _, _, three in seen.volts()) > 4.9, "the rail behind its converter stays"
        assert list(dip.others) == ["main-2"]
        other = dip.others["main-2"]
        assert max(dip.began_s, other.began_s) < min(dip.ended_s, other.ended_s)
        board.check()

        with pytest.raises(UsageError, match=r"outside the 0 to 1\.5 A of the board's input io5v"):
            board.power.latch_up(1.6, 0.1, 0.5, wait_s=5.0)
        seen = Terminals(lab.control)
        raising = threading.Timer(0.3, lab.load, (6.0,))  # 1.2 A
        raising.start()
        easing = threading.Thread(
            target=lambda: (until(lambda: lab.state() == (False, False, False), 10.0), lab.load(2.0))
        )
        easing.start()
        done = board.power.latch_up(1.0, 0.2, 0.5, wait_s=10.0)
        raising.join()
        easing.join()
        seen.stop()
        assert (done.input, done.held_s >= 0.2, done.off_s >= 0.5) == ("io5v", True, True)
        assert done.peak_a == pytest.approx(1.2, abs=0.05)
        # the one that latched at once, the others in reverse; on in order
        assert seen.switched() == [(3, False), (2, False), (1, False), (1, True), (2, True), (3, True)]
        assert lab.state() == (True, True, True)
        board.check()
        flight.end()
    events = read_events(lab.run / "events.jsonl")
    dips = {event["input"]: event for event in events if event["kind"] == "brown_out"}
    assert {name: event["began_s"] for name, event in dips.items()} == {
        "main-1": dip.began_s,
        "main-2": other.began_s,
    }
    (latched,) = [event for event in events if event["kind"] == "latch_up"]
    assert latched["input"] == "io5v"
    assert not {event["kind"] for event in events} & {"tripped", "envelope_breach", "load_shed", "safe_state"}
