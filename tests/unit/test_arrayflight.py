"""A power loop whose channel is the satellite's array, against virtual simulators: light, dark, collapse."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import timelapse
from test_powerloop import FAST, FakeDeadman

from hil.bench.arrayflight import ArrayPlan, ArraySource
from hil.bench.levels import Layers
from hil.bench.powerloop import PowerLoop
from hil.bench.powervalues import Flight, PowerSample
from hil.bench.safety import Envelope, Intent, IntentJournal
from hil.drivers import solar
from hil.drivers.scpi import InstrumentError, ScpiSupply
from hil.drivers.solar import Curve, leave_array, plays_array
from hil.errors import BenchError, SafetyError, UsageError
from hil.mission.clock import MissionClock
from hil.model import Setpoint
from hil.virtual.supply import Channel, Fault, Load, RecordedLoad, VirtualSupply, ea

CURVE = Curve(22.0, 2.0, 18.0, 1.8)
INPUT = Envelope(
    voltage_min_v=12.0,
    voltage_max_v=24.0,
    current_max_a=2.5,
    power_max_w=45.0,
    overvoltage_protection_v=26.0,
    overcurrent_protection_a=2.8,
    inrush_s=0.02,
    off_dwell_s=0.05,
    on_timeout_s=0.4,
    undervoltage_lockout_v=8.0,
)
MODELS = ["keysight-e4360", "keysight-mp4300", "chroma-62000h-s"]


class Sun:
    """The light on the array, as a test says."""

    def __init__(self) -> None:
        self.light = 1.0

    def __call__(self, mission_s: float) -> float:
        return self.light


@dataclass
class Rig:
    """A running loop on an array's channel, and everything around it."""

    virtual: VirtualSupply
    supply: ScpiSupply
    loop: PowerLoop
    task: asyncio.Task[None]
    deadman: FakeDeadman
    journal: IntentJournal
    cuts: list[str]
    source: ArraySource
    sun: Sun = field(default_factory=Sun)
    samples: list[PowerSample] = field(default_factory=list)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def channel(self) -> Channel:
        return self.virtual.instrument.channels[1]

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == kind]

    async def until(self, condition: Callable[[], object], timeout_s: float = 8.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"never happened; events: {self.events}"
            await asyncio.sleep(0.005)

    def flight(self) -> Flight:
        clock = MissionClock(wall_mono_s=time.monotonic())
        return Flight(None, clock, lambda t: 30.0 * self.sun.light, self.sun, planned_w=15.0)

    async def prepare(self, curve: Curve = CURVE) -> dict[str, float]:
        return await self.source.prepare(ArrayPlan(curve, self.sun), 0.0, INPUT, "vb1")

    async def begin(self) -> None:
        """A flight, and the output on."""
        await self.prepare()
        self.loop.attach(self.flight())
        await self.loop.request_on()

    async def ended(self) -> BaseException | None:
        await asyncio.wait((self.task,), timeout=8)
        assert self.task.done()
        return None if self.task.cancelled() else self.task.exception()


def fly(
    directory: Path,
    body: Callable[[Rig], Awaitable[None]],
    model: str = "keysight-e4360",
    load: Load | None = None,
) -> Rig:
    """Run `body` beside a loop; afterwards the loop is cancelled and the output must be off."""

    async def steps() -> Rig:
        loads: dict[int, Load] = {1: load or RecordedLoad(((0.0, 12.0),), 8.0)}
        async with VirtualSupply(model, loads=loads) as virtual:
            address = f"tcp://127.0.0.1:{virtual.port}"
            supply = ScpiSupply(model, address, timeout_s=0.5)
            deadman, journal, cuts = FakeDeadman(), IntentJournal(directory / "intent.jsonl"), []
            source = ArraySource(supply, 1)
            loop = PowerLoop(
                "vb1",
                supply,
                1,
                INPUT,
                journal,
                Intent("vb1", address, model, 1, 0.6),
                deadman,
                Setpoint(20.0, 2.5),
                on_sample=lambda sample: rig.samples.append(sample),
                on_event=lambda kind, data: rig.events.append((kind, data)),
                on_cut=cuts.append,
                layers=Layers(accept="D"),  # Keysight's OCP stays off
                tuning=FAST,
                array=source,
            )
            rig = Rig(virtual, supply, loop, asyncio.create_task(loop.run()), deadman, journal, cuts, source)
            try:
                await rig.until(lambda: rig.samples or rig.task.done())
                await body(rig)
            finally:
                rig.task.cancel()
                await asyncio.wait((rig.task,))
                await supply.close()
            assert not rig.channel.output_on
            return rig

    return timelapse.run(steps())


@pytest.mark.parametrize("model", MODELS)
def test_the_curve_is_there_before_the_output_and_follows_the_light(tmp_path: Path, model: str) -> None:
    async def body(rig: Rig) -> None:
        rig.sun.light = 0.5
        told = await rig.prepare()
        assert (told["light"], told["voc_v"], told["isc_a"]) == (0.5, 22.0, pytest.approx(1.0))
        assert not rig.channel.output_on
        await rig.until(lambda: rig.channel.curve is not None)
        rig.loop.attach(rig.flight())
        on = await rig.loop.request_on()
        no_ocp = model.startswith("keysight")
        assert (on.level.level, on.waived) == (("D", ("no-ocp",)) if no_ocp else ("C", ()))
        assert 12.0 < on.reading.voltage_v < 22.0
        assert rig.deadman.armed
        curve = rig.channel.curve
        assert curve is not None
        assert (curve.open_circuit_v, curve.short_circuit_a) == (pytest.approx(22.0), pytest.approx(1.0))
        rig.sun.light = 0.9
        await rig.until(lambda: rig.channel.curve and rig.channel.curve.short_circuit_a > 1.79)
        rig.sun.light = 0.904  # the nearest step is the one that is played
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 5)
        await rig.loop.request_off()
        await rig.source.leave()
        assert rig.channel.curve is None
        await rig.until(lambda: rig.samples[-1].state == "off")
        rig.loop.detach()

    rig = fly(tmp_path, body, model)
    assert rig.kinds == ["board_on", "array_light", "board_off", "safe_state"]
    (light,) = rig.of("array_light")
    assert (light["light"], light["isc_a"], light["imp_a"]) == (0.9, pytest.approx(1.8), pytest.approx(1.62))
    last = [sample for sample in rig.samples if sample.state == "on"][-1]
    assert (last.soc, last.bus_voltage_v, last.array_used_w, last.battery_w, last.gain) == (None,) * 5
    assert (last.array_w, last.power_w) == (pytest.approx(27.1, abs=0.2), pytest.approx(12.0, rel=0.02))
    assert (last.voltage_set_v, last.current_limit_a) == (22.0, pytest.approx(1.8))
    ledger = rig.loop.ledger
    assert ledger.writes == 1
    assert ledger.metered_j == pytest.approx(rig.samples[-1].energy_j, rel=1e-6)
    assert ledger.fed_j == 0.0


