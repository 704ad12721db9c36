"""Values that verdict and report both derive from a record: who drew what when, in which light, through which link."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hil.campaign.record import Event, Floats, Record, spans
from hil.inference import metrics
from hil.model import Direction, Span

ON = "on"
SUN, ECLIPSE, PENUMBRA = "sun", "eclipse", "penumbra"
_MARGIN_S = 1.0  # a supply's current reading lags; samples this close to a change belong to neither side


@dataclass(frozen=True, slots=True)
class Inference:
    """One stretch of wall time in which the board generated tokens; `tokens` as the client counted them."""

    span: Span
    tokens: int


@dataclass(frozen=True, slots=True)
class PerPhase:
    """Energy and tokens of inference in one light: sun, penumbra or eclipse; joules are wall joules."""

    phase: str
    seconds: float
    energy_j: float
    tokens: int

    @property
    def j_per_token(self) -> float | None:
        return self.energy_j / self.tokens if self.tokens else None


def event_span(event: Event, label: str = "") -> Span:
    """The wall interval an event reports about: from `t_start_mono`, for `wall_s`, or the `wall_s` before it."""
    wall = float(event.get("wall_s", 0.0))
    start = float(event.get("t_start_mono", event.t_mono - wall))
    return Span(start, float(event.get("t_end_mono", start + wall)), label or event.kind)


def steps(record: Record) -> list[Span]:
    """Wall spans of the mission's steps; one that never finished ends with the record."""
    last = end_s(record)
    found = []
    for started in record.of("step_started"):
        ends = [e.t_mono for e in record.of("step_finished") if e["index"] == started["index"]]
        found.append(Span(started.t_mono, min(ends, default=last), str(started["step"])))
    return found


def end_s(record: Record) -> float:
    """Monotonic time of the last thing in the record."""
    times = [event.t_mono for event in record.events[-1:]]
    times += [float(record.power.t_mono[-1])] if len(record.power.t_mono) else []
    return max(times, default=0.0)


def inference(record: Record) -> list[Inference]:
    """Streamed queries (first byte up to last byte down) and stretches of continuous load, oldest first."""
    found = [
        Inference(Span(float(e["t_send_mono"]), float(e["t_last_mono"]), f"query {e['id']}"), int(e["tokens"]))
        for e in record.of("query")
    ]
    found += [Inference(event_span(e, "load"), int(e["tokens"])) for e in record.of("inference_load")]
    return sorted(found, key=lambda item: item.span.start_s)


def within(t_s: Floats, intervals: list[Span], margin_s: float = 0.0) -> NDArray[np.bool_]:
    """Which times lie in any interval, each widened by `margin_s` (narrowed when negative)."""
    inside = np.zeros(len(t_s), dtype=np.bool_)
    for item in intervals:
        inside |= (t_s >= item.start_s - margin_s) & (t_s < item.end_s + margin_s)
    return inside


def powered(record: Record) -> NDArray[np.bool_]:
    """Samples of an output that was on throughout.

    A sample is labelled with the loop's state at the end of its tick, its reading was taken at the beginning: the first
    sample after switching on still shows the output as it was before.
    """
    on: NDArray[np.bool_] = record.power.state == ON
    on[1:] &= on[:-1].copy()
    on[:1] = False
    return on


def inference_samples(record: Record) -> NDArray[np.bool_]:
    """Power samples well inside of inference."""
    active = [item.span for item in inference(record)]
    return powered(record) & within(record.power.t_mono, active, -_MARGIN_S)


def idle_samples(record: Record) -> NDArray[np.bool_]:
    """Power samples of a board whose model is loaded and that nobody asks anything.

    Journalled `idle` stretches when there are any; otherwise what follows a ready model server until the power is cut,
    without inference and without the steps that keep the board busy in other ways, each widened by a second.
    """
    t_s = record.power.t_mono
    declared = [event_span(event) for event in record.of("idle")]
    if declared:
        return powered(record) & within(t_s, declared)
    cuts = [event.t_mono for event in record.of("load_shed", "board_off")]
    ready = [
        Span(event.t_mono + _MARGIN_S, min((cut for cut in cuts if cut > event.t_mono), default=np.inf))
        for event in record.of("serve_ready")
    ]
    busy = [item.span for item in inference(record)]
    busy += [step for step in steps(record) if step.label in _BUSY_STEPS]
    return powered(record) & within(t_s, ready) & ~within(t_s, busy, _MARGIN_S)


