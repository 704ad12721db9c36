"""A supply that misbehaves: what the driver says, no old answer taken for a new one, and off that still works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from hil.drivers.forced_off import ForcedOff, force_off
from hil.drivers.scpi import (
    InstrumentClosed,
    InstrumentError,
    InstrumentTimeout,
    ReadbackError,
    ReplyError,
    ScpiSupply,
)
from hil.errors import BenchError
from hil.model import Setpoint
from hil.virtual.supply import Fault, RecordedLoad, ResistiveLoad, VirtualSupply

TIMEOUT_S = 0.2


def with_supply(body: Callable[[VirtualSupply, ScpiSupply], Awaitable[None]]) -> None:
    """A virtual supply with a board on channel 1, on at 15 V, and a driver that knows it."""

    async def steps() -> None:
        async with VirtualSupply(loads={1: RecordedLoad(((0.0, 6.0),))}) as virtual:
            supply = ScpiSupply("rigol-dp800", f"tcp://127.0.0.1:{virtual.port}", timeout_s=TIMEOUT_S)
            await supply.program(1, Setpoint(15.0, 2.0))
            await supply.output(1, True)
            try:
                await body(virtual, supply)
            finally:
                await supply.close()

    asyncio.run(steps())


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("silent", "MEAS"), InstrumentTimeout),
        (Fault("late", "MEAS", delay_s=2 * TIMEOUT_S), InstrumentTimeout),
        (Fault("garbage", "MEAS"), ReplyError),
        (Fault("garbage", "MEAS", text="15.00,0.400"), ReplyError),
        (Fault("garbage", "MEAS", text="x" * 10_000), ReplyError),
        (Fault("garbage", "OUTP. CH1", text="15.00,0.400,6.00"), ReplyError),
        (Fault("drop", "MEAS"), InstrumentClosed),
        (Fault("half_open", "MEAS"), InstrumentTimeout),
    ],
    ids=["silent", "late", "garbage", "truncated", "endless", "swapped", "dropped", "half-open"],
)
def test_each_fault_has_its_error_in_time_and_the_next_call_recovers(
    fault: Fault, error: type[InstrumentError]
) -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        virtual.faults.append(fault)
        start = time.monotonic()
        with pytest.raises(error) as caught:
            await supply.measure(1)
        assert time.monotonic() - start < TIMEOUT_S + 5
        assert type(caught.value) is error
        reading = await supply.measure(1)
        assert reading.output_on
        assert supply.recovery is not None
        assert (supply.recovery.generation, supply.recovery.changed) == (1, ())

    with_supply(body)


def test_a_late_answer_is_never_taken_for_the_next_one() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        await supply.program(2, Setpoint(3.0, 1.0))
        late = 0
        for delay in (1.05, 1.05, 1.05, 1.05, 2.0):
            virtual.faults.append(Fault("late", "SOUR1:VOLT.", delay_s=TIMEOUT_S * delay))
            try:  # on a busy host an answer that is hardly late is there when the time-out would be noticed
                assert await supply.setpoint(1) == Setpoint(15.0, 2.0)
            except InstrumentTimeout:
                late += 1
            assert await supply.setpoint(2) == Setpoint(3.0, 1.0)
        assert late > 0

    with_supply(body)


def test_an_idle_connection_that_was_dropped_is_reopened_without_an_error() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        virtual.drop_connections()
        await asyncio.sleep(0.05)  # the reset must arrive while nobody talks
        assert (await supply.measure(1)).output_on
        assert supply.recovery is not None

    with_supply(body)


def test_an_output_that_changed_behind_our_back_is_found_on_reopening() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        virtual.instrument.execute(":OUTP CH1,OFF;:OUTP CH3,ON")
        virtual.drop_connections()
        await asyncio.sleep(0.05)
        await supply.measure(2)
        assert supply.recovery is not None
        assert supply.recovery.changed == (1, 3)

    with_supply(body)


def test_a_supply_that_is_gone_is_said_with_its_address() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        await virtual.stop()
        with pytest.raises(InstrumentClosed, match=r"tcp://127\.0\.0\.1:\d+"):
            await supply.measure(1)
        with pytest.raises(InstrumentClosed, match=r"cannot connect to tcp://127\.0\.0\.1:\d+: ") as caught:
            await supply.measure(1)
        assert "instrument is on" in caught.value.hint

    with_supply(body)


def test_a_refused_or_ignored_set_point_is_not_done() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        virtual.faults.append(Fault("refuse", "SOUR1:VOLT 12"))
        with pytest.raises(ReadbackError, match="12 V but reads back 15 V; it says: -221 Settings conflict"):
            await supply.program(1, Setpoint(12.0, 2.0))
        virtual.faults.append(Fault("ignore", "SOUR1:CURR 1"))
        with pytest.raises(ReadbackError, match="current limit was set to 1 A but reads back 2 A"):
            await supply.program(1, Setpoint(12.0, 1.0))
        assert supply.recovery is None  # the dialogue was in step all the time

    with_supply(body)


def test_many_callers_share_one_dialogue() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        for ch, volts in ((1, 15.0), (2, 7.0), (3, 3.3)):
            await supply.program(ch, Setpoint(volts, 1.0))
        answers = await asyncio.gather(*(supply.setpoint(1 + index % 3) for index in range(60)))
        assert [answer.voltage_v for answer in answers] == [15.0, 7.0, 3.3] * 20
        assert supply.recovery is None

    with_supply(body)


def test_an_overflowing_error_queue_is_drained_and_ends() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        for _ in range(40):
            virtual.instrument.execute(":NONSENSE")
        entries = await supply.errors()
        assert entries[-1].code == -350
        assert await supply.errors() == ()

    with_supply(body)


# ---------------------------------------------------------------------------------------------------------- force_off
def forced(virtual: VirtualSupply, deadline_s: float = 10.0) -> Awaitable[ForcedOff]:
    address = f"tcp://127.0.0.1:{virtual.port}"
    return asyncio.to_thread(force_off, address, "rigol-dp800", (1, 2), 0.6, deadline_s, attempt_s=0.2)


@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault("drop", ".", 3),
        Fault("silent", r"\?", 1),
        Fault("half_open", r"OUTP\? CH1", 1),
        Fault("garbage", "MEAS", 1),
        Fault("ignore", "OUTP CH1,OFF", 2),
        Fault("refuse", "OUTP CH1,OFF", 1),
    ],
    ids=["none", "dropped", "silent", "half-open", "garbage", "ignored", "refused"],
)
def test_forced_off_gets_through_every_passing_fault(fault: Fault | None) -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        if fault is not None:
            virtual.faults.append(fault)
        result = await forced(virtual)
        assert result.off, result.trouble
        assert not virtual.instrument.channels[1].output_on
        assert all(volts is not None and volts < 0.6 for volts in result.voltages_v.values())
        assert result.elapsed_s < 8

    with_supply(body)


def test_forced_off_that_fails_says_why_and_keeps_its_deadline() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        virtual.faults.append(Fault("ignore", "OUTP CH1,OFF", -1))
        result = await forced(virtual, deadline_s=0.4)
        assert not result.off
        assert "15" in result.trouble
        assert result.elapsed_s < 5
        await virtual.stop()
        result = await forced(virtual, deadline_s=0.2)
        assert not result.off
        assert "refused" in result.trouble

    with_supply(body)


def test_forced_off_does_not_take_a_short_for_off() -> None:
    async def body(virtual: VirtualSupply, supply: ScpiSupply) -> None:
        virtual.instrument.channels[1].load = ResistiveLoad(0.01)  # in CC: on, and next to no volts
        virtual.faults.append(Fault("ignore", "OUTP CH1,OFF", -1))
        result = await forced(virtual, deadline_s=0.4)
        assert virtual.instrument.channels[1].output_on
        assert not result.off

    with_supply(body)


def test_errors_of_a_supply_are_the_benchs_never_the_boards() -> None:
    assert all(
        issubclass(kind, BenchError) for kind in (InstrumentTimeout, InstrumentClosed, ReplyError, ReadbackError)
    )
