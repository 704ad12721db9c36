"""Measures of the compiled environment: what the engine computed from the orbit, no flight needed.

The verdict reads the run's `timeline.npz`; `mission check` asks the same functions before the flight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hil.campaign.evidence import Measure, Measured, NoEvidence
from hil.campaign.record import Record
from hil.errors import UsageError
from hil.mission import timeline_file
from hil.mission.environment import MissionEnvironment
from hil.mission.frames import DAY_S, Floats
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.shadow import sunlit_fraction
from hil.mission.timeline import Timeline

OfTimeline = Callable[[Timeline], tuple[float, str]]

YEAR_DAYS = 365.25
_DAY_STEP = 1.5  # between the orbits that are looked at through a year: a season's days are good to two
_ORBIT_SAMPLES = 480  # 12 s in low orbit: a share of the year is good to 1e-4, an eclipse's length to a dozen seconds


def _sunlit_share(timeline: Timeline) -> tuple[float, str]:
    lit = float(np.trapezoid(timeline.sunlit_fraction, timeline.t_s) / timeline.duration_s)
    return lit, f"mean visible share of the Sun over {timeline.duration_s / 3600:.1f} h"


def _eclipses(timeline: Timeline) -> list[float]:
    return [eclipse.duration_s for eclipse in timeline.eclipses]


def _eclipse_longest(timeline: Timeline) -> tuple[float, str]:
    found = _eclipses(timeline)
    return max(found, default=0.0), f"penumbra included, {len(found)} eclipses"


def _eclipse_count(timeline: Timeline) -> tuple[float, str]:
    return float(len(timeline.eclipses)), f"in {timeline.duration_s / 3600:.1f} h"


def _passes_per_day(timeline: Timeline) -> tuple[float, str]:
    return len(timeline.contacts) / (timeline.duration_s / DAY_S), f"{len(timeline.contacts)} contacts"


def _contact_share(timeline: Timeline) -> tuple[float, str]:
    seconds = sum(contact.duration_s for contact in timeline.contacts)
    return seconds / timeline.duration_s, f"{seconds / 60:.0f} min of contact"


def _contact_mean(timeline: Timeline) -> tuple[float, str]:
    if not timeline.contacts:
        raise NoEvidence("the mission has no contact")
    return float(np.mean([item.duration_s for item in timeline.contacts])), f"of {len(timeline.contacts)} contacts"


def _gap_longest(timeline: Timeline) -> tuple[float, str]:
    ends = [0.0, *(item.los_s for item in timeline.contacts)]
    starts = [*(item.aos_s for item in timeline.contacts), timeline.duration_s]
    return max(start - end for start, end in zip(starts, ends, strict=True)), f"{len(timeline.contacts)} contacts"


def _beta(pick: Callable[[Floats], float]) -> OfTimeline:
    return lambda timeline: (float(pick(timeline.beta_deg)), "angle of the Sun above the orbit's plane")


def _array_wh(timeline: Timeline) -> tuple[float, str]:
    joules = float(np.trapezoid(timeline.array_w, timeline.t_s))
    orbits = timeline.duration_s / timeline.environment.orbit.period_s
    return joules / 3600.0 / orbits, f"over {orbits:.1f} orbits, at the array's terminals (modelled)"


def _year_share(timeline: Timeline) -> tuple[float, str]:
    shares, _ = year_of_light(timeline.environment)
    return float(np.mean(shares)), f"{len(shares)} orbits through a year from the mission's start"


def _year_longest(timeline: Timeline) -> tuple[float, str]:
    _, longest = year_of_light(timeline.environment)
    return float(np.max(longest)), f"longest of {len(longest)} orbits through a year, penumbra included"


def _year_season(timeline: Timeline) -> tuple[float, str]:
    _, longest = year_of_light(timeline.environment)
    days = float(np.mean(longest > 0)) * YEAR_DAYS
    return days, f"{int(np.sum(longest > 0))} of {len(longest)} orbits through a year have an eclipse"


def year_of_light(environment: MissionEnvironment) -> tuple[Floats, Floats]:
    """Sunlit share and longest eclipse (s) of an orbit every day and a half through the year from the mission's start.

    Raises NoEvidence for elements that do not last a year.
    """
    return _year_of_light(environment.orbit, environment.start.timestamp())


@functools.lru_cache(maxsize=64)
def _year_of_light(orbit: Orbit, start: float) -> tuple[Floats, Floats]:
    from datetime import UTC, datetime

    ephemeris = Ephemeris(orbit, datetime.fromtimestamp(start, UTC))
    first_s = np.arange(0.0, YEAR_DAYS * DAY_S, _DAY_STEP * DAY_S)
    within_s = (np.arange(_ORBIT_SAMPLES) + 0.5) * orbit.period_s / _ORBIT_SAMPLES
    try:
        lit = sunlit_fraction(ephemeris, (first_s[:, None] + within_s[None, :]).ravel()).reshape(len(first_s), -1)
    except UsageError as error:
        raise NoEvidence(f"the elements do not last a year: {error.message}") from None
    dark = (lit < 1.0).sum(axis=1) * orbit.period_s / _ORBIT_SAMPLES
    return lit.mean(axis=1), np.asarray(dark, dtype=np.float64)


OF_TIMELINE: dict[str, tuple[str, str, OfTimeline]] = {
    "timeline.sunlit_share": ("1", "Mean visible share of the Sun's disc over the mission.", _sunlit_share),
    "timeline.eclipse_count": ("eclipses", "Eclipses in the mission, partial ones included.", _eclipse_count),
    "timeline.eclipse_s.max": ("s", "Longest eclipse in the mission, penumbra included.", _eclipse_longest),
    "timeline.beta_deg.min": ("deg", "Smallest angle of the Sun above the orbit's plane.", _beta(np.min)),
    "timeline.beta_deg.max": ("deg", "Largest angle of the Sun above the orbit's plane.", _beta(np.max)),
    "timeline.passes_per_day": ("1/d", "Contacts a day, overlapping stations merged.", _passes_per_day),
    "timeline.contact_s.mean": ("s", "Mean length of a contact.", _contact_mean),
    "timeline.contact_share": ("1", "Share of the mission that is contact.", _contact_share),
    "timeline.gap_s.max": ("s", "Longest time without a contact.", _gap_longest),
    "timeline.array_wh_per_orbit": ("Wh", "Energy that the array offers in an orbit (modelled).", _array_wh),
    "year.sunlit_share": (
        "1",
        "The year's mean visible share of the Sun's disc, from the mission's start.",
        _year_share,
    ),
    "year.eclipse_s.max": ("s", "Longest eclipse of that year, to a dozen seconds.", _year_longest),
    "year.eclipse_days": ("d", "Days of that year whose orbits have an eclipse.", _year_season),
}
"""Name: unit, definition, function of the timeline to value and evidence (which may raise NoEvidence)."""


def _from_record(of: OfTimeline) -> Callable[[Record], Measured]:
    def measure(record: Record) -> Measured:
        path = record.directory / "timeline.npz"
        if not path.is_file():
            raise NoEvidence("the run has no timeline.npz")
        value, evidence = of(_load(path, path.stat().st_mtime_ns))
        return Measured(value, f"{evidence}; computed, not measured")

    return measure


@functools.lru_cache(maxsize=2)
def _load(path: Path, changed_ns: int) -> Timeline:
    try:
        return timeline_file.load(path)
    except UsageError as error:
        raise NoEvidence(error.message) from None


MEASURES = tuple(Measure(name, unit, said, _from_record(of)) for name, (unit, said, of) in OF_TIMELINE.items())
