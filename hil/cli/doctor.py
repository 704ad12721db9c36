"""`hil doctor`: one table that says whether the bench can fly, and why not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hil.cli.options import bench_option, json_option, print_json, the_bench
from hil.errors import ExitCode, HilError

if TYPE_CHECKING:
    from hil.inventory import Bench


@click.command()
@bench_option
@click.option("--measure-off", metavar="BOARD", help="power BOARD and cut it, to measure how long off takes")
@click.option("--yes", is_flag=True, help="consent to that on real hardware")
@json_option
def doctor(bench_file: str | None, measure_off: str | None, yes: bool, as_json: bool) -> int:
    """Check every fixture and this host; exit code 3 if the bench cannot fly. Switches nothing unless asked to."""
    from hil.bench.host import host_checks
    from hil.client import attach

    bench = the_bench(bench_file)
    if measure_off is not None:
        from hil.cli import measure_off as cuts

        cuts.consent(bench, measure_off, yes, click.confirm)
        cuts.measure_off(bench, measure_off, lambda line: click.echo(line, err=as_json))
    rows = _runs() + _virtual(bench)
    try:
        with attach(bench) as daemon:
            state = daemon.status()
            rows.append(_row("daemon", "answers", True, f"pid {state['pid']}, hil {state['version']}"))
            rows += daemon.doctor()
    except HilError as error:
        rows.append(_row("daemon", "answers", False, str(error)))
        rows += [_row("host", *row) for row in ([] if bench.url else host_checks([bench.state_dir]))]
    healthy = all(row["ok"] is not False for row in rows)
    if as_json:
        print_json({"bench": bench.name, "can_fly": healthy, "checks": rows})
    else:
        marks = {True: "ok", False: "NO", None: "-"}
        for row in rows:
            found = row["found"].replace("\n", "\n" + " " * 48)
            click.echo(f"{marks[row['ok']]:3} {row['fixture']:14} {row['what']:28} {found}")
        click.echo(f"bench {bench.name} {'can fly' if healthy else 'CANNOT fly'}")
    return int(ExitCode.PASS if healthy else ExitCode.BENCH)


def _row(fixture: str, what: str, ok: bool | None, found: str) -> dict[str, Any]:
    return {"fixture": fixture, "what": what, "ok": ok, "found": found}


def _virtual(bench: Bench) -> list[dict[str, Any]]:
    """Whether a virtual bench of this host is up: without it everything below is lost."""
    if bench.file.virtual is None or bench.url:
        return []
    from hil.virtual import supervisor
    from hil.virtual.config import virtual_bench

    running = supervisor.status(virtual_bench(bench))["running"]
    found = "is up" if running else f"is not up\nnext: hil virtual up {bench.path}"
    return [_row("here", "virtual bench", running, found)]


def _runs() -> list[dict[str, Any]]:
    """Records are written here, wherever the bench is."""
    from hil.bench.host import DISK_FREE_BYTES

    free = shutil.disk_usage(Path.cwd()).free
    return [_row("here", "disk space", free > DISK_FREE_BYTES, f"{free / 1e9:.1f} GB free for runs in {Path.cwd()}")]
