"""The virtual supply on its wires: PyVISA as an independent client of five makers, serial ports, faults, control."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hil.errors import UsageError
from hil.virtual.supply import Fault, Load, RecordedLoad, ResistiveLoad, VirtualSupply


class Server:
    """A supply on its own thread and loop, as another process would be."""

    def __init__(self, model: str, loads: dict[int, Load]) -> None:
        self.supply = VirtualSupply(model, loads)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.do(self.supply.start())

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.do(self.supply.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)
        self.loop.close()


@contextmanager
def serving(model: str, load: Load | None = None, channel: int = 1) -> Iterator[Server]:
    server = Server(model, {channel: load} if load else {})
    try:
        yield server
    finally:
        server.close()


def until(true: Callable[[], bool], timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not become so"
        time.sleep(0.005)


# ----------------------------------------------------------------------- PyVISA, an independent client
def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]?\d+\.\d+(?:E[-+]\d+)?", text)]


@contextmanager
def visa(resource: str, **options: Any) -> Iterator[Any]:
    pyvisa = pytest.importorskip("pyvisa")
    manager = pyvisa.ResourceManager("@py")
    client = manager.open_resource(resource, timeout=15000, **options)
    try:
        yield client
    finally:
        client.close()
        manager.close()


@dataclass(frozen=True)
class Talk:
    """What a VISA user types to run 12 V into 12 ohm on `channel`."""

    model: str
    on: str
    volts: str
    amperes: str
    off: str
    channel: int = 1
    gap_s: float = 0.0
    end: str = "\n"


TALKS = [
    Talk(
        "keysight-n6700",
        "VOLT 12,(@1);:CURR 3,(@1);:OUTP ON,(@1)",
        "MEAS:VOLT? (@1)",
        "MEAS:CURR? (@1)",
        "OUTP OFF,(@1)",
    ),
    Talk(
        "keysight-e36300",
        "APPL CH2,12,1.01;:OUTP ON,(@2)",
        "MEAS:VOLT? (@2)",
        "MEAS:CURR? (@2)",
        "OUTP OFF,(@2)",
        channel=2,
    ),
    Talk("rigol-dp2000", ":APPL CH1,12,3;:OUTP CH1,ON", ":MEAS:VOLT? CH1", ":MEAS:CURR? CH1", ":OUTP CH1,OFF"),
    Talk("rs-hmp", "INST:NSEL 1;:APPL 12,3;:OUTP:SEL ON;:OUTP:GEN ON", "MEAS:VOLT?", "MEAS:CURR?", "OUTP:GEN OFF"),
    Talk("rs-nge", "INST:NSEL 1;:APPL 12,3;:OUTP ON;:OUTP:GEN ON", "MEAS:VOLT?", "MEAS:CURR?", "OUTP:GEN OFF"),
    Talk("tti-cpx", "V1 12;I1 3;OP1 1", "V1O?", "I1O?", "OPALL 0", end="\r\n"),
    Talk(
        "siglent-spd3303x",
        "CH1:VOLT 12;:CH1:CURR 3;:OUTP CH1,ON",
        "MEAS:VOLT? CH1",
        "MEAS:CURR? CH1",
        "OUTP CH1,OFF",
        gap_s=0.03,
    ),
    Talk("tdk-genesys", "VOLT 12;CURR 3;:OUTP:STAT ON", "MEAS:VOLT?", "MEAS:CURR?", "OUTP:STAT OFF"),
]


@pytest.mark.parametrize("talk", TALKS, ids=lambda talk: talk.model)
def test_pyvisa_runs_an_output(talk: Talk) -> None:
    load = ResistiveLoad(12.0)
    with serving(talk.model, load, talk.channel) as server:
        resource = f"TCPIP::127.0.0.1::{server.supply.port}::SOCKET"
        with visa(resource, read_termination=talk.end, write_termination="\n") as psu:
            assert psu.query("*IDN?") == server.supply.instrument.model.identity
            time.sleep(talk.gap_s)
            psu.write(talk.on)

            def there() -> bool:
                found = []
                for question in (talk.volts, talk.amperes):
                    time.sleep(talk.gap_s)
                    found += numbers(psu.query(question))
                return found == [12.0, 1.0]

            until(there)
            time.sleep(talk.gap_s)
            psu.write(talk.off)
            until(lambda: not load.powered)


def test_pyvisa_runs_a_korad_on_a_serial_port() -> None:
    load = ResistiveLoad(12.0)
    with serving("korad-ka3005p", load) as server:
        path = server.do(server.supply.start_serial())
        with visa(f"ASRL{path}::INSTR", read_termination=None, write_termination="", baud_rate=9600) as psu:
            channel = server.supply.instrument.channels[1]
            for command, heard in (
                ("VSET1:12.00", lambda: channel.voltage_set_v == 12.0),
                ("ISET1:3.000", lambda: channel.current_limit_a == 3.0),
                ("OUT1", lambda: load.powered),
            ):
                psu.write_raw(command.encode())
                until(heard)  # or the next one would be read along with it
                time.sleep(0.09)
            for question, answer in (
                ("VSET1?", b"12.00"),
                ("ISET1?", b"3.000K"),
                ("STATUS?", b"\x41"),
                ("IOUT1?", b"1.000"),
            ):
                time.sleep(0.09)
                psu.write_raw(question.encode())
                assert psu.read_bytes(len(answer)) == answer


# ---------------------------------------------------------------------------------------------- serial
class Line:
    """A serial port opened with nothing but the kernel."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        mode = termios.tcgetattr(self.fd)
        assert not mode[3] & (termios.ICANON | termios.ECHO)

    def ask(self, text: str, timeout_s: float = 10.0) -> bytes:
        os.write(self.fd, text.encode())
        return os.read(self.fd, 100) if select.select([self.fd], [], [], timeout_s)[0] else b""


