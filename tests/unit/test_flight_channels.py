"""A board on several supply channels in a flight: one model fed by all, shed and restored in order, all made safe."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timelapse
from test_powerloop import FakeDeadman

from hil.bench.board import BoardOwner, Channel
from hil.bench.pacing import Pacing
from hil.bench.powerloop import PowerLoop
from hil.bench.powervalues import Bounds, Flight, PowerSample, Tuning
from hil.bench.safety import Envelope, Intent, IntentJournal, power_off
from hil.drivers.scpi import ScpiSupply
from hil.errors import BenchError, SafetyError, UsageError
from hil.inventory import load_bench
from hil.inventory.bench import BenchBoard, PowerWire
from hil.inventory.board_type import load_board_type
from hil.mission.clock import MissionClock
from hil.mission.eps import EpsConfig, EpsModel, ShedConfig
from hil.model import Setpoint
from hil.virtual.supply import Fault, RecordedLoad, VirtualSupply

ROOT = Path(__file__).resolve().parents[2]
TYPE = load_board_type(ROOT / "boards/virtual-arm64.yaml")
ENVELOPE = Envelope(11, 19, 2.5, 30, 20, 2.8, inrush_s=0.02, off_dwell_s=0.05, on_timeout_s=0.4, slew_v_per_s=500)
AUX = replace(ENVELOPE, voltage_min_v=4.5, voltage_max_v=5.5, overvoltage_protection_v=6.0)
RULE = ShedConfig(shed_v=14.0, hold_s=2.0, restore_v=14.4, restore_soc=0.4, dwell_s=0.3)
CH1, CH2 = 0, 1


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of 30 ms, which the virtual supply allows."""
    times = partial(Tuning, period_min_s=0.03, filter_s=0.03, stale_s=0.5, breach_s=0.05, off_timeout_s=1.0)
    monkeypatch.setattr("hil.bench.powerloop.Tuning", times)


