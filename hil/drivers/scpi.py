"""Programmable supplies: one session with one owner, whatever the dialect.

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
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from hil.drivers.codec import (
    ErrorEntry,
    Identity,
    InstrumentClosed,
    InstrumentError,
    InstrumentRefused,
    InstrumentTimeout,
    ReadbackError,
    ReplyError,
)
from hil.drivers.dialects import Capabilities, ChannelRange, Dialect, dialect
from hil.drivers.dialogue import PROTECTIONS, Dialogue, Pause, Protection, Steps, T
from hil.drivers.transport import (
    Transport,
    parse_address,
    parse_any_address,
    transport_for,
)
from hil.errors import SafetyError, UsageError
from hil.model import Applied, Reading, Setpoint

__all__ = [
    "Dip",
    "ErrorEntry",
    "Identity",
    "InstrumentClosed",
    "InstrumentError",
    "InstrumentRefused",
    "InstrumentTimeout",
    "ReadbackError",
    "Reading",
    "Recovery",
    "ReplyError",
    "ScpiSupply",
    "Supply",
    "parse_address",
]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found after the session had to be reopened. `changed` lists channels whose output is not as before."""

    time_s: float
    generation: int
    outputs: Mapping[int, bool]
    changed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dip:
    """A dip of one channel as it was played: begun at `began_s` of the driver's clock, when the command was out.

    `lasted_s`: `by_list` the dwell as the instrument reads it back, else between two writes. `output_on` is what the
    instrument says afterwards, `trips` what switched it off.
    """

    began_s: float
    lasted_s: float
    by_list: bool
    output_on: bool
    trips: tuple[str, ...]


