"""The host that tests run on: whether it stood still while a time was measured, and what tests left running on it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

STALL_S = 0.5


class Host:
    """Watches how much longer than asked a short sleep takes, on a thread that does nothing else."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._worst_s = 0.0
        self._thread = threading.Thread(target=self._watch, name="host-watch", daemon=True)
        self._thread.start()

    def excuses(self, what: str, seconds: float, limit_s: float) -> None:
        """A time over its limit counts only if the host ran: otherwise nothing was measured, and the test says so."""
        if seconds >= limit_s and self._worst_s > STALL_S:
            pytest.skip(f"{what} took {seconds:.2f} s, but the host stood still for {self._worst_s:.2f} s meanwhile")
        assert seconds < limit_s, f"{what} took {seconds:.2f} s (worst delay of the host {self._worst_s:.3f} s)"

    def valid(self, invalid: list[str]) -> None:
        """A flight's record is to be valid. Where the host stood still it must not be, and the test says so."""
        if invalid and self._worst_s > STALL_S:
            pytest.skip(f"the record is invalid, as it must: the host stood still for {self._worst_s:.2f} s: {invalid}")
        assert invalid == []

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        pause_s = 0.02
        while not self._stop.is_set():
            began = time.monotonic()
            time.sleep(pause_s)
            self._worst_s = max(self._worst_s, time.monotonic() - began - pause_s)


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that are free now, for a server that starts later.

    Below those that the kernel gives to whoever asks for any, so that none of them is taken meanwhile. Each worker of a
    test run has ports of its own: two that ask at once would both find the same one free.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    below = range(lowest // 2, lowest) if lowest > 8192 else range(8192, 60_000)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    below = below[worker :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    found: list[int] = []
    for port in random.SystemRandom().sample(below, len(below)):
        if len(found) == count:
            break
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


def left_behind(mark: str) -> list[str]:
    """Kill what the tests started and did not end, found by an entry of its environment; a moment's grace is given."""
    deadline = time.monotonic() + 10
    while (found := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # Commands of a board whose connection was cut sleep on, as they may.
    return [f"{pid} {words}" for pid, words in found.items() if not words.startswith("sleep ")]


def _marked(mark: str) -> dict[int, str]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(process.name) != os.getpid() and mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200].strip()
                if words:  # one that has ended and waits for its parent has none
                    found[int(process.name)] = words
    return found
