"""What Skyfield and DE421 say about the same orbits: the engine's worst differences, for tests and docs/validation.md.

Skyfield reads the elements from a message of its own, propagates with SGP4 too, and has its own frames (IAU 2000A,
UT1 from measured and predicted tables), ellipsoid, horizon and Sun. What it does not have is a shadow with a penumbra:
the edges here are those of two discs seen from its satellite, with its apparent Sun. Its own binary answer, the Sun's
centre behind a sphere, has to change between our first and second contact.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sgp4

from hil.mission.frames import DAY_S, TT_MINUS_UTC_S, Station
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.passes import find_passes
from hil.mission.radio import DIRECTIONS, one_way_delay_s
from hil.mission.shadow import EARTH_RADIUS_KM, SUN_RADIUS_KM, find_eclipses
from hil.mission.sun import AU_KM, sun_teme_km
from hil.mission.tle import checksum

Floats = npt.NDArray[np.float64]
FLOWN = Path(__file__).parents[2] / "fixtures" / "tle" / "starcloud1_flown_epoch_2026-07-26.tle"
SPEED_OF_LIGHT_KM_S = 299_792.458
STATIONS = (
    Station("miyun", 40.45, 116.86, 60.0),
    Station("svalbard", 78.23, 15.4, 400.0, mask_deg=10.0),
    Station("santiago", -33.15, -70.67, 720.0, mask_deg=10.0),
    Station("troll", -72.01, 2.53, 1_200.0, mask_deg=0.0),
    Station("valley-on-the-equator", 1.35, 103.8, mask_table=((0.0, 3.0), (80.0, 12.0), (150.0, 4.0), (260.0, 25.0))),
)
MARCH, JUNE, SEPTEMBER, DECEMBER = (
    datetime(2026, month, day, tzinfo=UTC) for month, day in ((3, 20), (6, 21), (9, 23), (12, 21))
)


@dataclass(frozen=True, slots=True)
class Case:
    """One orbit from one instant on."""

    name: str
    orbit: Orbit
    start: datetime


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine promises; the names are those of `Residuals`."""

    pass_edge_s: float = 0.5
    eclipse_edge_s: float = 1.0
    range_m: float = 200.0
    elevation_deg: float = 0.02
    delay_us: float = 1.0


@dataclass(frozen=True, slots=True)
class Residuals:
    """The worst difference of each kind, and over how many edges and samples."""

    pass_edge_s: float
    eclipse_edge_s: float
    range_m: float
    elevation_deg: float
    delay_us: float
    pass_edges: int
    eclipse_edges: int
    samples: int
    disagreements: tuple[str, ...]

    def missed(self) -> list[str]:
        """The limits that are not kept, and every other disagreement."""
        limits = Limits()
        names = [field.name for field in fields(limits)]
        return [
            f"{name} {getattr(self, name):.4g}, limit {getattr(limits, name):g}"
            for name in names
            if not getattr(self, name) <= getattr(limits, name)
        ] + list(self.disagreements)


def cases() -> tuple[Case, ...]:
    """Every kind of orbit that a mission may name, at solstices, equinoxes and the edge of an eclipse season."""
    kepler, sso = Orbit.kepler, Orbit.sso
    return (
        Case("polar, 700 km, 90 deg", kepler(MARCH, altitude_km=700, inclination_deg=90, raan_deg=40), MARCH),
        Case("dawn-dusk, 650 km, LTAN 6", sso(650, DECEMBER, ltan_h=6), DECEMBER),
        Case("dawn-dusk, 600 km, season's edge", sso(600, datetime(2026, 5, 5, tzinfo=UTC), ltan_h=18),
             datetime(2026, 5, 5, tzinfo=UTC)),
        Case("sun-synchronous, 535 km, LTDN 10:30", sso(535, JUNE, ltdn_h=10.5), JUNE),
        Case("space station, 415 km, 51.6 deg",
             kepler(SEPTEMBER, altitude_km=415, inclination_deg=51.64, raan_deg=200, bstar=2e-4), SEPTEMBER),
        Case("600 km, 30 deg", kepler(JUNE, altitude_km=600, inclination_deg=30, raan_deg=75), JUNE),
        Case("Molniya, e 0.72, 63.4 deg",
             kepler(MARCH, mean_motion_rev_day=2.00561, inclination_deg=63.4, eccentricity=0.72,
                    argument_of_perigee_deg=270, raan_deg=100), MARCH),
        Case("transfer orbit, e 0.73, 7 deg",
             kepler(SEPTEMBER, mean_motion_rev_day=2.27, inclination_deg=7, eccentricity=0.73,
                    argument_of_perigee_deg=178, raan_deg=20), SEPTEMBER),
        Case("1,200 km, 87.9 deg", kepler(DECEMBER, altitude_km=1_200, inclination_deg=87.9, raan_deg=330), DECEMBER),
        Case("retrograde, 800 km, 140 deg", kepler(JUNE, altitude_km=800, inclination_deg=140, raan_deg=10), JUNE),
        Case("equatorial, 550 km, 0.1 deg", kepler(MARCH, altitude_km=550, inclination_deg=0.1), MARCH),
        Case("flown elements, 500 km, 45.4 deg", Orbit.from_tle(FLOWN.read_text()), datetime(2026, 7, 27, tzinfo=UTC)),
    )  # fmt: skip


