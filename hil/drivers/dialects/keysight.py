"""Keysight E36300 and N6700/N6705, and the solar-array simulators E4360 and MP4300: channel lists behind every command.

What bites: clearing a protection restores the output as it was before the trip; any message on any interface feeds the
N6700's watchdog; after a trip, the watchdog's too (bit 2048 of the questionable register), `OUTP?` may still say 1.
The array simulators take the four corner values in ONE message: sent one by one they make four curves, and a set that
makes no curve leaves the old one in force.

A dip is a list of one voltage, played once and left (`LIST:TERM:LAST OFF`), so that the instrument itself returns to
its set point, whatever becomes of us. Only the voltage is in list mode: the current limit and all protections hold.
"""

from __future__ import annotations

from collections.abc import Mapping

from hil.drivers.dialects.base import (
    COMMON,
    ONE,
    OPERATION,
    SWITCH,
    Capabilities,
    Command,
    Dialect,
    ListLimits,
    Operation,
    Reply,
    Unknown,
    Watchdog,
    bit,
    channel,
    channels,
    manual,
    table,
    unverified,
)

_OV, _OC, _PROT, _TRANSIENT = 1, 2, 2048, 64
#: Bits of a summary register as in the whole E36xx family: 1 means the voltage is not held, 2 the current is not.
_ISUM = Reply("bits", words=((3, "UR"), (1, "CC"), (2, "CV")))

_CHANNEL_LIST: Mapping[Operation, Command] = table(
    COMMON,
    {
        "set_voltage": manual("VOLT {v},(@{ch})"),
        "set_current": manual("CURR {a},(@{ch})"),
        "get_voltage": manual("VOLT? (@{ch})", ONE),
        "get_current": manual("CURR? (@{ch})", ONE),
        "set_output": manual("OUTP {state},(@{ch})"),
        "get_output": manual("OUTP? (@{ch})", SWITCH),
        "measure_voltage": manual("MEAS:VOLT? (@{ch})", ONE),
        "measure_current": manual("MEAS:CURR? (@{ch})", ONE),
        "set_ovp_level": manual("VOLT:PROT {v},(@{ch})"),
        "get_ovp_level": manual("VOLT:PROT? (@{ch})", ONE),
        "set_ocp_state": manual("CURR:PROT:STAT {state},(@{ch})"),
        "get_ocp_state": manual("CURR:PROT:STAT? (@{ch})", SWITCH),
    },
)


_MODE = Reply(words=(("FIX", "FIXED"), ("FIXED", "FIXED"), ("STEP", "STEP"), ("LIST", "LIST"), ("ARB", "ARB")))


def _dip_list(transient: str, note: str = "") -> Mapping[Operation, Command]:
    """One step of volts; `transient` is the word that the N6700 puts behind its trigger commands."""
    settings = (
        *("CURR:MODE FIX", "LIST:COUN 1", "LIST:STEP AUTO", "LIST:TERM:LAST OFF", "LIST:VOLT {v}", "LIST:DWEL {t}"),
        *(f"TRIG{transient}:SOUR IMM", "VOLT:MODE LIST"),
    )
    return {
        "load_list": manual("\n".join(f"{setting},(@{{ch}})" for setting in settings), note=note),
        "get_list_voltage": manual("LIST:VOLT? (@{ch})", ONE, note),
        "get_list_dwell": manual("LIST:DWEL? (@{ch})", ONE, note),
        "get_list_count": manual("LIST:COUN? (@{ch})", ONE, note),
        "get_list_last": manual("LIST:TERM:LAST? (@{ch})", SWITCH, note),
        "get_voltage_mode": manual("VOLT:MODE? (@{ch})", _MODE, note),
        "get_current_mode": manual("CURR:MODE? (@{ch})", _MODE, note),
        "start_list": manual(f"INIT{transient} (@{{ch}})", note=note),
        "abort_list": manual(f"ABOR{transient} (@{{ch}})", note=note),
        "fix_voltage": manual("VOLT:MODE FIX,(@{ch})", note=note),
    }


