"""What a dialect is made of: commands with the form of their replies, capability records, models, named quirks.

A dialect is a value: adding one adds no code as long as its quirks have names here. Every command says how far it is
known: `manual` (read in the maker's guide or in a published driver) or `unverified` (general knowledge; check before
trusting it on hardware). The query of a `manual` setting counts as `manual`. Nothing here was tried on an instrument.

A command's text may hold several lines: each is a message of its own, and only the last one may ask. Templates know
`{ch}` (channel number), `{v}` and `{a}` (decimals without exponent), `{state}` (the dialect's word for on or off) and
whatever else the operation names; `{volts:.2f}` and `{amps:.3f}` are for instruments that want fixed places.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from hil.errors import BenchError

Operation = Literal[
    "identify",
    "clear_status",
    "error",
    "execution_error",  # TTi keeps numbers in registers instead of a queue
    "query_error",
    "event_status",
    "take_remote",
    "get_remote",
    "release_remote",
    "channel_count",
    "max_voltage",
    "max_current",
    "max_ovp",
    "set_voltage",
    "set_current",
    "get_voltage",
    "get_current",
    "set_output",
    "get_output",
    "set_master",  # the one switch behind all channels
    "get_master",
    "get_tracking",  # true when channels are coupled in series or in parallel
    "measure",  # volts, amperes and watts in one reply
    "measure_voltage",
    "measure_current",
    "regulation",
    "set_ovp_level",
    "set_ovp_state",
    "get_ovp_level",
    "get_ovp_state",
    "ovp_tripped",
    "clear_ovp",
    "set_ocp_level",
    "set_ocp_state",
    "get_ocp_level",
    "get_ocp_state",
    "ocp_tripped",
    "clear_ocp",
    "max_ocp_delay",
    "set_ocp_delay",
    "get_ocp_delay",
    "set_opp_level",
    "set_opp_state",
    "get_opp_level",
    "get_opp_state",
    "opp_tripped",
    "clear_opp",
    "set_watchdog",
    "get_watchdog",
    "set_watchdog_delay",
    "get_watchdog_delay",
    "watchdog_tripped",
    "load_list",  # one step at {v} for {t} seconds, played once, then what was set before; started by `start_list`
    "get_list_voltage",
    "get_list_dwell",
    "get_list_count",
    "get_list_last",  # true when the output stays at the last step
    "get_voltage_mode",
    "get_current_mode",
    "start_list",
    "list_running",
    "abort_list",
    "fix_voltage",  # back from the list to the set point
    "sas_mode",
    "sas_enter",
    "sas_leave",
    "sas_curve",
    "sas_point",
    "sas_submit",
    "sas_get_voc",
    "sas_get_isc",
    "sas_get_vmp",
    "sas_get_imp",
    "sas_scale",
    "sas_get_scale",
]
Source = Literal["manual", "unverified"]
Quirk = Literal[
    "clear_restores_output",  # clearing a protection switches the output back on if it was on before the trip
    "clear_enables_output",  # clearing a protection switches the output on, whatever it was before
    "common_output_switch",  # one master switch for all channels: they form one lease group
    "global_clear",  # clearing one channel clears all: they form one lease group
    "trip_read_clears",  # asking for a trip forgets it in the instrument
    "remote_on_serial_only",  # `take_remote` belongs to RS-232 and USB-serial, not to the network
    "error_read_clears",  # asking for errors acknowledges trips too
    "output_reply_lies",  # after a trip the instrument may still answer that its output is on
    "sas_switch_resets",  # entering or leaving the array mode switches the output off and forgets its settings
]

#: A decimal number as instruments write them.
NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"


@dataclass(frozen=True, slots=True)
class Reply:
    """How an answer is to be read.

    `text`, `switch` (ON/OFF/1/0), `numbers` (exactly `count`, comma-separated, or the groups of `pattern`), `bits` (an
    integer, decimal or `0x…`), `byte` (one raw byte as an integer). For `bits` and `byte` asked as a switch, `masks`
    holds the mask of each channel (one for all if there is only one). `words` maps what the instrument says to what we
    call it: a word, or a mask of which all bits must be set; they are tried in order. `length` is the number of bytes
    of a reply without terminator (-1: the line falls silent), `stray` how many more may follow it. `part` is the one
    of several comma-separated words that is meant (-1: all).
    """

    form: Literal["text", "switch", "numbers", "bits", "byte"] = "text"
    count: int = 1
    pattern: str = ""
    masks: tuple[int, ...] = ()
    words: tuple[tuple[int | str, str], ...] = ()
    length: int = 0
    stray: int = 0
    part: int = -1


TEXT = Reply()
SWITCH = Reply("switch")
ONE = Reply("numbers")
THREE = Reply("numbers", count=3)
#: The operation register of Keysight's and TDK-Lambda's: bit 0 constant voltage, bit 1 constant current.
OPERATION = Reply("bits", words=((1, "CV"), (2, "CC"), (0, "UR")))
CV_CC_WORDS = Reply(words=(("CV", "CV"), ("CC", "CC"), ("UR", "UR")))


def tagged(pattern: str) -> Reply:
    """Numbers inside a reply with tags or units: `N` stands for a number, `{ch}` for the channel."""
    return Reply("numbers", pattern=pattern.replace("N", NUMBER))


def bit(*masks: int) -> Reply:
    """A status register of which one bit (one a channel) is the answer."""
    return Reply("bits", masks=masks)


@dataclass(frozen=True, slots=True)
class Command:
    """What to say for one operation. `source` says how far it is known; `note` names what to check."""

    text: str
    source: Source
    reply: Reply = TEXT
    note: str = ""


def manual(text: str, reply: Reply = TEXT, note: str = "") -> Command:
    """A command read in the maker's manual or in a published driver."""
    return Command(text, "manual", reply, note)


