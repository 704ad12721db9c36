"""Passes over stations with root-found AOS and LOS, and their merger into one contact plan with handovers.

Handover rule when several stations see the satellite at once:
`keep-current` (default) stays with a station until it sets, then takes the highest visible one: fewest handovers.
`highest` always serves through the station with the highest elevation; switches where two elevations cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from hil.errors import UsageError
from hil.mission.frames import Floats, Station, look
from hil.mission.orbit import Ephemeris
from hil.mission.roots import Function, crossings, maxima, positive_intervals, scan_grid
from hil.model import Span

Handover = Literal["keep-current", "highest"]

_SCAN_STEP_S = 30.0
_CROSSING_STEP_S = 5.0


@dataclass(frozen=True, slots=True)
class Pass:
    """One satellite over one station. Seconds since the mission's start; elevation in degrees."""

    station: str
    aos_s: float
    los_s: float
    max_elevation_deg: float
    max_elevation_s: float

    @property
    def duration_s(self) -> float:
        return self.los_s - self.aos_s


@dataclass(frozen=True, slots=True)
class Contact:
    """Unbroken time in which at least one station sees the satellite.

    `spans` say who serves when (label = station name), without gaps from `aos_s` to `los_s`; `station` is the first.
    The maximum elevation is that of the serving station.
    """

    station: str
    aos_s: float
    los_s: float
    max_elevation_deg: float
    max_elevation_s: float
    spans: tuple[Span, ...]

    @property
    def duration_s(self) -> float:
        return self.los_s - self.aos_s


def find_passes(ephemeris: Ephemeris, station: Station, start_s: float, end_s: float) -> tuple[Pass, ...]:
    """Passes that touch [start_s, end_s], sorted by AOS.

    AOS and LOS are the true ones also when they lie outside of the window (searched for up to one period, at most half
    a day); what never rises or sets within that is cut there. Passes shorter than the scan step are found.
    """
    pad_s = min(ephemeris.orbit.period_s, 43_200.0)
    grid = scan_grid(start_s - pad_s, end_s + pad_s, min(_SCAN_STEP_S, ephemeris.orbit.period_s / 180.0))

    def above_mask(t_s: Floats) -> Floats:
        seen = ephemeris.look(station, t_s)
        return seen.elevation_deg - station.mask_at(seen.azimuth_deg)

    windows = positive_intervals(above_mask, grid)
    windows = windows[(windows[:, 1] >= start_s) & (windows[:, 0] <= end_s)]
    if not len(windows):
        return ()

    def elevation(t_s: Floats) -> Floats:
        return ephemeris.look(station, t_s).elevation_deg

    peak_s, peak_deg = _highest(elevation, windows)
    return tuple(
        Pass(station.name, float(aos), float(los), float(top_deg), float(top_s))
        for (aos, los), top_s, top_deg in zip(windows, peak_s, peak_deg, strict=True)
    )


def contact_plan(
    ephemeris: Ephemeris,
    stations: Sequence[Station],
    start_s: float,
    end_s: float,
    *,
    handover: Handover = "keep-current",
) -> tuple[Contact, ...]:
    """All stations' passes in [start_s, end_s] merged into contacts that never overlap."""
    names = [station.name for station in stations]
    if len(set(names)) != len(names):
        raise UsageError(f"two stations share a name: {', '.join(sorted(names))}", hint="station names must be unique")
    by_name = dict(zip(names, stations, strict=True))
    passes = sorted(
        (p for station in stations for p in find_passes(ephemeris, station, start_s, end_s)),
        key=lambda p: (p.aos_s, p.station),
    )
    contacts = []
    for group in _overlapping(passes):
        spans = _serve(ephemeris, by_name, group, handover) if len(group) > 1 else (_span(group[0]),)
        top_deg, top_s = _peak(ephemeris, by_name, group, spans)
        contacts.append(Contact(spans[0].label, spans[0].start_s, spans[-1].end_s, top_deg, top_s, spans))
    return tuple(contacts)


