"""Array curves: what makes one, the model against its published values, and the words to each simulator."""

from __future__ import annotations

import asyncio
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_supply import Exchange, play
from test_dialects import OK, OPEN, ask, say

from hil.drivers import solar
from hil.drivers.codec import ReadbackError
from hil.drivers.scpi import ScpiSupply
from hil.drivers.solar import Curve, leave_array, play_array
from hil.errors import SafetyError, UsageError

BIG = Curve(100, 5, 90, 4.5)
LINE = "CURR:SAS:ISC 5,(@1);IMP 4.5,(@1);:VOLT:SAS:VOC 100,(@1);VMP 90,(@1)"
READ_BACK = ask(
    "VOLT:SAS:VOC? (@1)", "100", "VOLT:SAS:VMP? (@1)", "90", "CURR:SAS:ISC? (@1)", "5", "CURR:SAS:IMP? (@1)", "4.5"
)  # fmt: skip
CHROMA_CURVE = say("SAS:VOC 100", "SAS:ISC 5", "SAS:VMP 90", "SAS:IMP 4.5", "TRIG")


@pytest.mark.parametrize(
    ("curve", "power_w"),
    [
        (BIG, 406.8016),
        (Curve(20, 2, 17, 1.8), 30.6 * 1.00002),
        (Curve(2.72, 0.52, 2.41, 0.504), 2.41 * 0.504 * 1.00196),
    ],
)
def test_the_model_meets_its_three_points_and_its_published_power(curve: Curve, power_w: float) -> None:
    curve.check()
    assert curve.voltage_v(0) == pytest.approx(curve.voc_v, abs=1e-9)
    assert curve.voltage_v(curve.imp_a) == pytest.approx(curve.vmp_v, abs=1e-9)
    assert curve.voltage_v(curve.isc_a) == pytest.approx(0, abs=1e-9)
    best = max(i / 20000 * curve.isc_a * curve.voltage_v(i / 20000 * curve.isc_a) for i in range(1, 20000))
    assert best == pytest.approx(power_w, rel=1e-5)


@pytest.mark.parametrize(
    ("curve", "why"),
    [
        (Curve(100, 5, 90, 5), "0 < Imp < Isc"),
        (Curve(100, 5, 100, 4.5), "0 < Vmp < Voc"),
        (Curve(100, 5, -1, 4.5), "0 < Vmp < Voc"),
        (Curve(100, 5, 40, 2.9), "bends inwards"),
        (Curve(100, 5, 50, 2.51), "no array curve"),
        (Curve(math.nan, 5, 90, 4.5), "finite"),
    ],
)
def test_what_makes_no_curve_is_refused_and_says_why(curve: Curve, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        curve.check()


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.98), st.floats(0.05, 0.98))
def test_every_accepted_curve_falls_all_the_way_down(v: float, i: float) -> None:
    curve = Curve(100, 5, 100 * v, 5 * i)
    try:
        curve.check()
    except UsageError:
        return
    currents = [curve.current_a(volts) for volts in range(0, 126)]
    assert currents[0] == pytest.approx(5, rel=1e-6)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(currents))
    assert currents[100:] == [0.0] * 26


@pytest.mark.parametrize("name", ["keysight-e4360", "keysight-mp4300"])
def test_keysight_takes_the_curve_in_one_message(name: str) -> None:
    scale: tuple[Exchange, ...] = ()
    if name == "keysight-mp4300":
        scale = (*say("CURR:SAS:SCAL 100,(@1)"), *ask("CURR:SAS:SCAL? (@1)", "100"))
    play(
        name,
        lambda supply: play_array(supply, 1, BIG),
        *OPEN[name],
        *ask("CURR:MODE? (@1)", "FIX", "OUTP? (@1)", "0"),
        *say("CURR:MODE SAS,(@1)"),
        *ask("CURR:MODE? (@1)", "SAS"),
        *say(LINE),
        *scale,
        *READ_BACK,
        *ask("SYST:ERR?", OK),
    )


def test_less_light_is_a_scale_where_there_is_one_and_less_current_elsewhere() -> None:
    play(
        "keysight-mp4300",
        lambda supply: play_array(supply, 1, BIG, scale=0.4),
        *OPEN["keysight-mp4300"],
        *ask("CURR:MODE? (@1)", "SAS"),  # already an array: the output is not asked, it may be on
        *say(LINE, "CURR:SAS:SCAL 40,(@1)"),
        *ask("CURR:SAS:SCAL? (@1)", "40"),
        *READ_BACK,
        *ask("SYST:ERR?", OK),
    )
    half = "CURR:SAS:ISC 2.5,(@1);IMP 2.25,(@1);:VOLT:SAS:VOC 100,(@1);VMP 90,(@1)"
    play(
        "keysight-e4360",
        lambda supply: play_array(supply, 1, BIG, scale=0.5),
        *OPEN["keysight-e4360"],
        *ask("CURR:MODE? (@1)", "SAS"),
        *say(half),
        *READ_BACK[:2],
        *ask("CURR:SAS:ISC? (@1)", "2.5", "CURR:SAS:IMP? (@1)", "2.25", "SYST:ERR?", OK),
    )


