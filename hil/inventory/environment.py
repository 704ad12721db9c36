"""From a checked mission file to what the mission engine compiles: the one place that knows both."""

from __future__ import annotations

import numpy as np

from hil.errors import UsageError
from hil.inventory import yaml_file
from hil.inventory.board_type import BoardType
from hil.inventory.mission import Mission, MissionFile
from hil.inventory.mission_link import LinkPlan, LinkRates
from hil.inventory.network import network
from hil.inventory.orbit_file import read_orbit_file
from hil.inventory.power_environment import power_environment, thermal_config
from hil.mission.bursts import Bursts, RandomOutages
from hil.mission.environment import MissionEnvironment
from hil.mission.faults import FaultPlan, FaultRate
from hil.mission.frames import DAY_S, Station
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.radio import Channel, LinkBudget, LinkEnvironment, LinkWindow
from hil.mission.relay import Relay
from hil.mission.routes import Network
from hil.model import Span


def mission_orbit(mission: Mission) -> Orbit:
    """The orbit that the mission file names.

    Raises UsageError with file and line for elements that cannot be, that are years from the mission, or that decay
    before its end.
    """
    start, days = mission.start, mission.file.duration_h / 24.0
    kind = next(iter(mission.file.orbit.model_fields_set))
    where = f"{mission.path}:{line_of(mission, 'orbit', kind)}"
    if mission.orbit_path is not None:  # its complaints name the orbit file
        orbit = read_orbit_file(mission.orbit_path, "omm" if kind == "omm" else "tle")
        orbit.require_epoch_near(start, days=days, where=where)
    try:
        if mission.orbit_path is None:
            orbit = _design(mission)
        Ephemeris(orbit, start).teme_km(np.array([0.0, days * DAY_S]))
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None
    return orbit


def _design(mission: Mission) -> Orbit:
    sso, kepler = mission.file.orbit.sso, mission.file.orbit.kepler
    if sso is not None:
        return Orbit.sso(sso.altitude_km, sso.epoch or mission.start, ltan_h=sso.ltan_h, ltdn_h=sso.ltdn_h)
    if kepler is not None:
        return Orbit.kepler(kepler.epoch or mission.start, name=mission.name, **kepler.model_dump(exclude={"epoch"}))
    raise UsageError("the orbit has no source", hint="give exactly one of tle, omm, kepler, sso")


def line_of(mission: Mission, *key: str | int) -> int:
    """The line on which a key of the mission stands, in the chosen case if that sets it; 1 for a key that is absent."""
    _, lines = yaml_file.read(mission.path)
    in_case = ("cases", mission.file.case or "", *key)
    return lines.get(in_case, lines.get(key, 1))


def constellation(mission: Mission) -> Network | None:
    """What routes are compiled from; None when the mission has no constellation, or one without links.

    Raises UsageError with file and line for satellites, links or outages that cannot be.
    """
    if mission.file.constellation is None:
        return None
    return network(mission, mission_orbit(mission), _stations(mission.file))


def environment(mission: Mission, board: BoardType) -> MissionEnvironment:
    """The environment of `mission` with `board` as its computer. Raises UsageError naming the file that is wrong."""
    file = mission.file
    relay = _relay(mission)
    try:
        return MissionEnvironment(
            name=mission.name,
            orbit=mission_orbit(mission) if relay is None else relay.orbit,
            stations=_stations(file),
            start=mission.start,
            duration_s=file.duration_h * 3600.0,
            link=_link(file.link),
            power=power_environment(file.power, board),
            thermal=thermal_config(file.thermal),
            seed=file.seed,
            faults=_faults(file),
            relay=relay,
        )
    except UsageError as error:
        raise UsageError(f"{mission.path}: {error.message}", hint=error.hint) from None


def _relay(mission: Mission) -> Relay | None:
    """What leads to the board's satellite, when that is one of a constellation."""
    plan = mission.file.constellation
    if plan is None or plan.target is None or (links := constellation(mission)) is None:
        return None
    return Relay(links.constellation, links.isl, plan.target, links.step_s)


def _stations(file: MissionFile) -> tuple[Station, ...]:
    return tuple(
        Station(
            name=name,
            latitude_deg=station.latitude_deg,
            longitude_deg=station.longitude_deg,
            altitude_m=station.altitude_m,
            mask_deg=station.mask_deg,
            mask_table=station.mask_table,
        )
        for name, station in file.stations.items()
    )


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


def _link(plan: LinkPlan) -> LinkEnvironment:
    """The radio section in seconds and hertz."""
    random = plan.random_outages
    window = None
    if plan.window_h is not None:  # the file's own check: then every_h and one_way_delay_s are there as well
        window = LinkWindow(plan.window_h * 3600.0, (plan.every_h or 0.0) * 3600.0, plan.one_way_delay_s or 0.0)
    return LinkEnvironment(
        uplink=_channel(plan.uplink),
        downlink=_channel(plan.downlink),
        jitter_s=plan.jitter_s,
        processing_s=plan.processing_s,
        acquisition_s=plan.acquisition_s,
        handover=plan.handover,
        outages=tuple(
            Span(item.start_h * 3600.0, item.start_h * 3600.0 + item.duration_s, "scheduled") for item in plan.outages
        ),
        random_outages=None if random is None else RandomOutages(random.per_day, random.mean_s),
        window=window,
    )


def _channel(rates: LinkRates) -> Channel:
    budget, bursts = rates.budget, rates.bursts
    return Channel(
        rate_bps=rates.rate_bps,
        budget=None
        if budget is None
        else LinkBudget(
            frequency_hz=float(round(budget.frequency_ghz * 1e9)),  # 8.2 GHz has no exact float
            **{name: getattr(budget, name) for name in type(budget).model_fields if name != "frequency_ghz"},
        ),
        max_rate_bps=rates.max_rate_bps,
        loss=rates.loss,
        bursts=None if bursts is None else Bursts(bursts.good_mean_s, bursts.bad_mean_s, bursts.loss_bad),
    )
