"""Every operation of every dialect, word for word as it goes over the wire, and the traps of each maker."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import timelapse
from scripted_supply import Exchange, ScriptedLine, play, scripted

from hil.drivers import codec, scpi
from hil.drivers.codec import InstrumentRefused, InstrumentTimeout, ReadbackError, ReplyError
from hil.drivers.dialects import DIALECTS, base, dialect
from hil.drivers.scpi import ScpiSupply
from hil.errors import BenchError, SafetyError, UsageError
from hil.model import Setpoint

OK = '0,"No error"'
CLS: Exchange = ("*CLS", None)
Action = Callable[[ScpiSupply], Awaitable[Any]]


def say(*texts: str) -> tuple[Exchange, ...]:
    """Messages without an answer."""
    return tuple((text, None) for text in texts)


def ask(*pairs: str) -> tuple[Exchange, ...]:
    """Question, answer, question, answer …"""
    return tuple(zip(pairs[::2], pairs[1::2], strict=True))


def selected(*pairs: str) -> tuple[Exchange, ...]:
    """R&S questions about channel 1: each after a selection in a message of its own."""
    return tuple(item for pair in ask(*pairs) for item in (("INST:NSEL 1", None), pair))


def bk(*pairs: str) -> tuple[Exchange, ...]:
    """BK questions and settings about channel 1; an empty answer stands for none."""
    return tuple(item for q, a in ask(*pairs) for item in (("INST:SEL CH1", None), (q, a or None)))


#: What is said before the first operation: status, identity, remote control, limits, output states.
OPEN: dict[str, tuple[Exchange, ...]] = {
    "keysight-e36300": (
        CLS,
        *ask("*IDN?", "Keysight Technologies,E36312A,MY57000001,1.0.4"),
        *ask("OUTP? (@1)", "0", "OUTP? (@2)", "0", "OUTP? (@3)", "0"),
    ),
    "keysight-n6700": (
        CLS,
        *ask("*IDN?", "Keysight Technologies,N6701C,MY56000001,E.02.07", "SYST:CHAN?", "1"),
        *ask("VOLT? MAX,(@1)", "+5.10000000E+01", "CURR? MAX,(@1)", "+5.10000000E+00"),
        *ask("OUTP? (@1)", "0"),
    ),
    "rigol-dp800": (
        CLS,
        *ask("*IDN?", "RIGOL TECHNOLOGIES,DP832,DP8C000001,00.01.16"),
        *ask(":OUTP? CH1", "OFF", ":OUTP? CH2", "OFF", ":OUTP? CH3", "OFF"),
    ),
    "rigol-dp2000": (
        CLS,
        *ask("*IDN?", "RIGOL TECHNOLOGIES,DP2031,DP2A000001,00.01.00"),
        *ask(":OUTP? CH1", "OFF", ":OUTP? CH2", "OFF", ":OUTP? CH3", "OFF"),
    ),
    "siglent-spd3303x": (
        CLS,
        *ask("*IDN?", "Siglent Technologies,SPD3303X-E,SPD3XIDD4R5542,1.01.01.02.05,V3.0"),
        *ask("SYST:STAT?", "0x4", "SYST:STAT?", "0x4", "SYST:STAT?", "0x4"),
    ),
    "rs-hmp": (
        CLS,
        *ask("*IDN?", "ROHDE&SCHWARZ, HMP2020, 120000, HW50020001/SW2.62"),
        *selected("OUTP:SEL?", "0"),
        ("INST:NSEL 2", None),
        *ask("OUTP:SEL?", "0"),
    ),
    "rs-nge": (
        CLS,
        *ask("*IDN?", "Rohde&Schwarz,NGE102B,5601.3800k02/100001,1.54"),
        *selected("OUTP?", "0"),
        ("INST:NSEL 2", None),
        *ask("OUTP?", "0"),
    ),
    "tti-cpx": (
        CLS,
        *ask("*IDN?", "THURLBY THANDAR, CPX400DP, 384531, 1.03-2.00", "OP1?", "0", "OP2?", "0"),
    ),
    "korad-ka3005p": ask("*IDN?", "KORADKA3005PV2.0", "STATUS?", "\x01"),
    "bk-9130b": (
        CLS,
        *ask("*IDN?", "B&K Precision,9130B,802204020757510014,1.05-1.04"),
        *bk("SOUR:CHAN:OUTP?", "0"),
        *say("INST:SEL CH2"),
        *ask("SOUR:CHAN:OUTP?", "0"),
        *say("INST:SEL CH3"),
        *ask("SOUR:CHAN:OUTP?", "0"),
    ),
    "itech-it6500": (
        CLS,
        *ask("*IDN?", "ITECH Ltd., IT6512C, 600000000000000001, 1.07"),
        *ask("VOLT? MAX", "80", "CURR? MAX", "60", "OUTP?", "0"),
    ),
    "ea-psi": (
        CLS,
        *ask("*IDN?", "EA Elektro-Automatik GmbH & Co. KG, PSI 9080-60 2U, 1234560001, V2.07 08.04.2016"),
        *say("SYST:LOCK ON"),
        *ask("SYST:LOCK:OWN?", "REMOTE", "OUTP?", "OFF"),
    ),
    "tdk-genesys": (CLS, *ask("*IDN?", "TDK-LAMBDA,G60-85,S/N:1,REV:1", "OUTP:STAT?", "OFF")),
    "chroma-62000p": (CLS, *ask("*IDN?", "CHROMA,62012P-80-60,03.30.1,05648", "CONF:OUTP?", "OFF")),
    "keysight-e4360": (
        CLS,
        *ask("*IDN?", "Keysight Technologies,E4360A,MY50000001,A.01", "SYST:CHAN?", "1"),
        *ask("VOLT? MAX,(@1)", "130", "CURR? MAX,(@1)", "5.1", "OUTP? (@1)", "0"),
    ),
    "keysight-mp4300": (
        CLS,
        *ask("*IDN?", "Keysight Technologies,MP4301A,MY60000001,A.01", "SYST:CHAN?", "1"),
        *ask("VOLT? MAX,(@1)", "160", "CURR? MAX,(@1)", "10", "OUTP? (@1)", "0"),
    ),
    "chroma-62000h-s": (CLS, *ask("*IDN?", "CHROMA,62020H-150S,01.00,1", "CONF:OUTP?", "OFF")),
}
OPEN["ea-pv"] = OPEN["ea-psi"]

PROGRAM = Setpoint(5.5, 2.5)
#: 5.5 V and 2.5 A, set and read back.
PROGRAMMED: dict[str, tuple[Exchange, ...]] = {
    "keysight-e36300": (
        *say("CURR 2.5,(@1)", "VOLT 5.5,(@1)"),
        *ask("VOLT? (@1)", "+5.50000000E+00", "CURR? (@1)", "+2.50000000E+00"),
    ),
    "rigol-dp800": (
        *say(":SOUR1:CURR 2.5", ":SOUR1:VOLT 5.5"),
        *ask(":SOUR1:VOLT?", "5.50", ":SOUR1:CURR?", "2.500"),
    ),
    "siglent-spd3303x": (
        *say("CH1:CURR 2.5", "CH1:VOLT 5.5"),
        *ask("CH1:VOLT?", "5.50", "CH1:CURR?", "2.500"),
    ),
    "rs-hmp": (
        *say("INST:NSEL 1;:CURR 2.5", "INST:NSEL 1;:VOLT 5.5"),
        *selected("VOLT?", "5.500", "CURR?", "2.5000"),
    ),
    "tti-cpx": (*say("I1 2.5", "V1 5.5"), *ask("V1?", "V1 5.50", "I1?", "I1 2.50")),
    "korad-ka3005p": (*say("ISET1:2.500", "VSET1:05.50"), *ask("VSET1?", "05.50", "ISET1?", "2.500K")),
    "bk-9130b": bk("SOUR:CURR 2.5", "", "SOUR:VOLT 5.5", "", "SOUR:VOLT?", "5.500", "SOUR:CURR?", "2.500"),
    "itech-it6500": (*say("CURR 2.5", "VOLT 5.5"), *ask("VOLT?", "5.5", "CURR?", "2.5")),
    "ea-psi": (*say("CURR 2.5", "VOLT 5.5"), *ask("VOLT?", "5.50 V", "CURR?", "2.5 A")),
    "chroma-62000p": (
        *say("SOUR:CURR 2.5", "SOUR:VOLT 5.5"),
        *ask("SOUR:VOLT?", "5.500000e+00", "SOUR:CURR?", "2.500000e+00"),
    ),
}
#: 5.5 V, 0.5 A, 2.75 W measured on an output that is on.
MEASURED: dict[str, tuple[Exchange, ...]] = {
    "keysight-e36300": (
        *ask("MEAS:VOLT? (@1)", "+5.5E+00", "MEAS:CURR? (@1)", "+5.0E-01", "OUTP? (@1)", "1"),
        *ask("VOLT:PROT:TRIP? (@1)", "0", "CURR:PROT:TRIP? (@1)", "0"),  # on only if nothing has tripped
    ),
    "keysight-n6700": (
        *ask("MEAS:VOLT? (@1)", "5.5", "MEAS:CURR? (@1)", "0.5"),
        *ask("OUTP? (@1)", "1", "STAT:QUES:COND? (@1)", "0"),
    ),
    "rigol-dp800": ask(":MEAS:ALL? CH1", "5.5,0.5,2.75", ":OUTP? CH1", "ON"),
    "siglent-spd3303x": ask("MEAS:VOLT? CH1", "5.5", "MEAS:CURR? CH1", "0.5", "SYST:STAT?", "0x14"),
    "rs-hmp": (
        *selected("MEAS:VOLT?", "5.500", "MEAS:CURR?", "0.5000", "OUTP:SEL?", "1"),
        *ask("OUTP:GEN?", "1"),
    ),
    "rs-nge": (*selected("MEAS:VOLT?", "5.500", "MEAS:CURR?", "0.500", "OUTP?", "1"), *ask("OUTP:GEN?", "1")),
    "tti-cpx": ask("V1O?", "5.50V", "I1O?", "0.50A", "OP1?", "1"),
    "korad-ka3005p": ask("VOUT1?", "05.50", "IOUT1?", "0.500", "STATUS?", "\x41"),
    "bk-9130b": bk("MEAS:VOLT?", "5.5", "MEAS:CURR?", "0.5", "SOUR:CHAN:OUTP?", "1"),
    "itech-it6500": ask("MEAS:VOLT?", "5.5", "MEAS:CURR?", "0.5", "OUTP?", "1"),
    "ea-psi": ask("MEAS:ARR?", "5.50 V, 0.5 A, 2.75 W", "OUTP?", "ON"),
    "tdk-genesys": ask("MEAS:VOLT?", "5.500", "MEAS:CURR?", "0.500", "OUTP:STAT?", "ON"),
    "chroma-62000p": ask("MEAS:VOLT?", "5.5", "MEAS:CURR?", "0.5", "CONF:OUTP?", "ON"),
}
#: Output on, output off, both read back.
SWITCHED: dict[str, tuple[Exchange, ...]] = {
    "keysight-e36300": (
        *say("OUTP ON,(@1)"),
        *ask("OUTP? (@1)", "1", "VOLT:PROT:TRIP? (@1)", "0", "CURR:PROT:TRIP? (@1)", "0"),
        *say("OUTP OFF,(@1)"),
        *ask("OUTP? (@1)", "0"),
    ),
    "keysight-n6700": (
        *say("OUTP ON,(@1)"),
        *ask("OUTP? (@1)", "1", "STAT:QUES:COND? (@1)", "0"),
        *say("OUTP OFF,(@1)"),
        *ask("OUTP? (@1)", "0"),
    ),
    "rigol-dp800": (*say(":OUTP CH1,ON"), *ask(":OUTP? CH1", "ON"), *say(":OUTP CH1,OFF"), *ask(":OUTP? CH1", "OFF")),
    "siglent-spd3303x": (
        *say("OUTP CH1,ON"),
        *ask("SYST:STAT?", "0x14"),
        *say("OUTP CH1,OFF"),
        *ask("SYST:STAT?", "0x4"),
    ),
    "rs-hmp": (
        *ask("OUTP:GEN?", "0"),
        *say("INST:NSEL 2"),
        *ask("OUTP:SEL?", "0"),
        *say("INST:NSEL 1;:OUTP:SEL ON", "OUTP:GEN ON"),
        *selected("OUTP:SEL?", "1"),
        *ask("OUTP:GEN?", "1"),
        *say("INST:NSEL 1;:OUTP:SEL OFF"),
        *selected("OUTP:SEL?", "0"),
    ),
    "rs-nge": (
        *ask("OUTP:GEN?", "1"),  # the master is on already: only this channel's switch moves
        *say("INST:NSEL 1;:OUTP ON"),
        *selected("OUTP?", "1"),
        *ask("OUTP:GEN?", "1"),
        *say("INST:NSEL 1;:OUTP OFF"),
        *selected("OUTP?", "0"),
    ),
    "tti-cpx": (*say("OP1 1"), *ask("OP1?", "1"), *say("OP1 0"), *ask("OP1?", "0")),
    "korad-ka3005p": (*say("OUT1"), *ask("STATUS?", "\x41"), *say("OUT0"), *ask("STATUS?", "\x01")),
    "bk-9130b": bk("SOUR:CHAN:OUTP 1", "", "SOUR:CHAN:OUTP?", "1", "SOUR:CHAN:OUTP 0", "", "SOUR:CHAN:OUTP?", "0"),
    "itech-it6500": (*say("OUTP 1"), *ask("OUTP?", "1"), *say("OUTP 0"), *ask("OUTP?", "0")),
    "ea-psi": (*say("OUTP ON"), *ask("OUTP?", "ON"), *say("OUTP OFF"), *ask("OUTP?", "OFF")),
    "tdk-genesys": (*say("OUTP:STAT ON"), *ask("OUTP:STAT?", "ON"), *say("OUTP:STAT OFF"), *ask("OUTP:STAT?", "OFF")),
    "chroma-62000p": (*say("CONF:OUTP ON"), *ask("CONF:OUTP?", "ON"), *say("CONF:OUTP OFF"), *ask("CONF:OUTP?", "OFF")),
}
#: OVP 6 V and OCP 3 A, enabled and read back.
PROTECTED: dict[str, tuple[Exchange, ...]] = {
    "keysight-e36300": (
        *say("VOLT:PROT 6,(@1)"),
        *ask("VOLT:PROT? (@1)", "6.0"),
        *say("CURR:PROT:STAT ON,(@1)"),
        *ask("CURR:PROT:STAT? (@1)", "1", "SYST:ERR?", '+0,"No error"'),
    ),
    "rigol-dp800": (
        *say(":OUTP:OVP:VAL CH1,6", ":OUTP:OVP CH1,ON"),
        *ask(":OUTP:OVP:VAL? CH1", "6.00", ":OUTP:OVP? CH1", "ON"),
        *say(":OUTP:OCP:VAL CH1,3", ":OUTP:OCP CH1,ON"),
        *ask(":OUTP:OCP:VAL? CH1", "3.000", ":OUTP:OCP? CH1", "ON", ":SYST:ERR?", OK),
    ),
    "rs-hmp": (
        *say("INST:NSEL 1;:VOLT:PROT:LEV 6"),
        *selected("VOLT:PROT:LEV?", "6.000"),
        *say("INST:NSEL 1;:FUSE:STAT ON"),
        *selected("FUSE:STAT?", "1"),
        *ask("SYST:ERR?", OK),
    ),
    "rs-nge": (
        *say("INST:NSEL 1;:VOLT:PROT:LEV 6", "INST:NSEL 1;:VOLT:PROT:STAT ON"),
        *selected("VOLT:PROT:LEV?", "6.000", "VOLT:PROT:STAT?", "1"),
        *say("INST:NSEL 1;:FUSE:STAT ON"),
        *selected("FUSE:STAT?", "1"),
        *ask("SYST:ERR?", OK),
    ),
    "tti-cpx": (
        *say("OVP1 6"),
        *ask("OVP1?", "VP1 6.0"),
        *say("OCP1 3"),
        *ask("OCP1?", "CP1 3.00", "EER?", "0", "QER?", "0", "*ESR?", "0"),
    ),
    "itech-it6500": (
        *say("VOLT:PROT 6", "VOLT:PROT:STAT 1"),
        *ask("VOLT:PROT?", "6", "VOLT:PROT:STAT?", "1"),
        *say("CURR:PROT 3", "CURR:PROT:STAT 1"),
        *ask("CURR:PROT?", "3", "CURR:PROT:STAT?", "1", "SYST:ERR?", OK),
    ),
    "ea-psi": (
        *say("VOLT:PROT 6"),
        *ask("VOLT:PROT?", "6.0 V"),
        *say("CURR:PROT 3"),
        *ask("CURR:PROT?", "3.0 A", "STAT:QUES:COND?", "0", "SYST:ERR?", OK),
    ),
    "tdk-genesys": (
        *say("VOLT:PROT:LEV 6"),
        *ask("VOLT:PROT:LEV?", "6.0"),
        *say("CURR:PROT:STAT ON"),
        *ask("CURR:PROT:STAT?", "ON", "SYST:ERR?", OK),
    ),
    "chroma-62000p": (
        *say("SOUR:VOLT:PROT:HIGH 6"),
        *ask("SOUR:VOLT:PROT:HIGH?", "6.0"),
        *say("SOUR:CURR:PROT:HIGH 3"),
        *ask("SOUR:CURR:PROT:HIGH?", "3.0", "SYST:ERR?", OK),
    ),
}
#: A latched OCP, asked; then off, clear, off verified, nothing latched.
CLEARED: dict[str, tuple[Exchange, ...]] = {
    "keysight-e36300": (
        *ask("VOLT:PROT:TRIP? (@1)", "0", "CURR:PROT:TRIP? (@1)", "1"),
        *say("OUTP OFF,(@1)"),
        *ask("OUTP? (@1)", "0"),
        *say("ABOR (@1)", "OUTP:PROT:CLE (@1)"),
        *ask("OUTP? (@1)", "0", "VOLT:PROT:TRIP? (@1)", "0", "CURR:PROT:TRIP? (@1)", "0"),
    ),
    "keysight-n6700": (
        *ask("STAT:QUES:COND? (@1)", "2"),
        *say("OUTP OFF,(@1)"),
        *ask("OUTP? (@1)", "0"),
        *say("ABOR:TRAN (@1)", "OUTP:PROT:CLE (@1)"),
        *ask("OUTP? (@1)", "0", "STAT:QUES:COND? (@1)", "0"),
    ),
    "rigol-dp800": (
        *ask(":OUTP:OVP:QUES? CH1", "NO", ":OUTP:OCP:QUES? CH1", "YES"),
        *say(":OUTP CH1,OFF"),
        *ask(":OUTP? CH1", "OFF"),
        *say(":OUTP:OVP:CLEAR CH1", ":OUTP:OCP:CLEAR CH1"),
        *ask(":OUTP? CH1", "OFF", ":OUTP:OVP:QUES? CH1", "NO", ":OUTP:OCP:QUES? CH1", "NO"),
    ),
    "rigol-dp2000": (
        *ask(":OUTP:OVP:QUES? CH1", "NO", ":OUTP:OCP:QUES? CH1", "YES"),
        *say(":OUTP CH1,OFF"),
        *ask(":OUTP? CH1", "OFF", ":SOUR1:VOLT?", "5.50"),
        *say(":SOUR1:VOLT 0"),  # the clear switches on: with no volts then
        *ask(":SOUR1:VOLT?", "0.00"),
        *say(":SOUR1:VOLT:PROT:CLE", ":SOUR1:CURR:PROT:CLE"),
        *ask(":OUTP? CH1", "ON"),
        *say(":OUTP CH1,OFF"),
        *ask(":OUTP? CH1", "OFF"),
        *say(":SOUR1:VOLT 5.5"),
        *ask(":SOUR1:VOLT?", "5.50", ":OUTP:OVP:QUES? CH1", "NO", ":OUTP:OCP:QUES? CH1", "NO"),
    ),
    "rs-hmp": (
        *selected("VOLT:PROT:TRIP?", "0", "FUSE:TRIP?", "1"),
        *say("INST:NSEL 1;:OUTP:SEL OFF"),
        *selected("OUTP:SEL?", "0"),
        *say("INST:NSEL 1;:VOLT:PROT:CLE"),
        # a blown fuse has no clear: it ends when the output is switched on again
        *selected("OUTP:SEL?", "0", "VOLT:PROT:TRIP?", "0", "FUSE:TRIP?", "1"),
    ),
    "tti-cpx": (
        *ask("LSR1?", "8"),
        *say("OP1 0"),
        *ask("OP1?", "0", "LSR2?", "0"),
        *say("TRIPRST"),
        *ask("OP1?", "0", "LSR1?", "0"),
    ),
    "rs-nge": (
        *selected("VOLT:PROT:TRIP?", "0", "FUSE:TRIP?", "1"),
        *say("INST:NSEL 1;:OUTP OFF"),
        *selected("OUTP?", "0"),
        *say("INST:NSEL 1;:VOLT:PROT:CLE", "INST:NSEL 1;:FUSE:TRIP:CLE"),
        *selected("OUTP?", "0", "VOLT:PROT:TRIP?", "0", "FUSE:TRIP?", "0"),
    ),
    "chroma-62000p": (  # no clear: it ends with switching off and on
        *ask("FETC:STAT?", "2,OFF,CV"),
        *say("CONF:OUTP OFF"),
        *ask("CONF:OUTP?", "OFF", "CONF:OUTP?", "OFF", "FETC:STAT?", "0,OFF,CV"),
    ),
    "ea-psi": (
        *ask("STAT:QUES:COND?", "2"),
        *say("OUTP OFF"),
        *ask("OUTP?", "OFF"),
        *ask("SYST:ERR:ALL?", '203,"Overcurrent"'),
        *ask("OUTP?", "OFF", "STAT:QUES:COND?", "0"),
    ),
    "tdk-genesys": (
        *ask("STAT:QUES:COND?", "8"),
        *say("OUTP:STAT OFF"),
        *ask("OUTP:STAT?", "OFF"),
        *say("OUTP:PROT:CLE"),
        *ask("OUTP:STAT?", "OFF", "STAT:QUES:COND?", "0"),
    ),
}
REGULATED: dict[str, tuple[Exchange, ...]] = {
    "keysight-e36300": ask("STAT:QUES:INST:ISUM1:COND?", "1"),
    "keysight-n6700": ask("STAT:OPER:COND? (@1)", "2"),
    "rigol-dp800": ask(":OUTP:MODE? CH1", "CC"),
    "siglent-spd3303x": ask("SYST:STAT?", "0x15"),
    "rs-hmp": ask("STAT:QUES:INST:ISUM1:COND?", "1"),
    "rs-nge": ask("STAT:QUES:INST:ISUM1:COND?", "1"),
    "korad-ka3005p": ask("STATUS?", "\x40"),
    "tdk-genesys": ask("STAT:OPER:COND?", "2"),
    "chroma-62000p": ask("FETC:STAT?", "0,ON,CC"),
}


def queries(script: tuple[Exchange, ...]) -> tuple[Exchange, ...]:
    """A dialogue without its settings; selections in front of a question stay."""
    return tuple(
        item
        for item, after in zip(script, (*script[1:], ("", None)), strict=True)
        if item[1] is not None or (item[0].startswith("INST:") and ";" not in item[0] and after[1] is not None)
    )


# families that say the same as their siblings
for table in (PROGRAMMED, PROTECTED):
    for sibling in ("keysight-n6700", "keysight-e4360", "keysight-mp4300"):
        table[sibling] = table["keysight-e36300"]
for table in (MEASURED, SWITCHED, CLEARED):
    for sibling in ("keysight-e4360", "keysight-mp4300"):
        table[sibling] = tuple(item for item in table["keysight-n6700"] if not item[0].startswith("ABOR"))
for table in (PROGRAMMED, MEASURED, SWITCHED, PROTECTED, REGULATED):
    table["rigol-dp2000"] = table["rigol-dp800"]
for table in (PROGRAMMED, MEASURED, SWITCHED, PROTECTED, CLEARED, REGULATED):
    table["chroma-62000h-s"] = table["chroma-62000p"]
for table in (PROGRAMMED, MEASURED, SWITCHED, PROTECTED, CLEARED):
    table["ea-pv"] = table["ea-psi"]
PROGRAMMED["rs-nge"], PROGRAMMED["tdk-genesys"] = PROGRAMMED["rs-hmp"], PROGRAMMED["itech-it6500"]


def test_every_dialect_has_its_dialogues() -> None:
    assert set(OPEN) == set(PROGRAMMED) == set(MEASURED) == set(SWITCHED) == set(DIALECTS)


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_program_sets_the_limit_first_and_reads_both_back(name: str) -> None:
    play(name, lambda supply: supply.program(1, PROGRAM), *OPEN[name], *PROGRAMMED[name])


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_the_set_point_is_what_reads_back(name: str) -> None:
    found = play(name, lambda supply: supply.setpoint(1), *OPEN[name], *queries(PROGRAMMED[name]))
    assert found == PROGRAM


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_measure_reads_volts_amperes_watts_and_the_output(name: str) -> None:
    reading = play(name, lambda supply: supply.measure(1), *OPEN[name], *MEASURED[name])
    assert (reading.voltage_v, reading.current_a, reading.power_w, reading.output_on) == (5.5, 0.5, 2.75, True)


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_an_output_is_switched_and_read_back_both_ways(name: str) -> None:
    async def both(supply: ScpiSupply) -> None:
        await supply.output(1, True)
        assert supply.known_outputs[1]
        await supply.output(1, False)
        assert not supply.known_outputs[1]

    play(name, both, *OPEN[name], *SWITCHED[name])


@pytest.mark.parametrize("name", sorted(PROTECTED))
def test_protections_are_set_enabled_and_read_back(name: str) -> None:
    play(name, lambda supply: supply.program_protection(1, 6.0, 3.0), *OPEN[name], *PROTECTED[name])


@pytest.mark.parametrize("name", sorted(CLEARED))
def test_a_trip_is_cleared_with_the_output_off_first(name: str) -> None:
    async def clear(supply: ScpiSupply) -> None:
        assert await supply.tripped(1) == ("ocp",)
        await supply.clear_protection(1)

    play(name, clear, *OPEN[name], *CLEARED[name])


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_regulation_is_told_where_the_instrument_tells(name: str) -> None:
    mode = play(name, lambda supply: supply.regulation(1), *OPEN[name], *REGULATED.get(name, ()))
    assert mode == ("CC" if name in REGULATED else "unknown")


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_garbage_instead_of_a_number_is_never_a_measurement(name: str) -> None:
    (question, _), *_ = [item for item in MEASURED[name] if item[1] is not None]
    before = [item for item in MEASURED[name][:1] if item[1] is None]
    with pytest.raises(ReplyError):
        play(name, lambda supply: supply.measure(1), *OPEN[name], *before, (question, "#####"))


WRONG = {"tti-cpx": "V1 4.20", "korad-ka3005p": "04.20"}
REFUSALS: dict[str, tuple[Exchange, ...]] = {
    "queue": ask("SYST:ERR?", '-222,"Data out of range"', "SYST:ERR?", "0  No Error"),
    "registers": ask("EER?", "120", "QER?", "0", "*ESR?", "16"),
    "none": (),
}


@pytest.mark.parametrize("name", sorted(set(DIALECTS) - {"ea-psi", "ea-pv"}))
def test_a_set_point_that_does_not_read_back_is_not_done(name: str) -> None:
    script = list(PROGRAMMED[name])
    at = next(index for index, (_, reply) in enumerate(script) if reply is not None)
    script[at] = (script[at][0], WRONG.get(name, "4.2"))
    speak = dialect(name)
    refusals = REFUSALS[speak.errors]
    if speak.errors == "queue":
        refusals = tuple((speak.commands["error"].text, reply) for _, reply in refusals)
    with pytest.raises(ReadbackError, match=r"was set to 5.5 V but reads back 4.2 V") as caught:
        play(name, lambda supply: supply.program(1, PROGRAM), *OPEN[name], *script, *refusals)
    said = {"queue": "it says: -222 Data out of range", "registers": "it says: 120 execution error", "none": "4.2 V"}
    assert str(caught.value).endswith(said[speak.errors])


# --------------------------------------------------------------------------------------------- what every table keeps
@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_no_dialect_resets_and_every_template_can_be_filled(name: str) -> None:
    speak = dialect(name)
    for operation, command in speak.commands.items():
        assert not re.search(r"\*RST|\*SAV|\*RCL|OPALL", command.text), operation
        values = dict.fromkeys(("v", "a", "w", "t", "isc", "imp", "voc", "vmp", "percent", "index"), 1.0)
        *before, last = speak.messages(operation, 1, on=True, **values)
        assert not any(text.endswith("?") for text in before)
        asks = "?" in last
        assert asks == (operation.startswith(ASKING) or last == "SYST:ERR:ALL?"), operation
        assert not asks or operation in TEXT_REPLIES or command.reply != base.TEXT, operation


ASKING = (
    "identify",
    "error",
    "execution_e",
    "query_e",
    "event_s",
    "get_",
    "max_",
    "measure",
    "regulation",
    "channel_c",
)
ASKING += ("ovp_tripped", "ocp_tripped", "opp_tripped", "watchdog_tripped", "list_running", "sas_mode", "sas_get")
TEXT_REPLIES = ("identify", "error", "clear_ovp", "clear_ocp", "clear_opp")


def test_known_and_unknown_commands_are_told_apart_as_the_reference_does() -> None:
    unverified = {name: set(dialect(name).unverified()) for name in DIALECTS}
    assert unverified["rigol-dp800"] == {"measure", "clear_ovp"}
    assert unverified["siglent-spd3303x"] == unverified["korad-ka3005p"] == unverified["rs-hmp"] == set()
    assert {"clear_ovp", "clear_ocp"} <= unverified["keysight-e36300"]
    assert unverified["keysight-n6700"] == {"channel_count", "max_voltage", "max_current"}
    itech = set(dialect("itech-it6500").commands) - unverified["itech-it6500"]
    assert {name for name in itech if not name.startswith(("identify", "clear_status", "error"))} == {
        "set_opp_level", "set_opp_state", "get_opp_level", "get_opp_state"
    }  # fmt: skip
    assert "measure" in unverified["ea-psi"]
    tdk = set(dialect("tdk-genesys").commands) - {"identify", "clear_status", "error"}
    assert tdk - unverified["tdk-genesys"] == {"regulation", "ovp_tripped", "ocp_tripped"}


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_a_stranger_is_not_driven(name: str) -> None:
    at = next(index for index, (text, _) in enumerate(OPEN[name]) if text == "*IDN?")
    with pytest.raises(BenchError, match="no model that dialect"):
        play(name, idle, *OPEN[name][:at], ("*IDN?", "ACME,PSU9000,1,1"))


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_what_an_instrument_is_not_asked_has_a_reason(name: str) -> None:
    speak = dialect(name)
    for _, record in speak.models:
        protections = [kind for kind in ("ovp", "ocp", "opp") if getattr(record, kind)]
        missing = set() if speak.has("regulation") else {"regulation"}
        missing |= {"trips"} if any(f"{kind}_tripped" not in speak.commands for kind in protections) else set()
        assert set(speak.unknown) == missing
        assert all(len(reason) > 20 for reason in speak.unknown.values())
        # dips are played by a list exactly where its commands are known; elsewhere the record says why not
        assert speak.has("load_list") == (record.lists is not None and not record.lists.unused)


async def idle(supply: ScpiSupply) -> None:
    """Nothing beyond opening."""


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_the_capability_record_agrees_with_the_command_table(name: str) -> None:
    speak = dialect(name)
    for _, record in speak.models:
        assert record.measures_power == speak.has("measure")
        assert record.ovp == (speak.has("set_ovp_level") and speak.has("get_ovp_level"))
        assert record.ocp == (speak.has("set_ocp_level") or speak.has("set_ocp_state"))
        assert record.ocp_follows_limit == (record.ocp and not speak.has("set_ocp_level"))
        assert record.opp == speak.has("set_opp_level")
        assert record.ocp_delay == speak.has("set_ocp_delay")
        assert bool(record.watchdog) == speak.has("set_watchdog")
        assert record.solar_array == speak.has("sas_mode")
        assert (record.limits == "ask") == speak.has("max_voltage")
        assert record.channels


def test_lease_groups_are_where_channels_are_not_independent() -> None:
    assert {name for name in DIALECTS if dialect(name).lease_group} == {"rs-hmp", "rs-nge", "tti-cpx"}


@pytest.mark.parametrize(
    ("name", "ovp", "ocp"),
    [("siglent-spd3303x", False, False), ("korad-ka3005p", False, False), ("bk-9130b", True, False)],
)
def test_a_protection_that_a_model_has_not_is_refused_before_anything_is_sent(name: str, ovp: bool, ocp: bool) -> None:
    async def ask_for(supply: ScpiSupply) -> None:
        assert (supply.capabilities.ovp, supply.capabilities.ocp) == (ovp, ocp)
        if not ovp:
            with pytest.raises(UsageError, match="has no over-voltage protection over remote; nothing was sent"):
                await supply.program_protection(1, 6.0, None)
        with pytest.raises(UsageError, match="has no over-current protection over remote; nothing was sent"):
            await supply.program_protection(1, None, 3.0)

    play(name, ask_for, *OPEN[name])


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_nothing_is_clamped(name: str) -> None:
    async def too_much(supply: ScpiSupply) -> None:
        limits = supply.capabilities.channels[1]
        for setpoint in (
            Setpoint(limits.voltage_max_v * 1.01 + 0.01, 1),
            Setpoint(1, limits.current_max_a * 1.01 + 0.01),
            Setpoint(-0.1, 1),
            Setpoint(math.nan, 1),
        ):
            with pytest.raises(UsageError):
                await supply.program(1, setpoint)

    play(name, too_much, *OPEN[name])


# ------------------------------------------------------------------------------------------------------ makers' traps
def test_siglent_waits_twenty_milliseconds_between_messages() -> None:
    waits, gap = spoken_gaps("siglent-spd3303x", lambda supply: supply.program(1, PROGRAM))
    assert gap == 0.02
    assert min(waits) >= 0.02 - 1e-9


def test_korad_waits_eighty_milliseconds_and_drops_the_sixth_byte() -> None:
    waits, gap = spoken_gaps("korad-ka3005p", lambda supply: supply.program(1, PROGRAM))
    assert gap == 0.08
    assert min(waits) >= 0.08 - 1e-9
    supply, line = scripted(
        "korad-ka3005p", *OPEN["korad-ka3005p"], *ask("VSET1?", "05.50", "ISET1?", "2.500K", "VSET1?", "05.50")
    )

    async def steps() -> None:
        await supply.setpoint(1)
        assert line.rest == 1
        with pytest.raises(AssertionError):
            await supply.setpoint(1)  # the script ends after VSET1?

    timelapse.run(steps())
    assert line.dropped == 1


def test_korad_bytes_that_are_no_stray_are_out_of_step() -> None:
    with pytest.raises(ReplyError, match="nobody asked"):
        play("korad-ka3005p", lambda supply: supply.setpoint(1), *OPEN["korad-ka3005p"], *ask("VSET1?", "05.50K"))


def test_korad_status_is_one_raw_byte() -> None:
    opened = OPEN["korad-ka3005p"]
    with pytest.raises(ReplyError, match="one raw byte"):
        codec.parse_register("41", "byte")
    assert play("korad-ka3005p", lambda s: s.output_state(1), *opened, *ask("STATUS?", "\xff")) is True
    assert play("korad-ka3005p", lambda s: s.output_state(1), *opened, *ask("STATUS?", "\xbf")) is False
    assert play("korad-ka3005p", lambda s: s.errors(), *opened) == ()


def test_siglent_status_tells_channels_apart_and_coupled_channels_are_refused() -> None:
    opened = OPEN["siglent-spd3303x"]
    assert play("siglent-spd3303x", lambda s: s.output_state(2), *opened, *ask("SYST:STAT?", "0x24")) is True
    assert play("siglent-spd3303x", lambda s: s.output_state(2), *opened, *ask("SYST:STAT?", "0x14")) is False
    assert play("siglent-spd3303x", lambda s: s.regulation(2), *opened, *ask("SYST:STAT?", "0x6")) == "CC"
    assert play("siglent-spd3303x", lambda s: s.regulation(2), *opened, *ask("SYST:STAT?", "0x5")) == "CV"
    for coupled in ("0x8", "0xc"):
        with pytest.raises(SafetyError, match="coupled"):
            play("siglent-spd3303x", idle, *opened[:2], *ask("SYST:STAT?", coupled))


def test_a_master_switch_is_not_closed_over_a_selected_channel() -> None:
    with pytest.raises(SafetyError, match="channel 2 is selected"):
        play(
            "rs-hmp",
            lambda supply: supply.output(1, True),
            *OPEN["rs-hmp"],
            *ask("OUTP:GEN?", "0"),
            *say("INST:NSEL 2"),
            *ask("OUTP:SEL?", "1"),
        )


def test_a_selected_channel_behind_an_open_master_is_off() -> None:
    state = play(
        "rs-hmp", lambda s: s.output_state(1), *OPEN["rs-hmp"], *selected("OUTP:SEL?", "1"), ("OUTP:GEN?", "0")
    )
    assert state is False


@pytest.mark.parametrize(("highest", "sent"), [("250", "20"), ("10.00", "0.02")])
def test_the_unit_of_a_fuse_delay_is_taken_from_its_maximum(highest: str, sent: str) -> None:
    play(
        "rs-nge",
        lambda supply: supply.program_protection(1, None, None, ocp_delay_s=0.02),
        *OPEN["rs-nge"],
        *selected("FUSE:DEL? MAX", highest),
        *say(f"INST:NSEL 1;:FUSE:DEL {sent}"),
        *selected("FUSE:DEL?", sent),
        *ask("SYST:ERR?", OK),
    )


def test_a_fuse_delay_whose_unit_is_not_clear_is_refused() -> None:
    with pytest.raises(BenchError, match="neither seconds nor milliseconds"):
        play(
            "rs-nge",
            lambda supply: supply.program_protection(1, None, None, ocp_delay_s=0.02),
            *OPEN["rs-nge"],
            *selected("FUSE:DEL? MAX", "50"),
        )


def test_tti_trips_are_remembered_because_reading_forgets_them() -> None:
    async def look_twice(supply: ScpiSupply) -> None:
        assert await supply.tripped(1) == ("ovp",)
        assert await supply.tripped(1) == ("ovp",)

    play("tti-cpx", look_twice, *OPEN["tti-cpx"], *ask("LSR1?", "4", "LSR1?", "0"))


def test_a_trip_that_asking_for_errors_acknowledges_is_noted_first() -> None:
    async def steps(supply: ScpiSupply) -> None:
        assert [str(entry) for entry in await supply.errors()] == ["203 Overcurrent"]
        assert await supply.tripped(1) == ("ocp",)

    said = ask("STAT:QUES:COND?", "2", "SYST:ERR?", '203,"Overcurrent"', "SYST:ERR?", OK, "STAT:QUES:COND?", "0")
    play("ea-psi", steps, *OPEN["ea-psi"], *said)


def test_a_global_clear_switches_off_what_else_has_tripped() -> None:
    play(
        "tti-cpx",
        lambda supply: supply.clear_protection(1),
        *OPEN["tti-cpx"],
        *say("OP1 0"),
        *ask("OP1?", "0", "LSR2?", "8"),
        *say("OP2 0"),
        *ask("OP2?", "0"),
        *say("TRIPRST"),
        *ask("OP1?", "0", "LSR1?", "0"),
    )


def test_tti_registers_are_errors() -> None:
    entries = play("tti-cpx", lambda s: s.errors(), *OPEN["tti-cpx"], *ask("EER?", "0", "QER?", "2", "*ESR?", "36"))
    assert [str(entry) for entry in entries] == ["2 query error", "32 command error"]
    with pytest.raises(InstrumentRefused, match="120 execution error"):
        play(
            "tti-cpx",
            lambda supply: supply.program_protection(1, 6.0, None),
            *OPEN["tti-cpx"],
            *PROTECTED["tti-cpx"][:2],
            *ask("EER?", "120", "QER?", "0", "*ESR?", "16"),
        )


@pytest.mark.parametrize("reply", ["12.00A", "12.00", "V2 12.00", "12.00V junk"])
def test_a_reply_with_the_wrong_unit_or_channel_is_refused(reply: str) -> None:
    with pytest.raises(ReplyError):
        play("tti-cpx", lambda supply: supply.measure(1), *OPEN["tti-cpx"], *ask("V1O?", reply))


def test_ea_is_locked_first_and_a_refused_lock_is_said() -> None:
    opened = OPEN["ea-psi"]
    with pytest.raises(BenchError, match=r"refuses remote control \(it says LOCAL"):
        play("ea-psi", idle, *opened[:3], ("SYST:LOCK:OWN?", "LOCAL"))


def test_ea_settings_may_read_back_late_but_not_never() -> None:
    settings = say("CURR 2.5", "VOLT 5.5")
    late = ask("VOLT?", "0.0 V", "CURR?", "2.5 A", "VOLT?", "5.50 V")
    play("ea-psi", lambda s: s.program(1, PROGRAM), *OPEN["ea-psi"], *settings, *late)
    supply, line = scripted("ea-psi", *OPEN["ea-psi"], *settings, *late[:2], *[("VOLT?", "0.0 V")] * 99)

    async def steps() -> None:
        with pytest.raises(AssertionError, match="STAT:QUES"):  # having given up, it asks for errors
            await supply.program(1, PROGRAM)

    timelapse.run(steps())
    assert line.script


def test_ea_lets_go_of_the_lock_when_it_is_closed() -> None:
    play("ea-psi", lambda supply: supply.close(), *OPEN["ea-psi"], *say("SYST:LOCK OFF"))


def test_remote_control_is_taken_on_a_serial_line_only() -> None:
    cls, idn, *rest = OPEN["itech-it6500"]
    play("itech-it6500", idle, cls, idn, *say("SYST:REM"), *rest, address="serial:///dev/ttyUSB0")
    play("itech-it6500", idle, cls, idn, *rest)


def test_power_protection_where_there_is_one() -> None:
    play(
        "itech-it6500",
        lambda supply: supply.program_protection(1, None, None, opp_w=100.0),
        *OPEN["itech-it6500"],
        *say("POW:PROT 100", "POW:PROT:STAT 1"),
        *ask("POW:PROT?", "100", "POW:PROT:STAT?", "1", "SYST:ERR?", OK),
    )
    with pytest.raises(UsageError, match="no over-power protection"):
        play("rigol-dp800", lambda s: s.program_protection(1, None, None, opp_w=9.0), *OPEN["rigol-dp800"])


def test_where_ocp_acts_at_the_limit_no_higher_limit_is_accepted() -> None:
    async def steps(supply: ScpiSupply) -> None:
        await supply.program_protection(1, 6.0, 3.0)
        with pytest.raises(UsageError, match="trips at its current limit; nothing was sent"):
            await supply.program(1, Setpoint(5.0, 3.1))

    play("keysight-e36300", steps, *OPEN["keysight-e36300"], *PROTECTED["keysight-e36300"])


def test_bk_protects_the_voltage_of_the_selected_channel_and_clears_it_there() -> None:
    async def steps(supply: ScpiSupply) -> None:
        await supply.program_protection(1, 6.0, None)
        await supply.clear_protection(1)

    play(
        "bk-9130b",
        steps,
        *OPEN["bk-9130b"],
        *bk("SOUR:VOLT:PROT 6", "", "SOUR:VOLT:PROT:STAT 1", "", "SOUR:VOLT:PROT?", "6.0", "SOUR:VOLT:PROT:STAT?", "1"),
        *ask("SYST:ERR?", OK),
        *bk("SOUR:CHAN:OUTP 0", "", "SOUR:CHAN:OUTP?", "0", "SOUR:CHAN:OUTP?", "0"),
    )


def test_bk_whose_protection_stays_off_is_refused() -> None:
    async def steps(supply: ScpiSupply) -> None:
        with pytest.raises(ReadbackError, match=r"ovp of channel 1 .* stays disabled"):
            await supply.program_protection(1, 6.0, None)

    play(
        "bk-9130b",
        steps,
        *OPEN["bk-9130b"],
        *bk("SOUR:VOLT:PROT 6", "", "SOUR:VOLT:PROT:STAT 1", "", "SOUR:VOLT:PROT?", "6.0", "SOUR:VOLT:PROT:STAT?", "0"),
        *ask("SYST:ERR?", OK),
    )


# --------------------------------------------------------------------------------------------------------------- dips
def loading(transient: str, volts: str = "4", dwell: str = "0.01") -> tuple[Exchange, ...]:
    """A dip as Keysight's list on channel 1: what is set now, then what is told."""
    told = [*("CURR:MODE FIX", "LIST:COUN 1", "LIST:STEP AUTO", "LIST:TERM:LAST OFF", f"LIST:VOLT {volts}")]
    told += [f"LIST:DWEL {dwell}", f"TRIG{transient}:SOUR IMM", "VOLT:MODE LIST"]
    return (*ask("VOLT? (@1)", "+5.50000000E+00"), *say(*(f"{text},(@1)" for text in told)))


