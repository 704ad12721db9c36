"""The virtual supply: channel physics with a hand-wound clock, the command language, and independent clients."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hil.errors import BenchError, UsageError
from hil.virtual.supply import (
    DECAY_TAU_S,
    RETURN_DWELL_S,
    Instrument,
    Load,
    RecordedLoad,
    ResistiveLoad,
    VirtualSupply,
    supply_model,
)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Box:
    """An instrument, its clock and a short way to type."""

    def __init__(self, load: Load | None = None, channel: int = 1) -> None:
        self.clock = Clock()
        self.instrument = Instrument(supply_model("rigol-dp800"), {channel: load} if load else {}, self.clock)

    def type(self, *messages: str) -> str | None:
        answer = None
        for message in messages:
            answer = self.instrument.execute(message)
        return answer

    def wait(self, seconds: float) -> None:
        """Let time pass in ticks of 10 ms, as the server does."""
        end = self.clock.now + seconds
        while self.clock.now < end - 1e-9:
            self.clock.now = min(end, self.clock.now + 0.01)
            self.instrument.tick()

    def error(self) -> str:
        answer = self.type(":SYST:ERR?")
        assert answer is not None
        return answer


def board(box_clock: Clock | None = None, watts: float = 5.0) -> RecordedLoad:
    clock = box_clock or Clock()
    return RecordedLoad(((0.0, watts),), 8.5, clock)


# ---------------------------------------------------------------------------------------------------------- physics
def test_constant_power_board_draws_power_over_voltage() -> None:
    box = Box(board(watts=6.0))
    box.type(":APPL CH1,15,2.5", ":OUTP CH1,ON")
    box.wait(0.2)
    assert box.type(":MEAS:ALL? CH1") == "15.00,0.400,6.00"
    assert box.type(":OUTP:MODE? CH1") == "CV"


def test_resistor_goes_from_constant_voltage_to_constant_current() -> None:
    box = Box(ResistiveLoad(10.0))
    box.type(":APPL CH1,12,2", ":OUTP CH1,ON")
    box.wait(0.2)
    assert (box.type(":MEAS:ALL? CH1"), box.type(":OUTP:MODE? CH1")) == ("12.00,1.200,14.40", "CV")
    box.type(":SOUR1:CURR 0.5")
    box.wait(0.2)
    assert (box.type(":MEAS:ALL? CH1"), box.type(":OUTP:MODE? CH1")) == ("5.00,0.500,2.50", "CC")


def test_constant_power_beyond_the_limit_collapses_and_hiccups() -> None:
    load = board(watts=15.0)
    box = Box(load)
    box.type(":APPL CH1,15,2", ":OUTP CH1,ON")
    box.wait(0.2)
    assert load.powered
    before = len(load.edges)
    box.type(":SOUR1:CURR 0.3")  # 15 W at 15 V want 1 A
    box.wait(0.5)
    lost = [on for _, on in load.edges[before:]].count(False)
    assert 2 <= lost <= 0.5 / RETURN_DWELL_S + 1
    assert box.type(":OUTP? CH1") == "ON"


def test_output_off_takes_the_load_away_at_once_and_the_voltage_decays() -> None:
    load = board()
    box = Box(load)
    box.type(":APPL CH1,15,2.5", ":OUTP CH1,ON")
    box.wait(0.2)
    box.type(":OUTP CH1,OFF")
    assert not load.powered
    assert float(box.type(":MEAS? CH1") or 0) == pytest.approx(15.0, abs=0.02)
    box.wait(DECAY_TAU_S)
    assert float(box.type(":MEAS? CH1") or 0) == pytest.approx(15.0 / math.e, abs=0.02)
    box.wait(1.0)
    assert box.type(":MEAS? CH1") == "0.00"


def test_brown_out_and_return_with_hysteresis() -> None:
    load = board()
    box = Box(load)
    box.type(":APPL CH1,15,2.5", ":OUTP CH1,ON")
    box.wait(0.2)
    box.type(":SOUR1:VOLT 8.4")
    box.wait(0.2)
    assert not load.powered
    box.type(":SOUR1:VOLT 8.9")  # above the lock-out, below lock-out + 0.5 V
    box.wait(0.5)
    assert not load.powered
    box.type(":SOUR1:VOLT 9.0")
    box.wait(0.2)
    assert load.powered
    assert [on for _, on in load.edges] == [True, False, True]


@pytest.mark.parametrize(
    ("set_up", "what"),
    [
        ((":OUTP:OVP:VAL CH1,16", ":OUTP:OVP CH1,ON", ":SOUR1:VOLT 17"), "OVP"),
        ((":OUTP:OCP:VAL CH1,0.2", ":OUTP:OCP CH1,ON"), "OCP"),
    ],
)
def test_a_trip_latches_and_takes_the_load_away(set_up: tuple[str, ...], what: str) -> None:
    load = board()
    box = Box(load)
    box.type(":APPL CH1,15,2.5", ":OUTP CH1,ON")
    box.wait(0.2)
    box.type(*set_up)
    box.wait(0.1)
    assert not load.powered
    assert box.type(f":OUTP:{what}:QUES? CH1") == "YES"
    assert box.type(":OUTP? CH1") == "OFF"
    box.type(":OUTP CH1,ON")
    assert box.type(":OUTP? CH1") == "OFF"
    assert box.error().startswith("-221")
    box.type(f":OUTP:{what}:CLEAR CH1")
    assert box.type(f":OUTP:{what}:QUES? CH1") == "NO"
    assert box.type(":OUTP? CH1") == "OFF"


def test_the_sources_own_clear_switches_back_on_unless_off_came_first() -> None:
    box = Box(board())
    for off_first, expected in ((False, "ON"), (True, "OFF")):
        box.type(":APPL CH1,15,2.5", ":OUTP:OVP CH1,OFF", ":OUTP CH1,ON")
        box.wait(0.2)
        box.type(":OUTP:OVP:VAL CH1,14", ":OUTP:OVP CH1,ON")
        box.wait(0.1)
        assert box.type(":OUTP? CH1") == "OFF"
        box.type(":OUTP:OVP CH1,OFF", *([":OUTP CH1,OFF"] if off_first else []), ":SOUR1:VOLT:PROT:CLE")
        assert box.type(":OUTP? CH1") == expected


def test_a_recorded_load_follows_its_profile_since_power_on() -> None:
    clock = Clock()
    load = RecordedLoad(((0.0, 12.0), (3.0, 5.0)), clock=clock)
    assert load.power_w(clock()) == 0.0
    load.set_powered(True)
    assert [load.power_w(clock() + age) for age in (0.0, 2.9, 3.0, 99.0)] == [12.0, 12.0, 5.0, 5.0]
    with pytest.raises(UsageError):
        RecordedLoad(((3.0, 1.0), (0.0, 1.0)))


# --------------------------------------------------------------------------------------------------------- language
@pytest.mark.parametrize(
    "header",
    [
        ":SOUR1:VOLT",
        ":source1:voltage:level:immediate:amplitude",
        "SOUR1:VOLT:LEV",
        ":VOLT",
        "volt",
        ":SOURCE1:VOLT:IMM:AMPL",
    ],
)
def test_long_and_short_forms_in_any_case(header: str) -> None:
    box = Box()
    box.type(f"{header} 12.34")
    assert box.type(f"{header}?") == "12.34"
    assert box.error() == '0,"No error"'


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (":NONSENSE", -113),
        (":SOURC1:VOLT 1", -113),
        (":VOLTA 1", -113),
        (":SOUR1:VOLT", -109),
        (":SOUR1:VOLT 33", -222),
        (":SOUR1:VOLT -1", -222),
        (":SOUR1:VOLT abc", -104),
        (":SOUR1:VOLT nan", -222),
        (":SOUR9:VOLT 1", -224),
        (":OUTP CH7,ON", -224),
        (":OUTP CH1,MAYBE", -224),
        (":MEAS:ALL CH1", -113),
        ("*IDN", -113),
    ],
)
def test_bad_input_has_no_effect_and_an_error(message: str, code: int) -> None:
    box = Box()
    box.type(":APPL CH1,12,1")
    assert box.type(message) is None
    assert box.error().startswith(f"{code},")
    assert box.error() == '0,"No error"'
    assert box.type(":APPL? CH1") == "CH1:30V/3A,12.00,1.000"


def test_compound_messages_follow_the_path_and_join_their_answers() -> None:
    box = Box()
    assert box.type(":OUTP:OVP:VAL CH1,17;STAT CH1,ON;VAL? CH1;STAT? CH1") == "17.00;ON"
    assert box.type(":SOUR2:VOLT 3;:SOUR2:CURR 1;*IDN?;:APPL? CH2,VOLT") == f"{box.instrument.model.identity};3.00"
    assert box.error() == '0,"No error"'


def test_the_selected_channel_and_minimum_and_maximum() -> None:
    box = Box()
    box.type(":INST CH3", "VOLT MAX")
    assert box.type(":APPL? CH3") == "CH3:5V/3A,5.30,3.000"
    assert box.type(":VOLT? MIN") == "0.00"
    assert box.type(":INST:NSEL?") == "3"


def test_the_error_queue_overflows_into_350() -> None:
    box = Box()
    for _ in range(30):
        box.type(":NONSENSE")
    seen = [box.error() for _ in range(21)]
    assert seen[18:] == ['-113,"Undefined header"', '-350,"Queue overflow"', '0,"No error"']
    box.type(":NONSENSE", "*CLS")
    assert box.error() == '0,"No error"'


def test_event_status_remembers_command_and_execution_errors() -> None:
    box = Box()
    box.type(":NONSENSE", ":SOUR1:VOLT 99")
    assert box.type("*ESR?") == "48"
    assert box.type("*ESR?") == "0"


def test_the_serial_number_says_virtual() -> None:
    maker, model, serial, _ = (Box().type("*IDN?") or "").split(",")
    assert (maker, model) == ("RIGOL TECHNOLOGIES", "DP832")
    assert "VIRTUAL" in serial


# ----------------------------------------------------------------------------------------------------------- server
@contextmanager
def serving(load: Load | None = None) -> Iterator[VirtualSupply]:
    """A supply on its own thread and loop, as another process would be."""
    supply = VirtualSupply(loads={1: load} if load else {})
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(supply.start(), loop).result(5)
        yield supply
    finally:
        asyncio.run_coroutine_threadsafe(supply.stop(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


def test_pyvisa_py_speaks_to_it() -> None:
    pyvisa = pytest.importorskip("pyvisa")
    load = RecordedLoad(((0.0, 6.0),))
    with serving(load) as supply:
        manager = pyvisa.ResourceManager("@py")
        psu = manager.open_resource(
            f"TCPIP::127.0.0.1::{supply.port}::SOCKET", read_termination="\n", write_termination="\n", timeout=15000
        )
        try:
            assert psu.query("*IDN?").startswith("RIGOL TECHNOLOGIES,DP832,")
            psu.write(":APPL CH1,15,2.5")
            psu.write(":OUTP CH1,ON")
            psu.write(":OUTP CH1,ON;:NONSENSE")
            assert psu.query(":SYST:ERR?") == '-113,"Undefined header"'
            deadline = threading.Event()
            for _ in range(200):
                if psu.query_ascii_values(":MEAS:ALL? CH1") == [15.0, 0.4, 6.0]:
                    break
                deadline.wait(0.01)
            assert psu.query_ascii_values(":MEAS:ALL? CH1") == [15.0, 0.4, 6.0]
            psu.write(":OUTP CH1,OFF")
            assert psu.query(":OUTP? CH1") == "OFF"
            assert [on for _, on in load.edges] == [True, False]
        finally:
            psu.close()
            manager.close()


def test_brown_out_happens_with_no_client_connected() -> None:
    lost = threading.Event()

    class Watched(RecordedLoad):
        def set_powered(self, on: bool) -> None:
            super().set_powered(on)
            if not on:
                lost.set()

    load = Watched(((0.0, 5.0),))
    with serving(load) as supply:
        with socket.create_connection(("127.0.0.1", supply.port), timeout=15) as sock:
            sock.sendall(b":APPL CH1,15,2.5;:OUTP CH1,ON;*OPC?\n")
            assert sock.recv(100) == b"1\n"
            while not load.powered:
                sock.sendall(b"*OPC?\n")
                sock.recv(100)
            sock.sendall(b":SOUR1:VOLT 5\n")
        assert lost.wait(2.0)


def test_an_endless_message_is_dropped_and_the_next_one_heard() -> None:
    with serving() as supply, socket.create_connection(("127.0.0.1", supply.port), timeout=15) as sock:
        sock.sendall(b"x" * 10_000 + b"\n*IDN?\n:SYST:ERR?\n")
        lines = sock.makefile("rb")
        assert lines.readline().startswith(b"RIGOL")
        assert lines.readline().startswith(b"-223")


def test_a_taken_port_is_said_with_the_next_step() -> None:
    with serving() as supply:

        async def second() -> None:
            await VirtualSupply().start(port=supply.port)

        with pytest.raises(BenchError, match=r"cannot listen on 127.0.0.1.*[Aa]ddress already in use") as caught:
            asyncio.run(second())
        assert "another port" in caught.value.hint


def test_only_loopback_and_known_models_and_channels() -> None:
    with pytest.raises(UsageError, match="loopback only"):
        asyncio.run(VirtualSupply().start("0.0.0.0"))
    with pytest.raises(UsageError, match="rigol-dp800"):
        VirtualSupply("rigol")
    with pytest.raises(UsageError, match="no channel 9"):
        VirtualSupply(loads={9: ResistiveLoad(1.0)})
