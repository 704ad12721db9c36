"""A board as the daemon owns it: several channels in order, latch-ups, cut points, lines, on virtual supplies."""

from __future__ import annotations

import asyncio
import os
import select
import threading
import tty
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timelapse
from test_powerloop import FakeDeadman

from hil.bench.board import BoardOwner, Channel
from hil.bench.consoles import Ring
from hil.bench.controls import Controls
from hil.bench.cutpoint import CutPoint
from hil.bench.fixtures import lease_groups
from hil.bench.leases import LeaseStore
from hil.bench.powerfaults import LatchUpLimits
from hil.bench.powerloop import PowerLoop
from hil.bench.safety import Envelope, Intent, IntentJournal, power_off
from hil.drivers.scpi import ScpiSupply
from hil.errors import BenchError, SafetyError, UsageError
from hil.inventory import load_bench
from hil.inventory.bench import BenchBoard, PowerWire
from hil.inventory.board_type import BoardType, load_board_type
from hil.model import Setpoint
from hil.virtual.supply import Fault, RecordedLoad, VirtualSupply

ROOT = Path(__file__).resolve().parents[2]
ENVELOPE = Envelope(11, 19, 2.5, 30, 20, 2.8, inrush_s=0.02, off_dwell_s=0.05, on_timeout_s=0.4)
AUX = replace(ENVELOPE, voltage_min_v=4.5, voltage_max_v=5.5, overvoltage_protection_v=6.0)


class FakeConsole:
    """What a board says, put in by the test."""

    def __init__(self) -> None:
        self.ring = Ring()
        self._more = asyncio.Event()

    def say(self, data: bytes) -> None:
        self.ring.append(data)
        self._more.set()

    async def wait_beyond(self, offset: int, timeout_s: float | None) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self.ring.end <= offset:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            return False
        return True


@dataclass
class Rig:
    """A board on channels of one virtual supply."""

    board: BoardOwner
    virtual: VirtualSupply
    console: FakeConsole
    loads: dict[int, RecordedLoad]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def on(self, voltage_v: float | None = None) -> dict[str, Any]:
        return await self.board.on(voltage_v, allowed)

    def is_on(self, channel: int = 1) -> bool:
        return self.virtual.instrument.channels[channel].output_on


def allowed() -> None:
    """The lease holds."""


def board_type() -> BoardType:
    return load_board_type(ROOT / "boards/virtual-arm64.yaml")


def run(
    tmp_path: Path,
    body: Callable[[Rig], Awaitable[None]],
    aux_channel: int | None = None,
    watts: Any = None,
    lockout_v: float = 0.0,
) -> None:
    async def steps() -> None:
        loads = {n: RecordedLoad(((0.0, 6.0),), undervoltage_lockout_v=3.0) for n in (1, 2)}
        if watts is not None:
            loads[1] = RecordedLoad(watts)
        async with VirtualSupply(loads=loads) as virtual:
            address = f"tcp://127.0.0.1:{virtual.port}"
            supply = ScpiSupply("rigol-dp800", address, timeout_s=2.0)
            inputs = [(1, replace(ENVELOPE, undervoltage_lockout_v=lockout_v), Setpoint(15.0, 2.0), True, 0.0)]
            if aux_channel is not None:
                inputs.append((aux_channel, AUX, Setpoint(5.0, 2.0), False, 0.3))
            channels = tuple(
                Channel(supply, n, Intent("b1", address, "rigol-dp800", n, 0.6), delay, envelope, nominal, main=main)
                for n, envelope, nominal, main, delay in inputs
            )
            wires = BenchBoard(type="virtual-arm64", power=(PowerWire(supply="psu1", channel=1),))
            console = FakeConsole()
            events: list[tuple[str, dict[str, Any]]] = []
            board = BoardOwner(
                "b1", wires, board_type(), channels, console, None,  # type: ignore[arg-type]
                IntentJournal(tmp_path / "intent.jsonl"), FakeDeadman(),
                on_event=lambda _, kind, data: events.append((kind, data)),
                on_sample=lambda _, sample: None, on_failure=lambda _, error: None,
            )  # fmt: skip
            try:
                await body(Rig(board, virtual, console, loads, events))
            finally:
                await board.calm()
                await board.rest()
                await supply.close()
            assert not any(channel.output_on for channel in virtual.instrument.channels.values())

    timelapse.run(steps())


