"""Compiles a mission's environment into its timeline: contacts, eclipses and edges root-found, columns between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hil.mission import faults, frames, linkplan
from hil.mission.bursts import outages
from hil.mission.environment import MissionEnvironment
from hil.mission.frames import Floats
from hil.mission.linkplan import Edge
from hil.mission.orbit import Ephemeris
from hil.mission.passes import Contact, contact_plan
from hil.mission.radio import DIRECTIONS, SPEED_OF_LIGHT_M_S, LinkEnvironment
from hil.mission.relay import RelayPlan
from hil.mission.shadow import Eclipse, find_eclipses, plane_angle_deg, visible_fraction
from hil.mission.timeline import EDGE_KINDS, Timeline
from hil.model import Direction

_PENUMBRA_COMB = 32
_CONTACT_STEP_S = 1.0
_SAME_S = 1e-6  # edges nearer than this are one row of the columns


def compile_timeline(environment: MissionEnvironment) -> Timeline:
    """Compute the mission's environment. Raises UsageError when the orbit cannot be propagated that far."""
    ephemeris = Ephemeris(environment.orbit, environment.start)
    end_s = environment.duration_s
    relay = _relay_plan(environment)
    contacts = relay.contacts if relay else _contacts(environment, ephemeris)
    eclipses = find_eclipses(ephemeris, 0.0, end_s)
    served = relay or ephemeris  # whom the stations talk to
    track = _contact_track(environment, served, contacts)
    link = _link(environment, served, contacts, track, relay.reroutes if relay else ())
    relay_t_s, relay_delay_s = relay.isl_track() if relay else (np.zeros(0), np.zeros(0))
    edges = _edges(environment, (*_eclipse_edges(eclipses), *link.edges))

    t_s = _grid(environment, edges, eclipses)
    position, velocity = ephemeris.teme_km(t_s)
    sun = ephemeris.sun_km(t_s)
    sunlit = visible_fraction(position, sun)
    array_w = np.zeros_like(t_s)
    if environment.power is not None:
        array_w = environment.power.array.power_w(sunlit, sun)
    delay_s, elevation_deg = _path_columns(environment.link, t_s, contacts, track)
    if relay:
        delay_s = delay_s + relay.isl_delay_s(t_s)
    return Timeline(
        environment=environment,
        t_s=t_s,
        sunlit_fraction=sunlit,
        array_w=array_w,
        beta_deg=plane_angle_deg(position, velocity, sun),
        delay_s=delay_s,
        elevation_deg=elevation_deg,
        relay_t_s=relay_t_s,
        relay_delay_s=relay_delay_s,
        uplink_bps=_held(link.steps["uplink"], t_s),
        downlink_bps=_held(link.steps["downlink"], t_s),
        edges=edges,
        contacts=contacts,
        eclipses=eclipses,
        faults=faults.schedule(environment.faults, ephemeris, end_s, environment.seed) if environment.faults else (),
        **track,
        **{f"{direction}_step_t_s": steps.t_s for direction, steps in link.steps.items()},
        **{f"{direction}_step_bps": steps.rate_bps for direction, steps in link.steps.items()},
        **{f"{direction}_step_loss": steps.loss for direction, steps in link.steps.items()},
    )


def _relay_plan(environment: MissionEnvironment) -> RelayPlan | None:
    relay, handover = environment.relay, environment.link.handover
    if relay is None:
        return None
    return relay.plan(environment.stations, environment.start, environment.duration_s, handover=handover)


def _contacts(environment: MissionEnvironment, ephemeris: Ephemeris) -> tuple[Contact, ...]:
    """Passes over the stations, or the openings of a window: those have no elevation (nan)."""
    link = environment.link
    if link.window is None:
        return contact_plan(ephemeris, environment.stations, 0.0, environment.duration_s, handover=link.handover)
    return tuple(
        Contact(span.label, span.start_s, span.end_s, math.nan, math.nan, (span,))
        for span in link.window.spans(environment.duration_s)
    )


@dataclass(frozen=True, slots=True)
class _Link:
    steps: dict[Direction, linkplan.Steps]
    edges: tuple[Edge, ...]


def _link(
    environment: MissionEnvironment,
    served: Ephemeris | RelayPlan,
    contacts: tuple[Contact, ...],
    track: dict[str, Floats],
    reroutes: tuple[float, ...],
) -> _Link:
    link, seed = environment.link, environment.seed
    if environment.relay is not None:
        link = link.capped(environment.relay.isl.rate_bps)
    spans = [span for contact in contacts for span in contact.spans]
    geometry = linkplan.Track(
        track["contact_t_s"], track["contact_range_m"], track["contact_elevation_deg"], track["contact_span"]
    )
    rates = linkplan.rate_steps(link, contacts, geometry, served, environment.stations)
    faded = linkplan.contact_fades(link, contacts, environment.start, seed)
    silent = outages(link.outages, link.random_outages, environment.duration_s, seed)
    return _Link(
        steps={
            direction: linkplan.direction_steps(
                link.channel(direction), rates[direction], contacts, faded[direction], silent
            )
            for direction in DIRECTIONS
        },
        edges=(
            *linkplan.contact_edges(link, contacts),
            *(Edge(t_s, "reroute") for t_s in reroutes),
            *linkplan.rate_edges(rates, spans),
            *linkplan.fade_edges(faded),
            *linkplan.outage_edges(silent),
        ),
    )


