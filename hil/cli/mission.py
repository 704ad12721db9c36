"""`hil mission`: list, show, check, compile and fly missions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hil.cli.constellation import routes
from hil.cli.mission_argument import SHIPPED, load_named, mission_argument
from hil.cli.options import FIXTURES, VIRTUAL_BENCH, bench_option, board_option, json_option, print_json, the_bench
from hil.errors import ExitCode, HilError, UsageError

if TYPE_CHECKING:
    from hil.campaign.check import Finding
    from hil.campaign.overview import Overview
    from hil.inventory import BoardType, Mission
    from hil.mission.timeline import Timeline

F = TypeVar("F", bound=Callable[..., Any])

_SUFFIXES = (".yaml", ".yml")


def _span_options(what: str) -> Callable[[F], F]:
    def add(function: F) -> F:
        until = click.option("--until", metavar="T", help=f"{what} ends there")
        begin = click.option("--from", "start", metavar="T", help=f"{what} begins at hours into the mission, or at UTC")
        return begin(until(function))

    return add


def _board_type(bench_file: str | None, board_name: str | None) -> BoardType:
    """The type of the named bench's board; the virtual board's without a bench."""
    from hil.inventory import load_board_type

    if bench_file:
        return the_bench(bench_file).board(board_name)[2]
    return load_board_type(FIXTURES.parent / "boards" / "virtual-arm64.yaml")


def _compile(item: Mission, bench_file: str | None, board_name: str | None) -> Timeline:
    from hil.inventory.environment import environment
    from hil.mission.compile import compile_timeline

    return compile_timeline(environment(item, _board_type(bench_file, board_name)))


def _overview(item: Mission) -> Overview:
    """What the mission is; what to be careful about goes to standard error, once a command."""
    from hil.campaign.overview import overview

    told = overview(item)
    _warn(told.cautions)
    return told


def _warn(cautions: Iterable[str]) -> None:
    for caution in cautions:
        click.echo(f"warning: {caution}", err=True)


@click.group()
def mission() -> None:
    """List, show, check, compile and fly missions."""


mission.add_command(routes)


@mission.command("list")
@click.argument("places", nargs=-1, metavar="[FILE|DIRECTORY]...", type=click.Path(exists=True, path_type=Path))
@json_option
def list_(places: tuple[Path, ...], as_json: bool) -> int:
    """Missions that come with hil, or those in files."""
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, str]] = []
    for path in _mission_files(places or (SHIPPED,)):
        try:
            rows.append(_row(load_named(path)))
        except HilError as error:  # one bad file must not hide the others
            bad.append({"path": str(path), "error": str(error)})
    if as_json:
        print_json({"missions": rows, "unreadable": bad})
    else:
        for row in rows:
            _print_row(row)
        for item in bad:
            click.echo(f"hil: {item['error']}", err=True)
    return int(ExitCode.USAGE if bad else ExitCode.PASS)


def _mission_files(places: tuple[Path, ...]) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            yield from sorted(path for path in place.iterdir() if path.suffix in _SUFFIXES)
        else:
            yield place


def _row(item: Mission) -> dict[str, Any]:
    from hil.campaign.overview import overview
    from hil.mission.frames import utc_text

    file, told = item.file, overview(item)
    return {
        "name": item.name,
        "title": file.title,
        "path": str(item.path),
        "orbit": told.orbit,
        "elements": told.elements,
        "start": utc_text(file.start),
        "duration_h": file.duration_h,
        "stations": list(file.stations),
        "steps": [step.kind for step in file.steps],
        "cases": list(file.cases),
        "model": file.model.title,
        "model_file": str(file.model.file),
        "model_present": file.model.file.is_file(),
    }


def _print_row(row: dict[str, Any]) -> None:
    stations = f"{len(row['stations'])} station{'' if len(row['stations']) == 1 else 's'}"
    facts = [row["orbit"], row["elements"], f"{row['duration_h']:g} h", stations]
    facts += [f"cases {', '.join(row['cases'])}"] if row["cases"] else []
    click.echo(click.style(row["name"], bold=True) + f"  {row['title']}")
    click.echo(f"    {' · '.join(facts)}")
    click.echo(f"    {' → '.join(row['steps'])}")
    click.echo(f"    model {'present' if row['model_present'] else 'ABSENT'}: {row['model']}\n")


@mission.command()
@mission_argument
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="draw it: .html, .svg or .png")
@_span_options("the plot")
@bench_option
@board_option
@json_option
def show(
    mission_file: Path,
    case: str | None,
    plot: Path | None,
    start: str | None,
    until: str | None,
    bench_file: str | None,
    board_name: str | None,
    as_json: bool,
) -> None:
    """What a mission is; with --plot what its sky and power do.

    Told are its steps, criteria, sources, assumptions and what nobody published.
    """
    item = load_named(mission_file, case)
    told = _overview(item)
    if plot is not None:
        _plot(item, plot, start, until, bench_file, board_name)
    elif start or until:
        raise UsageError("--from and --until bound a plot", hint="add --plot FILE.html")
    if as_json:
        print_json(_shown(item, told, plot))
    elif plot is not None:
        click.echo(f"wrote {plot}")
    else:
        _print_mission(item, told)


def _plot(
    item: Mission, plot: Path, start: str | None, until: str | None, bench_file: str | None, board_name: str | None
) -> None:
    from hil.campaign import mission_plot
    from hil.campaign.pace import Pace

    mission_plot.check_path(plot)
    span = Pace.of(item, start=start, until=until)
    timeline = _compile(item, bench_file, board_name)
    mission_plot.write(plot, item, timeline, start_s=span.start_s, end_s=span.until_s)


def _shown(item: Mission, told: Overview, plot: Path | None) -> dict[str, Any]:
    """The mission file's own keys, and under `derived` what follows from it."""
    from datetime import timedelta

    from hil.mission.frames import utc_text

    file = item.file
    return {
        **file.model_dump(mode="json", by_alias=True, exclude_unset=True),
        "start": utc_text(file.start),
        "derived": {
            "path": str(item.path),
            "end": utc_text(file.start + timedelta(hours=file.duration_h)),
            "orbit": told.orbit,
            "elements": told.elements,
            "elements_epoch": told.epoch,
            "elements_age_days": None if told.age_days is None else round(told.age_days, 3),
            "model_present": file.model.file.is_file(),
            "warnings": list(told.cautions),
            "plot": None if plot is None else str(plot),
        },
    }


