"""The solar array: watts from cells, pointing, ageing, temperature; its I-V curve; curves for hardware simulators.

The curve is the four-point exponential model of Britton, Lunscher and Tanju (European Space Power Conference, 1993),
the one that solar-array simulators are programmed with. Up to the maximum-power point it follows a cell's diode
equation within 1.5 %; beyond, it falls nearly straight to Voc where a cell stays high and drops late, so that a bus
above Vmp gets less than it would. Currents scale with the light; the small logarithmic fall of the voltages in weak
light is left out: it matters only within the seconds of a penumbra.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hil.errors import UsageError
from hil.mission.frames import Floats
from hil.mission.sun import AU_KM

SUN_W_M2 = 1_361.0  # at 1 AU; cells are rated at AM0, 1367 W/m2: their efficiency carries over, their watts do not
CELL_RATED_C = 28.0
_TABLE_ROWS = 2_048
_BISECTIONS = 80


@dataclass(frozen=True, slots=True)
class SasCurve:
    """An I-V curve by open-circuit voltage, short-circuit current and the maximum-power point, volts and amperes.

    >>> curve = SasCurve(voc_v=100.0, isc_a=5.0, vmp_v=90.0, imp_a=4.5)
    >>> round(curve.voltage_v(4.5), 9), round(curve.max_power()[2], 2)
    (90.0, 406.8)
    """

    voc_v: float
    isc_a: float
    vmp_v: float
    imp_a: float

    def __post_init__(self) -> None:
        if not (0 < self.vmp_v < self.voc_v < 1e5 and 0 < self.imp_a < self.isc_a < 1e5):
            raise UsageError(
                f"no I-V curve has Voc {self.voc_v} V, Vmp {self.vmp_v} V, Isc {self.isc_a} A, Imp {self.imp_a} A",
                hint="0 < Vmp < Voc and 0 < Imp < Isc",
            )
        if self._bend <= 0:
            raise UsageError(
                f"the exponential model has no curve through Vmp {self.vmp_v} V, Imp {self.imp_a} A below Voc "
                f"{self.voc_v} V, Isc {self.isc_a} A",
                hint="the maximum-power point is too far from the knee: Isc / Imp x (1 - Vmp / Voc)^2 must be below 1",
            )

    @property
    def series_ohm(self) -> float:
        """Rs of the model: slope near open circuit."""
        return (self.voc_v - self.vmp_v) / self.imp_a

    @property
    def _bend(self) -> float:
        """a of the model, always below 1; without a positive one the curve does not exist."""
        rs = self.series_ohm
        return (self.vmp_v * (1.0 + rs * self.isc_a / self.voc_v) + rs * (self.imp_a - self.isc_a)) / self.voc_v

    @property
    def exponent(self) -> float:
        """N of the model: how sharp the knee is."""
        return math.log(2.0 - 2.0**self._bend) / math.log(self.imp_a / self.isc_a)

    def voltage_v(self, current_a: float) -> float:
        """Terminal voltage at a current, 0..isc_a; UsageError outside."""
        if not 0 <= current_a <= self.isc_a:
            raise UsageError(f"the array cannot source {current_a!r} A", hint=f"0..{self.isc_a:g} A")
        return float(self._volts(np.float64(current_a)))

    def current_a(self, voltage_v: float) -> float:
        """Current at a terminal voltage: isc_a at and below 0 V, 0 at and above open circuit."""
        return float(self.currents_a(np.array([voltage_v]))[0])

    def currents_a(self, voltage_v: Floats) -> Floats:
        """`current_a` for an array of voltages, by bisection of the falling V(I)."""
        low, high = np.zeros_like(voltage_v), np.full_like(voltage_v, self.isc_a)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            above = self._volts(middle) > voltage_v
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.asarray(0.5 * (low + high), dtype=np.float64)

    def max_power(self) -> tuple[float, float, float]:
        """(volts, amperes, watts) of the curve's true maximum; a little above vmp_v x imp_a by the model's nature."""
        rs, n, k = self.series_ohm, self.exponent, 1.0 + self.series_ohm * self.isc_a / self.voc_v
        low, high = 0.0, self.isc_a
        for _ in range(_BISECTIONS):
            amps = 0.5 * (low + high)
            share = (amps / self.isc_a) ** n
            slope = (-self.voc_v * n * share / (max(amps, 1e-300) * (2.0 - share) * math.log(2.0)) - rs) / k
            low, high = (amps, high) if self.voltage_v(amps) + amps * slope > 0 else (low, amps)
        volts = self.voltage_v(low)
        return volts, low, volts * low

    def scaled(self, currents: float, voltages: float = 1.0) -> SasCurve:
        """The same shape with its currents and voltages multiplied; factors above zero."""
        return SasCurve(self.voc_v * voltages, self.isc_a * currents, self.vmp_v * voltages, self.imp_a * currents)

    def _volts(self, current_a: Any) -> Any:
        share = (current_a / self.isc_a) ** self.exponent
        rs = self.series_ohm
        volts = self.voc_v * np.log2(2.0 - share) - rs * (current_a - self.isc_a)
        return volts / (1.0 + rs * self.isc_a / self.voc_v)


@dataclass(frozen=True, slots=True)
class ArrayConfig:
    """A solar array by its begin-of-life power.

    `bol_w` at 1 AU, normal incidence, 28 C (`of_cells` and `of_curve` compute it); `degradation` is what is left of it
    (end of life 0.85); `pointing` the mean cosine towards the Sun. Power changes by `power_coefficient_per_k` of its
    value for each kelvin of `temperature_c` above 28 C, current by `current_coefficient_per_k`, voltage by the rest.
    Output: bol_w x degradation x pointing x temperature x visible solar disc, and with `distance_scaling` the inverse
    square of the Sun's distance (+3.4 % in January, -3.3 % in July). `curve`: begin of life, full sun, 28 C.
    """

    bol_w: float
    degradation: float = 1.0
    pointing: float = 1.0
    distance_scaling: bool = False
    temperature_c: float = CELL_RATED_C
    power_coefficient_per_k: float = -0.0025
    current_coefficient_per_k: float = 0.0005
    curve: SasCurve | None = None

    def __post_init__(self) -> None:
        bounds = {
            "bol_w": (0.0, 1e7),
            "degradation": (0.0, 1.0),
            "pointing": (0.0, 1.0),
            "temperature_c": (-200.0, 200.0),
            "power_coefficient_per_k": (-0.005, 0.0),
            "current_coefficient_per_k": (0.0, 0.004),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses nan
                raise UsageError(f"array: {name} is {value}, must be within {low:g}..{high:g}", hint=f"correct {name}")

    @classmethod
    def of_cells(cls, area_m2: float, efficiency: float, **rest: Any) -> ArrayConfig:
        """An array of `area_m2` of cells of an efficiency rated at AM0 and 28 C; 1361 W/m2 fall on it at 1 AU."""
        return cls(SUN_W_M2 * area_m2 * efficiency, **rest)

    @classmethod
    def of_curve(cls, curve: SasCurve, **rest: Any) -> ArrayConfig:
        """An array whose begin-of-life power is its curve's maximum."""
        return cls(curve.max_power()[2], curve=curve, **rest)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ArrayConfig:
        """Inverse of `dataclasses.asdict`."""
        curve = values.get("curve")
        return cls(**{**values, "curve": curve and SasCurve(**curve)})

    @property
    def full_sun_w(self) -> float:
        """Watts at the maximum-power point in full sunlight at 1 AU."""
        warmer_k = self.temperature_c - CELL_RATED_C
        return self.bol_w * self.degradation * self.pointing * (1.0 + self.power_coefficient_per_k * warmer_k)

    def power_w(self, sunlit: Floats, sun_km: Floats) -> Floats:
        """Watts at the maximum-power point for visible solar discs (n,) and geocentric Sun positions (n, 3)."""
        watts = self.full_sun_w * sunlit
        return watts * AU_KM**2 / (sun_km * sun_km).sum(axis=1) if self.distance_scaling else watts

    @property
    def operating_curve(self) -> SasCurve | None:
        """The curve at the array's temperature whose maximum is `full_sun_w`; None without curve or without power."""
        if self.curve is None or self.full_sun_w <= 0:
            return None
        warmer_k = self.temperature_c - CELL_RATED_C
        voltages = (1.0 + self.power_coefficient_per_k * warmer_k) / (1.0 + self.current_coefficient_per_k * warmer_k)
        return self.curve.scaled(self.full_sun_w / (self.curve.max_power()[2] * voltages), voltages)


