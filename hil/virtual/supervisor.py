"""The virtual bench's cupboard: one detached process that holds supply, link box and boards, as a lab's shelf would.

It outlives the CLI and the daemon, so that a kill test of either proves something. Whatever it started dies with it:
each child asked the kernel for SIGKILL at its parent's death.

    python -m hil.virtual.supervisor < config.json      the body, in the foreground; `up` starts it detached
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from hil.drivers import broker, userspace_link
from hil.errors import BenchError, HilError, UsageError
from hil.virtual.artefacts import Progress, require_tools, ssh_key, trust_host
from hil.virtual.board import BoardConfig, VirtualBoard, payload_mac, prepare
from hil.virtual.console import ConsoleRelay
from hil.virtual.hub import Hub
from hil.virtual.images import build_board_disk, build_uboot_flash
from hil.virtual.inputs import InputWire, power_inputs
from hil.virtual.linkbox import QEMU as LINKBOX_QEMU
from hil.virtual.linkbox import LinkBox, LinkBoxConfig
from hil.virtual.linkbox import ensure_image as ensure_linkbox_image
from hil.virtual.supply import Load, VirtualSupply

START_TIMEOUT_S = 120.0  # some five seconds on an idle host
STOP_TIMEOUT_S = 10.0
_WATCH_S = 0.5
_TAP = "payload0"


@dataclass(frozen=True, slots=True)
class BoardWire:
    """One emulated board of the bench file: what feeds it, where it is reached, how it draws power."""

    name: str
    inputs: tuple[InputWire, ...]
    mgmt_port: int
    payload_address: str = "10.42.0.2"
    memory_mib: int = 1024
    cpus: int = 2
    idle_w: float = 5.0
    full_w: float = 15.0
    full_cpu_cores: float = 1.0


@dataclass(frozen=True, slots=True)
class VirtualBench:
    """What `up` needs to know; built from a bench file's `virtual` section. Directories must exist (see `hil.paths`).

    `supply_tty` is the link to a serial supply's port, whose `supply_port` is None.
    `broker` is the payload broker's socket as the bench file names it. The link is a QEMU box (`linkbox_mgmt_port`) or
    a process in user space (`userspace_link`, its control socket); with neither, boards have no payload port.
    """

    name: str
    cache: Path
    state: Path
    runtime: Path
    boards: tuple[BoardWire, ...]
    supply_model: str = "rigol-dp800"
    supply_port: int | None = 15025
    supply_tty: Path | None = None
    linkbox_mgmt_port: int | None = 15122
    userspace_link: Path | None = None
    userspace_seed: int | None = None
    userspace_log: Path | None = None
    payload_host: str = "10.42.0.1"
    payload_prefix: int = 24
    broker: Path | None = None

    @property
    def has_link(self) -> bool:
        """Whether boards have a payload port."""
        return self.linkbox_mgmt_port is not None or self.userspace_link is not None

    @property
    def broker_socket(self) -> Path:
        """Where payload sockets are asked for."""
        return self.broker or self.runtime / "payload.sock"

    @property
    def supply_address(self) -> str:
        """Where a client finds the supply."""
        return f"serial://{self.supply_tty}" if self.supply_port is None else f"tcp://127.0.0.1:{self.supply_port}"

    @property
    def supply_control(self) -> Path:
        """The supply's control socket: faults in, the truth at its terminals out; see `VirtualSupply.control`."""
        return self.runtime / "supply.control.sock"

    @property
    def log(self) -> Path:
        """The supervisor's own log."""
        return self.state / "virtual.log"

    @property
    def lock(self) -> Path:
        """Held by the supervisor for as long as it lives."""
        return self.runtime / "virtual.lock"

    @property
    def status_file(self) -> Path:
        """What `status` reads; rewritten at every change."""
        return self.runtime / "virtual.json"

    def to_json(self) -> str:
        """The configuration as the supervisor process reads it."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @staticmethod
    def from_json(text: str) -> VirtualBench:
        """The inverse of `to_json`."""
        raw = json.loads(text)
        for key in ("cache", "state", "runtime", "broker", "supply_tty", "userspace_link", "userspace_log"):
            raw[key] = Path(raw[key]) if raw[key] is not None else None
        raw["boards"] = tuple(
            BoardWire(**board | {"inputs": tuple(InputWire(**wire) for wire in board["inputs"])})
            for board in raw["boards"]
        )
        return VirtualBench(**raw)

    def ports(self) -> dict[int, str]:
        """Every TCP port the bench listens on (127.0.0.1) and what for."""
        found = {self.supply_port: "the supply"} if self.supply_port is not None else {}
        if self.linkbox_mgmt_port is not None:
            found[self.linkbox_mgmt_port] = "the link box's SSH"
        for board in self.boards:
            found[board.mgmt_port] = f"{board.name}'s mgmt SSH"
        return found


# --- the commands -----------------------------------------------------------------------------------------------------


def up(bench: VirtualBench, progress: Progress = lambda _: None) -> None:
    """Start the bench detached and return when its supply listens and its link box answers; boards are unpowered.

    Does nothing when it is up already with the same configuration. Raises UsageError when a port is taken or when
    another configuration runs, BenchError with the log's last lines when the start fails.
    """
    with _exclusive(bench.runtime / "virtual.up.lock"):
        running = status(bench)
        if running["running"]:
            if running.get("config") != json.loads(bench.to_json()):
                raise UsageError(
                    f"virtual bench {bench.name} is up with another configuration", hint="run `hil virtual down` first"
                )
            return
        # What is missing or taken is told before anything is built or started.
        require_tools(*_tools(bench))
        _require_free_ports(bench)
        _build(bench, progress)
        progress(f"virtual bench {bench.name}: starting supply and link box")
        _start_detached(bench)


def down(bench: VirtualBench) -> bool:
    """End the bench: outputs off, boards killed, sockets removed. False when it was not running."""
    found = status(bench)
    if not found["running"]:
        return False
    try:
        handle = os.pidfd_open(int(found["pid"]))
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not select.select([handle], [], [], STOP_TIMEOUT_S)[0]:
            signal.pidfd_send_signal(handle, signal.SIGKILL)  # its children die with it
            select.select([handle], [], [], STOP_TIMEOUT_S)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)
    return True


def status(bench: VirtualBench) -> dict[str, Any]:
    """`{"running": bool, ...}`; when it runs also pid, since (Unix seconds), config, and each part with its pid."""
    if not _is_locked(bench.lock):
        return {"running": False, "name": bench.name}
    deadline_s = time.monotonic() + 2.0
    while True:
        try:
            return {"running": True, **json.loads(bench.status_file.read_text())}
        except (OSError, ValueError) as error:  # it holds the lock and is about to write
            if time.monotonic() > deadline_s:
                raise BenchError(
                    f"virtual bench {bench.name} runs but wrote no status", hint=f"see {bench.log}"
                ) from error
            time.sleep(0.02)


def _tools(bench: VirtualBench) -> tuple[str, ...]:
    board = ("qemu-system-aarch64", "mkenvimage")
    return board if bench.linkbox_mgmt_port is None else (*board, LINKBOX_QEMU)


def _build(bench: VirtualBench, progress: Progress) -> None:
    """Images and pinned keys; slow the first time only."""
    build_uboot_flash(bench.cache, progress)
    build_board_disk(bench.cache, progress)
    host_key = ssh_key(bench.cache, "board_host_ed25519")
    for board in bench.boards:
        trust_host(bench.cache, "127.0.0.1", board.mgmt_port, host_key)
        if bench.has_link:
            trust_host(bench.cache, board.payload_address, 22, host_key)
    if bench.linkbox_mgmt_port is not None:
        ensure_linkbox_image(bench.cache, bench.linkbox_mgmt_port, progress)


def _start_detached(bench: VirtualBench) -> None:
    with bench.log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "hil.virtual.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as pipe:
        pipe.write(bench.to_json().encode())
    with process.stdout as ready:
        if select.select([ready], [], [], START_TIMEOUT_S)[0] and ready.readline() == b"ready\n":
            return
    process.kill()
    process.wait()
    said = bench.log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    tail = "\n  ".join(said[-12:])
    raise BenchError(f"virtual bench {bench.name} did not start:\n  {tail}", hint=f"the whole log: {bench.log}")


def _require_free_ports(bench: VirtualBench) -> None:
    for port, use in bench.ports().items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                owner = _port_owner(port)
                raise UsageError(
                    f"port {port} on 127.0.0.1, meant for {use}, is taken by {owner or 'another process'}",
                    hint="stop that process (`hil virtual down` when it is another virtual bench), "
                    "or choose another port in the bench file",
                ) from error


def _port_owner(port: int) -> str | None:
    """Who listens on a TCP port, as "name (pid N)"; None when this user may not see it."""
    suffix, inodes = f":{port:04X}", set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[1].endswith(suffix) and fields[3] == "0A":
                    inodes.add(f"socket:[{fields[9]}]")
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) in inodes:
                process = descriptor.parent.parent
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return None


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --- the body ---------------------------------------------------------------------------------------------------------


class _Stopped(Exception):
    """A signal asked the supervisor to end while it was still starting."""


@dataclass
class _Parts:
    """What the supervisor holds; filled in the order of starting, taken down in reverse."""

    bench: VirtualBench
    since: float
    broker: subprocess.Popen[bytes] | None = None
    linkbox: LinkBox | None = None
    userspace: subprocess.Popen[bytes] | None = None
    boards: dict[str, VirtualBoard] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)

    def publish(self) -> None:
        """Write what `status` reads."""
        parts: dict[str, Mapping[str, object]] = {}
        if self.broker is not None:
            parts["broker"] = {"pid": self.broker.pid if self.broker.poll() is None else None}
        if self.linkbox is not None:
            parts["link_box"] = {"pid": self.linkbox.pid, "boot_s": round(self.linkbox.boot_s, 2)}
        if self.userspace is not None:
            parts["link"] = {"pid": self.userspace.pid if self.userspace.poll() is None else None}
        parts["supply"] = {"address": self.bench.supply_address, "model": self.bench.supply_model}
        boards = {
            name: {"powered": board.powered, "pid": board.pid, "power_on_count": board.power_on_count}
            for name, board in self.boards.items()
        }
        value = {
            "name": self.bench.name,
            "pid": os.getpid(),
            "since": self.since,
            "config": json.loads(self.bench.to_json()),
            "parts": parts,
            "boards": boards,
            "faults": self.faults,
        }
        fresh = self.bench.status_file.with_name(".virtual.json.new")
        fresh.write_text(json.dumps(value, indent=1))
        fresh.replace(self.bench.status_file)


def run(bench: VirtualBench, ready: TextIO) -> None:
    """The supervisor's body: start everything, print `ready`, serve until SIGTERM or SIGINT, take everything down."""
    with bench.lock.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"virtual bench {bench.name} is up already") from None

        def stop(number: int, frame: FrameType | None) -> None:
            raise _Stopped

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        parts = _Parts(bench, time.time())
        try:
            with contextlib.suppress(_Stopped):
                parts.publish()
                _start_link(parts)
                asyncio.run(_serve(parts, ready))
        finally:
            _take_down(parts)


