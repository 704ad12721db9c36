"""Bytes from one stream into another, until one side ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

CHUNK_BYTES = 1 << 16


async def pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, allowed: Callable[[], object] = lambda: None
) -> None:
    """Pass on what comes until it ends; `allowed` is asked for every piece and raises what ends it."""
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            allowed()
            writer.write(data)
            await writer.drain()


async def until_one_ends(*pumps: Coroutine[Any, Any, None]) -> None:
    """Run them until one ends, for whatever reason; the others are cancelled."""
    running = [asyncio.ensure_future(item) for item in pumps]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for item in running:
            item.cancel()
        await asyncio.gather(*running, return_exceptions=True)