def test_a_scpi_supply_on_a_serial_port_with_a_name(tmp_path: Path) -> None:
    with serving("itech-it6500") as server:
        link = tmp_path / "psu1.tty"
        assert server.do(server.supply.start_serial(link)) == str(link)
        line = Line(str(link))
        assert line.ask("SYST:REM\nVOLT 12\nVOLT?\n") == b"12.000\n"
        os.close(line.fd)
        line = Line(str(link))  # a client that comes back finds the port as it left it
        assert line.ask("VOLT?\n") == b"12.000\n"
        os.close(line.fd)
    assert not link.exists()


def test_korad_commands_that_arrive_at_once_are_one_heard_and_the_rest_lost() -> None:
    with serving("korad-ka3005p") as server:
        line = Line(server.do(server.supply.start_serial()))
        assert line.ask("VSET1:5.00ISET1:1.000VSET1?", 0.1) == b""
        time.sleep(0.09)
        assert line.ask("VSET1?") == b"05.00"
        time.sleep(0.09)
        assert line.ask("ISET1?") == b"5.000K"
        os.close(line.fd)


# ---------------------------------------------------------------------------------------------- faults
class Client:
    """A plain socket with lines."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=15)
        self.lines = self.socket.makefile("rb")

    def write(self, *messages: str) -> None:
        self.socket.sendall("".join(m + "\n" for m in messages).encode())

    def ask(self, message: str) -> str:
        self.write(message)
        return self.read()

    def read(self) -> str:
        return self.lines.readline().decode().strip()

    def is_silent(self, seconds: float = 0.15) -> bool:
        return not select.select([self.socket], [], [], seconds)[0]

    def close(self) -> None:
        self.lines.close()
        self.socket.close()


@contextmanager
def talking(model: str = "rigol-dp800", load: Load | None = None) -> Iterator[tuple[VirtualSupply, Client]]:
    with serving(model, load) as server:
        client = Client(server.supply.port)
        try:
            yield server.supply, client
        finally:
            client.close()


def test_swapped_answers_come_in_the_wrong_order_and_duplicates_twice() -> None:
    with talking() as (supply, client):
        client.write(":APPL CH1,12,2")
        supply.faults.append(Fault("swapped", "VOLT"))
        client.write(":SOUR1:VOLT?", ":SOUR1:CURR?")
        assert (client.read(), client.read()) == ("2.000", "12.00")
        supply.faults.append(Fault("duplicate", "VOLT"))
        assert (client.ask(":SOUR1:VOLT?"), client.ask(":SOUR1:CURR?"), client.read()) == ("12.00", "12.00", "2.000")


def test_a_swapped_answer_that_nothing_follows_is_silence() -> None:
    with talking() as (supply, client):
        supply.faults.append(Fault("swapped", "IDN"))
        client.write("*IDN?")
        assert client.is_silent()


def test_an_overflowing_queue_says_so_at_its_end() -> None:
    with talking() as (supply, client):
        supply.faults.append(Fault("overflow", "VOLT 5"))
        client.write(":SOUR1:VOLT 5")
        entries = [client.ask(":SYST:ERR?") for _ in range(21)]
        assert entries[19:] == ['-350,"Queue overflow"', '0,"No error"']
        assert client.ask(":SOUR1:VOLT?") == "5.00"


def test_a_refused_over_voltage_protection_keeps_the_old_one() -> None:
    with talking("keysight-n6700") as (supply, client):
        supply.faults.append(Fault("refuse", r"VOLT:PROT \d"))
        client.write("VOLT:PROT 13,(@1)")
        assert client.ask("SYST:ERR?") == '-221,"Settings conflict"'
        assert client.ask("VOLT:PROT? (@1)") == "+5.50000000E+01"


def test_a_trip_during_a_list_leaves_the_list_running_behind_it() -> None:
    load = RecordedLoad(((0.0, 6.0),))
    with talking("keysight-n6700", load) as (supply, client):
        client.write("VOLT 12,(@1)", "CURR 2,(@1)", "OUTP ON,(@1)", "VOLT:MODE LIST,(@1)", "LIST:VOLT 12,15,(@1)")
        client.write("LIST:DWEL 0.2,(@1)", "LIST:COUN INF,(@1)", "TRIG:TRAN:SOUR BUS,(@1)", "INIT:TRAN (@1)", "*TRG")
        until(lambda: load.powered)
        supply.faults.append(Fault("trip", r"MEAS"))
        client.ask("MEAS:VOLT? (@1)")
        assert not load.powered
        seen: set[str] = set()
        until(lambda: len(seen | {client.ask("VOLT? (@1)")}) == 2 or bool(seen.add(client.ask("VOLT? (@1)"))))
        assert client.ask("OUTP? (@1)") == "1"


def test_genesys_answers_take_their_time_in_order() -> None:
    with talking("tdk-genesys") as (_, client):
        start = time.monotonic()
        client.write("SYST:ERR?", "VOLT?")
        assert client.read() == '0,"No error"'
        assert time.monotonic() - start >= 0.060
        assert client.read() == "0.000"


def is_reset(sock: socket.socket) -> bool:
    """Whether the far end has gone, seen by reading."""
    try:
        return sock.recv(10) == b""
    except ConnectionResetError:
        return True


def test_ea_drops_an_idle_connection_and_not_the_output() -> None:
    load = RecordedLoad(((0.0, 6.0),))
    with talking("ea-psi", load) as (supply, client):
        for message in ("SYST:LOCK ON", "VOLT 15", "CURR 2", "OUTP ON"):
            client.write(message)
            time.sleep(0.01)
        until(lambda: load.powered)
        supply.instrument.idle_timeout_s = 0.1  # five seconds in life
        assert is_reset(client.socket)
        assert load.powered


def test_the_watchdog_of_an_n6700_counts_real_time() -> None:
    load = RecordedLoad(((0.0, 6.0),))
    with talking("keysight-n6700", load) as (_, client):
        client.write("VOLT 15,(@1)", "CURR 2,(@1)", "OUTP ON,(@1)")
        until(lambda: load.powered)
        armed = time.monotonic()
        client.write("OUTP:PROT:WDOG:DEL 1", "OUTP:PROT:WDOG ON")
        assert client.ask("OUTP:PROT:WDOG?") == "1"
        until(lambda: not load.powered)
        assert 0.95 < time.monotonic() - armed < 10.0
        assert (client.ask("OUTP? (@1)"), client.ask("STAT:QUES:COND? (@1)")) == ("1", "2048")


# -------------------------------------------------------------------------------------- control socket
def test_the_control_socket_puts_faults_in_and_tells_the_truth(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with serving("siglent-spd3303x") as server:
        server.do(server.supply.start_control(path))
        assert path.stat().st_mode & 0o777 == 0o600
        control = socket.socket(socket.AF_UNIX)
        control.connect(str(path))
        lines = control.makefile("rb")

        def ask(**request: object) -> dict[str, Any]:
            control.sendall(json.dumps(request).encode() + b"\n")
            answer: dict[str, Any] = json.loads(lines.readline())
            return answer

        client = Client(server.supply.port)
        client.write("CH1:VOLT 12")
        until(lambda: server.supply.instrument.channels[1].voltage_set_v == 12.0)
        time.sleep(0.03)
        client.write("OUTP CH1,ON")
        until(lambda: ask(do="state")["channels"]["1"]["voltage_v"] > 11.9)
        assert ask(do="fault", kind="silent", match="IDN", count=-1)["faults"][0]["kind"] == "silent"
        client.write("*IDN?")
        assert client.is_silent()
        assert ask(do="heal")["faults"] == []
        assert client.ask("*IDN?").startswith("Siglent")
        ask(do="latency", delay_s=0.1)
        start = time.monotonic()
        time.sleep(0.03)
        assert client.ask("*IDN?").startswith("Siglent")
        assert time.monotonic() - start >= 0.13
        assert ask(do="heal")["faults"] == []
        assert ask(do="trip", channel=1)["channels"]["1"]["tripped"]
        assert not ask(do="power_cycle")["channels"]["1"]["tripped"]
        assert is_reset(client.socket)
        assert "no fault" in ask(do="fault", kind="nonsense")["error"]
        assert "cannot" in ask(do="dance")["error"]
        assert "error" in ask(do="fault", kind="silent", match="(")
        control.sendall(b"not json\n")
        assert b"error" in lines.readline()
        client.close()
        lines.close()
        control.close()
    assert not path.exists()


def test_unknown_models_are_named_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no virtual supply model") as caught:
        VirtualSupply("acme-1")
    assert "tti-cpx" in caught.value.hint


# ------------------------------------------------------------------------------------------------- CLI
def test_the_command_serves_a_chosen_model_and_load_until_stopped(tmp_path: Path) -> None:
    control = tmp_path / "c.sock"
    arguments = ["--model", "tti-cpx", "--port", "0", "--load", "2=resistive:10", "--serial", "--control", str(control)]
    command = [sys.executable, "-c", "from hil.cli import main; main()", "virtual", "supply", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rsplit(":", 1)[1])
            tty = process.stdout.readline().split()[-1]
            client = Client(port)
            client.write("V2 5", "I2 1", "OP2 1")
            until(lambda: client.ask("I2O?") == "0.500A")
            line = Line(tty)
            assert line.ask("V2?\n") == b"V2 5.00\r\n"
            os.close(line.fd)
            client.close()
        finally:
            process.terminate()
        assert process.wait(30) == 0
    assert not control.exists()
