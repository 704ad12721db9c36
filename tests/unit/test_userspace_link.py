"""The user-space link: what its shaper decides, by a clock of the test's own, and its process on real sockets."""

from __future__ import annotations

import csv
import json
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.drivers.frame_ports import StreamPort, open_port
from hil.drivers.shaper import Packet, Point, Shaper
from hil.drivers.userspace_link import UserSpaceLink, start
from hil.errors import BenchError, UsageError
from hil.model import LinkState

FRAME = bytes(1250)  # 10,000 bits


def drained(shaper: Shaper) -> list[Packet]:
    """Everything that is under way, in the order in which it leaves."""
    packets = []
    while (due_s := shaper.next_due_s()) is not None:
        assert shaper.take(due_s - 1e-9) is None
        packet = shaper.take(due_s)
        assert packet is not None
        packets.append(packet)
    return packets


def shaped(state: LinkState, seed: int = 1) -> Shaper:
    shaper = Shaper(seed)
    shaper.set(state)
    return shaper


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of a packet


def test_a_delay_is_added_to_each_packet() -> None:
    shaper = shaped(LinkState(delay_s=0.02))
    for at_s in (1.0, 1.001, 1.5):
        shaper.offer(FRAME, at_s)
    assert [packet.due_s for packet in drained(shaper)] == pytest.approx([1.02, 1.021, 1.52])


def test_a_rate_spaces_packets_by_their_length_and_the_delay_comes_after() -> None:
    shaper = shaped(LinkState(delay_s=0.5, rate_bps=1e6))
    for _ in range(3):
        shaper.offer(FRAME, 1.0)
    shaper.offer(FRAME, 2.0)
    assert [packet.due_s for packet in drained(shaper)] == pytest.approx([1.51, 1.52, 1.53, 2.51])


def test_what_does_not_fit_into_the_queue_is_dropped_and_what_is_under_way_does_not_count() -> None:
    shaper = shaped(LinkState(delay_s=10.0, rate_bps=1e6, queue_packets=2))
    for at_s in (0.0, 0.0, 0.0, 0.0105, 0.5):
        shaper.offer(FRAME, at_s)
    counters = shaper.counters()
    assert (counters.dropped, counters.overlimits, counters.backlog_packets) == (1, 1, 4)
    assert len(drained(shaper)) == 4


def test_an_outage_loses_what_comes_and_not_what_is_under_way() -> None:
    shaper = Shaper(1)
    clear, dark = LinkState(delay_s=0.1), LinkState(delay_s=0.1, outage=True)
    shaper.plan([Point(0.0, clear), Point(1.0, dark), Point(2.0, clear)])
    for at_s in (0.95, 1.0, 1.99, 2.0):
        shaper.offer(FRAME, at_s)
    assert [packet.in_s for packet in drained(shaper)] == [0.95, 2.0]
    assert shaper.counters().dropped == 2


def test_between_two_points_the_delay_is_interpolated_for_each_packet() -> None:
    shaper = Shaper(1)
    dark = LinkState(outage=True)
    points = [(10.0, 0.010), (20.0, 0.020), (20.0, 0.005), (30.0, 0.015)]
    shaper.plan([*(Point(at_s, LinkState(delay_s=delay_s)) for at_s, delay_s in points), Point(40.0, dark)])
    asked = (5.0, 10.0, 12.5, 19.999, 20.0, 25.0, 35.0)
    assert [shaper.delay_at(at_s) for at_s in asked] == pytest.approx(
        [0.010, 0.010, 0.0125, 0.019999, 0.005, 0.010, 0.015]
    )
    with pytest.raises(ValueError, match="order of time"):
        shaper.plan([Point(2.0, dark), Point(1.0, dark)])
    with pytest.raises(ValueError, match="order of time"):
        shaper.plan([])


@settings(max_examples=25)
@given(st.integers(0, 1000), st.lists(st.floats(0, 0.003), min_size=2, max_size=40))
def test_packets_keep_their_order_unless_told_otherwise(seed: int, gaps: list[float]) -> None:
    shaper, now_s = Shaper(seed), 0.0
    for index, gap_s in enumerate(gaps):
        now_s += gap_s
        shaper.set(LinkState(delay_s=0.02 / (1 + index), jitter_s=0.005))  # the delay falls as well
        shaper.offer(FRAME, now_s)
    packets = drained(shaper)
    assert [packet.number for packet in packets] == sorted(packet.number for packet in packets)
    assert all(packet.due_s >= packet.in_s for packet in packets)


def test_packets_overtake_each_other_when_asked() -> None:
    shaper = shaped(LinkState(delay_s=0.02, jitter_s=0.01, reorder=True))
    for index in range(50):
        shaper.offer(FRAME, index * 0.001)
    packets = drained(shaper)
    assert [packet.number for packet in packets] != sorted(packet.number for packet in packets)
    spread = [packet.due_s - packet.in_s for packet in packets]
    assert 0.01 <= min(spread) < 0.013
    assert 0.027 < max(spread) <= 0.03


