"""Supply dialects as data: a command table, the channel form, named quirks and a capability record per model.

A dialect is a value: adding one adds no code as long as its quirks have names here. Every command says how far it is
known: `manual` (read in the maker's programming guide) or `unverified` (general knowledge; check before trusting it on
hardware). Nothing here was tried on an instrument.

Templates know `{ch}` (channel number), `{v}` (volts), `{a}` (amperes) and `{state}` (the dialect's word for on or off).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from hil.errors import BenchError, UsageError

Operation = Literal[
    "identify",
    "clear_status",
    "error",
    "set_voltage",
    "set_current",
    "get_voltage",
    "get_current",
    "set_output",
    "get_output",
    "measure",
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
]
Source = Literal["manual", "unverified"]
Quirk = Literal[
    "clear_restores_output",  # clearing a protection may switch the output back on
    "common_output_switch",  # one master switch for all channels: they form one lease group
    "global_clear",  # clearing one channel clears all
]


@dataclass(frozen=True, slots=True)
class Command:
    """One message of a dialect. `source` says how far it is known; `note` names what to check."""

    text: str
    source: Source
    note: str = ""


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
class Capabilities:
    """What a model can do. `command_s` is the assumed time of one exchange before it has been measured."""

    model: str
    channels: Mapping[int, ChannelRange]
    ovp: bool
    ocp: bool
    watchdog: bool
    lists: bool
    solar_array: bool
    measures_power: bool
    command_s: float
    source: Source


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a family of supplies is spoken to. `port` is its usual raw-socket port."""

    name: str
    title: str
    commands: Mapping[Operation, Command]
    models: tuple[tuple[str, Capabilities], ...]  # (pattern over *IDN?, what that model can do)
    terminator: str = "\n"
    on: str = "ON"
    off: str = "OFF"
    port: int = 5025
    min_gap_s: float = 0.0
    quirks: frozenset[Quirk] = field(default_factory=frozenset)

    def message(self, operation: Operation, ch: int = 0, v: float = 0.0, a: float = 0.0, on: bool = False) -> str:
        """The text to send for `operation`, without terminator. BenchError when the dialect has no such command."""
        command = self.commands.get(operation)
        if command is None:
            raise BenchError(f"dialect {self.name} has no command for {operation}")
        state = self.on if on else self.off
        return command.text.format(ch=ch, v=number(v), a=number(a), state=state)

    def has(self, operation: Operation) -> bool:
        return operation in self.commands

    def capabilities(self, identity: str) -> Capabilities:
        """The record of the model that answered `identity` to `*IDN?`; BenchError for a stranger, never a guess."""
        for pattern, record in self.models:
            if re.search(pattern, identity, re.IGNORECASE):
                return record
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


def dialect(name: str) -> Dialect:
    """The dialect called `name`; UsageError lists the known ones."""
    found = DIALECTS.get(name)
    if found is None:
        raise UsageError(f"unknown supply dialect {name!r}", hint=f"known dialects: {', '.join(sorted(DIALECTS))}")
    return found


def _dp800_channel(volts: float, amperes: float, over_v: float, ovp_v: float) -> ChannelRange:
    return ChannelRange(
        voltage_max_v=over_v,
        current_max_a=3.2,
        ovp_min_v=0.01,
        ovp_max_v=ovp_v,
        ocp_min_a=0.001,
        ocp_max_a=3.3,
        voltage_step_v=0.01,
        current_step_a=0.001,
        rated_v=volts,
        rated_a=amperes,
    )


_DP832 = Capabilities(
    model="DP832",
    channels=MappingProxyType(
        {
            1: _dp800_channel(30.0, 3.0, 32.0, 33.0),
            2: _dp800_channel(30.0, 3.0, 32.0, 33.0),
            3: _dp800_channel(5.0, 3.0, 5.3, 5.5),
        }
    ),
    ovp=True,
    ocp=True,
    watchdog=False,
    lists=False,  # the DP800 timer and delayer count in whole seconds: too coarse for a mission
    solar_array=False,
    measures_power=True,
    command_s=0.02,
    source="unverified",  # settable range and steps from the data sheet's table, not checked on a unit
)

RIGOL_DP800 = Dialect(
    name="rigol-dp800",
    title="Rigol DP800 series",
    port=5555,
    quirks=frozenset({"clear_restores_output"}),
    models=((r"^RIGOL TECHNOLOGIES,DP832A?,", _DP832),),
    commands=MappingProxyType(
        {
            "identify": Command("*IDN?", "manual"),
            "clear_status": Command("*CLS", "manual"),
            "error": Command(":SYST:ERR?", "manual"),
            "set_voltage": Command(":SOUR{ch}:VOLT {v}", "manual"),
            "set_current": Command(":SOUR{ch}:CURR {a}", "manual"),
            "get_voltage": Command(":SOUR{ch}:VOLT?", "manual"),
            "get_current": Command(":SOUR{ch}:CURR?", "manual"),
            "set_output": Command(":OUTP CH{ch},{state}", "manual"),
            "get_output": Command(":OUTP? CH{ch}", "manual"),
            "measure": Command(":MEAS:ALL? CH{ch}", "unverified", "three numbers: volts, amperes, watts"),
            "regulation": Command(":OUTP:MODE? CH{ch}", "manual"),
            "set_ovp_level": Command(":OUTP:OVP:VAL CH{ch},{v}", "manual"),
            "set_ovp_state": Command(":OUTP:OVP CH{ch},{state}", "manual"),
            "get_ovp_level": Command(":OUTP:OVP:VAL? CH{ch}", "manual"),
            "get_ovp_state": Command(":OUTP:OVP? CH{ch}", "manual"),
            "ovp_tripped": Command(":OUTP:OVP:QUES? CH{ch}", "manual"),
            "clear_ovp": Command(":OUTP:OVP:CLEAR CH{ch}", "unverified"),
            "set_ocp_level": Command(":OUTP:OCP:VAL CH{ch},{a}", "manual"),
            "set_ocp_state": Command(":OUTP:OCP CH{ch},{state}", "manual"),
            "get_ocp_level": Command(":OUTP:OCP:VAL? CH{ch}", "manual"),
            "get_ocp_state": Command(":OUTP:OCP? CH{ch}", "manual"),
            "ocp_tripped": Command(":OUTP:OCP:QUES? CH{ch}", "manual"),
            "clear_ocp": Command(":OUTP:OCP:CLEAR CH{ch}", "manual"),
        }
    ),
)

DIALECTS: Mapping[str, Dialect] = MappingProxyType({entry.name: entry for entry in (RIGOL_DP800,)})