class Sky:
    """One orbit in Skyfield; times are seconds since `start`."""

    def __init__(self, orbit: Orbit, start: datetime) -> None:
        self._scale, self._bodies = _skyfield()
        self._start = start
        api = importlib.import_module("skyfield.api")
        self._api = api
        self._satellite = api.EarthSatellite.from_omm(self._scale, _message(orbit))

    def times(self, t_s: Floats) -> Any:
        at = self._start
        return self._scale.utc(at.year, at.month, at.day, at.hour, at.minute, at.second + np.asarray(t_s))

    def look(self, station: Station, t_s: Floats) -> tuple[Floats, Floats, Floats]:
        """Elevation and azimuth in degrees, range in metres."""
        altitude, azimuth, distance = (self._satellite - self._site(station)).at(self.times(t_s)).altaz()
        return altitude.degrees, azimuth.degrees, distance.m

    def clearance_deg(self, station: Station, t_s: Floats) -> Floats:
        """Degrees above the station's mask, which is interpolated here on its own."""
        elevation, azimuth, _ = self.look(station, t_s)
        if not station.mask_table:
            return elevation - station.mask_deg
        azimuths, masks = (np.array(column) for column in zip(*station.mask_table, strict=True))
        return elevation - np.interp(
            azimuth, np.concatenate([azimuths, azimuths[:1] + 360]), np.concatenate([masks, masks[:1]])
        )

    def light_s(self, station: Station, t_s: Floats, direction: str) -> Floats:
        """Light time of what is sent at `t_s`: from there and then, to where the other end is when it arrives."""
        ends = (self._site(station), self._satellite)
        sender, receiver = ends if direction == "uplink" else ends[::-1]
        sent = sender.at(self.times(t_s)).position.km
        delay = np.zeros_like(t_s)
        for _ in range(3):
            received = receiver.at(self.times(t_s + delay)).position.km
            delay = np.linalg.norm(sent - received, axis=0) / SPEED_OF_LIGHT_KM_S
        return delay

    def depth_rad(self, t_s: Floats, sign: float) -> Floats:
        """Overlap of Earth's and Sun's discs: sign +1 touches at the penumbra's edge, -1 at the umbra's."""
        times = self.times(t_s)
        position = self._satellite.at(times).position.km.T
        to_sun = self._bodies["earth"].at(times).observe(self._bodies["sun"]).apparent().position.km.T - position
        far, near = np.linalg.norm(to_sun, axis=1), np.linalg.norm(position, axis=1)
        apart = np.arctan2(np.linalg.norm(np.cross(to_sun, position), axis=1), -(to_sun * position).sum(axis=1))
        return np.asarray(np.arcsin(EARTH_RADIUS_KM / near) + sign * np.arcsin(SUN_RADIUS_KM / far) - apart)

    def sunlit(self, t_s: Floats) -> npt.NDArray[np.bool_]:
        """Skyfield's own binary answer."""
        return np.asarray(self._satellite.at(self.times(t_s)).is_sunlit(self._bodies))

    def _site(self, station: Station) -> Any:
        return self._api.wgs84.latlon(station.latitude_deg, station.longitude_deg, station.altitude_m)