@pytest.mark.parametrize("model", MODELS)
def test_the_dark_is_an_output_that_is_off_and_no_power_cut(tmp_path: Path, model: str) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.sun.light = 0.0
        await rig.until(lambda: not rig.channel.output_on)
        await rig.until(lambda: rig.samples[-1].voltage_v < 0.6)
        assert rig.loop.state == "on"
        assert rig.deadman.armed
        assert len(rig.journal.open_intents()) == 1
        assert rig.cuts == []
        rig.sun.light = 1.0
        await rig.until(lambda: rig.channel.output_on)
        await rig.until(lambda: rig.samples[-1].power_w > 11.0)
        assert rig.cuts == []
        await rig.loop.request_off()
        assert rig.cuts == ["requested"]

    rig = fly(tmp_path, body, model)
    assert [kind for kind in rig.kinds if kind != "array_light"] == [
        "board_on",
        "array_dark",
        "array_lit",
        "board_off",
        "safe_state",
    ]
    assert rig.of("array_dark")[0]["isc_a"] == 0.0


def test_a_start_in_the_dark_waits_for_the_light_with_the_output_off(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.sun.light = 0.0
        await rig.begin()
        assert rig.loop.state == "on"
        assert not rig.channel.output_on
        assert rig.deadman.armed
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 3)
        assert not rig.channel.output_on
        rig.sun.light = 0.6
        await rig.until(lambda: rig.of("array_lit"))
        assert rig.channel.output_on

    rig = fly(tmp_path, body)
    assert rig.kinds[:2] == ["board_on", "array_lit"]


