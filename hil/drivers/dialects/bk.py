"""BK Precision 9130B: channels by name, `OUTP` switches all of them, `SOUR:CHAN:OUTP` the selected one.

Over-voltage protection is enabled and its state read back: the maker's other series, and the ITECH this one is built
like, keep it off until told. Unverified on a 9130B: one that does not know `VOLT:PROT:STAT` does not answer, and is not
powered then, rather than powered without protection. No clear is known (the maker's PVS series has `PROT:CLE`): a trip
ends when the output is switched off and on again.
"""

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

_SELECT = "INST:SEL CH{ch}\n"


def _bk(name: str, *ratings: tuple[float, float]) -> tuple[str, Capabilities]:
    record = Capabilities(
        model=name,
        channels=channels(*(channel(v, a) for v, a in ratings)),
        ovp=True,
        ocp=False,
        command_s=0.03,
        source="unverified",
    )
    return rf"^B&?K Precision,\s*{name},", record


BK_9130B = Dialect(
    name="bk-9130b",
    title="BK Precision 9130B series",
    on="1",
    off="0",
    unknown={
        "regulation": "no question for it in what we read of the 9130B's guide",
        "trips": "no question for them in what we read of the 9130B's guide; the 9115 has VOLT:PROT:TRIG?",
    },
    models=(
        _bk("9130B", (30, 3), (30, 3), (5, 3)),
        _bk("9131B", (30, 6), (30, 6), (5, 3)),
        _bk("9132B", (60, 3), (60, 3), (5, 3)),
    ),
    commands=table(
        COMMON,
        {
            "set_voltage": manual(_SELECT + "SOUR:VOLT {v}"),
            "set_current": manual(_SELECT + "SOUR:CURR {a}"),
            "get_voltage": manual(_SELECT + "SOUR:VOLT?", ONE),
            "get_current": manual(_SELECT + "SOUR:CURR?", ONE),
            "set_output": manual(_SELECT + "SOUR:CHAN:OUTP {state}"),
            "get_output": manual(_SELECT + "SOUR:CHAN:OUTP?", SWITCH),
            "measure_voltage": manual(_SELECT + "MEAS:VOLT?", ONE),
            "measure_current": manual(_SELECT + "MEAS:CURR?", ONE),
            "set_ovp_level": manual(_SELECT + "SOUR:VOLT:PROT {v}"),
            "get_ovp_level": manual(_SELECT + "SOUR:VOLT:PROT?", ONE),
            "set_ovp_state": unverified(_SELECT + "SOUR:VOLT:PROT:STAT {state}"),
            "get_ovp_state": unverified(_SELECT + "SOUR:VOLT:PROT:STAT?", SWITCH),
        },
    ),
)
