"""`hil board`: list boards, switch and measure power, watch the console, open a shell."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import click

from hil.cli.options import bench_option, board_option, json_option, print_json, the_bench
from hil.cli.power import line, outlet, power
from hil.errors import BenchError, UsageError


@click.group()
def board() -> None:
    """List boards; power, control lines, console, ssh."""


@board.command("list")
@bench_option
@json_option
def list_(bench_file: str | None, as_json: bool) -> None:
    """The boards of the bench."""
    bench = the_bench(bench_file)
    rows = [
        {
            "name": name,
            "type": item.type,
            "hardware": bench.types[item.type].hardware,
            "arch": bench.types[item.type].arch,
        }
        for name, item in bench.file.boards.items()
    ]
    if as_json:
        print_json({"boards": rows})
        return
    for row in rows:
        click.echo(f"{row['name']:12} {row['type']:20} {row['arch']:10} {row['hardware']}")


board.add_command(power)
board.add_command(line)
board.add_command(outlet)


@board.command()
@bench_option
@board_option
@click.option("--follow/--no-follow", default=True, help="keep printing until Ctrl-C")
def console(bench_file: str | None, board_name: str | None, follow: bool) -> None:
    """Print the board's console, from the beginning of the daemon's log."""
    from hil.client import attach

    bench = the_bench(bench_file)
    name, _, _ = bench.board(board_name)
    with attach(bench) as client:
        terminal = client.board(name).console
        with contextlib.suppress(BenchError):
            terminal.seek(0)  # refused once the daemon no longer holds the beginning: then from now on
        while True:
            sys.stdout.buffer.write(terminal.read_available())
            sys.stdout.buffer.flush()
            if not follow:
                return
            time.sleep(0.05)


@board.command()
@bench_option
@board_option
@click.argument("command", nargs=-1)
def ssh(bench_file: str | None, board_name: str | None, command: tuple[str, ...]) -> None:
    """OpenSSH to the board over its management port, with the pinned host key."""
    bench = the_bench(bench_file)
    name, wires, _ = bench.board(board_name)
    mgmt = wires.mgmt
    if mgmt is None:
        raise UsageError(f"board {name} has no mgmt port in {bench.path}", hint="`hil board console` reaches it")
    options = ["IdentitiesOnly=yes", "StrictHostKeyChecking=yes", f"UserKnownHostsFile={Path(mgmt.known_hosts)}"]
    argv = ["ssh", "-i", str(mgmt.key), "-p", str(mgmt.port), *(part for o in options for part in ("-o", o))]
    os.execvp("ssh", [*argv, f"{mgmt.user}@{mgmt.address}", *command])  # noqa: S606
