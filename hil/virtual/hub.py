"""An Ethernet switch for a virtual bench with several boards: they share the one inner port of the link box.

Frames travel as QEMU's `-netdev stream` sends them: a 4-byte big-endian length, then the frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from hil.errors import BenchError

MAX_FRAME_BYTES = 65536
QUEUE_BYTES = 1_000_000
"""Frames for a port that does not take them are dropped beyond this, as a switch does."""

_GROUP_BIT = 0x01


class Hub:
    """Joins the link box (`uplink`, a listening unix socket) and the boards' ports (sockets that the hub listens on).

    A board that is power-cycled simply connects again. Use in a running asyncio loop.
    """

    def __init__(self, uplink: Path, ports: Mapping[str, Path]) -> None:
        self._uplink, self._ports = uplink, dict(ports)
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._learned: dict[bytes, str] = {}
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.dropped_frames = 0

    async def start(self) -> None:
        """Connect to the link box and listen for the boards. BenchError when the link box is not there."""
        try:
            reader, writer = await asyncio.open_unix_connection(os.fspath(self._uplink))
        except OSError as error:
            raise BenchError(f"the link box's inner port {self._uplink} does not answer: {error}") from error
        self._spawn("link box", reader, writer)
        for name, path in self._ports.items():
            path.unlink(missing_ok=True)

            def plugged(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                self._spawn(name, reader, writer)

            self._servers.append(await asyncio.start_unix_server(plugged, os.fspath(path)))
            path.chmod(0o600)

    async def stop(self) -> None:
        """Unplug everything and remove the boards' sockets."""
        for server in self._servers:
            server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for path in self._ports.values():
            path.unlink(missing_ok=True)

    def _spawn(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        old = self._writers.get(name)
        if old is not None:
            old.close()  # the killed emulator's end
        self._writers[name] = writer
        task = asyncio.get_running_loop().create_task(self._relay(name, reader, writer), name=f"hub {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                while True:
                    header = await reader.readexactly(4)
                    (length,) = struct.unpack(">I", header)
                    if not 0 < length <= MAX_FRAME_BYTES:
                        return
                    self._forward(name, header, await reader.readexactly(length))
        finally:
            writer.close()
            if self._writers.get(name) is writer:
                del self._writers[name]

    def _forward(self, source: str, header: bytes, frame: bytes) -> None:
        destination, sender = frame[:6], frame[6:12]
        self._learned[sender] = source
        known = None if destination[0] & _GROUP_BIT else self._learned.get(destination)
        for name in [known] if known is not None else list(self._writers):
            writer = self._writers.get(name)
            if writer is None or name == source:
                continue
            if writer.transport.get_write_buffer_size() > QUEUE_BYTES:
                self.dropped_frames += 1
                continue
            writer.write(header + frame)
