"""Dips and latch-ups of a board on several channels: begun together, cut and started as one, what stays untouched."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timelapse
from test_flight_channels import AUX, CH1, CH2, ENVELOPE, Rig, run

from hil.bench.powerfaults import LatchUpLimits, NotTogether, Together
from hil.bench.powervalues import Tuning
from hil.drivers.scpi import ScpiSupply
from hil.errors import BenchError, UsageError
from hil.model import Setpoint
from hil.virtual.supply import Fault, RecordedLoad, VirtualSupply

BOTH: dict[str, Any] = {"aux": ENVELOPE, "aux_main": True}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of 30 ms, which the virtual supply allows."""
    times = partial(Tuning, period_min_s=0.03, filter_s=0.03, stale_s=0.5, breach_s=0.05, off_timeout_s=1.0)
    monkeypatch.setattr("hil.bench.powerloop.Tuning", times)


def allowed() -> None:
    """The lease holds."""


async def powered(rig: Rig) -> None:
    await rig.board.on(None, allowed)


@contextlib.asynccontextmanager
async def terminals(rig: Rig) -> AsyncIterator[list[tuple[float, float]]]:
    """Volts at both outputs, seen inside the instruments, every millisecond of the body."""
    seen: list[tuple[float, float]] = []

    async def watch() -> None:
        while True:
            for virtual in rig.virtuals:
                virtual.instrument.tick()
            seen.append((rig.output(CH1).terminal_v, rig.output(CH2).terminal_v))
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    yield seen
    watching.cancel()


# --------------------------------------------------------------------------------------------------------- brown-outs
@pytest.mark.parametrize("supplies", [1, 2])
@pytest.mark.parametrize("duration_s", [0.3, 0.8])
def test_every_channel_on_the_bus_dips_at_the_same_moment(tmp_path: Path, supplies: int, duration_s: float) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        async with terminals(rig) as seen:
            done = await rig.board.brown_out(4.0, duration_s, allowed)
        other = done["others"]["io"]
        assert list(done["others"]) == ["io"]
        assert any(one < 11.2 and two < 11.2 for one, two in seen), "never both low"
        assert max(done["began_s"], other["began_s"]) < min(done["ended_s"], other["ended_s"])
        for dip in (done, other):
            assert dip["ended_s"] - dip["began_s"] >= duration_s - 0.02
            assert (dip["low_v"], dip["output_on"]) == (11.0, True)
            assert (dip["lowest_v"] is not None) == (duration_s > 0.5)
        told = {event["input"]: event for event in rig.of("brown_out")}
        assert told["main"]["began_s"] == done["began_s"]
        assert told["io"]["began_s"] == other["began_s"]
        assert (rig.output(CH1).voltage_set_v, rig.output(CH2).voltage_set_v) == (15.0, 15.0)
        assert rig.are_on() == (True, True)

    run(tmp_path, body, supplies=supplies, **BOTH)


@pytest.mark.parametrize("aux_first", [False, True])
def test_a_channel_behind_a_converter_stays_where_it_is(tmp_path: Path, aux_first: bool) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        await rig.until(lambda: rig.output(CH2).terminal_v > 4.99)
        async with terminals(rig) as seen:
            done = await rig.board.brown_out(4.0, 0.1, allowed)
        assert min(one for one, _ in seen) < 11.2
        assert min(two for _, two in seen) > 4.9
        assert done["others"] == {}
        assert [event["input"] for event in rig.of("brown_out")] == ["main"]

    run(tmp_path, body, aux_first=aux_first)


@pytest.mark.parametrize("duration_s", [0.05, 0.8])
def test_a_dip_that_one_channel_may_not_do_is_done_by_none(tmp_path: Path, duration_s: float) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        async with terminals(rig) as seen:
            with pytest.raises(UsageError, match=r"ends at 11 V, below the board's 12 V"):
                await rig.board.brown_out(4.0, duration_s, allowed)
        assert min(min(pair) for pair in seen) > 14.5
        assert rig.of("brown_out") == []
        await asyncio.sleep(0.1)
        assert (rig.are_on(), rig.failures) == ((True, True), [])
        assert (await rig.board.brown_out(2.0, 0.05, allowed))["output_on"]  # both may be dipped again

    run(tmp_path, body, aux_main=True, aux=replace(ENVELOPE, brownout_min_v=12.0))


