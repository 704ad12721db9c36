"""The power loop against the virtual supply: metering, following the bus, shedding and restoring, every way to stop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timelapse

from hil.bench.crosscheck import CrossCheck, MeterBounds
from hil.bench.deadman import ArmedOutput
from hil.bench.pacing import Pacing
from hil.bench.powerflight import FlightPower
from hil.bench.powerloop import PowerLoop
from hil.bench.powervalues import Bounds, Flight, PowerSample, Tuning
from hil.bench.safety import Envelope, Intent, IntentJournal
from hil.drivers.scpi import ScpiSupply
from hil.errors import BenchError, SafetyError, UsageError
from hil.mission.clock import MissionClock
from hil.mission.eps import EpsConfig, EpsModel, ShedConfig
from hil.mission.solar_array import SasCurve
from hil.model import Reading, Setpoint
from hil.virtual.supply import Fault, Load, RecordedLoad, ResistiveLoad, VirtualSupply

ENVELOPE = Envelope(
    voltage_min_v=9.0,
    voltage_max_v=19.0,
    current_max_a=2.5,
    power_max_w=30.0,
    overvoltage_protection_v=20.0,
    overcurrent_protection_a=2.8,
    inrush_s=0.02,
    slew_v_per_s=500.0,
    off_dwell_s=0.05,
    on_timeout_s=0.4,
)
FAST = Tuning(period_min_s=0.02, filter_s=0.02, stale_s=0.5, breach_s=0.05, pulse_s=0.05, off_timeout_s=1.0)


class FakeDeadman:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.alive = True
        self.beats: list[float] = []
        self.armed: set[tuple[str, int]] = set()

    def beat(self, source: str) -> None:
        self.beats.append(time.monotonic())

    async def arm(self, output: ArmedOutput) -> None:
        self.armed.add(output.intent.key)

    async def disarm(self, intent: Intent) -> None:
        self.armed.discard(intent.key)


@dataclass
class Rig:
    """A running loop and everything around it."""

    virtual: VirtualSupply
    loop: PowerLoop
    task: asyncio.Task[None]
    deadman: FakeDeadman
    journal: IntentJournal
    samples: list[PowerSample]
    events: list[tuple[str, dict[str, Any]]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == kind]

    @property
    def is_on(self) -> bool:
        return self.virtual.instrument.channels[1].output_on

    async def until(self, condition: Callable[[], object], timeout_s: float = 30.0) -> None:
        """Run until `condition`; fails when the loop ended or time is up."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"never happened; events: {self.events}"
            await asyncio.sleep(0.005)

    async def ended(self) -> BaseException | None:
        await asyncio.wait((self.task,), timeout=30)
        assert self.task.done()
        return None if self.task.cancelled() else self.task.exception()


def fly(
    tmp_path: Path,
    body: Callable[[Rig], Awaitable[None]],
    load: Load | None = None,
    envelope: Envelope = ENVELOPE,
    tuning: Tuning = FAST,
    meter: CrossCheck | None = None,
    model: str = "rigol-dp800",
    timeout_s: float = 1.0,
) -> Rig:
    """Run `body` beside a loop; afterwards the loop is cancelled and the output must be off."""

    async def steps() -> Rig:
        async with VirtualSupply(model, loads={1: load or RecordedLoad(((0.0, 6.0),))}) as virtual:
            address = f"tcp://127.0.0.1:{virtual.port}"
            supply = ScpiSupply(model, address, timeout_s=timeout_s)
            intent = Intent("vb1", address, model, 1, 0.6)
            journal = IntentJournal(tmp_path / "intent.jsonl")
            samples: list[PowerSample] = []
            events: list[tuple[str, dict[str, Any]]] = []
            deadman = FakeDeadman()
            loop = PowerLoop(
                "vb1",
                supply,
                1,
                envelope,
                journal,
                intent,
                deadman,
                Setpoint(15.0, 2.0),
                on_sample=samples.append,
                on_event=lambda kind, data: events.append((kind, data)),
                tuning=tuning,
                meter=meter,
            )
            task = asyncio.create_task(loop.run())
            rig = Rig(virtual, loop, task, deadman, journal, samples, events)
            try:
                await rig.until(lambda: samples or task.done())
                await body(rig)
            finally:
                task.cancel()
                await asyncio.wait((task,))
                await supply.close()
            return rig

    return timelapse.run(steps())


