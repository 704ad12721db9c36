"""From the power and thermal sections of a checked mission file to the mission engine's configurations."""

from __future__ import annotations

from itertools import pairwise

from hil.inventory.board_type import BoardType
from hil.inventory.mission_power import Array, Battery, PowerPlan, ThermalPlan
from hil.mission.environment import PowerEnvironment
from hil.mission.eps import ConverterLoss, EpsConfig, ShedConfig
from hil.mission.solar_array import ArrayConfig
from hil.mission.thermal import Coupling, Cutoff, Node, Radiator, ThermalConfig


def power_environment(plan: PowerPlan, board: BoardType) -> PowerEnvironment:
    """The satellite's power side with `board` as its computer. Raises UsageError for what the engine refuses."""
    array, battery, shed = plan.array, plan.battery, plan.shed
    array_config = _array(array)
    polarization = battery.polarization
    return PowerEnvironment(
        array=array_config,
        eps=EpsConfig(
            capacity_ah=battery.capacity_wh / (_mean_cell_v(battery) * battery.cells_series),
            cells_series=battery.cells_series,
            resistance_ohm=battery.resistance_ohm,
            polarization_ohm=0.0 if polarization is None else polarization.resistance_ohm,
            polarization_s=60.0 if polarization is None else polarization.time_constant_s,
            ocv=battery.open_circuit,
            charge_max_c=battery.charge_c_rate,
            charge_efficiency=battery.charge_efficiency,
            charge_cell_v=battery.charge_cell_v,
            mppt_efficiency=array.mppt_efficiency,
            platform_w=plan.platform_w,
            initial_soc=battery.initial_soc,
            regulated_bus_v=plan.bus.regulated_v,
            converter=ConverterLoss(**plan.bus.converter.model_dump()),
            direct=array_config.operating_curve if array.conversion == "direct" else None,
        ),
        shed=ShedConfig(
            shed_v=shed.voltage_v,
            hold_s=shed.hold_s,
            restore_v=shed.restore_voltage_v,
            restore_soc=shed.restore_soc,
            dwell_s=shed.dwell_s,
        ),
        board_idle_w=board.power.idle_w,
        board_full_w=board.power.inference_w,
    )


def thermal_config(plan: ThermalPlan | None) -> ThermalConfig | None:
    """The thermal nodes, None when the mission has none."""
    if plan is None:
        return None
    return ThermalConfig(
        nodes=tuple(Node(name=name, **node.model_dump()) for name, node in plan.nodes.items()),
        couplings=tuple(Coupling(*item.between, item.conductance_w_per_k) for item in plan.couplings),
        radiators=tuple(Radiator(**item.model_dump()) for item in plan.radiators),
        cutoff=None if plan.cutoff is None else Cutoff(**plan.cutoff.model_dump()),
    )


def _array(array: Array) -> ArrayConfig:
    return ArrayConfig(
        bol_w=array.rated_w,
        degradation=array.degradation,
        pointing=array.pointing,
        distance_scaling=array.distance_scaling,
        temperature_c=array.temperature_c,
        power_coefficient_per_k=array.power_coefficient_per_k,
        current_coefficient_per_k=array.current_coefficient_per_k,
        curve=None if array.curve is None else array.curve.model_curve(),
    )


def _mean_cell_v(battery: Battery) -> float:
    """Wh over the whole discharge divided by the mean open-circuit voltage of that discharge is the charge in Ah."""
    return sum((high - low) * (low_v + high_v) / 2 for (low, low_v), (high, high_v) in pairwise(battery.open_circuit))
