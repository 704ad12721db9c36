"""Where leases are asked for and given back: the line of those who wait, holders that die, boards after their lease.

The store says who holds what; this decides whose turn it is, and brings every board whose lease ended to its
`on_lease_end` state before the next holder gets its token.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hil.bench.leases import Ended, Lease, LeaseStore, Taken, describe, watch_process
from hil.errors import BenchError, HilError, UsageError

log = logging.getLogger("hil.leases")

TICK_S = 0.5
DISCONNECT_TICK_S = 0.5
# Who has waited this long counts as one priority higher: nobody waits for ever.
AGING_S = 600.0
FLASH_GRACE_MAX_S = 900.0
CHECKPOINT_S = 30.0


class Boards(Protocol):
    """What the desk needs done with boards."""

    async def end(self, ended: Ended) -> None:
        """Bring the board to its `on_lease_end` state. HilError: it could not be done."""

    async def ready(self, boards: Sequence[str]) -> None:
        """Prepare boards for a new holder."""

    def energized(self, board: str) -> bool:
        """Whether an output of the board is or may be on."""


@dataclass(frozen=True, slots=True)
class Request:
    """One wish for a lease: the first of `alternatives` that is free, all its boards at once.

    `user` is who is served in turn, `holder` what people read. Higher `priority` goes first.
    """

    alternatives: tuple[tuple[str, ...], ...]
    holder: str
    user: str = ""
    pid: int | None = None
    ttl_s: float = 30.0
    wait_s: float = 0.0
    priority: int = 0
    preempt: bool = False
    reason: str = ""


@dataclass(eq=False, slots=True)
class Waiter:
    """A request in line."""

    request: Request
    wanted: tuple[frozenset[str], ...]
    arrival: int
    since_s: float
    granted: asyncio.Future[tuple[Lease, str]]

    @property
    def boards(self) -> frozenset[str]:
        """Every board that it may come to hold."""
        return frozenset[str]().union(*self.wanted)


@dataclass(eq=False, slots=True)
class FlashSection:
    """A holder writes firmware: its board is not cut before the section ends, or `grace_s` after the lease did."""

    lease: Lease
    token: str
    grace_s: float
    over: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseDesk:
    """Grants, renews and ends leases. On the daemon's loop.

    `spawn` starts a task whose failure ends the daemon. `now_s` is the store's clock.
    """

    def __init__(
        self,
        open_store: Callable[[], LeaseStore],
        boards: Boards,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        now_s: Callable[[], float],
    ) -> None:
        self._open_store = open_store
        self._boards = boards
        self._spawn = spawn
        self._now_s = now_s
        self._store: LeaseStore
        self._waiting: list[Waiter] = []
        self._arrivals = itertools.count()
        self._served_s: dict[str, float] = {}
        self._event = asyncio.Event()
        self._watched: dict[str, int] = {}
        self._endings: dict[str, asyncio.Task[None]] = {}
        self._flash: dict[str, FlashSection] = {}
        self._closed = False

    def open(self) -> None:
        """Open the store; nothing is acted on before `keep`."""
        self._store = self._open_store()
        self._store.expire(self._now_s())
        self._watch_holders()

    async def keep(self) -> None:
        """Notice leases that run out or whose holder dies, and act on every end. Runs until cancelled."""
        checkpoint_s = self._now_s() + CHECKPOINT_S
        while True:
            self._store.expire(self._now_s())
            self._watch_holders()
            self._begin_endings()
            self._serve()
            self._event.clear()
            if self._now_s() > checkpoint_s:
                await asyncio.to_thread(self._store.checkpoint)
                checkpoint_s = self._now_s() + CHECKPOINT_S
            expiry_s = self._store.next_expiry_s()
            # A death is an event of its own pidfd; only the TTL needs a clock.
            patience = TICK_S if expiry_s is None else min(TICK_S, max(0.01, expiry_s - self._now_s()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._event.wait()

    def close(self) -> None:
        """Tell those in line, and who asks from now on, that the daemon ends. Leases stay: the next one knows them."""
        self._closed = True
        for waiter in self._waiting:
            if not waiter.granted.done():
                waiter.granted.set_exception(_ends())

    # ---------------------------------------------------------------------------------------------- who has what
    def leases(self) -> tuple[Lease, ...]:
        """Every lease that has not ended."""
        return self._store.leases()

    def busy(self) -> bool:
        """Whether anybody holds or waits for a board, or a board is still on its way to its `on_lease_end` state."""
        return bool(self._waiting or self._endings or self.leases() or self._store.unsettled())

    def check(self, token: str | None, board: str) -> Lease:
        """The lease that lets `token` drive `board` now; BenchError otherwise.

        In a flash section the token of a lease that ended is good for that board until the section or its grace ends.
        """
        try:
            return self._store.check(token, board, self._now_s())
        except BenchError:
            section = self._flash.get(board)
            if section is not None and token and hmac.compare_digest(section.token.encode(), token.encode()):
                return section.lease
            raise

    def waiting(self) -> list[tuple[Waiter, str]]:
        """Those in line, in the order in which they are served, and why each waits."""
        return [(waiter, self._why(waiter)) for waiter in self._order()]

    def flashing(self, board: str) -> FlashSection | None:
        return self._flash.get(board)

    # --------------------------------------------------------------------------------------------- asking for it
    async def acquire(self, request: Request, disconnected: Callable[[], Awaitable[bool]]) -> tuple[Lease, str]:
        """Grant, or wait in line for at most `wait_s`; returns the lease and its token.

        Raises UsageError for what can never be granted, BenchError that says why it did not come in time.
        """
        if self._closed:  # calls are answered almost to the end: nobody may take this for a lease that lasts
            raise _ends()
        waiter = self._in_line(request)
        deadline_s = waiter.since_s + request.wait_s
        self._waiting.append(waiter)
        try:
            self._serve()
            while not waiter.granted.done():
                left_s = deadline_s - self._now_s()
                if left_s <= 0:
                    raise Taken(self._why(waiter), hint=f"{_wait(request)}, or take over with --preempt --reason TEXT")
                await asyncio.wait({waiter.granted}, timeout=min(DISCONNECT_TICK_S, left_s))
                if not waiter.granted.done() and await disconnected():
                    raise BenchError("the client that waited for the lease is gone")
        except BaseException:
            if not waiter.granted.cancel() and waiter.granted.exception() is None:
                self._give_back(*waiter.granted.result())  # granted as it left
            self._event.set()  # its boards are for those behind it
            raise
        finally:
            self._waiting.remove(waiter)
        lease, token = waiter.granted.result()
        return await self._hand_over(lease, token), token

    def _in_line(self, request: Request) -> Waiter:
        if not request.alternatives:
            raise UsageError("a lease needs at least one board")
        for boards in request.alternatives:
            self._store.check_request(boards, request.ttl_s, request.preempt, request.reason)
        wanted = tuple(frozenset(self._store.together(boards)) for boards in request.alternatives)
        granted: asyncio.Future[tuple[Lease, str]] = asyncio.get_running_loop().create_future()
        return Waiter(request, wanted, next(self._arrivals), self._now_s(), granted)

    def _order(self) -> list[Waiter]:
        """Who is served first: by priority, then the user who was served longest ago, then who came first."""
        now_s = self._now_s()

        def key(waiter: Waiter) -> tuple[float, float, int]:
            aged = waiter.request.priority + (now_s - waiter.since_s) // AGING_S
            preempts = 1e9 if waiter.request.preempt else 0.0
            return (-(aged + preempts), self._served_s.get(waiter.request.user, 0.0), waiter.arrival)

        return sorted(self._waiting, key=key)

    def _serve(self) -> None:
        """Grant what can be granted. Nobody overtakes one who waits for the same board: boards wait for who is ahead
        too, or several at once would never come free together.
        """
        kept: set[str] = set()
        for waiter in self._order():
            if not waiter.granted.done() and not self._grant(waiter, kept):
                kept |= waiter.boards

    def _grant(self, waiter: Waiter, kept: set[str]) -> bool:
        request, now_s = waiter.request, self._now_s()
        for boards, wanted in zip(request.alternatives, waiter.wanted, strict=True):
            if not request.preempt and (wanted & kept or self._holders(wanted)):
                continue
            try:
                lease, token = self._store.acquire(
                    boards,
                    holder=request.holder,
                    user=request.user,
                    pid=request.pid,
                    ttl_s=request.ttl_s,
                    now_s=now_s,
                    reason=request.reason,
                    preempt=request.preempt,
                )
            except Exception as error:  # whatever it is: it is this one's, and must not end the desk
                waiter.granted.set_exception(error)
                return True
            self._served_s[request.user] = now_s
            log.info("lease %s of %s for %s %s", lease.id, ", ".join(lease.boards), lease.holder, lease.reason)
            self._watch_holders()
            waiter.granted.set_result((lease, token))
            return True
        return False

    def _holders(self, boards: frozenset[str]) -> list[Lease]:
        now_s = self._now_s()
        return [lease for lease in self.leases() if lease.expires_s > now_s and boards & set(lease.boards)]

    def _why(self, waiter: Waiter) -> str:
        """Why it has not been served: who holds what it wants, or who is ahead of it."""
        now_s = self._now_s()
        boards = waiter.boards
        said = sorted(text for lease in self._holders(boards) for text in describe(lease, boards, now_s))
        for other in itertools.takewhile(lambda other: other is not waiter, self._order()):
            shared = sorted(boards & other.boards)
            if shared and not other.granted.done():
                said.append(f"{other.request.holder} is ahead in the line for {', '.join(shared)}")
        said += [f"board {board} goes to its on_lease_end state" for board in sorted(boards & self._endings.keys())]
        if not said:
            return f"{', '.join(sorted(boards))}: not served yet"
        return "; ".join(said) + (self._store.why(waiter.request.alternatives[0]) if len(waiter.wanted) == 1 else "")

    async def _hand_over(self, lease: Lease, token: str) -> Lease:
        """The lease with its boards as their former lease leaves them, and all of its time ahead."""
        try:
            while not await self._ended(lease.boards, lease.ttl_s / 3):
                lease = self.renew(lease.id, token)  # a shutdown may take longer than it lives
            await self._boards.ready(lease.boards)
        except BaseException:
            # The client gets the error and no token: nobody could give this lease back.
            self._give_back(lease, token)
            raise
        return lease

    def _give_back(self, lease: Lease, token: str) -> None:
        with contextlib.suppress(BenchError):
            self._store.release(lease.id, token, self._now_s())
        self._event.set()

    # ------------------------------------------------------------------------------------------- holding, ending
    def renew(self, lease_id: str, token: str | None) -> Lease:
        """All of its time to live from now. Raises BenchError when it is over."""
        return self._store.renew(lease_id, token or "", self._now_s())

    async def release(self, lease_id: str, token: str | None) -> None:
        """End a lease; returns when its boards are in their `on_lease_end` state."""
        boards = next((lease.boards for lease in self.leases() if lease.id == lease_id), ())
        self._store.release(lease_id, token or "", self._now_s())
        for board in boards:
            self._end_section(board)  # whoever gives a board back has done with it
        self._watch_holders()
        self._begin_endings()
        self._serve()
        await self._ended(boards, None)

    def begin_flash(self, board: str, token: str | None, grace_s: float) -> None:
        """Until `end_flash` the end of the lease does not cut this board's power, for at most `grace_s` seconds."""
        lease = self.check(token, board)
        if not 0 < grace_s <= FLASH_GRACE_MAX_S:
            raise UsageError(f"the grace of a flash section is at most {FLASH_GRACE_MAX_S:g} s, not {grace_s:g} s")
        self._end_section(board)
        self._flash[board] = FlashSection(lease, token or "", grace_s)
        log.info("board %s: flash section of lease %s begins, grace %g s", board, lease.id, grace_s)

    def end_flash(self, board: str, token: str | None) -> None:
        """The board may be cut again."""
        self.check(token, board)
        self._end_section(board)

    def _end_section(self, board: str) -> None:
        section = self._flash.pop(board, None)
        if section is not None:
            log.info("board %s: flash section of lease %s ends", board, section.lease.id)
            section.over.set()

    def _begin_endings(self) -> None:
        for board in {ended.board for ended in self._store.unsettled()} - self._endings.keys():
            task = self._spawn(self._end_board(board), f"end-lease-{board}")
            self._endings[board] = task
            task.add_done_callback(lambda task, board=board: self._ending_done(board, task))  # type: ignore[misc]

    def _ending_done(self, board: str, task: asyncio.Task[None]) -> None:
        del self._endings[board]
        if not task.cancelled() and task.exception() is None:
            self._begin_endings()  # another lease of it may have ended meanwhile

    async def _end_board(self, board: str) -> None:
        """Bring a board whose leases ended to its `on_lease_end` state."""
        for ended in [item for item in self._store.unsettled() if item.board == board]:
            await self._grace(ended)
            log.info("board %s: lease %s %s", ended.board, ended.lease, ended.cause)
            try:
                await self._boards.end(ended)
            except HilError as error:
                log.error("board %s after lease %s: %s", ended.board, ended.lease, error)
                if self._boards.energized(board):
                    raise  # it stays unsettled: the daemon ends, in the safe state
                # Off, but its link may not be clear: whoever takes the board next clears it, or is told.
            self._store.settled(ended)

    async def _grace(self, ended: Ended) -> None:
        section = self._flash.get(ended.board)
        if section is None or section.lease.id != ended.lease:
            return
        log.warning("board %s: lease %s %s in a flash section", ended.board, ended.lease, ended.cause)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(section.grace_s):
                await section.over.wait()
        self._end_section(ended.board)

    async def _ended(self, boards: Iterable[str], timeout_s: float | None) -> bool:
        """Wait until these boards are as their former leases leave them; False after `timeout_s`."""
        names = frozenset(boards)
        self._begin_endings()
        while running := {self._endings[board] for board in names & self._endings.keys()}:
            done, late = await asyncio.wait(running, timeout=timeout_s)
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error if isinstance(error, HilError) else BenchError(f"{task.get_name()} failed: {error!r}")
            if late:
                return False
            await asyncio.sleep(0)  # their callbacks have run
            self._begin_endings()
        return True

    # -------------------------------------------------------------------------------------------------- holders
    def _watch_holders(self) -> None:
        """A pidfd for each lease's holder, for as long as the lease lives."""
        loop = asyncio.get_running_loop()
        living = {lease.id: lease for lease in self.leases()}
        for lease_id in [item for item in self._watched if item not in living]:
            handle = self._watched.pop(lease_id)
            loop.remove_reader(handle)
            os.close(handle)
        for lease in living.values():
            if lease.pid is None or lease.id in self._watched:
                continue
            try:
                watch = watch_process(lease.pid, lease.pid_start)
            except OSError:
                continue  # at the next tick; until then each tick looks at it
            if watch is None:
                self._event.set()
                continue
            self._watched[lease.id] = watch
            loop.add_reader(watch, self._holder_ended, lease.id, watch)

    def _holder_ended(self, lease_id: str, handle: int) -> None:
        asyncio.get_running_loop().remove_reader(handle)
        log.info("the holder of lease %s has ended", lease_id)
        self._event.set()


def _ends() -> BenchError:
    return BenchError("the bench daemon is ending", hint="ask again: it is started anew")


def _wait(request: Request) -> str:
    return "wait longer" if request.wait_s else "wait for it (wait_s, --wait-s)"
