"""R&S HMP and NGE100/NGL/NGP: a channel is selected first, settings and queries go in separate messages.

The selection is repeated in every message that sets something and before every query: another client or a hand at the
front panel may have selected another board's channel meanwhile. One master switch feeds all selected channels.
"""

from __future__ import annotations

from hil.drivers.dialects.base import (
    COMMON,
    ONE,
    SWITCH,
    Capabilities,
    Dialect,
    ListLimits,
    Reply,
    channel,
    channels,
    manual,
    table,
    unverified,
)

_ISUM = Reply("bits", words=((3, "UR"), (1, "CC"), (2, "CV")))
_S = "INST:NSEL {ch};:"  # in front of a setting, in the same message
_NO_READ_BACK = "its arbitrary sequence cannot be read back before it runs, nor is it known how it leaves the output"
_Q = "INST:NSEL {ch}\n"  # in front of a query, in a message of its own

_COMMANDS = table(
    COMMON,
    {
        "set_voltage": manual(_S + "VOLT {v}"),
        "set_current": manual(_S + "CURR {a}"),
        "get_voltage": manual(_Q + "VOLT?", ONE),
        "get_current": manual(_Q + "CURR?", ONE),
        "set_master": manual("OUTP:GEN {state}"),
        "get_master": manual("OUTP:GEN?", SWITCH),
        "measure_voltage": manual(_Q + "MEAS:VOLT?", ONE),
        "measure_current": manual(_Q + "MEAS:CURR?", ONE),
        "set_ovp_level": manual(_S + "VOLT:PROT:LEV {v}"),
        "get_ovp_level": manual(_Q + "VOLT:PROT:LEV?", ONE),
        "ovp_tripped": manual(_Q + "VOLT:PROT:TRIP?", SWITCH),
        "clear_ovp": manual(_S + "VOLT:PROT:CLE"),
        "set_ocp_state": manual(_S + "FUSE:STAT {state}"),
        "get_ocp_state": manual(_Q + "FUSE:STAT?", SWITCH),
        "ocp_tripped": manual(_Q + "FUSE:TRIP?", SWITCH),
    },
)


def _hmp(name: str, *ratings: tuple[float, float]) -> tuple[str, Capabilities]:
    record = Capabilities(
        model=name,
        channels=channels(*(channel(v, a, ovp_v=v + 0.5) for v, a in ratings)),
        ovp=True,
        ocp=True,
        ocp_follows_limit=True,
        lists=ListLimits(128, 0.06, 10.0, 0.01, _NO_READ_BACK),
        command_s=0.02,
        source="unverified",
    )
    return rf"^(HAMEG|ROHDE&SCHWARZ|Rohde&Schwarz),\s*{name},", record


RS_HMP = Dialect(
    name="rs-hmp",
    title="R&S (Hameg) HMP series",
    on="ON",
    off="OFF",
    quirks=frozenset({"common_output_switch"}),
    models=(
        _hmp("HMP2020", (32.05, 10), (32.05, 5)),
        _hmp("HMP2030", (32.05, 5), (32.05, 5), (32.05, 5)),
        _hmp("HMP4030", *[(32.05, 10)] * 3),
        _hmp("HMP4040", *[(32.05, 10)] * 4),
    ),
    commands=table(
        _COMMANDS,
        {
            "set_output": manual(_S + "OUTP:SEL {state}"),
            "get_output": manual(_Q + "OUTP:SEL?", SWITCH),
            "regulation": manual("STAT:QUES:INST:ISUM{ch}:COND?", _ISUM),
        },
    ),
)


def _nge(name: str, pattern: str, *ratings: tuple[float, float]) -> tuple[str, Capabilities]:
    record = Capabilities(
        model=name,
        channels=channels(*(channel(v, a) for v, a in ratings)),
        ovp=True,
        ocp=True,
        ocp_follows_limit=True,
        ocp_delay=True,
        lists=ListLimits(128, 0.01, 600.0, 0.01, _NO_READ_BACK),
        command_s=0.02,
        source="unverified",
    )
    return rf"^(ROHDE&SCHWARZ|Rohde&Schwarz),\s*{pattern},", record


RS_NGE = Dialect(
    name="rs-nge",
    title="R&S NGE100, NGL200 and NGP800 series",
    quirks=frozenset({"common_output_switch"}),
    models=(
        _nge("NGE102B", "NGE102B?", *[(32.0, 3.0)] * 2),
        _nge("NGE103B", "NGE103B?", *[(32.0, 3.0)] * 3),
        _nge("NGL201", "NGL201", (20.0, 6.0)),
        _nge("NGL202", "NGL202", *[(20.0, 6.0)] * 2),
        _nge("NGP804", "NGP804", *[(32.0, 20.0)] * 4),
        _nge("NGP814", "NGP814", *[(64.0, 10.0)] * 4),
    ),
    commands=table(
        _COMMANDS,
        {
            "set_output": manual(_S + "OUTP {state}"),
            "get_output": manual(_Q + "OUTP?", SWITCH),
            "set_ovp_state": manual(_S + "VOLT:PROT:STAT {state}"),
            "get_ovp_state": manual(_Q + "VOLT:PROT:STAT?", SWITCH),
            "max_ocp_delay": manual(_Q + "FUSE:DEL? MAX", ONE, "250 on an NGE100: milliseconds; seconds elsewhere"),
            "clear_ocp": unverified(_S + "FUSE:TRIP:CLE"),
            "set_ocp_delay": manual(_S + "FUSE:DEL {t}"),
            "get_ocp_delay": manual(_Q + "FUSE:DEL?", ONE),
            "regulation": unverified("STAT:QUES:INST:ISUM{ch}:COND?", _ISUM),
        },
    ),
)
