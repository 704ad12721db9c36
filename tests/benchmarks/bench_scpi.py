"""Exchange time on loopback: our driver next to pyvisa-py, against the same virtual supply in its own process.

Run by `make bench`. Prints p50 and p99 of one query in milliseconds, and of the loop's own exchange set.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hil.drivers.scpi import ScpiSupply
from hil.model import Setpoint

ROUNDS = 3000
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


def quantiles(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3


def timed(action: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return times


async def ours(port: int) -> dict[str, list[float]]:
    supply = ScpiSupply("rigol-dp800", f"tcp://127.0.0.1:{port}")
    await supply.program(1, Setpoint(15.0, 2.0))
    await supply.output(1, True)
    found: dict[str, list[float]] = {"hil: one query": [], "hil: measure": [], "hil: program, read back": []}
    for index in range(ROUNDS):
        start = time.perf_counter()
        await supply.output_state(1)
        queried = time.perf_counter()
        await supply.measure(1)
        measured = time.perf_counter()
        await supply.program(1, Setpoint(15.0 + 0.01 * (index % 10), 2.0))
        programmed = time.perf_counter()
        for name, span in zip(found, (queried - start, measured - queried, programmed - measured), strict=True):
            found[name].append(span)
    await supply.output(1, False)
    await supply.close()
    return found


def theirs(port: int) -> dict[str, list[float]]:
    import pyvisa

    manager = pyvisa.ResourceManager("@py")
    psu = manager.open_resource(
        f"TCPIP::127.0.0.1::{port}::SOCKET", read_termination="\n", write_termination="\n", timeout=2000
    )
    try:
        return {"pyvisa-py: one query": timed(lambda: psu.query(":OUTP? CH1"))}
    finally:
        psu.close()
        manager.close()


def main() -> None:
    root = Path(__file__).parents[2]
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        if server.stdout is None:
            raise SystemExit("the supply has no output")
        port = int(server.stdout.readline())
        results = {**asyncio.run(ours(port)), **theirs(port)}
    finally:
        server.kill()
        server.wait()
    print(f"{'loopback, ' + str(ROUNDS) + ' rounds':<28}{'p50 ms':>10}{'p99 ms':>10}")
    for name, times in results.items():
        p50, p99 = quantiles(times)
        print(f"{name:<28}{p50:>10.3f}{p99:>10.3f}")


if __name__ == "__main__":
    main()
