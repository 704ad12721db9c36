"""A flight that cannot go on does not wait for answers that will never come."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from hil.campaign import flying as module
from hil.campaign.flying import Flying
from hil.errors import BenchError


class FlightThatMayFail:
    def __init__(self) -> None:
        self.lost = threading.Event()
        self.asked = 0
        self.hiccups = 0

    def state(self) -> dict[str, Any]:
        self.asked += 1
        if self.hiccups:
            self.hiccups -= 1
            raise BenchError("busy")
        if self.lost.is_set():
            raise BenchError("no bench daemon answers")
        return {}


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Any:
    ground, board = socket.socketpair()
    monkeypatch.setattr(module, "WATCH_S", 0.01)
    monkeypatch.setattr(module.broker, "connect", lambda *_: ground)
    yield ground, board
    ground.close()
    board.close()


def flown(flight: FlightThatMayFail, disconnected: threading.Event) -> Flying:
    nothing: Any = None
    return Flying(
        mission=nothing,
        board_name="vb1",
        wires=SimpleNamespace(payload=SimpleNamespace(broker=None)),  # type: ignore[arg-type]
        type=nothing,
        timeline=nothing,
        board=SimpleNamespace(disconnect=disconnected.set),  # type: ignore[arg-type]
        flight=flight,  # type: ignore[arg-type]
        journal=nothing,
        say=lambda line: None,
        interrupted=threading.Event(),
    )


def test_a_question_is_hung_up_when_the_daemon_is_gone(ends: Any) -> None:
    flight, disconnected = FlightThatMayFail(), threading.Event()
    flying = flown(flight, disconnected)
    with flying.watched():
        ground = flying.connect_payload("10.0.0.1", 80, 1.0)
        ground.settimeout(10)
        flight.lost.set()
        assert ground.recv(1) == b""  # a board without power never says so: TimeoutError after 10 s without the watch
        assert disconnected.wait(10)


def test_one_hiccup_hangs_nobody_up(ends: Any) -> None:
    flight, disconnected = FlightThatMayFail(), threading.Event()
    flying = flown(flight, disconnected)
    flight.hiccups = 1
    with flying.watched():
        ground = flying.connect_payload("10.0.0.1", 80, 1.0)
        while flight.asked < 5:
            pass
        ends[1].sendall(b"x")
        assert ground.recv(1) == b"x"
    assert not disconnected.is_set()


def test_a_wait_for_the_board_ends_when_the_daemon_is_gone(ends: Any) -> None:
    flight = FlightThatMayFail()
    flying = flown(flight, threading.Event())
    with flying.watched():
        flight.lost.set()
        with pytest.raises(BenchError, match="no bench daemon answers"):
            flying.wait("the model server is healthy", lambda: False, timeout_s=20, every_s=0.01)
