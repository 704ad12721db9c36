"""Serial lines of every kind: the same bytes out and in, held against pyserial's RFC 2217 server; coming and going."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import select
import socket
import threading
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.bench.console_reader import PortReader
from hil.bench.consoles import Console
from hil.drivers.serial_port import CombinedUart, LineSettings, Port, Telnet, open_port, parse_port
from hil.errors import BenchError, UsageError
from hil.inventory.bench import ConsoleWire

EVERY_BYTE = bytes(range(256)) * 40  # 10 KiB, with 0xFF, XON, XOFF and line feeds


class Echo:
    """A far end on a listening socket that sends back what it hears."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.peers: list[socket.socket] = []
        listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self.listener.accept()
                self.peers.append(peer)
                threading.Thread(target=self._echo, args=(peer,), daemon=True).start()

    def _echo(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := peer.recv(4096):
                peer.sendall(data)

    def hang_up(self) -> None:
        for peer in self.peers:
            peer.shutdown(socket.SHUT_RDWR)
        self.peers.clear()


@contextlib.contextmanager
def rfc2217_server(board: str) -> Iterator[tuple[int, Any]]:
    """pyserial's server before a tty: (TCP port, its serial port)."""
    import serial
    import serial.rfc2217

    class Line(serial.Serial):  # type: ignore[misc]
        """A pseudo terminal has no modem lines to tell of."""

        cts = dsr = ri = cd = property(lambda self: False)

    listener = socket.create_server(("127.0.0.1", 0))
    line = Line(board, 9600, timeout=0.02)
    end = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        write = type("Out", (), {"write": staticmethod(peer.sendall)})()
        manager = serial.rfc2217.PortManager(line, write)
        peer.settimeout(0.005)
        with contextlib.suppress(OSError):
            while not end.is_set():
                with contextlib.suppress(TimeoutError):
                    data = peer.recv(1024)
                    if not data:
                        break
                    line.write(b"".join(manager.filter(data)))
                data = line.read(line.in_waiting)
                if data:
                    peer.sendall(b"".join(manager.escape(data)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], line
    finally:
        end.set()
        listener.close()
        thread.join(2)
        line.close()


def exchange(port: Port, data: bytes, timeout_s: float = 20.0) -> bytes:
    """Write all of `data`, read as much back."""
    heard, deadline = bytearray(), time.monotonic() + timeout_s
    left = data
    while len(heard) < len(data) and time.monotonic() < deadline:
        if left:
            left = left[port.write(left) :]
        select.select([port.fileno()], [port.fileno()] if left else [], [], 0.05)
        heard += port.read()
    return bytes(heard)


@pytest.fixture
def board_tty() -> Iterator[str]:
    """A pseudo terminal whose far end echoes."""
    master, slave = os.openpty()
    tty.setraw(slave)

    def echo() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(master, 1024):
                os.write(master, data)

    threading.Thread(target=echo, daemon=True).start()
    yield os.ttyname(slave)
    os.close(slave)
    os.close(master)


def test_every_byte_passes_a_tty(board_tty: str) -> None:
    port = open_port(board_tty)
    assert exchange(port, EVERY_BYTE) == EVERY_BYTE
    with pytest.raises(OSError, match="another program has it open"):
        open_port(board_tty)
    port.close()
    open_port(board_tty).close()


@pytest.mark.parametrize("kind", ["socket", "unix"])
def test_every_byte_passes_a_socket(kind: str, tmp_path: Path) -> None:
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(tmp_path / "chardev"))
        address = f"unix://{tmp_path}/chardev"
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"socket://127.0.0.1:{listener.getsockname()[1]}"
    far = Echo(listener)
    port = open_port(address)
    assert port.read() == b""
    assert exchange(port, EVERY_BYTE) == EVERY_BYTE
    far.hang_up()
    select.select([port.fileno()], [], [], 2)
    with pytest.raises(OSError, match="closed the connection"):
        port.read()
    port.close()
    listener.close()


def test_rfc2217_sets_the_line_and_passes_every_byte(board_tty: str) -> None:
    with rfc2217_server(board_tty) as (number, line):
        port = open_port(f"rfc2217://127.0.0.1:{number}", LineSettings(baud=57600, stop_bits=2))
        assert (line.baudrate, line.stopbits, line.parity, line.bytesize) == (57600, 2, "N", 8)
        assert exchange(port, EVERY_BYTE) == EVERY_BYTE
        port.close()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (bytes((255, 254, 44)), "does not speak RFC 2217"),
        (
            bytes((255, 253, 44))
            + b"".join(bytes((255, 250, 44, 100 + n, *value, 255, 240)) for n, value in enumerate(
                ((0, 0, 37, 128), (8,), (1,), (1,), (1,)), start=1)),
            "refuses the line settings: baud",
        ),
        (b"", "confirms no line settings"),
    ],
)  # fmt: skip
def test_an_rfc2217_server_that_does_not_do_as_asked(answer: bytes, why: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        peer.sendall(answer)
        with contextlib.suppress(OSError):
            while peer.recv(1024):
                pass

    threading.Thread(target=serve, daemon=True).start()
    with pytest.raises(OSError, match=why):
        open_port(f"rfc2217://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3)
    listener.close()


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.one_of(
            st.binary(max_size=12),
            st.sampled_from(
                [("sub", bytes((44, 101, 0, 1, 194, 255))), ("option", bytes((253, 44))), ("nop", b"\xf1")]
            ),
        ),
        max_size=12,
    ),
    cuts=st.sets(st.integers(0, 120)),
)
def test_telnet_is_the_same_however_it_is_cut(parts: list[bytes | tuple[str, bytes]], cuts: set[int]) -> None:
    wire, data, subs, options = b"", b"", [], []
    for part in parts:
        if isinstance(part, bytes):
            wire, data = wire + part.replace(b"\xff", b"\xff\xff"), data + part
        elif part[0] == "sub":
            wire += b"\xff\xfa" + part[1].replace(b"\xff", b"\xff\xff") + b"\xff\xf0"
            subs.append(part[1])
        elif part[0] == "option":
            wire += b"\xff" + part[1]
            options.append(tuple(part[1]))
        else:
            wire += b"\xff" + part[1]
    telnet, got, at = Telnet(), b"", 0
    for cut in [*sorted(cut for cut in cuts if cut < len(wire)), len(wire)]:
        got += telnet.feed(wire[at:cut])
        at = cut
    assert (got, telnet.subs, telnet.options) == (data, subs, options)


