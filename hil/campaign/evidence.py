"""What a measure is made of: a value with the evidence it rests on, and how events become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hil.campaign import derive
from hil.campaign.record import Event, Record
from hil.model import Span

Value = float | bool | str


class NoEvidence(Exception):
    """The record does not hold what this measure needs."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A value, where it comes from, and the wall spans it was measured in (for the clock rate)."""

    value: Value
    evidence: str
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Measure:
    """A name that a mission's criteria may use; `unit` is empty for true or false."""

    name: str
    unit: str
    definition: str
    of: Callable[[Record], Measured]


def events_of(record: Record, kind: str, where: Callable[[Event], bool] = lambda event: True) -> list[Event]:
    found = [event for event in record.of(kind) if where(event)]
    if not found:
        raise NoEvidence(f"no event `{kind}` in the journal")
    return found


def numbers_of(events: Iterable[Event], name: str) -> list[tuple[float, Event]]:
    found = [(float(event[name]), event) for event in events if event.get(name) is not None]
    if not found:
        raise NoEvidence(f"no event holds `{name}`")
    return found


def extreme(pairs: Sequence[tuple[float, Event]], pick: Callable[..., Any], what: str) -> Measured:
    # Comparisons with a NaN would hide it behind any other value.
    broken = [pair for pair in pairs if not np.isfinite(pair[0])]
    value, event = broken[0] if broken else pick(pairs, key=lambda pair: pair[0])
    times = tuple(span_of(item) for _, item in pairs)
    return Measured(
        value, f"{what} of {len(pairs)} ({event.kind}), at mission time {clock_text(event.t_mission)}", times
    )


def span_of(event: Event) -> Span:
    if event.kind == "query":
        return Span(float(event["t_send_mono"]), float(event["t_last_mono"]))
    if event.kind == "boot":
        took = max((float(event[name]) for name in ("login_s", "ssh_s") if event.get(name) is not None), default=0.0)
        return Span(event.t_mono - took, event.t_mono)
    return derive.event_span(event)


def clock_text(mission_s: float | None) -> str:
    if mission_s is None or not np.isfinite(mission_s):
        return "unknown"
    whole = round(mission_s)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def counted(events: Sequence[Event], what: str) -> Measured:
    return Measured(float(len(events)), f"{what}: {len(events)}", tuple(span_of(event) for event in events))


def must_have_ended(record: Record) -> None:
    """A count of zero is evidence only if the record was kept to the end of the flight."""
    if not record.of("flight_ended"):
        raise NoEvidence("the flight has no end in the journal: nothing can be said to have never happened")
