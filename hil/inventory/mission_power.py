"""Electrical power and heat of a mission file: array, battery, bus, load shedding, thermal nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hil.inventory.yaml_file import Strict

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class SasCurve(Strict):
    """The array's I-V curve in full sun at begin of life, as a hardware solar-array simulator is told it."""

    voc_v: Positive
    isc_a: Positive
    vmp_v: Positive
    imp_a: Positive


class Array(Strict):
    """Solar array: begin-of-life watts, or area and efficiency; what is left of them, pointing, temperature."""

    bol_w: float | None = Field(default=None, ge=0)
    area_m2: Positive | None = None
    efficiency: Share | None = Field(default=None, description="of the cells at 28 C, AM0 1367 W/m2")
    degradation: Share = 1.0
    pointing: Share = 1.0
    temperature_c: float = Field(default=28.0, ge=-200, le=200)
    power_coefficient_per_k: float = Field(default=-0.0025, ge=-0.02, le=0.0)
    distance_scaling: bool = False
    conversion: Literal["mppt", "direct"] = "mppt"
    mppt_efficiency: Share = 0.97
    curve: SasCurve | None = Field(default=None, description="required for direct transfer; output for simulators")

    @model_validator(mode="after")
    def _size(self) -> Array:
        if (self.bol_w is None) == (self.area_m2 is None) or (self.area_m2 is None) != (self.efficiency is None):
            raise ValueError("give either bol_w, or area_m2 and efficiency")
        if self.conversion == "direct" and self.curve is None:
            raise ValueError("direct transfer needs curve: {voc_v, isc_a, vmp_v, imp_a}")
        return self


class Battery(Strict):
    """Battery of the satellite; capacity in Wh at the cells. `ocv`: rows [state of charge, volts per cell]."""

    cells_series: int = Field(ge=1)
    capacity_wh: Positive
    resistance_ohm: float = Field(ge=0)
    charge_c_rate: Positive = 1.0
    charge_efficiency: float = Field(default=0.99, gt=0, le=1)
    charge_cell_v: Positive = 4.2
    ocv: tuple[tuple[float, float], ...] = ()
    initial_soc: Share = 1.0


class Converter(Strict):
    """A converter's losses: p0_w + k1 P + k2_per_w P^2 at output power P."""

    p0_w: float = Field(default=0.0, ge=0)
    k1: float = Field(default=0.0, ge=0, lt=1)
    k2_per_w: float = Field(default=0.0, ge=0)


class Bus(Strict):
    """Battery bus when `regulated_v` is absent, else a constant voltage behind a converter."""

    regulated_v: Positive | None = None
    converter: Converter = Converter()


class Shed(Strict):
    """Load shedding: the board's power is really cut. Dwell is wall time: a board's rails discharge in real time."""

    voltage_v: Positive
    hold_s: float = Field(default=2.0, ge=0)
    restore_voltage_v: Positive
    restore_soc: Share
    dwell_s: float = Field(default=5.0, ge=0)


class PowerPlan(Strict):
    """The satellite's electrical power system. `platform_w` is everything but the board, modelled."""

    platform_w: float = Field(ge=0)
    array: Array
    battery: Battery
    bus: Bus = Bus()
    shed: Shed


class ThermalNode(Strict):
    """A lump of heat capacity at one temperature."""

    heat_capacity_j_per_k: Positive
    initial_c: float = Field(default=20.0, gt=-273.15)
    board_share: Share = Field(default=0.0, description="share of the board's measured power that heats this node")
    constant_w: float = Field(default=0.0, ge=0, description="heat of the platform in this node, modelled")


class Coupling(Strict):
    """Conduction between two nodes."""

    between: tuple[str, str]
    conductance_w_per_k: Positive


class Radiator(Strict):
    """A surface of `node` that radiates to space; `area_m2` of one side. Sun, albedo and Earth infrared heat it."""

    node: str
    area_m2: Positive
    sides: Literal[1, 2] = 1
    emissivity: Share = 0.9
    absorptivity: Share = 0.2
    sun_share: Share = Field(default=0.0, description="mean cosine towards the Sun in sunlight")
    earth_view_factor: Share = Field(default=0.0, description="for albedo and Earth infrared")


class ThermalCutoff(Strict):
    """Run until hot, cool, repeat: the workload stops at `off_c` and may go on at `on_c`."""

    node: str
    off_c: float
    on_c: float

    @model_validator(mode="after")
    def _ordered(self) -> ThermalCutoff:
        if self.on_c >= self.off_c:
            raise ValueError("on_c must be below off_c")
        return self


class ThermalPlan(Strict):
    """Lumped thermal model of the spacecraft around the board. Modelled, never measured; it does not scale with k."""

    nodes: dict[str, ThermalNode] = Field(min_length=1)
    couplings: tuple[Coupling, ...] = ()
    radiators: tuple[Radiator, ...] = ()
    cutoff: ThermalCutoff | None = None

    @model_validator(mode="after")
    def _known_nodes(self) -> ThermalPlan:
        named = {name for item in self.couplings for name in item.between} | {item.node for item in self.radiators}
        named |= {self.cutoff.node} if self.cutoff else set()
        unknown = sorted(named - set(self.nodes))
        if unknown:
            raise ValueError(f"unknown thermal node {', '.join(unknown)}; nodes are {', '.join(self.nodes)}")
        return self
