"""Switched outlets over HTTP and over a serial relay board, byte for byte."""

from __future__ import annotations

import os
import threading
import tty
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from hil.drivers.codec import InstrumentClosed, ReadbackError, ReplyError
from hil.drivers.outlets import LcusRelay, TasmotaOutlet, lcus_message, outlet_for
from hil.errors import UsageError


class Plug(HTTPServer):
    """A Tasmota strip with two relays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.relays = {"1": "OFF", "2": "ON"}
        self.stuck = False
        self.reply: tuple[int, bytes] | None = None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path: str) -> tuple[int, bytes]:
        self.asked.append(path)
        if self.reply is not None:
            return self.reply
        command, _, argument = path.removeprefix("/cm?cmnd=Power").partition("%20")
        if argument and not self.stuck:
            self.relays[command] = argument.upper()
        return 200, f'{{"POWER{command}":"{self.relays[command]}"}}'.encode()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Plug)
        status, body = self.server.answer(self.path)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def plug() -> Iterator[Plug]:
    server = Plug()
    yield server
    server.shutdown()
    server.server_close()


def test_a_tasmota_outlet_switches_and_reads_back(plug: Plug) -> None:
    outlet = outlet_for(f"tasmota://127.0.0.1:{plug.server_port}/1")
    assert outlet.confirms
    assert outlet.state() is False
    outlet.switch(True)
    assert plug.relays == {"1": "ON", "2": "ON"}
    outlet.switch(False)
    assert plug.relays == {"1": "OFF", "2": "ON"}
    assert plug.asked == [
        "/cm?cmnd=Power1",
        "/cm?cmnd=Power1%20On",
        "/cm?cmnd=Power1",
        "/cm?cmnd=Power1%20Off",
        "/cm?cmnd=Power1",
    ]


def test_an_outlet_that_does_not_switch_is_not_switched(plug: Plug) -> None:
    plug.stuck = True
    with pytest.raises(ReadbackError, match="outlet 1 of 127"):
        TasmotaOutlet("127.0.0.1", plug.server_port, 1, 1.0).switch(True)


@pytest.mark.parametrize(
    "reply", [(200, b"<html>"), (200, b'{"Command":"Unknown"}'), (500, b'{"POWER1":"ON"}'), (200, b'{"POWER2":"ON"}')]
)
def test_an_answer_without_the_state_is_an_error(plug: Plug, reply: tuple[int, bytes]) -> None:
    plug.reply = reply
    with pytest.raises(ReplyError, match="instead of its state"):
        TasmotaOutlet("127.0.0.1", plug.server_port, 1, 1.0).state()


def test_a_plug_with_one_relay_says_power_and_a_locked_one_says_so(plug: Plug) -> None:
    outlet = TasmotaOutlet("127.0.0.1", plug.server_port, 1, 1.0)
    plug.reply = (200, b'{"POWER":"ON"}')
    assert outlet.state() is True
    plug.reply = (401, b"")
    with pytest.raises(UsageError, match="password"):
        outlet.state()


def test_an_outlet_that_is_not_there_is_said(plug: Plug) -> None:
    port = plug.server_port
    plug.shutdown()
    plug.server_close()
    with pytest.raises(InstrumentClosed, match=f"cannot reach outlet 127.0.0.1:{port}"):
        TasmotaOutlet("127.0.0.1", port, 1, 1.0).switch(False)


def test_an_lcus_relay_gets_four_bytes_and_promises_nothing() -> None:
    assert lcus_message(1, True) == bytes.fromhex("A00101A2")
    assert lcus_message(1, False) == bytes.fromhex("A00100A1")
    assert lcus_message(4, True) == bytes.fromhex("A00401A5")
    master, slave = os.openpty()
    tty.setraw(slave)
    try:
        relay = outlet_for(f"lcus://{os.ttyname(slave)}?relay=2")
        assert (relay.confirms, relay.state()) == (False, None)
        relay.switch(True)
        assert os.read(master, 16) == bytes.fromhex("A00201A3")
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("address", ["http://plug", "tasmota:///1", "tasmota://plug/x", "lcus://ttyUSB0", "lcus:///"])
def test_another_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        outlet_for(address)


def test_a_relay_that_no_board_has_is_refused() -> None:
    with pytest.raises(UsageError, match="1 to 16"):
        LcusRelay("/dev/ttyUSB0", 17)
