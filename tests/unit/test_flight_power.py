"""A flight's power as the daemon flies it: its mission's bounds, its second meter, its ledger in the record."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timelapse
from test_powerloop import FakeDeadman

from hil.bench.board import BoardOwner, Channel
from hil.bench.crosscheck import cross_check
from hil.bench.exporter import BenchMetrics, Exporter
from hil.bench.flight import FlightControl
from hil.bench.pacing import Pacing
from hil.bench.powervalues import PowerSample
from hil.bench.safety import Envelope, Intent, IntentJournal
from hil.campaign import measures, record, verdict
from hil.drivers.scpi import ScpiSupply
from hil.errors import UsageError
from hil.inventory.bench import BenchBoard, MeterWire, PowerWire
from hil.inventory.board_type import load_board_type
from hil.model import Setpoint
from hil.virtual.supply import RecordedLoad, VirtualSupply

ROOT = Path(__file__).resolve().parents[2]
TYPE = load_board_type(ROOT / "boards/virtual-arm64.yaml")
SHORT = ROOT / "fixtures/missions/short.yaml"
METER = MeterWire(supply="psu1", channel=2, hold_s=0.2, every_s=0.1)


@dataclass
class Rig:
    """A board on channel 1; what channel 2 feeds is what the second meter shows."""

    board: BoardOwner
    virtual: VirtualSupply
    flight: FlightControl

    async def until(self, condition: Callable[[], object], timeout_s: float = 30.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"never happened; {self.flight.describe()}"
            await asyncio.sleep(0.02)


def mission(tmp_path: Path, **changes: str) -> Path:
    text = SHORT.read_text().replace("../tle", str(SHORT.parent.parent / "tle"))
    for before, after in changes.items():
        assert before in text
        text = text.replace(f"{before}: ", after, 1)
    path = tmp_path / "mission.yaml"
    path.write_text(text)
    return path


def fly(tmp_path: Path, path: Path, body: Callable[[Rig], Awaitable[None]], meter_w: float = 6.0) -> Path:
    """Fly `path` with `body` beside; the run directory. The flight is ended and everything off afterwards."""
    directory = tmp_path / "run"

    async def steps() -> None:
        loads = {1: RecordedLoad(((0.0, 6.0),)), 2: RecordedLoad(((0.0, meter_w),))}
        async with VirtualSupply(loads=loads) as virtual:
            address = f"tcp://127.0.0.1:{virtual.port}"
            supply = ScpiSupply("rigol-dp800", address)
            channel = Channel(
                supply, 1, Intent("b1", address, "rigol-dp800", 1, 0.6), 0.0, Envelope.of(TYPE.supply),
                Setpoint(15.0, 2.5), pacing=Pacing(), meter=cross_check(METER, supply, None),
            )  # fmt: skip
            flights: list[FlightControl] = []

            def told(_: BoardOwner, kind: str, data: dict[str, Any]) -> None:
                for flight in flights:
                    flight.told(kind, data)

            def sampled(_: BoardOwner, sample: PowerSample) -> None:
                for flight in flights:
                    flight.sampled(sample)

            board = BoardOwner(
                "b1", BenchBoard(type="virtual-arm64", power=(PowerWire(supply="psu1", channel=1),), meter=METER), TYPE,
                (channel,), None, None, IntentJournal(tmp_path / "intent.jsonl"), FakeDeadman(),
                on_event=told, on_sample=sampled,
                on_failure=lambda _, error: None,
            )  # fmt: skip
            try:
                flight = await FlightControl.begin(board, path, directory, 0.0, {}, lambda: None)
                flights.append(flight)
                virtual.instrument.execute(":APPL CH2,15,1;:OUTP CH2,ON")
                await board.on(None, lambda: None)
                await body(Rig(board, virtual, flight))
                await flight.end("test")
            finally:
                await board.off("test")
                await board.rest()
                await supply.close()

    timelapse.run(steps())
    return directory


def test_the_ledger_is_in_the_record_once_a_second_and_at_the_end(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.flight.set_rate(10.0, "test")
        with closing(sqlite3.connect(tmp_path / "run/telemetry.sqlite")) as live:
            await rig.until(lambda: live.execute("SELECT count(*) FROM ledger").fetchone()[0] >= 3)
        loop = await rig.board.loop()
        await rig.until(lambda: loop.ledger.compared > 5)
        assert rig.flight.describe()["invalid"] == []

    directory = fly(tmp_path, mission(tmp_path), body)
    with closing(sqlite3.connect(directory / "telemetry.sqlite")) as telemetry:
        telemetry.row_factory = sqlite3.Row
        rows = telemetry.execute("SELECT * FROM ledger ORDER BY t_mono").fetchall()
        energies = dict(telemetry.execute("SELECT t_mono, energy_j FROM power").fetchall())
    assert len(rows) >= 4
    for row in rows[1:-1]:
        assert row["metered_j"] == pytest.approx(energies[row["t_mono"]], rel=0.02)
    last = rows[-1]
    assert last["metered_j"] >= max(energies.values())  # and what was drawn from the last tick until it was off
    assert last["fed_j"] == pytest.approx(last["metered_mission_j"], rel=0.1)
    spent = sum(last[name] for name in ("stored_j", "delivered_j", "mppt_loss_j", "resistance_loss_j", "charge_loss_j"))
    assert spent + last["curtailed_j"] == pytest.approx(last["generated_j"], abs=1e-6 * last["delivered_j"])
    kept = record.read(directory)
    (ended,) = kept.of("flight_ended")
    assert ended["power_ledger"]["fed_j"] == last["fed_j"]
    assert measures.MEASURES["energy.gap_share"].of(kept).value == 0.0
    residual = measures.MEASURES["energy.fed_residual_share"].of(kept).value
    assert isinstance(residual, float)
    assert residual < 0.1
    compared = measures.MEASURES["energy.meter_comparisons"].of(kept)
    assert compared.value == ended["power_ledger"]["compared"] > 5
    assert "channel 2 of psu1" in compared.evidence


def test_meters_that_disagree_are_an_event_a_state_a_metric_and_a_verdict(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.until(lambda: rig.flight.invalid)
        (reason,) = rig.flight.describe()["invalid"]
        assert "run_invalid: b1: channel 2 of psu1: the second meter shows" in reason
        flying = rig.board.metrics(rig.flight.metrics(), "sunlit")
        text = Exporter(lambda: BenchMetrics("b", "0", True, 1, (flying,))).render()[0].decode()
        assert 'hil_flight_invalid_reasons{board="b1"} 1.0' in text
        assert rig.virtual.instrument.channels[1].output_on

    directory = fly(tmp_path, mission(tmp_path), body, meter_w=12.0)
    kept = record.read(directory)
    assert [event["what"] for event in kept.of("run_invalid")] == ["meters"]
    row = next(row for row in verdict.evaluate(kept, ()).criteria if row.name == verdict.BENCH_ROW)
    assert row.verdict == "invalid"
    assert "channel 2 of psu1" in row.evidence


def test_the_missions_bounds_are_the_loops(tmp_path: Path) -> None:
    async def never(rig: Rig) -> None:
        raise AssertionError("it must not fly")

    tight = mission(tmp_path, shed="loop: {period_s: 0.05}\n  shed: ")
    with pytest.raises(UsageError, match=r"the supply allows a loop of 0\.1\d* s, the mission needs 0\.050 s"):
        fly(tmp_path, tight, never)
    quick = mission(tmp_path, hold_s="hold_s: 0.1, was: ").read_text().replace("was: 2, ", "")
    (tmp_path / "mission.yaml").write_text(quick)
    with pytest.raises(UsageError, match=r"the mission needs 0\.050 s"):
        fly(tmp_path, tmp_path / "mission.yaml", never)


DIRECT = "conversion: direct, curve: {voc_v: 20, isc_a: 2.75, vmp_v: 17.5, imp_a: 2.515}, bol_w: "


def test_an_array_without_a_tracker_is_flown_on_a_battery(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def follows() -> bool:
            last, bus_v = rig.board.last, rig.flight.describe()["power"]["bus_voltage_v"]
            return last is not None and (last.array_used_w or 0.0) > 1.0 and abs(last.voltage_set_v - bus_v) < 0.1

        await rig.until(follows)
        assert rig.flight.describe()["invalid"] == []

    fly(tmp_path, mission(tmp_path, bol_w=DIRECT), body)


def test_an_array_without_a_tracker_is_not_flown_without_a_battery(tmp_path: Path) -> None:
    async def never(rig: Rig) -> None:
        raise AssertionError("it must not fly")

    regulated = "bus: {regulated_v: 15}\n  shed: "
    path = mission(tmp_path, bol_w=DIRECT, capacity_wh="capacity_wh: 0, was: ", shed=regulated)
    path.write_text(path.read_text().replace("was: 10.4, ", "").replace("restore_soc: 0.3", "restore_soc: 0"))
    with pytest.raises(UsageError, match=r"mission.yaml:\d+: .*without a battery the bus needs regulated_v and .*mppt"):
        fly(tmp_path, path, never)
