"""`hil orbit eclipses|passes|track`: what an orbit does, straight from a TLE file."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from hil.cli.options import json_option, print_json
from hil.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def _time(context: click.Context, parameter: click.Parameter, value: str) -> datetime:
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError:
        raise click.BadParameter("expected UTC as 2026-03-20T00:00:00Z") from None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _station(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, float, float]:
    try:
        latitude, longitude, altitude = (float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("expected LAT,LON,ALT_M in degrees and metres, for example 40.45,116.86,0") from None
    return latitude, longitude, altitude


def _tle_option(function: F) -> F:
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option("--tle", required=True, type=kind, help="file with a two-line element set")(function)


def _start_option(function: F) -> F:
    return click.option("--start", required=True, callback=_time, metavar="UTC", help="2026-03-20T00:00:00Z")(function)


def _station_option(function: F) -> F:
    return click.option("--station", required=True, callback=_station, metavar="LAT,LON,ALT_M")(function)


def _ephemeris(tle: Path, start: datetime) -> Any:
    from hil.mission.orbit import Ephemeris, Orbit

    orbit = Orbit.from_tle(tle.read_text(encoding="utf-8"), source=str(tle))
    for caution in orbit.warnings(start):
        click.echo(f"warning: {caution}", err=True)
    return Ephemeris(orbit, start)


@click.group()
def orbit() -> None:
    """Eclipses, passes and tracks of an orbit."""


@orbit.command()
@_tle_option
@_start_option
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), default=24.0, show_default=True)
@json_option
def eclipses(tle: Path, start: datetime, hours: float, as_json: bool) -> None:
    """Penumbra and umbra entries and exits."""
    from hil.mission.frames import utc_text
    from hil.mission.shadow import find_eclipses

    names = ("penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit")
    rows = [
        {name: None if (t_s := getattr(item, f"{name}_s")) is None else utc_text(start, t_s) for name in names}
        for item in find_eclipses(_ephemeris(tle, start), 0.0, hours * 3600.0)
    ]
    if as_json:
        print_json({"eclipses": rows})
        return
    click.echo("  ".join(f"{name:24}" for name in names))
    for row in rows:
        click.echo("  ".join(f"{row[name] or '-':24}" for name in names))


@orbit.command()
@_tle_option
@_station_option
@click.option("--mask-deg", type=click.FloatRange(-5, 89.9), default=5.0, show_default=True)
@_start_option
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), default=24.0, show_default=True)
@json_option
def passes(
    tle: Path, station: tuple[float, float, float], mask_deg: float, start: datetime, hours: float, as_json: bool
) -> None:
    """Passes over one ground station."""
    from hil.mission.frames import Station, utc_text
    from hil.mission.passes import find_passes

    ground = Station("station", *station, mask_deg=mask_deg)
    rows = [
        {
            "aos": utc_text(start, item.aos_s),
            "los": utc_text(start, item.los_s),
            "max_elevation_deg": round(item.max_elevation_deg, 4),
            "max_elevation_at": utc_text(start, item.max_elevation_s),
        }
        for item in find_passes(_ephemeris(tle, start), ground, 0.0, hours * 3600.0)
    ]
    if as_json:
        print_json({"passes": rows})
        return
    click.echo(f"{'aos':24}  {'los':24}  {'max elevation':>13}  at")
    for row in rows:
        click.echo(f"{row['aos']}  {row['los']}  {row['max_elevation_deg']:12.1f}°  {row['max_elevation_at']}")


@orbit.command()
@_tle_option
@_station_option
@_start_option
@click.option("--seconds", type=click.FloatRange(min=0), required=True)
@click.option("--step-s", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@json_option
def track(
    tle: Path, station: tuple[float, float, float], start: datetime, seconds: float, step_s: float, as_json: bool
) -> None:
    """Elevation, azimuth, range, one-way delay and sunlight, sample by sample."""
    import numpy as np

    from hil.mission.frames import Station, utc_text
    from hil.mission.radio import one_way_delay_s
    from hil.mission.shadow import sunlit_fraction

    if seconds / step_s > 1e6:
        raise UsageError("more than a million samples", hint="a larger --step-s or fewer --seconds")
    ephemeris = _ephemeris(tle, start)
    t_s = np.arange(0.0, seconds + step_s / 2, step_s)
    look = ephemeris.look(Station("station", *station), t_s)
    sunlit = sunlit_fraction(ephemeris, t_s)
    rows: list[dict[str, Any]] = [
        {
            "time": utc_text(start, float(t)),
            "elevation_deg": float(look.elevation_deg[index]),
            "azimuth_deg": float(look.azimuth_deg[index]),
            "range_m": float(look.range_m[index]),
            "delay_s": one_way_delay_s(float(look.range_m[index])),
            "sunlit_fraction": float(sunlit[index]),
        }
        for index, t in enumerate(t_s)
    ]
    if as_json:
        print_json({"samples": rows})
        return
    for row in rows:
        click.echo(
            f"{row['time']}  el {row['elevation_deg']:7.3f}°  az {row['azimuth_deg']:7.3f}°  "
            f"{row['range_m'] / 1e3:9.3f} km  {row['delay_s'] * 1e3:7.4f} ms  sun {row['sunlit_fraction']:.3f}"
        )
