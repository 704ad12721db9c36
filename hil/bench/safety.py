"""Switching a board's power on and off so that nothing is left on by accident: sequences, envelope, intent journal.

The start sequence refuses rather than repairs: an output that is on and not in our journal belongs to somebody else.
Before an output goes on, an intent is on the disk; it is closed only when the measured voltage proves that the output
is off. So whatever dies, the next start knows what may still be live and ends it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from hil.bench.levels import CapabilityLevel, Layers, cut_outlet, ocp_acts
from hil.drivers.forced_off import ForcedOff, force_off
from hil.drivers.scpi import InstrumentError, Supply
from hil.drivers.transport import endpoint
from hil.errors import BenchError, SafetyError
from hil.model import Reading, Setpoint

POLL_S = 0.02
_ROTATE_BYTES = 1 << 20


# ------------------------------------------------------------------------------------------------------- envelope
class LimitsLike(Protocol):
    """What `Envelope.of` reads: the `supply` section of a board type."""

    @property
    def voltage_min_v(self) -> float: ...
    @property
    def voltage_max_v(self) -> float: ...
    @property
    def current_max_a(self) -> float: ...
    @property
    def power_max_w(self) -> float: ...
    @property
    def overvoltage_protection_v(self) -> float: ...
    @property
    def overcurrent_protection_a(self) -> float: ...
    @property
    def inrush_s(self) -> float: ...
    @property
    def slew_v_per_s(self) -> float: ...
    @property
    def off_dwell_s(self) -> float: ...
    @property
    def off_voltage_v(self) -> float: ...
    @property
    def on_tolerance_v(self) -> float: ...
    @property
    def on_timeout_s(self) -> float: ...
    @property
    def undervoltage_lockout_v(self) -> float: ...
    @property
    def brownout_min_v(self) -> float: ...
    @property
    def inrush_current_max_a(self) -> float | None: ...
    @property
    def inrush_energy_max_j(self) -> float | None: ...
    @property
    def energy_max_j(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a board may be fed. Volts, amperes, watts, seconds; a request outside is refused, never clamped.

    `inrush_…` bound the first `inrush_s` after power on, `energy_max_j` what one power-on may deliver in all; None does
    not bound. `brownout_min_v` is the lowest voltage of a deliberate dip; below `undervoltage_lockout_v` the board is
    taken to have lost its power.
    """

    voltage_min_v: float
    voltage_max_v: float
    current_max_a: float
    power_max_w: float
    overvoltage_protection_v: float
    overcurrent_protection_a: float
    inrush_s: float = 0.5
    slew_v_per_s: float = 50.0
    off_dwell_s: float = 5.0
    off_voltage_v: float = 0.6
    on_tolerance_v: float = 0.3
    on_timeout_s: float = 2.0
    undervoltage_lockout_v: float = 0.0
    brownout_min_v: float = 0.0
    inrush_current_max_a: float | None = None
    inrush_energy_max_j: float | None = None
    energy_max_j: float | None = None

    @classmethod
    def of(cls, limits: LimitsLike) -> Envelope:
        """The envelope of a board type's `supply` section."""
        return cls(**{name: getattr(limits, name) for name in cls.__dataclass_fields__})

    def check(self, setpoint: Setpoint) -> None:
        """SafetyError when a set point leaves the envelope."""
        volts, amperes = setpoint.voltage_v, setpoint.current_limit_a
        if not (math.isfinite(volts) and self.voltage_min_v <= volts <= self.voltage_max_v):
            raise SafetyError(
                f"{volts:g} V is outside the board's {self.voltage_min_v:g} to {self.voltage_max_v:g} V",
                hint="correct the mission's bus voltage or the board type; nothing was sent to the supply",
            )
        if not (math.isfinite(amperes) and 0 < amperes <= self.current_max_a):
            raise SafetyError(
                f"a current limit of {amperes:g} A is outside the board's 0 to {self.current_max_a:g} A",
                hint="correct the current limit or the board type; nothing was sent to the supply",
            )

    def breach(self, reading: Reading, energy_j: float = 0.0) -> str:
        """Why a measurement leaves the envelope, or an empty text. Under-voltage is the mission's to create.

        `energy_j` is what the board took since power on.
        """
        if reading.voltage_v > self.voltage_max_v + self.on_tolerance_v:
            return f"{reading.voltage_v:g} V measured, more than the board's {self.voltage_max_v:g} V"
        if reading.current_a > self.current_max_a * 1.02 + 0.01:
            return f"{reading.current_a:g} A measured, more than the board's {self.current_max_a:g} A"
        if reading.power_w > self.power_max_w * 1.02 + 0.05:
            return f"{reading.power_w:g} W measured, more than the board's {self.power_max_w:g} W"
        if self.energy_max_j is not None and energy_j > self.energy_max_j:
            return f"{energy_j:.0f} J since power on, more than the board's {self.energy_max_j:g} J"
        return ""

    def inrush_breach(self, peak_a: float, energy_j: float) -> str:
        """Why the inrush leaves its own bounds, or an empty text."""
        if self.inrush_current_max_a is not None and peak_a > self.inrush_current_max_a * 1.02 + 0.01:
            return f"an inrush of {peak_a:g} A, more than the board's {self.inrush_current_max_a:g} A"
        if self.inrush_energy_max_j is not None and energy_j > self.inrush_energy_max_j:
            return f"an inrush of {energy_j:.2f} J, more than the board's {self.inrush_energy_max_j:g} J"
        return ""


