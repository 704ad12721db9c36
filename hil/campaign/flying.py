"""What every step of a flight works with: the board, the flight, the journal, and how to wait and to tell."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hil.bench.journal import Journal
from hil.drivers import broker
from hil.errors import BoardError, UsageError
from hil.inventory import Mission

if TYPE_CHECKING:
    from hil.client import Board, Flight
    from hil.inventory.bench import BenchBoard, PayloadWire
    from hil.inventory.board_type import BoardType
    from hil.mission.timeline import Timeline

MODEL_PORT = 8080
MAILBOX_PORT = 8081

Say = Callable[[str], None]


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
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def payload(self) -> PayloadWire:
        if self.wires.payload is None:
            raise UsageError(f"board {self.board_name} has no payload port", hint="add `payload:` to the bench file")
        return self.wires.payload

    def connect_payload(self, host: str, port: int, timeout_s: float) -> Any:
        """A TCP socket on the ground side of the emulated link."""
        return broker.connect(self.payload.broker, host, port, timeout_s)

    def event(self, kind: str, **fields: Any) -> None:
        """Write to the journal with the mission time of this moment."""
        state = self.flight.state()
        self.journal.write(kind, t_mission=state["t_mission"], rate=state["rate"], **fields)

    def wait(self, what: str, condition: Callable[[], Any], *, timeout_s: float, every_s: float = 0.1) -> Any:
        """The first true value of `condition`. Raises BoardError naming `what` after `timeout_s` wall seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise BoardError(f"board {self.board_name}: waited {timeout_s:g} s in vain until {what}")
            if self.interrupted.wait(every_s):
                raise KeyboardInterrupt
