"""Time and frames: UTC instants, Julian dates, sidereal time, TEME to ITRF, geodetic stations.

Simplifications, stated once: UT1 = UTC (the difference is kept below 0.9 s by leap seconds and has been below 0.1 s
since 2021: less than 50 m at the equator), polar motion is neglected (10 m), no leap second inside a mission, and
TT - UTC is the value of 2017 and later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import numpy.typing as npt

from hil.errors import UsageError

Floats = npt.NDArray[np.float64]

TT_MINUS_UTC_S = 69.184
DAY_S = 86_400.0
WGS84_RADIUS_M = 6_378_137.0
WGS84_FLATTENING = 1 / 298.257223563


def utc(instant: datetime) -> datetime:
    """The instant in UTC; a naive datetime is refused rather than guessed."""
    if instant.tzinfo is None:
        raise UsageError(f"time {instant.isoformat()} has no time zone", hint="write it in UTC: 2026-03-20T00:00:00Z")
    return instant.astimezone(UTC)


def utc_text(start: datetime, t_s: float = 0.0) -> str:
    """`start` + `t_s` as `2026-03-20T00:00:00.000Z`, rounded to the millisecond."""
    instant = utc(start) + timedelta(milliseconds=round(t_s * 1000.0))
    rounded = instant + timedelta(microseconds=500)
    return f"{rounded:%Y-%m-%dT%H:%M:%S}.{rounded.microsecond // 1000:03d}Z"


def julian_date(instant: datetime) -> tuple[float, float]:
    """(midnight's Julian date, fraction of the day), UTC; split so that no precision is lost."""
    instant = utc(instant)
    midnight = instant.replace(hour=0, minute=0, second=0, microsecond=0)
    return instant.toordinal() + 1_721_424.5, (instant - midnight).total_seconds() / DAY_S


def from_julian_date(day: float, fraction: float) -> datetime:
    """Inverse of `julian_date`, to the microsecond."""
    return datetime(2000, 1, 1, tzinfo=UTC) + timedelta(days=day - 2_451_544.5) + timedelta(days=fraction)


def gmst_rad(day: float, fraction: Floats) -> Floats:
    """Greenwich mean sidereal time, IAU 1982, radians in 0..2 pi; UT1 is taken as UTC."""
    centuries = (day - 2_451_545.0 + fraction) / 36_525.0
    turns = (day - 2_451_545.0) % 1.0 + fraction  # keep the whole days out: they are whole turns
    seconds = 67_310.54841 + DAY_S * turns
    seconds = seconds + centuries * (8_640_184.812866 + centuries * (0.093104 - 6.2e-6 * centuries))
    return np.asarray(np.mod(seconds * (2.0 * math.pi / DAY_S), 2.0 * math.pi), dtype=np.float64)


def teme_to_itrf(position: Floats, gmst: Floats) -> Floats:
    """Rotate TEME vectors, shape (n, 3), into the Earth-fixed frame; polar motion neglected."""
    cos, sin = np.cos(gmst), np.sin(gmst)
    x, y, z = position[:, 0], position[:, 1], position[:, 2]
    return np.column_stack([cos * x + sin * y, cos * y - sin * x, z])


def geodetic(itrf_m: Floats) -> tuple[Floats, Floats, Floats]:
    """WGS-84 latitude (deg), longitude (deg, -180..180) and altitude (m) of Earth-fixed positions, shape (n, 3).

    Bowring's closed form: better than 1e-6 deg and a centimetre from the ground to geostationary height.
    """
    x, y, z = itrf_m[:, 0], itrf_m[:, 1], itrf_m[:, 2]
    e2 = WGS84_FLATTENING * (2.0 - WGS84_FLATTENING)
    polar_m = WGS84_RADIUS_M * (1.0 - WGS84_FLATTENING)
    across = np.hypot(x, y)
    reduced = np.arctan2(z * WGS84_RADIUS_M, across * polar_m)
    latitude = np.arctan2(
        z + e2 / (1.0 - e2) * polar_m * np.sin(reduced) ** 3, across - e2 * WGS84_RADIUS_M * np.cos(reduced) ** 3
    )
    sine = np.sin(latitude)
    altitude = across * np.cos(latitude) + z * sine - WGS84_RADIUS_M * np.sqrt(1.0 - e2 * sine * sine)
    return np.degrees(latitude), np.degrees(np.arctan2(y, x)), altitude


@dataclass(frozen=True, slots=True)
class Station:
    """A ground station on the WGS-84 ellipsoid.

    `mask_deg` is the lowest usable elevation. `mask_table` overrides it by azimuth: (azimuth_deg, elevation_deg) rows,
    interpolated linearly around the compass. Raises UsageError when a value is out of range.
    """

    name: str
    latitude_deg: float
    longitude_deg: float
    altitude_m: float = 0.0
    mask_deg: float = 5.0
    mask_table: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        ranges = (
            ("latitude_deg", self.latitude_deg, -90.0, 90.0),
            ("longitude_deg", self.longitude_deg, -180.0, 360.0),
            ("altitude_m", self.altitude_m, -500.0, 9_000.0),
            ("mask_deg", self.mask_deg, -5.0, 89.9),
            *(("mask_table azimuth", azimuth, 0.0, 360.0) for azimuth, _ in self.mask_table),
            *(("mask_table elevation", mask, -5.0, 89.9) for _, mask in self.mask_table),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:  # also refuses nan
                raise UsageError(
                    f"station {self.name}: {name} is {value}, must be within {low:g}..{high:g}",
                    hint="stations are latitude, longitude in degrees (north and east positive), altitude in metres",
                )

    def itrf_m(self) -> Floats:
        """Earth-fixed position in metres, shape (3,)."""
        latitude, longitude = math.radians(self.latitude_deg), math.radians(self.longitude_deg)
        e2 = WGS84_FLATTENING * (2.0 - WGS84_FLATTENING)
        normal = WGS84_RADIUS_M / math.sqrt(1.0 - e2 * math.sin(latitude) ** 2)
        across = (normal + self.altitude_m) * math.cos(latitude)
        up = (normal * (1.0 - e2) + self.altitude_m) * math.sin(latitude)
        return np.array([across * math.cos(longitude), across * math.sin(longitude), up])

    def axes(self) -> Floats:
        """Rows east, north, up of the station's horizon in the Earth-fixed frame, shape (3, 3)."""
        latitude, longitude = math.radians(self.latitude_deg), math.radians(self.longitude_deg)
        sin_lat, cos_lat = math.sin(latitude), math.cos(latitude)
        sin_lon, cos_lon = math.sin(longitude), math.cos(longitude)
        return np.array(
            [
                [-sin_lon, cos_lon, 0.0],
                [-sin_lat * cos_lon, -sin_lat * sin_lon, cos_lat],
                [cos_lat * cos_lon, cos_lat * sin_lon, sin_lat],
            ]
        )

    def mask_at(self, azimuth_deg: Floats) -> Floats | float:
        """Lowest usable elevation in degrees towards each azimuth."""
        if not self.mask_table:
            return self.mask_deg
        azimuth, mask = (np.array(column) for column in zip(*sorted(self.mask_table), strict=True))
        return np.asarray(np.interp(azimuth_deg, azimuth, mask, period=360.0), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Look:
    """Where a station sees the satellite; arrays of shape (n,). Geometric: no light time, no refraction."""

    elevation_deg: Floats
    azimuth_deg: Floats
    range_m: Floats


def look(station: Station, satellite_itrf_m: Floats) -> Look:
    """Elevation, azimuth (from north through east) and slant range for positions of shape (n, 3) in metres."""
    local = (satellite_itrf_m - station.itrf_m()) @ station.axes().T
    east, north, up = local[:, 0], local[:, 1], local[:, 2]
    across = np.hypot(east, north)
    return Look(
        elevation_deg=np.degrees(np.arctan2(up, across)),
        azimuth_deg=np.mod(np.degrees(np.arctan2(east, north)), 360.0),
        range_m=np.hypot(across, up),
    )