def loaded(**answers: str) -> tuple[Exchange, ...]:
    """The list as it reads back, with one answer changed."""
    said = {"LIST:VOLT": "+4.0E+00", "LIST:DWEL": "+1.0E-02", "LIST:COUN": "1", "LIST:TERM:LAST": "0"}
    said |= {"VOLT:MODE": "LIST", "CURR:MODE": "FIX", **{key.replace("_", ":"): text for key, text in answers.items()}}
    return tuple((f"{what}? (@1)", text) for what, text in said.items())


def ended(transient: str) -> tuple[Exchange, ...]:
    """The list is over: back to the set point, verified."""
    stop = say(f"ABOR{transient} (@1)", "VOLT:MODE FIX,(@1)")
    return (*stop, *ask("VOLT:MODE? (@1)", "FIX", "VOLT? (@1)", "+5.50000000E+00", "SYST:ERR?", '+0,"No error"'))


async def dip(supply: ScpiSupply, seconds: float = 0.01) -> scpi.Dip:
    return (await supply.dip({1: (4.0, 5.5)}, seconds))[1]


NO_ERROR = ask("SYST:ERR?", '+0,"No error"')
RUNNING, DONE = ask("STAT:OPER:COND? (@1)", "65", "STAT:OPER:COND? (@1)", "1")


