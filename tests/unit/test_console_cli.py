"""The console lent to another program: a pseudo terminal that leads through the daemon's stream to the board."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hil.bench.consoles import Console as Server
from hil.cli.console import carry, pseudo_terminal
from hil.client.console_line import DaemonLine
from hil.errors import BenchError, UsageError


class Lease:
    ttl_s = 0.3

    def __init__(self) -> None:
        self.renewed = 0

    def renew(self) -> None:
        self.renewed += 1


def read(fd: int, count: int, timeout_s: float = 20.0) -> bytes:
    data, deadline = b"", time.monotonic() + timeout_s
    while len(data) < count and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            data += os.read(fd, count - len(data))
        time.sleep(0.002)
    return data


def lent(tmp_path: Path, work: Callable[[int, int], None], lease: Any, token: str | None) -> None:
    """`work(board's end, a program's end)` while the console is lent at `tmp_path/tty`."""
    board, far = os.openpty()
    tty.setraw(far)
    os.set_blocking(board, False)

    def authorize(given: str) -> None:
        if given != "right":
            raise BenchError("this lease is over")

    async def scenario() -> None:
        console = Server("b1", os.ttyname(far), 115200, tmp_path / "log", on_error=lambda error: None)
        await console.serve(tmp_path / "c.sock", authorize)
        console.start()
        while not console.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        line = DaemonLine("b1", tmp_path / "c.sock", lambda: token)
        await asyncio.to_thread(line.connect, None)
        with pseudo_terminal(tmp_path / "tty") as (master, path):
            ended: list[BaseException] = []

            def bridge() -> None:
                try:
                    carry(line, master, master, lease)
                except BenchError as error:
                    ended.append(error)

            thread = threading.Thread(target=bridge)
            thread.start()
            program = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            try:
                await asyncio.to_thread(work, board, program)
            finally:
                os.close(program)
                await console.stop()
                await asyncio.to_thread(thread.join, 20)
            assert "stream ended" in str(ended[0])
        assert not (tmp_path / "tty").is_symlink()

    asyncio.run(asyncio.wait_for(scenario(), 60))
    os.close(board)
    os.close(far)


def test_another_program_reads_and_writes_under_the_lease(tmp_path: Path) -> None:
    lease = Lease()

    def work(board: int, program: int) -> None:
        os.write(board, b"vb1 login: ")
        assert read(program, 11) == b"vb1 login: "
        os.write(program, b"root\r")
        assert read(board, 5) == b"root\r"
        deadline = time.monotonic() + 20
        while not lease.renewed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lease.renewed

    lent(tmp_path, work, lease, "right")
    assert (tmp_path / "log/b1.log").read_bytes() == b"vb1 login: "


def test_without_a_lease_it_only_reads(tmp_path: Path) -> None:
    def work(board: int, program: int) -> None:
        os.write(program, b"evil\r")
        os.write(board, b"quiet")
        assert read(program, 5) == b"quiet"
        assert read(board, 1, 0.2) == b""

    lent(tmp_path, work, None, None)


def test_what_nobody_reads_does_not_stop_the_stream(tmp_path: Path) -> None:
    def work(board: int, program: int) -> None:
        for _ in range(40):
            deadline = time.monotonic() + 20
            data = b"x" * 1000
            while data and time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(board, data) :]
        time.sleep(0.5)
        kept = read(program, 100_000, 0.3)
        assert 0 < len(kept) < 40_000  # the kernel keeps some KiB, the rest was dropped
        os.write(board, b"alive")
        assert read(program, 5) == b"alive"

    lent(tmp_path, work, None, None)


def test_a_link_that_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="cannot link"), pseudo_terminal(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "stale").symlink_to("/nowhere")
    with pseudo_terminal(tmp_path / "stale") as (_, path):
        assert path == str(tmp_path / "stale")
        assert os.path.realpath(path).startswith("/dev/pts/")
    assert not (tmp_path / "stale").is_symlink()