def residuals(case: Case, *, hours: float, step_s: float) -> Residuals:
    """Everything the engine says about `case` over `hours`, held against the oracle."""
    ephemeris, sky = Ephemeris(case.orbit, case.start), Sky(case.orbit, case.start)
    end_s = hours * 3_600.0
    grid = np.arange(0.0, end_s, step_s)
    wrong: list[str] = []
    ranges, elevations, delays, edges = [0.0], [0.0], [0.0], [0.0]
    edge_count = 0
    for station in STATIONS:
        elevation, _, distance = sky.look(station, grid)
        ours = ephemeris.look(station, grid)
        ranges.append(np.abs(ours.range_m - distance).max())
        elevations.append(np.abs(ours.elevation_deg - elevation).max())
        some = grid[elevation > 0][::7]
        if some.size:
            for direction in DIRECTIONS:
                ours_s = _delay_s(ephemeris, station, some, direction)
                delays.append(1e6 * np.abs(ours_s - sky.light_s(station, some, direction)).max())
        windows = [(item.aos_s, item.los_s) for item in find_passes(ephemeris, station, 0.0, end_s)]
        found = _inner(windows, end_s)
        edges += _misses(lambda t, s=station: sky.clearance_deg(s, t), found)
        edge_count += len(found)
        wrong += _differing(grid, sky.clearance_deg(station, grid) > 0, windows, f"visibility from {station.name}")
    eclipses = find_eclipses(ephemeris, 0.0, end_s)
    dark = [(item.penumbra_entry_s, item.penumbra_exit_s) for item in eclipses]
    total = [
        (item.umbra_entry_s, item.umbra_exit_s)
        for item in eclipses
        if item.umbra_entry_s is not None and item.umbra_exit_s is not None
    ]
    shadow = [0.0]
    for sign, windows in ((1.0, dark), (-1.0, total)):
        shadow += _misses(lambda t, s=sign: sky.depth_rad(t, s), np.array(windows).ravel())
        wrong += _differing(grid, sky.depth_rad(grid, sign) > 0, windows, "penumbra" if sign > 0 else "umbra")
    wrong += _binary(sky, dark, total)
    return Residuals(
        pass_edge_s=float(max(edges)),
        eclipse_edge_s=float(max(shadow)),
        range_m=float(max(ranges)),
        elevation_deg=float(max(elevations)),
        delay_us=float(max(delays)),
        pass_edges=edge_count,
        eclipse_edges=2 * (len(dark) + len(total)),
        samples=len(grid) * len(STATIONS),
        disagreements=tuple(wrong),
    )


def _delay_s(ephemeris: Ephemeris, station: Station, t_s: Floats, direction: str) -> Floats:
    """The engine's delay; the range's rate is taken over a second, as a timeline does."""
    before, now, after = (ephemeris.look(station, t_s + dt).range_m for dt in (-0.5, 0.0, 0.5))
    rates = after - before if direction == "uplink" else np.zeros_like(now)
    return np.array([one_way_delay_s(r, 0.0, rate) for r, rate in zip(now, rates, strict=True)])


def vallado_cases() -> list[tuple[str, str, list[list[float]]]]:
    """(line 1, line 2, rows of minutes, x, y, z, vx, vy, vz) of the verification set that the sgp4 wheel carries."""
    folder = Path(sgp4.__file__).parent
    lines = [line for line in (folder / "SGP4-VER.TLE").read_text().splitlines() if line[:2] in ("1 ", "2 ")]
    expected: list[list[list[float]]] = []
    for line in (folder / "tcppver.out").read_text().splitlines():
        if line.rstrip().endswith("xx"):
            expected.append([])
        elif line.strip():
            expected[-1].append([float(word) for word in line.split()[:7]])
    pairs = zip(lines[::2], lines[1::2], strict=True)
    # three lines of the set carry altered digits with their old checksum: signed again
    return [(signed(one), signed(two), rows) for (one, two), rows in zip(pairs, expected, strict=True)]


def signed(line: str) -> str:
    """The TLE line with a right checksum."""
    return line[:68] + str(checksum(line))


def vallado_residuals() -> tuple[int, float]:
    """How many states the engine reproduces, and the worst coordinate's difference in km."""
    some = Orbit.from_tle(FLOWN.read_text())
    count, worst = 0, 0.0
    for one, two, rows in vallado_cases():
        orbit = replace(some, line1=one, line2=two)  # without the strict reader, which refuses three cases
        if one[2:7] == "33334":
            continue  # its only row is left over from the case before: SGP4 errs at once
        minutes, expected = np.array(rows)[:, 0], np.array(rows)[:, 1:4]
        day, fraction = orbit._satrec.jdsatepoch, orbit._satrec.jdsatepochF
        position, _ = orbit.teme_km(day, fraction + minutes / 1_440.0)
        count, worst = count + len(rows), max(worst, float(np.abs(position - expected).max()))
    return count, worst