def test_an_n6700_plays_a_dip_and_is_asked_when_it_has_ended() -> None:
    found = play(
        "keysight-n6700",
        dip,
        *OPEN["keysight-n6700"],
        *loading(":TRAN"),
        *loaded(),
        *NO_ERROR,
        *say("INIT:TRAN (@1)"),
        *(RUNNING, RUNNING, DONE),
        *ended(":TRAN"),
        *ask("OUTP? (@1)", "1", "STAT:QUES:COND? (@1)", "0"),
    )
    assert found == scpi.Dip(found.began_s, 0.01, True, True, ())


def test_an_e36300_plays_a_dip_that_is_on_its_grid_and_nothing_else() -> None:
    after = ask("OUTP? (@1)", "1", "VOLT:PROT:TRIP? (@1)", "0", "CURR:PROT:TRIP? (@1)", "0")
    opened = OPEN["keysight-e36300"]
    listed = (*loading(""), *loaded(), *NO_ERROR, *say("INIT (@1)"), *ended(""), *after)
    found = play("keysight-e36300", dip, *opened, *listed)
    assert found == scpi.Dip(found.began_s, 0.01, True, True, ())
    written = (*say("VOLT 4,(@1)", "VOLT 5.5,(@1)"), *ask("VOLT? (@1)", "5.5"), *NO_ERROR, *after)
    found = play("keysight-e36300", lambda supply: dip(supply, 0.015), *opened, *written)
    assert not found.by_list