def battery(soc: float = 0.8, resistance_ohm: float = 0.1, capacity_ah: float = 0.05) -> EpsModel:
    return EpsModel(
        EpsConfig(
            capacity_ah=capacity_ah, resistance_ohm=resistance_ohm, initial_soc=soc, cells_series=4, charge_max_c=100.0
        )
    )


def flight(eps: EpsModel, rate: float = 1.0, array_w: float = 0.0, **changes: Any) -> Flight:
    clock = MissionClock(wall_mono_s=time.monotonic(), rate=rate)
    made = Flight(eps, clock, lambda t: array_w, lambda t: 0.0, planned_w=15.0)
    return replace(made, **changes)


# --------------------------------------------------------------------------------------------------- without flight
def test_metering_on_and_off_with_events_and_the_dead_man_armed_in_between(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        assert rig.is_on
        assert rig.deadman.armed
        await rig.until(lambda: rig.samples[-1].power_w == 6.0)
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 20)
        await rig.loop.request_off()
        assert not rig.is_on
        assert not rig.deadman.armed
        assert rig.journal.open_intents() == ()

    rig = fly(tmp_path, body)
    assert [kind for kind, _ in rig.events if kind.startswith("board")] == ["board_on", "board_off"]
    on = [sample for sample in rig.samples if sample.state == "on" and sample.power_w == 6.0]
    measured = on[-1].energy_j - on[0].energy_j
    assert measured == pytest.approx(6.0 * (on[-1].t_mono - on[0].t_mono), rel=1e-6)
    assert on[-1].t_mission is None
    assert on[-1].row()["voltage_set_v"] == 15.0


def test_cancelling_the_loop_ends_with_the_output_off(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        rig.task.cancel()
        await rig.ended()
        assert not rig.is_on
        assert rig.of("safe_state")[0]["verified"] is True
        assert rig.journal.open_intents() == ()
        with pytest.raises(BenchError, match="does not run"):
            await rig.loop.request_on()

    fly(tmp_path, body)


def test_switching_on_twice_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        with pytest.raises(UsageError, match="on already"):
            await rig.loop.request_on()
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 3)
        assert rig.is_on
        assert not rig.of("safe_state")

    fly(tmp_path, body)


def test_a_failed_start_is_the_callers_and_the_loop_goes_on(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(SafetyError, match="CC"):
            await rig.loop.request_on()
        assert not rig.is_on
        assert not rig.deadman.armed
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 3)
        assert rig.loop.state == "off"

    fly(tmp_path, body, ResistiveLoad(0.5))


def test_a_trip_is_told_with_its_name_and_can_be_started_again(tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 6.0), (0.3, 45.0), (0.8, 6.0)))

    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        await rig.until(lambda: rig.of("tripped") and rig.loop.state == "tripped")
        assert rig.of("tripped")[0]["protections"] == ["ocp"]
        assert not rig.deadman.armed
        load.profile = ((0.0, 6.0),)
        await rig.loop.request_on()
        await rig.until(lambda: rig.samples[-1].state == "on")

    fly(tmp_path, body, load, envelope=replace(ENVELOPE, overcurrent_protection_a=1.0))


def test_leaving_the_envelope_for_long_enough_cuts(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        await rig.until(lambda: rig.loop.state == "tripped")
        assert "12 W measured" in rig.of("envelope_breach")[0]["cause"]
        assert not rig.is_on

    load = RecordedLoad(((0.0, 6.0), (0.3, 12.0)))
    fly(tmp_path, body, load, envelope=replace(ENVELOPE, power_max_w=10.0))


@pytest.mark.parametrize("what", ["dead-man", "breach", "energy"])
def test_a_long_dip_ends_with_what_would_cut_the_board(tmp_path: Path, what: str) -> None:
    load = RecordedLoad(((0.0, 6.0),))

    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        dip = asyncio.create_task(rig.loop.request_dip(2.0, 20.0))
        await rig.until(lambda: rig.samples[-1].voltage_v < 13.5)
        if what == "dead-man":
            rig.deadman.alive = False
        elif what == "breach":
            load.profile = ((0.0, 12.0),)
        await rig.until(lambda: not rig.is_on, 15.0)  # and the dip would take twenty
        await asyncio.wait((dip,), timeout=10.0)
        assert dip.done()
        dip.exception()

    changes = {"dead-man": {}, "breach": {"power_max_w": 10.0}, "energy": {"energy_max_j": 3.0}}[what]
    fly(tmp_path, body, load, envelope=replace(ENVELOPE, **changes))


def test_a_dip_longer_than_a_flight_may_be_late_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(battery(), bounds=Bounds(lateness_s=0.5)))
        await rig.loop.request_on()
        assert (await rig.loop.request_dip(2.0, 0.4)).output_on
        with pytest.raises(UsageError, match=r"may be 0\.5 s late"):
            await rig.loop.request_dip(2.0, 0.7)
        await asyncio.sleep(0.2)
        assert rig.is_on

    fly(tmp_path, body)


