"""`hil board`: list boards, switch and measure power, watch the console, open a shell, copy files."""

from __future__ import annotations

import click

from hil.cli.console import console
from hil.cli.options import bench_option, json_option, print_json, the_bench
from hil.cli.power import line, outlet, power
from hil.cli.ssh import get, put, ssh, trust


@click.group()
def board() -> None:
    """List boards; power, control lines, console, ssh, files."""


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
for command in (console, ssh, trust, put, get):
    board.add_command(command)
