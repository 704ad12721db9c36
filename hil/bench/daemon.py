"""The bench daemon: one process a bench file, one event loop, the only one who talks to its instruments.

Start: lock the bench and its instruments, finish what a dead run left on, dead-man, consoles, API. End, whatever the
cause: flight over, every output off and verified, links cleared, leases kept. Ends itself after a minute without a
lease and with every output off.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import functools
import logging
import logging.handlers
import os
import queue
import resource
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from hil.bench import leases as lease_module
from hil.bench.account import Account
from hil.bench.boards import Boards
from hil.bench.deadman import Deadman
from hil.bench.exporter import serve_metrics
from hil.bench.fixtures import Fixtures, lease_groups
from hil.bench.heart import Heart
from hil.bench.lease_desk import LeaseDesk
from hil.bench.leased_streams import LeasedStreams
from hil.bench.leases import LeaseStore, boot_clock
from hil.bench.operations import Operations
from hil.bench.sockets import bind_unix
from hil.drivers.prompt import raise_share
from hil.errors import BenchError, ExitCode, HilError, UsageError
from hil.inventory import Bench, load_bench

log = logging.getLogger("hil.daemon")

NICENESS = -10
IDLE_S = 60.0
LOG_BYTES = 4 << 20
DESCRIPTORS = 65536


class Daemon:
    """Its life: start, the tasks that it cannot live without, and the end in the safe state."""

    def __init__(self, bench: Bench, idle_s: float = IDLE_S) -> None:
        self.bench = bench
        self.runtime_dir = bench.runtime_dir
        self.failure: HilError | None = None
        self._idle_s = idle_s
        self._busy_until_s = 0.0
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fixtures = Fixtures(bench)
        self._streams = LeasedStreams(
            lambda board, epoch, token: self.operations.check(board, epoch, token),
            lambda board: self.boards.named(board).wires,
        )
        self.boards = Boards(bench, self._fixtures, self._streams, lambda: self._desk.leases())
        self._heart = Heart(
            lambda: Deadman(self._fixtures.intents.path, log=bench.state_dir / "deadman.log"), self.boards.until_all_off
        )
        self._desk = LeaseDesk(self._open_leases, self.boards, self._spawn, boot_clock)
        self.account = Account(bench, self.boards, self._desk, self._heart, self._busy)
        self.operations = Operations(
            bench, self._fixtures, self.boards, self._desk, self._heart, self._stop, self._busy
        )

    async def run(self) -> ExitCode:
        """Serve until stopped. The exit code says whether the end was orderly."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._signalled, number)
        try:
            await self._start()
            log.info("bench %s is up, pid %d", self.bench.name, os.getpid())
            await self._stop.wait()
        except HilError as error:
            self.failure = error
            log.error("%s", error)
        finally:
            self._stop.set()
            await asyncio.shield(self._safe_state())
        return ExitCode.PASS if self.failure is None else self.failure.exit_code

    async def _start(self) -> None:
        await self._fixtures.take()
        await self._heart.ensure()
        self.boards.make(self._heart)
        self._desk.open()
        for board in self.boards.owners.values():
            if board.console is not None:
                board.console.start()
                path = self.runtime_dir / f"console-{board.name}.sock"
                await board.console.serve(path, functools.partial(self._authorize, board.name))
        await self._streams.serve(self.runtime_dir / "streams.sock")
        server, self.account.metrics_port = await serve_metrics(self.account.exporter, self.bench.file.metrics_port)
        self._spawn(server.serve_forever(), "metrics")
        (self.runtime_dir / "metrics.port").write_text(f"{self.account.metrics_port}\n")
        await self._serve_remote()
        self._busy()
        self._spawn(self._desk.keep(), "leases")
        self._spawn(self._watch_deadman(), "deadman")
        self._spawn(self._watch_idle(), "idle")
        self._spawn(self._serve_api(), "api")

    async def _safe_state(self) -> None:
        """Every output off and verified, links cleared. Each step is tried, whatever the others did."""
        log.info("going to the safe state")
        self._desk.close()
        if self.boards.flight is not None:
            await self._try("ending the flight", self.boards.flight.end("the daemon ends"))
        for board in self.boards.owners.values():
            await self._try(f"letting go of what board {board.name} has armed", board.calm())
            if board.energized:
                await self._try(f"switching board {board.name} off", board.off("the daemon ends"))
            await self._try(f"ending the power loop of board {board.name}", board.rest())
        for link in self._fixtures.links.values():
            await self._try(f"clearing link {link.name}", link.close())
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=3.0)
        await self._try("ending the streams of leases", self._streams.close())
        for board in self.boards.owners.values():
            if board.console is not None:
                await self._try(f"closing the console of {board.name}", board.console.stop())
        for board in self.boards.owners.values():
            await self._try(f"giving back the lines of {board.name}", board.controls.release_all(close=True))
        for supply in self._fixtures.supplies.values():
            await self._try(f"closing {supply.address}", supply.close())
        left = self._fixtures.intents.open_intents()
        if left and self.boards.owners:
            log.error("outputs are not verified off; the dead-man goes on trying: %s", left)
            await self._try("handing over to the dead-man", self._heart.hand_over(left))
            self.failure = self.failure or BenchError("outputs are not verified off")
        else:
            await self._try("stopping the dead-man", self._heart.stop())
        for name in (
            "api.sock",
            "streams.sock",
            "metrics.port",
            *(f"console-{board}.sock" for board in self.boards.owners),
        ):
            (self.runtime_dir / name).unlink(missing_ok=True)
        self._fixtures.let_go()
        log.info("safe state reached" if self.failure is None else f"ended: {self.failure.message}")

    async def _try(self, what: str, step: Awaitable[object]) -> None:
        try:
            await step
        except Exception as error:
            log.error("%s failed: %s", what, error)
            if self.failure is None:
                self.failure = error if isinstance(error, HilError) else BenchError(f"{what} failed: {error!r}")

    def _signalled(self, number: int) -> None:
        log.info("received %s", signal.Signals(number).name)
        self._stop.set()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task the daemon cannot live without: its failure ends the daemon, in the safe state."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("task %s ended", task.get_name(), exc_info=error)
            self.failure = error if isinstance(error, HilError) else BenchError(f"{task.get_name()} ended: {error!r}")
            self._stop.set()

    # --------------------------------------------------------------------------------------------------- what it serves
    async def _serve_api(self) -> None:
        import uvicorn
        from uvicorn.protocols.http.auto import AutoHTTPProtocol

        from hil.bench.api import make_app
        from hil.bench.request_limits import in_time

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # signals are the daemon's: it reaches the safe state before it ends

        config = uvicorn.Config(
            make_app(self.account, self.operations),
            http=in_time(AutoHTTPProtocol),  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=3600,
            timeout_graceful_shutdown=1,
        )
        self._busy()  # a busy host takes seconds up to here, in which nobody could come
        await Server(config).serve(sockets=[bind_unix(self.bench.api_socket)])

    async def _serve_remote(self) -> None:
        """Listen for clients of other hosts, when the bench file says so."""
        wire = self.bench.file.remote
        if wire is None:
            return
        from hil.bench.api import make_app
        from hil.bench.remote import RemoteServer, Users, certificate, fingerprint

        made, key = await asyncio.to_thread(certificate, self.bench.state_dir, self.bench.name)
        remote = RemoteServer(
            make_app(self.account, self.operations), Users(self.bench.state_dir), (made, key), self._stream_socket
        )
        server, port = await remote.start(wire.host, wire.port)
        self.account.remote = {"listen": f"{wire.host}:{port}", "fingerprint": fingerprint(made)}
        log.info("clients of other hosts come in at %s", self.account.remote["listen"])
        self._spawn(server.serve_forever(), "remote")

    def _stream_socket(self, stream: str, name: str) -> Path:
        """Where a stream for clients of other hosts is served on this one."""
        if stream == "console":
            self.operations.console(self.boards.named(name))
            return self.runtime_dir / f"console-{name}.sock"
        if stream == "ssh":
            return self.runtime_dir / "streams.sock"
        raise UsageError(f"no stream {stream!r}", hint="console or ssh")

    def _authorize(self, board: str, token: str) -> None:
        self.operations.held(token, board)

    def _open_leases(self) -> LeaseStore:
        return LeaseStore(
            self.bench.state_dir / "leases.sqlite",
            self.bench.file.boards,
            boot_id=lease_module.host_boot_id(),
            started=lease_module.process_started,
            groups=lease_groups(self.bench),
            removed=self._removed_users(),
        )

    def _removed_users(self) -> Callable[[str], bool]:
        """Says whether a user of another host was removed; looks at the file that `hil bench token` writes."""
        if self.bench.file.remote is None:
            return lambda user: False
        from hil.bench.remote import Users

        users = Users(self.bench.state_dir)

        def removed(user: str) -> bool:
            try:
                return user not in users.list()
            except BenchError:
                return False  # nobody knows: the lease's time to live bounds it

        return removed

    # -------------------------------------------------------------------------------------------------- what it watches
    async def _watch_idle(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._idle_s / 5))
            if (
                self.account.remote is not None  # nobody on another host could start it again
                or self._desk.busy()
                or self.boards.flying
                or any(board.energized for board in self.boards.owners.values())
            ):
                self._busy()
            elif time.monotonic() > self._busy_until_s:
                log.info("idle for %g s", self._idle_s)
                self._stop.set()
                return

    def _busy(self) -> None:
        self._busy_until_s = time.monotonic() + self._idle_s

    async def _watch_deadman(self) -> None:
        while True:
            await self._heart.died()
            log.error("the dead-man died")
            if self.boards.flight is not None and self.boards.flight.state == "running":
                self.boards.flight.event("deadman", {"alive": False})
                self.boards.flight.invalidate("the dead-man process died")
            await self._heart.ensure()
            log.info("a new dead-man watches, pid %s", self._heart.pid)


