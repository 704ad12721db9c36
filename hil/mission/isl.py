"""Links between satellites: who may talk to whom, over which distance, how near the Earth, and what is out of order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hil.errors import UsageError
from hil.mission.constellation import EARTH_KM, Constellation, Ints, mean_axis_km, ring_figures
from hil.mission.frames import Floats
from hil.mission.orbit import Orbit

Topology = Literal["ring", "grid", "mesh"]

_MESH_LIMIT = 500  # satellites; every pair is looked at
_PHASES = 32
_NEARLY_CIRCULAR = 0.05  # above it a ring breathes too much to be judged by its mean radius


@dataclass(frozen=True, slots=True)
class IslOutage:
    """A satellite (`other` None: all its links) or one link out of order from `start_s` to `end_s` of mission time."""

    satellite: int
    start_s: float = 0.0
    end_s: float = math.inf
    other: int | None = None


@dataclass(frozen=True, slots=True)
class IslConfig:
    """Inter-satellite links; the same in both directions.

    `topology`: `ring` links neighbours in a plane; `grid` also the nearest satellite of both adjacent planes (+Grid);
    `mesh` every pair within `max_range_km`. A link works while its length is at most `max_range_km` and the straight
    line stays `grazing_altitude_km` above a sphere of the equatorial radius, and not before `acquisition_s` after it
    (re)appeared. Links that are there when the mission starts are taken as locked. `processing_s` is added per link.
    `reacquire_after_eclipse`: a terminal that comes out of the Earth's shadow (end of the penumbra) has to lock anew.
    """

    rate_bps: float
    topology: Topology = "ring"
    acquisition_s: float = 0.0
    max_range_km: float | None = None
    grazing_altitude_km: float = 80.0
    processing_s: float = 0.0
    outages: tuple[IslOutage, ...] = ()
    reacquire_after_eclipse: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate_bps < 1e14:
            raise UsageError(f"isl rate_bps is {self.rate_bps}", hint="bits per second, above zero")
        if self.topology not in ("ring", "grid", "mesh"):
            raise UsageError(f"unknown isl topology {self.topology!r}", hint="ring, grid or mesh")
        if self.topology == "mesh" and self.max_range_km is None:
            raise UsageError("a mesh of inter-satellite links needs max_range_km", hint="how far a terminal reaches")
        for name in ("acquisition_s", "processing_s"):
            if not 0 <= getattr(self, name) < 3_600:
                raise UsageError(f"isl {name} is {getattr(self, name)}", hint="seconds, zero or more")
        if self.max_range_km is not None and not self.max_range_km > 0:
            raise UsageError(f"isl max_range_km is {self.max_range_km}", hint="above zero")
        if not 0 <= self.grazing_altitude_km < 1e5:
            raise UsageError(f"isl grazing_altitude_km is {self.grazing_altitude_km}", hint="kilometres, zero or more")
        for outage in self.outages:
            if not 0 <= outage.start_s < outage.end_s:
                raise UsageError(
                    f"outage of satellite {outage.satellite} from {outage.start_s:g} s to {outage.end_s:g} s",
                    hint="it starts at or after the mission's start and ends later than it starts",
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IslConfig:
        """Inverse of `dataclasses.asdict`, also after a round trip through JSON."""
        return cls(**{**values, "outages": tuple(IslOutage(**item) for item in values["outages"])})


def pairs(constellation: Constellation, config: IslConfig) -> Ints:
    """The links that the topology allows, each once, as rows (lower, higher satellite), sorted; shape (links, 2).

    Raises UsageError when neighbours of an even, circular ring never see each other, saying how many satellites would.
    """
    count, planes, slots = len(constellation), constellation.planes, constellation.per_plane
    if config.topology == "mesh":
        if count > _MESH_LIMIT:
            raise UsageError(f"a mesh of {count} satellites", hint=f"use grid or ring above {_MESH_LIMIT} satellites")
        return np.argwhere(np.triu(np.ones((count, count), dtype=bool), k=1)).astype(np.int64)
    numbers = np.arange(count, dtype=np.int64).reshape(planes, slots)
    found = []
    if slots > 1:
        first = constellation.orbits[0]
        circular = constellation.even and first.eccentricity < _NEARLY_CIRCULAR
        if circular and (config.topology == "ring" or planes == 1):
            _require_sight(first, slots, config)
        found.append(np.column_stack([numbers.ravel(), np.roll(numbers, -1, axis=1).ravel()]))
    if config.topology == "grid":
        for plane in range(planes if constellation.closed else planes - 1):
            following = (plane + 1) % planes
            shift = _nearest_slot(constellation, plane, following)
            found.append(np.column_stack([numbers[plane], np.roll(numbers[following], -shift)]))
    links = np.sort(np.concatenate(found or [np.zeros((0, 2), dtype=np.int64)]), axis=1)
    return np.unique(links[links[:, 0] != links[:, 1]], axis=0)


def geometry(a_km: Floats, b_km: Floats) -> tuple[Floats, Floats]:
    """Length of the straight line from a to b and the height of its lowest point over the equatorial radius, km.

    Shapes (…, 3) to (…). Between its ends the line is lowest where it passes nearest to the Earth's centre.
    """
    along = b_km - a_km
    squared = np.einsum("...i,...i", along, along)
    share = -np.einsum("...i,...i", a_km, along) / np.maximum(squared, 1e-18)
    lowest = a_km + np.clip(share, 0.0, 1.0)[..., np.newaxis] * along
    return np.sqrt(squared), np.sqrt(np.einsum("...i,...i", lowest, lowest)) - EARTH_KM


def margin_km(range_km: Floats, grazing_km: Floats, config: IslConfig) -> Floats:
    """Above zero while the geometry allows the link: what is left of height and of range, the smaller, km."""
    height = grazing_km - config.grazing_altitude_km
    return height if config.max_range_km is None else np.minimum(height, config.max_range_km - range_km)


def check_outages(constellation: Constellation, links: Ints, config: IslConfig) -> None:
    """Raises UsageError for an outage of a satellite or a link that does not exist."""
    known = {(int(a), int(b)) for a, b in links}
    for outage in config.outages:
        ends = [outage.satellite] if outage.other is None else [outage.satellite, outage.other]
        for end in ends:
            if not 0 <= end < len(constellation):
                raise UsageError(
                    f"outage of satellite {end}, but there are {len(constellation)}",
                    hint=f"satellites are numbered 0..{len(constellation) - 1}, plane by plane",
                )
        if outage.other is not None and tuple(sorted(ends)) not in known:
            raise UsageError(
                f"outage of the link {ends[0]}-{ends[1]}, but these two have none",
                hint="name two neighbours, or leave `other` out to lose the whole satellite",
            )


def _require_sight(orbit: Orbit, slots: int, config: IslConfig) -> None:
    axis_km = mean_axis_km(orbit)
    figures = ring_figures(axis_km, slots)
    lowest_km = EARTH_KM + config.grazing_altitude_km
    needed = [2]
    if lowest_km >= axis_km:
        raise UsageError(
            f"the orbit is {axis_km - EARTH_KM:.0f} km high, the links may not pass below "
            f"{config.grazing_altitude_km:g} km: no number of satellites makes a ring",
            hint="a lower grazing_altitude_km or a higher orbit",
        )
    needed.append(math.ceil(math.pi / math.acos(lowest_km / axis_km)))
    if config.max_range_km is not None and config.max_range_km < 2.0 * axis_km:
        needed.append(math.ceil(math.pi / math.asin(config.max_range_km / (2.0 * axis_km))))
    short_km = config.grazing_altitude_km - figures.grazing_km
    if short_km > 0 and slots > 2:
        what = (
            f"a ring of {slots} at {axis_km - EARTH_KM:.0f} km grazes the Earth: the line between neighbours passes "
            f"{short_km:.0f} km below the limit of {config.grazing_altitude_km:g} km"
        )
    elif slots == 2:
        what = f"two satellites in a plane at {axis_km - EARTH_KM:.0f} km have the Earth between them"
    elif config.max_range_km is not None and figures.neighbour_km > config.max_range_km:
        over_km = figures.neighbour_km - config.max_range_km
        what = (
            f"neighbours in a ring of {slots} are {figures.neighbour_km:.0f} km apart, {over_km:.0f} km more than "
            f"max_range_km {config.max_range_km:g}"
        )
    else:
        return
    raise UsageError(what, hint=f"{max(needed)} satellites in the plane would do")


def _nearest_slot(constellation: Constellation, plane: int, following: int) -> int:
    """Slot of the following plane that stays nearest, over a revolution, to slot 0 of this one."""
    slots = constellation.per_plane
    one = constellation.orbits[plane * slots]
    others = constellation.orbits[following * slots : (following + 1) * slots]
    turn = np.linspace(0.0, 2.0 * math.pi, _PHASES, endpoint=False)
    here = _directions([one], turn)
    nearness = np.einsum("sti,sti->s", np.broadcast_to(here, (slots, *here.shape[1:])), _directions(others, turn))
    return int(np.argmax(np.round(nearness, 6)))  # rounded: of two equally near ones always the same


def _directions(orbits: Any, turn: Floats) -> Floats:
    """Unit vectors of circular orbits at their mean argument of latitude plus `turn`: (orbits, n, 3)."""
    node = np.radians([orbit.raan_deg for orbit in orbits])[:, np.newaxis]
    tilt = np.radians([orbit.inclination_deg for orbit in orbits])[:, np.newaxis]
    start = np.radians([orbit.argument_of_perigee_deg + orbit.mean_anomaly_deg for orbit in orbits])[:, np.newaxis]
    cos_u, sin_u = np.cos(start + turn), np.sin(start + turn)
    return np.stack(
        [
            np.cos(node) * cos_u - np.sin(node) * np.cos(tilt) * sin_u,
            np.sin(node) * cos_u + np.cos(node) * np.cos(tilt) * sin_u,
            np.sin(tilt) * sin_u,
        ],
        axis=-1,
    )
