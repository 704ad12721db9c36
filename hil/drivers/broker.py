"""The payload broker: a process inside a network namespace of its own that hands out sockets and the ground's TAP.

The board's payload port ends in that namespace and nowhere else, so nothing on the host can reach the board around the
link emulator. A socket belongs to the namespace in which it was made, whoever holds it: callers get connected sockets
and the host kernel's TCP is the ground station's TCP.

    python -m hil.drivers.broker SOCKET --tap payload0 --address 10.42.0.1/24 --neighbour 10.42.0.2=52:54:00:00:00:02

Protocol on the unix stream socket: one JSON object a line, one answer a line, descriptors beside the answer.
Requests: `{"op": "connect", "host", "port", "timeout_s", "sndbuf"?, "kind"?: "udp"}`, `{"op": "tap", "name"}`,
`{"op": "counters"}`. An error is `{"error": text, "errno": number or null}`.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hil.errors import BenchError, UsageError

#: MAC of the ground end, the same at every start: a board may pin its neighbour entry to it.
GROUND_MAC = "52:54:00:42:00:01"

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG = 1
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_MAX_LINE = 65536


# ---------------------------------------------------------------------------------------------------------------------
# Clients


def connect(broker: Path | None, host: str, port: int, timeout_s: float, sndbuf: int | None = None) -> socket.socket:
    """A connected TCP socket to `host`:`port`, through the broker's namespace (None: the host's own network).

    `sndbuf` bounds what the kernel takes before the wire does, bytes (the kernel books about twice as much for it).
    Raises OSError as `socket.create_connection` does (TimeoutError, ConnectionRefusedError, ...), BenchError when the
    broker itself does not answer. The socket blocks and has no time-out set.
    """
    if broker is None:
        sock = _dial(host, port, timeout_s, sndbuf)
    else:
        request = {"op": "connect", "host": host, "port": port, "timeout_s": timeout_s, "sndbuf": sndbuf}
        _, descriptors = _ask(broker, request, timeout_s + 5.0)
        sock = socket.socket(fileno=_one(descriptors, broker))
    sock.settimeout(None)
    return sock


def connect_udp(broker: Path | None, host: str, port: int, timeout_s: float = 5.0) -> socket.socket:
    """A UDP socket whose peer is `host`:`port`, for probes that nothing retransmits. Raises as `connect` does."""
    if broker is None:
        return _dial(host, port, timeout_s, None, socket.SOCK_DGRAM)
    request = {"op": "connect", "kind": "udp", "host": host, "port": port, "timeout_s": timeout_s}
    _, descriptors = _ask(broker, request, timeout_s + 5.0)
    return socket.socket(fileno=_one(descriptors, broker))


def open_tap(broker: Path, name: str) -> int:
    """A descriptor of the TAP `name` in the broker's namespace; the caller closes it. Frames, no extra header."""
    _, descriptors = _ask(broker, {"op": "tap", "name": name}, 10.0)
    return _one(descriptors, broker)


def counters(broker: Path) -> dict[str, dict[str, int]]:
    """Interface -> its counters (`rx_bytes`, `tx_packets`, `tx_dropped`, ...) in the broker's namespace.

    Seen from the ground: `tx` is what it sent towards the board.
    """
    answer, _ = _ask(broker, {"op": "counters"}, 10.0)
    return dict(answer["counters"])


def start(
    path: Path, *, tap: str, address: str, neighbours: Mapping[str, str] | None = None, timeout_s: float = 10.0
) -> subprocess.Popen[bytes]:
    """Start a broker process that serves `path` and wait until it does. It dies with the calling thread.

    Raises BenchError with the broker's own words when it cannot work here.
    """
    argv = [sys.executable, "-m", "hil.drivers.broker", str(path), "--tap", tap, "--address", address]
    for ip, mac in (neighbours or {}).items():
        argv += ["--neighbour", f"{ip}={mac}"]
    # Its stderr stays ours only until it serves: nobody reads that pipe later.
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        watchdog = threading.Timer(timeout_s, process.kill)
        watchdog.start()
        try:
            ready = process.stdout.readline()
        finally:
            watchdog.cancel()
        if ready == b"ready\n":
            return process
        process.kill()
        said = process.stderr.read().decode(errors="replace").strip()
        process.wait()
    message, _, hint = said.partition("\n  next: ")
    raise BenchError(message or f"the payload broker did not start within {timeout_s:g} s", hint=hint)