def test_where_no_list_can_be_read_back_a_dip_is_two_writes() -> None:
    found = play(
        "rs-hmp",
        lambda supply: dip(supply, 0.06),
        *OPEN["rs-hmp"],
        *say("INST:NSEL 1;:VOLT 4", "INST:NSEL 1;:VOLT 5.5"),
        *selected("VOLT?", "5.500"),
        *ask("SYST:ERR?", OK),
        *selected("OUTP:SEL?", "1"),
        *ask("OUTP:GEN?", "1"),
    )
    assert (found.by_list, found.output_on) == (False, True)


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"LIST_VOLT": "3.9"}, r"3\.9 V instead of 4 V"),
        ({"LIST_DWEL": "0.1"}, r"0\.1 s instead of 0\.01 s"),
        ({"LIST_COUN": "3"}, "3 times"),
        ({"LIST_COUN": "9.9E37"}, "finite number"),  # for ever
        ({"LIST_TERM_LAST": "1"}, "stays at its last step"),
        ({"VOLT_MODE": "FIX"}, "voltage mode FIXED"),
        ({"CURR_MODE": "LIST"}, "current mode LIST"),  # the current limit would go with it
    ],
)
def test_a_list_that_is_not_the_dip_is_not_started(answers: dict[str, str], says: str) -> None:
    script = [*OPEN["keysight-n6700"], *loading(":TRAN"), *loaded(**answers)]
    if "9.9E37" in answers.values():
        script = script[: [text for text, _ in script].index("LIST:COUN? (@1)") + 1]
    with pytest.raises((ReadbackError, ReplyError), match=says):
        play("keysight-n6700", dip, *script)


