"""Dips and latch-ups through a running power loop on virtual supplies: what was reached, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import timelapse
from test_powerloop import ENVELOPE, Rig, fly

from hil.bench import powerfaults
from hil.bench.powerfaults import DIP_MAX_S, DipFailed, LatchUpLimits, LatchUpWatch, check_dip
from hil.bench.safety import Envelope
from hil.client import faults as client
from hil.drivers.scpi import ScpiSupply
from hil.errors import BenchError, SafetyError, UsageError
from hil.model import Reading, Setpoint
from hil.virtual.supply import Channel, Fault, Load, RecordedLoad, VirtualSupply
from hil.virtual.supply.sequence import Sequence, Step

LOCKED = dataclasses.replace(ENVELOPE, undervoltage_lockout_v=8.5, brownout_min_v=2.0)
Body = Callable[[Rig], Awaitable[None]]


def powered(
    tmp_path: Path,
    body: Body,
    load: Load | None = None,
    envelope: Envelope = LOCKED,
    model: str = "rigol-dp800",
) -> None:
    async def steps(rig: Rig) -> None:
        await rig.loop.request_on()
        await body(rig)

    fly(tmp_path, steps, load, envelope, model=model)


async def reached(channel: Channel, volts: float) -> None:
    """Wait until a virtual channel is set to `volts`; fails after ten seconds."""
    end = time.monotonic() + 10.0
    while channel.voltage_set_v != volts:
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


# --------------------------------------------------------------------------------------------------------- brown-out
@pytest.mark.parametrize("duration_s", [0.01, 0.05, 0.3])
def test_a_dip_of_milliseconds_is_as_long_as_the_board_sees_it(tmp_path: Path, duration_s: float) -> None:
    """Never shorter; as good as not longer in the best of some, because a busy host is late for the way back."""
    load = RecordedLoad(((0.0, 6.0),))

    async def body(rig: Rig) -> None:
        seen = asyncio.create_task(watch(rig))
        for _ in range(20):
            done = await rig.loop.request_dip(4.0, duration_s)
            assert (done.low_v, done.asked_s, done.output_on, done.lockout) == (11.0, duration_s, True, False)
            assert duration_s <= done.reached_s
            assert done.command_s > 0
            assert (done.lowest_v, done.samples, done.latch_up_judged) == (None, 0, None)  # nothing was asked meanwhile
            assert rig.virtual.instrument.channels[1].voltage_set_v == 15.0
            assert rig.of("brown_out")[-1]["reached_s"] == done.reached_s
            assert rig.loop.state == "on"
            low_v = min(volts, default=15.0)
            if done.reached_s < duration_s + 0.03 and done.command_s < 0.05 and low_v < 11.61:
                break
        seen.cancel()
        assert done.reached_s < duration_s + 0.03
        assert done.command_s < 0.05
        assert low_v == pytest.approx(11.0, abs=0.6 if duration_s < 0.02 else 0.05)

    volts: list[float] = []

    async def watch(rig: Rig) -> None:
        while True:
            rig.virtual.instrument.tick()
            volts.append(rig.virtual.instrument.channels[1].terminal_v)
            await asyncio.sleep(0.001)

    powered(tmp_path, body, load)
    assert [on for _, on in load.edges] == [True, False]  # it never saw less than its lock-out


@pytest.mark.parametrize("duration_s", [0.01, 0.3])
def test_a_supply_with_a_list_plays_the_dip_itself(
    tmp_path: Path, duration_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen inside the instrument: as long as the dwell, however busy we are, and back in fixed mode."""
    load = RecordedLoad(((0.0, 6.0),))
    played: list[tuple[float, Step]] = []
    due = Sequence.due

    def seen(sequence: Sequence, now_s: float) -> Iterator[tuple[float, Step]]:
        for moment in due(sequence, now_s):
            played.append(moment)
            yield moment

    async def body(rig: Rig) -> None:
        monkeypatch.setattr(Sequence, "due", seen)
        box = rig.virtual.instrument
        done = await rig.loop.request_dip(4.0, duration_s)
        assert (done.by, done.reached_s, done.output_on, done.trips) == ("list", duration_s, True, ())
        assert (box.channels[1].voltage_set_v, box.execute("VOLT:MODE? (@1)")) == (15.0, "FIX")
        assert rig.of("brown_out")[0]["by"] == "list"
        assert rig.loop.state == "on"

    powered(tmp_path, body, load, model="keysight-n6700")
    assert [(step.voltage_v, step.current_a) for _, step in played] == [(11.0, None), (15.0, 2.0)]
    assert played[1][0] - played[0][0] == pytest.approx(duration_s, abs=1e-6)
    assert [on for _, on in load.edges] == [True, False]  # never below its lock-out, until it was switched off


