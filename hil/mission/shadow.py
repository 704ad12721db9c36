"""The Earth's shadow: visible fraction of the solar disc, root-found eclipse edges, beta angle.

Geometry: a spherical Earth of equatorial radius without atmosphere (oblateness and refraction move an edge by a few
seconds at most; every published tool that this is compared with neglects them too), a spherical Sun, both seen as discs
from the satellite. Equations: Montenbruck and Gill, Satellite Orbits, section 3.4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hil.mission.frames import Floats
from hil.mission.orbit import Ephemeris
from hil.mission.roots import TO_THE_LAST_BIT, crossings, maxima, positive_intervals, scan_grid

EARTH_RADIUS_KM = 6_378.1366
SUN_RADIUS_KM = 695_700.0
SCAN_STEP_S = 30.0  # shorter than half of the shortest eclipse that the peak search would not find anyway


@dataclass(frozen=True, slots=True)
class Eclipse:
    """One passage through the shadow; seconds since the mission's start. Umbra is None when it is only partial.

    Edges are the true ones also when they lie before the start or after the end of the window that was asked for.
    """

    penumbra_entry_s: float
    umbra_entry_s: float | None
    umbra_exit_s: float | None
    penumbra_exit_s: float

    @property
    def duration_s(self) -> float:
        """From first to last contact with the penumbra."""
        return self.penumbra_exit_s - self.penumbra_entry_s


def visible_fraction(satellite_km: Floats, sun_km: Floats) -> Floats:
    """Visible part of the solar disc, 0..1, for geocentric positions of shape (n, 3) in one frame."""
    sun_disc, earth_disc, apart = _discs(satellite_km, sun_km)
    fraction = np.ones_like(apart)
    fraction[apart <= earth_disc - sun_disc] = 0.0
    annular = apart <= sun_disc - earth_disc  # only far beyond the Moon
    fraction[annular] = 1.0 - (earth_disc[annular] / sun_disc[annular]) ** 2
    partial = (apart < sun_disc + earth_disc) & (apart > np.abs(earth_disc - sun_disc))
    a, b, c = sun_disc[partial], earth_disc[partial], apart[partial]
    fraction[partial] = np.clip(1.0 - _lens_area(a, b, c) / (np.pi * a * a), 0.0, 1.0)
    return fraction


def _lens_area(a: Floats, b: Floats, c: Floats) -> Floats:
    """Common area of two discs of radius a and b whose centres are c apart, partly overlapping.

    Two circular segments of half-angles alpha and beta. The angles come from sine and cosine together, with the
    differences of nearly equal radii factored out: an arc cosine alone loses half of the digits near first contact.
    """
    double_area = np.sqrt(np.maximum((a + b + c) * (b + c - a) * (a + c - b) * (a + b - c), 0.0))
    alpha = np.arctan2(double_area, a * a + (c - b) * (c + b))
    beta = np.arctan2(double_area, b * b + (c - a) * (c + a))
    segments = a * a * (alpha - np.sin(alpha) * np.cos(alpha)) + b * b * (beta - np.sin(beta) * np.cos(beta))
    return np.asarray(segments, dtype=np.float64)


def sunlit_fraction(ephemeris: Ephemeris, t_s: Floats) -> Floats:
    """Visible part of the solar disc at each instant, 0..1."""
    position, _ = ephemeris.teme_km(t_s)
    return visible_fraction(position, ephemeris.sun_km(t_s))


def beta_deg(ephemeris: Ephemeris, t_s: Floats) -> Floats:
    """Angle of the Sun above the orbital plane, degrees, positive on the side of the angular momentum."""
    position, velocity = ephemeris.teme_km(t_s)
    return plane_angle_deg(position, velocity, ephemeris.sun_km(t_s))


def plane_angle_deg(position: Floats, velocity: Floats, sun: Floats) -> Floats:
    """Beta angle from vectors of shape (n, 3)."""
    normal = np.cross(position, velocity)
    sine = (normal * sun).sum(axis=1) / (_length(normal) * _length(sun))
    return np.asarray(np.degrees(np.arcsin(np.clip(sine, -1.0, 1.0))), dtype=np.float64)


def find_eclipses(ephemeris: Ephemeris, start_s: float, end_s: float) -> tuple[Eclipse, ...]:
    """Eclipses that touch [start_s, end_s], sorted. Looks up to a period beyond both ends for the true edges."""
    pad_s = min(ephemeris.orbit.period_s, 43_200.0)
    step_s = min(SCAN_STEP_S, ephemeris.orbit.period_s / 100.0)
    grid = scan_grid(start_s - pad_s, end_s + pad_s, step_s)
    inside = positive_intervals(_depth(ephemeris, +1.0), grid)
    inside = inside[(inside[:, 1] >= start_s) & (inside[:, 0] <= end_s)]
    umbra = _umbra(ephemeris, inside)
    return tuple(
        Eclipse(float(entry), u and u[0], u and u[1], float(leave))
        for (entry, leave), u in zip(inside, umbra, strict=True)
    )


def _umbra(ephemeris: Ephemeris, penumbra: Floats) -> list[tuple[float, float] | None]:
    """The total part of each penumbra passage, or None: the shadow is deepest once in each."""
    depth = _depth(ephemeris, -1.0)
    found: list[tuple[float, float] | None] = [None] * len(penumbra)
    if not len(penumbra):
        return found
    deepest_s, deepest = maxima(depth, penumbra[:, 0], penumbra[:, 1])
    total = np.nonzero(deepest > 0)[0]
    entry = crossings(depth, penumbra[total, 0], deepest_s[total], TO_THE_LAST_BIT)
    leave = crossings(depth, deepest_s[total], penumbra[total, 1], TO_THE_LAST_BIT)
    for index, low, high in zip(total, entry, leave, strict=True):
        found[int(index)] = (float(low), float(high))
    return found


def _depth(ephemeris: Ephemeris, sign: float) -> Callable[[Floats], Floats]:
    """Angle (rad) by which the discs overlap: sign +1 for the penumbra, -1 for the umbra; positive inside."""

    def depth(t_s: Floats) -> Floats:
        position, _ = ephemeris.teme_km(t_s)
        sun_disc, earth_disc, apart = _discs(position, ephemeris.sun_km(t_s))
        overlap: Floats = earth_disc + sign * sun_disc - apart
        return overlap

    return depth


def _discs(satellite: Floats, sun: Floats) -> tuple[Floats, Floats, Floats]:
    """Apparent radii of Sun and Earth and the distance of their centres, radians, seen from the satellite."""
    to_sun = sun - satellite
    sun_distance, earth_distance = _length(to_sun), _length(satellite)
    cosine = -(to_sun * satellite).sum(axis=1)
    sine = _length(np.cross(to_sun, satellite))
    return (
        np.arcsin(SUN_RADIUS_KM / sun_distance),
        np.arcsin(np.minimum(EARTH_RADIUS_KM / earth_distance, 1.0)),
        np.arctan2(sine, cosine),
    )


def _length(vectors: Floats) -> Floats:
    return np.asarray(np.sqrt((vectors * vectors).sum(axis=1)), dtype=np.float64)
