"""Rigol DP800 and DP2000: channel names in the arguments, three measurements in a reply, a clear that re-energises."""

from __future__ import annotations

from hil.drivers.dialects.base import (
    COMMON,
    CV_CC_WORDS,
    ONE,
    SWITCH,
    THREE,
    Capabilities,
    ChannelRange,
    Dialect,
    ListLimits,
    channels,
    manual,
    table,
    unverified,
)


def _channel(volts: float, amperes: float, over_v: float, ovp_v: float) -> ChannelRange:
    over_a, ocp_a = round(amperes * 3.2 / 3.0, 3), round(amperes * 1.1, 3)
    return ChannelRange(over_v, over_a, 0.01, ovp_v, 0.001, ocp_a, 0.01, 0.001, volts, amperes)


_DP832 = Capabilities(
    model="DP832",
    channels=channels(_channel(30, 3, 32, 33), _channel(30, 3, 32, 33), _channel(5, 3, 5.3, 5.5)),
    ovp=True,
    ocp=True,
    measures_power=True,
    lists=ListLimits(2048, 1.0, 99_999.0, 1.0, unused="its timer counts in whole seconds and switches the output"),
    command_s=0.02,
    source="unverified",  # settable range and steps from the data sheet's table, not checked on a unit
)

_COMMANDS = table(
    COMMON,
    {
        "error": manual(":SYST:ERR?"),
        "set_voltage": manual(":SOUR{ch}:VOLT {v}"),
        "set_current": manual(":SOUR{ch}:CURR {a}"),
        "get_voltage": manual(":SOUR{ch}:VOLT?", ONE),
        "get_current": manual(":SOUR{ch}:CURR?", ONE),
        "set_output": manual(":OUTP CH{ch},{state}"),
        "get_output": manual(":OUTP? CH{ch}", SWITCH),
        "measure": unverified(":MEAS:ALL? CH{ch}", THREE, "three numbers: volts, amperes, watts"),
        "regulation": manual(":OUTP:MODE? CH{ch}", CV_CC_WORDS),
        "set_ovp_level": manual(":OUTP:OVP:VAL CH{ch},{v}"),
        "set_ovp_state": manual(":OUTP:OVP CH{ch},{state}"),
        "get_ovp_level": manual(":OUTP:OVP:VAL? CH{ch}", ONE),
        "get_ovp_state": manual(":OUTP:OVP? CH{ch}", SWITCH),
        "ovp_tripped": manual(":OUTP:OVP:QUES? CH{ch}", SWITCH),
        "clear_ovp": unverified(":OUTP:OVP:CLEAR CH{ch}"),
        "set_ocp_level": manual(":OUTP:OCP:VAL CH{ch},{a}"),
        "set_ocp_state": manual(":OUTP:OCP CH{ch},{state}"),
        "get_ocp_level": manual(":OUTP:OCP:VAL? CH{ch}", ONE),
        "get_ocp_state": manual(":OUTP:OCP? CH{ch}", SWITCH),
        "ocp_tripped": manual(":OUTP:OCP:QUES? CH{ch}", SWITCH),
        "clear_ocp": manual(":OUTP:OCP:CLEAR CH{ch}"),
    },
)

RIGOL_DP800 = Dialect(
    name="rigol-dp800",
    title="Rigol DP800 series",
    port=5555,
    quirks=frozenset({"clear_restores_output"}),
    models=((r"^RIGOL TECHNOLOGIES,DP832A?,", _DP832),),
    commands=_COMMANDS,
)

_DP2031 = Capabilities(
    model="DP2031",
    channels=channels(_channel(32, 3, 32, 35.2), _channel(32, 3, 32, 35.2), _channel(6, 5, 6, 6.6)),
    ovp=True,
    ocp=True,
    measures_power=True,
    command_s=0.02,
    source="unverified",
)

RIGOL_DP2000 = Dialect(
    name="rigol-dp2000",
    title="Rigol DP2000 series",
    port=5555,
    quirks=frozenset({"clear_enables_output"}),
    models=((r"^RIGOL TECHNOLOGIES,DP2031A?,", _DP2031),),
    commands=table(
        _COMMANDS,
        {
            "clear_ovp": unverified(":SOUR{ch}:VOLT:PROT:CLE"),
            "clear_ocp": manual(":SOUR{ch}:CURR:PROT:CLE", note="switches the output on"),
        },
    ),
)
