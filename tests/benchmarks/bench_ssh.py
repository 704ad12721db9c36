"""Shells and files over SSH next to labgrid and OpenSSH's `sftp`, against one OpenSSH server in the same run.

Run by `make bench` (four minutes). The peers take turns with us, so that whatever else the host does meets all of them.
Limits of commands are for a quiet host: they are held against the calmest turn of each, p50 over all turns is printed
beside it. Files are compared by p50 with p50 of the same run, the best printed beside it; while a p50 does not stand
still, more rounds are run. The limit: no slower
than `sftp`, which only moves, a get hashed at both ends and in place, a put synced. A put's hashes cost about what its
lead over `sftp` is when both ends share two cores: that line is printed and not held.

- loopback: connect, one command, 64 MiB there and back, of which each line says what it includes. `sftp` and labgrid
  neither hash nor sync. They start processes of their own for a copy; what an empty file costs them is taken off, which
  flatters them. Our lines begin on a connection that is open, and include opening and closing the file.
- a line of 2 Mbit/s and 300 ms round trip between two network namespaces, made by the user-space link: what share of
  the line's rate the file's own bytes fill, from the first confirmation to the last, and with opening and closing.

labgrid is looked for here, then in the interpreter that HIL_LABGRID names; without one its columns stay empty.
`--quick` leaves the slow line out. Exits 1 when a limit is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import emulated_line
import sshd
from sshd import Sshd

from hil.drivers.ssh import Download, Shell, Upload, get, put
from hil.model import LinkState

CONNECT_LIMIT_MS, RUN_LIMIT_MS, FILL_LIMIT = 150.0, 1.5, 0.9
FILE_MIB, ROUNDS, MOST_ROUNDS = 64, 9, 27
SPREAD = 1.25  # upper over lower quartile of a line whose p50 stands still
# What is compared, and what each includes beside moving the file.
PUT_MOVED, PUT_PLACED = "put  hil, moved and synced", "put  hil, synced, hashed at both ends, in place"
GET_MOVED, GET_PLACED = "get  hil, moved and hashed here", "get  hil, hashed at both ends, in place"
PUT_SFTP, GET_SFTP = "put  sftp, moved", "get  sftp, moved"
CALLS, TURNS = 50, 8
LINE = LinkState(delay_s=0.15, rate_bps=2e6)
LINE_MIB = 10
Turns = dict[str, list[list[float]]]

# Commands on standard input, one JSON list a line; answers in seconds.
LABGRID = """
import json, logging, sys, time
from labgrid import Target
from labgrid.driver import SSHDriver
from labgrid.resource import NetworkService
where = json.loads(sys.argv[1])
def activate():
    target = Target("bench")
    NetworkService(target, "service", address=where["address"], port=where["port"], username=where["user"])
    driver = SSHDriver(target, "ssh", keyfile=where["key"])
    target.activate(driver)
    return target, driver
target, driver = activate()
for line in sys.stdin:
    what, *words = json.loads(line)
    began = time.perf_counter()
    if what == "connect":
        target.deactivate(driver)
        began = time.perf_counter()
        target, driver = activate()
    else:
        getattr(driver, what)(*words)
    print(json.dumps(time.perf_counter() - began), flush=True)
