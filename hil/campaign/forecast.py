"""The satellite's power flown ahead, the board at a constant load, shed by the mission's rule: all of it modelled."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hil.errors import UsageError
from hil.mission.eps import EpsModel, ShedConfig
from hil.mission.frames import Floats
from hil.mission.timeline import Timeline
from hil.model import Span

MOST_STEPS = 60_000  # of the model: a longer mission is flown in longer steps, which a plot does not show


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
    end_s = timeline.duration_s
    longest_s = end_s / MOST_STEPS if len(timeline.t_s) > MOST_STEPS else 0.0
    model = EpsModel(replace(power.eps, max_substep_s=max(power.eps.max_substep_s, longest_s)))
    t_s = _rows(timeline, end_s, longest_s)
    array_w = np.interp(t_s, timeline.t_s, timeline.array_w)
    switch = _Switch(power.shed)
    rows = [(model.state.soc, model.state.bus_voltage_v, board_w + power.eps.platform_w)]
    collapsed = False
    for index in range(1, len(t_s)):
        dt_s = float(t_s[index] - t_s[index - 1])
        load_w = 0.0 if switch.since_s is not None else board_w
        state = model.step(dt_s, load_w, 0.5 * float(array_w[index - 1] + array_w[index]))
        collapsed = collapsed or state.collapsed
        switch.see(float(t_s[index]), dt_s, state.bus_voltage_v, state.soc)
        next_w = 0.0 if switch.since_s is not None else board_w
        rows.append((state.soc, state.bus_voltage_v, next_w + power.eps.platform_w))
    soc, volts, load = np.array(rows).T
    return Forecast(label, t_s, soc, volts, load, switch.spans(end_s), collapsed)


class _Switch:
    """The mission's shed rule: below the voltage for its hold, back above voltage and charge."""

    def __init__(self, rule: ShedConfig | None) -> None:
        self.rule = rule
        self.since_s: float | None = None
        self._low_s = 0.0
        self._over: list[Span] = []

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


def _rows(timeline: Timeline, end_s: float, longest_s: float) -> Floats:
    """The timeline's rows up to `end_s`, no nearer to each other than `longest_s`."""
    t_s = np.append(timeline.t_s[timeline.t_s < end_s], end_s)
    if not longest_s:
        return t_s
    cell = np.floor(t_s / longest_s)
    keep = np.ones(len(t_s), dtype=bool)
    keep[1:-1] = np.diff(cell)[:-1] > 0
    return t_s[keep]
