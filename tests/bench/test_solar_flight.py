"""A flight on a solar-array simulator through a real daemon: into the dark and out of it, told by the simulator itself.

The simulators run in processes of their own, with the physics of an array at their terminals, and are asked through a
plain socket, never through hil.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from host import Host
from test_daemon import BOARD_TYPE, MISSION, Lab, SupplyProcess, fly, gone, until

from hil.bench.journal import read_events
from hil.bench.safety import IntentJournal
from hil.campaign import record
from hil.campaign.evidence import NoEvidence
from hil.campaign.measures import MEASURES
from hil.client.http import DaemonGone
from hil.errors import UsageError
from hil.inventory import load_bench, load_board_type, load_mission
from hil.inventory.environment import environment
from hil.mission.compile import compile_timeline
from hil.mission.timeline import Timeline

SUPPLY = """
import asyncio, sys
from hil.virtual.supply import RecordedLoad, serve_supply
loads = {1: RecordedLoad(eval(sys.argv[2]), undervoltage_lockout_v=float(sys.argv[3]))}
ready = lambda supply: print(supply.port, flush=True)
asyncio.run(serve_supply(sys.argv[1], "127.0.0.1", 0, loads, ready=ready))
"""

# The limits of the power unit's array input, beside those of the board.
RAILS = """
rails:
  array: {voltage_min_v: 12, voltage_nominal_v: 18, voltage_max_v: 26, undervoltage_lockout_v: 8, current_max_a: 3,
    power_max_w: 60, overvoltage_protection_v: 28, overcurrent_protection_a: 3.2, inrush_s: 0.1, off_dwell_s: 0.1}
"""

BENCH = """
schema: 1
name: {name}
board_types: {types}
supplies:
  sas1: {{driver: scpi, dialect: {model}, address: "tcp://127.0.0.1:{port}", accept_level: D}}
boards:
  b1: {{type: recorded, power: [{{supply: sas1, channel: 1, rail: array{source}}}]}}
"""

NO_CURVE = "array: {bol_w: 44, degradation: 0.85, pointing: 0.95}"
CURVE = "array: {curve: {voc_v: 22, isc_a: 2.3, vmp_v: 18, imp_a: 2.1}, degradation: 0.85, pointing: 0.95}"
ISC_A = 2.3 * 0.85 * 0.95  # what is left of it in full sun
DIM = "((0.0, 3.0),)"  # what a tenth of the light still feeds
STEADY = "((0.0, 12.0),)"


@dataclass(frozen=True)
class Words:
    """How a simulator is asked, past hil's drivers."""

    output: str
    isc: str
    mode: str


ASK = {
    "keysight-e4360": Words("OUTP? (@1)", "CURR:SAS:ISC? (@1)", "CURR:MODE? (@1)"),
    "keysight-mp4300": Words("OUTP? (@1)", "CURR:SAS:SCAL? (@1)", "CURR:MODE? (@1)"),
    "chroma-62000h-s": Words("CONF:OUTP?", "SAS:ISC?", "OUTP:MODE?"),
}


class Simulator(SupplyProcess):
    """A virtual solar-array simulator with a load on channel 1."""

    def __init__(self, model: str, profile: str, lockout_v: float) -> None:
        argv = [sys.executable, "-c", SUPPLY, model, profile, str(lockout_v)]
        self.words = ASK[model]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def is_on(self, channel: int = 1) -> bool:
        return self.ask(self.words.output) in ("1", "ON")

    def volts(self, channel: int = 1) -> float:
        return float(self.ask("MEAS:VOLT? (@1)" if "(@1)" in self.words.output else "MEAS:VOLT?"))

    def isc(self) -> float:
        return float(self.ask(self.words.isc))

    def mode(self) -> str:
        return self.ask(self.words.mode)


class ArrayLab(Lab):
    """A bench whose one board hangs behind a simulated array."""

    def __init__(self, directory: Path, model: str, profile: str = STEADY, lockout_v: float = 8.0) -> None:
        (directory / "types").mkdir()
        (directory / "types/recorded.yaml").write_text(BOARD_TYPE + RAILS)
        self.directory, self.model = directory, model
        self.supply: Simulator = Simulator(model, profile, lockout_v)
        self.path = self.bench_file("array", ", source: array")
        self.bench = load_bench(self.path)
        self.run = directory / "runs/run"

    def bench_file(self, name: str, source: str) -> Path:
        path = self.directory / f"{name}.yaml"
        facts = {"types": self.directory / "types", "port": self.supply.port, "model": self.model}
        path.write_text(BENCH.format(name=name, source=source, **facts))
        return path

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        found = [event for event in read_events(self.run / "events.jsonl") if not kinds or event["kind"] in kinds]
        return [dict(event) for event in found]


