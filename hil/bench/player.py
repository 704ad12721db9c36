"""Plays a timeline's links onto the emulator: each edge at its instant, and in between whatever has drifted.

Delay drifts by at most 25 us/s, so fidelity is decided at the edges: the schedule is absolute, an edge is never
dropped, and how late each state was acknowledged is recorded. Between edges the state is refreshed twice a second of
wall time, but not just before an edge. A state on its way to a far emulator takes time: edges are sent so much earlier
(`lead_s`). A change of the clock plans everything anew. Rates scale with the clock's rate, delay and loss never.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hil.errors import BenchError
from hil.mission.clock import MissionClock
from hil.mission.radio import LINK_EDGES, OUTAGE
from hil.model import Applied, Direction, LinkState

_T = TypeVar("_T")

TRACK_S = 0.5
DRIFT_S = 20e-6
OVERRUN_S = 0.25
COUNTERS_S = 1.0
# Refreshes and counters go over the same session: never when an edge is this near.
CLEAR_OF_EDGE_S = 0.2
BOTH_OUT: Mapping[Direction, LinkState] = {"uplink": OUTAGE, "downlink": OUTAGE}
NO_EMULATION: Mapping[Direction, LinkState] = {"uplink": LinkState(), "downlink": LinkState()}


class LinkDriver(Protocol):
    """A link emulator; blocking calls."""

    @property
    def lead_s(self) -> float: ...

    def open(self) -> None: ...

    def apply(self, states: Mapping[Direction, LinkState], scheduled_s: float) -> dict[Direction, Applied]: ...

    def counters(self) -> Mapping[Direction, Any]: ...

    def clear(self) -> object: ...

    def preflight(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class LinkOwner:
    """The one user of a link box: its blocking driver runs on a thread of its own, calls in the order they came.

    `states` is what was last read back; None when the link is as hil found it, or unknown after an error. `touched`
    says that hil added something to the box; the file `mark` keeps that beyond the death of this process.
    """

    def __init__(self, name: str, driver: LinkDriver, mark: Path | None = None) -> None:
        self.name = name
        self.states: Mapping[Direction, LinkState] | None = None
        self.touched = mark is not None and mark.exists()
        self._driver = driver
        self._mark = mark
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"hil-link-{name}")

    @property
    def lead_s(self) -> float:
        """How much earlier than its instant an edge is sent."""
        return self._driver.lead_s

    async def apply(self, states: Mapping[Direction, LinkState], scheduled_s: float) -> dict[Direction, Applied]:
        """Apply both directions whole and read them back. Raises BenchError; the state is then unknown."""
        if not self.touched:
            await self._run(self._remember)
        self.touched = True
        self.states = None
        applied = await self._run(lambda: self._driver.apply(states, scheduled_s))
        self.states = dict(states)
        return applied

    async def counters(self) -> Mapping[Direction, Any]:
        return await self._run(self._driver.counters)

    async def preflight(self) -> dict[str, Any]:
        return await self._run(self._driver.preflight)

    async def clear(self) -> None:
        """Remove what hil added; does nothing to a box that neither this daemon nor one before it touched."""
        if self.touched:
            self.states = None
            await self._run(self._driver.clear)
            self.touched = False
            if self._mark is not None:
                self._mark.unlink(missing_ok=True)

    async def close(self) -> None:
        """Clear the link and drop the connection. Raises BenchError when the link stays as it is."""
        try:
            await self.clear()
        finally:
            await self._run(self._driver.close)
            self._thread.shutdown(wait=False)

    def _remember(self) -> None:
        if self._mark is None:
            return
        try:
            self._mark.touch(mode=0o600)
        except OSError as error:
            raise BenchError(f"cannot write {self._mark}: {error.strerror}", hint="free disk space") from error

    async def _run(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


class EdgeLike(Protocol):
    """An edge of the timeline."""

    @property
    def t_s(self) -> float: ...
    @property
    def kind(self) -> str: ...
    @property
    def detail(self) -> str: ...


class TimelineLike(Protocol):
    """What the player needs of a timeline."""

    @property
    def edges(self) -> Sequence[EdgeLike]: ...

    def link_at(self, t_s: float, rate_scale: float = 1.0) -> dict[Direction, LinkState]: ...


@dataclass(frozen=True, slots=True)
class Played:
    """A link state that was applied and read back. `cause`: the edge's kind, `track`, `clock`, `skip`, `start`…"""

    mission_s: float
    rate: float
    cause: str
    states: Mapping[Direction, LinkState]
    applied: Mapping[Direction, Applied]

    @property
    def lateness_s(self) -> float:
        return max(applied.lateness_s for applied in self.applied.values())