# --------------------------------------------------------------------------------------------------- intent journal
@dataclass(frozen=True, slots=True)
class Intent:
    """An output that was or was about to be switched on, with all that is needed to switch it off blindly.

    `outlet` is the address of a switched outlet or relay behind it, for when the supply does not obey.
    """

    board: str
    address: str
    dialect: str
    channel: int
    off_voltage_v: float
    outlet: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.address, self.channel


class IntentJournal:
    """Append-only JSON lines, each on the disk (fsync) before the call returns. Several processes may append."""

    def __init__(self, path: Path, *, wall: Callable[[], float] = time.time) -> None:
        self.path = path
        self._wall = wall
        self._lock = threading.Lock()
        self._live: dict[tuple[str, int], Intent] = {}
        self._read_inode = self._read_bytes = 0
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists() and path.stat().st_size > _ROTATE_BYTES and not self.open_intents():
            path.replace(path.with_suffix(".old.jsonl"))

    def opened(self, intent: Intent) -> None:
        """Write that the output is about to go on. Blocking; BenchError when the disk refuses: then it must not."""
        self._append({"op": "on", **asdict(intent)})

    def closed(self, intent: Intent, voltage_v: float | None, how: str) -> None:
        """Write that the output is verified off. `how` says who did it."""
        self._append({"op": "off", **asdict(intent), "voltage_v": voltage_v, "how": how})

    def open_intents(self) -> tuple[Intent, ...]:
        """Outputs that nobody verified off, oldest first. A torn line was never acknowledged and is left out.

        Asked every second and more: only what was appended since the last time is read.
        """
        with self._lock:
            for entry in self._new_entries():
                try:
                    intent = Intent(**{name: entry[name] for name in Intent.__dataclass_fields__ if name in entry})
                except TypeError:
                    continue
                self._live.pop(intent.key, None)
                if entry.get("op") == "on":
                    self._live[intent.key] = intent
            return tuple(self._live.values())

    def _new_entries(self) -> Iterable[Mapping[str, Any]]:
        try:
            with self.path.open("rb") as file:
                info = os.fstat(file.fileno())
                if info.st_ino != self._read_inode or info.st_size < self._read_bytes:
                    self._read_inode, self._read_bytes = info.st_ino, 0
                    self._live.clear()
                file.seek(self._read_bytes)
                text = file.read()
        except FileNotFoundError:
            self._read_bytes = 0
            self._live.clear()
            return
        except OSError as error:
            raise BenchError(f"cannot read the intent journal {self.path}: {error.strerror}") from error
        whole = text[: text.rfind(b"\n") + 1]  # a line that is being written is read next time
        self._read_bytes += len(whole)
        for line in filter(None, whole.split(b"\n")):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    yield entry

    def _append(self, entry: Mapping[str, Any]) -> None:
        stamped = {"t_wall": self._wall(), "pid": os.getpid(), **entry}
        # The leading newline ends whatever line a crash may have torn; one write, so that appenders do not mix.
        data = b"\n" + json.dumps(stamped, separators=(",", ":")).encode() + b"\n"
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.write(handle, data) != len(data):
                    raise OSError(28, "short write")
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise BenchError(
                f"cannot write the intent journal {self.path}: {error.strerror}",
                hint="free the disk; without the journal no output is switched on",
            ) from error


@dataclass(frozen=True, slots=True)
class Leftover:
    """An output that a dead run left behind, and what became of it. `outlet` says what the outlet did, if asked."""

    intent: Intent
    result: ForcedOff
    outlet: str = ""


