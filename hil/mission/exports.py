"""Writes a compiled timeline to a file in the format that its name ends with, for people, plots and other emulators.

`hil.mission.exports.write(timeline, path)` is the one door; `SUFFIXES` lists the formats. docs/missions.md describes
every column.

Facts of other tools' formats, as of 2026: ION's `ionrc(5)` (contact plans: whole seconds, bytes per second, one way
each; ranges in light seconds, both ways when the lower node number comes first), uD3TN's JSON configuration messages
(DTN seconds since 2000-01-01 UTC, bytes per second), TheaterQ's extended trace lines (KEEP us, LATENCY ns, JITTER ns,
RATE bit/s, LOSS of 2**32 - 1, LIMIT packets, duplicates, ROUTE_ID).
"""

from __future__ import annotations

import csv
import io
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from hil.errors import UsageError
from hil.mission import timeline_file
from hil.mission.compile import compile_timeline
from hil.mission.radio import DIRECTIONS, LINK_EDGES
from hil.mission.solar_array import sas_rows
from hil.mission.timeline import AXES, Timeline
from hil.model import Direction, LinkState, Span

SATELLITE_NODE = 1  # the stations follow from 2 on, in the mission's order
_DTN_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_TRACE_STEP_S = 1.0
_FRAME_BYTES = 1_514
_MIN_BUFFER, _BUFFER_S = 256, 0.25
_U32_MAX = 2**32 - 1


def write(timeline: Timeline, path: Path) -> None:
    """Write `timeline` to `path`. Raises UsageError for a suffix that no format has, or a file that cannot be written.

    The longest suffix of `SUFFIXES` that the name ends with decides: `day.edges.csv` is a list of edges.
    """
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            try:
                if suffix == ".npz":
                    timeline_file.save(timeline, path)
                else:
                    path.write_text(_TEXTS[suffix](timeline), encoding="utf-8")
            except OSError as error:
                raise UsageError(f"cannot write {path}: {error.strerror}") from error
            return
    raise UsageError(f"{path}: unknown format", hint=f"end the name with one of {', '.join(SUFFIXES)}")