def test_a_list_that_is_refused_is_not_started() -> None:
    refused = ask("SYST:ERR?", '-221,"Settings conflict"', "SYST:ERR?", '+0,"No error"')
    with pytest.raises(InstrumentRefused, match="while loading the list of channel 1: -221 Settings conflict"):
        play("keysight-n6700", dip, *OPEN["keysight-n6700"], *loading(":TRAN"), *loaded(), *refused)


def test_a_dip_that_would_return_to_something_else_is_not_even_loaded() -> None:
    with pytest.raises(ReadbackError, match=r"was set to 5\.5 V but reads back 5 V"):
        play("keysight-n6700", dip, *OPEN["keysight-n6700"], *ask("VOLT? (@1)", "5.0"), *NO_ERROR)


def test_a_list_that_does_not_end_is_an_error() -> None:
    script = (*loading(":TRAN"), *loaded(), *NO_ERROR, *say("INIT:TRAN (@1)"), *[RUNNING] * 10)
    with pytest.raises(ReadbackError, match=r"the list of channel 1 of .* goes on after its 0\.01 s"):
        play("keysight-n6700", dip, *OPEN["keysight-n6700"], *script)


def test_a_voltage_that_stays_in_list_mode_is_an_error() -> None:
    stop = (*say("ABOR:TRAN (@1)", "VOLT:MODE FIX,(@1)"), *ask("VOLT:MODE? (@1)", "LIST"))
    with pytest.raises(ReadbackError, match="stays in mode LIST"):
        play("keysight-n6700", lambda supply: supply.stop_list(1), *OPEN["keysight-n6700"], *stop)
    play("rigol-dp800", lambda supply: supply.stop_list(1), *OPEN["rigol-dp800"])  # has none: nothing to say


