"""All boards of the bench and the flight of one of them: what they tell, and what the end of a lease does to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from hil.bench.board import BoardOwner
from hil.bench.fixtures import Fixtures
from hil.bench.flight import FlightControl
from hil.bench.heart import Heart
from hil.bench.leased_streams import LeasedStreams
from hil.bench.leases import Ended, Lease
from hil.bench.powervalues import PowerSample
from hil.bench.shutdown import shut_down
from hil.errors import BenchError, HilError, SafetyError, UsageError
from hil.inventory import Bench
from hil.inventory.bench import ShutdownThenOff

log = logging.getLogger("hil.daemon")

OFF_S = 15.0


class Boards:
    """The owners by name, none before `make`, and the newest flight. What the lease desk needs done is done here."""

    def __init__(
        self, bench: Bench, fixtures: Fixtures, streams: LeasedStreams, leases: Callable[[], tuple[Lease, ...]]
    ) -> None:
        self._bench = bench
        self._fixtures = fixtures
        self._streams = streams
        self._leases = leases
        self.owners: dict[str, BoardOwner] = {}
        self.flight: FlightControl | None = None

    def make(self, heart: Heart) -> None:
        """Make the owner of every board in the bench file."""
        for name in self._bench.file.boards:
            self.owners[name] = self._fixtures.board(
                name,
                heart,
                on_event=self._event,
                on_sample=self._sample,
                on_failure=self._failure,
                on_cut=lambda board: self._streams.end(board.name, "watch"),
                on_console_error=lambda error, name=name: self._console_failed(name, error),  # type: ignore[misc]
            )

    def named(self, name: str) -> BoardOwner:
        """The board, or UsageError that says which there are."""
        if name not in self.owners:
            raise UsageError(
                f"bench {self._bench.name} has no board {name!r}", hint=f"its boards: {', '.join(self.owners)}"
            )
        return self.owners[name]

    def flight_of(self, board: BoardOwner) -> FlightControl | None:
        """The flight of this board, while it lasts."""
        flight = self.flight
        return flight if flight is not None and flight.board is board and flight.state != "ended" else None

    @property
    def flying(self) -> bool:
        """Whether a flight goes on."""
        return self.flight is not None and self.flight.state != "ended"

    def energized(self, board: str) -> bool:
        """Whether an output of the board is or may be on."""
        return board in self.owners and self.owners[board].energized

    async def until_all_off(self) -> None:
        """Return when every output is verified off: the power loops see to it at their next tick."""
        try:
            async with asyncio.timeout(OFF_S):
                await asyncio.gather(*(board.until_off() for board in self.owners.values()))
        except TimeoutError:
            raise SafetyError(
                f"the dead-man died and outputs are not verified off within {OFF_S:g} s",
                hint="the bench daemon ends, and a new dead-man goes on trying",
            ) from None

    async def end(self, ended: Ended) -> None:
        """Bring a board whose lease ended to its `on_lease_end` state."""
        board = self.owners.get(ended.board)
        if board is None:
            return  # the bench file no longer names it
        self._streams.end(board.name)
        await board.calm()
        policy = board.wires.on_lease_end
        if isinstance(policy, ShutdownThenOff) and board.state == "on":
            how = await shut_down(board, policy.shutdown_then_off.timeout_s)
            log.info("board %s: %s", board.name, how)
            self._event(board, "shutdown", {"how": how})
        flight = self.flight_of(board)
        if flight is not None:
            flight.invalidate(f"the lease ended: {ended.cause}")
            await flight.end(f"lease {ended.cause}")
        shared = self._link_in_use(board)
        if policy == "hold" and board.state == "on":
            if not shared:
                await board.hold()
            return
        if board.energized or board.state != "off":
            await board.off(f"lease {ended.cause}")
        await board.rest()
        if board.link is not None and not shared:
            await board.link.clear()

    async def ready(self, names: Sequence[str]) -> None:
        """Prepare boards for a new holder."""
        for name in names:
            board = self.owners[name]
            if not board.energized:
                board.fault = ""  # its former holder's
            # Held in outage, or left behind because the link box did not answer at the end of that lease.
            if board.link is not None and board.link.touched and not self._link_in_use(board):
                await board.set_link(None)

    def _link_in_use(self, board: BoardOwner) -> bool:
        """Whether another leased board is reached through the same link box: then the link is not ours to change."""
        leased = {name for lease in self._leases() for name in lease.boards}
        return board.link is not None and any(
            other.link is board.link for name, other in self.owners.items() if name in leased and other is not board
        )

    def _event(self, board: BoardOwner, kind: str, data: dict[str, Any]) -> None:
        flight = self.flight_of(board)
        if flight is not None:
            flight.told(kind, data)

    def _sample(self, board: BoardOwner, sample: PowerSample) -> None:
        flight = self.flight_of(board)
        board.count_energy(sample, "none" if flight is None else flight.phase)
        if flight is not None:
            flight.sampled(sample)

    def _failure(self, board: BoardOwner, error: BaseException) -> None:
        flight = self.flight_of(board)
        if flight is not None:
            flight.fail(error if isinstance(error, HilError) else BenchError(f"the power loop ended: {error!r}"))

    def _console_failed(self, name: str, error: BenchError) -> None:
        log.error("%s", error)
        flight = self.flight_of(self.owners[name])
        if flight is not None:
            flight.fail(error)
