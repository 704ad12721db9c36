"""A mission's environment compiled ahead: immutable columns over mission time, root-found edges, a content hash.

`compile_timeline(environment)` is pure and deterministic. Seconds are mission seconds since `environment.start`.

Columns over `t_s` (a regular grid, plus every edge, plus a fine comb through each penumbra; interpolate linearly):
`sunlit_fraction` 0..1, `array_w` at the array's terminals, `beta_deg`, `delay_s` one-way and `elevation_deg` of the
serving station (both nan outside contacts).
Columns over `contact_t_s` (one second apart within each serving span): `contact_range_m`, `contact_elevation_deg`,
`contact_azimuth_deg`, `contact_span` (index of the span; spans follow one another through `contacts` in order).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from hil.errors import UsageError
from hil.mission import frames
from hil.mission.eps import EpsConfig, ShedConfig
from hil.mission.frames import Floats, Station
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.passes import Contact, contact_plan
from hil.mission.radio import OUTAGE, SPEED_OF_LIGHT_M_S, LinkEnvironment, one_way_delay_s
from hil.mission.shadow import Eclipse, find_eclipses, plane_angle_deg, visible_fraction
from hil.mission.solar_array import ArrayConfig
from hil.mission.sun import AU_KM
from hil.model import Direction, LinkState, Span

FORMAT = 1  # raise it when a column's meaning changes: it is part of the hash and of the file
EDGE_KINDS = ("penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit", "los", "aos", "handover", "rate")
_PENUMBRA_COMB = 32
_CONTACT_STEP_S = 1.0
_SAME_S = 1e-6  # edges nearer than this are one row of the columns
# quanta of the content hash: far coarser than the last-bit differences between machines, far finer than a setpoint
_HASH_QUANTA = {"sunlit_fraction": 1e-4, "beta_deg": 1e-3, "contact_range_m": 10.0, "edge_s": 1e-3}


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", frames.utc(self.start))
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
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MissionEnvironment:
        """Inverse of `as_dict`, also after a round trip through JSON."""
        power = values["power"]
        return cls(
            name=values["name"],
            orbit=Orbit.from_dict(values["orbit"]),
            stations=tuple(Station(**{**s, "mask_table": _rows(s["mask_table"])}) for s in values["stations"]),
            start=datetime.fromisoformat(values["start"]),
            duration_s=values["duration_s"],
            link=LinkEnvironment(**values["link"]),
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
        )


@dataclass(frozen=True, slots=True)
class Edge:
    """An instant at which the environment changes its nature. `detail` names the station of a radio edge.

    `rate` marks a change of the usable rate: the end of acquisition after AOS or a handover.
    """

    t_s: float
    kind: str
    detail: str = ""


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
    edges: tuple[Edge, ...]
    contacts: tuple[Contact, ...]
    eclipses: tuple[Eclipse, ...]
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
        """Both directions at a mission time. Outage outside contacts and until the modem has locked.

        `rate_scale` multiplies the rates: pass the clock's rate, so that a contact carries the same bytes. Delay and
        loss never scale.
        """
        fast = self._fast
        index = bisect_right(fast.span_start, t_s) - 1
        if index < 0 or t_s >= fast.span_end[index] or t_s < fast.span_locked[index]:
            return {"uplink": OUTAGE, "downlink": OUTAGE}
        link = self.environment.link
        delay_s = one_way_delay_s(_interpolate(fast.contact_t, fast.contact_range, t_s), link.processing_s)
        return {
            "uplink": LinkState(delay_s, link.jitter_s, link.uplink_loss, link.uplink_bps * rate_scale),
            "downlink": LinkState(delay_s, link.jitter_s, link.downlink_loss, link.downlink_bps * rate_scale),
        }

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
        if kinds is not None and not set(kinds) <= set(EDGE_KINDS):
            raise UsageError(f"unknown edge kind in {sorted(kinds)}", hint=f"kinds are {', '.join(EDGE_KINDS)}")
        for edge in self.edges[bisect_right(self._fast.edge_t, t_s) :]:
            if kinds is None or edge.kind in kinds:
                return edge
        return None

    def save(self, path: Path) -> None:
        """Write an .npz: the columns, and `meta` (JSON as bytes) with environment, edges, contacts, eclipses, hash."""
        meta = {
            "format": FORMAT,
            "hash": self.hash,
            "environment": self.environment.as_dict(),
            "edges": [asdict(edge) for edge in self.edges],
            "contacts": [asdict(contact) for contact in self.contacts],
            "eclipses": [asdict(eclipse) for eclipse in self.eclipses],
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
                columns = {name: np.array(file[name], dtype=np.float64) for name in _COLUMNS}
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
            timeline = cls(
                environment=MissionEnvironment.from_dict(meta["environment"]),
                edges=tuple(Edge(**edge) for edge in meta["edges"]),
                contacts=tuple(
                    Contact(**{**contact, "spans": tuple(Span(**span) for span in contact["spans"])})
                    for contact in meta["contacts"]
                ),
                eclipses=tuple(Eclipse(**eclipse) for eclipse in meta["eclipses"]),
                **columns,
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError(f"{path} is not a timeline: {error}", hint="compile the mission again") from error
        if timeline.hash != meta["hash"]:
            raise UsageError(f"{path} was altered: its hash does not agree", hint="compile the mission again")
        return timeline

    def to_csv(self) -> str:
        """The columns over `t_s` as CSV text with a header; empty cells outside contacts."""
        names = ("t_s", "sunlit_fraction", "array_w", "beta_deg", "delay_s", "elevation_deg")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("utc", *names))
        for row in zip(*(getattr(self, name).tolist() for name in names), strict=True):
            writer.writerow((self.utc(row[0]), *("" if value != value else f"{value:.9g}" for value in row)))
        return text.getvalue()


_COLUMNS = (
    "t_s",
    "sunlit_fraction",
    "array_w",
    "beta_deg",
    "delay_s",
    "elevation_deg",
    "contact_t_s",
    "contact_range_m",
    "contact_elevation_deg",
    "contact_azimuth_deg",
    "contact_span",
)


class _Fast:
    """The columns as plain lists: numpy's scalar access costs more than the bisection itself."""

    __slots__ = (
        "array_w",
        "contact_range",
        "contact_start",
        "contact_t",
        "edge_t",
        "span_end",
        "span_locked",
        "span_start",
        "sunlit",
        "t_s",
    )

    def __init__(self, timeline: Timeline) -> None:
        spans = [span for contact in timeline.contacts for span in contact.spans]
        self.t_s: list[float] = timeline.t_s.tolist()
        self.sunlit: list[float] = timeline.sunlit_fraction.tolist()
        self.array_w: list[float] = timeline.array_w.tolist()
        self.contact_t: list[float] = timeline.contact_t_s.tolist()
        self.contact_range: list[float] = timeline.contact_range_m.tolist()
        self.contact_start = [contact.aos_s for contact in timeline.contacts]
        self.span_start = [span.start_s for span in spans]
        self.span_end = [span.end_s for span in spans]
        self.span_locked = [span.start_s + timeline.environment.link.acquisition_s for span in spans]
        self.edge_t = [edge.t_s for edge in timeline.edges]


