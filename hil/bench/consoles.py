"""Serial consoles: one reader a port, logged from the first byte on, read by many and written under a lease.

The port may appear after the daemon and vanish at any moment (a virtual board's pseudo terminal, a USB adapter, a
terminal server): it is opened again as soon as it is there. Opening never flushes: what the board said before is still
in the driver's queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hil.bench.console_reader import PortReader, Watched
from hil.bench.pumps import until_one_ends
from hil.bench.sockets import bind_unix, describe_error
from hil.drivers.serial_port import LineSettings, check_settings, open_port, parse_port
from hil.errors import BenchError, HilError, UsageError

READ_BYTES = 4096
RING_BYTES = 1 << 20
REOPEN_S = 0.1
DIAL_S = 5.0
WRITE_S = 2.0
HANDSHAKE_BYTES = 4096
HANDSHAKE_S = 5.0


@dataclass(slots=True)
class LineIndex:
    """Cuts a byte stream into lines: when the first byte of each came, where it starts, how long it is.

    `feed` returns the lines that a chunk ended; lengths include the line feed.
    """

    offset: int = 0
    _start: int = 0
    _since_s: float | None = None

    def feed(self, data: bytes, now_s: float) -> list[tuple[float, int, int]]:
        lines: list[tuple[float, int, int]] = []
        base, position = self.offset, 0
        while (end := data.find(b"\n", position) + 1) > 0:
            since = now_s if self._since_s is None else self._since_s
            lines.append((since, self._start, base + end - self._start))
            self._start, self._since_s, position = base + end, None, end
        self.offset = base + len(data)
        if position < len(data) and self._since_s is None:
            self._since_s = now_s
        return lines

    def rest(self) -> list[tuple[float, int, int]]:
        """The unfinished line, when there is one (a login prompt has no line feed)."""
        if self._since_s is None:
            return []
        return [(self._since_s, self._start, self.offset - self._start)]


class ConsoleLog:
    """`<board>.log` with the raw bytes and `<board>.lines.jsonl` with t_mono, offset and length of each line."""

    def __init__(self, directory: Path, board: str) -> None:
        self.path = directory / f"{board}.log"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._raw = self.path.open("ab", buffering=0)
            self._lines = (directory / f"{board}.lines.jsonl").open("ab", buffering=0)
        except OSError as error:
            raise _log_failed(self.path, error) from error
        self._index = LineIndex(offset=self._raw.tell(), _start=self._raw.tell())

    def write(self, data: bytes, now_s: float) -> None:
        """Append; raises BenchError when the disk refuses."""
        try:
            if self._raw.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._write_lines(self._index.feed(data, now_s))
        except OSError as error:
            raise _log_failed(self.path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._write_lines(self._index.rest())
        self._raw.close()
        self._lines.close()

    def _write_lines(self, lines: list[tuple[float, int, int]]) -> None:
        if lines:
            text = "".join(f'{{"t_mono":{t:.6f},"offset":{offset},"length":{n}}}\n' for t, offset, n in lines)
            self._lines.write(text.encode())


@dataclass(slots=True)
class Ring:
    """The newest bytes of a stream, addressed by their offset since the stream began."""

    limit: int = RING_BYTES
    end: int = 0
    _data: bytearray = field(default_factory=bytearray)

    @property
    def start(self) -> int:
        return self.end - len(self._data)

    def append(self, data: bytes) -> None:
        self._data += data
        self.end += len(data)
        # Cut only when twice as long as promised: deleting from the front copies what stays.
        if len(self._data) > 2 * self.limit:
            del self._data[: len(self._data) - self.limit]

    def since(self, offset: int, limit: int = RING_BYTES) -> tuple[int, bytes]:
        """(offset of the first byte returned, bytes). A start above `offset` means that bytes in between are gone."""
        start = min(max(offset, self.start), self.end)
        index = start - self.start
        return start, bytes(self._data[index : index + limit])


class Console:
    """The one reader of a board's console. Lives on one event loop; `start` and `stop` from there.

    `on_error` is told once when a log cannot be written any more (the run is then invalid); reading goes on.
    """

    def __init__(
        self,
        board: str,
        address: str,
        settings: LineSettings | int,
        log_directory: Path,
        *,
        on_error: Callable[[BenchError], None],
        reader: PortReader | None = None,
        ring_bytes: int = RING_BYTES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`address`: see `hil.drivers.serial_port`; `settings`: a number is a baud rate; `reader`: shared by all."""
        self._settings = LineSettings(baud=settings) if isinstance(settings, int) else settings
        try:
            self._over_network = parse_port(address).kind in ("tcp", "rfc2217")
            check_settings(self._settings)
        except UsageError as error:
            raise UsageError(f"console of board {board}: {error.message}", hint=error.hint) from None
        self.board = board
        self.address = address
        self.ring = Ring(ring_bytes)
        self._logs: list[ConsoleLog] = [ConsoleLog(log_directory, board)]
        self._on_error = on_error
        self._monotonic = monotonic
        self._reader = reader or PortReader()
        self._line: Watched | None = None
        self._task: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._waiters: set[asyncio.Future[None]] = set()
        self._write_lock = asyncio.Lock()
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self.reason = "not opened yet"

    @property
    def connected(self) -> bool:
        return self._line is not None

    @property
    def last_line(self) -> str:
        """The newest non-empty line, for people."""
        _, tail = self.ring.since(self.ring.end - 400)
        lines = [line for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""

    def start(self) -> None:
        """Open the port as soon as it is there, for ever."""
        self._task = asyncio.get_running_loop().create_task(self._keep_open(), name=f"console-{self.board}")

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        # Their streams end at once; each handler then finishes by itself.
        for writer in self._clients.values():
            writer.transport.abort()
        if self._clients:
            await asyncio.wait(tuple(self._clients))
        self._close()
        for log in self._logs:
            log.close()
        self._logs.clear()

    def add_log(self, directory: Path) -> ConsoleLog:
        """Also log to `directory` from the next byte on."""
        log = ConsoleLog(directory, self.board)
        self._logs.append(log)
        return log

    def remove_log(self, log: ConsoleLog) -> None:
        if log in self._logs:
            self._logs.remove(log)
            log.close()

    async def wait_beyond(self, offset: int, timeout_s: float | None) -> bool:
        """True when the stream is longer than `offset`; False after `timeout_s` without."""
        if self.ring.end > offset:
            return True
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
        return True

    async def write(self, data: bytes) -> None:
        """Write to the board. Raises BenchError when the port is not there or takes nothing for `WRITE_S`."""
        async with self._write_lock:
            while data:
                line = self._line
                if line is None:
                    raise BenchError(f"console of board {self.board}: {self.address} is not there: {self.reason}")
                try:
                    taken = line.port.write(data)
                except OSError as error:
                    self._gone(error)
                    continue
                self._reader.hurry(line)
                data = data[taken:]
                if data and taken == 0 and not await self._writable(line.port.fileno()):
                    raise BenchError(
                        f"console of board {self.board}: {self.address} takes no bytes, {len(data)} are left"
                    )

    async def serve(self, path: Path, authorize: Callable[[str], None]) -> None:
        """Offer the raw byte stream on a unix socket; `authorize` raises HilError for a token that may not write.

        The client's first line is `{"token": …|null, "since": N|null}`; ours is `{"offset": N}` or `{"error": {…}}`;
        then raw bytes both ways. A reader that falls behind by more than the ring is disconnected, and sees at its
        next `since` that bytes are gone.
        """
        self._server = await asyncio.start_unix_server(
            lambda reader, writer: self._client(reader, writer, authorize),
            sock=bind_unix(path),
            limit=HANDSHAKE_BYTES,
        )

    async def _client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, authorize: Callable[[str], None]
    ) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._clients[task] = writer
        try:
            token, since = _handshake(await asyncio.wait_for(reader.readline(), HANDSHAKE_S))
            if token is not None:
                authorize(token)
        except HilError as error:
            writer.write(json.dumps({"error": describe_error(error)}).encode() + b"\n")
        except (OSError, TimeoutError, ValueError):
            pass  # not one of our clients, or it went away
        else:
            await self._stream(reader, writer, token, since, authorize)
        finally:
            if task is not None:
                del self._clients[task]
            writer.close()

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        token: str | None,
        since: int | None,
        authorize: Callable[[str], None],
    ) -> None:
        offset = self.ring.end if since is None else self.ring.since(since, 0)[0]
        writer.write(json.dumps({"offset": offset}).encode() + b"\n")
        # Whichever ends first ends the stream: the client left, fell behind, or lost its lease while writing.
        await until_one_ends(self._pump_out(writer, offset), self._pump_in(reader, token, authorize))

    async def _pump_out(self, writer: asyncio.StreamWriter, offset: int) -> None:
        while True:
            await self.wait_beyond(offset, None)
            start, data = self.ring.since(offset, 1 << 16)
            if start != offset:
                raise ConnectionError("the reader fell behind")
            writer.write(data)
            await writer.drain()
            offset += len(data)

    async def _pump_in(self, reader: asyncio.StreamReader, token: str | None, authorize: Callable[[str], None]) -> None:
        while data := await reader.read(READ_BYTES):
            if token is None:
                raise BenchError("a reader without a token may not write")
            authorize(token)  # the lease may have ended since the last bytes
            await self.write(data)

    async def _keep_open(self) -> None:
        while True:
            try:
                if self._over_network:
                    port = await asyncio.to_thread(open_port, self.address, self._settings, DIAL_S)
                else:
                    port = open_port(self.address, self._settings)
            except OSError as error:
                self.reason = error.strerror or str(error)
                await asyncio.sleep(REOPEN_S)
                continue
            self._lost.clear()
            self._line = self._reader.add(port, self._received, self._gone)
            await self._lost.wait()
            await asyncio.sleep(REOPEN_S)

    def _received(self, data: bytes) -> None:
        now_s = self._monotonic()
        for log in tuple(self._logs):
            try:
                log.write(data, now_s)
            except BenchError as error:
                self._logs.remove(log)
                log.close()
                self._on_error(error)
        self.ring.append(data)
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _gone(self, error: OSError) -> None:
        self.reason = error.strerror or str(error) or "closed"
        self._close()
        self._lost.set()

    def _close(self) -> None:
        if self._line is not None:
            number = self._line.port.fileno()
            self._reader.remove(self._line)
            asyncio.get_running_loop().remove_writer(number)
            self._line.port.close()
            self._line = None

    async def _writable(self, fd: int) -> bool:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(fd, lambda: None if ready.done() else ready.set_result(None))
        try:
            # Bounded: a port that is lost meanwhile is closed and will never turn writable.
            await asyncio.wait_for(ready, WRITE_S)
        except TimeoutError:
            return False
        finally:
            if self._line is not None and self._line.port.fileno() == fd:
                loop.remove_writer(fd)
        return True


def _handshake(line: bytes) -> tuple[str | None, int | None]:
    try:
        asked: Any = json.loads(line)
        token, since = asked.get("token"), asked.get("since")
    except (ValueError, AttributeError):
        raise UsageError('the console stream begins with a line {"token": …, "since": …}') from None
    if not (token is None or isinstance(token, str)) or not (since is None or (type(since) is int and since >= 0)):
        raise UsageError("the console stream wants a token (text or null) and since (a byte offset or null)")
    return token, since


def _log_failed(path: Path, error: OSError) -> BenchError:
    return BenchError(
        f"cannot write console log {path}: {error.strerror}", hint="free disk space; the log is incomplete from here on"
    )