def test_a_curve_that_the_instrument_did_not_take_is_not_done() -> None:
    with pytest.raises(ReadbackError, match="isc was set to 5 A but reads back 3 A"):
        play(
            "keysight-e4360",
            lambda supply: play_array(supply, 1, BIG),
            *OPEN["keysight-e4360"],
            *ask("CURR:MODE? (@1)", "SAS"),
            *say(LINE),
            *READ_BACK[:2],
            *ask("CURR:SAS:ISC? (@1)", "3"),
        )
    with pytest.raises(ReadbackError, match="refused the array curve: -221 Settings conflict"):
        play(
            "keysight-e4360",
            lambda supply: play_array(supply, 1, BIG),
            *OPEN["keysight-e4360"],
            *ask("CURR:MODE? (@1)", "SAS"),
            *say(LINE),
            *READ_BACK,
            *ask("SYST:ERR?", '-221,"Settings conflict"', "SYST:ERR?", OK),
        )


def test_the_mode_is_not_switched_under_a_live_board() -> None:
    for action in (lambda supply: play_array(supply, 1, BIG), lambda supply: leave_array(supply, 1)):
        mode = "FIX" if action.__code__.co_names[0] == "play_array" else "SAS"
        with pytest.raises(SafetyError, match="channel 1 is on"):
            play(
                "keysight-mp4300",
                action,
                *OPEN["keysight-mp4300"],
                *ask("CURR:MODE? (@1)", mode, "OUTP? (@1)", "1", "STAT:QUES:COND? (@1)", "0"),
            )


def test_chroma_takes_four_values_and_a_trigger() -> None:
    play(
        "chroma-62000h-s",
        lambda supply: play_array(supply, 1, BIG),
        *OPEN["chroma-62000h-s"],
        *ask("OUTP:MODE?", "SAS"),
        *CHROMA_CURVE,
        *ask("SAS:VOC?", "100", "SAS:VMP?", "90", "SAS:ISC?", "5", "SAS:IMP?", "4.5", "SYST:ERR?", OK),
    )


def test_ea_plays_a_table_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solar, "TABLE_TURN", 4)
    monkeypatch.setattr(solar, "TABLE_POINTS", 6)  # 0, 20, 40, 60, 80 and 100 V
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr("hil.drivers.scpi.asyncio.sleep", noted)
    curve = Curve(80, 50, 70, 45)
    points = solar.table_currents(curve, 80.0)
    assert points[0] == pytest.approx(50)
    assert points[4:] == [0.0, 0.0]
    play(
        "ea-pv",
        lambda supply: play_array(supply, 1, curve, scale=0.85),
        *OPEN["ea-pv"],
        *ask("FUNC:GEN:SEL?", "NONE", "OUTP?", "OFF"),
        *say("FUNC:GEN:SEL PV"),
        *ask("FUNC:GEN:SEL?", "PV"),
        *(
            line
            for index, amperes in enumerate(points)
            for line in say(f"FUNC:GEN:XY:LEV {index}", f"FUNC:GEN:XY:DATA {solar_number(amperes)}")
        ),
        *ask("FUNC:GEN:SEL?", "PV"),  # whatever others said between its turns
        *say("FUNC:GEN:XY:SUBM", "IRR 85"),
        *ask("IRR?", "85 %", "STAT:QUES:COND?", "0", "SYST:ERR?", OK),
    )
    assert pauses.count(2.0) == 2  # before the table, and before anybody may switch on
    play(
        "ea-pv",
        lambda supply: leave_array(supply, 1),
        *OPEN["ea-pv"],
        *ask("FUNC:GEN:SEL?", "PV", "OUTP?", "OFF"),
        *say("FUNC:GEN:SEL NONE"),
        *ask("FUNC:GEN:SEL?", "NONE"),
    )


def solar_number(value: float) -> str:
    """As many decimals as the wire carries."""
    return f"{value:.6f}".rstrip("0").rstrip(".") or "0"


def test_a_supply_without_the_mode_and_a_curve_beyond_the_channel_send_nothing() -> None:
    async def plain(supply: ScpiSupply) -> None:
        with pytest.raises(UsageError, match="no solar-array simulator; nothing was sent"):
            await play_array(supply, 1, BIG)

    play("rigol-dp800", plain, *OPEN["rigol-dp800"])

    async def beyond(supply: ScpiSupply) -> None:
        with pytest.raises(UsageError, match=r"leave channel 1's 130 V and 5\.1 A; nothing was sent"):
            await play_array(supply, 1, Curve(131, 5, 110, 4.5))
        with pytest.raises(UsageError, match=r"0\.01 to 1"):
            await play_array(supply, 1, BIG, scale=0)

    play("keysight-e4360", beyond, *OPEN["keysight-e4360"])