def test_a_trip_during_a_list_is_told_and_the_output_is_switched_off(tmp_path: Path) -> None:
    """The list goes on behind the trip; nothing of it reaches the board."""
    load = RecordedLoad(((0.0, 6.0),))

    async def body(rig: Rig) -> None:
        rig.virtual.faults.append(Fault("trip", "INIT:TRAN"))  # every channel, over voltage
        done = await rig.loop.request_dip(4.0, 0.1)
        assert (done.by, done.output_on, done.trips) == ("list", False, ("ovp",))
        await rig.until(lambda: rig.loop.state == "tripped")
        assert rig.of("tripped")[0]["protections"] == ["ovp"]
        assert not rig.is_on
        assert rig.virtual.instrument.execute("OUTP? (@1)") == "0"  # a clear would bring nothing back

    powered(tmp_path, body, load, model="keysight-n6700")
    assert [on for _, on in load.edges] == [True, False]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("refuse", "LIST:VOLT 11"), "reads back"),
        (Fault("ignore", "LIST:TERM:LAST OFF"), None),  # it was off before: all is well
        (Fault("ignore", "LIST:DWEL 0.1"), "0.001 s instead of 0.1 s"),
        (Fault("refuse", "INIT:TRAN"), "-221 Settings conflict"),
        (Fault("drop", "INIT:TRAN"), "the old set point is in force again"),
        (Fault("drop", "ABOR:TRAN"), "the old set point is in force again"),
        (Fault("ignore", "VOLT:MODE FIX"), "stays in mode LIST"),
        (Fault("silent", "STAT:OPER:COND"), "the old set point is in force again"),
    ],
)
def test_a_list_that_fails_leaves_the_old_voltage_in_fixed_mode(tmp_path: Path, fault: Fault, says: str | None) -> None:
    async def body(rig: Rig) -> None:
        rig.virtual.faults.append(fault)
        if says is None:
            assert (await rig.loop.request_dip(4.0, 0.1)).by == "list"
        else:
            with pytest.raises(DipFailed, match=says):
                await rig.loop.request_dip(4.0, 0.1)
        assert fault.count == 0
        box = rig.virtual.instrument
        assert (box.channels[1].voltage_set_v, box.execute("VOLT:MODE? (@1)")) == (15.0, "FIX")
        assert 1 not in box.sequences
        await asyncio.sleep(0.05)
        assert rig.is_on
        assert not rig.task.done()

    powered(tmp_path, body, model="keysight-n6700")


def test_a_list_that_cannot_be_left_ends_in_the_safe_state(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.virtual.faults.append(Fault("ignore", "VOLT:MODE FIX", -1))
        with pytest.raises(SafetyError, match="stays in mode LIST"):
            await rig.loop.request_dip(4.0, 0.05)
        assert isinstance(await rig.ended(), SafetyError)
        assert not rig.is_on
        assert rig.of("safe_state")[0]["verified"] is True

    powered(tmp_path, body, model="keysight-n6700")


def test_a_list_ends_by_itself_when_its_owner_dies(tmp_path: Path) -> None:
    """What two writes cannot do: a daemon that is killed in the dip leaves no board on a low bus."""

    async def steps() -> None:
        async with VirtualSupply("keysight-n6700", loads={1: RecordedLoad(((0.0, 6.0),))}) as virtual:
            supply = ScpiSupply("keysight-n6700", f"tcp://127.0.0.1:{virtual.port}", timeout_s=2.0)
            await supply.program(1, Setpoint(12.0, 2.0))
            await supply.output(1, True)
            channel = virtual.instrument.channels[1]
            dip = asyncio.create_task(supply.dip({1: (9.0, 12.0)}, 0.3))
            await reached(channel, 9.0)
            dip.cancel()
            await asyncio.wait((dip,))
            assert channel.voltage_set_v == 9.0
            await reached(channel, 12.0)
            await supply.stop_list(1)  # who comes next finds it armed at worst
            assert virtual.instrument.execute("VOLT:MODE? (@1)") == "FIX"
            assert await supply.output_state(1)
            await supply.close()

    timelapse.run(steps())


def test_a_long_dip_is_metered_as_it_goes_and_restarts_the_board(tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 6.0),))
    cuts: list[str] = []
    reached_s: list[float] = []

    async def body(rig: Rig) -> None:
        rig.loop._on_cut = cuts.append
        before = len(rig.samples)
        done = await rig.loop.request_dip(9.0, 0.8)
        reached_s.append(done.reached_s)
        assert done.lowest_v == pytest.approx(6.0, abs=0.05)
        assert done.lockout
        assert len(rig.samples) - before >= 2  # some ten on an idle host; not only its end
        assert min(sample.voltage_v for sample in rig.samples[before:]) == done.lowest_v
        await asyncio.sleep(0.2)
        assert rig.loop.state == "on"

    powered(tmp_path, body, load)
    assert [on for _, on in load.edges] == [True, False, True, False]
    assert reached_s[0] >= 0.8
    assert load.edges[2][0] - load.edges[1][0] == pytest.approx(reached_s[0], abs=0.3)  # of its fall and its rise
    assert cuts[0] == "brown-out to 6 V"  # whoever knew the board before knows nothing of it now