def serve(bench: Bench, *, idle_s: float = IDLE_S, to_terminal: bool = True) -> int:
    """Run the daemon of `bench` in this process until it is stopped or idle; returns the exit code.

    Raises BenchError when another daemon serves this bench. The log goes to the bench's state directory.
    """
    lock = _lock(bench)
    try:
        log_writer = _log_to(bench.state_dir / "daemon.log", to_terminal)
        # A second without a heartbeat is a dead daemon: a busy host must not make it look like one. Not real time, or
        # whatever it computes would stop the machine.
        raise_share(NICENESS)
        _raise_descriptors()
        try:
            return int(asyncio.run(_main(bench, idle_s)))
        finally:
            log_writer.stop()
    finally:
        os.close(lock)


def _raise_descriptors() -> None:
    """Let it have as many open files as it may: out of them, it could neither watch holders nor reach a supply."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _main(bench: Bench, idle_s: float) -> ExitCode:
    return await Daemon(bench, idle_s).run()


def _lock(bench: Bench) -> int:
    path = bench.runtime_dir / "daemon.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
        os.close(handle)
        raise BenchError(
            f"process {owner or '?'} already serves bench {bench.name}", hint="hil bench status, hil bench stop"
        ) from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def _log_to(path: Path, to_terminal: bool) -> logging.handlers.QueueListener:
    """Log through a thread: a terminal that is held or a slow disk must not stop the event loop. Stop it at the end."""
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
    ]
    if to_terminal:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.basicConfig(
        level=logging.INFO, handlers=[logging.handlers.QueueHandler(lines)], format="%(message)s", force=True
    )
    logging.getLogger("paramiko").setLevel(logging.WARNING)
    writer = logging.handlers.QueueListener(lines, *handlers)
    writer.start()
    return writer


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m hil.bench.daemon BENCH`: how a client starts it."""
    parser = argparse.ArgumentParser(prog="python -m hil.bench.daemon")
    parser.add_argument("bench", type=Path)
    parser.add_argument("--idle-s", type=float, default=IDLE_S)
    arguments = parser.parse_args(argv)
    try:
        return serve(load_bench(arguments.bench), idle_s=arguments.idle_s, to_terminal=False)
    except HilError as error:
        print(error, file=sys.stderr, flush=True)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
