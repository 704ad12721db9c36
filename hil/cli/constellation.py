"""`hil mission routes`: how the ground reaches the satellites of a mission's constellation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hil.cli.mission_argument import load_named, mission_argument
from hil.cli.options import json_option, print_json
from hil.errors import UsageError

if TYPE_CHECKING:
    from hil.mission.routes import Network, Routes

_LISTED = 40  # satellites that are still worth a line each


@click.command()
@mission_argument
@click.option("--station", "stations", metavar="NAME", multiple=True, help="only from this station (may be repeated)")
@click.option("--to", "target", type=click.IntRange(min=0), metavar="SATELLITE", help="every way to this satellite")
@click.option("--contacts", is_flag=True, help="also when every link works: the contact plan of the constellation")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="write the columns of --to as CSV")
@json_option
def routes(
    mission_file: Path,
    case: str | None,
    stations: tuple[str, ...],
    target: int | None,
    contacts: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Ways of least delay through a constellation.

    From the stations to every satellite over the whole mission, with handovers.
    """
    from hil.inventory.environment import constellation
    from hil.mission.routes import compile_routes

    if out is not None and target is None:
        raise UsageError("--out writes the way to one satellite", hint="name it with --to")
    item = load_named(mission_file, case)
    network = constellation(item)
    if network is None:
        raise UsageError(
            f"{item.path}: no inter-satellite links to route over", hint="add `constellation` with `isl` to the mission"
        )
    network = _from_stations(network, stations)
    found = compile_routes(network)
    summary = {"mission": item.name, **_summary(network, found)}
    if target is not None:
        summary["to"] = _ways(found, target, item.file.link.handover)
    if out is not None and target is not None:
        _write(found, target, out)
    if contacts:
        summary["contacts"] = _contacts(found)
    if as_json:
        print_json(summary)
    else:
        _print(summary)


def _from_stations(network: Network, names: tuple[str, ...]) -> Network:
    known = {station.name: station for station in network.stations}
    for name in names:
        if name not in known:
            raise UsageError(f"no station {name}", hint=f"the mission has {', '.join(known)}")
    return replace(network, stations=tuple(known[name] for name in names)) if names else network


def _summary(network: Network, found: Routes) -> dict[str, Any]:
    import numpy as np

    from hil.mission.constellation import mean_axis_km, ring_figures
    from hil.mission.frames import utc_text

    count, ring = len(network.constellation), None
    if network.constellation.even and network.constellation.per_plane > 1:
        figures = ring_figures(mean_axis_km(network.constellation.orbits[0]), network.constellation.per_plane)
        ring = {
            "neighbour_m": round(1e3 * figures.neighbour_km),
            "one_way_s": round(figures.one_way_s, 6),
            "grazing_altitude_m": round(1e3 * figures.grazing_km),
        }
    steps = found.delay_s[:-1] if len(found.t_s) > 1 else found.delay_s
    reached = np.isfinite(steps)
    rows = []
    for satellite in range(count):
        delays = steps[reached[:, satellite], satellite]
        rows.append(
            {
                "satellite": satellite,
                "name": network.constellation.orbits[satellite].name,
                "reachable_share": round(float(reached[:, satellite].mean()), 4),
                "delay_s_median": round(float(np.median(delays)), 6) if len(delays) else None,
                "delay_s_max": round(float(delays.max()), 6) if len(delays) else None,
                "hops_max": int(found.to(satellite).hops.max()),
            }
        )
    return {
        "start": utc_text(network.start),
        "end": utc_text(network.start, network.duration_s),
        "step_s": network.step_s,
        "stations": [station.name for station in network.stations],
        "planes": network.constellation.planes,
        "links": len(found.links),
        "neighbours": ring,
        "satellites": rows,
    }