def finish_leftovers(journal: IntentJournal, *, deadline_s: float = 5.0) -> tuple[Leftover, ...]:
    """Switch off what a dead run left on, before anything else. Blocking: call it from a thread.

    All are tried; where the supply does not obey, its outlet is cut. Then SafetyError names those that could not be
    verified off. The caller holds the bench's lock.
    """
    done: list[Leftover] = []
    stuck: list[Leftover] = []
    for intent in journal.open_intents():
        result = force_off(intent.address, intent.dialect, (intent.channel,), intent.off_voltage_v, deadline_s)
        item = Leftover(intent, result)
        if result.off:
            journal.closed(intent, result.voltages_v[intent.channel], "leftover of a dead run")
        elif intent.outlet and (cut := cut_outlet(intent.outlet)).off:
            journal.closed(intent, None, f"leftover of a dead run: {cut.said}")
            item = Leftover(intent, result, cut.said)
        else:
            stuck.append(item)
        done.append(item)
    if stuck:
        names = "; ".join(
            f"{item.intent.board}: channel {item.intent.channel} of {item.intent.address} ({item.result.trouble})"
            for item in stuck
        )
        raise SafetyError(
            f"a former run left outputs on that cannot be switched off: {names}",
            hint="switch them off by hand at the instrument, or make it reachable, and start again",
        )
    return tuple(done)


# ------------------------------------------------------------------------------------------------------- two owners
class InstrumentLock:
    """Host-wide claim on one instrument address; released by `release` or by the death of this process.

    An abstract unix socket: no file to leave behind, no permissions between users, gone with its owner. The claim is on
    where the address leads: `localhost` and `127.0.0.1`, or two users on one link box, are the same instrument.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket: socket.socket | None = None

    def acquire(self) -> None:
        """BenchError when another process holds the instrument."""
        name = "\0hil-instrument-" + sha256(_endpoint(self.address).encode()).hexdigest()[:32]
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(name)
        except OSError as error:
            claim.close()
            raise BenchError(
                f"another process on this host drives the instrument at {self.address}",
                hint="stop the other bench daemon (`hil bench stop`), or give this bench its own supply",
            ) from error
        self._socket = claim

    def release(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _endpoint(address: str) -> str:
    if address.startswith(("serial:", "visa:")):
        return endpoint(address)
    if address.startswith(("unix:", "netem:")):  # a socket's path, or this host's own ports
        return address
    parts = urlsplit(address.lower())
    host = parts.hostname or address.lower()
    with contextlib.suppress(OSError):  # a name that nobody knows leads nowhere yet
        host = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    return f"{host} {parts.port}"


# -------------------------------------------------------------------------------------------------------- sequences
@dataclass(frozen=True, slots=True)
class PoweredOn:
    """A finished start sequence: monotonic times of output on and of voltage in tolerance, and the last reading.

    `peak_a` and `energy_j` (trapezoid over the samples) cover the inrush window. `waived` are protections that the
    supply lacks and the lab did without.
    """

    on_s: float
    settled_s: float
    reading: Reading
    peak_a: float
    energy_j: float
    level: CapabilityLevel
    waived: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoweredOff:
    """A verified switch-off: monotonic times of the command and of the measured proof."""

    off_s: float
    verified_s: float
    reading: Reading


class Source(Protocol):
    """What a channel gives instead of a set voltage: a solar array's curve (`hil.bench.arrayflight`)."""

    @property
    def lit(self) -> bool:
        """Whether the output is to go on at all: an array in the dark is one that is off."""

    async def program(self) -> None:
        """Set and read back what is given, while the output is off."""

    def holds(self, reading: Reading, envelope: Envelope) -> bool:
        """Whether a measurement shows that the board has its power."""


Step = Callable[[str], None]
NO_LAYERS = Layers()


def _silent(step: str) -> None:
    """No listener."""


def _unseen(reading: Reading) -> None:
    """No listener."""