def unverified(text: str, reply: Reply = TEXT, note: str = "") -> Command:
    """A command from general knowledge."""
    return Command(text, "unverified", reply, note)


@dataclass(frozen=True, slots=True)
class ChannelRange:
    """What one channel accepts (volts, amperes) and the smallest step it can be set to and reads back."""

    voltage_max_v: float
    current_max_a: float
    ovp_min_v: float
    ovp_max_v: float
    ocp_min_a: float
    ocp_max_a: float
    voltage_step_v: float
    current_step_a: float
    rated_v: float
    rated_a: float


@dataclass(frozen=True, slots=True)
class ListLimits:
    """A list of set points that the instrument plays by itself: number of steps, dwell a step in seconds.

    `unused` says why dips are not played by it.
    """

    steps: int
    dwell_min_s: float
    dwell_max_s: float
    dwell_step_s: float
    unused: str = ""

    def plays(self, seconds: float) -> bool:
        """Whether a dip of this length is a step of the list, exactly: it is never rounded to one."""
        on_grid = abs(round(seconds / self.dwell_step_s) * self.dwell_step_s - seconds) <= 1e-4 * seconds
        return not self.unused and on_grid and self.dwell_min_s <= seconds <= self.dwell_max_s


@dataclass(frozen=True, slots=True)
class Watchdog:
    """The instrument's own output watchdog: the delays in seconds that it can be armed with."""

    delay_min_s: float
    delay_max_s: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can do. `command_s` is the assumed time of one exchange before it has been measured.

    `limits` says where the channel ranges come from: `data` (this record), `model` (volts and amperes in the model's
    name, groups `v` and `a` of its pattern), `ask` (the instrument is asked for its maxima when it is opened).
    `measures_power`: watts are the instrument's own, elsewhere the product of volts and amperes.
    `ocp_follows_limit`: there is no over-current threshold of its own, the channel trips when it reaches its limit.
    """

    model: str
    channels: Mapping[int, ChannelRange]
    ovp: bool
    ocp: bool
    command_s: float
    source: Source
    opp: bool = False
    ocp_follows_limit: bool = False
    ocp_delay: bool = False
    watchdog: Watchdog | None = None
    lists: ListLimits | None = None
    solar_array: bool = False
    measures_power: bool = False
    limits: Literal["data", "model", "ask"] = "data"


#: What an instrument is not asked, and why.
Unknown = Mapping[Literal["regulation", "trips"], str]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a family of supplies is spoken to.

    `port` is its usual raw-socket port, `baud` its usual serial rate. `min_gap_s` must pass between two messages.
    `settle_s` is how long a setting may take to read back. `errors` says how the instrument reports refusals.
    `unknown` says why it is not asked for CV or CC, or for what has tripped, where it is not.
    """

    name: str
    title: str
    commands: Mapping[Operation, Command]
    models: tuple[tuple[str, Capabilities], ...]  # (pattern over *IDN?, what that model can do)
    terminator: str = "\n"
    on: str = "ON"
    off: str = "OFF"
    port: int = 5025
    baud: int = 9600
    min_gap_s: float = 0.0
    settle_s: float = 0.0
    errors: Literal["queue", "registers", "none"] = "queue"
    quirks: frozenset[Quirk] = field(default_factory=frozenset)
    unknown: Unknown = field(default_factory=dict)

    @property
    def lease_group(self) -> bool:
        """True when the channels are not independent, so that boards on them must be leased together."""
        return bool(self.quirks & {"common_output_switch", "global_clear"})

    def command(self, operation: Operation) -> Command:
        """The command for `operation`; BenchError when the dialect has none."""
        command = self.commands.get(operation)
        if command is None:
            raise BenchError(f"dialect {self.name} has no command for {operation}")
        return command

    def messages(self, operation: Operation, ch: int = 0, **values: float | bool) -> list[str]:
        """The lines to send for `operation`, without terminator. Values: `v`, `a`, `on` and what the command names."""
        fields: dict[str, object] = {
            name: number(value) for name, value in values.items() if not isinstance(value, bool)
        }
        fields |= {"volts": values.get("v", 0.0), "amps": values.get("a", 0.0)}
        fields["state"] = self.on if values.get("on") else self.off
        return self.command(operation).text.format(ch=ch, **fields).split("\n")

    def has(self, operation: Operation) -> bool:
        return operation in self.commands

    def capabilities(self, identity: str) -> Capabilities:
        """The record of the model that answered `identity` to `*IDN?`; BenchError for a stranger, never a guess."""
        for pattern, record in self.models:
            if found := re.search(pattern, identity, re.IGNORECASE):
                return _scaled(record, found) if record.limits == "model" else record
        known = ", ".join(record.model for _, record in self.models)
        raise BenchError(
            f"the instrument says {identity!r}, which is no model that dialect {self.name} knows ({known})",
            hint="check address and dialect in the bench file; an unknown model has unknown limits and is not driven",
        )

    def unverified(self) -> tuple[Operation, ...]:
        """Operations that no manual confirmed yet; `hil doctor` lists them."""
        return tuple(name for name, command in self.commands.items() if command.source == "unverified")


