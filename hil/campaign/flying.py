"""What every step of a flight works with: the board, the flight, the journal, and how to pass time and to tell."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hil.bench.journal import Journal
from hil.campaign.pace import Pace
from hil.drivers import broker
from hil.errors import BoardError, HilError, UsageError
from hil.inventory import Mission

if TYPE_CHECKING:
    from hil.client import Board, Flight
    from hil.inventory.bench import BenchBoard, PayloadWire
    from hil.inventory.board_type import BoardType
    from hil.mission.timeline import Timeline

MODEL_PORT = 8080
MAILBOX_PORT = 8081
# Wall seconds that a flown gap's last approach takes at every rate it passes through, so that nothing is overshot.
APPROACH_S = 2.0
# Volts by which what load shedding watches must have recovered before a gap that the daemon slowed is flown fast again.
RECOVERED_V = 0.1
# Wall seconds between looks at the mission's clock while a step waits.
LOOK_S = 0.25
# Wall seconds between looks at whether the flight can go on at all.
WATCH_S = 1.0

Say = Callable[[str], None]


class TimeIsUp(Exception):
    """The mission time at which this flight was to end is reached. Not an error: what was asked for."""


@dataclass
class Flying:
    """What a step works with. `answers` carries what a later step compares with."""

    mission: Mission
    board_name: str
    wires: BenchBoard
    type: BoardType
    timeline: Timeline
    board: Board
    flight: Flight
    journal: Journal
    say: Say
    interrupted: threading.Event
    pace: Pace = field(default_factory=Pace)
    answers: dict[str, str] = field(default_factory=dict)
    features: frozenset[str] = frozenset()
    _ground_ends: weakref.WeakSet[socket.socket] = field(default_factory=weakref.WeakSet)
    _lost: HilError | None = None  # why the flight cannot go on

    @property
    def payload(self) -> PayloadWire:
        if self.wires.payload is None:
            raise UsageError(f"board {self.board_name} has no payload port", hint="add `payload:` to the bench file")
        return self.wires.payload

    def connect_payload(self, host: str, port: int, timeout_s: float) -> Any:
        """A TCP socket on the ground side of the emulated link."""
        ground = broker.connect(self.payload.broker, host, port, timeout_s)
        self._ground_ends.add(ground)
        return ground

    def connect_payload_udp(self, port: int) -> socket.socket:
        """A UDP socket on the ground side of the emulated link, towards a port of the board."""
        ground = broker.connect_udp(self.payload.broker, self.payload.address, port)
        self._ground_ends.add(ground)
        return ground

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Hang up on the board as soon as the flight cannot go on.

        A board without power answers nothing, and nothing tells its peer: without this a step would wait for an answer
        until its own time-out, two minutes for a question, after the daemon is dead. `wait` ends then, too.
        """
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), name="hil-watch-flight", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _watch(self, over: threading.Event) -> None:
        failures: list[HilError] = []
        while len(failures) < 2:  # one may be a hiccup of a busy host
            if over.wait(WATCH_S):
                return
            try:
                self.flight.state()
            except HilError as error:
                failures.append(error)
            else:
                failures.clear()
        self._lost = failures[-1]
        for ground in tuple(self._ground_ends):
            with contextlib.suppress(OSError):  # closed already
                ground.shutdown(socket.SHUT_RDWR)
        self.board.disconnect()

    def event(self, kind: str, **fields: Any) -> None:
        """Write to the journal with the mission time of this moment."""
        state = self.flight.state()
        self.journal.write(kind, t_mission=state["t_mission"], rate=state["rate"], **fields)

    def wait(self, what: str, condition: Callable[[], Any], *, timeout_s: float, every_s: float = 0.1) -> Any:
        """The first true value of `condition`. Raises BoardError naming `what` after `timeout_s` wall seconds.

        What makes the flight end is raised as it is, also where `condition` takes it for a board that is not ready yet.
        """
        deadline = time.monotonic() + timeout_s
        looked = time.monotonic()
        while True:
            value = condition()
            if value:
                return value
            if self._lost is not None:
                raise self._lost
            if time.monotonic() > deadline:
                raise BoardError(f"board {self.board_name}: waited {timeout_s:g} s in vain until {what}")
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                self.check_time()
            self.pause(every_s)

    def pause(self, wall_s: float) -> None:
        """Let wall time pass. Raises KeyboardInterrupt when the flight is interrupted."""
        if self.interrupted.wait(wall_s):
            raise KeyboardInterrupt

    @property
    def end_s(self) -> float:
        """The mission time at which this flight ends at the latest."""
        return self.timeline.duration_s if self.pace.until_s is None else self.pace.until_s

    def clock(self, rate: float, cause: str, *, at_most: float = math.inf) -> float:
        """Run mission time at `rate`, or at what the operator asked for instead; returns the rate that it is.

        `at_most` bounds both: a step that comes near to where it must stop. Raises TimeIsUp at the end of the flight.
        """
        answer = self.flight.clock(min(self.pace.rate_of(rate), at_most), cause=cause)
        self._check_time(answer["t_mission"])
        return float(answer["rate"])

    def go_to(self, t_s: float, cause: str, *, as_now: bool = False) -> None:
        """Let the mission's time come to `t_s`: a jump, or flown if so asked for.

        In a jump the board is taken to idle, with `as_now` to draw what it drew just before. Raises TimeIsUp when the
        flight ends before.
        """
        target_s = t_s if self.pace.until_s is None else min(t_s, self.pace.until_s)
        if self.pace.flies_gaps:
            self._fly_to(target_s, cause)
        else:
            watts = None if as_now else self.type.power.idle_w
            self.flight.skip_to(target_s, assumed_board_w=watts, cause=cause)
        self._check_time(target_s)

    def _fly_to(self, t_s: float, cause: str) -> None:
        """Fly to `t_s` with the board as it is; slower and slower towards it, so that it is not overshot."""
        rate = self.pace.rate or 1.0
        state = self.flight.state()
        if t_s - state["t_mission"] > rate * APPROACH_S:
            self.say(f"  {(t_s - state['t_mission']) / 60:.0f} min of mission time at x{rate:g}: {cause}")
        slowed_v: float | None = None
        while (left_s := t_s - state["t_mission"]) > 0:
            wanted = min(rate, max(left_s / APPROACH_S, 1.0))
            if slowed_v is not None and state["power"]["watched_v"] < slowed_v + RECOVERED_V:
                wanted = 1.0  # the daemon forbade more: load shedding is flown in real time
            if wanted != state["rate"]:
                self.flight.clock(wanted, cause=cause)
            self.pause(min(0.75 * left_s / wanted if wanted > 1 else left_s, 1.0))
            self.board.check()  # a board that lost its power in the gap is not flown on
            state = self.flight.state()
            if state["rate"] < wanted:
                slowed_v = state["power"]["watched_v"]
        if state["rate"] > 1:
            self.flight.clock(1.0, cause=cause)

    def check_time(self) -> None:
        """Raises TimeIsUp when the mission has come to the flight's end."""
        if self.pace.until_s is not None:
            self._check_time(self.flight.state()["t_mission"])

    def _check_time(self, t_mission: float) -> None:
        if self.pace.until_s is not None and t_mission >= self.pace.until_s:
            raise TimeIsUp