async def power_on(
    supply: Supply,
    channel: int,
    envelope: Envelope,
    setpoint: Setpoint,
    journal: IntentJournal,
    intent: Intent,
    *,
    off_since_s: float | None = None,
    source: Source | None = None,
    layers: Layers = NO_LAYERS,
    armed: Callable[[], Awaitable[None]] | None = None,
    on_step: Step = _silent,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    on_reading: Callable[[Reading], None] = _unseen,
) -> PoweredOn:
    """The start sequence. Every step must succeed; any failure after the intent ends with the output off.

    `off_since_s`: when the output was last verified off; None waits the whole off dwell from now. `layers` say what
    level of protection is accepted, and hold the supply's watchdog, which is armed and read back before the output
    goes on. `armed` is awaited before that too: there the dead-man learns of it. `on_reading` gets what is measured
    once it is on. `source` is programmed in place of `setpoint`, after the dwell and before the protections, which
    entering its mode may forget; while it is dark the output stays off. Raises SafetyError, BenchError or UsageError;
    the message says what was measured.
    """
    if source is None:
        envelope.check(setpoint)
    on_step("identify")
    await supply.open()
    can = supply.capabilities
    level = await layers.level(can, array=source is not None)
    if await supply.output_state(channel) and intent.key not in {item.key for item in journal.open_intents()}:
        raise SafetyError(
            f"channel {channel} of {intent.address} is on, and this bench did not switch it on",
            hint="find out who did; switch it off at the instrument when nothing depends on it, then try again",
        )
    on_step("off")
    await supply.output(channel, False)
    discharged = await _wait_discharged(supply, channel, envelope, clock, sleep)
    on_step("clear")
    await supply.clear_status()
    if await supply.tripped(channel):
        await supply.clear_protection(channel)
    ocp = ocp_acts(can, source is not None)
    since = discharged if off_since_s is None else off_since_s
    if source is not None:
        # Its light moves on in the dwell: what is programmed is of the moment that the output goes on.
        on_step("dwell")
        await _dwell(since + envelope.off_dwell_s, clock, sleep)
        on_step("program")
        await source.program()
    on_step("protect")
    await supply.program_protection(
        channel,
        envelope.overvoltage_protection_v if can.ovp else None,
        envelope.overcurrent_protection_a if ocp else None,
    )
    if source is None:
        on_step("program")
        await supply.program(channel, setpoint)
        on_step("dwell")
        await _dwell(since + envelope.off_dwell_s, clock, sleep)
    on_step("intent")
    await asyncio.to_thread(journal.opened, intent)
    try:
        if armed is not None:
            await armed()
        if layers.watchdog is not None and await layers.watchdog.hold(intent.key):
            on_step("watchdog")
        on_step("on" if source is None or source.lit else "dark")
        applied = await supply.output(channel, source is None or source.lit)
        if source is not None and not source.lit:
            reading, peak, energy = await supply.measure(channel), 0.0, 0.0
        else:
            reading, peak, energy = await _settle(
                supply, channel, envelope, setpoint, source, applied.acknowledged_s, clock, sleep, on_reading
            )
    except BaseException as failure:
        on_step("abort")
        # Shielded: a Ctrl-C during the start must not leave the output on.
        cut = asyncio.ensure_future(
            power_off(
                supply,
                channel,
                envelope,
                journal,
                intent,
                how="start failed",
                layers=layers,
                clock=clock,
                sleep=sleep,
                on_reading=on_reading,
            )
        )
        try:
            await _shielded(cut)
        except BenchError as second:
            failure.add_note(f"and switching off failed too: {second}")
        raise
    on_step("settled")
    waived = tuple(name for has, name in ((ocp, "no-ocp"), (can.ovp, "no-ovp")) if not has)
    return PoweredOn(applied.acknowledged_s, reading.time_s, reading, peak, energy, level, waived)


async def power_off(
    supply: Supply,
    channel: int,
    envelope: Envelope,
    journal: IntentJournal,
    intent: Intent,
    *,
    how: str = "switched off",
    timeout_s: float = 5.0,
    layers: Layers = NO_LAYERS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    on_reading: Callable[[Reading], None] = _unseen,
) -> PoweredOff:
    """Output off, proved by measured volts, then the intent is closed. Retries broken dialogues until `timeout_s`.

    SafetyError when it cannot be proved. Its outlet, if it has one, was then cut; unless that says off, the intent
    stays open for the dead-man and the next start.
    """
    end = clock() + timeout_s
    off_s, trouble = math.nan, ""
    while True:
        try:
            if math.isnan(off_s):
                off_s = (await supply.output(channel, False)).acknowledged_s
            reading = await supply.measure(channel)
            on_reading(reading)
            if reading.output_on:
                off_s = math.nan
            elif reading.voltage_v < envelope.off_voltage_v:
                break
            trouble = f"{reading.voltage_v:g} V measured, output {'on' if reading.output_on else 'off'}"
        except (InstrumentError, SafetyError) as error:
            trouble, off_s = error.message, math.nan
        if clock() >= end:
            said = await _cut_outlet(journal, intent)
            raise SafetyError(
                f"{intent.board}: channel {channel} of {intent.address} is not verified off: {trouble}{said}",
                hint="switch the supply off by hand; the next start of the bench tries again first",
            )
        await sleep(POLL_S)
    verified = clock()
    await asyncio.to_thread(journal.closed, intent, reading.voltage_v, how)
    if layers.watchdog is not None:
        await layers.watchdog.release(intent.key)
    return PoweredOff(off_s, verified, reading)