@dataclass(frozen=True, slots=True)
class Due:
    """What comes next: at `wall_s` (monotonic) an edge, or None for a refresh."""

    wall_s: float
    edge: EdgeLike | None


class Listener(Protocol):
    """Who writes down what the player did."""

    def played(self, played: Played) -> None: ...

    def passed(self, edge: EdgeLike, played: Played | None) -> None:
        """An edge is behind us; `played` for one that changed the link."""

    def overrun(self, edge: EdgeLike, late_s: float) -> None: ...

    def counted(self, counters: Mapping[Direction, Any]) -> None: ...

    def failed(self, error: BenchError) -> None: ...


def next_due(edge: EdgeLike | None, clock: MissionClock, now_s: float, track_from_s: float, lead_s: float = 0.0) -> Due:
    """`edge`, or the next refresh on the grid that began at `track_from_s` if that comes before the edge is sent."""
    tick = track_from_s + (math.floor((now_s - track_from_s) / TRACK_S) + 1) * TRACK_S
    if edge is not None:
        at = clock.wall_s(max(edge.t_s, clock.segments[-1].mission_start_s))
        if at - lead_s <= tick:
            return Due(at, edge)
    return Due(tick, None)


def drifted(before: Mapping[Direction, LinkState] | None, now: Mapping[Direction, LinkState]) -> bool:
    """Whether a refresh is worth an exchange with the emulator."""
    if before is None or before.keys() != now.keys():
        return True
    for direction, state in now.items():
        old = before[direction]
        if state.outage and old.outage:
            continue
        if abs(state.delay_s - old.delay_s) >= DRIFT_S:
            return True
        if (state.outage, state.loss, state.rate_bps, state.jitter_s) != (
            old.outage,
            old.loss,
            old.rate_bps,
            old.jitter_s,
        ):
            return True
    return False