@dataclass
class Rig:
    """A board with two inputs, main first: on channels 1 and 2 of one supply, or on one supply each."""

    board: BoardOwner
    virtuals: list[VirtualSupply]
    loads: list[RecordedLoad]
    eps: EpsModel
    deadman: FakeDeadman
    journal: IntentJournal
    events: list[tuple[str, dict[str, Any]]]
    samples: list[PowerSample]
    failures: list[BaseException]
    sun_w: float = 0.0
    lead: PowerLoop | None = field(default=None)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == kind]

    def output(self, index: int) -> Any:
        one = len(self.virtuals) == 1
        return self.virtuals[0 if one else index].instrument.channels[index + 1 if one else 1]

    def are_on(self) -> tuple[bool, bool]:
        return self.output(CH1).output_on, self.output(CH2).output_on

    async def begin(self, rate: float = 1.0, **changes: Any) -> None:
        """Attach the flight, then switch on."""
        clock = MissionClock(wall_mono_s=time.monotonic(), rate=rate)
        flight = Flight(self.eps, clock, lambda t: self.sun_w, lambda t: 0.0, planned_w=15.0)
        self.lead = await self.board.loop()
        self.board.attach(replace(flight, **changes))
        await self.board.on(None, lambda: None)

    async def until(self, condition: Callable[[], object], timeout_s: float = 30.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"never happened; events: {self.events}"
            await asyncio.sleep(0.005)


def run(
    tmp_path: Path,
    body: Callable[[Rig], Awaitable[None]],
    *,
    soc: float = 0.35,
    aux: Envelope = AUX,
    aux_main: bool = False,
    aux_first: bool = False,
    supplies: int = 1,
) -> Rig:
    """Run `body`; afterwards the loops are ended and both outputs must be off."""

    async def steps() -> Rig:
        loads = [RecordedLoad(((0.0, watts),), undervoltage_lockout_v=3.0) for watts in (6.0, 2.0)]
        async with AsyncExitStack() as stack:
            plans = [{1: loads[0], 2: loads[1]}] if supplies == 1 else [{1: loads[0]}, {1: loads[1]}]
            virtuals = [await stack.enter_async_context(VirtualSupply(loads=plan)) for plan in plans]
            drivers = [ScpiSupply("rigol-dp800", f"tcp://127.0.0.1:{item.port}", timeout_s=1.0) for item in virtuals]
            pacing, journal, deadman = Pacing(), IntentJournal(tmp_path / "intent.jsonl"), FakeDeadman()

            def channel(index: int, envelope: Envelope, nominal: Setpoint, **more: Any) -> Channel:
                supply, number = drivers[index % supplies], index + 1 if supplies == 1 else 1
                intent = Intent("b1", supply.address, "rigol-dp800", number, 0.6)
                return Channel(supply, number, intent, 0.2 * index, envelope, nominal, pacing=pacing, **more)

            aux_nominal = Setpoint(15.0 if aux_main else 5.0, 2.0)
            channels = (
                channel(0, ENVELOPE, Setpoint(15.0, 2.0)),
                channel(1, aux, aux_nominal, main=aux_main, rail="io", converter_efficiency=0.8),
            )
            events: list[tuple[str, dict[str, Any]]] = []
            samples: list[PowerSample] = []
            failures: list[BaseException] = []
            board = BoardOwner(
                "b1", BenchBoard(type="virtual-arm64", power=(PowerWire(supply="psu1", channel=1),)), TYPE,
                channels[::-1] if aux_first else channels, None, None, journal, deadman,
                on_event=lambda _, kind, data: events.append((kind, data)),
                on_sample=lambda _, sample: samples.append(sample),
                on_failure=lambda _, error: failures.append(error),
            )  # fmt: skip
            eps = EpsModel(EpsConfig(capacity_ah=0.02, initial_soc=soc, charge_max_c=100.0))
            rig = Rig(board, virtuals, loads, eps, deadman, journal, events, samples, failures)
            try:
                await body(rig)
            finally:
                await board.rest()
                for supply in drivers:
                    await supply.close()
            assert rig.are_on() == (False, False)
            assert journal.open_intents() == ()
            assert not deadman.armed
            return rig

    return timelapse.run(steps())


@pytest.mark.parametrize("again", [False, True])
def test_a_flight_that_begins_while_its_lease_ends_is_refused_and_holds_the_loops_that_run(
    tmp_path: Path, again: bool
) -> None:
    async def body(rig: Rig) -> None:
        first = await rig.board.loop()
        await rig.board.rest()
        flight = Flight(rig.eps, MissionClock(time.monotonic()), lambda t: 0.0, lambda t: 0.0, planned_w=15.0)
        if again:
            lead, other = await asyncio.gather(rig.board.loop(), rig.board.loop())
            assert rig.board.attach(flight) is lead is other is not first
            assert lead.flight is flight
        else:
            with pytest.raises(BenchError, match="have ended"):
                rig.board.attach(flight)

    run(tmp_path, body, soc=0.8)


@pytest.mark.parametrize("aux_first", [False, True])
def test_the_answers_to_on_and_off_show_the_leading_channel_with_the_watts_of_all(
    tmp_path: Path, aux_first: bool
) -> None:
    async def body(rig: Rig) -> None:
        on = await rig.board.on(None, lambda: None)
        assert on["voltage_v"] == pytest.approx(15.0, abs=0.31)
        assert on["power_w"] == pytest.approx(8.0, rel=0.1)
        off = await rig.board.off("test")
        assert off["voltage_v"] < 0.6
        for moment, edge in (("on_s", 0), ("off_s", 1)):
            of_main, of_io = (load.edges[edge][0] for load in rig.loads)
            told = on[moment] if edge == 0 else off[moment]
            assert abs(told - of_main) < abs(told - of_io)

    run(tmp_path, body, soc=0.8, aux_first=aux_first)


def test_the_gain_is_judged_with_the_converters_losses(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        floor = rig.eps.gain(1.0, ENVELOPE.voltage_min_v)
        with pytest.raises(UsageError, match=r"gain would be 0\.5[5-7]"):
            await rig.begin(planned_w=0.45 / floor)

    run(tmp_path, body, soc=0.8)


def test_a_skip_books_what_the_converters_take(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        assert rig.lead is not None
        await rig.until(lambda: len(rig.samples) > 20)
        before = rig.lead.ledger.converter_j
        flight = rig.lead.flight
        assert flight is not None
        async with rig.lead.advanced_model(1e5, assumed_board_w=8.0, step_s=10.0):
            flight.clock.skip_to(1e5, time.monotonic())  # type: ignore[attr-defined]
        assert rig.lead.ledger.assumed_j == pytest.approx(8.0 * 1e5, rel=0.01)
        assert rig.lead.ledger.converter_j - before == pytest.approx(0.5 * 1e5, rel=0.05)

    run(tmp_path, body, soc=0.8)


def test_a_channel_that_is_switched_is_fed_to_the_model_at_the_moment(tmp_path: Path) -> None:
    """The other channel advances the model while it is: by what this one drew before, that would be too much."""

    async def body(rig: Rig) -> None:
        await rig.begin()
        assert rig.lead is not None
        await rig.until(lambda: len(rig.samples) > 20)
        ledger, closed = rig.lead.ledger, rig.journal.closed

        def slowly(*args: Any) -> None:
            time.sleep(1.0)
            closed(*args)

        before_j = ledger.fed_j - ledger.metered_mission_j
        rig.journal.closed = slowly  # type: ignore[method-assign,assignment]
        await rig.board._loops[CH2][0].request_off()
        rig.journal.closed = closed  # type: ignore[method-assign]
        off_j = ledger.fed_j - ledger.metered_mission_j
        assert off_j - before_j == pytest.approx(0.0, abs=0.8)
        await rig.board._loops[CH2][0].request_on()
        assert ledger.fed_j - ledger.metered_mission_j - off_j == pytest.approx(0.0, abs=0.8)

    run(tmp_path, body, soc=0.8, aux=replace(AUX, inrush_s=1.0, on_timeout_s=1.5))


def switchings(rig: Rig) -> list[tuple[str, bool]]:
    """Which input went on or off, in order of time."""
    edges = [(at_s, name, on) for name, load in zip(("main", "io"), rig.loads, strict=True) for at_s, on in load.edges]
    return [(name, on) for _, name, on in sorted(edges)]


def test_the_bus_moves_its_channel_and_the_model_is_fed_by_both(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin(rate=5.0)
        assert rig.lead is not None
        await rig.until(lambda: len(rig.samples) > 20)
        first_v = rig.eps.state.bus_voltage_v
        await rig.until(lambda: rig.eps.state.bus_voltage_v < first_v - 0.2)
        last = rig.samples[-1]
        assert last.bus_voltage_v is not None
        assert rig.output(CH1).voltage_set_v == pytest.approx(rig.eps.state.bus_voltage_v, abs=0.05)
        assert rig.output(CH2).voltage_set_v == 5.0
        assert last.board == "b1"
        assert last.power_w == pytest.approx(8.0, abs=0.01)
        # 6 W straight from the bus, 2 W behind a converter of 80 %.
        assert rig.eps.state.load_w == pytest.approx(6.0 + 2.0 / 0.8, rel=0.02)
        assert last.gain == pytest.approx(0.1 * 8.5 / last.bus_voltage_v**2, rel=0.05)
        ledger = rig.lead.ledger
        before = kept(ledger)
        await rig.until(lambda: len(rig.samples) > 40)
        fed, lost = ledger.fed_j - before["fed_j"], ledger.converter_j - before["converter_j"]
        assert lost == pytest.approx(fed * 0.5 / 8.0, rel=0.05)
        assert ledger.metered_j == pytest.approx(rig.samples[-1].energy_j, rel=0.05)
        await rig.board.off("test")

    run(tmp_path, body, soc=0.8)


def kept(ledger: Any) -> dict[str, float]:
    return {name: getattr(ledger, name) for name in ("fed_j", "converter_j")}


@pytest.mark.parametrize("aux_first", [False, True])
def test_a_shed_cuts_all_in_reverse_and_a_restore_starts_all_in_order(tmp_path: Path, aux_first: bool) -> None:
    """Whether the channel that leads is the first to go on or the last."""

    async def body(rig: Rig) -> None:
        await rig.begin(rate=60.0, shed=RULE)
        await rig.until(lambda: rig.of("load_shed"))
        assert rig.are_on() == (False, False)
        assert rig.journal.open_intents() == ()
        assert not rig.deadman.armed
        with pytest.raises(BenchError, match="shed by the mission"):
            await rig.board.on(None, lambda: None)
        assert (rig.board.state, rig.are_on()) == ("shed", (False, False))
        rig.sun_w = 60.0
        await rig.until(lambda: rig.of("load_restored"))
        assert rig.are_on() == (True, True)
        assert rig.output(CH2).voltage_set_v == 5.0

    rig = run(tmp_path, body, aux_first=aux_first)
    order = ["io", "main"] if aux_first else ["main", "io"]
    on, off = [(name, True) for name in order], [(name, False) for name in reversed(order)]
    assert switchings(rig)[:6] == on + off + on
    ons = [at_s for at_s, state in rig.loads[1 - aux_first].edges if state]
    others = [at_s for at_s, state in rig.loads[int(aux_first)].edges if state]
    assert ons[1] - others[1] >= (0.0 if aux_first else 0.2), "the bench file's delay holds for a restore too"
    assert [event["board"] for event in rig.of("load_shed")] == ["b1"]
    assert rig.of("load_shed")[0]["input"] == "main"


def test_the_leading_channel_is_measured_while_another_one_takes_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off in a shed before it, on in a restore after it, a second each."""

    async def slow(supply: Any, channel: int, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(1.0 if channel == 2 else 0.0)
        return await power_off(supply, channel, *args, **kwargs)

    monkeypatch.setattr("hil.bench.safety.power_off", slow)

    async def body(rig: Rig) -> None:
        await rig.begin(rate=60.0, shed=RULE, bounds=Bounds(gap_s=0.6))
        await rig.until(lambda: rig.of("load_shed"))
        rig.sun_w = 60.0
        await rig.until(lambda: rig.of("load_restored"))
        await asyncio.sleep(0.2)
        assert rig.are_on() == (True, True)
        assert not rig.of("run_invalid")

    run(tmp_path, body, aux=replace(AUX, inrush_s=1.0, on_timeout_s=1.5))


def test_a_leading_channel_that_trips_in_the_middle_of_a_restore_is_seen_and_takes_the_others_along(
    tmp_path: Path,
) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin(rate=60.0, shed=RULE)
        await rig.until(lambda: rig.of("load_shed"))
        rig.sun_w = 60.0
        await rig.until(lambda: rig.of("load_restoring") and rig.are_on() == (True, True))
        rig.virtuals[0].instrument.trip(1, "ocp")
        await rig.until(lambda: rig.of("tripped"))
        assert rig.are_on()[1], "while the other one still starts"
        await rig.until(lambda: rig.are_on() == (False, False))
        await rig.until(lambda: rig.board.state == "tripped")
        assert not rig.of("load_restored")

    run(tmp_path, body, aux=replace(AUX, inrush_s=1.0, on_timeout_s=1.5))


def test_two_channels_on_the_bus_both_follow_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin(rate=10.0)
        assert all(abs(rig.output(n).voltage_set_v - 15.8) < 0.2 for n in (CH1, CH2))
        await rig.until(lambda: rig.eps.state.bus_voltage_v < 15.0)
        now_v = rig.eps.state.bus_voltage_v
        await rig.until(lambda: all(abs(rig.output(n).voltage_set_v - now_v) < 0.4 for n in (CH1, CH2)))
        assert rig.eps.state.load_w == pytest.approx(8.0, rel=0.02)

    run(tmp_path, body, soc=0.8, aux=ENVELOPE, aux_main=True)


def test_a_channel_that_trips_takes_the_other_with_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.virtuals[0].instrument.trip(2, "ocp")
        await rig.until(lambda: rig.of("tripped") or rig.of("envelope_breach"))
        await rig.until(lambda: rig.are_on() == (False, False))
        told = [data for kind, data in rig.events if kind in ("tripped", "envelope_breach")]
        assert told[0]["input"] == "io"
        await rig.until(lambda: rig.board.state == "off")
        assert any("another input went off: io" in data["how"] for data in rig.of("board_off"))

    run(tmp_path, body, soc=0.8)


def test_a_channel_whose_supply_is_silent_leaves_nothing_half_fed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin()
        rig.virtuals[1].faults.append(Fault("silent", r"MEAS:ALL", -1))
        await rig.until(lambda: rig.are_on()[0] is False)
        assert isinstance(rig.failures[0], SafetyError)
        assert "b1/1: no measurement" in str(rig.failures[0])
        rig.virtuals[1].faults.clear()
        rig.virtuals[1].instrument.execute(":OUTP CH1,OFF")  # what the dead-man would do
        rig.deadman.armed.clear()
        for intent in rig.journal.open_intents():
            rig.journal.closed(intent, 0.0, "test")

    run(tmp_path, body, soc=0.8, supplies=2)


def test_a_restore_that_fails_half_way_leaves_everything_off(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin(rate=60.0, shed=RULE)
        await rig.until(lambda: rig.of("load_shed"))
        rig.virtuals[0].faults.append(Fault("ignore", "OUTP CH2,ON", -1))
        rig.sun_w = 60.0
        await rig.until(lambda: rig.failures)
        await rig.until(lambda: rig.are_on() == (False, False))
        assert "did not switch on" in str(rig.failures[0])
        assert [on for _, on in rig.loads[0].edges] == [True, False, True, False]

    run(tmp_path, body)


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.25])
def test_an_off_that_comes_in_the_middle_of_a_restore_has_the_last_word(tmp_path: Path, after_s: float) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin(rate=60.0, shed=RULE)
        await rig.until(lambda: rig.of("load_shed"))
        rig.sun_w = 60.0
        await rig.until(lambda: rig.of("load_restoring"))
        await asyncio.sleep(after_s)
        await rig.board.off("test")
        assert rig.are_on() == (False, False)
        await asyncio.sleep(0.6)
        assert (rig.board.state, rig.are_on()) == ("off", (False, False))

    run(tmp_path, body)


def test_an_off_in_the_middle_of_a_shed_ends_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.begin(rate=60.0, shed=RULE)
        await rig.until(lambda: rig.are_on()[1] is False)
        await rig.board.off("test")
        rig.sun_w = 60.0
        await asyncio.sleep(0.8)
        assert (rig.board.state, rig.are_on()) == ("off", (False, False))

    run(tmp_path, body)


def test_every_channel_on_the_bus_must_bear_its_voltage(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(SafetyError, match=r"outside the board's 4.5 to 5.5 V"):
            await rig.begin()
        assert rig.lead is not None
        assert rig.lead.flight is None

    run(tmp_path, body, soc=0.8, aux_main=True)


# --------------------------------------------------------------------------------------------------- the bench file
BENCH = """
schema: 1
name: channels
board_types: {types}
supplies:
  psu1: {{driver: scpi, dialect: rigol-dp800, address: "tcp://192.0.2.1:5555"}}
boards:
  b1:
    type: two-inputs
    power:
      - {{supply: psu1, channel: 1{first}}}
      - {{supply: psu1, channel: 2{second}}}
"""


def bench(tmp_path: Path, first: str = "", second: str = "", more: str = "") -> tuple[PowerWire, ...]:
    text = (ROOT / "boards/virtual-arm64.yaml").read_text().replace("name: virtual-arm64", "name: two-inputs")
    supply = text[text.index("supply:\n") + len("supply:\n") : text.index("boot:")]
    (tmp_path / "two-inputs.yaml").write_text(
        text + "rails:\n  io:\n" + "".join(f"  {line}\n" for line in supply.splitlines())
    )
    path = tmp_path / "bench.yaml"
    path.write_text(BENCH.format(types=tmp_path, first=first, second=second) + more)
    return load_bench(path).file.boards["b1"].power


def test_the_bench_file_says_which_channels_follow_the_bus(tmp_path: Path) -> None:
    assert [wire.on_bus for wire in bench(tmp_path, second=", rail: io, converter_efficiency: 0.9")] == [True, False]
    flipped = bench(tmp_path, ", follows_bus: false, converter_efficiency: 0.9", ", rail: io, follows_bus: true")
    assert [wire.on_bus for wire in flipped] == [False, True]


@pytest.mark.parametrize(
    ("first", "second", "more", "complaint"),
    [
        (", follows_bus: false", ", rail: io", "", r"bench.yaml:10: none of board b1's channels follows"),
        ("", ", rail: io, follows_bus: true, converter_efficiency: 0.9", "", r"bench.yaml:12: .*no converter stands"),
        ("", ", rail: io, on_delay_s: 61", "", r"bench.yaml:12: .*on_delay_s"),
        ("", "", '    meter: {supply: psu1, channel: 3}\n', r"bench.yaml:13: a meter is held against .* has several"),
    ],
)  # fmt: skip
def test_a_bench_file_that_cannot_be_flown_is_refused(
    tmp_path: Path, first: str, second: str, more: str, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        bench(tmp_path, first, second, more)


def test_one_channel_is_not_named_twice(tmp_path: Path) -> None:
    assert len(bench(tmp_path, "", ", rail: io")) == 2
    path = tmp_path / "bench.yaml"
    path.write_text(path.read_text().replace("channel: 2", "channel: 1"))
    with pytest.raises(UsageError, match=r"bench.yaml:12: channel 1 of supply psu1 already feeds board b1"):
        load_bench(path)