"""


def p50(values: list[float]) -> float:
    return statistics.median(values)


def calmest(turns: list[list[float]]) -> float:
    """The p50 of the turn in which the host did least else, seconds."""
    return min(p50(turn) for turn in turns)


def told(turns: list[list[float]]) -> str:
    overall = p50([value for turn in turns for value in turn])
    return f"{calmest(turns) * 1e3:8.2f} ms (all turns {overall * 1e3:.2f})"


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


@contextmanager
def labgrid(server: Sshd) -> Iterator[Callable[..., float] | None]:
    """A function that lets labgrid do something and says how long it took; None without labgrid."""
    python = sys.executable if importlib.util.find_spec("labgrid") else os.environ.get("HIL_LABGRID")
    if python is None:
        yield None
        return
    where = {"address": server.address, "port": server.port, "user": sshd.USER, "key": str(server.key)}
    process = subprocess.Popen(
        [python, "-c", LABGRID, json.dumps(where)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def do(*words: str) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(words) + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    try:
        yield do
    finally:
        process.kill()
        process.wait()


def sftp(server: Sshd, line: str) -> float:
    """Seconds of one `sftp` run with one command."""
    argv = ["sftp", "-F", "none", "-q", "-b", "-", "-i", str(server.key), "-P", str(server.port)]
    argv += ["-o", f"UserKnownHostsFile={server.known_hosts}", f"{sshd.USER}@{server.address}"]
    return timed(lambda: subprocess.run(argv, input=line, text=True, check=True, stdout=subprocess.DEVNULL))


def commands(server: Sshd, peer: Callable[..., float] | None) -> tuple[Turns, Turns]:
    """What connecting and `run(["true"])` take, a list a turn: ours, then labgrid's."""
    ours: Turns = {"connect": [], "run": []}
    theirs: Turns = {"connect": [], "run": []}
    server.connect().close()  # imports are not what is measured
    for _ in range(TURNS):
        began = time.perf_counter()
        with server.connect() as shell:
            ours["connect"].append([time.perf_counter() - began])
            settle(shell)
            ours["run"].append([timed(lambda: shell.run(["true"], 10)) for _ in range(CALLS)])
        if peer is not None:
            theirs["connect"].append([peer("connect")])
            theirs["run"].append([peer("run", "true") for _ in range(CALLS)])
    return ours, theirs


def settle(shell: Shell) -> None:
    """The first calls of a connection pay for its helper; they are printed apart."""
    for _ in range(20):
        shell.run(["true"], 10)
        time.sleep(0.01)


def first_calls(server: Sshd) -> list[float]:
    """The first five commands of a connection, seconds."""
    with server.connect() as shell:
        return [timed(lambda: shell.run(["true"], 10)) for _ in range(5)]


def files(server: Sshd, directory: Path, peer: Callable[..., float] | None) -> dict[str, list[float]]:
    """MiB/s of each way to move the file, a value a round."""
    source, there, back, empty = (directory / name for name in ("source", "there", "back", "empty"))
    source.write_bytes(os.urandom(FILE_MIB << 20))
    empty.write_bytes(b"")
    found: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(FILE_MIB / seconds)

    with server.connect() as shell:
        settle(shell)
        while not settled(found):
            there.unlink(missing_ok=True)
            back.unlink(missing_ok=True)
            upload = Upload(
                source, str(there), onboard=None, window_bytes=4 << 20, write_bytes=255 << 10, sync_bytes=1 << 40
            )
            note(PUT_MOVED, timed(lambda: upload.run(shell, stall_s=30)))  # noqa: B023
            Path(upload.part).unlink()
            note(PUT_PLACED, timed(lambda: put(shell, source, str(there))))
            download = Download(str(there), back)
            note(GET_MOVED, timed(lambda: download.run(shell, stall_s=30)))  # noqa: B023
            download.part.unlink()
            note(GET_PLACED, timed(lambda: get(shell, str(there), back)))
            there.unlink()
            note(PUT_SFTP, sftp(server, f"put {source} {there}") - sftp(server, f"put {empty} {directory / 'e'}"))
            note(GET_SFTP, sftp(server, f"get {there} {back}") - sftp(server, f"get {empty} {directory / 'e'}"))
            if peer is not None:
                there.unlink()
                back.unlink()
                note(
                    "put  labgrid, moved",
                    peer("put", str(source), str(there)) - peer("put", str(empty), f"{there}.empty"),
                )
                note(
                    "get  labgrid, moved", peer("get", str(there), str(back)) - peer("get", str(empty), f"{back}.empty")
                )
    return found


