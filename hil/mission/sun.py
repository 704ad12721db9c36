"""Where the Sun is: a truncated VSOP87 series, within five arc seconds (0.0013 deg) of JPL's DE421 over 2000-2049.

The largest terms of the Earth's heliocentric longitude and radius after Meeus, Astronomical Algorithms, appendix III;
latitude (below 1.2") is neglected. Referred to the true equator and *mean* equinox of date, so that it meets SGP4's
TEME vectors without a further rotation. Includes annual aberration: the apparent Sun is the one that casts shadows.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hil.mission.frames import DAY_S, TT_MINUS_UTC_S

Floats = npt.NDArray[np.float64]

AU_KM = 149_597_870.7
_ARCSEC = math.pi / 648_000.0

# amplitude (1e-8 rad or au), phase (rad), frequency (rad per Julian millennium)
_L0 = np.array(
    [
        (3_341_656.0, 4.6692568, 6_283.0758500),
        (34_894.0, 4.62610, 12_566.15170),
        (3_497.0, 2.7441, 5_753.3849),
        (3_418.0, 2.8289, 3.5231),
        (3_136.0, 3.6277, 77_713.7715),
        (2_676.0, 4.4181, 7_860.4194),
        (2_343.0, 6.1352, 3_930.2097),
        (1_324.0, 0.7425, 11_506.7698),
        (1_273.0, 2.0371, 529.6910),
        (1_199.0, 1.1096, 1_577.3435),
        (990.0, 5.233, 5_884.927),
        (902.0, 2.045, 26.298),
        (857.0, 3.508, 398.149),
        (780.0, 1.179, 5_223.694),
        (753.0, 2.533, 5_507.553),
        (505.0, 4.583, 18_849.228),
        (492.0, 4.205, 775.523),
    ]
)
_L1 = np.array([(206_059.0, 2.678235, 6_283.075850), (4_303.0, 2.6351, 12_566.1517)])
_R0 = np.array(
    [
        (1_670_700.0, 3.0984635, 6_283.0758500),
        (13_956.0, 3.05525, 12_566.15170),
        (3_084.0, 5.1985, 77_713.7715),
        (1_628.0, 1.1739, 5_753.3849),
        (1_576.0, 2.8469, 7_860.4194),
    ]
)
_R1 = np.array([(103_019.0, 1.107490, 6_283.075850)])


def sun_teme_km(day: float, fraction: Floats) -> Floats:
    """Apparent geocentric Sun in km, shape (n, 3), for UTC Julian dates `day` + `fraction`; frame: TEME of date."""
    tau = (day - 2_451_545.0 + fraction + TT_MINUS_UTC_S / DAY_S) / 365_250.0
    earth_longitude = 1.75347046 + 6_283.31966747 * tau + 5.2919e-4 * tau**2
    earth_longitude = earth_longitude + 1e-8 * (_series(_L0, tau) + tau * _series(_L1, tau))
    radius_au = 1.00013989 + 1e-8 * (_series(_R0, tau) + tau * _series(_R1, tau))

    centuries = 10.0 * tau
    node = np.radians(125.04452 - 1_934.136261 * centuries)
    sun_mean = np.radians(280.4665 + 36_000.7698 * centuries)
    moon_mean = np.radians(218.3165 + 481_267.8813 * centuries)
    in_longitude = _ARCSEC * (
        -17.20 * np.sin(node) - 1.32 * np.sin(2 * sun_mean) - 0.23 * np.sin(2 * moon_mean) + 0.21 * np.sin(2 * node)
    )
    in_obliquity = _ARCSEC * (
        9.20 * np.cos(node) + 0.57 * np.cos(2 * sun_mean) + 0.10 * np.cos(2 * moon_mean) - 0.09 * np.cos(2 * node)
    )
    obliquity = np.radians(23.439291111 - 0.013004167 * centuries) + in_obliquity

    frame_bias = -0.09033 * _ARCSEC  # dynamical equinox of VSOP87 to FK5
    aberration = -20.4898 * _ARCSEC / radius_au
    longitude = earth_longitude + math.pi + frame_bias + in_longitude + aberration
    x, y = np.cos(longitude), np.cos(obliquity) * np.sin(longitude)
    z = np.sin(obliquity) * np.sin(longitude)
    equinox = in_longitude * np.cos(obliquity)  # equation of the equinoxes: true to mean equinox
    cos, sin = np.cos(equinox), np.sin(equinox)
    return np.column_stack([x * cos + y * sin, y * cos - x * sin, z]) * (radius_au * AU_KM)[:, None]


def _series(terms: Floats, tau: Floats) -> Floats:
    total = np.zeros_like(tau)
    for amplitude, phase, frequency in terms.tolist():  # term by term: a year at 30 s would not fit as one table
        total += amplitude * np.cos(phase + frequency * tau)
    return total