def sas_rows(array: ArrayConfig, array_w: Floats) -> Floats:
    """Curves for a hardware solar-array simulator: rows of (voc_v, isc_a, vmp_v, imp_a), shape (n, 4).

    `array_w` is a timeline's column; each row's true maximum is that power. In the dark both currents are 0 and the
    voltages stay: simulators refuse Isc = 0, drive them with their lowest light or with the output off then. Raises
    UsageError when the array has no curve.
    """
    curve = array.operating_curve
    if curve is None:
        raise UsageError(
            "the mission's array has no I-V curve", hint="add `curve: {voc_v, isc_a, vmp_v, imp_a}` to its power.array"
        )
    share = np.asarray(array_w, dtype=np.float64) / array.full_sun_w
    constant = np.ones_like(share)
    columns = (constant * curve.voc_v, share * curve.isc_a, constant * curve.vmp_v, share * curve.imp_a)
    return np.stack(columns, axis=1)


class ArrayCurrent:
    """An array's current at a voltage, fast: for direct transfer, where the bus decides the array's voltage.

    Chords of the curve over equal steps of voltage, so never above the curve: what it gives never exceeds the maximum.
    """

    def __init__(self, curve: SasCurve) -> None:
        self.max_power_w = curve.max_power()[2]
        self._step_v = curve.voc_v / (_TABLE_ROWS - 1)
        self._amps: list[float] = curve.currents_a(np.linspace(0.0, curve.voc_v, _TABLE_ROWS)).tolist()
        self._amps[-1] = 0.0

    def at(self, voltage_v: float, array_w: float) -> float:
        """Amperes at a terminal voltage of an array whose maximum is now `array_w`."""
        place = max(voltage_v, 0.0) / self._step_v
        index = int(place)
        if index >= len(self._amps) - 1:
            return 0.0
        low = self._amps[index]
        return (low + (place - index) * (self._amps[index + 1] - low)) * array_w / self.max_power_w
