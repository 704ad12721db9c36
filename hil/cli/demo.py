"""`hil demo`: the virtual bench up, one mission flown on it, a verdict at the end."""

from __future__ import annotations

from pathlib import Path

import click

from hil.cli.options import FIXTURES, VIRTUAL_BENCH


@click.command()
@click.option("--mission", "mission_file", type=click.Path(dir_okay=False, path_type=Path), help="another mission file")
@click.option(
    "--bench", "bench_file", type=click.Path(dir_okay=False, path_type=Path), help="another virtual bench (other ports)"
)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="where the run directory goes",
)
@click.option("--keep", is_flag=True, help="leave the virtual bench running afterwards")
def demo(mission_file: Path | None, bench_file: Path | None, runs: Path, keep: bool) -> int:
    """Fly the Star-Compute Qwen-3 mission on the virtual bench; no hardware, no network."""
    from hil.cli.flight_display import fly_with_display
    from hil.inventory import load_bench, load_mission
    from hil.virtual import supervisor
    from hil.virtual.config import virtual_bench

    bench = load_bench(bench_file or VIRTUAL_BENCH)
    mission = load_mission(mission_file or FIXTURES / "missions" / "star-compute-qwen3.yaml")
    config = virtual_bench(bench)
    supervisor.up(config, click.echo)
    try:
        return int(fly_with_display(bench, mission, runs=runs).exit_code)
    finally:
        if not keep:
            supervisor.down(config)
