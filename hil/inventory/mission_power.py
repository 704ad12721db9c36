"""Electrical power and heat of a mission file: array, battery, bus, load shedding, thermal nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hil.errors import UsageError
from hil.inventory.yaml_file import Strict
from hil.mission import eps, solar_array
from hil.mission.battery import NMC_OCV

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
CURVE_AGREES = 0.05  # a data sheet rounds its points


class SasCurve(Strict):
    """The array's I-V curve in full sun at begin of life, as a hardware solar-array simulator is told it."""

    voc_v: Positive
    isc_a: Positive
    vmp_v: Positive
    imp_a: Positive

    @model_validator(mode="after")
    def _possible(self) -> SasCurve:
        self.model_curve()
        return self

    def model_curve(self) -> solar_array.SasCurve:
        """As the mission engine has it. Raises ValueError when no such curve exists."""
        try:
            return solar_array.SasCurve(**self.model_dump())
        except UsageError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None


class Array(Strict):
    """Solar array: begin-of-life watts, area and efficiency, or its curve; what is left, pointing, temperature."""

    bol_w: float | None = Field(default=None, ge=0)
    area_m2: Positive | None = None
    efficiency: Share | None = Field(default=None, description="of the cells at 28 C, AM0 1367 W/m2")
    degradation: Share = 1.0
    pointing: Share = 1.0
    temperature_c: float = Field(default=28.0, ge=-200, le=200)
    power_coefficient_per_k: float = Field(default=-0.0025, ge=-0.005, le=0.0)
    current_coefficient_per_k: float = Field(default=0.0005, ge=0.0, le=0.004)
    distance_scaling: bool = False
    conversion: Literal["mppt", "direct"] = "mppt"
    mppt_efficiency: Share = 0.97
    curve: SasCurve | None = Field(
        default=None, description="28 C, full sun; for direct transfer and simulators; alone it also gives bol_w"
    )

    @model_validator(mode="after")
    def _size(self) -> Array:
        sized = sum(value is not None for value in (self.bol_w, self.area_m2))
        if sized > 1 or (self.area_m2 is None) != (self.efficiency is None) or (not sized and self.curve is None):
            raise ValueError("give either bol_w, or area_m2 and efficiency, or only curve")
        if self.conversion == "direct" and self.curve is None:
            raise ValueError("direct transfer needs curve: {voc_v, isc_a, vmp_v, imp_a}")
        if sized and self.curve is not None:
            curve_w = self.curve.model_curve().max_power()[2]
            if abs(curve_w - self.rated_w) > CURVE_AGREES * curve_w:
                raise ValueError(f"its curve gives {curve_w:.1f} W at most, its size {self.rated_w:.1f} W")
        return self

    @property
    def rated_w(self) -> float:
        """Begin-of-life watts at 1 AU and 28 C."""
        if self.bol_w is not None:
            return self.bol_w
        if self.area_m2 is not None:
            return solar_array.SUN_W_M2 * self.area_m2 * (self.efficiency or 0.0)
        return 0.0 if self.curve is None else self.curve.model_curve().max_power()[2]


class Polarization(Strict):
    """A voltage that builds up under current and decays after: a resistance with a parallel capacitance."""

    resistance_ohm: Positive
    time_constant_s: Positive


class Battery(Strict):
    """Battery of the satellite; capacity in Wh at the cells, 0 for none. `ocv`: rows [state of charge, volts a cell].

    Resistances are the whole pack's.
    """

    cells_series: int = Field(ge=1)
    capacity_wh: float = Field(ge=0, description="0: no battery; that needs bus.regulated_v")
    resistance_ohm: float = Field(ge=0)
    polarization: Polarization | None = None
    charge_c_rate: Positive = 1.0
    charge_efficiency: float = Field(default=0.99, gt=0, le=1)
    charge_cell_v: Positive = 4.2
    ocv: tuple[tuple[float, float], ...] = ()
    initial_soc: Share = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Battery:
        try:
            eps.EpsConfig(1.0, ocv=self.open_circuit, charge_cell_v=self.charge_cell_v)
        except UsageError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
        return self

    @property
    def open_circuit(self) -> tuple[tuple[float, float], ...]:
        """Rows of (state of charge, volts per cell): the file's, else a common lithium-ion cell's (assumed)."""
        return self.ocv or NMC_OCV


class Converter(Strict):
    """A converter's losses: p0_w + k1 P + k2_per_w P^2 at output power P."""

    p0_w: float = Field(default=0.0, ge=0)
    k1: float = Field(default=0.0, ge=0, lt=1)
    k2_per_w: float = Field(default=0.0, ge=0)


class Bus(Strict):
    """Battery bus when `regulated_v` is absent, else a constant voltage behind a converter."""

    regulated_v: Positive | None = None
    converter: Converter = Converter()

    @model_validator(mode="after")
    def _converted(self) -> Bus:
        if self.regulated_v is None and self.converter != Converter():
            raise ValueError("converter losses need regulated_v: a battery bus has no converter")
        return self


class Shed(Strict):
    """Load shedding: the board's power is really cut. Voltages are the battery's (the bus's without a battery).

    Dwell is wall time: a board's rails discharge in real time.
    """

    voltage_v: Positive
    hold_s: float = Field(default=2.0, ge=0)
    restore_voltage_v: Positive
    restore_soc: Share
    dwell_s: float = Field(default=5.0, ge=0)

    @model_validator(mode="after")
    def _hysteresis(self) -> Shed:
        if self.restore_voltage_v <= self.voltage_v:
            raise ValueError("restore_voltage_v must be above voltage_v, or the board is cut and powered for ever")
        return self


class LoopBounds(Strict):
    """What the power loop must keep to while the mission is flown, wall seconds; beyond it the run is invalid.

    `period_s`: the slowest loop; a supply that cannot do it is refused before the flight. `lateness_s`: of a set point
    after its schedule. `gap_s`: between two measurements of an output that is on.
    """

    period_s: Positive = 1.0
    lateness_s: Positive = 1.0
    gap_s: Positive = 1.0


class PowerPlan(Strict):
    """The satellite's electrical power system. `platform_w` is everything but the board, modelled."""

    platform_w: float = Field(ge=0)
    array: Array
    battery: Battery
    bus: Bus = Bus()
    shed: Shed
    loop: LoopBounds = LoopBounds()

    @model_validator(mode="after")
    def _fits(self) -> PowerPlan:
        if self.battery.capacity_wh == 0 and (self.bus.regulated_v is None or self.array.conversion == "direct"):
            raise ValueError("without a battery the bus needs regulated_v and the array a tracker (mppt)")
        if self.battery.capacity_wh == 0 and self.shed.restore_soc > 0:
            raise ValueError("without a battery shed.restore_soc must be 0: it would never be restored")
        if self.battery.capacity_wh == 0 and self.shed.restore_voltage_v > (self.bus.regulated_v or 0.0):
            raise ValueError("without a battery shed.restore_voltage_v must not be above bus.regulated_v")
        return self


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
        if sum(node.board_share for node in self.nodes.values()) > 1.0 + 1e-9:
            raise ValueError("the nodes' board_share add up to more than 1")
        if unknown:
            raise ValueError(f"unknown thermal node {', '.join(unknown)}; nodes are {', '.join(self.nodes)}")
        return self
