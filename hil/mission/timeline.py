"""A mission's environment compiled ahead, and its look-ups: immutable columns over mission time, root-found edges.

`hil.mission.compile` makes it, `hil.mission.timeline_file` keeps it. Seconds are mission seconds since
`environment.start`.

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

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise

import numpy as np

from hil.errors import UsageError
from hil.mission import frames
from hil.mission.environment import MissionEnvironment
from hil.mission.faults import Fault
from hil.mission.frames import Floats
from hil.mission.linkplan import Edge
from hil.mission.passes import Contact
from hil.mission.radio import OUTAGE, one_way_delay_s
from hil.mission.shadow import Eclipse
from hil.mission.timeline_hash import content_hash
from hil.model import Direction, LinkState, Span

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
# each axis of time and the columns over it
AXES = {
    "t_s": ("sunlit_fraction", "array_w", "beta_deg", "delay_s", "elevation_deg", "uplink_bps", "downlink_bps"),
    "contact_t_s": ("contact_range_m", "contact_elevation_deg", "contact_azimuth_deg", "contact_span"),
    "relay_t_s": ("relay_delay_s",),
    "uplink_step_t_s": ("uplink_step_bps", "uplink_step_loss"),
    "downlink_step_t_s": ("downlink_step_bps", "downlink_step_loss"),
}
COLUMNS = tuple(name for axis, columns in AXES.items() for name in (axis, *columns))


@dataclass(frozen=True, eq=False)
class Timeline:
    """The compiled environment. Made by `compile_timeline` or `timeline_file.load`; never changes."""

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
        for name in COLUMNS:
            getattr(self, name).setflags(write=False)
        object.__setattr__(self, "hash", content_hash(self))
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
