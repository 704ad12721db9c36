"""The virtual board's serial line: nothing is lost before a reader comes, and a power cycle keeps the order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hil.virtual import console as module
from hil.virtual.console import ConsoleRelay


async def read_until(descriptor: int, end: bytes) -> bytes:
    heard = b""
    os.set_blocking(descriptor, False)
    async with asyncio.timeout(20):
        while not heard.endswith(end):
            try:
                heard += os.read(descriptor, 65536)
            except BlockingIOError:
                await asyncio.sleep(0.001)
    return heard


def open_line(path: Path) -> int:
    """The line is raw already; setting it again would flush what the kernel holds."""
    return os.open(path, os.O_RDWR | os.O_NOCTTY)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (the relay has no event for tests)
            await asyncio.sleep(0.001)


def test_early_bytes_wait_for_a_reader_and_boots_stay_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        relay = ConsoleRelay(tmp_path / "sock", tmp_path / "tty")
        assert (tmp_path / "tty").stat().st_mode & 0o777 == 0o600
        first = b"".join(b"boot one line %d\r\n" % n for n in range(20_000))
        _, qemu = await asyncio.open_unix_connection(str(tmp_path / "sock"))
        qemu.write(first)
        await qemu.drain()
        qemu.close()  # power cut, while nobody reads
        reader, qemu = await asyncio.open_unix_connection(str(tmp_path / "sock"))
        qemu.write(b"boot two\r\n$")
        line = open_line(tmp_path / "tty")
        assert await read_until(line, b"$") == first + b"boot two\r\n$"
        os.write(line, b"root\r")
        assert await asyncio.wait_for(reader.readexactly(5), 20) == b"root\r"
        assert relay.dropped_bytes == 0
        qemu.close()
        relay.close()
        os.close(line)

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_an_unread_line_keeps_the_newest_and_counts_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER_BYTES", 10_000)

    async def scenario() -> None:
        relay = ConsoleRelay(tmp_path / "sock", tmp_path / "tty")
        _, qemu = await asyncio.open_unix_connection(str(tmp_path / "sock"))
        sent = b"x" * 200_000 + b"end$"
        qemu.write(sent)
        await qemu.drain()
        await until(lambda: relay.dropped_bytes > 0)
        line = open_line(tmp_path / "tty")
        heard = await read_until(line, b"end$")
        assert len(heard) + relay.dropped_bytes == len(sent)
        qemu.close()
        relay.close()
        os.close(line)

    asyncio.run(scenario())