class Player:
    """Plays `timeline` by `clock` onto `link` until cancelled; without a link it only reports the edges."""

    def __init__(
        self,
        timeline: TimelineLike,
        clock: MissionClock,
        link: LinkOwner | None,
        listener: Listener,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeline = timeline
        self._edges = tuple(timeline.edges)
        self.clock = clock
        self._link = link
        self._listener = listener
        self._monotonic = monotonic
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._cause = "start"
        self._busy = asyncio.Lock()
        self._next = 0
        self._flown_s = -math.inf  # mission second of the newest edge, which was sent ahead of it
        self._counted_s = -math.inf
        self.overruns = 0
        self.last: Played | None = None
        self.ready = asyncio.Event()

    def replan(self, cause: str) -> None:
        """The clock has changed: play the state of now, then go on from here."""
        self._cause = cause
        self._settled.clear()
        self._changed.set()

    async def settled(self) -> None:
        """Return when the newest change of the clock has reached the link, or failed to (`Listener.failed`)."""
        await self._settled.wait()

    @contextlib.asynccontextmanager
    async def outage(self, cause: str) -> AsyncIterator[None]:
        """Hold the link in outage while the body moves the clock; the state of then is played afterwards.

        The payload must not carry traffic while mission time jumps. Raises BenchError when the outage is not proven.
        """
        async with self._busy:
            if self._link is not None:
                await self._apply(BOTH_OUT, self._monotonic(), cause)
            try:
                yield
            finally:
                # Edges that the jump passed over were not flown: they are not reported as such.
                self._seek()
                self.replan(cause)

    async def run(self) -> None:
        """Play until cancelled."""
        self._seek()
        self._changed.set()
        track_from_s = self._monotonic()
        while True:
            now_s = self._monotonic()
            lead_s = 0.0 if self._link is None else self._link.lead_s
            due = next_due(self._upcoming(), self.clock, now_s, track_from_s, lead_s)
            wait_s = due.wall_s - now_s - (0.0 if due.edge is None else lead_s)
            if not self._changed.is_set() and wait_s > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
            async with self._busy:
                if self._changed.is_set():
                    self._changed.clear()
                    await self._play_now(self._cause)
                    if not self._changed.is_set():
                        self._settled.set()
                elif due.edge is not None:
                    await self._play_edge(due.wall_s, due.edge)
                else:
                    await self._refresh()
            self.ready.set()

    async def _play_now(self, cause: str) -> None:
        now_s = self._monotonic()
        await self._try(self._state_at(now_s), now_s, cause)

    def _state_at(self, now_s: float) -> Mapping[Direction, LinkState]:
        """The link's state at a wall time; an edge that was sent ahead is not taken back before its instant."""
        return self._timeline.link_at(max(self.clock.mission_s(now_s), self._flown_s), rate_scale=self.clock.rate)

    def _seek(self) -> None:
        """Take the first edge that is not behind us as the next one."""
        self._flown_s = -math.inf
        self._next = bisect_right(self._edges, self.clock.mission_s(self._monotonic()), key=lambda edge: edge.t_s)

    def _upcoming(self) -> EdgeLike | None:
        return self._edges[self._next] if self._next < len(self._edges) else None

    async def _play_edge(self, wall_s: float, edge: EdgeLike) -> None:
        self._next += 1
        self._flown_s = edge.t_s
        played = None
        if edge.kind in LINK_EDGES and self._link is not None:
            # The edge's own instant, never a rounding before it: there the old state still holds. When we are so late
            # that the next edge is due as well, each is still played in its turn.
            mission_s = max(edge.t_s, self.clock.mission_s(self._monotonic()))
            following = self._upcoming()
            if following is not None and following.t_s <= mission_s:
                mission_s = edge.t_s
            states = self._timeline.link_at(mission_s, rate_scale=self.clock.rate)
            played = await self._try(states, wall_s, edge.kind)
        self._listener.passed(edge, played)
        late_s = self._monotonic() - wall_s if played is None else played.lateness_s
        if late_s > OVERRUN_S:
            self.overruns += 1
            self._listener.overrun(edge, late_s)
        if played is not None and not self._edge_near():
            await self._count()

    async def _refresh(self) -> None:
        if self._edge_near():
            return  # its exchange would make the edge wait, and the edge brings the whole state
        now_s = self._monotonic()
        states = self._state_at(now_s)
        if self._link is not None and drifted(self._link.states, states):
            await self._try(states, now_s, "track")
        if now_s - self._counted_s >= COUNTERS_S and not self._edge_near():
            await self._count()

    def _edge_near(self) -> bool:
        edge = self._upcoming()
        if edge is None:
            return False
        begin_s = self.clock.segments[-1].mission_start_s
        lead_s = 0.0 if self._link is None else self._link.lead_s
        return self.clock.wall_s(max(edge.t_s, begin_s)) - lead_s - self._monotonic() < CLEAR_OF_EDGE_S

    async def _try(self, states: Mapping[Direction, LinkState], scheduled_s: float, cause: str) -> Played | None:
        if self._link is None:
            return None
        try:
            return await self._apply(states, scheduled_s, cause)
        except BenchError as error:
            # The next refresh tries again; the run is invalid from here, which the listener writes down.
            self._listener.failed(error)
            return None

    async def _apply(self, states: Mapping[Direction, LinkState], scheduled_s: float, cause: str) -> Played:
        if self._link is None:
            raise BenchError("no link emulator to apply a state to")
        mission_s = self.clock.mission_s(scheduled_s)
        rate = self.clock.rate
        applied = await self._link.apply(states, scheduled_s)
        self.last = played = Played(mission_s, rate, cause, dict(states), applied)
        self._listener.played(played)
        return played

    async def _count(self) -> None:
        if self._link is None:
            return
        self._counted_s = self._monotonic()
        try:
            self._listener.counted(await self._link.counters())
        except BenchError as error:
            self._listener.failed(error)