def _say(text: str) -> None:
    """A line of the log."""
    moment = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
    print(f"{stamp}.{int(moment % 1 * 1000):03d}Z {text}", file=sys.stderr, flush=True)


def _inner_socket(bench: VirtualBench) -> Path:
    """Where the link box listens for the board."""
    return bench.runtime / "inner.sock"


def payload_socket(bench: VirtualBench, board: str) -> Path | None:
    """Where a board's payload port is plugged in: into the link box, or into the hub when there are several."""
    if not bench.has_link:
        return None
    return _inner_socket(bench) if len(bench.boards) == 1 else bench.runtime / f"{board}.payload.sock"


def _start_link(parts: _Parts) -> None:
    bench = parts.bench
    if not bench.has_link:
        return
    neighbours = {board.payload_address: payload_mac(bench.name, board.name) for board in bench.boards}
    address = f"{bench.payload_host}/{bench.payload_prefix}"
    parts.broker = broker.start(bench.broker_socket, tap=_TAP, address=address, neighbours=neighbours)
    if bench.linkbox_mgmt_port is None:
        _start_userspace_link(parts)
        return
    image = ensure_linkbox_image(bench.cache, bench.linkbox_mgmt_port, _say)
    tap = broker.open_tap(bench.broker_socket, _TAP)
    try:
        log = bench.state / "linkbox.console.log"
        box = LinkBox(LinkBoxConfig(image, tap, _inner_socket(bench), bench.linkbox_mgmt_port, log))
        parts.linkbox = box
        box.start()
    finally:
        os.close(tap)
    _say(f"link box answers after {box.boot_s:.1f} s")


