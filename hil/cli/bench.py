"""`hil bench`: the daemon that owns the instruments."""

from __future__ import annotations

import click

from hil.cli.options import bench_option, json_option, print_json, the_bench


@click.group()
def bench() -> None:
    """Start, watch and stop the bench daemon."""


@bench.command()
@bench_option
def serve(bench_file: str | None) -> int:
    """Run the daemon in the foreground; clients start it by themselves otherwise."""
    from hil.bench.daemon import serve as run

    return int(run(the_bench(bench_file)))


@bench.command()
@bench_option
@json_option
def status(bench_file: str | None, as_json: bool) -> None:
    """Boards, leases and the flight in progress."""
    from hil.client import attach

    with attach(the_bench(bench_file), start=False) as client:
        state = client.status()
    if as_json:
        print_json(state)
        return
    click.echo(f"bench {state['bench']}  daemon {state['pid']}  hil {state['version']}  metrics {state['metrics']}")
    for name, board in state["boards"].items():
        power, lease = board["power"], board["lease"]
        measured = "not measured yet"
        if power is not None:
            measured = f"{power['voltage_v']:6.2f} V {power['current_a']:6.3f} A {power['power_w']:6.2f} W"
        click.echo(f"  {name:10} {board['state']:8} {measured}  lease {lease['holder'] if lease else '-'}")
        if board["fault"]:
            click.echo(f"             fault: {board['fault']}")
    if state["flight"]:
        flight = state["flight"]
        click.echo(f"  flight {flight['utc']} at rate {flight['rate']:g}, state of charge {flight['soc']:.0%}")


@bench.command()
@bench_option
@click.option("--force", is_flag=True, help="even while a board is leased")
def stop(bench_file: str | None, force: bool) -> None:
    """Switch every output off and end the daemon."""
    from hil.client import attach
    from hil.client.http import DaemonGone

    try:
        with attach(the_bench(bench_file), start=False) as client:
            client.stop(force=force)
    except DaemonGone:
        click.echo("no daemon runs")