def test_a_channel_that_is_off_keeps_the_others_from_dipping(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        await rig.board._loops[1][0].request_off()
        with pytest.raises(UsageError, match="b1/1 is off"):
            await rig.board.brown_out(4.0, 0.1, allowed)
        assert rig.output(CH1).voltage_set_v == 15.0

    run(tmp_path, body, **BOTH)


def test_a_channel_that_nobody_joins_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hil.bench.powerfaults.READY_S", 0.1)

    async def body(rig: Rig) -> None:
        await powered(rig)
        with pytest.raises(NotTogether, match="could not begin"):
            await rig.board._loops[0][0].request_dip(4.0, 0.1, Together(2))
        assert rig.output(CH1).voltage_set_v == 15.0
        await asyncio.sleep(0.1)
        assert rig.are_on() == (True, True)

    run(tmp_path, body, **BOTH)


@pytest.mark.parametrize("main_lockout_v", [0.0, 10.0])
def test_a_dip_below_the_lock_outs_is_one_cut_of_the_board(tmp_path: Path, main_lockout_v: float) -> None:
    async def body(rig: Rig) -> None:
        main = rig.board.channels[0]
        rig.board.channels = (
            replace(main, envelope=replace(main.envelope, undervoltage_lockout_v=main_lockout_v)),
            rig.board.channels[1],
        )
        await powered(rig)
        for cuts in (1, 2):
            done = await rig.board.brown_out(6.0, 0.02, allowed)
            assert (done["lockout"], done["others"]["io"]["lockout"]) == (main_lockout_v > 0, True)
            assert (done["power_epoch"], rig.board.power_cuts) == (cuts, cuts)
            await rig.board.brown_out(2.0, 0.02, allowed)
            assert rig.board.power_cuts == cuts
        await rig.board.off("test")
        assert rig.board.power_cuts == 3

    run(tmp_path, body, aux_main=True, aux=replace(ENVELOPE, undervoltage_lockout_v=10.0))


@pytest.mark.parametrize("how", ["off", "trip", "breach"])
def test_a_long_dip_ends_on_all_channels_with_what_ends_it_on_one(tmp_path: Path, how: str) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        dip = asyncio.create_task(rig.board.brown_out(2.0, 30.0, allowed))
        await rig.until(lambda: {rig.output(CH1).voltage_set_v, rig.output(CH2).voltage_set_v} == {13.0})
        if how == "off":
            await asyncio.wait_for(rig.board.off("test"), 3.0)
        elif how == "trip":
            rig.virtuals[0].instrument.trip(2, "ocp")
        else:
            rig.loads[CH2].profile = ((0.0, 25.0),)
        await rig.until(lambda: rig.are_on() == (False, False), 4.0)
        await asyncio.wait((dip,), timeout=3.0)
        assert dip.done()
        if dip.exception() is None:
            assert dip.result()["reached_s"] < 10.0

    run(tmp_path, body, aux_main=True, aux=replace(ENVELOPE, power_max_w=20.0))


def test_a_dip_that_fails_on_one_channel_leaves_the_old_voltage_on_all(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        rig.virtuals[0].faults.append(Fault("drop", "SOUR2:VOLT.15", 1))  # the way back
        with pytest.raises(BenchError, match="the old set point is in force again"):
            await rig.board.brown_out(4.0, 0.05, allowed)
        assert (rig.output(CH1).voltage_set_v, rig.output(CH2).voltage_set_v) == (15.0, 15.0)
        await asyncio.sleep(0.1)
        assert (rig.are_on(), rig.failures) == ((True, True), [])

    run(tmp_path, body, **BOTH)


def test_two_lists_of_one_instrument_play_at_the_same_time() -> None:
    async def steps() -> None:
        loads = {n: RecordedLoad(((0.0, 6.0),), undervoltage_lockout_v=3.0) for n in (1, 2)}
        async with VirtualSupply("keysight-n6700", loads=loads) as virtual:
            supply = ScpiSupply("keysight-n6700", f"tcp://127.0.0.1:{virtual.port}", timeout_s=2.0)
            for channel in (1, 2):
                await supply.program(channel, Setpoint(12.0, 2.0))
                await supply.output(channel, True)
            one, two = (await supply.dip({1: (9.0, 12.0), 2: (8.0, 12.0)}, 0.3)).values()
            assert (one.by_list, two.by_list, one.lasted_s, two.lasted_s) == (True, True, 0.3, 0.3)
            assert 0 < two.began_s - one.began_s < 0.3
            outputs = virtual.instrument.channels
            assert [outputs[n].voltage_set_v for n in (1, 2)] == [12.0, 12.0]
            assert [virtual.instrument.execute(f"VOLT:MODE? (@{n})") for n in (1, 2)] == ["FIX", "FIX"]
            await supply.close()

    timelapse.run(steps())


# ---------------------------------------------------------------------------------------------------------- latch-ups
def switched(rig: Rig) -> list[tuple[int, bool]]:
    """(channel, on) in the order in which the loads saw it."""
    edges = [(time_s, index, on) for index, load in enumerate(rig.loads) for time_s, on in load.edges]
    return [(index, on) for _, index, on in sorted(edges)]


@pytest.mark.parametrize("latching", [CH1, CH2])
def test_a_latch_up_of_any_channel_cuts_the_board_and_starts_it_in_order(tmp_path: Path, latching: int) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        watts = 6.0 if latching == CH2 else 24.0  # 1.2 A at 5 V, 1.6 A at 15 V
        epoch = rig.board.power_epoch
        waiting = asyncio.create_task(rig.board.latch_up(LatchUpLimits(1.0, 0.1), 0.4, 8.0, allowed))
        await asyncio.sleep(0.2)
        assert rig.are_on() == (True, True)
        rig.loads[latching].profile = ((0.0, watts),)
        await rig.until(lambda: rig.are_on() == (False, False))
        rig.loads[latching].profile = ((0.0, 3.0),)
        done = await waiting
        assert done["input"] == ("main", "io")[latching]
        assert done["peak_a"] == pytest.approx(1.2 if latching == CH2 else 1.6, abs=0.05)
        assert rig.are_on() == (True, True)
        assert rig.board.power_epoch == epoch + 1
        first, second = latching, 1 - latching
        assert switched(rig) == [(CH1, True), (CH2, True), (first, False), (second, False), (CH1, True), (CH2, True)]
        last_off_s = max(load.edges[1][0] for load in rig.loads)
        assert rig.loads[CH1].edges[2][0] - last_off_s >= 0.4
        assert [event["input"] for event in rig.of("latch_up")] == [done["input"]]
        assert not any(loop._latch_up.armed for loop, _ in rig.board._loops)

    run(tmp_path, body)


def test_one_input_can_be_watched_alone_and_gets_the_emulated_current(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        rig.loads[CH1].profile = ((0.0, 24.0),)  # too much for the threshold, but nobody asks
        done = await rig.board.latch_up(LatchUpLimits(1.0, 0.0, added_a=0.9), 0.1, 5.0, allowed, "io")
        assert (done["input"], done["added_a"]) == ("io", 0.9)
        assert done["peak_a"] == pytest.approx(1.3, abs=0.05)  # 2 W at 5 V, and 0.9 A

    run(tmp_path, body)


def test_what_is_emulated_goes_to_the_leading_input_unless_told(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        done = await rig.board.latch_up(LatchUpLimits(1.0, 0.0, added_a=0.9), 0.1, 5.0, allowed)
        assert done["input"] == "main"

    run(tmp_path, body, aux_first=True)


@pytest.mark.parametrize(
    ("threshold_a", "of_input", "says"),
    [(2.2, None, r"2\.2 A is outside the 0 to 2 A of the board's input io"), (1.0, "usb", "no input 'usb'")],
)
def test_a_threshold_that_one_input_cannot_reach_is_refused_and_none_is_armed(
    tmp_path: Path, threshold_a: float, of_input: str | None, says: str
) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        with pytest.raises(UsageError, match=says):
            await rig.board.latch_up(LatchUpLimits(threshold_a, 0.0), 0.1, 5.0, allowed, of_input)
        assert not any(loop._latch_up.armed for loop, _ in rig.board._loops)
        with pytest.raises(BenchError, match=r"did not draw more than 2\.2 A"):
            await rig.board.latch_up(LatchUpLimits(2.2, 0.0), 0.1, 0.1, allowed, "main")
        assert rig.are_on() == (True, True)

    run(tmp_path, body, aux=replace(AUX, current_max_a=2.0))


def test_a_second_latch_up_is_refused_and_the_first_stays_armed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        first = asyncio.create_task(rig.board.latch_up(LatchUpLimits(1.0, 0.0), 0.1, 8.0, allowed, "io"))
        await asyncio.sleep(0.05)
        with pytest.raises(UsageError, match="armed already"):
            await rig.board.latch_up(LatchUpLimits(1.0, 0.0), 0.1, 8.0, allowed)
        rig.loads[CH2].profile = ((0.0, 6.0),)
        await rig.until(lambda: rig.of("latch_up"))
        rig.loads[CH2].profile = ((0.0, 2.0),)
        assert (await first)["input"] == "io"

    run(tmp_path, body)


@pytest.mark.parametrize("latching", [CH1, CH2])
def test_a_latch_up_in_a_long_dip_ends_the_dip_of_all_and_cuts_the_board(tmp_path: Path, latching: int) -> None:
    async def body(rig: Rig) -> None:
        await powered(rig)
        waiting = asyncio.create_task(rig.board.latch_up(LatchUpLimits(1.0, 0.1), 0.4, 8.0, allowed))
        dip = asyncio.create_task(rig.board.brown_out(3.0, 30.0, allowed))
        await rig.until(lambda: {rig.output(CH1).voltage_set_v, rig.output(CH2).voltage_set_v} == {12.0})
        rig.loads[latching].profile = ((0.0, 18.0),)  # 1.5 A
        await rig.until(lambda: rig.are_on() == (False, False))
        rig.loads[latching].profile = ((0.0, 3.0),)
        assert (await waiting)["input"] == ("main", "io")[latching]
        ended = await asyncio.wait_for(dip, 3.0)
        latched = (ended, ended["others"]["io"])[latching]
        assert (latched["output_on"], latched["latch_up_judged"]) == (False, True)
        assert rig.are_on() == (True, True)

    run(tmp_path, body, **BOTH)
