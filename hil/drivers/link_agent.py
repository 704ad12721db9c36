"""The far end of link measurements: answers probes, counts packets, sends trains. Standard library only.

Its text also runs on boards (`python3`, nothing installed), so it imports nothing of hil at the top.

    python3 link_agent.py PORT
    python -m hil.drivers.link_agent PORT --stream PATH --address 10.42.0.2/24 --mac MAC --ground IP=MAC

The first serves until its standard input ends; the second in a namespace of its own, behind a QEMU stream socket.

Datagrams: op, run, number, two 64-bit values, padding. `E` asks for an echo: `e` brings when it came and when the
answer left. `C` is counted; `R` asks for the count of a run, `r` brings it as JSON. `S` asks for a train of `D`
packets: as many as its number, one every A nanoseconds, B bytes each. Times are nanoseconds of the wall clock, arrivals
as the kernel stamped them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field

HEADER = struct.Struct("!cIIqq")
OVERHEAD_BYTES = 42  # Ethernet, IPv4 and UDP headers: what an emulator counts besides the payload
_SO_TIMESTAMPNS = 35


@dataclass
class Tally:
    """What arrived of one run of numbered packets."""

    frames_bytes: int = 0
    packets: int = 0
    duplicates: int = 0
    late: int = 0
    first_ns: int = 0
    last_ns: int = 0
    first_bytes: int = 0
    highest: int = -1
    seen: set[int] = field(default_factory=set)

    def add(self, number: int, size: int, at_ns: int) -> None:
        """A packet of `size` payload bytes."""
        frame = size + OVERHEAD_BYTES
        if not self.packets:
            self.first_ns, self.first_bytes = at_ns, frame
        self.last_ns = at_ns
        self.packets += 1
        self.frames_bytes += frame
        if number in self.seen:
            self.duplicates += 1
        elif number < self.highest:
            self.late += 1
        self.seen.add(number)
        self.highest = max(self.highest, number)

    def report(self) -> dict[str, object]:
        """As JSON, with the numbers that came as ranges [first, last]."""
        ranges: list[list[int]] = []
        for number in sorted(self.seen):
            if ranges and ranges[-1][1] == number - 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        return {
            "frames_bytes": self.frames_bytes,
            "packets": self.packets,
            "duplicates": self.duplicates,
            "late": self.late,
            "first_ns": self.first_ns,
            "last_ns": self.last_ns,
            "first_bytes": self.first_bytes,
            "ranges": ranges,
        }


def prepare(sock: socket.socket) -> None:
    """Kernel time stamps and room for a burst."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 4 << 20)


def receive(sock: socket.socket) -> tuple[bytes, int, object]:
    """A datagram, when the kernel got it (ns of the wall clock), who sent it."""
    data, ancillary, _, peer = sock.recvmsg(65536, 64)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("=qq", payload[:16])
            return data, seconds * 1_000_000_000 + nanoseconds, peer
    return data, time.time_ns(), peer


def send_train(sock: socket.socket, peer: object, run: int, count: int, gap_ns: int, size: int) -> None:
    """`count` packets of `size` payload bytes, one every `gap_ns`; when we are late the next ones are not."""
    padding = bytes(max(0, size - HEADER.size))
    due_ns = time.monotonic_ns()
    for number in range(count):
        pause_ns = due_ns - time.monotonic_ns()
        if pause_ns > 0:
            time.sleep(pause_ns / 1e9)
        due_ns += gap_ns
        packet = HEADER.pack(b"D", run, number, time.time_ns(), 0) + padding
        try:
            sock.sendto(packet, peer) if peer is not None else sock.send(packet)  # type: ignore[call-overload]
        except OSError:  # the queue of the interface is full: as lost as any
            continue


def serve(sock: socket.socket) -> None:
    """Answer until the socket is closed."""
    prepare(sock)
    tallies: dict[int, Tally] = {}
    while True:
        data, at_ns, peer = receive(sock)
        if len(data) < HEADER.size:
            continue
        op, run, number, first, second = HEADER.unpack_from(data)
        if op == b"E":
            answer = HEADER.pack(b"e", run, number, at_ns, time.time_ns())
            sock.sendto(answer + data[HEADER.size :], peer)  # type: ignore[call-overload]
        elif op == b"C":
            tallies.setdefault(run, Tally()).add(number, len(data), at_ns)
        elif op == b"R":
            report = json.dumps(tallies.get(run, Tally()).report(), separators=(",", ":")).encode()
            sock.sendto(HEADER.pack(b"r", run, 0, 0, 0) + report[:60000], peer)  # type: ignore[call-overload]
        elif op == b"S":
            train = (sock, peer, run, number, first, second)
            threading.Thread(target=send_train, args=train, daemon=True).start()


def _end_with_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _behind_a_stream(path: str, address: str, mac: str, ground: str) -> None:
    """Become two processes in a new namespace: the child goes on as the agent, the parent passes frames."""
    import select
    import subprocess
    from pathlib import Path

    from hil.drivers import broker
    from hil.drivers.frame_ports import StreamPort, TapPort
    from hil.drivers.prompt import be_prompt

    parent = os.getppid()
    be_prompt(inherited=True)  # inside the namespace it would be refused
    broker.enter_namespace()
    broker.die_with_parent(parent)()
    tap = broker.create_tap("agent0")
    ip, _, hardware = ground.partition("=")
    setup = f"link set lo up\nlink set dev agent0 address {mac} addrgenmode none\naddress add {address} dev agent0\n"
    setup += f"link set dev agent0 up\nneighbour replace {ip} lladdr {hardware} dev agent0 nud permanent\n"
    subprocess.run(["ip", "-batch", "-"], input=setup, text=True, check=True)
    wire, port = StreamPort.connect(Path(path)), TapPort(tap)
    me = os.getpid()
    if os.fork() == 0:
        broker.die_with_parent(me)()
        return
    while wire.descriptors():
        readable, _, _ = select.select([tap, *wire.descriptors()], [], [])
        for descriptor in readable:
            source, sink = (port, wire) if descriptor == tap else (wire, port)
            for frame in source.read(descriptor):
                sink.write(frame)
    os._exit(0)


def main(argv: list[str]) -> None:
    """See the module's text. Prints `ready`."""
    options = dict(zip(argv[1::2], argv[2::2], strict=False))
    if "--stream" in options:
        _behind_a_stream(options["--stream"], options["--address"], options["--mac"], options["--ground"])
    else:
        threading.Thread(target=_end_with_input, daemon=True).start()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("", int(argv[0])))
    # An answer must not wait for the processor, where we may ask for that; `be_prompt` does not come along to a board.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(10))
    print("ready", flush=True)
    serve(sock)


if __name__ == "__main__":
    main(sys.argv[1:])
