"""The satellite's power flown ahead, the board at a constant load, shed by the mission's rule: all of it modelled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from hil.errors import UsageError
from hil.mission.eps import EpsModel, ShedConfig
from hil.mission.frames import Floats
from hil.mission.timeline import Timeline
from hil.model import Span

MOST_STEPS = 40_000  # of the model: a longer mission is flown in longer steps, which a plot does not show
NEAR_SHED_V = 0.5  # volts above shedding below which no step is longer than this, so that it is not seen too late
NEAR_STEP_S = 10.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Columns over `t_s` (mission seconds): what holds at that instant; `load_w` holds until the next row.

    `shed`: while the board was cut off. `collapsed`: the battery could not carry what was left.
    """

    label: str
    t_s: Floats
    soc: Floats
    bus_voltage_v: Floats
    load_w: Floats
    shed: tuple[Span, ...]
    collapsed: bool


def forecast(timeline: Timeline, label: str, board_w: float) -> Forecast:
    """Fly the power system through the whole timeline with the board at `board_w` whenever it has power.

    The dwell of a shed load is wall time and not flown. Raises UsageError for a mission without power.
    """
    power = timeline.environment.power
    if power is None:
        raise UsageError(f"mission {timeline.environment.name} has no power section")
    longest_s = timeline.duration_s / MOST_STEPS if len(timeline.t_s) > MOST_STEPS else 0.0
    model = EpsModel(replace(power.eps, max_substep_s=max(power.eps.max_substep_s, longest_s)))
    t_s = _rows(timeline, longest_s)
    array_w = _mean_array_w(timeline, t_s).tolist()
    switch = _Switch(power.shed)
    near_v = 0.0 if power.shed is None else power.shed.shed_v + NEAR_SHED_V
    rows = [(model.state.soc, model.state.bus_voltage_v, board_w + power.eps.platform_w)]
    collapsed = False
    for index, (start_s, end_s) in enumerate(pairwise(t_s.tolist())):
        parts = math.ceil((end_s - start_s) / NEAR_STEP_S - 1e-9) if model.state.bus_voltage_v < near_v else 1
        dt_s = (end_s - start_s) / max(parts, 1)
        for part in range(max(parts, 1)):
            state = model.step(dt_s, switch.board_w(board_w), array_w[index])
            collapsed = collapsed or state.collapsed
            switch.see(
                end_s if part + 1 >= parts else start_s + (part + 1) * dt_s, dt_s, state.bus_voltage_v, state.soc
            )
        rows.append((state.soc, state.bus_voltage_v, switch.board_w(board_w) + power.eps.platform_w))
    soc, volts, load = np.array(rows).T
    return Forecast(label, t_s, soc, volts, load, switch.spans(timeline.duration_s), collapsed)


class _Switch:
    """The mission's shed rule: below the voltage for its hold, back above voltage and charge."""

    def __init__(self, rule: ShedConfig | None) -> None:
        self.rule = rule
        self.since_s: float | None = None
        self._low_s = 0.0
        self._over: list[Span] = []

    def board_w(self, watts: float) -> float:
        """What the board draws that would draw `watts`."""
        return watts if self.since_s is None else 0.0

    def see(self, now_s: float, dt_s: float, volts: float, soc: float) -> None:
        rule = self.rule
        if rule is None:
            return
        if self.since_s is None:
            self._low_s = self._low_s + dt_s if volts < rule.shed_v else 0.0
            if self._low_s and self._low_s >= rule.hold_s:
                self.since_s = now_s
        elif volts >= rule.restore_v and soc >= rule.restore_soc:
            self._over.append(Span(self.since_s, now_s, "load shed"))
            self.since_s, self._low_s = None, 0.0

    def spans(self, end_s: float) -> tuple[Span, ...]:
        last = () if self.since_s is None else (Span(self.since_s, end_s, "load shed"),)
        return (*self._over, *last)


def _mean_array_w(timeline: Timeline, t_s: Floats) -> Floats:
    """Mean array power between each two of `t_s`, whatever lies between them."""
    steps = np.diff(timeline.t_s) * (timeline.array_w[:-1] + timeline.array_w[1:]) / 2.0
    joules = np.interp(t_s, timeline.t_s, np.concatenate([[0.0], np.cumsum(steps)]))
    mean: Floats = np.diff(joules) / np.diff(t_s)
    return np.maximum(mean, 0.0)


def _rows(timeline: Timeline, longest_s: float) -> Floats:
    """The timeline's rows, one in each cell of `longest_s`; all of them when that is zero."""
    t_s = timeline.t_s
    if not longest_s:
        return t_s
    cell = np.floor(t_s / longest_s)
    keep = np.ones(len(t_s), dtype=bool)
    keep[1:-1] = np.diff(cell)[:-1] > 0
    return t_s[keep]
