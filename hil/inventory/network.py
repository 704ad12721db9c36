"""From a mission file's constellation to the network that routes are compiled from."""

from __future__ import annotations

import math

from hil.errors import UsageError
from hil.inventory import yaml_file
from hil.inventory.mission import Mission
from hil.inventory.mission_constellation import ConstellationPlan, IslPlan
from hil.mission.constellation import Constellation
from hil.mission.frames import Station
from hil.mission.isl import IslConfig, IslOutage
from hil.mission.orbit import Orbit
from hil.mission.routes import Network


def network(mission: Mission, orbit: Orbit, stations: tuple[Station, ...]) -> Network | None:
    """The satellites and links of `mission`, made from `orbit`; None without a constellation, or one without links.

    Raises UsageError with file and line for a pattern that cannot be: phasing, satellites in one place, a ring that
    the Earth blocks, outages of what does not exist.
    """
    file = mission.file
    plan = file.constellation
    if plan is None or plan.isl is None:
        return None
    satellites = _satellites(mission, plan, orbit)
    try:
        found = Network(
            constellation=satellites,
            isl=_isl(plan.isl),
            stations=stations,
            start=mission.start,
            duration_s=file.duration_h * 3_600.0,
            step_s=plan.step_s,
            ground_processing_s=file.link.processing_s,
        )
        found.parts()
    except UsageError as error:
        raise UsageError(f"{mission.path}:{_line(mission)}: {error.message}", hint=error.hint) from None
    if plan.target is not None and plan.target >= len(satellites):
        raise UsageError(
            f"{mission.path}:{_line(mission, 'target')}: target {plan.target} of {len(satellites)} satellites",
            hint=f"satellites are numbered 0..{len(satellites) - 1}",
        )
    return found


def _satellites(mission: Mission, plan: ConstellationPlan, orbit: Orbit) -> Constellation:
    if plan.omm is None:
        return Constellation.walker(
            orbit,
            plan.planes,
            plan.satellites_per_plane or 1,
            phasing=plan.phasing,
            raan_spread_deg=plan.raan_spread_deg,
        )
    path = (mission.path.parent / plan.omm).resolve()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{mission.path}:{_line(mission, 'omm')}: {path} cannot be read: {error}") from None
    found = Constellation.from_omm(text, source=str(path))
    for orbit in found.orbits:
        where = f"{mission.path}:{_line(mission, 'omm')}"
        orbit.require_epoch_near(mission.start, days=mission.file.duration_h / 24.0, where=where)
    return found


def _isl(plan: IslPlan) -> IslConfig:
    return IslConfig(
        rate_bps=plan.rate_bps,
        topology=plan.topology,
        acquisition_s=plan.acquisition_s,
        processing_s=plan.processing_s,
        max_range_km=plan.max_range_km,
        grazing_altitude_km=plan.grazing_altitude_km,
        reacquire_after_eclipse=plan.reacquire_after_eclipse,
        outages=tuple(
            IslOutage(
                satellite=item.satellite,
                start_s=item.start_h * 3_600.0,
                end_s=math.inf if item.duration_h is None else (item.start_h + item.duration_h) * 3_600.0,
                other=item.other,
            )
            for item in plan.outages
        ),
    )


def _line(mission: Mission, *key: str) -> int:
    """Where a key of the section stands, in the chosen case if that sets it; else the section itself."""
    _, lines = yaml_file.read(mission.path)
    case = ("cases", mission.file.case or "")
    for where in ((*case, "constellation", *key), ("constellation", *key), (*case, "constellation")):
        if where in lines:
            return lines[where]
    return lines.get(("constellation",), 1)