def test_one_lost_sample_is_told_and_survived(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        rig.virtual.faults.append(Fault("silent", "MEAS:ALL"))
        await rig.until(lambda: rig.of("sample_back"))
        assert rig.loop.state == "on"
        assert rig.is_on

    fly(tmp_path, body, tuning=replace(FAST, stale_s=5.0), timeout_s=0.2)


def test_a_supply_that_stays_silent_ends_the_loop_with_the_dead_man_still_armed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        rig.virtual.faults.append(Fault("silent", r"\?", -1))
        failure = await rig.ended()
        assert isinstance(failure, SafetyError)
        assert "no measurement" in failure.message
        assert any("safe state was not reached" in note for note in failure.__notes__)
        assert rig.of("safe_state")[0]["verified"] is False
        assert rig.deadman.armed
        assert len(rig.journal.open_intents()) == 1

    fly(tmp_path, body, tuning=replace(FAST, stale_s=0.3))


def test_a_refused_set_point_ends_in_the_safe_state(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(battery(), rate=10.0))
        await rig.loop.request_on()
        rig.virtual.faults.append(Fault("ignore", "SOUR1:VOLT [0-9]", -1))
        failure = await rig.ended()
        assert isinstance(failure, SafetyError)
        assert "reads back" in failure.message
        assert not rig.is_on
        assert rig.of("safe_state")[0]["verified"] is True

    fly(tmp_path, body)


def test_a_dead_dead_man_ends_in_the_safe_state(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        rig.deadman.alive = False
        failure = await rig.ended()
        assert isinstance(failure, SafetyError)
        assert "dead-man process is gone" in failure.message
        assert not rig.is_on

    fly(tmp_path, body)


def test_a_hanging_step_stops_the_heartbeat(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        async def hang(ch: int) -> Any:
            await asyncio.Event().wait()

        rig.loop._supply.measure = hang  # type: ignore[method-assign]
        await asyncio.sleep(1.0)
        assert time.monotonic() - rig.deadman.beats[-1] > 0.4

    fly(tmp_path, body, tuning=replace(FAST, step_budget_s=0.3))


def test_an_output_switched_on_by_somebody_else_is_told_once_and_left_alone(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.virtual.instrument.execute(":APPL CH1,12,1;:OUTP CH1,ON")
        await rig.until(lambda: rig.of("foreign_output"))
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 5)
        assert len(rig.of("foreign_output")) == 1
        assert rig.is_on

    fly(tmp_path, body)


def test_a_loop_that_cannot_keep_its_period_says_so(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.virtual.faults.append(Fault("late", "MEAS:ALL", 1, delay_s=0.15))
        await rig.until(lambda: rig.loop.overruns)
        assert rig.of("overrun")[0]["lateness_s"] > 0.1

    fly(tmp_path, body, tuning=replace(FAST, overrun_s=0.1))


# ------------------------------------------------------------------------------------------------------ with flight
def test_the_bus_voltage_follows_the_battery(tmp_path: Path) -> None:
    eps = battery(soc=0.8)

    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(eps, rate=30.0))
        await rig.loop.request_on()
        first = eps.state.bus_voltage_v
        await rig.until(lambda: eps.state.bus_voltage_v < first - 0.3)
        settled = rig.samples[-1]
        assert settled.bus_voltage_v is not None
        assert settled.voltage_set_v == pytest.approx(settled.bus_voltage_v, abs=0.0101)
        assert settled.voltage_v == pytest.approx(settled.bus_voltage_v, abs=0.1)
        assert settled.soc == pytest.approx(eps.state.soc, abs=0.005)  # the model may be a tick ahead of its sample
        assert settled.gain == pytest.approx(0.1 * 6.0 / settled.bus_voltage_v**2, rel=0.1)

    rig = fly(tmp_path, body)
    flown = [sample for sample in rig.samples if sample.rate == 30.0 and sample.state == "on"]
    wall = flown[-1].energy_j - flown[0].energy_j
    assert flown[-1].mission_energy_j - flown[0].mission_energy_j == pytest.approx(30.0 * wall, rel=1e-9)


def test_the_ledger_of_the_model_agrees_with_the_metered_energy(tmp_path: Path) -> None:
    eps = battery(soc=0.9, capacity_ah=0.5)

    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(eps, rate=20.0))
        await rig.loop.request_on()
        start = rig.loop.last
        assert start is not None
        delivered, metered = eps.ledger.delivered_j, rig.samples[-1].mission_energy_j
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 50)
        model_j = eps.ledger.delivered_j - delivered
        meter_j = rig.samples[-1].mission_energy_j - metered
        assert model_j == pytest.approx(meter_j, rel=0.1)

    fly(tmp_path, body)


@pytest.mark.parametrize("regulated_v", [None, 15.0])
def test_the_load_is_shed_by_a_real_cut_and_restored_by_itself(tmp_path: Path, regulated_v: float | None) -> None:
    """By the battery's voltage, also where the bus holds its own to the end."""
    eps = EpsModel(replace(battery(soc=0.35, capacity_ah=0.02).config, regulated_bus_v=regulated_v))
    load = RecordedLoad(((0.0, 6.0),))
    sun = {"w": 0.0}
    rule = ShedConfig(shed_v=14.0, hold_s=2.0, restore_v=14.4, restore_soc=0.4, dwell_s=1.0)

    async def body(rig: Rig) -> None:
        rig.loop.attach(replace(flight(eps, rate=20.0, shed=rule), array_w=lambda t: sun["w"]))
        await rig.loop.request_on()
        await rig.until(lambda: rig.of("load_shed"))
        assert rig.loop.state == "shed"
        assert not rig.is_on
        assert not load.powered
        assert not rig.deadman.armed
        with pytest.raises(BenchError, match="shed by the mission"):
            await rig.loop.request_on()
        sun["w"] = 40.0
        await rig.until(lambda: rig.of("load_restored"))
        assert rig.loop.state == "on"
        assert rig.is_on
        await rig.until(lambda: rig.samples[-1].state == "on")

    rig = fly(tmp_path, body, load)
    shed, restored = rig.of("load_shed")[0], rig.of("load_restored")[0]
    assert shed["cause"] == "bus below its shed voltage"
    assert shed["watched_v"] < 14.0
    assert shed["bus_voltage_v"] == (regulated_v or shed["watched_v"])
    assert shed["verified_v"] < 0.6
    assert restored["soc"] >= 0.4
    assert restored["bus_voltage_v"] >= 14.4
    assert restored["on_mono"] - shed["verified_mono"] >= 1.0
    assert rig.of("load_restoring")[0]["rested_s"] < 1.5, "the battery was ready before the dwell was over"
    assert len(rig.of("load_shed")) == len(rig.of("load_restored")) == 1
    assert {sample.state for sample in rig.samples} >= {"off", "on", "shed"}


def test_a_short_dip_below_the_shed_voltage_is_held_out(tmp_path: Path) -> None:
    eps = battery(soc=0.35, capacity_ah=1.0)
    rule = ShedConfig(shed_v=14.35, hold_s=1000.0, restore_v=14.4, restore_soc=0.1, dwell_s=0.1)

    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(eps, shed=rule))
        await rig.loop.request_on()
        await rig.until(lambda: (rig.samples[-1].bus_voltage_v or 99) < 14.6)
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 20)
        assert rig.loop.state == "on"

    fly(tmp_path, body)