def _ways(found: Routes, target: int, handover: str) -> dict[str, Any]:
    from hil.mission.frames import utc_text
    from hil.mission.relay import RelayPlan

    plan = RelayPlan(found, target, keep=handover == "keep-current")
    start = found.network.start
    return {
        "satellite": target,
        "handover": handover,
        "reachable_s": round(sum(span.duration_s for span in plan.spans), 3),
        "contacts": len(plan.contacts),
        "handovers": sum(len(contact.spans) - 1 for contact in plan.contacts),
        "reroutes": len(plan.reroutes),
        "ways": [
            {
                "start": utc_text(start, span.start_s),
                "end": utc_text(start, span.end_s),
                "station": span.station,
                "path": list(span.path),
                "hops": span.hops,
                "delay_s_start": round(delays[0], 6),
                "delay_s_end": round(delays[1], 6),
            }
            for span, delays in zip(plan.spans, plan.delays_s(), strict=True)
        ],
    }


def _write(found: Routes, target: int, out: Path) -> None:
    """The way of least delay at every step: utc, t_s, delay_s, hops, station, path (satellites, access first)."""
    from hil.mission.frames import utc_text

    route = found.to(target)
    lines = ["utc,t_s,delay_s,hops,station,path"]
    for step, (t_s, delay_s, hops) in enumerate(zip(route.t_s, route.delay_s, route.hops, strict=True)):
        station = found.network.stations[route.station[step]].name if hops else ""
        path = " ".join(str(satellite) for satellite in found.path(step, target))
        delay = f"{delay_s:.9f}" if hops else ""
        lines.append(f"{utc_text(found.network.start, float(t_s))},{t_s:.6f},{delay},{hops},{station},{path}")
    try:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}") from error


def _contacts(found: Routes) -> list[dict[str, Any]]:
    from hil.mission.frames import utc_text
    from hil.mission.routes import GROUND

    start = found.network.start
    return [
        {
            "start": utc_text(start, span.start_s),
            "end": utc_text(start, span.end_s),
            "from": span.station if span.a == GROUND else span.a,
            "to": span.b,
        }
        for span in found.link_spans
    ]


def _print(summary: dict[str, Any]) -> None:
    rows = summary["satellites"]
    span = f"{summary['start']} to {summary['end']}, every {summary['step_s']:g} s"
    click.echo(
        f"{summary['mission']}  {len(rows)} satellites in {summary['planes']} plane(s), "
        f"{summary['links']} possible links, from {', '.join(summary['stations'])}, {span}"
    )
    if ring := summary["neighbours"]:
        click.echo(
            f"neighbours in a plane: {ring['neighbour_m'] / 1e3:,.0f} km, {1e3 * ring['one_way_s']:.2f} ms one way, "
            f"line of sight {ring['grazing_altitude_m'] / 1e3:,.0f} km above the Earth"
        )
    if len(rows) <= _LISTED:
        click.echo(f"{'satellite':>9}  {'name':10} {'reachable':>9} {'median':>10} {'longest':>10} {'hops':>5}")
        for row in rows:
            delays = f"{_ms(row['delay_s_median']):>10} {_ms(row['delay_s_max']):>10}"
            click.echo(
                f"{row['satellite']:9}  {row['name']:10} {row['reachable_share']:9.1%} {delays} {row['hops_max']:5}"
            )
    else:
        shares = [row["reachable_share"] for row in rows]
        longest = max((row["delay_s_max"] for row in rows if row["delay_s_max"] is not None), default=None)
        click.echo(
            f"reachable {min(shares):.1%} to {max(shares):.1%} of the time; longest delay {_ms(longest)}, at most "
            f"{max(row['hops_max'] for row in rows)} hops"
        )
    if "to" in summary:
        _print_ways(summary["to"])
    for item in summary.get("contacts", []):
        click.echo(f"  {item['start']}  {item['end']}  {item['from']} - {item['to']}")


def _print_ways(ways: dict[str, Any]) -> None:
    click.echo(
        f"\nto satellite {ways['satellite']}: {ways['reachable_s'] / 3_600:.2f} h in {ways['contacts']} contacts, "
        f"{ways['handovers']} handovers on the ground, {ways['reroutes']} between satellites"
    )
    for way in ways["ways"]:
        path = " > ".join([way["station"], *(str(satellite) for satellite in way["path"])])
        delay = f"{_ms(way['delay_s_start']):>9} to {_ms(way['delay_s_end']):>9}"
        click.echo(f"  {way['start']}  {way['end']}  {delay}  {path}")


def _ms(delay_s: float | None) -> str:
    return "-" if delay_s is None else f"{1e3 * delay_s:.2f} ms"
