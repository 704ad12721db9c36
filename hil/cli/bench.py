"""`hil bench`: the daemon that owns the instruments."""

from __future__ import annotations

import socket

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
    if state["remote"]:
        click.echo(f"  users of other hosts: https://{state['remote']['listen']}#{state['remote']['fingerprint']}")
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
        charge = "behind an array" if flight["soc"] is None else f"state of charge {flight['soc']:.0%}"
        click.echo(f"  flight {flight['utc']} at rate {flight['rate']:g}, {charge}")


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


@bench.group()
def token() -> None:
    """Who may use the bench from other hosts."""


@token.command()
@bench_option
@click.argument("user")
def add(bench_file: str | None, user: str) -> None:
    """Make a token for USER and print it, once; an older one of that user is void."""
    import time

    from hil.bench.remote import Users, certificate, fingerprint

    bench = the_bench(bench_file)
    made, _ = certificate(bench.state_dir, bench.name)
    click.echo(f"HIL_BENCH_TOKEN={Users(bench.state_dir).add(user, time.time())}")
    wire = bench.file.remote
    if wire is None:
        click.echo(f"nothing listens yet: add `remote: {{host: 0.0.0.0}}` to {bench.path}", err=True)
    else:
        host = socket.getfqdn() if wire.host in ("0.0.0.0", "::") else wire.host  # noqa: S104  (it is asked about)
        click.echo(f"HIL_BENCH=https://{host}:{wire.port}#{fingerprint(made)}")


@token.command("list")
@bench_option
@json_option
def list_(bench_file: str | None, as_json: bool) -> None:
    """Users with a token, and since when."""
    from hil.bench.remote import Users

    users = Users(the_bench(bench_file).state_dir).list()
    if as_json:
        print_json({"users": users})
        return
    for user, added in users.items():
        click.echo(f"{user:20} since {added}")


@token.command()
@bench_option
@click.argument("user")
def remove(bench_file: str | None, user: str) -> None:
    """Make USER's token void. A lease that the user holds runs out by itself."""
    from hil.bench.remote import Users

    Users(the_bench(bench_file).state_dir).remove(user)
