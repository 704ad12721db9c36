"""Many satellites at once: Walker shells, rings and formations made from one orbit, and their vectorised propagation.

Satellites are numbered plane by plane from 0: satellite `plane * per_plane + slot`. All positions here are TEME.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from sgp4.api import SGP4_ERRORS, SatrecArray

from hil.errors import UsageError
from hil.mission import frames
from hil.mission.frames import Floats
from hil.mission.omm import split_omm
from hil.mission.orbit import Orbit
from hil.mission.radio import SPEED_OF_LIGHT_M_S

Ints = npt.NDArray[np.int64]

EARTH_KM = 6_378.137
_SAME_PLACE_KM = 1e-3
MAX_SATELLITES = 10_000
_LEAST_ECCENTRICITY = 1e-6  # SGP4 takes a smaller one for this: the centre would be 7 m off among the others


@dataclass(frozen=True, slots=True)
class Constellation:
    """The satellites of one fleet, plane by plane, equally many in each. Make it with `walker`, `ring` or `listed`.

    `closed`: the last plane has the first one as its neighbour (not so in a star, where these two fly against each
    other). `even`: the satellites of a plane are evenly spread. Raises UsageError for fewer than two satellites or
    planes of different size.
    """

    orbits: tuple[Orbit, ...]
    planes: int = 1
    closed: bool = True
    even: bool = False

    def __post_init__(self) -> None:
        count = len(self.orbits)
        if not 2 <= count <= MAX_SATELLITES:
            raise UsageError(f"a constellation of {count} satellites", hint=f"2 to {MAX_SATELLITES} satellites")
        if self.planes < 1 or count % self.planes:
            raise UsageError(f"{count} satellites do not fill {self.planes} planes evenly", hint="T = planes x slots")

    def __len__(self) -> int:
        return len(self.orbits)

    @property
    def per_plane(self) -> int:
        return len(self.orbits) // self.planes

    @classmethod
    def walker(
        cls, orbit: Orbit, planes: int, per_plane: int, *, phasing: int = 0, raan_spread_deg: float = 360.0
    ) -> Constellation:
        """Walker's pattern i:T/P/F from `orbit`, which becomes slot 0 of plane 0; T = planes x per_plane.

        Planes lie `raan_spread_deg` / P apart (360 a delta, 180 a star); a plane is F x 360/T degrees ahead of the one
        before (J. G. Walker, "Satellite constellations", JBIS 37, 1984). All keep the orbit's drag term and epoch.
        """
        if planes < 1 or per_plane < 1:
            raise UsageError(f"{planes} planes of {per_plane} satellites", hint="at least one of each")
        if not 0 <= phasing < planes:
            raise UsageError(
                f"phasing F = {phasing} with P = {planes} planes", hint=f"F is a whole number, 0..{planes - 1}"
            )
        if not 0 < raan_spread_deg <= 360:
            raise UsageError(f"raan_spread_deg is {raan_spread_deg}", hint="360 for a delta, 180 for a star pattern")
        if planes * per_plane > MAX_SATELLITES:
            raise UsageError(f"{planes * per_plane} satellites", hint=f"at most {MAX_SATELLITES}")
        orbits = tuple(
            _moved(
                orbit,
                name=f"p{plane}s{slot}",
                raan_deg=raan_spread_deg * plane / planes,
                anomaly_deg=360.0 * slot / per_plane + 360.0 * phasing * plane / (planes * per_plane),
            )
            for plane in range(planes)
            for slot in range(per_plane)
        )
        return cls(orbits, planes, closed=raan_spread_deg == 360.0, even=True)

    @classmethod
    def ring(cls, orbit: Orbit, satellites: int) -> Constellation:
        """`satellites` spread evenly over one plane."""
        return cls.walker(orbit, 1, satellites)

    @classmethod
    def listed(cls, orbits: Sequence[Orbit]) -> Constellation:
        """These satellites as they are; neighbours in a ring are neighbours in the list."""
        return cls(tuple(orbits))

    @classmethod
    def from_omm(cls, text: str, *, source: str = "OMM") -> Constellation:
        """All satellites of a CCSDS 502 file (JSON or XML), in its order. Errors name the message and its field."""
        messages = split_omm(text, source=source)
        return cls.listed(
            [
                Orbit.from_omm(item, source=f"{source}: message {number}")
                for number, item in enumerate(messages, start=1)
            ]
        )

    def to_omm(self) -> str:
        """The satellites as a JSON list of CCSDS 502 messages, every digit kept."""
        rows = [
            {
                "OBJECT_NAME": orbit.name,
                "REF_FRAME": "TEME",
                "TIME_SYSTEM": "UTC",
                "MEAN_ELEMENT_THEORY": "SGP4",
                "EPOCH": orbit.epoch.replace(tzinfo=None).isoformat(),
                "MEAN_MOTION": orbit.mean_motion_rev_day,
                "ECCENTRICITY": orbit.eccentricity,
                "INCLINATION": orbit.inclination_deg,
                "RA_OF_ASC_NODE": orbit.raan_deg,
                "ARG_OF_PERICENTER": orbit.argument_of_perigee_deg,
                "MEAN_ANOMALY": orbit.mean_anomaly_deg,
                "BSTAR": orbit.bstar,
            }
            for orbit in self.orbits
        ]
        return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal constellation."""
        return {
            "orbits": [orbit.as_dict() for orbit in self.orbits],
            "planes": self.planes,
            "closed": self.closed,
            "even": self.even,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Constellation:
        """Inverse of `as_dict`."""
        return cls(**{**values, "orbits": tuple(Orbit.from_dict(item) for item in values["orbits"])})


def lattice_formation(centre: Orbit, *, spacing_m: float = 100.0, radius_steps: int = 5) -> Constellation:
    """A flat formation around a circular orbit in which neighbours circle each other at 1 to 2 times `spacing_m`.

    Members share semi-major axis, inclination, node and mean argument of latitude; only the eccentricity vector
    differs. A difference de moves a satellite on an ellipse a*de high and 2*a*de long around the centre once per orbit
    (Hill, Clohessy and Wiltshire), so a square lattice of eccentricity vectors turns as one body. Steps of 100 m and
    a disc of 5 steps at 650 km give 81 satellites within 1 km and e up to 7.2e-5: the published Suncatcher cluster
    (arXiv 2511.19468). The first satellite is the centre.
    """
    if not 1.0 <= spacing_m <= 1e5 or not 1 <= radius_steps <= 40:
        raise UsageError(f"a formation of {radius_steps} steps of {spacing_m} m", hint="1..40 steps of 1 m to 100 km")
    step = spacing_m / 1_000.0 / mean_axis_km(centre)
    span = range(-radius_steps, radius_steps + 1)
    cells = sorted(
        ((x, y) for x in span for y in span if x * x + y * y <= radius_steps**2), key=lambda c: c[0] ** 2 + c[1] ** 2
    )
    latitude = centre.argument_of_perigee_deg + centre.mean_anomaly_deg
    orbits = []
    for x, y in cells:
        e_x, e_y = step * x + _LEAST_ECCENTRICITY, step * y
        perigee = math.degrees(math.atan2(e_y, e_x)) % 360.0
        orbits.append(
            replace(
                centre,
                name=f"x{x:+d}y{y:+d}",
                eccentricity=math.hypot(e_x, e_y),
                argument_of_perigee_deg=perigee,
                mean_anomaly_deg=(latitude - perigee) % 360.0,
                line1="",
                line2="",
            )
        )
    return Constellation.listed(orbits)


@dataclass(frozen=True, slots=True)
class Fleet:
    """A constellation on a time axis: seconds since `start`. Raises UsageError when two satellites are in one place."""

    constellation: Constellation
    start: datetime
    _records: Any = field(init=False, repr=False, compare=False)
    _day: float = field(init=False, repr=False, compare=False)
    _fraction: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        day, fraction = frames.julian_date(self.start)
        object.__setattr__(self, "_day", day)
        object.__setattr__(self, "_fraction", fraction)
        object.__setattr__(self, "_records", SatrecArray([orbit.satrec for orbit in self.constellation.orbits]))
        self._refuse_collisions()

    def teme_km(self, t_s: Floats) -> tuple[Floats, Floats]:
        """Positions (km) and velocities (km/s), each (satellites, n, 3). Raises UsageError when SGP4 gives up.

        Needs 48 bytes a satellite and instant: ask for hours, not for weeks.
        """
        days = self._days(t_s)
        error, position, velocity = self._records.sgp4(np.full(days.shape, self._day), days)
        if error.any():
            satellite, step = (int(index[0]) for index in np.nonzero(error))
            instant = frames.utc_text(self.start, float(t_s[step]))
            reason = SGP4_ERRORS.get(int(error[satellite, step]), "unknown error")
            raise UsageError(
                f"satellite {satellite} ({self.constellation.orbits[satellite].name}) cannot be propagated to "
                f"{instant}: {reason}",
                hint="use newer elements, or a start time nearer to their epoch",
            )
        return position, velocity

    def gmst_rad(self, t_s: Floats) -> Floats:
        """Greenwich sidereal time at each instant, radians."""
        return frames.gmst_rad(self._day, self._days(t_s))

    def _days(self, t_s: Floats) -> Floats:
        return np.asarray(self._fraction + np.asarray(t_s, dtype=np.float64) / frames.DAY_S)

    def _refuse_collisions(self) -> None:
        from scipy.spatial import cKDTree

        position, _ = self.teme_km(np.zeros(1))
        twins = cKDTree(position[:, 0, :]).query_pairs(_SAME_PLACE_KM)
        if twins:
            first, second = min(twins)
            names = [f"{index} ({self.constellation.orbits[index].name})" for index in (first, second)]
            raise UsageError(
                f"satellites {names[0]} and {names[1]} are at the same place at {frames.utc_text(self.start)}"
                + (f", and {len(twins) - 1} pairs more" if len(twins) > 1 else ""),
                hint="remove the copy, or give it another mean anomaly, node or eccentricity",
            )


def mean_axis_km(orbit: Orbit) -> float:
    """Semi-major axis in km as SGP4 has it, with Kozai's correction undone."""
    return float(orbit.satrec.a * orbit.satrec.radiusearthkm)


@dataclass(frozen=True, slots=True)
class RingFigures:
    """One plane's neighbours on a circular orbit: distance, and how high their line of sight passes over the Earth."""

    neighbour_km: float
    one_way_s: float
    grazing_km: float


def ring_figures(axis_km: float, satellites: int) -> RingFigures:
    """Chord 2 a sin(pi/N) and grazing height a cos(pi/N) - R over the equatorial radius."""
    neighbour_km = 2.0 * axis_km * math.sin(math.pi / satellites)
    return RingFigures(
        neighbour_km, 1_000.0 * neighbour_km / SPEED_OF_LIGHT_M_S, axis_km * math.cos(math.pi / satellites) - EARTH_KM
    )


def _moved(orbit: Orbit, *, name: str, raan_deg: float, anomaly_deg: float) -> Orbit:
    return replace(
        orbit,
        name=name,
        raan_deg=(orbit.raan_deg + raan_deg) % 360.0,
        mean_anomaly_deg=(orbit.mean_anomaly_deg + anomaly_deg) % 360.0,
        line1="",
        line2="",
    )
