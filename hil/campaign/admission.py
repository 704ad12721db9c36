"""Whether a query may still be started in this contact: predicted from what the queries before it took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Admission:
    """The rule of a query step. Wall seconds; queries run at clock rate 1, where wall and mission seconds are one.

    >>> rule = Admission(first_estimate_s=30.0, margin_s=20.0)
    >>> rule.admits(left_s=49.0), rule.admits(left_s=50.0)
    (False, True)
    """

    first_estimate_s: float
    margin_s: float | None
    taken_s: list[float] = field(default_factory=list)

    @property
    def predicted_s(self) -> float:
        """The longest query so far, or the first estimate: an optimist's mean would admit half of them wrongly."""
        return max(self.taken_s, default=self.first_estimate_s)

    def admits(self, left_s: float) -> bool:
        """Whether a query may start with `left_s` of contact left. Without a margin any time left will do."""
        return left_s > 0 if self.margin_s is None else self.predicted_s + self.margin_s <= left_s
