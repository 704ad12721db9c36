"""Leases: all or none, expiry, fencing, holders that die, restarts, and no double grant whatever happens."""

from __future__ import annotations

import errno
import os
import select
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hil.bench.leases import OVER_KEPT, LeaseStore, process_started, watch_process
from hil.errors import BenchError, UsageError

BOARDS = ("a", "b", "c")


def store(path: Path, boot: str = "boot-1", alive: dict[int, int] | None = None) -> LeaseStore:
    known = {1: 100} if alive is None else alive
    return LeaseStore(path / "leases.sqlite", BOARDS, boot_id=boot, started=known.get)


def take(leases: LeaseStore, *boards: str, now: float = 0.0, ttl: float = 30.0, **more: Any) -> tuple[Any, str]:
    return leases.acquire(boards, holder="me", pid=more.pop("pid", None), ttl_s=ttl, now_s=now, **more)


def test_several_boards_at_once_or_none(tmp_path: Path) -> None:
    leases = store(tmp_path)
    take(leases, "b")
    with pytest.raises(BenchError, match="board b is leased by me"):
        take(leases, "a", "b")
    lease, token = take(leases, "a", "c")
    assert lease.boards == ("a", "c")
    assert leases.check(token, "c", 1.0).id == lease.id


def test_the_ttl_ends_a_lease_and_renewal_extends_it(tmp_path: Path) -> None:
    leases = store(tmp_path)
    lease, token = take(leases, "a", now=0, ttl=10)
    leases.renew(lease.id, token, 9.0)
    assert leases.check(token, "a", 18.9)
    with pytest.raises(BenchError, match="ran out"):
        leases.check(token, "a", 19.0)
    leases.expire(19.0)
    assert [(ended.board, ended.cause) for ended in leases.unsettled()] == [("a", "expired")]
    with pytest.raises(BenchError, match="ran out"):
        leases.renew(lease.id, token, 19.5)


def test_preempting_needs_a_reason_and_fences_the_loser(tmp_path: Path) -> None:
    leases = store(tmp_path)
    first, old = take(leases, "a", "b")
    with pytest.raises(UsageError, match="reason"):
        take(leases, "a", preempt=True)
    second, new = take(leases, "a", preempt=True, reason="release tonight")
    assert second.fence > first.fence
    with pytest.raises(BenchError, match=rf"{first.id} was taken over by me: release tonight"):
        leases.check(old, "b", 1.0)
    assert leases.check(new, "a", 1.0)
    assert {(ended.board, ended.cause) for ended in leases.unsettled()} == {("a", "preempted"), ("b", "preempted")}


