"""`hil board ssh|trust|put|get`: shells and files of a board over SSH, and the first contact that pins its key."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hil.cli.options import bench_option, board_option, the_bench
from hil.errors import BenchError, HilError, UsageError
from hil.inventory.bench import Bench, PayloadWire, SshWire

if TYPE_CHECKING:
    from hil.client import Lease
    from hil.client.shell import AnyShell
    from hil.drivers.ssh import Attempt, Login
    from hil.drivers.ssh.connection import Opener

DIAL_S = 20.0

plane_option = click.option(
    "--plane", type=click.Choice(["mgmt", "payload"]), default="mgmt", show_default=True, help="payload: the link"
)


@click.command()
@bench_option
@board_option
@click.option("--pipe", is_flag=True, hidden=True, help="only pass bytes on, for OpenSSH's ProxyCommand")
@click.argument("command", nargs=-1)
def ssh(bench_file: str | None, board_name: str | None, pipe: bool, command: tuple[str, ...]) -> None:
    """OpenSSH to the board over its management port, with the pinned host key.

    Several words are one command with its arguments, as they are: `hil board ssh -- printf '%s' 'a b'`. One word is a
    line for the board's shell: `hil board ssh 'dmesg | tail'`.
    """
    from hil.client.shell import login, openssh

    bench = the_bench(bench_file)
    name, wire = _wire(bench, board_name, "mgmt")
    if pipe:
        with _opener(bench, name, "mgmt") as opener:
            if opener is None:
                raise UsageError("only a bench on another host is reached through a pipe")
            _pass_on(opener(DIAL_S))
        return
    hil = [sys.argv[0], "board", "ssh", "--pipe", "--bench", bench.url, "--board", name] if bench.url else []
    argv = openssh([login(hop) for hop in (*wire.jump, wire)], hil)
    line = command[0] if len(command) == 1 else shlex.join(command)
    os.execvp("ssh", [*argv, line] if command else argv)  # noqa: S606


@click.command()
@bench_option
@click.argument("board_name", metavar="BOARD", required=False)
@plane_option
@click.option("--fingerprint", help="trust only this key: SHA256:…, as `ssh-keygen -lf` prints it on the board")
@click.option("--yes", is_flag=True, help="do not ask; on networks where nobody can stand in between")
@click.option("--replace", is_flag=True, help="the board was reinstalled or swapped: forget its earlier key")
def trust(
    bench_file: str | None, board_name: str | None, plane: str, fingerprint: str | None, yes: bool, replace: bool
) -> None:
    """First contact: show the host key of BOARD and of machines on the way, and pin what you confirm."""
    from hil.client.shell import login

    bench = the_bench(bench_file)
    name, wire = _wire(bench, board_name, plane)
    with _opener(bench, name, plane) as opener:
        broker = wire.broker if isinstance(wire, PayloadWire) and opener is None else None
        _trust(name, [login(hop) for hop in (*wire.jump, wire)], broker, opener, fingerprint, yes, replace)


def _trust(
    name: str,
    hops: Sequence[Login],
    broker: Path | None,
    opener: Opener | None,
    fingerprint: str | None,
    yes: bool,
    replace: bool,
) -> None:
    from hil.drivers.ssh import host_key, pin, pinned

    for index, hop in enumerate(hops):
        last = index == len(hops) - 1
        known = pinned(hop.known_hosts, hop.host, hop.port)
        if known and not last:
            continue  # it was trusted before, and is what the next key is seen through
        key = host_key(hop, hops[:index], broker=broker, opener=opener)
        what = f"board {name}" if last else "jump host"
        click.echo(f"{what} {hop.host} port {hop.port}: {key.kind} {key.fingerprint}")
        if known != (key,):
            _confirm(key.fingerprint, fingerprint if last else None, yes)
        fresh = pin(hop.known_hosts, hop.host, hop.port, key, replace=replace and last)
        click.echo(f"{'pinned in' if fresh else 'already pinned in'} {hop.known_hosts}")


def _confirm(seen: str, wanted: str | None, yes: bool) -> None:
    if wanted is not None:
        if seen != wanted:
            raise BenchError(f"the key there is {seen}, not {wanted}", hint="another machine answers at this address")
        return
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here", hint="--fingerprint SHA256:…, or --yes on a network of your own")
    click.confirm("is this the key that the board itself shows (ssh-keygen -lf)?", abort=True)


@click.command()
@bench_option
@board_option
@plane_option
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target")
def put(bench_file: str | None, board_name: str | None, plane: str, source: Path, target: str) -> None:
    """Copy the file SOURCE to TARGET on the board; resumed where an earlier try ended, hashed before it is in place."""
    from hil.client.console_shell import ConsoleShell
    from hil.drivers import ssh as files

    there = f"{target}{source.name}" if target.endswith("/") else target
    with _shell(bench_file, board_name, plane) as shell:
        if isinstance(shell, ConsoleShell):
            shell.put(source, there)
            click.echo(f"{source} -> {there}: over the console")
            return
        with _progress(source.stat().st_size) as moved:
            attempt = files.put(shell, source, there, on_progress=moved)
    _told(attempt, f"{source} -> {there}")


@click.command()
@bench_option
@board_option
@plane_option
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path), default=Path())
def get(bench_file: str | None, board_name: str | None, plane: str, source: str, target: Path) -> None:
    """Copy the file SOURCE of the board to TARGET (a file or a directory); resumed and hashed likewise."""
    from hil.client.console_shell import ConsoleShell
    from hil.drivers import ssh as files

    here = target / source.rpartition("/")[2] if target.is_dir() else target
    with _shell(bench_file, board_name, plane) as shell:
        if isinstance(shell, ConsoleShell):
            here.write_bytes(shell.get(source))
            click.echo(f"{source} -> {here}: over the console")
            return
        with _progress(None) as moved:
            attempt = files.get(shell, source, here, on_progress=moved)
    _told(attempt, f"{source} -> {here}")


@contextlib.contextmanager
def _shell(bench_file: str | None, board_name: str | None, plane: str) -> Iterator[AnyShell]:
    """A shell under the lease that this user holds: over the console where a board has no mgmt port."""
    from hil.cli.lease import held_lease
    from hil.client import attach

    bench = the_bench(bench_file)
    name, wires, _ = bench.board(board_name)
    if plane == "payload" or wires.console is None:
        _wire(bench, board_name, plane)
    with attach(bench) as client, held_lease(client, bench, name) as lease, _renewed(lease):
        held = client.board(name, lease)
        if plane == "mgmt":
            yield held.shell
            return
        with held.payload_shell() as shell:
            yield shell


@contextlib.contextmanager
def _opener(bench: Bench, board: str, plane: str) -> Iterator[Opener | None]:
    """What gives sockets to a board whose bench is on another host, under the lease that this user holds there."""
    from hil.cli.lease import held_lease
    from hil.client import attach

    if not bench.url:
        yield None
        return
    with attach(bench) as client, held_lease(client, bench, board) as lease, _renewed(lease):
        yield client.board(board, lease).opener(plane)


@contextlib.contextmanager
def _renewed(lease: Lease) -> Iterator[None]:
    """The lease does not run out meanwhile: a session or a large file may take longer than it lives."""
    over = threading.Event()

    def renew() -> None:
        while not over.wait(lease.ttl_s / 3):
            with contextlib.suppress(HilError):  # a lease that is over ends the stream, which says so
                lease.renew()

    threading.Thread(target=renew, name="hil-lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _pass_on(sock: socket.socket) -> None:
    """Standard input into the socket and the socket into standard output, until one of them ends."""

    def up() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(0, 1 << 16):
                sock.sendall(data)
            sock.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=up, daemon=True).start()
    with sock, contextlib.suppress(OSError):
        while data := sock.recv(1 << 16):
            while data:
                data = data[os.write(1, data) :]


@contextlib.contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], None]]:
    """Tells on a terminal how far it is, five times a second."""
    shown = [0.0]

    def moved(offset: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - shown[0] > 0.2:
            shown[0] = time.monotonic()
            whole = "" if not total else f" of {total / 1e6:.1f}"
            click.echo(f"\r{offset / 1e6:.1f}{whole} MB", nl=False, err=True)

    yield moved
    if shown[0]:
        click.echo("\r\x1b[K", nl=False, err=True)


def _told(attempt: Attempt, what: str) -> None:
    mib_s = attempt.sent_bytes / max(attempt.duration_s, 1e-6) / 2**20
    resumed = f", {attempt.start_offset} were there" if attempt.start_offset else ""
    click.echo(f"{what}: {attempt.sent_bytes} bytes in {attempt.duration_s:.2f} s ({mib_s:.1f} MiB/s){resumed}")


def _wire(bench: Bench, board_name: str | None, plane: str) -> tuple[str, SshWire]:
    name, wires, _ = bench.board(board_name)
    wire = wires.mgmt if plane == "mgmt" else wires.payload
    if wire is None:
        raise UsageError(f"board {name} has no {plane} port in {bench.path}", hint="`hil board console` reaches it")
    return name, wire
