"""The power loop of one board: meter it, feed the battery model, let the bus follow, shed and restore the load.

One task owns the channel. Each tick measures, integrates energy from the raw samples, and without a flight does no
more than that and beat. With a flight the filtered current drives the power system's model over the mission time that
passed, and the model's bus voltage becomes the supply's set point. Voltage steps are limited by the board's slew. The
load is shed by a real power cut.

Whatever goes wrong ends in the safe state: output off, verified, told as an event, and the error goes to the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

from hil.bench import safety
from hil.bench.crosscheck import CrossCheck
from hil.bench.deadman import ArmedOutput
from hil.bench.levels import Layers
from hil.bench.pacing import Pacing
from hil.bench.powerfaults import BrownOut, DipFailed, LatchUp, LatchUpLimits, LatchUpWatch, brown_out, check_dip
from hil.bench.safety import NO_LAYERS, Envelope, Intent, IntentJournal, PoweredOff, PoweredOn
from hil.drivers.scpi import InstrumentError, Supply
from hil.errors import BenchError, HilError, SafetyError, UsageError
from hil.mission.eps import GAIN_LIMIT
from hil.model import Reading, Setpoint

State = Literal["off", "on", "shed", "tripped"]
OnEvent = Callable[[str, dict[str, Any]], None]
OnCut = Callable[[str], None]


# ------------------------------------------------------------------------------------------- what the loop needs
class EpsStateLike(Protocol):
    """The part of `hil.mission.eps.EpsState` that the loop reads."""

    @property
    def soc(self) -> float: ...
    @property
    def bus_voltage_v(self) -> float: ...
    @property
    def watched_v(self) -> float: ...
    @property
    def battery_power_w(self) -> float: ...
    @property
    def array_used_w(self) -> float: ...
    @property
    def collapsed(self) -> bool: ...


class EpsLike(Protocol):
    """`hil.mission.eps.EpsModel`: mission seconds and watts in, state out; `gain` is the loop's own feedback."""

    @property
    def state(self) -> EpsStateLike: ...

    def step(self, dt_s: float, board_w: float, array_w: float) -> EpsStateLike: ...

    def gain(self, board_w: float, voltage_v: float | None = None) -> float: ...


class ClockLike(Protocol):
    """`hil.mission.clock.MissionClock`."""

    @property
    def rate(self) -> float: ...

    def mission_s(self, wall_s: float) -> float: ...


class ShedLike(Protocol):
    """`hil.mission.eps.ShedConfig`: hold in mission seconds, dwell in wall seconds."""

    @property
    def shed_v(self) -> float: ...
    @property
    def hold_s(self) -> float: ...
    @property
    def restore_v(self) -> float: ...
    @property
    def restore_soc(self) -> float: ...
    @property
    def dwell_s(self) -> float: ...


class Heartbeat(Protocol):
    """`hil.bench.deadman.Deadman`."""

    @property
    def alive(self) -> bool: ...

    def beat(self, source: str) -> None: ...

    async def arm(self, output: ArmedOutput) -> None: ...

    async def disarm(self, intent: Intent) -> None: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the loop must keep to in a flight, wall seconds; beyond it the record does not show the mission.

    `period_s`: the slowest loop. `lateness_s`: from a tick's schedule to its acknowledged set point. `gap_s`: between
    two measurements of an output that is on.
    """

    period_s: float = 1.0
    lateness_s: float = 1.0
    gap_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Flight:
    """What closes the loop. `array_w` and `sunlit` are functions of mission seconds.

    `planned_w` is the largest board load the mission plans with: the gain is judged by it before the flight.
    `array_direct`: the array feeds the bus without a tracker between them.
    """

    eps: EpsLike
    clock: ClockLike
    array_w: Callable[[float], float]
    sunlit: Callable[[float], float]
    current_limit_a: float
    planned_w: float
    shed: ShedLike | None = None
    array_direct: bool = False
    bounds: Bounds = Bounds()


@dataclass(slots=True)
class PowerLedger:
    """What one flight measured, and what the battery model was told of it. Joules.

    `metered_j` is wall energy, `gap_j` the part of it that lies between samples further apart than the bound: drawn
    straight between them, not measured. `metered_mission_j` and `fed_j` are mission energy, as measured and as fed to
    the model through the filter; `assumed_j` is what skips fed without a measurement. `writes` are set points that
    were sent, `writes_skipped` those below the supply's resolution. `compared` readings of the second meter, if there
    is one, were held against the supply's.
    """

    metered_j: float = 0.0
    gap_j: float = 0.0
    metered_mission_j: float = 0.0
    fed_j: float = 0.0
    assumed_j: float = 0.0
    samples: int = 0
    lost_samples: int = 0
    longest_gap_s: float = 0.0
    latest_s: float = 0.0
    overruns: int = 0
    writes: int = 0
    writes_skipped: int = 0
    meter: str = ""
    compared: int = 0


@dataclass(frozen=True, slots=True)
class PowerSample:
    """One tick. Volts, amperes, watts and joules are measured at the supply; None without a flight.

    `energy_j` integrates over wall time and is what tokens are divided by; `mission_energy_j` over mission time.
    `bus_voltage_v`, `soc`, `array_w`, `array_used_w`, `battery_w` and `gain` are the model's.
    """

    t_mono: float
    board: str
    state: State
    voltage_set_v: float
    current_limit_a: float
    voltage_v: float
    current_a: float
    power_w: float
    energy_j: float
    mission_energy_j: float
    lateness_s: float
    t_mission: float | None = None
    rate: float | None = None
    soc: float | None = None
    bus_voltage_v: float | None = None
    array_w: float | None = None
    array_used_w: float | None = None
    battery_w: float | None = None
    sunlit: float | None = None
    gain: float | None = None

    def row(self) -> dict[str, Any]:
        """Column names and values of the recorder's `power` table."""
        return {name: getattr(self, name) for name in _COLUMNS}


