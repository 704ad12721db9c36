"""Heat: lumped nodes that conduct to one another and radiate to space, warmed by the board, the Sun and the Earth.

C dT/dt = heat + conduction + absorbed sunlight, albedo and Earth infrared - emissivity sigma A T^4. Long steps are
divided to a tenth of the fastest node's time constant, and to a tenth of its temperature while one heats up steeply.
They are integrated with Heun's rule, and every flow is booked as it is applied, so that the ledger closes to rounding.

A thermal time constant belongs to the hardware: the model runs in wall time, whatever the mission's clock does. Its
temperatures are modelled, never measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hil.errors import UsageError
from hil.mission.frames import Floats

STEFAN_BOLTZMANN = 5.670374419e-8
SUN_W_M2 = 1_361.0
ALBEDO = 0.3
EARTH_IR_W_M2 = 237.0
ZERO_C_K = 273.15
_SHARE_OF_TIME_CONSTANT = 0.1
_RISE = 0.1  # of its temperature, or of the least below, a radiating node may warm in one sub-step
_SETTLED_S, _SETTLED_K = 600.0, 1e-6
_LEAST_K = 100.0


@dataclass(frozen=True, slots=True)
class Node:
    """A lump of heat capacity; its heat is `board_share` of the board's power and `constant_w` of the platform's."""

    name: str
    heat_capacity_j_per_k: float
    initial_c: float = 20.0
    board_share: float = 0.0
    constant_w: float = 0.0


@dataclass(frozen=True, slots=True)
class Coupling:
    """Conduction between two nodes, W/K."""

    a: str
    b: str
    conductance_w_per_k: float


@dataclass(frozen=True, slots=True)
class Radiator:
    """A surface of a node. `area_m2` of one side; `sides` that radiate to space.

    One side sees the Sun with the mean cosine `sun_share` while it shines, and the Earth with `earth_view_factor`.
    """

    node: str
    area_m2: float
    sides: int = 1
    emissivity: float = 0.9
    absorptivity: float = 0.2
    sun_share: float = 0.0
    earth_view_factor: float = 0.0

    @property
    def emitting_w_per_k4(self) -> float:
        return self.emissivity * STEFAN_BOLTZMANN * self.area_m2 * self.sides

    def absorbed_w(self, sunlit: float, albedo: float) -> tuple[float, float, float]:
        """(sunlight, albedo, Earth infrared) that it takes in, watts."""
        seen_m2 = self.area_m2 * self.earth_view_factor
        return (
            self.absorptivity * SUN_W_M2 * self.area_m2 * self.sun_share * sunlit,
            self.absorptivity * SUN_W_M2 * ALBEDO * seen_m2 * albedo,
            self.emissivity * EARTH_IR_W_M2 * seen_m2,
        )


@dataclass(frozen=True, slots=True)
class Cutoff:
    """Run until hot, cool, repeat: work stops when `node` reaches `off_c` and may go on once it is down at `on_c`."""

    node: str
    off_c: float
    on_c: float


@dataclass(frozen=True, slots=True)
class ThermalConfig:
    """The nodes and what connects them. Raises UsageError for what no spacecraft can be."""

    nodes: tuple[Node, ...]
    couplings: tuple[Coupling, ...] = ()
    radiators: tuple[Radiator, ...] = ()
    cutoff: Cutoff | None = None

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        named = {name for item in self.couplings for name in (item.a, item.b)} | {item.node for item in self.radiators}
        named |= {self.cutoff.node} if self.cutoff else set()
        if not names or len(set(names)) != len(names) or not named <= set(names):
            raise UsageError(
                f"thermal nodes are {names}, named are {sorted(named)}", hint="each node once, and name only nodes"
            )
        for node in self.nodes:
            _check(f"thermal node {node.name}: heat capacity", node.heat_capacity_j_per_k, 1e-3, 1e12)
            _check(f"thermal node {node.name}: initial_c", node.initial_c, -ZERO_C_K, 2_000.0)
            _check(f"thermal node {node.name}: board_share", node.board_share, 0.0, 1.0)
            _check(f"thermal node {node.name}: constant_w", node.constant_w, 0.0, 1e9)
        _check("thermal nodes: sum of board_share", sum(node.board_share for node in self.nodes), 0.0, 1.0 + 1e-9)
        for item in self.couplings:
            _check(f"coupling {item.a}-{item.b}", item.conductance_w_per_k, 0.0, 1e9)
        for radiator in self.radiators:
            _check(f"radiator of {radiator.node}: area_m2", radiator.area_m2, 0.0, 1e7)
            _check(f"radiator of {radiator.node}: sides", radiator.sides, 1, 2)
            for name in ("emissivity", "absorptivity", "sun_share", "earth_view_factor"):
                _check(f"radiator of {radiator.node}: {name}", getattr(radiator, name), 0.0, 1.0)
        if self.cutoff is not None and not self.cutoff.on_c < self.cutoff.off_c:
            raise UsageError("thermal cutoff: on_c is not below off_c", hint="without hysteresis it would chatter")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ThermalConfig:
        """Inverse of `dataclasses.asdict`, also after a round trip through JSON."""
        cutoff = values["cutoff"]
        return cls(
            nodes=tuple(Node(**node) for node in values["nodes"]),
            couplings=tuple(Coupling(**item) for item in values["couplings"]),
            radiators=tuple(Radiator(**item) for item in values["radiators"]),
            cutoff=cutoff and Cutoff(**cutoff),
        )


@dataclass(frozen=True, slots=True)
class ThermalState:
    """Temperatures in Celsius by node, and whether the workload may run."""

    nodes: dict[str, float]
    may_run: bool


class HeatLedger(NamedTuple):
    """Joules since the model began. `heat_j` of board and platform, `radiated_j` to space."""

    heat_j: float
    sun_j: float
    albedo_j: float
    earth_j: float
    radiated_j: float
    stored_j: float

    @property
    def throughput_j(self) -> float:
        return self.heat_j + self.sun_j + self.albedo_j + self.earth_j + self.radiated_j

    @property
    def residual_j(self) -> float:
        """in - out - stored; zero but for rounding."""
        return self.heat_j + self.sun_j + self.albedo_j + self.earth_j - self.radiated_j - self.stored_j


class ThermalModel:
    """Temperatures that are stepped forward.

    >>> chip = Node("chip", 340.0, board_share=1.0)
    >>> model = ThermalModel(ThermalConfig((chip,), cutoff=Cutoff("chip", 60, 30)))
    >>> model.step(890.0, board_w=15.0).may_run, model.step(20.0, board_w=15.0).may_run
    (True, False)
    """

    def __init__(self, config: ThermalConfig) -> None:
        self.config = config
        index = {node.name: place for place, node in enumerate(config.nodes)}
        self._capacity = [node.heat_capacity_j_per_k for node in config.nodes]
        self._links = [(index[item.a], index[item.b], item.conductance_w_per_k) for item in config.couplings]
        self._emitting = [0.0] * len(index)
        for radiator in config.radiators:
            self._emitting[index[radiator.node]] += radiator.emitting_w_per_k4
        self._conducting = [0.0] * len(index)
        for a, b, conductance in self._links:
            self._conducting[a] += conductance
            self._conducting[b] += conductance
        self._radiator_of = [index[radiator.node] for radiator in config.radiators]
        self._watched = index[config.cutoff.node] if config.cutoff else None
        self._start_k = [node.initial_c + ZERO_C_K for node in config.nodes]
        self._kelvin = list(self._start_k)
        self._in_j = [0.0] * 4
        self._radiated_j = 0.0
        self._may_run = True
        self._judge()

    @property
    def state(self) -> ThermalState:
        names = (node.name for node in self.config.nodes)
        return ThermalState(
            dict(zip(names, (kelvin - ZERO_C_K for kelvin in self._kelvin), strict=True)), self._may_run
        )

    @property
    def ledger(self) -> HeatLedger:
        """Energy since the model was made."""
        stored = zip(self._capacity, self._kelvin, self._start_k, strict=True)
        heat_j, sun_j, albedo_j, earth_j = self._in_j
        stored_j = sum(c * (now - then) for c, now, then in stored)
        return HeatLedger(heat_j, sun_j, albedo_j, earth_j, self._radiated_j, stored_j)

    def step(self, dt_s: float, board_w: float = 0.0, sunlit: float = 0.0, albedo: float = 0.0) -> ThermalState:
        """Advance by `dt_s` of wall time under constant inputs; long steps are divided.

        `sunlit`: visible part of the solar disc. `albedo`: what `albedo_cosine` gives. Raises UsageError for
        a negative or non-finite argument.
        """
        for name, value in (("dt_s", dt_s), ("board_w", board_w), ("sunlit", sunlit), ("albedo", albedo)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"thermal step: {name} is {value!r}", hint="zero or more, and finite")
        heat_w, entering_w = self._inputs(board_w, sunlit, albedo)
        left_s = dt_s
        while left_s > 0.0:
            part_s = min(left_s, self._longest_s(heat_w))
            self._heun(part_s, heat_w)
            for place, watts in enumerate(entering_w):
                self._in_j[place] += watts * part_s
            left_s = left_s - part_s if part_s < left_s else 0.0
            self._judge()
        return self.state

    def _inputs(self, board_w: float, sunlit: float, albedo: float) -> tuple[list[float], list[float]]:
        """(watts into each node, watts by origin in the ledger's order)."""
        heat_w = [node.constant_w + node.board_share * board_w for node in self.config.nodes]
        entering_w = [sum(heat_w), 0.0, 0.0, 0.0]
        for place, radiator in zip(self._radiator_of, self.config.radiators, strict=True):
            absorbed = radiator.absorbed_w(sunlit, albedo)
            heat_w[place] += sum(absorbed)
            for origin, watts in enumerate(absorbed, start=1):
                entering_w[origin] += watts
        return heat_w, entering_w

    def _longest_s(self, heat_w: list[float]) -> float:
        """The longest stable and accurate sub-step from the present temperatures.

        The time constant is judged at the temperature that the node may reach in it: emission rises with its cube.
        """
        longest_s = math.inf
        net_w, _ = self._flows(self._kelvin, heat_w)
        for place, capacity in enumerate(self._capacity):
            emitting, kelvin = self._emitting[place], max(self._kelvin[place], _LEAST_K)
            slope = self._conducting[place] + 4.0 * emitting * ((1.0 + _RISE) * kelvin) ** 3
            if slope > 0.0:
                longest_s = min(longest_s, _SHARE_OF_TIME_CONSTANT * capacity / slope)
            if emitting > 0.0 and net_w[place] > 0.0:
                longest_s = min(longest_s, _RISE * capacity * kelvin / net_w[place])
        return longest_s

    def _heun(self, dt_s: float, heat_w: list[float]) -> None:
        before = self._kelvin
        first_w, first_out_w = self._flows(before, heat_w)
        ahead = [k + w * dt_s / c for k, w, c in zip(before, first_w, self._capacity, strict=True)]
        second_w, second_out_w = self._flows(ahead, heat_w)
        self._kelvin = [
            kelvin + 0.5 * (a + b) * dt_s / capacity
            for kelvin, a, b, capacity in zip(before, first_w, second_w, self._capacity, strict=True)
        ]
        self._radiated_j += 0.5 * (first_out_w + second_out_w) * dt_s

    def _flows(self, kelvin: list[float], heat_w: list[float]) -> tuple[list[float], float]:
        """(net watts into each node, watts radiated to space)."""
        net_w, out_w = list(heat_w), 0.0
        for place, (emitting, at) in enumerate(zip(self._emitting, kelvin, strict=True)):
            if emitting > 0.0:
                radiated_w = emitting * at * at * at * at
                net_w[place] -= radiated_w
                out_w += radiated_w
        for a, b, conductance in self._links:
            flow_w = conductance * (kelvin[a] - kelvin[b])
            net_w[a] -= flow_w
            net_w[b] += flow_w
        return net_w, out_w

    def _judge(self) -> None:
        if self._watched is None or self.config.cutoff is None:
            return
        celsius = self._kelvin[self._watched] - ZERO_C_K
        if celsius >= self.config.cutoff.off_c:
            self._may_run = False
        elif celsius <= self.config.cutoff.on_c:
            self._may_run = True


def albedo_cosine(position_km: Floats, sun_km: Floats) -> Floats:
    """Cosine of the Sun's zenith angle on the ground below the satellite, 0 at night; shape (n,).

    Geocentric positions of shape (n, 3) in one frame. What a low satellite sees of the Earth is lit about so.
    """
    along = (position_km * sun_km).sum(axis=1)
    length = np.linalg.norm(position_km, axis=1) * np.linalg.norm(sun_km, axis=1)
    return np.asarray(np.clip(along / length, 0.0, 1.0), dtype=np.float64)


def radiator_temperature_c(
    power_w: float, area_m2: float, *, sides: int = 1, emissivity: float = 0.9, absorbed_w_m2: float = 0.0
) -> float:
    """Steady temperature of a radiator that gives off `power_w` and what it absorbs, W/m2 of one side's area.

    >>> round(radiator_temperature_c(120e3, 110.0, sides=2))
    48
    """
    surface = Radiator("", area_m2, sides, emissivity)
    _check("radiator: watts", power_w + absorbed_w_m2 * area_m2, 0.0, 1e12)
    if not surface.emitting_w_per_k4 > 0:
        raise UsageError("a radiator without area or emissivity gives nothing off", hint="above zero, both")
    return float(((power_w + absorbed_w_m2 * area_m2) / surface.emitting_w_per_k4) ** 0.25 - ZERO_C_K)


def radiator_area_m2(
    power_w: float, temperature_c: float, *, sides: int = 1, emissivity: float = 0.9, absorbed_w_m2: float = 0.0
) -> float:
    """Area of one side that gives off `power_w` at a temperature; UsageError when it would warm up instead."""
    _check("radiator: watts", power_w, 0.0, 1e12)
    given_w_m2 = Radiator("", 1.0, sides, emissivity).emitting_w_per_k4 * (temperature_c + ZERO_C_K) ** 4
    if given_w_m2 <= absorbed_w_m2:
        raise UsageError(
            f"at {temperature_c:g} C a radiator gives off {given_w_m2:.0f} W/m2 and absorbs {absorbed_w_m2:.0f}",
            hint="let it be warmer, or shade it",
        )
    return power_w / (given_w_m2 - absorbed_w_m2)


@dataclass(frozen=True, slots=True)
class Burst:
    """How long work lasts from the beginning until it must stop, and how long it cools; None: not within the limit."""

    run_s: float | None
    cool_s: float | None
    state: ThermalState


def burst_forecast(
    config: ThermalConfig,
    run_w: float,
    idle_w: float,
    *,
    sunlit: float = 0.0,
    albedo: float = 0.0,
    limit_s: float = 86_400.0,
    step_s: float = 1.0,
) -> Burst:
    """Work at `run_w` from the initial temperatures until the cut-off, then idle until work may go on."""
    model = ThermalModel(config)

    def until(wanted: bool, watts: float) -> float | None:
        look = max(round(_SETTLED_S / step_s), 1)
        state = before = model.state
        for count in range(math.ceil(limit_s / step_s) + 1):
            if state.may_run is wanted:
                return count * step_s
            if count % look == 0 and count:
                moved_k = max(abs(state.nodes[name] - before.nodes[name]) for name in state.nodes)
                if moved_k < _SETTLED_K:  # nothing changes any more
                    return None
                before = state
            state = model.step(step_s, watts, sunlit, albedo)
        return None

    run_s = until(False, run_w)
    return Burst(run_s, None if run_s is None else until(True, idle_w), model.state)


def _check(what: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses nan
        raise UsageError(f"{what} is {value}, must be within {low:g}..{high:g}", hint="correct the thermal section")
