"""A list of set points that a supply plays by itself, whatever its maker calls it: list, timer, arbitrary waveform."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """Volts and amperes to set (None keeps the old value), held for `dwell_s`; `off` switches the output off."""

    voltage_v: float | None
    current_a: float | None
    dwell_s: float
    off: bool = False


class Sequence:
    """Steps from `start_s` on, `repeat` times (0 for ever), then `last`. It runs on while an output is tripped."""

    def __init__(self, steps: tuple[Step, ...], start_s: float, repeat: int = 1, last: Step | None = None) -> None:
        if not steps:
            raise ValueError("a sequence needs steps")
        self.steps = steps
        self.repeat = repeat
        self.last = last
        self.ended = False
        self.index = 0
        self._round = 0
        self._next_s = start_s

    def due(self, now_s: float) -> Iterator[tuple[float, Step]]:
        """Steps whose time has come since the last call, each with its moment."""
        while not self.ended and self._next_s <= now_s + 1e-9:
            moment_s = self._next_s
            if self.index == len(self.steps):
                self._round += 1
                self.index = 0
                if self.repeat and self._round >= self.repeat:
                    self.ended = True
                    if self.last is not None:
                        yield moment_s, self.last
                    return
            step = self.steps[self.index]
            self.index += 1
            self._next_s = moment_s + max(step.dwell_s, 1e-6)
            yield moment_s, step
