"""Measures of endurance steps (`cruise`, `duty_cycle`) and of what a lab's own programs report (`run`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hil.campaign import derive
from hil.campaign.evidence import Measure, Measured, NoEvidence, Value, counted, events_of, extreme, numbers_of
from hil.campaign.record import Event, Record
from hil.inference import metrics
from hil.model import Span

REPORTED = "reported"
STATISTICS = ("last", "min", "max", "count", "p95", "all")


# --- what a program reports -------------------------------------------------------------------------------------------


def reported(name: str, statistic: str, unit: str) -> Measure:
    """The measure `reported.NAME.STATISTIC`, whose `unit` the mission's run step declares."""
    own = {"count": "values", "all": ""}.get(statistic, unit)
    return Measure(
        f"{REPORTED}.{name}.{statistic}",
        own,
        f"{statistic} of what a program reported as {name}",
        lambda record: _reported(record, name, statistic, unit),
    )


def split_reported(measure: str) -> tuple[str, str] | None:
    """Name and statistic of a `reported.NAME.STATISTIC`; None for any other text."""
    family, _, rest = measure.partition(".")
    name, _, statistic = rest.rpartition(".")
    return (name, statistic) if family == REPORTED and name and statistic in STATISTICS else None


def _reported(record: Record, name: str, statistic: str, unit: str) -> Measured:
    if statistic == "count":
        found = record.of(REPORTED)
        if not found and not record.of("run_done"):
            raise NoEvidence("no program was run to its end")
        return counted([event for event in found if event["name"] == name], f"values of {name}")
    events = events_of(record, REPORTED, lambda event: event["name"] == name)
    other = sorted({str(event["unit"]) for event in events} - {unit})
    if other:
        raise NoEvidence(f"{name} was reported in {', '.join(other)}, not in {unit or 'no unit'}")
    values: list[Value] = [event["value"] for event in events]
    spans = tuple(derive.event_span(event) for event in events)
    evidence = f"{statistic} of {len(values)} values that {', '.join(sorted({e['run'] for e in events}))} reported"
    return Measured(_statistic(values, statistic, name), evidence, spans)


def _statistic(values: Sequence[Value], statistic: str, name: str) -> Value:
    if statistic == "last":
        return values[-1]
    if statistic == "all":
        return all(value is True for value in values)
    if any(isinstance(value, bool | str) for value in values):
        raise NoEvidence(f"{name} is not a number: it has no {statistic}")
    numbers = [float(value) for value in values]
    # Comparisons with a NaN would hide it behind any other value.
    if any(math.isnan(number) for number in numbers):
        return math.nan
    if statistic == "p95":
        return metrics.quantile(numbers, 0.95)
    return min(numbers) if statistic == "min" else max(numbers)


# --- cruise and duty cycle --------------------------------------------------------------------------------------------


def _sum(kind: str, name: str, what: str) -> Callable[[Record], Measured]:
    def of(record: Record) -> Measured:
        events = events_of(record, kind)
        total = sum(value for value, _ in numbers_of(events, name))
        return Measured(total, f"{what} in {len(events)} {kind} steps", tuple(derive.event_span(e) for e in events))

    return of


def _pick(kind: str, name: str, pick: Callable[..., Any], what: str) -> Callable[[Record], Measured]:
    return lambda record: extreme(numbers_of(events_of(record, kind), name), pick, what)


def _cruise_soc_min(record: Record) -> Measured:
    spans = [derive.event_span(event) for event in events_of(record, "cruise")]
    inside = derive.within(record.power.t_mono, spans)
    soc = record.power.soc[inside]
    if not np.any(np.isfinite(soc)):
        raise NoEvidence("no sample of the state of charge while cruising")
    return Measured(float(np.nanmin(soc)), f"lowest of {len(soc)} samples (modelled battery)", tuple(spans))


def _cruise_soc_drop(record: Record) -> Measured:
    events = events_of(record, "cruise")
    return extreme([(float(e["soc_start"]) - float(e["soc_end"]), e) for e in events], max, "largest loss")


def _restored(record: Record) -> Measured:
    events = events_of(record, "cruise")
    good = [event for event in events if event["sheds"] == event["boots_after_shed"]]
    sheds = sum(int(event["sheds"]) for event in events)
    return Measured(
        len(good) == len(events), f"{sheds} sheds; boots to login after each of them in {len(good)} cruises"
    )


def _cuts(record: Record) -> Measured:
    cuts = events_of(record, "run_cut")
    good = [event for event in cuts if event["while_running"] is True]
    return Measured(float(len(good)), f"{len(good)} of {len(cuts)} power cuts met a program that was running")


