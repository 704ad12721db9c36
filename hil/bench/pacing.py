"""When the power loops of one daemon tick: spread over the period, and no faster than their instruments allow.

Loops that tick at the same moment stand in line behind each other, and the last one is late. So each has its own phase
of the period. Channels of one instrument share its time: the period of each follows from what all of them need.
"""

from __future__ import annotations

import math
from collections import deque

MARGIN = 1.5
SETS = 50
# The golden section: however many join, their phases lie apart, and those of one instrument too.
_APART = (math.sqrt(5.0) - 1.0) / 2.0


class Slot:
    """One loop's place. `leave` it when the loop ends: its instrument then has more time for the others."""

    def __init__(self, phase: float, mates: list[Slot]) -> None:
        self.phase = phase
        self._mates = mates
        self._sets: deque[float] = deque(maxlen=SETS)
        self._typical_s = 0.0
        mates.append(self)

    def leave(self) -> None:
        if self in self._mates:
            self._mates.remove(self)

    def measured(self, set_s: float) -> None:
        """How long the instrument was busy with one tick of this loop, without the time in line, in seconds."""
        self._sets.append(set_s)
        ordered = sorted(self._sets)
        self._typical_s = ordered[int(0.9 * (len(ordered) - 1))]

    def period_s(self, least_s: float) -> float:
        """Period of the loop: `least_s`, or longer where the instrument's channels need more in all."""
        return max(least_s, MARGIN * sum(mate._typical_s for mate in self._mates))

    def next_s(self, now_s: float, period_s: float) -> float:
        """The first moment after `now_s` that is this loop's."""
        turns = math.floor(now_s / period_s - self.phase) + 1
        return (turns + self.phase) * period_s


class Pacing:
    """Gives every loop its slot. One for a daemon."""

    def __init__(self) -> None:
        self._joined = 0
        self._instruments: dict[int, list[Slot]] = {}

    def join(self, instrument: int) -> Slot:
        """A slot on the instrument that all its loops name by the same number."""
        self._joined += 1
        return Slot(self._joined * _APART % 1.0, self._instruments.setdefault(instrument, []))
