"""ITECH IT6300, IT6500 and IT-M3x: plain SCPI on one channel; on a serial line remote control is taken first."""

from __future__ import annotations

from hil.drivers.dialects.base import (
    COMMON,
    ONE,
    SWITCH,
    Capabilities,
    Dialect,
    channel,
    channels,
    manual,
    table,
    unverified,
)

_NOT_READ = "the maker numbers status bits by series; the IT6500's were not read"

_IT6500 = Capabilities(
    model="IT6500",
    channels=channels(channel(0, 0)),
    limits="ask",
    ovp=True,
    ocp=True,
    opp=True,
    command_s=0.02,
    source="unverified",
)

ITECH_IT6500 = Dialect(
    name="itech-it6500",
    title="ITECH IT6300, IT6500 and IT-M3x series",
    port=30000,
    on="1",
    off="0",
    quirks=frozenset({"remote_on_serial_only"}),
    unknown={"regulation": _NOT_READ, "trips": _NOT_READ},
    models=((r"^ITECH[^,]*,\s*IT-?(63|65|M3)\w+", _IT6500),),
    commands=table(
        COMMON,
        {
            "take_remote": unverified("SYST:REM"),
            "max_voltage": unverified("VOLT? MAX", ONE),
            "max_current": unverified("CURR? MAX", ONE),
            "set_voltage": unverified("VOLT {v}"),
            "set_current": unverified("CURR {a}"),
            "get_voltage": unverified("VOLT?", ONE),
            "get_current": unverified("CURR?", ONE),
            "set_output": unverified("OUTP {state}"),
            "get_output": unverified("OUTP?", SWITCH),
            "measure_voltage": unverified("MEAS:VOLT?", ONE),
            "measure_current": unverified("MEAS:CURR?", ONE),
            "set_ovp_level": unverified("VOLT:PROT {v}"),
            "set_ovp_state": unverified("VOLT:PROT:STAT {state}"),
            "get_ovp_level": unverified("VOLT:PROT?", ONE),
            "get_ovp_state": unverified("VOLT:PROT:STAT?", SWITCH),
            "set_ocp_level": unverified("CURR:PROT {a}"),
            "set_ocp_state": unverified("CURR:PROT:STAT {state}"),
            "get_ocp_level": unverified("CURR:PROT?", ONE),
            "get_ocp_state": unverified("CURR:PROT:STAT?", SWITCH),
            "set_opp_level": manual("POW:PROT {w}"),
            "set_opp_state": manual("POW:PROT:STAT {state}"),
            "get_opp_level": manual("POW:PROT?", ONE),
            "get_opp_state": manual("POW:PROT:STAT?", SWITCH),
            "clear_ovp": unverified("PROT:CLE"),
            "clear_ocp": unverified("PROT:CLE"),
            "clear_opp": unverified("PROT:CLE"),
        },
    ),
)
