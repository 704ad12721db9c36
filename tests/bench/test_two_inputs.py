"""A board on two channels through a real daemon: into an eclipse, shed, restored; both inputs asked at the supply."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from host import Host
from test_daemon import BOARD_TYPE, Lab, SupplyProcess, fly, gone, until

from hil.bench.journal import read_events
from hil.bench.safety import IntentJournal
from hil.client.http import DaemonGone
from hil.errors import BenchError
from hil.inventory import load_bench
from hil.mission import timeline_file

SUPPLY = """
import asyncio
from hil.virtual.supply import RecordedLoad, serve_supply
loads = {1: RecordedLoad(((0.0, 12.0),), undervoltage_lockout_v=10.0),
         2: RecordedLoad(((0.0, 3.0),), undervoltage_lockout_v=4.0)}
ready = lambda supply: print(supply.port, flush=True)
asyncio.run(serve_supply("rigol-dp800", "127.0.0.1", 0, loads, ready=ready))
"""

RAILS = """
rails:
  io5v: {voltage_min_v: 4.75, voltage_nominal_v: 5, voltage_max_v: 5.25, undervoltage_lockout_v: 4, current_max_a: 1.5,
    power_max_w: 7, overvoltage_protection_v: 5.8, overcurrent_protection_a: 1.7, inrush_s: 0.1, off_dwell_s: 0.1}
"""

BENCH = """
schema: 1
name: two-inputs
board_types: {types}
supplies:
  psu1: {{driver: scpi, dialect: rigol-dp800, address: "tcp://127.0.0.1:{port}"}}
boards:
  b1:
    type: recorded
    power:
      - {{supply: psu1, channel: 1}}
      - {{supply: psu1, channel: 2, rail: io5v, on_delay_s: 0.1, converter_efficiency: 0.8}}
"""


class TwoChannels(SupplyProcess):
    """A supply with a board on channels 1 and 2."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SUPPLY], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def are_on(self) -> tuple[bool, bool]:
        return self.is_on(1), self.is_on(2)


class TwoInputs(Lab):
    """A bench whose one board hangs on both channels."""

    def __init__(self, directory: Path) -> None:
        (directory / "types").mkdir()
        (directory / "types/recorded.yaml").write_text(BOARD_TYPE + RAILS)
        self.supply: TwoChannels = TwoChannels()
        self.path = directory / "bench.yaml"
        self.path.write_text(BENCH.format(types=directory / "types", port=self.supply.port))
        self.bench = load_bench(self.path)
        self.run = directory / "runs/run"


@pytest.mark.soak
def test_two_inputs_fly_through_an_eclipse_and_are_shed_and_restored_together(tmp_path: Path) -> None:
    lab = TwoInputs(tmp_path)
    try:
        fly_through_an_eclipse(lab)
    finally:
        lab.close()
    events = read_events(lab.run / "events.jsonl")
    assert [event["kind"] for event in events if event["kind"].startswith("load_")] == [
        "load_shed",
        "load_restoring",
        "load_restored",
    ]
    switched = [event["kind"] for event in events if event["kind"].endswith(("_on", "_off"))]
    assert switched == ["board_on", "input_on", "input_off", "input_on", "input_off", "board_off"]
    (started,) = [event for event in events if event["kind"] == "flight_started"]
    assert started["inputs"] == [
        {"input": "main", "follows_bus": True},
        {"input": "io5v", "converter_efficiency": 0.8, "label": "modelled"},
    ]
    power = events[-1]["power_ledger"]
    assert power["fed_j"] == pytest.approx(power["metered_mission_j"], rel=0.15)
    assert power["converter_j"] == pytest.approx((power["fed_j"] + power["assumed_j"]) * 0.75 / 15.0, rel=0.15)
    with closing(sqlite3.connect(lab.run / "telemetry.sqlite")) as database:
        on = "state = 'on' AND rate = 1 AND power_w > 0.5"
        whole = database.execute(f"SELECT avg(power_w), max(board) FROM power WHERE {on} AND power_w > 14").fetchone()
        inputs = dict(database.execute(f"SELECT input, avg(power_w) FROM inputs WHERE {on} GROUP BY input"))
        meta = dict(database.execute("SELECT key, value FROM meta"))
        volts = dict(
            database.execute(f"SELECT input, max(voltage_v) - min(voltage_v) FROM inputs WHERE {on} GROUP BY 1")
        )
    assert whole == (pytest.approx(15.0, rel=0.02), "b1")
    assert inputs == {"main": pytest.approx(12.0, rel=0.03), "io5v": pytest.approx(3.0, rel=0.03)}
    assert meta["capability_level"].startswith("main: C (")
    assert " | io5v: C (" in meta["capability_level"]
    assert volts["main"] > 1.0, "it followed the bus down"
    assert volts["io5v"] < 0.1, "it stayed where it was"


def fly_through_an_eclipse(lab: TwoInputs) -> None:
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        board = daemon.board("b1", lease)
        flight = fly(lab, daemon, lease)
        board.power.on()
        assert lab.supply.are_on() == (True, True)
        until(lambda: 14 < board.power.read().power_w < 16, what="for both inputs' watts")
        timeline = timeline_file.load(lab.run / "timeline.npz")
        assert timeline.environment.power is not None
        shed = timeline.environment.power.shed
        assert shed is not None
        flight.skip_to(timeline.eclipses[-1].umbra_entry_s or 0.0, assumed_board_w=5.0, cause="eclipse")
        while (left_v := flight.state()["power"]["bus_voltage_v"] - shed.shed_v) > 0.02:
            step_s = 60 if left_v > 0.5 else 2
            flight.skip_to(flight.state()["t_mission"] + step_s, assumed_board_w=15.0, cause="towards shedding")
        flight.clock(60.0, cause="eclipse")
        until(lambda: flight.state()["power"]["state"] == "shed", 20)
        until(lambda: lab.supply.are_on() == (False, False), 2)
        with pytest.raises(BenchError, match="shed by the mission's power system"):
            board.power.on()
        assert lab.supply.are_on() == (False, False)
        flight.clock(900.0, cause="recharge")
        until(lambda: flight.state()["power"]["state"] == "on", 20)
        until(lambda: lab.supply.are_on() == (True, True), 3)
        assert float(lab.supply.ask(":SOUR2:VOLT?")) == 5.0
        assert flight.state()["rate"] == 1.0
        assert flight.end()["invalid"] == []
        assert lab.supply.are_on() == (False, False)
        assert max(lab.supply.volts(1), lab.supply.volts(2)) < 0.6


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.soak)])
def test_a_daemon_that_dies_in_flight_leaves_neither_input_on(tmp_path: Path, host: Host, number: int) -> None:
    lab = TwoInputs(tmp_path)
    try:
        with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
            fly(lab, daemon, lease)
            daemon.board("b1", lease).power.on()
            assert lab.supply.are_on() == (True, True)
            pid = daemon.status()["pid"]
            began = time.monotonic()
            os.kill(pid, number)
            until(lambda: lab.supply.are_on() == (False, False), 8.0)
            host.excuses("both inputs off", time.monotonic() - began, 2.5)
            until(lambda: gone(pid), 5.0)
            journal = IntentJournal(lab.bench.state_dir / "intent.jsonl")
            until(lambda: not journal.open_intents(), 5.0, "for both to be verified off")
            daemon.http.close()
    except DaemonGone:
        pass  # the lease cannot be given back
    finally:
        lab.close()
