"""The thermal model in a flight: wall time, measured energy, record, events, metrics."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hil.bench.exporter import BenchMetrics, BoardMetrics, Exporter, FlightMetrics, per_phase
from hil.bench.heat import FlightHeat
from hil.bench.powervalues import PowerSample
from hil.bench.recorder import Recorder
from hil.mission.compile import compile_timeline
from hil.mission.environment import MissionEnvironment
from hil.mission.orbit import Orbit
from hil.mission.radio import Channel, LinkEnvironment
from hil.mission.thermal import Coupling, Cutoff, Node, Radiator, ThermalConfig, ThermalModel, ThermalState
from hil.mission.timeline import Timeline

CHIP = ThermalConfig((Node("chip", 100.0, 20.0, board_share=1.0),), cutoff=Cutoff("chip", 40.0, 30.0))
IDLE = PowerSample(0.0, "b1", "on", 15.0, 2.0, 15.0, 1.0, 15.0, 0.0, 0.0, 0.0, t_mission=0.0, rate=60.0)


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    start = datetime(2026, 3, 20, tzinfo=UTC)
    link = LinkEnvironment(Channel(1e6), Channel(1e6))
    orbit = Orbit.sso(535.0, start, ltdn_h=10.5)
    return compile_timeline(MissionEnvironment("heat", orbit, (), start, 12_000.0, link))


class Sink:
    """Where a flight puts rows and tells events."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.told: list[tuple[str, dict[str, Any]]] = []

    def put(self, table: str, row: Any) -> None:
        assert table == "thermal"
        self.rows.append(dict(row))

    def tell(self, kind: str, **fields: Any) -> None:
        self.told.append((kind, fields))


def heat(config: ThermalConfig, timeline: Timeline) -> tuple[FlightHeat, Sink]:
    sink = Sink()
    return FlightHeat(config, timeline, put=sink.put, tell=sink.tell), sink


def test_measured_energy_warms_the_chip_in_wall_time(timeline: Timeline) -> None:
    """Ten wall seconds at clock rate 60 are ten seconds of heat; what counts is the energy, not the momentary power."""
    model, sink = heat(CHIP, timeline)
    for tick in range(101):
        model.sampled(
            replace(IDLE, t_mono=500 + tick / 10, energy_j=7.0 + 2.0 * tick, t_mission=6.0 * tick, power_w=0.1)
        )
    assert model.describe() == {"nodes": {"chip": pytest.approx(22.0)}, "may_run": True, "label": "modelled"}
    assert model.ledger.heat_j == pytest.approx(200.0)
    assert [round(row["t_mono"]) for row in sink.rows] == list(range(501, 511))  # a row a second
    assert sink.rows[-1]["temperature_c"] == pytest.approx(22.0)
    assert (sink.rows[-1]["node"], sink.rows[-1]["board"], sink.rows[-1]["may_run"]) == ("chip", "b1", 1)
    # a power loop that was started anew counts from zero: its power stands in
    model.sampled(replace(IDLE, t_mono=520.0, energy_j=0.0, power_w=30.0))
    assert model.describe()["nodes"]["chip"] == pytest.approx(22.0 + 30.0 * 10 / 100)


def test_the_cut_off_is_told_once_and_again_when_it_is_over(timeline: Timeline) -> None:
    config = replace(CHIP, radiators=(Radiator("chip", 0.1),))
    model, sink = heat(config, timeline)
    energy_j = 0.0
    for second in range(200):
        energy_j += 120.0 if second < 60 else 0.0
        model.sampled(replace(IDLE, t_mono=float(second), energy_j=energy_j))
    assert [kind for kind, _ in sink.told] == ["thermal_cutoff", "thermal_ready"]
    assert sink.told[0][1]["nodes"]["chip"] >= 40.0
    assert sink.told[0][1]["label"] == "modelled"
    assert sink.told[0][1]["board_w"] == pytest.approx(120.0)
    assert sink.told[1][1]["nodes"]["chip"] <= 30.0
    assert {row["may_run"] for row in sink.rows} == {0, 1}


