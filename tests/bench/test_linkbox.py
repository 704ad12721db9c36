"""The link box for real: its QEMU, its netem, the broker's namespace; a second namespace plays the board."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hil.drivers import broker
from hil.drivers.netem import NetemSsh
from hil.errors import BenchError
from hil.model import LinkState
from hil.paths import cache_dir
from hil.virtual.linkbox import LinkBox, LinkBoxConfig, ensure_image

BOARD, BOARD_MAC, UDP_ECHO, TCP_SINK = "10.42.0.2", "52:54:00:99:00:02", 7, 9
pytestmark = pytest.mark.xdist_group("boards")

CLEAR = LinkState()


# ---------------------------------------------------------------------------------------------------------------------
# The far end: run as a script in its own namespace, it speaks QEMU's stream framing as a board's QEMU would.


def play_board(stream_socket: str) -> None:
    """A TAP at 10.42.0.2 joined to the box's inner port; a UDP echo on port 7; a TCP sink that answers on port 9."""
    parent = os.getppid()
    broker.enter_namespace()
    broker.die_with_parent(parent)()
    tap = broker.create_tap("board0")
    setup = f"link set lo up\nlink set dev board0 address {BOARD_MAC} addrgenmode none\n"
    setup += f"address add {BOARD}/24 dev board0\nlink set dev board0 up\n"
    setup += f"neighbour replace 10.42.0.1 lladdr {broker.GROUND_MAC} dev board0 nud permanent\n"
    subprocess.run(["ip", "-batch", "-"], input=setup, text=True, check=True)
    wire = socket.socket(socket.AF_UNIX)
    wire.connect(stream_socket)
    for serve in (_echo_udp, _sink_tcp):
        threading.Thread(target=serve, daemon=True).start()
    print("ready", flush=True)
    buffer = b""
    while True:
        readable, _, _ = select.select([tap, wire.fileno()], [], [])
        if tap in readable:
            frame = os.read(tap, 65536)
            wire.sendall(struct.pack(">I", len(frame)) + frame)
        if wire.fileno() in readable:
            buffer += wire.recv(65536)
            while len(buffer) >= 4 and len(buffer) >= 4 + (length := struct.unpack_from(">I", buffer)[0]):
                os.write(tap, buffer[4 : 4 + length])
                buffer = buffer[4 + length :]


def _echo_udp() -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("", UDP_ECHO))
    while True:
        data, peer = sock.recvfrom(2048)
        sock.sendto(data, peer)


def _sink_tcp() -> None:
    """Per connection: seconds from the first byte to the end of the stream, and how many bytes came."""
    server = socket.create_server(("", TCP_SINK))
    while True:
        connection, _ = server.accept()
        with connection:
            count, began = len(connection.recv(1)), time.monotonic()
            while data := connection.recv(65536):
                count += len(data)
            connection.sendall(f"{time.monotonic() - began:.6f} {count}\n".encode())


# ---------------------------------------------------------------------------------------------------------------------
# The bench


