"""Orbit Mean-Elements Messages (CCSDS 502.0): JSON as the public catalogues write it, and XML; full doubles are kept.

A TLE has seven digits of eccentricity and four of each angle; an OMM has as many as its writer cares for, which is what
close formations and catalogue numbers beyond 99999 need. Every complaint names the file and the field.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from typing import Any

from hil.errors import UsageError
from hil.mission.elements import BOUNDS, Elements, impossible

_ANGLES = {
    "INCLINATION": "inclination_deg",
    "RA_OF_ASC_NODE": "raan_deg",
    "ARG_OF_PERICENTER": "argument_of_perigee_deg",
    "MEAN_ANOMALY": "mean_anomaly_deg",
}
# What the elements must be for SGP4 to mean anything; absent is fine: the catalogues' JSON leaves the constants out.
_META = {
    "CENTER_NAME": ("EARTH",),
    "REF_FRAME": ("TEME",),
    "TIME_SYSTEM": ("UTC",),
    "MEAN_ELEMENT_THEORY": ("SGP4", "SGP/SGP4", "SGP"),
    "EPHEMERIS_TYPE": ("0", "2", "3"),
}
_DAY_OF_YEAR = re.compile(r"(\d{4})-(\d{3})T(.+)")


def read_omm(text: str, *, source: str = "OMM") -> Elements:
    """The only satellite in `text`, which is JSON or XML. Raises UsageError naming `source` and the field."""
    body = text.lstrip("\ufeff \t\r\n")
    fields = _xml_fields(body, source) if body.startswith("<") else _json_fields(body, source)
    fields = {key: value for key, value in fields.items() if value is not None and value != ""}

    def bad(field: str, message: str) -> UsageError:
        return UsageError(f"{source}: {field} {message}", hint="fetch the message again, or check who edited it")

    def number(field: str, default: float | None = None) -> float:
        if field not in fields and default is not None:
            return default
        if field not in fields:
            raise bad(field, "is missing")
        try:
            value = float(fields[field])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value) or isinstance(fields[field], bool):
            raise bad(field, f"is {fields[field]!r}, not a number")
        return value

    def within(field: str, key: str) -> float:
        value, (low, high) = number(field), BOUNDS[key]
        if not low <= value <= high:
            raise bad(field, f"is {value:g}, must be within {low:g}..{high:g}")
        return value

    for field, allowed in _META.items():
        if field in fields and str(fields[field]).strip().upper() not in allowed:
            raise bad(field, f"is {fields[field]!r}; SGP4 elements have {' or '.join(allowed)}")
    if "DECAY_DATE" in fields:
        raise bad("DECAY_DATE", f"is {fields['DECAY_DATE']}: this object has decayed")
    if "MEAN_MOTION" not in fields and "SEMI_MAJOR_AXIS" in fields:
        raise bad("MEAN_MOTION", "is missing: SGP4 elements give it, SEMI_MAJOR_AXIS belongs to another theory")
    motion, eccentricity = within("MEAN_MOTION", "mean_motion_rev_day"), number("ECCENTRICITY")
    if (reason := impossible(motion, eccentricity)) is not None:
        raise bad("ECCENTRICITY", f"and MEAN_MOTION: {reason}")
    angles = {key: within(field, key) for field, key in _ANGLES.items()}
    if "EPOCH" not in fields:
        raise bad("EPOCH", "is missing")
    try:
        epoch = _epoch(str(fields["EPOCH"]))
    except ValueError:
        raise bad("EPOCH", f"is {fields['EPOCH']!r}, expected UTC as 2026-03-20T12:00:00.000000") from None
    return Elements(
        name=str(fields.get("OBJECT_NAME", fields.get("NORAD_CAT_ID", fields.get("OBJECT_ID", "OMM")))).strip(),
        epoch=epoch,
        inclination_deg=angles["inclination_deg"],
        raan_deg=angles["raan_deg"],
        eccentricity=eccentricity,
        argument_of_perigee_deg=angles["argument_of_perigee_deg"],
        mean_anomaly_deg=angles["mean_anomaly_deg"],
        mean_motion_rev_day=motion,
        bstar=number("BSTAR", 0.0),
    )


def split_omm(text: str, *, source: str = "OMM") -> tuple[str, ...]:
    """The messages in a file of many satellites, each as `read_omm` takes it: a JSON list, or XML of many segments."""
    body = text.lstrip("\ufeff \t\r\n")
    if body.startswith("<"):
        return tuple(ET.tostring(item, encoding="unicode") for item in _segments(body, source))
    return tuple(json.dumps(row) for row in _rows(body, source))


def _epoch(text: str) -> datetime:
    """Both of CCSDS's calendars; microseconds, which is 8 mm along the orbit."""
    ordinal = _DAY_OF_YEAR.fullmatch(text.strip())
    if ordinal is None:
        instant = datetime.fromisoformat(text.strip())
    else:
        year, day, clock = ordinal.groups()
        if not 1 <= int(day) <= 366:
            raise ValueError(text)
        instant = datetime.fromisoformat(f"{year}-01-01T{clock}") + timedelta(days=int(day) - 1)
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


def _json_fields(text: str, source: str) -> dict[str, Any]:
    rows = _rows(text, source)
    _only_one(source, len(rows))
    if not isinstance(rows[0], dict):
        raise UsageError(f"{source}: not an OMM: expected an object with EPOCH, MEAN_MOTION, …")
    return rows[0]


def _rows(text: str, source: str) -> list[Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        place = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError(f"{source}{place}: not an OMM: neither XML nor JSON ({error})") from None
    return data if isinstance(data, list) else [data]


def _xml_fields(text: str, source: str) -> dict[str, Any]:
    segments = _segments(text, source)
    _only_one(source, len(segments))
    return {_tag(item): item.text for item in segments[0].iter() if not len(item)}


def _segments(text: str, source: str) -> list[ET.Element]:
    if "<!DOCTYPE" in text:  # entities are not part of the format, and a known way to fill memory
        raise UsageError(f"{source}: an OMM has no DOCTYPE", hint="remove it, or fetch the message again")
    try:
        root = ET.fromstring(text)  # noqa: S314 - no DOCTYPE, see above
    except ET.ParseError as error:
        raise UsageError(f"{source}:{error.position[0]}: not valid XML: {error}") from None
    return [item for item in root.iter() if _tag(item) == "segment"]


def _tag(item: ET.Element) -> str:
    return item.tag.rpartition("}")[2]


def _only_one(source: str, count: int) -> None:
    if count != 1:
        raise UsageError(f"{source}: expected one satellite, found {count}", hint="give a file with exactly one")
