"""What the API does: to boards, leases and the flight. Plain values for JSON, HilError for what is refused.

Everything that changes a board asks for the lease's token first.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hil
from hil.bench.account import public
from hil.bench.board import BoardOwner
from hil.bench.boards import Boards
from hil.bench.consoles import Console
from hil.bench.cutpoint import ArmedCut, CutPoint
from hil.bench.doctor import examine
from hil.bench.fixtures import Fixtures
from hil.bench.flight import FlightControl
from hil.bench.heart import Heart
from hil.bench.lease_desk import LeaseDesk, Request
from hil.bench.leases import OVER_TLS
from hil.bench.powerfaults import LatchUpLimits
from hil.errors import BenchError, UsageError
from hil.inventory import Bench
from hil.model import Direction, LinkState

if TYPE_CHECKING:
    from hil.bench.api import ClockBody, FlightBody, LatchUpBody, LeaseBody


class Operations:
    """The API's calls. `ending` is set when the daemon is on its way down; `busy` keeps it from ending by itself."""

    def __init__(
        self,
        bench: Bench,
        fixtures: Fixtures,
        boards: Boards,
        desk: LeaseDesk,
        heart: Heart,
        ending: asyncio.Event,
        busy: Callable[[], None],
    ) -> None:
        self._bench = bench
        self._fixtures = fixtures
        self._boards = boards
        self._desk = desk
        self._heart = heart
        self._ending = ending
        self._busy = busy
        self._flight_lock = asyncio.Lock()

    def request_stop(self, force: bool) -> None:
        """Stop soon. Refused while boards are leased, unless `force`."""
        held = self._desk.leases()
        if held and not force:
            raise BenchError(
                "; ".join(f"{', '.join(item.boards)} leased by {item.holder}" for item in held),
                hint="release the leases, or stop with --force: the boards are switched off",
            )
        asyncio.get_running_loop().call_later(0.05, self._ending.set)  # after this answer has left

    def held(self, token: str | None, name: str) -> BoardOwner:
        """The board, when `token` holds it now."""
        board = self._boards.named(name)
        self._desk.check(token, name)
        return board

    def _may_drive(self, token: str | None, name: str) -> BoardOwner:
        """As `held`, for what would switch something on: not any more once the daemon is on its way down."""
        if self._ending.is_set():
            raise BenchError("the bench daemon is ending", hint="the next command starts it again")
        return self.held(token, name)

    def check(self, name: str, power_epoch: int | None, token: str | None) -> dict[str, Any]:
        """Whether a client may go on with the board: it has the lease and knows of every power cut."""
        board = self.held(token, name)
        board.check_epoch(power_epoch)
        return {"power_epoch": board.power_epoch}

    # ------------------------------------------------------------------------------------------------------------ power
    async def switch_power(self, name: str, action: str, voltage_v: float | None, token: str | None) -> dict[str, Any]:
        board = self.held(token, name)
        if action == "off":
            return await board.off("requested")
        await self._heart.ensure()
        return await board.on(voltage_v, lambda: self._may_drive(token, name), cycle=action == "cycle")

    async def read_power(self, name: str) -> dict[str, Any]:
        return await self._boards.named(name).read()

    async def brown_out(self, name: str, depth_v: float, duration_s: float, token: str | None) -> dict[str, Any]:
        return await self.held(token, name).brown_out(depth_v, duration_s, lambda: self._may_drive(token, name))

    async def latch_up(self, name: str, body: LatchUpBody, token: str | None) -> dict[str, Any]:
        limits = LatchUpLimits(body.threshold_a, body.hold_s, body.added_a)
        board = self.held(token, name)
        await self._heart.ensure()
        return await board.latch_up(
            limits, body.off_s, body.wait_s, lambda: self._may_drive(token, name), of_input=body.input
        )

    async def arm_cut(self, name: str, point: CutPoint, token: str | None) -> dict[str, Any]:
        cut = self.held(token, name).arm_cut(point, lambda: self.held(token, name))
        return asdict(cut.report)

    async def read_cut(self, name: str, wait_s: float) -> dict[str, Any]:
        return await self._cut(name).wait(wait_s)

    async def disarm_cut(self, name: str, token: str | None) -> dict[str, Any]:
        self.held(token, name)
        return await self._cut(name).disarm()

    def _cut(self, name: str) -> ArmedCut:
        cut = self._boards.named(name).cut
        if cut is None:
            raise UsageError(f"board {name} has no cut point armed")
        return cut

    # ------------------------------------------------------------------------------------- lines, outlet, link, console
    def read_lines(self, name: str) -> dict[str, Any]:
        return self._boards.named(name).controls.state()

    async def drive_line(self, name: str, line: str, action: str, hold_s: float, token: str | None) -> dict[str, Any]:
        controls = self._may_drive(token, name).controls
        if action == "press":
            await controls.press(line, hold_s)
        else:
            await controls.set(line, action == "hold")
        return controls.state()

    async def outlet(self, name: str, on: bool | None, token: str | None) -> dict[str, Any]:
        board = self._boards.named(name) if on is None else self._may_drive(token, name)
        return await board.outlet(on)

    def read_link(self, name: str) -> dict[str, Any]:
        return self._boards.named(name).link_state()

    async def set_link(self, name: str, states: dict[Direction, LinkState] | None, token: str | None) -> dict[str, Any]:
        board = self.held(token, name)
        board.need_link()
        flight = self._boards.flight
        if flight is not None and flight.state != "ended" and flight.board.link is board.link:
            raise BenchError(
                f"the link of board {name} belongs to the flight of board {flight.board.name}",
                hint="end the flight first",
            )
        return await board.set_link(states)

    async def read_console(self, name: str, since: int, wait_s: float) -> tuple[int, bytes]:
        console = self.console(self._boards.named(name))
        await console.wait_beyond(since, wait_s)
        return console.ring.since(since)

    def console(self, board: BoardOwner) -> Console:
        """Its console, or UsageError."""
        if board.console is None:
            raise UsageError(f"board {board.name} has no console", hint="add `console:` to the bench file")
        return board.console

    # ----------------------------------------------------------------------------------------------------------- leases
    async def acquire(
        self, body: LeaseBody, user: str | None, disconnected: Callable[[], Awaitable[bool]]
    ) -> dict[str, Any]:
        """Grant, or wait in line for at most `wait_s`. `user`: who it is on another host; None on this one."""
        self._busy()
        began_s = time.monotonic()
        request = Request(
            alternatives=tuple(tuple(dict.fromkeys(boards)) for boards in (body.any_of or [body.boards])),
            holder=body.holder if user is None else f"{user}: {body.holder}",
            user=body.user.removesuffix(OVER_TLS) if user is None else f"{user}{OVER_TLS}",
            pid=body.pid if user is None else None,  # a process of another host cannot be watched: only its TTL ends it
            ttl_s=body.ttl_s,
            wait_s=body.wait_s,
            priority=body.priority,
            preempt=body.preempt,
            reason=body.reason,
        )
        lease, token = await self._desk.acquire(request, disconnected)
        if time.monotonic() - began_s > 1.0 and await disconnected():
            await self._desk.release(lease.id, token)
            raise BenchError("the client that waited for the lease is gone")
        return {"lease": lease.id, "token": token, **public(lease)}

    async def renew(self, lease_id: str, token: str | None) -> dict[str, Any]:
        return public(self._desk.renew(lease_id, token))

    async def release(self, lease_id: str, token: str | None) -> dict[str, Any]:
        """End a lease; returns when its boards are in their `on_lease_end` state."""
        await self._desk.release(lease_id, token)
        return {"released": lease_id}

    def flash(self, name: str, grace_s: float | None, token: str | None) -> dict[str, Any]:
        """Begin a flash section, or end it with `grace_s` None."""
        self._boards.named(name)
        if grace_s is None:
            self._desk.end_flash(name, token)
        else:
            self._desk.begin_flash(name, token, grace_s)
        return {"flashing": self._desk.flashing(name) is not None}

    # ------------------------------------------------------------------------------------------------------- the flight
    async def start_flight(self, body: FlightBody, token: str | None) -> dict[str, Any]:
        board = self._may_drive(token, body.board)
        async with self._flight_lock:
            if self._boards.flight is not None and self._boards.flight.state != "ended":
                raise BenchError(
                    f"a flight of board {self._boards.flight.board.name} is running",
                    hint="one flight a bench at a time: wait for it, or end it",
                )
            await self._heart.ensure()
            self._boards.flight = None
            self._boards.flight = await FlightControl.begin(
                board,
                Path(body.mission_path),
                Path(body.run_dir),
                body.start_s,
                await self._meta(board),
                lambda: self._may_drive(token, body.board),
            )
            try:
                self._may_drive(token, body.board)
            except BenchError:
                # Whoever ended the lease meanwhile found no flight to end.
                await self._boards.flight.end("the lease ended while it began")
                raise
        return self._boards.flight.describe()

    async def _meta(self, board: BoardOwner) -> dict[str, str]:
        facts = {"bench": self._bench.name, "hil_version": hil.__version__}
        supplies, levels = [], []
        for channel in board.channels:
            await channel.supply.open()
            told = f"{channel.input}: " if len(board.channels) > 1 else ""
            supplies.append(f"{told}{channel.supply.identity}")
            can, array = channel.supply.capabilities, channel.array is not None
            levels.append(f"{told}{await channel.layers.level(can, array=array)}")
        facts |= {"supply": " | ".join(supplies), "capability_level": " | ".join(levels)}
        facts["time_to_off"] = self._fixtures.cut_times.said(board.name)
        if board.link is not None:
            facts["link_box"] = json.dumps(await board.link.preflight())
        return facts

    def flight_state(self) -> dict[str, Any] | None:
        return None if self._boards.flight is None else self._boards.flight.describe()

    async def change_clock(self, body: ClockBody, token: str | None) -> dict[str, Any]:
        flight = self._need_flight(token)
        if (body.rate is None) == (body.skip_to is None):
            raise UsageError("a change of the clock is either `rate` or `skip_to`")
        if body.rate is not None:
            return await flight.set_rate(body.rate, body.cause)
        return await flight.skip_to(float(body.skip_to or 0.0), body.assumed_board_w, body.cause)

    def record(self, table: str, rows: Sequence[dict[str, Any]], token: str | None) -> dict[str, Any]:
        return {"recorded": self._need_flight(token).record(table, rows)}

    def event(self, kind: str, fields: dict[str, Any], token: str | None) -> dict[str, Any]:
        self._need_flight(token).event(kind, fields)
        return {}

    async def end_flight(self, token: str | None) -> dict[str, Any]:
        if self._boards.flight is not None and self._boards.flight.state == "ended":
            return {"state": "ended", "invalid": list(self._boards.flight.invalid)}
        return await self._need_flight(token).end("requested")

    def _need_flight(self, token: str | None) -> FlightControl:
        if self._boards.flight is None:
            raise BenchError("no flight is running", hint="hil mission fly")
        self.held(token, self._boards.flight.board.name)
        return self._boards.flight

    # -------------------------------------------------------------------------------------------------------- the bench
    async def doctor(self) -> dict[str, Any]:
        """Every fixture asked, nothing switched."""
        await self._heart.ensure()
        checks = await examine(
            self._boards.owners,
            {name: wire.dialect for name, wire in self._bench.file.supplies.items()},
            self._fixtures.supplies,
            self._fixtures.links,
            self._fixtures.cut_times,
            deadman_alive=self._heart.alive,
            state_dir=self._bench.state_dir,
        )
        return {"checks": [asdict(check) for check in checks]}
