"""A mission's environment compiled ahead: immutable columns over mission time, root-found edges, a content hash.

`compile_timeline(environment)` is pure and deterministic. Seconds are mission seconds since `environment.start`.

Columns over `t_s` (a regular grid, plus every edge, plus a fine comb through each penumbra; interpolate linearly):
`sunlit_fraction` 0..1, `array_w` at the array's terminals, `beta_deg`, `delay_s` one-way of the downlink (the uplink's
differs by the satellite's movement under way, 0.2 us at most in low orbit) and `elevation_deg` of the serving station
(both nan outside contacts). `uplink_bps`, `downlink_bps`: usable rate, 0 in silence; it holds from its
row to the next.
Columns over `contact_t_s` (one second apart within each serving span): `contact_range_m`, `contact_elevation_deg`,
`contact_azimuth_deg`, `contact_span` (index of the span; spans follow one another through `contacts` in order). A
link window has no geometry, hence no rows here.
Columns over `uplink_step_t_s` (and likewise for the downlink): `uplink_step_bps` (0: silence) and `uplink_step_loss`,
each holding from its row to the next: fades, outages, acquisition and the ladder of the budget are all in them.
Columns over `relay_t_s` (one second apart within each way through a constellation; none without a relay):
`relay_delay_s`, what the links between satellites add to the ground leg, which the other columns describe.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import zipfile
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hil.errors import UsageError
from hil.mission import faults, frames, linkplan
from hil.mission.bursts import outages
from hil.mission.eps import EpsConfig, ShedConfig
from hil.mission.faults import Fault, FaultPlan, FaultRate
from hil.mission.frames import Floats, Station
from hil.mission.linkplan import Edge as Edge
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.passes import Contact, contact_plan
from hil.mission.radio import DIRECTIONS, OUTAGE, SPEED_OF_LIGHT_M_S, LinkEnvironment, one_way_delay_s
from hil.mission.relay import Relay, RelayPlan
from hil.mission.shadow import Eclipse, find_eclipses, plane_angle_deg, visible_fraction
from hil.mission.solar_array import ArrayConfig
from hil.mission.thermal import ThermalConfig
from hil.model import Direction, LinkState, Span

FORMAT = 3  # raise it when a column's meaning changes: it is part of the hash and of the file
# in the order in which edges of one instant are listed: what ends before what begins
EDGE_KINDS = (
    "penumbra_entry",
    "umbra_entry",
    "umbra_exit",
    "penumbra_exit",
    "los",
    "burst_end",
    "outage_end",
    "aos",
    "handover",
    "reroute",
    "rate",
    "burst_start",
    "outage_start",
)
_KINDS = frozenset(EDGE_KINDS)
_PENUMBRA_COMB = 32
_CONTACT_STEP_S = 1.0
_SAME_S = 1e-6  # edges nearer than this are one row of the columns
# quanta of the content hash: far coarser than the last-bit differences between machines, finer than what matters
_HASH_QUANTA = {
    "sunlit_fraction": 1e-4,
    "beta_deg": 1e-3,
    "contact_range_m": 10.0,
    "relay_delay_s": 1e-7,
    "uplink_step_bps": 1.0,
    "downlink_step_bps": 1.0,
    "uplink_step_loss": 1e-6,
    "downlink_step_loss": 1e-6,
}
_HASH_TIME_S = 1e-3
_HASH_DIGITS = 12  # of the environment's numbers: an orbit made from altitude and node has last bits of its own


@dataclass(frozen=True, slots=True)
class PowerEnvironment:
    """The satellite's power side: array, battery and bus, load shedding, and what the board is expected to draw."""

    array: ArrayConfig
    eps: EpsConfig
    shed: ShedConfig | None = None
    board_idle_w: float = 0.0
    board_full_w: float = 0.0


