"""The payload broker: its protocol on a real unix socket, its namespace where this machine allows one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hil.drivers import broker
from hil.errors import BenchError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """A broker's server in this process, without a namespace; `tap0` is a pipe's end."""
    path = tmp_path / "b.sock"
    tmp_path.chmod(0o700)
    listener = broker._listen(path)
    reader, writer = os.pipe()
    thread = threading.Thread(target=broker.Server(listener, {"tap0": writer}).serve_forever)
    thread.start()
    yield path
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(2)
    assert not thread.is_alive()
    os.close(reader)
    os.close(writer)


@pytest.fixture
def echo() -> Iterator[int]:
    """A TCP port on this host that echoes one message a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(connection.recv(100))

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def test_a_connected_socket_arrives_and_blocks(server: Path, echo: int) -> None:
    with broker.connect(server, "127.0.0.1", echo, 2, sndbuf=65536) as sock:
        assert sock.gettimeout() is None
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 65536  # the kernel books twice
        assert not os.get_inheritable(sock.fileno())
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"


def test_without_a_broker_the_host_network_is_used(echo: int) -> None:
    with broker.connect(None, "127.0.0.1", echo, 2) as sock:
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"


def test_a_udp_probe_socket_has_its_peer(server: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        with broker.connect_udp(server, *peer.getsockname()) as sock:
            sock.send(b"ping")
            assert peer.recv(10) == b"ping"


def test_refused_is_what_the_caller_sees(server: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        broker.connect(server, "127.0.0.1", port, 2)


def test_a_slow_connect_delays_nobody(server: Path, echo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    release, dial = threading.Event(), broker._dial

    def slow(host: str, port: int, timeout_s: float, *rest: object) -> socket.socket:
        if host == "dark":
            assert release.wait(30)
            raise TimeoutError("timed out")
        return dial(host, port, timeout_s, None)

    monkeypatch.setattr(broker, "_dial", slow)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            broker.connect(server, "dark", 22, 30)
        except OSError as error:
            raised.append(error)

    waiting = threading.Thread(target=ask)
    waiting.start()
    began = time.monotonic()
    broker.connect(server, "127.0.0.1", echo, 20).close()
    assert waiting.is_alive()
    assert time.monotonic() - began < 20
    release.set()
    waiting.join(30)
    assert isinstance(raised[0], TimeoutError)


def test_descriptors_are_not_leaked(server: Path, echo: int) -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    broker.connect(server, "127.0.0.1", echo, 2).close()
    before = opened()
    for _ in range(20):
        broker.connect(server, "127.0.0.1", echo, 2).close()
    deadline = time.monotonic() + 15
    while opened() > before + 2:
        assert time.monotonic() < deadline, f"{opened()} descriptors, {before} before"
        time.sleep(0.01)


def test_tap_by_name(server: Path) -> None:
    descriptor = broker.open_tap(server, "tap0")
    os.close(descriptor)
    with pytest.raises(BenchError, match="no TAP 'tap9' here"):
        broker.open_tap(server, "tap9")


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"op": "connect"}\n', b'{"op": "dance"}\n', b"[]\n"])
def test_bad_requests_are_answered_and_the_server_lives(server: Path, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(server))
        sock.sendall(line)
        assert "error" in json.loads(sock.makefile().readline())
    assert "lo" in broker.counters(server)


def test_no_broker_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="does not answer") as raised:
        broker.connect(tmp_path / "none.sock", "10.42.0.2", 22, 1)
    assert "hil virtual status" in raised.value.hint


def test_socket_is_for_this_user_only(server: Path) -> None:
    assert server.stat().st_mode & 0o777 == 0o600


def test_a_directory_others_may_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(Exception, match="0700"):
        broker._listen(tmp_path / "b.sock")


def test_counters_of_proc_net_dev() -> None:
    text = (
        "Inter-|   Receive                     |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo\n"
        "payload0: 1514      2    0    3    0     0          0         0      66       1    0    4    0     0       0\n"
    )
    assert broker.parse_counters(text) == {
        "payload0": {
            "rx_bytes": 1514,
            "rx_packets": 2,
            "rx_errors": 0,
            "rx_dropped": 3,
            "tx_bytes": 66,
            "tx_packets": 1,
            "tx_errors": 0,
            "tx_dropped": 4,
        }
    }


def test_namespace_set_up_pins_neighbours() -> None:
    assert broker.ip_batch("payload0", "10.42.0.1/24", {"10.42.0.2": "52:54:00:00:00:02"}).splitlines() == [
        "link set lo up",
        "link set dev payload0 address 52:54:00:42:00:01 addrgenmode none",
        "address add 10.42.0.1/24 dev payload0",
        "link set dev payload0 txqueuelen 1000 up",
        "ntable change name arp_cache dev payload0 mcast_probes 100000 ucast_probes 100000",
        "neighbour replace 10.42.0.2 lladdr 52:54:00:00:00:02 dev payload0 nud permanent",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The real process


def _usable() -> str:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is not accessible to this user"
    done = subprocess.run(["unshare", "-Urn", "true"], capture_output=True, text=True, check=False)
    return f"no user namespaces: {done.stderr.strip()}" if done.returncode else ""


needs_namespace = pytest.mark.skipif(bool(_usable()), reason=_usable() or "usable")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Path]:
    tmp_path.chmod(0o700)
    path = tmp_path / "payload.sock"
    running = broker.start(path, tap="payload0", address="10.42.0.1/24", neighbours={"10.42.0.2": "52:54:00:00:00:02"})
    yield path
    running.kill()
    running.wait()


@needs_namespace
def test_sockets_live_in_a_network_of_their_own(process: Path, echo: int) -> None:
    assert set(broker.counters(process)) == {"lo", "payload0"}
    broker.connect(None, "127.0.0.1", echo, 2).close()
    with pytest.raises(ConnectionRefusedError):  # the host's port is not there
        broker.connect(process, "127.0.0.1", echo, 2)
    with pytest.raises(OSError, match="unreachable") as raised:  # and there is no way out
        broker.connect(process, "192.0.2.1", 80, 2)
    assert raised.value.errno == errno.ENETUNREACH


@needs_namespace
def test_frames_reach_the_tap_and_silence_is_a_time_out(process: Path) -> None:
    tap = broker.open_tap(process, "payload0")
    try:
        with pytest.raises(TimeoutError):
            broker.connect(process, "10.42.0.2", 22, 0.5)
        frame = os.read(tap, 2000)
        assert frame[:12] == bytes.fromhex("525400000002" + broker.GROUND_MAC.replace(":", ""))
        assert frame[23] == 6  # TCP: no ARP went first
    finally:
        os.close(tap)


@needs_namespace
def test_broker_dies_with_its_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    code = (
        "import sys; from pathlib import Path; from hil.drivers import broker\n"
        f"p = broker.start(Path({str(tmp_path / 'b.sock')!r}), tap='t0', address='10.42.0.1/24')\n"
        "print(p.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    try:
        assert select.select([pidfd], [], [], 5)[0], "the broker outlived its parent"
    finally:
        os.close(pidfd)


@needs_namespace
def test_a_bad_address_is_reported_in_the_tools_words(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(BenchError, match="payload namespace cannot be set up"):
        broker.start(tmp_path / "b.sock", tap="t0", address="not-an-address")


def test_missing_tun_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "open", absent)
    with pytest.raises(BenchError, match="/dev/net/tun is missing") as raised:
        broker.create_tap("t0")
    assert "modprobe tun" in raised.value.hint