def test_an_off_does_not_wait_for_the_end_of_a_long_dip(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        dip = asyncio.create_task(rig.loop.request_dip(4.0, 30.0))
        await asyncio.sleep(0.3)
        await asyncio.wait_for(rig.loop.request_off(), 10.0)
        assert not rig.is_on
        done = await dip
        assert 0.2 < done.reached_s < 10.0

    powered(tmp_path, body)


@pytest.mark.parametrize(
    ("depth_v", "duration_s", "says"),
    [
        (13.1, 0.1, r"ends at 1\.9 V, below the board's 2 V"),
        (0.0, 0.1, "depth above 0 V"),
        (math.nan, 0.1, "depth above 0 V"),
        (4.0, 0.009, r"lasts 0\.01 s to 60 s"),
        (4.0, DIP_MAX_S + 1, "lasts"),
        (4.0, math.nan, "lasts"),
    ],
)
def test_a_dip_outside_the_envelope_is_refused_and_the_board_stays_on(
    tmp_path: Path, depth_v: float, duration_s: float, says: str
) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(UsageError, match=says):
            await rig.loop.request_dip(depth_v, duration_s)
        await asyncio.sleep(0.05)
        assert rig.is_on
        assert not rig.task.done()

    powered(tmp_path, body)


def test_only_a_board_that_is_on_can_be_dipped(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(UsageError, match="vb1 is off"):
            await rig.loop.request_dip(4.0, 0.1)

    fly(tmp_path, body)


def test_a_dip_that_fails_half_way_ends_with_the_old_voltage(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.virtual.faults.append(Fault("drop", "SOUR1:VOLT.15", 1))  # the way back
        with pytest.raises(DipFailed, match="the old set point is in force again"):
            await rig.loop.request_dip(4.0, 0.05)
        assert rig.virtual.instrument.channels[1].voltage_set_v == 15.0
        assert rig.is_on
        assert not rig.task.done()

    powered(tmp_path, body)


def test_a_voltage_that_does_not_come_back_ends_in_the_safe_state(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.virtual.faults.append(Fault("ignore", "SOUR1:VOLT.15", -1))
        with pytest.raises(SafetyError, match="does not take 15 V again"):
            await rig.loop.request_dip(4.0, 0.05)
        assert isinstance(await rig.ended(), SafetyError)
        assert not rig.is_on
        assert rig.of("safe_state")[0]["verified"] is True

    powered(tmp_path, body)


def test_a_slow_supply_says_what_it_reached(tmp_path: Path) -> None:
    async def steps() -> None:
        async with VirtualSupply("siglent-spd3303x", loads={1: RecordedLoad(((0.0, 6.0),))}) as virtual:
            supply = ScpiSupply("siglent-spd3303x", f"tcp://127.0.0.1:{virtual.port}", timeout_s=2.0)
            await supply.program(1, Setpoint(12.0, 2.0))
            await supply.output(1, True)
            found = [(await supply.dip({1: (9.0, 12.0)}, 0.01))[1] for _ in range(3)]
            assert 0.02 <= min(done.lasted_s for done in found) < 0.08  # 20 ms lie between any two commands
            assert not any(done.by_list for done in found)
            assert (await supply.setpoint(1)).voltage_v == 12.0
            with pytest.raises(UsageError, match="nothing was sent"):
                await supply.dip({1: (-1.0, 12.0)}, 0.01)
            await supply.close()

    timelapse.run(steps())


def test_a_dip_has_bounds_without_a_supply() -> None:
    assert check_dip(LOCKED, Setpoint(15.0, 2.0), 13.0, 0.01) == 2.0
    assert check_dip(ENVELOPE, Setpoint(15.0, 2.0), 15.0, 1.0) == 0.0


def test_a_client_is_told_who_timed_the_dip() -> None:
    fields = (11.0, 0.01, 0.01, 0.002, None, True, False)
    assert (
        client.BrownOut(*fields, "list", [], 1.0, 1.01, 0, None).played
        == "by the instrument's list, 10 ms as read back"
    )
    assert client.BrownOut(*fields, "writes", [], 1.0, 1.01, 0, None).played == "by two writes, measured 10.0 ms"
    answer = {field.name for field in dataclasses.fields(powerfaults.BrownOut)}
    assert {field.name for field in dataclasses.fields(client.BrownOut)} - answer == {"others"}  # by name, over HTTP


# ---------------------------------------------------------------------------------------------------------- latch-up
def test_a_current_that_stays_too_high_cuts_and_says_the_energy(tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 6.0), (0.3, 24.0)))  # 0.4 A, then 1.6 A

    async def body(rig: Rig) -> None:
        done = await asyncio.wait_for(rig.loop.watch_latch_up(LatchUpLimits(1.0, 0.2)), 10)
        assert rig.loop.state == "off"
        assert not rig.is_on
        held_s = done.cut_s - done.exceeded_s
        assert 0.2 <= held_s < 5.0  # a tick or two longer on an idle host
        assert done.peak_a == pytest.approx(1.6, abs=0.02)
        assert done.energy_above_j == pytest.approx(0.6 * 15.0 * held_s, rel=0.1)
        assert done.verified_s > done.cut_s
        (event,) = rig.of("latch_up")
        assert event["energy_above_j"] == done.energy_above_j

    powered(tmp_path, body, load)


def test_a_short_peak_does_not_cut_and_an_emulated_current_does(tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 6.0), (0.2, 24.0), (0.3, 6.0)))

    async def body(rig: Rig) -> None:
        armed = rig.loop.watch_latch_up(LatchUpLimits(1.0, 0.25))
        with pytest.raises(UsageError, match="armed already"):
            rig.loop.watch_latch_up(LatchUpLimits(1.0, 0.25))
        await asyncio.sleep(0.7)
        assert rig.is_on
        armed.cancel()
        done = await asyncio.wait_for(rig.loop.watch_latch_up(LatchUpLimits(1.0, 0.1, added_a=0.8)), 10)
        assert done.added_a == 0.8
        assert done.peak_a == pytest.approx(1.2, abs=0.02)

    powered(tmp_path, body, load)