@dataclass(frozen=True, slots=True)
class MissionEnvironment:
    """Everything the timeline is made from, and nothing else. Times in seconds, `start` an instant in UTC."""

    name: str
    orbit: Orbit
    stations: tuple[Station, ...]
    start: datetime
    duration_s: float
    link: LinkEnvironment
    power: PowerEnvironment | None = None
    seed: int = 0
    step_s: float = 10.0
    faults: FaultPlan | None = None
    relay: Relay | None = None
    thermal: ThermalConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", frames.utc(self.start))
        if self.relay is not None and self.relay.orbit != self.orbit:
            raise UsageError(f"mission {self.name}: its orbit is not that of the satellite its relay leads to")
        if self.relay is not None and self.link.window is not None:
            raise UsageError(f"mission {self.name}: a link window has no station for a relay to start from")
        if not 0 < self.duration_s <= 400 * frames.DAY_S:
            raise UsageError(f"mission {self.name}: duration_s is {self.duration_s}", hint="above zero, up to 400 days")
        if not 0.1 <= self.step_s <= 600:
            raise UsageError(f"mission {self.name}: step_s is {self.step_s}", hint="0.1..600 s; 10 is a good value")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` reads them back to an equal environment."""
        return {
            "name": self.name,
            "orbit": self.orbit.as_dict(),
            "stations": [asdict(station) for station in self.stations],
            "start": self.start.isoformat(),
            "duration_s": self.duration_s,
            "link": asdict(self.link),
            "power": None if self.power is None else asdict(self.power),
            "seed": self.seed,
            "step_s": self.step_s,
            "faults": None if self.faults is None else asdict(self.faults),
            "relay": None if self.relay is None else self.relay.as_dict(),
            "thermal": None if self.thermal is None else asdict(self.thermal),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MissionEnvironment:
        """Inverse of `as_dict`, also after a round trip through JSON."""
        power, plan = values["power"], values["faults"]
        return cls(
            name=values["name"],
            orbit=Orbit.from_dict(values["orbit"]),
            stations=tuple(Station(**{**s, "mask_table": _rows(s["mask_table"])}) for s in values["stations"]),
            start=datetime.fromisoformat(values["start"]),
            duration_s=values["duration_s"],
            link=LinkEnvironment.from_dict(values["link"]),
            power=power
            and PowerEnvironment(
                array=ArrayConfig.from_dict(power["array"]),
                eps=EpsConfig.from_dict(power["eps"]),
                shed=power["shed"] and ShedConfig(**power["shed"]),
                board_idle_w=power["board_idle_w"],
                board_full_w=power["board_full_w"],
            ),
            seed=values["seed"],
            step_s=values["step_s"],
            relay=values["relay"] and Relay.from_dict(values["relay"]),
            thermal=values["thermal"] and ThermalConfig.from_dict(values["thermal"]),
            faults=plan and FaultPlan(**{**plan, "rates": tuple(FaultRate(**rate) for rate in plan["rates"])}),
        )


@dataclass(frozen=True, eq=False)
class Timeline:
    """The compiled environment. Made by `compile_timeline` or `Timeline.load`; never changes."""

    environment: MissionEnvironment
    t_s: Floats
    sunlit_fraction: Floats
    array_w: Floats
    beta_deg: Floats
    delay_s: Floats
    elevation_deg: Floats
    contact_t_s: Floats
    contact_range_m: Floats
    contact_elevation_deg: Floats
    contact_azimuth_deg: Floats
    contact_span: Floats
    relay_t_s: Floats
    relay_delay_s: Floats
    uplink_bps: Floats
    downlink_bps: Floats
    uplink_step_t_s: Floats
    uplink_step_bps: Floats
    uplink_step_loss: Floats
    downlink_step_t_s: Floats
    downlink_step_bps: Floats
    downlink_step_loss: Floats
    edges: tuple[Edge, ...]
    contacts: tuple[Contact, ...]
    eclipses: tuple[Eclipse, ...]
    faults: tuple[Fault, ...]
    hash: str = field(init=False)
    _fast: _Fast = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in _COLUMNS:
            getattr(self, name).setflags(write=False)
        object.__setattr__(self, "hash", _content_hash(self))
        object.__setattr__(self, "_fast", _Fast(self))

    @property
    def start(self) -> datetime:
        return self.environment.start

    @property
    def duration_s(self) -> float:
        return self.environment.duration_s

    def utc(self, t_s: float) -> str:
        """A mission time as UTC text."""
        return frames.utc_text(self.start, t_s)

    def sunlit_at(self, t_s: float) -> float:
        """Visible fraction of the solar disc, 0..1; held constant beyond both ends."""
        return _interpolate(self._fast.t_s, self._fast.sunlit, t_s)

    def array_power_w(self, t_s: float) -> float:
        """Array power at its terminals, watts; 0 when the mission has no array."""
        return _interpolate(self._fast.t_s, self._fast.array_w, t_s)

    def link_at(self, t_s: float, rate_scale: float = 1.0) -> dict[Direction, LinkState]:
        """Both directions at a mission time: rate, fades and outages as they are then.

        Outage outside of contacts, until the modem has locked, and while the signal is too weak for any mode.
        `rate_scale` multiplies the rates: pass the clock's rate, so that a contact carries the same bytes. Delay and
        loss never scale.
        """
        (up_bps, up_loss), (down_bps, down_loss) = self._fast.uplink.at(t_s), self._fast.downlink.at(t_s)
        if not up_bps and not down_bps:
            return {"uplink": OUTAGE, "downlink": OUTAGE}
        up_s, down_s = self.delay_at(t_s, "uplink"), self.delay_at(t_s, "downlink")
        jitter_s = self.environment.link.jitter_s
        return {
            "uplink": LinkState(up_s, jitter_s, up_loss, up_bps * rate_scale) if up_bps else OUTAGE,
            "downlink": LinkState(down_s, jitter_s, down_loss, down_bps * rate_scale) if down_bps else OUTAGE,
        }

    def capacity_bits(self, direction: Direction, start_s: float, end_s: float) -> float:
        """Bits that one direction can carry within mission seconds [start_s, end_s): the integral of its rate.

        Time in which every packet is lost carries nothing; a lower loss is not subtracted, as what crosses the link
        includes what is sent again.
        """
        t_s, rate_bps, loss = (getattr(self, f"{direction}_step_{name}") for name in ("t_s", "bps", "loss"))
        if not len(t_s) or end_s <= start_s:
            return 0.0
        borders = np.clip(np.append(t_s, np.inf), start_s, end_s)
        return float(np.sum(np.diff(borders) * np.where(loss < 1.0, rate_bps, 0.0)))

    def open_spans(self, start_s: float, end_s: float) -> tuple[Span, ...]:
        """When both directions carry something within [start_s, end_s): the link is up. Fades do not count as down."""
        times = {start_s, max(start_s, end_s)}
        for steps in self._fast.steps:
            times.update(steps.t_s[bisect_right(steps.t_s, start_s) : bisect_left(steps.t_s, end_s)])
        spans: list[Span] = []
        for low, high in pairwise(sorted(times)):
            if not all(steps.at(low)[0] for steps in self._fast.steps):
                continue
            if spans and spans[-1].end_s == low:
                spans[-1] = Span(spans[-1].start_s, high)
            else:
                spans.append(Span(low, high))
        return tuple(spans)

    def opening(self, contact: Contact) -> Span | None:
        """From the first to the last instant of a contact at which the link is up; None when it never is.

        A fixed rate is up from the modem's lock to LOS; a budget comes later and goes earlier than that.
        """
        spans = self.open_spans(contact.aos_s, contact.los_s)
        return Span(spans[0].start_s, spans[-1].end_s, contact.station) if spans else None

    def mean_rate_bps(self, direction: Direction, start_s: float, end_s: float) -> float:
        """Mean rate of the time in which one direction is not silent within [start_s, end_s); 0 when it always is.

        For a fixed rate it is that rate, whatever fades and outages did.
        """
        t_s, rate_bps = (getattr(self, f"{direction}_step_{name}") for name in ("t_s", "bps"))
        if not len(t_s) or end_s <= start_s:
            return 0.0
        held_s = np.diff(np.clip(np.append(t_s, np.inf), start_s, end_s)) * (rate_bps > 0.0)
        open_s = float(held_s.sum())
        return float((held_s * rate_bps).sum()) / open_s if open_s > 0 else 0.0

    def contact_at(self, t_s: float) -> Contact | None:
        """The contact in progress, or None."""
        index = bisect_right(self._fast.contact_start, t_s) - 1
        return self.contacts[index] if index >= 0 and t_s < self.contacts[index].los_s else None

    def next_contact(self, t_s: float) -> Contact | None:
        """The first contact whose AOS is after `t_s`, or None."""
        index = bisect_right(self._fast.contact_start, t_s)
        return self.contacts[index] if index < len(self.contacts) else None

    def next_edge(self, t_s: float, kinds: Collection[str] | None = None) -> Edge | None:
        """The first edge after `t_s`, of these kinds if given, or None. Raises UsageError for an unknown kind."""
        if kinds is not None and not _KINDS.issuperset(kinds):
            raise UsageError(f"unknown edge kind in {sorted(kinds)}", hint=f"kinds are {', '.join(EDGE_KINDS)}")
        for index in range(bisect_right(self._fast.edge_t, t_s), len(self.edges)):
            if kinds is None or self.edges[index].kind in kinds:
                return self.edges[index]
        return None

    def delay_at(self, t_s: float, direction: Direction = "downlink") -> float:
        """One-way delay in seconds of what is sent at `t_s` over the serving path; for instants within contacts."""
        link = self.environment.link
        if link.window is not None:
            return link.window.one_way_delay_s + link.processing_s
        range_m, rate_m_s = _line(self._fast.contact_t, self._fast.contact_range, t_s)
        delay_s = one_way_delay_s(range_m, link.processing_s, rate_m_s if direction == "uplink" else 0.0)
        if self._fast.relay_t:
            delay_s += _interpolate(self._fast.relay_t, self._fast.relay_delay, t_s)
        return delay_s

    def save(self, path: Path) -> None:
        """Write an .npz: the columns, and `meta` (JSON as bytes) with environment, edges, contacts, eclipses, hash."""
        meta = {
            "format": FORMAT,
            "hash": self.hash,
            "environment": self.environment.as_dict(),
            "edges": [asdict(edge) for edge in self.edges],
            "contacts": [asdict(contact) for contact in self.contacts],
            "eclipses": [asdict(eclipse) for eclipse in self.eclipses],
            "faults": [asdict(fault) for fault in self.faults],
        }
        packed = np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8)
        with path.open("wb") as file:  # a file object: numpy appends .npz to a bare name
            np.savez_compressed(file, meta=packed, **{name: getattr(self, name) for name in _COLUMNS})

    @classmethod
    def load(cls, path: Path) -> Timeline:
        """Read what `save` wrote; UsageError when it is something else or its hash does not agree."""
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(bytes(file["meta"]))
                if meta["format"] != FORMAT:
                    raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
                columns = {name: np.array(file[name], dtype=np.float64) for name in _COLUMNS}
            _check_columns(columns)
            timeline = cls(
                environment=MissionEnvironment.from_dict(meta["environment"]),
                edges=tuple(Edge(**edge) for edge in meta["edges"]),
                contacts=tuple(
                    Contact(**{**contact, "spans": tuple(Span(**span) for span in contact["spans"])})
                    for contact in meta["contacts"]
                ),
                eclipses=tuple(Eclipse(**eclipse) for eclipse in meta["eclipses"]),
                faults=tuple(Fault(**fault) for fault in meta["faults"]),
                **columns,
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError(f"{path} is not a timeline: {error}", hint="compile the mission again") from error
        if timeline.hash != meta["hash"]:
            raise UsageError(f"{path} was altered: its hash does not agree", hint="compile the mission again")
        return timeline

    def to_csv(self) -> str:
        """The columns over `t_s` as CSV text with a header; empty cells outside contacts."""
        names = ("t_s", *_AXES["t_s"])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("utc", *names))
        for row in zip(*(getattr(self, name).tolist() for name in names), strict=True):
            cells = ("" if value != value else f"{value:.9g}" for value in row[1:])
            writer.writerow((self.utc(row[0]), f"{row[0]:.6f}", *cells))
        return text.getvalue()


# each axis of time and the columns over it
_AXES = {
    "t_s": ("sunlit_fraction", "array_w", "beta_deg", "delay_s", "elevation_deg", "uplink_bps", "downlink_bps"),
    "contact_t_s": ("contact_range_m", "contact_elevation_deg", "contact_azimuth_deg", "contact_span"),
    "relay_t_s": ("relay_delay_s",),
    "uplink_step_t_s": ("uplink_step_bps", "uplink_step_loss"),
    "downlink_step_t_s": ("downlink_step_bps", "downlink_step_loss"),
}
_COLUMNS = tuple(name for axis, columns in _AXES.items() for name in (axis, *columns))
_NAN_OUTSIDE_CONTACTS = ("delay_s", "elevation_deg")


def _check_columns(columns: dict[str, Floats]) -> None:
    """Raises ValueError for columns that no compilation makes: the hash does not cover all of them."""
    for axis, names in _AXES.items():
        rows = len(columns[axis])
        if any(columns[name].shape != (rows,) for name in (axis, *names)):
            raise ValueError(f"columns over {axis} differ in length")
        if not (np.isfinite(columns[axis]).all() and (np.diff(columns[axis]) >= 0).all()):
            raise ValueError(f"{axis} does not rise")
        for name in names:
            if name not in _NAN_OUTSIDE_CONTACTS and not np.isfinite(columns[name]).all():
                raise ValueError(f"{name} has values that are no numbers")
    for name in ("sunlit_fraction", "uplink_step_loss", "downlink_step_loss"):
        if ((columns[name] < 0) | (columns[name] > 1)).any():
            raise ValueError(f"{name} leaves 0..1")
    for name in ("array_w", "contact_range_m", "relay_delay_s", "uplink_step_bps", "downlink_step_bps"):
        if (columns[name] < 0).any():
            raise ValueError(f"{name} is below zero")


class _FastSteps:
    """One direction's steps as plain lists."""

    __slots__ = ("state", "t_s")

    def __init__(self, timeline: Timeline, direction: Direction) -> None:
        t_s, rate_bps, loss = (getattr(timeline, f"{direction}_step_{name}") for name in ("t_s", "bps", "loss"))
        self.t_s: list[float] = t_s.tolist()
        # the last entry is the state before the first step: index -1
        self.state = [*zip(rate_bps.tolist(), loss.tolist(), strict=True), (0.0, 0.0)]

    def at(self, t_s: float) -> tuple[float, float]:
        """Rate (0: silence) and loss."""
        return self.state[bisect_right(self.t_s, t_s) - 1]


class _Fast:
    """The columns as plain lists: numpy's scalar access costs more than the bisection itself."""

    __slots__ = (
        "array_w",
        "contact_range",
        "contact_start",
        "contact_t",
        "downlink",
        "edge_t",
        "relay_delay",
        "relay_t",
        "steps",
        "sunlit",
        "t_s",
        "uplink",
    )

    def __init__(self, timeline: Timeline) -> None:
        self.t_s: list[float] = timeline.t_s.tolist()
        self.sunlit: list[float] = timeline.sunlit_fraction.tolist()
        self.array_w: list[float] = timeline.array_w.tolist()
        self.contact_t: list[float] = timeline.contact_t_s.tolist()
        self.contact_range: list[float] = timeline.contact_range_m.tolist()
        self.relay_t: list[float] = timeline.relay_t_s.tolist()
        self.relay_delay: list[float] = timeline.relay_delay_s.tolist()
        self.contact_start = [contact.aos_s for contact in timeline.contacts]
        self.uplink = _FastSteps(timeline, "uplink")
        self.downlink = _FastSteps(timeline, "downlink")
        self.steps = (self.uplink, self.downlink)
        self.edge_t = [edge.t_s for edge in timeline.edges]


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


def _content_hash(timeline: Timeline) -> str:
    """SHA-256 over the environment and the results, both rounded.

    The environment determines the results, so equal inputs give equal hashes; the results are in it so that a change of
    the code that moves them shows: in thousands of rows even a shift far below the quantum meets some boundary. They
    are rounded to `_HASH_QUANTA` and `_HASH_TIME_S`, because two machines' libm differ in the last bit: with noise of
    that size put into the propagator, edges move by a nanosecond at most, sunlight by 1e-11, and the chance that any
    value of a two-day mission meets a boundary is about one in thirty thousand.
    """
    digest = hashlib.sha256(f"hil timeline {FORMAT}\n".encode())
    digest.update(json.dumps(_rounded(timeline.environment.as_dict()), sort_keys=True).encode())
    digest.update("\n".join(f"{edge.kind} {edge.detail}" for edge in timeline.edges).encode())
    digest.update("\n".join(f"{fault.kind} {fault.in_saa}" for fault in timeline.faults).encode())
    times = {
        "edge_s": np.array([edge.t_s for edge in timeline.edges]),
        "fault_s": np.array([fault.t_s for fault in timeline.faults]),
        "uplink_step_t_s": timeline.uplink_step_t_s,
        "downlink_step_t_s": timeline.downlink_step_t_s,
    }
    quantised = [(name, values, _HASH_TIME_S) for name, values in times.items()]
    quantised += [(name, getattr(timeline, name), quantum) for name, quantum in _HASH_QUANTA.items()]
    for name, values, quantum in quantised:
        digest.update(name.encode())
        digest.update(np.rint(values / quantum).astype("<i8").tobytes())
    return digest.hexdigest()


def _rounded(value: Any) -> Any:
    """The same value with every number rounded: 86400 and 86400.0 in a mission file are one mission."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else f"{value:.{_HASH_DIGITS}g}"
    return value


def _interpolate(x: list[float], y: list[float], at: float) -> float:
    return _line(x, y, at)[0]


def _line(x: list[float], y: list[float], at: float) -> tuple[float, float]:
    """Value and slope of the line through the two points around `at`; constant beyond both ends."""
    at = float(at)  # a numpy scalar is slow here, and would end up in JSON and in LinkState
    index = bisect_right(x, at)
    if index == 0:
        return y[0], 0.0
    if index == len(x):
        return y[-1], 0.0
    low = x[index - 1]
    slope = (y[index] - y[index - 1]) / (x[index] - low)
    return y[index - 1] + slope * (at - low), slope


def _rows(values: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(a), float(b)) for a, b in values)