_BUSY_STEPS = ("boot", "upload", "serve", "loss_of_signal", "eclipse", "end")


def light(sunlit: Floats) -> NDArray[np.str_]:
    """Phase of each sample from the visible share of the Sun's disc."""
    partly = np.where(sunlit <= 0.001, ECLIPSE, PENUMBRA)
    return np.where(sunlit >= 0.999, SUN, partly)


def per_phase(record: Record) -> list[PerPhase]:
    """Inference energy and tokens by light; energy is integrated from the raw samples, tokens counted as they came."""
    power, tokens = record.power, record.tokens
    phases = light(power.sunlit)
    totals: dict[str, list[float]] = {}
    for phase in (SUN, PENUMBRA, ECLIPSE):
        for first, last in spans(phases == phase):
            # A phase lasts until the first sample of the next one.
            until = power.t_mono[last + 1] if last + 1 < len(power.t_mono) else power.t_mono[last]
            for item in inference(record):
                start, end = max(power.t_mono[first], item.span.start_s), min(until, item.span.end_s)
                joules = metrics.energy_j(power.t_mono, power.power_w, start, end) if end > start else None
                if joules is None:
                    continue
                counted = tokens.n[(tokens.t_mono >= start) & (tokens.t_mono < end + 1e-9)]
                sums = totals.setdefault(phase, [0.0, 0.0, 0.0])
                for index, value in enumerate((end - start, joules, float(np.sum(counted)))):
                    sums[index] += value
    return [PerPhase(phase, seconds, joules, round(count)) for phase, (seconds, joules, count) in totals.items()]


def applied(record: Record, direction: Direction) -> tuple[Floats, Floats, Floats]:
    """When each state of one direction was in force, its rate in bit/s (0 in an outage) and its delay in seconds."""
    link = record.link
    mine = link.direction == direction
    since = np.where(np.isfinite(link.acknowledged_s), link.acknowledged_s, link.t_mono)[mine]
    rate = np.where((link.outage[mine] > 0) | (link.loss[mine] >= 1), 0.0, link.rate_bps[mine])
    order = np.argsort(since, kind="stable")
    return since[order], rate[order], link.delay_s[mine][order]


def capacity_bits(record: Record, direction: Direction, span: Span) -> float | None:
    """Bits that the emulated link could have carried within a wall span; None before its first known state."""
    pieces = _pieces(record, direction, span)
    return None if pieces is None else float(np.sum(pieces[0] * pieces[1]))


def open_s(record: Record, direction: Direction, span: Span) -> float | None:
    """Wall seconds of a span in which the emulated link carried anything; None before its first known state."""
    pieces = _pieces(record, direction, span)
    return None if pieces is None else float(np.sum(pieces[0][pieces[1] > 0]))


def _pieces(record: Record, direction: Direction, span: Span) -> tuple[Floats, Floats] | None:
    """Durations and rates of the link's states within a wall span."""
    since, rate, _ = applied(record, direction)
    if len(since) == 0 or since[0] > span.end_s:
        return None
    borders = np.concatenate(([span.start_s], since[(since > span.start_s) & (since < span.end_s)], [span.end_s]))
    at = np.searchsorted(since, borders[:-1], side="right") - 1
    # Before the first row the emulator's state is unknown: it counts as closed, which can only raise the share used.
    rates = np.where(at >= 0, rate[np.maximum(at, 0)], 0.0)
    return np.diff(borders), rates


def crossed_bytes(record: Record, direction: Direction) -> float | None:
    """Bytes that left the emulator's queue in one direction, from its own counters; None without two readings."""
    counted = record.qdisc.sent_bytes[record.qdisc.direction == direction]
    return metrics.gained(counted) if len(counted) >= 2 else None
