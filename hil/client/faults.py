"""What clients hold of power faults made on purpose: their results, and a power cut that waits for its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hil.errors import BenchError

ASK_S = 20.0  # one long poll


@dataclass(frozen=True, slots=True)
class BrownOut:
    """A dip as it was: `reached_s` instead of `asked_s`, with `command_s` a measured exchange of the supply.

    `by`: the supply's own `list`, whose dwell `reached_s` was read back before it began, or two `writes`, between which
    it was measured. `lowest_v` is None when the dip was too short to be measured. `output_on` is false when a
    protection switched off, one of `trips`. `lockout`: below the board's lock-out, so that its power counts as cut.
    `began_s` and `ended_s` are of the bench host's monotonic clock. `others`: a board's further inputs that the bus
    feeds, by name, each as it was dipped. `samples` were measured in the dip; with none a latch-up protection saw
    nothing of it: `latch_up_judged`, None when none was armed.
    """

    low_v: float
    asked_s: float
    reached_s: float
    command_s: float
    lowest_v: float | None
    output_on: bool
    lockout: bool
    by: Literal["list", "writes"]
    trips: Sequence[str]
    began_s: float
    ended_s: float
    samples: int
    latch_up_judged: bool | None
    others: Mapping[str, BrownOut] = field(default_factory=dict)

    @staticmethod
    def of(answer: Mapping[str, Any]) -> BrownOut:
        """From the daemon's answer, whose dips of other inputs have no `others`."""
        values = {name: answer[name] for name in BrownOut.__slots__ if name != "others"}
        others = {name: BrownOut.of(other) for name, other in answer.get("others", {}).items()}
        return BrownOut(**values, others=others)

    @property
    def played(self) -> str:
        """Who timed it, in words."""
        if self.by == "list":
            return f"by the instrument's list, {self.reached_s * 1000:g} ms as read back"
        return f"by two writes, measured {self.reached_s * 1000:.1f} ms"


@dataclass(frozen=True, slots=True)
class LatchUp:
    """A latch-up cut and restart: seconds above the threshold before the cut, highest current, energy above it.

    `input` is the one that latched, `main` where the board has no other.
    """

    held_s: float
    peak_a: float
    energy_above_j: float
    added_a: float
    off_s: float
    input: str


@dataclass(frozen=True, slots=True)
class CutDone:
    """A power cut at its place: what matched, the console offset after it, and what the cut took.

    `overshoot_bytes` were read beyond the place in the same go; `latency_s` from the place to the supply's answer.
    """

    matched: str
    offset: int
    overshoot_bytes: int
    latency_s: float
    discharge_s: float


class CutAt:
    """An armed power cut. `wait` for it, or `disarm` it; it is disarmed with the lease."""

    def __init__(self, call: Callable[[str, float], Mapping[str, Any]], done: Callable[[], None], board: str) -> None:
        self._call = call
        self._done = done
        self._board = board

    def wait(self, timeout_s: float = 120.0) -> CutDone:
        """The finished cut. Raises BenchError when it failed, was disarmed or did not come in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            report = self._call("GET", min(left, ASK_S))
            if report["state"] == "done":
                self._done()
                return CutDone(
                    matched=report["matched"],
                    offset=report["offset"],
                    overshoot_bytes=report["seen_offset"] - report["offset"],
                    latency_s=report["latency_s"],
                    discharge_s=report["verified_s"] - report["off_s"],
                )
            if report["state"] in ("failed", "disarmed"):
                raise BenchError(f"the cut of board {self._board} {report['state']}: {report['trouble']}".rstrip(": "))
            if left == 0.0:
                raise BenchError(f"the cut of board {self._board} did not come within {timeout_s:g} s")

    def disarm(self) -> None:
        """Call it off; one that is being done is waited for."""
        self._call("DELETE", 0.0)