async def _cut_outlet(journal: IntentJournal, intent: Intent) -> str:
    """The last resort, if there is one: the outlet behind the supply. What to add to the message."""
    if not intent.outlet:
        return ""
    cut = await asyncio.to_thread(cut_outlet, intent.outlet)
    if cut.off:
        await asyncio.to_thread(journal.closed, intent, None, cut.said)
    return f"; {cut.said}"


async def _shielded(task: asyncio.Future[PoweredOff]) -> None:
    """Wait for `task` to its end however often the caller is cancelled; its own error is raised."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    task.result()


async def _dwell(until_s: float, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]) -> None:
    while (left := until_s - clock()) > 0:
        await sleep(min(left, 0.25))


async def _wait_discharged(
    supply: Supply,
    channel: int,
    envelope: Envelope,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
) -> float:
    """The time at which the terminals measured below the off voltage."""
    end = clock() + max(2.0, envelope.off_dwell_s)
    while True:
        reading = await supply.measure(channel)
        if not reading.output_on and reading.voltage_v < envelope.off_voltage_v:
            return clock()
        if clock() >= end:
            raise SafetyError(
                f"{reading.voltage_v:g} V at channel {channel} although its output is off",
                hint="something else feeds the board (USB, a second supply, a battery); unplug it",
            )
        await sleep(POLL_S)


async def _settle(
    supply: Supply,
    channel: int,
    envelope: Envelope,
    setpoint: Setpoint,
    source: Source | None,
    on_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
    on_reading: Callable[[Reading], None],
) -> tuple[Reading, float, float]:
    """Inrush window, then the voltage must be within tolerance; (last reading, highest current, energy since on)."""
    peak, energy, before_s, before_w = 0.0, 0.0, on_s, 0.0
    while True:
        reading = await supply.measure(channel)
        on_reading(reading)
        peak = max(peak, reading.current_a)
        energy += 0.5 * (reading.power_w + before_w) * max(0.0, reading.time_s - before_s)
        before_s, before_w = reading.time_s, reading.power_w
        if not reading.output_on:
            trips = ", ".join(await supply.tripped(channel)) or "no protection reported"
            raise SafetyError(
                f"the output went off by itself after {clock() - on_s:.3f} s ({trips}); peak {peak:g} A",
                hint="check the wiring for a short and the board type's over-current limit against its inrush",
            )
        if reading.voltage_v > envelope.voltage_max_v + envelope.on_tolerance_v:
            raise SafetyError(f"{reading.voltage_v:g} V measured instead of {setpoint.voltage_v:g} V")
        if inrush := envelope.inrush_breach(peak, energy) if clock() - on_s <= envelope.inrush_s else "":
            raise SafetyError(inrush, hint="check the board for damage, then the board type's bounds for its inrush")
        elapsed = clock() - on_s
        in_tolerance = (
            abs(reading.voltage_v - setpoint.voltage_v) <= envelope.on_tolerance_v
            if source is None
            else source.holds(reading, envelope)
        )
        if elapsed >= envelope.inrush_s and in_tolerance and not envelope.breach(reading):
            return reading, peak, energy
        if elapsed >= max(envelope.on_timeout_s, envelope.inrush_s):
            mode = await supply.regulation(channel)
            if source is not None:
                raise SafetyError(
                    f"after {elapsed:.2f} s the unit behind the array has {reading.voltage_v:g} V at "
                    f"{reading.current_a:g} A ({mode}), less than its {envelope.voltage_min_v:g} V",
                    hint="a short, or a load that asks for more than the array has in this light",
                )
            raise SafetyError(
                f"after {elapsed:.2f} s the board has {reading.voltage_v:g} V at {reading.current_a:g} A ({mode}) "
                f"instead of {setpoint.voltage_v:g} V ± {envelope.on_tolerance_v:g} V",
                hint="in CC the board draws the whole limit: a short, or a limit below its boot current",
            )
        await sleep(POLL_S)
