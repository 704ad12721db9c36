"""`hil campaign`: look at finished runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def campaign() -> None:
    """Reports and verdicts of runs."""


@campaign.command("list")
@click.option("--runs", "runs_dir", default="runs", show_default=True, type=click.Path(path_type=Path))
def list_(runs_dir: Path) -> None:
    """Runs and their verdicts, newest first."""
    import json

    for directory in sorted(runs_dir.glob("*/"), reverse=True):
        file = directory / "verdict.json"
        verdict = json.loads(file.read_text())["verdict"] if file.is_file() else "unfinished"
        click.echo(f"{verdict:10} {directory}")


@campaign.command()
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(run_dir: Path) -> int:
    """Evaluate the record of RUN_DIR again: verdict.json, junit.xml, report.html. Exit code is the verdict's."""
    from hil.campaign.finish import finish

    result = finish(run_dir)
    click.echo(f"{result.verdict}: {run_dir / 'report.html'}")
    return int(result.exit_code)
