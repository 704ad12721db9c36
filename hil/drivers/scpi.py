"""SCPI supplies over TCP: a codec without I/O, an asyncio session with one owner, and a blocking way to switch off.

Rules that the reference's facts force on us: TCP_NODELAY (44 ms a query without it), one monotonic deadline an
exchange, end-of-file is not a timeout, and after any failed or cancelled exchange the connection is poisoned, because
the next read would return the previous answer. A poisoned session is closed, reopened, cleared, and its identity and
output states are read again before anything else happens. No write is repeated blindly, nothing is clamped, `*RST` is
never sent: other channels may feed other boards.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from hil.drivers.dialects import Capabilities, ChannelRange, Dialect, Operation, dialect
from hil.errors import BenchError, SafetyError, UsageError
from hil.model import Applied, Reading, Setpoint

MAX_REPLY_BYTES = 4096
MAX_ERRORS = 32


# --------------------------------------------------------------------------------------------------------- errors
class InstrumentError(BenchError):
    """Talking to an instrument failed; the message names the address."""


class InstrumentTimeout(InstrumentError):
    """No answer within the deadline. The session is poisoned."""


class InstrumentClosed(InstrumentError):
    """The instrument refused, reset or ended the connection."""


class ReplyError(InstrumentError):
    """An answer that makes no sense here: garbage, out of step, or in an unknown form."""


class InstrumentRefused(InstrumentError):
    """The instrument queued errors; `entries` holds all of them."""

    def __init__(self, message: str, entries: tuple[ErrorEntry, ...], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.entries = entries


class ReadbackError(SafetyError):
    """What was set did not come back: the instrument is not in the state that was asked for."""


# ---------------------------------------------------------------------------------------------------------- codec
@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """One entry of an instrument's error queue."""

    code: int
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


@dataclass(frozen=True, slots=True)
class Identity:
    """The four fields of `*IDN?`."""

    maker: str
    model: str
    serial: str
    firmware: str

    def __str__(self) -> str:
        return ",".join((self.maker, self.model, self.serial, self.firmware))


class LineDecoder:
    """Bytes in, complete reply lines out. Raises ReplyError when a line grows beyond any sensible answer."""

    def __init__(self, terminator: bytes = b"\n", limit: int = MAX_REPLY_BYTES) -> None:
        self._terminator = terminator
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[str]:
        self._buffer += data
        *lines, rest = self._buffer.split(self._terminator)
        self._buffer = bytearray(rest)
        if len(rest) > self._limit:
            raise ReplyError(f"a reply of more than {self._limit} bytes without an end")
        return [line.decode("latin-1").strip() for line in lines]

    @property
    def partial(self) -> bool:
        """True when bytes of an unfinished line are held."""
        return bool(self._buffer)


def parse_error_entry(reply: str) -> ErrorEntry | None:
    """None for "no error" in any of its four forms (`0,"No error"`, `+0,…`, `0 No Error`, `0  No Error`).

    An unknown form raises ReplyError: it must never count as "fine".
    """
    found = re.fullmatch(r'([+-]?\d+)(?:\s*,\s*|\s+)"?(.*?)"?', reply.strip())
    if not found:
        raise ReplyError(f"error queue entry in an unknown form: {reply!r}")
    code, text = int(found.group(1)), found.group(2)
    if code == 0:
        if not re.match(r"no error\b", text, re.IGNORECASE):
            raise ReplyError(f"error queue entry in an unknown form: {reply!r}")
        return None
    return ErrorEntry(code, text)


def parse_numbers(reply: str, count: int) -> tuple[float, ...]:
    """Exactly `count` finite, comma-separated numbers without units; ReplyError otherwise (9.9E37 means overload)."""
    try:
        values = tuple(float(part) for part in reply.split(","))
    except ValueError:
        raise ReplyError(f"expected {count} number(s), got {reply!r}") from None
    if len(values) != count or not all(math.isfinite(value) and abs(value) < 1e9 for value in values):
        raise ReplyError(f"expected {count} finite number(s), got {reply!r}")
    return values


