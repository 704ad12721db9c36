"""The verdict as JUnit XML, a test case per criterion and step: the board's fault is a failure, the lab's an error."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET  # writes only: nothing foreign is parsed
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hil.campaign import derive
from hil.campaign.record import Record
from hil.model import Criterion, VerdictFile

# XML 1.0 forbids these even escaped; a console line quoted in a message may hold them.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write(path: Path, record: Record, verdict: VerdictFile) -> None:
    """Write `junit.xml` whole or not at all; the suite's properties are the run's provenance."""
    known = dict(_flat(record.provenance))
    mission = known.get("mission.name", "mission")
    suite = ET.Element("testsuite", name=f"hil.{mission}")
    listed = ET.SubElement(suite, "properties")
    for name, value in {**known, "run": record.directory.name, "verdict": verdict.verdict}.items():
        ET.SubElement(listed, "property", name=name, value=_clean(value))
    cases = [*_steps(record, mission), *(_criterion(row, mission) for row in verdict.criteria)]
    suite.extend(cases)
    suite.set("tests", str(len(cases)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("errors", str(sum(case.find("error") is not None for case in cases)))
    suite.set("skipped", "0")
    suite.set("time", f"{sum(float(case.get('time', '0')) for case in cases):.3f}")
    if record.events:
        suite.set("timestamp", record.events[0].t_wall.removesuffix("Z"))
    root = ET.Element("testsuites", name="hil")
    root.append(suite)
    ET.indent(root)
    part = path.with_name(f".{path.name}.part")
    ET.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)
    os.replace(part, path)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values as dotted names: `board.type`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _criterion(row: Criterion, mission: str) -> ET.Element:
    case = ET.Element("testcase", classname=f"{mission}.criteria", name=row.name, time="0")
    told = "no value" if row.measured is None else f"{row.measured} {row.unit}".strip()
    message = _clean(f"{row.verdict}: {told}, limit {row.limit} {row.unit}".strip())
    if row.verdict == "fail":
        ET.SubElement(case, "failure", type="fail", message=message).text = _clean(row.evidence)
    elif row.verdict != "pass":
        ET.SubElement(case, "error", type=row.verdict, message=message).text = _clean(row.evidence)
    else:
        ET.SubElement(case, "system-out").text = _clean(f"{message}\n{row.evidence}")
    return case


def _steps(record: Record, mission: str) -> list[ET.Element]:
    """One case per step that was started. A step without an end carries the error that stopped the flight."""
    cases = []
    errors = record.of("error")
    for span, started in zip(derive.steps(record), record.of("step_started"), strict=True):
        name = f"{started['index'] + 1}-{started['step']}"
        case = ET.Element("testcase", classname=f"{mission}.steps", name=name, time=f"{span.duration_s:.3f}")
        ends = [event for event in record.of("step_finished") if event["index"] == started["index"]]
        if not ends or ends[-1]["ok"] is not True:
            cause = next((event for event in errors if event.t_mono >= started.t_mono), None)
            arm = "bench" if cause is None else str(cause.get("arm"))
            text = "the step did not finish" if cause is None else str(cause.get("message"))
            kind = "failure" if arm == "board" else "error"
            ET.SubElement(case, kind, type=arm, message=_clean(text.splitlines()[0] if text else arm)).text = _clean(
                text
            )
        cases.append(case)
    return cases


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
