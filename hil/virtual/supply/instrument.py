"""The supply behind the wire: channels, error queue, faults put in by tests, and the vendor's interpreter over them.

No I/O, time is a parameter: a server lets the clock run, a test winds it by hand.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from hil.errors import UsageError
from hil.virtual.supply.loads import Load
from hil.virtual.supply.physics import Channel, ChannelModel
from hil.virtual.supply.sequence import Sequence

FaultKind = Literal[
    "silent",
    "late",
    "swapped",
    "duplicate",
    "garbage",
    "drop",
    "half_open",
    "refuse",
    "ignore",
    "overflow",
    "trip",
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


@dataclass(slots=True)
class Fault:
    """A defect that a test puts in: applied to the next `count` commands whose text matches `match` (case ignored).

    silent: executed, not answered. late: answered after `delay_s`. swapped: answered after the next answer.
    duplicate: answered twice. garbage: answered with `text`. drop: the connection is reset instead of answering.
    half_open: from now on the connection takes everything and says nothing. refuse: error -221 and no effect.
    ignore: no effect and no error, which only a read-back finds. overflow: executed, and the error queue is full of
    other errors. trip: executed, then every output trips. A negative `count` never ends.
    """

    kind: FaultKind
    match: str = "."
    count: int = 1
    delay_s: float = 0.0
    text: str = "\x00#?"

    def takes(self, command: str) -> bool:
        return self.count != 0 and re.search(self.match, command, re.IGNORECASE) is not None


class Vendor(Protocol):
    """One maker's language over an instrument."""

    def execute(self, message: str) -> str | None:
        """Run one message; its answer without terminator, or None."""

    def tick(self, now_s: float) -> None:
        """What the firmware does by itself: watchdogs, delayed writes, linked fuses."""

    def reset(self) -> None:
        """State of the language itself, as after `*RST`."""

    def trip(self, number: int, kind: str) -> None:
        """A test trips a protection."""


@dataclass(frozen=True, slots=True)
class SupplyModel:
    """A supply the server can be. `identity` is its `*IDN?` answer; the serial number says that it is virtual.

    `vendor` makes its interpreter. `keeps_enable`, `trips_in_cc`: see `Channel`. `reply_end` ends each answer;
    `command_end` is false for a maker whose commands end by silence. `queue_length` is that of its error queue.
    `port` is where the maker listens. `known` says from where the commands are known.
    """

    name: str
    identity: str
    channels: Mapping[int, ChannelModel]
    vendor: Callable[[Instrument], Vendor]
    decimals_v: int = 3
    decimals_a: int = 3
    decimals_w: int = 2
    keeps_enable: bool = False
    trips_in_cc: bool = False
    reply_end: bytes = b"\n"
    command_end: bool = True
    queue_length: int = 20
    port: int = 5025
    known: str = "unverified"


