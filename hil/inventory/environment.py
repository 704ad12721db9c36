"""From a checked mission file to what the mission engine compiles: the one place that knows both."""

from __future__ import annotations

from itertools import pairwise

from hil.errors import UsageError
from hil.inventory.board_type import BoardType
from hil.inventory.mission import Mission, MissionFile
from hil.mission.battery import NMC_OCV
from hil.mission.eps import EpsConfig, ShedConfig
from hil.mission.faults import FaultPlan, FaultRate
from hil.mission.frames import Station
from hil.mission.orbit import Orbit
from hil.mission.radio import LinkEnvironment
from hil.mission.solar_array import ArrayConfig
from hil.mission.timeline import MissionEnvironment, PowerEnvironment


def mission_orbit(mission: Mission) -> Orbit:
    """The orbit that the mission file names. Raises UsageError with file and line for elements that cannot be."""
    source, start = mission.file.orbit, mission.start
    if source.sso is not None:
        design = source.sso
        return Orbit.sso(design.altitude_km, design.epoch or start, ltan_h=design.ltan_h, ltdn_h=design.ltdn_h)
    if source.tle is None or mission.orbit_path is None:
        raise UsageError(f"{mission.path}: only `tle` and `sso` orbits can be flown yet")
    return Orbit.from_tle(mission.orbit_path.read_text(encoding="utf-8"), source=str(mission.orbit_path))


def environment(mission: Mission, board: BoardType) -> MissionEnvironment:
    """The environment of `mission` with `board` as its computer. Raises UsageError naming the file that is wrong."""
    file = mission.file
    orbit = mission_orbit(mission)
    power = file.power
    battery = power.battery
    shed = power.shed
    # Wh over the whole discharge divided by the mean open-circuit voltage of that discharge is the charge in Ah.
    mean_cell_v = sum((high - low) * (low_v + high_v) / 2 for (low, low_v), (high, high_v) in pairwise(NMC_OCV))
    try:
        return MissionEnvironment(
            name=mission.name,
            orbit=orbit,
            stations=tuple(
                Station(
                    name=name,
                    latitude_deg=station.latitude_deg,
                    longitude_deg=station.longitude_deg,
                    altitude_m=station.altitude_m,
                    mask_deg=station.mask_deg,
                )
                for name, station in file.stations.items()
            ),
            start=mission.start,
            duration_s=file.duration_h * 3600.0,
            link=LinkEnvironment(
                uplink_bps=file.link.uplink.rate_bps or 0.0,
                downlink_bps=file.link.downlink.rate_bps or 0.0,
                uplink_loss=file.link.uplink.loss,
                downlink_loss=file.link.downlink.loss,
                acquisition_s=file.link.acquisition_s,
            ),
            power=PowerEnvironment(
                array=ArrayConfig(
                    bol_w=power.array.bol_w or 0.0, degradation=power.array.degradation, pointing=power.array.pointing
                ),
                eps=EpsConfig(
                    capacity_ah=battery.capacity_wh / (mean_cell_v * battery.cells_series),
                    cells_series=battery.cells_series,
                    resistance_ohm=battery.resistance_ohm,
                    charge_max_c=battery.charge_c_rate,
                    platform_w=power.platform_w,
                    initial_soc=battery.initial_soc,
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
            ),
            seed=file.seed,
        )
    except UsageError as error:
        raise UsageError(f"{mission.path}: {error.message}", hint=error.hint) from None


def _faults(file: MissionFile) -> FaultPlan | None:
    """The radiation faults of the mission, cross-sections turned into rates; None when it names none."""
    plan = file.faults
    if plan is None:
        return None
    rates = tuple(
        FaultRate(kind, rate.per_year)
        if rate.per_year is not None
        else FaultRate.from_cross_section(kind, rate.cross_section_cm2 or 0.0, plan.fluence_per_cm2_year)
        for kind, rate in plan.rates.items()
    )
    return FaultPlan(rates, acceleration=plan.acceleration, saa_share=plan.saa_share)
