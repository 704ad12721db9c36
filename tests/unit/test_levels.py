"""Capability levels, the supply's watchdog, outlets of last resort and measured times, on virtual supplies."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import tty
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from plug import Plug

from hil.bench import safety
from hil.bench.deadman import CutResult, _Watchman
from hil.bench.levels import CutTimes, Layers, SupplyWatchdog, TimeToOff, capability_level, cut_outlet, outlet_answer
from hil.bench.safety import Envelope, Intent, IntentJournal
from hil.drivers.dialects import RIGOL_DP800
from hil.drivers.dialects.base import Watchdog
from hil.drivers.scpi import ScpiSupply
from hil.errors import SafetyError, UsageError
from hil.model import Setpoint
from hil.virtual.supply import Fault, RecordedLoad, VirtualSupply

DP800 = RIGOL_DP800.models[0][1]
ENVELOPE = Envelope(9, 19, 2.5, 30, 20, 2.8, inrush_s=0.02, off_dwell_s=0.0, on_timeout_s=0.4)


@pytest.fixture
def plug() -> Iterator[Plug]:
    made = Plug()
    yield made
    made.close()


# ------------------------------------------------------------------------------------------------------------ levels
def test_each_level_says_what_a_better_one_lacks() -> None:
    watched = dataclasses.replace(DP800, watchdog=Watchdog(1, 3600))
    assert capability_level(watched).level == "A"
    assert "watchdog_s: 0" in capability_level(watched, watchdog_s=0).reasons[0]
    assert capability_level(watched, watchdog_s=0).level == "C"
    assert capability_level(DP800, outlet="confirms").level == "B"
    deaf = capability_level(DP800, outlet="deaf")
    assert (deaf.level, deaf.reasons[-1]) == ("B", "the relay behind it cannot tell whether it obeyed")
    plain = capability_level(DP800)
    assert (plain.level, len(plain.reasons)) == ("C", 2)
    bare = capability_level(dataclasses.replace(watched, ovp=False), deadman=False, outlet="confirms")
    assert bare.level == "D"
    assert bare.reasons == (
        "DP832 has no over-voltage protection over remote",
        "no dead-man process watches the daemon",
    )
    assert str(plain).startswith("C (dead-man, OVP and OCP); DP832")


def test_a_protection_that_stays_off_on_an_array_makes_no_level() -> None:
    """OCP at the current limit would trip at every point left of an array's maximum: consent is asked for instead."""
    at_limit = dataclasses.replace(DP800, ocp_follows_limit=True)
    assert capability_level(at_limit).level == "C"
    assert capability_level(DP800, array=True).level == "C"
    found = capability_level(at_limit, array=True, outlet="confirms")
    assert (found.level, len(found.reasons)) == ("D", 1)
    assert "stays off: it would trip wherever an array limits the current" in found.reasons[0]
    with pytest.raises(SafetyError, match="level D and this bench accepts C or better") as no:
        asyncio.run(Layers().level(at_limit, array=True))
    assert "accept_level: D" in no.value.hint
    assert asyncio.run(Layers(accept="D").level(at_limit, array=True)).level == "D"


def test_losing_an_outlet_lowers_the_level_and_needs_consent(plug: Plug) -> None:
    layers = Layers(plug.address, accept="B")
    assert asyncio.run(layers.level(DP800)).level == "B"
    plug.close()
    with pytest.raises(
        SafetyError, match=r"level C and this bench accepts B or better: .*its outlet is no layer"
    ) as no:
        asyncio.run(layers.level(DP800))
    assert "accept_level: C" in no.value.hint
    assert asyncio.run(dataclasses.replace(layers, accept="C").level(DP800)).level == "C"


