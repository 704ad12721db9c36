"""EA PS and PSI, and their PV function: remote control is locked first, replies carry units, settings act late.

The makers ask for 5 ms and recommend 10 to 15 ms between messages. A connection that is idle for 5 s is dropped, the
output stays on: the session reopens by itself and finds it so. The PV function plays a table of 4096 currents; it must
not be touched for two seconds after it was selected, and leaving it forgets the table.
"""

from __future__ import annotations

from collections.abc import Mapping

from hil.drivers.dialects.base import (
    COMMON,
    SWITCH,
    Capabilities,
    Command,
    Dialect,
    Operation,
    Reply,
    Unknown,
    bit,
    channel,
    channels,
    manual,
    table,
    tagged,
    unverified,
)

_V, _A, _W = tagged("N ?V?"), tagged("N ?A?"), tagged("N ?W?")
_OWNER = Reply(words=(("REMOTE", "REMOTE"), ("LOCAL", "LOCAL"), ("NONE", "NONE")))


def _psi(solar_array: bool) -> tuple[str, Capabilities]:
    record = Capabilities(
        model="PS/PSI",
        # multiples of the ratings in the model's name
        channels=channels(channel(1.02, 1.02, v_step=0.1, a_step=0.1, ovp_v=1.1, ocp_a=1.1)),
        limits="model",
        ovp=True,
        ocp=True,
        opp=True,
        measures_power=True,
        solar_array=solar_array,
        command_s=0.02,
        source="unverified",
    )
    return r"^EA[^,]*,\s*(?P<model>PS[A-Z]* ?(?:9|10)(?P<v>\d{3})-(?P<a>\d+)[^,]*)", record


_COMMANDS: Mapping[Operation, Command] = table(
    COMMON,
    {
        "take_remote": manual("SYST:LOCK ON"),
        "get_remote": unverified("SYST:LOCK:OWN?", _OWNER),
        "release_remote": unverified("SYST:LOCK OFF"),
        "set_voltage": manual("VOLT {v}"),
        "set_current": manual("CURR {a}"),
        "get_voltage": manual("VOLT?", _V),
        "get_current": manual("CURR?", _A),
        "set_output": manual("OUTP {state}"),
        "get_output": manual("OUTP?", SWITCH),
        "measure": unverified("MEAS:ARR?", tagged("N ?V, ?N ?A, ?N ?W"), "three numbers with units"),
        "set_ovp_level": manual("VOLT:PROT {v}"),
        "get_ovp_level": manual("VOLT:PROT?", _V),
        "set_ocp_level": manual("CURR:PROT {a}"),
        "get_ocp_level": manual("CURR:PROT?", _A),
        "set_opp_level": manual("POW:PROT {w}"),
        "get_opp_level": manual("POW:PROT?", _W),
        "ovp_tripped": unverified(
            "STAT:QUES:COND?", bit(1), "the bits of the register; the older PS 9000 has OVP in bit 6"
        ),
        "ocp_tripped": unverified("STAT:QUES:COND?", bit(2), "the bits of the questionable register"),
        "opp_tripped": unverified("STAT:QUES:COND?", bit(4), "the bits of the questionable register"),
        "clear_ovp": unverified("SYST:ERR:ALL?", note="reading the errors acknowledges an alarm"),
        "clear_ocp": unverified("SYST:ERR:ALL?", note="reading the errors acknowledges an alarm"),
        "clear_opp": unverified("SYST:ERR:ALL?", note="reading the errors acknowledges an alarm"),
    },
)

_NOT_TOLD: Unknown = {
    "regulation": "the older PS 9000 has CC in bit 7 of its questionable register; the PSI's was not read"
}

EA_PSI = Dialect(
    name="ea-psi",
    title="EA PS and PSI 9000/10000 series",
    min_gap_s=0.015,
    settle_s=0.25,
    quirks=frozenset({"error_read_clears"}),
    unknown=_NOT_TOLD,
    models=(_psi(solar_array=False),),
    commands=_COMMANDS,
)

EA_PV = Dialect(
    name="ea-pv",
    title="EA PSI and PSB with the PV function",
    min_gap_s=0.015,
    settle_s=0.25,
    quirks=frozenset({"error_read_clears", "sas_switch_resets"}),
    unknown=_NOT_TOLD,
    models=(_psi(solar_array=True),),
    commands=table(
        _COMMANDS,
        {
            "sas_mode": unverified("FUNC:GEN:SEL?", Reply(words=(("NONE", "FIXED"), ("PV", "SAS")))),
            "sas_enter": manual("FUNC:GEN:SEL PV"),
            "sas_leave": manual("FUNC:GEN:SEL NONE"),
            "sas_point": unverified("FUNC:GEN:XY:LEV {index}\nFUNC:GEN:XY:DATA {a}"),
            "sas_submit": unverified("FUNC:GEN:XY:SUBM"),
            "sas_scale": manual("IRR {percent}"),
            "sas_get_scale": unverified("IRR?", tagged("N ?%?")),
        },
    ),
)
