"""Which acceptance criteria a bench can show, and why not the others: before a flight, from mission and bench alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hil.campaign import behind_array
from hil.campaign.evidence import NoEvidence
from hil.campaign.measures import find, steps_for
from hil.campaign.measures_steps import split_reported
from hil.campaign.measures_timeline import OF_TIMELINE
from hil.campaign.verdict import limit_text, within
from hil.inventory.mission import CriterionSpec, MissionFile
from hil.inventory.mission_steps import RunStep, Step
from hil.mission.timeline import Timeline

# Their clock is fast in one part and real in another: which counts shows only in the flight.
_MIXED = frozenset({"eclipse", "cruise"})


@dataclass(frozen=True, slots=True)
class Outlook:
    """What can be said of a criterion before the flight. `ok` None: the flight will tell."""

    name: str
    ok: bool | None
    why: str


def outlook(
    file: MissionFile, features: frozenset[str], timeline: Timeline, *, on_array: bool = False
) -> list[Outlook]:
    """One line a criterion. Those of the compiled orbit are judged already. `on_array`: the board's battery is real."""
    return [_of(spec, file, features, timeline, on_array) for spec in file.criteria]


def _of(
    spec: CriterionSpec, file: MissionFile, features: frozenset[str], timeline: Timeline, on_array: bool
) -> Outlook:
    if find(spec.measure, file.reports) is None:
        return Outlook(spec.name, False, f"there is no measure {spec.measure}")
    unseen = behind_array.lacking(spec.measure) if on_array else ""
    reason = unseen or next(_reasons(spec, file, features), None)
    if reason:
        return Outlook(spec.name, False, reason)
    if spec.measure in OF_TIMELINE:
        return _computed(spec, timeline)
    return Outlook(spec.name, None, f"{spec.measure} {limit_text(spec)}: the flight will tell")


def _reasons(spec: CriterionSpec, file: MissionFile, features: frozenset[str]) -> Iterator[str]:
    """Why the bench cannot show this criterion, the weightiest reason first."""
    lacking = sorted(set(spec.requires) - features)
    if lacking:
        yield f"the bench has no {', '.join(lacking)}"
    kinds = steps_for(spec.measure)
    able = [step for step in file.steps if not kinds or step.kind in kinds]
    told = split_reported(spec.measure)
    if told is not None:
        able = [step for step in able if step.run is not None and told[0] in step.run.reports]
    if not able:
        yield f"no step gives {spec.measure}; it takes one of {', '.join(kinds)}"
    flown = [step for step in able if step.run is None or features.issuperset(step.run.requires)]
    if able and not flown:
        lacking = sorted({name for step in able for name in _requires(step.run)} - features)
        yield f"its step is left out: the bench has no {', '.join(lacking)}"
    rates = {_rate(step) for step in flown if step.kind not in _MIXED}
    if spec.clock_rate is not None and kinds and flown and rates and not _any_close(rates, spec.clock_rate):
        found = ", ".join(f"{rate:g}" for rate in sorted(rates))
        yield f"it counts only at clock rate {spec.clock_rate:g}, its step runs at {found}"


def _requires(step: RunStep | None) -> tuple[str, ...]:
    return () if step is None else step.requires


def _rate(step: Step) -> float:
    """The clock rate of a step; those that cannot be scaled have no key for it."""
    return float(getattr(getattr(step, step.kind), "clock_rate", 1.0))


def _any_close(rates: set[float], wanted: float) -> bool:
    return any(math.isclose(rate, wanted, rel_tol=1e-9) for rate in rates)


def _computed(spec: CriterionSpec, timeline: Timeline) -> Outlook:
    unit, _, of = OF_TIMELINE[spec.measure]
    try:
        value, evidence = of(timeline)
    except NoEvidence as lack:
        return Outlook(spec.name, False, str(lack))
    told = f"{spec.measure} is {value:.6g}{'' if unit == '1' else f' {unit}'}, {limit_text(spec)}; {evidence}"
    return Outlook(spec.name, within(spec, value), told)
