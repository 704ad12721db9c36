"""Bytes from one stream into another, until one side ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

CHUNK_BYTES = 1 << 16
NAP_S = 0.004  # shorter ones are saved up


class Pace:
    """At most so many bytes a second over all pumps that share it: what they copy keeps the loop from other work."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._due_s = 0.0

    async def spend(self, count: int) -> None:
        """Return when `count` bytes, and what others spent before, have had their time."""
        now_s = time.monotonic()
        self._due_s = max(self._due_s, now_s) + count / self._bytes_per_s
        if self._due_s - now_s > NAP_S:
            await asyncio.sleep(self._due_s - now_s)


async def pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    allowed: Callable[[], object] = lambda: None,
    pace: Pace | None = None,
) -> None:
    """Pass on what comes until it ends; `allowed` is asked for every piece and raises what ends it."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            allowed()
            writer.write(data)
            await writer.drain()
            if pace is not None:
                await pace.spend(len(data))


async def until_one_ends(*pumps: Coroutine[Any, Any, None]) -> None:
    """Run them until one ends, for whatever reason; the others are cancelled."""
    running = [asyncio.ensure_future(item) for item in pumps]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for item in running:
            item.cancel()
        await asyncio.gather(*running, return_exceptions=True)
