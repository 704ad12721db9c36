"""Mean elements as every source gives them, their sizes in one another's terms, and what no orbit can be."""

from __future__ import annotations

import math
from datetime import datetime
from typing import TypedDict

MU_KM3_S2 = 398_600.4418
EARTH_KM = 6_378.137
J2 = 1.08262668e-3
DAY_S = 86_400.0
LOWEST_PERIGEE_KM = 60.0  # real elements of objects in their last days go down to 80 km
BOUNDS = {
    "inclination_deg": (0.0, 180.0),
    "raan_deg": (0.0, 360.0),
    "argument_of_perigee_deg": (0.0, 360.0),
    "mean_anomaly_deg": (0.0, 360.0),
    "mean_motion_rev_day": (0.05, 18.0),
}


class Elements(TypedDict):
    """One satellite's mean elements at an epoch, in the units of a TLE: degrees, revolutions per day (Kozai)."""

    name: str
    epoch: datetime
    inclination_deg: float
    raan_deg: float
    eccentricity: float
    argument_of_perigee_deg: float
    mean_anomaly_deg: float
    mean_motion_rev_day: float
    bstar: float


def axis_km(mean_motion_rev_day: float) -> float:
    """Semi-major axis of a mean motion, km (Kepler's third law, no correction)."""
    return float((MU_KM3_S2 * (DAY_S / (2.0 * math.pi * mean_motion_rev_day)) ** 2) ** (1.0 / 3.0))


def kozai_rev_day(axis: float, inclination_deg: float, eccentricity: float) -> float:
    """The mean motion SGP4 expects for a mean semi-major axis in km.

    SGP4 takes Kozai's mean motion and undoes his correction for J2 (Hoots and Roehrich, Spacetrack Report 3, section
    6); without putting it in first the orbit is some 3 km off.
    """
    motion = math.sqrt(MU_KM3_S2 / axis**3)
    shape = (3.0 * math.cos(math.radians(inclination_deg)) ** 2 - 1.0) / (1.0 - eccentricity**2) ** 1.5
    kozai = motion * (1.0 + 0.75 * J2 * (EARTH_KM / axis) ** 2 * shape)
    return float(kozai * DAY_S / (2.0 * math.pi))


def impossible(mean_motion_rev_day: float, eccentricity: float) -> str | None:
    """Why no satellite can be on such an orbit, or None."""
    if not 0.0 <= eccentricity < 1.0:
        kind = "below zero" if eccentricity < 0 else "open: the orbit is hyperbolic or parabolic"
        return f"an eccentricity of {eccentricity:g} is {kind}"
    perigee_km = axis_km(mean_motion_rev_day) * (1.0 - eccentricity) - EARTH_KM
    if perigee_km < 0:
        return f"the perigee is {-perigee_km:.0f} km below ground: this orbit has decayed or never existed"
    if perigee_km < LOWEST_PERIGEE_KM:
        return f"the perigee is {perigee_km:.0f} km high: this orbit has decayed or never existed"
    return None
