"""When radiation faults arrive: published rates made into a seeded schedule, in bursts over the South Atlantic Anomaly.

The anomaly is an ellipse of geodetic latitude and longitude inscribed in the box that is usually given for about
500 km: 50 S to the equator, 90 W to 40 E; above 2,000 km the inner belt is everywhere and the ellipse means nothing.
Particle maps draw ovals, and the box's corners are quiet, hence the ellipse. Both are assumptions of this bench: the
real contour moves with altitude, energy and 0.3 degrees west a year. The schedule says when and what, not what it does.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from hil.errors import UsageError
from hil.mission import frames
from hil.mission.frames import Floats
from hil.mission.orbit import Ephemeris
from hil.mission.roots import positive_intervals, scan_grid

YEAR_S = 365.25 * frames.DAY_S
SAA_LATITUDE_DEG, SAA_HALF_HEIGHT_DEG = -25.0, 25.0
SAA_LONGITUDE_DEG, SAA_HALF_WIDTH_DEG = -25.0, 65.0
SAA_CEILING_M = 2e6
MAX_FAULTS = 100_000
_SCAN_STEP_S = 60.0


@dataclass(frozen=True, slots=True)
class FaultRate:
    """Mean arrivals of one kind of fault per year in the mission's orbit. Raises UsageError when below zero."""

    kind: str
    per_year: float

    def __post_init__(self) -> None:
        if not 0 <= self.per_year < math.inf:
            raise UsageError(f"fault {self.kind}: per_year is {self.per_year}", hint="zero or more arrivals a year")

    @classmethod
    def from_cross_section(cls, kind: str, cross_section_cm2: float, fluence_per_cm2_year: float) -> FaultRate:
        """Rate = cross-section of the whole device (cm2) x particles per cm2 and year behind its shielding."""
        return cls(kind, cross_section_cm2 * fluence_per_cm2_year)


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Rates, how many times more often they are made to arrive, and the long-run share of them within the anomaly."""

    rates: tuple[FaultRate, ...]
    acceleration: float = 1.0
    saa_share: float = 0.9

    def __post_init__(self) -> None:
        kinds = [rate.kind for rate in self.rates]
        if len(set(kinds)) != len(kinds):
            raise UsageError(f"a fault is listed twice: {', '.join(sorted(kinds))}", hint="one rate for each kind")
        if not 0 < self.acceleration < math.inf or not 0 <= self.saa_share <= 1:
            raise UsageError(
                f"faults: acceleration {self.acceleration}, saa_share {self.saa_share}",
                hint="acceleration above 0, saa_share 0..1",
            )


@dataclass(frozen=True, slots=True)
class Fault:
    """One arrival: mission time in seconds, its kind, and whether the satellite was inside the anomaly."""

    t_s: float
    kind: str
    in_saa: bool


def schedule(plan: FaultPlan, ephemeris: Ephemeris, duration_s: float, seed: int) -> tuple[Fault, ...]:
    """Arrivals in [0, duration_s), sorted: a Poisson process for each kind whose rate steps at the anomaly's edges.

    Inside the rate is share / f, outside (1 - share) / (1 - f) of the mean one, f being the long-run share of time
    inside: a long mission has `saa_share` of its faults there, a short one that stays clear has fewer faults at all.
    An orbit that never enters has the mean rate throughout. Each kind draws from a stream of its own, so that adding
    a kind leaves the others alone, and a longer mission only appends.
    """
    windows = saa_windows(ephemeris, 0.0, duration_s)
    starts, inside = _segments(windows, duration_s)
    share, time_share = plan.saa_share, saa_time_share(ephemeris)
    relative = np.ones_like(starts)
    if time_share > 0:
        relative = np.where(inside, share / time_share, (1.0 - share) / (1.0 - time_share))
    faults: list[Fault] = []
    for rate in plan.rates:
        intensity = relative * (rate.per_year * plan.acceleration / YEAR_S)
        reached = np.concatenate([[0.0], np.cumsum(intensity * np.diff(starts, append=duration_s))])
        if reached[-1] > MAX_FAULTS:
            raise UsageError(
                f"fault {rate.kind}: about {reached[-1]:.3g} arrivals in {duration_s / 3600:g} h",
                hint=f"lower the rate or `acceleration`: up to {MAX_FAULTS} of a kind can be scheduled",
            )
        arrivals = _unit_arrivals(_stream(seed, rate.kind), float(reached[-1]))
        segment = np.searchsorted(reached, arrivals, side="right") - 1
        at_s = starts[segment] + (arrivals - reached[segment]) / intensity[segment]
        faults += [Fault(float(t), rate.kind, bool(within)) for t, within in zip(at_s, inside[segment], strict=True)]
    return tuple(sorted(faults, key=lambda fault: (fault.t_s, fault.kind)))


def saa_windows(ephemeris: Ephemeris, start_s: float, end_s: float) -> Floats:
    """Rows (entry_s, exit_s) of the time inside the anomaly, root-found and cut at both ends; shape (n, 2)."""

    def depth(t_s: Floats) -> Floats:
        latitude, longitude, altitude = frames.geodetic(ephemeris.itrf_m(t_s))
        return np.minimum(_ellipse(latitude, longitude), 1.0 - altitude / SAA_CEILING_M)

    step_s = min(_SCAN_STEP_S, ephemeris.orbit.period_s / 60.0)
    return positive_intervals(depth, scan_grid(start_s, end_s, step_s))


def saa_time_share(ephemeris: Ephemeris) -> float:
    """Long-run share of time inside the anomaly, 0..1: one revolution, its longitudes taken as equally likely."""
    t_s = np.linspace(0.0, ephemeris.orbit.period_s, 720, endpoint=False)
    latitude, _, altitude = frames.geodetic(ephemeris.itrf_m(t_s))
    across = np.maximum(1.0 - ((latitude - SAA_LATITUDE_DEG) / SAA_HALF_HEIGHT_DEG) ** 2, 0.0)
    width_deg = np.where(altitude < SAA_CEILING_M, 2.0 * SAA_HALF_WIDTH_DEG * np.sqrt(across), 0.0)
    return float(width_deg.mean() / 360.0)


def _ellipse(latitude_deg: Floats, longitude_deg: Floats) -> Floats:
    """One at the centre of the anomaly, zero on its edge, negative outside."""
    east = (longitude_deg - SAA_LONGITUDE_DEG + 180.0) % 360.0 - 180.0
    north = latitude_deg - SAA_LATITUDE_DEG
    depth: Floats = 1.0 - (north / SAA_HALF_HEIGHT_DEG) ** 2 - (east / SAA_HALF_WIDTH_DEG) ** 2
    return depth


def _segments(windows: Floats, duration_s: float) -> tuple[Floats, np.ndarray[tuple[int, ...], np.dtype[np.bool_]]]:
    """Starts of the pieces of constant rate, and which of them lie inside the anomaly."""
    starts = np.concatenate([[0.0], windows.ravel()])
    inside = np.arange(len(starts)) % 2 == 1  # outside, inside, outside …; a piece may be empty at both ends
    keep = np.diff(starts, append=duration_s) > 0
    return starts[keep], inside[keep]


def _stream(seed: int, kind: str) -> np.random.Generator:
    key = np.frombuffer(hashlib.sha256(kind.encode()).digest()[:16], dtype="<u4")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=tuple(key.tolist()))))


def _unit_arrivals(random: np.random.Generator, end: float) -> Floats:
    """A Poisson process of rate one over [0, end): uniform numbers only, whose stream numpy has never changed."""
    total = 0.0
    found: list[float] = []
    while True:
        total -= math.log1p(-random.random())
        if total >= end:
            return np.array(found)
        found.append(total)
