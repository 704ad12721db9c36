"""`hil mission`: list, show, check, compile and fly missions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hil.cli.options import FIXTURES, bench_option, board_option, json_option, print_json, the_bench
from hil.errors import ExitCode

if TYPE_CHECKING:
    from hil.inventory import BoardType, Mission

F = TypeVar("F", bound=Callable[..., Any])


def _mission_argument(function: F) -> F:
    return click.argument("mission_file", metavar="MISSION", type=click.Path(dir_okay=False, path_type=Path))(function)


def _load(mission_file: Path) -> Mission:
    """A path, or the bare name of a mission that comes with hil."""
    from hil.inventory import load_mission

    shipped = FIXTURES / "missions" / f"{mission_file}.yaml"
    return load_mission(shipped if not mission_file.exists() and shipped.is_file() else mission_file)


def _board_type(bench_file: str | None, board_name: str | None) -> BoardType:
    """The type of the named bench's board; the virtual board's without a bench."""
    from hil.inventory import load_board_type

    if bench_file:
        return the_bench(bench_file).board(board_name)[2]
    return load_board_type(FIXTURES.parent / "boards" / "virtual-arm64.yaml")


@click.group()
def mission() -> None:
    """List, check, compile and fly missions."""


@mission.command("list")
@json_option
def list_(as_json: bool) -> None:
    """The missions that come with hil."""
    rows = [_load(path) for path in sorted((FIXTURES / "missions").glob("*.yaml"))]
    if as_json:
        print_json({"missions": [{"name": m.name, "title": m.file.title, "path": str(m.path)} for m in rows]})
        return
    for item in rows:
        click.echo(f"{item.name:24} {item.file.title}")


@mission.command()
@_mission_argument
@json_option
def show(mission_file: Path, as_json: bool) -> None:
    """Steps, criteria, sources and assumptions of a mission."""
    item = _load(mission_file)
    file = item.file
    if as_json:
        print_json(file.model_dump(mode="json", by_alias=True, exclude_unset=True))
        return
    click.echo(f"{file.title}  ({item.path})")
    click.echo(f"start {file.start:%Y-%m-%dT%H:%M:%SZ}, {file.duration_h:g} h, stations {', '.join(file.stations)}")
    click.echo(f"model {file.model.title}")
    click.echo(f"steps {' -> '.join(step.kind for step in file.steps)}")
    for heading, lines in (
        ("criteria", [f"{c.name}: {c.measure} {_bound(c)}" for c in file.criteria]),
        ("sources", file.sources),
        ("assumptions", file.assumptions),
    ):
        click.echo(f"\n{heading}")
        for line in lines:
            click.echo(f"  - {line}")


@mission.command()
@_mission_argument
@bench_option
@board_option
@json_option
def check(mission_file: Path, bench_file: str | None, board_name: str | None, as_json: bool) -> int:
    """Whether the mission is sound and what it needs: contacts, eclipses, energy, model file."""
    from hil.campaign.check import check_mission

    item = _load(mission_file)
    findings = check_mission(item, _board_type(bench_file, board_name))
    if as_json:
        print_json(
            {"mission": item.name, "findings": [{"ok": f.ok, "what": f.what, "found": f.found} for f in findings]}
        )
    else:
        for finding in findings:
            click.echo(f"{'ok ' if finding.ok else 'NO '} {finding.what}: {finding.found}")
    return int(ExitCode.PASS if all(finding.ok for finding in findings) else ExitCode.FAIL)


@mission.command("compile")
@_mission_argument
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="write the timeline: .npz or .csv")
@bench_option
@board_option
@json_option
def compile_(
    mission_file: Path, out: Path | None, bench_file: str | None, board_name: str | None, as_json: bool
) -> None:
    """Compute passes, eclipses, delay, rate and array power ahead of the flight."""
    from hil.errors import UsageError
    from hil.inventory.environment import environment
    from hil.mission.timeline import compile_timeline

    if out is not None and out.suffix not in {".npz", ".csv"}:
        raise UsageError(f"--out {out}: unknown kind of file", hint="end the name in .npz or .csv")
    timeline = compile_timeline(environment(_load(mission_file), _board_type(bench_file, board_name)))
    if out is not None and out.suffix == ".npz":
        timeline.save(out)
    elif out is not None:
        out.write_text(timeline.to_csv(), encoding="utf-8")
    summary = {
        "mission": timeline.environment.name,
        "hash": timeline.hash,
        "start": timeline.utc(0.0),
        "end": timeline.utc(timeline.duration_s),
        "contacts": [
            {
                "aos": timeline.utc(item.aos_s),
                "los": timeline.utc(item.los_s),
                "stations": [span.label for span in item.spans],
                "max_elevation_deg": round(item.max_elevation_deg, 3),
            }
            for item in timeline.contacts
        ],
        "eclipses": [
            {
                "penumbra_entry": timeline.utc(item.penumbra_entry_s),
                "penumbra_exit": timeline.utc(item.penumbra_exit_s),
            }
            for item in timeline.eclipses
        ],
    }
    if as_json:
        print_json(summary)
        return
    click.echo(f"{summary['mission']}  {summary['start']} to {summary['end']}  hash {timeline.hash[:16]}")
    click.echo(f"{len(timeline.contacts)} contacts, {len(timeline.eclipses)} eclipses, {len(timeline.edges)} edges")
    for contact in timeline.contacts:
        stations = " -> ".join(span.label for span in contact.spans)
        aos = timeline.utc(contact.aos_s)
        click.echo(f"  {aos}  {contact.duration_s:5.0f} s  {contact.max_elevation_deg:4.0f}°  {stations}")


@mission.command()
@_mission_argument
@bench_option
@board_option
@click.option("--runs", type=click.Path(file_okay=False, path_type=Path), default=Path("runs"), show_default=True)
def fly(mission_file: Path, bench_file: str | None, board_name: str | None, runs: Path) -> int:
    """Fly a mission on a board; exit code is the verdict's."""
    from hil.cli.flight_display import fly_with_display

    finished = fly_with_display(the_bench(bench_file), _load(mission_file), board_name=board_name, runs=runs)
    return int(finished.exit_code)


def _bound(criterion: Any) -> str:
    parts = [
        f"{sign} {value}"
        for sign, value in ((">=", criterion.min), ("<=", criterion.max), ("=", criterion.equals))
        if value is not None
    ]
    return " and ".join(parts) + (f" {criterion.unit}" if criterion.unit else "")
