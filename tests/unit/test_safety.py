"""Start and stop sequences, envelope, intent journal and claims, against the virtual supply in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hil.bench import safety
from hil.bench.levels import Layers
from hil.bench.safety import Envelope, InstrumentLock, Intent, IntentJournal, PoweredOff, PoweredOn
from hil.drivers.scpi import ScpiSupply
from hil.errors import BenchError, SafetyError
from hil.model import Reading, Setpoint
from hil.virtual.supply import Fault, Load, RecordedLoad, ResistiveLoad, VirtualSupply

ENVELOPE = Envelope(
    voltage_min_v=9.0,
    voltage_max_v=19.0,
    current_max_a=2.5,
    power_max_w=30.0,
    overvoltage_protection_v=20.0,
    overcurrent_protection_a=2.8,
    inrush_s=0.05,
    off_dwell_s=0.1,
    on_timeout_s=0.4,
)
SETPOINT = Setpoint(15.0, 2.0)


@dataclasses.dataclass
class Rig:
    """A virtual supply, a driver on it and a journal."""

    virtual: VirtualSupply
    supply: ScpiSupply
    journal: IntentJournal
    intent: Intent
    steps: list[str] = dataclasses.field(default_factory=list)

    async def on(
        self, setpoint: Setpoint = SETPOINT, envelope: Envelope = ENVELOPE, layers: Layers = safety.NO_LAYERS
    ) -> PoweredOn:
        self.steps.clear()
        return await safety.power_on(
            self.supply, 1, envelope, setpoint, self.journal, self.intent, layers=layers, on_step=self.steps.append
        )

    async def off(self, timeout_s: float = 2.0) -> PoweredOff:
        return await safety.power_off(self.supply, 1, ENVELOPE, self.journal, self.intent, timeout_s=timeout_s)

    @property
    def is_on(self) -> bool:
        return self.virtual.instrument.channels[1].output_on

    def entries(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.journal.path.read_text().splitlines() if line]


def rig(tmp_path: Path, steps: Callable[[Rig], Awaitable[None]], load: Load | None = None) -> None:
    async def body() -> None:
        async with VirtualSupply(loads={1: load or RecordedLoad(((0.0, 6.0),))}) as virtual:
            address = f"tcp://127.0.0.1:{virtual.port}"
            supply = ScpiSupply("rigol-dp800", address, timeout_s=2.0)
            journal = IntentJournal(tmp_path / "intent.jsonl")
            await steps(Rig(virtual, supply, journal, Intent("vb1", address, "rigol-dp800", 1, 0.6)))
            await supply.close()

    asyncio.run(body())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds; fails after five seconds."""
    for _ in range(2500):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("the condition never held")