def _burst_rate_spread(record: Record) -> Measured:
    events = [event for event in events_of(record, "burst") if float(event["wall_s"]) > 0]
    rates = [float(event["tokens"]) / float(event["wall_s"]) for event in events]
    if len(rates) < 2 or not np.mean(rates):
        raise NoEvidence("a spread needs two bursts with tokens")
    spread = (max(rates) - min(rates)) / float(np.mean(rates))
    return Measured(
        spread, f"{min(rates):.2f} to {max(rates):.2f} tokens/s", tuple(derive.event_span(e) for e in events)
    )


# --- queries under an admission rule ----------------------------------------------------------------------------------


def _admitted(record: Record) -> tuple[list[Event], list[Event]]:
    """Queries that the admission rule let through, and those of them that lost the signal."""
    answered = [event for event in record.of("query") if event.get("predicted_s") is not None]
    lost = [event for event in record.of("query_lost") if event.get("predicted_s") is not None]
    if not answered and not lost:
        raise NoEvidence("no query was subject to an admission rule")
    late = [event for event in answered if event["link_up_throughout"] is not True]
    return answered + lost, late + lost


def _false_admits(record: Record) -> Measured:
    admitted, late = _admitted(record)
    return Measured(len(late) / len(admitted), f"{len(late)} of {len(admitted)} admitted queries lost the signal")


def _query_p95(record: Record) -> Measured:
    events = events_of(record, "query", lambda event: event.get("plane", "payload") == "payload")
    took = [float(event["t_last_mono"]) - float(event["t_send_mono"]) for event in events]
    spans = tuple(Span(float(e["t_send_mono"]), float(e["t_last_mono"])) for e in events)
    return Measured(metrics.quantile(took, 0.95), f"nearest rank of {len(took)} queries", spans)


def _answer_bytes(record: Record) -> Measured:
    events = events_of(record, "query")
    return extreme([(float(len(str(event["answer"]).encode())), event) for event in events], max, "longest answer")


MEASURES = (
    Measure("query.duration_s.p95", "s", "95 % of the queries took at most this long (nearest rank).", _query_p95),
    Measure(
        "query.false_admits_share",
        "1",
        "Queries that the admission rule let start and that lost the signal all the same, over all that it let start.",
        _false_admits,
    ),
    Measure("query.answer_bytes.max", "B", "Longest answer, as UTF-8.", _answer_bytes),
    Measure("run.cuts", "cuts", "Power cuts in the middle of a program of a run step.", _cuts),
    Measure("cruise.orbits", "orbits", "Orbits flown by cruise steps.", _sum("cruise", "orbits", "orbits")),
    Measure("cruise.sheds", "cuts", "Times the load was shed while cruising.", _sum("cruise", "sheds", "load sheds")),
    Measure(
        "cruise.restored_ok", "", "After every load shed of a cruise the board booted to login by itself.", _restored
    ),
    Measure("cruise.soc_min", "1", "Lowest state of charge while cruising (modelled battery).", _cruise_soc_min),
    Measure(
        "cruise.shutdown_margin_s.min",
        "s",
        "Shortest time from an orderly shutdown to the eclipse that it was for.",
        _pick("shut_down", "before_eclipse_s", min, "shortest"),
    ),
    Measure(
        "cruise.resume_s.max",
        "s",
        "Longest time from sunrise to a board that works again: boot, and the model loaded if it is to infer.",
        _pick("resumed", "resume_s", max, "longest"),
    ),
    Measure(
        "cruise.soc_drop.max",
        "1",
        "Largest loss of charge from a cruise's start to its end (modelled battery).",
        _cruise_soc_drop,
    ),
    Measure(
        "duty.bursts",
        "bursts",
        "Bursts that the thermal model ended.",
        lambda r: counted(events_of(r, "burst"), "bursts"),
    ),
    Measure("duty.on_s.min", "s", "Shortest burst.", _pick("burst", "wall_s", min, "shortest")),
    Measure("duty.on_s.max", "s", "Longest burst.", _pick("burst", "wall_s", max, "longest")),
    Measure("duty.rest_s.max", "s", "Longest rest before a burst.", _pick("burst", "rest_s", max, "longest")),
    Measure(
        "duty.stop_s.max",
        "s",
        "Longest time from the thermal model's stop until the answer under way was dropped.",
        _pick("burst", "stop_s", max, "longest"),
    ),
    Measure("duty.tokens.min", "tokens", "Fewest tokens of a burst.", _pick("burst", "tokens", min, "fewest")),
    Measure(
        "duty.tokens_rate_spread",
        "1",
        "Difference between the fastest and the slowest burst in tokens a second, over their mean.",
        _burst_rate_spread,
    ),
)
