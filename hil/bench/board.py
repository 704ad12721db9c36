"""One board as the daemon owns it: its power loops, its console and its link, and what is counted about it.

A board may hang on several supply channels, a power loop each. What is on, tripped or shed is told of the channel that
leads: the first one that the satellite's bus feeds. A channel that goes off by itself takes the others with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hil.bench.arrayflight import ArraySource
from hil.bench.boardfaults import FedInput, arm_latch_up, ask, dip_together, raise_end, wait_latch_up
from hil.bench.consoles import Console
from hil.bench.controls import Controls
from hil.bench.crosscheck import CrossCheck
from hil.bench.cutpoint import ArmedCut, CutPoint
from hil.bench.exporter import BoardMetrics, FlightMetrics, LinkMetrics, per_phase
from hil.bench.journal import utc_text
from hil.bench.levels import Layers
from hil.bench.pacing import Pacing
from hil.bench.player import BOTH_OUT, LinkOwner
from hil.bench.powerfaults import LatchUpLimits
from hil.bench.powerloop import PowerLoop
from hil.bench.powervalues import Flight, Heartbeat, PowerSample
from hil.bench.safety import NO_LAYERS, Envelope, Intent, IntentJournal, PoweredOff, PoweredOn
from hil.bench.shedding import Others
from hil.drivers.outlets import outlet_for
from hil.drivers.scpi import Supply
from hil.errors import BenchError, HilError, UsageError
from hil.inventory.bench import BenchBoard
from hil.inventory.board_type import BoardType
from hil.model import Direction, LinkState, Reading, Setpoint

log = logging.getLogger("hil.board")

FIRST_SAMPLE_S = 5.0
OFF_MAX_S = 3600.0
# A board is on and off with its leading channel; of the others it is told under another name.
OF_AN_INPUT = {"board_on": "input_on", "board_off": "input_off"}
WENT_OFF = frozenset({"tripped", "envelope_breach", "latch_up"})
# Told by the power loop at every tick while they last; the log and the journal take one a second.
FREQUENT = frozenset({"slew_limited", "overrun", "setpoint_lost"})


@dataclass(frozen=True, slots=True)
class Channel:
    """A supply channel that feeds one input of the board: its limits, what it gets, what stands behind it.

    `main`: the satellite's bus feeds it: asked voltages, dips and flights are its. The others hang, in a flight, on a
    modelled converter of `converter_efficiency`. `rail` is the input's name, empty for the board's main one. `array`:
    the channel is the satellite's array, for a power unit with a battery that the board hangs behind.
    """

    supply: Supply
    number: int
    intent: Intent
    on_delay_s: float
    envelope: Envelope
    nominal: Setpoint
    layers: Layers = NO_LAYERS
    main: bool = True
    pacing: Pacing | None = None
    meter: CrossCheck | None = None
    rail: str = ""
    converter_efficiency: float = 1.0
    array: ArraySource | None = None
    before_on: Callable[[], Awaitable[None]] | None = None

    @property
    def input(self) -> str:
        """What the record calls it."""
        return self.rail or "main"


class BoardOwner:
    """Everything the daemon does with one board. `on_event` gets what the power loops tell, `on_sample` each sample.

    `on_failure` gets the error that ended a power loop; the output is then verified off, or the dead-man will see to
    it because the beats have stopped. `on_cut` is told when the power epoch has risen.
    """

    def __init__(
        self,
        name: str,
        wires: BenchBoard,
        board_type: BoardType,
        channels: tuple[Channel, ...],
        console: Console | None,
        link: LinkOwner | None,
        journal: IntentJournal,
        heartbeat: Heartbeat,
        *,
        on_event: Callable[[BoardOwner, str, dict[str, Any]], None],
        on_sample: Callable[[BoardOwner, PowerSample], None],
        on_failure: Callable[[BoardOwner, BaseException], None],
        on_cut: Callable[[BoardOwner], None] = lambda board: None,
        first_epoch: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.wires = wires
        self.type = board_type
        self.channels = channels
        self._names = _input_names(channels)
        self.console = console
        self.link = link
        self.energy_j = per_phase()
        self.tokens = per_phase()
        self.upload_bytes = 0.0
        self.power_epoch = first_epoch
        self.power_cuts = 0
        self.last_cut = f"before {utc_text(time.time())}: the daemon that knew this board then is gone"
        self.overruns = 0
        self.player_overruns = 0
        self.fault = ""
        self.last: PowerSample | None = None
        self.sampled_at_s: float | None = None
        self._journal = journal
        self._heartbeat = heartbeat
        self._on_event = on_event
        self._on_sample = on_sample
        self._on_failure = on_failure
        self._on_cut = on_cut
        self._monotonic = monotonic
        self._loops: list[tuple[PowerLoop, asyncio.Task[None]]] = []
        self._newest: dict[int, PowerSample] = {}
        self._seen_energy_j = 0.0
        self._cut_starts = 0
        self._followers: set[asyncio.Task[None]] = set()
        self._told_s: dict[str, float] = {}
        self.cut: ArmedCut | None = None
        self.controls = Controls(name, wires.lines)
        self._last_off: PoweredOff | None = None
        self._switching = asyncio.Lock()
        self._switched_s = 0.0

    @property
    def state(self) -> str:
        """`off`, `on`, `shed` or `tripped`: the leading channel's."""
        return self._loops[self._lead][0].state if self._loops else "off"

    @property
    def on_array(self) -> bool:
        """Whether a real power unit on a simulated array feeds it, so that no battery is modelled."""
        return any(channel.array is not None for channel in self.channels)

    @property
    def energized(self) -> bool:
        """Whether an output of this board is or may be on."""
        keys = {item.intent.key for item in self.channels}
        return any(loop.state == "on" for loop, _ in self._loops) or any(
            intent.key in keys for intent in self._journal.open_intents()
        )

    async def until_off(self) -> None:
        """Return when every output of this board is verified off, by whomever."""
        while self.energized:  # noqa: ASYNC110 (the dead-man may be the one who does it: another process)
            await asyncio.sleep(0.05)

    async def loop(self) -> PowerLoop:
        """The running power loop that leads, after the first sample of every channel."""
        async with self._switching:  # nobody ends them meanwhile
            await self._start_loops()
            deadline = self._monotonic() + FIRST_SAMPLE_S
            for loop, task in self._loops:
                while loop.last is None:
                    raise_end(task)
                    if self._monotonic() > deadline:
                        raise BenchError(f"board {self.name}: its supply gave no sample within {FIRST_SAMPLE_S:g} s")
                    await asyncio.sleep(0.01)
            return self._loops[self._lead][0]

    def inputs(self) -> dict[str, PowerSample]:
        """The newest sample of each channel by the name of its input."""
        return {self._names[index]: sample for index, sample in self._newest.items()}

    def attach(self, flight: Flight) -> PowerLoop:
        """Begin a flight on the running loops; the one that leads. Raises what `PowerLoop.attach` raises.

        BenchError when they have ended since `loop` gave them: the lease may have.
        """
        if not self._loops:
            raise BenchError(f"board {self.name}: its power loops have ended: its lease is over")
        for _, task in self._loops:
            raise_end(task)
        delayed = [(channel.on_delay_s, loop) for channel, (loop, _) in zip(self.channels, self._loops, strict=True)]
        others = None
        if len(delayed) > 1:
            delay_s, _ = delayed[self._lead]
            before, after = tuple(delayed[: self._lead]), tuple(delayed[self._lead + 1 :])
            others = Others(before, after, delay_s, self._switching)
        lead = self._loops[self._lead][0]
        lead.attach(flight, others)
        return lead

    async def on(
        self, voltage_v: float | None, allowed: Callable[[], object], *, cycle: bool = False
    ) -> dict[str, Any]:
        """Every channel on, in order, through the start sequence; all off again when one fails. `cycle`: off first.

        `allowed` is asked when it is this call's turn: its lease may have ended while it stood in line, and whoever
        ended it has seen to it already that the board is off.
        """
        async with self._switching:
            allowed()
            try:
                if cycle:
                    await self._all_off("power cycle")
                    allowed()
                return await self._all_on(voltage_v)
            finally:
                self._switched_s = self._monotonic()

    async def off(self, how: str) -> dict[str, Any]:
        """Every channel off, in reverse order, each verified; the first failure is raised after all were tried."""
        async with self._switching:
            try:
                reading = await self._all_off(how)
                if reading is None and (answer := await self.read())["output_on"]:
                    await self._start_loops()  # somebody else switched it on; that it should be off was said here
                    reading = await self._all_off(how)
            finally:
                self._switched_s = self._monotonic()
        if reading is None:
            return answer
        done = self._last_off
        times = {} if done is None else {"off_s": done.off_s, "verified_s": done.verified_s}
        return {**self._answer(reading), **times}

    # ---------------------------------------------------------------------------------------------- faults on purpose
    async def brown_out(self, depth_v: float, duration_s: float, allowed: Callable[[], object]) -> dict[str, Any]:
        """A dip of every input that the bus feeds, see `dip_together`: the leading one's, and `others` by name."""
        allowed()
        done = {name: asdict(item) for name, item in (await dip_together(self._fed(), depth_v, duration_s)).items()}
        lead = done.pop(self._names[self._lead])
        return {**lead, "others": done, "power_epoch": self.power_epoch}

    async def latch_up(
        self,
        limits: LatchUpLimits,
        off_s: float,
        wait_s: float,
        allowed: Callable[[], object],
        of_input: str | None = None,
    ) -> dict[str, Any]:
        """Watch the current of every input, or of one; cut the board when one stays too high, rest, start it again.

        The input that latched goes off at once, the others after it in reverse order; `off_s` counts from the last
        measured off. UsageError for a threshold above an input's limit. BenchError when no current stayed above it
        within `wait_s`: nothing was cut.
        """
        dwell_s = max(channel.envelope.off_dwell_s for channel in self.channels)
        if not dwell_s <= off_s <= OFF_MAX_S:
            raise UsageError(
                f"after a latch-up cut the board rests for {dwell_s:g} s (its off dwell) to {OFF_MAX_S:g} s, "
                f"not {off_s:g} s"
            )
        allowed()
        fed = self._fed()
        voltage_v = fed[self._lead].loop.setpoint.voltage_v
        cut = await wait_latch_up(self.name, fed, arm_latch_up(self.name, fed, limits, of_input), wait_s)
        if cut is None:
            raise BenchError(
                f"board {self.name} did not draw more than {limits.threshold_a:g} A for {limits.hold_s:g} s within "
                f"{wait_s:g} s",
                hint="lower the threshold, load the board, or emulate the current with added_a; nothing was cut",
            )
        latched, done = cut
        rests_s = done.verified_s
        if len(fed) > 1:
            await self.off("latch-up: the board's other inputs")
            rests_s = self._monotonic()
        await asyncio.sleep(max(0.0, rests_s + off_s - self._monotonic()))
        answer = await self.on(voltage_v, allowed)
        self._event("latch_up_restart", {"board": self.name, "off_s": answer["on_s"] - done.cut_s})
        return {**answer, **asdict(done), "held_s": done.cut_s - done.exceeded_s, "input": latched}

    def arm_cut(self, point: CutPoint, allowed: Callable[[], object]) -> ArmedCut:
        """Cut the board's power at a place on its console; one at a time."""
        if self.console is None:
            raise UsageError(f"board {self.name} has no console", hint="add `console:` to the bench file")
        if self.cut is not None and self.cut.live:
            raise UsageError(f"board {self.name} has a cut point armed", hint="disarm it first")

        async def off(how: str) -> tuple[float, float]:
            allowed()
            was_on = self.energized
            await self.off(how)
            done = self._last_off
            if done is None or not was_on:
                raise BenchError(f"board {self.name} was off already when its cut point came")
            return done.off_s, done.verified_s

        self.cut = ArmedCut(point, self.console.ring, self.console.wait_beyond, off, clock=self._monotonic)
        return self.cut

    async def calm(self) -> None:
        """A lease is over: nothing that it armed may still happen, and no button stays pressed."""
        if self.cut is not None:
            await self.cut.disarm()
        for loop, _ in self._loops:
            loop.disarm_latch_up()
        await self.controls.release_all()

    async def outlet(self, on: bool | None) -> dict[str, Any]:
        """Ask the outlet behind the main input, or switch it: a person's word after a cut of last resort."""
        address = self.channels[self._lead].layers.outlet
        if not address:
            raise UsageError(f"board {self.name} has no outlet", hint="add `outlet:` to its supply in the bench file")
        if on is False and self.energized:
            raise UsageError(f"board {self.name} is on", hint="switch it off first: hil board power off")
        driver = outlet_for(address)
        if on is not None:
            await asyncio.to_thread(driver.switch, on)
        return {"outlet": address, "confirms": driver.confirms, "on": await asyncio.to_thread(driver.state)}

    @property
    def _lead(self) -> int:
        return next((index for index, channel in enumerate(self.channels) if channel.main), 0)

    def _fed(self) -> list[FedInput]:
        """The inputs with their running loops, in order. UsageError when there are none."""
        if not self._loops:
            raise UsageError(f"board {self.name} is off", hint="switch it on first")
        raise_end(self._loops[self._lead][1])
        rows = enumerate(zip(self._names, self.channels, self._loops, strict=True))
        # Without a channel on the bus, which a bench file cannot say, the leading one stands for it.
        return [
            FedInput(name, channel.envelope, channel.main or index == self._lead, loop, task)
            for index, (name, channel, (loop, task)) in rows
        ]

    async def read(self) -> dict[str, Any]:
        """The newest sample; a measurement of now when no loop runs, or when that sample is from before a switching."""
        sample = self.last
        if (
            sample is not None
            and sample.t_mono > self._switched_s
            and self._loops
            and not any(task.done() for _, task in self._loops)
        ):
            array = self.channels[self._lead].array
            output_on = self.state == "on" and (array is None or array.lit)  # in the dark an array is off
            reading = Reading(sample.t_mono, sample.voltage_v, sample.current_a, sample.power_w, output_on)
        else:
            channel = self.channels[self._lead]
            await channel.supply.open()
            reading = await channel.supply.measure(channel.number)
        return self._answer(reading)

    async def rest(self) -> None:
        """End the power loops: nobody polls the supply of a board that nobody uses. Outputs on go off, verified."""
        async with self._switching:
            await self._end_loops()

    async def set_link(self, states: dict[Direction, LinkState] | None) -> dict[str, Any]:
        """Apply both directions, or clear with None."""
        link = self.need_link()
        if states is None:
            await link.clear()
        else:
            await link.apply(states, self._monotonic())
        return self.link_state()

    def need_link(self) -> LinkOwner:
        """The link's owner; UsageError when the bench file gives the board none."""
        if self.link is None:
            raise UsageError(
                f"board {self.name} has no link emulator", hint="add `payload:` with its `link:` to the bench file"
            )
        return self.link

    def link_state(self) -> dict[str, Any]:
        """What is applied now."""
        states = self.need_link().states
        return {
            "up": states is not None and not any(state.outage for state in states.values()),
            "known": states is not None,
            "states": None if states is None else {name: asdict(state) for name, state in states.items()},
        }

    async def hold(self) -> None:
        """A lease with `on_lease_end: hold` is over: power stays, the payload link is blocked."""
        if self.link is not None:
            await self.link.apply(BOTH_OUT, self._monotonic())

    def metrics(self, flight: FlightMetrics | None, phase: str) -> BoardMetrics:
        """This moment for the exporter."""
        sample = self.last
        return BoardMetrics(
            board=self.name,
            type=self.type.name,
            phase=phase,
            commanded_on=self.state == "on",
            power_w=None if sample is None else sample.power_w,
            voltage_v=None if sample is None else sample.voltage_v,
            current_a=None if sample is None else sample.current_a,
            sampled_at_s=self.sampled_at_s,
            energy_j=dict(self.energy_j),
            tokens=dict(self.tokens),
            upload_bytes=self.upload_bytes,
            lateness_s=0.0 if sample is None else sample.lateness_s,
            overruns=self.overruns + sum(loop.overruns for loop, _ in self._loops),
            player_overruns=self.player_overruns,
            power_cuts=self.power_cuts,
            link=None if self.link is None else _link_metrics(self.link),
            flight=flight,
        )

    def count_energy(self, sample: PowerSample, phase: str) -> None:
        """Attribute what this sample added to the phase it was drawn in."""
        self.energy_j[phase] += max(0.0, sample.energy_j - self._seen_energy_j)
        self._seen_energy_j = sample.energy_j

    def _answer(self, reading: Reading | None) -> dict[str, Any]:
        return {**({} if reading is None else asdict(reading)), "state": self.state, "power_epoch": self.power_epoch}

    async def _start_loops(self) -> None:
        if self._loops and not any(task.done() for _, task in self._loops):
            return
        await self._end_loops()
        self.fault = ""
        self.last = None
        self._newest.clear()
        self._seen_energy_j = 0.0
        self._cut_starts = 0
        self._loops = [self._start_loop(index, channel) for index, channel in enumerate(self.channels)]
        await asyncio.sleep(0)  # a loop takes requests once its task has begun

    def _start_loop(self, index: int, channel: Channel) -> tuple[PowerLoop, asyncio.Task[None]]:
        def sampled(sample: PowerSample) -> None:
            self._newest[index] = sample
            if index == self._lead:
                self.sampled_at_s = time.time()
                self.last = self._whole(sample)
                self._on_sample(self, self.last)

        def told(kind: str, data: dict[str, Any]) -> None:
            if len(self.channels) > 1:
                data = {**data, "board": self.name, "input": self._names[index]}
                kind = kind if index == self._lead else OF_AN_INPUT.get(kind, kind)
            self._event(kind, data)
            if kind in WENT_OFF and len(self.channels) > 1:
                following = self._follow_off(loop, loop.starts, f"{self._names[index]} {kind}")
                task = asyncio.get_running_loop().create_task(following)
                self._followers.add(task)
                task.add_done_callback(self._followers.discard)

        loop = PowerLoop(
            self.name if len(self.channels) == 1 else f"{self.name}/{index}",
            channel.supply,
            channel.number,
            channel.envelope,
            self._journal,
            channel.intent,
            self._heartbeat,
            channel.nominal,
            on_sample=sampled,
            on_event=told,
            on_cut=self._cut,
            layers=channel.layers,
            pacing=channel.pacing,
            meter=channel.meter,
            main=channel.main,
            converter_efficiency=channel.converter_efficiency,
            array=channel.array,
            before_on=channel.before_on,
        )
        task = asyncio.get_running_loop().create_task(loop.run(), name=f"power-{self.name}-{index}")
        task.add_done_callback(self._loop_ended)
        return loop, task

    def _whole(self, sample: PowerSample) -> PowerSample:
        """The leading channel's sample with the watts and joules of all channels, each as last measured."""
        if len(self.channels) == 1:
            return sample
        newest = self._newest.values()
        return replace(
            sample,
            board=self.name,
            power_w=sum(other.power_w for other in newest),
            energy_j=sum(other.energy_j for other in newest),
            mission_energy_j=sum(other.mission_energy_j for other in newest),
            lateness_s=max(other.lateness_s for other in newest),
        )

    async def _follow_off(self, gone: PowerLoop, starts: int, why: str) -> None:
        """A channel went off by itself: the others go off too, in reverse order. What fails ends its power loop.

        Not when `gone` was started anew meanwhile, as by a power cycle that had the turn: the board is fed again.
        """
        async with self._switching:
            if gone.starts != starts or all(loop is not gone for loop, _ in self._loops):
                return
            for loop, task in reversed(self._loops):
                if loop is not gone and loop.state == "on":
                    with contextlib.suppress(HilError):
                        await ask(loop.request_off(f"another input went off: {why}"), task)

    async def _end_loops(self) -> None:
        for _, task in reversed(self._loops):
            task.cancel()
        if self._loops:
            await asyncio.wait([task for _, task in self._loops])
        self.overruns += sum(loop.overruns for loop, _ in self._loops)
        self._loops = []

    async def _all_on(self, voltage_v: float | None) -> dict[str, Any]:
        if len(self.channels) > 1 and self.state == "shed":
            # Found out by the leading channel alone, the others would have been switched by then.
            raise BenchError(
                f"board {self.name}: its load is shed by the mission's power system",
                hint="wait until the battery restores it, or end the flight",
            )
        await self._start_loops()
        if any(loop.state == "on" for loop, _ in self._loops):  # a start that fails takes all inputs down: not these
            raise UsageError(f"board {self.name} is on already", hint="switch it off first, or use a power cycle")
        offset = None if self.console is None else self.console.ring.end
        started: list[PoweredOn] = []
        try:
            for (loop, task), channel in zip(self._loops, self.channels, strict=True):
                await asyncio.sleep(channel.on_delay_s)
                # A voltage that is asked for is the bus's; what the bus does not feed has its own.
                setpoint = None
                if voltage_v is not None and channel.main:
                    setpoint = Setpoint(voltage_v, channel.nominal.current_limit_a)
                started.append(await ask(loop.request_on(setpoint), task))
        except BaseException:
            if len(self.channels) > 1:
                await asyncio.shield(self._all_off("start of another channel failed"))
            raise
        reading = self._of_all([item.reading for item in started])
        return {**self._answer(reading), "console_offset": offset, "on_s": started[self._lead].on_s}

    def _of_all(self, readings: Sequence[Reading]) -> Reading:
        """The leading channel's reading, of `readings` in the channels' order, with the watts of all."""
        return replace(readings[self._lead], power_w=sum(item.power_w for item in readings))

    async def _all_off(self, how: str) -> Reading | None:
        self._last_off = None
        if not self._loops or any(task.done() for _, task in self._loops):
            if not self.energized:
                await self._end_loops()
                return None
            await self._start_loops()
        done: list[PoweredOff] = []
        failure: HilError | None = None
        for loop, task in reversed(self._loops):
            try:
                done.insert(0, await ask(loop.request_off(how), task))
            except HilError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        self._last_off = done[self._lead]
        return self._of_all([item.reading for item in done])

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.fault = str(error)
            log.error("board %s: its power loop ended: %s", self.name, error)
            for _, other in reversed(self._loops):
                other.cancel()  # each ends in the safe state: a board that is half fed is not safe
            self._on_failure(self, error)

    def _cut(self, why: str) -> None:
        """What clients know of the board is out of date from here. Inputs that go after the first are the same cut."""
        starts = sum(loop.starts for loop, _ in self._loops)
        if starts == self._cut_starts:
            return
        self._cut_starts = starts
        self.power_epoch += 1
        self.power_cuts += 1
        self.last_cut = f"at {utc_text(time.time())}: {why}"
        self._on_cut(self)

    def check_epoch(self, known: int | None) -> None:
        """BenchError when the board lost power since a client knew `known` of it."""
        if known is not None and known != self.power_epoch:
            raise BenchError(
                f"the power of board {self.name} was cut {self.last_cut}",
                hint="what was known of the board is gone: switch it on, or go on with board.accept_power_cut()",
            )

    def _event(self, kind: str, data: dict[str, Any]) -> None:
        now_s = self._monotonic()
        if kind in FREQUENT:
            if now_s - self._told_s.get(kind, -1e9) < 1.0:
                return
            self._told_s[kind] = now_s
        log.info("board %s: %s %s", self.name, kind, data)
        self._on_event(self, kind, data)


def _input_names(channels: tuple[Channel, ...]) -> list[str]:
    """What the record calls each channel: its input's name; where several feed one, with their number."""
    names = [channel.input for channel in channels]
    return [
        name if names.count(name) == 1 else f"{name}-{channel.number}"
        for name, channel in zip(names, channels, strict=True)
    ]


def _link_metrics(link: LinkOwner) -> LinkMetrics:
    states = link.states or {}
    up = bool(states) and not any(state.outage for state in states.values())
    return LinkMetrics(
        visible=up,
        delay_s={name: 0.0 if state.outage else state.delay_s for name, state in states.items()},
        rate_bps={name: 0.0 if state.outage else state.rate_bps for name, state in states.items()},
    )
