"""A link that reaches its satellite through others: routes to one target turned into contacts, geometry and delay.

The ground leg is what a radio link always is: contacts, handovers and acquisition at the access satellite. What the
inter-satellite links add is delay, and a cap of the rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np

from hil.errors import UsageError
from hil.mission.constellation import Constellation
from hil.mission.frames import Floats, Station, look
from hil.mission.isl import IslConfig, geometry
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.passes import Contact, Handover
from hil.mission.radio import SPEED_OF_LIGHT_M_S
from hil.mission.roots import maxima
from hil.mission.routes import SPEED_OF_LIGHT_KM_S, Network, Routes, RouteSpan, compile_routes
from hil.model import Span

_TRACK_STEP_S = 1.0
_PEAK_SAMPLES = 33


@dataclass(frozen=True, slots=True)
class Relay:
    """The constellation that a mission's satellite, number `target`, is reached through."""

    constellation: Constellation
    isl: IslConfig
    target: int
    step_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.target < len(self.constellation):
            raise UsageError(
                f"there is no satellite {self.target}",
                hint=f"satellites are numbered 0..{len(self.constellation) - 1}, plane by plane",
            )

    @property
    def orbit(self) -> Orbit:
        """The orbit of the target."""
        return self.constellation.orbits[self.target]

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal relay."""
        return {
            "constellation": self.constellation.as_dict(),
            "isl": asdict(self.isl),
            "target": self.target,
            "step_s": self.step_s,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Relay:
        """Inverse of `as_dict`, also after a round trip through JSON."""
        return cls(
            Constellation.from_dict(values["constellation"]),
            IslConfig.from_dict(values["isl"]),
            values["target"],
            values["step_s"],
        )

    def plan(
        self, stations: tuple[Station, ...], start: datetime, duration_s: float, *, handover: Handover = "keep-current"
    ) -> RelayPlan:
        """Routes to the target from any of `stations`. Raises UsageError as `compile_routes` does.

        `keep-current` keeps a way until one of its links goes; `highest` takes the shortest at every step.
        """
        network = Network(self.constellation, self.isl, stations, start, duration_s, self.step_s)
        return RelayPlan(compile_routes(network), self.target, keep=handover == "keep-current")


class RelayPlan:
    """Who carries the traffic to one satellite when, and how long it takes. Times in mission seconds.

    `spans`: the ways, one after the other. `contacts`: unbroken service, with a span of its own for every access
    satellite (label: the station), so that each handover waits for the modem. `reroutes`: instants at which the way
    between the satellites changes while the access satellite stays. `itrf_m(t_s)` is where the access satellite is.
    """

    def __init__(self, routes: Routes, target: int, *, keep: bool = False) -> None:
        network = routes.network
        self.target = target
        self.spans: tuple[RouteSpan, ...] = routes.spans(target, keep=keep)
        self._stations = {station.name: station for station in network.stations}
        self._processing_s = network.isl.processing_s
        self._ground_processing_s = network.ground_processing_s
        self._starts = np.array([span.start_s for span in self.spans])
        self._tracks = [Ephemeris(orbit, network.start) for orbit in network.constellation.orbits]
        self.contacts: tuple[Contact, ...] = self._contacts()
        self.reroutes: tuple[float, ...] = tuple(
            after.start_s
            for before, after in pairwise(self.spans)
            if after.start_s == before.end_s and _access(before) == _access(after)
        )

    def itrf_m(self, t_s: Floats) -> Floats:
        """Earth-fixed position of the serving access satellite in metres, (n, 3); nan where there is no way at all."""
        where = np.full((len(t_s), 3), np.nan)
        for access, rows in self._grouped(t_s, lambda span: span.path[0]):
            where[rows] = self._tracks[access].itrf_m(t_s[rows])
        return where

    def isl_delay_s(self, t_s: Floats) -> Floats:
        """Delay between access satellite and target, seconds; 0 where the target itself is in sight or nothing is."""
        delay_s = np.zeros(len(t_s))
        for path, rows in self._grouped(t_s, lambda span: span.path):
            where = [self._tracks[satellite].teme_km(t_s[rows])[0] for satellite in path]
            for a_km, b_km in pairwise(where):
                delay_s[rows] += geometry(a_km, b_km)[0] / SPEED_OF_LIGHT_KM_S + self._processing_s
        return delay_s

    def isl_track(self) -> tuple[Floats, Floats]:
        """`isl_delay_s` a second apart through every span as (t_s, delay_s): linear between the rows of a span.

        Where one span follows another there are two rows, the first just before the change.
        """
        combs = [np.zeros(0)]
        for span in self.spans:
            comb = np.linspace(span.start_s, span.end_s, max(2, int(np.ceil(span.duration_s / _TRACK_STEP_S)) + 1))
            comb[-1] = np.nextafter(span.end_s, -np.inf)
            combs.append(comb)
        t_s = np.concatenate(combs)
        return t_s, self.isl_delay_s(t_s)

    def delays_s(self) -> list[tuple[float, float]]:
        """One-way delay of the whole way at the start and at the end of every span; processing of all links in it."""
        low_s = np.array([span.start_s for span in self.spans])
        high_s = np.nextafter([span.end_s for span in self.spans], -np.inf)
        return list(zip(self._delay_s(low_s).tolist(), self._delay_s(high_s).tolist(), strict=True))

    def _delay_s(self, t_s: Floats) -> Floats:
        ground_s = np.zeros(len(t_s))
        where = self.itrf_m(t_s)
        for station, rows in self._grouped(t_s, lambda span: span.station):
            ground_s[rows] = look(self._stations[station], where[rows]).range_m / SPEED_OF_LIGHT_M_S
        return ground_s + self._ground_processing_s + self.isl_delay_s(t_s)

    def elevation_deg(self, t_s: Floats) -> Floats:
        """Elevation of the access satellite at the serving station; nan where there is no way at all."""
        elevation = np.full(len(t_s), np.nan)
        where = self.itrf_m(t_s)
        for station, rows in self._grouped(t_s, lambda span: span.station):
            elevation[rows] = look(self._stations[station], where[rows]).elevation_deg
        return elevation

    def _contacts(self) -> tuple[Contact, ...]:
        groups = [_serving(group) for group in _unbroken(self.spans)]
        peaks = iter(self._peaks([span for group in groups for span in group]))
        contacts = []
        for serving in groups:
            top_deg, top_s = max(next(peaks) for _ in serving)
            contacts.append(
                Contact(serving[0].label, serving[0].start_s, serving[-1].end_s, top_deg, top_s, tuple(serving))
            )
        return tuple(contacts)

    def _peaks(self, spans: Sequence[Span]) -> list[tuple[float, float]]:
        """Highest elevation and its instant in each serving span."""
        if not spans:
            return []
        first_s = np.array([span.start_s for span in spans])[:, np.newaxis]
        last_s = np.nextafter([span.end_s for span in spans], -np.inf)[:, np.newaxis]
        t_s = np.minimum(first_s + (last_s - first_s) * np.linspace(0.0, 1.0, _PEAK_SAMPLES), last_s)
        best = self.elevation_deg(t_s.ravel()).reshape(t_s.shape).argmax(axis=1)
        rows = np.arange(len(spans))
        low_s = t_s[rows, np.maximum(best - 1, 0)]
        high_s = t_s[rows, np.minimum(best + 1, _PEAK_SAMPLES - 1)]
        top_s, top_deg = maxima(self.elevation_deg, low_s, high_s)
        return list(zip(top_deg.tolist(), top_s.tolist(), strict=True))

    def _grouped(self, t_s: Floats, key: Any) -> Iterator[tuple[Any, Any]]:
        """Instants by a property of the span that serves at them, or that served last."""
        if not self.spans:
            return
        owner = np.maximum(np.searchsorted(self._starts, t_s, side="right") - 1, 0)
        keys = [key(span) for span in self.spans]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(keys))}
        groups = np.array([numbers[value] for value in keys])[owner]
        for value, number in numbers.items():
            rows = np.nonzero(groups == number)[0]
            if len(rows):
                yield value, rows


def _access(span: RouteSpan) -> tuple[str, int]:
    return span.station, span.path[0]


def _serving(group: Sequence[RouteSpan]) -> tuple[Span, ...]:
    """The ways of one contact joined while station and access satellite stay."""
    found = [Span(group[0].start_s, group[0].end_s, group[0].station)]
    for before, span in pairwise(group):
        if _access(before) == _access(span):
            found[-1] = Span(found[-1].start_s, span.end_s, span.station)
        else:
            found.append(Span(span.start_s, span.end_s, span.station))
    return tuple(found)


def _unbroken(spans: Sequence[RouteSpan]) -> list[list[RouteSpan]]:
    groups: list[list[RouteSpan]] = []
    for span in spans:
        if groups and groups[-1][-1].end_s == span.start_s:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
