"""`hil lease`: who holds which board; take and give back one that outlives the command."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hil.cli.options import bench_option, json_option, print_json, the_bench
from hil.errors import BenchError, UsageError

if TYPE_CHECKING:
    from hil import client, inventory


def _store(bench: inventory.Bench, board: str) -> Path:
    return bench.state_dir / f"lease-{board}.json"


def _is_held(daemon: client.Bench, bench: inventory.Bench, board: str) -> bool:
    """Whether the daemon still knows the lease that is stored for `board`."""
    row = daemon.status()["boards"][board]["lease"]
    return row is not None and row["lease"] == json.loads(_store(bench, board).read_text(encoding="utf-8"))["lease"]


@contextlib.contextmanager
def held_lease(daemon: client.Bench, bench: inventory.Bench, board: str) -> Iterator[client.Lease]:
    """The lease that `hil lease acquire` stored. Without one the command is refused: a lease that ends with the
    command would switch the board off again at once.
    """
    from hil.client import Lease

    try:
        granted = json.loads(_store(bench, board).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"board {board} is not leased by this user", hint=f"hil lease acquire {board}; afterwards hil lease release"
        ) from None
    lease = Lease.stored(daemon.http, granted)
    lease.renew()
    yield lease


@click.group()
def lease() -> None:
    """Acquire, release and list leases: who drives which board."""


@lease.command("list")
@bench_option
@json_option
def list_(bench_file: str | None, as_json: bool) -> None:
    """Who holds which board, since when and until when; who waits for one, and why."""
    from hil.client import attach

    with attach(the_bench(bench_file)) as daemon:
        held, waiting = daemon.leases(), daemon.waiting()
    if as_json:
        print_json({"leases": held, "waiting": waiting})
        return
    if not held:
        click.echo("no board is leased")
    for row in held:
        ends = f"until {row['until']}, unless renewed" if row["pid"] is None else f"while process {row['pid']} lives"
        click.echo(f"{', '.join(row['boards']):16} {row['holder']}  since {row['since']}  {ends}  {row['reason']}")
    for place, row in enumerate(waiting, 1):
        wants = " or ".join("+".join(boards) for boards in row["any_of"])
        priority = f"  priority {row['priority']}" if row["priority"] else ""
        click.echo(f"{place}. waits for {wants}: {row['holder']}  since {row['since']}{priority}  {row['reason']}")
        click.echo(f"   {row['why']}")


@lease.command()
@bench_option
@click.argument("boards", nargs=-1, required=True)
@click.option("--ttl-s", type=click.FloatRange(min=1), default=3600.0, show_default=True, help="how long it lasts")
@click.option(
    "--wait-s", type=click.FloatRange(min=0), default=0.0, show_default=True, help="how long to stand in line"
)
@click.option("--priority", type=click.IntRange(-10, 10), default=0, show_default=True, help="higher is served first")
@click.option("--preempt", is_flag=True, help="take it from its holder; needs --reason")
@click.option("--reason", default="", help="shown to all; told to the one who loses the board")
def acquire(
    bench_file: str | None,
    boards: tuple[str, ...],
    ttl_s: float,
    wait_s: float,
    priority: int,
    preempt: bool,
    reason: str,
) -> None:
    """Lease BOARDS until released or for --ttl-s; the token is kept in the state directory."""
    from hil.client import attach

    if preempt and not reason:
        raise UsageError("--preempt needs a reason", hint='--reason "release build is waiting"')
    bench = the_bench(bench_file)
    with attach(bench) as daemon:
        granted = daemon.lease(
            boards,
            ttl_s=ttl_s,
            wait_s=wait_s,
            priority=priority,
            preempt=preempt,
            reason=reason,
            pid=None,
            renew=False,
        )
    for board in granted.boards:  # more than asked for, where boards can only be leased together
        path = _store(bench, board)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump({"lease": granted.id, "token": granted.token, "boards": granted.boards, "ttl_s": ttl_s}, file)
    click.echo(f"leased {', '.join(granted.boards)} for {ttl_s:g} s")


@lease.command()
@bench_option
@click.argument("board")
def release(bench_file: str | None, board: str) -> None:
    """Give BOARD back; it goes to its `on_lease_end` state."""
    from hil.client import attach

    bench = the_bench(bench_file)
    with attach(bench) as daemon:
        try:
            with held_lease(daemon, bench, board) as held:
                boards = held.boards
                held.release()
        except BenchError:
            # Forgotten only when it is over: without its token nobody could release it before its time.
            with contextlib.suppress(BenchError):
                if not _is_held(daemon, bench, board):
                    _store(bench, board).unlink(missing_ok=True)
            raise
    for name in boards:
        _store(bench, name).unlink(missing_ok=True)
    click.echo(f"released {', '.join(boards)}")