_COLUMNS = tuple(item.name for item in fields(PowerSample))  # of numbers and words: `asdict` would copy each deeply


@dataclass(frozen=True, slots=True)
class Tuning:
    """Times of the loop, wall seconds. `filter_s` is the time constant of the fed-back current."""

    period_min_s: float = 0.1
    filter_s: float = 0.3
    stale_s: float = 2.0
    breach_s: float = 0.2
    overrun_s: float = 0.25
    pulse_s: float = 0.2
    step_budget_s: float = 4.0  # an await that takes longer than this counts as hung: the heartbeat stops
    off_timeout_s: float = 5.0


@dataclass(slots=True)
class _Command:
    kind: Literal["on", "off", "dip"]
    setpoint: Setpoint | None
    done: asyncio.Future[Any]
    how: str
    dip: tuple[float, float] = (0.0, 0.0)


class PowerLoop:
    """Owns one channel for one board. `run` is its task; everybody else calls `request_on`, `request_off`, `attach`."""

    def __init__(
        self,
        board: str,
        supply: Supply,
        channel: int,
        envelope: Envelope,
        journal: IntentJournal,
        intent: Intent,
        heartbeat: Heartbeat,
        nominal: Setpoint,
        *,
        on_sample: Callable[[PowerSample], None],
        on_event: OnEvent,
        on_cut: OnCut = lambda why: None,
        layers: Layers = NO_LAYERS,
        tuning: Tuning | None = None,
        pacing: Pacing | None = None,
        meter: CrossCheck | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.board = board
        self.state: State = "off"
        self.overruns = 0
        self.ledger = PowerLedger()
        self.last: PowerSample | None = None
        self.period_s = (tuning or Tuning()).period_min_s
        self._supply = supply
        self._channel = channel
        self._envelope = envelope
        self._journal = journal
        self._intent = intent
        self._heartbeat = heartbeat
        self._nominal = nominal
        self._on_sample = on_sample
        self._on_event = on_event
        self._on_cut = on_cut
        self._layers = layers
        self._tuning = tuning or Tuning()
        self._clock = clock
        self._commands: asyncio.Queue[_Command] = asyncio.Queue()
        self._flight: Flight | None = None
        self._set = nominal
        self._set_lost = False
        self._latch_up: tuple[LatchUpWatch, asyncio.Future[LatchUp]] | None = None
        self._energized = False  # an output that may be on, whatever the state is called
        self._off_verified_s: float | None = None
        self._alive_until_s = 0.0
        self._slot = (pacing or Pacing()).join(id(supply))
        self._writes_s: deque[float] = deque(maxlen=5)
        self._meter = meter
        self._invalid: set[str] = set()
        self._lost = False
        self._previous: Reading | None = None
        self._filtered_a = 0.0
        self._fresh_s = clock()
        self._breach_since_s: float | None = None
        self._gain = 0.0
        self._foreign = False
        self._setpoint_late_s = 0.0
        self._energy_j = 0.0
        self._energy_at_on_j = 0.0
        self._mission_energy_j = 0.0
        self._low_since_mission_s: float | None = None
        self._mission_s: float | None = None  # how far the model has come
        self._model_held = False
        self._running = False

    # ---------------------------------------------------------------------------------------------- for others
    @property
    def flight(self) -> Flight | None:
        return self._flight

    async def request_on(self, setpoint: Setpoint | None = None) -> PoweredOn:
        """Run the start sequence; returns when the board has its voltage. In a flight the bus voltage decides.

        Raises what `safety.power_on` raises, UsageError when it is on already, BenchError when the load is shed.
        """
        result: PoweredOn = await self._request("on", setpoint, "requested")
        return result

    async def request_off(self, how: str = "requested") -> PoweredOff:
        """Output off, verified by measurement. Also ends the wait of a shed load for its restore."""
        result: PoweredOff = await self._request("off", None, how)
        return result

    async def request_dip(self, depth_v: float, duration_s: float) -> BrownOut:
        """Lower the voltage for a while; nothing else is done with the channel meanwhile. See `powerfaults`."""
        result: BrownOut = await self._request("dip", None, "requested", (depth_v, duration_s))
        return result

    def watch_latch_up(self, limits: LatchUpLimits) -> asyncio.Future[LatchUp]:
        """Cut when the current stays above a threshold; done with the cut. Cancel it to disarm; one at a time."""
        limits.check(self._envelope)
        if self._latch_up is not None and not self._latch_up[1].done():
            raise UsageError(f"{self.board}: a latch-up protection is armed already")
        future: asyncio.Future[LatchUp] = asyncio.get_running_loop().create_future()
        self._latch_up = (LatchUpWatch(limits), future)
        return future

    @property
    def setpoint(self) -> Setpoint:
        """What the channel was last set to."""
        return self._set

    def attach(self, flight: Flight) -> None:
        """Close the loop. UsageError when the mission cannot be flown so: gain above 0.5, loop too slow, limits."""
        if flight.array_direct:
            raise UsageError(
                f"{self.board}: the mission's array feeds the bus directly: left of its point of maximum power it is a "
                "current source, which no supply that follows a program can play",
                hint="`conversion: mppt`; a hardware solar-array simulator plays the curve itself, but not in a flight",
            )
        floor_v = max(self._envelope.voltage_min_v, flight.shed.shed_v if flight.shed else 0.0)
        gain = max(flight.eps.gain(flight.planned_w), flight.eps.gain(flight.planned_w, floor_v))
        if not gain <= GAIN_LIMIT:
            raise UsageError(
                f"{self.board}: the power loop's gain would be {gain:.2f}, more than {GAIN_LIMIT}",
                hint="lower the battery's resistance or raise its voltage; a soft source needs a hardware simulator",
            )
        if self.period_s > flight.bounds.period_s:
            raise UsageError(
                f"{self.board}: the supply allows a loop of {self.period_s:.3f} s, the mission needs "
                f"{flight.bounds.period_s:.3f} s",
                hint="use a faster supply, or fewer boards on it",
            )
        bus_v = flight.eps.state.bus_voltage_v
        self._envelope.check(Setpoint(bus_v, flight.current_limit_a))
        self._flight = flight
        self.ledger = PowerLedger(meter="" if self._meter is None else self._meter.name)
        self._invalid.clear()
        self._low_since_mission_s = None
        self._mission_s = flight.clock.mission_s(self._clock())

    def detach(self) -> None:
        """Open the loop: the set point stays where it is, metering goes on. A shed load stays off."""
        self._flight = None
        if self.state == "shed":
            self.state = "off"

    @contextlib.asynccontextmanager
    async def advanced_model(self, until_s: float, assumed_board_w: float, step_s: float) -> AsyncIterator[None]:
        """Advance the battery to mission second `until_s` by model alone, and say so in a `model_advanced` event.

        The body moves the clock there, without an await. Days of it take seconds: they pass on a thread, and the ticks
        leave the model alone meanwhile, but not the board. A loop that stood still would be cut by the dead-man.
        """
        flight = self._flight
        if flight is None:
            raise UsageError(f"{self.board} is not in a flight")
        before_s = flight.clock.mission_s(self._clock()) if self._mission_s is None else self._mission_s
        dt_s = until_s - before_s
        if not (math.isfinite(dt_s) and dt_s >= 0 and step_s > 0):
            raise UsageError(f"cannot advance the model by {dt_s!r} s in steps of {step_s!r} s")
        self._model_held = True
        try:
            lowest_v = await asyncio.to_thread(_advance, flight, before_s, dt_s, assumed_board_w, step_s)
            self.ledger.assumed_j += assumed_board_w * dt_s
            self._mission_s = until_s
            self._low_since_mission_s = None
            state = flight.eps.state
            self._tell(
                "model_advanced",
                label="modelled",
                dt_mission_s=dt_s,
                assumed_board_w=assumed_board_w,
                soc=state.soc,
                bus_voltage_v=state.bus_voltage_v,
                lowest_watched_v=lowest_v,
            )
            yield
        finally:
            self._model_held = False

    # ------------------------------------------------------------------------------------------------- the task
    async def run(self) -> None:
        """Loop until cancelled. Leaves with the output verified off, or raises SafetyError that says it is not."""
        self._running = True
        self._live()
        beside = [asyncio.create_task(self._pulse(), name=f"pulse-{self.board}")]
        if self._meter is not None:
            beside.append(asyncio.create_task(self._cross_check(self._meter), name=f"meter-{self.board}"))
        try:
            await self._calibrate()
            await self._loop()
        except BaseException as failure:
            await self._safe_state(failure)
            raise
        finally:
            self._running = False
            self._slot.leave()
            for task in beside:
                task.cancel()
            self._refuse_waiting()

    async def _loop(self) -> None:
        due_s = self._slot.next_s(self._clock(), self.period_s)
        while True:
            command = await self._wait(due_s)
            self._live()
            state, lateness_s = self.state, max(0.0, self._clock() - due_s)
            if command is not None:
                await self._obey(command)
            else:
                await self._tick(due_s, lateness_s)
                if self.state == state and lateness_s <= self.period_s:
                    due_s += self.period_s
                    continue
            # After a switching, or a tick so late that it was told: on from the next moment of this loop's grid, never
            # a burst of ticks to catch up.
            due_s = self._slot.next_s(self._clock(), self.period_s)

    async def _wait(self, due_s: float) -> _Command | None:
        if not self._commands.empty():
            return self._commands.get_nowait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, due_s - self._clock())):
                return await self._commands.get()
        return None

    async def _calibrate(self) -> None:
        """Measure the exchange set before anybody relies on the period; also the first contact with the supply."""
        await self._supply.open()
        for _ in range(5):
            self._live()
            reading = await self._supply.measure(self._channel)
            # A write with its read-back costs as many exchanges as a measurement: assume so until one was measured.
            self._slot.measured(2 * reading.exchange_s)
        self.period_s = self._slot.period_s(self._tuning.period_min_s)

    def _adapt(self, measured_s: float) -> None:
        """A measurement took so long; a set point must fit into every tick too, whether this one had one or not."""
        write_s = sorted(self._writes_s)[len(self._writes_s) // 2] if self._writes_s else measured_s
        self._slot.measured(measured_s + write_s)
        self.period_s = self._slot.period_s(self._tuning.period_min_s)

    # ------------------------------------------------------------------------------------------------- one tick
    async def _tick(self, due_s: float, lateness_s: float) -> None:
        self._setpoint_late_s = 0.0
        self._check_heartbeat()
        reading = await self._measure()
        if reading is None:
            return
        self._account(reading)
        if self._energized and not reading.output_on:
            await self._on_trip(reading)
        elif self._energized:
            await self._watch_envelope(reading)
            await self._watch_latch_up(reading)
        else:
            self._watch_foreign(reading)
        if self._flight is not None and not self._model_held:
            await self._fly(self._flight, reading, due_s)
        self._adapt(reading.exchange_s)
        lateness_s = max(lateness_s, self._setpoint_late_s)
        self._judge(lateness_s)
        self._emit(reading, lateness_s)

    def _judge(self, lateness_s: float) -> None:
        """What a tick's timing means for the record."""
        if lateness_s > self._tuning.overrun_s:
            self.overruns += 1
            self.ledger.overruns += 1
            self._tell("overrun", lateness_s=lateness_s, period_s=self.period_s)
        self.ledger.latest_s = max(self.ledger.latest_s, lateness_s)
        if self._flight is None:
            return
        bounds = self._flight.bounds
        if lateness_s > bounds.lateness_s:
            self._invalidate("late", "a set point was {:.2f} s late", lateness_s, bounds.lateness_s)
        if self.period_s > bounds.period_s:
            self._invalidate("slow", "the supply allows a loop of {:.2f} s only", self.period_s, bounds.period_s)

    def _judge_gap(self, gap_s: float) -> None:
        """Samples of an output that is on are `gap_s` apart, or have been missing for so long."""
        self.ledger.longest_gap_s = max(self.ledger.longest_gap_s, gap_s)
        if self._flight is not None and gap_s > self._flight.bounds.gap_s:
            self._invalidate("stale", "no measurement for {:.2f} s", gap_s, self._flight.bounds.gap_s)

    def _invalidate(self, what: str, cause: str, measured: float, limit: float) -> None:
        """The flight's record no longer shows the mission; each kind is told once a flight."""
        self._declare(what, f"{cause.format(measured)}, more than {limit:g}", measured=measured, limit=limit)

    def _declare(self, what: str, cause: str, **data: float) -> None:
        if what not in self._invalid:
            self._invalid.add(what)
            self._tell("run_invalid", what=what, cause=f"{self.board}: {cause}", **data)

    async def _cross_check(self, meter: CrossCheck) -> None:
        """Hold the second meter against the supply while the output is on. Never stops the loop."""
        lost = apart = False
        while True:
            await asyncio.sleep(meter.bounds.every_s)
            if self.state != "on":
                meter.forget()
                continue
            if self._clock() >= self._alive_until_s:
                continue  # any question feeds a supply's watchdog: it must not outlive a loop that hangs
            before = meter.compared
            try:
                found = await meter.check()
            except (HilError, TimeoutError) as error:
                if not lost:
                    lost = True
                    self._tell("meter_lost", meter=meter.name, error=str(error) or type(error).__name__)
                continue
            lost = False
            self.ledger.compared += meter.compared - before
            if found is None or self.state != "on":
                apart = False
                continue
            cause = f"{meter.name}: {found.finding}, for {found.lasted_s:.1f} s"
            if not apart:
                apart = True
                self._tell("meters_disagree", meter=meter.name, cause=cause)
            if self._flight is not None:
                self._declare("meters", cause, supply_w=found.supply_w, board_w=found.board_w)

    async def _measure(self) -> Reading | None:
        """A reading, or None when the supply did not answer this time; SafetyError when that lasts while it is on."""
        try:
            reading = await self._supply.measure(self._channel)
        except InstrumentError as error:
            if not self._lost:
                self._lost = True
                self._tell("sample_lost", error=error.message)
            age = self._clock() - self._fresh_s
            self.ledger.lost_samples += 1
            if self._energized:
                self._judge_gap(age)
            if self._energized and age > self._tuning.stale_s:
                raise SafetyError(
                    f"{self.board}: no measurement for {age:.1f} s while the output is on: {error.message}",
                    hint="check the supply and its network; its output is switched off as soon as it answers",
                ) from error
            return None
        if self._lost:
            self._lost = False
            self._tell("sample_back", gap_s=self._clock() - self._fresh_s)
        self._fresh_s = self._clock()
        return reading

    def _account(self, reading: Reading) -> None:
        """Energy by trapezoid from raw samples; the fed-back current through one pole."""
        self.ledger.samples += 1
        if self._previous is not None:
            dt = reading.time_s - self._previous.time_s
            joules = 0.5 * (reading.power_w + self._previous.power_w) * dt
            self._add_energy(joules)
            if self._energized:
                self._judge_gap(dt)
                if self._flight is not None and dt > self._flight.bounds.gap_s:
                    self.ledger.gap_j += joules
            share = 1.0 - math.exp(-dt / self._tuning.filter_s)
            self._filtered_a += share * (reading.current_a - self._filtered_a)
        else:
            self._filtered_a = reading.current_a
        self._previous = reading
        if self._meter is not None and self._energized:
            self._meter.supply(reading)

    async def _on_trip(self, reading: Reading) -> None:
        trips = await self._supply.tripped(self._channel)
        recovery = self._supply.recovery
        cause = ", ".join(trips) or "the output went off by itself"
        self._tell(
            "tripped",
            protections=list(trips),
            cause=cause,
            voltage_v=reading.voltage_v,
            reopened=recovery is not None and self._channel in recovery.changed,
        )
        await self._cut("tripped", f"tripped: {cause}")

    async def _watch_envelope(self, reading: Reading) -> None:
        breach = self._envelope.breach(reading, self._energy_j - self._energy_at_on_j)
        if not breach:
            self._breach_since_s = None
            return
        if self._breach_since_s is None:
            self._breach_since_s = reading.time_s
        if reading.time_s - self._breach_since_s >= self._tuning.breach_s:
            self._tell("envelope_breach", cause=breach, voltage_v=reading.voltage_v, current_a=reading.current_a)
            await self._cut("tripped", f"outside the envelope: {breach}")

    async def _watch_latch_up(self, reading: Reading) -> None:
        if self._latch_up is None or not self._energized:
            return
        watch, future = self._latch_up
        if future.done():
            self._latch_up = None
        elif watch.due(reading):
            self._latch_up = None
            off = await self._cut("off", f"latch-up: more than {watch.limits.threshold_a:g} A")
            done = watch.done(off.off_s, off.verified_s)
            self._tell("latch_up", threshold_a=watch.limits.threshold_a, hold_s=watch.limits.hold_s, **asdict(done))
            if not future.done():
                future.set_result(done)

    def _watch_foreign(self, reading: Reading) -> None:
        """Somebody else switched this channel on: said once, not touched. The start sequence refuses it too."""
        if reading.output_on and not self._foreign:
            self._tell("foreign_output", voltage_v=reading.voltage_v, current_a=reading.current_a)
        self._foreign = reading.output_on

    # -------------------------------------------------------------------------------------------- with a flight
    async def _fly(self, flight: Flight, reading: Reading, due_s: float) -> None:
        board_w = max(0.0, self._filtered_a * reading.voltage_v) if self._energized else 0.0
        state = self._step_model(flight, self._clock(), board_w)
        mission_s = flight.clock.mission_s(reading.time_s) if self._mission_s is None else self._mission_s
        self._gain = flight.eps.gain(board_w)
        if self.state == "on":
            await self._follow(flight, state, mission_s, due_s)
        elif self.state == "shed":
            await self._maybe_restore(flight, state)

    def _step_model(self, flight: Flight, now_s: float, board_w: float) -> EpsStateLike:
        """Let the battery feed the board with `board_w` up to the monotonic time `now_s`."""
        mission_s = flight.clock.mission_s(now_s)
        before_s = mission_s if self._mission_s is None else self._mission_s
        dt_s = max(0.0, mission_s - before_s)
        self._mission_s = max(before_s, mission_s)
        self.ledger.fed_j += board_w * dt_s
        return flight.eps.step(dt_s, board_w, max(0.0, flight.array_w(mission_s)))

    def _feed_switching(self, *spans: tuple[float, float]) -> None:
        """Tell the model what was drawn between two ticks: (until when, watts) after each other."""
        if self._flight is not None and not self._model_held:
            for until_s, watts in spans:
                self._step_model(self._flight, until_s, watts)

    async def _follow(self, flight: Flight, state: EpsStateLike, mission_s: float, due_s: float) -> None:
        cause = self._shed_cause(flight, state, mission_s)
        if self._gain > GAIN_LIMIT:
            self._invalidate("gain", "the power loop's gain is {:.2f}", self._gain, GAIN_LIMIT)
            cause = "loop gain"
        if cause:
            await self._shed(flight, state, cause)
            return
        wanted = Setpoint(state.bus_voltage_v, flight.current_limit_a)
        self._envelope.check(wanted)
        limits = self._supply.capabilities.channels[self._channel]
        step_v = self._envelope.slew_v_per_s * self.period_s
        change_v = wanted.voltage_v - self._set.voltage_v
        if abs(change_v) > step_v:
            self._tell("slew_limited", wanted_v=wanted.voltage_v, present_v=self._set.voltage_v)
            wanted = Setpoint(self._set.voltage_v + math.copysign(step_v, change_v), wanted.current_limit_a)
        if (
            self._set_lost
            or abs(wanted.voltage_v - self._set.voltage_v) >= limits.voltage_step_v
            or abs(wanted.current_limit_a - self._set.current_limit_a) >= limits.current_step_a
        ):
            try:
                applied = await self._supply.program(self._channel, wanted, due_s)
            except InstrumentError as error:
                # Whether it arrived is unknown: the next tick writes again, whatever it then wants.
                self._set_lost = True
                self._tell("setpoint_lost", error=error.message, wanted_v=wanted.voltage_v)
                return
            self._set, self._set_lost = wanted, False
            self._setpoint_late_s = applied.lateness_s
            self._writes_s.append(applied.verified_s - applied.sent_s)
            self.ledger.writes += 1
        else:
            self.ledger.writes_skipped += 1

    def _shed_cause(self, flight: Flight, state: EpsStateLike, mission_s: float) -> str:
        if state.collapsed:
            return "bus collapse"
        if state.bus_voltage_v < self._envelope.voltage_min_v:
            return "bus below the board's minimum"
        rule = flight.shed
        if rule is None or state.watched_v >= rule.shed_v:
            self._low_since_mission_s = None
            return ""
        if self._low_since_mission_s is None:
            self._low_since_mission_s = mission_s
        return "bus below its shed voltage" if mission_s - self._low_since_mission_s >= rule.hold_s else ""

    async def _shed(self, flight: Flight, state: EpsStateLike, cause: str) -> None:
        self._low_since_mission_s = None
        off = await self._cut("shed", f"load shed: {cause}")
        self._tell(
            "load_shed",
            cause=cause,
            bus_voltage_v=state.bus_voltage_v,
            watched_v=state.watched_v,
            soc=state.soc,
            shed_v=flight.shed.shed_v if flight.shed else None,
            off_mono=off.off_s,
            verified_mono=off.verified_s,
            verified_v=off.reading.voltage_v,
        )

    async def _maybe_restore(self, flight: Flight, state: EpsStateLike) -> None:
        rule = flight.shed
        if rule is None or state.collapsed or self._off_verified_s is None:
            return
        rested_s = self._clock() - self._off_verified_s
        if state.soc < rule.restore_soc or state.watched_v < rule.restore_v or rested_s < rule.dwell_s:
            return
        self._tell("load_restoring", bus_voltage_v=state.bus_voltage_v, soc=state.soc, rested_s=rested_s)
        on = await self._power_on(Setpoint(state.bus_voltage_v, flight.current_limit_a))
        self._tell(
            "load_restored",
            bus_voltage_v=state.bus_voltage_v,
            soc=state.soc,
            rested_s=rested_s,
            on_mono=on.on_s,
            peak_a=on.peak_a,
        )

    # ------------------------------------------------------------------------------------------------- switching
    async def _obey(self, command: _Command) -> None:
        try:
            result: PoweredOn | PoweredOff | BrownOut
            if command.kind == "off":
                result = await self._switch_off(command.how)
            elif command.kind == "dip":
                result = await self._dip(*command.dip)
            else:
                result = await self._switch_on(command.setpoint)
        except BaseException as error:
            if not command.done.done():
                command.done.set_exception(
                    BenchError(f"{self.board}: the power loop is ending")
                    if isinstance(error, asyncio.CancelledError)
                    else error
                )
            # A refused or failed start that ended with the output off is the caller's, and so is a dip that was
            # refused or after which the old set point is in force again; all else ends the loop too.
            refused = command.kind == "dip" and isinstance(error, UsageError | DipFailed)
            if not isinstance(error, UsageError | BenchError) or (self._energized and not refused):
                raise
        else:
            if not command.done.done():
                command.done.set_result(result)

    async def _switch_on(self, setpoint: Setpoint | None) -> PoweredOn:
        if self.state == "on":
            raise UsageError(f"{self.board} is on already", hint="switch it off first, or use a power cycle")
        if self.state == "shed":
            raise BenchError(
                f"{self.board}: its load is shed by the mission's power system",
                hint="wait until the battery restores it, or end the flight",
            )
        if self._flight is not None:
            bus_v = self._flight.eps.state.bus_voltage_v
            setpoint = Setpoint(bus_v, self._flight.current_limit_a)
        on = await self._power_on(setpoint or self._nominal)
        self._tell(
            "board_on",
            voltage_v=on.reading.voltage_v,
            peak_a=on.peak_a,
            on_mono=on.on_s,
            capability_level=on.level.level,
            reasons=list(on.level.reasons),
            waived=list(on.waived),
        )
        return on

    async def _dip(self, depth_v: float, duration_s: float) -> BrownOut:
        if self.state != "on":
            raise UsageError(f"{self.board} is {self.state}: only a board that is on can be dipped")
        low_v = check_dip(self._envelope, self._set, depth_v, duration_s)
        if low_v < self._envelope.undervoltage_lockout_v:
            self._on_cut(f"brown-out to {low_v:g} V")
        done = await brown_out(
            self._supply,
            self._channel,
            self._envelope,
            self._set,
            depth_v,
            duration_s,
            sample=self._sample,
            nap=self._nap,
            interrupted=lambda: not self._commands.empty(),  # an off must not wait for the end of a long dip
            clock=self._clock,
        )
        self._fresh_s = self._clock()
        self._tell("brown_out", **asdict(done))
        return done

    async def _sample(self) -> Reading | None:
        """One measurement outside the grid of ticks: metered and recorded like any."""
        reading = await self._measure()
        if reading is not None:
            self._account(reading)
            self._emit(reading, 0.0)
        return reading

    async def _power_on(self, setpoint: Setpoint) -> PoweredOn:
        self._check_heartbeat(starting=True)
        try:
            on = await safety.power_on(
                self._supply,
                self._channel,
                self._envelope,
                setpoint,
                self._journal,
                self._intent,
                off_since_s=self._off_verified_s,
                layers=self._layers,
                armed=self._arm,
                clock=self._clock,
                sleep=self._nap,
            )
        except BaseException as error:
            if self._energized and not self._journal_open():
                self._energized = False
                self._off_verified_s = self._clock()
                with contextlib.suppress(SafetyError):
                    await self._heartbeat.disarm(self._intent)
            if isinstance(error, BenchError):
                self._tell("power_on_failed", error=error.message)
            raise
        self.state, self._set = "on", setpoint
        self._energy_at_on_j = self._energy_j
        self._add_energy(on.energy_j)
        started_w = on.energy_j / max(on.settled_s - on.on_s, 1e-3)
        self._feed_switching((on.on_s, 0.0), (on.settled_s, started_w))
        self._forget(on.reading)
        self._low_since_mission_s = None
        return on

    async def _arm(self) -> None:
        self._energized = True
        await self._heartbeat.arm(ArmedOutput(self.board, self._intent))

    async def _switch_off(self, how: str) -> PoweredOff:
        off = await self._cut("off", how)
        self._tell(
            "board_off", how=how, off_mono=off.off_s, verified_mono=off.verified_s, verified_v=off.reading.voltage_v
        )
        return off

    async def _cut(self, state: State, how: str) -> PoweredOff:
        """Output off, verified, journal closed, dead-man disarmed; then the loop is in `state`."""
        if self.state == "on":
            self._on_cut(how)  # before it happens: whoever fails by the cut must find it told
        off = await safety.power_off(
            self._supply,
            self._channel,
            self._envelope,
            self._journal,
            self._intent,
            how=how,
            timeout_s=self._tuning.off_timeout_s,
            layers=self._layers,
            clock=self._clock,
            sleep=self._nap,
        )
        if self._previous is not None:  # from the last sample to the cut the board drew what it drew
            self._add_energy(self._previous.power_w * max(0.0, off.off_s - self._previous.time_s))
            self._feed_switching((off.off_s, self._previous.power_w))
        self.state, self._energized = state, False
        self._off_verified_s = off.verified_s
        self._forget(off.reading)
        await self._heartbeat.disarm(self._intent)
        return off

    async def _safe_state(self, failure: BaseException) -> None:
        """Best effort to end with the output off, even while this task is being cancelled."""
        reason = f"{type(failure).__name__}: {failure}"
        if not self._energized:
            self._tell("safe_state", reason=reason, output="was off", verified=True)
            return
        why = failure.message if isinstance(failure, BenchError) else type(failure).__name__
        cut = asyncio.ensure_future(self._cut("off", f"safe state ({why})"))
        while not cut.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((cut,))
        error = cut.exception()
        if error is not None and self._energized:
            # Not disarmed: when this process goes, the dead-man keeps trying.
            failure.add_note(f"and the safe state was not reached: {error}")
        self._tell(
            "safe_state",
            reason=reason,
            output="off" if not self._energized else f"unverified: {error}",
            verified=not self._energized,
        )

    # --------------------------------------------------------------------------------------------------- helpers
    async def _request(
        self,
        kind: Literal["on", "off", "dip"],
        setpoint: Setpoint | None,
        how: str,
        dip: tuple[float, float] = (0.0, 0.0),
    ) -> Any:
        if not self._running:
            raise BenchError(f"{self.board}: its power loop does not run")
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._commands.put_nowait(_Command(kind, setpoint, done, how, dip))
        return await done

    def _refuse_waiting(self) -> None:
        while not self._commands.empty():
            command = self._commands.get_nowait()
            if not command.done.done():
                command.done.set_exception(BenchError(f"{self.board}: the power loop has ended"))

    def _check_heartbeat(self, *, starting: bool = False) -> None:
        if (starting or self._energized) and not self._heartbeat.alive:
            raise SafetyError(
                f"{self.board}: the dead-man process is gone" + ("" if starting else " while the output is on"),
                hint="restart the bench daemon; its log says why the dead-man ended",
            )

    def _live(self) -> None:
        """The loop made progress: the heartbeat may go on for one step's budget."""
        self._alive_until_s = self._clock() + self._tuning.step_budget_s

    async def _pulse(self) -> None:
        """Beat while the loop waits for a slow instrument, but not for a loop that hangs."""
        while True:
            if self._clock() < self._alive_until_s:
                self._heartbeat.beat(self.board)
            await asyncio.sleep(self._tuning.pulse_s)

    async def _nap(self, seconds: float) -> None:
        self._live()
        await asyncio.sleep(seconds)

    def _journal_open(self) -> bool:
        return self._intent.key in {item.key for item in self._journal.open_intents()}

    def _add_energy(self, joules: float) -> None:
        """Wall joules; in mission time at the present rate (a skip is the model's, not a measurement's)."""
        self._energy_j += joules
        if self._flight is not None:
            self._mission_energy_j += joules * self._flight.clock.rate
            self.ledger.metered_j += joules
            self.ledger.metered_mission_j += joules * self._flight.clock.rate

    def _forget(self, reading: Reading | None = None) -> None:
        """Start metering anew from `reading`: the span of a switching sequence is not interpolated over."""
        self._previous = reading
        self._filtered_a = reading.current_a if reading else 0.0
        self._fresh_s = self._clock()
        self._breach_since_s = None
        self._gain = 0.0

    def _tell(self, kind: str, **data: Any) -> None:
        self._on_event(kind, {"board": self.board, **data})

    def _emit(self, reading: Reading, lateness_s: float) -> None:
        sample = PowerSample(
            reading.time_s,
            self.board,
            self.state,
            self._set.voltage_v,
            self._set.current_limit_a,
            reading.voltage_v,
            reading.current_a,
            reading.power_w,
            self._energy_j,
            self._mission_energy_j,
            lateness_s,
            *(() if self._flight is None else self._modelled(self._flight, reading.time_s)),
        )
        self.last = sample
        self._on_sample(sample)

    def _modelled(self, flight: Flight, now_s: float) -> tuple[float, ...]:
        """What a sample says in a flight only, from `t_mission` on."""
        mission_s = self._mission_s
        if mission_s is None or self._model_held:
            mission_s = flight.clock.mission_s(now_s)
        state = flight.eps.state
        return (
            mission_s,
            flight.clock.rate,
            state.soc,
            state.bus_voltage_v,
            flight.array_w(mission_s),
            state.array_used_w,
            state.battery_power_w,
            flight.sunlit(mission_s),
            self._gain,
        )


def _advance(flight: Flight, before_s: float, dt_s: float, assumed_board_w: float, step_s: float) -> float:
    """Step the model through `dt_s` from mission second `before_s`; the lowest watched voltage on the way."""
    steps = max(1, math.ceil(dt_s / step_s))
    lowest_v = math.inf
    for index in range(steps):
        array_w = flight.array_w(before_s + (index + 0.5) * dt_s / steps)
        lowest_v = min(lowest_v, flight.eps.step(dt_s / steps, assumed_board_w, array_w).watched_v)
    return lowest_v