def _e36300(name: str, *ratings: tuple[float, float]) -> tuple[str, Capabilities]:
    ranges = [channel(v, a, over=1.03, ovp_v=v * 1.1) for v, a in ratings]
    record = Capabilities(
        model=name,
        channels=channels(*ranges),
        ovp=True,
        ocp=True,
        ocp_follows_limit=True,
        lists=ListLimits(100, 0.01, 3600.0, 0.01),  # the step of a dwell is not known finer
        command_s=0.01,
        source="unverified",
    )
    return rf"^Keysight Technologies,{name},", record


KEYSIGHT_E36300 = Dialect(
    name="keysight-e36300",
    title="Keysight E36300 series",
    quirks=frozenset({"clear_restores_output", "output_reply_lies"}),
    models=(
        _e36300("E36311A", (6, 5), (25, 1), (25, 1)),
        _e36300("E36312A", (6, 5), (25, 1), (25, 1)),
        _e36300("E36313A", (6, 10), (25, 2), (25, 2)),
    ),
    commands=table(
        _CHANNEL_LIST,
        _dip_list("", "as in a published driver"),
        {
            "ovp_tripped": manual("VOLT:PROT:TRIP? (@{ch})", SWITCH),
            "ocp_tripped": manual("CURR:PROT:TRIP? (@{ch})", SWITCH),
            "clear_ovp": unverified("OUTP:PROT:CLE (@{ch})"),
            "clear_ocp": unverified("OUTP:PROT:CLE (@{ch})"),
            "regulation": manual("STAT:QUES:INST:ISUM{ch}:COND?", _ISUM, "the meaning of its bits"),
        },
    ),
)

#: The mainframe is the same whatever modules it holds: their limits are asked, four channels at most.
_N6700 = Capabilities(
    model="N6700",
    channels=channels(*(channel(0, 0) for _ in range(4))),
    limits="ask",
    ovp=True,
    ocp=True,
    ocp_follows_limit=True,
    ocp_delay=True,
    watchdog=Watchdog(1, 3600),
    lists=ListLimits(512, 0.0, 262.144, 1e-6),
    command_s=0.005,
    source="manual",
)

KEYSIGHT_N6700 = Dialect(
    name="keysight-n6700",
    title="Keysight N6700 and N6705 modular systems",
    quirks=frozenset({"clear_restores_output", "output_reply_lies"}),
    models=((r"^(Keysight|Agilent) Technologies,N670[0-9][A-D],", _N6700),),
    commands=table(
        _CHANNEL_LIST,
        _dip_list(":TRAN"),
        {
            "channel_count": unverified("SYST:CHAN?", ONE),
            "max_voltage": unverified("VOLT? MAX,(@{ch})", ONE),
            "max_current": unverified("CURR? MAX,(@{ch})", ONE),
            "set_ocp_delay": manual("CURR:PROT:DEL {t},(@{ch})"),
            "get_ocp_delay": manual("CURR:PROT:DEL? (@{ch})", ONE),
            "ovp_tripped": manual("STAT:QUES:COND? (@{ch})", bit(_OV)),
            "ocp_tripped": manual("STAT:QUES:COND? (@{ch})", bit(_OC)),
            "watchdog_tripped": manual("STAT:QUES:COND? (@{ch})", bit(_PROT)),
            "list_running": manual("STAT:OPER:COND? (@{ch})", bit(_TRANSIENT)),
            "clear_ovp": manual("OUTP:PROT:CLE (@{ch})"),
            "clear_ocp": manual("OUTP:PROT:CLE (@{ch})"),
            "regulation": manual("STAT:OPER:COND? (@{ch})", OPERATION),
            "set_watchdog": manual("OUTP:PROT:WDOG {state}"),
            "get_watchdog": manual("OUTP:PROT:WDOG?", SWITCH),
            "set_watchdog_delay": manual("OUTP:PROT:WDOG:DEL {t}"),
            "get_watchdog_delay": manual("OUTP:PROT:WDOG:DEL?", ONE),
        },
    ),
)

