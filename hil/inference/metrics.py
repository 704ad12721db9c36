"""What every inference figure means, as small pure functions; `docs/metrics.md` says the same in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def tpot_s(t_first_s: float, t_last_s: float, tokens: int) -> float | None:
    """Seconds per output token after the first: (t_last - t_first) / (n - 1); None below two tokens."""
    return (t_last_s - t_first_s) / (tokens - 1) if tokens >= 2 else None


def decode_tps(t_first_s: float, t_last_s: float, tokens: int) -> float | None:
    """Tokens per second one user sees after the first token: 1 / TPOT. Not a throughput over users."""
    each = tpot_s(t_first_s, t_last_s, tokens)
    return 1.0 / each if each else None


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest-rank quantile: the smallest value that at least `share` of all values do not exceed.

    It is always a value that was measured. Raises ValueError when there is none.
    """
    if not values:
        raise ValueError("a quantile of nothing")
    ordered = sorted(values)
    rank = int(np.ceil(round(share * len(ordered), 9)))
    return ordered[min(max(rank, 1), len(ordered)) - 1]


def energy_j(t_s: Array, power_w: Array, start_s: float, end_s: float, *, max_gap_s: float = 2.0) -> float | None:
    """Joules between two instants: trapezoids over the samples, end points interpolated.

    None when the samples do not enclose the interval or leave a hole longer than `max_gap_s` in it: a hole is missing
    evidence, not zero watts.
    """
    if end_s <= start_s or len(t_s) < 2 or t_s[0] > start_s or t_s[-1] < end_s:
        return None
    first = int(np.searchsorted(t_s, start_s, side="right"))
    last = int(np.searchsorted(t_s, end_s, side="left"))
    enclosing = t_s[first - 1 : last + 1]
    if float(np.max(np.diff(enclosing), initial=0.0)) > max_gap_s:
        return None
    ends = np.interp([start_s, end_s], t_s, power_w)
    times = np.concatenate(([start_s], t_s[first:last], [end_s]))
    watts = np.concatenate((ends[:1], power_w[first:last], ends[1:]))
    return float(np.trapezoid(watts, times))


def gained(counter: Array) -> float:
    """How much a counter grew over its samples. A fall is a reset: what it shows after the fall was counted anew."""
    if len(counter) < 2:
        return 0.0
    steps = np.diff(counter)
    return float(np.sum(np.where(steps >= 0, steps, counter[1:])))
