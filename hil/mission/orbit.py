"""Orbits: strict TLE reading, sun-synchronous design orbits, and vectorised SGP4 propagation.

`Orbit.from_tle(text)` and `Orbit.sso(...)` make one; `Ephemeris(orbit, start)` answers in seconds since `start`.
SGP4 itself is never ours: the `sgp4` package does it, with the WGS-72 constants that element sets are fitted with.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
from sgp4.api import SGP4_ERRORS, WGS72, Satrec

from hil.errors import UsageError
from hil.mission import frames
from hil.mission.frames import Floats, Look, Station
from hil.mission.sun import sun_teme_km

TLE_FRESH_DAYS = 7.0
_TLE_DRIFT_KM_PER_DAY = (1.0, 3.0)  # sgp4's README; along-track, so it lands in AOS and LOS
_LOWEST_PERIGEE_KM = 60.0  # real elements of objects in their last days go down to 80 km
_MU_KM3_S2 = 398_600.4418
_EARTH_KM = 6_378.137
_J2 = 1.08262668e-3
_NODE_RATE_RAD_S = 1.99106e-7  # one turn per tropical year
_SGP4_EPOCH_JD = 2_433_281.5  # 1949 December 31: day zero of sgp4init
_SGP4_MESSAGE = {int(code): str(text) for code, text in SGP4_ERRORS.items()}


@dataclass(frozen=True, slots=True)
class Caution:
    """Something a person should know before trusting a result. `code` is stable, `message` is for reading."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Orbit:
    """One satellite's mean elements at an epoch, in the units of a TLE. Make it with `from_tle` or `sso`.

    `mean_motion_rev_day` is the Kozai mean motion SGP4 expects. Angles in degrees, TEME of epoch.
    """

    name: str
    epoch: datetime
    inclination_deg: float
    raan_deg: float
    eccentricity: float
    argument_of_perigee_deg: float
    mean_anomaly_deg: float
    mean_motion_rev_day: float
    bstar: float = 0.0
    line1: str = ""  # the TLE as read; empty for a design orbit
    line2: str = ""
    _satrec: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_satrec", self._make_satrec())

    @classmethod
    def from_tle(cls, text: str, *, name: str = "", source: str = "TLE") -> Orbit:
        """Read the only TLE in `text`: two lines of 69 characters, an optional name line, `#` comments and blanks.

        `source` (a file name) goes into messages: `UsageError` carries source:line for a bad checksum, length,
        column, or an orbit that cannot exist.
        """
        lines = [
            (number, line.rstrip())
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        title = ""
        if lines and not _looks_like(lines[0][1], "1"):
            title = lines.pop(0)[1].removeprefix("0 ").strip()
        if len(lines) != 2:
            raise UsageError(
                f"{source}: expected one TLE (two lines), found {len(lines)} element lines",
                hint="give a file with exactly one satellite: an optional name line, then the lines '1 …' and '2 …'",
            )
        _check_line(source, *lines[0], expected="1")
        _check_line(source, *lines[1], expected="2")
        return _read_elements(cls, source, lines[0], lines[1], name or title)

    @classmethod
    def sso(
        cls,
        altitude_km: float,
        epoch: datetime,
        *,
        ltdn_h: float | None = None,
        ltan_h: float | None = None,
        name: str = "",
    ) -> Orbit:
        """A circular sun-synchronous design orbit at `altitude_km` above the equatorial radius.

        Give the local mean solar time of the descending or of the ascending node in hours. Inclination from the J2
        node rate, mean motion with Kozai's correction (without it the altitude is 3 km off), node from the mean Sun.
        """
        if (ltdn_h is None) == (ltan_h is None):
            raise UsageError("give either ltdn_h or ltan_h", hint="ltan_h = ltdn_h + 12, modulo 24")
        node_h = float(ltan_h) if ltan_h is not None else float(ltdn_h or 0.0) + 12.0
        if not 0 <= node_h <= 36 or not 200 <= altitude_km <= 5_900:
            raise UsageError(
                f"no sun-synchronous orbit at {altitude_km} km with node time {node_h % 24} h",
                hint="altitude 200..5900 km, node time 0..24 h",
            )
        axis_km = _EARTH_KM + altitude_km
        motion = math.sqrt(_MU_KM3_S2 / axis_km**3)
        flattening = _J2 * (_EARTH_KM / axis_km) ** 2
        cos_i = -_NODE_RATE_RAD_S / (1.5 * flattening * motion)
        if cos_i < -1.0:
            raise UsageError(f"no sun-synchronous orbit exists at {altitude_km} km", hint="stay below about 5900 km")
        kozai = motion * (1.0 + 0.75 * flattening * (3.0 * cos_i**2 - 1.0))
        day, fraction = frames.julian_date(epoch)
        raan = 280.460 + 0.9856474 * (day - 2_451_545.0 + fraction) + 15.0 * (node_h - 12.0)
        return cls(
            name=name or f"sso-{altitude_km:g}km-ltan{node_h % 24:05.2f}h",
            epoch=frames.utc(epoch),
            inclination_deg=math.degrees(math.acos(cos_i)),
            raan_deg=raan % 360.0,
            eccentricity=1e-4,
            argument_of_perigee_deg=0.0,
            mean_anomaly_deg=0.0,
            mean_motion_rev_day=kozai * frames.DAY_S / (2.0 * math.pi),
        )

    @property
    def period_s(self) -> float:
        """Anomalistic period, seconds."""
        return frames.DAY_S / self.mean_motion_rev_day

    @property
    def perigee_km(self) -> float:
        """Height of the perigee above the equatorial radius, km, from the mean elements."""
        return _axis_km(self.mean_motion_rev_day) * (1.0 - self.eccentricity) - _EARTH_KM

    @property
    def satrec(self) -> Any:
        """The SGP4 record, for whoever propagates many orbits in one call."""
        return self._satrec

    def age_days(self, at: datetime) -> float:
        """Days from the epoch to `at`; negative before the epoch."""
        return (frames.utc(at) - self.epoch).total_seconds() / frames.DAY_S

    def warnings(self, at: datetime, *, days: float = 0.0) -> tuple[Caution, ...]:
        """What to know about using these elements from `at` for `days`. A design orbit does not age."""
        ages = [self.age_days(at), self.age_days(at + timedelta(days=days))]
        age = max(ages, key=abs)
        if not self.line1 or abs(age) <= TLE_FRESH_DAYS:
            return ()
        low, high = (abs(age) * drift for drift in _TLE_DRIFT_KM_PER_DAY)
        text = (
            f"{self.name}: the TLE is {abs(age):.1f} days {'old' if age > 0 else 'in the future'} when used; expect "
            f"{low:.0f}-{high:.0f} km along track, {low / 7.6:.1f}-{high / 7.6:.1f} s in AOS and LOS"
        )
        return (Caution("tle-age", text),)

    def teme_km(self, day: float, fraction: Floats) -> tuple[Floats, Floats]:
        """Positions (km) and velocities (km/s) in TEME, each (n, 3). Raises UsageError when SGP4 gives up."""
        error, position, velocity = self._satrec.sgp4_array(np.full(fraction.shape, day), fraction)
        if error.any():
            first = int(np.nonzero(error)[0][0])
            instant = frames.from_julian_date(day, float(fraction[first]))
            reason = _SGP4_MESSAGE.get(int(error[first]), "unknown error")
            raise UsageError(
                f"{self.name}: the orbit cannot be propagated to {frames.utc_text(instant)}: {reason}",
                hint="use a newer TLE, or a start time nearer to its epoch",
            )
        return position, velocity

    def as_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to an equal orbit."""
        return {
            "name": self.name,
            "epoch": self.epoch.isoformat(),
            "inclination_deg": self.inclination_deg,
            "raan_deg": self.raan_deg,
            "eccentricity": self.eccentricity,
            "argument_of_perigee_deg": self.argument_of_perigee_deg,
            "mean_anomaly_deg": self.mean_anomaly_deg,
            "mean_motion_rev_day": self.mean_motion_rev_day,
            "bstar": self.bstar,
            "line1": self.line1,
            "line2": self.line2,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Orbit:
        """Inverse of `as_dict`."""
        return cls(**{**values, "epoch": datetime.fromisoformat(values["epoch"])})

    def _make_satrec(self) -> Any:
        if self.line1:
            return Satrec.twoline2rv(self.line1, self.line2, WGS72)
        satrec = Satrec()
        day, fraction = frames.julian_date(self.epoch)
        satrec.sgp4init(
            WGS72,
            "i",
            0,
            day - _SGP4_EPOCH_JD + fraction,
            self.bstar,
            0.0,
            0.0,
            self.eccentricity,
            math.radians(self.argument_of_perigee_deg),
            math.radians(self.inclination_deg),
            math.radians(self.mean_anomaly_deg),
            self.mean_motion_rev_day * 2.0 * math.pi / 1_440.0,
            math.radians(self.raan_deg),
        )
        return satrec


@dataclass(frozen=True, slots=True)
class Ephemeris:
    """An orbit on a time axis: every method takes seconds since `start` as an array of shape (n,)."""

    orbit: Orbit
    start: datetime
    _day: float = field(init=False, repr=False, compare=False)
    _fraction: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        day, fraction = frames.julian_date(self.start)
        object.__setattr__(self, "_day", day)
        object.__setattr__(self, "_fraction", fraction)

    def teme_km(self, t_s: Floats) -> tuple[Floats, Floats]:
        """Position (km) and velocity (km/s) in TEME, each (n, 3)."""
        return self.orbit.teme_km(self._day, self._days(t_s))

    def sun_km(self, t_s: Floats) -> Floats:
        """Apparent Sun in TEME, km, (n, 3)."""
        return sun_teme_km(self._day, self._days(t_s))

    def itrf_m(self, t_s: Floats) -> Floats:
        """Earth-fixed position in metres, (n, 3)."""
        days = self._days(t_s)
        position, _ = self.orbit.teme_km(self._day, days)
        return 1_000.0 * frames.teme_to_itrf(position, frames.gmst_rad(self._day, days))

    def look(self, station: Station, t_s: Floats) -> Look:
        """Elevation, azimuth and range of the satellite from `station`."""
        return frames.look(station, self.itrf_m(t_s))

    def _days(self, t_s: Floats) -> npt.NDArray[np.float64]:
        return self._fraction + np.asarray(t_s, dtype=np.float64) / frames.DAY_S


def checksum(line: str) -> int:
    """The TLE checksum of the first 68 characters: sum of digits, a minus counts one, modulo 10."""
    return sum(int(c) if c in "0123456789" else c == "-" for c in line[:68]) % 10


def _looks_like(line: str, number: str) -> bool:
    # A satellite may be called "1 UP": a name line is told apart by its length as well.
    return line.startswith(f"{number} ") and len(line) > 24


def _check_line(source: str, number: int, line: str, *, expected: str) -> None:
    where = f"{source}:{number}"
    if not line.isascii():
        raise UsageError(f"{where}: TLE line has non-ASCII characters", hint="download the element set again as text")
    if not line.startswith(f"{expected} "):
        raise UsageError(f"{where}: expected TLE line {expected}, got {line[:20]!r}", hint="line 1 comes before line 2")
    if len(line) != 69:
        raise UsageError(
            f"{where}: a TLE line has 69 characters, this one {len(line)}",
            hint="columns matter: copy the element set without re-flowing it",
        )
    if not line[68].isdigit() or int(line[68]) != checksum(line):
        raise UsageError(
            f"{where}: checksum is {line[68]!r}, the line adds up to {checksum(line)}",
            hint="a digit was altered or lost: fetch the element set again",
        )


_EXPONENT = re.compile(r"([ +-])(\d{5})([+-]\d)")


def _read_elements(cls: type[Orbit], source: str, first: tuple[int, str], second: tuple[int, str], name: str) -> Orbit:
    (row1, line1), (row2, line2) = first, second

    def bad(row: int, message: str) -> UsageError:
        return UsageError(f"{source}:{row}: {message}", hint="fetch the element set again, or check who edited it")

    def number(row: int, line: str, low: int, high: int, what: str, bounds: tuple[float, float]) -> float:
        text = line[low:high].strip()
        try:
            value = float(text)
        except ValueError:
            raise bad(row, f"{what} is {text!r}, not a number") from None
        if not bounds[0] <= value <= bounds[1]:
            raise bad(row, f"{what} is {value:g}, must be within {bounds[0]:g}..{bounds[1]:g}")
        return value

    if line1[2:7] != line2[2:7]:
        raise bad(row2, f"the two lines belong to different satellites: {line1[2:7]} and {line2[2:7]}")
    year = int(number(row1, line1, 18, 20, "epoch year", (0, 99)))
    day = number(row1, line1, 20, 32, "epoch day", (1.0, 367.0))
    drag = _EXPONENT.fullmatch(line1[53:61])
    if drag is None:
        raise bad(row1, f"drag term is {line1[53:61]!r}, expected the form ' 12345-3'")
    inclination = number(row2, line2, 8, 16, "inclination", (0.0, 180.0))
    raan = number(row2, line2, 17, 25, "right ascension of the node", (0.0, 360.0))
    if not line2[26:33].isdigit():
        raise bad(row2, f"eccentricity is {line2[26:33]!r}, expected seven digits")
    perigee = number(row2, line2, 34, 42, "argument of perigee", (0.0, 360.0))
    anomaly = number(row2, line2, 43, 51, "mean anomaly", (0.0, 360.0))
    motion = number(row2, line2, 52, 63, "mean motion", (0.05, 18.0))
    century = 1900 if year >= 57 else 2000
    epoch = datetime(century + year, 1, 1, tzinfo=UTC) + timedelta(days=day - 1.0)
    satellite = line1[2:7].strip()
    eccentricity = float(f"0.{line2[26:33]}")
    perigee_km = _axis_km(motion) * (1.0 - eccentricity) - _EARTH_KM
    if perigee_km < _LOWEST_PERIGEE_KM:
        raise bad(row2, f"the perigee is {perigee_km:.0f} km high: this orbit has decayed or never existed")
    return cls(
        name=name or satellite,
        epoch=epoch,
        inclination_deg=inclination,
        raan_deg=raan,
        eccentricity=eccentricity,
        argument_of_perigee_deg=perigee,
        mean_anomaly_deg=anomaly,
        mean_motion_rev_day=motion,
        bstar=float(f"{drag[1].strip()}0.{drag[2]}e{drag[3]}"),
        line1=line1,
        line2=line2,
    )


def _axis_km(mean_motion_rev_day: float) -> float:
    return float((_MU_KM3_S2 * (frames.DAY_S / (2.0 * math.pi * mean_motion_rev_day)) ** 2) ** (1.0 / 3.0))
