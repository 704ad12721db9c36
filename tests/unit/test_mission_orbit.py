"""Orbit and stations of a mission file: every source is flown, every nonsense is refused with file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_omm import PLAIN

from hil.errors import UsageError
from hil.inventory import load_board_type, load_mission
from hil.inventory.environment import environment, mission_orbit
from hil.mission.frames import geodetic
from hil.mission.orbit import Ephemeris

ROOT = Path(__file__).parents[2]
SHORT = ROOT / "fixtures/missions/short.yaml"
BOARD = load_board_type(ROOT / "boards/virtual-arm64.yaml")


def write(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = yaml.safe_load(SHORT.read_text())
    content["orbit"] = {"tle": str(ROOT / "fixtures/tle/ref_qwen3_535_ltdn1030.tle")}
    change(content)
    path = folder / "mission.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def line_of(path: Path, key: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(f"{key}:"))


@pytest.mark.parametrize(
    ("orbit", "height_km", "inclination"),
    [
        ({"kepler": {"altitude_km": 600, "inclination_deg": 30}}, 600, 30),
        (
            {"kepler": {"semi_major_axis_km": 6878.137, "inclination_deg": 97.4, "epoch": "2025-12-31T12:00:00Z"}},
            500,
            97.4,
        ),
        ({"kepler": {"mean_motion_rev_day": 15.2165, "inclination_deg": 45.4}}, 500, 45.4),
        ({"sso": {"altitude_km": 650, "ltan_h": 6}}, 650, 97.99),
        ({"sso": {"altitude_km": 525, "ltdn_h": 22}}, 525, 97.5),
    ],
)
def test_every_design_is_flown(tmp_path: Path, orbit: dict[str, Any], height_km: float, inclination: float) -> None:
    mission = load_mission(write(tmp_path, lambda content: content.update(orbit=orbit)))
    flown = environment(mission, BOARD).orbit
    assert flown.inclination_deg == pytest.approx(inclination, abs=0.01)
    assert flown.perigee_km == pytest.approx(height_km, abs=6)
    t_s = np.linspace(0, flown.period_s, 200)
    position, _ = Ephemeris(flown, mission.start).teme_km(t_s)
    assert np.linalg.norm(position, axis=1) - 6_378.137 == pytest.approx(height_km, abs=15)


def test_a_message_is_flown(tmp_path: Path) -> None:
    (tmp_path / "sat.json").write_text(json.dumps([PLAIN]))

    def change(content: dict[str, Any]) -> None:
        content.update(orbit={"omm": "sat.json"}, start="2026-07-28T00:00:00Z")

    orbit = mission_orbit(load_mission(write(tmp_path, change)))
    assert (orbit.name, orbit.tracked, orbit.mean_anomaly_deg) == ("STARCLOUD-1", True, 91.9012)


@pytest.mark.parametrize(
    ("orbit", "key", "says"),
    [
        ({"kepler": {"altitude_km": 600, "inclination_deg": 30, "eccentricity": 0.2}}, "kepler", "below ground"),
        ({"kepler": {"altitude_km": 600, "inclination_deg": 30, "eccentricity": 1.2}}, "eccentricity", "less than 1"),
        ({"kepler": {"altitude_km": 600, "inclination_deg": 190}}, "inclination_deg", "less than or equal to 180"),
        ({"kepler": {"inclination_deg": 90}}, "kepler", "exactly one of altitude_km"),
        ({"kepler": {"altitude_km": 600, "mean_motion_rev_day": 15, "inclination_deg": 9}}, "kepler", "exactly one"),
        ({"kepler": {"altitude_km": 3e6, "inclination_deg": 9}}, "kepler", "revolutions a day"),
        ({"sso": {"altitude_km": 650}}, "sso", "exactly one of ltan_h"),
        ({"sso": {"altitude_km": 9000, "ltan_h": 6}}, "altitude_km", "5900"),
        ({"sso": {"altitude_km": 650, "ltan_h": 6}, "tle": "x"}, "orbit", "exactly one"),
        ({"omm": "absent.xml"}, "omm", "no OMM file"),
    ],
)
def test_elements_that_cannot_be_name_file_and_line(tmp_path: Path, orbit: dict[str, Any], key: str, says: str) -> None:
    path = write(tmp_path, lambda content: content.update(orbit=orbit))
    with pytest.raises(UsageError, match=says) as caught:
        mission_orbit(load_mission(path))
    assert caught.value.message.startswith(f"{path}:{line_of(path, key)}: ")


def test_elements_years_from_the_mission_are_refused_with_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, lambda content: content.update(start="2031-02-01T00:00:00Z"))
    with pytest.raises(UsageError, match=r"5\.1 years before the mission") as caught:
        mission_orbit(load_mission(path))
    assert caught.value.message.startswith(f"{path}:{line_of(path, 'tle')}: ")


def test_an_orbit_that_decays_before_the_mission_ends_is_refused_with_the_line(tmp_path: Path) -> None:
    one = "1 28350U 04020A   06167.21788666  .16154492  76267-5  18678-3 0  8894"
    two = "2 28350  64.9977 345.6130 0024870 260.7578  99.9590 16.47856722116490"
    (tmp_path / "falling.tle").write_text(f"{one}\n{two}\n")

    def change(content: dict[str, Any]) -> None:
        content.update(orbit={"tle": "falling.tle"}, start="2006-06-16T06:00:00Z", duration_h=72)

    path = write(tmp_path, change)
    with pytest.raises(UsageError, match="cannot be propagated to 2006-06-19") as caught:
        mission_orbit(load_mission(path))
    assert caught.value.message.startswith(f"{path}:{line_of(path, 'tle')}: ")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sat.tle").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(UsageError, match=r"sat\.tle: cannot be read"):
        mission_orbit(load_mission(write(tmp_path, lambda content: content.update(orbit={"tle": "sat.tle"}))))


TABLE = [[0, 5], [90, 12.5], [180, 30], [270, 7.5]]


def test_a_mask_table_reaches_the_passes_and_wraps_around_north(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["stations"] = {"valley": {"latitude_deg": 40, "longitude_deg": 100, "mask_table": TABLE}}

    (station,) = environment(load_mission(write(tmp_path, change)), BOARD).stations
    azimuth = np.array([0.0, 45.0, 90.0, 135.0, 225.0, 315.0, 359.999, 360.0])
    expected = [5.0, 8.75, 12.5, 21.25, 18.75, 6.25, 5.0, 5.0]
    assert station.mask_at(azimuth) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "key", "says"),
    [
        ({"latitude_deg": 91}, "latitude_deg", "less than or equal to 90"),
        ({"longitude_deg": 400}, "longitude_deg", "less than or equal to 360"),
        ({"mask_deg": 90}, "mask_deg", "less than 90"),
        ({"mask_deg": 95}, "mask_deg", "less than 90"),
        ({"mask_table": [[0, 5], [90, 90]]}, "- - 90", "elevation 90 within"),
        ({"mask_table": [[0, 5], [361, 9]]}, "- - 361", "azimuth 361"),
        ({"mask_table": [[0, 5], [90, 9], [360, 8]]}, "mask_table", "two elevations at azimuth 360"),
        ({"mask_table": [[0, 5, 7]]}, "- - 0", "mask_table"),
    ],
)
def test_stations_out_of_range_name_file_and_line(tmp_path: Path, values: dict[str, Any], key: str, says: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["stations"] = {"here": {"latitude_deg": 1.0, "longitude_deg": 2.0, **values}}

    path = write(tmp_path, change)
    with pytest.raises(UsageError, match=says) as caught:
        load_mission(path)
    number = int(re.match(rf"{re.escape(str(path))}:(\d+): ", caught.value.message)[1])  # type: ignore[index]
    said = path.read_text().splitlines()[number - 1].strip()
    assert said.startswith((key, "here:") if key == "mask_table" else key)


def test_azimuth_360_may_repeat_north(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["stations"]["miyun"]["mask_table"] = [*TABLE, [360, 5]]

    assert load_mission(write(tmp_path, change)).file.stations["miyun"].mask_table[-1] == (360.0, 5.0)


def test_faults_of_the_file_become_rates(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["faults"] = {
            "rates": {"sdc": {"per_year": 8.8}, "seu": {"cross_section_cm2": 3.9e-9}},
            "acceleration": 1000,
            "saa_share": 0.8,
        }

    from hil.inventory.environment import _faults

    plan = _faults(load_mission(write(tmp_path, change)).file)
    assert plan is not None
    assert {rate.kind: rate.per_year for rate in plan.rates} == pytest.approx({"sdc": 8.8, "seu": 4.641})
    assert (plan.acceleration, plan.saa_share) == (1000, 0.8)
    assert _faults(load_mission(write(tmp_path, lambda content: content.pop("faults", None))).file) is None


def test_ground_track_is_geodetic() -> None:
    """Bowring's form against its inverse, the station's own position, from pole to pole and ground to geostationary."""
    from hil.mission.frames import Station

    rows = [(lat, lon, alt) for lat in (-90, -63.3, 0, 12, 45, 89.99) for lon in (-180, 7, 170) for alt in (0, 9_000)]
    position = np.array([Station("x", *row).itrf_m() for row in rows])
    up = np.array([Station("x", *row).axes()[2] for row in rows])
    for extra in (0.0, 535e3, 35_786e3):
        latitude, longitude, altitude = geodetic(position + extra * up)
        expected = np.array(rows, dtype=float)
        assert latitude == pytest.approx(expected[:, 0], abs=1e-6)
        turn = (longitude - expected[:, 1] + 180) % 360 - 180
        assert np.abs(turn * np.cos(np.radians(latitude))).max() < 1e-9
        assert altitude == pytest.approx(expected[:, 2] + extra, abs=0.01)