def test_shares_are_met_and_repeat_with_the_seed() -> None:
    def fly(seed: int) -> list[tuple[int, str]]:
        shaper = shaped(LinkState(loss=0.1, duplicate=0.05, corrupt=0.02), seed)
        for index in range(20_000):
            shaper.offer(b"\0" * 20, float(index))
        return [(packet.number, packet.fate) for packet in drained(shaper)]

    first = fly(7)
    assert first == fly(7)
    assert first != fly(8)
    fates = [fate for _, fate in first]
    passed = len(fates) - fates.count("duplicate")
    # Four standard deviations of a binomial.
    assert abs(passed - 18_000) < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    assert abs(fates.count("duplicate") - 0.05 * passed) < 4 * (passed * 0.05) ** 0.5
    assert abs(fates.count("corrupted") - 0.02 * passed) < 4 * (passed * 0.02) ** 0.5


def test_corruption_turns_one_bit() -> None:
    shaper = shaped(LinkState(corrupt=1.0))
    frame = random.Random(1).randbytes(100)
    shaper.offer(frame, 0.0)
    (packet,) = drained(shaper)
    changed = int.from_bytes(frame, "big") ^ int.from_bytes(packet.frame, "big")
    assert changed.bit_count() == 1


# ---------------------------------------------------------------------------------------------------------------------
# The process


class Peer:
    """One end of the link, speaking QEMU's framing."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._buffer = b""

    def send(self, frame: bytes) -> float:
        now_s = time.monotonic()
        self._socket.sendall(struct.pack(">I", len(frame)) + frame)
        return now_s

    def receive(self) -> bytes:
        while len(self._buffer) < 4 or len(self._buffer) < 4 + int.from_bytes(self._buffer[:4], "big"):
            data = self._socket.recv(65536)
            assert data, "the link hung up"
            self._buffer += data
        length = int.from_bytes(self._buffer[:4], "big")
        frame, self._buffer = self._buffer[4 : 4 + length], self._buffer[4 + length :]
        return frame

    def silent(self, for_s: float) -> bool:
        self._socket.settimeout(for_s)
        try:
            self.receive()
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(20)
        return False

    def close(self) -> None:
        self._socket.close()


@contextmanager
def running(directory: Path, log: Path | None = None) -> Iterator[UserSpaceLink]:
    control = directory / "c.sock"
    process = start(control, ground=f"listen:{directory}/g.sock", board=f"listen:{directory}/b.sock", seed=3, log=log)
    link = UserSpaceLink("air", control)
    try:
        yield link
    finally:
        link.close()
        process.terminate()
        assert process.wait(30) == 0
        assert not control.exists()


def test_frames_pass_late_and_the_log_says_when(tmp_path: Path) -> None:
    log = tmp_path / "packets.csv"
    with running(tmp_path, log) as link:
        ground, board = Peer(tmp_path / "g.sock"), Peer(tmp_path / "b.sock")
        board.send(b"hello")
        assert ground.receive() == b"hello"
        state = LinkState(delay_s=0.02)
        applied = link.apply({"uplink": state}, time.monotonic())["uplink"]
        assert applied.scheduled_s <= applied.sent_s <= applied.acknowledged_s <= applied.verified_s
        assert link.state() == {"uplink": state, "downlink": None}
        took = []
        for number in range(20):
            sent_s = ground.send(number.to_bytes(60, "big"))
            assert board.receive() == number.to_bytes(60, "big")
            took.append(time.monotonic() - sent_s)
        assert min(took) > 0.0199
        assert min(took) < 0.03  # the quickest: a busy host is late for some, and the log below says when they were due
        assert link.counters()["uplink"].sent_packets == 20
        assert link.clear() == ["uplink"]
        assert link.state() == {"uplink": None, "downlink": None}
        rows = list(csv.DictReader(log.open()))
    assert [row["direction"] for row in rows] == ["downlink"] + ["uplink"] * 20
    for row in rows[1:]:
        assert float(row["t_due"]) - float(row["t_in"]) == pytest.approx(0.02, abs=2e-6)
        assert float(row["t_out"]) >= float(row["t_due"]) - 1e-6


def test_an_outage_is_silence_and_a_plan_needs_no_further_word(tmp_path: Path) -> None:
    with running(tmp_path) as link:
        ground, board = Peer(tmp_path / "g.sock"), Peer(tmp_path / "b.sock")
        now_s = time.monotonic()
        dark = LinkState(outage=True)
        link.plan({"uplink": [Point(now_s, dark), Point(now_s + 60.0, LinkState())]})
        ground.send(b"lost")
        assert board.silent(0.1)
        now_s = time.monotonic()
        link.plan({"uplink": [Point(now_s, dark), Point(now_s + 0.3, LinkState())]})
        time.sleep(max(0.0, now_s + 0.31 - time.monotonic()))
        ground.send(b"passes")
        assert board.receive() == b"passes"


def test_a_board_that_was_cut_off_connects_again_and_half_a_frame_does_no_harm(tmp_path: Path) -> None:
    with running(tmp_path):
        ground, board = Peer(tmp_path / "g.sock"), Peer(tmp_path / "b.sock")
        board._socket.sendall(struct.pack(">I", 1000) + b"half")
        board.close()
        again = Peer(tmp_path / "b.sock")
        again.send(b"whole")
        assert ground.receive() == b"whole"
        nonsense = Peer(tmp_path / "b.sock")
        nonsense._socket.sendall(b"\xff" * 8)
        assert nonsense._socket.recv(10) == b""  # hung up
        last = Peer(tmp_path / "b.sock")
        last.send(b"fine")
        assert ground.receive() == b"fine"


def test_bad_requests_are_told_and_change_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as link:
        link.apply({"uplink": LinkState(delay_s=0.01)}, 0.0)
        for request, says in (
            ({"op": "apply", "states": {"uplink": {"delay_s": -1}}}, "finite"),
            ({"op": "apply", "states": {"uplink": {"loss": 0.5}, "sideways": {}}}, "sideways"),
            ({"op": "dance"}, "unknown op"),
            ({}, "bad request"),
        ):
            with pytest.raises(BenchError, match=says):
                link._ask(request)
        assert link.state()["uplink"] == LinkState(delay_s=0.01)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "c.sock"))
        sock.sendall(b"not json\n")
        assert "error" in json.loads(sock.recv(4096))


def test_a_process_that_started_anew_is_found_again_and_a_missing_one_is_told(tmp_path: Path) -> None:
    with running(tmp_path) as link:
        link.open()
    with pytest.raises(BenchError, match="does not answer") as raised:
        link.open()
    assert "hil link serve" in raised.value.hint
    with running(tmp_path) as second:
        stale = UserSpaceLink("air", tmp_path / "c.sock")
        stale.open()
        second.open()
    with running(tmp_path):
        assert stale.apply({"downlink": LinkState(loss=0.5)}, 0.0)["downlink"].verified_s > 0


def test_ports_are_checked_before_anything_starts(tmp_path: Path) -> None:
    for text in ("eth0", "tap:", "listen:", "broker:x", "tap:" + "x" * 16):
        with pytest.raises(UsageError, match="not a port"):
            open_port(text)
    with pytest.raises(BenchError, match="nobody listens"):
        open_port(f"connect:{tmp_path}/none")
    with pytest.raises(BenchError, match="nobody listens"):
        start(tmp_path / "c.sock", ground=f"connect:{tmp_path}/none", board=f"listen:{tmp_path}/b")


def test_frames_that_nobody_takes_are_dropped_whole(tmp_path: Path) -> None:
    port = StreamPort.listen(tmp_path / "p.sock")
    port.write(b"x")
    assert port.dropped == 1
    peer = Peer(tmp_path / "p.sock")
    for descriptor in port.descriptors():
        port.read(descriptor)
    frame = bytes(60_000)
    for _ in range(400):  # 24 MB into a socket that holds a few
        port.write(frame)
    assert port.dropped > 100
    sent = 401 - port.dropped
    for _ in range(20):
        assert peer.receive() == frame  # and never a torn one
    assert sent > 20
    port.close()


_ON_INTERFACES = """
import json, select, socket, subprocess
from hil.drivers import broker
from hil.drivers.frame_ports import open_port
from hil.errors import BenchError

