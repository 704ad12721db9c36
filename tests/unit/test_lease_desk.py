"""The line for leases: whose turn it is, what waits for what, and boards brought to their state before the next."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hil.bench.lease_desk import AGING_S, LeaseDesk, Request
from hil.bench.leases import Ended, Lease, LeaseStore, Taken, process_started
from hil.bench.shutdown import shut_down
from hil.errors import BenchError, UsageError
from hil.inventory.board_type import Shutdown

BOARDS = ("a", "b", "c")


class Lab:
    """Boards that remember what was done with them, and a clock that tests move."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.slow: dict[str, asyncio.Event] = {}
        self.broken: set[str] = set()
        self.offset_s = 0.0
        self.failed: list[BaseException] = []

    async def end(self, ended: Ended) -> None:
        if ended.board in self.slow:
            await self.slow[ended.board].wait()
        if ended.board in self.broken:
            raise BenchError(f"{ended.board} does not go off")
        self.done.append(f"{ended.board} {ended.cause}")

    async def ready(self, boards: Sequence[str]) -> None:
        self.done.append(f"ready {' '.join(boards)}")

    def energized(self, board: str) -> bool:
        return board in self.broken

    def now_s(self) -> float:
        return asyncio.get_running_loop().time() + self.offset_s

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(self._note)
        return task

    def _note(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed.append(error)


async def here() -> bool:
    return False


def with_desk(
    tmp_path: Path,
    body: Callable[[LeaseDesk, Lab], Awaitable[None]],
    started: Callable[[int], int | None] = {1: 1}.get,
) -> None:
    async def run() -> None:
        lab = Lab()
        desk = LeaseDesk(
            lambda: LeaseStore(tmp_path / "leases.sqlite", BOARDS, boot_id="boot", started=started),
            lab,
            lab.spawn,
            lab.now_s,
        )
        desk.open()
        keeper = asyncio.create_task(desk.keep())
        try:
            await asyncio.wait_for(body(desk, lab), 10)
        finally:
            keeper.cancel()

    asyncio.run(run())


def ask(desk: LeaseDesk, *boards: str, user: str = "me", **more: Any) -> asyncio.Task[tuple[Lease, str]]:
    """A request that waits for a minute."""
    more.setdefault("wait_s", 60.0)
    alternatives = more.pop("any_of", (boards,))
    request = Request(alternatives, holder=f"{user}@host", user=user, **more)
    return asyncio.get_running_loop().create_task(desk.acquire(request, here))


async def soon() -> None:
    """Time for everything that is due now."""
    for _ in range(30):
        await asyncio.sleep(0)


async def served(desk: LeaseDesk, held: tuple[Lease, str], waiting: dict[str, asyncio.Task[tuple[Lease, str]]]) -> str:
    """The order in which those who wait get their boards, each giving them back at once."""
    order = []
    await desk.release(held[0].id, held[1])
    while waiting:
        done, _ = await asyncio.wait(waiting.values(), return_when=asyncio.FIRST_COMPLETED)
        for name in [name for name, task in waiting.items() if task in done]:
            order.append(name)
            lease, token = waiting.pop(name).result()
            await desk.release(lease.id, token)
    return " ".join(order)


def test_priority_first_then_who_was_served_longest_ago_then_who_came_first(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        held = await ask(desk, "a", user="anna")
        waiting = {}
        for name, user, priority in (
            ("anna-1", "anna", 0),
            ("anna-2", "anna", 0),
            ("bert-1", "bert", 0),
            ("bert-2", "bert", 0),
            ("urgent", "anna", 1),
            ("whenever", "carl", -1),
        ):
            waiting[name] = ask(desk, "a", user=user, priority=priority)
            await soon()
        assert await served(desk, held, waiting) == "urgent bert-1 anna-1 bert-2 anna-2 whenever"

    with_desk(tmp_path, body)


def test_what_goes_wrong_with_one_in_line_is_told_to_that_one_alone(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        held = await ask(desk, "a")
        poor, good = ask(desk, "a", pid=2**40), ask(desk, "a")
        await soon()
        await desk.release(held[0].id, held[1])
        with pytest.raises(OverflowError):
            await poor
        assert (await good)[0].boards == ("a",)

    with_desk(tmp_path, body, process_started)


def test_a_holder_that_cannot_be_watched_keeps_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def body(desk: LeaseDesk, lab: Lab) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pidfd_open", refuse)
            held, _ = await ask(desk, "a", pid=1)
            await soon()
        assert desk.leases() == (held,)

    with_desk(tmp_path, body)


def test_long_waiting_counts_as_priority(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        held = await ask(desk, "a", ttl_s=20_000.0)
        old = ask(desk, "a", wait_s=1e4)
        await soon()
        lab.offset_s += 2 * AGING_S + 1
        urgent = ask(desk, "a", priority=1, wait_s=1e4)
        await soon()
        assert await served(desk, held, {"urgent": urgent, "old": old}) == "old urgent"

    with_desk(tmp_path, body)


def test_nobody_overtakes_who_waits_for_several_boards(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        first = await ask(desk, "a")
        pair = ask(desk, "a", "b", user="pair")
        await soon()
        with pytest.raises(BenchError, match="pair@host is ahead in the line for b"):
            await ask(desk, "b", user="late", wait_s=0.0)
        late = ask(desk, "b", user="late")
        await ask(desk, "c", user="other", wait_s=0.0)
        await soon()
        assert not late.done()
        (one, why), (two, why_two) = desk.waiting()
        assert [one.request.user, two.request.user] == ["pair", "late"]
        assert "board a is leased by me@host for another" in why
        assert why_two == "pair@host is ahead in the line for b"
        await desk.release(first[0].id, first[1])
        lease, token = await pair
        assert lease.boards == ("a", "b")
        await desk.release(lease.id, token)
        assert (await late)[0].boards == ("b",)

    with_desk(tmp_path, body)


def test_the_first_set_that_is_free_is_given(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        any_board = {"any_of": (("a",), ("b",))}
        first, token = await ask(desk, **any_board)
        second, _ = await ask(desk, **any_board)
        assert (first.boards, second.boards) == (("a",), ("b",))
        third = ask(desk, **any_board)
        await soon()
        assert not third.done()
        await desk.release(first.id, token)
        assert (await third)[0].boards == ("a",)
        with pytest.raises(Taken, match=r"board a is leased by me@host.*board b is leased by me@host"):
            await ask(desk, **any_board, wait_s=0.0)

    with_desk(tmp_path, body)


def test_who_leaves_the_line_leaves_no_lease_behind(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        held = await ask(desk, "a")
        waiting = ask(desk, "a", "b")
        behind = ask(desk, "b")
        await soon()
        waiting.cancel()
        assert (await behind)[0].boards == ("b",)
        leaving = ask(desk, "a")
        await soon()
        lab.slow["a"] = asyncio.Event()
        release = asyncio.create_task(desk.release(held[0].id, held[1]))
        await soon()
        assert ("a",) in [lease.boards for lease in desk.leases()]  # granted, and not handed over yet
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        lab.slow["a"].set()
        await release
        assert [lease.boards for lease in desk.leases()] == [("b",)]
        assert desk.waiting() == []

    with_desk(tmp_path, body)


def test_what_can_never_be_granted_is_refused_at_once(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        for request, says in (
            ({"any_of": ()}, "at least one board"),
            ({"any_of": (("a",), ("z",))}, "no board z"),
            ({"any_of": (("a",),), "pid": 77}, "does not run"),
            ({"any_of": (("a",),), "preempt": True}, "needs a reason"),
        ):
            with pytest.raises(UsageError, match=says):
                await ask(desk, **request)  # type: ignore[arg-type]
        assert not desk.busy()

    with_desk(tmp_path, body)


def test_preempting_passes_the_line_and_the_loser_reads_why(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        _, token = await ask(desk, "a", user="anna")
        waiting = ask(desk, "a", user="bert")
        await soon()
        lease, _ = await ask(desk, "a", user="carl", preempt=True, reason="release tonight")
        assert lab.done[-2:] == ["a preempted", "ready a"]
        with pytest.raises(BenchError, match="taken over by carl@host: release tonight"):
            desk.check(token, "a")
        assert desk.leases() == (lease,)
        assert not waiting.done()

    with_desk(tmp_path, body)


def test_a_board_is_handed_over_after_its_ending_and_others_do_not_wait_for_it(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        lab.slow["a"] = asyncio.Event()
        held = await ask(desk, "a", "b")
        next_a, next_b = ask(desk, "a", ttl_s=0.3), ask(desk, "b")
        await soon()
        release = asyncio.create_task(desk.release(held[0].id, held[1]))
        assert (await next_b)[0].boards == ("b",)
        await asyncio.sleep(0.5)  # longer than the lease that waits for it lives
        assert not next_a.done()
        assert not release.done()
        lab.slow["a"].set()
        lease, token = await next_a
        await release
        assert desk.check(token, "a") == lease
        assert lab.done == ["ready a b", "b released", "ready b", "a released", "ready a"]

    with_desk(tmp_path, body)


def test_a_daemon_that_ends_grants_nothing_more(tmp_path: Path) -> None:
    """It answers calls for a while yet: a lease that it gave then would be on a daemon that is gone."""

    async def body(desk: LeaseDesk, lab: Lab) -> None:
        held, waiting = await ask(desk, "a"), ask(desk, "a")
        await soon()
        desk.close()
        for asked in (waiting, ask(desk, "b")):
            with pytest.raises(BenchError, match="the bench daemon is ending"):
                await asked
        assert desk.leases() == (held[0],)

    with_desk(tmp_path, body)


def test_a_board_that_does_not_go_off_fails_the_daemon_and_who_waited(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        held = await ask(desk, "a")
        lab.broken.add("a")
        after = ask(desk, "a")
        await soon()
        for task in (asyncio.create_task(desk.release(held[0].id, held[1])), after):
            with pytest.raises(BenchError, match="a does not go off"):
                await task
        assert lab.failed
        assert desk.leases() == ()
        assert desk.busy()  # unsettled: the next daemon finds it

    with_desk(tmp_path, body)


def test_a_flash_section_is_finished_before_the_board_is_cut(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        lease, token = await ask(desk, "a", "b")
        desk.begin_flash("a", token, 30.0)
        taken = ask(desk, "a", preempt=True, reason="mine")
        await asyncio.sleep(0.05)
        assert "b preempted" in lab.done
        assert "a preempted" not in lab.done
        assert desk.check(token, "a").id == lease.id  # its holder finishes what it began
        with pytest.raises(BenchError, match="taken over"):
            desk.check(token, "b")
        with pytest.raises(BenchError, match="under a lease"):
            desk.end_flash("a", None)
        with pytest.raises(BenchError, match="never was one"):
            desk.end_flash("a", "guess")
        desk.end_flash("a", token)
        await taken
        assert "a preempted" in lab.done
        with pytest.raises(BenchError, match="taken over"):
            desk.check(token, "a")

    with_desk(tmp_path, body)


def test_the_grace_of_a_flash_section_is_bounded_and_giving_back_needs_none(tmp_path: Path) -> None:
    async def body(desk: LeaseDesk, lab: Lab) -> None:
        _, token = await ask(desk, "a", ttl_s=0.1)
        desk.begin_flash("a", token, 0.3)
        with pytest.raises(UsageError, match="at most 900 s"):
            desk.begin_flash("a", token, 1e4)
        began = lab.now_s()
        await ask(desk, "a")
        assert 0.35 < lab.now_s() - began < 2.0
        assert lab.done[-2:] == ["a expired", "ready a"]
        with pytest.raises(BenchError, match="ran out"):
            desk.check(token, "a")
        lease, token = await ask(desk, "b")
        desk.begin_flash("b", token, 30.0)
        await desk.release(lease.id, token)
        assert desk.flashing("b") is None

    with_desk(tmp_path, body)


class Ring:
    """A console ring with what the board has said so far."""

    def __init__(self) -> None:
        self.data = b"login: "

    @property
    def end(self) -> int:
        return len(self.data)

    def since(self, offset: int) -> tuple[int, bytes]:
        return offset, self.data[offset:]


class Terminal:
    def __init__(self, answer: bytes) -> None:
        self.ring, self.answer, self.written = Ring(), answer, b""

    async def write(self, data: bytes) -> None:
        self.written += data
        self.ring.data += data + self.answer


@pytest.mark.parametrize(
    ("answer", "power_w", "says"),
    [
        (b"\r\nreboot: Power down\r\n", 5.0, r"shut down over its console .*it said 'reboot: Power down'"),
        (b"\r\n", 0.2, r"shut down over its console .*it draws 0.20 W"),
        (b"\r\n", 5.0, r"was not down after 0.3 s"),
    ],
)
def test_a_board_is_shut_down_over_its_console(answer: bytes, power_w: float, says: str) -> None:
    console = Terminal(answer)
    board = SimpleNamespace(
        console=console,
        wires=SimpleNamespace(mgmt=None),
        type=SimpleNamespace(shutdown=Shutdown(down_w=0.5)),
        last=SimpleNamespace(power_w=power_w),
    )
    how = asyncio.run(shut_down(board, 0.3))  # type: ignore[arg-type]
    assert re.search(says, how), how
    assert console.written == b"\x03\rpoweroff\r"


def test_a_board_without_a_way_in_is_only_switched_off() -> None:
    board = SimpleNamespace(console=None, wires=SimpleNamespace(mgmt=None), type=SimpleNamespace(shutdown=Shutdown()))
    assert "no way to shut it down" in asyncio.run(shut_down(board, 0.3))  # type: ignore[arg-type]
