"""Every driver against the virtual supply of its maker: two readings of the same manuals must agree on the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timelapse

from hil.drivers.dialects import dialect
from hil.drivers.forced_off import force_off
from hil.drivers.scpi import InstrumentError, ReadbackError, ScpiSupply
from hil.drivers.solar import Curve, leave_array, play_array
from hil.model import Setpoint
from hil.virtual.supply import MODELS, Load, RecordedLoad, ResistiveLoad, VirtualSupply, ea

CURVE = Curve(voc_v=50.0, isc_a=4.0, vmp_v=42.0, imp_a=3.6)
NO_TRIP_QUERY = {"siglent-spd3303x", "korad-ka3005p", "bk-9130b", "itech-it6500", "chroma-62000p", "chroma-62000h-s"}


def run(
    name: str,
    load: Load,
    tmp_path: Path,
    body: Callable[[VirtualSupply, ScpiSupply], Awaitable[None]],
    gap: bool = True,
    in_time: Callable[[Coroutine[Any, Any, None]], None] = timelapse.run,
) -> None:
    """The driver on a TCP line, or on a serial port where the maker has no other.

    Some makers' supplies lose what comes too soon. Two commands that a host which stood still hands over at once are
    lost that way without the driver's fault, so what fails there is tried again.
    """

    async def steps() -> None:
        virtual = VirtualSupply(name, {1: load})
        if name.startswith("korad"):
            address = f"serial://{await virtual.start_serial(tmp_path / 'tty')}"
        else:
            await virtual.start()
            address = f"tcp://127.0.0.1:{virtual.port}"
        known = dialect(name) if gap else replace(dialect(name), min_gap_s=0.0)
        supply = ScpiSupply(known, address, timeout_s=2.0)
        try:
            await body(virtual, supply)
        finally:
            await supply.close()
            await virtual.stop()

    for left in (2, 1, 0):
        try:
            in_time(steps())
            break
        except (InstrumentError, ReadbackError):
            if not left or not dialect(name).min_gap_s:
                raise
            if isinstance(load, RecordedLoad):
                load.edges.clear()


@pytest.mark.parametrize("name", MODELS)
def test_the_driver_runs_a_board(name: str, tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 3.0),), undervoltage_lockout_v=3.0)

    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        channel = virtual.instrument.channels[1]
        await supply.program(1, Setpoint(5.0, 1.0))
        await supply.output(1, True)
        for _ in range(100):
            if (reading := await supply.measure(1)).voltage_v == 5.0:
                break
            await asyncio.sleep(0.01)
        assert reading.output_on
        assert reading.current_a == pytest.approx(0.6, abs=0.002)  # 5.00 V may still be 4.996 V
        assert (channel.voltage_set_v, channel.current_limit_a, load.powered) == (5.0, 1.0, True)
        assert await supply.regulation(1) in ("CV", "unknown")
        assert await supply.tripped(1) == ()
        await supply.output(1, False)
        assert not channel.output_on
        assert not load.powered
        assert await supply.errors() == ()
        assert supply.recovery is None  # the dialogue was in step all the time

    run(name, load, tmp_path, body)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("siglent-spd3303x", "korad-ka3005p")])
def test_the_driver_clears_a_trip_and_the_board_stays_off(name: str, tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 3.0),), undervoltage_lockout_v=3.0)

    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        channel = virtual.instrument.channels[1]
        await supply.program(1, Setpoint(5.0, 1.0))
        await supply.program_protection(1, 6.0, None if name == "bk-9130b" else 1.0)
        assert channel.ovp.level == 6.0
        assert channel.ovp.enabled
        await supply.output(1, True)
        await asyncio.sleep(0.05)
        assert load.powered
        virtual.instrument.trip(1, "ovp")
        assert not load.powered
        if name not in NO_TRIP_QUERY:
            assert await supply.tripped(1) == ("ovp",)
        edges = len(load.edges)
        await asyncio.sleep(0.3)  # a DP2000's clear switches on, at zero volts: but its capacitors must be empty
        await supply.clear_protection(1)
        assert not channel.output_on
        if "chroma" not in name:
            assert not channel.tripped
        await asyncio.sleep(0.05)
        assert len(load.edges) == edges  # not even for a moment
        await supply.program(1, Setpoint(5.0, 1.0))
        await supply.output(1, True)
        await asyncio.sleep(0.05)
        assert load.powered

    run(name, load, tmp_path, body)


def test_the_driver_arms_the_watchdog_and_tells_its_trip_from_the_reply_that_lies(tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 3.0),), undervoltage_lockout_v=3.0)

    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        await supply.program(1, Setpoint(5.0, 1.0))
        await supply.arm_watchdog(1.0)
        await supply.output(1, True)
        await asyncio.sleep(0.1)
        assert load.powered
        await asyncio.sleep(1.1)
        assert not load.powered
        assert virtual.instrument.execute("OUTP? (@1)") == "1"
        assert not (await supply.measure(1)).output_on
        assert await supply.tripped(1) == ("watchdog",)
        await supply.clear_protection(1)
        assert not virtual.instrument.channels[1].output_on

    run("keysight-n6700", load, tmp_path, body)


@pytest.mark.parametrize("name", MODELS)
def test_the_driver_dips_by_a_list_where_it_knows_one(name: str, tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 3.0),), undervoltage_lockout_v=3.0)

    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        channel = virtual.instrument.channels[1]
        await supply.program(1, Setpoint(5.0, 1.0))
        await supply.output(1, True)
        await asyncio.sleep(0.05)
        done = (await supply.dip({1: (4.0, 5.0)}, 0.01))[1]
        assert (done.by_list, done.output_on, done.trips) == ("keysight-n6700" in name or "e36300" in name, True, ())
        assert done.lasted_s == 0.01 if done.by_list else 0.01 <= done.lasted_s < 1.0
        assert (channel.voltage_set_v, channel.current_limit_a) == (5.0, 1.0)
        assert not virtual.instrument.sequences
        assert [on for _, on in load.edges] == [True]  # 4 V were enough for it
        assert await supply.errors() == ()

    run(name, load, tmp_path, body)


SOURCES = [name for name in MODELS if dialect(name).has("regulation") and not dialect(name).has("sas_mode")]


@pytest.mark.parametrize("name", SOURCES)
def test_the_driver_tells_constant_current_from_constant_voltage(name: str, tmp_path: Path) -> None:
    load = ResistiveLoad(10.0)

    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        await supply.program(1, Setpoint(5.0, 1.0))
        await supply.output(1, True)
        await asyncio.sleep(0.1)
        assert await supply.regulation(1) == "CV"
        await supply.program(1, Setpoint(5.0, 0.2))
        await asyncio.sleep(0.3)
        assert virtual.instrument.channels[1].mode == "CC"
        assert await supply.regulation(1) == "CC"

    run(name, load, tmp_path, body)


@pytest.mark.parametrize("kind", ["ovp", "ocp"])
def test_a_genesys_tells_its_two_trips_apart(kind: str, tmp_path: Path) -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        await supply.program(1, Setpoint(5.0, 1.0))
        await supply.output(1, True)
        virtual.instrument.trip(1, kind)
        assert await supply.tripped(1) == (kind,)

    run("tdk-genesys", RecordedLoad(((0.0, 3.0),), undervoltage_lockout_v=3.0), tmp_path, body)


@pytest.mark.parametrize("name", ["keysight-e4360", "keysight-mp4300", "chroma-62000h-s", "ea-pv"])
def test_the_driver_plays_an_array(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = ResistiveLoad(CURVE.vmp_v / CURVE.imp_a)

    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        channel = virtual.instrument.channels[1]
        await play_array(supply, 1, CURVE)
        await supply.output(1, True)
        for _ in range(300):
            # Both: the voltage still rises after it is near enough.
            near_v = channel.curve is not None and abs(channel.terminal_v - CURVE.vmp_v) < 0.1
            if near_v and abs(channel.current_a - CURVE.imp_a) < 0.01:
                break
            await asyncio.sleep(0.01)
        assert channel.terminal_v == pytest.approx(CURVE.vmp_v, abs=0.1)
        assert channel.current_a == pytest.approx(CURVE.imp_a, abs=0.01)
        await supply.output(1, False)
        await leave_array(supply, 1)
        assert channel.curve is None

    # the gaps that an EA asks for would make its table of 4096 points take a minute
    monkeypatch.setattr(ea, "EXECUTION_S", 0.0)
    run(name, load, tmp_path, body, gap=name != "ea-pv")


@pytest.mark.parametrize("name", MODELS)
def test_the_dead_man_gets_every_makers_output_off(name: str, tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 3.0),), undervoltage_lockout_v=3.0)

    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        await supply.program(1, Setpoint(5.0, 1.0))
        await supply.output(1, True)
        await asyncio.sleep(0.1)
        assert load.powered
        await supply.close()  # the daemon is dead: its connection is gone, its output is on
        result = await asyncio.to_thread(force_off, supply.address, name, (1,), 0.6, 5.0)
        assert result.off, result.trouble
        assert not virtual.instrument.channels[1].output_on
        assert virtual.instrument.channels[1].terminal_v < 0.6
        assert not load.powered

    run(name, load, tmp_path, body, in_time=asyncio.run)  # the dead-man's clock is a thread's