def test_a_trip_during_a_list_is_told() -> None:
    found = play(
        "keysight-n6700",
        dip,
        *OPEN["keysight-n6700"],
        *(*loading(":TRAN"), *loaded(), *NO_ERROR, *say("INIT:TRAN (@1)"), DONE, *ended(":TRAN")),
        *ask("OUTP? (@1)", "1", "STAT:QUES:COND? (@1)", "2", "STAT:QUES:COND? (@1)", "2"),
    )
    assert (found.output_on, found.trips) == (False, ("ocp",))


# ------------------------------------------------------------------------------------------------ the N6700's watchdog
ARM = (
    *say("OUTP:PROT:WDOG:DEL 5", "OUTP:PROT:WDOG ON"),
    *ask("OUTP:PROT:WDOG:DEL?", "5", "OUTP:PROT:WDOG?", "1"),
)


def test_the_watchdog_is_armed_read_back_and_disarmed() -> None:
    async def steps(supply: ScpiSupply) -> None:
        await supply.arm_watchdog(5)
        assert supply.watchdog_s == 5
        await supply.disarm_watchdog()
        assert supply.watchdog_s is None

    play("keysight-n6700", steps, *OPEN["keysight-n6700"], *ARM, *say("OUTP:PROT:WDOG OFF"), ("OUTP:PROT:WDOG?", "0"))


