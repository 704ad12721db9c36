"""`hil doctor`: one table that says whether the bench can fly, and why not."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hil.cli.options import bench_option, json_option, print_json, the_bench
from hil.errors import ExitCode, HilError

if TYPE_CHECKING:
    from hil.inventory import Bench

DISK_FREE_BYTES = 1 << 30
CLOCK_SYNCHRONIZED = Path("/run/systemd/timesync/synchronized")


@click.command()
@bench_option
@click.option("--measure-off", metavar="BOARD", help="power BOARD and cut it, to measure how long off takes")
@click.option("--yes", is_flag=True, help="consent to that on real hardware")
@json_option
def doctor(bench_file: str | None, measure_off: str | None, yes: bool, as_json: bool) -> int:
    """Check every fixture and this host; exit code 3 if the bench cannot fly. Switches nothing unless asked to."""
    from hil.client import attach

    bench = the_bench(bench_file)
    if measure_off is not None:
        from hil.cli import measure_off as cuts

        cuts.consent(bench, measure_off, yes, click.confirm)
        cuts.measure_off(bench, measure_off, lambda line: click.echo(line, err=as_json))
    rows = _host(bench)
    try:
        with attach(bench) as daemon:
            state = daemon.status()
            rows.append(_row("daemon", "answers", True, f"pid {state['pid']}, hil {state['version']}"))
            rows += daemon.doctor()
            rows += _boards(bench, state)
    except HilError as error:
        rows.append(_row("daemon", "answers", False, str(error)))
    healthy = all(row["ok"] is not False for row in rows)
    if as_json:
        print_json({"bench": bench.name, "can_fly": healthy, "checks": rows})
    else:
        marks = {True: "ok", False: "NO", None: "-"}
        for row in rows:
            found = row["found"].replace("\n", "\n" + " " * 48)
            click.echo(f"{marks[row['ok']]:3} {row['fixture']:14} {row['what']:28} {found}")
        click.echo(f"bench {bench.name} {'can fly' if healthy else 'CANNOT fly'}")
    return int(ExitCode.PASS if healthy else ExitCode.BENCH)


def _row(fixture: str, what: str, ok: bool | None, found: str) -> dict[str, Any]:
    return {"fixture": fixture, "what": what, "ok": ok, "found": found}


def _host(bench: Bench) -> list[dict[str, Any]]:
    free = min(shutil.disk_usage(path).free for path in (Path.cwd(), bench.state_dir))
    load = os.getloadavg()[0]
    synchronized = CLOCK_SYNCHRONIZED.exists()
    return [
        _row("host", "disk space", free > DISK_FREE_BYTES, f"{free / 1e9:.1f} GB free for runs and state"),
        _row("host", "load", None, f"{load:.1f} on {os.cpu_count()} cores"),
        _row(
            "host",
            "clock",
            None,
            "synchronised" if synchronized else "not known to be synchronised; durations do not depend on it",
        ),
    ]


def _boards(bench: Bench, state: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, board in bench.file.boards.items():
        if board.payload is not None and board.payload.broker is None:
            rows.append(_row(name, "payload", None, "no broker: this host's own routes lead to the board"))
        elif board.payload is not None:
            there = board.payload.broker is not None and board.payload.broker.is_socket()
            rows.append(_row(name, "payload broker", there, str(board.payload.broker)))
        powered = state["boards"][name]["state"] == "on"
        if board.mgmt is not None and powered:
            rows.append(_mgmt(name, board.mgmt.address, board.mgmt.port))
        elif board.mgmt is not None:
            rows.append(_row(name, "mgmt", None, "not asked: the board is off"))
        for file in {wire.known_hosts for wire in (board.mgmt, board.payload) if wire is not None}:
            rows.append(_row(name, "pinned host keys", file.is_file(), str(file)))
    return rows


def _mgmt(name: str, host: str, port: int) -> dict[str, Any]:
    try:
        with socket.create_connection((host, port), timeout=5.0) as sock:
            sock.settimeout(5.0)
            banner = sock.recv(64).decode("ascii", "replace").strip()
    except OSError as error:
        return _row(name, "mgmt", False, f"{host}:{port}: {error}")
    return _row(name, "mgmt", banner.startswith("SSH-"), f"{host}:{port} {banner}")