def test_the_sky_is_that_of_the_mission_time(timeline: Timeline) -> None:
    """In the umbra no sunlight and no albedo; under the Sun both, and the Earth's own warmth always."""
    radiator = Radiator("chip", 1.0, sun_share=0.5, earth_view_factor=0.4)
    config = ThermalConfig((Node("chip", 1e6),), radiators=(radiator,))
    eclipse = timeline.eclipses[0]
    assert eclipse.umbra_entry_s is not None
    assert eclipse.umbra_exit_s is not None
    dark_s = 0.5 * (eclipse.umbra_entry_s + eclipse.umbra_exit_s)
    for mission_s, sunny in ((dark_s, False), (dark_s + 2_862.0, True)):
        model, _ = heat(config, timeline)
        for second in (0.0, 10.0):
            model.sampled(replace(IDLE, t_mono=second, t_mission=mission_s))
        ledger = model.ledger
        assert ledger.earth_j == pytest.approx(10 * 0.9 * 237 * 0.4)
        assert ledger.sun_j == pytest.approx(10 * 0.2 * 1361 * 0.5 if sunny else 0.0)
        most = 10 * 0.2 * 1361 * 0.3 * 0.4
        # half an orbit after the middle of the shadow the satellite is where the Sun stands highest below it
        assert (0.8 * most < ledger.albedo_j <= most) if sunny else ledger.albedo_j == 0.0


def test_it_goes_into_the_record(timeline: Timeline, tmp_path: Path) -> None:
    errors: list[Exception] = []
    recorder = Recorder(tmp_path / "telemetry.sqlite", on_error=errors.append)
    two = ThermalConfig((Node("chip", 50.0, board_share=1.0), Node("hull", 500.0)), (Coupling("chip", "hull", 1.0),))
    model = FlightHeat(two, timeline, put=recorder.put, tell=lambda *a, **k: None)
    for second in range(4):
        model.sampled(replace(IDLE, t_mono=float(second), energy_j=10.0 * second))
    recorder.close()
    assert errors == []
    with sqlite3.connect(tmp_path / "telemetry.sqlite") as db:
        rows = db.execute("SELECT t_mono, node, temperature_c, may_run, rate FROM thermal ORDER BY rowid").fetchall()
    reference = ThermalModel(two)
    expected = []
    for second in (1.0, 2.0, 3.0):
        expected += [(second, name, celsius, 1, 60.0) for name, celsius in reference.step(1.0, 10.0).nodes.items()]
    assert rows == expected


def test_it_is_shown_as_metrics_that_say_modelled() -> None:
    board = BoardMetrics(
        board="b1", type="t", phase="sunlit", commanded_on=True, power_w=1.0, voltage_v=1.0, current_a=1.0,
        sampled_at_s=1.0, energy_j=per_phase(), tokens=per_phase(), upload_bytes=0.0, lateness_s=0.0, overruns=0,
        player_overruns=0, power_cuts=0, link=None,
        flight=FlightMetrics(1.0, 1.0, 0.5, 14.0, ThermalState({"chip": 41.5, "hull": -3.0}, False)),
    )  # fmt: skip
    bench = BenchMetrics("lab", "1", True, 0, (board,))
    body = Exporter(lambda: bench).render()[0].decode()
    assert 'hil_thermal_node_celsius{board="b1",node="chip"} 41.5' in body
    assert 'hil_thermal_node_celsius{board="b1",node="hull"} -3.0' in body
    assert 'hil_thermal_may_run{board="b1"} 0.0' in body
    assert "# HELP hil_thermal_node_celsius Modelled" in body
    cold = replace(bench, boards=(replace(board, flight=FlightMetrics(1.0, 1.0, 0.5, 14.0)),))
    assert "hil_thermal_node_celsius{" not in Exporter(lambda: cold).render()[0].decode()
