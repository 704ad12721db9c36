"""The SCPI codec and the dialogue of the driver, word for word, against a scripted line."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

import pytest

from hil.drivers import codec, scpi, transport
from hil.drivers.codec import LINE, ErrorEntry, Frame, Inbox
from hil.drivers.dialects import dialect, number
from hil.drivers.scpi import (
    InstrumentClosed,
    InstrumentError,
    InstrumentRefused,
    InstrumentTimeout,
    ReadbackError,
    ReplyError,
    ScpiSupply,
)
from hil.errors import BenchError, SafetyError, UsageError
from hil.model import Setpoint

IDN = "RIGOL TECHNOLOGIES,DP832,DP8C000001,00.01.16"
NO_ERROR = '0,"No error"'
Exchange = tuple[str, str | Exception | None]
OPEN: tuple[Exchange, ...] = (
    ("*CLS", None),
    ("*IDN?", IDN),
    (":OUTP? CH1", "OFF"),
    (":OUTP? CH2", "OFF"),
    (":OUTP? CH3", "OFF"),
)


class Script:
    """A transport that knows the whole dialogue in advance: (sent, reply) pairs; None is no reply."""

    def __init__(self, dialogue: Sequence[Exchange]) -> None:
        self.dialogue = list(dialogue)
        self.reply: str | Exception | None = None
        self.connects = 0
        self.surplus = False
        self.up = False

    async def connect(self, deadline_s: float) -> None:
        self.connects += 1
        self.up = True
        self.surplus = False

    def alive(self) -> bool:
        return self.up

    def write(self, data: bytes) -> None:
        assert data.endswith(b"\n")
        sent = data[:-1].decode()
        assert self.dialogue, f"nothing more was expected, got {sent!r}"
        expected, self.reply = self.dialogue.pop(0)
        assert sent == expected

    async def read(self, deadline_s: float, frame: Frame = LINE) -> str:
        reply, self.reply = self.reply, None
        if isinstance(reply, Exception):
            raise reply
        assert reply is not None, "the script has no reply here"
        return reply

    def unread(self) -> int:
        return int(self.surplus)

    def drop(self, count: int) -> None:
        raise AssertionError(f"{count} bytes dropped")

    def close(self) -> None:
        self.up = False


def dialogue(*exchanges: Exchange, opened: bool = True) -> tuple[ScpiSupply, Script]:
    script = Script((*OPEN, *exchanges) if opened else exchanges)
    return ScpiSupply("rigol-dp800", "tcp://192.0.2.1:5555", transport=script), script


def run(action: Callable[[ScpiSupply], Awaitable[object]], *exchanges: Exchange) -> object:
    """Open, do, and require that the script was used up to its last line."""
    supply, script = dialogue(*exchanges)

    async def steps() -> object:
        await supply.open()
        try:
            return await action(supply)
        finally:
            assert script.dialogue == []

    return asyncio.run(steps())


# ------------------------------------------------------------------------------------------------------------ codec
@pytest.mark.parametrize("reply", ['0,"No error"', '+0,"No error"', "0 No Error", "0  No Error", '0,"No Error"'])
def test_every_known_form_of_no_error_is_none(reply: str) -> None:
    assert codec.parse_error_entry(reply) is None


@pytest.mark.parametrize("reply", ["", "fine", "0", '0,"Nothing wrong"', "No error", '0,"No errors at all'])
def test_an_unknown_form_is_an_error_and_never_fine(reply: str) -> None:
    with pytest.raises(ReplyError):
        codec.parse_error_entry(reply)


def test_an_error_keeps_code_and_text() -> None:
    assert codec.parse_error_entry('-113,"Undefined header"') == ErrorEntry(-113, "Undefined header")


@pytest.mark.parametrize("reply", ["", "1.0,2.0", "abc", "nan", "9.9E37", "inf", "1.0V"])
def test_a_number_is_a_finite_number_or_an_error(reply: str) -> None:
    with pytest.raises(ReplyError):
        codec.parse_numbers(reply, 1)


def test_lines_come_out_whole_however_the_bytes_arrive() -> None:
    inbox, lines = Inbox(), []
    for byte in b"1.0\r\n2.0\n3":
        inbox.feed(bytes([byte]))
        lines += filter(None, [inbox.take(LINE)])
    assert lines == ["1.0", "2.0"]
    assert len(inbox) == 1


def test_a_line_without_end_is_refused() -> None:
    with pytest.raises(ReplyError, match="without an end"):
        Inbox(limit=10).feed(b"x" * 11)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:5555", "tcp://host", "tcp://host:x", "serial:///dev/ttyUSB0", "tcp://h:1/x"]
)
def test_an_address_says_tcp_host_port(address: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        transport.parse_address(address)


def test_ipv6_addresses_are_understood() -> None:
    assert transport.parse_address("tcp://[::1]:5555") == ("::1", 5555)


def test_numbers_on_the_wire_have_no_exponent() -> None:
    assert [number(value) for value in (1e-7, 0.001, 12.0, 12.340, -0.0)] == ["0", "0.001", "12", "12.34", "0"]


# --------------------------------------------------------------------------------------------------------- dialogue
def test_opening_clears_identifies_and_reads_every_output() -> None:
    supply, script = dialogue()
    asyncio.run(supply.open())
    assert script.dialogue == []
    assert (supply.identity.maker, supply.identity.model) == ("RIGOL TECHNOLOGIES", "DP832")
    assert supply.capabilities.channels[3].voltage_max_v == 5.3
    assert supply.known_outputs == {1: False, 2: False, 3: False}


def test_a_stranger_is_not_driven() -> None:
    supply, _ = dialogue(("*CLS", None), ("*IDN?", "ACME,PSU9000,1,1"), opened=False)
    with pytest.raises(BenchError, match="no model that dialect"):
        asyncio.run(supply.open())


def test_program_sets_the_limit_before_the_voltage_and_reads_both_back() -> None:
    run(
        lambda supply: supply.program(1, Setpoint(15.004, 2.5)),
        (":SOUR1:CURR 2.5", None),
        (":SOUR1:VOLT 15", None),
        (":SOUR1:VOLT?", "15.00"),
        (":SOUR1:CURR?", "2.500"),
    )


def test_a_setpoint_that_does_not_read_back_names_both_values_and_the_errors() -> None:
    with pytest.raises(ReadbackError, match=r"set to 15 V but reads back 12 V; it says: -222 Data out of range"):
        run(
            lambda supply: supply.program(1, Setpoint(15, 2.5)),
            (":SOUR1:CURR 2.5", None),
            (":SOUR1:VOLT 15", None),
            (":SOUR1:VOLT?", "12.00"),
            (":SOUR1:CURR?", "2.500"),
            (":SYST:ERR?", '-222,"Data out of range"'),
            (":SYST:ERR?", NO_ERROR),
        )


@pytest.mark.parametrize(
    "setpoint", [Setpoint(32.1, 1), Setpoint(-0.1, 1), Setpoint(5, 3.3), Setpoint(math.nan, 1), Setpoint(5, math.inf)]
)
def test_out_of_range_is_refused_before_anything_is_sent(setpoint: Setpoint) -> None:
    with pytest.raises(UsageError):
        run(lambda supply: supply.program(1, setpoint))


def test_an_unknown_channel_is_refused() -> None:
    with pytest.raises(UsageError, match="no channel 4"):
        run(lambda supply: supply.measure(4))


def test_protection_is_programmed_and_read_back_and_the_error_queue_asked() -> None:
    run(
        lambda supply: supply.program_protection(1, 20.0, 2.8),
        (":OUTP:OVP:VAL CH1,20", None),
        (":OUTP:OVP CH1,ON", None),
        (":OUTP:OVP:VAL? CH1", "20.00"),
        (":OUTP:OVP? CH1", "ON"),
        (":OUTP:OCP:VAL CH1,2.8", None),
        (":OUTP:OCP CH1,ON", None),
        (":OUTP:OCP:VAL? CH1", "2.800"),
        (":OUTP:OCP? CH1", "ON"),
        (":SYST:ERR?", NO_ERROR),
    )


def test_a_protection_out_of_range_sends_nothing_at_all() -> None:
    with pytest.raises(UsageError, match="ocp level"):
        run(lambda supply: supply.program_protection(1, 20.0, 9.0))


def test_queued_errors_are_raised_all_together() -> None:
    with pytest.raises(InstrumentRefused) as caught:
        run(
            lambda supply: supply.program_protection(1, 20.0, None),
            (":OUTP:OVP:VAL CH1,20", None),
            (":OUTP:OVP CH1,ON", None),
            (":OUTP:OVP:VAL? CH1", "20.00"),
            (":OUTP:OVP? CH1", "ON"),
            (":SYST:ERR?", '-221,"Settings conflict"'),
            (":SYST:ERR?", '-113,"Undefined header"'),
            (":SYST:ERR?", NO_ERROR),
        )
    assert [entry.code for entry in caught.value.entries] == [-221, -113]


def test_measure_reads_three_numbers_and_the_output() -> None:
    reading = run(lambda supply: supply.measure(2), (":MEAS:ALL? CH2", "15.00,0.333,5.00"), (":OUTP? CH2", "ON"))
    assert isinstance(reading, scpi.Reading)
    assert (reading.voltage_v, reading.current_a, reading.power_w, reading.output_on) == (15.0, 0.333, 5.0, True)


def test_an_output_that_stays_off_names_the_trip() -> None:
    with pytest.raises(ReadbackError, match=r"did not switch on \(ocp tripped\)"):
        run(
            lambda supply: supply.output(1, True),
            (":OUTP CH1,ON", None),
            (":OUTP? CH1", "OFF"),
            (":OUTP:OVP:QUES? CH1", "NO"),
            (":OUTP:OCP:QUES? CH1", "YES"),
        )


def test_a_trip_is_cleared_with_the_output_off_first() -> None:
    run(
        lambda supply: supply.clear_protection(1),
        (":OUTP CH1,OFF", None),
        (":OUTP? CH1", "OFF"),
        (":OUTP:OVP:CLEAR CH1", None),
        (":OUTP:OCP:CLEAR CH1", None),
        (":OUTP? CH1", "OFF"),
        (":OUTP:OVP:QUES? CH1", "NO"),
        (":OUTP:OCP:QUES? CH1", "NO"),
    )


def test_a_clear_that_re_energises_is_undone_and_said() -> None:
    with pytest.raises(SafetyError, match="switched it on"):
        run(
            lambda supply: supply.clear_protection(1),
            (":OUTP CH1,OFF", None),
            (":OUTP? CH1", "OFF"),
            (":OUTP:OVP:CLEAR CH1", None),
            (":OUTP:OCP:CLEAR CH1", None),
            (":OUTP? CH1", "ON"),
            (":OUTP CH1,OFF", None),
        )


def test_an_error_queue_without_end_is_bounded() -> None:
    with pytest.raises(InstrumentRefused, match="does not end"):
        run(lambda supply: supply.errors(), *[(":SYST:ERR?", '-350,"Queue overflow"')] * 32)


def test_reset_is_in_no_dialogue() -> None:
    assert not [text for text in dialect("rigol-dp800").commands.values() if "*RST" in text.text]


# -------------------------------------------------------------------------------------------- poisoned sessions
def fail_then(first: Exception, *after: Exchange) -> tuple[ScpiSupply, Script]:
    return dialogue((":OUTP? CH1", first), *after)


@pytest.mark.parametrize("failure", [InstrumentTimeout("late"), InstrumentClosed("gone"), ReplyError("junk")])
def test_after_a_failure_identity_and_outputs_are_read_before_anything_else(failure: InstrumentError) -> None:
    again: tuple[Exchange, ...] = (*OPEN[:2], (":OUTP? CH1", "ON"), *OPEN[3:])
    supply, script = fail_then(failure, *again, (":OUTP:MODE? CH1", "CV"))

    async def steps() -> None:
        await supply.open()
        with pytest.raises(type(failure)):
            await supply.output_state(1)
        assert await supply.regulation(1) == "CV"

    asyncio.run(steps())
    assert script.connects == 2
    assert script.dialogue == []
    assert supply.recovery is not None
    assert (supply.recovery.generation, supply.recovery.changed) == (1, (1,))


def test_another_instrument_at_the_same_address_is_not_driven() -> None:
    supply, _ = fail_then(InstrumentTimeout("late"), ("*CLS", None), ("*IDN?", "RIGOL TECHNOLOGIES,DP832,OTHER,1"))

    async def steps() -> None:
        await supply.open()
        with pytest.raises(InstrumentTimeout):
            await supply.output_state(1)
        with pytest.raises(SafetyError, match="another instrument answers"):
            await supply.output(1, True)

    asyncio.run(steps())


def test_bytes_that_nobody_asked_for_poison_the_session() -> None:
    supply, script = dialogue(*OPEN, (":OUTP? CH1", "OFF"))

    async def steps() -> None:
        await supply.open()
        script.surplus = True
        with pytest.raises(ReplyError, match="nobody asked"):
            await supply.output_state(1)
        assert await supply.output_state(1) is False

    asyncio.run(steps())
    assert script.connects == 2


def test_a_cancelled_exchange_poisons_too() -> None:
    supply, script = dialogue((":OUTP? CH1", None), *OPEN, (":OUTP? CH1", "OFF"))
    patient = asyncio.Event()

    async def never(deadline_s: float, frame: Frame = LINE) -> str:
        patient.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def steps() -> None:
        await supply.open()
        read = script.read
        script.read = never  # type: ignore[method-assign]
        task = asyncio.create_task(supply.output_state(1))
        await patient.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        script.read = read  # type: ignore[method-assign]
        assert await supply.output_state(1) is False

    asyncio.run(steps())
    assert script.connects == 2


def test_a_refusal_does_not_poison() -> None:
    supply, script = dialogue((":OUTP? CH1", "OFF"))

    async def steps() -> None:
        await supply.open()
        with pytest.raises(UsageError):
            await supply.program(1, Setpoint(99, 1))
        await supply.output_state(1)

    asyncio.run(steps())
    assert script.connects == 1


def test_a_closed_supply_says_so() -> None:
    supply, _ = dialogue()

    async def steps() -> None:
        await supply.open()
        await supply.close()
        await supply.measure(1)

    with pytest.raises(UsageError, match="was closed"):
        asyncio.run(steps())


def test_unverified_commands_are_listed_for_the_doctor() -> None:
    assert set(dialect("rigol-dp800").unverified()) == {"measure", "clear_ovp"}


def test_an_unknown_dialect_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="rigol-dp800"):
        dialect("rigol")
