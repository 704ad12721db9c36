"""What happens at a virtual output: inrush, hold-up, trips with delays, energy, decay, the curve of a solar array."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.virtual.supply import DECAY_TAU_S, Channel, ChannelModel, Load, RecordedLoad, ResistiveLoad, parse_load
from hil.virtual.supply.physics import OUTPUT_CAPACITANCE_F
from hil.virtual.supply.solar import CurveError, exponential, table

MODEL = ChannelModel(30.0, 3.0, 32.0, 3.2, 33.0, 3.3)
MILLIFARAD = 1e-3


class Rig:
    """A channel with a hand-wound clock that ticks every 10 ms, or as told."""

    def __init__(self, load: Load | None, tick_s: float = 0.01, **options: bool) -> None:
        self.now = 50.0
        self.tick_s = tick_s
        if isinstance(load, RecordedLoad):
            load._clock = lambda: self.now
        self.channel = Channel(MODEL, load, self.now, **options)

    def on(self, volts: float, amperes: float = 3.0) -> None:
        self.channel.voltage_set_v, self.channel.current_limit_a = volts, amperes
        self.channel.switch(True, self.now)

    def off(self) -> None:
        self.channel.switch(False, self.now)

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end - 1e-12:
            self.now = min(end, self.now + self.tick_s)
            self.channel.advance(self.now)


def board(watts: float = 6.0, farad: float = 0.0, lockout_v: float = 8.5) -> RecordedLoad:
    return RecordedLoad(((0.0, watts),), lockout_v, input_capacitance_f=farad)


# --------------------------------------------------------------------------------------------------- inrush, hold-up
def test_inrush_is_the_charge_of_the_loads_capacitors() -> None:
    rig = Rig(board(0.0, MILLIFARAD), tick_s=0.001)
    rig.on(15.0)
    charge_c = 0.0
    for _ in range(100):
        rig.wait(0.001)
        charge_c += rig.channel.current_a * 0.001
    assert rig.channel.terminal_v == pytest.approx(15.0)
    assert charge_c == pytest.approx(MILLIFARAD * 15.0, rel=0.02)
    assert rig.channel.peak_a > 1.0
    assert rig.channel.current_a == 0.0


def test_the_current_limit_stretches_the_inrush() -> None:
    rig = Rig(board(0.0, MILLIFARAD), tick_s=0.001)
    rig.on(15.0, 0.1)  # 15 mC at 0.1 A
    rig.wait(0.14)
    assert rig.channel.mode == "CC"
    assert rig.channel.terminal_v == pytest.approx(14.0, abs=0.1)
    rig.wait(0.06)
    assert rig.channel.mode == "CV"
    assert rig.channel.peak_a == pytest.approx(0.1)


def test_without_capacitors_there_is_no_inrush() -> None:
    rig = Rig(board(0.0))
    rig.on(15.0)
    rig.wait(0.1)
    assert rig.channel.peak_a == 0.0


def test_hold_up_carries_the_board_through_a_short_dip_and_not_through_a_long_one() -> None:
    load = board(5.0, MILLIFARAD)
    rig = Rig(load, tick_s=0.001)
    rig.on(15.0)
    rig.wait(0.2)
    # from 15 V to 8.5 V on both capacitors, with the load and the bleeder: d(V^2)/dt = -2 P / C - 2 V^2 / (R C)
    farad, ohm = MILLIFARAD + OUTPUT_CAPACITANCE_F, DECAY_TAU_S / OUTPUT_CAPACITANCE_F
    hold_s = 0.5 * ohm * farad * math.log((15.0**2 + 5.0 * ohm) / (8.5**2 + 5.0 * ohm))
    rig.off()
    rig.wait(0.9 * hold_s)
    assert load.powered
    rig.on(15.0)
    rig.wait(0.2)
    assert [on for _, on in load.edges] == [True]
    rig.off()
    start = rig.now
    rig.wait(2.0 * hold_s)
    assert load.edges[-1][1] is False
    assert load.edges[-1][0] - start == pytest.approx(hold_s, abs=0.002)


def test_decay_below_600_mv_takes_its_time_and_a_resistor_shortens_it() -> None:
    times = []
    for load in (None, ResistiveLoad(10.0)):
        rig = Rig(load, tick_s=0.0005)
        rig.on(15.0)
        rig.wait(0.2)
        rig.off()
        start = rig.now
        while rig.channel.terminal_v >= 0.6:
            rig.wait(0.0005)
        times.append(rig.now - start)
    assert times[0] == pytest.approx(DECAY_TAU_S * math.log(15.0 / 0.6), rel=0.02)
    parallel = 1.0 / (1.0 / 10.0 + OUTPUT_CAPACITANCE_F / DECAY_TAU_S)
    assert times[1] == pytest.approx(parallel * OUTPUT_CAPACITANCE_F * math.log(25.0), rel=0.1)


# -------------------------------------------------------------------------------------------------- trips, energy, time
@pytest.mark.parametrize("tick_s", [0.001, 0.01, 1.0])
def test_a_trip_waits_for_its_delay_however_coarse_time_is(tick_s: float) -> None:
    rig = Rig(ResistiveLoad(10.0), tick_s=tick_s)
    rig.on(10.0)
    rig.wait(1.0)
    rig.channel.ocp.enabled, rig.channel.ocp.level, rig.channel.ocp.delay_s = True, 0.5, 0.25
    rig.channel.advance(rig.now)  # as after every command
    before = rig.channel.energy_j
    rig.wait(1.0)
    assert rig.channel.ocp.tripped
    assert rig.channel.energy_j - before == pytest.approx(10.0 * 0.25, rel=0.05)


def test_an_over_current_shorter_than_the_delay_does_not_trip() -> None:
    load = RecordedLoad(((0.0, 5.0), (0.5, 30.0), (0.6, 5.0)))
    rig = Rig(load)
    rig.on(15.0)
    rig.channel.ocp.enabled, rig.channel.ocp.level, rig.channel.ocp.delay_s = True, 1.0, 0.15
    rig.wait(1.0)
    assert not rig.channel.tripped
    rig.channel.ocp.delay_s = 0.05
    rig.off()
    rig.on(15.0)
    rig.wait(1.0)
    assert rig.channel.ocp.tripped


def test_over_power_trips() -> None:
    rig = Rig(board(20.0))
    rig.on(15.0)
    rig.channel.opp.enabled, rig.channel.opp.level = True, 19.0
    rig.wait(0.1)
    assert rig.channel.opp.tripped
    assert not rig.channel.output_on


@pytest.mark.parametrize("keeps_enable", [False, True])
def test_after_a_trip_a_maker_keeps_the_enable_or_drops_it(keeps_enable: bool) -> None:
    rig = Rig(board(), keeps_enable=keeps_enable)
    rig.on(15.0)
    rig.wait(0.1)
    rig.channel.trip("test", rig.now)
    assert not rig.channel.output_on
    assert rig.channel.enabled == keeps_enable
    rig.channel.clear_all(rig.now)
    assert rig.channel.output_on == keeps_enable


def test_energy_is_what_the_load_took() -> None:
    rig = Rig(board(6.0))
    rig.on(15.0)
    rig.wait(0.2)
    before = rig.channel.energy_j
    rig.wait(10.0)
    assert rig.channel.energy_j - before == pytest.approx(60.0, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    volts=st.floats(1.0, 30.0),
    limit=st.floats(0.05, 3.0),
    ohm=st.floats(1.0, 200.0),
    tick_s=st.sampled_from([0.003, 0.01, 0.2]),
)
def test_a_resistor_meets_ohm_and_the_limit_however_coarse_time_is(
    volts: float, limit: float, ohm: float, tick_s: float
) -> None:
    rig = Rig(ResistiveLoad(ohm), tick_s=tick_s)
    rig.on(volts, limit)
    rig.wait(0.4)
    expected = min(volts / ohm, limit)
    assert rig.channel.current_a == pytest.approx(expected, rel=1e-3)
    assert rig.channel.terminal_v == pytest.approx(expected * ohm, rel=1e-3, abs=1e-3)
    assert rig.channel.mode == ("CV" if volts / ohm <= limit else "CC")


def test_an_hour_of_standstill_is_caught_up_at_once() -> None:
    rig = Rig(board(15.0), tick_s=3600.0)
    rig.on(15.0, 0.3)  # hiccups: every millisecond something moves
    rig.wait(3600.0)
    assert rig.channel.output_on


# -------------------------------------------------------------------------------------------------------- solar arrays
@pytest.mark.parametrize(
    ("parameters", "rise"),
    [((100.0, 5.0, 90.0, 4.5), 0.00445), ((20.0, 2.0, 17.0, 1.8), 0.00002), ((2.72, 0.52, 2.41, 0.504), 0.00196)],
)
def test_the_exponential_curve_goes_through_its_points(
    parameters: tuple[float, float, float, float], rise: float
) -> None:
    voc, isc, vmp, imp = parameters
    curve = exponential(voc, isc, vmp, imp)
    assert curve.current_a(0.0) == isc
    assert curve.current_a(voc) == 0.0
    assert curve.current_a(vmp) == pytest.approx(imp, rel=1e-6)
    # the true maximum lies slightly above Vmp * Imp; the reference gives by how much
    assert curve.best[0] / (vmp * imp) - 1.0 == pytest.approx(rise, abs=6e-5)


@pytest.mark.parametrize(
    "bad", [(100, 5, 90, 5), (100, 5, 100, 4.5), (100, 5, 0, 4.5), (100, 5, 90, 0), (100, 5, 20, 0.5)]
)
def test_parameters_that_are_no_array_are_refused(bad: tuple[float, float, float, float]) -> None:
    with pytest.raises(CurveError):
        exponential(*bad)


def test_a_table_must_fall() -> None:
    with pytest.raises(CurveError):
        table([(0.0, 1.0), (10.0, 2.0)])
    with pytest.raises(CurveError):
        table([(0.0, 1.0)])
    assert table([(10.0, 0.0), (0.0, 2.0)]).current_a(5.0) == 1.0


def test_constant_power_sits_right_of_the_maximum_and_folds_beyond_it() -> None:
    rig = Rig(RecordedLoad(((0.0, 300.0), (1.0, 405.5), (2.0, 410.0)), undervoltage_lockout_v=30.0))
    rig.channel.curve = exponential(100.0, 5.0, 90.0, 4.5)
    rig.on(0.0)
    rig.wait(0.9)
    assert rig.channel.terminal_v > 90.0
    assert rig.channel.terminal_v * rig.channel.current_a == pytest.approx(300.0, rel=1e-3)
    rig.wait(1.0)
    assert rig.channel.load_powered
    assert rig.channel.terminal_v * rig.channel.current_a == pytest.approx(405.5, rel=1e-3)
    rig.wait(0.3)
    assert isinstance(rig.channel.load, RecordedLoad)
    assert False in [on for _, on in rig.channel.load.edges]


def test_less_light_less_current() -> None:
    rig = Rig(ResistiveLoad(2.0))
    rig.channel.curve = exponential(20.0, 2.0, 17.0, 1.8).scaled(0.5)
    rig.on(0.0)
    rig.wait(0.3)
    assert rig.channel.current_a == pytest.approx(rig.channel.curve.current_a(rig.channel.terminal_v), rel=1e-3)
    assert rig.channel.current_a == pytest.approx(1.0, rel=5e-3)
    assert rig.channel.mode == "CC"


# ------------------------------------------------------------------------------------------------------------- --load
def test_loads_of_the_command_line(tmp_path: Path) -> None:
    recorded = tmp_path / "boot.csv"
    recorded.write_text("time_s,power_w\n# measured\n0,12.5\n3,5\n")
    number, load = parse_load(f"2=recorded:{recorded}")
    assert number == 2
    assert isinstance(load, RecordedLoad)
    assert load.profile == ((0.0, 12.5), (3.0, 5.0))
    number, load = parse_load("resistive:10")
    assert isinstance(load, ResistiveLoad)
    assert (number, load.resistance_ohm) == (1, 10.0)
    assert parse_load("3=none") == (3, None)
    board_load = parse_load("board")[1]
    assert isinstance(board_load, RecordedLoad)
    assert board_load.input_capacitance_f > 0.0


@pytest.mark.parametrize("text", ["", "cp", "cp:x", "cp:-1", "resistive:0", "x=cp:1", "lamp", "none:1", "cp:nan"])
def test_loads_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_load(text)


def test_a_recorded_load_says_which_line_is_wrong(tmp_path: Path) -> None:
    recorded = tmp_path / "boot.csv"
    recorded.write_text("0,12.5\n3;5\n")
    with pytest.raises(UsageError, match=r"boot\.csv:2"):
        parse_load(f"recorded:{recorded}")
    with pytest.raises(UsageError, match="cannot read"):
        parse_load(f"recorded:{tmp_path}/none.csv")