_SAS: Mapping[Operation, Command] = table(
    {operation: unverified(command.text, command.reply) for operation, command in _CHANNEL_LIST.items()},
    COMMON,
    {
        "channel_count": unverified("SYST:CHAN?", ONE),
        "max_voltage": unverified("VOLT? MAX,(@{ch})", ONE),
        "max_current": unverified("CURR? MAX,(@{ch})", ONE),
        "ovp_tripped": unverified("STAT:QUES:COND? (@{ch})", bit(_OV)),
        "ocp_tripped": unverified("STAT:QUES:COND? (@{ch})", bit(_OC)),
        "clear_ovp": unverified("OUTP:PROT:CLE (@{ch})"),
        "clear_ocp": unverified("OUTP:PROT:CLE (@{ch})"),
        "sas_mode": manual("CURR:MODE? (@{ch})", Reply(words=(("FIX", "FIXED"), ("FIXED", "FIXED"), ("SAS", "SAS")))),
        "sas_enter": manual("CURR:MODE SAS,(@{ch})"),
        "sas_leave": manual("CURR:MODE FIX,(@{ch})"),
        "sas_curve": manual(
            "CURR:SAS:ISC {isc},(@{ch});IMP {imp},(@{ch});:VOLT:SAS:VOC {voc},(@{ch});VMP {vmp},(@{ch})"
        ),
        "sas_get_isc": manual("CURR:SAS:ISC? (@{ch})", ONE),
        "sas_get_imp": manual("CURR:SAS:IMP? (@{ch})", ONE),
        "sas_get_voc": manual("VOLT:SAS:VOC? (@{ch})", ONE),
        "sas_get_vmp": manual("VOLT:SAS:VMP? (@{ch})", ONE),
    },
)

_NOT_TOLD: Unknown = {"regulation": "the operation register's bits are not in what we read of its guide"}

_E4360 = Capabilities(
    model="E4360",
    channels=channels(channel(0, 0), channel(0, 0)),
    limits="ask",
    ovp=True,
    ocp=True,
    ocp_follows_limit=True,
    lists=ListLimits(512, 0.0, 33_554.0, 0.03, unused="its lists hold array curves"),  # the step is its default dwell
    solar_array=True,
    command_s=0.01,
    source="unverified",
)

KEYSIGHT_E4360 = Dialect(
    name="keysight-e4360",
    title="Keysight E4360 modular solar array simulator",
    quirks=frozenset({"clear_restores_output", "output_reply_lies"}),
    models=((r"^(Keysight|Agilent) Technologies,E4360A,", _E4360),),
    unknown=_NOT_TOLD,
    commands=_SAS,
)

_MP4300 = Capabilities(
    model="MP4300",
    channels=channels(channel(0, 0), channel(0, 0)),
    limits="ask",
    ovp=True,
    ocp=True,
    ocp_follows_limit=True,
    solar_array=True,
    command_s=0.01,
    source="unverified",
)

KEYSIGHT_MP4300 = Dialect(
    name="keysight-mp4300",
    title="Keysight MP4300 modular solar array simulator",
    quirks=frozenset({"clear_restores_output", "output_reply_lies", "sas_switch_resets"}),
    unknown=_NOT_TOLD,
    models=((r"^Keysight Technologies,MP43\d\d[A-Z]?,", _MP4300),),
    commands=table(
        _SAS,
        {
            "sas_scale": manual("CURR:SAS:SCAL {percent},(@{ch})"),
            "sas_get_scale": manual("CURR:SAS:SCAL? (@{ch})", ONE),
        },
    ),
)
