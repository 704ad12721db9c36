"""The mission clock: wall time to mission time, with a piecewise rate and forward skips."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from hil.errors import UsageError


@dataclass(frozen=True, slots=True)
class Segment:
    """From `wall_start_s` on, mission time runs from `mission_start_s` at `rate` mission seconds per wall second.

    A segment of kind `skip` began with a jump over `skipped_s` of mission time; `run` continued where it was.
    """

    wall_start_s: float
    mission_start_s: float
    rate: float
    kind: Literal["run", "skip"] = "run"
    skipped_s: float = 0.0


class MissionClock:
    """Maps `time.monotonic()` to mission seconds. It never reads a clock itself, and never goes back.

    >>> clock = MissionClock(wall_mono_s=100.0, rate=60.0)
    >>> clock.mission_s(101.0), clock.wall_s(120.0)
    (60.0, 102.0)
    """

    def __init__(self, start_mission_s: float = 0.0, wall_mono_s: float = 0.0, rate: float = 1.0) -> None:
        _check_rate(rate)
        if not (math.isfinite(start_mission_s) and math.isfinite(wall_mono_s)):
            raise UsageError("the mission clock needs finite start times", hint="give seconds")
        # replaced as a whole, so that a reader on another thread sees the old or the new list, never half of one
        self._segments: tuple[Segment, ...] = (Segment(wall_mono_s, start_mission_s, rate),)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Every segment so far, for the record."""
        return self._segments

    @property
    def rate(self) -> float:
        """Mission seconds per wall second in the newest segment."""
        return self._segments[-1].rate

    def mission_s(self, wall_s: float) -> float:
        """Mission time at a wall (monotonic) time, also in the past; before the start it is the start."""
        segments = self._segments
        index = bisect_right(segments, wall_s, key=lambda segment: segment.wall_start_s) - 1
        segment = segments[max(index, 0)]
        return segment.mission_start_s + max(wall_s - segment.wall_start_s, 0.0) * segment.rate

    def flown_s(self, from_wall_s: float, to_wall_s: float) -> float:
        """Mission seconds that ran between two wall times, without those that were skipped."""
        skipped_s = 0.0
        for segment in reversed(self._segments):  # asked for the last moments, many times a second
            if segment.wall_start_s <= from_wall_s:
                break
            skipped_s += segment.skipped_s if segment.wall_start_s <= to_wall_s else 0.0
        return self.mission_s(to_wall_s) - self.mission_s(from_wall_s) - skipped_s

    def wall_s(self, mission_s: float) -> float:
        """When the newest segment reaches a mission time, if its rate stays. Raises UsageError for an earlier time."""
        segment = self._segments[-1]
        if mission_s < segment.mission_start_s:
            raise UsageError(
                f"mission time {mission_s:.3f} s lies before the present segment, which began at "
                f"{segment.mission_start_s:.3f} s",
                hint="only future mission times have a wall time to wait for",
            )
        return segment.wall_start_s + (mission_s - segment.mission_start_s) / segment.rate

    def set_rate(self, rate: float, at_wall_s: float) -> Segment:
        """From `at_wall_s` on run at `rate`; mission time is continuous. Returns the new segment."""
        _check_rate(rate)
        return self._append(Segment(at_wall_s, self._now(at_wall_s), rate))

    def skip_to(self, mission_s: float, at_wall_s: float) -> Segment:
        """Jump forward to `mission_s` at `at_wall_s`, keeping the rate. Raises UsageError for a jump backwards."""
        now_s = self._now(at_wall_s)
        if not (math.isfinite(mission_s) and mission_s >= now_s):
            raise UsageError(
                f"cannot skip back from mission time {now_s:.3f} s to {mission_s:.3f} s",
                hint="mission time only goes forward; start a new flight to see the past again",
            )
        return self._append(Segment(at_wall_s, mission_s, self.rate, "skip", mission_s - now_s))

    def _now(self, wall_s: float) -> float:
        newest = self._segments[-1].wall_start_s
        if not (math.isfinite(wall_s) and wall_s >= newest):
            raise UsageError(
                f"the clock was already changed at wall time {newest:.3f} s, after {wall_s:.3f} s",
                hint="pass time.monotonic() of now",
            )
        return self.mission_s(wall_s)

    def _append(self, segment: Segment) -> Segment:
        self._segments = (*self._segments, segment)
        return segment


def _check_rate(rate: float) -> None:
    if not (math.isfinite(rate) and rate > 0):
        raise UsageError(f"clock rate {rate!r} is impossible", hint="a rate above zero; 1 is real time")
