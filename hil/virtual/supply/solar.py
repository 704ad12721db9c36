"""The I-V curve of a solar-array simulator: the exponential model of four parameters, and tables of points.

Exponential model: Britton, Lunscher, Tanju, ESA WPP-054 (1993), as the makers of these simulators cite it.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_POINTS = 192


class CurveError(ValueError):
    """Parameters or points that are no solar array; the text says which rule they break."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Current over voltage as points with rising `volts` from 0 and falling `amperes`; straight between them."""

    volts: tuple[float, ...]
    amperes: tuple[float, ...]
    best: tuple[float, float, float]
    """Watts, volts and amperes of the maximum-power point."""

    @property
    def open_circuit_v(self) -> float:
        return self.volts[-1]

    @property
    def short_circuit_a(self) -> float:
        return self.amperes[0]

    def current_a(self, voltage_v: float) -> float:
        """Amperes the array gives at a terminal voltage."""
        if voltage_v <= 0.0:
            return self.amperes[0]
        if voltage_v >= self.volts[-1]:
            return 0.0
        index = bisect.bisect_right(self.volts, voltage_v)
        left, right = self.volts[index - 1], self.volts[index]
        share = (voltage_v - left) / (right - left)
        return self.amperes[index - 1] + share * (self.amperes[index] - self.amperes[index - 1])

    def scaled(self, current_share: float) -> Curve:
        """The same array under less light: every current times `current_share`, voltages as they are."""
        return _curve(self.volts, tuple(i * current_share for i in self.amperes))

    def meet(self, voltage_v: float, load_a: Callable[[float], float]) -> float:
        """Where the terminal voltage goes from `voltage_v` with a load that draws `load_a(V)`.

        More current than the load takes raises the voltage until the two curves meet; less lowers it, down to zero
        when they do not meet any more: the fold to the left of the maximum-power point.
        """

        def surplus(v: float) -> float:
            return self.current_a(v) - load_a(v)

        rising = surplus(voltage_v) >= 0.0
        start = bisect.bisect_right(self.volts, voltage_v) if rising else bisect.bisect_left(self.volts, voltage_v)
        path: Iterable[float] = self.volts[start:] if rising else reversed(self.volts[:start])
        near = voltage_v
        for far in path:
            if (surplus(far) >= 0.0) != rising:
                return _crossing(surplus, near, far)
            near = far
        return self.open_circuit_v if rising else 0.0


def _crossing(surplus: Callable[[float], float], near: float, far: float) -> float:
    sign = surplus(near) >= 0.0
    for _ in range(40):
        middle = 0.5 * (near + far)
        if (surplus(middle) >= 0.0) == sign:
            near = middle
        else:
            far = middle
    return 0.5 * (near + far)


def exponential(voc_v: float, isc_a: float, vmp_v: float, imp_a: float) -> Curve:
    """The curve through (0, Isc), (Vmp, Imp) and (Voc, 0). CurveError when the four do not describe an array."""
    if not (0.0 < imp_a < isc_a and 0.0 < vmp_v < voc_v):
        raise CurveError("needs 0 < Imp < Isc and 0 < Vmp < Voc")
    if vmp_v / voc_v + imp_a / isc_a <= 1.0:
        raise CurveError("the knee lies below the straight line from Isc to Voc")
    rs = (voc_v - vmp_v) / imp_a
    stretch = 1.0 + rs * isc_a / voc_v
    a = (vmp_v * stretch + rs * (imp_a - isc_a)) / voc_v
    if not 0.0 < 2.0 - 2.0**a < 1.0:
        raise CurveError("no such knee: Vmp and Imp are too far from, or too close to, Voc and Isc")
    n = math.log(2.0 - 2.0**a) / math.log(imp_a / isc_a)

    def voltage(i: float) -> float:
        return (voc_v * math.log2(2.0 - (i / isc_a) ** n) - rs * (i - isc_a)) / stretch

    # Points crowd towards Isc, where the curve turns; the maximum-power point is one of them.
    shares = {1.0 - (1.0 - k / _POINTS) ** 3 for k in range(_POINTS + 1)} | {imp_a / isc_a}
    currents = sorted((isc_a * share for share in shares), reverse=True)
    points = [(max(0.0, voltage(i)), i) for i in currents]
    points[0], points[-1] = (0.0, isc_a), (voc_v, 0.0)
    return table(points)


def table(points: Iterable[tuple[float, float]]) -> Curve:
    """A curve from (volts, amperes) points in any order. CurveError when the current rises with the voltage."""
    ordered = sorted(points)
    if len(ordered) < 2:
        raise CurveError("a table needs two points or more")
    volts, amperes = zip(*ordered, strict=True)
    if any(b > a + 1e-12 for a, b in itertools.pairwise(amperes)) or volts[0] < 0.0 or amperes[-1] < 0.0:
        raise CurveError("current must fall as voltage rises, and neither may be negative")
    distinct = [0] + [k for k in range(1, len(volts)) if volts[k] > volts[k - 1]]
    return _curve(tuple(volts[k] for k in distinct), tuple(amperes[k] for k in distinct))


def _curve(volts: tuple[float, ...], amperes: tuple[float, ...]) -> Curve:
    return Curve(volts, amperes, max((v * i, v, i) for v, i in zip(volts, amperes, strict=True)))
