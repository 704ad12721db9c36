"""What follows a flight, and can be repeated from its record: verdict.json, junit.xml, report.html."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hil.campaign import junit, report, verdict
from hil.campaign.provenance import add_provenance
from hil.campaign.record import read
from hil.errors import BenchError, ExitCode
from hil.model import Criterion, Verdict


@dataclass(frozen=True, slots=True)
class Finished:
    """The outcome of a run. `errors` are the messages of what broke, oldest first."""

    run: Path
    verdict: Verdict
    criteria: tuple[Criterion, ...]
    errors: tuple[str, ...]
    exit_code: ExitCode


def finish(run: Path) -> Finished:
    """Evaluate the record in `run` and write verdict, JUnit and report beside it. Raises BenchError on a full disk."""
    record = read(run)
    link_box = record.meta.get("link_box")
    if link_box is not None and "link_box" not in record.provenance:
        add_provenance(run, link_box=json.loads(link_box))
        record = read(run)
    mission = verdict.mission_of(run)
    result = verdict.evaluate(record, mission.criteria, mission.reports)
    try:
        verdict.write(run / "verdict.json", result)
        junit.write(run / "junit.xml", record, result)
        report.write(run / "report.html", record, result)
    except OSError as error:
        raise BenchError(
            f"cannot write the verdict of {run}: {error.strerror}",
            hint=f"free disk space, then: hil campaign report {run}",
        ) from error
    errors = record.of("error")
    interrupted = any(event.get("arm") == "interrupted" for event in errors)
    return Finished(
        run=run,
        verdict=result.verdict,
        criteria=result.criteria,
        errors=tuple(str(event["message"]) for event in errors),
        exit_code=ExitCode.INTERRUPTED if interrupted else verdict.exit_code(result.verdict),
    )