def settled(found: dict[str, list[float]]) -> bool:
    """Whether there are rounds enough for a p50 of each line."""
    rounds = len(next(iter(found.values()), []))
    if rounds < ROUNDS:
        return False
    quartiles = [statistics.quantiles(values, n=4) for values in found.values()]
    return rounds >= MOST_ROUNDS or all(high <= SPREAD * low for low, _, high in quartiles)


def slow_line(directory: Path) -> dict[str, tuple[float, float]]:
    """Share of the line's rate: while it flows, and with opening and closing."""
    source = directory / "slow"
    source.write_bytes(os.urandom(LINE_MIB << 20))
    found = {}
    with (
        emulated_line.line() as line,
        sshd.serve(directory, address=emulated_line.BOARD, inside=line.inside, broker=line.ground) as server,
    ):
        line.link.apply({"uplink": LINE, "downlink": LINE}, time.monotonic())
        with server.connect(broker=line.ground, timeout_s=30, sndbuf=256 << 10) as shell:
            upload = Upload(source, f"{directory}/far", onboard=None)
            download = Download(f"{directory}/far.part", directory / "near")
            for name, transfer in (("put", upload), ("get", download)):
                seen: list[tuple[float, int]] = []
                attempt = transfer.run(
                    shell,
                    stall_s=30,
                    on_progress=lambda offset: seen.append((time.monotonic(), offset)),  # noqa: B023
                )
                (t0, first), (t1, last) = seen[0], seen[-1]
                flowing, whole = (last - first) / (t1 - t0), attempt.offset / attempt.duration_s
                found[name] = (flowing * 8 / LINE.rate_bps, whole * 8 / LINE.rate_bps)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the slow line")
    options = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory(prefix="hil-") as scratch:
        directory = Path(scratch)
        with sshd.serve(directory) as server:
            print(f"SSH on loopback, p50 of the calmest turn, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
            with labgrid(server) as peer:
                ours, theirs = commands(server, peer)
                for what, limit_ms in (("connect", CONNECT_LIMIT_MS), ("run", RUN_LIMIT_MS)):
                    mine = calmest(ours[what]) * 1e3
                    his = f"labgrid {told(theirs[what])}" if theirs[what] else "labgrid is not here"
                    print(f"  {what:8} {told(ours[what])}   {his}   limit {limit_ms:g} ms")
                    if mine > limit_ms:
                        missed.append(f"{what} takes {mine:.2f} ms, the limit is {limit_ms:g} ms")
                early = ", ".join(f"{seconds * 1e3:.1f}" for seconds in first_calls(server))
                print(f"  the first commands of a connection, before its helper is up: {early} ms")
                speeds = files(server, directory, peer)
        rounds = len(speeds[PUT_SFTP])
        print(f"{FILE_MIB} MiB on loopback, MiB/s, p50 of {rounds} rounds (best), load {os.getloadavg()[0]:.1f}")
        for name, values in sorted(speeds.items()):
            print(f"  {name:48} {p50(values):7.1f} ({max(values):.1f})")
        for moved, placed, his in ((PUT_MOVED, PUT_PLACED, PUT_SFTP), (GET_MOVED, GET_PLACED, GET_SFTP)):
            shares = {name: p50(speeds[name]) / p50(speeds[his]) for name in (moved, placed)}
            print(f"  {his[:3]}  of sftp's p50: {shares[moved]:.2f} as above, {shares[placed]:.2f} hashed and in place")
            held = moved if moved == PUT_MOVED else placed
            if shares[held] < 1:
                missed.append(f"{held}: {p50(speeds[held]):.1f} MiB/s, sftp has {p50(speeds[his]):.1f}")
        if not options.quick:
            print(f"{LINE_MIB} MiB over 2 Mbit/s, 300 ms (user-space link, two namespaces): share of the rate")
            for name, (flowing, whole) in slow_line(directory).items():
                print(
                    f"  {name}  {flowing:6.1%} flowing, {whole:6.1%} with opening and closing (limit {FILL_LIMIT:.0%})"
                )
                if flowing < FILL_LIMIT:
                    missed.append(f"{name} fills {flowing:.1%} of the line")
    for text in missed:
        print(text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