def test_a_latch_up_in_a_long_dip_cuts_in_the_dip(tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 6.0),))

    async def body(rig: Rig) -> None:
        armed = rig.loop.watch_latch_up(LatchUpLimits(1.0, 0.2))
        dip = asyncio.create_task(rig.loop.request_dip(4.0, 30.0))
        await rig.until(lambda: rig.samples[-1].voltage_v < 11.5)
        assert not armed.done()
        load.profile = ((0.0, 22.0),)  # 2 A at 11 V
        done = await asyncio.wait_for(armed, 3.0)
        assert not rig.is_on
        assert done.cut_s - done.exceeded_s >= 0.2
        assert done.peak_a == pytest.approx(2.0, abs=0.05)
        ended = await asyncio.wait_for(dip, 3.0)
        assert (ended.output_on, ended.trips, ended.latch_up_judged) == (False, (), True)
        assert ended.began_s < done.exceeded_s < done.cut_s < ended.ended_s  # from 11 V, not from the old voltage
        assert ended.samples >= 2
        assert [kind for kind, _ in rig.events if kind in ("latch_up", "brown_out")] == ["latch_up", "brown_out"]
        await rig.loop.request_on()
        assert rig.virtual.instrument.channels[1].voltage_set_v == 15.0

    powered(tmp_path, body, load)


