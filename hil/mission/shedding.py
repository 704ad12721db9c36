"""Load shedding as a rule over time: when the board is cut off, and when it comes back."""

from __future__ import annotations

from hil.mission.eps import EpsState, ShedConfig
from hil.model import Span


class ShedSwitch:
    """Flown beside an `EpsModel`: show it every state, and give the board no power while `open` is true.

    Without a rule nothing is ever shed. The dwell is wall time, which a model has not: it is left out.
    """

    def __init__(self, rule: ShedConfig | None) -> None:
        self._rule = rule
        self._since_s: float | None = None
        self._low_s = 0.0
        self._over: list[Span] = []

    @property
    def open(self) -> bool:
        """Whether the board is cut off."""
        return self._since_s is not None

    def see(self, now_s: float, dt_s: float, state: EpsState) -> None:
        """What the power system is at `now_s`, after a step of `dt_s` under one load."""
        rule = self._rule
        if rule is None:
            return
        if self._since_s is None:
            self._low_s = self._low_s + dt_s if state.watched_v < rule.shed_v else 0.0
            if self._low_s and self._low_s >= rule.hold_s:
                self._since_s = now_s
        elif state.watched_v >= rule.restore_v and state.soc >= rule.restore_soc:
            self._over.append(Span(self._since_s, now_s, "load shed"))
            self._since_s, self._low_s = None, 0.0

    def spans(self, end_s: float) -> tuple[Span, ...]:
        """When the board was cut off, up to `end_s`."""
        last = () if self._since_s is None else (Span(self._since_s, end_s, "load shed"),)
        return (*self._over, *last)
