"""Lines to instruments: addresses, deadlines, ends, a serial port without terminators, VISA, and off without a loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
import tty
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest
from pydantic import ValidationError

from hil.drivers.codec import LINE, SILENCE, Frame, Inbox, InstrumentClosed, InstrumentTimeout, ReplyError
from hil.drivers.forced_off import force_off
from hil.drivers.scpi import ScpiSupply
from hil.drivers.transport import Address, Transport, endpoint, parse_any_address, transport_for
from hil.drivers.transport_tcp import TcpTransport
from hil.errors import UsageError
from hil.inventory.bench import SupplyWire
from hil.model import Setpoint


class Korad:
    """A KA3005P on a pseudo-terminal, as far as these tests need it: no terminators, one message a gap."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        tty.setraw(slave)
        self.device = os.ttyname(slave)
        self._slave = slave
        self.heard: list[str] = []
        self.volts, self.amps, self.on = 0.0, 0.0, True
        self.mute = False
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                text = os.read(self.master, 4096).decode()
            except OSError:
                return
            self.heard.append(text)
            reply = b"" if self.mute else self._answer(text)
            if reply:
                os.write(self.master, reply)

    def _answer(self, text: str) -> bytes:
        if text.startswith("VSET1:"):
            self.volts = float(text[6:])
        elif text.startswith("ISET1:"):
            self.amps = float(text[6:])
        elif text in ("OUT0", "OUT1"):
            self.on = text == "OUT1"
        answers = {
            "*IDN?": b"KORADKA3005PV2.0",
            "STATUS?": bytes([0x41 if self.on else 0x01]),
            "VSET1?": f"{self.volts:05.2f}".encode(),
            "ISET1?": f"{self.amps:.3f}K".encode(),
            "VOUT1?": f"{self.volts if self.on else 0:05.2f}".encode(),
            "IOUT1?": b"0.123",
        }
        return answers.get(text, b"")

    def close(self) -> None:
        os.close(self.master)
        os.close(self._slave)


@pytest.fixture
def korad() -> Iterator[Korad]:
    instrument = Korad()
    yield instrument
    instrument.close()


@contextmanager
def listener(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A TCP instrument that treats its first caller with `serve`; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            connection, _ = server.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        thread.join(30)


def talk(address: str, body: Callable[[Transport], Awaitable[None]]) -> None:
    async def steps() -> None:
        transport = transport_for(address, "\n", 9600)
        await transport.connect(time.monotonic() + 10)
        try:
            await body(transport)
        finally:
            transport.close()

    asyncio.run(steps())


# -------------------------------------------------------------------------------------------------------- addresses
@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://psu1.lab:5025", Address("tcp", "psu1.lab", 5025)),
        ("tcp://[::1]:5555", Address("tcp", "::1", 5555)),
        ("serial:///dev/ttyUSB0", Address("serial", "/dev/ttyUSB0")),
        ("serial:///dev/serial/by-id/x?baud=115200", Address("serial", "/dev/serial/by-id/x", baud=115200)),
        ("visa://USB0::0x2A8D::0x1202::MY1::0::INSTR", Address("visa", "USB0::0x2A8D::0x1202::MY1::0::INSTR")),
    ],
)
def test_an_address_is_understood(text: str, address: Address) -> None:
    assert parse_any_address(text) == address


@pytest.mark.parametrize("text", ["127.0.0.1:1", "tcp://h", "serial://ttyUSB0", "serial:///d?baud=x", "visa://USB0"])
def test_another_address_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(UsageError, match="not understood") as caught:
        parse_any_address(text)
    assert "serial:///dev/NAME" in caught.value.hint


def test_the_bench_file_takes_every_kind_of_address() -> None:
    for address in (
        "tcp://psu1.lab:5025",
        "tcp://[::1]:5555",
        "serial:///dev/ttyUSB0?baud=9600",
        "visa://GPIB::5::INSTR",
    ):
        assert SupplyWire(driver="scpi", dialect="rigol-dp800", address=address).address == address
        parse_any_address(address)
    for address in ("127.0.0.1:1", "tcp://h", "serial://ttyUSB0", "serial:///dev/tty?x=1", "visa://USB0"):
        with pytest.raises(ValidationError):
            SupplyWire(driver="scpi", dialect="rigol-dp800", address=address)