def _print_mission(item: Mission, told: Overview) -> None:
    file = item.file
    click.echo(click.style(file.title, bold=True) + f"  ({item.path}{f', case {file.case}' if file.case else ''})")
    facts = (
        ("start", f"{file.start:%Y-%m-%dT%H:%M:%SZ}, {file.duration_h:g} h"),
        ("orbit", f"{told.orbit}; {told.elements}"),
        ("stations", ", ".join(file.stations)),
        ("model", f"{file.model.title}{'' if file.model.file.is_file() else f' (ABSENT: {file.model.file})'}"),
        ("steps", " → ".join(step.kind for step in file.steps)),
        ("cases", ", ".join(file.cases)),
    )
    for name, fact in facts:
        if fact:
            click.echo(f"{name:9} {fact}")
    for heading, lines in (
        ("criteria", [f"{c.name}: {c.measure} {_bound(c)}" for c in file.criteria]),
        ("sources", file.sources),
        ("assumptions", file.assumptions),
        ("unknown", file.unknown),
    ):
        if lines:
            click.echo(f"\n{heading}")
        for line in lines:
            click.echo(f"  - {line}")


@mission.command()
@mission_argument
@bench_option
@board_option
@json_option
def check(mission_file: Path, case: str | None, bench_file: str | None, board_name: str | None, as_json: bool) -> int:
    """Whether a mission is sound, what it needs of a bench.

    Of its cases what differs is told. Without --bench it is the virtual bench that is asked.
    """
    from hil.campaign.check import Place, check_mission

    item = load_named(mission_file, case)
    told = _overview(item)
    board = _board_type(bench_file, board_name)
    place = Place.of(the_bench(bench_file or str(VIRTUAL_BENCH)), board_name if bench_file else None)
    findings = check_mission(item, board, place)
    cases = {} if item.file.case else {name: load_named(mission_file, name) for name in item.file.cases}
    others = {name: check_mission(other, board, place) for name, other in cases.items()}
    if as_json:
        print_json(
            {
                "mission": item.name,
                "case": item.file.case,
                "findings": [_finding(finding) for finding in findings],
                "cases": {name: [_finding(finding) for finding in found] for name, found in others.items()},
                "warnings": list(told.cautions),
            }
        )
    else:
        _print_findings(findings)
        for name, found in others.items():
            click.echo(click.style(f"\ncase {name}", bold=True))
            _print_findings([finding for finding in found if finding not in findings])
    every = [*findings, *(finding for found in others.values() for finding in found)]
    return int(ExitCode.FAIL if any(finding.ok is False for finding in every) else ExitCode.PASS)


def _finding(finding: Finding) -> dict[str, Any]:
    return {"ok": finding.ok, "what": finding.what, "found": finding.found, "data": finding.data}


def _print_findings(findings: Iterable[Finding]) -> None:
    marks = {True: "ok ", False: "NO ", None: "?  "}
    for finding in findings:
        click.echo(f"{marks[finding.ok]} {finding.what}: {finding.found}")


