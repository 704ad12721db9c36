"""TDK-Lambda Genesys: plain SCPI on one channel; asking for errors takes 60 to 74 ms, so the loop does not."""

from __future__ import annotations

from hil.drivers.dialects.base import (
    COMMON,
    ONE,
    OPERATION,
    SWITCH,
    Capabilities,
    Dialect,
    bit,
    channel,
    channels,
    manual,
    table,
    unverified,
)

#: Faults that shut the output down, as the LAN interface's guide numbers them.
_FOLDBACK, _OV = 8, 16

_GENESYS = Capabilities(
    model="Genesys",
    # multiples of the ratings in the model's name
    channels=channels(channel(1.05, 1.05, v_step=0.01, a_step=0.01, ovp_v=1.1)),
    limits="model",
    ovp=True,
    ocp=True,
    ocp_follows_limit=True,
    command_s=0.012,
    source="unverified",
)

TDK_GENESYS = Dialect(
    name="tdk-genesys",
    title="TDK-Lambda Genesys series",
    port=8003,
    quirks=frozenset({"remote_on_serial_only"}),
    models=((r"^(?:TDK[ -]?)?LAMBDA,\s*(?P<model>G(?:EN)?H?(?P<v>[\d.]+)-(?P<a>[\d.]+)[^,]*)", _GENESYS),),
    commands=table(
        COMMON,
        {
            "take_remote": unverified("SYST:SET REM"),
            "set_voltage": unverified("VOLT {v}"),
            "set_current": unverified("CURR {a}"),
            "get_voltage": unverified("VOLT?", ONE),
            "get_current": unverified("CURR?", ONE),
            "set_output": unverified("OUTP:STAT {state}"),
            "get_output": unverified("OUTP:STAT?", SWITCH),
            "measure_voltage": unverified("MEAS:VOLT?", ONE),
            "measure_current": unverified("MEAS:CURR?", ONE),
            "regulation": manual("STAT:OPER:COND?", OPERATION),
            "set_ovp_level": unverified("VOLT:PROT:LEV {v}"),
            "get_ovp_level": unverified("VOLT:PROT:LEV?", ONE),
            "ovp_tripped": manual("STAT:QUES:COND?", bit(_OV)),
            "set_ocp_state": unverified("CURR:PROT:STAT {state}", note="the maker calls it foldback"),
            "get_ocp_state": unverified("CURR:PROT:STAT?", SWITCH),
            "ocp_tripped": manual("STAT:QUES:COND?", bit(_FOLDBACK)),
            "clear_ovp": unverified("OUTP:PROT:CLE"),
            "clear_ocp": unverified("OUTP:PROT:CLE"),
        },
    ),
)
