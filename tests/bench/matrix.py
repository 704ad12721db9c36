"""A bench for the fault matrix: a supply that is asked behind its language, a load that a test can raise, faulty wires.

The supply runs in a process of its own. What is at its terminals is read from its control socket, a plain unix socket
with JSON lines that feeds no watchdog and shares no code with the cut; nothing of hil lies in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from plug import Plug

from hil.client import Bench, Board, Lease, attach
from hil.client.http import DaemonGone
from hil.errors import HilError
from hil.inventory import load_bench

OFF_V = 0.6
VOLTAGE_MAX_V, POWER_MAX_W = 19.0, 30.0  # the board type's, below
NORMAL_W, OVERLOAD_W = 12.0, 35.0

SUPPLY = """
import asyncio, os, sys
from pathlib import Path
from hil.virtual.supply import serve_supply

class FileLoad:
    undervoltage_lockout_v = 10.0

    def __init__(self, path):
        self.file = os.open(path, os.O_RDONLY)

    def power_w(self, now_s):
        return float(os.pread(self.file, 32, 0) or b"0")

    def set_powered(self, on):
        pass

model, control, watts = sys.argv[1:4]
ready = lambda supply: print(supply.port, flush=True)
asyncio.run(serve_supply(model, "127.0.0.1", 0, {1: FileLoad(watts)}, ready=ready, control=Path(control)))
"""

# Loaded by every Python process that inherits PYTHONPATH, first of all the daemon: a wall clock that can be stepped,
# and a step of the teardown that can be broken.
SITE = """
import os, sys, time
if clock := os.environ.get("MATRIX_CLOCK"):
    real = time.time
    def stepped():
        with open(clock) as file:
            return real() + float(file.read() or 0)
    time.time = stepped
broken = os.environ.get("MATRIX_BREAK")
if broken and "hil.bench.daemon" in sys.orig_argv:
    import asyncio, importlib
    module, _, path = broken.partition(":")
    *owner, name = path.split(".")
    target = importlib.import_module(module)
    for part in owner:
        target = getattr(target, part)
    def breaks(*args, **keywords):
        raise RuntimeError(f"{path} is broken on purpose")
    async def breaks_later(*args, **keywords):
        breaks()
    setattr(target, name, breaks_later if asyncio.iscoroutinefunction(getattr(target, name)) else breaks)
"""

BOARD_TYPE = """
schema: 1
name: loaded
title: A load that a test raises
arch: aarch64
hardware: virtual
supply: {voltage_min_v: 11, voltage_nominal_v: 15, voltage_max_v: 19, undervoltage_lockout_v: 10, current_max_a: 2.5,
  power_max_w: 30, overvoltage_protection_v: 20, overcurrent_protection_a: 2.8, inrush_s: 0.1, off_dwell_s: 0.3}
power: {idle_w: 5, inference_w: 12, source: recorded}
"""

BENCH = """
schema: 1
name: {name}
board_types: {types}
supplies:
  psu1: {{driver: scpi, dialect: {dialect}, address: "tcp://127.0.0.1:{port}"{more}}}
links: {links}
boards:
  b1: {{type: loaded, power: [{{supply: psu1, channel: 1}}], console: {{port: {console}}}}}
"""


def until(condition: Callable[[], object], timeout_s: float = 30.0, what: str = "") -> None:
    """Wait for `condition`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain {what}"
        time.sleep(0.005)


# Nobody listens there: what a link's end costs, and what it must not cost.
LINK = """{box1: {driver: netem-ssh, address: "ssh://root@127.0.0.1:1", key: /dev/null, known_hosts: /dev/null,
  uplink_interface: eth0, downlink_interface: eth1}}"""


