"""`hil link`: the emulator between ground and board, by hand; what it can be here, and its certificate."""

from __future__ import annotations

from pathlib import Path

import click

from hil.cli.lease import held_lease
from hil.cli.options import bench_option, board_option, json_option, print_json, the_bench


@click.group()
def link() -> None:
    """Show, set, clear and certify the emulated link."""


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


@link.command()
@json_option
def backends(as_json: bool) -> None:
    """Which emulators this host can be, and why not the others; the first usable one is to be preferred."""
    from dataclasses import asdict

    from hil.drivers import link_backends

    found = link_backends.backends()
    best = link_backends.chosen(found)
    if as_json:
        print_json({"chosen": None if best is None else best.driver, "backends": [asdict(item) for item in found]})
        return
    for item in found:
        mark = "use" if item is best else "ok" if item.usable else "NO"
        click.echo(f"{mark:4} {item.driver:11} {item.why}")


@link.command()
@bench_option
@board_option
@click.option("--quick", is_flag=True, help="fewer packets, one delay: half a minute instead of two")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="write the certificate there, as JSON")
@json_option
def certify(bench_file: str | None, board_name: str | None, quick: bool, out: Path | None, as_json: bool) -> int:
    """Measure what the emulator does to packets, and hold it against what it was asked for.

    Without --bench: a user-space link between two namespaces of this host. Exit code 1 when the link fails a limit, 6
    when the bare path is too noisy or a wrong setting goes unnoticed.
    """
    from hil.bench.certificate import QUICK, Plan
    from hil.cli import link_certify
    from hil.errors import ExitCode

    bench = the_bench(bench_file) if bench_file else None
    say = (lambda line: None) if as_json else click.echo
    found = link_certify.certify(bench, board_name, QUICK if quick else Plan(), say)
    if out is not None:
        link_certify.write(found, out)
    if as_json:
        print_json(found.as_json())
    else:
        click.echo(f"{found.facts['backend']}: {found.verdict}")
    return int({"pass": ExitCode.PASS, "fail": ExitCode.FAIL}.get(found.verdict, ExitCode.INVALID))


_PORTS = "listen:PATH, connect:PATH, tap:NAME, tun:NAME or broker:SOCKET:NAME"


@link.command()
@click.argument("control", type=click.Path(path_type=Path))
@click.option("--ground", required=True, metavar="PORT", help=f"towards the ground: {_PORTS}")
@click.option("--board", required=True, metavar="PORT", help="towards the board: likewise")
@click.option("--seed", type=click.IntRange(min=0), help="makes losses repeat")
@click.option("--log", type=click.Path(dir_okay=False, path_type=Path), help="a line a packet: came, due, left")
def serve(control: Path, ground: str, board: str, seed: int | None, log: Path | None) -> int:
    """Be a link in user space until stopped; a bench file's `driver: user-space` names the socket CONTROL."""
    from hil.drivers import userspace_link

    argv = [str(control), "--ground", ground, "--board", board]
    argv += [] if seed is None else ["--seed", str(seed)]
    argv += [] if log is None else ["--log", str(log)]
    return userspace_link.main(argv)
