"""`hil orbit eclipses|passes|track|seasons`: what an orbit does, straight from its elements."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hil.cli.options import json_option, print_json
from hil.errors import UsageError

if TYPE_CHECKING:
    from hil.mission.orbit import Ephemeris

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


def _sso(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        altitude, node = (float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("expected ALT_KM,LTAN_H, for example 600,18") from None
    return altitude, node


def _orbit_options(function: F) -> F:
    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    for option in (
        click.option(
            "--sso", callback=_sso, metavar="ALT_KM,LTAN_H", help="sun-synchronous design: height, node's hour"
        ),
        click.option("--omm", type=file, help="file with a CCSDS 502 message, JSON or XML"),
        click.option("--tle", type=file, help="file with a two-line element set"),
    ):
        function = option(function)
    return function


def _start_option(function: F) -> F:
    return click.option("--start", required=True, callback=_time, metavar="UTC", help="2026-03-20T00:00:00Z")(function)


def _station_option(function: F) -> F:
    return click.option("--station", required=True, callback=_station, metavar="LAT,LON,ALT_M", help="degrees, metres")(
        function
    )


def _ephemeris(
    start: datetime, days: float, tle: Path | None, omm: Path | None, sso: tuple[float, float] | None
) -> Ephemeris:
    """The one orbit that was named, from `start` on; what to know about its elements goes to stderr."""
    from hil.inventory.orbit_file import read_orbit_file
    from hil.mission.orbit import Ephemeris, Orbit

    path = tle or omm
    if sum(source is not None for source in (tle, omm, sso)) != 1:
        raise UsageError("name one orbit", hint="give exactly one of --tle FILE, --omm FILE, --sso ALT_KM,LTAN_H")
    if sso is not None:
        return Ephemeris(Orbit.sso(sso[0], start, ltan_h=sso[1]), start)
    orbit = read_orbit_file(path or Path(), "tle" if tle is not None else "omm")
    orbit.require_epoch_near(start, days=days, where=str(path))
    for caution in orbit.warnings(start, days=days):
        click.echo(f"warning: {caution.message}", err=True)
    return Ephemeris(orbit, start)


@click.group()
def orbit() -> None:
    """Eclipses, passes, tracks and seasons of an orbit."""


@orbit.command()
@_orbit_options
@_start_option
@click.option(
    "--hours", type=click.FloatRange(min=0, min_open=True), default=24.0, show_default=True, help="from start on"
)
@json_option
def eclipses(start: datetime, hours: float, as_json: bool, **source: Any) -> None:
    """Penumbra and umbra entries and exits."""
    from hil.mission.frames import utc_text
    from hil.mission.shadow import find_eclipses

    names = ("penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit")
    rows = [
        {name: None if (t_s := getattr(item, f"{name}_s")) is None else utc_text(start, t_s) for name in names}
        for item in find_eclipses(_ephemeris(start, hours / 24.0, **source), 0.0, hours * 3600.0)
    ]
    if as_json:
        print_json({"eclipses": rows})
        return
    click.echo("  ".join(f"{name:24}" for name in names))
    for row in rows:
        click.echo("  ".join(f"{row[name] or '-':24}" for name in names))


@orbit.command()
@_orbit_options
@_station_option
@click.option("--mask-deg", type=click.FloatRange(-5, 89.9), default=5.0, show_default=True, help="lowest elevation")
@_start_option
@click.option(
    "--hours", type=click.FloatRange(min=0, min_open=True), default=24.0, show_default=True, help="from start on"
)
@json_option
def passes(
    station: tuple[float, float, float],
    mask_deg: float,
    start: datetime,
    hours: float,
    as_json: bool,
    **source: Any,
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
        for item in find_passes(_ephemeris(start, hours / 24.0, **source), ground, 0.0, hours * 3600.0)
    ]
    if as_json:
        print_json({"passes": rows})
        return
    click.echo(f"{'aos':24}  {'los':24}  {'max elevation':>13}  at")
    for row in rows:
        click.echo(f"{row['aos']}  {row['los']}  {row['max_elevation_deg']:12.1f}°  {row['max_elevation_at']}")


@orbit.command()
@_orbit_options
@_station_option
@_start_option
@click.option("--seconds", type=click.FloatRange(min=0), required=True, help="from start on")
@click.option(
    "--step-s", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="between samples"
)
@json_option
def track(
    station: tuple[float, float, float],
    start: datetime,
    seconds: float,
    step_s: float,
    as_json: bool,
    **source: Any,
) -> None:
    """Elevation, azimuth, range, delay and sunlight."""
    import numpy as np

    from hil.mission.frames import DAY_S, Station, utc_text
    from hil.mission.radio import one_way_delay_s
    from hil.mission.shadow import sunlit_fraction

    if seconds / step_s > 1e6:
        raise UsageError("more than a million samples", hint="a larger --step-s or fewer --seconds")
    ephemeris = _ephemeris(start, seconds / DAY_S, **source)
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


@orbit.command()
@_orbit_options
@_start_option
@click.option(
    "--days",
    type=click.FloatRange(min=0, max=400, min_open=True),
    default=365.0,
    show_default=True,
    help="from start on",
)
@json_option
def seasons(start: datetime, days: float, as_json: bool, **source: Any) -> None:
    """Eclipse seasons, sunlit share and range of beta."""
    from hil.mission.frames import DAY_S, utc_text
    from hil.mission.seasons import sunlight

    view = sunlight(_ephemeris(start, days, **source), days)
    rows = [
        {
            "start": utc_text(start, item.start_s),
            "end": utc_text(start, item.end_s),
            "eclipses": item.eclipses,
            "longest_s": round(item.longest_s, 3),
            "longest_at": utc_text(start, item.longest_at_s),
        }
        for item in view.seasons
    ]
    if as_json:
        print_json(
            {
                "seasons": rows,
                "days": view.days,
                "sunlit_fraction": round(view.sunlit_fraction, 6),
                "beta_min_deg": round(view.beta_min_deg, 4),
                "beta_max_deg": round(view.beta_max_deg, 4),
            }
        )
        return
    for item, row in zip(view.seasons, rows, strict=True):
        click.echo(
            f"{row['start']}  to  {row['end']}  {(item.end_s - item.start_s) / DAY_S:6.1f} d  "
            f"{item.eclipses:5d} eclipses, longest {item.longest_s / 60:.1f} min at {row['longest_at']}"
        )
    click.echo(
        f"{'no eclipse; ' if not rows else ''}in sunlight {view.sunlit_fraction:.2%} of {days:g} days, "
        f"beta {view.beta_min_deg:.1f}° to {view.beta_max_deg:.1f}°"
    )
