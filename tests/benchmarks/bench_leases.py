"""Leases next to labgrid's coordinator in one run: acquire, release, hand-over to a waiter. Exit 1 on a missed limit.

hil's side is the whole way a client takes: HTTP on the unix socket, store on disk, a pidfd on the holder. The bench is
a virtual supply with its outputs off. Random kills are `tests/bench/test_lease_kills.py` (`make soak`).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/bench"), str(ROOT / "tests")]
BLOCKS, BLOCK, HAND_OVERS = 30, 20, 30
LIMITS_MS = {"hil acquire p50": 1.0, "hil hand-over p50": 20.0, "hil hand-over max": 100.0}


def timed(work: Callable[[], Any], into: list[float]) -> Any:
    began = time.perf_counter()
    value = work()
    into.append((time.perf_counter() - began) * 1e3)
    return value


def spread(name: str, values_ms: list[float]) -> dict[str, float]:
    ordered = sorted(values_ms)
    return {
        f"{name} p50": statistics.median(ordered),
        f"{name} p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        f"{name} max": ordered[-1],
    }


Times = dict[str, list[float]]


def of_hil(daemon: Any, times: Times) -> None:
    """One block of acquisitions and releases."""
    for _ in range(BLOCK):
        timed(lambda: daemon.http.get("/v1/leases"), times["hil call"])
        lease = timed(lambda: daemon.lease(["b1"], renew=False), times["hil acquire"])
        timed(lease.release, times["hil release"])


def hand_over(daemon: Any, other: Any, times: Times) -> None:
    """From the release of a board to its grant to somebody in line."""
    held = daemon.lease(["b1"], renew=False)
    got: list[tuple[float, Any]] = []

    def wait() -> None:
        lease = other.lease(["b1"], wait_s=10, renew=False)
        got.append((time.perf_counter(), lease))

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not daemon.waiting():
        time.sleep(0.002)
    began = time.perf_counter()
    held.release()
    waiter.join()
    times["hil hand-over"].append((got[0][0] - began) * 1e3)
    got[0][1].release()


@contextlib.contextmanager
def coordinator(directory: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "labgrid.remote.coordinator", "-l", f"127.0.0.1:{port}"],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


class Labgrid:
    """The same by labgrid's own client library: one place on a kept connection."""

    def __init__(self, address: str) -> None:
        self._runner = asyncio.Runner()
        self._session: Any = self._runner.run(self._start(address))

    async def _start(self, address: str) -> Any:
        from labgrid.remote.client import ClientSession
        from labgrid.remote.generated import labgrid_coordinator_pb2 as wire

        session = ClientSession(
            address=address, loop=asyncio.get_running_loop(), role=None, prog=None, args=None, env=None
        )
        await session.start()
        await session.stub.AddPlace(wire.AddPlaceRequest(name="b1"))
        return session

    def block(self, times: Times) -> None:
        self._runner.run(self._block(times))

    async def _block(self, times: Times) -> None:
        from labgrid.remote.generated import labgrid_coordinator_pb2 as wire

        for _ in range(BLOCK):
            began = time.perf_counter()
            await self._session.stub.AcquirePlace(wire.AcquirePlaceRequest(placename="b1"))
            acquired = time.perf_counter()
            await self._session.stub.ReleasePlace(wire.ReleasePlaceRequest(placename="b1"))
            times["labgrid acquire"].append((acquired - began) * 1e3)
            times["labgrid release"].append((time.perf_counter() - acquired) * 1e3)

    def close(self) -> None:
        self._runner.run(self._session.stop())
        self._runner.close()


def measure(lab: Any, directory: Path) -> Times:
    """Blocks of hil and labgrid in turn, so that both meet the same host."""
    times: Times = collections.defaultdict(list)
    with contextlib.ExitStack() as stack:
        daemon, other = stack.enter_context(lab.attach()), stack.enter_context(lab.attach())
        peer = None
        try:
            import labgrid  # noqa: F401
        except ImportError as error:
            print(f"labgrid is not here to compare with: {error}")
        else:
            peer = Labgrid(stack.enter_context(coordinator(directory)))
            stack.callback(peer.close)
        for _ in range(BLOCKS):
            of_hil(daemon, times)
            if peer is not None:
                peer.block(times)
        for _ in range(HAND_OVERS):
            hand_over(daemon, other, times)
    return times


def main() -> int:
    from test_daemon import Lab

    # Unix socket paths are short.
    with tempfile.TemporaryDirectory() as state, tempfile.TemporaryDirectory(prefix="hil-") as runtime:
        os.environ.update(XDG_STATE_HOME=state, XDG_RUNTIME_DIR=runtime)
        directory = Path(state) / "lab"
        directory.mkdir()
        lab = Lab(directory)
        try:
            times = measure(lab, directory)
        finally:
            lab.close()
    figures: dict[str, float] = {}
    for name, values in times.items():
        figures.update(spread(name, values))
    for name, value in figures.items():
        limit = LIMITS_MS.get(name)
        print(f"{name:22} {value:8.3f} ms{'' if limit is None else f'  (limit {limit:g})'}")
    missed = [name for name, limit in LIMITS_MS.items() if figures[name] > limit]
    print(json.dumps({"load": os.getloadavg()[0], "cores": os.cpu_count(), "missed": missed}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
