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
import hashlib
import json
import logging
import logging.handlers
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hil
from hil.bench import leases as lease_module
from hil.bench.board import BoardOwner, Channel
from hil.bench.console_reader import PortReader
from hil.bench.consoles import Console
from hil.bench.crosscheck import CrossCheck, cross_check
from hil.bench.cutpoint import ArmedCut, CutPoint
from hil.bench.deadman import ArmedOutput, Deadman
from hil.bench.doctor import examine
from hil.bench.exporter import BenchMetrics, Exporter, serve_metrics
from hil.bench.flight import FlightControl
from hil.bench.journal import utc_text
from hil.bench.lease_desk import LeaseDesk, Request, Waiter
from hil.bench.leased_streams import LeasedStreams
from hil.bench.leases import Ended, Lease, LeaseStore, boot_clock
from hil.bench.levels import CutTimes, Layers, SupplyWatchdog
from hil.bench.links import link_driver
from hil.bench.pacing import Pacing
from hil.bench.player import LinkOwner
from hil.bench.powerfaults import LatchUpLimits
from hil.bench.powervalues import PowerSample
from hil.bench.safety import Envelope, InstrumentLock, Intent, IntentJournal, finish_leftovers
from hil.bench.shutdown import shut_down
from hil.bench.sockets import bind_unix
from hil.drivers.dialects import dialect
from hil.drivers.scpi import ScpiSupply
from hil.drivers.serial_port import LineSettings
from hil.errors import BenchError, ExitCode, HilError, SafetyError, UsageError
from hil.inventory import Bench, load_bench
from hil.inventory.bench import ConsoleWire, PowerWire, ShutdownThenOff
from hil.inventory.board_type import BoardType
from hil.model import Direction, LinkState, Setpoint

if TYPE_CHECKING:
    from hil.bench.api import ClockBody, FlightBody, LatchUpBody, LeaseBody

log = logging.getLogger("hil.daemon")

NICE = -10
IDLE_S = 60.0
LOG_BYTES = 4 << 20
OFF_S = 15.0
# Of a lease; `id` is told as `lease`, and what names its process for good is nobody's business.
PUBLIC = tuple(field.name for field in fields(Lease) if field.name not in ("id", "pid_start"))


class Heart:
    """The dead-man of the moment: a new one takes the place of one that died, once no output hangs on it.

    `until_off` returns when every output is verified off, SafetyError when that does not come about.
    """

    def __init__(self, make: Callable[[], Deadman], until_off: Callable[[], Awaitable[None]]) -> None:
        self._make = make
        self._until_off = until_off
        self._deadman: Deadman | None = None
        self._starting = asyncio.Lock()

    @property
    def armed(self) -> bool:
        return self._deadman is not None and self._deadman.armed

    @property
    def alive(self) -> bool:
        return self._deadman is not None and self._deadman.alive

    @property
    def pid(self) -> int | None:
        return self._deadman.pid if self._deadman is not None and self._deadman.alive else None

    def beat(self, source: str) -> None:
        if self._deadman is not None:
            self._deadman.beat(source)

    async def arm(self, output: ArmedOutput) -> None:
        await self._need().arm(output)

    async def disarm(self, intent: Intent) -> None:
        await self._need().disarm(intent)

    async def ensure(self) -> None:
        """Start a dead-man unless one lives. Raises SafetyError when it does not come up."""
        async with self._starting:
            if not self.alive:
                # With a new one at hand the power loops would not notice that nobody watches what is on.
                await self._until_off()
                await self._replace()

    async def hand_over(self, left: Sequence[Intent]) -> None:
        """Have a dead-man go on trying to switch these off when this process is gone."""
        async with self._starting:
            if not self.alive:
                await self._replace()
        for intent in left:
            await self.arm(ArmedOutput("leftover", intent))

    async def _replace(self) -> None:
        if self._deadman is not None:
            await self._deadman.kill()
        self._deadman = self._make()
        await self._deadman.start()

    async def died(self) -> None:
        """Return when the present dead-man has died."""
        await self._need().dead.wait()

    async def stop(self) -> None:
        """Let it end. Only with every output verified off."""
        if self._deadman is not None:
            await self._deadman.stop()

    def _need(self) -> Deadman:
        if self._deadman is None:
            raise BenchError("the dead-man was not started")
        return self._deadman