def test_a_collapsing_bus_is_shed_at_once(tmp_path: Path) -> None:
    eps = battery(soc=0.03, capacity_ah=0.01)

    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(eps, rate=100.0))
        await rig.loop.request_on()
        await rig.until(lambda: rig.of("load_shed"))
        assert rig.of("load_shed")[0]["cause"] == "bus collapse"

    fly(tmp_path, body)


def test_a_gain_above_half_is_refused_before_the_flight(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(UsageError, match="gain would be"):
            rig.loop.attach(flight(battery(resistance_ohm=10.0)))
        assert rig.loop.flight is None

    fly(tmp_path, body)


def test_a_gain_above_half_in_flight_sheds_and_invalidates(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(battery(soc=1.0, resistance_ohm=2.0, capacity_ah=5.0), planned_w=5.0))
        flown = rig.loop._flown
        assert flown is not None
        flown.flight = replace(flown.flight, eps=Louder(flown.flight.eps))  # type: ignore[arg-type]
        await rig.loop.request_on()
        await rig.until(lambda: rig.of("load_shed"))
        told = rig.of("run_invalid")
        assert (told[0]["what"], told[0]["measured"], told[0]["limit"]) == ("gain", 0.7, 0.5)
        assert rig.of("load_shed")[0]["cause"] == "loop gain"

    fly(tmp_path, body)


class Louder:
    """A model that finds out too late that its source is soft."""

    def __init__(self, eps: EpsModel) -> None:
        self._eps = eps

    @property
    def state(self) -> Any:
        return self._eps.state

    def step(self, dt_s: float, board_w: float, array_w: float) -> Any:
        return self._eps.step(dt_s, board_w, array_w)

    def gain(self, board_w: float, voltage_v: float | None = None) -> float:
        return 0.7 if board_w > 1 else 0.0


def test_a_mission_faster_than_the_supply_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(UsageError, match="the supply allows a loop of"):
            rig.loop.attach(flight(battery(), bounds=Bounds(period_s=0.001)))

    fly(tmp_path, body)


def test_a_bus_beyond_the_boards_limit_is_refused_before_the_flight(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        eps = EpsModel(EpsConfig(capacity_ah=1.0, cells_series=5, initial_soc=1.0))
        with pytest.raises(SafetyError, match="outside the board's"):
            rig.loop.attach(flight(eps))

    fly(tmp_path, body)


def test_voltage_steps_keep_the_slew_limit(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        rig.loop.attach(flight(battery(soc=0.3, capacity_ah=5.0)))  # 14.4 V; the board is at 15 V
        await rig.until(lambda: rig.samples[-1].voltage_set_v < 14.5)

    rig = fly(tmp_path, body, envelope=replace(ENVELOPE, slew_v_per_s=5.0))
    assert rig.of("slew_limited")
    sets = [sample.voltage_set_v for sample in rig.samples if sample.state == "on"]
    steps = [abs(b - a) for a, b in pairwise(sets)]
    assert max(steps) <= 5.0 * max(0.02, rig.loop.period_s) * 3 + 1e-9


def test_a_skip_advances_the_model_once_and_says_that_it_is_modelled(tmp_path: Path) -> None:
    eps = battery(soc=0.5, capacity_ah=5.0)

    async def body(rig: Rig) -> None:
        made = flight(eps, array_w=6.1)
        rig.loop.attach(made)
        await rig.loop.request_on()
        before = eps.state.soc
        assert isinstance(made.clock, MissionClock)
        beats = len(rig.deadman.beats)
        async with rig.loop.advanced_model(2e5, assumed_board_w=6.0, step_s=10.0):
            made.clock.skip_to(2e5, time.monotonic())
        # Two days in steps of ten seconds take a while: the board is metered meanwhile, and the heart beats.
        assert len(rig.deadman.beats) - beats > 5
        after = eps.state.soc
        seen = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > seen + 5)
        assert abs(eps.state.soc - after) < 0.001
        assert after != before
        told = rig.of("model_advanced")[0]
        assert (told["label"], told["assumed_board_w"]) == ("modelled", 6.0)
        assert rig.samples[-1].mission_energy_j < 100

    fly(tmp_path, body)


# ------------------------------------------------------------------------------------------ what a flight must keep to
def direct(resistance_ohm: float) -> EpsModel:
    """An array of 17.5 V at its maximum on a battery of some 14.4 V."""
    curve = SasCurve(20.0, 2.75, 17.5, 2.515)
    return EpsModel(replace(battery(soc=0.3, resistance_ohm=resistance_ohm, capacity_ah=0.05).config, direct=curve))


def test_an_array_on_a_batterys_bus_is_flown_left_of_its_maximum(tmp_path: Path) -> None:
    eps = direct(0.3)

    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(eps, rate=10.0, array_w=44.0))
        await rig.loop.request_on()
        first_v = eps.state.bus_voltage_v
        await rig.until(lambda: eps.state.bus_voltage_v > first_v + 0.3)
        assert rig.samples[-1].voltage_v == pytest.approx(eps.state.bus_voltage_v, abs=0.1)
        assert eps.state.bus_voltage_v < 17.0
        assert eps.config.direct is not None
        at_bus_a = eps.config.direct.current_a(eps.state.bus_voltage_v)
        assert at_bus_a > 2.6, "nearly its short-circuit current"
        assert eps.state.array_used_w == pytest.approx(at_bus_a * eps.state.bus_voltage_v, rel=0.01)
        assert eps.state.mismatch_w > 0.5
        assert not rig.of("run_invalid")

    fly(tmp_path, body)


def test_an_array_on_a_battery_too_soft_to_hold_the_bus_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(UsageError, match="gain would be"):
            rig.loop.attach(flight(direct(10.0), array_w=44.0))
        assert rig.loop.flight is None

    fly(tmp_path, body)


def test_the_gain_is_judged_at_the_lowest_voltage_that_is_flown(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        eps = battery(soc=1.0, resistance_ohm=5.0)
        assert eps.gain(15.0) < 0.5 < eps.gain(15.0, 11.0)
        with pytest.raises(UsageError, match=r"gain would be 0\.6"):
            rig.loop.attach(flight(eps, shed=ShedConfig(shed_v=11.0)))

    fly(tmp_path, body)


def test_a_late_set_point_makes_the_run_invalid_once(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(battery(), bounds=Bounds(lateness_s=0.1)))
        await rig.loop.request_on()
        while rig.loop.ledger.overruns < 2:  # a tick without a set point takes more of it to be late
            fault, before = Fault("late", "MEAS:ALL", 1, delay_s=0.16), len(rig.samples)
            rig.virtual.faults.append(fault)
            await rig.until(lambda: fault.count == 0 and len(rig.samples) > before + 1)  # noqa: B023  (awaited at once)
        told = rig.of("run_invalid")
        assert [event["what"] for event in told] == ["late"]
        assert told[0]["measured"] > told[0]["limit"] == 0.1
        assert "late, more than 0.1" in told[0]["cause"]
        assert rig.is_on

    fly(tmp_path, body, tuning=replace(FAST, overrun_s=0.1))


def test_a_stale_measurement_makes_the_run_invalid_and_its_energy_a_gap(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(battery(), bounds=Bounds(gap_s=0.3)))
        await rig.loop.request_on()
        await rig.until(lambda: rig.loop.ledger.samples > 20)
        assert rig.loop.ledger.gap_j == 0.0
        assert not rig.of("run_invalid")
        rig.virtual.faults.append(Fault("silent", "MEAS:ALL", 2))
        await rig.until(lambda: rig.of("sample_back"))
        await rig.until(lambda: rig.of("run_invalid"))
        assert rig.of("run_invalid")[0]["what"] == "stale"
        assert rig.loop.ledger.lost_samples == 2
        assert rig.loop.ledger.longest_gap_s > 0.4
        assert rig.loop.ledger.gap_j == pytest.approx(6.0 * rig.loop.ledger.longest_gap_s, rel=0.05)
        assert rig.is_on

    fly(tmp_path, body, tuning=replace(FAST, stale_s=5.0), timeout_s=0.5)


def test_a_supply_that_becomes_too_slow_in_flight_makes_the_run_invalid(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(battery(), bounds=Bounds(period_s=0.1)))
        await rig.loop.request_on()
        assert rig.loop.period_s < 0.1
        rig.virtual.latency_s = 0.03
        await rig.until(lambda: rig.of("run_invalid"))
        assert rig.of("run_invalid")[0]["what"] == "slow"
        assert rig.loop.period_s > 0.1

    fly(tmp_path, body)


def test_writes_below_the_resolution_are_left_out(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        eps = EpsModel(replace(battery(capacity_ah=5.0).config, regulated_bus_v=15.0))
        rig.loop.attach(flight(eps))
        await rig.loop.request_on()
        await rig.until(lambda: rig.loop.ledger.writes_skipped > 30)
        assert rig.loop.ledger.writes == 0
        rig.loop.detach()
        rig.loop.attach(flight(battery(soc=0.5), rate=200.0))
        await rig.until(lambda: rig.loop.ledger.writes > 10)

    fly(tmp_path, body)


def test_energy_is_of_the_raw_samples_and_the_model_is_fed_the_filtered_current(tmp_path: Path) -> None:
    fed: list[float] = []
    steady: list[float] = []

    class Watched(Louder):
        def step(self, dt_s: float, board_w: float, array_w: float) -> Any:
            fed.append(board_w)
            return super().step(dt_s, board_w, array_w)

        def gain(self, board_w: float, voltage_v: float | None = None) -> float:
            return 0.0

    load = RecordedLoad(tuple((0.1 * n, 18.0 if n % 2 else 3.0) for n in range(200)))

    async def body(rig: Rig) -> None:
        made = flight(battery(capacity_ah=5.0))
        rig.loop.attach(replace(made, eps=Watched(made.eps)))  # type: ignore[arg-type]
        await rig.loop.request_on()
        await rig.until(lambda: rig.loop.ledger.samples > 120)
        steady.extend(fed[-40:])

    rig = fly(tmp_path, body, load, tuning=replace(FAST, filter_s=0.5))
    on = [sample for sample in rig.samples if sample.state == "on"][1:]
    assert {round(sample.power_w) for sample in on} == {3, 18}
    by_hand = sum(0.5 * (a.power_w + b.power_w) * (b.t_mono - a.t_mono) for a, b in pairwise(on))
    assert on[-1].energy_j - on[0].energy_j == pytest.approx(by_hand, rel=1e-9)
    assert max(steady) - min(steady) < 7.0, "steps of 15 W, smoothed with a time constant of five of them"


def test_the_ledger_says_what_was_measured_and_what_the_model_was_fed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        made = flight(battery(capacity_ah=5.0), rate=10.0)
        rig.loop.attach(made)
        await rig.loop.request_on()
        await rig.until(lambda: rig.loop.ledger.samples > 80)
        ledger = rig.loop.ledger
        assert ledger.metered_j == pytest.approx(rig.samples[-1].energy_j, rel=0.02)
        assert ledger.metered_mission_j == pytest.approx(10.0 * ledger.metered_j, rel=1e-9)
        assert ledger.fed_j == pytest.approx(ledger.metered_mission_j, rel=0.1)
        assert ledger.assumed_j == 0.0
        async with rig.loop.advanced_model(1e4, assumed_board_w=2.0, step_s=10.0):
            made.clock.skip_to(1e4, time.monotonic())  # type: ignore[attr-defined]
        assert ledger.assumed_j == pytest.approx(2.0 * 1e4, rel=0.01)

    fly(tmp_path, body)


def test_energy_is_the_missions_at_the_rate_it_was_drawn_at() -> None:
    """A rate that changes between two samples, and skips, which nothing was measured of: those the model assumed."""
    now = [100.0]
    clock = MissionClock(wall_mono_s=100.0)
    made = replace(flight(battery()), clock=clock)
    flown = FlightPower(made, 9.0, tell=lambda kind, data: None, clock=lambda: now[0])
    clock.set_rate(60.0, 100.75)
    clock.skip_to(5000.0, 101.0)
    clock.set_rate(1.0, 101.5)
    assert flown.metered(20.0, 100.0, 102.0) == pytest.approx(10.0 * (0.75 + 0.25 * 60 + 0.5 * 60 + 0.5))
    assert flown.metered(5.0, 102.0, 102.0) == 0.0

    async def skip() -> None:
        async with flown.advanced(9000.0, 1.0, 100.0):
            assert flown.metered(20.0, 102.0, 103.0) == 0.0
            now[0] = 103.5
            clock.skip_to(9000.0, now[0])

    timelapse.run(skip())
    assert flown.metered(20.0, 103.0, 104.0) == pytest.approx(10.0)
    assert flown.ledger.metered_j == 65.0


# ------------------------------------------------------------------------------------------------------ second meter
class Handheld:
    """A meter that shows what the test says."""

    def __init__(self, watts: float) -> None:
        self.watts = watts
        self.broken = False
        self.asked: Callable[[float], object] = lambda now_s: None

    async def read(self) -> Reading:
        self.asked(time.monotonic())
        if self.broken:
            raise BenchError("the meter is off")
        return Reading(time.monotonic(), 15.0, self.watts / 15.0, self.watts, True)

    def check(self) -> CrossCheck:
        return CrossCheck("handheld", self.read, MeterBounds(hold_s=0.15, every_s=0.03))


def test_meters_that_disagree_make_the_run_invalid(tmp_path: Path) -> None:
    handheld = Handheld(5.8)

    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(battery()))
        await rig.loop.request_on()
        await rig.until(lambda: rig.loop.ledger.compared > 10)
        assert not rig.of("run_invalid")
        handheld.watts = 9.0
        await rig.until(lambda: rig.of("run_invalid"))
        told = rig.of("run_invalid")[0]
        assert (told["what"], told["board_w"]) == ("meters", 9.0)
        assert "handheld: the second meter shows 9 W, more than the supply's 6 W" in told["cause"]
        count = rig.loop.ledger.compared
        await rig.until(lambda: rig.loop.ledger.compared > count + 10)
        assert len(rig.of("run_invalid")) == len(rig.of("meters_disagree")) == 1
        assert rig.is_on
        assert rig.loop.ledger.meter == "handheld"

    fly(tmp_path, body, meter=handheld.check())


def test_a_meter_that_does_not_answer_is_told_once_and_compares_nothing(tmp_path: Path) -> None:
    handheld = Handheld(99.0)
    handheld.broken = True

    async def body(rig: Rig) -> None:
        rig.loop.attach(flight(battery()))
        await rig.loop.request_on()
        await rig.until(lambda: rig.of("meter_lost"))
        await asyncio.sleep(0.2)
        assert len(rig.of("meter_lost")) == 1
        assert rig.loop.ledger.compared == 0
        assert not rig.of("run_invalid")

    fly(tmp_path, body, meter=handheld.check())


def test_a_loop_that_hangs_asks_its_second_meter_nothing_more(tmp_path: Path) -> None:
    """It may be a channel of the same instrument, whose watchdog every question feeds."""
    handheld = Handheld(5.8)
    check = handheld.check()

    async def body(rig: Rig) -> None:
        await rig.loop.request_on()
        await rig.until(lambda: check.compared > 2)

        async def hang(ch: int) -> Any:
            await asyncio.Event().wait()

        rig.loop._supply.measure = hang  # type: ignore[method-assign]
        asked: list[float] = []
        handheld.asked = asked.append
        await asyncio.sleep(0.6)
        before = len(asked)
        await asyncio.sleep(0.3)
        del rig.loop._supply.measure  # the way to the safe state needs it
        assert len(asked) == before

    fly(tmp_path, body, tuning=replace(FAST, step_budget_s=0.3), meter=check)


# ------------------------------------------------------------------------------------- several channels, one supply
def test_channels_of_one_supply_get_equal_turns_and_the_period_of_all_their_exchanges(tmp_path: Path) -> None:
    """A slow supply with three boards: nobody starves, nobody ticks faster than the instrument can serve all three.

    Judged over a second of a quiet host: there must be one among some.
    """

    def fair(found: dict[str, list[PowerSample]]) -> bool:
        counts = sorted(len(samples) for samples in found.values())
        waits = [sample.lateness_s for samples in found.values() for sample in samples]
        in_line = sorted(waits)[len(waits) // 2] >= 0.05 if waits else True
        return counts[0] >= 2 and counts[-1] - counts[0] <= 1 and not in_line

    async def steps() -> dict[str, list[PowerSample]]:
        found: dict[str, list[PowerSample]] = {"b1": [], "b2": [], "b3": []}
        loads = {n: RecordedLoad(((0.0, 6.0),), undervoltage_lockout_v=3.0) for n in (1, 2, 3)}
        async with VirtualSupply(loads=loads) as virtual:
            virtual.latency_s = 0.01
            address = f"tcp://127.0.0.1:{virtual.port}"
            supply = ScpiSupply("rigol-dp800", address)
            journal, pacing = IntentJournal(tmp_path / "intent.jsonl"), Pacing()
            loops = [
                PowerLoop(
                    board,
                    supply,
                    channel,
                    ENVELOPE,
                    journal,
                    Intent(board, address, "rigol-dp800", channel, 0.6),
                    FakeDeadman(),
                    Setpoint(15.0, 2.0),
                    on_sample=found[board].append,
                    on_event=lambda kind, data: None,
                    tuning=replace(FAST, period_min_s=0.05),
                    pacing=pacing,
                )
                for channel, board in enumerate(found, 1)
            ]
            tasks = [asyncio.create_task(loop.run()) for loop in loops]
            for _ in range(10):
                await asyncio.sleep(1.0)
                if fair(found):
                    break
                for samples in found.values():
                    samples.clear()
            # Two questions and as many for a set point's write, ten milliseconds each, three channels.
            assert all(0.15 < loop.period_s < 1.0 for loop in loops)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await supply.close()
        return found

    assert fair(timelapse.run(steps())), "no second in which each had its turns and nobody stood in line"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ten_minutes_of_64_loops_take_no_more_memory_than_one() -> None:
    bench = Path(__file__).parents[1] / "benchmarks/bench_powerloop.py"
    done = subprocess.run(
        [sys.executable, str(bench), "--minutes", "10", "--memory-only"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