def parse_switch(reply: str) -> bool:
    """ON, OFF, YES, NO, 1 or 0."""
    word = reply.strip().upper()
    if word in ("ON", "YES", "1"):
        return True
    if word in ("OFF", "NO", "0"):
        return False
    raise ReplyError(f"expected ON or OFF, got {reply!r}")


def parse_identity(reply: str) -> Identity:
    """The answer to `*IDN?`; ReplyError when it has not four fields."""
    fields = [part.strip() for part in reply.split(",")]
    if len(fields) != 4 or not fields[0] or not fields[1]:
        raise ReplyError(f"*IDN? answered {reply!r} instead of maker,model,serial,firmware")
    return Identity(*fields)


def parse_address(address: str) -> tuple[str, int]:
    """(host, port) of `tcp://HOST:PORT`, IPv6 hosts in brackets; UsageError otherwise."""
    parts = urlsplit(address)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme != "tcp" or not host or not port or parts.path not in ("", "/"):
        raise UsageError(f"supply address {address!r} is not understood", hint="write tcp://HOST:PORT")
    return host, port


# ------------------------------------------------------------------------------------------------------ transport
class Transport(Protocol):
    """A duplex line to one instrument. Deadlines are `time.monotonic()` values."""

    async def connect(self, deadline_s: float) -> None: ...

    def alive(self) -> bool:
        """False once the other end has gone."""
        ...

    def write(self, data: bytes) -> None: ...

    async def read_line(self, deadline_s: float) -> str: ...

    def unread(self) -> bool:
        """True when bytes are there that nobody asked for."""
        ...

    def close(self) -> None: ...


class _Line(asyncio.Protocol):
    """One connection. A new one is made for each reopening, so that late callbacks of the old one reach nobody."""

    def __init__(self, address: str, terminator: bytes) -> None:
        self.address = address
        self.decoder = LineDecoder(terminator)
        self.lines: deque[str] = deque()
        self.waiter: asyncio.Future[None] | None = None
        self.end: InstrumentError | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"a stream transport was expected, got {type(transport).__name__}")
        self.transport = transport
        _tune(transport.get_extra_info("socket"))

    def data_received(self, data: bytes) -> None:
        try:
            self.lines.extend(self.decoder.feed(data))
        except ReplyError as error:
            self.end = error
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = str(exc) if exc else "it ended the connection"
        self.end = self.end or InstrumentClosed(f"{self.address} is gone: {reason}")
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done() and (self.lines or self.end):
            self.waiter.set_result(None)


