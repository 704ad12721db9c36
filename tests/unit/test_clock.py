"""The mission clock: continuity, monotony, skips, refusals."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission.clock import MissionClock, Segment


def test_real_time_by_default() -> None:
    clock = MissionClock(start_mission_s=5.0, wall_mono_s=1_000.0)
    assert clock.mission_s(1_010.0) == 15.0
    assert clock.wall_s(15.0) == 1_010.0
    assert clock.rate == 1.0


def test_rates_and_skips_are_recorded_as_segments() -> None:
    clock = MissionClock(0.0, 100.0, rate=1.0)
    clock.set_rate(60.0, 110.0)
    clock.skip_to(1_000.0, 112.0)
    clock.set_rate(1.0, 113.0)
    assert clock.segments == (
        Segment(100.0, 0.0, 1.0),
        Segment(110.0, 10.0, 60.0),
        Segment(112.0, 1_000.0, 60.0, "skip", 870.0),
        Segment(113.0, 1_060.0, 1.0),
    )
    walls = [100.0, 105.0, 110.0, 111.0, 111.999, 112.0, 112.5, 113.0, 120.0]
    missions = [0.0, 5.0, 10.0, 70.0, 129.94, 1_000.0, 1_030.0, 1_060.0, 1_067.0]
    assert [clock.mission_s(wall) for wall in walls] == pytest.approx(missions)
    assert clock.wall_s(1_100.0) == pytest.approx(153.0)
    spans = [(105.0, 111.0), (105.0, 112.5), (112.0, 113.0), (90.0, 120.0)]
    assert [clock.flown_s(*span) for span in spans] == pytest.approx([65.0, 155.0, 60.0, 197.0])


def test_before_the_start_is_the_start() -> None:
    assert MissionClock(7.0, 100.0, 60.0).mission_s(99.0) == 7.0


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates_are_refused(rate: float) -> None:
    clock = MissionClock()
    with pytest.raises(UsageError, match="impossible"):
        clock.set_rate(rate, 1.0)
    with pytest.raises(UsageError, match="impossible"):
        MissionClock(rate=rate)
    assert len(clock.segments) == 1


def test_going_back_is_refused_and_changes_nothing() -> None:
    clock = MissionClock(0.0, 0.0, 10.0)
    with pytest.raises(UsageError, match="skip back"):
        clock.skip_to(99.0, 10.0)
    clock.set_rate(2.0, 10.0)
    for change in (lambda: clock.set_rate(1.0, 9.0), lambda: clock.skip_to(1e6, 9.0)):
        with pytest.raises(UsageError, match="already changed"):
            change()
    with pytest.raises(UsageError, match="before the present segment"):
        clock.wall_s(99.0)
    assert len(clock.segments) == 2


def test_a_skip_to_now_is_allowed() -> None:
    clock = MissionClock(0.0, 0.0, 1.0)
    assert clock.skip_to(10.0, 10.0).skipped_s == 0.0


changes = st.lists(st.tuples(st.sampled_from(["rate", "skip"]), st.floats(0, 1e4), st.floats(0.01, 1e3)), max_size=8)


@given(changes, st.lists(st.floats(0, 1e5), min_size=2, max_size=20))
def test_never_goes_back_and_inverts(steps: list[tuple[str, float, float]], walls: list[float]) -> None:
    clock = MissionClock(0.0, 0.0)
    wall = 0.0
    for kind, wait_s, value in steps:
        wall += wait_s
        if kind == "rate":
            before = clock.mission_s(wall)
            clock.set_rate(value, wall)
            assert clock.mission_s(wall) == pytest.approx(before)  # a new rate does not jump
        else:
            clock.skip_to(clock.mission_s(wall) + value, wall)
    mission = [clock.mission_s(t) for t in sorted(walls)]
    assert all(a <= b for a, b in pairwise(mission))
    later = wall + 100.0
    assert clock.wall_s(clock.mission_s(later)) == pytest.approx(later)