def test_two_spellings_of_one_instrument_are_one_endpoint(tmp_path: object, korad: Korad) -> None:
    link = f"{tmp_path}/by-id"
    os.symlink(korad.device, link)
    assert endpoint(f"serial://{link}") == endpoint(f"serial://{korad.device}?baud=9600")
    assert endpoint("tcp://localhost:5555") == endpoint("tcp://127.0.0.1:5555")
    assert endpoint("tcp://127.0.0.1:5555") != endpoint("tcp://127.0.0.1:5556")


# ---------------------------------------------------------------------------------------------------------- framing
def test_replies_are_cut_at_a_terminator_at_a_length_or_at_silence() -> None:
    inbox = Inbox()
    inbox.feed(b"12.00 0.5\r\nrest")
    assert inbox.take(Frame(5)) == "12.00"
    assert inbox.take(LINE) == "0.5"
    assert inbox.take(LINE) is None
    assert inbox.take(Frame(5)) is None
    assert inbox.take(SILENCE) == "rest"
    assert inbox.take(SILENCE) is None


# -------------------------------------------------------------------------------------------------------------- TCP
def test_nodelay_and_keepalive_are_set() -> None:
    def check(connection: socket.socket) -> None:
        connection.recv(1)

    async def body(transport: Transport) -> None:
        assert isinstance(transport, TcpTransport)
        assert transport._line is not None
        assert transport._line.transport is not None
        sock = transport._line.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
        transport.write(b"x")

    with listener(check) as address:
        talk(address, body)


def test_silence_is_a_timeout_at_its_deadline_and_an_end_is_not() -> None:
    waited = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.recv(10)
        waited.wait(20)
        connection.sendall(b"half an ans")

    async def body(transport: Transport) -> None:
        transport.write(b"question\n")
        start = time.monotonic()
        with pytest.raises(InstrumentTimeout, match="did not answer in time"):
            await transport.read(start + 0.1)
        assert 0.09 < time.monotonic() - start < 10
        waited.set()
        start = time.monotonic()
        with pytest.raises(InstrumentClosed, match="ended the connection"):
            await transport.read(start + 30)
        assert time.monotonic() - start < 15
        assert not transport.alive()
        assert transport.unread() == 11

    with listener(serve) as address:
        talk(address, body)


def test_an_earlier_deadline_than_the_last_one_is_kept() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(10)
        connection.sendall(b"1\n")
        connection.recv(10)

    async def body(transport: Transport) -> None:
        transport.write(b"a\n")
        assert await transport.read(time.monotonic() + 30) == "1"
        start = time.monotonic()
        with pytest.raises(InstrumentTimeout):
            await transport.read(start + 0.1)
        assert time.monotonic() - start < 15
        transport.write(b"b\n")

    with listener(serve) as address:
        talk(address, body)


def test_a_later_deadline_is_not_cut_short_by_an_earlier_one() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(10)
        connection.sendall(b"1\n")
        connection.recv(10)
        time.sleep(0.6)
        connection.sendall(b"2\n")

    async def body(transport: Transport) -> None:
        transport.write(b"a\n")
        assert await transport.read(time.monotonic() + 0.5) == "1"
        transport.write(b"b\n")
        assert await transport.read(time.monotonic() + 10) == "2"

    with listener(serve) as address:
        talk(address, body)


def test_an_endless_reply_is_an_error_and_not_a_full_memory() -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(10)
        connection.sendall(b"x" * 100_000)
        with contextlib.suppress(ConnectionResetError):
            connection.recv(1)

    async def body(transport: Transport) -> None:
        transport.write(b"a\n")
        with pytest.raises(ReplyError, match="without an end"):
            await transport.read(time.monotonic() + 5)

    with listener(serve) as address:
        talk(address, body)


def test_nobody_there_is_said_with_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(InstrumentClosed, match=f"cannot connect to tcp://127.0.0.1:{port}"):
        talk(f"tcp://127.0.0.1:{port}", never)


async def never(transport: Transport) -> None:
    raise AssertionError("it connected")


