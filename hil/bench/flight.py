"""A flight: one board under one mission's sky. Owns the mission clock; everything it sees goes into the run directory.

Runs as part of the daemon. What makes the record worthless is said at once: `invalid` is journaled and shown, and what
makes going on pointless (`error`) is raised to every client that asks for the flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hil.bench import exporter
from hil.bench.arrayflight import GoOn, array_plan
from hil.bench.board import BoardOwner
from hil.bench.consoles import ConsoleLog
from hil.bench.exporter import FlightMetrics, phase_of
from hil.bench.heat import FlightHeat
from hil.bench.journal import Journal, utc_text
from hil.bench.player import EdgeLike, Played, Player
from hil.bench.powerloop import PowerLoop
from hil.bench.powervalues import Bounds, PowerSample
from hil.bench.powervalues import Flight as PowerFlight
from hil.bench.recorder import TABLES, Recorder, Value
from hil.bench.sockets import describe_error
from hil.errors import BenchError, HilError, UsageError
from hil.inventory import Mission, load_mission
from hil.inventory.environment import environment
from hil.mission import timeline_file
from hil.mission.clock import MissionClock, Segment
from hil.mission.compile import compile_timeline
from hil.mission.eps import EpsModel
from hil.mission.timeline import Timeline
from hil.model import Direction

log = logging.getLogger("hil.flight")

ASSUMED_OVER_S = 10.0
NEAR_SHED_V = 0.3
MODEL_STEP_S = 10.0
NEXT_EDGES = 6
SETTLED_S = 30.0
LEDGER_S = 1.0  # a flight that is killed leaves its ledger up to here
# Told by the power loop; the measurement is then no longer that of the mission that was asked for.
INVALIDATING = frozenset({"run_invalid", "tripped", "envelope_breach"})


class FlightControl:
    """One flight from `begin` to `end`. Lives on the daemon's event loop."""

    def __init__(
        self,
        board: BoardOwner,
        mission: Mission,
        timeline: Timeline,
        run_dir: Path,
        start_s: float,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.board = board
        self.mission = mission
        self.timeline = timeline
        self.run_dir = run_dir
        self.state = "starting"
        self.invalid: list[str] = []
        self.error: HilError | None = None
        self.tokens = 0
        self._start_s = start_s
        self._monotonic = monotonic
        self._upload_bytes = 0.0
        self._watts: deque[tuple[float, float]] = deque(maxlen=1000)
        self._loop: PowerLoop | None = None
        self._eps: EpsModel | None = None
        self._player_task: asyncio.Task[None] | None = None
        self._console_log: ConsoleLog | None = None
        self._events = asyncio.get_running_loop()
        self._clock_lock = asyncio.Lock()
        self._ending: asyncio.Task[dict[str, Any]] | None = None
        self._ledger_at_s = -math.inf
        self._input_at_s: dict[str, float] = {}
        self.clock = MissionClock(start_s, monotonic())
        self._near_shed_v = max(
            (
                part.near_shed_v
                for step in mission.file.steps
                for part in (step.eclipse, step.cruise)
                if part is not None
            ),
            default=NEAR_SHED_V,
        )
        self.recorder = Recorder(run_dir / "telemetry.sqlite", on_error=self._fail_from_thread)
        try:
            self.journal = Journal(
                run_dir / "events.jsonl", "daemon", stamp=self._stamp, on_error=self._fail_from_thread
            )
        except BenchError:
            self.recorder.close()
            raise
        self.player = Player(timeline, self.clock, board.link, self, monotonic=monotonic)
        thermal = timeline.environment.thermal
        # Behind an array nobody measures what the board itself draws: its heat would be a guess.
        heated = thermal is not None and not board.on_array
        self._heat = FlightHeat(thermal, timeline, put=self._put, tell=self._write) if thermal and heated else None

    @classmethod
    async def begin(
        cls,
        board: BoardOwner,
        mission_path: Path,
        run_dir: Path,
        start_s: float,
        meta: Mapping[str, str],
        go_on: GoOn,
    ) -> FlightControl:
        """Compile the mission and start its clock. Raises UsageError when it does not fit the board or the bench.

        What takes minutes asks `go_on` meanwhile, and what that raises ends it.
        """
        await board.loop()
        # A day compiles in some 0.1 s, mostly inside numpy: a thread is enough, a process would take longer to start.
        mission, timeline = await asyncio.to_thread(_prepare, mission_path, board, run_dir)
        if not start_s < timeline.duration_s:
            raise UsageError(f"start_s {start_s:g} is behind the mission's end at {timeline.duration_s:g} s")
        flight = cls(board, mission, timeline, run_dir, start_s)
        try:
            await flight._start(meta, go_on)
        except BaseException:
            await asyncio.shield(flight.end("start failed"))
            raise
        return flight

    async def _start(self, meta: Mapping[str, str], go_on: GoOn) -> None:
        power = self.timeline.environment.power
        if power is None:
            raise UsageError(f"{self.mission.path}: a flight needs the mission's `power:`")
        eps = None if self.board.on_array else EpsModel(power.eps)
        if self.board.console is not None:
            self._console_log = self.board.console.add_log(self.run_dir / "console")
        for channel in self.board.channels:
            if channel.array is not None:
                plan = array_plan(self.timeline)
                told = await channel.array.prepare(plan, self._start_s, channel.envelope, self.board.name, go_on)
                self._write("array_programmed", **told)
        # The clock counts from here, not from before the compilation.
        self.clock = self.player.clock = MissionClock(self._start_s, self._monotonic())
        loop = self.board.attach(
            PowerFlight(
                eps=eps,
                clock=self.clock,
                array_w=self.timeline.array_power_w,
                sunlit=self.timeline.sunlit_at,
                planned_w=power.board_full_w or self.board.type.power.inference_w,
                shed=power.shed,
                bounds=self._bounds(),
            )
        )
        self._loop, self._eps = loop, eps
        self._record_clock(self.clock.segments[0], "start")
        for key, value in {**meta, **self._anchors()}.items():
            self._put("meta", {"key": key, "value": value})
        self._player_task = asyncio.create_task(self.player.run(), name=f"player-{self.board.name}")
        self._player_task.add_done_callback(self._player_ended)
        await self.player.ready.wait()
        self.state = "running"
        self._write(
            "flight_started",
            board=self.board.name,
            mission=self.mission.name,
            start_s=self._start_s,
            timeline_sha256=self.timeline.hash,
            soc=None if eps is None else eps.state.soc,
            period_s=loop.period_s,
            **self._fed_over(),
        )

    def _fed_over(self) -> dict[str, Any]:
        """How the board hangs on the bus, when it has several channels: what does not follow it is modelled.

        On an array it hangs behind a real power unit, and then the array alone is.
        """
        if self.board.on_array:
            return {"power_source": "array", "label": "the array is modelled, its battery is real"}
        if len(self.board.channels) == 1:
            return {}
        inputs = [
            {"input": channel.input, "follows_bus": True}
            if channel.main
            else {"input": channel.input, "converter_efficiency": channel.converter_efficiency, "label": "modelled"}
            for channel in self.board.channels
        ]
        return {"inputs": inputs}

    def _bounds(self) -> Bounds:
        """The mission's; and a load that is to be shed after so long must be looked at twice within that time."""
        plan = self.mission.file.power
        if plan is None:
            return Bounds()
        hold_s = plan.shed.hold_s
        sheds = hold_s > 0 and not self.board.on_array
        period_s = min(plan.loop.period_s, hold_s / 2) if sheds else plan.loop.period_s
        return Bounds(period_s, plan.loop.lateness_s, plan.loop.gap_s)

    async def end(self, why: str) -> dict[str, Any]:
        """Load off and verified, link cleared, record closed; idempotent. Raises what made it incomplete."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(why), name="flight-end")
        return await asyncio.shield(self._ending)

    def fail(self, error: HilError) -> None:
        """Going on is pointless: every client that asks is told. The first error counts."""
        if self.error is None and self.state != "ended":
            self.error = error
            self.invalidate(error.message)

    def invalidate(self, reason: str) -> None:
        """The record no longer shows what the mission asked for; each reason is journaled once."""
        if reason not in self.invalid:
            self.invalid.append(reason)
            log.warning("flight of %s is invalid: %s", self.board.name, reason)
            self._write("invalid", reason=reason)

    # ------------------------------------------------------------------------------------------------ the clock
    async def set_rate(self, rate: float, cause: str) -> dict[str, Any]:
        """Run at `rate` from now on; returns once the link has the new rate."""
        async with self._clock_lock:
            self._running()
            if self.board.on_array and rate != 1.0:
                raise _real_battery(self.board.name, f"a clock rate of {rate:g}")
            self._set_rate(rate, cause)
            await self._settled()
        return {"t_mission": self._now_s(), "rate": self.clock.rate}

    async def skip_to(self, t_s: float, assumed_board_w: float | None, cause: str) -> dict[str, Any]:
        """Jump to mission second `t_s`: link in outage first, the charge advanced by model, then the state of then.

        A moment that has passed already is reached: nothing happens and `skipped_s` is 0.
        """
        async with self._clock_lock:
            self._running()
            if not math.isfinite(t_s) or t_s > self.timeline.duration_s:
                raise UsageError(f"the mission ends at {self.timeline.duration_s:g} s, cannot skip to {t_s:g} s")
            if t_s <= self._now_s():
                return {"t_mission": self._now_s(), "rate": self.clock.rate, "skipped_s": 0.0}
            if self.board.on_array:
                raise _real_battery(self.board.name, "a skip")
            async with self.player.outage("skip"):
                segment, assumed_w = await self._jump(t_s, assumed_board_w, cause)
            await self._settled()
        return {
            "t_mission": self._now_s(),
            "rate": self.clock.rate,
            "skipped_s": segment.skipped_s,
            "assumed_board_w": assumed_w,
        }

    async def _settled(self) -> None:
        try:
            async with asyncio.timeout(SETTLED_S):
                await self.player.settled()
        except TimeoutError:
            raise self.error or BenchError(
                f"the link of board {self.board.name} did not follow the clock within {SETTLED_S:g} s"
            ) from None

    async def _jump(self, t_s: float, assumed_board_w: float | None, cause: str) -> tuple[Segment, float]:
        """The jump itself: first the model, then the clock at once, or the power loop would count it twice."""
        if self._loop is None:
            raise BenchError(f"flight of {self.board.name}: its power loop is gone")
        watts = self._recent_w() if assumed_board_w is None else assumed_board_w
        async with self._loop.advanced_model(t_s, watts, MODEL_STEP_S):
            self._running()  # it may have ended meanwhile
            now_s = self._monotonic()
            segment = self.clock.skip_to(max(t_s, self.clock.mission_s(now_s)), now_s)
        self._record_clock(segment, cause or "skip")
        self._write(
            "clock",
            rate=segment.rate,
            skipped_s=segment.skipped_s,
            cause=cause,
            assumed_board_w=watts,
            label="modelled",
        )
        return segment, watts

    def _set_rate(self, rate: float, cause: str) -> None:
        if rate == self.clock.rate:
            return
        segment = self.clock.set_rate(rate, self._monotonic())
        self._record_clock(segment, cause)
        self._write("clock", rate=rate, skipped_s=0.0, cause=cause)
        self.player.replan("clock")

    def _recent_w(self) -> float:
        """Mean board power of the last seconds; 0 while the board is off."""
        if self.board.state != "on":
            return 0.0
        since_s = self._monotonic() - ASSUMED_OVER_S
        watts = [watts for at_s, watts in self._watts if at_s >= since_s]
        return sum(watts) / len(watts) if watts else self.board.type.power.idle_w

    # ------------------------------------------------------------------------------------- what the board tells
    def sampled(self, sample: PowerSample) -> None:
        """A tick of the power loop."""
        if sample.state == "on":
            self._watts.append((sample.t_mono, sample.power_w))
        else:
            self._watts.clear()  # what it drew before it was switched off says nothing about now
        self._put("power", sample.row())
        if len(self.board.channels) > 1:
            self._put_inputs()
        if sample.t_mono - self._ledger_at_s >= LEDGER_S:
            self._put_ledger(sample.t_mono)
        if self._heat is not None and self.state == "running":
            self._heat.sampled(sample)
        shed = self.timeline.environment.power and self.timeline.environment.power.shed
        if (
            shed
            and self.clock.rate > 1.0
            and sample.state == "on"
            and self._eps is not None
            and self._eps.state.watched_v < shed.shed_v + self._near_shed_v
        ):
            self._set_rate(1.0, "load shedding")

    def told(self, kind: str, data: Mapping[str, Any]) -> None:
        """An event of the power loop."""
        self._write(kind, **data)
        if kind == "load_restoring" and self.clock.rate > 1.0:
            self._set_rate(1.0, "boot")  # a board boots in real time
        if kind == "model_advanced":
            self._check_skip(float(data["assumed_board_w"]), float(data["lowest_watched_v"]))
        if kind in INVALIDATING:
            self.invalidate(f"{kind}: {data.get('cause', '')}")

    def _check_skip(self, assumed_w: float, lowest_v: float) -> None:
        """A board that would have lost its power in a skipped span cannot be flown on as if it had not."""
        power = self.timeline.environment.power
        limit_v = power.shed.shed_v if power is not None and power.shed is not None else 0.0
        if assumed_w > 0 and (lowest_v < limit_v or lowest_v <= 0):
            self.invalidate(
                f"skip: with the board at the assumed {assumed_w:.1f} W the bus would have fallen to {lowest_v:.2f} V"
            )

    # ------------------------------------------------------------------------------------ what the player tells
    def played(self, played: Played) -> None:
        for direction, state in played.states.items():
            applied = played.applied[direction]
            self._put(
                "link",
                {
                    "t_mono": applied.acknowledged_s,
                    "t_mission": played.mission_s,
                    "rate": played.rate,
                    "board": self.board.name,
                    "direction": direction,
                    "delay_s": state.delay_s,
                    "loss": state.effective_loss,
                    "rate_bps": state.rate_bps,
                    "outage": int(state.outage),
                    "scheduled_s": applied.scheduled_s,
                    "sent_s": applied.sent_s,
                    "acknowledged_s": applied.acknowledged_s,
                    "verified_s": applied.verified_s,
                    "cause": played.cause,
                },
            )

    def passed(self, edge: EdgeLike, played: Played | None) -> None:
        self._write(
            "edge_applied",
            edge=edge.kind,
            detail=edge.detail,
            t_edge_s=edge.t_s,
            link=played is not None,
            lateness_s=None if played is None else played.lateness_s,
        )

    def overrun(self, edge: EdgeLike, late_s: float) -> None:
        self.board.player_overruns += 1
        self._write("overrun", edge=edge.kind, t_edge_s=edge.t_s, lateness_s=late_s, source_task="player")

    def counted(self, counters: Mapping[Direction, Any]) -> None:
        now_s = self._monotonic()
        for direction, count in counters.items():
            self._put(
                "qdisc",
                {
                    "t_mono": now_s,
                    "t_mission": self.clock.mission_s(now_s),
                    "board": self.board.name,
                    "direction": direction,
                    "sent_bytes": count.sent_bytes,
                    "sent_packets": count.sent_packets,
                    "dropped": count.dropped,
                    "backlog_packets": count.backlog_packets,
                },
            )

    def failed(self, error: BenchError) -> None:
        self.fail(error)

    # ----------------------------------------------------------------------------------- what the client counts
    def record(self, table: str, rows: Sequence[Mapping[str, Value]]) -> int:
        """Tokens and progress from the client, each stamped with its own `t_mono`."""
        self._running()
        for row in rows:
            t_mono = row.get("t_mono")
            if not isinstance(t_mono, int | float):
                raise UsageError(f"a row of {table} needs t_mono, seconds of time.monotonic()")
            t_mission = self.clock.mission_s(t_mono)
            stamped = {**row, "t_mission": t_mission, "rate": self._rate_at(t_mono), "board": self.board.name}
            try:
                self.recorder.put(table, stamped)
            except ValueError as error:
                raise UsageError(str(error)) from None
            self._count(table, row, t_mission)
        return len(rows)

    def _count(self, table: str, row: Mapping[str, Value], t_mission: float) -> None:
        if table == "tokens":
            n = row.get("n")
            if isinstance(n, int):
                self.tokens += n
                self.board.tokens[phase_of(self.timeline.sunlit_at(t_mission))] += n
        elif row.get("kind") == "upload_bytes":
            value = row.get("value")
            if isinstance(value, int | float):
                self.board.upload_bytes += max(0.0, value - self._upload_bytes)
                self._upload_bytes = max(self._upload_bytes, float(value))

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        """An event that a client hands over. Raises UsageError for reserved field names."""
        self._running()
        try:
            self.journal.write(kind, **fields)
        except ValueError as error:
            raise UsageError(str(error)) from None

    # ------------------------------------------------------------------------------------------------ its state
    @property
    def phase(self) -> str:
        """sunlit, penumbra or umbra; `none` once it has ended."""
        return phase_of(self.timeline.sunlit_at(self._now_s())) if self.state == "running" else "none"

    def metrics(self) -> FlightMetrics | None:
        """For the exporter; None once it has ended."""
        if self.state != "running":
            return None
        eps = None if self._eps is None else self._eps.state
        heat = None if self._heat is None else self._heat.state
        soc, bus_v = (None, None) if eps is None else (eps.soc, eps.bus_voltage_v)
        return FlightMetrics(self._now_s(), self.clock.rate, soc, bus_v, heat, len(self.invalid))

    def describe(self) -> dict[str, Any]:
        """The answer to GET /v1/flight."""
        now_s = self._now_s()
        timeline = self.timeline
        contact = timeline.contact_at(now_s)
        eps = None if self._eps is None else self._eps.state
        sample = self.board.last
        power = {} if sample is None else sample.row()
        power.update(
            state=self.board.state,
            bus_voltage_v=None if eps is None else eps.bus_voltage_v,
            watched_v=None if eps is None else eps.watched_v,
        )
        return {
            "board": self.board.name,
            "mission": self.mission.name,
            "run_dir": str(self.run_dir),
            "state": self.state,
            "t_mission": now_s,
            "utc": timeline.utc(now_s),
            "rate": self.clock.rate,
            "phase": {"sunlit": timeline.sunlit_at(now_s), "label": phase_of(timeline.sunlit_at(now_s))},
            "contact": contact and {"station": contact.station, "aos_s": contact.aos_s, "los_s": contact.los_s},
            "next_edges": self._next_edges(now_s),
            "power": power,
            "soc": None if eps is None else eps.soc,
            "thermal": None if self._heat is None else self._heat.describe(),
            "link": self._link(now_s),
            "upload_bytes": self._upload_bytes,
            "tokens": self.tokens,
            "invalid": list(self.invalid),
            "overruns": {
                "player": self.player.overruns,
                "power": 0 if self._loop is None else self._loop.ledger.overruns,
            },
            "error": None if self.error is None else describe_error(self.error),
        }

    def _link(self, now_s: float) -> dict[str, Any]:
        """What is applied and read back; without an emulator what the timeline says, and that it is so."""
        if self.board.link is None:
            states: Mapping[Direction, Any] | None = self.timeline.link_at(now_s, rate_scale=self.clock.rate)
        else:
            states = self.board.link.states
        up = states is not None and not any(state.outage for state in states.values())
        return {
            "up": up,
            "emulated": self.board.link is not None,
            "states": None if states is None else {name: asdict(state) for name, state in states.items()},
            "delay_s": states["uplink"].delay_s if states and up else None,
            "rate_bps": states["uplink"].rate_bps if states and up else None,
        }

    def _next_edges(self, now_s: float) -> list[dict[str, Any]]:
        edges = self.timeline.edges
        first = bisect_right(edges, now_s, key=lambda edge: edge.t_s)
        return [asdict(edge) for edge in edges[first : first + NEXT_EDGES]]

    # --------------------------------------------------------------------------------------------------- helpers
    async def _end(self, why: str) -> dict[str, Any]:
        problems: list[HilError] = []
        if self._player_task is not None:
            self._player_task.cancel()
            await asyncio.wait((self._player_task,))
        for act in (self._power_off, self._leave_array, self._clear_link):
            try:
                await act(why)
            except HilError as error:
                problems.append(error)
                self.invalidate(error.message)
        if self._loop is not None:
            self._loop.detach()
        self._put_ledger(self._monotonic())
        self._write(
            "flight_ended",
            why=why,
            invalid=self.invalid,
            tokens=self.tokens,
            upload_bytes=self._upload_bytes,
            ledger=None if self._eps is None else asdict(self._eps.ledger),
            power_ledger=None if self._loop is None else asdict(self._loop.ledger),
            heat_ledger=None if self._heat is None else self._heat.ledger._asdict(),
        )
        self.state = "ended"
        if self._console_log is not None and self.board.console is not None:
            self.board.console.remove_log(self._console_log)
        for close in (self.recorder.close, self.journal.close):
            try:
                await asyncio.to_thread(close)
            except HilError as error:
                problems.append(error)
        if problems and self.error is None:
            raise problems[0]
        return {"state": self.state, "invalid": list(self.invalid)}

    async def _power_off(self, why: str) -> None:
        if self.board.state != "off" or self.board.energized:  # of several channels the leading one may be off alone
            await self.board.off(f"flight: {why}")

    async def _leave_array(self, why: str) -> None:
        for channel in self.board.channels:
            if channel.array is None:
                continue
            try:
                await channel.array.leave()
            except BenchError as error:  # the output is what counts; the next start of a board leaves the mode first
                self._write("array_not_left", error=error.message)

    async def _clear_link(self, why: str) -> None:
        link = self.board.link
        if link is None:
            return
        try:
            if link.touched:
                self.counted(await link.counters())  # the last word of the queues: clearing removes them
        finally:
            await link.clear()

    def _running(self) -> None:
        if self.error is not None:
            raise self.error
        if self.state != "running":
            raise BenchError(f"the flight of board {self.board.name} is over", hint="start a new one")

    def _player_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("player of %s ended", self.board.name, exc_info=error)
            self.fail(error if isinstance(error, HilError) else BenchError(f"the player ended: {error!r}"))

    def _fail_from_thread(self, error: BenchError) -> None:
        self._events.call_soon_threadsafe(self.fail, error)

    def _now_s(self) -> float:
        return self.clock.mission_s(self._monotonic())

    def _stamp(self) -> tuple[float, float]:
        return self._now_s(), self.clock.rate

    def _rate_at(self, t_mono: float) -> float:
        segments = self.clock.segments
        index = bisect_right(segments, t_mono, key=lambda segment: segment.wall_start_s) - 1
        return segments[max(index, 0)].rate

    def _record_clock(self, segment: Segment, cause: str) -> None:
        self._put(
            "clock",
            {
                "wall_start_s": segment.wall_start_s,
                "mission_start_s": segment.mission_start_s,
                "rate": segment.rate,
                "kind": segment.kind,
                "cause": cause,
            },
        )

    def _anchors(self) -> dict[str, str]:
        """Wall and monotonic time of one moment, and what the record was made from."""
        return {
            "anchor_monotonic_s": f"{self._monotonic():.6f}",
            "anchor_utc": utc_text(time.time()),
            "mission": self.mission.name,
            "mission_start_utc": self.timeline.utc(0.0),
            "timeline_sha256": self.timeline.hash,
            "board": self.board.name,
            "board_type": self.board.type.name,
            "undervoltage_lockout_v": f"{self.board.type.supply.undervoltage_lockout_v:g}",
            "phases": ",".join(exporter.PHASES),
            "power_source": "array" if self.board.on_array else "bus",
        }

    def _put_inputs(self) -> None:
        """What each of several supply channels measured; the `power` table has their watts and joules in one."""
        for name, sample in self.board.inputs().items():
            if sample.t_mission is not None and sample.t_mono > self._input_at_s.get(name, -math.inf):
                self._input_at_s[name] = sample.t_mono
                row = sample.row()
                kept = {column: row[column] for column in TABLES["inputs"] if column != "input"}
                self._put("inputs", {**kept, "board": self.board.name, "input": name})

    def _put_ledger(self, now_s: float) -> None:
        """Where the energy has gone since the flight began: the modelled satellite's, and what was measured."""
        self._ledger_at_s = now_s
        if self._loop is None:
            return
        measured = self._loop.ledger
        stamp = {"t_mono": now_s, "t_mission": self.clock.mission_s(now_s), "rate": self.clock.rate}
        told = {
            name: getattr(measured, name)
            for name in ("metered_j", "gap_j", "metered_mission_j", "fed_j", "converter_j")
        }
        modelled = {} if self._eps is None else asdict(self._eps.ledger)
        row = {**stamp, "board": self.board.name, **modelled, **told, "assumed_j": measured.assumed_j}
        self._put("ledger", row)

    def _put(self, table: str, row: Mapping[str, Value]) -> None:
        with contextlib.suppress(BenchError):  # told once through `on_error`: the flight has failed by then
            self.recorder.put(table, row)

    def _write(self, kind: str, **fields: Any) -> None:
        try:
            self.journal.write(kind, **fields)
        except BenchError as error:
            if self.error is None:
                self.error = error
                self.invalid.append(error.message)
                log.error("%s", error)


def _real_battery(board: str, what: str) -> UsageError:
    return UsageError(
        f"{board} hangs on an array, before a real battery: that does not follow {what}",
        hint="such a flight runs in real time: hil mission fly --rate 1, which flies the gaps too",
    )


def _prepare(mission_path: Path, board: BoardOwner, run_dir: Path) -> tuple[Mission, Timeline]:
    mission = load_mission(mission_path)
    timeline = compile_timeline(environment(mission, board.type))
    if board.on_array:
        try:
            array_plan(timeline)
        except UsageError as error:
            raise UsageError(f"{mission.path}: {error.message}", hint=error.hint) from None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        timeline_file.save(timeline, run_dir / "timeline.npz")
    except OSError as error:
        (run_dir / "timeline.npz").unlink(missing_ok=True)  # half of it would take the room of the verdict
        raise BenchError(f"cannot write to run directory {run_dir}: {error.strerror}") from error
    return mission, timeline