@pytest.mark.parametrize(
    ("boards", "message"), [(["z"], "no board z"), ([], "at least one")], ids=["unknown board", "no board"]
)
def test_wrong_requests_say_so(tmp_path: Path, boards: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        take(store(tmp_path), *boards)


def test_a_token_is_needed_and_only_for_its_own_board(tmp_path: Path) -> None:
    leases = store(tmp_path)
    _, token = take(leases, "a")
    with pytest.raises(BenchError, match="under a lease"):
        leases.check(None, "a", 0)
    with pytest.raises(BenchError, match="not for board b"):
        leases.check(token, "b", 0)
    with pytest.raises(BenchError, match="over"):
        leases.check("guess", "a", 0)


def test_leases_and_fence_survive_a_restart_of_the_daemon(tmp_path: Path) -> None:
    leases = store(tmp_path)
    lease, token = take(leases, "a")
    leases.close()
    again = store(tmp_path)
    assert again.check(token, "a", 5.0) == lease
    with pytest.raises(BenchError, match="leased"):
        take(again, "a", now=5.0)
    other, _ = take(again, "b", now=5.0)
    assert other.fence == lease.fence + 1


def test_an_end_nobody_acted_on_survives_a_restart(tmp_path: Path) -> None:
    leases = store(tmp_path)
    lease, token = take(leases, "a")
    leases.release(lease.id, token, 1.0)
    leases.close()
    again = store(tmp_path)
    (ended,) = again.unsettled()
    assert (ended.board, ended.cause) == ("a", "released")
    again.settled(ended)
    assert again.unsettled() == ()


def test_a_reboot_of_the_host_ends_every_lease(tmp_path: Path) -> None:
    leases = store(tmp_path)
    first, token = take(leases, "a", now=1000.0)
    leases.close()
    again = store(tmp_path, boot="boot-2")
    again.expire(1.0)
    assert [ended.cause for ended in again.unsettled()] == ["host_rebooted"]
    with pytest.raises(BenchError, match="host was booted"):
        again.check(token, "a", 1.0)
    # A power cut may have taken the newest leases, and their fences, from the disk.
    assert take(again, "a", now=2.0)[0].fence > first.fence + 1000
    again.close()
    same_boot = store(tmp_path, boot="boot-2")
    assert take(same_boot, "b", now=3.0)[0].fence < first.fence + 10_010


def test_a_user_who_is_removed_loses_the_leases_taken_from_another_host(tmp_path: Path) -> None:
    users = {"anna", "bert"}
    path = tmp_path / "leases.sqlite"
    leases = LeaseStore(path, BOARDS, boot_id="boot", started={1: 100}.get, removed=lambda user: user not in users)
    _, token = take(leases, "a", user="anna over TLS")
    take(leases, "b", user="bert over TLS")
    take(leases, "c", user="carl", pid=1)  # on this host, where nobody keeps a list
    leases.expire(1.0)
    assert leases.unsettled() == ()
    users.remove("anna")
    leases.expire(2.0)
    assert [(ended.board, ended.cause) for ended in leases.unsettled()] == [("a", "user_removed")]
    with pytest.raises(BenchError, match="ended with its user, who was removed from this bench"):
        leases.check(token, "a", 2.0)
    assert [lease.boards for lease in leases.leases()] == [("b",), ("c",)]


def test_a_store_from_before_leases_had_users_is_read(tmp_path: Path) -> None:
    leases = store(tmp_path)
    _, token = take(leases, "a")
    leases.close()
    with sqlite3.connect(tmp_path / "leases.sqlite") as database:
        database.execute("ALTER TABLE lease DROP COLUMN user")
    database.close()
    assert store(tmp_path).check(token, "a", 1.0).user == ""


def test_what_became_of_a_lease_is_told_for_a_while_only(tmp_path: Path) -> None:
    leases = store(tmp_path)
    lease, token = take(leases, "a")
    leases.release(lease.id, token, 1.0)
    with pytest.raises(BenchError, match=f"lease {lease.id} was released"):
        leases.check(token, "a", 1.0)
    for _ in range(OVER_KEPT):
        other, its = take(leases, "a")
        leases.release(other.id, its, 1.0)
    with pytest.raises(BenchError, match="never was one of this bench"):
        leases.check(token, "a", 1.0)


def test_a_dead_holder_and_a_reused_pid_end_the_lease(tmp_path: Path) -> None:
    alive = {1: 100, 2: 200}
    leases = store(tmp_path, alive=alive)
    take(leases, "a", pid=1)
    take(leases, "b", pid=2)
    del alive[1]
    alive[2] = 999  # the pid lives again as another process
    leases.expire(1.0)
    assert [(ended.board, ended.cause) for ended in leases.unsettled()] == [("a", "holder_died"), ("b", "holder_died")]


def test_a_holder_that_does_not_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not run"):
        take(store(tmp_path), "a", pid=77)


def test_the_kernel_tells_when_a_process_ends() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_started(child.pid)
    assert started is not None
    watch = watch_process(child.pid, started)
    assert watch is not None
    assert watch_process(child.pid, started + 1) is None
    child.kill()
    os.waitid(os.P_PIDFD, watch, os.WEXITED | os.WNOWAIT)
    assert process_started(child.pid) is None  # a zombie counts as dead
    child.communicate()
    os.close(watch)


@pytest.mark.parametrize("call", ["pidfd_open", "open"])
def test_a_holder_that_cannot_be_looked_at_is_not_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Without descriptors left every lease would end, and every board go off."""
    leases = LeaseStore(tmp_path / "leases.sqlite", BOARDS, boot_id="boot", started=process_started)
    lease, _ = take(leases, "a", pid=os.getpid())

    def refuse(*what: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        leases.expire(1.0)
        assert leases.leases() == (lease,)
        with pytest.raises(OSError, match="Too many open files"):
            watch_process(os.getpid(), lease.pid_start)
        with pytest.raises(BenchError, match=rf"process {os.getpid()}, cannot be looked at: Too many open files"):
            take(leases, "b", pid=os.getpid())
    leases.expire(60.0)
    assert [ended.cause for ended in leases.unsettled()] == ["expired"]


class OneHolderABoard(RuleBasedStateMachine):
    """Whatever is acquired, renewed, released, taken over, restarted or killed: one valid token a board at most."""

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.alive: dict[int, int] = {1: 1, 2: 2, 3: 3}
        self.now = 0.0
        self.highest_fence = 0
        self.tokens: list[tuple[str, str]] = []
        self.leases = store(Path(self.directory.name), alive=self.alive)

    @rule(
        boards=st.sets(st.sampled_from(BOARDS), min_size=1),
        pid=st.sampled_from((None, 1, 2, 3)),
        ttl=st.floats(0.5, 20),
        preempt=st.booleans(),
    )
    def acquire(self, boards: set[str], pid: int | None, ttl: float, preempt: bool) -> None:
        try:
            lease, token = take(
                self.leases, *boards, now=self.now, ttl=ttl, pid=pid, preempt=preempt, reason="why" if preempt else ""
            )
        except (BenchError, UsageError):
            return
        assert lease.fence > self.highest_fence
        self.highest_fence = lease.fence
        self.tokens.append((lease.id, token))

    @rule(data=st.data(), how=st.sampled_from(("renew", "release")))
    def use(self, data: st.DataObject, how: str) -> None:
        if self.tokens:
            lease_id, token = data.draw(st.sampled_from(self.tokens))
            try:
                getattr(self.leases, how)(lease_id, token, self.now)
            except BenchError:
                return

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(pid=st.sampled_from((1, 2, 3)))
    def kill(self, pid: int) -> None:
        self.alive[pid] += 10
        self.leases.expire(self.now)

    @rule()
    def restart(self) -> None:
        self.leases.close()
        self.leases = store(Path(self.directory.name), alive=self.alive)

    @invariant()
    def one_holder(self) -> None:
        for board in BOARDS:
            holders = []
            for lease_id, token in self.tokens:
                try:
                    holders.append(self.leases.check(token, board, self.now).id)
                except BenchError:
                    continue
                assert holders[-1] == lease_id
            assert len(holders) <= 1, f"{board} is held by {holders}"

    def teardown(self) -> None:
        self.leases.close()
        self.directory.cleanup()


TestOneHolderABoard = OneHolderABoard.TestCase
TestOneHolderABoard.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_process_lives_until_its_last_thread_has_ended() -> None:
    """Its locks are held until then: who gave the board to the next one earlier would have two holders."""
    program = (
        "import ctypes, platform, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[platform.machine()], 0)\n"  # exit of this thread alone
    )
    child = subprocess.Popen([sys.executable, "-c", program])
    try:
        stat = Path(f"/proc/{child.pid}/stat")
        until = time.monotonic() + 20
        while ") Z " not in stat.read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert process_started(child.pid) is not None
    finally:
        child.kill()
    watch = os.pidfd_open(child.pid)
    select.select([watch], [], [], 10)
    os.close(watch)
    assert process_started(child.pid) is None
    child.wait()
