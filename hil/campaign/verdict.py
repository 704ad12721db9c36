"""Turns a mission's acceptance criteria and a run's record into `verdict.json`; only `pass` is green.

Each criterion is judged for itself:
`missing`  the record lacks what the measure needs, or the bench a feature that the criterion requires
`invalid`  it was measured, but at another clock rate than the criterion demands, or the value is not a number
`fail`     the value breaks a bound;  `pass`  it keeps all of them
Two rows of our own say what no criterion can: whether the board misbehaved (`fail`) and whether the bench was in order
(`infra` when it broke or the flight never ended, `invalid` when it could not measure). The run's verdict is the worst
row, in the order fail, infra, invalid, missing, pass: a board's failure is reported even when the bench broke later,
and nothing but a complete record can pass.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hil.campaign.evidence import Measured, NoEvidence, Value
from hil.campaign.measures import MEASURES, find
from hil.campaign.measures_steps import REPORTED, STATISTICS, split_reported
from hil.campaign.record import Record
from hil.errors import ExitCode, UsageError
from hil.inventory.mission import CriterionSpec, MissionFile, read_mission_file
from hil.model import Criterion, Verdict, VerdictFile

WORST_FIRST: tuple[Verdict, ...] = ("fail", "infra", "invalid", "missing", "pass")
NO_REPORTS: Mapping[str, str] = MappingProxyType({})
BOARD_ROW, BENCH_ROW = "board-in-order", "bench-in-order"
_EXIT: dict[Verdict, ExitCode] = {
    "pass": ExitCode.PASS,
    "fail": ExitCode.FAIL,
    "infra": ExitCode.BENCH,
    "invalid": ExitCode.INVALID,
    "missing": ExitCode.INVALID,
}


def mission_of(run: Path) -> MissionFile:
    """The mission as it was copied into the run directory."""
    return read_mission_file(run / "mission.yaml")


def check_criteria(
    criteria: Iterable[CriterionSpec], where: str = "mission", reports: Mapping[str, str] = NO_REPORTS
) -> None:
    """Refuse criteria that can never be judged: unknown measure, other unit, wrong kind of bound. Raises UsageError.

    `reports` are the names and units that the mission's run steps report (`MissionFile.reports`).
    """
    for spec in criteria:
        measure = find(spec.measure, reports)
        if measure is None:
            raise UsageError(
                f"{where}: criterion {spec.name}: no measure {spec.measure!r}", hint=_nearest(spec.measure, reports)
            )
        if spec.unit and spec.unit != measure.unit:
            raise UsageError(
                f"{where}: criterion {spec.name}: {measure.name} is {_kind(measure.unit)}, not {spec.unit}",
                hint=f"write unit: {measure.unit!r}" if measure.unit else "leave the unit out",
            )
        text = isinstance(spec.equals, str) and split_reported(spec.measure) is not None
        truth = (isinstance(spec.equals, bool) or text) and spec.min is None and spec.max is None
        if truth != (not measure.unit):
            raise UsageError(
                f"{where}: criterion {spec.name}: {measure.name} is {_kind(measure.unit)}",
                hint="bound it by min, max or equals" if measure.unit else "write equals: true",
            )


def _nearest(name: str, reports: Mapping[str, str]) -> str:
    own = [f"{REPORTED}.{told}.{statistic}" for told in reports for statistic in STATISTICS]
    near = difflib.get_close_matches(name, [*MEASURES, *own], n=1, cutoff=0.4)
    if split_reported(name) is not None:
        known = ", ".join(reports) or "nothing"
        return f"a run step must name it under `reports`; the mission's programs report {known}"
    return f"did you mean {near[0]!r}? docs/missions.md lists all" if near else "docs/missions.md lists all"


def _kind(unit: str) -> str:
    return f"a number in {unit!r}" if unit else "true or false"


def evaluate(record: Record, criteria: Sequence[CriterionSpec], reports: Mapping[str, str] = NO_REPORTS) -> VerdictFile:
    """Judge every criterion from the record. Without criteria the verdict is `missing`, never `pass`."""
    check_criteria(criteria, reports=reports)
    rows = [_judge(record, spec, reports) for spec in criteria]
    own = [_board_row(record), _bench_row(record)]
    verdict = worst([row.verdict for row in (*rows, *own)]) if rows else worst(["missing", *(r.verdict for r in own)])
    return VerdictFile(verdict=verdict, criteria=(*rows, *own))


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of some verdicts; `missing` when there is none."""
    return next((item for item in WORST_FIRST if item in verdicts), "missing")


def exit_code(verdict: Verdict) -> ExitCode:
    """The exit code a command ends with."""
    return _EXIT[verdict]


