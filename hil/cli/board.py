"""`hil board`: list and show boards, switch and measure power, watch the console, open a shell, copy files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from hil.cli.console import console
from hil.cli.options import bench_option, json_option, print_json, the_bench
from hil.cli.power import line, outlet, power
from hil.cli.ssh import get, put, ssh, trust


@click.group()
def board() -> None:
    """List and show boards; power, control lines, console, ssh, files."""


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


@board.command()
@bench_option
@click.argument("board_name", metavar="[BOARD]", required=False)
@json_option
def show(bench_file: str | None, board_name: str | None, as_json: bool) -> None:
    """One board: its type, wiring and limits, who leases it, and what its power is now."""
    from hil.client import attach

    bench = the_bench(bench_file)
    name, wires, kind = bench.board(board_name)
    with attach(bench) as daemon:
        state = daemon.status()["boards"][name]
        lease = next((row for row in daemon.leases() if name in row["boards"]), None)
    shown = {
        "name": name,
        "type": {key: getattr(kind, key) for key in ("name", "title", "arch", "hardware")},
        "features": sorted(bench.features(name)),
        # Who looks at a board need not learn how to log in there.
        "wiring": wires.model_dump(mode="json", exclude={"type": True, "console": {"password"}}),
        "limits": {
            "main": kind.supply.model_dump(),
            **{rail: limits.model_dump() for rail, limits in kind.rails.items()},
        },
        "lease": lease,
        "power": {key: state[key] for key in ("state", "fault", "power_epoch")} | {"sample": state["power"]},
        "link": state["link"],
        "console": state["console"],
    }
    if as_json:
        print_json(shown)
        return
    for key, told in _told(shown):
        click.echo(f"{key:10} {told}")


def _told(shown: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    kind, wiring, state, lease = shown["type"], shown["wiring"], shown["power"], shown["lease"]
    yield shown["name"], f"{kind['title']} ({kind['name']}, {kind['arch']}, hardware: {kind['hardware']})"
    yield "features", ", ".join(shown["features"]) or "none"
    for wire in wiring["power"]:
        yield (
            "fed by",
            f"{wire['supply']} channel {wire['channel']}" + (f", rail {wire['rail']}" if wire["rail"] else ""),
        )
    for plane in ("mgmt", "payload"):
        if wire := wiring[plane]:
            link = f" behind {wire['link']}" if plane == "payload" else ""
            yield plane, f"{wire['user']}@{wire['address']}:{wire['port']}{link}"
    yield "console", "none" if wiring["console"] is None else wiring["console"]["port"]
    for name, address in wiring["lines"].items():
        yield "line", f"{name}: {address}"
    for rail, limits in shown["limits"].items():
        volts = f"{limits['voltage_min_v']:g} to {limits['voltage_max_v']:g} V"
        yield "limits", f"{rail}: {volts}, {limits['current_max_a']:g} A, {limits['power_max_w']:g} W"
    yield "lease", "free" if lease is None else f"{lease['holder']} until {lease['until']}  {lease['reason']}".rstrip()
    sample, told = state["sample"], [state["state"]]
    if sample is not None:
        told.append(f"{sample['voltage_v']:.3f} V  {sample['current_a']:.3f} A  {sample['power_w']:.2f} W")
    if state["fault"]:
        told.append(f"fault: {state['fault']}")
    yield "power", ", ".join(told)


board.add_command(power)
board.add_command(line)
board.add_command(outlet)
for command in (console, ssh, trust, put, get):
    board.add_command(command)
