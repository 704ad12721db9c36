"""Orbit files on disk: two-line elements and CCSDS messages, read whole or refused with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from hil.errors import UsageError
from hil.mission.orbit import Orbit


def read_orbit_file(path: Path, kind: Literal["tle", "omm"]) -> Orbit:
    """The only satellite in `path`. Raises UsageError naming the file, and the line or the field that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    return Orbit.from_tle(text, source=str(path)) if kind == "tle" else Orbit.from_omm(text, source=str(path))
