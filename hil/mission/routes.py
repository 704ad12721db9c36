"""Shortest-delay routes from the ground through a constellation, step by step, with handovers.

`compile_routes(network)` walks the mission in steps (`step_s`). At every step Dijkstra's algorithm (scipy) finds the
way of least delay from the ground to every satellite over the links that work at that instant. Ground legs follow the
stations' elevation masks; of several stations that see a satellite the nearest one counts.

What is exact and what is stepwise: when a link appears or goes (AOS, LOS, range, grazing, acquisition, outage) is
root-found; which way is the best is decided at the steps. `Routes.spans` joins the two: a way is never used outside of
the time in which all of its links work; it is left early when one of them goes, and the next step's way is entered as
soon as its links work. Between the two there may be silence of less than one step that another way could have filled.
Positions between steps are Hermite-interpolated: 0.4 m at 60 s in low orbits, growing with the fourth power of the
step. Light time is geometric: satellites move by less than 200 m while a signal crosses one link, which is neglected.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from hil.errors import UsageError
from hil.mission import frames
from hil.mission.constellation import Constellation, Fleet, Ints
from hil.mission.frames import Floats, Station, look
from hil.mission.isl import IslConfig, check_outages, geometry, margin_km, pairs
from hil.mission.orbit import Ephemeris
from hil.mission.radio import SPEED_OF_LIGHT_M_S
from hil.mission.roots import crossings, maxima
from hil.mission.shadow import find_eclipses

SPEED_OF_LIGHT_KM_S = SPEED_OF_LIGHT_M_S / 1_000.0
GROUND = -1
UNREACHABLE = -2

_CHUNK_CELLS = 400_000  # satellites and links times instants held at once: some 100 MB
_MAX_CELLS = 60_000_000  # satellites times steps kept: 0.9 GB

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Network:
    """Everything routes are made from: satellites, their links, stations, and the span of time in seconds.

    `ground_processing_s` is added to every ground leg, `isl.processing_s` to every link between satellites.
    """

    constellation: Constellation
    isl: IslConfig
    stations: tuple[Station, ...]
    start: datetime
    duration_s: float
    step_s: float = 60.0
    ground_processing_s: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.step_s <= 300:
            raise UsageError(f"constellation step_s is {self.step_s}", hint="1..300 s; 60 is a good value")
        if not self.duration_s > 0:
            raise UsageError(f"routes over {self.duration_s} s", hint="a duration above zero")
        if not self.stations:
            raise UsageError("routes need a ground station to start from")
        cells = len(self.constellation) * self.duration_s / self.step_s
        if cells > _MAX_CELLS:
            raise UsageError(
                f"routes to {len(self.constellation)} satellites over {self.duration_s / 3600:g} h in steps of "
                f"{self.step_s:g} s need {cells * 14 / 1e9:.1f} GB",
                hint=f"a step of {self.step_s * cells / _MAX_CELLS:.0f} s, or fewer hours",
            )

    def parts(self) -> tuple[Fleet, Ints]:
        """The satellites on the time axis, and the links that the topology allows.

        Raises UsageError for satellites in one place, a ring that the Earth blocks, outages of what is not there.
        """
        links = pairs(self.constellation, self.isl)
        check_outages(self.constellation, links, self.isl)
        return Fleet(self.constellation, self.start), links


@dataclass(frozen=True, slots=True)
class LinkSpan:
    """Time in which one link works. `a` is the lower satellite, or `GROUND` with `station` set. Seconds of the mission.

    Cut at both ends of the mission. For links between satellites acquisition is over at `start_s`; on the ground it is
    AOS: whoever uses the leg first has to lock on.
    """

    a: int
    b: int
    start_s: float
    end_s: float
    station: str = ""


@dataclass(frozen=True, slots=True)
class RouteSpan:
    """One unbroken way from `station` over the satellites of `path` (access first, target last)."""

    start_s: float
    end_s: float
    station: str
    path: tuple[int, ...]

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def hops(self) -> int:
        """Links from the station to the target, the ground leg included."""
        return len(self.path)


@dataclass(frozen=True, eq=False)
class Route:
    """The way to one satellite as columns over the steps. Without a way: delay inf, hops 0, access and station -1."""

    target: int
    t_s: Floats
    delay_s: Floats
    hops: Ints
    access: Ints
    station: Ints


@dataclass(frozen=True, eq=False)
class Routes:
    """Ways to every satellite at every step. Made by `compile_routes`; never changes.

    `delay_s` (steps, satellites), inf where there is no way; `previous` the satellite before (`GROUND`: the station
    itself, `UNREACHABLE`: no way); `station` the nearest station that sees the satellite, -1 for none.
    `links`: rows of satellites that may be linked; `link_spans`: when they work, ground legs included.
    """

    network: Network
    t_s: Floats
    delay_s: Floats
    previous: npt.NDArray[np.int32]
    station: npt.NDArray[np.int16]
    links: Ints
    link_spans: tuple[LinkSpan, ...]
    _by_link: dict[tuple[int, int, str], list[LinkSpan]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_link: dict[tuple[int, int, str], list[LinkSpan]] = {}
        for span in self.link_spans:
            by_link.setdefault((span.a, span.b, span.station), []).append(span)
        object.__setattr__(self, "_by_link", by_link)

    def to(self, target: int) -> Route:
        """Columns of the way to one satellite."""
        self._require(target)
        steps = np.arange(len(self.t_s))
        here = np.full(len(steps), target, dtype=np.int64)
        hops = np.zeros(len(steps), dtype=np.int64)
        access = np.full(len(steps), -1, dtype=np.int64)
        walking = self.previous[:, target] != UNREACHABLE
        while walking.any():
            hops[walking] += 1
            before = self.previous[steps, here]
            arrived = walking & (before == GROUND)
            access[arrived] = here[arrived]
            walking &= ~arrived
            here[walking] = before[walking]
        station = np.where(access >= 0, self.station[steps, access], -1).astype(np.int64)
        return Route(target, self.t_s, self.delay_s[:, target], hops, access, station)

    def path(self, step: int, target: int) -> tuple[int, ...]:
        """Satellites from the access satellite to `target` at a step; empty when there is no way."""
        self._require(target)
        if self.previous[step, target] == UNREACHABLE:
            return ()
        found = [target]
        while (before := int(self.previous[step, found[-1]])) != GROUND:
            found.append(before)
        return tuple(reversed(found))

    def spans(self, target: int, *, keep: bool = False) -> tuple[RouteSpan, ...]:
        """Who carries the traffic to `target` when, as the module's first lines explain. Sorted, never overlapping.

        `keep`: a way is kept until one of its links goes, also when a shorter one appears: fewer handovers.
        """
        names = [station.name for station in self.network.stations]
        found: list[RouteSpan] = []
        holds_s = free_s = 0.0  # until when the last way works; nothing is decided from `free_s` on
        for step, t_s in enumerate(self.t_s.tolist()):
            until_s = float(self.t_s[step + 1]) if step + 1 < len(self.t_s) else self.network.duration_s
            ways: list[tuple[str, tuple[int, ...]]] = []
            if keep and free_s == t_s < holds_s:
                ways.append((found[-1].station, found[-1].path))
            if path := self.path(step, target):
                ways.append((names[self.station[step, path[0]]], path))
            for station, path in ways:
                low_s, high_s = self._works(station, path, t_s)
                # From the step on, or before it if the way works already and the one before has ended.
                start_s, stop_s = max(free_s, low_s), min(high_s, until_s)
                if stop_s > start_s:
                    _append(found, RouteSpan(start_s, stop_s, station, path))
                    free_s, holds_s = stop_s, high_s
        return tuple(found)

    def _works(self, station: str, path: tuple[int, ...], t_s: float) -> tuple[float, float]:
        """The interval around `t_s` in which every link of the way works."""
        keys = [(GROUND, path[0], station)]
        keys += [(min(a, b), max(a, b), "") for a, b in pairwise(path)]
        low_s, high_s = -math.inf, math.inf
        for key in keys:
            spans = self._by_link[key]
            span = spans[bisect_right(spans, t_s, key=lambda item: item.start_s) - 1]
            low_s, high_s = max(low_s, span.start_s), min(high_s, span.end_s)
        return low_s, high_s

    def _require(self, target: int) -> None:
        if not 0 <= target < len(self.network.constellation):
            raise UsageError(
                f"there is no satellite {target}",
                hint=f"satellites are numbered 0..{len(self.network.constellation) - 1}, plane by plane",
            )


def _append(spans: list[RouteSpan], span: RouteSpan) -> None:
    """Add a span, or lengthen the last one if it is the same way without a break."""
    last = spans[-1] if spans else None
    if last and last.end_s == span.start_s and (last.station, last.path) == (span.station, span.path):
        spans[-1] = RouteSpan(last.start_s, span.end_s, span.station, span.path)
    else:
        spans.append(span)


def compile_routes(network: Network) -> Routes:
    """Routes of the whole span. Raises UsageError for satellites in one place, or a ring that the Earth blocks."""
    fleet, links = network.parts()
    t_s = np.append(np.arange(0.0, network.duration_s, network.step_s), network.duration_s)
    if len(t_s) > 2 and t_s[-1] - t_s[-2] < 1e-6:
        t_s = np.delete(t_s, -2)
    states = _States(network, links)
    count = len(network.constellation)
    delay_s = np.full((len(t_s), count), np.inf)
    previous = np.full((len(t_s), count), UNREACHABLE, dtype=np.int32)
    station = np.full((len(t_s), count), -1, dtype=np.int16)
    rows = max(4, _CHUNK_CELLS // (count * len(network.stations) + len(links)))
    for first in range(0, len(t_s), rows):
        last = min(first + rows, len(t_s))
        # One instant more on both sides: a change belongs to the interval before a step, a bump to its middle.
        low, high = max(first - 1, 0), min(last + 1, len(t_s))
        window = _Window(network, fleet, links, t_s[low:high])
        if first == 0:
            states.begin(window.margin[:, 0] > 0)
        states.expect(*window.changes(first - low, last - low))
        isl_s = window.isl_range_km / SPEED_OF_LIGHT_KM_S + network.isl.processing_s
        ground_s = window.ground_range_m / SPEED_OF_LIGHT_M_S + network.ground_processing_s
        for step in range(first, last):
            works = states.at(float(t_s[step]))
            delay_s[step], previous[step], station[step] = _shortest(
                links, isl_s[:, step - low], ground_s[:, :, step - low], works
            )
    return Routes(network, t_s, delay_s, previous, station, links, states.finish(network.duration_s))


def _shortest(
    links: Ints, isl_s: Floats, ground_s: Floats, works: Bools
) -> tuple[Floats, npt.NDArray[np.int32], npt.NDArray[np.int16]]:
    """Delay, previous node and nearest station for every satellite at one instant. `works`: links, then ground legs."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import dijkstra

    count = ground_s.shape[1]
    legs_s = np.where(works[len(links) :].reshape(ground_s.shape), ground_s, np.inf)
    nearest = np.asarray(legs_s.argmin(axis=0))
    leg_s = legs_s[nearest, np.arange(count)]
    seen = np.nonzero(np.isfinite(leg_s))[0]
    up = works[: len(links)]
    weight = np.concatenate([isl_s[up], leg_s[seen]])
    one = np.concatenate([links[up, 0], np.full(len(seen), count)])
    other = np.concatenate([links[up, 1], seen])
    graph = csr_matrix((weight, (one, other)), shape=(count + 1, count + 1))
    delay_s, before = dijkstra(graph, directed=False, indices=count, return_predecessors=True)
    before = np.where(before[:count] == count, GROUND, np.where(before[:count] < 0, UNREACHABLE, before[:count]))
    station = np.where(np.isfinite(leg_s), nearest, -1)
    return delay_s[:count], before.astype(np.int32), station.astype(np.int16)


