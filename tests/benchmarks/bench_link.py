"""Link emulators: what a change costs next to pyroute2 and `tc`, what a link in user space carries and how late it is.

Run by `make bench`, in a network namespace of its own. Prints figures and exits 1 when a limit is missed: a change with
its read-back over netlink p99 <= 1 ms; the user-space link passes its certificate. Where the kernel has no netem the
changes are those of a pfifo: the same messages, another qdisc.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hil.bench.certificate import QUICK, USER_SPACE, Certifier
from hil.bench.far_end import user_space_bench
from hil.drivers import broker
from hil.drivers.netem_local import netem_module
from hil.drivers.netlink import Netem, Request, RouteSocket, encode_netem, get_root, set_root
from hil.drivers.prompt import be_prompt
from hil.drivers.userspace_link import UserSpaceLink, start
from hil.model import LinkState

LIMIT_S = 1e-3
HANDLE = 0x1A5 << 16


def quantiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return f"p50 {ordered[len(ordered) // 2] * 1e6:8.0f} us   p99 {ordered[int(len(ordered) * 0.99)] * 1e6:8.0f} us"


def timed(times: int, action: Callable[[int], object]) -> list[float]:
    took = []
    for index in range(times):
        began = time.perf_counter()
        action(index)
        took.append(time.perf_counter() - began)
    return took


def changes() -> bool:
    """One direction changed and read back: ours, pyroute2's, and a `tc` process for each."""
    with_netem = netem_module() == "loaded"
    kind = "netem" if with_netem else "pfifo"
    subprocess.run(["ip", "link", "add", "bench0", "type", "veth", "peer", "name", "bench1"], check=True)
    subprocess.run(["ip", "link", "set", "bench0", "up"], check=True)
    sock = RouteSocket()
    index = sock.ifindex("bench0")

    def request(step: int) -> Request:
        options = encode_netem(Netem(limit=500 + step)) if with_netem else struct.pack("=I", 500 + step)
        return set_root(index, HANDLE, kind, options)

    ours = timed(3000, lambda step: sock.ask(request(step), get_root(index)))
    print(f"change and read-back of a {kind}, hil over netlink   {quantiles(ours)}")
    try:
        from pyroute2 import IPRoute
    except ImportError:
        print("pyroute2 is not installed")
    else:
        with IPRoute() as peer:

            def peers(step: int) -> None:
                peer.tc("change", kind, index, handle=HANDLE, limit=500 + step)
                peer.get_qdiscs(index)

            print(f"the same by pyroute2                             {quantiles(timed(500, peers))}")

    def process(step: int) -> None:
        words = ["tc", "qdisc", "change", "dev", "bench0", "root", "handle", "1a5:", kind, "limit", str(500 + step)]
        subprocess.run(words, check=True)

    print(f"the same by a tc process, without read-back      {quantiles(timed(100, process))}")
    sock.close()
    return sorted(ours)[int(len(ours) * 0.99)] <= LIMIT_S


def throughput(directory: Path) -> None:
    """Frames of 1,400 bytes through the relay, as many as it takes, counted at the far end."""
    ground, board = directory / "g.sock", directory / "b.sock"
    process = start(directory / "c.sock", ground=f"listen:{ground}", board=f"listen:{board}", with_parent=True)
    try:
        link = UserSpaceLink("air", directory / "c.sock")
        took = timed(1000, lambda step: link.apply({"uplink": LinkState(delay_s=1e-6 * step)}, time.monotonic()))
        print(f"user space: change and read-back                 {quantiles(took)}")
        link.apply({"uplink": LinkState(delay_s=0.01)}, time.monotonic())
        left, right = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        left.connect(str(ground))
        right.connect(str(board))
        frame, seconds = struct.pack(">I", 1400) + bytes(1400), 3.0
        stop = time.monotonic() + seconds

        def flood() -> None:
            while time.monotonic() < stop:
                left.sendall(frame * 8)

        sender = threading.Thread(target=flood)
        sender.start()
        right.settimeout(0.5)
        came = 0
        try:
            while True:
                came += len(right.recv(1 << 18))
        except TimeoutError:
            sender.join()
        counters = link.counters()["uplink"]
        frames = came / len(frame)
        print(
            f"user space: flood of 1,400 B frames with 10 ms     {8 * came / seconds / 1e6:.0f} Mbit/s, "
            f"{frames / seconds:.0f} frames/s, {counters.dropped} dropped"
        )
        link.close()
    finally:
        process.terminate()
        process.wait()


def certificate(directory: Path) -> bool:
    with user_space_bench(directory) as (link, far):
        found = Certifier(link, far.path, USER_SPACE, far.one_clock, QUICK).measure()
    for row in found.criteria:
        print(f"user space: {row.verdict:7} {row.name}: {row.evidence}")
    return found.verdict == "pass"


def main() -> int:
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, kernel {os.uname().release}")
    be_prompt(inherited=True)
    good = True
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        good = certificate(Path(first))
        throughput(Path(second))
    # A process may enter a namespace only while it has one thread, which numpy's library sees to otherwise.
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    good = subprocess.run([sys.executable, __file__, "changes"], check=False, env=alone).returncode == 0 and good
    print(f"load {os.getloadavg()[0]:.1f}: {'pass' if good else 'FAIL'}")
    return 0 if good else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["changes"]:
        broker.enter_namespace()
        sys.exit(0 if changes() else 1)
    sys.exit(main())
