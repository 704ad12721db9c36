"""An orderly shutdown of a board before its power is cut: over its management port, else over its console."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING

from hil.errors import HilError

if TYPE_CHECKING:
    from hil.bench.board import BoardOwner
    from hil.inventory.bench import SshWire

POLL_S = 0.1
SSH_S = 15.0
# The line may hold half a command, and what runs may not be a shell.
INTERRUPT = b"\x03\r"
TAIL_BYTES = 200  # longer than a board's last words


async def shut_down(board: BoardOwner, timeout_s: float) -> str:
    """Ask the board to shut down and wait until it says or shows that it is down, at most `timeout_s`.

    Returns how it went; never raises: the power is cut afterwards in any case.
    """
    began_s = time.monotonic()
    since = 0 if board.console is None else board.console.ring.end
    try:
        async with asyncio.timeout(timeout_s):
            asked = await _ask(board)
            if asked is None:
                return "no way to shut it down: it has neither a management port nor a console that answers"
            while (seen := _down(board, since)) is None:  # noqa: ASYNC110 (two sources, one without events)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        return f"was asked to shut down and was not down after {timeout_s:g} s"
    return f"shut down {asked} within {time.monotonic() - began_s:.1f} s: {seen}"


async def _ask(board: BoardOwner) -> str | None:
    if board.wires.mgmt is not None:
        try:
            await asyncio.to_thread(_over_ssh, board.wires.mgmt, board.type.shutdown.command)
        except HilError:
            pass  # it does not answer there: perhaps it does on its console
        else:
            return "over its management port"
    if board.console is None:
        return None
    try:
        await board.console.write(INTERRUPT + board.type.shutdown.command.encode() + b"\r")
    except HilError:
        return None
    return "over its console"


def _over_ssh(wire: SshWire, command: str) -> None:
    from hil.drivers.ssh import Login, Shell
    from hil.errors import BoardError

    board = (wire.address, wire.port, wire.user, wire.key, wire.known_hosts)
    jump = [Login(hop.address, hop.port, hop.user, hop.key, hop.known_hosts) for hop in wire.jump]
    shell = Shell.connect(*board, jump=jump, timeout_s=SSH_S)
    try:
        shell.run(["sh", "-c", command], timeout_s=SSH_S)
    except BoardError:
        pass  # it went down before it answered
    finally:
        shell.abort()


def _down(board: BoardOwner, since: int) -> str | None:
    """What shows that the board is down: its last words, or a current that only a board that is down draws."""
    shutdown = board.type.shutdown
    if board.console is not None:
        start = max(since, board.console.ring.end - (1 << 16))
        said = re.search(shutdown.done.encode(), board.console.ring.since(start)[1])
        if said is not None:
            return f"it said {said.group(0).decode('utf-8', 'replace')[:TAIL_BYTES]!r}"
    sample = board.last
    if shutdown.down_w is not None and sample is not None and sample.power_w < shutdown.down_w:
        return f"it draws {sample.power_w:.2f} W"
    return None
