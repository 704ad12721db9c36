"""What an operator asks of the mission clock for one flight: its rate, gaps flown or skipped, its begin and end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hil.errors import UsageError

if TYPE_CHECKING:
    from hil.inventory import Mission

MAX_RATE = 1000.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How the mission clock is to run. Without a wish, as the mission's steps say: their own rates, gaps skipped.

    `rate` replaces the rate of every step that scales time and never that of one that runs in real time; with it the
    gaps are flown at this rate, unless `contacts_only` skips them. Times in mission seconds.

    >>> Pace(rate=30.0).rate_of(60.0), Pace(rate=30.0).rate_of(1.0), Pace(rate=30.0, contacts_only=True).flies_gaps
    (30.0, 1.0, False)
    """

    rate: float | None = None
    contacts_only: bool = False
    start_s: float = 0.0
    until_s: float | None = None
    real: bool = False
    """The mission's own `clock: real`: no step scales time; gaps are skipped all the same, unless `rate` is 1."""

    @classmethod
    def of(
        cls,
        mission: Mission,
        *,
        rate: float | None = None,
        contacts_only: bool = False,
        start: str | None = None,
        until: str | None = None,
    ) -> Pace:
        """Check an operator's wishes against the mission; `start` and `until` as `mission_seconds` reads them.

        Raises UsageError for what cannot be flown.
        """
        if rate is not None and not (math.isfinite(rate) and 1 <= rate <= MAX_RATE):
            raise UsageError(
                f"--rate {rate:g} cannot be flown", hint=f"1 (real time) to {MAX_RATE:g} mission seconds a second"
            )
        if mission.file.clock == "real" and rate is not None and rate > 1:
            raise UsageError(
                f"{mission.path}: the mission is flown in real time, --rate {rate:g} would scale it",
                hint="leave --rate out, or say `clock: scaled` in the mission file",
            )
        begin_s = 0.0 if start is None else _within(mission, "--from", start)
        end_s = None if until is None else _within(mission, "--until", until)
        if end_s is not None and end_s <= begin_s:
            raise UsageError(
                f"--until {until} is not after {'the start' if start is None else f'--from {start}'}",
                hint="mission time only goes forward",
            )
        if begin_s >= mission.file.duration_h * 3600.0:
            raise UsageError(f"--from {start} is the mission's end: nothing is left to fly", hint="an earlier time")
        return cls(rate, contacts_only, begin_s, end_s, mission.file.clock == "real")

    @property
    def flies_gaps(self) -> bool:
        """Whether mission time between what the steps do is flown instead of skipped."""
        return self.rate is not None and not self.contacts_only

    def rate_of(self, rate: float) -> float:
        """The clock rate in place of what a step asks for."""
        if rate <= 1 or (self.rate is None and not self.real):
            return rate
        return self.rate or 1.0

    def facts(self, mission: Mission) -> dict[str, Any]:
        """For provenance.json: what was asked for, None where the mission decides."""
        return {
            "rate": self.rate,
            "contacts_only": self.contacts_only,
            "from_s": self.start_s,
            "from": _utc(mission, self.start_s),
            "until_s": self.until_s,
            "until": None if self.until_s is None else _utc(mission, self.until_s),
        }


def mission_seconds(mission: Mission, text: str) -> float:
    """A mission time as people write it, in seconds since the mission's start: hours (`12.5`, `12.5h`) or UTC.

    Raises UsageError for anything else, also for a time of day without a zone.
    """
    try:
        hours = float(text.removesuffix("h"))
    except ValueError:
        hours = None
    if hours is not None and math.isfinite(hours):
        return hours * 3600.0
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise UsageError(
            f"{text!r} is not a mission time", hint="hours since the start (12.5), or UTC as 2026-03-20T00:00:00Z"
        )
    return (moment - mission.start).total_seconds()


def _within(mission: Mission, option: str, text: str) -> float:
    t_s, end_s = mission_seconds(mission, text), mission.file.duration_h * 3600.0
    if not 0 <= t_s <= end_s:
        raise UsageError(
            f"{option} {text} is {'before the start' if t_s < 0 else 'after the end'} of {mission.path}",
            hint=f"the mission runs from {_utc(mission, 0.0)} to {_utc(mission, end_s)}, {mission.file.duration_h:g} h",
        )
    return t_s


def _utc(mission: Mission, t_s: float) -> str:
    moment = datetime.fromtimestamp(mission.start.timestamp() + t_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
