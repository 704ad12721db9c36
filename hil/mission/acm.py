"""Adaptive coding and modulation: the DVB-S2 ladder as data, and which rung a modem stands on while its signal moves.

Source of the rows: ETSI EN 302 307-1, table 13: FECFRAME of 64,800 bits, no pilots, quasi-error-free (packet error rate
1e-7) over an ideal channel with perfect recovery; what a real modem loses belongs into the budget's margin.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModCod:
    """One mode: information bits per symbol, and the Es/N0 in dB that it needs."""

    name: str
    bits_per_symbol: float
    es_n0_db: float


DVB_S2 = (
    ModCod("QPSK 1/4", 0.490243, -2.35),
    ModCod("QPSK 1/3", 0.656448, -1.24),
    ModCod("QPSK 2/5", 0.789412, -0.30),
    ModCod("QPSK 1/2", 0.988858, 1.00),
    ModCod("QPSK 3/5", 1.188304, 2.23),
    ModCod("QPSK 2/3", 1.322253, 3.10),
    ModCod("QPSK 3/4", 1.487473, 4.03),
    ModCod("QPSK 4/5", 1.587196, 4.68),
    ModCod("QPSK 5/6", 1.654663, 5.18),
    ModCod("QPSK 8/9", 1.766451, 6.20),
    ModCod("QPSK 9/10", 1.788612, 6.42),
    ModCod("8PSK 3/5", 1.779991, 5.50),
    ModCod("8PSK 2/3", 1.980636, 6.62),
    ModCod("8PSK 3/4", 2.228124, 7.91),
    ModCod("8PSK 5/6", 2.478562, 9.35),
    ModCod("8PSK 8/9", 2.646012, 10.69),
    ModCod("8PSK 9/10", 2.679207, 10.98),
    ModCod("16APSK 2/3", 2.637201, 8.97),
    ModCod("16APSK 3/4", 2.966728, 10.21),
    ModCod("16APSK 4/5", 3.165623, 11.03),
    ModCod("16APSK 5/6", 3.300184, 11.61),
    ModCod("16APSK 8/9", 3.523143, 12.89),
    ModCod("16APSK 9/10", 3.567342, 13.13),
    ModCod("32APSK 3/4", 3.703295, 12.73),
    ModCod("32APSK 4/5", 3.951571, 13.64),
    ModCod("32APSK 5/6", 4.119540, 14.28),
    ModCod("32APSK 8/9", 4.397854, 15.69),
    ModCod("32APSK 9/10", 4.453027, 16.05),
)


def ladder(modes: Iterable[ModCod] = DVB_S2) -> tuple[ModCod, ...]:
    """The modes worth using, rising in both columns: one that needs more signal and carries no more is left out."""
    rungs: list[ModCod] = []
    for mode in sorted(modes, key=lambda item: (item.es_n0_db, -item.bits_per_symbol)):
        if not rungs or mode.bits_per_symbol > rungs[-1].bits_per_symbol:
            rungs.append(mode)
    return tuple(rungs)


def climb(rung: int, holds: int, reaches: int) -> int:
    """The rung after one look at the signal; 0 is none at all.

    `holds`: how many rungs the signal carries; `reaches`: how many it carries with the hysteresis on top, so never
    more. A modem goes up only to what it reaches and down only to what still holds, which is what keeps it from
    flapping: between a step up and the next step down the signal has fallen by the whole hysteresis.
    """
    return min(max(rung, reaches), holds)