def timeline_csv(timeline: Timeline) -> str:
    """The columns over `t_s` as CSV text with a header; empty cells outside contacts."""
    names = ("t_s", *AXES["t_s"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("utc", *names))
    for row in zip(*(getattr(timeline, name).tolist() for name in names), strict=True):
        cells = ("" if value != value else f"{value:.9g}" for value in row[1:])
        writer.writerow((timeline.utc(row[0]), f"{row[0]:.6f}", *cells))
    return text.getvalue()


def edges_csv(timeline: Timeline) -> str:
    """Every edge and every scheduled fault as CSV: `utc`, `t_s`, `kind`, `detail`."""
    rows = [(edge.t_s, edge.kind, edge.detail) for edge in timeline.edges]
    rows += [
        (fault.t_s, "fault", f"{fault.kind}{' in the anomaly' if fault.in_saa else ''}") for fault in timeline.faults
    ]
    return _csv(
        ("utc", "t_s", "kind", "detail"),
        ((timeline.utc(t_s), f"{t_s:.6f}", kind, detail) for t_s, kind, detail in sorted(rows, key=lambda row: row[0])),
    )


def trace_csv(timeline: Timeline) -> str:
    """Both directions of the link as an emulator would play them; every row holds until the next one.

    Columns: `time_s`, then for uplink and downlink `_delay_s`, `_jitter_s`, `_loss` (1 in an outage), `_rate_bps` (0 in
    an outage), `_up` (1 or 0). Rows at every change and, in contacts, once a second: the delay drifts by 25 us at most.
    """
    columns = [
        f"{direction}_{name}" for direction in DIRECTIONS for name in ("delay_s", "jitter_s", "loss", "rate_bps", "up")
    ]

    def rows() -> Iterator[tuple[str, ...]]:
        for t_s, states in _played(timeline, DIRECTIONS):
            cells = [f"{t_s:.6f}"]
            for state in states:
                cells += [f"{state.delay_s:.9f}", f"{state.jitter_s:.9f}", f"{state.effective_loss:.9g}"]
                cells += [f"{state.rate_bps:.3f}", str(int(not state.outage))]
            yield tuple(cells)

    return _csv(("time_s", *columns), rows())


def theaterq(timeline: Timeline, direction: Direction) -> str:
    """One direction as a TheaterQ trace (`ingest EXTENDED`).

    The route is always 1, so that a delay that shrinks reorders nothing.
    """
    lines = [
        f"# {timeline.environment.name} {direction}, timeline {timeline.hash}",
        "# keep_us,latency_ns,jitter_ns,rate_bps,loss_u32,limit_packets,dup_prob_u32,dup_delay_ns,route_id",
    ]
    rows = [(round(t_s * 1e6), state) for t_s, (state,) in _played(timeline, (direction,))]
    end_us = round(timeline.duration_s * 1e6)
    for (from_us, state), to_us in zip(rows, [*(us for us, _ in rows[1:]), end_us], strict=True):
        if to_us > from_us:
            delay_ns, jitter_ns = round(state.delay_s * 1e9), round(state.jitter_s * 1e9)
            loss = round(state.effective_loss * _U32_MAX)
            values = (to_us - from_us, delay_ns, jitter_ns, round(state.rate_bps), loss, _queue_packets(state), 0, 0, 1)
            lines.append(",".join(map(str, values)))
    return "\n".join(lines) + "\n"


def sas_csv(timeline: Timeline) -> str:
    """The array as a hardware solar-array simulator takes it: `utc`, `t_s`, `voc_v`, `isc_a`, `vmp_v`, `imp_a`.

    Linear between rows. Raises UsageError when the mission has no array, or the array no curve.
    """
    power = timeline.environment.power
    if power is None:
        raise UsageError(f"mission {timeline.environment.name} has no power section, hence no array")
    rows = zip(timeline.t_s.tolist(), sas_rows(power.array, timeline.array_w).tolist(), strict=True)
    return _csv(
        ("utc", "t_s", "voc_v", "isc_a", "vmp_v", "imp_a"),
        ((timeline.utc(t_s), f"{t_s:.6f}", *(f"{value:.6g}" for value in row)) for t_s, row in rows),
    )


@dataclass(frozen=True, slots=True)
class PlannedContact:
    """One direction at one rate over one station, in whole mission seconds that lie within the real ones."""

    start_s: int
    end_s: int
    station: str
    direction: Direction
    rate_bps: float


def contact_plan(timeline: Timeline) -> tuple[PlannedContact, ...]:
    """What is known beforehand: contacts, their rates and scheduled outages; neither fades nor random outages.

    A router plans with this; what the link box does to it afterwards is the test.
    """
    planned = _without_chance(timeline)
    spans = _spans(planned)
    starts = [span.start_s for span in spans]
    found = []
    for direction in DIRECTIONS:
        t_s = [*getattr(planned, f"{direction}_step_t_s").tolist(), planned.duration_s]
        rates = getattr(planned, f"{direction}_step_bps").tolist()
        for (low, high), rate_bps in zip(pairwise(t_s), rates, strict=True):
            start_s, end_s = math.ceil(max(low, 0.0)), math.floor(min(high, planned.duration_s))
            if rate_bps > 0 and start_s < end_s:
                station = spans[bisect_right(starts, low) - 1].label
                found.append(PlannedContact(start_s, end_s, station, direction, rate_bps))
    return tuple(sorted(found, key=lambda item: (item.start_s, item.direction, item.station)))


def ion_contact_plan(timeline: Timeline) -> str:
    """Commands for ION's `ionadmin`. Times are relative to its reference time; a comment says how to pin them."""
    nodes = _nodes(timeline)
    lines = [
        f"# {timeline.environment.name}, timeline {timeline.hash}",
        f"# mission second 0 is {timeline.start:%Y/%m/%d-%H:%M:%S} UTC; to pin the plan to it put this before it:",
        f"# @ {timeline.start:%Y/%m/%d-%H:%M:%S}",
        f"# node {SATELLITE_NODE}: the satellite",
        *(f"# node {node}: {station}" for station, node in nodes.items()),
    ]
    for item in contact_plan(timeline):
        ends = (nodes[item.station], SATELLITE_NODE)
        source, target = ends if item.direction == "uplink" else ends[::-1]
        if item.rate_bps >= 8:
            lines.append(f"a contact +{item.start_s} +{item.end_s} {source} {target} {math.floor(item.rate_bps / 8)}")
    for span in _spans(timeline):
        start_s, end_s = max(math.floor(span.start_s), 0), math.ceil(min(span.end_s, timeline.duration_s))
        # one second at least: a light time of 0 is not one that a router can plan with
        light_s = max(1, math.ceil(max(map(timeline.delay_at, _instants(span)))))
        lines.append(f"a range +{start_s} +{end_s} {SATELLITE_NODE} {nodes[span.label]} {light_s}")
    return "\n".join(lines) + "\n"


def ud3tn_json(timeline: Timeline) -> str:
    """A list of {`configure`: the node to be told, `message`: a uD3TN configuration message}, one a pair of nodes.

    `cla_addr`, the neighbour's transport address, is the lab's and must be added to each message.
    """
    nodes = _nodes(timeline)
    plan = contact_plan(timeline)
    base_s = round((timeline.start - _DTN_EPOCH).total_seconds())
    told: list[dict[str, Any]] = []
    for station, node in nodes.items():
        for direction, sender, receiver in (("uplink", node, SATELLITE_NODE), ("downlink", SATELLITE_NODE, node)):
            contacts = [
                {
                    "start": base_s + item.start_s,
                    "end": base_s + item.end_s,
                    "data_rate": math.floor(item.rate_bps / 8),
                    "reachable_eids": [],
                }
                for item in plan
                if item.station == station and item.direction == direction and item.rate_bps >= 8
            ]
            message = {"command": "ADD", "node_id": f"ipn:{receiver}.0", "contact_list": contacts}
            if contacts:
                told.append({"configure": f"ipn:{sender}.0", "message": message})
    return json.dumps(told, indent=1) + "\n"


_TEXTS: dict[str, Callable[[Timeline], str]] = {
    ".csv": timeline_csv,
    ".edges.csv": edges_csv,
    ".trace.csv": trace_csv,
    ".uplink.theaterq.csv": lambda timeline: theaterq(timeline, "uplink"),
    ".downlink.theaterq.csv": lambda timeline: theaterq(timeline, "downlink"),
    ".ion.contactplan": ion_contact_plan,
    ".ud3tn.json": ud3tn_json,
    ".sas.csv": sas_csv,
}
SUFFIXES = (".npz", *_TEXTS)


def _played(timeline: Timeline, directions: Iterable[Direction]) -> Iterator[tuple[float, tuple[LinkState, ...]]]:
    """The instants at which something changes, each with the states from then on; in contacts once a second."""
    wanted = tuple(directions)
    times = {0.0, *(edge.t_s for edge in timeline.edges if edge.kind in LINK_EDGES)}
    for span in _spans(timeline):
        times.update(_instants(span))
    before: tuple[LinkState, ...] | None = None
    for t_s in sorted(t for t in times if 0.0 <= t < timeline.duration_s):
        link = timeline.link_at(t_s)
        states = tuple(link[direction] for direction in wanted)
        if states != before:
            yield t_s, states
        before = states


def _queue_packets(state: LinkState) -> int:
    """Full frames in flight and a quarter of a second of them in the bottleneck's buffer."""
    frames_per_s = state.rate_bps / (8 * _FRAME_BYTES)
    in_flight = math.ceil(frames_per_s * (state.delay_s + state.jitter_s))
    return in_flight + max(_MIN_BUFFER, math.ceil(frames_per_s * _BUFFER_S))


def _without_chance(timeline: Timeline) -> Timeline:
    environment = timeline.environment
    link = environment.link
    if link.random_outages is None and link.uplink.bursts is None and link.downlink.bursts is None:
        return timeline
    calm = replace(
        link,
        random_outages=None,
        uplink=replace(link.uplink, bursts=None),
        downlink=replace(link.downlink, bursts=None),
    )
    return compile_timeline(replace(environment, link=calm, power=None, faults=None, step_s=600.0))


def _spans(timeline: Timeline) -> list[Span]:
    return [span for contact in timeline.contacts for span in contact.spans]


def _nodes(timeline: Timeline) -> dict[str, int]:
    window = timeline.environment.link.window
    names = [station.name for station in timeline.environment.stations] if window is None else [window.label]
    return {name: SATELLITE_NODE + 1 + index for index, name in enumerate(names)}


def _instants(span: Span) -> list[float]:
    """Once a second through a span, its end left out."""
    return [span.start_s + index * _TRACE_STEP_S for index in range(math.ceil(span.duration_s / _TRACE_STEP_S))]


def _csv(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
