"""Find the bench's daemon, or start it: detached, once, however many clients come at the same time."""

from __future__ import annotations

import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hil.client.http import DaemonGone, Http
from hil.errors import BenchError

if TYPE_CHECKING:
    from hil import inventory
    from hil.client.bench import Bench

START_S = 20.0
POLL_S = 0.02
LOG_LINES = 15
# A parent in between that ends at once: the daemon is nobody's child, so no client leaves a zombie or waits for it.
_DETACH = """
import json, os, subprocess, sys
argv, log = json.loads(sys.argv[1]), sys.argv[2]
out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
null = os.open(os.devnull, os.O_RDONLY)
child = subprocess.Popen(argv, stdin=null, stdout=out, stderr=out, start_new_session=True, cwd="/")
print(child.pid, flush=True)
os._exit(0)
"""


def attach(bench: inventory.Bench, *, start: bool = True) -> Bench:
    """The bench behind its daemon; starts the daemon when none answers and `start`.

    The daemon of a bench on another host is never started from here. Raises BenchError with the daemon's last log lines
    when it does not come up, DaemonGone when `start` is False.
    """
    from hil.client.bench import Bench

    if bench.url:
        from hil.client.remote import Address

        return Bench(bench, Http.remote(Address.of(bench.url)))
    http = Http(bench.api_socket)
    if not start:
        _same_bench(http, bench)
    elif not _answers(bench, http):
        with _one_at_a_time(bench.runtime_dir / "start.lock"):
            _start(bench, http)
    return Bench(bench, http)


def _start(bench: inventory.Bench, http: Http) -> None:
    deadline = time.monotonic() + START_S
    # Somebody may have started it while we waited for the lock, or it may be on its way up or down.
    while not _answers(bench, http):
        if not _held(bench.runtime_dir / "daemon.lock"):
            _spawn(bench, http, deadline)
            return
        if time.monotonic() > deadline:
            raise BenchError(
                f"a daemon holds bench {bench.name} but does not answer within {START_S:g} s",
                hint=f"its log: {bench.state_dir / 'daemon.log'}",
            )
        time.sleep(POLL_S)


def _spawn(bench: inventory.Bench, http: Http, deadline: float) -> None:
    log = bench.state_dir / "daemon.log"
    argv = [sys.executable, "-m", "hil.bench.daemon", str(bench.path)]
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", _DETACH, json.dumps(argv), str(log)],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    if done.returncode != 0:
        raise BenchError(f"cannot start the bench daemon: {done.stderr.strip()[-400:]}")
    with _watching(int(done.stdout)) as ended:
        while not _answers(bench, http):
            late = time.monotonic() > deadline
            # When it ended because another one was faster, that one will answer.
            if late or (ended() and not _held(bench.runtime_dir / "daemon.lock")):
                raise BenchError(
                    f"the bench daemon {'did not answer in time' if late else 'ended at once'}:\n{_tail(log)}",
                    hint=f"its whole log: {log}",
                )
            time.sleep(POLL_S)


def _answers(bench: inventory.Bench, http: Http) -> bool:
    try:
        _same_bench(http, bench)
    except DaemonGone:
        http.close()
        return False
    return True


def _held(path: Path) -> bool:
    """Whether a process holds the lock of the bench's daemon."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _same_bench(http: Http, bench: inventory.Bench) -> None:
    status = http.get("/v1/status", timeout_s=5.0)
    digest = status.get("bench_sha256")
    if digest != bench_digest(bench.path):
        raise BenchError(
            f"the daemon of {bench.path} runs with an older version of that file",
            hint="hil bench stop; the next command starts it again",
        )


def bench_digest(path: Path) -> str:
    """SHA-256 of the bench file's bytes: a daemon must not go on with wires that the file no longer names."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def _watching(pid: int) -> Iterator[Ended]:
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        yield Ended(None)
        return
    try:
        yield Ended(fd)
    finally:
        os.close(fd)


class Ended:
    """Asks whether the watched process has ended."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def __call__(self) -> bool:
        return self._fd is None or bool(select.select([self._fd], [], [], 0)[0])


def _tail(log: Path) -> str:
    try:
        lines = log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]
    except OSError:
        lines = []
    return "\n".join(f"    {line}" for line in lines) or "    (its log is empty)"
