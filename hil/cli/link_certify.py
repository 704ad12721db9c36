"""The work of `hil link certify`: finds the far end that the bench allows, measures, writes the certificate down."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hil.bench.certificate import (
    EMULATED,
    NETEM_LOCAL,
    NETEM_REMOTE,
    QUICK,
    USER_SPACE,
    Certificate,
    Certifier,
    Limits,
    Plan,
)
from hil.bench.far_end import FarEnd, behind_stream, on_board, user_space_bench
from hil.bench.links import link_driver
from hil.bench.safety import InstrumentLock
from hil.drivers.link import LinkEmulator
from hil.drivers.prompt import be_prompt
from hil.errors import BenchError, UsageError

if TYPE_CHECKING:
    from hil.inventory import Bench
    from hil.inventory.bench import PayloadWire


def certify(bench: Bench | None, board_name: str | None, plan: Plan, say: Callable[[str], None]) -> Certificate:
    """Measure the link of a bench's board, or without a bench a user-space link between two namespaces of this host.

    The daemon must not run: a link has one owner. Raises UsageError, BenchError.
    """
    be_prompt(inherited=True)  # the SSH connection's thread and the far end as well: they are the measure
    with contextlib.ExitStack() as stack:
        if bench is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hil-")))
            link: LinkEmulator
            link, far = stack.enter_context(user_space_bench(directory))
            limits = USER_SPACE
        else:
            name, wires, _ = bench.board(board_name)
            if wires.payload is None:
                raise UsageError(f"board {name} has no payload link", hint="add `payload:` to the bench file")
            link, limits = stack.enter_context(_claimed(bench, wires.payload.link))
            far = stack.enter_context(_far_end(bench, name, wires.payload))
        say(f"far end: {far.what}")
        found = Certifier(link, far.path, limits, far.one_clock, plan, say).measure()
    extra = {"bench": None if bench is None else bench.name, "far_end": far.what}
    return Certificate(found.verdict, found.criteria, {**extra, **found.facts})


def for_flight(bench: Bench, board_name: str | None, run: Path, say: Callable[[str], None]) -> None:
    """Measure before a flight, into `certificate.json` of its run. BenchError when the link does not pass."""
    found = certify(bench, board_name, QUICK, say)
    write(found, run / "certificate.json")
    if found.verdict != "pass":
        bad = "; ".join(f"{row.name}: {row.evidence}" for row in found.criteria if row.verdict != "pass")
        raise BenchError(
            f"the link's certificate is {found.verdict}: {bad}",
            hint="on a busy host the bare path is noisy: try again when it is idle, or fly without --certify",
        )


def write(certificate: Certificate, path: Path) -> None:
    """Write it down. UsageError when that place cannot be written."""
    try:
        path.write_text(json.dumps(certificate.as_json(), indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def _claimed(bench: Bench, name: str) -> Iterator[tuple[LinkEmulator, Limits]]:
    """The link's driver, claimed for this process, and what its backend must meet."""
    wire = bench.file.links[name]
    lock = InstrumentLock(wire.address)
    try:
        lock.acquire()
    except BenchError as error:
        raise BenchError(error.message, hint=f"a link has one owner: `hil bench stop --bench {bench.path}`") from error
    played = bench.file.virtual is not None and wire.driver == "netem-ssh"
    limits = {"netem-ssh": EMULATED if played else NETEM_REMOTE, "netem": NETEM_LOCAL}.get(wire.driver, USER_SPACE)
    link = link_driver(name, wire)
    try:
        link.open()
        yield link, limits
    finally:
        link.close()
        lock.release()


@contextlib.contextmanager
def _far_end(bench: Bench, name: str, payload: PayloadWire) -> Iterator[FarEnd]:
    """In the place of a virtual board that is off; else on the board, started over its management port."""
    inner = None if bench.file.virtual is None else _vacant(bench, name)
    network = None if bench.file.virtual is None else bench.file.virtual.payload_network
    if inner is not None and network is not None:
        from hil.virtual.board import payload_mac

        mac = payload_mac(bench.name, name)
        with behind_stream(
            inner, payload.broker, address=payload.address, prefix=network.prefix, mac=mac, ground=network.host
        ) as far:
            yield far
        return
    mgmt = bench.file.boards[name].mgmt
    if mgmt is None:
        raise UsageError(
            f"board {name} has no management port to start the far end over",
            hint="a certificate needs somebody who answers behind the link",
        )
    with on_board(mgmt, payload.broker, payload.address) as far:
        yield far


def _vacant(bench: Bench, name: str) -> Path | None:
    """Where a far end can be plugged in; None when the board is on. BenchError when the virtual bench is down."""
    from hil.virtual import supervisor
    from hil.virtual.config import virtual_bench

    config = virtual_bench(bench)
    state = supervisor.status(config)
    if not state["running"]:
        raise BenchError(f"virtual bench {bench.name} is down", hint=f"hil virtual up {bench.path}")
    return None if state["boards"][name]["powered"] else supervisor.payload_socket(config, name)