def sun_residuals() -> tuple[float, float]:
    """Worst angle (deg) and distance (au) between the engine's Sun and DE421's apparent one, in TEME, 2000 to 2049."""
    scale, bodies = _skyfield()
    teme = importlib.import_module("skyfield.sgp4lib").TEME
    day = 2_451_544.5
    days = np.arange(0.0, 18_262.0, 9.13)
    times = scale.tt_jd(day + days + TT_MINUS_UTC_S / DAY_S)
    theirs = bodies["earth"].at(times).observe(bodies["sun"]).apparent().frame_xyz(teme).km.T
    ours = sun_teme_km(day, days)
    far, near = np.linalg.norm(theirs, axis=1), np.linalg.norm(ours, axis=1)
    apart = np.arcsin(np.linalg.norm(np.cross(ours, theirs), axis=1) / far / near)
    return float(np.degrees(apart.max())), float(np.abs(far - near).max() / AU_KM)


def _misses(oracle: Callable[[Floats], Floats], edges_s: Floats) -> list[float]:
    """How far the oracle's sign change is from each of our edges, seconds; infinite beyond three."""
    if not len(edges_s):
        return []
    offsets = np.linspace(-3.0, 3.0, 13)
    values = oracle((edges_s[:, None] + offsets).ravel()).reshape(len(edges_s), len(offsets))
    found = []
    for row in values:
        cells = np.nonzero(np.sign(row[1:]) != np.sign(row[:-1]))[0]
        at = [offsets[i] - row[i] * (offsets[i + 1] - offsets[i]) / (row[i + 1] - row[i]) for i in cells]
        found.append(min(np.abs(at), default=np.inf))
    return found


def _differing(grid: Floats, oracle: npt.NDArray[np.bool_], windows: list[Any], what: str) -> list[str]:
    """Samples at which the oracle is inside and we are not, or the other way round, more than a second from an edge."""
    ours = np.zeros(len(grid), dtype=bool)
    near = np.zeros(len(grid), dtype=bool)
    for low, high in windows:
        ours |= (grid >= low) & (grid <= high)
        near |= (np.abs(grid - low) < 1.0) | (np.abs(grid - high) < 1.0)
    return [f"{what} at {t:.0f} s" for t in grid[(ours != oracle) & ~near]]


def _binary(sky: Sky, dark: list[Any], total: list[Any]) -> list[str]:
    """Skyfield's is_sunlit is true until first contact and false from second contact on, and back."""
    wrong = []
    outside = np.array([t for low, high in dark for t in (low - 1.0, high + 1.0)])
    inside = np.array([t for low, high in total for t in (low + 1.0, high - 1.0) if high - low > 2.0])
    if outside.size and not sky.sunlit(outside).all():
        wrong.append("is_sunlit is false outside of the penumbra")
    if inside.size and sky.sunlit(inside).any():
        wrong.append("is_sunlit is true inside the umbra")
    return wrong


def _inner(windows: list[tuple[float, float]], end_s: float) -> Floats:
    """Edges within the time compared: what never rises or sets is cut outside of it, not crossed."""
    return np.array([t for window in windows for t in window if 0.0 < t < end_s])


def _message(orbit: Orbit) -> dict[str, str]:
    return {
        "OBJECT_NAME": orbit.name,
        "OBJECT_ID": "2026-001A",
        "EPOCH": f"{orbit.epoch:%Y-%m-%dT%H:%M:%S.%f}",
        "MEAN_MOTION": repr(orbit.mean_motion_rev_day),
        "ECCENTRICITY": repr(orbit.eccentricity),
        "INCLINATION": repr(orbit.inclination_deg),
        "RA_OF_ASC_NODE": repr(orbit.raan_deg),
        "ARG_OF_PERICENTER": repr(orbit.argument_of_perigee_deg),
        "MEAN_ANOMALY": repr(orbit.mean_anomaly_deg),
        "EPHEMERIS_TYPE": "0",
        "CLASSIFICATION_TYPE": "U",
        "NORAD_CAT_ID": "99999",
        "ELEMENT_SET_NO": "1",
        "REV_AT_EPOCH": "1",
        "BSTAR": repr(orbit.bstar),
        "MEAN_MOTION_DOT": "0",
        "MEAN_MOTION_DDOT": "0",
    }


@cache
def _skyfield() -> tuple[Any, Any]:
    api = importlib.import_module("skyfield.api")
    data = importlib.import_module("skyfield_data")
    return api.load.timescale(builtin=True), api.Loader(data.__path__[0] + "/data", verbose=False)("de421.bsp")