def write(path: Path, verdict: VerdictFile) -> None:
    """Write `verdict.json` whole or not at all."""
    text = json.dumps(as_json(verdict), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def as_json(verdict: VerdictFile) -> dict[str, Any]:
    """`verdict.json`'s content, keys in the documented order."""
    return {
        "schema": verdict.schema,
        "verdict": verdict.verdict,
        "criteria": [asdict(row) for row in verdict.criteria],
    }


def _judge(record: Record, spec: CriterionSpec, reports: Mapping[str, str]) -> Criterion:
    measure = find(spec.measure, reports)
    if measure is None:
        raise UsageError(f"criterion {spec.name}: no measure {spec.measure!r}")

    def row(verdict: Verdict, value: Value | None, evidence: str, rate: float | None = None) -> Criterion:
        return Criterion(spec.name, verdict, value, limit_text(spec), measure.unit, rate, evidence)

    lacking = _lacking(record, spec)
    if lacking:
        return row("missing", None, f"the bench has no {', '.join(lacking)}, without which this cannot be shown")
    try:
        measured = measure.of(record)
    except NoEvidence as lack:
        return row("missing", None, str(lack))
    except (KeyError, TypeError, ValueError) as error:
        # A journal that lacks a field it should have is a hole in the evidence, not a crash of the verdict.
        return row("missing", None, f"the record is not as expected: {type(error).__name__}: {error}")
    value = measured.value
    if not isinstance(value, str) and not math.isfinite(value):
        return row("invalid", None, f"not a number; {measured.evidence}")
    rates = _rates(record, measured)
    rate = rates[0] if rates is not None and rates[0] == rates[1] else None
    if spec.clock_rate is not None and (rate is None or not math.isclose(rate, spec.clock_rate, rel_tol=1e-9)):
        found = "at an unknown clock rate" if rates is None else f"at clock rate {_range(*rates)}"
        return row("invalid", value, f"measured {found}, valid only at {spec.clock_rate:g}; {measured.evidence}", rate)
    return row("pass" if within(spec, value) else "fail", value, measured.evidence, rate)


def _lacking(record: Record, spec: CriterionSpec) -> list[str]:
    """Features that the criterion needs and that the record does not say the bench had."""
    board = record.provenance.get("board")
    features = board.get("features", ()) if isinstance(board, dict) else ()
    return [feature for feature in spec.requires if feature not in features]


def _rates(record: Record, measured: Measured) -> tuple[float, float] | None:
    """Lowest and highest clock rate while this was measured; None when unknown or when no time belongs to it."""
    ranges = [record.rates_between(span.start_s, span.end_s) for span in measured.spans]
    known = [item for item in ranges if item is not None]
    if not known or len(known) < len(ranges):
        return None
    return min(low for low, _ in known), max(high for _, high in known)


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def within(spec: CriterionSpec, value: Value) -> bool:
    """Whether a value keeps the criterion's bounds."""
    if isinstance(spec.equals, bool) or isinstance(value, bool):
        return value is spec.equals
    if isinstance(spec.equals, str) or isinstance(value, str):
        return value == spec.equals
    return (
        (spec.min is None or value >= spec.min)
        and (spec.max is None or value <= spec.max)
        and (spec.equals is None or value == spec.equals)
    )


def limit_text(spec: CriterionSpec) -> str:
    """The bound as a person writes it: `>= 2, <= 6`, `= true`."""
    bounds = [f">= {spec.min:.10g}"] if spec.min is not None else []
    bounds += [f"<= {spec.max:.10g}"] if spec.max is not None else []
    if spec.equals is not None:
        told = spec.equals
        bounds.append(
            f"= {str(told).lower() if isinstance(told, bool) else told if isinstance(told, str) else f'{told:.10g}'}"
        )
    return ", ".join(bounds)


def _board_row(record: Record) -> Criterion:
    errors = [event for event in record.of("error") if event.get("arm") == "board"]
    evidence = "; ".join(str(event.get("message", "")) for event in errors) or "no board error in the journal"
    return Criterion(BOARD_ROW, "fail" if errors else "pass", float(len(errors)), "= 0", "errors", None, evidence)


def _bench_row(record: Record) -> Criterion:
    errors = [str(event.get("message", "")) for event in record.of("error") if event.get("arm") != "board"]
    errors += [f"the dead-man died: {event.data}" for event in record.of("deadman") if event.get("alive") is False]
    started, ended = record.of("flight_started"), record.of("flight_ended")
    if not started:
        errors.append("the flight never started")
    elif not ended:
        errors.append("the flight has no end: killed, or the daemon died")
    unmeasured = [str(event.get("reason", "")) for event in record.of("invalid")]
    verdict: Verdict = "infra" if errors else "invalid" if unmeasured else "pass"
    evidence = "; ".join(errors + unmeasured) or "no bench error, the flight was ended in order"
    return Criterion(BENCH_ROW, verdict, float(len(errors) + len(unmeasured)), "= 0", "faults", None, evidence)