def _start_userspace_link(parts: _Parts) -> None:
    bench = parts.bench
    assert bench.userspace_link is not None
    parts.userspace = userspace_link.start(
        bench.userspace_link,
        ground=f"broker:{bench.broker_socket}:{_TAP}",
        board=f"listen:{_inner_socket(bench)}",
        seed=bench.userspace_seed,
        log=bench.userspace_log,
        with_parent=True,
    )
    _say("the link in user space answers")


async def _serve(parts: _Parts, ready: TextIO) -> None:
    bench, loop = parts.bench, asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    master, flash = build_board_disk(bench.cache, _say), build_uboot_flash(bench.cache, _say)

    def changed(text: str) -> None:
        _say(text)
        parts.publish()

    async with contextlib.AsyncExitStack() as stack:
        for wire in bench.boards:
            config = _board_config(bench, wire, master, flash)
            for line in prepare(config):
                _say(line)
            console = ConsoleRelay(config.console_socket, bench.runtime / f"{wire.name}.console")
            stack.callback(console.close)
            parts.boards[wire.name] = VirtualBoard(config, bench.name, changed)
        if bench.has_link and len(bench.boards) > 1:
            hub = Hub(_inner_socket(bench), {w.name: bench.runtime / f"{w.name}.payload.sock" for w in bench.boards})
            stack.push_async_callback(hub.stop)
            await hub.start()
        loads: dict[int, Load] = {}
        for wire in bench.boards:
            loads |= power_inputs(parts.boards[wire.name], wire.inputs)
        supply = VirtualSupply(bench.supply_model, loads)
        stack.push_async_callback(supply.stop)
        if bench.supply_port is None:
            await supply.start_serial(bench.supply_tty)
        else:
            await supply.start("127.0.0.1", bench.supply_port)
        await supply.start_control(bench.supply_control)
        changed(f"virtual bench {bench.name} is up")
        ready.write("ready\n")
        ready.flush()
        _forget_stdout()
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _WATCH_S)
            _watch(parts)