# ---------------------------------------------------------------------------------------------------------- watchdog
class Rig:
    """A virtual N6700, a driver on it, its watchdog and a journal."""

    def __init__(self, virtual: VirtualSupply, directory: Path, delay_s: float = 1.0) -> None:
        self.virtual = virtual
        self.address = f"tcp://127.0.0.1:{virtual.port}"
        self.supply = ScpiSupply("keysight-n6700", self.address, timeout_s=2.0)
        self.watchdog = SupplyWatchdog(self.supply, delay_s)
        self.journal = IntentJournal(directory / "intent.jsonl")
        self.steps: list[str] = []

    def intent(self, channel: int) -> Intent:
        return Intent(f"b{channel}", self.address, "keysight-n6700", channel, 0.6)

    async def on(self, channel: int) -> safety.PoweredOn:
        return await safety.power_on(
            self.supply, channel, ENVELOPE, Setpoint(15.0, 2.0), self.journal, self.intent(channel),
            layers=Layers(watchdog=self.watchdog, accept="A"), on_step=self.steps.append,
        )  # fmt: skip

    async def off(self, channel: int) -> None:
        await safety.power_off(
            self.supply, channel, ENVELOPE, self.journal, self.intent(channel), layers=Layers(watchdog=self.watchdog)
        )

    @property
    def armed(self) -> bool:
        return self.virtual.instrument.execute("OUTP:PROT:WDOG?") == "1"


def n6700(directory: Path, body: Callable[[Rig], Awaitable[None]], delay_s: float = 1.0) -> None:
    async def steps() -> None:
        loads = {1: RecordedLoad(((0.0, 6.0),)), 2: RecordedLoad(((0.0, 6.0),))}
        async with VirtualSupply("keysight-n6700", loads=loads) as virtual:
            rig = Rig(virtual, directory, delay_s)
            await body(rig)
            await rig.supply.close()

    asyncio.run(steps())


