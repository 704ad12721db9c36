"""`hil virtual`: images, and the virtual bench's instruments as processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hil.cli.options import VIRTUAL_BENCH, json_option, print_json
from hil.inventory import Bench, load_bench


@click.group()
def virtual() -> None:
    """The virtual bench: images, up, down, status, supply."""


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
    link = load_bench(VIRTUAL_BENCH).file.links["box1"]
    if link.driver == "netem-ssh":
        ensure_image(paths.cache_dir(), link.port, click.echo)


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


_LOAD_HELP = "board, resistive:10, cp:15, recorded:FILE.csv or none; again for other channels"
_CONTROL_HELP = "unix socket for JSON lines: faults in, the truth at the terminals out"


@virtual.command()
@click.option("--model", default="rigol-dp800", show_default=True, help="vendor-series, see --list")
@click.option("--port", default=5025, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one")
@click.option("--load", "load_texts", multiple=True, metavar="[CH=]LOAD", help=_LOAD_HELP)
@click.option("--serial", is_flag=True, help="answer on a serial port (PTY) too, and print its path")
@click.option("--control", metavar="SOCKET", type=click.Path(dir_okay=False, path_type=Path), help=_CONTROL_HELP)
@click.option("--list", "list_only", is_flag=True, help="list the models and from where their commands are known")
@json_option
def supply(
    model: str,
    port: int,
    load_texts: tuple[str, ...],
    serial: bool,
    control: Path | None,
    list_only: bool,
    as_json: bool,
) -> None:
    """Run one virtual supply on 127.0.0.1 until stopped; any VISA or socket client may talk to it."""
    from hil.virtual.supply import parse_load, run_supply

    if list_only:
        _list_models(as_json)
        return
    loads = dict(parse_load(text) for text in load_texts)
    chosen = {number: load for number, load in loads.items() if load is not None} if load_texts else None
    run_supply(model, port, loads=chosen, serial=serial, control=control, announce=_announce)


def _list_models(as_json: bool) -> None:
    from hil.virtual.supply import MODELS

    if not as_json:
        for model in MODELS.values():
            click.echo(f"{model.name:18} {model.known}")
        return
    rows = []
    for model in MODELS.values():
        channels = {str(n): {"voltage_v": c.rated_v, "current_a": c.rated_a} for n, c in model.channels.items()}
        rows.append({
            "model": model.name,
            "identity": model.identity,
            "channels": channels,
            "usual_port": model.port,
            "known": model.known,
        })  # fmt: skip
    print_json(rows)


def _announce(text: str) -> None:
    click.echo(text)
    sys.stdout.flush()  # whoever started it as a process waits for the port
