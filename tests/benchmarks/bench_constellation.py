"""Speed and memory of constellations and routes; `python tests/benchmarks/bench_constellation.py`. Exits 1 on a miss.

Held on one core by the scheduler. Memory is the process's peak, taken right after the 2,800-satellite shell and before
Skyfield is loaded. Skyfield does the same work (position, elevation and range of n satellites from one station on the
same time grid) for fewer satellites, one by one as its interface has it: its rate does not depend on their number.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

# ruff: noqa: E402 - before numpy starts its threads, so that they are held on the same core
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import numpy as np

from hil.mission import frames
from hil.mission.compile import compile_timeline
from hil.mission.constellation import Constellation, Fleet
from hil.mission.environment import MissionEnvironment
from hil.mission.frames import Station, look
from hil.mission.isl import IslConfig
from hil.mission.orbit import Orbit
from hil.mission.radio import LinkEnvironment
from hil.mission.relay import Relay
from hil.mission.routes import Network, compile_routes

TLE = Path(__file__).parents[2] / "fixtures" / "tle" / "ref_qwen3_535_ltdn1030.tle"
START = datetime(2026, 1, 1, tzinfo=UTC)
DAY_S = 86_400.0
STATIONS = (Station("miyun", 40.45, 116.86), Station("kashgar", 39.50, 75.93), Station("sanya", 18.31, 109.31))
SKYFIELD_SATELLITES = 20
T = TypeVar("T")


def timed(call: Callable[[], T], repeat: int = 1) -> tuple[float, T]:
    """Best wall time of `repeat` calls, and what the last one gave."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return best, result


def looks(fleet: Fleet, t_s: np.ndarray, station: Station) -> int:
    """Elevation and range of every satellite at every instant, in slices as the route compiler takes them."""
    count, seen = len(fleet.constellation), 0
    rows = max(4, 400_000 // count)
    for first in range(0, len(t_s), rows):
        part = t_s[first : first + rows]
        position, _ = fleet.teme_km(part)
        fixed_m = 1e3 * frames.teme_to_itrf(position.reshape(-1, 3), np.tile(fleet.gmst_rad(part), count))
        seen += int((look(station, fixed_m).elevation_deg > 5).sum())
    return seen


def skyfield_looks(constellation: Constellation, t_s: np.ndarray, station: Station) -> float | None:
    """Wall seconds for the first satellites of the constellation, set-up of the time scale left out."""
    try:
        from skyfield.api import EarthSatellite, load, wgs84
    except ImportError:
        return None
    scale = load.timescale(builtin=True)
    times = scale.utc(2026, 1, 1, 0, 0, t_s)
    site = wgs84.latlon(station.latitude_deg, station.longitude_deg)
    satellites = [
        EarthSatellite.from_satrec(orbit.satrec, scale) for orbit in constellation.orbits[:SKYFIELD_SATELLITES]
    ]
    (satellites[0] - site).at(times).altaz()  # rotations of the times are computed once and kept
    return timed(lambda: [(satellite - site).at(times).altaz() for satellite in satellites], repeat=3)[0]


def main() -> int:
    orbit = Orbit.from_tle(TLE.read_text(), source=TLE.name)
    ring = Constellation.ring(orbit, 12)
    isl = IslConfig(1e9, acquisition_s=15.0)
    first_s, _ = timed(lambda: compile_routes(Network(ring, isl, STATIONS, START, DAY_S)))
    ring_s, _ = timed(lambda: compile_routes(Network(ring, isl, STATIONS, START, DAY_S)), repeat=3)
    relay = Relay(ring, isl, 5)
    mission = MissionEnvironment(
        "ring", relay.orbit, STATIONS, START, DAY_S, LinkEnvironment.fixed(3e5, 1e6), relay=relay
    )
    mission_s, _ = timed(lambda: compile_timeline(mission), repeat=3)

    shell = Constellation.walker(orbit, 40, 70, phasing=1)
    grid = IslConfig(1e9, "grid", acquisition_s=15.0, max_range_km=3_000.0)
    shell_s, routes = timed(lambda: compile_routes(Network(shell, grid, STATIONS[:1], START, DAY_S)))
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    steps = np.asarray(routes.t_s)
    to_one_s, spans = timed(lambda: routes.spans(1_500))

    fleet = Fleet(shell, START)
    looks_s, _ = timed(lambda: looks(fleet, steps, STATIONS[0]), repeat=3)
    rate = len(shell) * len(steps) / looks_s
    missed = 0
    for name, value, unit, limit in (
        ("ring of 12, 3 stations, 24 h: routes", ring_s, "s", 2.0),
        ("the first time, scipy being loaded", first_s, "s", None),
        ("the same as a mission's link: whole timeline", mission_s, "s", 2.0),
        ("2,800 satellites, 24 h at 60 s, +Grid: routes", shell_s, "s", 60.0),
        ("peak memory of all that", peak_gb, "GB", 2.0),
        (f"ways to one of them ({len(spans)} spans)", to_one_s, "s", None),
        ("positions, elevation, range of 2,800 x 1,441", looks_s, "s", None),
    ):
        verdict = "" if limit is None else ("ok" if value <= limit else "MISSED")
        missed += verdict == "MISSED"
        print(f"{name:52} {value:9.3f} {unit:3} {'' if limit is None else f'limit {limit:g} {unit}':14} {verdict}")
    print(f"{'hil: satellites x steps a second':52} {rate:12,.0f}")
    other_s = skyfield_looks(shell, steps, STATIONS[0])
    if other_s is not None:
        other = SKYFIELD_SATELLITES * len(steps) / other_s
        name = f"plain Skyfield, measured on {SKYFIELD_SATELLITES} satellites"
        print(f"{name:52} {other:12,.0f}  (hil is {rate / other:.1f} times as fast)")
        print(f"{'plain Skyfield for all 2,800, scaled':52} {other_s * len(shell) / SKYFIELD_SATELLITES:9.3f} s")
    routed = len(shell) * len(steps) / shell_s
    print(f"{'hil with links and routes: satellites x steps a second':52} {routed:12,.0f}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