@dataclass
class Link:
    """One booted link box and what is around it."""

    broker: Path
    box: LinkBox
    netem: NetemSsh
    inner: Path

    def probe(self, count: int, gap_s: float = 0.01, timeout_s: float = 1.0) -> list[float]:
        """Round-trip times of the UDP echoes that came back, seconds."""
        times = []
        with broker.connect_udp(self.broker, BOARD, UDP_ECHO) as sock:
            sock.settimeout(timeout_s)
            for number in range(count):
                sent_s = time.monotonic()
                sock.send(number.to_bytes(4, "big"))
                with contextlib.suppress(TimeoutError):
                    while int.from_bytes(sock.recv(64), "big") != number:
                        pass
                    times.append(time.monotonic() - sent_s)
                time.sleep(gap_s)
        return times

    @contextlib.contextmanager
    def board(self) -> Iterator[subprocess.Popen[bytes]]:
        """A far end on the inner port."""
        argv = [sys.executable, __file__, str(self.inner)]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                assert process.stdout.readline() == b"ready\n"
                yield process
            finally:
                process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    directory = tmp_path_factory.mktemp("link")
    directory.chmod(0o700)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    cache = cache_dir()
    image = ensure_image(cache, port, print)
    path = directory / "payload.sock"
    process = broker.start(path, tap="payload0", address="10.42.0.1/24", neighbours={BOARD: BOARD_MAC})
    tap = broker.open_tap(path, "payload0")
    box = LinkBox(LinkBoxConfig(image, tap, directory / "inner.sock", port, directory / "box.log"))
    keys = cache / "keys"
    netem = NetemSsh.at(
        "box1",
        host="127.0.0.1",
        port=port,
        user="root",
        key=keys / "id_ed25519",
        known_hosts=keys / "known_hosts",
        uplink_interface="eth1",
        downlink_interface="eth0",
    )
    try:
        box.start()
        netem.open()
        yield Link(path, box, netem, directory / "inner.sock")
    finally:
        netem.close()
        box.kill()
        process.kill()
        process.wait()
        os.close(tap)


@pytest.fixture(scope="module")
def board(link: Link) -> Iterator[None]:
    with link.board():
        deadline = time.monotonic() + 5
        while not link.probe(1, timeout_s=0.2):
            assert time.monotonic() < deadline, "the far end never answered"
        yield


@pytest.fixture(autouse=True)
def _clear_link(link: Link) -> Iterator[None]:
    yield
    link.netem.clear()


# ---------------------------------------------------------------------------------------------------------------------
# Tests


def test_box_boots_with_netem_and_without_offloads(link: Link) -> None:
    facts = link.netem.preflight()
    assert facts["netem"] == "loaded"
    assert facts["warnings"] == []
    assert facts["interfaces"]["eth0"]["offloads"] == {"tso": False, "gso": False, "gro": False, "lro": False}
    assert link.box.boot_s < 20  # about 3 s on an idle host


def test_inner_port_takes_a_board_again_after_a_power_cut(link: Link) -> None:
    # Runs before the module's `board` exists: the port takes one far end at a time.
    for _ in range(3):
        with link.board():
            deadline = time.monotonic() + 10
            while not link.probe(1, timeout_s=0.2):
                assert time.monotonic() < deadline, "the box did not take the next board"
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as cut:  # dies in the middle of a frame
            cut.settimeout(5)
            cut.connect(str(link.inner))
            cut.sendall(struct.pack(">I", 1000) + b"half a frame")


@pytest.mark.usefixtures("board")
def test_delay_is_added_in_each_direction(link: Link) -> None:
    bare = statistics.median(link.probe(30))
    link.netem.apply({"uplink": LinkState(delay_s=0.02), "downlink": LinkState(delay_s=0.03)}, time.monotonic())
    shaped = statistics.median(link.probe(30))
    print(f"round trip bare {bare * 1e3:.2f} ms, with 20 + 30 ms {shaped * 1e3:.2f} ms")
    assert 0.0495 < shaped - bare < 0.056  # an emulated machine's timers are late, by some milliseconds under load


@pytest.mark.usefixtures("board")
def test_outage_is_silence_and_connections_survive_it(link: Link) -> None:
    with broker.connect(link.broker, BOARD, TCP_SINK, 5) as sock:
        sock.settimeout(10)
        sock.sendall(b"before")
        dark = LinkState(delay_s=0.005, rate_bps=2e6, outage=True)
        before = link.netem.counters()["uplink"].dropped
        link.netem.apply({"uplink": dark, "downlink": dark}, time.monotonic())
        assert link.probe(5, timeout_s=0.1) == []  # and no error: neither refused nor unreachable
        sock.sendall(b"during")
        with pytest.raises(TimeoutError):
            broker.connect(link.broker, BOARD, TCP_SINK, 0.5)
        assert link.netem.counters()["uplink"].dropped - before >= 5
        link.netem.apply({"uplink": CLEAR, "downlink": CLEAR}, time.monotonic())
        sock.sendall(b"after")
        sock.shutdown(socket.SHUT_WR)
        assert sock.makefile().readline().split()[1] == str(len("beforeduringafter"))


