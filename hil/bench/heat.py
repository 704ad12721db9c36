"""The thermal model of a flight, fed with what the board was measured to draw. Always in wall time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hil.bench.powervalues import PowerSample
from hil.bench.recorder import Value
from hil.mission.orbit import Ephemeris
from hil.mission.thermal import HeatLedger, ThermalConfig, ThermalModel, ThermalState, albedo_cosine
from hil.mission.timeline import Timeline

STEP_S = 1.0  # heat is slow: a step, and a row of the record, a second


class FlightHeat:
    """Steps the model with the energy between samples; records each node; tells when the workload must rest.

    The hardware's time constants do not scale with the mission's clock, so neither does the model: sunlight and albedo
    are those of the present mission time, the steps are wall time, and a skip does not cool anything.
    """

    def __init__(
        self,
        config: ThermalConfig,
        timeline: Timeline,
        *,
        put: Callable[[str, Mapping[str, Value]], None],
        tell: Callable[..., None],
    ) -> None:
        self._model = ThermalModel(config)
        self._timeline = timeline
        self._sees_earth = any(item.earth_view_factor * item.absorptivity > 0 for item in config.radiators)
        self._ephemeris = Ephemeris(timeline.environment.orbit, timeline.environment.start)
        self._put = put
        self._tell = tell
        self._last: tuple[float, float] | None = None  # monotonic seconds and the board's joules up to then

    @property
    def state(self) -> ThermalState:
        return self._model.state

    @property
    def ledger(self) -> HeatLedger:
        return self._model.ledger

    def describe(self) -> dict[str, Any]:
        """For GET /v1/flight: temperatures in Celsius by node, and whether the workload may run."""
        state = self._model.state
        return {"nodes": state.nodes, "may_run": state.may_run, "label": "modelled"}

    def sampled(self, sample: PowerSample) -> None:
        """A tick of the power loop. Its energy counts, not its momentary power: a board boots between two samples."""
        if self._last is None:
            self._last = (sample.t_mono, sample.energy_j)
            return
        began_s, began_j = self._last
        dt_s = sample.t_mono - began_s
        if dt_s < STEP_S:
            return
        self._last = (sample.t_mono, sample.energy_j)
        drawn_j = sample.energy_j - began_j
        # a power loop that was started anew counts from zero
        board_w = drawn_j / dt_s if drawn_j >= 0 else max(sample.power_w, 0.0)
        mission_s = sample.t_mission or 0.0
        could_run = self._model.state.may_run
        state = self._model.step(dt_s, board_w, self._timeline.sunlit_at(mission_s), self._albedo(mission_s))
        self._record(sample, state)
        if state.may_run is not could_run:
            self._tell(
                "thermal_ready" if state.may_run else "thermal_cutoff",
                nodes=state.nodes,
                label="modelled",
                board_w=board_w,
            )

    def _albedo(self, mission_s: float) -> float:
        if not self._sees_earth:
            return 0.0
        at_s = np.array([mission_s])
        position_km, _ = self._ephemeris.teme_km(at_s)
        return float(albedo_cosine(position_km, self._ephemeris.sun_km(at_s))[0])

    def _record(self, sample: PowerSample, state: ThermalState) -> None:
        for node, celsius in state.nodes.items():
            self._put(
                "thermal",
                {
                    "t_mono": sample.t_mono,
                    "t_mission": sample.t_mission,
                    "rate": sample.rate,
                    "board": sample.board,
                    "node": node,
                    "temperature_c": celsius,
                    "may_run": int(state.may_run),
                },
            )
