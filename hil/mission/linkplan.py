"""When each direction of the link carries how much: contacts, rate steps, fades and outages made into one table.

A direction's state is constant between two rows of its `Steps`; every row has an edge of the timeline, so that whoever
plays the edges misses none. Rate steps of a budget are root-found on the true geometry, to a microsecond.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

import numpy as np

from hil.mission.acm import ModCod, climb, ladder
from hil.mission.bursts import fades
from hil.mission.frames import Floats, Station, look
from hil.mission.orbit import Ephemeris
from hil.mission.passes import Contact
from hil.mission.radio import DIRECTIONS, Channel, LinkBudget, LinkEnvironment
from hil.mission.relay import RelayPlan
from hil.mission.roots import crossings
from hil.model import Direction, Span

LADDER = ladder()


@dataclass(frozen=True, slots=True)
class Edge:
    """An instant at which the environment changes its nature.

    `detail` names the station of a radio edge, the direction of a fade, the cause of an outage. A `rate` edge is the
    end of acquisition (detail: the station) or a step of the ladder (`miyun downlink QPSK 3/4`; `none`: too weak).
    """

    t_s: float
    kind: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Steps:
    """The state of one direction from each `t_s` to the next: bits per second (0: silence), share of packets lost."""

    t_s: Floats
    rate_bps: Floats
    loss: Floats


@dataclass(frozen=True, slots=True)
class Track:
    """The geometry of all serving spans: rows of (t_s, range_m, elevation_deg, index of the span), in order of time."""

    t_s: Floats
    range_m: Floats
    elevation_deg: Floats
    span: Floats


@dataclass(frozen=True, slots=True)
class RateStep:
    """From `t_s` on, `channel` carries `rate_bps` in this mode; the span is an index into all serving spans."""

    t_s: float
    rate_bps: float
    mode: str
    span: int


def contact_edges(link: LinkEnvironment, contacts: Iterable[Contact]) -> Iterator[Edge]:
    """AOS, LOS, handovers and the ends of acquisition."""
    for contact in contacts:
        yield Edge(contact.aos_s, "aos", contact.station)
        yield Edge(contact.los_s, "los", contact.spans[-1].label)
        yield from (Edge(span.start_s, "handover", span.label) for span in contact.spans[1:])
        if link.acquisition_s > 0:
            locked = ((span, span.start_s + link.acquisition_s) for span in contact.spans)
            yield from (Edge(t_s, "rate", span.label) for span, t_s in locked if t_s < span.end_s)


def rate_steps(
    link: LinkEnvironment,
    contacts: Sequence[Contact],
    track: Track,
    served: Ephemeris | RelayPlan,
    stations: Sequence[Station],
) -> dict[Direction, list[RateStep]]:
    """What each direction carries from when on, in order of time; fades and outages are not in it.

    The first step of a span is at its lock. Spans that end before their modem has locked have none.
    """
    spans = [span for contact in contacts for span in contact.spans]
    locks = [span.start_s + link.acquisition_s for span in spans]
    steps: dict[Direction, list[RateStep]] = {}
    brackets: list[_Bracket] = []
    for direction in DIRECTIONS:
        channel = link.channel(direction)
        found: list[RateStep] = []
        for index, (span, lock_s) in enumerate(zip(spans, locks, strict=True)):
            if lock_s >= span.end_s:
                continue
            if channel.budget is None:
                found.append(RateStep(lock_s, channel.rate_bps or 0.0, "", index))
                continue
            first, walk = _walk(channel.budget, track, index, lock_s)
            found.append(RateStep(lock_s, *_rung(channel, first), index))
            brackets += [_Bracket(direction, index, span.label, *step) for step in walk]
        steps[direction] = found
    for bracket, t_s in zip(brackets, _solve(link, brackets, served, stations), strict=True):
        channel = link.channel(bracket.direction)
        steps[bracket.direction].append(RateStep(t_s, *_rung(channel, bracket.rung), bracket.span))
    return {direction: _distinct(sorted(found, key=lambda s: (s.span, s.t_s))) for direction, found in steps.items()}


def rate_edges(steps: Mapping[Direction, Sequence[RateStep]], spans: Sequence[Span]) -> Iterator[Edge]:
    """An edge for every step of the ladder but the first of a span, which is the lock and has its own."""
    for direction, found in steps.items():
        for before, step in pairwise(found):
            if step.span == before.span:
                yield Edge(step.t_s, "rate", f"{spans[step.span].label} {direction} {step.mode}")


def direction_steps(
    channel: Channel,
    rates: Sequence[RateStep],
    contacts: Sequence[Contact],
    faded: Sequence[Span],
    outages: Sequence[Span],
) -> Steps:
    """Everything that changes one direction, as one table of states."""
    spans = [span for contact in contacts for span in contact.spans]
    events: list[tuple[float, int, float]] = [(span.start_s, 0, 0.0) for span in spans]
    events += [(contact.los_s, 0, 0.0) for contact in contacts]
    events += [(step.t_s, 1, step.rate_bps) for step in rates]
    events += [(span.start_s, 2, 1.0) for span in faded] + [(span.end_s, 2, 0.0) for span in faded]
    events += [(span.start_s, 3, 1.0) for span in outages] + [(span.end_s, 3, 0.0) for span in outages]
    # At one instant a span's silence comes before its rate, and the end of a fade before the start of the next.
    events.sort()
    rate, fade, out = 0.0, 0.0, 0.0
    rows: list[tuple[float, float, float]] = []
    for t_s, what, value in events:
        if what <= 1:
            rate = value
        elif what == 2:
            fade = value
        else:
            out = value
        carries = 0.0 if out else rate
        row = (t_s, carries, channel.faded_loss if fade and carries else channel.loss)
        if rows and rows[-1][0] == t_s:
            rows.pop()
        if (rows[-1][1:] if rows else (0.0, channel.loss)) != row[1:]:
            rows.append(row)
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return Steps(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())


def contact_fades(
    link: LinkEnvironment, contacts: Sequence[Contact], start: datetime, seed: int
) -> dict[Direction, tuple[Span, ...]]:
    """The fades of every contact. The whole second of AOS names the stream: contacts do not touch each other."""
    found: dict[Direction, tuple[Span, ...]] = {}
    for direction in DIRECTIONS:
        bursts = link.channel(direction).bursts
        found[direction] = ()
        if bursts is not None:
            found[direction] = tuple(
                span
                for contact in contacts
                for span in fades(bursts, contact.aos_s, contact.los_s, seed, _key(direction, start, contact))
            )
    return found


def fade_edges(faded: Mapping[Direction, Sequence[Span]]) -> Iterator[Edge]:
    for direction, spans in faded.items():
        for span in spans:
            yield Edge(span.start_s, "burst_start", direction)
            yield Edge(span.end_s, "burst_end", direction)


def outage_edges(outages: Sequence[Span]) -> Iterator[Edge]:
    for span in outages:
        yield Edge(span.start_s, "outage_start", span.label)
        yield Edge(span.end_s, "outage_end", span.label)


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Somewhere between `low_s` and `high_s` the signal crosses `level_db`; from there on `rung` rungs are used."""

    direction: Direction
    span: int
    station: str
    low_s: float
    high_s: float
    level_db: float
    rung: int