def mission_file(directory: Path, array: str = CURVE) -> Path:
    text = MISSION.read_text().replace("../tle", str(MISSION.parent.parent / "tle"))
    assert NO_CURVE in text
    path = directory / "array-mission.yaml"
    path.write_text(text.replace(NO_CURVE, array))
    return path


def compiled(lab: ArrayLab, mission: Path) -> Timeline:
    kind = load_board_type(lab.directory / "types/recorded.yaml")
    return compile_timeline(environment(load_mission(mission), kind))


@pytest.fixture
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ArrayLab]:
    """`indirect` parameters are those of ArrayLab."""
    lab = ArrayLab(tmp_path, *getattr(request, "param", ("keysight-e4360",)))
    yield lab
    lab.close()


@pytest.mark.parametrize(
    "lab",
    [
        ("keysight-e4360", DIM),
        pytest.param(("keysight-mp4300", DIM), marks=pytest.mark.soak),
        pytest.param(("chroma-62000h-s", DIM), marks=pytest.mark.soak),
    ],
    indirect=True,
)
def test_a_flight_goes_into_the_dark_with_its_array_and_keeps_its_board(
    lab: ArrayLab, tmp_path: Path, host: Host
) -> None:
    mission = mission_file(tmp_path)
    entry_s = compiled(lab, mission).eclipses[0].umbra_entry_s
    assert entry_s is not None
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        found = {check["what"]: check["found"] for check in daemon.doctor() if check["fixture"] == "b1"}
        assert "the satellite's array" in found["channel 1: source"]
        board = daemon.board("b1", lease)
        with pytest.raises(UsageError, match="only a flight's mission says which curve"):
            board.power.on()
        flight = fly(lab, daemon, lease, entry_s - 5.0, mission)  # in the penumbra, half of the light
        assert not lab.supply.is_on()
        assert lab.supply.mode() == "SAS"
        board.power.on()
        assert lab.supply.is_on()
        began = lab.supply.isc()
        until(lambda: 2.5 < board.power.read().power_w < 3.5, what="for the load to run from the array")
        state = flight.state()
        assert (state["soc"], state["power"]["bus_voltage_v"], state["power"]["gain"]) == (None, None, None)
        until(lambda: lab.supply.isc() < began, what="for the penumbra to dim the curve in the instrument")
        until(lambda: not lab.supply.is_on(), 15, "for the umbra to switch the output off")
        until(lambda: flight.state()["t_mission"] > entry_s + 0.5, what="for the umbra")
        assert not board.power.read().output_on
        board.check()  # nobody cut its power: the unit's battery carries it
        assert flight.state()["power"]["state"] == "on"
        with pytest.raises(UsageError, match="does not follow a clock rate of 60"):
            flight.clock(60.0)
        with pytest.raises(UsageError, match="does not follow a skip"):
            flight.skip_to(entry_s + 1000.0)
        host.valid(flight.end()["invalid"])
        assert lab.supply.mode().startswith("FIX")
        assert not lab.supply.is_on()
    switched = [event["kind"] for event in lab.events() if event["kind"] in ("board_on", "array_dark", "board_off")]
    assert switched == ["board_on", "array_dark", "board_off"]
    (programmed,) = lab.events("array_programmed")
    assert (programmed["voc_v"], programmed["vmp_v"]) == (22.0, 18.0)
    assert programmed["isc_a"] == pytest.approx(ISC_A * programmed["light"], rel=1e-3)
    with closing(sqlite3.connect(lab.run / "telemetry.sqlite")) as database:
        ask = database.execute
        assert ask("SELECT count(soc), count(bus_voltage_v), count(battery_w), count(gain) FROM power").fetchone() == (
            (0,) * 4
        )
        (brightest_w, dark_w) = ask("SELECT max(array_w), min(array_w) FROM power").fetchone()
    assert brightest_w > 0.0
    assert dark_w < 0.01
    read = record.read(lab.run)
    for name in ("eclipse.min_bus_voltage_v", "energy.ledger_residual_share", "energy.j_per_token", "power.max_w"):
        with pytest.raises(NoEvidence, match="behind a solar-array simulator"):
            MEASURES[name].of(read)
    assert 2.5 < read.power.power_w.max() < 3.5