class _Window:
    """Geometry of all links over a few steps: rows are links first, then every station's leg to every satellite."""

    def __init__(self, network: Network, fleet: Fleet, links: Ints, t_s: Floats) -> None:
        self._network, self._fleet, self._links, self._t_s = network, fleet, links, t_s
        self._position, self._velocity = fleet.teme_km(t_s)
        count = len(network.constellation)
        self.isl_range_km, grazing_km = geometry(self._position[links[:, 0]], self._position[links[:, 1]])
        self.ground_range_m = np.empty((len(network.stations), count, len(t_s)))
        margins = [margin_km(self.isl_range_km, grazing_km, network.isl)]
        flat = self._position.reshape(-1, 3)
        earth_fixed_m = 1_000.0 * frames.teme_to_itrf(flat, np.tile(fleet.gmst_rad(t_s), count))
        for index, station in enumerate(network.stations):
            seen = look(station, earth_fixed_m)
            self.ground_range_m[index] = seen.range_m.reshape(count, -1)
            margins.append((seen.elevation_deg - station.mask_at(seen.azimuth_deg)).reshape(count, -1))
        self.margin = np.concatenate(margins)

    def changes(self, first: int, last: int) -> tuple[Ints, Floats, Bools]:
        """Links that appear or go between instants `first` - 1 and `last` of the window: row, time, whether it appears.

        Also a link that comes and goes (or goes and comes) between two steps: the margin's extremum is looked at
        wherever three samples bend far enough to reach zero.
        """
        margin = self.margin
        row, at = np.nonzero((margin[:, 1:] > 0) != (margin[:, :-1] > 0))
        inside = (at >= first - 1) & (at < last - 1)
        found = [(row[inside], self._t_s[at[inside]], self._t_s[at[inside] + 1])]
        if margin.shape[1] > 2:
            found += self._bumps(first, last)
        rows, low_s, high_s = (np.concatenate(column) for column in zip(*found, strict=True))
        when_s = crossings(lambda t_s: self._margin_at(rows, t_s), low_s, high_s)
        return rows, when_s, self._margin_at(rows, high_s) > 0

    def _bumps(self, first: int, last: int) -> list[tuple[Ints, Floats, Floats]]:
        left, middle, right = self.margin[:, :-2], self.margin[:, 1:-1], self.margin[:, 2:]
        sign = np.where(middle > 0, -1.0, 1.0)
        peak = (sign * middle >= sign * left) & (sign * middle >= sign * right)
        peak &= ((left > 0) == (middle > 0)) & ((right > 0) == (middle > 0))
        peak &= np.abs(middle) <= np.abs(left - 2.0 * middle + right)
        row, at = np.nonzero(peak)
        at = at + 1
        inside = (at >= first) & (at < last)
        row, at = row[inside], at[inside]
        turned = sign[row, at - 1]
        low_s, high_s = self._t_s[at - 1], self._t_s[at + 1]
        top_s, top = maxima(lambda t_s: turned * self._margin_at(row, t_s), low_s, high_s)
        real = top > 0
        return [(row[real], low_s[real], top_s[real]), (row[real], top_s[real], high_s[real])]

    def _margin_at(self, rows: Ints, t_s: Floats) -> Floats:
        """Margins of given rows, each at its own instant."""
        result = np.empty(len(rows))
        links, count = self._links, len(self._network.constellation)
        between = rows < len(links)
        if between.any():
            ends = links[rows[between]]
            a_km, b_km = (self._at(ends[:, side], t_s[between]) for side in (0, 1))
            result[between] = margin_km(*geometry(a_km, b_km), self._network.isl)
        for index, station in enumerate(self._network.stations):
            legs = (rows >= len(links) + index * count) & (rows < len(links) + (index + 1) * count)
            if legs.any():
                position = self._at((rows[legs] - len(links)) % count, t_s[legs])
                fixed_m = 1_000.0 * frames.teme_to_itrf(position, self._fleet.gmst_rad(t_s[legs]))
                seen = look(station, fixed_m)
                result[legs] = seen.elevation_deg - station.mask_at(seen.azimuth_deg)
        return result

    def _at(self, satellites: Ints, t_s: Floats) -> Floats:
        """Hermite-interpolated positions in km, one satellite and instant a row."""
        index = np.clip(np.searchsorted(self._t_s, t_s, side="right") - 1, 0, len(self._t_s) - 2)
        step_s = self._t_s[index + 1] - self._t_s[index]
        u = ((t_s - self._t_s[index]) / step_s)[:, np.newaxis]
        p0, p1 = self._position[satellites, index], self._position[satellites, index + 1]
        v0, v1 = (self._velocity[satellites, index + side] * step_s[:, np.newaxis] for side in (0, 1))
        chord = p1 - p0
        return np.asarray(p0 + u * (v0 + u * (3 * chord - 2 * v0 - v1 + u * (v0 + v1 - 2 * chord))))