@pytest.mark.usefixtures("board")
def test_rate_is_shaped_one_direction_at_a_time(link: Link) -> None:
    rate_bps, count = 4e6, 400_000

    def upload() -> float:
        with broker.connect(link.broker, BOARD, TCP_SINK, 5, sndbuf=65536) as sock:
            sock.settimeout(20)
            sock.sendall(bytes(count))
            sock.shutdown(socket.SHUT_WR)
            seconds, received = sock.makefile().readline().split()
            assert int(received) == count
            return 8 * count / float(seconds)

    link.netem.apply({"uplink": CLEAR, "downlink": LinkState(rate_bps=rate_bps)}, time.monotonic())
    assert upload() > 2 * rate_bps
    link.netem.apply({"uplink": LinkState(rate_bps=rate_bps), "downlink": CLEAR}, time.monotonic())
    before = link.netem.counters()["uplink"]
    # Never above the rate; near it in the best of three, because a busy host slows every party down.
    tries = [upload() for _ in range(3)]
    goodput = max(tries)
    crossed = link.netem.counters()["uplink"]
    print(f"goodput {goodput / 1e6:.3f} of {rate_bps / 1e6} Mbit/s")
    assert 0.85 < goodput / rate_bps < 1.0  # headers take 4.4 %
    assert crossed.sent_bytes - before.sent_bytes > len(tries) * count  # all of it went through netem
    assert crossed.dropped == before.dropped


def test_every_change_is_verified_within_milliseconds(link: Link) -> None:
    times = []
    for step in range(100):
        state = LinkState(delay_s=0.005 + step * 1e-5, rate_bps=300e3)
        began = time.monotonic()
        applied = link.netem.apply({"uplink": state, "downlink": state}, began)
        times.append(applied["downlink"].verified_s - began)
    times.sort()
    print(f"apply and verify p50 {times[50] * 1e3:.1f} ms, p99 {times[99] * 1e3:.1f} ms")
    assert times[50] < 0.1  # 5 ms on an idle host
    read = link.netem.state()["uplink"]
    assert read is not None
    assert read.delay_s == pytest.approx(0.00599, abs=2e-6)


def test_only_our_qdiscs_are_replaced_or_removed(link: Link) -> None:
    _on_box(link, "/sbin/tc qdisc add dev eth0 root handle 77: pfifo limit 50")
    try:
        fresh = NetemSsh("box1", link.netem.interfaces, link.netem.connect)
        with pytest.raises(BenchError, match=r"eth0 has a root qdisc that hil did not make: pfifo 77:"):
            fresh.open()
        link.netem.apply({"uplink": LinkState(delay_s=0.01)}, time.monotonic())
        assert fresh.clear() == ["eth1"]
        assert "pfifo 77:" in _on_box(link, "/sbin/tc qdisc show dev eth0").replace("qdisc ", "")
        fresh.close()
    finally:
        _on_box(link, "/sbin/tc qdisc del dev eth0 root")


def test_box_that_drops_the_connection_is_dialled_again(link: Link) -> None:
    _on_box(link, "/bin/busybox killall tc")
    state = LinkState(delay_s=0.01)
    assert link.netem.apply({"uplink": state}, time.monotonic())["uplink"].verified_s > 0
    with pytest.raises(BenchError, match="Cannot find device"):
        NetemSsh("box1", {"uplink": "eth9"}, link.netem.connect).open()


def _on_box(link: Link, command: str) -> str:
    session = link.netem.connect()
    try:
        return session.run(command, 5)
    finally:
        session.close()


if __name__ == "__main__":
    play_board(sys.argv[1])