broker.enter_namespace()
found = {}
for name in ("tun", "tap"):
    port = open_port(f"{name}:{name}9")
    for words in (f"address add 10.9.{len(found)}.1/24 dev {name}9", f"link set {name}9 up"):
        subprocess.run(["ip", *words.split()], check=True)
    peer = f"10.9.{len(found)}.2"
    if name == "tap":
        subprocess.run(f"ip neighbour add {peer} lladdr 02:00:00:00:00:09 dev tap9 nud permanent".split(), check=True)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(20)
    sock.connect((peer, 9))
    sock.send(b"to the board")
    while True:
        select.select(port.descriptors(), [], [], 5)
        frames = [f for d in port.descriptors() for f in port.read(d) if f.endswith(b"to the board")]
        if frames:
            break
    frame, start = bytearray(frames[0]), 0 if name == "tun" else 14
    frame[0:6], frame[6:12] = (frame[6:12], frame[0:6]) if start else (frame[0:6], frame[6:12])
    at = start + 12  # addresses, then ports change places: an answer; the sums stay what they were
    frame[at:at + 8] = frame[at + 4:at + 8] + frame[at:at + 4]
    frame[at + 8:at + 12] = frame[at + 10:at + 12] + frame[at + 8:at + 10]
    port.write(bytes(frame))
    found[name] = sock.recv(100).decode()
    try:
        open_port(f"{name}:{name}9")
    except BenchError as error:
        found[name + " again"] = str(error)
    port.close()
print(json.dumps(found))
"""


def test_tun_and_tap_interfaces_are_ports() -> None:
    done = subprocess.run([sys.executable, "-c", _ON_INTERFACES], capture_output=True, text=True, check=False)
    if done.returncode and ("namespace" in done.stderr or "/dev/net/tun" in done.stderr):
        pytest.skip(f"this host has no namespaces or no TUN: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["tun"], found["tap"]) == ("to the board", "to the board")
    assert "another process holds it" in found["tap again"]
