"""The wire of a virtual supply: TCP on loopback, a serial port as a PTY, and a control socket for who tests with it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import os
import re
import signal
import socket
import termios
import time
import tty
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hil.errors import BenchError, UsageError
from hil.virtual.supply.instrument import FAULT_KINDS, Fault, Instrument
from hil.virtual.supply.loads import DEFAULT_LOAD_LABEL, Load, default_loads
from hil.virtual.supply.models import supply_model

TICK_S = 0.010
MAX_MESSAGE_BYTES = 4096
SILENCE_S = 0.010  # ends a command where the maker has no terminator: ten characters at 9600 baud


class _Wire(Protocol):
    """Where answers go: a TCP transport or a PTY."""

    def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...


class Session:
    """One client's dialogue: cuts bytes into commands, applies faults, sends answers in order. No I/O of its own."""

    def __init__(self, supply: VirtualSupply, wire: _Wire) -> None:
        self._supply = supply
        self._wire: _Wire | None = wire
        self._buffer = bytearray()
        self._skipping = False
        self._deaf = False
        self._held: str | None = None
        self._busy_until_s = 0.0
        self._silence: asyncio.TimerHandle | None = None
        self.heard_s = time.monotonic()

    def feed(self, data: bytes) -> None:
        """Bytes from the client."""
        self.heard_s = time.monotonic()
        if self._deaf:
            return
        self._buffer += data
        if not self._supply.instrument.model.command_end:
            self._feed_unterminated()
            return
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if self._skipping:  # the end of a message that was already given up
                self._skipping = False
                continue
            if len(line) > MAX_MESSAGE_BYTES:
                self._supply.instrument.push_error(-223, "Too much data")
                continue
            self._message(line.decode("latin-1").strip())
            if self._deaf or self._wire is None:
                return
        if len(self._buffer) > MAX_MESSAGE_BYTES:
            self._buffer.clear()
            if not self._skipping:
                self._supply.instrument.push_error(-223, "Too much data")
            self._skipping = True

    def _feed_unterminated(self) -> None:
        """A command ends with its own last character where it has one (`?`), else when the line falls silent."""
        if self._silence is not None:
            self._silence.cancel()
        while (end := self._buffer.find(b"?")) >= 0:
            self._take(end + 1)
        if len(self._buffer) > MAX_MESSAGE_BYTES:
            self._buffer.clear()
        if self._buffer:
            self._silence = asyncio.get_running_loop().call_later(SILENCE_S, self._take, None)

    def _take(self, end: int | None) -> None:
        data = bytes(self._buffer[:end])
        del self._buffer[: len(data)]
        # What was sent without a pause still is one command after another: each starts with letters or `*`.
        for text in re.findall(r"\*?[A-Z]+[^A-Z*]*", data.decode("latin-1")[:MAX_MESSAGE_BYTES]):
            self._message(text.strip())

    def _message(self, text: str) -> None:
        if not text or self._deaf:
            return
        box = self._supply.instrument
        fault = box.take_fault(text)
        kind = fault.kind if fault else None
        if kind == "drop":
            self.abort()
            return
        if kind == "half_open":
            self._deaf = True
            return
        if kind in ("refuse", "ignore"):
            if kind == "refuse":
                box.push_error(-221, "Settings conflict")
            return
        answer = box.execute(text)
        if kind == "overflow":
            box.overflow()
        elif kind == "trip":
            for number in box.channels:
                box.trip(number)
        if fault and kind == "garbage":
            answer = fault.text
        if answer is None or kind == "silent":
            return
        if kind == "swapped" and self._held is None:
            self._held = answer
            return
        self._answer(answer, fault.delay_s if fault and kind == "late" else 0.0)
        if kind == "duplicate":
            self._answer(answer, 0.0)

    def _answer(self, answer: str, late_s: float) -> None:
        """Send in order after the instrument's own time; an answer that a fault makes late is overtaken by others."""
        loop = asyncio.get_running_loop()
        own_s = self._supply.instrument.reply_delay_s + self._supply.latency_s
        if own_s > 0.0:
            self._busy_until_s = max(loop.time(), self._busy_until_s) + own_s
            loop.call_at(self._busy_until_s + late_s, self.send, answer)
        elif late_s > 0.0:
            loop.call_later(late_s, self.send, answer)
        else:
            self.send(answer)

    def send(self, answer: str) -> None:
        """Write an answer, and after it the one that was held back to be swapped with it."""
        if self._wire is None:
            return
        end = self._supply.instrument.model.reply_end
        self._wire.write(answer.encode("latin-1") + end)
        held, self._held = self._held, None
        if held is not None:
            self._wire.write(held.encode("latin-1") + end)

    def abort(self) -> None:
        """Reset the connection, as a pulled plug on the far side of a firewall would look at best."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort()

    def closed(self) -> None:
        """The client is gone."""
        self._wire = None
        if self._silence is not None:
            self._silence.cancel()


class _Connection(asyncio.Protocol):
    def __init__(self, supply: VirtualSupply) -> None:
        self._supply = supply
        self._session: Session | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"a stream transport was expected, got {type(transport).__name__}")
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._session = Session(self._supply, transport)
        self._supply.sessions.add(self._session)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._session is not None:
            self._supply.sessions.discard(self._session)
            self._session.closed()

    def data_received(self, data: bytes) -> None:
        if self._session is not None:
            self._session.feed(data)


class SerialPort:
    """A PTY that a serial client opens as it would a USB adapter; one session for as long as the supply runs."""

    def __init__(self, supply: VirtualSupply, link: Path | None = None) -> None:
        self._supply = supply
        self._link = link
        # The slave stays open here too: else the master would report a hang-up whenever no client is attached.
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.fchmod(self._slave, 0o600)
        os.set_blocking(self._master, False)
        self.path = os.ttyname(self._slave)
        if link is not None:
            link.unlink(missing_ok=True)
            link.symlink_to(self.path)
            self.path = os.fspath(link)
        self._session = Session(supply, self)
        asyncio.get_running_loop().add_reader(self._master, self._readable)

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            self._session.feed(os.read(self._master, 65536))

    def write(self, data: bytes) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # nobody reads: a serial line loses what it cannot hold
            os.write(self._master, data)

    def abort(self) -> None:
        """A serial line has no connection to reset: what was on the way is lost."""
        with contextlib.suppress(termios.error):
            termios.tcflush(self._slave, termios.TCIOFLUSH)
        self._session = Session(self._supply, self)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._master)
        self._session.closed()
        os.close(self._master)
        os.close(self._slave)
        if self._link is not None:
            self._link.unlink(missing_ok=True)


class VirtualSupply:
    """The server. `start` binds, `stop` cuts every load; between them a 10 ms tick lets time pass.

    `faults` belongs to tests in the same process; tests in another use the control socket (`start_control`). Nothing
    on the instrument's own wire reaches either.
    """

    def __init__(
        self,
        model: str = "rigol-dp800",
        loads: Mapping[int, Load] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.instrument = Instrument(supply_model(model), loads or {}, clock)
        self.sessions: set[Session] = set()
        self.port = 0
        self.latency_s = 0.0  # of every answer, beside the maker's own; for tests
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._serial: SerialPort | None = None
        self._control: asyncio.Server | None = None
        self._control_path: Path | None = None

    @property
    def faults(self) -> list[Fault]:
        return self.instrument.faults

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen on a loopback address; port 0 takes a free one (see `port`). BenchError when the port is taken."""
        _require_loopback(host)
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _Connection(self), host, port)
        except OSError as error:
            raise BenchError(
                f"the virtual supply cannot listen on {host}:{port}: {error.strerror or error}",
                hint="another supply may be running there; stop it or choose another port",
            ) from error
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._run()

    async def start_serial(self, link: Path | None = None) -> str:
        """Listen on a PTY, with `link` as its name where given; returns the path that a serial client opens."""
        self._serial = SerialPort(self, link)
        self._run()
        return self._serial.path

    async def start_control(self, path: Path) -> None:
        """Listen on a unix socket for JSON lines that put faults in and ask for the truth; see `control`."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240  a socket file, once
        try:
            self._control = await asyncio.start_unix_server(self._controlled, path)
        except OSError as error:
            raise BenchError(f"the virtual supply cannot listen on {path}: {error.strerror or error}") from error
        path.chmod(0o600)  # noqa: ASYNC240
        self._control_path = path

    async def stop(self) -> None:
        """Switch every output off, drop the clients and close the port. Safe to call twice."""
        now = self.instrument.clock()
        for channel in self.instrument.channels.values():
            channel.switch(False, now)
            if channel.load_powered and channel.load is not None:  # its capacitors are no reason to wait
                channel.load.set_powered(False)
                channel.load_powered = False
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
            self._ticker = None
        self.drop_connections()
        if self._serial is not None:
            self._serial.close()
            self._serial = None
        for server in (self._server, self._control):
            if server is not None:
                server.close()
                await server.wait_closed()
        self._server = self._control = None
        if self._control_path is not None:
            self._control_path.unlink(missing_ok=True)
            self._control_path = None

    def drop_connections(self) -> None:
        """Reset every client, as a power cycle of the network switch would."""
        for session in tuple(self.sessions):
            session.abort()

    def _run(self) -> None:
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick(), name="virtual-supply-tick")

    async def _tick(self) -> None:
        while True:
            self.instrument.tick()
            idle_s = self.instrument.idle_timeout_s
            if idle_s > 0.0:
                for session in [s for s in self.sessions if time.monotonic() - s.heard_s > idle_s]:
                    session.abort()
            await asyncio.sleep(TICK_S)

    # --- the control socket ------------------------------------------------------------------------------------------
    async def _controlled(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                try:
                    answer = self.control(json.loads(line))
                except (UsageError, ValueError, TypeError, KeyError, re.error) as error:
                    answer = {"error": str(error)}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):  # gone, or a line without end
            pass
        finally:
            writer.close()

    def control(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One request of the control socket, `{"do": …}`; every answer holds the state that follows.

        state: what is at the terminals. fault: put one in, with the fields of `Fault`. heal: take all out. latency:
        every answer takes `delay_s` longer. trip: `channel` and `kind`. drop: reset every connection. power_cycle: the
        mains switch.
        """
        action = request.get("do", "state")
        box = self.instrument
        if action == "fault":
            fields = {key: value for key, value in request.items() if key != "do"}
            if fields.get("kind") not in FAULT_KINDS:
                raise UsageError(f"no fault {fields.get('kind')!r}", hint=f"faults are {', '.join(FAULT_KINDS)}")
            fault = Fault(**fields)
            re.compile(fault.match)
            self.faults.append(fault)
        elif action == "heal":
            self.faults.clear()
            self.latency_s = 0.0
        elif action == "latency":
            self.latency_s = max(0.0, float(request["delay_s"]))
        elif action == "trip":
            box.trip(int(request["channel"]), str(request.get("kind", "ovp")))
        elif action == "drop":
            self.drop_connections()
        elif action == "power_cycle":
            box.power_cycle()
            self.drop_connections()
        elif action != "state":
            raise UsageError(f"the control socket cannot {action!r}")
        return {**box.state(), "faults": [dataclasses.asdict(fault) for fault in self.faults if fault.count]}

    async def __aenter__(self) -> VirtualSupply:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


