"""Speed of the mission engine; `python tests/benchmarks/bench_mission.py`. Exits 1 when a limit is missed.

Best of five runs, wall seconds on one core. The Skyfield figure does the same geometry (positions, three stations'
elevation and range) without eclipses, edges or columns.
"""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from hil.mission.budget import fly
from hil.mission.bursts import Bursts, RandomOutages
from hil.mission.compile import compile_timeline
from hil.mission.environment import MissionEnvironment, PowerEnvironment
from hil.mission.eps import EpsConfig, EpsModel, ShedConfig
from hil.mission.frames import Station
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.radio import Channel, LinkBudget, LinkEnvironment
from hil.mission.shadow import find_eclipses
from hil.mission.solar_array import ArrayConfig, SasCurve
from hil.mission.thermal import Coupling, Node, Radiator, ThermalConfig, ThermalModel

TLE = Path(__file__).parents[2] / "fixtures" / "tle" / "ref_qwen3_535_ltdn1030.tle"
START = datetime(2026, 1, 1, tzinfo=UTC)
STATIONS = (Station("miyun", 40.45, 116.86), Station("kashgar", 39.50, 75.93), Station("sanya", 18.31, 109.31))


THERMAL = ThermalConfig(
    (Node("chip", 60.0, board_share=0.8), Node("case", 400.0, board_share=0.2), Node("panel", 900.0)),
    (Coupling("chip", "case", 2.0), Coupling("case", "panel", 4.0)),
    (Radiator("panel", 0.05, 2, sun_share=0.1, earth_view_factor=0.3),),
)


def best(call: Callable[[], object], repeat: int = 5, number: int = 1) -> float:
    return min(timeit.repeat(call, repeat=repeat, number=number)) / number


def skyfield_s(orbit: Orbit, t_s: np.ndarray) -> float | None:
    try:
        from skyfield.api import EarthSatellite, load, wgs84
    except ImportError:
        return None
    scale = load.timescale(builtin=True)
    satellite = EarthSatellite(orbit.line1, orbit.line2, None, scale)
    sites = [wgs84.latlon(s.latitude_deg, s.longitude_deg) for s in STATIONS]

    def work() -> None:
        times = scale.utc(2026, 1, 1, 0, 0, t_s)
        for site in sites:
            (satellite - site).at(times).altaz()

    return best(work, repeat=3)


def solver_s(eps: EpsConfig) -> float | None:
    """The same discharge as a differential equation, to the default accuracy of scipy's solver."""
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        return None
    soc, volts = (np.array(column) for column in zip(*eps.ocv, strict=True))

    def slope(_: float, at: np.ndarray) -> list[float]:
        ocv = 4 * float(np.interp(at[0], soc, volts))
        amps = (ocv - (ocv * ocv - 4 * eps.resistance_ohm * 21.0) ** 0.5) / (2 * eps.resistance_ohm)
        return [-amps / (eps.capacity_ah * 3_600)]

    return best(lambda: solve_ivp(slope, (0.0, 1_200.0), [1.0]), repeat=3)


def main() -> int:
    orbit = Orbit.from_tle(TLE.read_text(), source=TLE.name)
    power = PowerEnvironment(
        ArrayConfig(44.0, 0.85, 0.95), EpsConfig(0.70, resistance_ohm=0.3, platform_w=6.0), ShedConfig(13.2), 5.0, 15.0
    )
    day = MissionEnvironment(
        "bench", orbit, STATIONS, START, 86_400.0, LinkEnvironment.fixed(300e3, 1e6, acquisition_s=15.0), power
    )
    two_days = replace(day, duration_s=172_800.0)
    climbing = LinkEnvironment(
        Channel(300e3, bursts=Bursts(20.0, 2.0)),
        Channel(budget=LinkBudget(8.2e9, 10.0, 25.0, 60e6), bursts=Bursts(60.0, 1.0)),
        acquisition_s=15.0,
        random_outages=RandomOutages(20.0, 60.0),
    )
    rough = replace(day, link=climbing)
    timeline, ladder = compile_timeline(day), compile_timeline(rough)
    peak_s = timeline.contacts[2].max_elevation_s
    grid = np.arange(0.0, 86_400.0, 10.0)
    ephemeris = Ephemeris(orbit, START)
    eps = EpsModel(power.eps)
    direct = EpsModel(replace(power.eps, capacity_ah=70.0, initial_soc=0.6, direct=SasCurve(20.0, 2.0, 17.0, 1.8)))
    thermal = ThermalModel(THERMAL)
    geometry_s = best(lambda: [ephemeris.look(station, grid) for station in STATIONS])
    rows: list[tuple[str, float, float | None]] = [
        ("compile 24 h, 3 stations", best(lambda: compile_timeline(day)), 0.3),
        ("compile 48 h, 3 stations", best(lambda: compile_timeline(two_days)), 0.6),
        ("compile 24 h, ladder, fades, outages", best(lambda: compile_timeline(rough)), 0.3),
        ("eclipses of a year", best(lambda: find_eclipses(ephemeris, 0.0, 365 * 86_400.0), repeat=1), None),
        ("fly the power system for 24 h", best(lambda: fly(timeline, 5.0), repeat=2), None),
        ("link_at", best(lambda: timeline.link_at(peak_s, 60.0), number=1_000), 50e-6),
        ("link_at with ladder and fades", best(lambda: ladder.link_at(peak_s, 60.0), number=1_000), 50e-6),
        ("sunlit_at", best(lambda: timeline.sunlit_at(peak_s), number=1_000), 50e-6),
        ("power system step", best(lambda: eps.step(0.1, 9.0, 20.0), number=1_000), 50e-6),
        ("power system step, direct transfer", best(lambda: direct.step(0.1, 9.0, 20.0), number=1_000), 100e-6),
        ("thermal step, 3 nodes", best(lambda: thermal.step(0.1, 9.0, 1.0, 0.5), number=1_000), 50e-6),
        (
            "20 min of discharge in 5 s steps",
            best(lambda: EpsModel(power.eps).step(1_200.0, 15.0, 0.0), repeat=3),
            None,
        ),
        ("geometry 24 h at 10 s, 3 stations", geometry_s, None),
    ]
    other_s = skyfield_s(orbit, grid)
    if other_s is not None:
        rows.append(("the same with plain Skyfield", other_s, None))
    other_s = solver_s(power.eps)
    if other_s is not None:
        rows.append(("the discharge with scipy's solve_ivp", other_s, None))
    missed = 0
    for name, seconds, limit in rows:
        verdict = "" if limit is None else ("ok" if seconds <= limit else "MISSED")
        missed += verdict == "MISSED"
        print(
            f"{name:36} {seconds * 1e3:12.4f} ms  {'' if limit is None else f'limit {limit * 1e3:g} ms':16} {verdict}"
        )
    print(f"{'station-steps per second':36} {3 * len(grid) / geometry_s:12.0f}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