def _ask(broker: Path, request: Mapping[str, object], timeout_s: float) -> tuple[dict[str, Any], list[int]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(os.fspath(broker))
            sock.sendall(json.dumps(request).encode() + b"\n")
            line, descriptors = _receive_line(sock)
            answer = json.loads(line)
        except (OSError, ValueError) as error:
            raise BenchError(
                f"the payload broker on {broker} does not answer: {error}", hint="is the bench up? `hil virtual status`"
            ) from error
    if "error" in answer:
        for descriptor in descriptors:
            os.close(descriptor)
        number = answer.get("errno")
        if number is None:
            raise BenchError(f"payload broker: {answer['error']}")
        if number == errno.ETIMEDOUT:
            raise TimeoutError(number, answer["error"])
        raise OSError(number, answer["error"])  # becomes ConnectionRefusedError and the like by its number
    return answer, descriptors


def _receive_line(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors = b"", array.array("i")
    while not data.endswith(b"\n"):
        chunk, ancillary, _, _ = sock.recvmsg(_MAX_LINE, socket.CMSG_SPACE(4 * descriptors.itemsize))
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
        if not chunk:
            raise ConnectionError("it closed the connection")
        data += chunk
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return data, list(descriptors)


def _one(descriptors: Sequence[int], broker: Path) -> int:
    if len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise BenchError(f"the payload broker on {broker} answered with {len(descriptors)} descriptors instead of one")
    return descriptors[0]


# ---------------------------------------------------------------------------------------------------------------------
# The server


@dataclass(slots=True)
class Server:
    """Answers requests on a listening unix socket, a thread a connection, so that a slow connect delays nobody."""

    listener: socket.socket
    taps: Mapping[str, int] = field(default_factory=dict)

    def serve_forever(self) -> None:
        """Accept until the listener is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED, errno.EINTR):
                    continue
                return
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            stream = connection.makefile("rb")
            while line := stream.readline(_MAX_LINE):
                answer, descriptors, finished = self._answer(line)
                payload = json.dumps(answer).encode() + b"\n"
                try:
                    socket.send_fds(connection, [payload], descriptors)
                finally:
                    finished()

    def _answer(self, line: bytes) -> tuple[dict[str, Any], list[int], Callable[[], None]]:
        """One request's answer, the descriptors that go with it, and what to do once they are sent."""
        nothing: Callable[[], None] = lambda: None  # noqa: E731
        try:
            request = json.loads(line)
            match request["op"]:
                case "connect":
                    kind = socket.SOCK_DGRAM if request.get("kind") == "udp" else socket.SOCK_STREAM
                    host, port, timeout_s = str(request["host"]), int(request["port"]), float(request["timeout_s"])
                    sock = _dial(host, port, timeout_s, request.get("sndbuf"), kind)
                    sock.settimeout(None)
                    return {"ok": True}, [sock.fileno()], sock.close
                case "tap":
                    if request["name"] not in self.taps:
                        return {"error": f"no TAP {request['name']!r} here, there is {sorted(self.taps)}"}, [], nothing
                    return {"ok": True}, [self.taps[request["name"]]], nothing
                case "counters":
                    return {"ok": True, "counters": parse_counters(Path("/proc/net/dev").read_text())}, [], nothing
                case other:
                    return {"error": f"unknown op {other!r}"}, [], nothing
        except OSError as error:
            number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno
            return {"error": error.strerror or str(error), "errno": number}, [], nothing
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"bad request: {error!r}"}, [], nothing


def parse_counters(text: str) -> dict[str, dict[str, int]]:
    """`/proc/net/dev` as interface -> counter name -> value."""
    result = {}
    for line in text.splitlines()[2:]:
        name, _, values = line.partition(":")
        numbers = [int(value) for value in values.split()]
        names = ("rx_bytes", "rx_packets", "rx_errors", "rx_dropped")
        result[name.strip()] = dict(zip(names, numbers[:4], strict=True)) | dict(
            zip(("tx_bytes", "tx_packets", "tx_errors", "tx_dropped"), numbers[8:12], strict=True)
        )
    return result


def _dial(
    host: str, port: int, timeout_s: float, sndbuf: int | None, kind: socket.SocketKind = socket.SOCK_STREAM
) -> socket.socket:
    family, _, proto, _, address = socket.getaddrinfo(host, port, type=kind)[0]
    sock = socket.socket(family, kind, proto)
    try:
        if sndbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sndbuf)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(timeout_s)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


