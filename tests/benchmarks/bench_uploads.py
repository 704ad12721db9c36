"""A model upload by SFTP and by CFDP class 2 over the same emulated line: what each makes of a contact plan.

Run by `make bench` (about four minutes). The line is the user-space link between two network namespaces, so TCP is this
kernel's. Per case and protocol: seconds of contact used, the share of what the line could have carried in that time
that were bytes of the file (goodput), what the ground's interface counted on the wire over the file's bytes, bytes of
the file that the protocol sent again, and packets that went out again (TCP segments, CFDP file data PDUs): the figures
that a flight's report compares. The file's SHA-256 is compared at the far end every time.

Exits 1 when a file is not whole, or when CFDP fills less than 70 % of a line that loses 1 %.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import emulated_line
import sshd
from emulated_line import BOARD, Line
from sshd import Sshd

from hil.drivers import broker, cfdp
from hil.drivers.cfdp import CfdpUpload
from hil.drivers.ssh import ShellLost, ShellTimeout, Upload
from hil.errors import BoardError
from hil.model import LinkState

FILE_MIB = 3
GAP_S, AFTER_LOS_S = 4.0, 0.3
CLEAN = LinkState(delay_s=0.15, rate_bps=2e6)
FILL_LIMIT = 0.7  # the last gaps of so short a file cost a round trip or two each
SENDER_SHARE = 0.98  # of the line's rate: the queue in front of it stays short


@dataclass(frozen=True, slots=True)
class Case:
    """A line and how long its contacts last; None: one that does not end."""

    name: str
    state: LinkState
    contact_s: float | None = None


CASES = (
    Case("2 Mbit/s, 300 ms", CLEAN),
    Case("the same, 1 % lost", replace(CLEAN, loss=0.01)),
    Case("contacts of 6 s, 0.1 % lost", replace(CLEAN, loss=0.001), contact_s=6.0),
)


@dataclass(frozen=True, slots=True)
class Result:
    contacts: int
    contact_s: float
    again_bytes: int
    again_packets: int
    wire_bytes: int


def ground_sent(line: Line) -> int:
    """Bytes that the ground has put on the line, by its interface's counter."""
    return sum(item["tx_bytes"] for name, item in broker.counters(line.ground).items() if name != "lo")


@contextmanager
def contact(line: Line, case: Case) -> Iterator[threading.Event]:
    """Signal for as long as a contact lasts; the event is set a moment after it is lost."""
    stop = threading.Event()
    line.link.apply({"uplink": case.state, "downlink": case.state}, time.monotonic())

    def lose() -> None:
        outage = replace(case.state, outage=True)
        line.link.apply({"uplink": outage, "downlink": outage}, time.monotonic())
        if not stop.wait(AFTER_LOS_S):
            stop.set()

    timer = threading.Timer(case.contact_s, lose) if case.contact_s is not None else None
    if timer is not None:
        timer.start()
    try:
        yield stop
    finally:
        stop.set()
        if timer is not None:
            timer.cancel()
            timer.join()


def by_sftp(line: Line, server: Sshd, source: Path, target: str, case: Case) -> Result:
    upload, used_s, packets, before = Upload(source, target, onboard=None), 0.0, 0, ground_sent(line)
    for count in itertools.count(1):
        began = time.monotonic()
        with contact(line, case) as stop:
            shell = None
            try:
                limit_s = case.contact_s or 60.0
                shell = server.connect(broker=line.ground, timeout_s=limit_s, sndbuf=256 << 10)
                threading.Thread(target=lambda: (stop.wait(), shell.abort()), daemon=True).start()  # noqa: B023
                upload.run(shell, stall_s=60, stop=stop)
            except (ShellLost, ShellTimeout):
                if case.contact_s is None:
                    raise
            finally:
                if shell is not None:
                    shell.abort()
                    packets += shell.retransmissions()
        used_s += min(time.monotonic() - began, case.contact_s or 1e9)
        if upload.complete:
            again = sum(attempt.resent_bytes for attempt in upload.attempts)
            return Result(count, used_s, again, packets, ground_sent(line) - before)
        time.sleep(GAP_S)
    raise AssertionError


def by_cfdp(line: Line, server: Sshd, source: Path, target: str, case: Case) -> Result:
    line.link.clear()
    with server.connect(broker=line.ground, timeout_s=30) as mgmt:
        archive = cfdp.archive(Path(target).with_suffix(".pyz"))
        job = cfdp.start_receiver(mgmt, str(archive), str(Path(target).parent), ask_again_s=1.0, python=sys.executable)
    upload, used_s, before = CfdpUpload(source, f"{target}.part", ask_again_s=1.0), 0.0, ground_sent(line)
    while not upload.complete:
        if upload.contacts:
            time.sleep(GAP_S)
        began = time.monotonic()
        with contact(line, case) as stop, broker.connect_udp(line.ground, BOARD, cfdp.PORT) as sock:
            upload.run(sock, rate_bps=CLEAN.rate_bps * SENDER_SHARE, stop=stop)
        used_s += min(time.monotonic() - began, case.contact_s or 1e9)
    wire = ground_sent(line) - before
    line.link.clear()
    with server.connect(broker=line.ground, timeout_s=30) as mgmt:
        job.kill(mgmt)
    again, packets = (sum(getattr(item, name) for item in upload.contacts) for name in ("resent_bytes", "resent_pdus"))
    return Result(len(upload.contacts), used_s, again, packets, wire)


def main() -> int:
    missed = []
    tcp = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    ways: dict[str, Callable[[Line, Sshd, Path, str, Case], Result]] = {"sftp": by_sftp, "cfdp": by_cfdp}
    with tempfile.TemporaryDirectory(prefix="hil-") as scratch, emulated_line.line() as line:
        directory = Path(scratch)
        source = directory / "model"
        source.write_bytes(os.urandom(FILE_MIB << 20))
        wanted = hashlib.sha256(source.read_bytes()).digest()
        with sshd.serve(directory, address=BOARD, inside=line.inside, broker=line.ground) as server:
            load = os.getloadavg()[0]
            print(f"{FILE_MIB} MiB over the user-space link, {os.cpu_count()} cores, load {load:.1f}, TCP {tcp}")
            heads = f"{'contacts':>9}{'contact s':>11}{'goodput':>9}{'wire over':>11}{'again KiB':>11}{'packets':>9}"
            print(f"  {'line':30}{'protocol':9}{heads}")
            for number, case in enumerate(CASES):
                for way, send in ways.items():
                    target = str(directory / f"{way}{number}")
                    try:
                        result = send(line, server, source, target, case)
                    except BoardError as error:
                        missed.append(f"{case.name}, {way}: {error}")
                        continue
                    fill = FILE_MIB * 2**23 / result.contact_s / case.state.rate_bps
                    print(
                        f"  {case.name:30}{way:9}{result.contacts:9}{result.contact_s:11.1f}{fill:9.1%}"
                        f"{result.wire_bytes / (FILE_MIB << 20) - 1:+11.1%}{result.again_bytes / 1024:11.0f}"
                        f"{result.again_packets:9}",
                        flush=True,
                    )
                    if hashlib.sha256(Path(f"{target}.part").read_bytes()).digest() != wanted:
                        missed.append(f"{case.name}, {way}: the file is not whole")
                    if way == "cfdp" and case.state.loss == 0.01 and fill < FILL_LIMIT:
                        missed.append(f"{case.name}: CFDP fills {fill:.1%}, the limit is {FILL_LIMIT:.0%}")
    print("after a reboot of the board both go on from what is on its disk")
    for text in missed:
        print(text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