def number(value: float) -> str:
    """A decimal that every supply parses: no exponent, at most six places, no trailing zeros."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def channel(
    volts: float,
    amperes: float,
    *,
    v_step: float = 0.001,
    a_step: float = 0.001,
    over: float = 1.0,
    ovp_v: float = math.inf,
    ocp_a: float = math.inf,
) -> ChannelRange:
    """A channel rated `volts` and `amperes` that can be set up to `over` times that.

    Protection thresholds whose bounds are unknown are left to the instrument: one that it does not take is not read
    back, and then the request fails.
    """
    return ChannelRange(volts * over, amperes * over, 0.0, ovp_v, 0.0, ocp_a, v_step, a_step, volts, amperes)


def channels(*ranges: ChannelRange) -> Mapping[int, ChannelRange]:
    """Channels numbered from 1."""
    return MappingProxyType(dict(enumerate(ranges, 1)))


def table(*parts: Mapping[Operation, Command]) -> Mapping[Operation, Command]:
    """One command table out of several; later ones replace."""
    whole: dict[Operation, Command] = {}
    for part in parts:
        whole.update(part)
    return MappingProxyType(whole)


#: IEEE 488.2 and the error queue, the same for all that have them.
COMMON: Mapping[Operation, Command] = MappingProxyType(
    {
        "identify": manual("*IDN?"),
        "clear_status": manual("*CLS"),
        "error": manual("SYST:ERR?"),
    }
)


def _scaled(record: Capabilities, found: re.Match[str]) -> Capabilities:
    volts, amperes = float(found.group("v")), float(found.group("a"))
    ranges = {
        ch: replace(
            limits,
            voltage_max_v=volts * limits.voltage_max_v,
            current_max_a=amperes * limits.current_max_a,
            ovp_max_v=volts * limits.ovp_max_v,
            ocp_max_a=amperes * limits.ocp_max_a,
            rated_v=volts,
            rated_a=amperes,
        )
        for ch, limits in record.channels.items()
    }
    return replace(record, model=found.group("model"), channels=MappingProxyType(ranges))


def every(dialects: Mapping[str, Dialect]) -> Iterator[tuple[Dialect, Operation, Command]]:
    """All commands of all dialects, for tests and for the doctor."""
    for dialect in dialects.values():
        for operation, command in dialect.commands.items():
            yield dialect, operation, command
