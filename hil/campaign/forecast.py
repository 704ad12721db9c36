"""The satellite's power and heat flown ahead under a constant load, by the mission's own rules: all of it modelled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from hil.errors import UsageError
from hil.mission.eps import EpsModel
from hil.mission.frames import Floats
from hil.mission.orbit import Ephemeris
from hil.mission.shedding import ShedSwitch
from hil.mission.thermal import ThermalModel, albedo_cosine
from hil.mission.timeline import Timeline
from hil.model import Span

MOST_STEPS = 40_000  # of the model: a longer mission is flown in longer steps, which a plot does not show
NEAR_SHED_V = 0.5  # volts above shedding below which no step is longer than this, so that it is not seen too late
NEAR_STEP_S = 10.0  # nor is one where a temperature may end the work


@dataclass(frozen=True, slots=True)
class Forecast:
    """Columns over `t_s` (mission seconds): what holds at that instant; `load_w` holds until the next row.

    `temperature_c` by node, empty without a thermal model. `shed`: while the board was cut off. `rest`: while it was
    too hot to work. `collapsed`: the battery could not carry what was left.
    """

    label: str
    t_s: Floats
    soc: Floats
    bus_voltage_v: Floats
    load_w: Floats
    temperature_c: dict[str, Floats]
    shed: tuple[Span, ...]
    rest: tuple[Span, ...]
    collapsed: bool


def forecast(timeline: Timeline, label: str, board_w: float, idle_w: float = 0.0) -> Forecast:
    """Fly power and heat through the whole timeline with the board at `board_w` whenever it has power and may work.

    `idle_w` is what it draws while the thermal model forbids work. The dwell of a shed load is wall time and not flown;
    temperatures are those of a flight in real time. Raises UsageError for a mission without power.
    """
    power, thermal = timeline.environment.power, timeline.environment.thermal
    if power is None:
        raise UsageError(f"mission {timeline.environment.name} has no power section")
    longest_s = timeline.duration_s / MOST_STEPS if len(timeline.t_s) > MOST_STEPS else 0.0
    model = EpsModel(replace(power.eps, max_substep_s=max(power.eps.max_substep_s, longest_s)))
    heat = None if thermal is None else ThermalModel(thermal)
    t_s = _rows(timeline, longest_s)
    array_w, sunlit = (_means(timeline, column, t_s) for column in (timeline.array_w, timeline.sunlit_fraction))
    albedo = _albedo(timeline, t_s) if heat is not None else sunlit
    switch, rest = ShedSwitch(power.shed), _Rest()
    near_v = 0.0 if power.shed is None else power.shed.shed_v + NEAR_SHED_V

    def draw_w() -> float:
        working_w = board_w if rest.since_s is None else min(idle_w, board_w)
        return 0.0 if switch.open else working_w

    rows = [(model.state.soc, model.state.bus_voltage_v, draw_w() + power.eps.platform_w)]
    nodes = [] if heat is None else [heat.state.nodes]
    collapsed = False
    for index, (start_s, end_s) in enumerate(pairwise(t_s.tolist())):
        near = model.state.watched_v < near_v or (thermal is not None and thermal.cutoff is not None)
        parts = max(math.ceil((end_s - start_s) / NEAR_STEP_S - 1e-9), 1) if near else 1
        dt_s = (end_s - start_s) / parts
        for part in range(1, parts + 1):
            watts, now_s = draw_w(), end_s if part == parts else start_s + part * dt_s
            state = model.step(dt_s, watts, array_w[index])
            collapsed = collapsed or state.collapsed
            switch.see(now_s, dt_s, state)
            if heat is not None:
                rest.see(now_s, heat.step(dt_s, watts, sunlit[index], albedo[index]).may_run)
        rows.append((state.soc, state.bus_voltage_v, draw_w() + power.eps.platform_w))
        nodes += [] if heat is None else [heat.state.nodes]
    soc, volts, load = np.array(rows).T
    return Forecast(
        label=label,
        t_s=t_s,
        soc=soc,
        bus_voltage_v=volts,
        load_w=load,
        temperature_c={name: np.array([row[name] for row in nodes]) for name in (nodes[0] if nodes else ())},
        shed=switch.spans(timeline.duration_s),
        rest=rest.spans(timeline.duration_s),
        collapsed=collapsed,
    )


class _Rest:
    """When the thermal model forbade work."""

    def __init__(self) -> None:
        self.since_s: float | None = None
        self._over: list[Span] = []

    def see(self, now_s: float, may_run: bool) -> None:
        if self.since_s is None and not may_run:
            self.since_s = now_s
        elif self.since_s is not None and may_run:
            self._over.append(Span(self.since_s, now_s, "too hot"))
            self.since_s = None

    def spans(self, end_s: float) -> tuple[Span, ...]:
        last = () if self.since_s is None else (Span(self.since_s, end_s, "too hot"),)
        return (*self._over, *last)


def _means(timeline: Timeline, column: Floats, t_s: Floats) -> list[float]:
    """Mean of a column of the timeline between each two of `t_s`, whatever lies between them."""
    steps = np.diff(timeline.t_s) * (column[:-1] + column[1:]) / 2.0
    integral = np.interp(t_s, timeline.t_s, np.concatenate([[0.0], np.cumsum(steps)]))
    mean: list[float] = np.maximum(np.diff(integral) / np.diff(t_s), 0.0).tolist()
    return mean


def _albedo(timeline: Timeline, t_s: Floats) -> list[float]:
    ephemeris = Ephemeris(timeline.environment.orbit, timeline.start)
    middle = (t_s[:-1] + t_s[1:]) / 2.0
    cosine: list[float] = albedo_cosine(ephemeris.teme_km(middle)[0], ephemeris.sun_km(middle)).tolist()
    return cosine


def _rows(timeline: Timeline, longest_s: float) -> Floats:
    """The timeline's rows, one in each cell of `longest_s`; all of them when that is zero."""
    t_s = timeline.t_s
    if not longest_s:
        return t_s
    cell = np.floor(t_s / longest_s)
    keep = np.ones(len(t_s), dtype=bool)
    keep[1:-1] = np.diff(cell)[:-1] > 0
    return t_s[keep]