# ----------------------------------------------------------------------------------------------------------- serial
def test_a_supply_on_a_serial_port_without_terminators(korad: Korad) -> None:
    async def steps() -> None:
        supply = ScpiSupply("korad-ka3005p", f"serial://{korad.device}", timeout_s=5.0)
        await supply.open()
        assert supply.capabilities.model == "KA3005P"
        assert supply.known_outputs == {1: True}
        await supply.program(1, Setpoint(5.5, 2.5))
        assert await supply.setpoint(1) == Setpoint(5.5, 2.5)
        reading = await supply.measure(1)
        assert (reading.voltage_v, reading.current_a, reading.output_on) == (5.5, 0.123, True)
        await supply.output(1, False)
        assert supply.recovery is None  # the sixth byte put nothing out of step
        await supply.close()

    asyncio.run(steps())
    assert korad.heard[0] == "*IDN?"
    assert "ISET1:2.500" in korad.heard


def test_a_silent_serial_supply_times_out_and_is_reopened(korad: Korad) -> None:
    async def steps() -> None:
        supply = ScpiSupply("korad-ka3005p", f"serial://{korad.device}", timeout_s=1.0)
        await supply.open()
        korad.mute = True
        with pytest.raises(InstrumentTimeout):
            await supply.measure(1)
        korad.mute = False
        assert (await supply.measure(1)).output_on
        assert supply.recovery is not None
        await supply.close()

    asyncio.run(steps())


def test_a_serial_port_has_one_owner_and_its_absence_is_said(korad: Korad) -> None:
    async def two(first: Transport) -> None:
        second = transport_for(f"serial://{korad.device}", "", 9600)
        with pytest.raises(InstrumentClosed, match="cannot open"):
            await second.connect(time.monotonic() + 1)

    talk(f"serial://{korad.device}", two)
    with pytest.raises(InstrumentClosed, match="cannot open /dev/ttyNONE") as caught:
        talk("serial:///dev/ttyNONE", never)
    assert "dialout" in caught.value.hint


def test_a_serial_port_can_be_reopened_at_once(korad: Korad) -> None:
    async def again(transport: Transport) -> None:
        for _ in range(5):
            await asyncio.sleep(0.01)  # its reader has gone to sleep in the port
            await transport.connect(time.monotonic() + 10)
        transport.write(b"VOUT1?")
        assert await transport.read(time.monotonic() + 10, Frame(5)) == "00.00"

    talk(f"serial://{korad.device}", again)


def test_off_without_an_event_loop_over_a_serial_port(korad: Korad) -> None:
    korad.volts = 12.0
    result = force_off(f"serial://{korad.device}", "korad-ka3005p", (1,), 0.6, 20.0)
    assert result.off, result.trouble
    assert not korad.on
    assert korad.heard[0] == "OUT0"  # before anything is asked
    assert result.voltages_v == {1: 0.0}
    assert result.attempts == 1
    assert 0 < result.command_s < result.elapsed_s


# ------------------------------------------------------------------------------------------------------------- VISA
def test_a_supply_over_pyvisa() -> None:
    pytest.importorskip("pyvisa_py")
    questions = {"*IDN?": "RIGOL TECHNOLOGIES,DP832,DP8C000001,00.01.16", ":OUTP:MODE? CH1": "CV"}

    def serve(connection: socket.socket) -> None:
        with connection.makefile("rw", newline="\n") as lines:
            for line in lines:
                text = line.strip()
                if text.endswith("?") or "? " in text:
                    lines.write(questions.get(text, "OFF") + "\n")
                    lines.flush()

    with listener(serve) as address:

        async def steps() -> None:
            resource = f"visa://TCPIP::127.0.0.1::{address.rpartition(':')[2]}::SOCKET"
            supply = ScpiSupply("rigol-dp800", resource)
            await supply.open()
            assert supply.identity.serial == "DP8C000001"
            assert await supply.regulation(1) == "CV"
            await supply.close()

        asyncio.run(steps())


def test_a_visa_resource_that_is_not_there_is_said() -> None:
    pytest.importorskip("pyvisa_py")
    with pytest.raises(InstrumentClosed, match="visa://USB0::1::2::NONE"):
        talk("visa://USB0::1::2::NONE::0::INSTR", never)