def test_the_light_of_a_start_is_that_of_the_switching_and_not_of_before_the_dwell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(rig: Rig) -> None:
        nap = rig.loop._nap

        async def sunset(seconds: float) -> None:
            rig.sun.light = 0.0  # while the sequence waits
            await nap(seconds)

        monkeypatch.setattr(rig.loop, "_nap", sunset)
        rig.loop._envelope = replace(INPUT, off_dwell_s=0.4)
        await rig.begin()
        assert rig.loop.state == "on"
        assert not rig.channel.output_on

    assert fly(tmp_path, body).of("array_dark") == []


def test_more_than_the_array_has_folds_its_voltage_and_is_told(tmp_path: Path) -> None:
    thirst = RecordedLoad(((0.0, 0.0), (0.3, 12.0)), undervoltage_lockout_v=0.0)

    async def body(rig: Rig) -> None:
        await rig.begin()
        await rig.until(lambda: rig.samples[-1].power_w > 11.0)
        rig.sun.light = 0.2  # some 6 W of it
        await rig.until(lambda: rig.of("array_collapsed"))
        assert rig.channel.mode == "CC"
        assert rig.loop.state == "on"  # its OCP is off: a trip would be none of the satellite's
        thirst.profile = ((0.0, 0.0),)
        await rig.until(lambda: rig.of("array_recovered"))

    rig = fly(tmp_path, body, load=thirst)
    (collapsed,) = rig.of("array_collapsed")
    assert collapsed["voltage_v"] < 1.0
    assert collapsed["current_a"] == pytest.approx(0.4, abs=0.01)
    assert (collapsed["light"], collapsed["least_v"]) == (0.2, 8.0)