class TcpTransport:
    """A raw socket. Callbacks instead of asyncio streams: one task switch less an exchange."""

    def __init__(self, address: str, terminator: str = "\n") -> None:
        self.address = address
        self._host, self._port = parse_address(address)
        self._terminator = terminator.encode()
        self._line: _Line | None = None

    async def connect(self, deadline_s: float) -> None:
        self.close()
        line = _Line(self.address, self._terminator)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                await loop.create_connection(lambda: line, self._host, self._port)
        except TimeoutError:
            raise InstrumentTimeout(
                f"no connection to {self.address} in time", hint="is the instrument on, and its cable in?"
            ) from None
        except OSError as error:
            raise InstrumentClosed(
                f"cannot connect to {self.address}: {error.strerror or error}",
                hint="check that the instrument is on, its LAN interface enabled, and nobody else holds its one socket",
            ) from error
        self._line = line

    def alive(self) -> bool:
        return self._line is not None and self._line.end is None

    def write(self, data: bytes) -> None:
        line = self._living()
        if line.transport is not None:
            line.transport.write(data)

    async def read_line(self, deadline_s: float) -> str:
        line = self._line
        if line is None:
            raise InstrumentClosed(f"not connected to {self.address}")
        if not line.lines and line.end is None:
            loop = asyncio.get_running_loop()
            waiter = line.waiter = loop.create_future()
            timer = loop.call_later(max(0.0, deadline_s - time.monotonic()), _give_up, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                line.waiter = None
        if line.lines:
            return line.lines.popleft()
        if line.end is not None:
            raise line.end
        raise InstrumentTimeout(
            f"{self.address} did not answer in time", hint="is another client holding the instrument?"
        )

    def unread(self) -> bool:
        return self._line is not None and (bool(self._line.lines) or self._line.decoder.partial)

    def close(self) -> None:
        line, self._line = self._line, None
        if line is not None and line.transport is not None:
            line.transport.abort()

    def _living(self) -> _Line:
        if self._line is None:
            raise InstrumentClosed(f"not connected to {self.address}")
        if self._line.end is not None:
            raise self._line.end
        return self._line


def _give_up(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _tune(sock: socket.socket) -> None:
    """No Nagle delay; notice a vanished peer within some ten seconds even when nobody writes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --------------------------------------------------------------------------------------------------------- supply
@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found after the session had to be reopened. `changed` lists channels whose output is not as before."""

    time_s: float
    generation: int
    outputs: Mapping[int, bool]
    changed: tuple[int, ...]


class Supply(Protocol):
    """A programmable supply as the bench sees it. Channels are the instrument's own numbers, from 1."""

    @property
    def identity(self) -> Identity: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def recovery(self) -> Recovery | None: ...

    async def open(self) -> None: ...

    async def measure(self, ch: int) -> Reading: ...

    async def program(self, ch: int, setpoint: Setpoint, scheduled_s: float | None = None) -> Applied: ...

    async def setpoint(self, ch: int) -> Setpoint: ...

    async def program_protection(self, ch: int, ovp_v: float | None, ocp_a: float | None) -> None: ...

    async def output(self, ch: int, on: bool) -> Applied: ...

    async def output_state(self, ch: int) -> bool: ...

    async def regulation(self, ch: int) -> str: ...

    async def tripped(self, ch: int) -> tuple[str, ...]: ...

    async def clear_protection(self, ch: int) -> None: ...

    async def clear_status(self) -> None: ...

    async def errors(self) -> tuple[ErrorEntry, ...]: ...

    async def close(self) -> None: ...


class ScpiSupply:
    """One supply, one owner at a time. Every method may raise InstrumentError; the next call then reopens first.

    Requests beyond a channel's range are UsageErrors: nothing was sent. A value that does not read back within the
    channel's resolution is a ReadbackError (SafetyError).
    """

    def __init__(
        self,
        dialect_: Dialect | str,
        address: str,
        *,
        timeout_s: float = 1.0,
        transport: Transport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dialect = dialect(dialect_) if isinstance(dialect_, str) else dialect_
        self.address = address
        self._timeout_s = timeout_s
        self._transport = transport if transport is not None else TcpTransport(address, self.dialect.terminator)
        self._clock = clock
        self._lock = asyncio.Lock()
        self._poisoned = True
        self._opened = False
        self._closed = False
        self._identity: Identity | None = None
        self._capabilities: Capabilities | None = None
        self._outputs: dict[int, bool] = {}
        self._last_sent_s = -math.inf
        self._generation = 0
        self._recovery: Recovery | None = None

    # ------------------------------------------------------------------------------------------------ state
    @property
    def identity(self) -> Identity:
        if self._identity is None:
            raise UsageError(f"the supply at {self.address} is not open yet")
        return self._identity

    @property
    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            raise UsageError(f"the supply at {self.address} is not open yet")
        return self._capabilities

    @property
    def recovery(self) -> Recovery | None:
        """The last reopening, or None while the first session lives."""
        return self._recovery

    @property
    def known_outputs(self) -> Mapping[int, bool]:
        """Output states as last read from the instrument."""
        return dict(self._outputs)

    # ------------------------------------------------------------------------------------------- operations
    async def open(self) -> None:
        """Connect, clear the status, read identity and output states. Touches no output."""
        async with self._session():
            pass

    async def close(self) -> None:
        """Close the connection; outputs stay as they are. The supply cannot be used afterwards."""
        async with self._lock:
            self._closed = True
            self._poisoned = True
            self._transport.close()

    async def measure(self, ch: int) -> Reading:
        """Volts, amperes and watts at the terminals and the instrument's own word on its output."""
        async with self._session():
            self._range(ch)
            start = self._clock()
            volts, amperes, watts = parse_numbers(await self._ask("measure", ch), 3)
            taken = self._clock()
            on = parse_switch(await self._ask("get_output", ch))
            self._outputs[ch] = on
            return Reading((start + taken) / 2, volts, amperes, watts, on, self._clock() - start)

    async def program(self, ch: int, setpoint: Setpoint, scheduled_s: float | None = None) -> Applied:
        """Set voltage and current limit and read both back. The times in the result are this object's clock."""
        async with self._session():
            limits = self._range(ch)
            volts = _within("voltage", setpoint.voltage_v, 0.0, limits.voltage_max_v, limits.voltage_step_v, "V")
            amperes = _within(
                "current limit", setpoint.current_limit_a, 0.0, limits.current_max_a, limits.current_step_a, "A"
            )
            sent = self._clock()
            await self._tell("set_current", ch, a=amperes)
            await self._tell("set_voltage", ch, v=volts)
            read_v = parse_numbers(await self._ask("get_voltage", ch), 1)[0]
            acknowledged = self._clock()
            read_a = parse_numbers(await self._ask("get_current", ch), 1)[0]
            await self._agree(ch, "voltage", volts, read_v, limits.voltage_step_v, "V")
            await self._agree(ch, "current limit", amperes, read_a, limits.current_step_a, "A")
            return Applied(sent if scheduled_s is None else scheduled_s, sent, acknowledged, self._clock())

    async def setpoint(self, ch: int) -> Setpoint:
        """What the instrument is set to now."""
        async with self._session():
            self._range(ch)
            return Setpoint(
                parse_numbers(await self._ask("get_voltage", ch), 1)[0],
                parse_numbers(await self._ask("get_current", ch), 1)[0],
            )

    async def program_protection(self, ch: int, ovp_v: float | None, ocp_a: float | None) -> None:
        """Set and enable OVP and OCP, reading level and state back; None leaves one out."""
        async with self._session():
            limits = self._range(ch)
            v_step, a_step = limits.voltage_step_v, limits.current_step_a
            if ovp_v is not None:
                ovp_v = _within("ovp level", ovp_v, limits.ovp_min_v, limits.ovp_max_v, v_step, "V")
            if ocp_a is not None:
                ocp_a = _within("ocp level", ocp_a, limits.ocp_min_a, limits.ocp_max_a, a_step, "A")
            for name, level, step, unit in (("ovp", ovp_v, v_step, "V"), ("ocp", ocp_a, a_step, "A")):
                if level is not None:
                    await self._protect(ch, name, level, step, unit)
            await self._raise_errors(f"programming the protections of channel {ch}")

    async def output(self, ch: int, on: bool) -> Applied:
        """Switch and read back. Off means that the instrument says off; the measured voltage is the caller's check."""
        async with self._session():
            self._range(ch)
            sent = self._clock()
            await self._tell("set_output", ch, on=on)
            state = parse_switch(await self._ask("get_output", ch))
            acknowledged = self._clock()
            self._outputs[ch] = state
            if state != on:
                trips = await self._trips(ch)
                why = f" ({', '.join(trips)} tripped)" if trips else ""
                word = "on" if on else "off"
                raise ReadbackError(f"channel {ch} of {self.address} did not switch {word}{why}")
            return Applied(sent, sent, acknowledged, acknowledged)

    async def output_state(self, ch: int) -> bool:
        async with self._session():
            self._range(ch)
            self._outputs[ch] = parse_switch(await self._ask("get_output", ch))
            return self._outputs[ch]

    async def regulation(self, ch: int) -> str:
        """`CV`, `CC` or `UR` (unregulated)."""
        async with self._session():
            self._range(ch)
            word = (await self._ask("regulation", ch)).upper()
            if word not in ("CV", "CC", "UR"):
                raise ReplyError(f"expected CV, CC or UR, got {word!r}")
            return word

    async def tripped(self, ch: int) -> tuple[str, ...]:
        """The latched protections of a channel: any of `ovp`, `ocp`; empty when none."""
        async with self._session():
            self._range(ch)
            return await self._trips(ch)

    async def clear_protection(self, ch: int) -> None:
        """Clear latched trips, output off first: on many supplies the clear itself re-energises the board.

        Raises SafetyError when the output is on afterwards (it is switched off again before that).
        """
        async with self._session():
            self._range(ch)
            await self._tell("set_output", ch, on=False)
            if parse_switch(await self._ask("get_output", ch)):
                raise ReadbackError(f"channel {ch} of {self.address} did not switch off; its trip is left latched")
            clears: tuple[Operation, ...] = ("clear_ovp", "clear_ocp")
            for operation in clears:
                if self.dialect.has(operation):
                    await self._tell(operation, ch)
            self._outputs[ch] = parse_switch(await self._ask("get_output", ch))
            if self._outputs[ch]:
                await self._tell("set_output", ch, on=False)
                raise SafetyError(f"clearing the protection of channel {ch} of {self.address} switched its output on")
            if trips := await self._trips(ch):
                raise SafetyError(f"channel {ch} of {self.address} still reports {', '.join(trips)} after the clear")

    async def clear_status(self) -> None:
        """Empty the error queue and the status registers (`*CLS`)."""
        async with self._session():
            await self._tell("clear_status")

    async def errors(self) -> tuple[ErrorEntry, ...]:
        """Drain the error queue, oldest first; InstrumentError when it does not end after 32 entries."""
        async with self._session():
            return await self._drain()

    # -------------------------------------------------------------------------------------------- internals
    @contextlib.asynccontextmanager
    async def _session(self) -> AsyncIterator[None]:
        """Own the instrument for one operation; any failure or cancellation inside a dialogue poisons it."""
        async with self._lock:
            if self._closed:
                raise UsageError(f"the supply at {self.address} was closed")
            try:
                if self._poisoned or not self._transport.alive():
                    await self._reopen()
                yield
            except (UsageError, SafetyError, InstrumentRefused):
                raise  # the dialogue itself was in step
            except BaseException:
                self._poisoned = True
                self._transport.close()
                raise

    async def _reopen(self) -> None:
        await self._transport.connect(self._clock() + self._timeout_s)
        await self._tell("clear_status")
        identity = parse_identity(await self._ask("identify"))
        if self._identity is not None and identity != self._identity:
            raise SafetyError(
                f"another instrument answers at {self.address}: {identity} instead of {self._identity}",
                hint="check the cabling and addresses before going on",
            )
        capabilities = self.dialect.capabilities(str(identity))
        outputs = {}
        for ch in capabilities.channels:
            outputs[ch] = parse_switch(await self._ask("get_output", ch))
        before, self._outputs = self._outputs, outputs
        self._identity, self._capabilities, self._poisoned = identity, capabilities, False
        if self._opened:
            self._generation += 1
            changed = tuple(ch for ch, state in outputs.items() if before.get(ch, state) != state)
            self._recovery = Recovery(self._clock(), self._generation, outputs, changed)
        self._opened = True

    def _range(self, ch: int) -> ChannelRange:
        limits = self.capabilities.channels.get(ch)
        if limits is None:
            known = ", ".join(map(str, self.capabilities.channels))
            raise UsageError(f"{self.capabilities.model} at {self.address} has no channel {ch}", hint=f"it has {known}")
        return limits

    async def _gap(self) -> None:
        wait = self._last_sent_s + self.dialect.min_gap_s - self._clock()
        if self.dialect.min_gap_s > 0 and wait > 0:
            await asyncio.sleep(wait)

    async def _tell(
        self, operation: Operation, ch: int = 0, *, v: float = 0.0, a: float = 0.0, on: bool = False
    ) -> None:
        await self._gap()
        self._write(self.dialect.message(operation, ch, v, a, on))

    async def _ask(self, operation: Operation, ch: int = 0) -> str:
        await self._gap()
        if self._transport.unread():
            raise ReplyError(f"{self.address} sent something that nobody asked for; the dialogue is out of step")
        self._write(self.dialect.message(operation, ch))
        return await self._transport.read_line(self._clock() + self._timeout_s)

    def _write(self, text: str) -> None:
        self._last_sent_s = self._clock()
        self._transport.write((text + self.dialect.terminator).encode("ascii"))

    async def _protect(self, ch: int, name: str, level: float, step: float, unit: str) -> None:
        operations: dict[str, tuple[Operation, Operation, Operation, Operation]] = {
            "ovp": ("set_ovp_level", "set_ovp_state", "get_ovp_level", "get_ovp_state"),
            "ocp": ("set_ocp_level", "set_ocp_state", "get_ocp_level", "get_ocp_state"),
        }
        set_level, set_state, get_level, get_state = operations[name]
        await self._tell(set_level, ch, v=level, a=level)
        await self._tell(set_state, ch, on=True)
        await self._agree(ch, f"{name} level", level, parse_numbers(await self._ask(get_level, ch), 1)[0], step, unit)
        if not parse_switch(await self._ask(get_state, ch)):
            await self._raise_errors(f"enabling {name} of channel {ch}")
            raise ReadbackError(f"{name} of channel {ch} of {self.address} stays disabled")

    async def _agree(self, ch: int, what: str, wanted: float, read: float, step: float, unit: str) -> None:
        if abs(read - wanted) <= step * 0.5 + 1e-9:
            return
        entries = await self._drain()
        said = f"; it says: {'; '.join(map(str, entries))}" if entries else ""
        raise ReadbackError(
            f"channel {ch} of {self.address}: {what} was set to {wanted:g} {unit} but reads back {read:g} {unit}{said}"
        )

    async def _trips(self, ch: int) -> tuple[str, ...]:
        found = []
        questions: tuple[tuple[str, Operation], ...] = (("ovp", "ovp_tripped"), ("ocp", "ocp_tripped"))
        for name, operation in questions:
            if self.dialect.has(operation) and parse_switch(await self._ask(operation, ch)):
                found.append(name)
        return tuple(found)

    async def _drain(self) -> tuple[ErrorEntry, ...]:
        entries: list[ErrorEntry] = []
        for _ in range(MAX_ERRORS):
            entry = parse_error_entry(await self._ask("error"))
            if entry is None:
                return tuple(entries)
            entries.append(entry)
        raise InstrumentRefused(
            f"the error queue of {self.address} does not end: {'; '.join(map(str, entries[-3:]))}", tuple(entries)
        )

    async def _raise_errors(self, doing: str) -> None:
        entries = await self._drain()
        if entries:
            raise InstrumentRefused(f"{self.address} refused while {doing}: {'; '.join(map(str, entries))}", entries)


def _within(what: str, value: float, low: float, high: float, step: float, unit: str) -> float:
    """`value` on the channel's grid; UsageError when it is not a number or out of range. Never clamps."""
    if not math.isfinite(value):
        raise UsageError(f"{what} must be a finite number, got {value!r}")
    if not low - 1e-9 <= value <= high + 1e-9:
        raise UsageError(f"{what} {value:g} {unit} is outside {low:g} to {high:g} {unit}; nothing was sent")
    return round(round(value / step) * step, 9)


# ----------------------------------------------------------------------------------------------- blocking switch-off
@dataclass(frozen=True, slots=True)
class ForcedOff:
    """Outcome of `force_off`: last measured volts a channel (None: never answered), and how it went.

    `command_s` is when the off command last went out, `elapsed_s` when everything was verified or given up, both
    counted from the call.
    """

    off: bool
    voltages_v: Mapping[int, float | None]
    attempts: int
    command_s: float
    elapsed_s: float
    trouble: str = ""


def force_off(
    address: str,
    dialect_name: str,
    channels: Sequence[int],
    off_voltage_v: float,
    deadline_s: float,
    *,
    attempt_s: float = 0.5,
    clock: Callable[[], float] = time.monotonic,
) -> ForcedOff:
    """Switch channels off and verify measured volts below `off_voltage_v`, within `deadline_s` seconds from now.

    Blocking and without an event loop, for the dead-man. Off commands for all channels go out before anything is read,
    and again on each new connection: switching off twice is harmless. Never raises for a fault of the instrument.
    """
    speak = dialect(dialect_name)
    host, port = parse_address(address)
    start = clock()
    end = start + deadline_s
    pending = set(channels)
    volts: dict[int, float | None] = dict.fromkeys(channels)
    attempts, command_s, trouble = 0, 0.0, ""
    while pending and clock() < end:
        attempts += 1
        try:
            with socket.create_connection((host, port), timeout=max(0.05, min(attempt_s, end - clock()))) as sock:
                _tune(sock)
                for ch in channels:
                    _send_off(sock, speak, ch)
                command_s = clock() - start
                line = _BlockingLine(sock, speak.terminator.encode())
                while pending and clock() < end:
                    for ch in sorted(pending):
                        deadline = min(end, clock() + attempt_s)
                        on = parse_switch(line.ask(speak.message("get_output", ch), deadline, clock))
                        if on:
                            _send_off(sock, speak, ch)
                            command_s = clock() - start
                        volts[ch] = value = parse_numbers(line.ask(speak.message("measure", ch), deadline, clock), 3)[0]
                        if value < off_voltage_v and not on:  # a shorted output has no volts either
                            pending.discard(ch)
                    if pending:
                        time.sleep(0.01)
        except (OSError, InstrumentError) as error:
            trouble = str(error) or type(error).__name__
            time.sleep(min(0.02, max(0.0, end - clock())))
    still = [f"{volts[ch]} V on channel {ch}, not verified off" for ch in sorted(pending) if volts[ch] is not None]
    trouble = "; ".join(filter(None, [*still, trouble]))
    return ForcedOff(not pending, volts, attempts, command_s, clock() - start, trouble if pending else "")


def _send_off(sock: socket.socket, speak: Dialect, ch: int) -> None:
    sock.sendall((speak.message("set_output", ch, on=False) + speak.terminator).encode("ascii"))
    if speak.min_gap_s:
        time.sleep(speak.min_gap_s)


class _BlockingLine:
    """Question and answer on a blocking socket, each within a deadline."""

    def __init__(self, sock: socket.socket, terminator: bytes) -> None:
        self._sock = sock
        self._terminator = terminator
        self._decoder = LineDecoder(terminator)

    def ask(self, text: str, deadline_s: float, clock: Callable[[], float]) -> str:
        self._sock.sendall(text.encode("ascii") + self._terminator)
        while True:
            left = deadline_s - clock()
            if left <= 0:
                raise InstrumentTimeout("no answer in time")
            self._sock.settimeout(left)
            data = self._sock.recv(4096)
            if not data:
                raise InstrumentClosed("the instrument ended the connection")
            if lines := self._decoder.feed(data):
                return lines[0]