def compile_timeline(environment: MissionEnvironment) -> Timeline:
    """Compute the mission's environment. Raises UsageError when the orbit cannot be propagated that far."""
    ephemeris = Ephemeris(environment.orbit, environment.start)
    end_s = environment.duration_s
    contacts = contact_plan(ephemeris, environment.stations, 0.0, end_s, handover=environment.link.handover)
    eclipses = find_eclipses(ephemeris, 0.0, end_s)
    edges = _edges(environment, contacts, eclipses)
    track = _contact_track(ephemeris, environment.stations, contacts)

    t_s = _grid(environment, edges, eclipses)
    position, velocity = ephemeris.teme_km(t_s)
    sun = ephemeris.sun_km(t_s)
    sunlit = visible_fraction(position, sun)
    array_w = np.zeros_like(t_s)
    if environment.power is not None:
        array = environment.power.array
        array_w = array.full_sun_w * sunlit
        if array.distance_scaling:
            array_w = array_w * AU_KM**2 / (sun * sun).sum(axis=1)
    serving = _within_spans(t_s, contacts)
    delay = np.interp(t_s, track["contact_t_s"], track["contact_range_m"]) if contacts else np.zeros_like(t_s)
    elevation = np.interp(t_s, track["contact_t_s"], track["contact_elevation_deg"]) if contacts else delay
    return Timeline(
        environment=environment,
        t_s=t_s,
        sunlit_fraction=sunlit,
        array_w=array_w,
        beta_deg=plane_angle_deg(position, velocity, sun),
        delay_s=np.where(serving, delay / SPEED_OF_LIGHT_M_S + environment.link.processing_s, np.nan),
        elevation_deg=np.where(serving, elevation, np.nan),
        edges=edges,
        contacts=contacts,
        eclipses=eclipses,
        **track,
    )


