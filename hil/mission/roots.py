"""Vectorised search for the instants at which a sampled function changes sign, or peaks between two samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Function = Callable[[Floats], Floats]

BISECTIONS = 26  # 30 s / 2**26 = 0.5 us
TO_THE_LAST_BIT = 50
_GOLDEN = (np.sqrt(5.0) - 1.0) / 2.0
_PEAK_STEPS = 34  # 60 s * golden**34 = 5 us; a maximum is flat, more would only chase rounding


def crossings(function: Function, low_s: Floats, high_s: Floats, bisections: int = BISECTIONS) -> Floats:
    """Instants where `function` changes sign inside each bracket [low_s, high_s]; all brackets at once.

    Plain bisection on purpose: every trial instant is a dyadic fraction of the bracket, so two machines whose libm
    differ in the last bit still return the very same number. Brackets that are results themselves have no common
    fractions: go `TO_THE_LAST_BIT` with them.
    """
    low, high = np.array(low_s, dtype=np.float64), np.array(high_s, dtype=np.float64)
    if low.size == 0:
        return low
    rising = function(low) < 0
    for _ in range(bisections):
        middle = 0.5 * (low + high)
        below = (function(middle) < 0) == rising
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def maxima(function: Function, low_s: Floats, high_s: Floats) -> tuple[Floats, Floats]:
    """Golden-section maximum inside each bracket: (instants in seconds, values). One peak per bracket is assumed."""
    low, high = np.array(low_s, dtype=np.float64), np.array(high_s, dtype=np.float64)
    if low.size == 0:
        return low, low
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    f_left, f_right = function(left), function(right)
    for _ in range(_PEAK_STEPS):
        keep_left = f_left > f_right
        low, high = np.where(keep_left, low, left), np.where(keep_left, right, high)
        fresh = np.where(keep_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        f_fresh = function(fresh)
        left, right = np.where(keep_left, fresh, right), np.where(keep_left, left, fresh)
        f_left, f_right = np.where(keep_left, f_fresh, f_right), np.where(keep_left, f_left, f_fresh)
    best = 0.5 * (low + high)
    return best, function(best)


def positive_intervals(function: Function, grid_s: Floats) -> Floats:
    """Intervals in which `function` > 0 within the grid's span, as rows (start_s, end_s), sorted.

    Shape (n, 2). Edges are root-found; a bump that rises and falls between two samples is found through its maximum.
    An interval that is cut by the end of the grid ends there: scan wider than you need.
    """
    values = function(grid_s)
    inner = values[1:-1]
    bump = np.nonzero((inner <= 0) & (values[:-2] <= inner) & (values[2:] <= inner))[0]
    peak_s, peak = maxima(function, grid_s[bump], grid_s[bump + 2])
    found = peak > 0
    if found.any():
        grid_s = np.concatenate([grid_s, peak_s[found]])
        order = np.argsort(grid_s, kind="stable")
        grid_s, values = grid_s[order], np.concatenate([values, peak[found]])[order]
    positive = values > 0
    change = np.nonzero(positive[1:] != positive[:-1])[0]
    edges = crossings(function, grid_s[change], grid_s[change + 1])
    if positive[0]:
        edges = np.concatenate([grid_s[:1], edges])
    if positive[-1]:
        edges = np.concatenate([edges, grid_s[-1:]])
    return edges.reshape(-1, 2)


def scan_grid(start_s: float, end_s: float, step_s: float) -> Floats:
    """Samples from `start_s` to `end_s`, both included, at most `step_s` apart."""
    count = max(3, int(np.ceil((end_s - start_s) / step_s)) + 1)
    return np.linspace(start_s, end_s, count)