class Daemon:
    """Everything the API calls. Its methods return plain values for JSON and raise HilError."""

    def __init__(self, bench: Bench, idle_s: float = IDLE_S) -> None:
        self.bench = bench
        self.state_dir = bench.state_dir
        self.runtime_dir = bench.runtime_dir
        self.exporter = Exporter(self._metrics)
        self.boards: dict[str, BoardOwner] = {}
        self.flight: FlightControl | None = None
        self.failure: HilError | None = None
        self._idle_s = idle_s
        self._busy_until_s = 0.0
        self._digest = hashlib.sha256(bench.path.read_bytes()).hexdigest()
        self._started_s = time.time()
        self._metrics_port = 0
        self._remote: dict[str, str] | None = None
        self._stop = asyncio.Event()
        self._flight_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._locks = [InstrumentLock(address) for address in _addresses(bench)]
        self._intents = IntentJournal(self.state_dir / "intent.jsonl")
        self._console_reader = PortReader()
        self._heart = Heart(
            lambda: Deadman(self._intents.path, log=self.state_dir / "deadman.log"), self._until_all_off
        )
        self._supplies = {name: ScpiSupply(wire.dialect, wire.address) for name, wire in bench.file.supplies.items()}
        self._pacing = Pacing()
        self._watchdogs = {
            name: SupplyWatchdog(self._supplies[name], wire.watchdog_s) for name, wire in bench.file.supplies.items()
        }
        self.cut_times = CutTimes(self.state_dir / "time-to-off.json")
        self._links = {
            name: LinkOwner(name, link_driver(name, bench.file.links[name]), self.state_dir / f"link-{name}.touched")
            for name in bench.file.links
        }
        self._desk = LeaseDesk(self._open_leases, _LeasedBoards(self), self._spawn, boot_clock)
        self._streams = LeasedStreams(self.check, lambda name: self._board(name).wires)

    # --------------------------------------------------------------------------------------------- its life
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

    def request_stop(self, force: bool) -> None:
        """Stop soon. Refused while boards are leased, unless `force`."""
        held = self._desk.leases()
        if held and not force:
            raise BenchError(
                "; ".join(f"{', '.join(item.boards)} leased by {item.holder}" for item in held),
                hint="release the leases, or stop with --force: the boards are switched off",
            )
        asyncio.get_running_loop().call_later(0.05, self._stop.set)  # after this answer has left

    async def _start(self) -> None:
        for lock in self._locks:
            lock.acquire()
        for left in await asyncio.to_thread(finish_leftovers, self._intents):
            log.warning("switched off a leftover of a dead run: %s", left)
        for link in self._links.values():
            if link.touched:
                log.warning("clearing link %s, left by a dead run", link.name)
                # One that does not answer must not keep the boards from being switched: whoever leases one is told.
                with contextlib.suppress(BenchError):
                    await link.clear()
        await self._heart.ensure()
        for name in self.bench.file.boards:
            self.boards[name] = self._make_board(name)
        self._desk.open()
        for board in self.boards.values():
            if board.console is not None:
                board.console.start()
                path = self.runtime_dir / f"console-{board.name}.sock"
                await board.console.serve(path, functools.partial(self._authorize, board.name))
        await self._streams.serve(self.runtime_dir / "streams.sock")
        server, self._metrics_port = await serve_metrics(self.exporter, self.bench.file.metrics_port)
        self._spawn(server.serve_forever(), "metrics")
        (self.runtime_dir / "metrics.port").write_text(f"{self._metrics_port}\n")
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
        if self.flight is not None:
            await self._try("ending the flight", self.flight.end("the daemon ends"))
        for board in self.boards.values():
            await self._try(f"letting go of what board {board.name} has armed", board.calm())
            if board.energized:
                await self._try(f"switching board {board.name} off", board.off("the daemon ends"))
            await self._try(f"ending the power loop of board {board.name}", board.rest())
        for link in self._links.values():
            await self._try(f"clearing link {link.name}", link.close())
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=3.0)
        await self._try("ending the streams of leases", self._streams.close())
        for board in self.boards.values():
            if board.console is not None:
                await self._try(f"closing the console of {board.name}", board.console.stop())
        for board in self.boards.values():
            await self._try(f"giving back the lines of {board.name}", board.controls.release_all(close=True))
        for supply in self._supplies.values():
            await self._try(f"closing {supply.address}", supply.close())
        left = self._intents.open_intents()
        if left and self.boards:
            log.error("outputs are not verified off; the dead-man goes on trying: %s", left)
            await self._try("handing over to the dead-man", self._heart.hand_over(left))
            self.failure = self.failure or BenchError("outputs are not verified off")
        else:
            await self._try("stopping the dead-man", self._heart.stop())
        for name in ("api.sock", "streams.sock", "metrics.port", *(f"console-{board}.sock" for board in self.boards)):
            (self.runtime_dir / name).unlink(missing_ok=True)
        for lock in self._locks:
            lock.release()
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

    async def _serve_api(self) -> None:
        import uvicorn

        from hil.bench.api import make_app

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # signals are the daemon's: it reaches the safe state before it ends

        config = uvicorn.Config(
            make_app(self),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=3600,
            timeout_graceful_shutdown=1,
        )
        await Server(config).serve(sockets=[bind_unix(self.bench.api_socket)])

    async def _serve_remote(self) -> None:
        """Listen for clients of other hosts, when the bench file says so."""
        wire = self.bench.file.remote
        if wire is None:
            return
        from hil.bench.api import make_app
        from hil.bench.remote import RemoteServer, Users, certificate, fingerprint

        made, key = await asyncio.to_thread(certificate, self.state_dir, self.bench.name)
        remote = RemoteServer(make_app(self), Users(self.state_dir), (made, key), self._stream_socket)
        server, port = await remote.start(wire.host, wire.port)
        self._remote = {"listen": f"{wire.host}:{port}", "fingerprint": fingerprint(made)}
        log.info("clients of other hosts come in at %s", self._remote["listen"])
        self._spawn(server.serve_forever(), "remote")

    def _stream_socket(self, stream: str, name: str) -> Path:
        """Where a stream for clients of other hosts is served on this one."""
        if stream == "console":
            self._console(self._board(name))
            return self.runtime_dir / f"console-{name}.sock"
        if stream == "ssh":
            return self.runtime_dir / "streams.sock"
        raise UsageError(f"no stream {stream!r}", hint="console or ssh")

    async def _watch_idle(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._idle_s / 5))
            if (
                self._remote is not None  # nobody on another host could start it again
                or self._desk.busy()
                or (self.flight is not None and self.flight.state != "ended")
                or any(board.energized for board in self.boards.values())
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
            if self.flight is not None and self.flight.state == "running":
                self.flight.event("deadman", {"alive": False})
                self.flight.invalidate("the dead-man process died")
            await self._heart.ensure()
            log.info("a new dead-man watches, pid %s", self._heart.pid)

    async def _until_all_off(self) -> None:
        """Return when every output is verified off: the power loops see to it at their next tick."""
        try:
            async with asyncio.timeout(OFF_S):
                await asyncio.gather(*(board.until_off() for board in self.boards.values()))
        except TimeoutError:
            raise SafetyError(
                f"the dead-man died and outputs are not verified off within {OFF_S:g} s",
                hint="the bench daemon ends, and a new dead-man goes on trying",
            ) from None

    # --------------------------------------------------------------------------------------------- its boards
    def _make_board(self, name: str) -> BoardOwner:
        _, wires, board_type = self.bench.board(name)
        console = None
        if wires.console is not None:
            console = Console(
                name,
                wires.console.port,
                _line_settings(wires.console),
                self.state_dir / "console",
                on_error=lambda error: self._console_failed(name, error),
                reader=self._console_reader,
            )
        channels = tuple(self._make_channel(name, board_type, wire) for wire in wires.power)
        return BoardOwner(
            name,
            wires,
            board_type,
            channels,
            console,
            None if wires.payload is None else self._links[wires.payload.link],
            self._intents,
            self._heart,
            on_event=self._board_event,
            on_sample=self._board_sample,
            on_failure=self._board_failure,
            on_cut=lambda board: self._streams.end(board.name, "watch"),
            # Rises over restarts too: the end of a daemon is a power cut that nobody was left to count.
            first_epoch=int(boot_clock() * 1000),
        )

    def _make_channel(self, board: str, board_type: BoardType, wire: PowerWire) -> Channel:
        supply, limits = self.bench.file.supplies[wire.supply], board_type.limits(wire.rail)
        outlet = wire.outlet or supply.outlet or ""
        intent = Intent(board, supply.address, supply.dialect, wire.channel, limits.off_voltage_v, outlet)
        return Channel(
            supply=self._supplies[wire.supply],
            number=wire.channel,
            intent=intent,
            on_delay_s=wire.on_delay_s,
            envelope=Envelope.of(limits),
            nominal=Setpoint(limits.voltage_nominal_v, limits.current_max_a),
            layers=Layers(outlet, self._watchdogs[wire.supply], supply.accept_level),
            main=wire.on_bus,
            pacing=self._pacing,
            meter=self._make_meter(board) if wire.rail is None else None,
            rail=wire.rail or "",
            converter_efficiency=wire.converter_efficiency,
        )

    def _make_meter(self, board: str) -> CrossCheck | None:
        wires = self.bench.file.boards[board]
        if wires.meter is None:
            return None
        return cross_check(wires.meter, self._supplies.get(wires.meter.supply or ""), wires.mgmt)

    def _flight_of(self, board: BoardOwner) -> FlightControl | None:
        flight = self.flight
        return flight if flight is not None and flight.board is board and flight.state != "ended" else None

    def _board_event(self, board: BoardOwner, kind: str, data: dict[str, Any]) -> None:
        flight = self._flight_of(board)
        if flight is not None:
            flight.told(kind, data)

    def _board_sample(self, board: BoardOwner, sample: PowerSample) -> None:
        flight = self._flight_of(board)
        board.count_energy(sample, "none" if flight is None else flight.phase)
        if flight is not None:
            flight.sampled(sample)

    def _board_failure(self, board: BoardOwner, error: BaseException) -> None:
        flight = self._flight_of(board)
        if flight is not None:
            flight.fail(error if isinstance(error, HilError) else BenchError(f"the power loop ended: {error!r}"))

    def _console_failed(self, name: str, error: BenchError) -> None:
        log.error("%s", error)
        flight = self._flight_of(self.boards[name])
        if flight is not None:
            flight.fail(error)

    def _board(self, name: str) -> BoardOwner:
        if name not in self.boards:
            raise UsageError(
                f"bench {self.bench.name} has no board {name!r}", hint=f"its boards: {', '.join(self.boards)}"
            )
        return self.boards[name]

    def _need(self, token: str | None, name: str) -> BoardOwner:
        """The board, when `token` holds it now."""
        board = self._board(name)
        self._desk.check(token, name)
        return board

    def _may_drive(self, token: str | None, name: str) -> BoardOwner:
        """As `_need`, for what would switch something on: not any more once the daemon is on its way down."""
        if self._stop.is_set():
            raise BenchError("the bench daemon is ending", hint="the next command starts it again")
        return self._need(token, name)

    def _authorize(self, name: str, token: str) -> None:
        self._need(token, name)

    async def switch_power(self, name: str, action: str, voltage_v: float | None, token: str | None) -> dict[str, Any]:
        board = self._need(token, name)
        if action == "off":
            return await board.off("requested")
        await self._heart.ensure()
        return await board.on(voltage_v, lambda: self._may_drive(token, name), cycle=action == "cycle")

    # ------------------------------------------------------------------------------ what is done to a board on purpose
    async def brown_out(self, name: str, depth_v: float, duration_s: float, token: str | None) -> dict[str, Any]:
        return await self._need(token, name).brown_out(depth_v, duration_s, lambda: self._may_drive(token, name))

    async def latch_up(self, name: str, body: LatchUpBody, token: str | None) -> dict[str, Any]:
        limits = LatchUpLimits(body.threshold_a, body.hold_s, body.added_a)
        board = self._need(token, name)
        await self._heart.ensure()
        return await board.latch_up(limits, body.off_s, body.wait_s, lambda: self._may_drive(token, name))

    async def arm_cut(self, name: str, point: CutPoint, token: str | None) -> dict[str, Any]:
        cut = self._need(token, name).arm_cut(point, lambda: self._need(token, name))
        return asdict(cut.report)

    async def read_cut(self, name: str, wait_s: float) -> dict[str, Any]:
        return await self._cut(name).wait(wait_s)

    async def disarm_cut(self, name: str, token: str | None) -> dict[str, Any]:
        self._need(token, name)
        return await self._cut(name).disarm()

    def _cut(self, name: str) -> ArmedCut:
        cut = self._board(name).cut
        if cut is None:
            raise UsageError(f"board {name} has no cut point armed")
        return cut

    def read_lines(self, name: str) -> dict[str, Any]:
        return self._board(name).controls.state()

    async def drive_line(self, name: str, line: str, action: str, hold_s: float, token: str | None) -> dict[str, Any]:
        controls = self._may_drive(token, name).controls
        if action == "press":
            await controls.press(line, hold_s)
        else:
            await controls.set(line, action == "hold")
        return controls.state()

    async def outlet(self, name: str, on: bool | None, token: str | None) -> dict[str, Any]:
        board = self._board(name) if on is None else self._may_drive(token, name)
        return await board.outlet(on)

    def check(self, name: str, power_epoch: int | None, token: str | None) -> dict[str, Any]:
        """Whether a client may go on with the board: it has the lease and knows of every power cut."""
        board = self._need(token, name)
        board.check_epoch(power_epoch)
        return {"power_epoch": board.power_epoch}

    async def read_power(self, name: str) -> dict[str, Any]:
        return await self._board(name).read()

    def read_link(self, name: str) -> dict[str, Any]:
        return self._board(name).link_state()

    async def set_link(self, name: str, states: dict[Direction, LinkState] | None, token: str | None) -> dict[str, Any]:
        board = self._need(token, name)
        board.need_link()
        flight = self.flight
        if flight is not None and flight.state != "ended" and flight.board.link is board.link:
            raise BenchError(
                f"the link of board {name} belongs to the flight of board {flight.board.name}",
                hint="end the flight first",
            )
        return await board.set_link(states)

    async def read_console(self, name: str, since: int, wait_s: float) -> tuple[int, bytes]:
        console = self._console(self._board(name))
        await console.wait_beyond(since, wait_s)
        return console.ring.since(since)

    async def write_console(self, name: str, data: bytes, token: str | None) -> dict[str, Any]:
        await self._console(self._need(token, name)).write(data)
        return {"written": len(data)}

    def _console(self, board: BoardOwner) -> Console:
        if board.console is None:
            raise UsageError(f"board {board.name} has no console", hint="add `console:` to the bench file")
        return board.console

    # --------------------------------------------------------------------------------------------- its leases
    async def acquire(
        self, body: LeaseBody, user: str | None, disconnected: Callable[[], Awaitable[bool]]
    ) -> dict[str, Any]:
        """Grant, or wait in line for at most `wait_s`. `user`: who it is on another host; None on this one."""
        self._busy()
        began_s = time.monotonic()
        request = Request(
            alternatives=tuple(tuple(dict.fromkeys(boards)) for boards in (body.any_of or [body.boards])),
            holder=body.holder if user is None else f"{user}: {body.holder}",
            user=body.user if user is None else f"{user} over TLS",
            pid=body.pid if user is None else None,  # a process of another host cannot be watched: only its TTL ends it
            ttl_s=body.ttl_s,
            wait_s=body.wait_s,
            priority=body.priority,
            preempt=body.preempt,
            reason=body.reason,
        )
        lease, token = await self._desk.acquire(request, disconnected)
        if time.monotonic() - began_s > 1.0 and await disconnected():
            await self._desk.release(lease.id, token)
            raise BenchError("the client that waited for the lease is gone")
        return {"lease": lease.id, "token": token, **_public(lease)}

    async def renew(self, lease_id: str, token: str | None) -> dict[str, Any]:
        return _public(self._desk.renew(lease_id, token))

    async def release(self, lease_id: str, token: str | None) -> dict[str, Any]:
        """End a lease; returns when its boards are in their `on_lease_end` state."""
        await self._desk.release(lease_id, token)
        return {"released": lease_id}

    def list_leases(self) -> list[dict[str, Any]]:
        """Who holds what, since when, until when unless renewed."""
        now_s = boot_clock()
        return [
            {
                "lease": item.id,
                **_public(item),
                "since": _utc(item.acquired_s),
                "until": _utc(item.expires_s),
                "left_s": item.expires_s - now_s,
            }
            for item in self._desk.leases()
        ]

    def list_waiting(self) -> list[dict[str, Any]]:
        """Who waits for what since when, and why, in the order in which they are served."""
        return [_waiting(waiter, why) for waiter, why in self._desk.waiting()]

    def flash(self, name: str, grace_s: float | None, token: str | None) -> dict[str, Any]:
        """Begin a flash section, or end it with `grace_s` None."""
        self._board(name)
        if grace_s is None:
            self._desk.end_flash(name, token)
        else:
            self._desk.begin_flash(name, token, grace_s)
        return {"flashing": self._desk.flashing(name) is not None}

    async def end_lease(self, ended: Ended) -> None:
        """Bring a board whose lease ended to its `on_lease_end` state."""
        board = self.boards.get(ended.board)
        if board is None:
            return  # the bench file no longer names it
        self._streams.end(board.name)
        await board.calm()
        policy = board.wires.on_lease_end
        if isinstance(policy, ShutdownThenOff) and board.state == "on":
            how = await shut_down(board, policy.shutdown_then_off.timeout_s)
            log.info("board %s: %s", board.name, how)
            self._board_event(board, "shutdown", {"how": how})
        flight = self._flight_of(board)
        if flight is not None:
            flight.invalidate(f"the lease ended: {ended.cause}")
            await flight.end(f"lease {ended.cause}")
        shared = self._link_in_use(board)
        if policy == "hold" and board.state == "on":
            if not shared:
                await board.hold()
            return
        if board.energized or board.state != "off":
            await board.off(f"lease {ended.cause}")
        await board.rest()
        if board.link is not None and not shared:
            await board.link.clear()

    async def make_ready(self, names: Sequence[str]) -> None:
        """Prepare boards for a new holder."""
        for name in names:
            board = self.boards[name]
            if not board.energized:
                board.fault = ""  # its former holder's
            # Held in outage, or left behind because the link box did not answer at the end of that lease.
            if board.link is not None and board.link.touched and not self._link_in_use(board):
                await board.set_link(None)

    def _link_in_use(self, board: BoardOwner) -> bool:
        """Whether another leased board is reached through the same link box: then the link is not ours to change."""
        leased = {name for lease in self._desk.leases() for name in lease.boards}
        return board.link is not None and any(
            other.link is board.link for name, other in self.boards.items() if name in leased and other is not board
        )

    def _open_leases(self) -> LeaseStore:
        return LeaseStore(
            self.state_dir / "leases.sqlite",
            self.bench.file.boards,
            boot_id=lease_module.host_boot_id(),
            started=lease_module.process_started,
            groups=lease_groups(self.bench),
        )

    # --------------------------------------------------------------------------------------------- its flight
    async def start_flight(self, body: FlightBody, token: str | None) -> dict[str, Any]:
        board = self._may_drive(token, body.board)
        async with self._flight_lock:
            if self.flight is not None and self.flight.state != "ended":
                raise BenchError(
                    f"a flight of board {self.flight.board.name} is running",
                    hint="one flight a bench at a time: wait for it, or end it",
                )
            await self._heart.ensure()
            self.flight = None
            self.flight = await FlightControl.begin(
                board, Path(body.mission_path), Path(body.run_dir), body.start_s, await self._meta(board)
            )
            try:
                self._may_drive(token, body.board)
            except BenchError:
                # Whoever ended the lease meanwhile found no flight to end.
                await self.flight.end("the lease ended while it began")
                raise
        return self.flight.describe()

    async def _meta(self, board: BoardOwner) -> dict[str, str]:
        facts = {"bench": self.bench.name, "hil_version": hil.__version__}
        supplies, levels = [], []
        for channel in board.channels:
            await channel.supply.open()
            told = f"{channel.input}: " if len(board.channels) > 1 else ""
            supplies.append(f"{told}{channel.supply.identity}")
            levels.append(f"{told}{await channel.layers.level(channel.supply.capabilities)}")
        facts |= {"supply": " | ".join(supplies), "capability_level": " | ".join(levels)}
        facts["time_to_off"] = self.cut_times.said(board.name)
        if board.link is not None:
            facts["link_box"] = json.dumps(await board.link.preflight())
        return facts

    async def doctor(self) -> dict[str, Any]:
        """Every fixture asked, nothing switched."""
        await self._heart.ensure()
        checks = await examine(
            self.boards,
            {name: wire.dialect for name, wire in self.bench.file.supplies.items()},
            self._supplies,
            self._links,
            self.cut_times,
            deadman_alive=self._heart.alive,
            state_dir=self.state_dir,
        )
        return {"checks": [asdict(check) for check in checks]}

    def flight_state(self) -> dict[str, Any] | None:
        return None if self.flight is None else self.flight.describe()

    async def change_clock(self, body: ClockBody, token: str | None) -> dict[str, Any]:
        flight = self._need_flight(token)
        if (body.rate is None) == (body.skip_to is None):
            raise UsageError("a change of the clock is either `rate` or `skip_to`")
        if body.rate is not None:
            return await flight.set_rate(body.rate, body.cause)
        return await flight.skip_to(float(body.skip_to or 0.0), body.assumed_board_w, body.cause)

    def record(self, table: str, rows: Sequence[dict[str, Any]], token: str | None) -> dict[str, Any]:
        return {"recorded": self._need_flight(token).record(table, rows)}

    def event(self, kind: str, fields: dict[str, Any], token: str | None) -> dict[str, Any]:
        self._need_flight(token).event(kind, fields)
        return {}

    async def end_flight(self, token: str | None) -> dict[str, Any]:
        if self.flight is not None and self.flight.state == "ended":
            return {"state": "ended", "invalid": list(self.flight.invalid)}
        return await self._need_flight(token).end("requested")

    def _need_flight(self, token: str | None) -> FlightControl:
        if self.flight is None:
            raise BenchError("no flight is running", hint="hil mission fly")
        self._need(token, self.flight.board.name)
        return self.flight

    # --------------------------------------------------------------------------------------------- its account
    def status(self) -> dict[str, Any]:
        self._busy()
        holders = {board: item for item in self._desk.leases() for board in item.boards}
        return {
            "bench": self.bench.name,
            "bench_file": str(self.bench.path),
            "bench_sha256": self._digest,
            "version": hil.__version__,
            "pid": os.getpid(),
            "up_s": time.time() - self._started_s,
            "metrics": f"http://127.0.0.1:{self._metrics_port}/metrics",
            "log": str(self.state_dir / "daemon.log"),
            "remote": self._remote,
            "boards": {name: self._board_status(board, holders.get(name)) for name, board in self.boards.items()},
            "flight": None if self.flight is None else self.flight.describe(),
            "deadman": {"alive": self._heart.alive, "armed": self._heart.armed, "pid": self._heart.pid},
        }

    def describe_bench(self) -> dict[str, Any]:
        """The bench file and its board types, for clients that cannot read them here."""
        return {
            "path": str(self.bench.path),
            "id": self.bench.id,
            "file": self.bench.file.model_dump(mode="json", by_alias=True, exclude_none=True),
            "types": {
                name: item.model_dump(mode="json", by_alias=True, exclude_none=True)
                for name, item in self.bench.types.items()
            },
        }

    def _board_status(self, board: BoardOwner, lease: Lease | None) -> dict[str, Any]:
        console = board.console
        return {
            "type": board.type.name,
            "state": board.state,
            "fault": board.fault,
            "power_epoch": board.power_epoch,
            "power": None if board.last is None else board.last.row(),
            "link": None if board.link is None else board.link_state(),
            "lease": None if lease is None else {"lease": lease.id, **_public(lease)},
            "console": None
            if console is None
            else {
                "connected": console.connected,
                "bytes": console.ring.end,
                "last_line": console.last_line,
                "reason": "" if console.connected else console.reason,
            },
        }

    def _metrics(self) -> BenchMetrics:
        def one(board: BoardOwner) -> Any:
            flight = self._flight_of(board)
            if flight is None:
                return board.metrics(None, "none")
            return board.metrics(flight.metrics(), flight.phase)

        return BenchMetrics(
            bench=self.bench.name,
            version=hil.__version__,
            deadman_alive=self._heart.alive,
            leases=len(self._desk.leases()),
            boards=tuple(one(board) for board in self.boards.values()),
        )


@dataclass(frozen=True, slots=True)
class _LeasedBoards:
    """The daemon's boards as the lease desk needs them."""

    daemon: Daemon

    async def end(self, ended: Ended) -> None:
        await self.daemon.end_lease(ended)

    async def ready(self, boards: Sequence[str]) -> None:
        await self.daemon.make_ready(boards)

    def energized(self, board: str) -> bool:
        return board in self.daemon.boards and self.daemon.boards[board].energized


def serve(bench: Bench, *, idle_s: float = IDLE_S, to_terminal: bool = True) -> int:
    """Run the daemon of `bench` in this process until it is stopped or idle; returns the exit code.

    Raises BenchError when another daemon serves this bench. The log goes to the bench's state directory.
    """
    lock = _lock(bench)
    try:
        _log_to(bench.state_dir / "daemon.log", to_terminal)
        # A second without a heartbeat is a dead daemon: a busy host must not make it look like one. Not real time, or
        # whatever it computes would stop the machine.
        with contextlib.suppress(OSError):
            os.nice(NICE)
        return int(asyncio.run(_main(bench, idle_s)))
    finally:
        os.close(lock)


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


def _log_to(path: Path, to_terminal: bool) -> None:
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
    ]
    if to_terminal:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(
        level=logging.INFO, handlers=handlers, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.getLogger("paramiko").setLevel(logging.WARNING)


def _addresses(bench: Bench) -> list[str]:
    return sorted(
        {wire.address for wire in bench.file.supplies.values()} | {wire.address for wire in bench.file.links.values()}
    )


def lease_groups(bench: Bench) -> dict[str, tuple[str, ...]]:
    """For each board the boards that share a supply with it whose channels are not independent."""
    groups: dict[str, tuple[str, ...]] = {}
    for name, wire in bench.file.supplies.items():
        if not dialect(wire.dialect).lease_group:
            continue
        on_it = tuple(
            board for board, wires in bench.file.boards.items() if any(feed.supply == name for feed in wires.power)
        )
        if len(on_it) > 1:
            # A board on two such supplies ties the boards of both together.
            joined = tuple(dict.fromkeys(other for board in on_it for other in (*groups.get(board, ()), *on_it)))
            groups.update(dict.fromkeys(joined, joined))
    return groups


def _line_settings(wire: ConsoleWire) -> LineSettings:
    return LineSettings(wire.baud, wire.data_bits, wire.parity, wire.stop_bits, wire.flow, wire.combined_uart)


def _public(lease: Lease) -> dict[str, Any]:
    """A lease without what only its holder may know."""
    return {name: getattr(lease, name) for name in PUBLIC}


def _waiting(waiter: Waiter, why: str) -> dict[str, Any]:
    request = waiter.request
    return {
        "holder": request.holder,
        "any_of": [sorted(boards) for boards in waiter.wanted],
        "since": _utc(waiter.since_s),
        "until": _utc(waiter.since_s + request.wait_s),
        "priority": request.priority,
        "reason": request.reason,
        "why": why,
    }


def _utc(boot_s: float) -> str:
    """A moment of the leases' clock in UTC, by what the host's clock says now."""
    return utc_text(time.time() + boot_s - boot_clock())


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
