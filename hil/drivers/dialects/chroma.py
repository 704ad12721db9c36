"""Chroma 62000P, and 62000H-S with its solar-array mode: `SOUR:` in front, the output under `CONF:`.

No clear is known: after a trip the output is switched off and on again. The four corner values of a curve take effect
together with `TRIG`.
"""

from __future__ import annotations

from dataclasses import replace

from hil.drivers.dialects.base import (
    COMMON,
    CV_CC_WORDS,
    ONE,
    SWITCH,
    Capabilities,
    Dialect,
    Reply,
    channel,
    channels,
    manual,
    table,
    unverified,
)

_COMMANDS = table(
    COMMON,
    {
        "set_voltage": manual("SOUR:VOLT {v}"),
        "set_current": manual("SOUR:CURR {a}"),
        "get_voltage": manual("SOUR:VOLT?", ONE),
        "get_current": manual("SOUR:CURR?", ONE),
        "set_output": manual("CONF:OUTP {state}"),
        "get_output": manual("CONF:OUTP?", SWITCH),
        "measure_voltage": manual("MEAS:VOLT?", ONE),
        "measure_current": manual("MEAS:CURR?", ONE),
        "regulation": unverified("FETC:STAT?", Reply(words=CV_CC_WORDS.words, part=2), "its three words"),
        "ovp_tripped": unverified("FETC:STAT?", Reply("bits", masks=(1,), part=0), "its alarm bits"),
        "ocp_tripped": unverified("FETC:STAT?", Reply("bits", masks=(2,), part=0), "its alarm bits"),
        "set_ovp_level": manual("SOUR:VOLT:PROT:HIGH {v}"),
        "get_ovp_level": manual("SOUR:VOLT:PROT:HIGH?", ONE),
        "set_ocp_level": manual("SOUR:CURR:PROT:HIGH {a}"),
        "get_ocp_level": manual("SOUR:CURR:PROT:HIGH?", ONE),
    },
)


_62000P = Capabilities(
    model="62000P",
    # multiples of the ratings in the model's name
    channels=channels(channel(1.0, 1.0, v_step=0.01, a_step=0.01, ovp_v=1.1, ocp_a=1.05)),
    limits="model",
    ovp=True,
    ocp=True,
    command_s=0.02,
    source="unverified",
)


def _solar(name: str, volts: float, amperes: float) -> tuple[str, Capabilities]:
    one = channel(volts, amperes, v_step=0.01, a_step=0.01, ovp_v=volts * 1.1, ocp_a=amperes * 1.05)
    record = replace(_62000P, model=name, channels=channels(one), limits="data", solar_array=True)
    return rf"^CHROMA[^,]*,\s*{name},", record


CHROMA_62000P = Dialect(
    name="chroma-62000p",
    title="Chroma 62000P series",
    port=2101,
    models=((r"^CHROMA[^,]*,\s*(?P<model>62\d{3}P-(?P<v>\d+)-(?P<a>\d+)),", _62000P),),
    commands=_COMMANDS,
)

CHROMA_62000H_S = Dialect(
    name="chroma-62000h-s",
    title="Chroma 62000H-S solar array simulators",
    port=2101,
    models=(
        _solar("62020H-150S", 150, 40),
        _solar("62050H-600S", 600, 8.5),
        _solar("62100H-600S", 600, 17),
        _solar("62150H-600S", 600, 25),
        _solar("62150H-1000S", 1000, 15),
    ),
    commands=table(
        _COMMANDS,
        {
            "sas_mode": unverified("OUTP:MODE?", Reply(words=(("FIX", "FIXED"), ("FIXED", "FIXED"), ("SAS", "SAS")))),
            "sas_enter": unverified("OUTP:MODE SAS"),
            "sas_leave": unverified("OUTP:MODE FIXED"),
            "sas_curve": manual("SAS:VOC {voc}\nSAS:ISC {isc}\nSAS:VMP {vmp}\nSAS:IMP {imp}"),
            "sas_get_voc": manual("SAS:VOC?", ONE),
            "sas_get_isc": manual("SAS:ISC?", ONE),
            "sas_get_vmp": manual("SAS:VMP?", ONE),
            "sas_get_imp": manual("SAS:IMP?", ONE),
            "sas_submit": manual("TRIG"),
        },
    ),
)