def _edges(
    environment: MissionEnvironment, contacts: tuple[Contact, ...], eclipses: tuple[Eclipse, ...]
) -> tuple[Edge, ...]:
    found: list[Edge] = []
    for eclipse in eclipses:
        for kind in ("penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit"):
            t_s = getattr(eclipse, f"{kind}_s")
            if t_s is not None:
                found.append(Edge(t_s, kind))
    for contact in contacts:
        found.append(Edge(contact.aos_s, "aos", contact.station))
        found.append(Edge(contact.los_s, "los", contact.spans[-1].label))
        found += [Edge(span.start_s, "handover", span.label) for span in contact.spans[1:]]
        if environment.link.acquisition_s > 0:
            locked = ((span, span.start_s + environment.link.acquisition_s) for span in contact.spans)
            found += [Edge(t_s, "rate", span.label) for span, t_s in locked if t_s < span.end_s]
    order = {kind: index for index, kind in enumerate(EDGE_KINDS)}
    inside = (edge for edge in found if 0.0 <= edge.t_s <= environment.duration_s)
    return tuple(sorted(inside, key=lambda edge: (edge.t_s, order[edge.kind])))


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
    ephemeris: Ephemeris, stations: tuple[Station, ...], contacts: tuple[Contact, ...]
) -> dict[str, Floats]:
    """Range, elevation and azimuth through every serving span, a second apart: linear between rows to 0.05 us."""
    by_name = {station.name: station for station in stations}
    spans = [span for contact in contacts for span in contact.spans]
    times, owner = [], []
    for index, span in enumerate(spans):
        count = max(2, int(np.ceil(span.duration_s / _CONTACT_STEP_S)) + 1)
        comb = np.linspace(span.start_s, span.end_s, count)
        if index + 1 < len(spans) and spans[index + 1].start_s == span.end_s:
            comb[-1] = np.nextafter(span.end_s, -np.inf)  # the next span's first row holds this very instant
        times.append(comb)
        owner.append(np.full(count, float(index)))
    t_s = np.concatenate(times) if times else np.zeros(0)
    span_of = np.concatenate(owner) if owner else np.zeros(0)
    position = ephemeris.itrf_m(t_s)
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


def _within_spans(t_s: Floats, contacts: tuple[Contact, ...]) -> Any:
    inside = np.zeros(t_s.shape, dtype=bool)
    for contact in contacts:
        inside |= (t_s >= contact.aos_s) & (t_s < contact.los_s)
    return inside


def _content_hash(timeline: Timeline) -> str:
    """SHA-256 over the environment (exact) and the results (quantised).

    The environment determines the results, so equal inputs give equal hashes; the results are in it so that a change of
    the code that moves them shows. They are rounded to `_HASH_QUANTA`, because two machines' libm differ in the last
    bit: the chance that such a difference meets a rounding boundary is below one in a thousand for a two-day mission.
    """
    digest = hashlib.sha256(f"hil timeline {FORMAT}\n".encode())
    digest.update(json.dumps(_floats(timeline.environment.as_dict()), sort_keys=True).encode())
    edge_s = np.array([edge.t_s for edge in timeline.edges])
    digest.update("\n".join(f"{edge.kind} {edge.detail}" for edge in timeline.edges).encode())
    for name, quantum in _HASH_QUANTA.items():
        values = edge_s if name == "edge_s" else getattr(timeline, name)
        digest.update(name.encode())
        digest.update(np.rint(values / quantum).astype("<i8").tobytes())
    return digest.hexdigest()


def _floats(value: Any) -> Any:
    """The same value with every number a float: 86400 and 86400.0 in a mission file are one mission."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _interpolate(x: list[float], y: list[float], at: float) -> float:
    at = float(at)  # a numpy scalar is slow here, and would end up in JSON and in LinkState
    index = bisect_right(x, at)
    if index == 0:
        return y[0]
    if index == len(x):
        return y[-1]
    low = x[index - 1]
    return y[index - 1] + (y[index] - y[index - 1]) * (at - low) / (x[index] - low)


def _rows(values: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(a), float(b)) for a, b in values)
