"""What the daemon can say of its fixtures before anybody flies: reachable or not and why, versions, safety levels."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from hil.bench.board import BoardOwner
from hil.bench.player import LinkOwner
from hil.bench.safety import capability_level
from hil.drivers.dialects import dialect
from hil.drivers.scpi import ScpiSupply
from hil.errors import HilError

TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's table. `ok` None: worth knowing, stops nothing."""

    fixture: str
    what: str
    ok: bool | None
    found: str


async def examine(
    boards: Mapping[str, BoardOwner],
    dialects: Mapping[str, str],
    supplies: Mapping[str, ScpiSupply],
    links: Mapping[str, LinkOwner],
    *,
    deadman_alive: bool,
) -> list[Check]:
    """Ask every fixture. Switches nothing; a fixture that does not answer is a finding, not an exception."""
    groups = await asyncio.gather(
        *(_supply(name, supply, dialects[name], deadman_alive) for name, supply in supplies.items()),
        *(_link(name, link) for name, link in links.items()),
    )
    return [check for group in groups for check in group] + [
        check for name, board in boards.items() for check in _board(name, board)
    ]


async def _supply(name: str, supply: ScpiSupply, spoken: str, deadman_alive: bool) -> list[Check]:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await supply.open()
    except (HilError, TimeoutError) as error:
        return [Check(name, "supply answers", False, str(error) or f"no answer within {TIMEOUT_S:g} s")]
    level = capability_level(supply.capabilities, deadman=deadman_alive)
    unverified = dialect(spoken).unverified()
    checks = [
        Check(name, "supply answers", True, str(supply.identity)),
        Check(name, "capability level", level.level != "D", "; ".join((level.level, *level.reasons))),
    ]
    if unverified:
        checks.append(Check(name, "commands not in the manual", None, ", ".join(unverified)))
    return checks


async def _link(name: str, link: LinkOwner) -> list[Check]:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            facts = await link.preflight()
    except (HilError, TimeoutError) as error:
        return [Check(name, "link box answers", False, str(error) or f"no answer within {TIMEOUT_S:g} s")]
    found = f"netem over SSH; kernel {facts['kernel']}, {facts['tc']}, netem {facts['netem']}"
    checks = [Check(name, "link box answers", facts["netem"] != "missing", found)]
    return checks + [Check(name, "link box", None, warning) for warning in facts["warnings"]]


def _board(name: str, board: BoardOwner) -> list[Check]:
    checks = [Check(name, "board type", None, f"{board.type.title}; hardware: {board.type.hardware}")]
    if board.console is not None:
        reason = "open, logging" if board.console.connected else board.console.reason
        checks.append(Check(name, "console", board.console.connected, reason))
    if board.fault:
        checks.append(Check(name, "power", False, str(board.fault)))
    else:
        checks.append(Check(name, "power", None, f"output {board.state}"))
    return checks
