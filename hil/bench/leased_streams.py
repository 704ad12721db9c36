"""Streams that live as long as a lease, on one unix socket of the daemon.

The client's first line is `{"stream": "ssh" or "watch", "board", "token", …}`, ours the answer or `{"error": {…}}`.
`ssh` (`"plane": "mgmt" or "payload"`): raw bytes to and from the SSH port at that plane, or its first jump host, for
clients that cannot reach it themselves. `watch` (`"power_epoch": N or null`): answered as `/check` is, and then silent;
its end says that the answer may be another one now, so that a client need not ask again before every call.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hil.bench.pumps import Pace, pump, until_one_ends
from hil.bench.sockets import bind_unix, describe_error
from hil.drivers import broker
from hil.errors import BenchError, BoardError, HilError, UsageError
from hil.inventory.bench import BenchBoard, JumpHost

log = logging.getLogger("hil.streams")

HANDSHAKE_BYTES = 4096
HANDSHAKE_S = 5.0
DIAL_S = 10.0
DIALS = 32  # at a time, on threads of their own: the others write the daemon's files
SLOT_S = 5.0  # for an earlier dial to the same port of a board
LEFT_TICK_S = 0.1
# Copied on the loop that also regulates power: unbounded, a large file made it half a second late on a busy host.
COPY_BYTES_PER_S = 8 << 20
KINDS = ("ssh", "watch")
Kind = Literal["ssh", "watch"]


@dataclass(frozen=True, slots=True)
class _Open:
    """A stream whose client may go on."""

    kind: str
    board: str
    writer: asyncio.StreamWriter


class LeasedStreams:
    """The server of these streams. On the daemon's loop.

    `check(board, power_epoch, token)` raises HilError for who may not (go on to) drive the board; `wires(board)` are
    the board's.
    """

    def __init__(
        self, check: Callable[[str, int | None, str | None], dict[str, Any]], wires: Callable[[str], BenchBoard]
    ) -> None:
        self._check = check
        self._wires = wires
        self._open: dict[asyncio.Task[Any], _Open] = {}
        self._server: asyncio.Server | None = None
        self._dialers = ThreadPoolExecutor(DIALS, "hil-dial")
        self._slots: dict[tuple[str, str], asyncio.Lock] = {}
        self._pace = Pace(COPY_BYTES_PER_S)

    async def serve(self, path: Path) -> None:
        self._server = await asyncio.start_unix_server(self._client, sock=bind_unix(path), limit=HANDSHAKE_BYTES)

    def end(self, board: str, kind: Kind | None = None) -> None:
        """End the streams of a board at once: its lease is over, or (`watch`) its power was cut."""
        for task, item in tuple(self._open.items()):
            if item.board == board and kind in (None, item.kind):
                item.writer.transport.abort()  # the client's end is the news: it must not wait for the task
                task.cancel()  # which may wait for a board that takes nothing

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._dialers.shutdown(wait=False, cancel_futures=True)
        for board in {item.board for item in self._open.values()}:
            self.end(board)
        if self._open:
            await asyncio.wait(tuple(self._open), timeout=1.0)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream is served by a task")
        try:
            asked = _handshake(await asyncio.wait_for(reader.readline(), HANDSHAKE_S))
            # Known from here on: a lease that ends while we dial must end this, too.
            self._open[task] = _Open(asked["stream"], asked["board"], writer)
            await (self._ssh if asked["stream"] == "ssh" else self._watch)(asked, reader, writer)
        except HilError as error:
            _say(writer, {"error": describe_error(error)})
        except (OSError, TimeoutError, ValueError):
            pass  # not one of our clients, or it went away
        except asyncio.CancelledError:
            writer.transport.abort()  # `end`: asyncio would log a cancelled handler as an error
        finally:
            self._open.pop(task, None)
            writer.close()

    async def _watch(self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _say(writer, self._check(asked["board"], asked.get("power_epoch"), asked["token"]))
        await reader.read(1)  # until it leaves, or we end it

    async def _ssh(self, asked: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def allowed() -> None:
            self._check(asked["board"], None, asked["token"])

        allowed()
        sock = await _while_there(reader, self._dial(asked["board"], str(asked.get("plane"))))
        far_reader, far_writer = await asyncio.open_connection(sock=sock)
        try:
            allowed()
            _say(writer, {})
            log.info("a stream to the %s port of board %s begins", asked["plane"], asked["board"])
            await until_one_ends(
                pump(reader, far_writer, allowed, self._pace), pump(far_reader, writer, pace=self._pace)
            )
        finally:
            far_writer.transport.abort()

    async def _dial(self, board: str, plane: str) -> socket.socket:
        wires = self._wires(board)
        wire = {"mgmt": wires.mgmt, "payload": wires.payload}.get(plane)
        if wire is None:
            raise UsageError(f"board {board} has no {plane} port", hint=f"add `{plane}:` to the bench file")
        first: JumpHost = wire.jump[0] if wire.jump else wire
        through = wires.payload.broker if plane == "payload" and wires.payload is not None else None
        slot = self._slots.setdefault((board, plane), asyncio.Lock())
        try:
            async with asyncio.timeout(SLOT_S):
                await slot.acquire()
        except TimeoutError:
            raise BenchError(
                f"board {board}: another connection to its {plane} port is still being made", hint="try again"
            ) from None
        dial = asyncio.get_running_loop().run_in_executor(
            self._dialers, broker.connect, through, first.address, first.port, DIAL_S
        )
        dial.add_done_callback(lambda _: slot.release())  # also of one that nobody waits for any more
        try:
            sock = await asyncio.shield(dial)
        except OSError as error:
            where = f"{first.address} port {first.port}"
            raise BoardError(f"board {board}: nothing answers at {where}: {error.strerror or error}") from error
        except asyncio.CancelledError:
            dial.add_done_callback(_hang_up)
            raise
        sock.setblocking(False)
        return sock


async def _while_there(reader: asyncio.StreamReader, work: Coroutine[Any, Any, socket.socket]) -> socket.socket:
    """The work's result; cancelled when the client leaves meanwhile (ConnectionError)."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait((task,), timeout=LEFT_TICK_S)
            if reader.at_eof() and not task.done():
                raise ConnectionError("the client left")
        return task.result()
    finally:
        task.cancel()


def _hang_up(dial: asyncio.Future[socket.socket]) -> None:
    if not dial.cancelled() and dial.exception() is None:
        dial.result().close()


def _handshake(line: bytes) -> dict[str, Any]:
    asked = json.loads(line)
    if not isinstance(asked, dict) or asked.get("stream") not in KINDS:
        raise UsageError(f"a stream begins with a line that says which: {' or '.join(KINDS)}")
    epoch = asked.get("power_epoch")
    if not isinstance(asked.get("board"), str) or not isinstance(asked.get("token"), str):
        raise UsageError(f"a {asked['stream']} stream wants the board's name and the lease's token")
    if not (epoch is None or type(epoch) is int):
        raise UsageError("power_epoch is a number or null")
    return asked


def _say(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