@pytest.mark.parametrize("answers", [("60", "1"), ("5", "0")])
def test_a_watchdog_that_is_not_as_armed_is_no_watchdog(answers: tuple[str, str]) -> None:
    with pytest.raises(ReadbackError, match="reads back"):
        play(
            "keysight-n6700",
            lambda supply: supply.arm_watchdog(5),
            *OPEN["keysight-n6700"],
            *ARM[:2],
            *ask("OUTP:PROT:WDOG:DEL?", answers[0], "OUTP:PROT:WDOG?", answers[1]),
        )


def test_a_watchdog_is_refused_where_there_is_none_and_out_of_range() -> None:
    with pytest.raises(UsageError, match="has no output watchdog"):
        play("rigol-dp800", lambda supply: supply.arm_watchdog(5), *OPEN["rigol-dp800"])
    with pytest.raises(UsageError, match="outside 1 to 3600 s"):
        play("keysight-n6700", lambda supply: supply.arm_watchdog(0.5), *OPEN["keysight-n6700"])


def test_after_the_watchdogs_trip_the_output_is_off_whatever_it_says() -> None:
    async def steps(supply: ScpiSupply) -> None:
        assert await supply.output_state(1) is False
        assert await supply.tripped(1) == ("watchdog",)

    lies = ask("OUTP? (@1)", "1", "STAT:QUES:COND? (@1)", "2048", "STAT:QUES:COND? (@1)", "2048")
    play("keysight-n6700", steps, *OPEN["keysight-n6700"], *lies)


