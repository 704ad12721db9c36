"""`hil board console`: print it, type at it, or lend it to another program as a pseudo terminal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hil.cli.options import bench_option, board_option, the_bench
from hil.errors import BenchError, UsageError

if TYPE_CHECKING:
    from hil.client import Bench, Lease
    from hil.client.console_line import DaemonLine

LEAVE = b"\x1d"  # Ctrl-], as telnet has it
CHUNK = 4096


@click.command()
@bench_option
@board_option
@click.argument("name", required=False)
@click.option("--follow/--no-follow", default=True, help="keep printing until Ctrl-C")
@click.option("--interactive", "-i", is_flag=True, help="type at it from this terminal; Ctrl-] leaves")
@click.option(
    "--pty",
    is_flag=False,
    flag_value="",
    metavar="LINK",
    help="lend it to minicom, socat, …: as a pseudo terminal, linked at LINK",
)
def console(
    bench_file: str | None, board_name: str | None, name: str | None, follow: bool, interactive: bool, pty: str | None
) -> None:
    """Print the console of board NAME, from the beginning of the daemon's memory.

    With --interactive or --pty it can also be written to, under the lease that `hil lease acquire` took; without one
    it can only be read. The daemon goes on logging all of it, and others go on reading.
    """
    from hil.client import attach

    if interactive and pty is not None:
        raise UsageError("--interactive and --pty exclude each other")
    bench = the_bench(bench_file)
    name, _, _ = bench.board(name or board_name)
    with attach(bench) as client:
        if not interactive and pty is None:
            _print(client, name, follow)
            return
        with _lease(client, name) as lease:
            if interactive:
                _type(client, name, lease)
            else:
                _lend(client, name, lease, Path(pty) if pty else None)


def _print(client: Bench, name: str, follow: bool) -> None:
    terminal = client.board(name).console
    with contextlib.suppress(BenchError):
        terminal.seek(0)  # refused once the daemon no longer holds the beginning: then from now on
    while True:
        sys.stdout.buffer.write(terminal.read_available())
        sys.stdout.buffer.flush()
        if not follow:
            return
        time.sleep(0.05)


@contextlib.contextmanager
def _lease(client: Bench, name: str) -> Iterator[Lease | None]:
    from hil.cli.lease import held_lease

    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(held_lease(client, client.inventory, name))
        except (UsageError, BenchError) as error:
            click.echo(f"read only: {error.message}", err=True)
            lease = None
        yield lease


def _type(client: Bench, name: str, lease: Lease | None) -> None:
    if not sys.stdin.isatty():
        raise UsageError("--interactive needs a terminal", hint="pipe into a pseudo terminal: --pty LINK, and socat")
    line = _open(client, name, lease)
    click.echo(f"console of {name}; Ctrl-] leaves", err=True)
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        carry(line, 0, 1, lease, leave=LEAVE)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        line.close()
        click.echo("", err=True)


def _lend(client: Bench, name: str, lease: Lease | None, link: Path | None) -> None:
    line = _open(client, name, lease)
    with pseudo_terminal(link) as (master, path):
        click.echo(f"console of {name} at {path}; Ctrl-C ends", err=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the link is removed then too
        try:
            carry(line, master, master, lease)
        except KeyboardInterrupt:
            click.echo("", err=True)
        finally:
            line.close()


@contextlib.contextmanager
def pseudo_terminal(link: Path | None) -> Iterator[tuple[int, str]]:
    """(our end, the path to open). `link` leads there meanwhile; UsageError if it is taken."""
    master, slave = os.openpty()  # the slave stays open here: else a leaving reader would hang it up
    try:
        tty.setraw(slave)
        os.set_blocking(master, False)
        path = os.ttyname(slave)
        if link is not None:
            if link.is_symlink():
                link.unlink()
            try:
                link.symlink_to(path)
            except OSError as error:
                raise UsageError(f"cannot link the console at {link}: {error.strerror}") from error
        yield master, path if link is None else str(link)
    finally:
        if link is not None and link.is_symlink():
            link.unlink()
        os.close(master)
        os.close(slave)


def _open(client: Bench, name: str, lease: Lease | None) -> DaemonLine:
    from hil.client.console_line import DaemonLine

    if client.board(name).wires.console is None:
        raise UsageError(f"board {name} has no console", hint="add `console:` to the bench file")
    line = DaemonLine(name, client.console_socket(name), lambda: None if lease is None else lease.token)
    line.connect(None)
    return line


def carry(
    line: DaemonLine,
    near_in: int,
    near_out: int,
    lease: Lease | None,
    *,
    leave: bytes | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Bytes both ways until the near end is at its end, says `leave`, or the stream ends (BenchError).

    What a pseudo terminal does not take because nobody reads it is dropped: the log has it. The lease is renewed.
    """
    renew_s = clock() + (lease.ttl_s / 3 if lease else 0.0)
    poll = select.poll()
    poll.register(near_in, select.POLLIN)
    poll.register(line.fileno(), select.POLLIN)
    while True:
        ready = {number for number, _ in poll.poll(500)}
        if line.fileno() in ready:
            data = line.receive(0)
            with contextlib.suppress(BlockingIOError):
                while data:
                    data = data[os.write(near_out, data) :]
        if near_in in ready:
            typed = os.read(near_in, CHUNK)
            if not typed or (leave is not None and leave in typed):
                return
            if lease is not None:
                line.write(typed)
        if lease is not None and clock() >= renew_s:
            lease.renew()
            renew_s = clock() + lease.ttl_s / 3
