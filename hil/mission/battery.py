"""A battery pack: open-circuit voltage against charge, its energy content, and its inner resistance over a step.

The pack is OCV(SOC) behind a series resistance and, if asked for, one resistance with a parallel capacitance: the
voltage that builds up and decays over a minute or so under load. Under the constant current of one step its mean over
the step is known exactly, so that the whole pack looks like one source behind one resistance: `Source`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

# Open-circuit volts of one NMC cell against state of charge; textbook values, assumed (not a measured cell).
NMC_OCV = ((0.0, 3.0), (0.1, 3.4), (0.3, 3.6), (0.5, 3.7), (0.75, 3.9), (1.0, 4.2))


class Battery:
    """OCV table and energy content of a pack. Energies in joules, charge as state of charge 0..1."""

    def __init__(
        self, capacity_ah: float, cells_series: int = 1, ocv: tuple[tuple[float, float], ...] = NMC_OCV
    ) -> None:
        self.charge_c = capacity_ah * 3_600.0
        self.soc = tuple(soc for soc, _ in ocv)
        self.volts = tuple(volt * cells_series for _, volt in ocv)
        joules = [0.0]
        for index in range(1, len(self.soc)):
            width = self.soc[index] - self.soc[index - 1]
            joules.append(joules[-1] + self.charge_c * width * 0.5 * (self.volts[index] + self.volts[index - 1]))
        self._joules = tuple(joules)

    def ocv_v(self, soc: float) -> float:
        """Open-circuit voltage of the pack."""
        index, share = self._place(soc)
        return self.volts[index] + share * (self.volts[index + 1] - self.volts[index])

    def energy_j(self, soc: float) -> float:
        """Open-circuit energy content: the integral of OCV over charge."""
        index, share = self._place(soc)
        low, high = self.volts[index], self.volts[index + 1]
        width_c = self.charge_c * (self.soc[index + 1] - self.soc[index])
        return self._joules[index] + width_c * share * (low + 0.5 * share * (high - low))

    def soc_at(self, ocv_v: float) -> float:
        """State of charge at an open-circuit voltage of the pack, held within 0..1."""
        if ocv_v <= self.volts[0]:
            return 0.0
        if ocv_v >= self.volts[-1]:
            return 1.0
        index = bisect_right(self.volts, ocv_v) - 1
        share = (ocv_v - self.volts[index]) / (self.volts[index + 1] - self.volts[index])
        return self.soc[index] + share * (self.soc[index + 1] - self.soc[index])

    def mean_ocv_v(self, soc_a: float, soc_b: float) -> float:
        """Mean open-circuit voltage between two states of charge: energy moved per charge moved.

        Summed over the table's segments: the difference of two energies would lose its digits over short steps.
        """
        low, high = (soc_a, soc_b) if soc_a <= soc_b else (soc_b, soc_a)
        first, low_share = self._place(low)
        last, _ = self._place(high)
        if first == last:
            middle = 0.5 * (low + high)
            share = (middle - self.soc[first]) / (self.soc[first + 1] - self.soc[first])
            return self.volts[first] + share * (self.volts[first + 1] - self.volts[first])
        at, volts, sum_v = low, self.volts[first] + low_share * (self.volts[first + 1] - self.volts[first]), 0.0
        for index in range(first + 1, last + 1):
            sum_v += (self.soc[index] - at) * 0.5 * (volts + self.volts[index])
            at, volts = self.soc[index], self.volts[index]
        sum_v += (high - at) * 0.5 * (volts + self.ocv_v(high))
        return sum_v / (high - low)

    def _place(self, soc: float) -> tuple[int, float]:
        index = min(max(bisect_right(self.soc, soc) - 1, 0), len(self.soc) - 2)
        return index, (soc - self.soc[index]) / (self.soc[index + 1] - self.soc[index])


@dataclass(frozen=True, slots=True)
class Source:
    """The pack over one step of constant current I (discharging positive): mean terminal volts = OCV - drop - R I."""

    resistance_ohm: float
    drop_v: float
    decay: float
    """What is left of the polarization's present voltage after the step."""


class Polarization:
    """One resistance with a parallel capacitance: its voltage, exact for steps of constant current.

    v <- v e^(-dt/tau) + R I (1 - e^(-dt/tau)). Its mean over the step is R I (1 - p) + v p with
    p = (1 - e^(-dt/tau)) tau / dt.
    """

    def __init__(self, series_ohm: float, ohm: float, time_constant_s: float) -> None:
        self.volts = 0.0
        self._series_ohm = series_ohm
        self._ohm = ohm
        self._tau_s = time_constant_s
        self._farad = time_constant_s / ohm if ohm > 0 else 0.0

    @property
    def energy_j(self) -> float:
        """What the capacitance holds."""
        return 0.5 * self._farad * self.volts * self.volts

    def source(self, dt_s: float) -> Source:
        """The pack's inner resistance and voltage drop over a step of `dt_s`."""
        if self._ohm == 0.0:
            return Source(self._series_ohm, 0.0, 1.0)
        ratio = dt_s / self._tau_s
        decay = math.exp(-ratio)
        share = -math.expm1(-ratio) / ratio if ratio > 0 else 1.0
        return Source(self._series_ohm + self._ohm * (1.0 - share), share * self.volts, decay)

    def move(self, source: Source, current_a: float, dt_s: float) -> float:
        """Advance by one step of constant current; the joules that became heat, the series resistance's included."""
        series_j = self._series_ohm * current_a * current_a * dt_s
        if self._ohm == 0.0:
            return series_j
        mean_v = source.drop_v + (source.resistance_ohm - self._series_ohm) * current_a
        before_j = self.energy_j
        self.volts = self.volts * source.decay + self._ohm * current_a * (1.0 - source.decay)
        return series_j + current_a * mean_v * dt_s - (self.energy_j - before_j)