class Proxy:
    """A wire that can break: `swallow` takes everything and gives nothing, `cut` resets and refuses."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._mode = "pass"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def swallow(self) -> None:
        self._mode = "swallow"

    def cut(self) -> None:
        self._mode = "cut"

    def heal(self) -> None:
        """What was swallowed is gone, and so are its connections: as after a switch came back."""
        self._mode = "heal"

    def close(self) -> None:
        self._stop = True
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop:
            if self._mode in ("cut", "heal"):
                for pair in self._pairs:
                    for side in pair:
                        reset(side)
                self._pairs.clear()
                self._mode = "refuse" if self._mode == "cut" else "pass"
            sides = {side: other for a, b in self._pairs for side, other in ((a, b), (b, a))}
            for ready in select.select([self._listener, *sides], [], [], 0.01)[0]:
                if ready is self._listener:
                    self._accept()
                else:
                    self._forward(ready, sides[ready])

    def _accept(self) -> None:
        client = self._listener.accept()[0]
        if self._mode == "refuse":
            reset(client)
            return
        server = socket.create_connection(("127.0.0.1", self._target))
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs.append((client, server))

    def _forward(self, source: socket.socket, to: socket.socket) -> None:
        if source.fileno() < 0:
            return
        data = b""
        with contextlib.suppress(OSError):
            data = source.recv(65536)
        if data and self._mode == "pass":
            with contextlib.suppress(OSError):
                to.sendall(data)
        elif not data:
            self._pairs = [pair for pair in self._pairs if source not in pair]
            for side in (source, to):
                side.close()


def reset(side: socket.socket) -> None:
    """Close with RST."""
    with contextlib.suppress(OSError):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    side.close()


class Truth:
    """What is at the supply's terminals, by its control socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def do(self, action: str = "state", **fields: Any) -> dict[str, Any]:
        with self._lock:
            self._socket.sendall(json.dumps({"do": action, **fields}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._lines.readline())
        assert "error" not in answer, answer
        return answer

    def channel(self) -> dict[str, Any]:
        value: dict[str, Any] = self.do()["channels"]["1"]
        return value

    @property
    def is_on(self) -> bool:
        return bool(self.channel()["output_on"])

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@dataclass(frozen=True)
class Outcome:
    """From the fault to measured off: seconds, and joules delivered beyond the board's volts and watts."""

    seconds: float
    joules: float


class Meter:
    """Samples the terminals from now on, on a thread of its own connection."""

    def __init__(self, control: Path) -> None:
        self._truth = Truth(control)
        self._began = time.monotonic()
        self.samples: list[tuple[float, float, float, bool]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            channel = self._truth.channel()
            now = time.monotonic()
            self.samples.append((now, channel["voltage_v"], channel["current_a"], bool(channel["output_on"])))
            time.sleep(0.003)

    def until_off(self, timeout_s: float, since_s: float | None = None) -> Outcome:
        """Wait until the terminals are off, and account for the time since the fault."""
        began = self._began if since_s is None else since_s

        def off() -> float | None:
            return next((t for t, v, _, on in self.samples if t > began and v < OFF_V and not on), None)

        until(off, timeout_s, f"for off; now {self.samples[-1:]}")
        self.stop()
        end = off()
        assert end is not None
        joules, before = 0.0, None
        for t, volts, amperes, _ in self.samples:
            watts = volts * amperes
            excess = watts if volts > VOLTAGE_MAX_V * 1.01 else max(0.0, watts - POWER_MAX_W)
            if before is not None and began <= t <= end:
                joules += 0.5 * (excess + before[1]) * (t - max(before[0], began))
            before = (t, excess)
        return Outcome(end - began, joules)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._truth.close()


class Lab:
    """Supply, wire, outlet, bench file and the daemon that clients start for it."""

    def __init__(
        self,
        directory: Path,
        monkeypatch: Any,
        model: str = "rigol-dp800",
        more: str = "",
        outlet: bool = False,
        console: Path | None = None,
        link: bool = False,
    ) -> None:
        self.links = LINK if link else "{}"
        self.directory = directory
        self.console = console or directory / "no-console"
        self.watts = directory / "watts"
        self.load(NORMAL_W)
        site = directory / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
        self.control = Path(os.environ["XDG_RUNTIME_DIR"]) / f"c{time.monotonic_ns()}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPPLY, model, str(self.control), str(self.watts)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.supply_port = int(self.process.stdout.readline())
        self.truth = Truth(self.control)
        self.proxy = Proxy(self.supply_port)
        self.plug = Plug(lambda: self.truth.do("power_cycle")) if outlet else None
        if self.plug is not None:
            more += f', outlet: "{self.plug.address}"'
        (directory / "types").mkdir()
        (directory / "types/loaded.yaml").write_text(BOARD_TYPE)
        self.bench = load_bench(self.write_bench("matrix", self.proxy.port, model, more))
        self.journal = self.bench.state_dir / "intent.jsonl"

    def write_bench(self, name: str, port: int, dialect: str = "rigol-dp800", more: str = "") -> Path:
        path = self.directory / f"{name}.yaml"
        text = BENCH.format(
            name=name,
            types=self.directory / "types",
            port=port,
            dialect=dialect,
            more=more,
            console=self.console,
            links=self.links,
        )
        path.write_text(text)
        return path

    def load(self, watts: float) -> None:
        """What the board draws from now on."""
        new = f"{watts:<16g}".encode()
        if not self.watts.exists():
            self.watts.write_bytes(new)
        handle = os.open(self.watts, os.O_WRONLY)
        os.pwrite(handle, new, 0)
        os.close(handle)

    @contextlib.contextmanager
    def powered(self) -> Iterator[tuple[Bench, Lease, Board]]:
        """The board on under a lease that nobody renews; what the test did to the daemon may have ended both."""
        with attach(self.bench) as daemon:
            lease = daemon.lease(["b1"], ttl_s=600.0, pid=None, renew=False)
            board = daemon.board("b1", lease)
            board.power.on()
            assert self.truth.is_on
            yield daemon, lease, board

    def pids(self, daemon: Bench) -> tuple[int, int]:
        """(daemon, dead-man)."""
        status = daemon.status()
        return int(status["pid"]), int(status["deadman"]["pid"])

    def meter(self) -> Meter:
        return Meter(self.control)

    def cut_by(self) -> str:
        """Who closed the newest intent, by the journal."""
        entries = [json.loads(line) for line in self.journal.read_text().splitlines() if line]
        closed = [entry["how"] for entry in entries if entry["op"] == "off"]
        return str(closed[-1]) if closed else ""

    def ask(self, question: str) -> str:
        """What the supply answers to a stranger, past the wire that may be broken."""
        with socket.create_connection(("127.0.0.1", self.supply_port), timeout=5) as sock:
            sock.sendall(question.encode() + b"\n")
            return sock.makefile().readline().strip()

    def tell(self, command: str) -> None:
        """Say something to the supply as a stranger on the network would."""
        with socket.create_connection(("127.0.0.1", self.supply_port), timeout=5) as sock:
            sock.sendall(command.encode() + b"\n*IDN?\n")
            sock.makefile().readline()

    def close(self) -> None:
        self.proxy.heal()
        with contextlib.suppress(OSError, AssertionError):
            self.truth.do("heal")
        try:
            with attach(self.bench, start=False) as daemon:
                daemon.stop(force=True)
        except (DaemonGone, HilError):
            pass
        self.process.kill()
        self.process.communicate()
        self.truth.close()
        self.proxy.close()
        if self.plug is not None:
            self.plug.close()
        self.control.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- the table
SAFETY_ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
BEGIN, END = "<!-- fault matrix: begin -->", "<!-- fault matrix: end -->"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of a run as they stand in docs/safety.md."""
    lines = ["| Row | Fault | Cut by | J beyond | s to off |", "|---|---|---|---:|---:|"]
    for row in rows:
        cut_by = row["cut_by"].split(", more than")[0].split(": tcp://")[0].split(" tasmota://")[0]
        cut_by = cut_by.replace("b1: ", "").replace("safe state (", "power loop (").removesuffix(")")
        cut_by += ")" * (cut_by.count("(") - cut_by.count(")"))
        lines.append(f"| `{row['row']}` | {row['fault']} | {cut_by} | {row['joules']:.1f} | {row['seconds']:.2f} |")
    return "\n".join(lines)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put the rows of this run between the marks of the document."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """A signal to a process of this test's own daemon; none when it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


MakeLab = Callable[..., Lab]
