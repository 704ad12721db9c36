"""Orbits from every source, and vectorised SGP4 propagation.

`Orbit.from_tle`, `from_omm`, `kepler` and `sso` make one; `Ephemeris(orbit, start)` answers in seconds since `start`.
SGP4 itself is never ours: the `sgp4` package does it, with the WGS-72 constants that element sets are fitted with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
from sgp4.api import SGP4_ERRORS, WGS72, Satrec

from hil.errors import UsageError
from hil.mission import frames
from hil.mission.elements import BOUNDS, EARTH_KM, J2, MU_KM3_S2, axis_km, impossible, kozai_rev_day
from hil.mission.frames import Floats, Look, Station
from hil.mission.omm import read_omm
from hil.mission.sun import sun_teme_km
from hil.mission.tle import read_tle

FRESH_DAYS = 7.0
YEAR_DAYS = 365.25
REFUSED_YEARS = 5.0  # by then drag, manoeuvres and the node's drift have made another orbit of it
_DRIFT_KM_PER_DAY = (1.0, 3.0)  # sgp4's README; along-track, so it lands in AOS and LOS
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
    """One satellite's mean elements at an epoch, in the units of a TLE. Make it with one of the class methods.

    `mean_motion_rev_day` is the Kozai mean motion SGP4 expects. Angles in degrees, TEME of epoch. `tracked` elements
    describe a real object and age; a design orbit does not.
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
    line1: str = ""  # the TLE as read; empty for every other source
    line2: str = ""
    tracked: bool = False
    _satrec: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_satrec", self._make_satrec())

    @classmethod
    def from_tle(cls, text: str, *, source: str = "TLE") -> Orbit:
        """Read the only TLE in `text`; `source` (a file name) goes into messages. Errors: see `read_tle`."""
        elements, line1, line2 = read_tle(text, source=source)
        return cls(**elements, line1=line1, line2=line2, tracked=True)

    @classmethod
    def from_omm(cls, text: str, *, source: str = "OMM") -> Orbit:
        """Read the only satellite of a CCSDS 502 message, JSON or XML. Errors: see `read_omm`."""
        return cls(**read_omm(text, source=source), tracked=True)

    @classmethod
    def kepler(
        cls,
        epoch: datetime,
        *,
        inclination_deg: float,
        altitude_km: float | None = None,
        semi_major_axis_km: float | None = None,
        mean_motion_rev_day: float | None = None,
        eccentricity: float = 1e-4,
        raan_deg: float = 0.0,
        argument_of_perigee_deg: float = 0.0,
        mean_anomaly_deg: float = 0.0,
        bstar: float = 0.0,
        name: str = "",
    ) -> Orbit:
        """A design orbit from mean elements in TEME of `epoch`. Give exactly one of the three sizes.

        `altitude_km` is the semi-major axis less the equatorial radius (of an eccentric orbit: the mean of perigee and
        apogee). `mean_motion_rev_day` is Kozai's, as a TLE has it; the other two sizes are converted to it.
        Raises UsageError for a hyperbolic orbit or one whose perigee is below ground or decayed.
        """
        sizes = [size for size in (altitude_km, semi_major_axis_km, mean_motion_rev_day) if size is not None]
        if len(sizes) != 1:
            raise UsageError("give exactly one of altitude_km, semi_major_axis_km, mean_motion_rev_day")
        if not 0 <= eccentricity < 1:  # before the conversion, which has no answer for it
            raise UsageError(
                f"no such orbit: {impossible(1.0, eccentricity)}", hint="0 is a circle, below 1 an ellipse"
            )
        motion = mean_motion_rev_day
        if motion is None:
            axis = semi_major_axis_km if semi_major_axis_km is not None else EARTH_KM + (altitude_km or 0.0)
            if not axis > 0:
                raise UsageError(f"no such orbit: the semi-major axis is {axis:g} km", hint="above 6438 km")
            motion = kozai_rev_day(axis, inclination_deg, eccentricity)
        low, high = BOUNDS["mean_motion_rev_day"]
        reason = impossible(motion, eccentricity) if motion > 0 else "the mean motion is not above zero"
        if reason is None and not low <= motion <= high:
            reason = f"{motion:g} revolutions a day are not within SGP4's {low:g}..{high:g}"
        if reason is None and not 0 <= inclination_deg <= 180:
            reason = f"the inclination is {inclination_deg:g}, must be within 0..180"
        if reason is not None:
            raise UsageError(f"no such orbit: {reason}")
        return cls(
            name=name or f"kepler-{inclination_deg:g}deg",
            epoch=frames.utc(epoch),
            inclination_deg=inclination_deg,
            raan_deg=raan_deg % 360.0,
            eccentricity=eccentricity,
            argument_of_perigee_deg=argument_of_perigee_deg % 360.0,
            mean_anomaly_deg=mean_anomaly_deg % 360.0,
            mean_motion_rev_day=motion,
            bstar=bstar,
        )

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
        axis = EARTH_KM + altitude_km
        cos_i = -_NODE_RATE_RAD_S / (1.5 * J2 * (EARTH_KM / axis) ** 2 * math.sqrt(MU_KM3_S2 / axis**3))
        if cos_i < -1.0:
            raise UsageError(f"no sun-synchronous orbit exists at {altitude_km} km", hint="stay below about 5900 km")
        day, fraction = frames.julian_date(epoch)
        return cls.kepler(
            epoch,
            name=name or f"sso-{altitude_km:g}km-ltan{node_h % 24:05.2f}h",
            altitude_km=altitude_km,
            inclination_deg=math.degrees(math.acos(cos_i)),
            raan_deg=280.460 + 0.9856474 * (day - 2_451_545.0 + fraction) + 15.0 * (node_h - 12.0),
        )

    @property
    def period_s(self) -> float:
        """Anomalistic period, seconds."""
        return frames.DAY_S / self.mean_motion_rev_day

    @property
    def perigee_km(self) -> float:
        """Height of the perigee above the equatorial radius, km, from the mean elements."""
        return axis_km(self.mean_motion_rev_day) * (1.0 - self.eccentricity) - EARTH_KM

    @property
    def satrec(self) -> Any:
        """The SGP4 record, for whoever propagates many orbits in one call."""
        return self._satrec

    def age_days(self, at: datetime) -> float:
        """Days from the epoch to `at`; negative before the epoch."""
        return (frames.utc(at) - self.epoch).total_seconds() / frames.DAY_S

    def warnings(self, at: datetime, *, days: float = 0.0) -> tuple[Caution, ...]:
        """What to know about using these elements from `at` for `days`. A design orbit does not age."""
        age = self._worst_age_days(at, days)
        if not self.tracked or abs(age) <= FRESH_DAYS:
            return ()
        when = f"{self.name}: the elements are {abs(age):.1f} days {'old' if age > 0 else 'in the future'} when used; "
        if abs(age) > YEAR_DAYS:
            text = "only height and inclination still mean something, the times of passes and eclipses do not"
            return (Caution("elements-years", when + text),)
        low, high = (abs(age) * drift for drift in _DRIFT_KM_PER_DAY)
        speed = 2.0 * math.pi * axis_km(self.mean_motion_rev_day) / self.period_s
        text = f"expect {low:.0f}-{high:.0f} km along track, {low / speed:.1f}-{high / speed:.1f} s in AOS and LOS"
        return (Caution("elements-age", when + text),)

    def require_epoch_near(self, at: datetime, *, days: float = 0.0, where: str) -> None:
        """Raises UsageError, beginning with `where`, for tracked elements more than five years from their use."""
        age = self._worst_age_days(at, days)
        if self.tracked and abs(age) > REFUSED_YEARS * YEAR_DAYS:
            years = f"{abs(age) / YEAR_DAYS:.1f} years {'before' if age > 0 else 'after'} the mission"
            raise UsageError(
                f"{where}: the elements of {self.name} are of {frames.utc_text(self.epoch)}, {years}; "
                f"up to {REFUSED_YEARS:g} are accepted",
                hint="fetch newer elements, move `start`, or describe the orbit with kepler or sso",
            )

    def _worst_age_days(self, at: datetime, days: float) -> float:
        return max(self.age_days(at), self.age_days(at + timedelta(days=days)), key=abs)

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
            "tracked": self.tracked,
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
