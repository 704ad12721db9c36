"""Streams that hang on a lease, without a daemon: who gets one, and what ends it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hil.bench.leased_streams import LeasedStreams
from hil.bench.pumps import Pace
from hil.client.watch import Watch, Watches
from hil.drivers import broker
from hil.errors import BenchError, UsageError
from hil.inventory.bench import BenchBoard, JumpHost, PayloadWire, SshWire


class Served:
    """The streams of one board, on a thread of their own. `token` may drive it, in `power_epoch`."""

    def __init__(self, directory: Path, port: int) -> None:
        self.path = directory / "s.sock"
        self.token, self.power_epoch = "t1", 7
        self.asked = 0
        hop = JumpHost(address="127.0.0.1", port=port, known_hosts=directory)
        here = {"address": "127.0.0.1", "known_hosts": directory}
        self.wires = BenchBoard.model_construct(
            mgmt=SshWire(**here, port=1, jump=(hop,)),
            payload=PayloadWire(**here, port=port, link="l", broker=directory / "none"),
        )
        mute = JumpHost(address="127.0.0.1", port=9, known_hosts=directory)
        self.mute = BenchBoard.model_construct(mgmt=SshWire(**here, port=9, jump=(mute,)), payload=None)
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(5)

    def check(self, board: str, epoch: int | None, token: str | None) -> dict[str, Any]:
        self.asked += 1
        if board not in ("b1", "mute1", "mute2", "mute3"):
            raise UsageError(f"no board {board}")
        if token != self.token:
            raise BenchError("the lease is over")
        if epoch not in (None, self.power_epoch):
            raise BenchError("the power was cut")
        return {"power_epoch": self.power_epoch}

    def end(self, *what: Any) -> None:
        self._loop.call_soon_threadsafe(self._streams.end, "b1", *what)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(5)
        assert not self._thread.is_alive()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._streams = LeasedStreams(self.check, lambda board: self.wires if board == "b1" else self.mute)
        await self._streams.serve(self.path)
        ready.set()
        await self._over.wait()
        await self._streams.close()


@pytest.fixture
def port() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        yield listener


@pytest.fixture
def served(tmp_path: Path, port: socket.socket) -> Iterator[Served]:
    server = Served(tmp_path, port.getsockname()[1])
    yield server
    server.close()


def loud(watch: Watch) -> bool:
    """Whether it ends, as it does within a moment."""
    deadline = time.monotonic() + 15
    while watch.silent:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_a_watch_is_silent_until_something_changes(served: Served) -> None:
    watch = Watch(served.path, "b1", "t1", None)
    assert watch.power_epoch == 7
    served.end("ssh")
    time.sleep(0.05)
    assert watch.silent
    served.end("watch")
    assert loud(watch)
    watch.close()
    assert not watch.silent
    for board, token, epoch, says in (("b9", "t1", 7, "no board"), ("b1", "t2", 7, "over"), ("b1", "t1", 6, "cut")):
        with pytest.raises((BenchError, UsageError), match=says):
            Watch(served.path, board, token, epoch)
    again = Watch(served.path, "b1", "t1", 7)
    served.close()
    assert loud(again)
    again.close()


def asked_for_long(watches: Watches, known: int) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        watches.power_epoch("b1", "t1", known)


def test_nothing_is_asked_while_a_watch_is_silent(served: Served) -> None:
    watches = Watches(served.path)
    for _ in range(100):
        assert watches.power_epoch("b1", "t1", 7) == 7
    assert served.asked == 1
    with pytest.raises(BenchError, match="cut"):
        watches.power_epoch("b1", "t1", 6)  # what a client knows that the watch does not is asked
    served.power_epoch = 8
    served.end("watch")
    with pytest.raises(BenchError, match="the power was cut"):
        asked_for_long(watches, 7)
    assert watches.power_epoch("b1", "t1", None) == 8
    served.token = "t2"
    served.end()
    with pytest.raises(BenchError, match="over"):
        asked_for_long(watches, 8)
    watches.close()


def test_a_daemon_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hil.client.watch.TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "s.sock"))
        mute.listen()
        with pytest.raises(BenchError, match=r"did not answer within 0\.1 s"):
            Watches(tmp_path / "s.sock").power_epoch("b1", "t1", None)


def ask(served: Served, **asked: Any) -> tuple[socket.socket, dict[str, Any]]:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(str(served.path))
    client.sendall(json.dumps(asked).encode() + b"\n")
    return client, json.loads(client.makefile("rb").readline() or b"{}")


def test_bytes_go_to_the_first_machine_on_the_way_until_the_lease_ends(served: Served, port: socket.socket) -> None:
    client, answer = ask(served, stream="ssh", board="b1", token="t1", plane="mgmt")
    assert answer == {}
    peer, _ = port.accept()
    peer.settimeout(5)
    client.sendall(b"up")
    peer.sendall(b"down")
    assert (peer.recv(10), client.recv(10)) == (b"up", b"down")
    served.end("watch")
    client.sendall(b"more")
    assert peer.recv(10) == b"more"
    served.end()
    assert (peer.recv(10), client.recv(10)) == (b"", b"")
    for sock in (client, peer):
        sock.close()


def test_boards_that_do_not_answer_keep_no_other_waiting(
    served: Served, port: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, dialled, dial = threading.Event(), [], broker.connect

    def connect(through: Path | None, host: str, number: int, timeout_s: float) -> socket.socket:
        dialled.append(number)
        if number == 9:
            answers.wait(60)
            raise TimeoutError("timed out")
        return dial(through, host, number, timeout_s)

    def begin(board: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(served.path))
        client.sendall(json.dumps({"stream": "ssh", "board": board, "token": "t1", "plane": "mgmt"}).encode() + b"\n")
        return client

    monkeypatch.setattr(broker, "connect", connect)
    mute = [begin(f"mute{number}") for number in (1, 2, 3)]
    began = time.monotonic()
    client, answer = ask(served, stream="ssh", board="b1", token="t1", plane="mgmt")
    assert answer == {}
    assert time.monotonic() - began < 30
    left = begin("mute1")
    monkeypatch.setattr("hil.bench.leased_streams.SLOT_S", 0.2)
    client, answer = ask(served, stream="ssh", board="mute1", token="t1", plane="mgmt")
    assert answer["error"]["arm"] == "bench"
    assert "still being made" in answer["error"]["message"]
    left.close()
    mute[1].close()  # in the middle of the dial
    time.sleep(1.0)
    answers.set()
    assert b"nothing answers" in mute[0].recv(1000)
    client, answer = ask(served, stream="ssh", board="mute2", token="t1", plane="mgmt")
    assert "nothing answers" in answer["error"]["message"]
    assert dialled.count(9) == 4  # not for the one that left
    for sock in (client, *mute):
        sock.close()


def test_a_byte_after_the_lease_does_not_reach_the_board(served: Served, port: socket.socket) -> None:
    """Also before anybody had the time to end the stream."""
    client, _ = ask(served, stream="ssh", board="b1", token="t1", plane="mgmt")
    peer, _ = port.accept()
    peer.settimeout(5)
    served.token = "t2"
    client.sendall(b"late")
    assert peer.recv(10) == b""
    client.close()
    peer.close()


def test_pumps_that_share_a_pace_share_its_rate() -> None:
    async def copy(pace: Pace, pieces: int) -> None:
        for _ in range(pieces):
            await pace.spend(10_000)

    async def both() -> float:
        began, pace = time.monotonic(), Pace(1e6)
        await asyncio.gather(copy(pace, 10), copy(pace, 10))
        return time.monotonic() - began

    async def keys() -> float:
        began, pace = time.monotonic(), Pace(1e6)
        for _ in range(100):
            await pace.spend(1)
        return time.monotonic() - began

    assert 0.19 < asyncio.run(both()) < 10
    assert min(asyncio.run(keys()) for _ in range(5)) < 0.1  # nobody who types waits


@pytest.mark.parametrize(
    ("asked", "arm", "says"),
    [
        ({"stream": "ssh", "board": "b1", "token": "t2", "plane": "mgmt"}, "bench", "the lease is over"),
        ({"stream": "ssh", "board": "b1", "token": "t1", "plane": "moon"}, "usage", "b1 has no moon port"),
        ({"stream": "ssh", "board": "b1", "token": "t1", "plane": "payload"}, "bench", "the payload broker on"),
        ({"stream": "ssh", "board": "b1", "plane": "mgmt"}, "usage", "wants the board's name and the lease's token"),
        ({"stream": "watch", "board": "b1", "token": "t1", "power_epoch": "7"}, "usage", "a number or null"),
        ({"stream": "other", "board": "b1", "token": "t1"}, "usage", "ssh or watch"),
    ],
)
def test_what_is_refused_says_why(served: Served, asked: dict[str, Any], arm: str, says: str) -> None:
    client, answer = ask(served, **asked)
    assert answer["error"]["arm"] == arm
    assert says in answer["error"]["message"]
    assert client.recv(10) == b""
    client.close()
