"""Consoles next to labgrid in one run: send and expect, throughput, commands under a logging kernel, 64 ports at once.

Run by `make bench`. The far end is a process of its own, the same for both; both take turns, so that whatever else the
host does meets both. Exits 1 when a figure of ours misses its limit. `--soak` runs the 1,000 commands; else 200.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).parents[1] / name) for name in ("", "unit", "bench"))
from console_board import ShellBoard
from test_daemon import Lab

from hil.bench.console_reader import PortReader
from hil.bench.consoles import Console as Server
from hil.client.console import Console
from hil.drivers.serial_port import LineSettings
from hil.inventory import load_bench

TURNS, EACH = 10, 100
LOG_LINE = b"[    1.234567] systemd[1]: Starting a unit with a name of usual length for a boot log...\r\n"
PORTS, BYTES_PER_S, SECONDS, EVERY_S = 64, 11520, 8.0, 0.01
LIMITS = {
    "PTY": ("ms", 0.15),
    "raw TCP": ("ms", 0.3),
    "daemon": ("ms", 0.5),
}
Results = dict[str, tuple[float, str, float | None]]


# --- far ends, in processes of their own ------------------------------------------------------------------------------


def answer(read: Callable[[], bytes], write: Callable[[bytes], None]) -> None:
    """`ping` gets an answer and a prompt, `boot N` some N bytes of a boot log and a login prompt."""
    line = b""
    while data := read():
        line += data
        while b"\n" in line:
            word, _, line = line.partition(b"\n")
            if word.startswith(b"boot "):
                block = LOG_LINE * 40
                for _ in range(int(word[5:]) // len(block)):
                    write(block)
                write(b"vb1 login: ")
            else:
                write(word + b"\r\npong\r\n# ")


def far_pty(pipe: Connection) -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    pipe.send(os.ttyname(slave))

    def write(data: bytes) -> None:
        while data:
            data = data[os.write(master, data) :]

    answer(lambda: os.read(master, 4096), write)


def far_tcp(pipe: Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    while True:
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            answer(lambda peer=peer: peer.recv(4096), peer.sendall)  # type: ignore[misc]
        except OSError:
            continue


def far_feeder(pipe: Connection) -> None:
    """64 boards that talk at 115200 baud; sends back what each said."""
    lines = []
    for _ in range(PORTS):
        master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(master, False)
        lines.append((master, slave))
    pipe.send([os.ttyname(slave) for _, slave in lines])
    pipe.recv()
    said = [0] * PORTS
    start = time.monotonic()
    while (now := time.monotonic() - start) < SECONDS:
        for number, (master, _) in enumerate(lines):
            upto = int(now * BYTES_PER_S)
            if upto > said[number]:
                text = b"".join(
                    b"%02d:%07d 0123456789abcdefg\r\n" % (number, at)
                    for at in range(said[number] // 30, upto // 30 + 1)
                )
                piece = text[said[number] % 30 :][: upto - said[number]]
                said[number] += os.write(master, piece)
        time.sleep(max(0.0, EVERY_S - (time.monotonic() - start - now)))
    pipe.send(said)
    pipe.recv()


def reader_of_64(pipe: Connection) -> None:
    """What the daemon does with 64 consoles; tells its processor time."""
    ports, directory = pipe.recv()

    async def serve() -> None:
        reader = PortReader()
        consoles = [
            Server(f"b{number}", port, 115200, directory, on_error=lambda error: None, reader=reader)
            for number, port in enumerate(ports)
        ]
        for console in consoles:
            console.start()
        while not all(console.connected for console in consoles):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        pipe.send("ready")
        begun = resource.getrusage(resource.RUSAGE_SELF)
        while not pipe.poll():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        pipe.recv()
        await asyncio.sleep(0.5)
        ended = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((ended.ru_utime + ended.ru_stime) - (begun.ru_utime + begun.ru_stime))
        for console in consoles:
            await console.stop()
        pipe.send("logged")

    asyncio.run(serve())


def far_board(pipe: Connection) -> None:
    with ShellBoard(lines_per_s=200) as board:
        pipe.send(board.path)
        pipe.recv()
        pipe.send((board.messages, board.inside))


@contextmanager
def beside(target: Callable[[Connection], None]) -> Iterator[Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


# --- the measurements -------------------------------------------------------------------------------------------------


def labgrid_driver(kind: str, address: Any) -> Any:
    from labgrid import Target
    from labgrid.driver import SerialDriver
    from labgrid.resource import NetworkSerialPort, RawSerialPort

    logging.getLogger().setLevel(logging.WARNING)
    target = Target("bench")
    if kind == "PTY":
        RawSerialPort(target, None, port=address, speed=115200)
    else:
        NetworkSerialPort(target, None, host="127.0.0.1", port=address, speed=115200, protocol="raw")
    driver = SerialDriver(target, None)
    target.activate(driver)
    return driver


NUMBERS = itertools.count()


def ask_ours(console: Console) -> None:
    word = f"ping {next(NUMBERS) % 100}"  # so that no earlier answer can be taken for this one
    console.send(word)
    console.expect(f"{word}\r\npong\r\n# ", 5)


def ask_labgrid(driver: Any) -> None:
    word = f"ping {next(NUMBERS) % 100}"
    driver.sendline(word)
    driver.expect(f"{word}\r\npong\r\n# ", timeout=5)


def times_of(action: Callable[[], None]) -> list[float]:
    found = []
    for _ in range(EACH):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return found


def p50_ms(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2] * 1e3


def port_figures(kind: str, far: Callable[[Connection], None], results: Results) -> None:
    # A pseudo terminal has one owner: two far ends of the same kind.
    with beside(far) as pipe, beside(far) as other:
        address, theirs = pipe.recv(), other.recv()
        ours = Console.on_port(address if kind == "PTY" else f"socket://127.0.0.1:{address}", LineSettings())
        peer = labgrid_driver(kind, theirs)
        hil: list[float] = []
        labgrid: list[float] = []
        for _ in range(TURNS):
            hil += times_of(lambda: ask_ours(ours))
            if kind == "PTY":
                labgrid += times_of(lambda: ask_labgrid(peer))
        if kind != "PTY":
            labgrid = times_of(lambda: ask_labgrid(peer))
        results[f"send + expect p50, {kind}"] = (p50_ms(hil), "ms", LIMITS[kind][1])
        results[f"send + expect p50, {kind}, labgrid"] = (p50_ms(labgrid), "ms", None)
        size = 16 << 20
        best = 0.0
        for _ in range(3):
            start = time.perf_counter()
            ours.send(f"boot {size}")
            ours.expect("login: ", 60)
            best = max(best, size / (time.perf_counter() - start) / (1 << 20))
        results[f"expect behind a boot log, {kind}"] = (best, "MiB/s", 20.0)
        size = 4 << 20 if kind == "PTY" else 16 << 10
        start = time.perf_counter()
        peer.sendline(f"boot {size}")
        peer.expect("login: ", timeout=60)
        results[f"expect behind a boot log, {kind}, labgrid"] = (
            size / (time.perf_counter() - start) / (1 << 20),
            "MiB/s",
            None,
        )
        ours.close()


def daemon_figures(results: Results) -> None:
    """As a test has it: a leased board of a running daemon, the lease asked for at every call."""
    # Unix socket paths are short.
    with (
        tempfile.TemporaryDirectory() as name,
        tempfile.TemporaryDirectory(prefix="hil-") as runtime,
        beside(far_pty) as far,
    ):
        os.environ.update(XDG_STATE_HOME=f"{name}/state", XDG_RUNTIME_DIR=runtime)
        lab = Lab(Path(name))
        lab.path.write_text(lab.path.read_text().replace("b1: {", f"b1: {{console: {{port: {far.recv()}}}, "))
        lab.bench = load_bench(lab.path)
        try:
            with lab.attach() as daemon, daemon.lease(["b1"]) as lease:
                board = daemon.board("b1", lease)
                found: list[float] = []
                asked: list[float] = []
                for _ in range(TURNS):
                    found += times_of(lambda: ask_ours(board.console))
                    asked += times_of(board.check)
        finally:
            lab.close()
        results["send + expect p50, a leased board through the daemon"] = (p50_ms(found), "ms", LIMITS["daemon"][1])
        results["may this board still be driven, p50"] = (p50_ms(asked), "ms", None)


def figures_of_64(results: Results) -> None:
    with tempfile.TemporaryDirectory() as name, beside(far_feeder) as feeder, beside(reader_of_64) as reader:
        reader.send((feeder.recv(), Path(name)))
        reader.recv()
        feeder.send("go")
        said = feeder.recv()
        reader.send("stop")
        cpu_s = reader.recv()
        reader.recv()
        lost = 0
        for number, count in enumerate(said):
            heard = (Path(name) / f"b{number}.log").read_bytes()
            wanted = b"".join(b"%02d:%07d 0123456789abcdefg\r\n" % (number, at) for at in range(count // 30 + 1))[
                :count
            ]
            lost += heard != wanted
        rate = sum(said) / PORTS / SECONDS * 10
        results[f"{PORTS} consoles at {rate:.0f} baud: consoles with a byte lost"] = (lost, "", 0.5)
        results[f"{PORTS} consoles at {rate:.0f} baud: share of a core"] = (cpu_s / SECONDS * 100, "%", 25.0)


def command_figures(results: Results, count: int) -> None:
    with beside(far_board) as pipe:
        console = Console.on_port(pipe.recv())
        wrong, found = 0, []
        for number in range(count):
            start = time.perf_counter()
            done = console.run(f"echo a{number}; echo b{number}; exit {number % 200}", 30)
            found.append(time.perf_counter() - start)
            wrong += (done.stdout, done.returncode) != (f"a{number}\nb{number}\n", number % 200)
        pipe.send("enough")
        messages, inside = pipe.recv()
        results[f"{count} commands, {messages} kernel lines, {inside} inside a line: wrong"] = (wrong, "", 0.5)
        results["a command under 200 kernel lines a second, p50"] = (p50_ms(found), "ms", None)


def main() -> int:
    results: Results = {}
    port_figures("PTY", far_pty, results)
    port_figures("raw TCP", far_tcp, results)
    daemon_figures(results)
    figures_of_64(results)
    command_figures(results, 1000 if "--soak" in sys.argv else 200)
    missed = 0
    for what, (value, unit, limit) in results.items():
        ok = limit is None or (value >= limit if unit == "MiB/s" else value <= limit)
        missed += not ok
        bound = "" if limit is None else f"   limit {limit:g}{'' if ok else '   MISSED'}"
        print(f"{what:76} {value:9.3f} {unit:5}{bound}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
