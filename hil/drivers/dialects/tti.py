"""TTi CPX, PL, QL and MX: short words with the channel inside, replies with tags and units, errors in registers.

`TRIPRST` clears every channel, so that all of them form one lease group. Reading the limit register forgets the trips:
the driver remembers them. Channel numbers do not follow the order of the terminals.
"""

from __future__ import annotations

from hil.drivers.dialects.base import (
    SWITCH,
    Capabilities,
    ChannelRange,
    Dialect,
    Reply,
    bit,
    channel,
    channels,
    manual,
    table,
    tagged,
)

_REGISTER = Reply("bits")
_OV, _OC = 4, 8


def _tti(name: str, *ranges: ChannelRange) -> tuple[str, Capabilities]:
    record = Capabilities(
        model=name, channels=channels(*ranges), ovp=True, ocp=True, command_s=0.02, source="unverified"
    )
    return rf"^THURLBY[ -]THANDAR,\s*{name},", record


TTI_CPX = Dialect(
    name="tti-cpx",
    title="TTi CPX, PL, QL and MX series",
    port=9221,
    on="1",
    off="0",
    errors="registers",
    quirks=frozenset({"global_clear", "trip_read_clears"}),
    unknown={"regulation": "its limit register says what was entered since it was last asked, not what holds now"},
    models=(
        _tti("CPX200DP", *[channel(60, 10, v_step=0.01, a_step=0.01, ovp_v=66, ocp_a=11)] * 2),
        _tti("CPX400DP", *[channel(60, 20, v_step=0.01, a_step=0.01, ovp_v=66, ocp_a=22)] * 2),
        _tti("CPX400SP", channel(60, 20, v_step=0.01, a_step=0.01, ovp_v=66, ocp_a=22)),
        _tti("QL355P", channel(35, 3, ovp_v=40, ocp_a=5.5)),
        _tti("QL355TP", *[channel(35, 3, ovp_v=40, ocp_a=5.5)] * 2),
    ),
    commands=table(
        {
            "identify": manual("*IDN?"),
            "clear_status": manual("*CLS"),
            "event_status": manual("*ESR?", _REGISTER),
            "execution_error": manual("EER?", _REGISTER),
            "query_error": manual("QER?", _REGISTER),
            "set_voltage": manual("V{ch} {v}"),
            "set_current": manual("I{ch} {a}"),
            "get_voltage": manual("V{ch}?", tagged(r"V{ch} N")),
            "get_current": manual("I{ch}?", tagged(r"I{ch} N")),
            "set_output": manual("OP{ch} {state}"),
            "get_output": manual("OP{ch}?", SWITCH),
            "measure_voltage": manual("V{ch}O?", tagged(r"N ?V")),
            "measure_current": manual("I{ch}O?", tagged(r"N ?A")),
            "set_ovp_level": manual("OVP{ch} {v}"),
            "get_ovp_level": manual("OVP{ch}?", tagged(r"VP{ch} N")),
            "set_ocp_level": manual("OCP{ch} {a}"),
            "get_ocp_level": manual("OCP{ch}?", tagged(r"CP{ch} N")),
            "ovp_tripped": manual("LSR{ch}?", bit(_OV)),
            "ocp_tripped": manual("LSR{ch}?", bit(_OC)),
            "clear_ovp": manual("TRIPRST"),
            "clear_ocp": manual("TRIPRST"),
        }
    ),
)
