"""What the daemon can say of its fixtures before anybody flies: reachable or not and why, versions, safety levels."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hil.bench.arrayflight import LIGHT_STEP
from hil.bench.board import BoardOwner
from hil.bench.host import host_checks
from hil.bench.levels import CutTimes, capability_level, ocp_acts, outlet_answer
from hil.bench.player import LinkOwner
from hil.bench.powerfaults import DIP_MIN_S, ONE_TURN_S
from hil.drivers import link_backends
from hil.drivers.dialects import Capabilities, dialect
from hil.drivers.scpi import ScpiSupply
from hil.errors import HilError, UsageError
from hil.inventory.bench import BenchBoard

TIMEOUT_S = 15.0
NOT_ASKED = {"regulation": "CV or CC", "trips": "which protection tripped"}
WATCHDOG = "armed while a board is on; anybody who polls this supply feeds it too, and a dashboard that does defeats it"


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
    cut_times: CutTimes,
    *,
    deadman_alive: bool,
    state_dir: Path,
) -> list[Check]:
    """Ask every fixture. Switches nothing; a fixture that does not answer is a finding, not an exception."""
    groups = await asyncio.gather(
        *(_supply(name, supply, dialects[name]) for name, supply in supplies.items()),
        *(_link(name, link) for name, link in links.items()),
    )
    checks = [Check("host", *row) for row in await asyncio.to_thread(host_checks, [state_dir])]
    if links:
        here = await asyncio.to_thread(lambda: link_backends.told(link_backends.backends()))
        checks.append(Check("host", "link emulators", None, here))
    checks += [check for group in groups for check in group]
    for name, board in boards.items():  # afterwards: what a supply can do is known once it has answered
        checks += await _channels(name, board, cut_times, deadman_alive)
        checks += _board(name, board)
        checks += await asyncio.to_thread(_planes, name, board.wires, board.state == "on")
    return checks


async def _supply(name: str, supply: ScpiSupply, spoken: str) -> list[Check]:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await supply.open()
    except (HilError, TimeoutError) as error:
        return [Check(name, "supply answers", False, str(error) or f"no answer within {TIMEOUT_S:g} s")]
    unverified = dialect(spoken).unverified()
    checks = [Check(name, "supply answers", True, str(supply.identity))]
    if supply.capabilities.watchdog is not None:
        checks.append(Check(name, "watchdog", None, WATCHDOG))
    if dialect(spoken).lease_group:
        checks.append(Check(name, "channels", None, "not independent: boards on them are leased together"))
    checks.append(Check(name, "dips", None, _dips(supply.capabilities)))
    for what, why in dialect(spoken).unknown.items():
        checks.append(Check(name, NOT_ASKED[what], None, f"unknown: {why}"))
    if unverified:
        checks.append(Check(name, "commands not in the manual", None, ", ".join(unverified)))
    return checks


def _dips(can: Capabilities) -> str:
    """How a brown-out is played on this supply, and what the first figure of its result is."""
    if can.lists is None:
        return "two writes, measured: it has no list that we know"
    if can.lists.unused:
        return f"two writes, measured: {can.lists.unused}"
    least, most, step = (1000 * s for s in (max(can.lists.dwell_min_s, DIP_MIN_S), ONE_TURN_S, can.lists.dwell_step_s))
    return f"its own list, {least:g} to {most:g} ms in steps of {step:g} ms; longer ones are metered as they go"


async def _channels(name: str, board: BoardOwner, cut_times: CutTimes, deadman_alive: bool) -> list[Check]:
    """The capability level of each of a board's channels, and what a cut was measured to take."""
    checks = []
    for channel in board.channels:
        try:
            capabilities = channel.supply.capabilities
        except UsageError:
            continue  # it does not answer: said already
        answer = await asyncio.to_thread(outlet_answer, channel.layers.outlet)
        watchdog = channel.layers.watchdog
        level = capability_level(
            capabilities,
            deadman=deadman_alive,
            outlet=answer.kind,
            watchdog_s=None if watchdog is None else watchdog.delay_s,
            array=channel.array is not None,
        )
        what = f"channel {channel.number}: level"
        if channel.array is not None:
            checks.append(Check(name, f"channel {channel.number}: source", None, _array(capabilities)))
        accepted = level.level <= channel.layers.accept
        refused = () if accepted else (f"refused: this bench accepts {channel.layers.accept} or better",)
        checks.append(Check(name, what, accepted, "; ".join((str(level), *refused))))
        if answer.trouble or answer.on is False:
            said = answer.trouble or f"outlet {channel.layers.outlet} is off: hil board outlet on {name}"
            checks.append(Check(name, f"channel {channel.number}: outlet", False, said))
    return [*checks, Check(name, "time to off", None, cut_times.said(name))]


def _array(can: Capabilities) -> str:
    ocp = "" if ocp_acts(can, array=True) else "; its OCP stays off, the curve's Isc is the limit"
    return (
        "the satellite's array, for a power unit with a battery: flown in real time, off in the dark, in steps of "
        f"{LIGHT_STEP:.0%} of the light{ocp}; not run on hardware"
    )


async def _link(name: str, link: LinkOwner) -> list[Check]:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            facts = await link.preflight()
    except (HilError, TimeoutError) as error:
        return [Check(name, "link box answers", False, str(error) or f"no answer within {TIMEOUT_S:g} s")]
    versions = [f"{key} {facts[key]}" for key in ("kernel", "tc", "netem", "seed") if facts.get(key) is not None]
    found = f"{facts['backend']}; {', '.join(versions)}"
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


def _planes(name: str, wires: BenchBoard, powered: bool) -> list[Check]:
    """The board's network ports: who leads to them, and whether a board that is on answers."""
    checks = []
    if wires.payload is not None and wires.payload.broker is None:
        checks.append(Check(name, "payload", None, "no broker: this host's own routes lead to the board"))
    elif wires.payload is not None and wires.payload.broker is not None:
        broker = wires.payload.broker
        checks.append(Check(name, "payload broker", broker.is_socket(), str(broker)))
    if wires.mgmt is not None and powered:
        first = wires.mgmt.jump[0] if wires.mgmt.jump else wires.mgmt  # behind a jump host only that one is in reach
        checks.append(_mgmt(name, first.address, first.port))
    elif wires.mgmt is not None:
        checks.append(Check(name, "mgmt", None, "not asked: the board is off"))
    for file in {wire.known_hosts for wire in (wires.mgmt, wires.payload) if wire is not None}:
        checks.append(Check(name, "pinned host keys", file.is_file(), str(file)))
    return checks


def _mgmt(name: str, host: str, port: int) -> Check:
    try:
        with socket.create_connection((host, port), timeout=5.0) as sock:
            sock.settimeout(5.0)
            banner = sock.recv(64).decode("ascii", "replace").strip()
    except OSError as error:
        return Check(name, "mgmt", False, f"{host}:{port}: {error}")
    return Check(name, "mgmt", banner.startswith("SSH-"), f"{host}:{port} {banner}")
