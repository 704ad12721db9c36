"""`hil link show|set|clear`: the emulator between ground and board, by hand."""

from __future__ import annotations

import click

from hil.cli.lease import held_lease
from hil.cli.options import bench_option, board_option, json_option, print_json, the_bench


@click.group()
def link() -> None:
    """Show, set and clear the emulated link."""


@link.command()
@bench_option
@board_option
@json_option
def show(bench_file: str | None, board_name: str | None, as_json: bool) -> None:
    """What is applied now, per direction."""
    from hil.client import attach

    with attach(the_bench(bench_file)) as daemon:
        state = daemon.board(board_name).link.state()
    if as_json:
        print_json(state)
        return
    for key, value in state.items():
        click.echo(f"{key:10} {value}")


@link.command("set")
@bench_option
@board_option
@click.option("--delay-ms", type=click.FloatRange(min=0), default=0.0, help="one way")
@click.option("--rate-bps", type=click.FloatRange(min=0), default=0.0, help="bits per second; 0 is unlimited")
@click.option("--loss", type=click.FloatRange(0, 1), default=0.0, help="share of packets lost at random")
@click.option("--outage", is_flag=True, help="lose every packet")
def set_(
    bench_file: str | None, board_name: str | None, delay_ms: float, rate_bps: float, loss: float, outage: bool
) -> None:
    """Shape both directions alike; needs a lease."""
    from hil.client import attach
    from hil.model import LinkState

    bench = the_bench(bench_file)
    name, _, _ = bench.board(board_name)
    state = LinkState(delay_s=delay_ms / 1e3, rate_bps=rate_bps, loss=loss, outage=outage)
    with attach(bench) as daemon, held_lease(daemon, bench, name) as lease:
        daemon.board(name, lease).link.set(state)


@link.command()
@bench_option
@board_option
def clear(bench_file: str | None, board_name: str | None) -> None:
    """Remove what hil added to the emulator; needs a lease."""
    from hil.client import attach

    bench = the_bench(bench_file)
    name, _, _ = bench.board(board_name)
    with attach(bench) as daemon, held_lease(daemon, bench, name) as lease:
        daemon.board(name, lease).link.clear()