async def serve_supply(
    model: str,
    host: str,
    port: int,
    loads: Mapping[int, Load],
    *,
    ready: Callable[[VirtualSupply], None] | None = None,
    serial: Callable[[str], None] | None = None,
    control: Path | None = None,
) -> None:
    """Serve until cancelled, then cut the loads. `ready` is called once the port is bound; `serial`, where given, asks
    for a PTY as well and is called with its path."""
    supply = VirtualSupply(model, loads)
    try:
        await supply.start(host, port)
        if control is not None:
            await supply.start_control(control)
        if ready is not None:
            ready(supply)
        if serial is not None:
            serial(await supply.start_serial())
        await asyncio.Event().wait()
    finally:
        await supply.stop()


def run_supply(
    model: str,
    port: int,
    *,
    loads: Mapping[int, Load] | None = None,
    serial: bool = False,
    control: Path | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve one supply on 127.0.0.1 until interrupted; without `loads` a modelled board hangs on channel 1."""

    def ready(supply: VirtualSupply) -> None:
        announce(f"{supply.instrument.model.identity} on tcp://127.0.0.1:{supply.port}")
        if loads is None:
            announce(f"channel 1 carries a {DEFAULT_LOAD_LABEL}")

    async def serve() -> None:
        task = asyncio.current_task()
        if task is not None:  # a supervisor's SIGTERM ends it as Ctrl-C does: loads cut, sockets removed
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        chosen = default_loads() if loads is None else loads
        await serve_supply(model, "127.0.0.1", port, chosen, ready=ready, serial=pty_path, control=control)

    pty_path = (lambda path: announce(f"serial port {path}")) if serial else None
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(serve())


def _require_loopback(host: str) -> None:
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise UsageError(f"a virtual supply listens on loopback only, not on {host}", hint="use 127.0.0.1")