def _board_config(bench: VirtualBench, wire: BoardWire, master: Path, flash: Path) -> BoardConfig:
    return BoardConfig(
        name=wire.name,
        runtime=bench.runtime,
        state=bench.state,
        master_disk=master,
        uboot_flash=flash,
        mgmt_port=wire.mgmt_port,
        payload=f"{wire.payload_address}/{bench.payload_prefix}",
        gateway=bench.payload_host,
        payload_socket=payload_socket(bench, wire.name),
        memory_mib=wire.memory_mib,
        cpus=wire.cpus,
        idle_w=wire.idle_w,
        full_w=wire.full_w,
        full_cpu_cores=wire.full_cpu_cores,
    )


def _watch(parts: _Parts) -> None:
    """Notice a part that died; it stays dead and `status` says so, as a broken instrument stays broken."""
    found = []
    if parts.broker is not None and parts.broker.poll() is not None:
        found.append(f"the payload broker ended with code {parts.broker.returncode}")
    if parts.linkbox is not None and parts.linkbox.pid is None:
        found.append("the link box's QEMU ended")
    if parts.userspace is not None and parts.userspace.poll() is not None:
        found.append(f"the link in user space ended with code {parts.userspace.returncode}")
    if found != parts.faults:
        parts.faults = found
        for fault in found:
            _say(fault)
        parts.publish()


def _forget_stdout() -> None:
    """Nobody reads our standard output once `up` has returned."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _take_down(parts: _Parts) -> None:
    for board in parts.boards.values():
        board.close()
    if parts.linkbox is not None:
        parts.linkbox.kill()
    if parts.userspace is not None:
        parts.userspace.terminate()
        parts.userspace.wait()
    if parts.broker is not None:
        parts.broker.kill()
        parts.broker.wait()
    for path in (parts.bench.broker_socket, _inner_socket(parts.bench), parts.bench.status_file):
        path.unlink(missing_ok=True)
    _say("virtual bench is down")


def main() -> int:
    """Entry of `python -m hil.virtual.supervisor`: configuration on standard input, errors on standard error."""
    try:
        run(VirtualBench.from_json(sys.stdin.read()), sys.stdout)
    except HilError as error:
        _say(str(error))
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
