"""Holders and daemon killed at random moments: never two holders of a board, never a lease lost by a kill of another.

Who holds a board also holds a file lock of ours on its name, which the kernel takes away with the process: an account
of the truth that hil has no part in. A kill counts only when it hit a process that had or waited for a lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_daemon import Lab, gone, until

from hil.errors import BenchError

SEED = 20260320
WORKERS = 3
# One in so many kills is the daemon's: each takes it seconds to come back.
DAEMON_EVERY = 10

# Says `W` when it asks, `H` when it holds, `R` when it has given back; `double` and `lost` are what must not happen.
HOLDER = """
import fcntl, os, random, sys, time
from pathlib import Path
from hil.client import attach
from hil.client.http import DaemonGone
from hil.errors import BenchError
from hil.inventory import load_bench

bench, locks, seed = load_bench(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
say = lambda *words: print(*words, flush=True)

def patiently(work):
    # A daemon that was killed is started by whoever comes next.
    until = time.monotonic() + 60
    while True:
        try:
            return work(attach(bench))
        except (DaemonGone, BenchError) as error:
            again = isinstance(error, DaemonGone) or "ending" in str(error) or "did not come up" in str(error)
            if not (again or "ended at once" in str(error) or "does not answer" in str(error)):
                raise
            if time.monotonic() > until:
                raise
            time.sleep(0.05)

while True:
    boards = chance.choice((["b1"], ["b2"], ["b1", "b2"]))
    say("W", *boards)
    lease = patiently(lambda daemon: daemon.lease(boards, wait_s=120, ttl_s=120, renew=False))
    handles = []
    for board in boards:
        handle = os.open(locks / board, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("double", board)
        handles.append(handle)
    say("H", *boards)
    until = time.monotonic() + chance.uniform(0, 0.3)
    while True:
        for board in boards:
            try:
                patiently(lambda daemon: daemon.http.call("GET", f"/v1/boards/{board}/check", token=lease.token))
            except BenchError as error:
                say("lost", board, error)
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    for handle in handles:
        os.close(handle)
    try:
        patiently(lambda daemon: daemon.http.call("DELETE", f"/v1/leases/{lease.id}", token=lease.token, timeout_s=30))
    except BenchError as error:
        if "was released" not in str(error):  # the daemon was killed after it had done so
            say("lost", error)
    say("R", *boards)
"""


class Holder:
    """A process that takes and gives back leases until it is killed."""

    def __init__(self, lab: Lab, locks: Path, seed: int) -> None:
        self._said = (locks / f"said-{seed}").open("w+")
        argv = [sys.executable, "-c", HOLDER, str(lab.path), str(locks), str(seed)]
        self.process = subprocess.Popen(argv, stdout=self._said, stderr=subprocess.STDOUT, text=True)

    @property
    def said(self) -> list[str]:
        self._said.seek(0)
        return self._said.read().splitlines()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def kill_daemon(lab: Lab) -> bool:
    """Whether one was there to be killed."""
    try:
        pid = int((lab.bench.runtime_dir / "daemon.lock").read_text())
    except (OSError, ValueError):
        return False
    if gone(pid):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def storm(lab: Lab, directory: Path, kills: int) -> dict[str, int]:
    """Kill at random until `kills` have hit, some of them a holder; returns what was counted.

    On a slow host it waits for leases to be granted, or it would kill before anything happens.
    """
    chance = random.Random(SEED)
    holders: list[Holder] = []
    past: list[str] = []
    count = {"holders": 0, "holding": 0, "daemons": 0, "double": 0, "lost": 0, "granted": 0, "strange": 0}
    seeds = iter(range(1, 1 << 30))

    def granted() -> int:
        return sum(line.startswith("H") for said in (past, *(holder.said for holder in holders)) for line in said)

    try:
        while (hits := count["holders"] + count["daemons"]) < kills or count["holding"] < kills / 20:
            while len(holders) < WORKERS:
                holders.append(Holder(lab, directory, next(seeds)))
            until(lambda hits=hits: granted() >= hits / 2, 60, "for leases to be granted")
            time.sleep(chance.uniform(0.0, 0.4))
            if chance.randrange(DAEMON_EVERY) == 0:
                count["daemons"] += kill_daemon(lab)
                continue
            victim = chance.choice(holders)
            if not victim.said:
                continue  # not at work yet
            victim.kill()
            holders.remove(victim)
            said = victim.said
            count["holders"] += 1
            count["holding"] += said[-1].startswith("H")
            past += said
    finally:
        for holder in holders:
            holder.kill()
            past += holder.said
        print("\n".join(line for line in past if line[:2] not in ("W ", "H ", "R ")))
    for line in past:
        kind = line.split(" ")[0]
        name = {"H": "granted", "W": "", "R": ""}.get(kind, kind if kind in ("double", "lost") else "strange")
        if name:
            count[name] += 1
    return count


def nobody_holds_anything(lab: Lab, locks: Path) -> None:
    """All are dead: every lease ends, every board can be had, every output is off."""
    with lab.attach() as daemon:
        until = time.monotonic() + 20
        while daemon.leases():
            assert time.monotonic() < until, daemon.leases()
            time.sleep(0.05)
        with daemon.lease(["b1", "b2"], wait_s=20):
            for board in ("b1", "b2"):
                with (locks / board).open("a") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not lab.supply.is_on(1)
    assert not lab.supply.is_on(2)


def judged(lab: Lab, tmp_path: Path, kills: int) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    with contextlib.suppress(BenchError):
        lab.attach().close()
    count = storm(lab, locks, kills)
    print(count)
    nobody_holds_anything(lab, locks)
    assert (count["double"], count["lost"], count["strange"]) == (0, 0, 0)


def test_some_kills(lab: Lab, tmp_path: Path) -> None:
    judged(lab, tmp_path, 15)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_kills(lab: Lab, tmp_path: Path) -> None:
    judged(lab, tmp_path, int(os.environ.get("HIL_KILLS", "1000")))
