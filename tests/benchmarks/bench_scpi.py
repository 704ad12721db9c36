"""Exchange time on loopback: our driver next to pyvisa-py, against the same virtual supply in its own process.

Run by `make bench`. Prints p50 and p99 of one query in milliseconds, and of the loop's own exchange sets, and exits 1
when the p50 of one query exceeds its limit. Both clients take turns, a few hundred queries each, so that whatever else
the host does meets both; `plain socket` is a loop of send and recv with no client at all, the floor of this host.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hil.drivers.scpi import ScpiSupply
from hil.model import Setpoint

LIMIT_MS = 0.2
TURNS, EACH = 15, 200
QUESTION = ":OUTP? CH1"
SERVER = """
import asyncio
from hil.virtual.supply import RecordedLoad, VirtualSupply

async def main():
    supply = VirtualSupply(loads={1: RecordedLoad(((0.0, 6.0),))})
    await supply.start()
    print(supply.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
Times = dict[str, list[float]]


def quantiles(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3


def timed(action: Callable[[], object], into: list[float]) -> None:
    for _ in range(EACH):
        start = time.perf_counter()
        action()
        into.append(time.perf_counter() - start)


async def ours(supply: ScpiSupply, found: Times) -> None:
    async def span(name: str, action: Callable[[], Any]) -> None:
        start = time.perf_counter()
        await action()
        found.setdefault(name, []).append(time.perf_counter() - start)

    for _ in range(EACH):
        await span("hil: one query", lambda: supply.output_state(1))
    for index in range(EACH // 4):
        setpoint = Setpoint(15.0 + 0.01 * (index % 10), 2.0)
        await span("hil: measure (2 exchanges)", lambda: supply.measure(1))
        await span("hil: program, read back (4)", lambda wanted=setpoint: supply.program(1, wanted))


def plain(port: int) -> tuple[Callable[[], object], socket.socket]:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def query() -> object:
        sock.sendall(QUESTION.encode() + b"\n")
        return sock.recv(4096)

    return query, sock


async def race(port: int) -> Times:
    import pyvisa

    manager = pyvisa.ResourceManager("@py")
    psu = manager.open_resource(
        f"TCPIP::127.0.0.1::{port}::SOCKET", read_termination="\n", write_termination="\n", timeout=2000
    )
    query, sock = plain(port)
    supply = ScpiSupply("rigol-dp800", f"tcp://127.0.0.1:{port}")
    await supply.program(1, Setpoint(15.0, 2.0))
    await supply.output(1, True)
    found: Times = {"plain socket": [], "pyvisa-py: one query": []}
    for _ in range(TURNS):
        await ours(supply, found)
        timed(lambda: psu.query(QUESTION), found["pyvisa-py: one query"])
        timed(query, found["plain socket"])
    await supply.output(1, False)
    await supply.close()
    sock.close()
    psu.close()
    manager.close()
    return found


def main() -> int:
    root = Path(__file__).parents[2]
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        if server.stdout is None:
            raise SystemExit("the supply has no output")
        found = asyncio.run(race(int(server.stdout.readline())))
    finally:
        server.kill()
        server.wait()
    print(f"{'loopback':<32}{'n':>7}{'p50 ms':>10}{'p99 ms':>10}    load {os.getloadavg()[0]:.1f}")
    for name, times in sorted(found.items()):
        p50, p99 = quantiles(times)
        print(f"{name:<32}{len(times):>7}{p50:>10.3f}{p99:>10.3f}")
    p50, _ = quantiles(found["hil: one query"])
    if p50 > LIMIT_MS:
        print(f"one query takes {p50:.3f} ms, the limit is {LIMIT_MS} ms")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