def test_the_watchdog_is_armed_again_after_a_reopening() -> None:
    opened = OPEN["keysight-n6700"]

    async def steps(supply: ScpiSupply) -> None:
        await supply.arm_watchdog(5)
        with pytest.raises(InstrumentTimeout):
            await supply.regulation(1)
        assert await supply.regulation(1) == "CV"

    question = "STAT:OPER:COND? (@1)"
    play("keysight-n6700", steps, *opened, *ARM, (question, InstrumentTimeout("late")), *opened, *ARM, (question, "1"))


def test_an_over_current_delay_in_seconds() -> None:
    play(
        "keysight-n6700",
        lambda supply: supply.program_protection(1, None, None, ocp_delay_s=0.02),
        *OPEN["keysight-n6700"],
        *say("CURR:PROT:DEL 0.02,(@1)"),
        *ask("CURR:PROT:DEL? (@1)", "+2.0E-02", "SYST:ERR?", OK),
    )


# ------------------------------------------------------------------------------------------------------------- helpers
def spoken_gaps(name: str, action: Action) -> tuple[list[float], float]:
    """The time between every two messages of an action, on a clock that only sleeping moves."""
    line = ScriptedLine([*OPEN[name], *PROGRAMMED[name]], dialect(name).terminator)
    now, times = [0.0], []
    write = line.write

    def stamped(data: bytes) -> None:
        times.append(now[0])
        write(data)

    line.write = stamped  # type: ignore[method-assign]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    async def steps() -> None:
        supply = ScpiSupply(name, "tcp://192.0.2.1:1", transport=line, clock=lambda: now[0])
        await supply.open()
        await action(supply)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scpi.asyncio, "sleep", sleep)
        timelapse.run(steps())
    return [b - a for a, b in itertools.pairwise(times)], dialect(name).min_gap_s