# -------------------------------------------------------------------------------------------------------- sequences
def test_the_start_sequence_in_order_and_a_verified_stop(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        done = await rig.on()
        assert rig.steps == [
            "identify", "off", "clear", "protect", "program", "dwell", "intent", "on", "settled"
        ]  # fmt: skip
        assert done.reading.voltage_v == pytest.approx(15.0, abs=0.02)
        assert done.settled_s - done.on_s >= ENVELOPE.inrush_s
        channel = rig.virtual.instrument.channels[1]
        assert (channel.ovp.enabled, channel.ovp.level) == (True, 20.0)
        assert (channel.ocp.enabled, channel.ocp.level) == (True, 2.8)
        assert rig.journal.open_intents() == (rig.intent,)
        off = await rig.off()
        assert off.reading.voltage_v < 0.6
        assert rig.journal.open_intents() == ()
        assert [entry["op"] for entry in rig.entries()] == ["on", "off"]

    rig(tmp_path, steps)


def test_the_intent_is_on_the_disk_before_the_output_goes_on(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        seen: list[tuple[bool, tuple[Intent, ...]]] = []

        async def armed() -> None:
            seen.append((rig.is_on, rig.journal.open_intents()))

        await safety.power_on(rig.supply, 1, ENVELOPE, SETPOINT, rig.journal, rig.intent, armed=armed)
        assert seen == [(False, (rig.intent,))]

    rig(tmp_path, steps)


def test_an_output_that_is_on_and_not_ours_is_left_alone(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        rig.virtual.instrument.execute(":APPL CH1,12,1;:OUTP CH1,ON")
        with pytest.raises(SafetyError, match="did not switch it on"):
            await rig.on()
        assert rig.is_on
        assert rig.journal.open_intents() == ()

    rig(tmp_path, steps)


def test_an_output_left_on_by_ourselves_is_switched_off_and_started_anew(tmp_path: Path) -> None:
    load = RecordedLoad(((0.0, 6.0),))

    async def steps(rig: Rig) -> None:
        rig.journal.opened(rig.intent)
        rig.virtual.instrument.execute(":APPL CH1,12,1;:OUTP CH1,ON")
        await until(lambda: load.powered)
        await rig.on()
        assert rig.is_on

    rig(tmp_path, steps, load)
    assert [on for _, on in load.edges] == [True, False, True, False]


def test_off_dwell_is_kept_between_off_and_on(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        await rig.on()
        off = await rig.off()
        again = await safety.power_on(
            rig.supply,
            1,
            dataclasses.replace(ENVELOPE, off_dwell_s=0.3),
            SETPOINT,
            rig.journal,
            rig.intent,
            off_since_s=off.verified_s,
        )
        assert again.on_s - off.verified_s >= 0.3

    rig(tmp_path, steps)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("ignore", "OVP:VAL CH1", -1), "ovp level was set to 20 V but reads back 33 V"),
        (Fault("refuse", "OVP:VAL CH1", -1), "-221 Settings conflict"),
        (Fault("ignore", "OCP CH1,ON", -1), "ocp of channel 1 .* stays disabled"),
        (Fault("ignore", "SOUR1:VOLT 15", -1), "voltage was set to 15 V but reads back 0 V"),
        (Fault("ignore", "OUTP CH1,ON", -1), "did not switch on"),
    ],
)
def test_what_is_refused_or_ignored_stops_the_start_with_the_output_off(
    tmp_path: Path, fault: Fault, message: str
) -> None:
    async def steps(rig: Rig) -> None:
        rig.virtual.faults.append(fault)
        with pytest.raises(SafetyError, match=message):
            await rig.on()
        assert not rig.is_on
        assert rig.journal.open_intents() == ()

    rig(tmp_path, steps)


def test_a_short_is_said_with_its_current_and_regulation(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        with pytest.raises(SafetyError, match=r"at 2 A \(CC\) instead of 15 V"):
            await rig.on()
        assert not rig.is_on
        assert rig.journal.open_intents() == ()

    rig(tmp_path, steps, ResistiveLoad(0.5))


def test_a_trip_in_the_inrush_window_is_named(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        envelope = dataclasses.replace(ENVELOPE, overcurrent_protection_a=0.5)
        with pytest.raises(SafetyError, match=r"went off by itself .*ocp"):
            await rig.on(envelope=envelope)
        assert rig.journal.open_intents() == ()

    rig(tmp_path, steps, RecordedLoad(((0.0, 15.0),)))


@pytest.mark.parametrize("setpoint", [Setpoint(19.1, 2), Setpoint(8.9, 2), Setpoint(15, 2.6), Setpoint(math.nan, 1)])
def test_a_set_point_outside_the_envelope_sends_nothing(tmp_path: Path, setpoint: Setpoint) -> None:
    async def steps(rig: Rig) -> None:
        with pytest.raises(SafetyError, match="outside the board's"):
            await rig.on(setpoint)
        assert rig.steps == []

    rig(tmp_path, steps)


def test_cancelling_the_start_switches_off_again(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        went_on = asyncio.Event()
        envelope = dataclasses.replace(ENVELOPE, inrush_s=30.0, on_timeout_s=30.0)
        task = asyncio.create_task(
            safety.power_on(
                rig.supply,
                1,
                envelope,
                SETPOINT,
                rig.journal,
                rig.intent,
                on_step=lambda step: went_on.set() if step == "on" else None,
            )
        )
        await went_on.wait()
        await until(lambda: rig.is_on)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # an impatient second Ctrl-C changes nothing
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not rig.is_on
        assert rig.journal.open_intents() == ()

    rig(tmp_path, steps)


def test_off_is_retried_over_a_dropped_connection(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        await rig.on()
        rig.virtual.faults.append(Fault("drop", "OUTP CH1,OFF", 2))
        await rig.off()
        assert not rig.is_on

    rig(tmp_path, steps)


def test_an_off_that_cannot_be_proved_keeps_the_intent_open(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        await rig.on()
        rig.virtual.faults.append(Fault("ignore", "OUTP CH1,OFF", -1))
        with pytest.raises(SafetyError, match="not verified off"):
            await rig.off(timeout_s=0.3)
        assert rig.journal.open_intents() == (rig.intent,)

    rig(tmp_path, steps)


def test_a_disk_that_refuses_the_intent_keeps_the_output_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    async def steps(rig: Rig) -> None:
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(BenchError, match="No space left"):
            await rig.on()
        assert not rig.is_on
        assert "on" not in rig.steps

    rig(tmp_path, steps)


@pytest.mark.parametrize(("ovp", "ocp"), [(False, True), (True, False), (False, False)])
def test_a_supply_without_a_protection_needs_consent(tmp_path: Path, ovp: bool, ocp: bool) -> None:
    async def steps(rig: Rig) -> None:
        await rig.supply.open()
        rig.supply._capabilities = dataclasses.replace(rig.supply.capabilities, ovp=ovp, ocp=ocp)
        with pytest.raises(SafetyError, match=r"level D and this bench accepts C or better: DP832") as caught:
            await rig.on()
        assert "accept_level: D" in caught.value.hint
        assert rig.steps == ["identify"]
        done = await rig.on(layers=Layers(accept="D"))
        assert done.level.level == "D"
        assert done.waived == tuple(n for n, has in (("no-ocp", ocp), ("no-ovp", ovp)) if not has)
        channel = rig.virtual.instrument.channels[1]
        assert (channel.ovp.enabled, channel.ocp.enabled) == (ovp, ocp)
        await rig.off()

    rig(tmp_path, steps)


def test_the_inrush_has_bounds_of_its_own(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        bounded = dataclasses.replace(ENVELOPE, inrush_s=0.1)
        await rig.on(envelope=dataclasses.replace(bounded, inrush_current_max_a=1.2, inrush_energy_max_j=10.0))
        await rig.off()
        with pytest.raises(SafetyError, match=r"an inrush of .* A, more than the board's 0.5 A"):
            await rig.on(envelope=dataclasses.replace(bounded, inrush_current_max_a=0.5))
        assert not rig.is_on
        with pytest.raises(SafetyError, match=r"an inrush of .* J, more than the board's 0.3 J"):
            await rig.on(envelope=dataclasses.replace(bounded, inrush_energy_max_j=0.3))
        assert not rig.is_on
        assert rig.journal.open_intents() == ()

    rig(tmp_path, steps, RecordedLoad(((0.0, 12.0),)))


# ----------------------------------------------------------------------------------------------------------- values
def test_breach_names_the_quantity() -> None:
    def reading(v: float, a: float) -> Reading:
        return Reading(0.0, v, a, v * a, True)

    assert ENVELOPE.breach(reading(15.0, 1.0)) == ""
    assert "19.5 V" in ENVELOPE.breach(reading(19.5, 0.1))
    assert "2.6 A" in ENVELOPE.breach(reading(10.0, 2.6))
    assert "W measured" in ENVELOPE.breach(reading(18.0, 2.0))
    bounded = dataclasses.replace(ENVELOPE, energy_max_j=100.0)
    assert bounded.breach(reading(15.0, 1.0), 99.0) == ""
    assert bounded.breach(reading(15.0, 1.0), 101.0) == "101 J since power on, more than the board's 100 J"


# ---------------------------------------------------------------------------------------------------------- journal
def test_open_intents_survive_torn_lines(tmp_path: Path) -> None:
    journal = IntentJournal(tmp_path / "intent.jsonl")
    one = Intent("a", "tcp://h:1", "rigol-dp800", 1, 0.6)
    two = Intent("b", "tcp://h:1", "rigol-dp800", 2, 0.6)
    journal.opened(one)
    journal.opened(two)
    with journal.path.open("a") as handle:
        handle.write('{"op":"off","board":"b","addr')
    journal.closed(one, 0.1, "test")
    assert IntentJournal(journal.path).open_intents() == (two,)
    journal.opened(one)
    assert journal.open_intents() == (two, one)


def test_a_long_campaign_does_not_make_the_question_what_is_open_slow(tmp_path: Path) -> None:
    first, second = (Intent(f"vb{n}", "tcp://127.0.0.1:1", "rigol-dp800", n, 0.6) for n in (1, 2))
    ours, theirs = IntentJournal(tmp_path / "intent.jsonl"), IntentJournal(tmp_path / "intent.jsonl")
    ours.opened(first)
    lines = ours.path.read_bytes()
    off = lines.replace(b'"op":"on"', b'"op":"off"')
    ours.path.write_bytes((lines + off) * 20_000 + lines)  # one power cut after the other: 8 MB
    assert ours.open_intents() == theirs.open_intents() == (first,)

    def fifty_times() -> float:
        began = time.monotonic()
        for _ in range(50):
            assert ours.open_intents() == (first,)
        return time.monotonic() - began

    assert min(fifty_times() for _ in range(5)) < 0.1  # in the best of some: a busy host slows everything down
    theirs.opened(second)
    theirs.closed(first, 0.1, "dead-man")
    with ours.path.open("ab") as torn:
        torn.write(b'\n{"op":"off","boa')
    assert ours.open_intents() == theirs.open_intents() == (second,)
    theirs.closed(second, 0.1, "dead-man")  # ends the torn line
    assert ours.open_intents() == ()
    ours.path.unlink()
    ours.opened(first)
    assert ours.open_intents() == theirs.open_intents() == (first,)


def test_a_long_journal_is_put_aside_when_nothing_is_open(tmp_path: Path) -> None:
    journal = IntentJournal(tmp_path / "intent.jsonl")
    journal.path.write_text("\n" * ((1 << 20) + 1))
    journal.opened(Intent("a", "tcp://h:1", "rigol-dp800", 1, 0.6))
    IntentJournal(journal.path)
    assert journal.path.exists()
    journal.closed(Intent("a", "tcp://h:1", "rigol-dp800", 1, 0.6), 0.0, "test")
    IntentJournal(journal.path)
    assert not journal.path.exists()


def test_leftovers_are_ended_and_the_unreachable_named(tmp_path: Path) -> None:
    async def steps(rig: Rig) -> None:
        rig.virtual.instrument.execute(":APPL CH1,12,1;:OUTP CH1,ON")
        rig.journal.opened(rig.intent)
        done = await asyncio.to_thread(safety.finish_leftovers, rig.journal, deadline_s=2.0)
        assert [item.result.off for item in done] == [True]
        assert not rig.is_on
        assert rig.journal.open_intents() == ()
        gone = dataclasses.replace(rig.intent, address="tcp://127.0.0.1:1", board="ghost")
        rig.journal.opened(gone)
        with pytest.raises(SafetyError, match=r"ghost: channel 1 of tcp://127\.0\.0\.1:1"):
            await asyncio.to_thread(safety.finish_leftovers, rig.journal, deadline_s=0.1)
        assert rig.journal.open_intents() == (gone,)

    rig(tmp_path, steps)


# ------------------------------------------------------------------------------------------------------- two owners
def test_an_instrument_has_one_owner_on_this_host() -> None:
    address = "tcp://192.0.2.77:5555"
    lock = InstrumentLock(address)
    lock.acquire()
    try:
        with pytest.raises(BenchError, match="another process"):
            InstrumentLock(address.upper().replace("TCP", "tcp")).acquire()
    finally:
        lock.release()
    InstrumentLock(address).acquire()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("tcp://127.0.0.1:45991", "tcp://localhost:45991/"),
        ("ssh://root@127.0.0.1:45992", "ssh://lab@127.0.0.1:45992"),
    ],
)
def test_an_instrument_is_where_its_address_leads(one: str, other: str) -> None:
    first, second = InstrumentLock(one), InstrumentLock(other)
    first.acquire()
    try:
        with pytest.raises(BenchError, match="another process"):
            second.acquire()
    finally:
        first.release()
        second.release()


def test_a_dead_owner_holds_nothing() -> None:
    address = "tcp://192.0.2.78:5555"
    code = f"from hil.bench.safety import InstrumentLock; InstrumentLock({address!r}).acquire()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    lock = InstrumentLock(address)
    lock.acquire()
    lock.release()