def _eclipse_edges(eclipses: tuple[Eclipse, ...]) -> Iterator[Edge]:
    for eclipse in eclipses:
        for kind in ("penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit"):
            t_s = getattr(eclipse, f"{kind}_s")
            if t_s is not None:
                yield Edge(t_s, kind)


def _edges(environment: MissionEnvironment, found: Iterable[Edge]) -> tuple[Edge, ...]:
    """In order of time, those within the mission."""
    order = {kind: index for index, kind in enumerate(EDGE_KINDS)}
    inside = (edge for edge in found if 0.0 <= edge.t_s <= environment.duration_s)
    return tuple(sorted(inside, key=lambda edge: (edge.t_s, order[edge.kind], edge.detail)))


def _path_columns(
    link: LinkEnvironment, t_s: Floats, contacts: tuple[Contact, ...], track: dict[str, Floats]
) -> tuple[Floats, Floats]:
    """Delay and elevation over the grid, nan outside of contacts."""
    serving = _within_contacts(t_s, contacts)
    if link.window is not None:
        delay_s = np.full_like(t_s, link.window.one_way_delay_s + link.processing_s)
        return np.where(serving, delay_s, np.nan), np.full_like(t_s, np.nan)
    if not contacts:
        return np.full_like(t_s, np.nan), np.full_like(t_s, np.nan)
    range_m = np.interp(t_s, track["contact_t_s"], track["contact_range_m"])
    elevation_deg = np.interp(t_s, track["contact_t_s"], track["contact_elevation_deg"])
    delay_s = range_m / SPEED_OF_LIGHT_M_S + link.processing_s
    return np.where(serving, delay_s, np.nan), np.where(serving, elevation_deg, np.nan)


def _held(steps: linkplan.Steps, t_s: Floats) -> Floats:
    """The rate in force at each instant; 0 before the first step."""
    rates = np.concatenate([[0.0], steps.rate_bps])
    return np.asarray(rates[np.searchsorted(steps.t_s, t_s, side="right")], dtype=np.float64)


def _grid(environment: MissionEnvironment, edges: tuple[Edge, ...], eclipses: tuple[Eclipse, ...]) -> Floats:
    """Regular grid, the mission's end, every edge, and a comb through each penumbra, where sunlight really changes."""
    end_s = environment.duration_s
    # cosine spacing: the visible area bends hardest where the discs first and last touch
    comb = 0.5 - 0.5 * np.cos(np.linspace(0.0, np.pi, _PENUMBRA_COMB + 1))
    parts = [np.arange(0.0, end_s, environment.step_s), np.array([end_s]), np.array([edge.t_s for edge in edges])]
    for eclipse in eclipses:
        if eclipse.umbra_entry_s is None or eclipse.umbra_exit_s is None:
            ramps = [(eclipse.penumbra_entry_s, eclipse.penumbra_exit_s)]
        else:
            ramps = [
                (eclipse.penumbra_entry_s, eclipse.umbra_entry_s),
                (eclipse.umbra_exit_s, eclipse.penumbra_exit_s),
            ]
        parts += [low + (high - low) * comb for low, high in ramps]
    t_s = np.unique(np.concatenate(parts))
    t_s = t_s[(t_s >= 0.0) & (t_s <= end_s)]
    keep = np.ones(t_s.shape, dtype=bool)
    keep[1:] = np.diff(t_s) > _SAME_S
    return np.asarray(t_s[keep], dtype=np.float64)


def _contact_track(
    environment: MissionEnvironment, served: Ephemeris | RelayPlan, contacts: tuple[Contact, ...]
) -> dict[str, Floats]:
    """Range, elevation and azimuth through every serving span, a second apart: linear between rows to 0.05 us."""
    link = environment.link
    by_name = {station.name: station for station in environment.stations}
    spans = [] if link.window is not None else [span for contact in contacts for span in contact.spans]
    times, owner = [], []
    for index, span in enumerate(spans):
        count = max(2, int(np.ceil(span.duration_s / _CONTACT_STEP_S)) + 1)
        comb = np.linspace(span.start_s, span.end_s, count)
        if 0 < link.acquisition_s < span.duration_s:
            comb = np.union1d(comb, [span.start_s + link.acquisition_s])  # where the ladder is entered
            count = len(comb)
        if index + 1 < len(spans) and spans[index + 1].start_s == span.end_s:
            comb[-1] = np.nextafter(span.end_s, -np.inf)  # the next span's first row holds this very instant
        times.append(comb)
        owner.append(np.full(count, float(index)))
    t_s = np.concatenate(times) if times else np.zeros(0)
    span_of = np.concatenate(owner) if owner else np.zeros(0)
    position = served.itrf_m(t_s)
    columns = {name: np.zeros_like(t_s) for name in ("range_m", "elevation_deg", "azimuth_deg")}
    names = np.array([span.label for span in spans])
    for name, station in by_name.items():
        rows = np.isin(span_of, np.nonzero(names == name)[0].astype(np.float64)) if len(spans) else np.zeros(0, bool)
        seen = frames.look(station, position[rows])
        for column, values in columns.items():
            values[rows] = getattr(seen, column)
    return {
        "contact_t_s": t_s,
        "contact_range_m": columns["range_m"],
        "contact_elevation_deg": columns["elevation_deg"],
        "contact_azimuth_deg": columns["azimuth_deg"],
        "contact_span": span_of,
    }


def _within_contacts(t_s: Floats, contacts: tuple[Contact, ...]) -> Any:
    inside = np.zeros(t_s.shape, dtype=bool)
    for contact in contacts:
        inside |= (t_s >= contact.aos_s) & (t_s < contact.los_s)
    return inside