def test_the_watchdog_is_armed_before_output_on_and_leaves_with_the_last_output(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        assert not rig.armed
        done = await rig.on(1)
        assert done.level.level == "A"
        assert rig.steps[-3:] == ["watchdog", "on", "settled"]
        await rig.on(2)
        await rig.off(1)
        assert rig.armed
        await rig.off(2)
        assert not rig.armed

    n6700(tmp_path, body)


def test_a_watchdog_that_does_not_arm_keeps_the_output_off(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.virtual.faults.append(Fault("ignore", "WDOG (ON|1)", -1))
        with pytest.raises(SafetyError, match="reads back not armed"):
            await rig.on(1)
        assert not rig.virtual.instrument.channels[1].output_on
        assert rig.journal.open_intents() == ()
        assert "on" not in rig.steps

    n6700(tmp_path, body)


def test_it_cuts_when_nobody_talks_is_armed_again_after_reconnecting_and_fed_by_anybody(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        channel = rig.virtual.instrument.channels[1]
        await rig.on(1)
        rig.virtual.instrument.execute("OUTP:PROT:WDOG OFF")  # as a power glitch of its interface would
        rig.virtual.drop_connections()
        await asyncio.sleep(0.05)
        await rig.supply.measure(1)
        assert rig.armed
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # a dashboard that polls keeps a board on that its loop has forgotten
            began = time.monotonic()
            rig.virtual.instrument.execute("*IDN?")
            await asyncio.sleep(0.1)
        assert channel.output_on
        while channel.output_on:
            assert time.monotonic() - began < 15
            await asyncio.sleep(0.01)
        assert time.monotonic() - began > 0.95
        assert await rig.supply.tripped(1) == ("watchdog",)
        await rig.on(1)  # the start sequence clears the trip with the output off
        await rig.off(1)

    n6700(tmp_path, body)


def test_a_delay_that_the_instrument_cannot_have_is_refused(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(UsageError, match=r"watchdog delay 0\.5 s is outside 1 to 3600"):
            await rig.on(1)
        assert not rig.virtual.instrument.channels[1].output_on

    n6700(tmp_path, body, delay_s=0.5)


# ------------------------------------------------------------------------------------------------------------ outlet
def deaf_supply(directory: Path, outlet: str, body: Callable[[VirtualSupply, Intent, IntentJournal], Awaitable[None]]):
    """A supply whose output stays on whatever one says."""

    async def steps() -> None:
        async with VirtualSupply(loads={1: RecordedLoad(((0.0, 6.0),))}) as virtual:
            virtual.instrument.execute(":APPL CH1,12,1;:OUTP CH1,ON")
            virtual.faults.append(Fault("ignore", "OUTP CH1,OFF", -1))
            intent = Intent("b1", f"tcp://127.0.0.1:{virtual.port}", "rigol-dp800", 1, 0.6, outlet)
            journal = IntentJournal(directory / "intent.jsonl")
            journal.opened(intent)
            await body(virtual, intent, journal)

    asyncio.run(steps())


def test_an_output_that_does_not_go_off_is_cut_at_its_outlet_by_whoever_needs_it(tmp_path: Path, plug: Plug) -> None:
    async def body(virtual: VirtualSupply, intent: Intent, journal: IntentJournal) -> None:
        loop = asyncio.get_running_loop()
        plug.on_cut = lambda: loop.call_soon_threadsafe(virtual.instrument.power_cycle)
        supply = ScpiSupply("rigol-dp800", intent.address, timeout_s=2.0)
        with pytest.raises(SafetyError, match=r"not verified off: .*; outlet tasmota://\S+ says off"):
            await safety.power_off(supply, 1, ENVELOPE, journal, intent, timeout_s=0.1)
        await supply.close()
        assert (plug.on, journal.open_intents()) == (False, ())
        await asyncio.sleep(0.05)
        assert not virtual.instrument.channels[1].output_on

        plug.on = True
        virtual.instrument.execute(":APPL CH1,12,1;:OUTP CH1,ON")
        journal.opened(intent)
        (left,) = await asyncio.to_thread(safety.finish_leftovers, journal, deadline_s=0.2)
        assert (left.result.off, plug.on, journal.open_intents()) == (False, False, ())
        assert left.outlet.endswith("says off")

        plug.on = True
        virtual.instrument.execute(":APPL CH1,12,1;:OUTP CH1,ON")
        journal.opened(intent)
        watchman = object.__new__(_Watchman)
        watchman._journal = journal
        results: dict[tuple[str, str], CutResult] = {}
        began = time.monotonic()
        key = (intent.address, intent.dialect)
        await asyncio.to_thread(watchman._cut_instrument, key, [intent], began, results)
        assert 1.5 < time.monotonic() - began < 20  # the instrument had its chance first
        assert (results[key].off, plug.on, journal.open_intents()) == (True, False, ())

    deaf_supply(tmp_path, plug.address, body)


def test_an_outlet_that_does_not_obey_proves_nothing(tmp_path: Path, plug: Plug) -> None:
    async def body(virtual: VirtualSupply, intent: Intent, journal: IntentJournal) -> None:
        plug.broken = True
        supply = ScpiSupply("rigol-dp800", intent.address, timeout_s=2.0)
        with pytest.raises(SafetyError, match=r"; outlet tasmota://\S+ failed: outlet 1 of .* did not switch off"):
            await safety.power_off(supply, 1, ENVELOPE, journal, intent, timeout_s=0.1)
        assert journal.open_intents() == (intent,)
        with pytest.raises(SafetyError, match="a former run left outputs on"):
            await asyncio.to_thread(safety.finish_leftovers, journal, deadline_s=0.1)
        await supply.close()

    deaf_supply(tmp_path, plug.address, body)


def test_an_outlet_is_asked_without_an_exception(plug: Plug) -> None:
    assert (outlet_answer(plug.address).kind, outlet_answer(plug.address).on) == ("confirms", True)
    assert outlet_answer("lcus:///dev/nothing?relay=1").kind == "deaf"
    assert outlet_answer("").kind == ""
    assert not cut_outlet("lcus:///dev/nothing?relay=1").off
    plug.close()
    assert "cannot reach outlet" in outlet_answer(plug.address).trouble
    assert "failed" in cut_outlet(plug.address).said


def test_a_relay_that_cannot_say_whether_it_obeyed_proves_nothing() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    cut = cut_outlet(f"lcus://{os.ttyname(slave)}?relay=1")
    assert os.read(master, 16) == bytes.fromhex("a00100a1")
    assert not cut.off
    assert "cannot say" in cut.said
    os.close(master)
    os.close(slave)


# ------------------------------------------------------------------------------------------------------------- times
def test_measured_cuts_are_kept_the_newest_of_each_layer(tmp_path: Path) -> None:
    times = CutTimes(tmp_path / "time-to-off.json")
    assert times.said("b1") == "not measured: hil doctor --measure-off b1"
    for layer, seconds in (("command", 0.2), ("daemon killed", 0.5), ("command", 0.3)):
        times.write(TimeToOff("b1", layer, seconds, 1.0, "RIGOL"))
    times.write(TimeToOff("b2", "command", 9.0, 1.0, "RIGOL"))
    assert CutTimes(tmp_path / "time-to-off.json").said("b1") == "daemon killed 0.50 s; command 0.30 s"
    (tmp_path / "time-to-off.json").write_text("{")
    with pytest.raises(UsageError, match="remove it"):
        times.said("b1")
