"""Every maker's language of the virtual supply, word for word: the common life of an output, then each one's traps."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from virtual_box import Box

from hil.virtual.supply import MODELS, Load, RecordedLoad, ResistiveLoad


@dataclass(frozen=True)
class Life:
    """What a client types to run channel 1 at 12 V and 3 A into 12 ohm, and what it must read."""

    model: str
    on: tuple[str, ...]
    volts: tuple[str, str]
    amperes: tuple[str, str]
    setting: tuple[str, str]
    off: tuple[str, ...]
    nonsense: tuple[str, str, str]  # a wrong message, how to ask for the error, the answer
    gap_s: float = 0.0


UNDEFINED = '-113,"Undefined header"'
SIGNED = ("NONSENSE", "SYST:ERR?", UNDEFINED)
KEYSIGHT_ON = ("VOLT 12,(@1)", "CURR 3,(@1)", "OUTP ON,(@1)")
PLAIN_ON = ("VOLT 12", "CURR 3", "OUTP ON")
RIGOL = (":SOUR1:VOLT 12", ":SOUR1:CURR 3", ":OUTP CH1,ON")
LIVES = [
    Life(
        "keysight-e36300",
        ("VOLT 5,(@1)", "VOLT 12,(@2)", "CURR 1,(@2)", "VOLT 6,(@1)", "CURR 3,(@1)", "OUTP ON,(@1)"),
        ("MEAS:VOLT? (@1)", "+6.00000000E+00"),
        ("MEAS:CURR? (@1)", "+5.00000000E-01"),
        ("VOLT? (@1,2)", "+6.00000000E+00,+1.20000000E+01"),
        ("OUTP OFF,(@1)",),
        SIGNED,
    ),
    Life(
        "keysight-n6700",
        KEYSIGHT_ON,
        ("MEAS:VOLT? (@1)", "+1.20000000E+01"),
        ("MEAS:CURR? (@1)", "+1.00000000E+00"),
        ("CURR? (@1)", "+3.00000000E+00"),
        ("OUTP OFF,(@1)",),
        SIGNED,
    ),
    Life(
        "keysight-e4360",
        KEYSIGHT_ON,
        ("MEAS:VOLT? (@1)", "+1.20000000E+01"),
        ("MEAS:CURR? (@1)", "+1.00000000E+00"),
        ("CURR? (@1)", "+3.00000000E+00"),
        ("OUTP OFF,(@1)",),
        SIGNED,
    ),
    Life(
        "keysight-mp4300",
        KEYSIGHT_ON,
        ("MEAS:VOLT? (@1)", "+1.20000000E+01"),
        ("MEAS:CURR? (@1)", "+1.00000000E+00"),
        ("CURR? (@1)", "+3.00000000E+00"),
        ("OUTP OFF,(@1)",),
        SIGNED,
    ),
    Life(
        "rigol-dp800",
        RIGOL,
        (":MEAS:VOLT? CH1", "12.00"),
        (":MEAS:CURR? CH1", "1.000"),
        (":SOUR1:CURR?", "3.000"),
        (":OUTP CH1,OFF",),
        SIGNED,
    ),
    Life(
        "rigol-dp2000",
        RIGOL,
        (":MEAS:VOLT? CH1", "12.000"),
        (":MEAS:CURR? CH1", "1.0000"),
        (":SOUR1:CURR?", "3.0000"),
        (":OUTP CH1,OFF",),
        SIGNED,
    ),
    Life(
        "siglent-spd3303x",
        ("CH1:VOLT 12", "CH1:CURR 3", "OUTP CH1,ON"),
        ("MEAS:VOLT? CH1", "12.000"),
        ("MEAS:CURR? CH1", "1.000"),
        ("CH1:CURR?", "3.000"),
        ("OUTP CH1,OFF",),
        ("NONSENSE", "SYST:ERR?", "-113  Undefined header"),
        gap_s=0.02,
    ),
    Life(
        "rs-hmp",
        ("INST:NSEL 1;:VOLT 12;:CURR 3", "OUTP:SEL ON", "OUTP:GEN ON"),
        ("MEAS:VOLT?", "12.000"),
        ("MEAS:CURR?", "1.0000"),
        ("CURR?", "3.0000"),
        ("OUTP:SEL OFF",),
        SIGNED,
    ),
    Life(
        "rs-nge",
        ("INST:NSEL 1", "VOLT 12", "CURR 3", "OUTP ON", "OUTP:GEN ON"),
        ("MEAS:VOLT?", "12.000"),
        ("MEAS:CURR?", "1.000"),
        ("CURR?", "3.000"),
        ("OUTP OFF",),
        SIGNED,
    ),
    Life(
        "tti-cpx",
        ("V1 12", "I1 3", "OP1 1"),
        ("V1O?", "12.00V"),
        ("I1O?", "1.000A"),
        ("I1?", "I1 3.000"),
        ("OP1 0",),
        ("NONSENSE", "*ESR?", "32"),
    ),
    Life(
        "korad-ka3005p",
        ("VSET1:12.00", "ISET1:3.000", "OUT1"),
        ("VOUT1?", "12.00"),
        ("IOUT1?", "1.000"),
        ("VSET1?", "12.00"),
        ("OUT0",),
        ("NONSENSE", "VSET1?", "12.00"),  # it has no errors
        gap_s=0.08,
    ),
    Life(
        "bk-9130b",
        ("INST:SEL CH1", "SOUR:VOLT 12", "SOUR:CURR 3", "SOUR:CHAN:OUTP 1"),
        ("MEAS:VOLT?", "12.000"),
        ("MEAS:CURR?", "1.000"),
        ("SOUR:CURR?", "3.000"),
        ("SOUR:CHAN:OUTP 0",),
        SIGNED,
    ),
    Life(
        "itech-it6500",
        PLAIN_ON,
        ("MEAS:VOLT?", "12.000"),
        ("MEAS:CURR?", "1.000"),
        ("CURR?", "3.000"),
        ("OUTP 0",),
        SIGNED,
    ),
    Life(
        "ea-psi",
        ("SYST:LOCK ON", *PLAIN_ON),
        ("MEAS:VOLT?", "12.00 V"),
        ("MEAS:ARR?", "12.00 V, 1.00 A, 12.0 W"),
        ("CURR?", "3.00 A"),
        ("OUTP OFF",),
        SIGNED,
        gap_s=0.01,
    ),
    Life(
        "ea-pv",
        ("SYST:LOCK ON", *PLAIN_ON),
        ("MEAS:VOLT?", "12.00 V"),
        ("MEAS:CURR?", "1.00 A"),
        ("VOLT?", "12.00 V"),
        ("OUTP OFF",),
        SIGNED,
        gap_s=0.01,
    ),
    Life(
        "tdk-genesys",
        PLAIN_ON,
        ("MEAS:VOLT?", "12.000"),
        ("MEAS:CURR?", "1.000"),
        ("CURR?", "3.000"),
        ("OUTP:STAT OFF",),
        SIGNED,
    ),
    Life(
        "chroma-62000p",
        ("SOUR:VOLT 12", "SOUR:CURR 3", "CONF:OUTP ON"),
        ("MEAS:VOLT?", "12.000"),
        ("MEAS:CURR?", "1.000"),
        ("SOUR:CURR?", "3.000"),
        ("CONF:OUTP OFF",),
        SIGNED,
    ),
    Life(
        "chroma-62000h-s",
        ("SOUR:VOLT 12", "SOUR:CURR 3", "CONF:OUTP ON"),
        ("MEAS:VOLT?", "12.000"),
        ("MEAS:CURR?", "1.000"),
        ("SOUR:CURR?", "3.000"),
        ("CONF:OUTP OFF",),
        SIGNED,
    ),
]


def test_every_model_has_its_life_told() -> None:
    assert {life.model for life in LIVES} == set(MODELS)


@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.model)
def test_the_life_of_an_output(life: Life) -> None:
    load = ResistiveLoad(12.0)
    box = Box(life.model, load, gap_s=life.gap_s)
    box.type(*life.on)
    box.wait(0.2)
    assert load.powered
    for question, answer in (life.volts, life.amperes, life.setting):
        assert box.type(question) == answer
    wrong, ask, answer = life.nonsense
    assert box.type(wrong) is None
    assert box.type(ask) == answer
    box.type(*life.off)
    box.wait(0.4)
    assert not load.powered
    assert box.channel().terminal_v < 0.6


@pytest.mark.parametrize("name", MODELS)
def test_the_identity_is_a_makers_and_says_virtual(name: str) -> None:
    identity = Box(name).type("*IDN?")
    assert identity == MODELS[name].identity
    assert ("VIRTUAL" in identity) == (name != "korad-ka3005p")  # the Korad's identity has no serial number


HEADERS = """
VOLT CURR OUTP OUTP:GEN APPL INST INST:NSEL MEAS:VOLT MEAS:ALL VOLT:PROT CURR:PROT CURR:PROT:DEL FUSE:LINK FUSE:DEL
*SAV *RCL *TRG *CLS *RST OUTP:PROT:CLE OUTP:PROT:WDOG:DEL LIST:VOLT LIST:DWEL INIT:TRAN CURR:MODE CURR:SAS:ISC TRIG
CURR:TABL:NAME MEM:TABL:SEL MEM:TABL:VOLT TIME TIME:SET TIME:PARA TIME:GROUP TIME:CYCLE TIME:ENDS SAS:VOC APP:VOLT
ARB:DATA ARB:TRAN ARB:START SYST:LOCK FUNC:GEN:SEL FUNC:GEN:XY:LEV FUNC:GEN:XY:DATA V1 I1 OP1 OVP1 OPALL VSET1: OUT1
RCL1 STAT:QUES:INST:ISUM9:COND SOUR9:VOLT SYST:CHAN:MOD POW:PROT
"""
PARAMETERS = """
ON 1 -1 1e99 nan inf abc CH1 CH9 (@1) (@9) (@) (@1:99) ALL MAX 10,2,1 1,10,2,1 N,3 SAS PV TABL " ' ( ÿ
"""


@pytest.mark.parametrize("name", MODELS)
def test_noise_never_breaks_an_instrument(name: str) -> None:
    box, dice = Box(name, ResistiveLoad(10.0)), random.Random(name)
    headers, parameters = HEADERS.split(), ["", *PARAMETERS.split()]
    for _ in range(1500):
        box.clock.now += dice.choice((0.0, 0.001, 0.1))
        if box.instrument.crashed:
            box.instrument.power_cycle()
        units = [dice.choice(headers) + dice.choice(("", "?")) + " " + dice.choice(parameters) for _ in range(2)]
        box.instrument.execute(";".join(units[: dice.choice((1, 2))]))
        box.instrument.tick()
    box.instrument.power_cycle()
    box.wait(0.1)
    assert box.type("*IDN?") == MODELS[name].identity
    assert not box.channel().output_on


def board(watts: float = 6.0) -> RecordedLoad:
    return RecordedLoad(((0.0, watts),))


# ----------------------------------------------------------------------------------------------------------- Keysight
def n6700(load: Load | None = None) -> Box:
    box = Box("keysight-n6700", load or board())
    box.type("VOLT 15,(@1)", "CURR 2,(@1)", "OUTP ON,(@1)")
    box.wait(0.2)
    return box


def test_n6700_clear_brings_the_board_back_unless_off_came_first() -> None:
    for off_first, expected in ((False, True), (True, False)):
        box = n6700()
        box.type("VOLT:PROT 14,(@1)")
        box.wait(0.05)
        assert not box.channel().output_on
        assert box.type("OUTP? (@1)") == "1"  # the enable is as it was: the output is not
        assert box.type("STAT:QUES:COND? (@1)") == "1"
        assert box.type("STAT:OPER:COND? (@1)") == "4"
        box.type("VOLT:PROT 20,(@1)", *(["OUTP OFF,(@1)"] if off_first else []), "OUTP:PROT:CLE (@1)")
        assert box.channel().output_on == expected
        assert box.type("STAT:QUES:COND? (@1)") == "0"


def test_n6700_watchdog_fires_on_silence_and_outp_goes_on_saying_1() -> None:
    load = board()
    box = n6700(load)
    box.type("OUTP:PROT:WDOG:DEL 2", "OUTP:PROT:WDOG ON")
    assert (box.type("OUTP:PROT:WDOG?"), box.type("OUTP:PROT:WDOG:DEL?")) == ("1", "2")
    for _ in range(10):
        box.wait(1.5)
        box.type("MEAS:VOLT? (@3)")  # any message feeds it, even about another channel
    assert load.powered
    box.wait(1.99)
    assert load.powered
    box.wait(0.03)
    assert not load.powered
    assert box.type("OUTP? (@1)") == "1"
    assert box.type("STAT:QUES:COND? (@1)") == "2048"
    box.type("OUTP:PROT:CLE (@1)")
    assert box.channel().output_on


def test_n6700_a_message_that_means_nothing_feeds_the_watchdog_too() -> None:
    box = n6700()
    box.type("OUTP:PROT:WDOG:DEL 1", "OUTP:PROT:WDOG ON")
    for _ in range(3):
        box.wait(0.9)
        box.type("NONSENSE")
    assert box.channel().output_on


def test_n6700_watchdog_is_volatile_and_has_limits() -> None:
    box = n6700()
    assert box.type("OUTP:PROT:WDOG:DEL?") == "60"
    box.type("OUTP:PROT:WDOG:DEL 3601")
    assert box.type("SYST:ERR?") == '-222,"Data out of range"'
    box.type("OUTP:PROT:WDOG:DEL 5", "OUTP:PROT:WDOG ON", "*RST")
    assert (box.type("OUTP:PROT:WDOG?"), box.type("OUTP:PROT:WDOG:DEL?")) == ("0", "60")


def test_n6700_over_current_means_current_limit_for_its_delay() -> None:
    box = n6700(ResistiveLoad(10.0))  # 1.5 A
    box.type("CURR:PROT:DEL 0.05,(@1)", "CURR:PROT:STAT ON,(@1)", "CURR 1,(@1)")
    box.wait(0.04)
    assert box.channel().output_on
    assert box.type("STAT:OPER:COND? (@1)") == "2"
    box.wait(0.03)
    assert not box.channel().output_on
    assert box.type("STAT:QUES:COND? (@1)") == "2"


def test_n6700_coupled_protection_takes_every_channel() -> None:
    box = n6700()
    box.type("OUTP ON,(@2)", "OUTP:PROT:COUP ON", "VOLT:PROT 14,(@1)")
    box.wait(0.05)
    assert not box.channel(2).output_on
    assert box.type("STAT:QUES:COND? (@1,2)") == "1,2048"


def test_n6700_needs_its_channel_list() -> None:
    box = n6700()
    box.type("VOLT 12")
    assert box.type("SYST:ERR?") == '-109,"Missing parameter"'
    box.type("VOLT 12,(@9)")
    assert box.type("SYST:ERR?") == '-224,"Illegal parameter value"'
    box.type("VOLT 60,(@1:2)")
    assert box.type("SYST:ERR?") == '-222,"Data out of range"'
    assert box.type("VOLT? (@1:2)") == "+1.50000000E+01,+0.00000000E+00"


def test_n6700_power_limit_of_a_module() -> None:
    box = n6700(ResistiveLoad(4.0))
    box.type("CURR 10,(@1)", "VOLT 40,(@1)")  # 400 W wanted, 100 W there
    box.wait(0.5)
    assert float(box.type("MEAS:POW? (@1)") or 0) == pytest.approx(100.0, rel=0.01)


LIST = (
    "VOLT:MODE LIST,(@1)",
    "LIST:VOLT 10,12,14,(@1)",
    "LIST:DWEL 0.1,(@1)",
    "TRIG:TRAN:SOUR BUS,(@1)",
    "INIT:TRAN (@1)",
)


def test_n6700_list_plays_on_a_trigger_and_ends_where_it_began() -> None:
    box = n6700()
    box.type(*LIST)
    box.wait(0.5)
    assert box.type("VOLT? (@1)") == "+1.50000000E+01"
    box.type("*TRG")
    seen = []
    for _ in range(3):
        box.wait(0.05)
        seen.append(round(box.channel().terminal_v, 2))
        box.wait(0.05)
    assert seen == [10.0, 12.0, 14.0]
    box.wait(0.05)
    assert box.type("VOLT? (@1)") == "+1.50000000E+01"


def test_n6700_a_trip_during_a_list_does_not_stop_the_list() -> None:
    box = n6700()
    box.type("LIST:TERM:LAST ON,(@1)", *LIST, "VOLT:PROT 13,(@1)", "VOLT 10,(@1)", "OUTP:PROT:CLE (@1)")
    box.type("LIST:VOLT 10,14,10,(@1)", "*TRG")
    box.wait(0.15)
    assert not box.channel().output_on
    assert box.channel().voltage_set_v == 14.0
    box.wait(0.1)
    assert box.channel().voltage_set_v == 10.0  # it went on behind the trip
    box.type("OUTP:PROT:CLE (@1)")
    assert box.channel().output_on  # and a clear lets its present step out


def test_n6700_an_aborted_list_leaves_what_was_set_before_it() -> None:
    box = n6700()
    box.type("LIST:TERM:LAST ON,(@1)", "LIST:COUN INF,(@1)", *LIST, "*TRG")
    assert box.type("LIST:COUN? (@1)") == "9.9E37"
    box.wait(0.15)
    assert (box.channel().voltage_set_v, box.type("STAT:OPER:COND? (@1)")) == (12.0, "65")
    box.type("ABOR:TRAN (@1)")
    assert (box.channel().voltage_set_v, box.type("STAT:OPER:COND? (@1)")) == (15.0, "1")
    box.wait(1.0)
    assert box.channel().voltage_set_v == 15.0
    box.type("INIT:TRAN (@1)")
    assert box.type("STAT:OPER:COND? (@1)") == "81"  # waiting for its trigger


@pytest.mark.parametrize(
    ("told", "kept"),
    [("0.0100004", 0.01), ("0.0100006", 0.010001), ("0.300004", 0.3), ("2.70004", 2.7), ("30.0004", 30.0), ("0", 0.0)],
)
def test_n6700_keeps_a_dwell_as_finely_as_its_guide_says(told: str, kept: float) -> None:
    box = n6700()
    assert float(box.type("LIST:DWEL? (@1)") or "") == 0.001  # one step before anything is told
    box.type(f"LIST:DWEL {told},(@1)")
    assert float(box.type("LIST:DWEL? (@1)") or "") == pytest.approx(kept, abs=1e-9)


@pytest.mark.parametrize(
    "refused", ["LIST:DWEL 0.009,(@1)", "LIST:DWEL 3601,(@1)", "LIST:COUN 257,(@1)", "LIST:VOLT 6.2,(@1)"]
)
def test_e36300_lists_have_bounds_of_their_own(refused: str) -> None:
    box = Box("keysight-e36300", board(), channel=1)
    box.type("LIST:DWEL 0.01,3600,(@1)", "LIST:COUN 256,(@1)")
    assert box.type("SYST:ERR?") == '+0,"No error"'
    box.type(refused)
    assert box.type("SYST:ERR?") == '-222,"Data out of range"'


def test_n6700_lists_of_different_length_are_refused() -> None:
    box = n6700()
    box.type("LIST:CURR 1,2,(@1)", "CURR:MODE LIST,(@1)", *LIST)
    assert box.type("SYST:ERR?") == '+0,"No error"'
    box.type("*TRG")
    assert box.type("SYST:ERR?") == '-226,"Lists not same length"'
    box.type("TRIG:TRAN (@1)")
    assert box.type("SYST:ERR?") == '-211,"Trigger ignored"'
    box.type("LIST:VOLT " + ",".join(["1"] * 513) + ",(@1)")
    assert box.type("SYST:ERR?") == '-223,"Too much data"'


def test_e36300_selected_channel_trips_and_summary() -> None:
    box = Box("keysight-e36300", board(), channel=2)
    box.type("INST:SEL CH2", "VOLT 15", "CURR 1", "OUTP ON")
    box.wait(0.2)
    assert box.type("STAT:QUES:INST:ISUM2:COND?") == "2"
    assert (box.type("APPL? CH2"), box.type("INST:NSEL?")) == ('"+1.50000E+01,+1.00000E+00"', "2")
    box.type("CURR:PROT:STAT ON", "CURR 0.3")
    box.wait(0.05)
    assert (box.type("CURR:PROT:TRIP?"), box.type("VOLT:PROT:TRIP?")) == ("1", "0")
    assert box.type("STAT:QUES:INST:ISUM2:COND?") == "1024"
    box.type("CURR 1", "CURR:PROT:CLE (@2)")
    assert box.channel(2).output_on


# -------------------------------------------------------------------------------------------------------------- Rigol
@pytest.mark.parametrize(("model", "on_after_off"), [("rigol-dp800", False), ("rigol-dp2000", True)])
def test_rigol_clear_energises_the_dp2000_even_after_off(model: str, on_after_off: bool) -> None:
    box = Box(model, board())
    box.type(":APPL CH1,15,2", ":OUTP CH1,ON")
    box.wait(0.2)
    box.type(":OUTP:OCP:VAL CH1,0.2", ":OUTP:OCP CH1,ON")
    box.wait(0.05)
    assert box.type(":OUTP:OCP:QUES? CH1") == "YES"
    box.type(":OUTP:OCP CH1,OFF", ":OUTP CH1,OFF", ":SOUR1:CURR:PROT:CLE")
    assert box.channel().output_on == on_after_off
    box.type(":OUTP CH1,OFF")
    assert not box.channel().output_on


def test_rigol_timer_plays_groups_and_switches_off() -> None:
    box = Box("rigol-dp800", board())
    box.type(":APPL CH1,15,2", ":OUTP CH1,ON", ":INST CH1", ":TIME:GROUP 2", ":TIME:ENDS OFF")
    box.type(":TIME:PARA 0,10,2,1", ":TIME:PARA 1,12,2,1", ":TIME ON")
    assert box.type(":TIME?") == "ON"
    box.wait(0.5)
    assert box.type(":MEAS? CH1") == "10.00"
    box.wait(1.0)
    assert box.type(":MEAS? CH1") == "12.00"
    box.wait(1.0)
    assert (box.type(":TIME?"), box.type(":OUTP? CH1")) == ("OFF", "OFF")
    box.type(":TIME:PARA 0,10,2,0.5")  # not below a second
    assert (box.type(":SYST:ERR?") or "").startswith("-222")


# ------------------------------------------------------------------------------------------------------------ Siglent
def test_siglent_commands_without_a_gap_are_lost() -> None:
    box = Box("siglent-spd3303x")
    box.type("CH1:VOLT 12", "CH1:CURR 2")
    box.wait(0.02)
    assert box.type("CH1:CURR?") == "3.200"
    assert box.type("CH1:VOLT?") is None
    box.wait(0.02)
    assert box.type("CH1:VOLT?") == "12.000"


def test_siglent_status_word() -> None:
    box = Box("siglent-spd3303x", ResistiveLoad(10.0), gap_s=0.02)
    assert box.type("SYST:STAT?") == "0x04"
    box.type("CH1:VOLT 12", "CH1:CURR 0.5", "OUTP CH1,ON")
    box.wait(0.2)
    assert box.type("SYST:STAT?") == "0x15"
    box.type("OUTP CH2,ON", "OUTP:TRACK 2")
    assert box.type("SYST:STAT?") == "0x3d"
    assert box.type("OUTP?") is None
    assert (box.type("SYST:ERR?"), box.type("SYST:ERR?")) == ("-113  Undefined header", "0  No Error")


def test_siglent_crashes_on_two_saves_within_50_ms_until_its_mains_switch() -> None:
    box = Box("siglent-spd3303x", board())
    box.wait(0.02)
    box.type("CH1:VOLT 15")
    box.wait(0.02)
    box.type("OUTP CH1,ON")
    box.wait(0.1)
    box.type("*SAV 1")
    box.wait(0.06)
    box.type("*SAV 1")
    box.wait(0.03)
    box.type("*SAV 2")
    box.wait(1.0)
    assert box.type("*IDN?") is None
    assert box.channel().output_on  # and nobody can switch it off
    box.instrument.power_cycle()
    assert not box.channel().output_on
    assert (box.type("*IDN?") or "").startswith("Siglent")


def test_siglent_has_no_protection_over_remote() -> None:
    box = Box("siglent-spd3303x", gap_s=0.02)
    for message in ("VOLT:PROT 13", "CH1:VOLT:PROT 13", "OUTP:OVP CH1,ON"):
        box.type(message)
        assert (box.type("SYST:ERR?") or "").startswith("-113")


def test_siglent_timer_is_five_steps_of_whole_seconds() -> None:
    box = Box("siglent-spd3303x", gap_s=0.02)
    box.type("CH1:VOLT 5", "OUTP CH1,ON", "TIME:SET CH1,1,10,2,1.9", "TIME:SET CH1,2,12,2,1", "TIME CH1,ON")
    assert box.type("TIME:SET? CH1,1") == "10.000,2.000,1"
    box.wait(0.5)
    assert box.channel().voltage_set_v == 10.0
    box.wait(1.0)
    assert box.channel().voltage_set_v == 12.0
    box.wait(1.0)
    assert not box.channel().output_on
    box.type("TIME:SET CH1,6,1,1,1")
    assert (box.type("SYST:ERR?") or "").startswith("-222")


# ---------------------------------------------------------------------------------------------------- Rohde & Schwarz
def hmp(load: Load | None = None) -> Box:
    box = Box("rs-hmp", load or board())
    box.type("INST:NSEL 1", "APPL 15,2", "OUTP:SEL ON", "OUTP:GEN ON")
    box.wait(0.2)
    return box


def test_hmp_needs_its_selection_and_the_master_switch() -> None:
    box = Box("rs-hmp", board())
    box.type("INST:NSEL 1", "APPL 15,2", "OUTP:SEL ON")
    assert not box.channel().output_on
    assert (box.type("OUTP:SEL?"), box.type("OUTP?"), box.type("OUTP:GEN?")) == ("1", "0", "0")
    box.type("OUTP:GEN ON")
    assert box.channel().output_on
    box.type("INST OUT2", "OUTP:SEL ON", "OUTP:GEN OFF")
    assert not box.channel(1).output_on
    assert not box.channel(2).output_on
    assert box.type("INST?") == "OUTP2"


def test_hmp_fuse_trips_after_its_delay_and_takes_linked_channels() -> None:
    box = hmp(ResistiveLoad(10.0))
    box.type("INST:NSEL 2", "OUTP:SEL ON", "INST:NSEL 1", "FUSE:LINK 2", "FUSE:DEL 50", "FUSE:STAT ON", "CURR 1")
    assert (box.type("FUSE:DEL?"), box.type("FUSE:DEL? MAX"), box.type("FUSE:LINK?")) == ("50", "250", "2")
    box.wait(0.04)
    assert box.type("FUSE:TRIP?") == "0"
    box.wait(0.03)
    assert box.type("FUSE:TRIP?") == "1"
    assert not box.channel(2).output_on
    assert box.type("STAT:QUES:INST:ISUM1:COND?") == "1024"
    box.type("INST:NSEL 2")
    assert box.type("FUSE:TRIP?") == "1"


def test_hmp_over_voltage_trips_and_is_cleared_with_the_output_off() -> None:
    box = hmp()
    assert box.type("STAT:QUES:INST:ISUM1:COND?") == "2"
    box.type("VOLT:PROT:LEV 14")
    box.wait(0.05)
    assert (box.type("VOLT:PROT:TRIP?"), box.type("OUTP?")) == ("1", "0")
    box.type("OUTP:SEL ON")
    assert (box.type("SYST:ERR?") or "").startswith("-221")
    box.type("VOLT:PROT:LEV 20", "VOLT:PROT:CLE")
    assert (box.type("VOLT:PROT:TRIP?"), box.type("OUTP?")) == ("0", "0")


def test_hmp_arbitrary_waveform() -> None:
    box = hmp()
    box.type("ARB:DATA 10,2,0.1,12,2,0.1", "ARB:REP 2", "ARB:TRAN 1", "ARB:START 1")
    seen = []
    for _ in range(4):
        box.wait(0.05)
        seen.append(round(box.channel().terminal_v))
        box.wait(0.05)
    assert seen == [10, 12, 10, 12]
    box.type("ARB:DATA 10,2,0.05")
    assert (box.type("SYST:ERR?") or "").startswith("-222")
    box.type("ARB:DATA 10,2")
    assert (box.type("SYST:ERR?") or "").startswith("-109")


def test_nge_settings_and_queries_in_one_message_answer_with_what_was() -> None:
    box = Box("rs-nge")
    box.type("INST:NSEL 1", "VOLT 5")
    assert box.type("VOLT 12;:VOLT?") == "5.000"
    assert box.type("VOLT?") == "12.000"


def test_nge_has_states_for_its_protection_and_a_power_reading() -> None:
    box = Box("rs-nge", board())
    box.type("INST:NSEL 1", "VOLT 15", "CURR 2", "OUTP ON", "OUTP:GEN ON", "VOLT:PROT:LEV 14")
    box.wait(0.2)
    assert box.type("MEAS:POW?") == "6.000"
    assert box.channel().output_on
    box.type("VOLT:PROT ON")
    box.wait(0.02)
    assert box.type("VOLT:PROT:TRIP?") == "1"
    box.type("FUSE:DEL 251")
    assert (box.type("SYST:ERR?") or "").startswith("-222")


# ---------------------------------------------------------------------------------------------------------------- TTi
def test_tti_answers_name_what_was_asked() -> None:
    box = Box("tti-cpx")
    box.type("OVP1 13", "OCP1 4", "V2 5", "V2V 6")
    assert [box.type(q) for q in ("OVP1?", "OCP1?", "V2?", "OP1?", "LSR1?")] == [
        "VP1 13.00",
        "CP1 4.000",
        "V2 6.00",
        "0",
        "0",
    ]
    assert box.type("V1?;I1?") == "V1 0.00\r\nI1 20.000"


def test_tti_trips_until_tripreset() -> None:
    box = Box("tti-cpx", board())
    box.type("V1 15", "I1 2", "OP1 1", "OVP1 14")
    box.wait(0.05)
    assert (box.type("LSR1?"), box.type("OP1?")) == ("4", "0")
    box.type("OVP1 20", "OP1 1")
    assert (box.type("EER?"), box.type("EER?"), box.type("OP1?")) == ("116", "0", "0")
    box.type("TRIPRST")
    assert (box.type("OP1?"), box.type("LSR1?")) == ("0", "0")
    box.type("OP1 1")
    assert box.type("LSR1?") == "1"
    box.type("OPALL 0")
    assert not box.channel().output_on


def test_tti_errors_are_registers_that_reading_clears() -> None:
    box = Box("tti-cpx")
    box.type("V1 61", "X1 2", "V9 1", "V1 abc")
    assert (box.type("EER?"), box.type("EER?")) == ("115", "0")
    assert (box.type("*ESR?"), box.type("*ESR?"), box.type("QER?")) == ("48", "0", "0")
    assert box.type("V1?") == "V1 0.00"


# -------------------------------------------------------------------------------------------------------------- Korad
def test_korad_fixed_lengths_stray_byte_and_raw_status() -> None:
    box = Box("korad-ka3005p", ResistiveLoad(10.0), gap_s=0.08)
    box.type("VSET1:5", "ISET1:1.5")
    assert (box.type("VSET1?"), box.type("ISET1?")) == ("05.00", "1.500K")
    assert box.type("STATUS?") == "\x01"
    box.type("OUT1", "BEEP1")
    box.wait(0.1)
    assert (box.type("VOUT1?"), box.type("IOUT1?"), box.type("STATUS?")) == ("05.00", "0.500", "\x51")
    box.type("ISET1:0.2")
    assert box.type("STATUS?") == "\x50"
    box.type("VSET1:99")
    assert box.type("VSET1?") == "05.00"  # no range error: it is ignored
    assert box.type("SYST:ERR?") is None


def test_korad_commands_without_a_gap_are_lost() -> None:
    box = Box("korad-ka3005p", gap_s=0.08)
    box.type("VSET1:5.00")
    box.gap_s = 0.02
    box.type("ISET1:1.000")
    box.gap_s = 0.08
    assert box.type("ISET1?") == "5.000K"


def test_korad_ocp_is_a_switch_on_the_limit_and_out_is_not_a_channel() -> None:
    box = Box("korad-ka3005p", ResistiveLoad(10.0), gap_s=0.08)
    box.type("VSET1:12.00", "ISET1:0.500", "OUT1")
    box.wait(0.1)
    assert box.channel().mode == "CC"
    box.type("OCP1")
    assert not box.channel().output_on
    box.type("ISET1:2.000", "OUT1")
    assert box.channel().output_on


# ------------------------------------------------------------------------------------------------- B&K, ITECH, TDK, EA
def test_bk_one_command_switches_all_outputs() -> None:
    box = Box("bk-9130b", board())
    box.type("APP:VOLT 15,12,5", "APP:CURR 2,1,1", "OUTP 1")
    box.wait(0.2)
    assert all(box.channel(n).output_on for n in (1, 2, 3))
    assert box.type("MEAS:VOLT:ALL?") == "15.000, 12.000, 5.000"
    box.type("INST:NSEL 1", "VOLT:PROT 14", "VOLT:PROT:STAT ON")
    box.wait(0.02)
    assert (box.type("CHAN:OUTP?"), box.type("STAT:QUES:COND?")) == ("0", "1")
    box.type("CURR:PROT:STAT ON")
    assert (box.type("SYST:ERR?") or "").startswith("-113")


def test_itech_three_protections_with_delays() -> None:
    box = Box("itech-it6500", ResistiveLoad(10.0))
    box.type("VOLT 20", "CURR 10", "OUTP 1")
    box.wait(0.2)
    box.type("POW:PROT 30", "POW:PROT:DEL 0.05", "POW:PROT:STAT ON")  # 40 W
    box.wait(0.04)
    assert box.type("OUTP?") == "1"
    box.wait(0.03)
    assert (box.type("OUTP?"), box.type("STAT:QUES:COND?")) == ("0", "4")
    box.type("PROT:CLE")
    assert (box.type("OUTP?"), box.type("STAT:QUES:COND?")) == ("0", "0")
    box.type("POW:PROT:STAT OFF", "CURR:PROT 1", "CURR:PROT:STAT ON", "OUTP 1")
    box.wait(0.2)
    assert box.type("STAT:QUES:COND?") == "2"


def test_tdk_foldback_and_the_time_of_its_answers() -> None:
    box = Box("tdk-genesys", ResistiveLoad(10.0))
    box.type("VOLT 12", "CURR 0.5", "CURR:PROT:STAT ON", "OUTP:STAT ON")
    box.wait(0.1)
    assert (box.type("CURR:PROT:TRIP?"), box.type("OUTP:STAT?")) == ("1", "OFF")
    assert 0.008 <= box.instrument.reply_delay_s <= 0.012
    box.type("SYST:ERR?")
    assert 0.060 <= box.instrument.reply_delay_s <= 0.074


def test_ea_refuses_settings_without_its_lock() -> None:
    box = Box("ea-psi", gap_s=0.01)
    box.type("VOLT 12")
    assert (box.type("SYST:ERR?") or "").startswith("-221")
    assert (box.type("VOLT?"), box.type("SYST:LOCK:OWN?")) == ("0.00 V", "NONE")
    box.type("SYST:LOCK ON", "VOLT 12")
    assert (box.type("VOLT?"), box.type("SYST:LOCK:OWN?")) == ("12.00 V", "REMOTE")


def test_ea_writes_take_effect_later_and_in_order() -> None:
    box = Box("ea-psi")
    box.type("SYST:LOCK ON", "VOLT 12", "VOLT 13")
    assert box.type("VOLT?") == "0.00 V"
    box.wait(0.006)
    assert box.type("VOLT?") == "13.00 V"


def test_ea_alarm_stays_until_errors_were_asked_for() -> None:
    box = Box("ea-psi", board(), gap_s=0.01)
    box.type("SYST:LOCK ON", "VOLT 15", "CURR 2", "OUTP ON")
    box.wait(0.2)
    box.type("VOLT:PROT 14")
    box.wait(0.02)
    assert (box.type("OUTP?"), box.type("STAT:QUES?")) == ("OFF", str(1 + 512))
    box.type("VOLT:PROT 20", "OUTP ON")
    box.wait(0.02)
    assert box.type("OUTP?") == "OFF"
    assert (box.type("SYST:ALAR:COUN:OVOL?"), box.type("SYST:ALAR:COUN:OVOL?")) == ("1", "0")
    assert box.type("SYST:ERR:ALL?") == '-221,"Settings conflict"'
    assert box.type("STAT:QUES?") == "512"
    box.type("OUTP ON")
    box.wait(0.02)
    assert box.type("OUTP?") == "ON"


def test_ea_idle_time_out_can_be_switched_off() -> None:
    box = Box("ea-psi", gap_s=0.01)
    assert box.instrument.idle_timeout_s == 5.0
    box.type("SYST:COMM:LAN:TIM 0")
    assert box.type("SYST:COMM:LAN:TIM?") == "0"
    assert box.instrument.idle_timeout_s == 0.0


# -------------------------------------------------------------------------------------------------------- solar arrays
ONE_LINE = "CURR:SAS:ISC 5,(@1);IMP 4.5,(@1);:VOLT:SAS:VOC 100,(@1);VMP 90,(@1)"


def array(model: str, load: Load) -> Box:
    box = Box(model, load)
    box.type("CURR:MODE SAS,(@1)", ONE_LINE, "OUTP ON,(@1)")
    box.wait(0.3)
    return box


@pytest.mark.parametrize("model", ["keysight-e4360", "keysight-mp4300"])
def test_keysight_array_meets_a_resistor_at_the_maximum_power_point(model: str) -> None:
    box = array(model, ResistiveLoad(20.0))  # 90 V / 4.5 A
    assert box.type("SYST:ERR?") == '+0,"No error"'
    assert float(box.type("MEAS:VOLT? (@1)") or 0) == pytest.approx(90.0, abs=0.05)
    assert float(box.type("MEAS:CURR? (@1)") or 0) == pytest.approx(4.5, abs=0.01)


def test_e4360_curve_takes_30_ms_and_bad_parameters_keep_the_last() -> None:
    box = array("keysight-e4360", ResistiveLoad(20.0))
    box.type("CURR:SAS:ISC 2.5,(@1);IMP 2.25,(@1)")
    box.wait(0.02)
    assert box.channel().curve is not None
    assert box.channel().curve.short_circuit_a == 5.0
    box.wait(0.02)
    assert box.channel().curve.short_circuit_a == 2.5
    box.type("CURR:SAS:ISC 2,(@1)")  # below Imp
    box.wait(0.1)
    assert (box.type("SYST:ERR?") or "").startswith("-221")
    assert box.channel().curve.short_circuit_a == 2.5


def test_e4360_single_writes_are_curves_of_their_own() -> None:
    box = array("keysight-e4360", ResistiveLoad(20.0))
    box.type("CURR:SAS:ISC 3,(@1)", "CURR:SAS:IMP 2.7,(@1)", "VOLT:SAS:VOC 60,(@1)", "VOLT:SAS:VMP 54,(@1)")
    box.wait(0.1)
    errors = [box.type("SYST:ERR?") or "" for _ in range(3)]
    assert [e[:4] for e in errors] == ["-221", "-221", '+0,"']  # Isc < Imp, then Voc < Vmp
    assert box.channel().curve is not None
    assert box.channel().curve.open_circuit_v == 60.0


def test_e4360_plays_a_table() -> None:
    box = Box("keysight-e4360", ResistiveLoad(10.0))
    box.type("MEM:TABL:SEL day", "MEM:TABL:VOLT 0,40,50", "MEM:TABL:CURR 4,4,0")
    box.type("CURR:TABL:NAME day,(@1)", "CURR:MODE TABL,(@1)", "OUTP ON,(@1)")
    box.wait(0.3)
    assert box.type("SYST:ERR?") == '+0,"No error"'
    assert float(box.type("MEAS:VOLT? (@1)") or 0) == pytest.approx(40.0, abs=0.05)
    box.type("MEM:TABL:DEL day")
    assert (box.type("SYST:ERR?") or "").startswith("-221")


def test_array_beyond_its_power_folds_and_the_board_loses_its_supply() -> None:
    load = RecordedLoad(((0.0, 300.0), (1.0, 420.0)), undervoltage_lockout_v=40.0)
    box = Box("keysight-e4360", load)
    load._clock = box.clock
    box.type("CURR:MODE SAS,(@1)", ONE_LINE, "OUTP ON,(@1)")
    box.wait(0.9)
    assert load.powered
    assert box.channel().terminal_v > 90.0
    box.wait(0.3)  # 420 W of 406.8 W
    assert [on for _, on in load.edges][:2] == [True, False]


def test_mp4300_irradiance_and_mode_switch() -> None:
    box = array("keysight-mp4300", ResistiveLoad(20.0))
    box.type("CURR:SAS:SCAL 50,(@1)")
    box.wait(0.1)
    assert box.channel().curve is not None
    assert box.channel().curve.short_circuit_a == 2.5
    box.type('CURR:SAS:BWID "SHUNTSW",(@1)')
    assert box.type("CURR:SAS:BWID? (@1)") == '"SHUNTSW"'
    box.type("VOLT 20,(@1)", "CURR:MODE FIX,(@1)")
    assert not box.channel().output_on
    assert box.type("VOLT? (@1)") == "+0.00000000E+00"


def test_chroma_curve_waits_for_its_trigger_and_keeps_the_last_good_one() -> None:
    box = Box("chroma-62000h-s", ResistiveLoad(20.0))
    box.type("SAS:VOC 100", "SAS:ISC 5", "SAS:VMP 90", "SAS:IMP 4.5")
    assert box.channel().curve is None
    box.type("TRIG", "CONF:OUTP ON")
    box.wait(0.3)
    assert float(box.type("MEAS:VOLT?") or 0) == pytest.approx(90.0, abs=0.05)
    before = box.channel().curve
    for bad in (("SAS:IMP 5",), ("SAS:VMP 100",), ("SAS:VMP 20", "SAS:IMP 0.5")):
        box.type(*bad, "TRIG")
        assert (box.type("SYST:ERR?") or "").startswith("-221"), bad
        assert box.channel().curve is before
        box.type("SAS:VMP 90", "SAS:IMP 4.5")


def test_chroma_levels_trip_and_off_forgets() -> None:
    box = Box("chroma-62000p", board())
    box.type("SOUR:VOLT 15", "SOUR:CURR 2", "CONF:OUTP ON", "SOUR:VOLT:PROT:HIGH 14")
    box.wait(0.1)
    assert box.type("FETC:STAT?") == "1,OFF,CV"
    box.type("CONF:OUTP ON")
    assert (box.type("SYST:ERR?") or "").startswith("-221")
    box.type("SOUR:VOLT:PROT:HIGH 20", "CONF:OUTP OFF", "CONF:OUTP ON")
    box.wait(0.1)
    assert box.type("FETC:STAT?") == "0,ON,CV"


def test_ea_table_is_the_mode_and_is_lost_on_leaving() -> None:
    box = Box("ea-pv", ResistiveLoad(10.0), gap_s=0.01)
    amperes = ["4"] * 1639 + ["0"] * 2457  # 4 A up to 1638 / 4095 of 100 V
    box.type("SYST:LOCK ON", "FUNC:GEN:SEL PV", "FUNC:GEN:XY:LEV 0", "FUNC:GEN:XY:DATA " + ",".join(amperes))
    box.type("FUNC:GEN:XY:SUBM", "OUTP ON")
    box.wait(1.0)
    assert box.channel().curve is None  # loading takes two seconds
    box.wait(1.5)
    assert float((box.type("MEAS:VOLT?") or "").removesuffix(" V")) == pytest.approx(40.0, abs=0.1)
    box.type("IRR 50")
    box.wait(0.2)
    assert float((box.type("MEAS:VOLT?") or "").removesuffix(" V")) == pytest.approx(20.0, abs=0.1)
    box.type("OUTP OFF", "FUNC:GEN:SEL NONE")
    box.wait(0.1)
    assert box.channel().curve is None
    box.type("FUNC:GEN:XY:LEV 0")
    box.wait(0.1)
    assert (box.type("SYST:ERR?") or "").startswith("-221")
