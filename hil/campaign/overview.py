"""What a mission is in a few words for people: its orbit, how old the elements are, what to be careful about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hil.inventory.environment import line_of, mission_orbit
from hil.mission.budget import balance_caution
from hil.mission.frames import utc_text

if TYPE_CHECKING:
    from hil.inventory import Mission
    from hil.mission.environment import MissionEnvironment
    from hil.mission.orbit import Caution, Orbit
    from hil.mission.timeline import Timeline

_ROUND_KM = 25.0  # an orbit whose height varies by less is told by one height


@dataclass(frozen=True, slots=True)
class Overview:
    """`orbit`: height and inclination; `elements`: where they come from and how old they are at the mission's start.

    `age_days` is None for a design orbit, which does not age. `cautions` are sentences: file, line, name, what to know.
    """

    orbit: str
    elements: str
    age_days: float | None
    epoch: str
    cautions: tuple[str, ...]


def overview(mission: Mission) -> Overview:
    """Raises UsageError, with file and line, for an orbit that cannot be."""
    orbit = mission_orbit(mission)
    age = None if mission.orbit_path is None else orbit.age_days(mission.start)
    if age is None or mission.orbit_path is None:
        elements = "design orbit"
    else:
        elements = f"{mission.orbit_path.name}, {_age(age)} at the start"
    cautions = orbit.warnings(mission.start, days=mission.file.duration_h / 24.0)
    return Overview(
        orbit=orbit_text(orbit),
        elements=elements,
        age_days=age,
        epoch=utc_text(orbit.epoch),
        cautions=tuple(
            _caution(mission, caution, "orbit", *mission.file.orbit.model_fields_set) for caution in cautions
        ),
    )


def energy_cautions(mission: Mission, environment: Timeline | MissionEnvironment) -> tuple[str, ...]:
    """Like `Overview.cautions`: whether the array feeds the idle board. Raises UsageError without a power section."""
    caution = balance_caution(environment)
    return () if caution is None else (_caution(mission, caution, "power", "array"),)


def _caution(mission: Mission, caution: Caution, *key: str) -> str:
    return f"{mission.path.name}:{line_of(mission, *key)}: {caution.code}: {caution.message}"


def orbit_text(orbit: Orbit) -> str:
    """Mean height above the equatorial radius and inclination: `535 km, 97.5°`."""
    # SGP4's own axis: Kepler's third law on the mean motion of an element set is some 3 km too high.
    low, high = orbit.satrec.altp * orbit.satrec.radiusearthkm, orbit.satrec.alta * orbit.satrec.radiusearthkm
    height = f"{(low + high) / 2:.0f} km" if high - low < _ROUND_KM else f"{low:.0f} x {high:.0f} km"
    return f"{height}, {orbit.inclination_deg:.1f}°"


def _age(days: float) -> str:
    amount = f"{abs(days):.1f} days"
    return f"{amount} old" if days >= 0 else f"{amount} ahead"
