"""When loops tick: apart from each other, and as slowly as all channels of an instrument need."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hil.bench.pacing import Pacing


@pytest.mark.parametrize("count", [2, 3, 8, 64])
def test_ticks_of_many_loops_lie_apart(count: int) -> None:
    pacing = Pacing()
    slots = [pacing.join(index // 4) for index in range(count)]
    moments = sorted(slot.next_s(1000.0, 0.1) for slot in slots)
    gaps = [later - earlier for earlier, later in pairwise([*moments, moments[0] + 0.1])]
    assert min(gaps) > 0.1 / count / 3


def test_the_grid_of_a_loop_stays_where_it_is() -> None:
    pacing = Pacing()
    pacing.join(1)
    slot = pacing.join(1)
    first = slot.next_s(5000.03, 0.1)
    assert 5000.03 < first <= 5000.13
    assert slot.next_s(first, 0.1) == pytest.approx(first + 0.1)
    assert slot.next_s(first + 0.75, 0.1) == pytest.approx(first + 0.8)


def test_channels_of_one_instrument_share_its_time_and_others_do_not_care() -> None:
    pacing = Pacing()
    one, two, alone = pacing.join(1), pacing.join(1), pacing.join(2)
    for slot in (one, two, alone):
        assert slot.period_s(0.1) == 0.1
        for _ in range(20):
            slot.measured(0.06)
    assert one.period_s(0.1) == two.period_s(0.1) == pytest.approx(1.5 * 0.12)
    assert alone.period_s(0.1) == 0.1
    two.leave()
    two.leave()
    assert one.period_s(0.1) == 0.1


def test_one_slow_exchange_is_no_reason_to_slow_down() -> None:
    slot = Pacing().join(1)
    for index in range(50):
        slot.measured(2.0 if index == 25 else 0.02)
    assert slot.period_s(0.1) == 0.1
    for _ in range(25):
        slot.measured(0.2)
    assert slot.period_s(0.1) == pytest.approx(0.3)
