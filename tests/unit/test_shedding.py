"""The shed rule: hold, hysteresis in voltage and charge, what was never restored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hil.mission.eps import EpsConfig, EpsModel, ShedConfig
from hil.mission.shedding import ShedSwitch

RULE = ShedConfig(13.2, hold_s=2.0, restore_v=14.4, restore_soc=0.3)
REST = EpsModel(EpsConfig(capacity_ah=1.0)).state


def flown(rule: ShedConfig | None, *rows: tuple[float, float]) -> list[bool]:
    """Whether the board is cut off after each second with this voltage and charge."""
    switch = ShedSwitch(rule)
    found = []
    for index, (volts, soc) in enumerate(rows):
        switch.see(index + 1.0, 1.0, replace(REST, watched_v=volts, bus_voltage_v=12.0, soc=soc))
        found.append(switch.open)
    return found


def test_low_voltage_must_last() -> None:
    assert flown(RULE, (13.1, 1.0), (13.3, 1.0), (13.1, 1.0)) == [False, False, False]
    assert flown(RULE, (13.1, 1.0), (13.1, 1.0), (13.1, 1.0)) == [False, True, True]
    assert flown(replace(RULE, hold_s=0.0), (13.1, 1.0)) == [True]
    assert flown(None, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)) == [False, False, False]


@pytest.mark.parametrize(("volts", "soc", "back"), [(14.4, 0.3, True), (14.3, 1.0, False), (16.0, 0.29, False)])
def test_it_takes_voltage_and_charge_to_come_back(volts: float, soc: float, back: bool) -> None:
    assert flown(RULE, (13.0, 0.1), (13.0, 0.1), (volts, soc))[-1] is not back


def test_spans_end_with_the_flight_when_nothing_came_back() -> None:
    switch = ShedSwitch(RULE)
    for second, volts in enumerate((13.0, 13.0, 15.0, 13.0, 13.0), 1):
        switch.see(float(second), 1.0, replace(REST, watched_v=volts, soc=1.0))
    assert [(span.start_s, span.end_s) for span in switch.spans(9.0)] == [(2.0, 3.0), (5.0, 9.0)]