def test_a_unit_that_gets_no_voltage_at_the_start_is_switched_off_again(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.sun.light = 0.2
        with pytest.raises(SafetyError, match="the unit behind the array has 0"):
            await rig.begin()
        assert not rig.channel.output_on
        assert rig.journal.open_intents() == ()

    fly(tmp_path, body, load=RecordedLoad(((0.0, 12.0),), undervoltage_lockout_v=0.0))


@pytest.mark.parametrize("model", MODELS)
def test_a_trip_in_the_light_is_a_trip(tmp_path: Path, model: str) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.virtual.instrument.trip(1, "ovp")
        await rig.until(lambda: rig.loop.state == "tripped")
        assert not rig.deadman.armed

    rig = fly(tmp_path, body, model)
    assert rig.of("tripped")[0]["protections"] == ["ovp"]


def test_an_output_that_somebody_switches_on_in_the_dark_goes_off_for_good(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.sun.light = 0.0
        await rig.until(lambda: rig.of("array_dark"))
        rig.channel.switch(True, rig.virtual.instrument.clock())
        assert isinstance(error := await rig.ended(), SafetyError)
        assert "in the dark, and the output is on" in str(error)

    assert fly(tmp_path, body).of("safe_state")[0]["verified"] is True


def test_an_instrument_that_leaves_the_mode_ends_the_flight_in_the_safe_state(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.virtual.instrument.execute("CURR:MODE FIX,(@1)")
        rig.sun.light = 0.5
        assert isinstance(error := await rig.ended(), SafetyError)
        assert "plays an array no more" in str(error)

    assert fly(tmp_path, body).of("safe_state")[0]["verified"] is True


def test_a_change_that_was_not_answered_is_made_again(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.virtual.faults.append(Fault("drop", r"CURR:SAS:ISC\?", 1))
        rig.sun.light = 0.5
        await rig.until(lambda: rig.of("array_light"))
        await rig.until(lambda: rig.channel.curve and rig.channel.curve.short_circuit_a == pytest.approx(1.0))
        assert rig.loop.state == "on"

    rig = fly(tmp_path, body)
    assert len(rig.of("setpoint_lost")) == 1
    assert rig.of("tripped") == []


def test_an_output_that_goes_off_while_a_change_of_light_is_unanswered_is_a_trip(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.virtual.faults.append(Fault("drop", r"CURR:SAS:ISC\?", 1000))
        rig.sun.light = 0.5
        await rig.until(lambda: rig.of("setpoint_lost"))
        rig.channel.switch(False, rig.virtual.instrument.clock())  # at the panel
        await rig.until(lambda: rig.loop.state == "tripped")
        assert not rig.channel.output_on

    assert fly(tmp_path, body).of("array_lit") == []


@pytest.mark.parametrize("on", [True, False])
def test_a_switching_that_was_not_answered_is_made_again_and_no_trip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    async def body(rig: Rig) -> None:
        rig.sun.light = 0.0 if on else 1.0
        await rig.begin()
        output = rig.supply.output

        async def unanswered(ch: int, wanted: bool) -> Any:
            monkeypatch.setattr(rig.supply, "output", output)
            rig.channel.switch(wanted != on, rig.virtual.instrument.clock())  # it did not arrive
            raise InstrumentError("no answer")

        monkeypatch.setattr(rig.supply, "output", unanswered)
        rig.sun.light = 1.0 if on else 0.0
        await rig.until(lambda: rig.of("array_lit" if on else "array_dark"))
        assert rig.channel.output_on == on

    rig = fly(tmp_path, body)
    assert len(rig.of("setpoint_lost")) == 1
    assert rig.of("tripped") == []


def test_a_simulator_that_somebody_drives_by_hand_is_left_as_it_is(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await solar.play_array(rig.supply, 1, Curve(20.0, 1.0, 17.0, 0.9))
        rig.channel.switch(True, rig.virtual.instrument.clock())
        before = rig.channel.curve
        with pytest.raises(SafetyError, match=r"vb1: channel 1 of tcp://.* is on, and no flight switched it on"):
            await rig.prepare()
        await rig.source.leave()  # as a flight that failed to begin ends
        assert (rig.channel.output_on, rig.channel.curve) == (True, before)
        rig.channel.switch(False, rig.virtual.instrument.clock())

    fly(tmp_path, body)


def test_what_belongs_to_a_bus_or_leaves_the_input_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(UsageError, match="only a flight's mission says which curve"):
            await rig.loop.request_on()
        for curve, why in (
            (Curve(24.5, 2.0, 18.0, 1.8), "Voc 24.5 V and Isc 2 A at its brightest, outside the input's 12 to 24 V"),
            (Curve(11.5, 2.0, 9.0, 1.8), "outside the input's 12 to 24 V"),
            (Curve(22.0, 2.6, 18.0, 2.4), "and 2.5 A"),
        ):
            with pytest.raises(UsageError, match=why):
                await rig.prepare(curve)
        assert not await plays_array(rig.supply, 1)
        with pytest.raises(UsageError, match="no mission says which"):
            rig.loop.attach(rig.flight())
        await rig.prepare()
        slow = replace(rig.flight(), bounds=replace(rig.flight().bounds, period_s=1e-4))
        with pytest.raises(UsageError, match="the supply allows a loop of"):
            rig.loop.attach(slow)
        assert rig.loop.flight is None
        await rig.begin()
        with pytest.raises(UsageError, match="a dip there does not reach the board"):
            await rig.loop.request_dip(2.0, 0.1)
        assert rig.channel.output_on

    fly(tmp_path, body)


def test_a_table_is_loaded_once_and_then_only_the_light_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (solar, ea):
        monkeypatch.setattr(module, "TABLE_POINTS" if module is solar else "PV_POINTS", 14)
    monkeypatch.setattr(solar, "TABLE_PAUSE_S", 0.05)
    monkeypatch.setattr(ea, "PV_LOADING_S", 0.02)
    said: list[str] = []

    async def body(rig: Rig) -> None:
        execute = rig.virtual.instrument.execute

        def heard(message: str) -> str | None:
            said.append(message)
            return execute(message)

        monkeypatch.setattr(rig.virtual.instrument, "execute", heard)
        await rig.begin()
        assert rig.channel.output_on
        rig.sun.light = 0.0
        await rig.until(lambda: not rig.channel.output_on)
        rig.sun.light = 0.5
        await rig.until(lambda: rig.channel.output_on)
        await rig.loop.request_off()
        assert await plays_array(rig.supply, 1)
        await rig.source.leave()
        assert not await plays_array(rig.supply, 1)

    fly(tmp_path, body, "ea-pv", load=RecordedLoad(((0.0, 3.0),), 8.0))
    assert sum("XY:DATA" in line for line in said) == 14
    assert [line for line in said if line.startswith("IRR ")] == ["IRR 100", "IRR 100", "IRR 100", "IRR 50"]


@pytest.mark.parametrize("ends", ["the lease", "the daemon"])
def test_others_get_in_while_a_table_is_loaded_and_its_end_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    for module, name, value in ((solar, "TABLE_TURN", 2), (solar, "TABLE_PAUSE_S", 0.0), (ea, "EXECUTION_S", 0.0)):
        monkeypatch.setattr(module, name, value)
    said: list[str] = []
    over: list[str] = []

    def go_on() -> None:
        if over:
            raise BenchError("the lease is over")

    async def body(rig: Rig) -> None:
        monkeypatch.setattr(rig.supply, "_gap_s", 0.001)
        execute = rig.virtual.instrument.execute
        monkeypatch.setattr(rig.virtual.instrument, "execute", lambda message: said.append(message) or execute(message))
        loading = asyncio.create_task(rig.source.prepare(ArrayPlan(CURVE, rig.sun), 0.0, INPUT, "vb1", go_on))
        await rig.until(lambda: any("XY:DATA" in line for line in said))
        before = len(rig.samples)
        await rig.until(lambda: len(rig.samples) > before + 1)  # the power loop goes on
        assert not loading.done()
        if ends == "the lease":
            over.append(ends)
            with pytest.raises(BenchError, match="the lease is over"):
                await loading
            await rig.source.leave()
            assert not await plays_array(rig.supply, 1)
        else:
            await rig.supply.close()
            with pytest.raises(UsageError, match="was closed"):
                await loading

    fly(tmp_path, body, "ea-pv")
    assert 2 <= sum("XY:DATA" in line for line in said) < 4096
    assert not any("XY:SUBM" in line for line in said)


def test_what_an_array_left_behind_is_not_the_next_boards(tmp_path: Path) -> None:
    """As after the death of a daemon: the output is off, the mode and the curve are still there."""

    async def steps() -> None:
        async with VirtualSupply("keysight-mp4300", loads={1: RecordedLoad(((0.0, 6.0),))}) as virtual:
            address = f"tcp://127.0.0.1:{virtual.port}"
            supply = ScpiSupply("keysight-mp4300", address, timeout_s=0.5)
            await solar.play_array(supply, 1, CURVE)
            loop = PowerLoop(
                "vb1",
                supply,
                1,
                INPUT,
                IntentJournal(tmp_path / "intent.jsonl"),
                Intent("vb1", address, "keysight-mp4300", 1, 0.6),
                FakeDeadman(),
                Setpoint(15.0, 2.0),
                on_sample=lambda sample: None,
                on_event=lambda kind, data: None,
                tuning=FAST,
                before_on=lambda: leave_array(supply, 1),
            )
            task = asyncio.create_task(loop.run())
            await asyncio.sleep(0)  # a loop takes requests once its task has begun
            on = await loop.request_on()
            assert on.reading.voltage_v == pytest.approx(15.0, abs=0.3)
            assert virtual.instrument.channels[1].curve is None
            task.cancel()
            await asyncio.wait((task,))
            await supply.close()

    timelapse.run(steps())


def test_the_least_light_is_what_the_instrument_can_tell_from_none(tmp_path: Path) -> None:
    """Chroma counts currents in 10 mA: below 10 % of this curve Imp would read back as Isc."""

    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.sun.light = 0.1
        await rig.until(lambda: rig.of("array_light"))
        rig.sun.light = 0.09
        await rig.until(lambda: rig.of("array_dark"))
        assert not rig.channel.output_on

    rig = fly(tmp_path, body, "chroma-62000h-s", load=RecordedLoad(((0.0, 1.0),), 8.0))
    assert rig.of("array_light")[-1]["light"] == 0.1


def test_a_board_behind_an_array_is_not_in_a_model(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        with pytest.raises((UsageError, BenchError), match="no model of it"):
            async with rig.loop.advanced_model(1e4, 5.0, 10.0):
                pass

    fly(tmp_path, body)