def test_a_current_that_only_the_dip_makes_too_high_is_seen(tmp_path: Path) -> None:
    """A constant power is a higher current at a lower voltage: before and after the dip nothing is wrong."""

    async def body(rig: Rig) -> None:
        armed = rig.loop.watch_latch_up(LatchUpLimits(0.7, 0.2))  # 9 W: 0.6 A at 15 V, 0.9 A at 10 V
        done = await asyncio.wait_for(rig.loop.request_dip(5.0, 5.0), 4.0)
        assert armed.done()
        assert armed.result().peak_a == pytest.approx(0.9, abs=0.03)
        assert done.reached_s < 3.0

    powered(tmp_path, body, RecordedLoad(((0.0, 9.0),)))


@pytest.mark.parametrize(("duration_s", "judged"), [(0.3, False), (0.7, True)])
def test_a_dip_says_whether_the_latch_up_protection_saw_it(tmp_path: Path, duration_s: float, judged: bool) -> None:
    async def body(rig: Rig) -> None:
        armed = rig.loop.watch_latch_up(LatchUpLimits(2.0, 0.1))
        done = await rig.loop.request_dip(4.0, duration_s)
        assert (done.latch_up_judged, done.samples > 0) == (judged, judged)
        assert rig.of("brown_out")[0]["latch_up_judged"] is judged
        assert not armed.done()

    powered(tmp_path, body)


def test_a_latch_up_in_a_dip_whose_cut_fails_ends_in_the_safe_state(tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 6.0),))

    async def body(rig: Rig) -> None:
        rig.loop.watch_latch_up(LatchUpLimits(1.0, 0.1))
        dip = asyncio.create_task(rig.loop.request_dip(4.0, 30.0))
        await rig.until(lambda: rig.samples[-1].voltage_v < 11.5)
        rig.virtual.faults.append(Fault("ignore", "OUTP CH1,OFF", -1))
        load.profile = ((0.0, 22.0),)
        assert isinstance(await rig.ended(), SafetyError)
        with pytest.raises(SafetyError):
            await dip
        assert not isinstance(dip.exception(), DipFailed)
        # The supply answers all else: what is latched up must not get the old voltage back on top.
        assert rig.virtual.instrument.channels[1].voltage_set_v == 11.0
        assert rig.of("safe_state")

    powered(tmp_path, body, load)


@pytest.mark.parametrize(
    "limits",
    [
        LatchUpLimits(2.6, 0.1),
        LatchUpLimits(0.0, 0.1),
        LatchUpLimits(1.0, -0.1),
        LatchUpLimits(1.0, 0.1, math.inf),
        LatchUpLimits(math.nan, 0.1),
    ],
)
def test_a_protection_that_could_not_act_is_refused(limits: LatchUpLimits) -> None:
    with pytest.raises(UsageError):
        limits.check(ENVELOPE)


def test_a_power_cycle_begins_the_hold_anew(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        armed = rig.loop.watch_latch_up(LatchUpLimits(1.0, 60.0))
        assert rig.loop._latch_up._watch is not None
        before, _ = rig.loop._latch_up._watch
        await rig.until(lambda: before.exceeded_s is not None)
        await rig.loop.request_off()
        on = await rig.loop.request_on()
        assert rig.loop._latch_up._watch is not None
        after, _ = rig.loop._latch_up._watch
        await rig.until(lambda: after.exceeded_s is not None)
        assert after.exceeded_s is not None
        assert after.exceeded_s > on.on_s  # else the time off counts as too high a current, in the hold and in joules
        assert not armed.done()

    powered(tmp_path, body, RecordedLoad(((0.0, 24.0),)))


def test_the_energy_above_the_threshold_is_the_integral() -> None:
    watch = LatchUpWatch(LatchUpLimits(1.0, 1.0))
    currents = (0.5, 2.0, 3.0, 3.0)
    due = [watch.due(Reading(0.5 * n, 10.0, amps, 10.0 * amps, True)) for n, amps in enumerate(currents)]
    assert due == [False, False, False, True]
    done = watch.done(2.0, 2.1)
    assert (done.exceeded_s, done.peak_a) == (0.5, 3.0)
    assert done.energy_above_j == pytest.approx(0.5 * (10 + 20) * 0.5 + 20 * 0.5 + 20 * 0.5)
    assert issubclass(DipFailed, BenchError)