@pytest.mark.parametrize("lit", [True, False, None])
def test_the_output_of_a_board_that_is_on_is_off_where_its_array_is_in_the_dark(
    tmp_path: Path, lit: bool | None
) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        array = None if lit is None else SimpleNamespace(lit=lit)
        rig.board.channels = (replace(rig.board.channels[0], array=array),)  # type: ignore[arg-type]
        rig.board._switched_s = 0.0  # the sample of the loop counts, not a measurement for the asking
        for _ in range(2000):
            if rig.board.last is not None:
                break
            await asyncio.sleep(0.005)
        assert rig.board.last is not None
        assert (await rig.board.read())["output_on"] is (lit is not False)

    run(tmp_path, body)


# ------------------------------------------------------------------------------------------------- several channels
def test_channels_go_on_in_order_with_their_delays_and_off_in_reverse(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on(16.0)
        assert (rig.is_on(1), rig.is_on(2)) == (True, True)
        assert rig.virtual.instrument.channels[1].voltage_set_v == 16.0
        assert rig.virtual.instrument.channels[2].voltage_set_v == 5.0  # a rail of its own, with an envelope of its own
        await rig.board.off("test")
        (main_on, main_off), (aux_on, aux_off) = ([time_s for time_s, _ in rig.loads[n].edges] for n in (1, 2))
        assert aux_on - main_on >= 0.3
        assert aux_off < main_off

    run(tmp_path, body, aux_channel=2)


def test_a_channel_that_does_not_start_takes_the_others_down_with_it(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        rig.virtual.faults.append(Fault("ignore", "OUTP CH2,ON", -1))
        with pytest.raises(SafetyError, match=r"channel 2 .* did not switch on"):
            await rig.on()
        assert (rig.is_on(1), rig.is_on(2)) == (False, False)
        assert [on for _, on in rig.loads[1].edges] == [True, False]

    run(tmp_path, body, aux_channel=2)


def _loop(rig: Rig, index: int) -> PowerLoop:
    return rig.board._loops[index][0]


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what a supply does)
            await asyncio.sleep(0.01)


def test_a_power_cycle_outlasts_a_channel_that_trips_while_the_board_is_half_fed(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        cycle = asyncio.create_task(rig.board.on(None, allowed, cycle=True))
        await _until(lambda: not rig.is_on(2))
        await _until(lambda: _loop(rig, 1).state == "off")
        _loop(rig, 0)._tell("tripped", cause="half fed")  # the moment cannot be met with a real one
        await cycle
        await asyncio.sleep(0.5)
        assert (rig.is_on(1), rig.is_on(2), rig.board.state) == (True, True, "on")

    run(tmp_path, body, aux_channel=2)


def test_a_channel_that_trips_while_another_starts_takes_it_along_and_stays_tripped(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        starting = asyncio.create_task(rig.on())
        await _until(lambda: rig.is_on(1) and _loop(rig, 0).state == "on")
        rig.virtual.instrument.trip(1, "ocp")
        await _until(lambda: any(kind == "tripped" for kind, _ in rig.events))
        assert not starting.done()
        await starting
        await _until(lambda: not rig.is_on(2))
        await asyncio.sleep(0.3)
        assert (rig.is_on(1), rig.board.state, _loop(rig, 1).state) == (False, "tripped", "off")

    run(tmp_path, body, aux_channel=2)


def test_a_channel_that_trips_is_told_as_tripped_while_the_others_follow(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        rig.virtual.faults.append(Fault("late", "OUTP CH2,OFF", 1, delay_s=0.15))
        rig.virtual.instrument.trip(2, "ocp")
        await _until(lambda: _loop(rig, 0).state == "off")
        await asyncio.sleep(0.5)
        assert (_loop(rig, 1).state, rig.is_on(1)) == ("tripped", False)

    run(tmp_path, body, aux_channel=2)


def test_a_cut_of_several_inputs_counts_once(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        def cuts() -> tuple[int, int]:
            return rig.board.power_epoch, rig.board.power_cuts

        await rig.on()
        await rig.board.off("test")
        assert cuts() == (1, 1)
        await rig.on()
        await rig.board.on(None, allowed, cycle=True)
        assert cuts() == (2, 2)
        rig.virtual.instrument.trip(2, "ocp")  # goes alone first, and counts
        await _until(lambda: rig.board.power_cuts == 3)
        await _until(lambda: not rig.is_on(1))
        assert cuts() == (3, 3)
        rig.virtual.faults.append(Fault("ignore", "OUTP CH2,ON", -1))
        with pytest.raises(SafetyError):  # a partial start
            await rig.on()
        rig.virtual.faults.clear()
        assert cuts() == (4, 4)
        await rig.on()
        for n in (5, 6):  # the board stays on, without what it knew
            await rig.board.brown_out(15.0 - 2.0, 0.02, allowed)
            assert cuts() == (n, n)
        await rig.board.rest()
        assert cuts() == (7, 7)

    run(tmp_path, body, aux_channel=2, lockout_v=3.0)


@pytest.mark.parametrize("aux_channel", [None, 2])
def test_an_on_of_a_board_that_is_on_is_refused_and_cuts_nothing(tmp_path: Path, aux_channel: int | None) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        epoch = rig.board.power_epoch
        with pytest.raises(UsageError, match="on already"):
            await rig.on()
        await asyncio.sleep(0.5)
        assert (rig.board.state, rig.board.power_epoch) == ("on", epoch)
        assert all([on for _, on in load.edges] in ([True], []) for load in rig.loads.values())

    run(tmp_path, body, aux_channel=aux_channel)


@pytest.mark.parametrize("voltage_v", [0.0, 10.9, 19.1])
def test_a_voltage_outside_the_main_inputs_envelope_is_refused(tmp_path: Path, voltage_v: float) -> None:
    async def body(rig: Rig) -> None:
        with pytest.raises(SafetyError, match="outside the board's 11 to 19 V"):
            await rig.on(voltage_v)

    run(tmp_path, body)


# ---------------------------------------------------------------------------------------------------------- latch-up
def test_a_latch_up_cuts_rests_and_starts_again(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on(14.0)
        epoch = rig.board.power_epoch
        done = await rig.board.latch_up(LatchUpLimits(1.0, 0.15), 0.4, 20.0, allowed)
        assert rig.is_on()
        assert rig.virtual.instrument.channels[1].voltage_set_v == 14.0
        assert 0.15 <= done["held_s"] < 4.0  # a tick longer on an idle host
        assert done["on_s"] - done["verified_s"] >= 0.4
        assert done["power_epoch"] == rig.board.power_epoch == epoch + 1
        assert [kind for kind, _ in rig.events if kind.startswith("latch")] == ["latch_up", "latch_up_restart"]
        assert [on for _, on in rig.loads[1].edges] == [True, False, True]

    run(tmp_path, body, watts=((0.0, 6.0), (0.3, 24.0)))


def test_a_latch_up_that_never_comes_cuts_nothing_and_can_be_armed_anew(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        for _ in range(2):
            with pytest.raises(BenchError, match=r"did not draw more than 2 A for 0\.1 s within 0\.3 s"):
                await rig.board.latch_up(LatchUpLimits(2.0, 0.1), 0.1, 0.3, allowed)
        assert rig.is_on()
        with pytest.raises(UsageError, match=r"rests for 0\.05 s .*, not 0\.01 s"):
            await rig.board.latch_up(LatchUpLimits(2.0, 0.1), 0.01, 0.3, allowed)

    run(tmp_path, body)


@pytest.mark.parametrize("gone", [False, True])
def test_a_latch_up_that_is_cutting_when_its_wait_is_over_is_told_as_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """Whoever asked for it may be gone by then: the other input goes off all the same."""

    async def slow(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.6)
        return await power_off(*args, **kwargs)

    async def body(rig: Rig) -> None:
        await rig.on()
        with monkeypatch.context() as patch:
            patch.setattr("hil.bench.safety.power_off", slow)
            asked = asyncio.create_task(rig.board.latch_up(LatchUpLimits(0.2, 0.0), 0.1, 0.4, allowed))
            await asyncio.sleep(0.5)
            if gone:
                asked.cancel()
            await asyncio.wait((asked,))
            if not gone:
                assert asked.result()["peak_a"] > 0.2
                assert (rig.is_on(1), rig.is_on(2)) == (True, True)
                return
            end = asyncio.get_running_loop().time() + 4
            while rig.is_on(2):
                assert asyncio.get_running_loop().time() < end, rig.events
                await asyncio.sleep(0.02)
        assert not rig.is_on(1)

    run(tmp_path, body, aux_channel=2)


def test_a_latch_up_protection_ends_with_its_lease(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        asked = asyncio.create_task(rig.board.latch_up(LatchUpLimits(1.0, 0.0), 0.1, 30.0, allowed))
        await asyncio.sleep(0.1)
        await rig.board.calm()
        with pytest.raises(BenchError, match="its lease ended"):
            await asyncio.wait_for(asked, 15.0)
        rig.loads[1].profile = ((0.0, 24.0),)
        await asyncio.sleep(0.5)
        assert rig.is_on()

    run(tmp_path, body)


def test_a_board_whose_lease_ended_is_not_started_again(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()

        def refused() -> None:
            raise BenchError("this lease is over")

        left = [allowed, refused]
        with pytest.raises(BenchError, match="lease is over"):
            await rig.board.latch_up(LatchUpLimits(0.2, 0.0), 0.1, 20.0, lambda: left.pop(0)())
        assert not rig.is_on()

    run(tmp_path, body)


# --------------------------------------------------------------------------------------------------------- cut points
def test_a_cut_comes_at_its_pattern_even_across_two_reads(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        rig.console.say(b"Starting kernel in an earlier life\n")
        cut = rig.board.arm_cut(CutPoint(pattern=r"Starting\s+kernel"), allowed)
        with pytest.raises(UsageError, match="armed"):
            rig.board.arm_cut(CutPoint(byte_offset=1), allowed)
        rig.console.say(b"U-Boot\nStarting ke")
        await asyncio.sleep(0.1)
        assert rig.is_on()
        rig.console.say(b"rnel ...\nmore")
        report = await cut.wait(20.0)
        assert not rig.is_on()
        assert (report["state"], report["matched"]) == ("done", "Starting kernel")
        assert report["offset"] == 35 + len("U-Boot\nStarting kernel")
        assert report["seen_offset"] == rig.console.ring.end
        assert 0 < report["latency_s"] < 10
        assert report["verified_s"] > report["off_s"] > report["matched_s"]
        assert "Starting" in rig.board.last_cut

    run(tmp_path, body)


@pytest.mark.parametrize(("chunks", "overshoot"), [((b"abc", b"def"), 1), ((b"abcdefghij",), 5), ((b"abcd", b"e"), 0)])
def test_a_cut_comes_after_so_many_bytes(tmp_path: Path, chunks: tuple[bytes, ...], overshoot: int) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        rig.console.say(b"before")
        cut = rig.board.arm_cut(CutPoint(byte_offset=5, delay_s=0.1), allowed)
        await asyncio.sleep(0)
        for chunk in chunks:
            assert rig.is_on()
            rig.console.say(chunk)
            await asyncio.sleep(0.02)
        report = await cut.wait(20.0)
        assert (report["offset"], report["seen_offset"] - report["offset"]) == (6 + 5, overshoot)
        assert report["matched"] == "abcde"
        assert report["off_s"] - report["matched_s"] >= 0.1

    run(tmp_path, body)


def test_a_cut_is_called_off_with_the_lease_or_by_hand_and_gives_up_in_time(tmp_path: Path) -> None:
    async def body(rig: Rig) -> None:
        await rig.on()
        cut = rig.board.arm_cut(CutPoint(pattern="never"), allowed)
        await rig.board.calm()
        assert (await cut.wait(15.0))["state"] == "disarmed"
        cut = rig.board.arm_cut(CutPoint(pattern="never", timeout_s=0.1), allowed)
        report = await cut.wait(15.0)
        assert (report["state"], report["trouble"]) == ("failed", "its place did not come within 0.1 s")

        def refused() -> None:
            raise BenchError("this lease is over")

        cut = rig.board.arm_cut(CutPoint(pattern="now"), refused)
        rig.console.say(b"now")
        assert (await cut.wait(15.0))["trouble"] == "this lease is over"
        assert rig.is_on()
        await rig.board.off("test")
        cut = rig.board.arm_cut(CutPoint(pattern="now"), allowed)
        rig.console.say(b"now")
        assert "off already" in (await cut.wait(15.0))["trouble"]

    run(tmp_path, body)


@pytest.mark.parametrize(
    "point",
    [
        CutPoint(),
        CutPoint(pattern="a", byte_offset=1),
        CutPoint(pattern="("),
        CutPoint(pattern="a*"),
        CutPoint(byte_offset=0),
        CutPoint(pattern="a", delay_s=-1),
        CutPoint(pattern="a", delay_s=float("nan")),
        CutPoint(pattern="a", timeout_s=1e9),
    ],
)
def test_a_cut_point_that_makes_no_sense_is_refused(point: CutPoint) -> None:
    with pytest.raises(UsageError):
        point.compiled()


# -------------------------------------------------------------------------------------------------------------- lines
def test_a_pressed_line_is_let_go_of_whatever_happens() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)

    def said(count: int = 8) -> str:
        """So many bytes: a terminal hands them over a moment after they were written."""
        data = b""
        while len(data) < count:
            assert select.select([master], [], [], 5.0)[0], data
            data += os.read(master, count - len(data))
        return data.hex()

    async def body() -> None:
        controls = Controls("b1", {"reset": f"lcus://{os.ttyname(slave)}?relay=1"})
        assert controls.state()["reset"]["asserted"] is None
        await controls.press("reset", 0.05)
        assert said() == "a00101a2a00100a1"
        press = asyncio.create_task(controls.press("reset", 20.0))
        await asyncio.sleep(0.1)
        press.cancel()
        with pytest.raises(asyncio.CancelledError):
            await press
        assert said() == "a00101a2a00100a1"
        await controls.set("reset", True)
        assert controls.state()["reset"]["asserted"] is True
        await controls.release_all(close=True)
        assert said() == "a00101a2a00100a1"
        assert controls.state()["reset"]["asserted"] is False
        with pytest.raises(UsageError, match="its lines: reset"):
            await controls.press("recovery", 0.1)
        with pytest.raises(UsageError, match="pressed for up to 30 s"):
            await controls.press("reset", 31.0)

    timelapse.run(body())
    os.close(master)
    os.close(slave)


def test_a_press_that_is_called_off_on_its_way_does_not_overtake_its_release() -> None:
    said: list[bool] = []

    class Slow:
        def set(self, active: bool) -> None:
            if active:
                threading.Event().wait(0.2)
            said.append(active)

        def close(self) -> None:
            pass

    async def body() -> None:
        controls = Controls("b1", {"reset": "lcus:///dev/nothing?relay=1"})
        controls._lines["reset"] = Slow()
        press = asyncio.create_task(controls.press("reset", 5.0))
        for _ in range(2):
            await asyncio.sleep(0.05)
            press.cancel()
        with pytest.raises(asyncio.CancelledError):
            await press

    timelapse.run(body())
    assert said == [True, False]


# ------------------------------------------------------------------------------------------------------- lease groups
BENCH = """
schema: 1
name: groups
board_types: {types}
supplies:
  psu1: {{driver: scpi, dialect: {dialect}, address: "tcp://192.0.2.1:5025"}}
  psu2: {{driver: scpi, dialect: tti-cpx, address: "tcp://192.0.2.2:9221"}}
  psu3: {{driver: scpi, dialect: rigol-dp800, address: "tcp://192.0.2.3:5555"}}
boards:
  a: {{type: virtual-arm64, power: [{{supply: psu1, channel: 1}}]}}
  b: {{type: virtual-arm64, power: [{{supply: psu1, channel: 2}}, {{supply: psu2, channel: 1}}]}}
  c: {{type: virtual-arm64, power: [{{supply: psu2, channel: 2}}]}}
  d: {{type: virtual-arm64, power: [{{supply: psu3, channel: 1}}]}}
  e: {{type: virtual-arm64, power: [{{supply: psu3, channel: 2}}]}}
"""


def groups(tmp_path: Path, dialect: str) -> dict[str, tuple[str, ...]]:
    path = tmp_path / f"{dialect}.yaml"
    path.write_text(BENCH.format(types=ROOT / "boards", dialect=dialect))
    return {name: tuple(sorted(boards)) for name, boards in lease_groups(load_bench(path)).items()}


def test_boards_on_channels_that_are_not_independent_are_one_group(tmp_path: Path) -> None:
    assert groups(tmp_path, "rs-hmp") == dict.fromkeys("abc", ("a", "b", "c"))
    assert groups(tmp_path, "rigol-dp800") == dict.fromkeys("bc", ("b", "c"))


def test_a_lease_on_one_board_takes_its_group_and_the_refusal_says_why(tmp_path: Path) -> None:
    store = LeaseStore(
        tmp_path / "leases.sqlite",
        "abcd",
        boot_id="boot",
        started=lambda pid: 1,
        groups={"b": ("b", "c"), "c": ("b", "c")},
    )
    lease, token = store.acquire(["b"], holder="first", pid=None, ttl_s=30, now_s=0.0)
    assert lease.boards == ("b", "c")
    store.check(token, "c", 1.0)
    with pytest.raises(BenchError, match=r"board b is leased by first .*; board c is leased by first") as caught:
        store.acquire(["c"], holder="second", pid=None, ttl_s=30, now_s=1.0)
    assert "c can only be leased with b: they hang on one supply whose channels are not independent" in str(
        caught.value
    )
    assert store.acquire(["a"], holder="third", pid=None, ttl_s=30, now_s=1.0)[0].boards == ("a",)
