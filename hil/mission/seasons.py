"""A year of sunlight: eclipse seasons, the longest eclipse, the sunlit share of the time, and how far beta swings.

No low orbit is in sunlight for 24 hours all year: a dawn-dusk one below some 1,400 km has a season of eclipses too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hil.errors import UsageError
from hil.mission.frames import DAY_S
from hil.mission.orbit import Ephemeris
from hil.mission.shadow import Eclipse, beta_deg, find_eclipses, sunlit_fraction

_SEASON_GAP_S = 1.5 * DAY_S  # longer than the day between two eclipses of a geostationary satellite
_RAMP_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class Season:
    """Eclipses that follow one another without a free day and a half; seconds since the ephemeris' start.

    `longest_s` is from first to last contact with the penumbra. A season under way at either end of the time that was
    asked for is cut there.
    """

    start_s: float
    end_s: float
    eclipses: int
    longest_s: float
    longest_at_s: float


@dataclass(frozen=True, slots=True)
class Sunlight:
    """What the Sun does to an orbit over `days`. `sunlit_fraction`: mean visible share of the solar disc, 0..1."""

    days: float
    seasons: tuple[Season, ...]
    sunlit_fraction: float
    beta_min_deg: float
    beta_max_deg: float


def sunlight(ephemeris: Ephemeris, days: float) -> Sunlight:
    """Seasons and sunlit share from the ephemeris' start on, of up to 400 days; seconds of work for a year."""
    if not 0 < days <= 400:
        raise UsageError(f"{days:g} days of sunlight", hint="above 0, up to 400 days")
    end_s = days * DAY_S
    eclipses = find_eclipses(ephemeris, 0.0, end_s)
    beta = beta_deg(ephemeris, np.arange(0.0, end_s, 3_600.0))
    return Sunlight(
        days=days,
        seasons=tuple(_season(group, end_s) for group in _groups(ephemeris, eclipses)),
        sunlit_fraction=1.0 - _dark_s(ephemeris, eclipses, end_s) / end_s,
        beta_min_deg=float(beta.min()),
        beta_max_deg=float(beta.max()),
    )


def _groups(ephemeris: Ephemeris, eclipses: Sequence[Eclipse]) -> list[list[Eclipse]]:
    gap_s = max(_SEASON_GAP_S, 2.0 * ephemeris.orbit.period_s)
    groups: list[list[Eclipse]] = []
    for item in eclipses:
        if groups and item.penumbra_entry_s - groups[-1][-1].penumbra_exit_s < gap_s:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _season(group: Sequence[Eclipse], end_s: float) -> Season:
    longest = max(group, key=lambda item: item.duration_s)
    return Season(
        start_s=max(group[0].penumbra_entry_s, 0.0),
        end_s=min(group[-1].penumbra_exit_s, end_s),
        eclipses=len(group),
        longest_s=longest.duration_s,
        longest_at_s=longest.penumbra_entry_s,
    )


def _dark_s(ephemeris: Ephemeris, eclipses: Sequence[Eclipse], end_s: float) -> float:
    """Seconds of full sunlight that the eclipses take from [0, end_s]: the umbra whole, the penumbra sampled."""
    dark_s, ramps = 0.0, []
    for item in eclipses:
        if item.umbra_entry_s is None or item.umbra_exit_s is None:
            ramps.append((item.penumbra_entry_s, item.penumbra_exit_s))
            continue
        ramps += [(item.penumbra_entry_s, item.umbra_entry_s), (item.umbra_exit_s, item.penumbra_exit_s)]
        dark_s += max(0.0, min(item.umbra_exit_s, end_s) - max(item.umbra_entry_s, 0.0))
    if not ramps:
        return 0.0
    low, high = np.clip(np.array(ramps), 0.0, end_s).T
    shares = (np.arange(_RAMP_SAMPLES) + 0.5) / _RAMP_SAMPLES
    samples = low[:, None] + (high - low)[:, None] * shares
    covered = 1.0 - sunlit_fraction(ephemeris, samples.ravel()).reshape(samples.shape).mean(axis=1)
    return dark_s + float(((high - low) * covered).sum())