# ---------------------------------------------------------------------------------------------------------------------
# The process


def die_with_parent(parent_pid: int) -> Callable[[], None]:
    """A `preexec_fn` which makes the kernel kill this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: loading after it may deadlock

    def arrange() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before we asked
            os._exit(1)

    return arrange


def enter_namespace() -> None:
    """Move this process into a new user and network namespace in which it may do everything with the network.

    Works as an ordinary user and as root; must run while the process has one thread. Raises BenchError.
    """
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise BenchError(
            f"this user may not create a network namespace: {os.strerror(number)}",
            hint="allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
            "kernel.apparmor_restrict_unprivileged_userns=0), or run as root",
        )
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def create_tap(name: str) -> int:
    """A new TAP in this namespace: its descriptor. It lives as long as somebody holds the descriptor."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BenchError("/dev/net/tun is missing", hint="load the kernel's tun module: sudo modprobe tun") from error
    except OSError as error:
        raise BenchError(
            f"/dev/net/tun cannot be opened: {error.strerror}", hint="let this user use it: sudo chmod 666 /dev/net/tun"
        ) from error
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError as error:
        os.close(descriptor)
        raise BenchError(f"TAP {name} cannot be created: {error.strerror}") from error
    return descriptor


def ip_batch(tap: str, address: str, neighbours: Mapping[str, str]) -> str:
    """What `ip -batch -` must do to bring the namespace up.

    A neighbour entry that could expire would turn an outage into EHOSTUNREACH at once, where space has silence: known
    boards are pinned, and for others the kernel asks far longer than any outage lasts (hours at one probe a second).
    """
    lines = [
        "link set lo up",
        f"link set dev {tap} address {GROUND_MAC} addrgenmode none",  # no IPv6 chatter on the emulated link
        f"address add {address} dev {tap}",
        f"link set dev {tap} txqueuelen 1000 up",
        f"ntable change name arp_cache dev {tap} mcast_probes 100000 ucast_probes 100000",
    ]
    lines += [f"neighbour replace {ip} lladdr {mac} dev {tap} nud permanent" for ip, mac in neighbours.items()]
    return "\n".join(lines) + "\n"


def _configure(tap: str, address: str, neighbours: Mapping[str, str]) -> None:
    tool = shutil.which("ip", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if tool is None:
        raise BenchError("the program `ip` is missing", hint="apt install iproute2")
    done = subprocess.run(
        [tool, "-batch", "-"], input=ip_batch(tap, address, neighbours), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchError(f"the payload namespace cannot be set up: {done.stderr.strip()}")


def _listen(path: Path) -> socket.socket:
    """A unix socket that only this user can reach: 0600 in a directory that must be 0700."""
    info = path.parent.stat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise UsageError(f"{path.parent} must belong to this user and be 0700", hint=f"chmod 700 {path.parent}")
    if len(os.fsencode(path)) > 107:
        raise UsageError(f"unix socket path is too long: {path}", hint="set XDG_RUNTIME_DIR to a shorter directory")
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    finally:
        os.umask(previous)
    listener.listen(64)
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m hil.drivers.broker`. Prints `ready` when it serves; ends with its parent."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m hil.drivers.broker", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("socket", type=Path)
    parser.add_argument("--tap", required=True)
    parser.add_argument("--address", required=True, help="address/prefix of the ground end")
    parser.add_argument("--neighbour", action="append", default=[], metavar="IP=MAC", help="pin a board's MAC")
    options = parser.parse_args(argv)
    parent = os.getppid()
    try:
        neighbours = dict(item.split("=", 1) for item in options.neighbour)
        listener = _listen(options.socket)
        enter_namespace()
        # Only now: the kernel forgets the parent-death signal when credentials change.
        die_with_parent(parent)()
        tap = create_tap(options.tap)
        _configure(options.tap, options.address, neighbours)
    except (BenchError, UsageError) as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's business; we end with it
    print("ready", flush=True)
    Server(listener, {options.tap: tap}).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