class Pieces:
    """A port that reads as told."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    def fileno(self) -> int:
        return -1

    def read(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def write(self, data: bytes) -> int:
        return len(data)

    def close(self) -> None: ...


@settings(max_examples=60)
@given(cuts=st.sets(st.integers(0, 60)))
def test_the_tags_of_a_combined_uart_are_no_text(cuts: set[int]) -> None:
    wire = b"\xff\xfd\xff\xe0SPE up\r\n\xff\xe1Jetson UEFI firmware\r\n\xff\xe2bpmp: \xff\xe1ok \xff"
    edges = [0, *sorted(cut for cut in cuts if cut < len(wire)), len(wire)]
    port = CombinedUart(Pieces(*(wire[a:b] for a, b in itertools.pairwise(edges) if a < b)))
    heard = b"".join(port.read() for _ in range(len(edges)))
    assert heard == b"SPE up\r\nJetson UEFI firmware\r\nbpmp: ok "


@pytest.mark.parametrize(
    "address", ["", "http://x:1", "socket://host", "socket://h:70000", "unix://relative", "tcp:///x"]
)
def test_addresses_that_lead_nowhere(address: str) -> None:
    with pytest.raises(UsageError, match="rfc2217://HOST:PORT"):
        parse_port(address)
    with pytest.raises(ValueError, match="port"):
        ConsoleWire(port=address)


@pytest.mark.parametrize("address", ["/dev/ttyUSB0", "socket://[::1]:5000", "rfc2217://ts1:4001", "unix:///run/c.sock"])
def test_addresses_that_a_bench_file_may_name(address: str) -> None:
    parse_port(ConsoleWire(port=address).port)


def test_a_baud_rate_that_no_tty_has(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="console of board vb1: this host has no baud rate 12345"):
        Console("vb1", "/dev/null", 12345, tmp_path, on_error=lambda error: None)


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def test_a_terminal_server_that_hangs_up_is_called_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        far = Echo(listener)
        address = f"socket://127.0.0.1:{listener.getsockname()[1]}"
        console = Console("vb1", address, 115200, tmp_path, on_error=lambda error: None)
        console.start()
        for text in (b"one", b"two"):
            await until(lambda: console.connected)
            before = console.ring.end
            await console.write(text)
            await until(lambda before=before: console.ring.end == before + 3)  # type: ignore[misc]
            far.hang_up()
            await until(lambda: not console.connected)
            assert console.reason == "the far end closed the connection"
        await console.stop()
        listener.close()
        assert (tmp_path / "vb1.log").read_bytes() == b"onetwo"

    asyncio.run(scenario())


def test_a_port_that_takes_nothing_is_an_error_and_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hil.bench.consoles.WRITE_S", 0.05)

    async def scenario() -> None:
        master, slave = os.openpty()
        tty.setraw(slave)
        console = Console("vb1", os.ttyname(slave), 115200, tmp_path, on_error=lambda error: None)
        console.start()
        await until(lambda: console.connected)
        with pytest.raises(BenchError, match="takes no bytes"):
            await console.write(b"x" * 200_000)
        await console.stop()
        os.close(master)
        os.close(slave)

    asyncio.run(scenario())


def test_a_port_that_talks_on_is_read_in_rounds_and_at_once_after_a_write() -> None:
    async def scenario() -> None:
        now, wakes, heard = [0.0], [0], bytearray()
        near, far = socket.socketpair()
        near.setblocking(False)

        class Counted:
            fileno, close = near.fileno, near.close

            def read(self) -> bytes:
                wakes[0] += 1
                try:
                    return near.recv(4096)
                except BlockingIOError:
                    return b""

            def write(self, data: bytes) -> int:
                return near.send(data)

        reader = PortReader(clock=lambda: now[0])
        watched = reader.add(Counted(), heard.extend, lambda error: None)

        async def chatter() -> None:
            for _ in range(200):
                far.send(b"abc")
                await asyncio.sleep(0)

        await chatter()
        await until(lambda: len(heard) == 600)
        assert wakes[0] < 50  # rounds of a millisecond, not one wake for each of the 200
        wakes[0] = 0
        reader.hurry(watched)
        await chatter()
        await until(lambda: len(heard) == 1200)
        assert wakes[0] > 90
        reader.remove(watched)
        near.close()
        far.close()

    asyncio.run(scenario())
