"""Strict reading of two-line element sets: columns, checksums, ranges; every complaint names source and line."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from hil.errors import UsageError
from hil.mission.elements import BOUNDS, Elements, impossible

_EXPONENT = re.compile(r"([ +-])(\d{5})([+-]\d)")
_SGP4_TYPES = " 023"  # column 63: unset, distributed as SGP4, or the theories that SGP4 contains


def read_tle(text: str, *, source: str = "TLE") -> tuple[Elements, str, str]:
    """The only element set in `text`, and its two lines of 69 characters; blanks, `#` comments and a name may be there.

    `source` (a file name) goes into messages: `UsageError` carries source:line for a bad checksum, length, column, or
    an orbit that cannot exist.
    """
    lines = [
        (number, line.rstrip())
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    title = ""
    if lines and not _looks_like(lines[0][1], "1"):
        title = lines.pop(0)[1].removeprefix("0 ").strip()
    if len(lines) != 2:
        raise UsageError(
            f"{source}: expected one TLE (two lines), found {len(lines)} element lines",
            hint="give a file with exactly one satellite: an optional name line, then the lines '1 …' and '2 …'",
        )
    _check_line(source, *lines[0], expected="1")
    _check_line(source, *lines[1], expected="2")
    return _read_elements(source, lines[0], lines[1], title), lines[0][1], lines[1][1]


def checksum(line: str) -> int:
    """The TLE checksum of the first 68 characters: sum of digits, a minus counts one, modulo 10."""
    return sum(int(c) if c in "0123456789" else c == "-" for c in line[:68]) % 10


def _looks_like(line: str, number: str) -> bool:
    # A satellite may be called "1 UP": a name line is told apart by its length as well.
    return line.startswith(f"{number} ") and len(line) > 24


def _check_line(source: str, number: int, line: str, *, expected: str) -> None:
    where = f"{source}:{number}"
    if not line.isascii():
        raise UsageError(f"{where}: TLE line has non-ASCII characters", hint="download the element set again as text")
    if not line.startswith(f"{expected} "):
        raise UsageError(f"{where}: expected TLE line {expected}, got {line[:20]!r}", hint="line 1 comes before line 2")
    if len(line) != 69:
        raise UsageError(
            f"{where}: a TLE line has 69 characters, this one {len(line)}",
            hint="columns matter: copy the element set without re-flowing it",
        )
    if not line[68].isdigit() or int(line[68]) != checksum(line):
        raise UsageError(
            f"{where}: checksum is {line[68]!r}, the line adds up to {checksum(line)}",
            hint="a digit was altered or lost: fetch the element set again",
        )


def _read_elements(source: str, first: tuple[int, str], second: tuple[int, str], name: str) -> Elements:
    (row1, line1), (row2, line2) = first, second

    def bad(row: int, message: str) -> UsageError:
        return UsageError(f"{source}:{row}: {message}", hint="fetch the element set again, or check who edited it")

    def number(row: int, line: str, low: int, high: int, what: str, bounds: tuple[float, float]) -> float:
        text = line[low:high].strip()
        try:
            value = float(text)
        except ValueError:
            raise bad(row, f"{what} is {text!r}, not a number") from None
        if not bounds[0] <= value <= bounds[1]:
            raise bad(row, f"{what} is {value:g}, must be within {bounds[0]:g}..{bounds[1]:g}")
        return value

    if line1[2:7] != line2[2:7]:
        raise bad(row2, f"the two lines belong to different satellites: {line1[2:7]} and {line2[2:7]}")
    if line1[62] not in _SGP4_TYPES:
        raise bad(row1, f"ephemeris type {line1[62]!r} is not SGP4's (4 is SGP4-XP, another theory)")
    year = int(number(row1, line1, 18, 20, "epoch year", (0, 99)))
    day = number(row1, line1, 20, 32, "epoch day", (1.0, 367.0))
    drag = _EXPONENT.fullmatch(line1[53:61])
    if drag is None:
        raise bad(row1, f"drag term is {line1[53:61]!r}, expected the form ' 12345-3'")
    inclination = number(row2, line2, 8, 16, "inclination", BOUNDS["inclination_deg"])
    raan = number(row2, line2, 17, 25, "right ascension of the node", BOUNDS["raan_deg"])
    if not line2[26:33].isdigit():
        raise bad(row2, f"eccentricity is {line2[26:33]!r}, expected seven digits")
    eccentricity = float(f"0.{line2[26:33]}")
    perigee = number(row2, line2, 34, 42, "argument of perigee", BOUNDS["argument_of_perigee_deg"])
    anomaly = number(row2, line2, 43, 51, "mean anomaly", BOUNDS["mean_anomaly_deg"])
    motion = number(row2, line2, 52, 63, "mean motion", BOUNDS["mean_motion_rev_day"])
    if (reason := impossible(motion, eccentricity)) is not None:
        raise bad(row2, reason)
    century = 1900 if year >= 57 else 2000
    return Elements(
        name=name or line1[2:7].strip(),
        epoch=datetime(century + year, 1, 1, tzinfo=UTC) + timedelta(days=day - 1.0),
        inclination_deg=inclination,
        raan_deg=raan,
        eccentricity=eccentricity,
        argument_of_perigee_deg=perigee,
        mean_anomaly_deg=anomaly,
        mean_motion_rev_day=motion,
        bstar=float(f"{drag[1].strip()}0.{drag[2]}e{drag[3]}"),
    )