class _States:
    """Which links work as time goes on: geometry, outages and acquisition, one change after the other."""

    def __init__(self, network: Network, links: Ints) -> None:
        self._links, self._stations = links, network.stations
        self._count = len(network.constellation)
        size = len(links) + len(network.stations) * self._count
        self._clear = np.zeros(size, dtype=bool)
        self._blocked = np.zeros(size, dtype=np.int64)
        self._ready_s = np.full(size, np.inf)
        self._acquisition_s = np.zeros(size)
        self._acquisition_s[: len(links)] = network.isl.acquisition_s
        self._spans: list[tuple[int, float, float]] = []
        self._queue: list[tuple[float, int, int]] = []  # time, row, what: +1/-1 geometry, +2/-2 outage ends or starts
        for outage in network.isl.outages:
            for row in self._rows_of(outage.satellite, outage.other):
                self._queue.append((outage.start_s, int(row), -2))
                if outage.end_s < math.inf:
                    self._queue.append((outage.end_s, int(row), 2))
        if network.isl.reacquire_after_eclipse:
            self._queue += self._eclipse_exits(network)

    def begin(self, clear: Bools) -> None:
        """The mission starts: links that are there are locked, outages that start now have been there before."""
        self._clear[:] = clear
        self._ready_s[clear] = 0.0
        for _, row, _ in (item for item in self._queue if item[0] <= 0.0):
            self._blocked[row] += 1
            self._ready_s[row] = np.inf
        self._queue = [item for item in self._queue if item[0] > 0.0]

    def expect(self, rows: Ints, when_s: Floats, appears: Bools) -> None:
        """Changes of the geometry that come next."""
        what = np.where(appears, 1, -1)
        self._queue += zip(when_s.tolist(), rows.tolist(), what.tolist(), strict=True)
        self._queue.sort(reverse=True)

    def at(self, t_s: float) -> Bools:
        """Let everything happen until `t_s`; who works then."""
        while self._queue and self._queue[-1][0] <= t_s:
            self._change(*self._queue.pop())
        return np.asarray(self._ready_s <= t_s)

    def finish(self, end_s: float) -> tuple[LinkSpan, ...]:
        """All times in which links worked, sorted by start."""
        for row in np.nonzero(self._ready_s < end_s)[0]:
            self._spans.append((int(row), float(self._ready_s[row]), end_s))
        self._ready_s[:] = np.inf
        return tuple(
            sorted((self._span(*item) for item in self._spans), key=lambda s: (s.start_s, s.a, s.b, s.station))
        )

    def _change(self, t_s: float, row: int, what: int) -> None:
        before = self._clear[row] and not self._blocked[row]
        if abs(what) == 1:
            self._clear[row] = what > 0
        else:
            self._blocked[row] += 1 if what < 0 else -1
        now = self._clear[row] and not self._blocked[row]
        if now and not before:
            self._ready_s[row] = t_s + self._acquisition_s[row]
        elif before and not now:
            if self._ready_s[row] < t_s:
                self._spans.append((row, float(self._ready_s[row]), t_s))
            self._ready_s[row] = np.inf

    def _rows_of(self, satellite: int, other: int | None) -> Ints:
        links = self._links
        if other is not None:
            return np.nonzero((links[:, 0] == min(satellite, other)) & (links[:, 1] == max(satellite, other)))[0]
        legs = len(links) + np.arange(len(self._stations)) * self._count + satellite
        return np.concatenate([np.nonzero((links == satellite).any(axis=1))[0], legs])

    def _eclipse_exits(self, network: Network) -> Iterator[tuple[float, int, int]]:
        """Every link of a satellite that comes out of the shadow breaks for no time at all, and has to lock again."""
        for satellite, orbit in enumerate(network.constellation.orbits):
            rows = np.nonzero((self._links == satellite).any(axis=1))[0].tolist()
            for eclipse in find_eclipses(Ephemeris(orbit, network.start), 0.0, network.duration_s):
                if 0.0 < eclipse.penumbra_exit_s < network.duration_s:
                    yield from ((eclipse.penumbra_exit_s, row, what) for row in rows for what in (-2, 2))

    def _span(self, row: int, start_s: float, end_s: float) -> LinkSpan:
        if row < len(self._links):
            a, b = (int(end) for end in self._links[row])
            return LinkSpan(a, b, start_s, end_s)
        station, satellite = divmod(row - len(self._links), self._count)
        return LinkSpan(GROUND, satellite, start_s, end_s, self._stations[station].name)
