"""The power loop of one channel: meter it, feed the battery model, let the bus follow, shed and restore the load.

One task owns the channel. Each tick measures, integrates energy from the raw samples, and without a flight does no
more than that and beat. With a flight the filtered current drives the power system's model over the mission time that
passed, and the model's bus voltage becomes the supply's set point. Voltage steps are limited by the board's slew. The
load is shed by a real power cut.

A board that hangs on several channels has a loop for each. In a flight all of them feed one model; the first one that
the satellite's bus feeds leads: it sheds and restores the board's channels in their order. Others that the bus feeds
follow its voltage too, the rest stay at their set point.

Whatever goes wrong ends in the safe state: output off, verified, told as an event, and the error goes to the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from hil.bench import safety
from hil.bench.arrayflight import WRITE_EXCHANGES, ArraySource, refuse_fault, refuse_without_flight
from hil.bench.crosscheck import CrossCheck, Disagreement, hold_against
from hil.bench.deadman import ArmedOutput
from hil.bench.levels import Layers
from hil.bench.metering import Metering
from hil.bench.pacing import Pacing
from hil.bench.powerfaults import (
    BrownOut,
    CutFailed,
    DipFailed,
    LatchUp,
    LatchUpGuard,
    LatchUpLimits,
    Together,
    brown_out,
    check_dip,
)
from hil.bench.powerflight import FlightPower, check_flight
from hil.bench.powervalues import (
    Flight,
    Heartbeat,
    OnCut,
    OnEvent,
    PowerLedger,
    PowerSample,
    State,
    Tuning,
)
from hil.bench.safety import NO_LAYERS, Envelope, Intent, IntentJournal, PoweredOff, PoweredOn
from hil.bench.shedding import LoadShedding, Others
from hil.drivers.scpi import InstrumentError, Supply
from hil.errors import BenchError, SafetyError, UsageError
from hil.model import Reading, Setpoint

_Kind = Literal["on", "off", "dip", "shed", "restore"]


@dataclass(slots=True)
class _Command:
    kind: _Kind
    setpoint: Setpoint | None
    done: asyncio.Future[Any]
    how: str
    dip: _Dip | None = None


@dataclass(frozen=True, slots=True)
class _Dip:
    depth_v: float
    duration_s: float
    together: Together


class PowerLoop:
    """Owns one channel for one board. `run` is its task; everybody else calls `request_on`, `request_off`, `attach`.

    `main`: the satellite's bus feeds the channel, so that a flight moves its voltage; the others hang on a modelled
    converter of `converter_efficiency`. `array`: the channel is the satellite's array instead, and nothing behind it is
    modelled. `before_on` is awaited before the start sequence.
    """

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
        main: bool = True,
        converter_efficiency: float = 1.0,
        array: ArraySource | None = None,
        before_on: Callable[[], Awaitable[None]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.board = board
        self.state: State = "off"
        self.overruns = 0
        self.starts = 0  # how often the channel gave the board its power anew
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
        self._shedding = LoadShedding(self, self._pass_on)
        self._main = main
        self._efficiency = 1.0 if main else converter_efficiency
        self._array = array
        self._before_on = before_on
        self._set = nominal
        self._set_lost = False
        self._latch_up = LatchUpGuard(board, envelope, self._cut_latch_up, self._pass_on)
        self._energized = False  # an output that may be on, whatever the state is called
        self._off_verified_s: float | None = None
        self._alive_until_s = 0.0
        self._slot = (pacing or Pacing()).join(id(supply))
        self._writes_s: deque[float] = deque(maxlen=5)
        self._meter = meter
        self._metering = Metering(board, supply, channel, self._tuning, tell=self._pass_on, clock=clock)
        self._breach_since_s: float | None = None
        self._foreign = False
        self._setpoint_late_s = 0.0
        self._energy_at_on_j = 0.0
        self._running = False

    # ---------------------------------------------------------------------------------------------- for others
    @property
    def flight(self) -> Flight | None:
        return None if self._flown is None else self._flown.flight

    @property
    def ledger(self) -> PowerLedger:
        """What was measured and fed since the flight began, the last one's after its end."""
        return self._metering.ledger

    @property
    def _flown(self) -> FlightPower | None:
        return self._metering.flown

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

    async def request_shed(self, why: str) -> PoweredOff | None:
        """Off until `request_restore`; None when it is not on. For `LoadShedding`."""
        result: PoweredOff | None = await self._request("shed", None, why)
        return result

    async def request_restore(self) -> PoweredOn | None:
        """What was shed on again, at the voltage of the bus; None when it is no longer shed."""
        result: PoweredOn | None = await self._request("restore", None, "restored")
        return result

    async def request_dip(self, depth_v: float, duration_s: float, together: Together | None = None) -> BrownOut:
        """Lower the voltage for a while; nothing else is done with the channel meanwhile. See `powerfaults`."""
        dip = _Dip(depth_v, duration_s, together or Together())
        result: BrownOut = await self._request("dip", None, "requested", dip)
        return result

    def watch_latch_up(self, limits: LatchUpLimits) -> asyncio.Future[LatchUp]:
        """Cut when the current stays above a threshold; done with the cut. One at a time; see `disarm_latch_up`."""
        if self._array is not None:
            raise refuse_fault(self.board, "a latch-up current")
        return self._latch_up.arm(limits)

    def disarm_latch_up(self) -> None:
        """Call the watch off; a cut that is under way goes on."""
        self._latch_up.disarm()

    @property
    def energized(self) -> bool:
        """Whether the output may be on, whatever the state is called."""
        return self._energized

    @property
    def rested_s(self) -> float | None:
        """For how long the output has been verified off; None before the first time."""
        return None if self._off_verified_s is None else self._clock() - self._off_verified_s

    @property
    def setpoint(self) -> Setpoint:
        """What the channel was last set to."""
        return self._set

    def attach(self, flight: Flight, others: Others | None = None) -> None:
        """Close the loop, with `others` of the same board. UsageError when the mission cannot be flown so.

        That is a gain above 0.5, a loop that is too slow; SafetyError a bus outside the limits.
        """
        others = others or Others()
        loops = (self, *(loop for _, loop in (*others.before, *others.after)))
        board_min_v = max(loop._envelope.voltage_min_v for loop in loops if loop._main)
        check_flight(self.board, flight, board_min_v, min(loop._efficiency for loop in loops))
        for loop in loops:
            loop._check_flight(flight)
        meter = next((loop._meter.name for loop in loops if loop._meter is not None), "")
        flown = FlightPower(flight, board_min_v, tell=self._pass_on, clock=self._clock, meter=meter)
        if self._array is not None:
            self._writes_s.append(self._array.begin(lambda: flight.clock.mission_s(self._clock())))
        self._shedding.others = others
        for loop in loops:
            loop._metering.flown, loop._metering.ledger = flown, flown.ledger

    def _check_flight(self, flight: Flight) -> None:
        if self.period_s > flight.bounds.period_s:
            raise UsageError(
                f"{self.board}: the supply allows a loop of {self.period_s:.3f} s, the mission needs "
                f"{flight.bounds.period_s:.3f} s",
                hint="use a faster supply, or fewer boards on it",
            )
        if self._main and flight.eps is not None:
            self._envelope.check(Setpoint(flight.eps.state.bus_voltage_v, self._nominal.current_limit_a))

    def detach(self) -> None:
        """Open the loop: the set point stays where it is, metering goes on. A shed load stays off."""
        others, self._shedding.others = self._shedding.others, None
        if others is not None:
            for _, loop in (*others.before, *others.after):
                loop.detach()
        self._metering.flown = None
        if self.state == "shed":
            self.state = "off"

    def advanced_model(
        self, until_s: float, assumed_board_w: float, step_s: float
    ) -> AbstractAsyncContextManager[None]:
        """See `FlightPower.advanced`. UsageError without a flight."""
        if self._flown is None:
            raise UsageError(f"{self.board} is not in a flight")
        return self._flown.advanced(until_s, assumed_board_w, step_s)

    # ------------------------------------------------------------------------------------------------- the task
    async def run(self) -> None:
        """Loop until cancelled. Leaves with the output verified off, or raises SafetyError that says it is not."""
        self._running = True
        self._live()
        beside = [asyncio.create_task(self._pulse(), name=f"pulse-{self.board}")]
        if self._meter is not None:
            beside.append(asyncio.create_task(self._watch_meter(self._meter), name=f"meter-{self.board}"))
        try:
            await self._calibrate()
            await self._loop()
        except BaseException as failure:
            await self._safe_state(failure)
            raise
        finally:
            self._running = False
            self._slot.leave()
            self._shedding.cancel()
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
            writes = 1.0 if self._array is None else WRITE_EXCHANGES
            self._slot.measured((1.0 + writes) * reading.exchange_s)
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
        self._shedding.check()
        reading = await self._read()
        if reading is None:
            return
        dark = self._energized and self._array is not None and self._array.expected is not True
        if self._energized and not reading.output_on and not dark:
            await self._on_trip(reading)
        elif self._energized:
            if self._array is not None:
                self._judge_array(self._array, reading)
            await self._watch_envelope(reading)
            if self._energized:
                await self._latch_up.judge(reading)
        else:
            self._watch_foreign(reading)
        if self._flown is not None and not self._flown.held:
            await self._fly(self._flown, reading, due_s)
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
        if self._flown is not None:
            self._flown.judge_timing(self.board, lateness_s, self.period_s)

    def _watch_meter(self, meter: CrossCheck) -> Coroutine[Any, Any, None]:
        def compared(count: int) -> None:
            self.ledger.compared += count

        def apart(cause: str, found: Disagreement) -> None:
            if self._flown is not None:
                self._flown.declare(self.board, "meters", cause, supply_w=found.supply_w, board_w=found.board_w)

        return hold_against(
            meter,
            is_on=lambda: self.state == "on",
            # Any question feeds a supply's watchdog: it must not outlive a loop that hangs.
            may_ask=lambda: self._clock() < self._alive_until_s,
            tell=self._pass_on,
            compared=compared,
            apart=apart,
        )

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
        breach = self._breach(reading)
        if not breach:
            self._breach_since_s = None
            return
        if self._breach_since_s is None:
            self._breach_since_s = reading.time_s
        if reading.time_s - self._breach_since_s >= self._tuning.breach_s:
            self._tell("envelope_breach", cause=breach, voltage_v=reading.voltage_v, current_a=reading.current_a)
            await self._cut("tripped", f"outside the envelope: {breach}")

    def _breach(self, reading: Reading) -> str:
        return self._envelope.breach(reading, self._metering.energy_j - self._energy_at_on_j)

    def _watch_foreign(self, reading: Reading) -> None:
        """Somebody else switched this channel on: said once, not touched. The start sequence refuses it too."""
        if reading.output_on and not self._foreign:
            self._tell("foreign_output", voltage_v=reading.voltage_v, current_a=reading.current_a)
        self._foreign = reading.output_on

    # -------------------------------------------------------------------------------------------- with a flight
    async def _fly(self, flown: FlightPower, reading: Reading, due_s: float) -> None:
        if self._array is not None:
            flown.passed(self._clock())
            if self.state == "on":
                await self._follow_array(self._array, due_s)
            return
        board_w = self._metering.drawn_w(reading) if self._energized else 0.0
        state = flown.feed(self.board, board_w, self._clock(), self._efficiency)
        if self._shedding.leads:
            flown.gain = flown.model.gain(flown.bus_w)
            self._shedding.judge(flown)
        # Below the board's minimum the loop that leads sheds it, within a tick of its own.
        if self._main and self.state == "on" and state.bus_voltage_v >= flown.board_min_v:
            await self._follow(Setpoint(state.bus_voltage_v, self._nominal.current_limit_a), due_s)

    def _feed_reading(self, reading: Reading) -> None:
        """A measurement of a switching sequence: the other channels' loops advance the model meanwhile."""
        self._feed_switching(reading.time_s, reading.power_w if reading.output_on else 0.0)

    def _feed_switching(self, until_s: float, watts: float) -> None:
        """Tell the model what was drawn between two ticks."""
        if self._flown is not None and self._array is not None:
            self._flown.passed(until_s)
        elif self._flown is not None and not self._flown.held:
            self._flown.feed(self.board, watts, until_s, self._efficiency)

    def _judge_array(self, array: ArraySource, reading: Reading) -> None:
        if array.expected is False and reading.output_on:
            raise SafetyError(
                f"{self.board}: its array is in the dark, and the output is on",
                hint="somebody else switched it on at the instrument",
            )
        array.judge(reading, self._envelope.undervoltage_lockout_v, self._tuning.breach_s, self._pass_on)

    async def _follow_array(self, array: ArraySource, due_s: float) -> None:
        """Bring the channel to this moment's light."""
        try:
            applied = await array.follow(due_s, self._pass_on)
        except InstrumentError as error:
            self._tell("setpoint_lost", error=error.message, wanted_v=array.setpoint.voltage_v)
            return
        if applied is None:
            self.ledger.writes_skipped += 1
            return
        self._set, self._setpoint_late_s = array.setpoint, applied.lateness_s
        self._writes_s.append(applied.verified_s - applied.sent_s)
        self.ledger.writes += 1

    async def _follow(self, wanted: Setpoint, due_s: float) -> None:
        """Bring the channel to the bus's voltage, as fast as the board's slew allows."""
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

    # ------------------------------------------------------------------------------------------------- switching
    async def _obey(self, command: _Command) -> None:
        if command.done.cancelled() and command.kind != "off":
            return  # whoever asked is gone
        was_on = self.state == "on"
        try:
            result: PoweredOn | PoweredOff | BrownOut | None
            if command.kind == "off":
                result = await self._switch_off(command.how)
            elif command.dip is not None:
                result = await self._dip(command.dip)
            elif command.kind == "shed":
                result = await self._cut("shed", command.how) if self.state == "on" else None
            elif command.kind == "restore":
                result = await self._power_on(self._bus()) if self.state == "shed" else None
            else:
                result = await self._switch_on(command.setpoint)
        except BaseException as error:
            if not command.done.done():
                command.done.set_exception(
                    BenchError(f"{self.board}: the power loop is ending")
                    if isinstance(error, asyncio.CancelledError)
                    else error
                )
            # A refused or failed start that ended with the output off is the caller's, and so are an on of what is on
            # and a dip that was refused or after which the old set point is in force again; all else ends the loop too.
            refused = (command.kind == "dip" and isinstance(error, UsageError | DipFailed)) or (
                command.kind == "on" and was_on and isinstance(error, UsageError)
            )
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
        if self._array is not None and self._flown is None:
            raise refuse_without_flight(self.board)
        if self._flown is not None:
            setpoint = self._bus() if self._main else self._nominal
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

    def _bus(self) -> Setpoint:
        """What the flight's bus feeds now."""
        if self._array is not None:
            return self._array.setpoint
        volts = self._nominal.voltage_v if self._flown is None else self._flown.state.bus_voltage_v
        return Setpoint(volts, self._nominal.current_limit_a)

    async def _dip(self, asked: _Dip) -> BrownOut:
        try:
            self._check_dip(asked)
            return await self._brown_out(asked)
        except BaseException:
            await asked.together.give_up()
            raise

    def _check_dip(self, asked: _Dip) -> None:
        if self.state != "on":
            raise UsageError(f"{self.board} is {self.state}: only a board that is on can be dipped")
        if self._array is not None:
            raise refuse_fault(self.board, "a dip")
        check_dip(self._envelope, self._set, asked.depth_v, asked.duration_s)
        if self._flown is not None and asked.duration_s > (longest_s := self._flown.flight.bounds.lateness_s):
            raise UsageError(
                f"{self.board}: in this flight a set point may be {longest_s:g} s late, a dip of "
                f"{asked.duration_s:g} s keeps the bus from it for longer",
                hint="a shorter dip, or one outside a flight; nothing was sent to the supply",
            )

    async def _brown_out(self, asked: _Dip) -> BrownOut:
        breaches: list[str] = []
        low_v = self._set.voltage_v - asked.depth_v

        async def sample() -> Reading | None:
            reading = await self._sample()
            if reading is None or not reading.output_on:
                return reading
            breaches.extend(filter(None, (self._breach(reading),)))
            try:
                await self._latch_up.judge(reading)
            except BenchError as error:  # more than a dip that failed
                raise CutFailed(error.message, hint=error.hint) from error
            return replace(reading, output_on=self._energized)

        def begun() -> None:
            if low_v < self._envelope.undervoltage_lockout_v:
                if not asked.together.cut_told:
                    self._on_cut(f"brown-out to {low_v:g} V")
                asked.together.cut_told = True
                self.starts += 1

        done = await brown_out(
            self._supply,
            self._channel,
            self._envelope,
            self._set,
            asked.depth_v,
            asked.duration_s,
            asked.together,
            latch_up_armed=self._latch_up.armed,
            begun=begun,
            sample=sample,
            nap=self._nap,
            # Neither an off nor a breach, which the ticks then judge, waits for the end of a long dip.
            interrupted=lambda: bool(breaches) or not self._commands.empty(),
            clock=self._clock,
        )
        self._metering.touch()
        self._tell("brown_out", **asdict(done))
        return done

    async def _sample(self) -> Reading | None:
        """One measurement outside the grid of ticks: metered and recorded like any."""
        self._check_heartbeat()
        reading = await self._read()
        if reading is not None:
            self._emit(reading, 0.0)
        return reading

    async def _read(self) -> Reading | None:
        """Read and account one measurement, or None when the supply did not answer. Raises as `Metering.read`."""
        reading = await self._metering.read(self._energized)
        if reading is not None:
            self._metering.account(reading, self._energized)
            if self._meter is not None and self._energized:
                self._meter.supply(reading)
        return reading

    async def _power_on(self, setpoint: Setpoint) -> PoweredOn:
        self._check_heartbeat(starting=True)
        try:
            if self._before_on is not None:
                await self._before_on()
            on = await safety.power_on(
                self._supply,
                self._channel,
                self._envelope,
                setpoint,
                self._journal,
                self._intent,
                off_since_s=self._off_verified_s,
                source=self._array,
                layers=self._layers,
                armed=self._arm,
                clock=self._clock,
                sleep=self._nap,
                on_reading=self._feed_reading,
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
        self.state, self._set = "on", setpoint if self._array is None else self._array.setpoint
        self.starts += 1
        self._latch_up.restart()
        self._energy_at_on_j = self._metering.energy_j
        self._metering.add_energy(on.energy_j, on.on_s, on.settled_s)
        self._forget(on.reading)
        if self._flown is not None and self._shedding.leads:
            self._flown.switched()
        return on

    async def _arm(self) -> None:
        self._energized = True
        self._feed_switching(self._clock(), 0.0)
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
        last = self._metering.previous
        if last is not None and self._energized:  # until now the board drew what it drew
            self._feed_switching(self._clock(), last.power_w)
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
            on_reading=self._feed_reading,
        )
        if last is not None:  # from the last sample to the cut the board drew what it drew
            self._metering.add_energy(last.power_w * max(0.0, off.off_s - last.time_s), last.time_s, off.off_s)
        self.state, self._energized = state, False
        self._off_verified_s = off.verified_s
        self._forget(off.reading)
        await self._heartbeat.disarm(self._intent)
        return off

    async def _cut_latch_up(self, why: str) -> tuple[float, float]:
        off = await self._cut("off", why)
        return off.off_s, off.verified_s

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
        kind: _Kind,
        setpoint: Setpoint | None,
        how: str,
        dip: _Dip | None = None,
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

    def _forget(self, reading: Reading) -> None:
        """Begin anew with the reading that ended a switching sequence."""
        self._metering.forget(reading)
        self._breach_since_s = None
        if self._flown is not None and self._shedding.leads:
            self._flown.gain = 0.0

    def _tell(self, kind: str, **data: Any) -> None:
        self._pass_on(kind, data)

    def _pass_on(self, kind: str, data: dict[str, Any]) -> None:
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
            self._metering.energy_j,
            self._metering.mission_energy_j,
            lateness_s,
            *(() if self._flown is None else self._flown.sampled(reading.time_s)),
        )
        self.last = sample
        self._on_sample(sample)
