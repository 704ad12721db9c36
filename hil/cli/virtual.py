"""`hil virtual`: images, and the virtual bench's instruments as processes of their own."""

from __future__ import annotations

from pathlib import Path

import click

from hil.cli.options import VIRTUAL_BENCH, json_option, print_json
from hil.inventory import Bench, load_bench


@click.group()
def virtual() -> None:
    """The virtual bench: images, up, down, status."""


def _bench(file: Path | None) -> Bench:
    return load_bench(file or VIRTUAL_BENCH)


bench_argument = click.argument(
    "bench_file", required=False, metavar="[BENCH]", type=click.Path(dir_okay=False, path_type=Path)
)


@virtual.command()
@click.option("--fill-offline", type=click.Path(file_okay=False, path_type=Path), help="fill a folder for HIL_OFFLINE")
def images(fill_offline: Path | None) -> None:
    """Build or find everything the virtual bench boots from; nothing is fetched twice."""
    from hil import paths
    from hil.virtual import images as module
    from hil.virtual.linkbox import ensure_image

    if fill_offline is not None:
        module.fill_offline(paths.cache_dir(), fill_offline, click.echo)
        return
    module.ensure_images(paths.cache_dir(), click.echo)
    ensure_image(paths.cache_dir(), load_bench(VIRTUAL_BENCH).file.links["box1"].port, click.echo)


@virtual.command()
@bench_argument
def up(bench_file: Path | None) -> None:
    """Start supply, link box and payload network; boards start when their supply channel is switched on."""
    from hil.virtual import supervisor
    from hil.virtual.config import virtual_bench

    supervisor.up(virtual_bench(_bench(bench_file)), click.echo)


@virtual.command()
@bench_argument
def down(bench_file: Path | None) -> None:
    """Stop them; a running board loses its power."""
    from hil.virtual import supervisor
    from hil.virtual.config import virtual_bench

    supervisor.down(virtual_bench(_bench(bench_file)))


@virtual.command()
@bench_argument
@json_option
def status(bench_file: Path | None, as_json: bool) -> None:
    """What is running, and where it listens."""
    from hil.virtual import supervisor
    from hil.virtual.config import virtual_bench

    state = supervisor.status(virtual_bench(_bench(bench_file)))
    if as_json:
        print_json(state)
        return
    for key, value in state.items():
        click.echo(f"{key:12} {value}")


@virtual.command()
@click.option("--model", default="rigol-dp800", show_default=True, help="vendor-series")
@click.option("--port", default=5025, show_default=True, type=click.IntRange(1, 65535))
def supply(model: str, port: int) -> None:
    """Run one virtual supply, a resistor on each channel, until stopped; any VISA or socket client may talk to it."""
    from hil.virtual.supply import run_supply

    run_supply(model, port)