@mission.command("compile")
@mission_argument
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="write the timeline; the name's end says how"
)
@bench_option
@board_option
@json_option
def compile_(
    mission_file: Path,
    case: str | None,
    out: Path | None,
    bench_file: str | None,
    board_name: str | None,
    as_json: bool,
) -> None:
    """Compute a flight's passes, eclipses, link and sunlight."""
    from hil.campaign.overview import energy_cautions
    from hil.mission import exports

    if out is not None and not out.name.endswith(exports.SUFFIXES):
        raise UsageError(f"--out {out}: unknown format", hint=f"end the name with one of {', '.join(exports.SUFFIXES)}")
    item = load_named(mission_file, case)
    told = _overview(item)
    timeline = _compile(item, bench_file, board_name)
    short = energy_cautions(item, timeline)
    _warn(short)
    told = replace(told, cautions=(*told.cautions, *short))
    if out is not None:
        exports.write(timeline, out)
    if as_json:
        print_json(_summary(timeline, told, out))
    else:
        _print_summary(timeline, told, out)


def _summary(timeline: Timeline, told: Overview, out: Path | None) -> dict[str, Any]:
    def utc(t_s: float | None) -> str | None:
        return None if t_s is None else timeline.utc(t_s)

    return {
        "mission": timeline.environment.name,
        "hash": timeline.hash,
        "start": timeline.utc(0.0),
        "end": timeline.utc(timeline.duration_s),
        "orbit": told.orbit,
        "elements_age_days": None if told.age_days is None else round(told.age_days, 3),
        "contacts": [
            {
                "aos": utc(item.aos_s),
                "los": utc(item.los_s),
                "stations": [span.label for span in item.spans],
                # a link window has no elevation, and JSON has no nan
                "max_elevation_deg": None if math.isnan(item.max_elevation_deg) else round(item.max_elevation_deg, 3),
            }
            for item in timeline.contacts
        ],
        "eclipses": [
            {
                name: utc(getattr(item, f"{name}_s"))
                for name in ("penumbra_entry", "umbra_entry", "umbra_exit", "penumbra_exit")
            }
            for item in timeline.eclipses
        ],
        "edges": len(timeline.edges),
        "warnings": list(told.cautions),
        "out": None if out is None else str(out),
    }


def _print_summary(timeline: Timeline, told: Overview, out: Path | None) -> None:
    begin, end = timeline.utc(0.0), timeline.utc(timeline.duration_s)
    click.echo(f"{timeline.environment.name}  {begin} to {end}  hash {timeline.hash[:16]}")
    click.echo(f"{told.orbit}; {told.elements}")
    contact_min = sum(item.duration_s for item in timeline.contacts) / 60.0
    eclipse_min = max((item.duration_s for item in timeline.eclipses), default=0.0) / 60.0
    click.echo(
        f"{len(timeline.contacts)} contacts ({contact_min:.0f} min), {len(timeline.eclipses)} eclipses "
        f"(longest {eclipse_min:.1f} min), {len(timeline.edges)} edges"
    )
    for contact in timeline.contacts:
        stations = " → ".join(span.label for span in contact.spans)
        aos = timeline.utc(contact.aos_s)
        highest = "    –" if math.isnan(contact.max_elevation_deg) else f"{contact.max_elevation_deg:4.0f}°"
        click.echo(f"  {aos}  {contact.duration_s:5.0f} s  {highest}  {stations}")
    if out is not None:
        click.echo(f"wrote {out}")


@mission.command()
@mission_argument
@bench_option
@board_option
@click.option("--rate", type=float, metavar="K", help="clock rate of steps that scale time; gaps are flown at it too")
@click.option("--contacts-only", is_flag=True, help="skip the gaps between contacts, also with --rate and in cruises")
@_span_options("the flight")
@click.option("--certify", is_flag=True, help="measure the link first, into the run; fly only if it passes")
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="where the run directory goes",
)
def fly(
    mission_file: Path,
    case: str | None,
    bench_file: str | None,
    board_name: str | None,
    rate: float | None,
    contacts_only: bool,
    start: str | None,
    until: str | None,
    certify: bool,
    runs: Path,
) -> int:
    """Fly a mission on a board; exit code is the verdict's.

    Without --rate every step has the rate of the mission file, and the time between what the steps do is skipped. With
    it, steps that scale time run at K and the gaps are flown at K. What needs real time keeps it: boots, loading,
    questions, load shedding. T is hours into the mission (12.5) or UTC (2026-03-20T00:00:00Z); what is in progress at
    --until, a contact's upload or a question, is finished first.
    """
    from hil.campaign.overview import energy_cautions
    from hil.campaign.pace import Pace
    from hil.cli.flight_display import fly_with_display
    from hil.inventory.environment import environment

    item = load_named(mission_file, case)
    pace = Pace.of(item, rate=rate, contacts_only=contacts_only, start=start, until=until)
    _overview(item)
    bench = the_bench(bench_file)
    _warn(energy_cautions(item, environment(item, bench.board(board_name)[2])))
    finished = fly_with_display(bench, item, board_name=board_name, runs=runs, pace=pace, certify=certify)
    return int(finished.exit_code)


def _bound(criterion: Any) -> str:
    parts = [
        f"{sign} {value}"
        for sign, value in ((">=", criterion.min), ("<=", criterion.max), ("=", criterion.equals))
        if value is not None
    ]
    return " and ".join(parts) + (f" {criterion.unit}" if criterion.unit else "")