@pytest.mark.soak
@pytest.mark.parametrize("lab", [("keysight-mp4300",), ("chroma-62000h-s",)], indirect=True)
def test_a_flight_that_starts_in_the_dark_is_lit_at_sunrise(lab: ArrayLab, tmp_path: Path, host: Host) -> None:
    mission = mission_file(tmp_path)
    exit_s = compiled(lab, mission).eclipses[0].umbra_exit_s
    assert exit_s is not None
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        board = daemon.board("b1", lease)
        flight = fly(lab, daemon, lease, exit_s - 2.0, mission)
        board.power.on()
        if not lab.events("array_lit"):
            assert flight.state()["power"]["state"] == "on"
        until(lab.supply.is_on, 15, "for sunrise")
        until(lambda: board.power.read().power_w > 11, 20, "for light enough for the load")
        host.valid(flight.end()["invalid"])
    kinds = [event["kind"] for event in lab.events()]
    assert kinds.index("board_on") < kinds.index("array_lit") < kinds.index("board_off")


@pytest.mark.parametrize(
    "lab",
    [
        pytest.param(("keysight-e4360", "((0.0, 0.0), (1.0, 12.0), (2.0, 45.0))", 0.0), marks=pytest.mark.soak),
        ("chroma-62000h-s", "((0.0, 0.0), (1.0, 45.0))", 0.0),
    ],
    indirect=True,
)
def test_a_load_beyond_the_maximum_folds_the_array_and_is_told(lab: ArrayLab, tmp_path: Path, host: Host) -> None:
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        flight = fly(lab, daemon, lease, sunlit_s(lab, tmp_path), mission_file(tmp_path))
        daemon.board("b1", lease).power.on()
        until(lambda: lab.supply.volts() < 1.0, 15, "for the voltage to fold")
        until(lambda: lab.events("array_collapsed"), what="for that to be told")
        assert lab.supply.is_on()
        host.valid(flight.end()["invalid"])
    (collapsed,) = lab.events("array_collapsed")
    assert collapsed["voltage_v"] < 1.0
    assert collapsed["current_a"] == pytest.approx(collapsed["isc_a"], rel=0.02)
    assert lab.events("tripped") == []


def sunlit_s(lab: ArrayLab, directory: Path) -> float:
    """A mission time in full sun, with a minute of it to come."""
    return compiled(lab, mission_file(directory)).eclipses[0].penumbra_exit_s + 10.0


@pytest.mark.soak
def test_missions_that_the_array_cannot_play_are_refused_before_anything_is_set(lab: ArrayLab, tmp_path: Path) -> None:
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        for array, why in (
            (NO_CURVE, r"array-mission.yaml: the mission's array has no I-V curve\n.*add `curve: "),
            (CURVE.replace("voc_v: 22", "voc_v: 26.5"), r"Voc 26\.5 V .* outside the input's 12 to 26 V"),
            (CURVE.replace("isc_a: 2.3, vmp_v: 18, imp_a: 2.1", "isc_a: 4.3, vmp_v: 18, imp_a: 4.1"), "and 3 A"),
        ):
            with pytest.raises(UsageError, match=why):
                daemon.flight("b1", mission_file(tmp_path, array), lab.run, lease, 0.0)
            assert lab.supply.mode().startswith("FIX")
            assert not lab.supply.is_on()


@pytest.mark.soak
def test_a_killed_daemon_leaves_the_array_off_and_the_next_board_an_ordinary_supply(
    lab: ArrayLab, tmp_path: Path, host: Host
) -> None:
    try:
        with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
            fly(lab, daemon, lease, sunlit_s(lab, tmp_path), mission_file(tmp_path))
            daemon.board("b1", lease).power.on()
            assert lab.supply.is_on()
            pid = daemon.status()["pid"]
            began = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            until(lambda: not lab.supply.is_on(), 8.0)
            host.excuses("the array off", time.monotonic() - began, 2.5)
            until(lambda: gone(pid), 5.0)
            journal = IntentJournal(lab.bench.state_dir / "intent.jsonl")
            until(lambda: not journal.open_intents(), 5.0, "for it to be verified off")
            daemon.http.close()
    except DaemonGone:
        pass  # the lease cannot be given back
    assert lab.supply.mode() == "SAS"  # nobody was left to leave it
    lab.path = lab.bench_file("ordinary", ", follows_bus: true")
    lab.bench = load_bench(lab.path)
    with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
        assert 17.9 < daemon.board("b1", lease).power.on().voltage_v < 18.1
        assert lab.supply.mode().startswith("FIX")