def _key(direction: Direction, start: datetime, contact: Contact) -> str:
    return f"{direction}:{math.floor(start.timestamp() + contact.aos_s)}"


def _levels(budget: LinkBudget, modes: Sequence[ModCod] = LADDER) -> tuple[Floats, Floats]:
    """Es/N0 down to which each mode is held, and from which on it is taken, dB."""
    holds = np.array([mode.es_n0_db for mode in modes]) + budget.margin_db
    return holds, holds + budget.hysteresis_db


def _walk(
    budget: LinkBudget, track: Track, span: int, lock_s: float
) -> tuple[int, list[tuple[float, float, float, int]]]:
    """The rung at the lock, and brackets (low_s, high_s, level_db, rung after) of every later step within one span."""
    first, last = np.searchsorted(track.span, [span, span + 1])
    rows = slice(first + np.searchsorted(track.t_s[first:last], lock_s), last)
    t_s = track.t_s[rows]
    signal_db = budget.es_n0_db(track.range_m[rows], track.elevation_deg[rows])
    hold_db, reach_db = _levels(budget)
    holds = np.searchsorted(hold_db, signal_db, side="right")
    reaches = np.searchsorted(reach_db, signal_db, side="right")
    changed = np.nonzero((np.diff(holds) != 0) | (np.diff(reaches) != 0))[0] + 1
    start = rung = climb(0, int(holds[0]), int(reaches[0]))
    found = []
    for index in changed.tolist():
        to = climb(rung, int(holds[index]), int(reaches[index]))
        low, high = float(t_s[index - 1]), float(t_s[index])
        found += [(low, high, float(reach_db[step]), step + 1) for step in range(rung, to)]
        found += [(low, high, float(hold_db[step]), step) for step in range(rung - 1, to - 1, -1)]
        rung = to
    return start, found


def _solve(
    link: LinkEnvironment, brackets: Sequence[_Bracket], served: Ephemeris | RelayPlan, stations: Sequence[Station]
) -> list[float]:
    """All crossings at once: the propagator is asked for every bracket in one call."""
    if not brackets:
        return []
    level_db = np.array([bracket.level_db for bracket in brackets])
    groups = [
        (budget, station, rows)
        for direction in DIRECTIONS
        if (budget := link.channel(direction).budget) is not None
        for station in stations
        if len(rows := np.nonzero([b.direction == direction and b.station == station.name for b in brackets])[0])
    ]

    def above(t_s: Floats) -> Floats:
        position = served.itrf_m(t_s)
        signal_db = np.empty_like(t_s)
        for budget, station, rows in groups:
            seen = look(station, position[rows])
            signal_db[rows] = budget.es_n0_db(seen.range_m, seen.elevation_deg)
        return np.asarray(signal_db - level_db, dtype=np.float64)

    low, high = (np.array([getattr(bracket, name) for bracket in brackets]) for name in ("low_s", "high_s"))
    return [float(t_s) for t_s in crossings(above, low, high)]


def _rung(channel: Channel, rung: int) -> tuple[float, str]:
    """Rate and name of a rung; 0 is silence."""
    if rung == 0 or channel.budget is None:
        return 0.0, "none"
    mode = LADDER[rung - 1]
    return min(channel.budget.symbol_rate * mode.bits_per_symbol, channel.max_rate_bps or math.inf), mode.name


def _distinct(steps: Sequence[RateStep]) -> list[RateStep]:
    """Without the steps that change nothing: above a cap all modes carry the same."""
    found: list[RateStep] = []
    for step in steps:
        if not found or found[-1].span != step.span or found[-1].rate_bps != step.rate_bps:
            found.append(step)
    return found
