"""The radio: link budget, the ladder and its hysteresis, fades and outages, and what the timeline makes of them."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission import timeline_file
from hil.mission.acm import DVB_S2, ModCod, climb, ladder
from hil.mission.bursts import Bursts, RandomOutages, fades, outages
from hil.mission.compile import compile_timeline
from hil.mission.environment import MissionEnvironment
from hil.mission.frames import Station
from hil.mission.linkplan import LADDER
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.radio import (
    DIRECTIONS,
    LINK_EDGES,
    OUTAGE,
    Channel,
    LinkBudget,
    LinkEnvironment,
    LinkWindow,
    free_space_loss_db,
)
from hil.mission.timeline import EDGE_KINDS, Timeline
from hil.model import LinkState, Span

TLE = (Path(__file__).parents[2] / "fixtures" / "tle" / "ref_qwen3_535_ltdn1030.tle").read_text()
START = datetime(2026, 1, 1, tzinfo=UTC)
STATIONS = (Station("miyun", 40.45, 116.86), Station("kashgar", 39.50, 75.93), Station("sanya", 18.31, 109.31))
# an X-band downlink that climbs from QPSK to 16APSK in a pass, an S-band uplink that starts below the ladder
DOWN = LinkBudget(8.2e9, eirp_dbw=10.0, g_over_t_db_k=25.0, bandwidth_hz=60e6, atmosphere_zenith_db=0.2)
UP = LinkBudget(2.05e9, eirp_dbw=36.0, g_over_t_db_k=-30.0, bandwidth_hz=5e6)
ACM = LinkEnvironment(Channel(budget=UP), Channel(budget=DOWN, loss=1e-4), acquisition_s=10.0)
ENVIRONMENT = MissionEnvironment("radio", Orbit.from_tle(TLE), STATIONS, START, 43_200.0, ACM, seed=7)


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    return compile_timeline(ENVIRONMENT)


# -- the ladder


def test_the_table_agrees_with_what_a_frame_carries() -> None:
    """Bits per symbol follow from the frame: BCH block less its header, over the symbols of frame and PL header."""
    block = {"1/4": 16_008, "1/3": 21_408, "2/5": 25_728, "1/2": 32_208, "3/5": 38_688, "2/3": 43_040}
    block |= {"3/4": 48_408, "4/5": 51_648, "5/6": 53_840, "8/9": 57_472, "9/10": 58_192}
    bits = {"QPSK": 2, "8PSK": 3, "16APSK": 4, "32APSK": 5}
    assert len(DVB_S2) == 28
    for mode in DVB_S2:
        constellation, code = mode.name.split()
        symbols = 64_800 / bits[constellation] + 90
        assert mode.bits_per_symbol == pytest.approx((block[code] - 80) / symbols, abs=6e-7), mode.name


def test_no_mode_beats_shannon_and_none_is_far_from_it() -> None:
    for mode in DVB_S2:
        shannon = math.log2(1 + 10 ** (mode.es_n0_db / 10))
        assert 0.6 * shannon < mode.bits_per_symbol < shannon, mode.name


def test_the_ladder_leaves_out_what_needs_more_and_carries_no_more() -> None:
    assert all(a.es_n0_db < b.es_n0_db and a.bits_per_symbol < b.bits_per_symbol for a, b in pairwise(LADDER))
    for mode in set(DVB_S2) - set(LADDER):
        assert any(m.es_n0_db <= mode.es_n0_db and m.bits_per_symbol >= mode.bits_per_symbol for m in LADDER), mode
    assert "QPSK 8/9" in {mode.name for mode in set(DVB_S2) - set(LADDER)}  # 8PSK 3/5 carries more with less
    assert ladder((ModCod("b", 2.0, 3.0), ModCod("a", 1.0, 3.0))) == (ModCod("b", 2.0, 3.0),)


@settings(max_examples=60, deadline=None)
@given(
    signal=st.lists(st.floats(-12, 25), min_size=2, max_size=60),
    margin=st.floats(0, 3),
    hysteresis=st.floats(0.01, 4),
)
def test_a_modem_never_flaps_and_never_stands_above_its_signal(
    signal: list[float], margin: float, hysteresis: float
) -> None:
    hold = [mode.es_n0_db + margin for mode in LADDER]
    reach = [level + hysteresis for level in hold]
    rung = 0
    risen: dict[int, float] = {}
    for level in signal:
        before = rung
        rung = climb(rung, sum(level >= h for h in hold), sum(level >= r for r in reach))
        assert rung == 0 or level >= hold[rung - 1]
        assert rung == len(LADDER) or level < reach[rung] or rung > before
        for step in range(before, rung):
            risen[step] = level
        for step in range(rung, before):  # from up to down again the signal fell by the hysteresis
            assert risen[step] - level > hysteresis - 1e-9


# -- the budget


def test_free_space_loss_is_the_recommendations_formula() -> None:
    for frequency_ghz, range_km in ((2.2, 550.0), (8.2, 1_800.0), (26.0, 1_800.0)):
        short_form = 92.45 + 20 * math.log10(frequency_ghz) + 20 * math.log10(range_km)
        ours = float(free_space_loss_db(frequency_ghz * 1e9, np.array([range_km * 1e3]))[0])
        assert ours == pytest.approx(short_form, abs=0.005)
    assert float(free_space_loss_db(8.2e9, np.array([1.8e6]))[0]) == pytest.approx(175.83, abs=0.01)


def test_a_budget_by_hand() -> None:
    budget = LinkBudget(8.2e9, 10.0, 25.0, 60e6, pointing_loss_db=0.5, atmosphere_zenith_db=0.2, other_losses_db=1.0)
    assert budget.symbol_rate == 50e6
    # 10 + 25 + 228.599 - 175.832 - 0.5 - 1.0 - 0.2 / sin 10 deg = 85.115 dBHz; less 76.990 dB of symbols
    c_n0, es_n0 = (f(np.array([1.8e6]), np.array([10.0])) for f in (budget.c_n0_dbhz, budget.es_n0_db))
    assert float(c_n0[0]) == pytest.approx(85.115, abs=0.01)
    assert float(es_n0[0]) == pytest.approx(8.125, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(near=st.floats(3e5, 4e6), further=st.floats(1.0001, 3), low=st.floats(0, 89), higher=st.floats(0, 1))
def test_the_signal_falls_with_range_and_rises_with_elevation(
    near: float, further: float, low: float, higher: float
) -> None:
    high = low + higher * (90 - low)
    assert DOWN.es_n0_db(np.array([near * further]), np.array([low])) < DOWN.es_n0_db(np.array([near]), np.array([low]))
    assert DOWN.es_n0_db(np.array([near]), np.array([high])) >= DOWN.es_n0_db(np.array([near]), np.array([low]))


@pytest.mark.parametrize(
    "change",
    [{"frequency_hz": 0.0}, {"bandwidth_hz": -1.0}, {"rolloff": 1.5}, {"margin_db": -1.0}, {"eirp_dbw": math.nan}],
)
def test_an_impossible_budget_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        replace(DOWN, **change)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rate_bps": 1e6, "budget": DOWN},
        {"rate_bps": 0.0},
        {"rate_bps": 1e6, "loss": 1.1},
        {"budget": DOWN, "max_rate_bps": 0.0},
    ],
)
def test_an_impossible_channel_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Channel(**values)  # type: ignore[arg-type]


# -- what a pass makes of a budget


def signal_db(budget: LinkBudget, span: Span, t_s: np.ndarray) -> np.ndarray:
    station = next(station for station in STATIONS if station.name == span.label)
    seen = Ephemeris(ENVIRONMENT.orbit, START).look(station, t_s)
    return budget.es_n0_db(seen.range_m, seen.elevation_deg)


def serving(timeline: Timeline) -> Iterator[Span]:
    for contact in timeline.contacts:
        yield from contact.spans


def test_the_rate_climbs_and_falls_through_a_pass(timeline: Timeline) -> None:
    best = max(timeline.contacts, key=lambda contact: contact.max_elevation_deg)
    t_s = np.arange(best.aos_s + 11, best.max_elevation_s, 1.0)
    rates = [timeline.link_at(t)["downlink"].rate_bps for t in t_s]
    assert rates == sorted(rates)
    assert rates[-1] > 2.5 * rates[0] > 0
    assert timeline.link_at(best.max_elevation_s)["downlink"].loss == 1e-4
    kinds = {edge.detail.split(" ", 2)[1] for edge in timeline.edges if edge.kind == "rate" and " " in edge.detail}
    assert kinds == set(DIRECTIONS)


def test_the_rate_never_exceeds_ladder_or_shannon_and_is_no_lower_than_the_hysteresis_demands(
    timeline: Timeline,
) -> None:
    rng = np.random.default_rng(5)
    checked = 0
    for span in serving(timeline):
        t_s = np.sort(rng.uniform(span.start_s + 10.0, span.end_s, 400))
        for direction in DIRECTIONS:
            budget = ACM.channel(direction).budget
            assert budget is not None
            states = [timeline.link_at(t)[direction] for t in t_s]
            for state, level in zip(states, signal_db(budget, span, t_s), strict=True):
                rate = 0.0 if state.outage else state.rate_bps
                holds = [m for m in LADDER if m.es_n0_db + budget.margin_db <= level + 1e-6]
                reaches = [m for m in LADDER if m.es_n0_db + budget.margin_db + budget.hysteresis_db <= level - 1e-6]
                assert rate <= budget.symbol_rate * (holds[-1].bits_per_symbol if holds else 0.0)
                assert rate >= budget.symbol_rate * (reaches[-1].bits_per_symbol if reaches else 0.0)
                assert rate < budget.symbol_rate * math.log2(1 + 10 ** (level / 10))
                checked += rate > 0
    assert checked > 3_000


def test_rate_steps_are_at_the_instant_at_which_the_signal_crosses(timeline: Timeline) -> None:
    spans = list(serving(timeline))
    crossed = 0
    for edge in timeline.edges:
        if edge.kind != "rate" or " " not in edge.detail:
            continue
        _, direction, name = edge.detail.split(" ", 2)
        budget = ACM.channel(direction).budget  # type: ignore[arg-type]
        assert budget is not None
        span = next(span for span in spans if span.start_s <= edge.t_s < span.end_s)
        level, later = signal_db(budget, span, np.array([edge.t_s, edge.t_s + 0.5]))
        names = [mode.name for mode in LADDER]
        rung = 0 if name == "none" else names.index(name) + 1
        if later > level:
            expected = LADDER[rung - 1].es_n0_db + budget.margin_db + budget.hysteresis_db
        else:
            expected = LADDER[rung].es_n0_db + budget.margin_db
        assert level == pytest.approx(expected, abs=1e-6), edge
        before, after = (timeline.link_at(t)[direction] for t in (edge.t_s - 1e-3, edge.t_s))  # type: ignore[index]
        assert before.rate_bps != after.rate_bps
        assert after.outage is (name == "none")
        crossed += 1
    assert crossed > 150


def test_below_the_lowest_mode_there_is_silence_in_one_direction_only(timeline: Timeline) -> None:
    """The uplink reaches QPSK 1/4 late in the pass; the downlink is up long before."""
    contact = max(timeline.contacts, key=lambda item: item.max_elevation_deg)
    early = timeline.link_at(contact.aos_s + 10.5)
    assert early["uplink"] == OUTAGE
    assert not early["downlink"].outage
    opening = timeline.open_spans(contact.aos_s, contact.los_s)[0]
    assert opening.start_s > contact.aos_s + 20.0
    assert timeline.link_at(opening.start_s - 1e-3)["uplink"].outage
    assert not timeline.link_at(opening.start_s)["uplink"].outage


def test_a_cap_cuts_the_ladder_off() -> None:
    capped = replace(ACM, downlink=Channel(budget=DOWN, max_rate_bps=80e6))
    capped_line = compile_timeline(replace(ENVIRONMENT, link=capped))
    rates = set(capped_line.downlink_step_bps)
    assert max(rates) == 80e6
    assert len(rates) > 3
    details = [edge.detail for edge in capped_line.edges if edge.kind == "rate"]
    assert not [text for text in details if text.endswith("16APSK 3/4")], "no step where nothing changes"


@settings(max_examples=8, deadline=None)
@given(
    eirp=st.floats(-20, 30),
    hysteresis=st.floats(0, 5),
    margin=st.floats(0, 5),
    acquisition=st.floats(0, 200),
)
def test_any_budget_keeps_its_promises(eirp: float, hysteresis: float, margin: float, acquisition: float) -> None:
    budget = replace(DOWN, eirp_dbw=eirp, hysteresis_db=hysteresis, margin_db=margin)
    link = LinkEnvironment(Channel(1e5), Channel(budget=budget), acquisition_s=acquisition)
    timeline = compile_timeline(replace(ENVIRONMENT, link=link, duration_s=8_000.0))
    for span in serving(timeline):
        t_s = np.linspace(span.start_s, span.end_s, 60, endpoint=False)
        levels = signal_db(budget, span, t_s)
        rates = [timeline.link_at(t)["downlink"].rate_bps for t in t_s]
        for t, level, rate in zip(t_s, levels, rates, strict=True):
            holds = [m for m in LADDER if m.es_n0_db + margin <= level + 1e-6]
            assert rate <= budget.symbol_rate * (holds[-1].bits_per_symbol if holds else 0.0)
            assert rate == 0 or t >= span.start_s + acquisition - 1e-9
        turns = [b - a for a, b in pairwise(rates) if a and b and a != b]
        if len(contact_of(timeline, span).spans) == 1:  # one hill: once it falls, it does not rise again
            assert sum(a < 0 < b for a, b in pairwise(turns)) == 0


def contact_of(timeline: Timeline, span: Span):  # type: ignore[no-untyped-def]
    return next(contact for contact in timeline.contacts if span in contact.spans)


# -- fades and outages

BURSTS = Bursts(good_mean_s=20.0, bad_mean_s=2.0, loss_bad=0.9)


def test_fades_have_the_means_they_are_asked_for() -> None:
    spans = fades(BURSTS, 0.0, 200_000.0, seed=1, key="downlink:0")
    bad = [span.duration_s for span in spans]
    good = [b.start_s - a.end_s for a, b in pairwise(spans)]
    for sample, mean in ((bad, 2.0), (good, 20.0)):
        assert statistics.fmean(sample) == pytest.approx(mean, abs=4 * mean / math.sqrt(len(sample)))
        # exponential: the deviation is the mean, and 1/e are longer than it
        assert statistics.stdev(sample) == pytest.approx(mean, rel=0.06)
        assert sum(s > mean for s in sample) / len(sample) == pytest.approx(math.exp(-1), abs=0.02)


def test_a_contact_begins_faded_as_often_as_it_is_faded() -> None:
    begins = sum(
        bool(spans) and spans[0].start_s == 0.0
        for spans in (fades(BURSTS, 0.0, 30.0, seed=seed, key="uplink:1") for seed in range(4_000))
    )
    assert begins / 4_000 == pytest.approx(2 / 22, abs=4 * math.sqrt(0.083 / 4_000))


@settings(max_examples=40, deadline=None)
@given(start=st.floats(-1e4, 1e6), length=st.floats(0, 2_000), seed=st.integers(0, 2**40))
def test_fades_stay_within_and_apart(start: float, length: float, seed: int) -> None:
    spans = fades(BURSTS, start, start + length, seed, "uplink:3")
    assert all(start <= span.start_s < span.end_s <= start + length for span in spans)
    assert all(a.end_s < b.start_s for a, b in pairwise(spans))
    longer = fades(BURSTS, start, start + length + 100.0, seed, "uplink:3")
    assert [s.start_s for s in longer[: len(spans)]] == [s.start_s for s in spans]


def test_the_sequence_is_the_same_on_every_machine() -> None:
    first = fades(BURSTS, 0.0, 100.0, seed=535, key="uplink:1767225600")[0]
    assert (first.start_s, first.end_s) == (pytest.approx(3.84785968299, abs=1e-9), pytest.approx(4.46759736917))


def test_outages_arrive_as_often_and_last_as_long_as_asked() -> None:
    spans = outages((), RandomOutages(per_day=20.0, mean_s=60.0), 365 * 86_400.0, seed=3)
    assert len(spans) == pytest.approx(20 * 365, abs=4 * math.sqrt(20 * 365) + 110)  # 1.4 % overlap and are merged
    assert statistics.fmean(span.duration_s for span in spans) == pytest.approx(60.0 * 1.014, rel=0.05)
    assert all(a.end_s < b.start_s for a, b in pairwise(spans))
    shorter = outages((), RandomOutages(20.0, 60.0), 100 * 86_400.0, seed=3)
    assert spans[: len(shorter)] == shorter


def test_scheduled_outages_are_merged_with_what_they_meet() -> None:
    merged = outages((Span(50, 80), Span(10, 20), Span(75, 90)), None, 1_000.0, seed=0)
    assert merged == (Span(10, 20, "scheduled"), Span(50, 90, "scheduled"))


def test_an_absurd_number_of_fades_is_refused() -> None:
    with pytest.raises(UsageError, match="more than 200000"):
        fades(Bursts(1e-3, 1e-3), 0.0, 1e4, seed=0, key="uplink:0")


ROUGH = LinkEnvironment(
    Channel(3e5, loss=0.01, bursts=BURSTS),
    Channel(1e6, bursts=Bursts(30.0, 1.0)),
    acquisition_s=15.0,
    jitter_s=0.001,
    outages=(Span(0.0, 3_000.0), Span(40_000.0, 41_000.0)),
    random_outages=RandomOutages(40.0, 120.0),
)


@pytest.fixture(scope="module")
def rough() -> Timeline:
    return compile_timeline(replace(ENVIRONMENT, link=ROUGH))


def test_every_change_of_the_link_has_an_edge_and_only_delay_moves_in_between(rough: Timeline) -> None:
    instants = [0.0, *sorted({edge.t_s for edge in rough.edges if edge.kind in LINK_EDGES}), rough.duration_s]
    seen = set()
    for low, high in pairwise(instants):
        inside = np.linspace(low, high, 7)[:-1]
        states = [rough.link_at(t) for t in inside]
        for direction in DIRECTIONS:
            frozen = {replace(state[direction], delay_s=0.0) for state in states}
            assert len(frozen) == 1, (low, high, frozen)
            seen |= frozen
    assert {(s.rate_bps, s.loss) for s in seen if not s.outage} == {
        (3e5, 0.01),
        (3e5, 1 - 0.99 * 0.1),
        (1e6, 0.0),
        (1e6, 1.0),
    }


def test_fades_and_outages_alternate_and_name_their_direction(rough: Timeline) -> None:
    for direction in DIRECTIONS:
        kinds = [e.kind for e in rough.edges if e.kind.startswith("burst") and e.detail == direction]
        assert len(kinds) > 50
        assert kinds == ["burst_start", "burst_end"] * (len(kinds) // 2)
    kinds = [e.kind for e in rough.edges if e.kind.startswith("outage")]
    assert kinds == ["outage_start", "outage_end"] * (len(kinds) // 2) + ["outage_start"] * (len(kinds) % 2)
    assert {e.detail for e in rough.edges if e.kind == "outage_start"} == {"scheduled", "random"}
    assert set(EDGE_KINDS) >= {edge.kind for edge in rough.edges}


def test_an_outage_silences_a_contact_and_a_total_fade_is_loss_not_an_outage(rough: Timeline) -> None:
    contact = rough.contacts[2]
    hit = Span(contact.max_elevation_s, contact.max_elevation_s + 30.0)
    cut = compile_timeline(replace(ENVIRONMENT, link=replace(ROUGH, outages=(hit,), random_outages=None)))
    for t_s, silent in ((hit.start_s - 1e-3, False), (hit.start_s, True), (hit.end_s - 1e-3, True), (hit.end_s, False)):
        assert all(state.outage for state in cut.link_at(t_s).values()) is silent
    assert cut.capacity_bits("uplink", hit.start_s, hit.end_s) == 0.0
    assert cut.open_spans(hit.start_s - 10.0, hit.end_s + 10.0)[0].end_s == hit.start_s
    total = [state for t in rough.downlink_step_t_s if (state := rough.link_at(t)["downlink"]).loss == 1.0]
    assert total
    assert not any(state.outage for state in total)


def test_one_contact_does_not_change_another_contacts_fades(rough: Timeline) -> None:
    def downlink(timeline: Timeline) -> dict[float, tuple[float, ...]]:
        bursts = [e.t_s for e in timeline.edges if e.kind == "burst_start" and e.detail == "downlink"]
        return {
            round(c.aos_s, 3): tuple(round(t, 5) for t in bursts if c.aos_s <= t < c.los_s) for c in timeline.contacts
        }

    before = downlink(rough)
    fewer = downlink(compile_timeline(replace(ENVIRONMENT, link=ROUGH, stations=STATIONS[:1])))
    same = set(before) & set(fewer)
    assert len(same) >= 2
    assert all(before[aos][: len(fewer[aos])] == fewer[aos] for aos in same)
    calm = downlink(compile_timeline(replace(ENVIRONMENT, link=replace(ROUGH, uplink=Channel(3e5)))))
    assert calm == before, "the uplink's fades are not the downlink's"
    other = downlink(compile_timeline(replace(ENVIRONMENT, link=ROUGH, seed=8)))
    assert other.keys() == before.keys()
    assert all(other[aos] != before[aos] for aos in before if before[aos])


# -- windows


def test_a_window_opens_on_schedule_without_any_station() -> None:
    link = LinkEnvironment(
        Channel(2e6), Channel(2e6), processing_s=0.05, acquisition_s=30.0, window=LinkWindow(7_200.0, 604_800.0, 0.3)
    )
    week = compile_timeline(replace(ENVIRONMENT, link=link, stations=(), duration_s=8 * 86_400.0, step_s=60.0))
    assert [(c.aos_s, c.los_s) for c in week.contacts] == [(0.0, 7_200.0), (604_800.0, 612_000.0)]
    assert all(math.isnan(c.max_elevation_deg) for c in week.contacts)
    assert week.link_at(29.9)["uplink"] == OUTAGE
    assert week.link_at(30.0)["downlink"] == LinkState(0.35, rate_bps=2e6)
    assert week.link_at(7_200.0)["uplink"] == OUTAGE
    # the published 1.8 GB a week, less the modem's half minute
    assert week.capacity_bits("uplink", 0.0, 604_800.0) / 8 == pytest.approx(250e3 * (7_200 - 30))
    assert [e.kind for e in week.edges if e.kind in LINK_EDGES] == ["aos", "rate", "los"] * 2
    inside = (week.t_s >= 0) & (week.t_s < 7_200)
    np.testing.assert_allclose(week.delay_s[inside], 0.35)
    assert np.isnan(week.elevation_deg).all()


def test_a_window_of_impossible_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="shorter"):
        LinkWindow(7_200.0, 7_200.0, 0.1)
    with pytest.raises(UsageError, match="no geometry"):
        LinkEnvironment(Channel(1e6), Channel(budget=DOWN), window=LinkWindow(1.0, 2.0, 0.1))


# -- capacity and openings


@settings(max_examples=40, deadline=None)
@given(a=st.floats(-1e3, 4.4e4), b=st.floats(-1e3, 4.4e4), c=st.floats(-1e3, 4.4e4))
def test_capacity_is_additive_and_never_negative(timeline: Timeline, a: float, b: float, c: float) -> None:
    low, middle, high = sorted((a, b, c))
    whole, first, second = (
        timeline.capacity_bits("downlink", *ends) for ends in ((low, high), (low, middle), (middle, high))
    )
    assert whole == pytest.approx(first + second, rel=1e-9, abs=1.0)
    assert first >= 0
    assert timeline.capacity_bits("downlink", high, low) == 0.0


def test_capacity_is_the_integral_of_what_link_at_says(rough: Timeline) -> None:
    contact = rough.contacts[3]
    step = 0.05
    for direction in DIRECTIONS:
        t_s = np.arange(contact.aos_s, contact.los_s, step)
        states = [rough.link_at(t)[direction] for t in t_s]
        summed = sum(0.0 if s.outage or s.loss >= 1 else s.rate_bps for s in states) * step
        bits = rough.capacity_bits(direction, contact.aos_s, contact.los_s)
        assert bits == pytest.approx(summed, rel=2e-3)
        assert bits > 0


def test_openings_are_when_both_directions_carry(rough: Timeline) -> None:
    opened = rough.open_spans(0.0, rough.duration_s)
    assert opened
    assert all(a.end_s < b.start_s for a, b in pairwise(opened))
    for span in opened:
        assert not any(state.outage for state in rough.link_at(0.5 * (span.start_s + span.end_s)).values())
        assert any(state.outage for state in rough.link_at(span.end_s).values())


# -- files


@settings(max_examples=30, deadline=None)
@given(
    up=st.one_of(
        st.builds(
            Channel,
            rate_bps=st.floats(1, 1e12),
            loss=st.floats(0, 1),
            bursts=st.none() | st.builds(Bursts, st.floats(1e-3, 1e6), st.floats(1e-3, 1e6), st.floats(0, 1)),
        ),
        st.builds(
            Channel,
            budget=st.builds(
                LinkBudget, st.floats(1e6, 1e11), st.floats(-50, 80), st.floats(-40, 50), st.floats(1e3, 1e10)
            ),
            max_rate_bps=st.none() | st.floats(1, 1e12),
        ),
    ),
    acquisition=st.floats(0, 3_599),
    seed=st.integers(0, 2**63),
    spans=st.lists(st.builds(lambda a, b: Span(a, a + b, "scheduled"), st.floats(0, 1e6), st.floats(1e-3, 1e6))),
    random=st.none() | st.builds(RandomOutages, st.floats(1e-3, 1e4), st.floats(1e-3, 1e6)),
    window=st.none() | st.builds(LinkWindow, st.floats(1, 1e3), st.floats(1.1e3, 1e6), st.floats(0, 10)),
)
def test_an_environment_survives_json_exactly(
    up: Channel,
    acquisition: float,
    seed: int,
    spans: list[Span],
    random: RandomOutages | None,
    window: LinkWindow | None,
) -> None:
    link = LinkEnvironment(
        up,
        Channel(1e6),
        acquisition_s=acquisition,
        outages=tuple(spans),
        random_outages=random,
        window=None if up.budget else window,
    )
    before = replace(ENVIRONMENT, link=link, seed=seed)
    text = json.dumps(before.as_dict())
    assert MissionEnvironment.from_dict(json.loads(text)) == before
    assert LinkEnvironment.from_dict(asdict(link)) == link


def test_a_rough_timeline_survives_its_file(rough: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "rough.npz"
    timeline_file.save(rough, path)
    loaded = timeline_file.load(path)
    assert loaded.hash == rough.hash
    assert loaded.environment == rough.environment
    assert loaded.edges == rough.edges
    for t_s in rough.uplink_step_t_s:
        assert loaded.link_at(t_s) == rough.link_at(t_s)


def test_seed_and_fades_are_in_the_hash(rough: Timeline) -> None:
    assert compile_timeline(rough.environment).hash == rough.hash
    changed = [
        replace(rough.environment, seed=8),
        replace(rough.environment, link=replace(ROUGH, random_outages=None)),
        replace(rough.environment, link=replace(ROUGH, downlink=Channel(1e6))),
        replace(rough.environment, link=replace(ROUGH, downlink=Channel(1e6, bursts=Bursts(30.0, 1.0, 0.99)))),
    ]
    assert len({rough.hash, *(compile_timeline(item).hash for item in changed)}) == 5


def test_another_machines_last_bits_do_not_change_the_hash(rough: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The propagator's and the logarithm's last bits differ between processors and C libraries."""
    environment = replace(rough.environment, link=replace(ROUGH, downlink=Channel(budget=DOWN, bursts=BURSTS)))
    here = compile_timeline(environment)
    rng = np.random.default_rng(11)
    teme_km, log1p = Orbit.teme_km, math.log1p

    def elsewhere(self: Orbit, *when: Any) -> Any:
        return tuple(column * (1 + rng.uniform(-4e-16, 4e-16, column.shape)) for column in teme_km(self, *when))

    monkeypatch.setattr(Orbit, "teme_km", elsewhere)
    monkeypatch.setattr(math, "log1p", lambda x: log1p(x) * (1 + rng.uniform(-2.2e-16, 2.2e-16)))
    there = compile_timeline(environment)
    moved = [abs(a.t_s - b.t_s) for a, b in zip(here.edges, there.edges, strict=True)]
    assert 0 < max(moved) < 1e-4
    assert there.hash == here.hash


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("delay_s", lambda column: column[:-1], "columns over t_s differ in length"),
        ("array_w", lambda column: column - 1.0, "array_w is below zero"),
        ("uplink_step_loss", lambda column: column + 1.0, "uplink_step_loss leaves 0..1"),
        ("contact_t_s", lambda column: column[::-1], "contact_t_s does not rise"),
        ("downlink_step_bps", lambda column: column * np.nan, "downlink_step_bps has values that are no numbers"),
        ("contact_range_m", lambda column: column[:, None], "columns over contact_t_s differ in length"),
    ],
)
def test_columns_that_no_compilation_makes_are_refused(
    rough: Timeline, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    path = tmp_path / "rough.npz"
    timeline_file.save(rough, path)
    with np.load(path) as file:
        content = dict(file)
    content[name] = change(content[name])
    with path.open("wb") as out:
        np.savez(out, **content)
    with pytest.raises(UsageError, match=re.escape(message)):
        timeline_file.load(path)


def test_an_older_format_is_told_apart_from_a_broken_file(rough: Timeline, tmp_path: Path) -> None:
    path = tmp_path / "rough.npz"
    timeline_file.save(rough, path)
    with np.load(path) as file:
        content = dict(file)
    meta = json.loads(bytes(content["meta"])) | {"format": 1}
    content["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    del content["uplink_bps"]
    with path.open("wb") as out:
        np.savez(out, **content)
    with pytest.raises(UsageError, match="format 1, this version reads"):
        timeline_file.load(path)