def _highest(elevation: Function, windows: Floats) -> tuple[Floats, Floats]:
    """Highest elevation in each window; several local peaks (high orbits, table masks) are told apart by sampling."""
    shares = np.linspace(0.0, 1.0, 17)
    samples = windows[:, :1] + (windows[:, 1:] - windows[:, :1]) * shares
    values = elevation(samples.ravel()).reshape(samples.shape)
    best = values.argmax(axis=1)
    rows = np.arange(len(windows))
    low = samples[rows, np.maximum(best - 1, 0)]
    high = samples[rows, np.minimum(best + 1, len(shares) - 1)]
    return maxima(elevation, low, high)


def _overlapping(passes: Sequence[Pass]) -> list[list[Pass]]:
    groups: list[list[Pass]] = []
    end_s = -np.inf
    for item in passes:
        if item.aos_s <= end_s:
            groups[-1].append(item)
        else:
            groups.append([item])
        end_s = max(end_s, item.los_s)
    return groups


def _span(item: Pass) -> Span:
    return Span(item.aos_s, item.los_s, item.station)


def _elevation_at(ephemeris: Ephemeris, station: Station, t_s: float) -> float:
    return float(ephemeris.look(station, np.array([t_s])).elevation_deg[0])


def _serve(
    ephemeris: Ephemeris, stations: dict[str, Station], group: Sequence[Pass], handover: Handover
) -> tuple[Span, ...]:
    """Who serves when, within one contact."""
    breaks = {t for item in group for t in (item.aos_s, item.los_s)}
    if handover == "highest":
        breaks |= {t for a in group for b in group if a.station < b.station for t in _swaps(ephemeris, stations, a, b)}
    instants = sorted(breaks)
    spans: list[Span] = []
    for low, high in pairwise(instants):
        middle = 0.5 * (low + high)
        visible = {item.station for item in group if item.aos_s <= middle <= item.los_s}
        current = spans[-1].label if spans else ""
        if handover == "keep-current" and current in visible:
            chosen = current
        else:
            # decided where the choice is made for keep-current, in the middle (clear of the crossing) for highest
            when = low if handover == "keep-current" else middle
            chosen = max(sorted(visible), key=lambda name: _elevation_at(ephemeris, stations[name], when))
        if chosen == current:
            spans[-1] = Span(spans[-1].start_s, high, current)
        else:
            spans.append(Span(low, high, chosen))
    return tuple(spans)


def _swaps(ephemeris: Ephemeris, stations: dict[str, Station], a: Pass, b: Pass) -> list[float]:
    """Instants at which two stations see the satellite equally high while both see it."""
    low, high = max(a.aos_s, b.aos_s), min(a.los_s, b.los_s)
    if high <= low:
        return []

    def lead(t_s: Floats) -> Floats:
        position = ephemeris.itrf_m(t_s)
        first, second = (_look_elevation(stations[item.station], position) for item in (a, b))
        return first - second

    grid = scan_grid(low, high, _CROSSING_STEP_S)
    values = lead(grid)
    change = np.nonzero((values[1:] < 0) != (values[:-1] < 0))[0]
    return [float(t) for t in crossings(lead, grid[change], grid[change + 1])]


def _look_elevation(station: Station, position: Floats) -> Floats:
    return look(station, position).elevation_deg


def _peak(
    ephemeris: Ephemeris, stations: dict[str, Station], group: Sequence[Pass], spans: Sequence[Span]
) -> tuple[float, float]:
    """Highest elevation of the serving station and its instant."""
    peaks = [
        (item.max_elevation_deg, item.max_elevation_s)
        for item in group
        for span in spans
        if span.label == item.station and span.start_s <= item.max_elevation_s <= span.end_s
    ]
    if len(spans) > 1 or not peaks:
        peaks += [
            (_elevation_at(ephemeris, stations[span.label], t), t) for span in spans for t in (span.start_s, span.end_s)
        ]
    return max(peaks)
