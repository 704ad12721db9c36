"""`hil campaign`: look at finished runs."""

from __future__ import annotations

from pathlib import Path

import click

from hil.cli.options import json_option, print_json
from hil.errors import UsageError


@click.group()
def campaign() -> None:
    """Reports and verdicts of runs."""


@campaign.command("list")
@click.option(
    "--runs",
    "runs_dir",
    default="runs",
    show_default=True,
    type=click.Path(path_type=Path),
    help="directory of the run directories",
)
@json_option
def list_(runs_dir: Path, as_json: bool) -> None:
    """Runs and their verdicts, newest first."""
    import json

    if not runs_dir.is_dir():
        raise UsageError(
            f"no runs in {runs_dir.resolve()}: there is no such directory", hint="--runs DIR, where runs were written"
        )
    found = []
    for directory in sorted(runs_dir.glob("*/"), reverse=True):
        file = directory / "verdict.json"
        verdict = json.loads(file.read_text())["verdict"] if file.is_file() else "unfinished"
        found.append({"run": str(directory), "verdict": verdict})
    if as_json:
        print_json({"runs": found})
        return
    if not found:
        click.echo(f"no runs in {runs_dir.resolve()}")
    for row in found:
        click.echo(f"{row['verdict']:10} {row['run']}")


@campaign.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(run_dir: Path) -> int:
    """Evaluate the record of RUN_DIR again: verdict.json, junit.xml, report.html. Exit code is the verdict's."""
    from hil.campaign.finish import finish

    result = finish(run_dir)
    click.echo(f"{result.verdict}: {run_dir / 'report.html'}")
    return int(result.exit_code)
