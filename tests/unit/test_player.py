"""The player: edges at their instants at any clock rate, outage during a skip, a refresh only after some drift."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hil.bench import player as module
from hil.bench.player import BOTH_OUT, NO_EMULATION, LinkOwner, Played, Player, drifted, next_due
from hil.errors import BenchError
from hil.mission.clock import MissionClock
from hil.mission.radio import LINK_EDGES
from hil.mission.timeline import EDGE_KINDS
from hil.model import Applied, Direction, LinkState


@dataclass(frozen=True)
class Edge:
    t_s: float
    kind: str
    detail: str = ""


class Sky:
    """In contact between `aos` and `los`: 10 ms and 1 us more each second, 300 kbit/s; the sun sets in between."""

    def __init__(self, aos: float, los: float) -> None:
        self.aos, self.los = aos, los
        self.edges = (
            Edge(aos, "aos", "miyun"),
            Edge(aos, "rate", "miyun"),
            Edge((aos + los) / 2, "umbra_entry"),
            Edge(los, "los", "miyun"),
        )

    def link_at(self, t_s: float, rate_scale: float = 1.0) -> dict[Direction, LinkState]:
        if not self.aos <= t_s < self.los:
            return dict(BOTH_OUT)
        state = LinkState(delay_s=0.01 + 1e-6 * t_s, rate_bps=300e3 * rate_scale)
        return {"uplink": state, "downlink": state}


@dataclass
class Box:
    """A link box: blocking, takes `takes_s`, fails while `broken`."""

    takes_s: float = 0.0
    lead_s: float = 0.0
    broken: bool = False
    states: list[Mapping[Direction, LinkState]] = field(default_factory=list)
    closed: bool = False
    cleared: int = 0

    def open(self) -> None: ...

    def apply(self, states: Mapping[Direction, LinkState], scheduled_s: float) -> dict[Direction, Applied]:
        if self.broken:
            raise BenchError("the netem box is lost")
        sent = time.monotonic()
        if self.takes_s:
            time.sleep(self.takes_s)
        self.states.append(states)
        return {direction: Applied(scheduled_s, sent, time.monotonic(), time.monotonic()) for direction in states}

    def counters(self) -> dict[Direction, int]:
        return {"uplink": len(self.states)}

    def clear(self) -> None:
        self.cleared += 1

    def preflight(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True


@dataclass
class Log:
    """A listener that keeps everything."""

    states: list[Played] = field(default_factory=list)
    edges: list[tuple[str, Played | None]] = field(default_factory=list)
    overruns: list[tuple[str, float]] = field(default_factory=list)
    counters: int = 0
    errors: list[BenchError] = field(default_factory=list)

    def played(self, played: Played) -> None:
        self.states.append(played)

    def passed(self, edge: Any, played: Played | None) -> None:
        self.edges.append((edge.kind, played))

    def overrun(self, edge: Any, late_s: float) -> None:
        self.overruns.append((edge.kind, late_s))

    def counted(self, counters: Mapping[Direction, Any]) -> None:
        self.counters += 1

    def failed(self, error: BenchError) -> None:
        self.errors.append(error)


class Flying:
    """A player at work on a box, with its clock running from mission second 0."""

    def __init__(self, sky: Sky, box: Box | None, rate: float = 1.0) -> None:
        self.box = box
        self.log = Log()
        self.clock = MissionClock(0.0, time.monotonic(), rate)
        self.link = None if box is None else LinkOwner("box1", box)
        self.player = Player(sky, self.clock, self.link, self.log)

    async def __aenter__(self) -> Flying:
        self.task = asyncio.create_task(self.player.run())
        await self.player.ready.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.wait((self.task,))
        if self.link is not None:
            await self.link.close()

    async def passed(self, count: int) -> None:
        await until(lambda: len(self.log.edges) >= count)

    @property
    def causes(self) -> list[str]:
        return [played.cause for played in self.log.states]


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def run(scenario: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario, 60)

    asyncio.run(bounded())


@pytest.mark.parametrize("rate", [1.0, 60.0])
def test_edges_are_played_at_their_instants_with_the_rate_scaled_and_the_delay_not(rate: float) -> None:
    async def scenario() -> None:
        async with Flying(Sky(0.2 * rate, 0.6 * rate), Box(), rate) as flight:
            await flight.passed(4)
        assert [kind for kind, _ in flight.log.edges] == ["aos", "rate", "umbra_entry", "los"]
        first = flight.log.states[0]
        assert (first.cause, first.states["uplink"].outage) == ("start", True)
        for kind, wall in (("aos", 0.2), ("los", 0.6)):
            played = next(p for k, p in flight.log.edges if k == kind and p)
            applied = played.applied["uplink"]
            assert applied.scheduled_s - flight.clock.segments[0].wall_start_s == pytest.approx(wall, abs=1e-6)
            assert 0 <= played.lateness_s < 1.0  # how late depends on the host; that it is told does not
            assert played.states["uplink"].outage is (kind == "los")
        up = next(p for k, p in flight.log.edges if k == "aos" and p).states["uplink"]
        assert up.rate_bps == 300e3 * rate
        assert 0.01 <= up.delay_s < 0.0101
        assert dict(flight.log.edges)["umbra_entry"] is None  # the sun's edges do not touch the link
        assert flight.box is not None
        assert flight.box.closed
        assert flight.box.cleared == 1

    run(scenario())


def test_edges_leave_for_a_far_box_before_their_instant() -> None:
    async def scenario() -> None:
        async with Flying(Sky(0.9, 1.8), Box(lead_s=0.8)) as flight:
            await flight.passed(4)
        begin_s = flight.clock.segments[0].wall_start_s
        for kind, wall in (("aos", 0.9), ("los", 1.8)):
            played = next(p for k, p in flight.log.edges if k == kind and p)
            applied = played.applied["uplink"]
            assert applied.scheduled_s - begin_s == pytest.approx(wall, abs=1e-6)
            assert wall - 0.8 <= applied.sent_s - begin_s < wall
            assert played.states["uplink"].outage is (kind == "los")  # what holds from the edge on, though sent before
        assert [kind for kind, _ in flight.log.edges] == ["aos", "rate", "umbra_entry", "los"]

    run(scenario())


def test_an_edge_that_was_sent_ahead_is_not_taken_back_by_a_change_of_the_clock() -> None:
    async def scenario() -> None:
        async with Flying(Sky(30.0, 1000.0), Box(lead_s=29.9)) as flight:
            await flight.passed(2)
            assert flight.clock.mission_s(time.monotonic()) < 30.0
            flight.clock.set_rate(2.0, time.monotonic())
            flight.player.replan("clock")
            await until(lambda: "clock" in flight.causes)
            played = next(played for played in flight.log.states if played.cause == "clock")
            assert not played.states["uplink"].outage
            async with flight.player.outage("skip"):
                flight.clock.skip_to(20.0, time.monotonic())
            await flight.passed(4)  # a skip seeks anew: the edge is ahead again

    run(scenario())


def test_no_refresh_is_under_way_when_an_edge_is_due() -> None:
    async def scenario() -> None:
        los_s = 2 * module.TRACK_S + 0.05
        sky = Sky(0, 60.0 * los_s)
        sky.edges = sky.edges[-1:]
        async with Flying(sky, Box(), 60.0) as flight:
            await flight.passed(1)
        begin_s = flight.clock.segments[0].wall_start_s
        before = [
            begin_s + los_s - played.applied["uplink"].scheduled_s
            for played in flight.log.states
            if played.cause == "track" and not played.states["uplink"].outage
        ]
        assert before  # there was something to refresh
        assert min(before) > module.CLEAR_OF_EDGE_S - 0.05

    run(scenario())


class Weather(Sky):
    """A tenth of a second apart, every kind of edge that a link has; each finds a loss of its own on the link."""

    def __init__(self) -> None:
        self.aos, self.los = 0.0, 100.0
        self.edges = tuple(Edge(0.2 + 0.1 * index, kind) for index, kind in enumerate(sorted(LINK_EDGES)))

    def link_at(self, t_s: float, rate_scale: float = 1.0) -> dict[Direction, LinkState]:
        seen = sum(edge.t_s <= t_s for edge in self.edges)
        state = LinkState(delay_s=0.01, loss=seen / 100, rate_bps=300e3 * rate_scale)
        return {"uplink": state, "downlink": state}


def test_every_kind_of_link_edge_reaches_the_link_at_its_instant() -> None:
    async def scenario() -> None:
        async with Flying(Weather(), Box()) as flight:
            await flight.passed(len(LINK_EDGES))
        assert [kind for kind, _ in flight.log.edges] == sorted(LINK_EDGES)
        for index, (kind, played) in enumerate(flight.log.edges):
            assert played is not None, kind
            assert played.cause == kind
            assert played.states["uplink"].loss == (index + 1) / 100
            scheduled_s = played.applied["uplink"].scheduled_s - flight.clock.segments[0].wall_start_s
            assert scheduled_s == pytest.approx(0.2 + 0.1 * index, abs=1e-6)

    assert set(EDGE_KINDS) >= LINK_EDGES
    run(scenario())


def test_a_change_of_rate_is_played_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with Flying(Sky(0, 1000), Box()) as flight:
            flight.clock.set_rate(60.0, time.monotonic())
            flight.player.replan("clock")
            await until(lambda: "clock" in flight.causes)
            assert flight.log.states[-1].states["downlink"].rate_bps == 18e6

    run(scenario())


def test_a_skip_happens_in_outage_and_jumps_over_edges() -> None:
    async def scenario() -> None:
        async with Flying(Sky(0, 1000), Box()) as flight:
            seen = len(flight.log.states)
            async with flight.player.outage("skip"):
                assert flight.box is not None
                assert flight.box.states[-1] == BOTH_OUT
                flight.clock.skip_to(600.0, time.monotonic())
            await until(lambda: len(flight.log.states) >= seen + 2)
            assert flight.causes[seen:] == ["skip", "skip"]
            assert flight.log.states[-1].mission_s >= 600
            assert not flight.log.states[-1].states["uplink"].outage
            assert [kind for kind, _ in flight.log.edges] == []

    run(scenario())


def test_a_slow_box_is_an_overrun_and_no_edge_is_dropped() -> None:
    async def scenario() -> None:
        async with Flying(Sky(0.3, 0.4), Box(takes_s=0.3)) as flight:
            await flight.passed(4)
        assert [kind for kind, _ in flight.log.edges] == ["aos", "rate", "umbra_entry", "los"]
        assert [kind for kind, _ in flight.log.overruns][-1] == "los"
        assert flight.log.overruns[-1][1] > module.OVERRUN_S
        played = [p.states["uplink"].outage for k, p in flight.log.edges if p and k in ("aos", "los")]
        assert played == [False, True]

    run(scenario())


def test_a_lost_box_is_told_and_tried_again() -> None:
    async def scenario() -> None:
        async with Flying(Sky(0, 1000), Box(broken=True)) as flight:
            assert "lost" in flight.log.errors[0].message
            assert flight.link is not None
            assert flight.link.states is None
            assert flight.box is not None
            flight.box.broken = False
            await until(lambda: flight.log.states)
            assert flight.causes == ["track"]

    run(scenario())


def test_a_link_that_cannot_be_cleared_is_said_and_its_connection_dropped() -> None:
    async def body() -> None:
        box = Box()
        link = LinkOwner("box", box)
        await link.apply(NO_EMULATION, 0.0)

        def clear() -> None:
            raise BenchError("still shaped")

        box.clear = clear  # type: ignore[method-assign]
        with pytest.raises(BenchError, match="still shaped"):
            await link.close()
        assert box.closed

    asyncio.run(body())


def test_who_died_with_a_shaped_link_is_cleared_up_after(tmp_path: Path) -> None:
    async def body() -> None:
        mark = tmp_path / "box.touched"
        await LinkOwner("box", Box(), mark).apply(NO_EMULATION, 0.0)  # and then its process is killed
        box = Box()
        link = LinkOwner("box", box, mark)
        assert link.touched
        await link.clear()
        assert box.cleared == 1
        assert not LinkOwner("box", box, mark).touched
        await link.clear()
        assert box.cleared == 1, "a box that nobody touched is left alone"
        with pytest.raises(BenchError, match="cannot write"):
            await LinkOwner("box", box, tmp_path / "absent" / "mark").apply(NO_EMULATION, 0.0)

    asyncio.run(body())


def test_without_a_link_the_edges_still_pass() -> None:
    async def scenario() -> None:
        async with Flying(Sky(0.05, 0.1), None) as flight:
            await flight.passed(4)
        assert all(played is None for _, played in flight.log.edges)

    run(scenario())


@given(
    t=st.floats(0, 1e5),
    at=st.floats(0, 1e4),
    rate=st.floats(0.1, 1000),
    elapsed=st.floats(0, 1e4),
    lead=st.floats(0, 0.4),
)
@example(t=10.52, at=0.0, rate=1.0, elapsed=10.02, lead=0.15)  # behind the refresh at 10.5, and sent before it
def test_what_is_due_next_is_never_beyond_one_refresh(
    t: float, at: float, rate: float, elapsed: float, lead: float
) -> None:
    clock = MissionClock(0.0, at, rate)
    now = at + elapsed
    due = next_due(Edge(t, "los"), clock, now, at, lead)
    if due.edge is None:
        assert now - 1e-6 < due.wall_s <= now + module.TRACK_S + 1e-6
        assert clock.wall_s(t) - lead > due.wall_s  # no refresh is waited for while an edge should leave
    else:
        assert due.wall_s == clock.wall_s(t)
        assert due.wall_s - lead <= now + module.TRACK_S + 1e-6


def test_drift_below_the_threshold_is_not_worth_an_exchange() -> None:
    state = LinkState(delay_s=0.01, rate_bps=1e6)
    both: dict[Direction, LinkState] = {"uplink": state, "downlink": state}
    assert not drifted(both, {**both, "uplink": replace(state, delay_s=0.010019)})
    assert drifted(both, {**both, "uplink": replace(state, delay_s=0.010021)})
    assert drifted(both, {**both, "downlink": replace(state, rate_bps=2e6)})
    assert drifted(None, both)
    assert not drifted(BOTH_OUT, {d: replace(s, delay_s=0.5) for d, s in BOTH_OUT.items()})