class Supply(Protocol):
    """A programmable supply as the bench sees it. Channels are the instrument's own numbers, from 1.

    What a model cannot do is in its `capabilities`; asking for it all the same is a UsageError before anything is sent.
    """

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

    async def dip(self, dips: Mapping[int, tuple[float, float]], seconds: float) -> dict[int, Dip]: ...

    async def stop_list(self, ch: int) -> None: ...

    async def program_protection(self, ch: int, ovp_v: float | None, ocp_a: float | None) -> None: ...

    async def output(self, ch: int, on: bool) -> Applied: ...

    async def output_state(self, ch: int) -> bool: ...

    async def regulation(self, ch: int) -> str: ...

    async def tripped(self, ch: int) -> tuple[str, ...]: ...

    async def clear_protection(self, ch: int) -> None: ...

    async def arm_watchdog(self, delay_s: float) -> None: ...

    async def disarm_watchdog(self) -> None: ...

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
        self._serial = parse_any_address(address).kind == "serial"
        self._transport = transport or transport_for(address, self.dialect.terminator, self.dialect.baud)
        self._clock = clock
        self._talk = Dialogue(self.dialect)
        self._terminator = self.dialect.terminator
        self._gap_s = self.dialect.min_gap_s
        self._turn = _Turn(self)
        self._lock = asyncio.Lock()
        self._poisoned = True
        self._opened = False
        self._closed = False
        self._identity: Identity | None = None
        self._capabilities: Capabilities | None = None
        self._outputs: dict[int, bool] = {}
        self._latched: dict[int, set[str]] = {}
        self._ceiling_a: dict[int, float] = {}
        self._watchdog_s: float | None = None
        self._last_s = -math.inf
        self._stray = 0
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

    @property
    def watchdog_s(self) -> float | None:
        """The delay that the instrument's watchdog is armed with, or None."""
        return self._watchdog_s

    # ------------------------------------------------------------------------------------------- operations
    async def open(self) -> None:
        """Connect, clear the status, read identity and output states. Touches no output."""
        async with self._turn:
            pass

    async def close(self) -> None:
        """Close the connection; outputs stay as they are. The supply cannot be used afterwards."""
        async with self._lock:
            self._closed = True
            if not self._poisoned and self._transport.alive() and self.dialect.has("release_remote"):
                with contextlib.suppress(InstrumentError):  # the connection goes anyway
                    await self._run(self._talk.tell("release_remote"))
            self._poisoned = True
            self._transport.close()

    async def measure(self, ch: int) -> Reading:
        """Volts, amperes and watts at the terminals and the instrument's own word on its output."""
        async with self._turn:
            self._range(ch)
            start = self._clock()
            volts, amperes, watts = await self._run(self._talk.measured(ch))
            taken = self._clock()
            on = self._outputs[ch] = await self._run(self._talk.output_on(ch))
            return Reading((start + taken) / 2, volts, amperes, watts, on, self._clock() - start)

    async def program(self, ch: int, setpoint: Setpoint, scheduled_s: float | None = None) -> Applied:
        """Set voltage and current limit and read both back. The times in the result are this object's clock."""
        async with self._turn:
            limits = self._range(ch)
            volts = self._on_grid(ch, setpoint.voltage_v)
            amperes = _within(
                "current limit", setpoint.current_limit_a, 0.0, limits.current_max_a, limits.current_step_a, "A"
            )
            self._below_ceiling(ch, amperes)
            talk, sent = self._talk, self._clock()
            await self._run(talk.tell("set_current", ch, a=amperes))
            await self._run(talk.tell("set_voltage", ch, v=volts))
            read_v = await self._run(talk.value("get_voltage", ch))
            acknowledged = self._clock()
            read_a = await self._run(talk.value("get_current", ch))
            await self._agree(ch, "voltage", volts, read_v, limits.voltage_step_v, "V")
            await self._agree(ch, "current limit", amperes, read_a, limits.current_step_a, "A")
            return Applied(sent if scheduled_s is None else scheduled_s, sent, acknowledged, self._clock())

    async def setpoint(self, ch: int) -> Setpoint:
        """What the instrument is set to now."""
        async with self._turn:
            self._range(ch)
            return Setpoint(
                await self._run(self._talk.value("get_voltage", ch)),
                await self._run(self._talk.value("get_current", ch)),
            )

    async def dip(self, dips: Mapping[int, tuple[float, float]], seconds: float) -> dict[int, Dip]:
        """Other voltages for `seconds` and the old ones again, as one turn: `dips` are channels with volts (low, back).

        What a channel goes back to must be what is set now. By the instrument's own lists where the model has one that
        can be read back before it is started, else by two writes a channel with nothing asked in between; several
        channels begin one write apart. What is set afterwards is read back. After any error a list may still run or be
        armed: `stop_list` ends it.
        """
        async with self._turn:
            steps_v = {ch: self._range(ch).voltage_step_v for ch in dips}
            dips = {ch: (self._on_grid(ch, low_v), self._on_grid(ch, back_v)) for ch, (low_v, back_v) in dips.items()}
            lists = self.capabilities.lists
            by_list = lists is not None and lists.plays(seconds)
            if by_list:
                played = await self._dip_by_lists(dips, seconds)
            else:
                played = await self._run(self._talk.dip(dips, seconds, self._clock))
            found = {}
            for ch, (began_s, lasted_s, read_v) in played.items():
                low_v, back_v = dips[ch]
                await self._agree(ch, "voltage", back_v, read_v, steps_v[ch], "V")
                await self._raise_errors(f"dipping channel {ch} to {low_v:g} V")
                on = await self._read_output(ch)
                found[ch] = Dip(began_s, lasted_s, by_list, on, () if on else await self._trips(ch))
            return found

    async def stop_list(self, ch: int) -> None:
        """End the instrument's list, running or not, and verify that the voltage follows its set point again."""
        async with self._turn:
            self._range(ch)
            if self.dialect.has("load_list"):
                await self._stop_list(ch)

    async def program_protection(
        self,
        ch: int,
        ovp_v: float | None,
        ocp_a: float | None,
        *,
        opp_w: float | None = None,
        ocp_delay_s: float | None = None,
    ) -> None:
        """Set and enable OVP, OCP and over-power protection, reading level and state back; None leaves one out.

        Where over-current protection acts at the current limit (`ocp_follows_limit`), `ocp_a` becomes the highest limit
        that `program` accepts. UsageError, with nothing sent, for a protection that the model has not.
        """
        async with self._turn:
            limits, can = self._range(ch), self.capabilities
            wanted: list[tuple[Protection, float, float, str]] = []
            if ovp_v is not None:
                self._need(can.ovp, "over-voltage protection over remote")
                level = _within("ovp level", ovp_v, limits.ovp_min_v, limits.ovp_max_v, limits.voltage_step_v, "V")
                wanted.append(("ovp", level, limits.voltage_step_v, "V"))
            if ocp_a is not None:
                self._need(can.ocp, "over-current protection over remote")
                level = _within("ocp level", ocp_a, limits.ocp_min_a, limits.ocp_max_a, limits.current_step_a, "A")
                wanted.append(("ocp", level, limits.current_step_a, "A"))
            if opp_w is not None:
                self._need(can.opp, "over-power protection over remote")
                wanted.append(("opp", _within("opp level", opp_w, 0.0, math.inf, 0.1, "W"), 0.1, "W"))
            if ocp_delay_s is not None:
                self._need(can.ocp_delay, "over-current delay that can be set")
            for name, level, step, unit in wanted:
                await self._protect(ch, name, level, step, unit)
            if ocp_delay_s is not None:
                read_s = await self._run(self._talk.delay_ocp(ch, ocp_delay_s))
                await self._agree(ch, "ocp delay", ocp_delay_s, read_s, 0.002, "s")
            await self._raise_errors(f"programming the protections of channel {ch}")

    async def output(self, ch: int, on: bool) -> Applied:
        """Switch and read back. Off means that the instrument says off; the measured voltage is the caller's check."""
        async with self._turn:
            self._range(ch)
            sent = self._clock()
            steps = self._talk.switch_on(ch, tuple(self.capabilities.channels)) if on else self._talk.switch_off(ch)
            await self._run(steps)
            state = await self._settled(lambda: self._talk.output_on(ch), on)
            acknowledged = self._clock()
            self._outputs[ch] = state
            if state != on:
                trips = await self._trips(ch)
                why = f" ({', '.join(trips)} tripped)" if trips else ""
                word = "on" if on else "off"
                raise ReadbackError(f"channel {ch} of {self.address} did not switch {word}{why}")
            return Applied(sent, sent, acknowledged, acknowledged)

    async def output_state(self, ch: int) -> bool:
        """The instrument's own word on its output."""
        async with self._turn:
            self._range(ch)
            self._outputs[ch] = await self._run(self._talk.output_on(ch))
            return self._outputs[ch]

    async def regulation(self, ch: int) -> str:
        """`CV`, `CC`, `UR` (unregulated), or `unknown` where the instrument does not say."""
        async with self._turn:
            self._range(ch)
            return await self._run(self._talk.regulation(ch))

    async def tripped(self, ch: int) -> tuple[str, ...]:
        """The latched protections of a channel: any of `ovp`, `ocp`, `opp`, `watchdog`; empty when none."""
        async with self._turn:
            self._range(ch)
            return await self._trips(ch)

    async def clear_protection(self, ch: int) -> None:
        """Clear latched trips, output off first: on many supplies the clear itself re-energises the board.

        Where one clear is for all channels, other tripped channels are switched off first too. Where the clear always
        switches on, the set voltage is zero meanwhile. Raises SafetyError when the output is on afterwards (it is
        switched off again before that).
        """
        async with self._turn:
            limits = self._range(ch)
            enables = "clear_enables_output" in self.dialect.quirks
            await self._off_before_clear(ch)
            if "global_clear" in self.dialect.quirks:
                for other in self.capabilities.channels:
                    if other != ch and await self._trips(other):
                        await self._off_before_clear(other)
            set_v = 0.0
            if enables:
                set_v = await self._run(self._talk.value("get_voltage", ch))
                await self._set_voltage(ch, 0.0, limits.voltage_step_v)
            await self._run(self._talk.clear(ch))
            if await self._read_output(ch):
                await self._run(self._talk.switch_off(ch))
                if not enables:
                    raise SafetyError(f"clearing the protection of channel {ch} of {self.address} switched it on")
                if await self._read_output(ch):
                    raise ReadbackError(f"channel {ch} of {self.address} did not switch off after its clear")
            if enables:
                await self._set_voltage(ch, set_v, limits.voltage_step_v)
            self._latched.pop(ch, None)
            if trips := [name for name in await self._trips(ch) if self._talk.can_clear(name)]:
                raise SafetyError(f"channel {ch} of {self.address} still reports {', '.join(trips)} after the clear")

    async def arm_watchdog(self, delay_s: float) -> None:
        """Let the instrument cut all outputs when nobody has talked to it for `delay_s` seconds; read back.

        Any message on any interface feeds it, a polling dashboard too. It is armed again after a reopening.
        """
        async with self._turn:
            span = self.capabilities.watchdog
            if span is None:
                self._need(False, "output watchdog")
                return
            delay_s = _within("watchdog delay", delay_s, span.delay_min_s, span.delay_max_s, 1.0, "s")
            await self._arm(delay_s)
            self._watchdog_s = delay_s

    async def disarm_watchdog(self) -> None:
        """Switch the instrument's watchdog off and read that back."""
        async with self._turn:
            self._need(self.capabilities.watchdog is not None, "output watchdog")
            await self._run(self._talk.tell("set_watchdog", on=False))
            if await self._run(self._talk.flag("get_watchdog")):
                raise ReadbackError(f"the watchdog of {self.address} stays armed")
            self._watchdog_s = None

    async def clear_status(self) -> None:
        """Empty the error queue and the status registers (`*CLS`), where there are any."""
        async with self._turn:
            if self.dialect.has("clear_status"):
                await self._run(self._talk.tell("clear_status"))

    async def errors(self) -> tuple[ErrorEntry, ...]:
        """Drain the error queue, oldest first; InstrumentRefused when it does not end after 32 entries."""
        async with self._turn:
            return await self._drain()

    async def converse(self, steps: Steps[T]) -> T:
        """Run a dialogue of another module (a solar array's, say) as one turn of this session."""
        async with self._turn:
            return await self._run(steps)

    # -------------------------------------------------------------------------------------------- session
    @property
    def in_step(self) -> bool:
        """True when the next reply will answer the next question."""
        return not self._poisoned and self._transport.alive()

    async def begin(self) -> None:
        """Bring the session in step; for `_Turn` only, which holds the lock."""
        if self._closed:
            raise UsageError(f"the supply at {self.address} was closed")
        await self._reopen()

    def poison(self) -> None:
        """The dialogue is out of step: what comes next may answer an earlier question."""
        self._poisoned = True
        self._transport.close()

    async def _reopen(self) -> None:
        await self._transport.connect(self._clock() + self._timeout_s)
        self._stray = 0
        identity = await self._run(self._talk.identify())
        if self._identity is not None and identity != self._identity:
            raise SafetyError(
                f"another instrument answers at {self.address}: {identity} instead of {self._identity}",
                hint="check the cabling and addresses before going on",
            )
        capabilities = self.dialect.capabilities(str(identity))
        await self._run(self._talk.take_remote(self._serial))
        await self._run(self._talk.check_independent())
        capabilities = await self._run(self._talk.limits(capabilities))
        outputs = {}
        for ch in capabilities.channels:
            outputs[ch] = await self._run(self._talk.output_on(ch))
        if self._watchdog_s is not None:
            await self._arm(self._watchdog_s)  # it does not survive everything that makes us reopen
        before, self._outputs = self._outputs, outputs
        self._identity, self._capabilities, self._poisoned = identity, capabilities, False
        if self._opened:
            self._generation += 1
            changed = tuple(ch for ch, state in outputs.items() if before.get(ch, state) != state)
            self._recovery = Recovery(self._clock(), self._generation, outputs, changed)
        self._opened = True

    async def _run(self, steps: Steps[T]) -> T:
        """Say what a dialogue says, and give it the answers."""
        transport = self._transport
        try:
            step = next(steps)
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = steps.send("")
                    continue
                if self._gap_s:
                    await self._gap()
                if self._stray:
                    transport.drop(self._stray)
                    self._stray = 0
                if step.frame is not None and transport.unread():
                    raise ReplyError(f"{self.address} sent what nobody asked for; the dialogue is out of step")
                transport.write((step.text + self._terminator).encode("latin-1"))
                reply = ""
                if step.frame is not None:
                    reply = await transport.read(self._clock() + self._timeout_s, step.frame)
                    self._stray = step.stray
                if self._gap_s:
                    self._last_s = self._clock()
                step = steps.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result

    async def _gap(self) -> None:
        wait = self._last_s + self._gap_s - self._clock()
        if wait > 0:
            await asyncio.sleep(wait)

    # ------------------------------------------------------------------------------------------- internals
    def _range(self, ch: int) -> ChannelRange:
        limits = self.capabilities.channels.get(ch)
        if limits is None:
            known = ", ".join(map(str, self.capabilities.channels))
            raise UsageError(f"{self.capabilities.model} at {self.address} has no channel {ch}", hint=f"it has {known}")
        return limits

    def _need(self, present: bool, what: str) -> None:
        if not present:
            raise UsageError(f"{self.capabilities.model} at {self.address} has no {what}; nothing was sent")

    def _below_ceiling(self, ch: int, amperes: float) -> None:
        ceiling = self._ceiling_a.get(ch)
        if ceiling is not None and amperes > ceiling + 1e-9:
            raise UsageError(
                f"current limit {amperes:g} A is above the over-current level {ceiling:g} A of channel {ch}, and this "
                "supply trips at its current limit; nothing was sent"
            )

    def _on_grid(self, ch: int, volts: float) -> float:
        limits = self._range(ch)
        return _within("voltage", volts, 0.0, limits.voltage_max_v, limits.voltage_step_v, "V")

    async def _read_output(self, ch: int) -> bool:
        self._outputs[ch] = await self._run(self._talk.output_on(ch))
        return self._outputs[ch]

    async def _settled(self, ask: Callable[[], Steps[bool]], wanted: bool) -> bool:
        """Ask until the answer is as wanted, for as long as this dialect may take to carry out a setting."""
        end = self._clock() + self.dialect.settle_s
        while True:
            state = await self._run(ask())
            if state == wanted or self._clock() >= end:
                return state

    async def _set_voltage(self, ch: int, volts: float, step_v: float) -> None:
        await self._run(self._talk.tell("set_voltage", ch, v=volts))
        await self._agree(ch, "voltage", volts, await self._run(self._talk.value("get_voltage", ch)), step_v, "V")

    async def _off_before_clear(self, ch: int) -> None:
        await self._run(self._talk.switch_off(ch))
        self._outputs[ch] = await self._settled(lambda: self._talk.output_on(ch), False)
        if self._outputs[ch]:
            raise ReadbackError(f"channel {ch} of {self.address} did not switch off; its trip is left latched")

    async def _arm(self, delay_s: float) -> None:
        talk = self._talk
        await self._run(talk.tell("set_watchdog_delay", t=delay_s))
        await self._run(talk.tell("set_watchdog", on=True))
        read_s = await self._run(talk.value("get_watchdog_delay"))
        armed = await self._run(talk.flag("get_watchdog"))
        if not armed or abs(read_s - delay_s) > 0.5:
            state = f"armed with {read_s:g} s" if armed else "not armed"
            raise ReadbackError(f"the watchdog of {self.address} was armed with {delay_s:g} s and reads back {state}")

    async def _dip_by_lists(
        self, dips: Mapping[int, tuple[float, float]], seconds: float
    ) -> dict[int, tuple[float, float, float]]:
        """By channel: when it was started, seconds as the instrument reads its dwell back, the set point afterwards."""
        talk, dwells_s = self._talk, {}
        for ch, (low_v, back_v) in dips.items():
            step_v = self._range(ch).voltage_step_v
            await self._agree(ch, "voltage", back_v, await self._run(talk.value("get_voltage", ch)), step_v, "V")
            loaded = await self._run(talk.load_list(ch, low_v, seconds))
            if wrong := loaded.differs(low_v, seconds, step_v):
                raise ReadbackError(
                    f"the list of channel {ch} of {self.address} reads back {', '.join(wrong)}; not started"
                )
            await self._raise_errors(f"loading the list of channel {ch}")
            dwells_s[ch] = loaded.dwell_s
        played = await self._run(talk.play_lists(tuple(dips), seconds, self._clock))
        found = {}
        for ch, (began_s, ended) in played.items():
            if not ended:
                raise ReadbackError(f"the list of channel {ch} of {self.address} goes on after its {seconds:g} s")
            await self._stop_list(ch)
            found[ch] = (began_s, dwells_s[ch], await self._run(talk.value("get_voltage", ch)))
        return found

    async def _stop_list(self, ch: int) -> None:
        mode = await self._run(self._talk.stop_list(ch))
        if mode != "FIXED":
            raise ReadbackError(f"the voltage of channel {ch} of {self.address} stays in mode {mode}")

    async def _protect(self, ch: int, name: Protection, level: float, step: float, unit: str) -> None:
        read, enabled = await self._run(self._talk.protect(ch, name, level))
        if read is not None:
            await self._agree(ch, f"{name} level", level, read, step, unit)
        if not enabled:
            await self._raise_errors(f"enabling {name} of channel {ch}")
            raise ReadbackError(f"{name} of channel {ch} of {self.address} stays disabled")
        if name == "ocp" and self.capabilities.ocp_follows_limit:
            self._ceiling_a[ch] = level

    async def _agree(self, ch: int, what: str, wanted: float, read: float, step: float, unit: str) -> None:
        """ReadbackError unless `read` is `wanted`; a dialect that carries settings out late is asked again."""
        names = {"voltage": "get_voltage", "current limit": "get_current"}
        names |= {f"{name} level": f"get_{name}_level" for name in PROTECTIONS}
        end = self._clock() + self.dialect.settle_s
        while abs(read - wanted) > step * 0.5 + 1e-9:
            if what not in names or self._clock() >= end:
                entries = await self._drain()
                said = f"; it says: {'; '.join(map(str, entries))}" if entries else ""
                raise ReadbackError(
                    f"channel {ch} of {self.address}: {what} was set to {wanted:g} {unit} but reads back "
                    f"{read:g} {unit}{said}"
                )
            read = await self._run(self._talk.value(names[what], ch))  # type: ignore[arg-type]

    async def _trips(self, ch: int) -> tuple[str, ...]:
        trips = await self._run(self._talk.trips(ch))
        if self.dialect.quirks & {"trip_read_clears", "error_read_clears"}:
            latched = self._latched.setdefault(ch, set())
            latched.update(trips)
            return tuple(name for name in (*PROTECTIONS, "watchdog") if name in latched)
        return trips

    async def _drain(self) -> tuple[ErrorEntry, ...]:
        """All errors. Where asking for them acknowledges trips, those are noted first."""
        if "error_read_clears" in self.dialect.quirks:
            for ch in self.capabilities.channels:
                await self._trips(ch)
        return await self._run(self._talk.drain())

    async def _raise_errors(self, doing: str) -> None:
        entries = await self._drain()
        if entries:
            raise InstrumentRefused(f"{self.address} refused while {doing}: {'; '.join(map(str, entries))}", entries)


class _Turn:
    """Owns a session for one operation; any failure or cancellation inside a dialogue poisons it.

    A class and not a generator: it is entered for every exchange of the power loop.
    """

    __slots__ = ("_supply",)

    def __init__(self, supply: ScpiSupply) -> None:
        self._supply = supply

    async def __aenter__(self) -> None:
        supply = self._supply
        await supply._lock.acquire()
        if supply.in_step:
            return
        try:
            await supply.begin()
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After these the dialogue is in step: nothing was sent, or all answers were read.
        if error is not None and not isinstance(error, (UsageError, SafetyError, InstrumentRefused)):
            self._supply.poison()
        self._supply._lock.release()


def _within(what: str, value: float, low: float, high: float, step: float, unit: str) -> float:
    """`value` on the channel's grid; UsageError when it is not a number or out of range. Never clamps."""
    if not math.isfinite(value):
        raise UsageError(f"{what} must be a finite number, got {value!r}")
    if not low - 1e-9 <= value <= high + 1e-9:
        raise UsageError(f"{what} {value:g} {unit} is outside {low:g} to {high:g} {unit}; nothing was sent")
    return round(round(value / step) * step, 9)