class Instrument:
    """Channels, error queue and command interpreter of one supply. Raises UsageError for a load on no channel."""

    def __init__(self, model: SupplyModel, loads: Mapping[int, Load], clock: Callable[[], float]) -> None:
        unknown = set(loads) - set(model.channels)
        if unknown:
            raise UsageError(f"{model.name} has no channel {', '.join(map(str, sorted(unknown)))} to put a load on")
        self.model = model
        self.clock = clock
        self._loads = dict(loads)
        self.faults: list[Fault] = []
        self.crashed = False
        self._start()

    def _start(self) -> None:
        now = self.clock()
        model = self.model
        self.channels = {
            number: Channel(
                limits,
                self._loads.get(number),
                now,
                keeps_enable=model.keeps_enable,
                trips_in_cc=model.trips_in_cc,
            )
            for number, limits in model.channels.items()
        }
        self.sequences: dict[int, Sequence] = {}
        self.selected = min(self.channels)
        self.errors: deque[tuple[int, str]] = deque()
        self.event_status = 0
        self.reply_delay_s = 0.0
        self.idle_timeout_s = 0.0
        self.vendor: Vendor = model.vendor(self)

    def power_cycle(self) -> None:
        """The mains switch: outputs off, everything volatile forgotten, a crashed firmware alive again."""
        now = self.clock()
        for channel in self.channels.values():
            channel.switch(False, now)
            channel.set_master(False, now)  # a maker whose trips keep their enable is off too
            if channel.load_powered and channel.load is not None:
                channel.load.set_powered(False)
        self.crashed = False
        self._start()

    def tick(self) -> None:
        """Let time pass for all channels: due list steps at their own moments, then the firmware's own doings."""
        now = self.clock()
        for number in tuple(self.sequences):
            self._run_sequence(number, now)
        for channel in self.channels.values():
            channel.advance(now)
        self.vendor.tick(now)

    def _run_sequence(self, number: int, now_s: float) -> None:
        sequence, channel = self.sequences[number], self.channels[number]
        for moment_s, step in sequence.due(now_s):
            channel.advance(moment_s)
            if step.voltage_v is not None:
                channel.voltage_set_v = step.voltage_v
            if step.current_a is not None:
                channel.current_limit_a = step.current_a
            if step.off:
                channel.switch(False, moment_s)
        if sequence.ended:
            del self.sequences[number]

    def push_error(self, code: int, text: str) -> None:
        """Queue an error; when full, the newest becomes -350 as SCPI says."""
        # Bit 5 of the event status: command errors; bit 4: execution errors; bit 3: device errors.
        self.event_status |= 32 if -200 < code <= -100 else 16 if -300 < code <= -200 else 8
        if len(self.errors) >= self.model.queue_length:
            self.errors[-1] = (-350, "Queue overflow")
        else:
            self.errors.append((code, text))

    def pop_error(self) -> tuple[int, str]:
        return self.errors.popleft() if self.errors else (0, "No error")

    def overflow(self) -> None:
        """Fill the error queue with one more than it holds."""
        for _ in range(self.model.queue_length + 1):
            self.push_error(-230, "Data corrupt or stale")

    def reset(self) -> None:
        """`*RST`: outputs off, trips forgotten, settings at their defaults."""
        now = self.clock()
        self.sequences.clear()
        for channel in self.channels.values():
            channel.switch(False, now)
            channel.clear_all(now)
            channel.defaults()
        self.selected = min(self.channels)
        self.vendor.reset()

    def trip(self, number: int, kind: str = "ovp") -> None:
        """Trip a protection (`ovp`, `ocp`, or another reason) of a channel, as a fault in the lab would."""
        self.tick()
        self.vendor.trip(number, kind)

    def take_fault(self, command: str) -> Fault | None:
        for fault in self.faults:
            if fault.takes(command):
                fault.count -= 1
                return fault
        return None

    def execute(self, message: str) -> str | None:
        """Run one program message and return its answer without terminator, or None."""
        self.reply_delay_s = 0.0
        return None if self.crashed else self.vendor.execute(message)

    def state(self) -> dict[str, Any]:
        """What really is at the terminals, whatever the language says; for tests and the control socket."""
        self.tick()
        return {
            "model": self.model.name,
            "crashed": self.crashed,
            "errors": len(self.errors),
            "channels": {
                str(number): {
                    "output_on": channel.output_on,
                    "voltage_v": channel.terminal_v,
                    "current_a": channel.current_a,
                    "mode": channel.mode,
                    "tripped": channel.tripped,
                    "load_powered": channel.load_powered,
                    "energy_j": channel.energy_j,
                    "peak_a": channel.peak_a,
                }
                for number, channel in self.channels.items()
            },
        }


def trip_channel(channel: Channel, kind: str, now_s: float) -> None:
    """What most makers do when a protection fires: the flag of that protection, or a reason of its own."""
    if kind not in ("ovp", "ocp"):
        channel.trip(kind, now_s)
        return
    protection = channel.ovp if kind == "ovp" else channel.ocp
    protection.tripped = True
    channel.trip(kind, now_s)
    channel.shutdown.discard(kind)  # the flag above is what holds it
