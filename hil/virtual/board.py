"""The virtual board: QEMU's `virt` machine behind supply channels; outputs on start it, any output off kills it.

Its power demand is the CPU time its process really used, mapped through the board type's idle and full-load watts:
modelled, and labelled so, but it rises when the board works and only then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hil.drivers.broker import die_with_parent
from hil.errors import BenchError
from hil.virtual.artefacts import disk_errors, find_tool, require_tools, run_tool
from hil.virtual.images import MGMT_MAC_PREFIX, PAYLOAD_MAC_PREFIX, uboot_environment, write_environment_flash

STANDBY_W = 0.5
"""Drawn by a board whose output is on but which shut itself down."""

_WINDOW_S = 0.05
"""CPU time is averaged over at least this long: shorter windows see the scheduler, not the load."""

_TRANSLATION_MIB = 128
"""QEMU's cache of translated code; its default would be a quarter of the board's memory, which is more than it uses."""


@dataclass(frozen=True, slots=True)
class BoardConfig:
    """One virtual board. `payload` is its payload address with prefix length; `payload_socket` where the link box (or
    hub) listens, None for a board without that wire. Watts and cores are the board type's `modelled_power`."""

    name: str
    runtime: Path
    state: Path
    master_disk: Path
    uboot_flash: Path
    mgmt_port: int
    payload: str = "10.42.0.2/24"
    gateway: str = "10.42.0.1"
    payload_socket: Path | None = None
    memory_mib: int = 1024
    cpus: int = 2
    idle_w: float = 5.0
    full_w: float = 15.0
    full_cpu_cores: float = 1.0

    @property
    def disk(self) -> Path:
        """The board's own writable disk; survives power cuts and `hil virtual down`."""
        return self.state / f"{self.name}.disk.img"

    @property
    def environment_flash(self) -> Path:
        """The board's flash chip that holds U-Boot's environment; writable by `saveenv`."""
        return self.state / f"{self.name}.env.img"

    @property
    def console_socket(self) -> Path:
        """Where QEMU finds its console listener."""
        return self.runtime / f"{self.name}.console.sock"

    @property
    def log(self) -> Path:
        """What QEMU itself says, for example that a port is taken."""
        return self.state / f"{self.name}.qemu.log"


def payload_mac(bench: str, board: str) -> str:
    """MAC of a board's payload port: stable, distinct for each board of a bench. The prefix tells the ports apart."""
    return _mac(PAYLOAD_MAC_PREFIX, bench, board)


def _mac(prefix: str, *parts: str) -> str:
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return f"{prefix}:{digest[0]:02x}:{digest[1]:02x}"


def prepare(config: BoardConfig, *, fresh: bool = False) -> list[str]:
    """Make the board's disk and environment flash when absent, outdated or `fresh`; returns what was done, for a log.

    A disk is outdated when the master image changed. Raises BenchError when the disk is full.
    """
    require_tools("qemu-system-aarch64", "mkenvimage")
    environment = uboot_environment(config.name, config.payload, config.gateway)
    marks = {config.disk: str(config.master_disk), config.environment_flash: environment}
    record = config.state / f"{config.name}.made.json"
    try:
        made = json.loads(record.read_text())
    except (OSError, ValueError):
        made = {}
    done = []
    for path, mark in marks.items():
        if path.is_file() and made.get(path.name) == mark and not fresh:
            continue
        made.pop(path.name, None)
        _replace_json(record, made)
        if path == config.disk:
            partial = path.with_name(f".{path.name}.new")
            with disk_errors(f"copying {config.name}'s disk", config.state):
                run_tool(["cp", "--sparse=always", "--reflink=auto", config.master_disk, partial], "copying the disk")
                partial.chmod(0o600)
                partial.replace(path)
        else:
            write_environment_flash(path, environment)
        made[path.name] = mark
        _replace_json(record, made)
        done.append(f"{config.name}: new {path.name}")
    return done


def _replace_json(path: Path, value: object) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(value))
    fresh.replace(path)


def qemu_argv(config: BoardConfig, bench: str) -> list[str]:
    """The command line of the board's QEMU."""
    forward = f"hostfwd=tcp:127.0.0.1:{config.mgmt_port}-10.0.2.15:22"
    argv = ["qemu-system-aarch64", "-name", f"hil-{bench}-{config.name}", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-M", "virt", "-accel", f"tcg,thread=multi,tb-size={_TRANSLATION_MIB}"]
    # near the A78AE of an Orin; QEMU's `max` emulates pointer authentication too and boots half as fast
    argv += ["-cpu", "cortex-a76", "-smp", str(config.cpus), "-m", str(config.memory_mib)]
    argv += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={config.uboot_flash}"]
    argv += ["-drive", f"if=pflash,unit=1,format=raw,file={config.environment_flash}"]
    # raw and writeback: a write that the guest saw completed is in the host's page cache and survives the SIGKILL that
    # is our power cut; what the guest had not written yet is lost, as on a disk without a volatile cache. The guest's
    # flushes reach the host's disk, so a power cut of the host keeps the file system whole too.
    argv += ["-drive", f"if=none,id=disk,format=raw,cache=writeback,discard=unmap,file={config.disk}"]
    argv += ["-device", "virtio-blk-device,drive=disk", "-device", "virtio-rng-device"]
    argv += ["-netdev", f"user,id=mgmt,restrict=on,ipv6=off,{forward}"]
    argv += ["-device", f"virtio-net-device,netdev=mgmt,mac={_mac(MGMT_MAC_PREFIX, bench, config.name)}"]
    if config.payload_socket is not None:
        argv += ["-netdev", f"stream,id=payload,server=off,addr.type=unix,addr.path={config.payload_socket}"]
        argv += ["-device", f"virtio-net-device,netdev=payload,mac={payload_mac(bench, config.name)}"]
    argv += ["-chardev", f"socket,id=console,path={config.console_socket},server=off", "-serial", "chardev:console"]
    return argv


class VirtualBoard:
    """What the inputs of a board feed (`hil.virtual.inputs`). Use it from the main thread: QEMU is told to die with the
    thread it starts in."""

    def __init__(self, config: BoardConfig, bench: str, changed: Callable[[str], None] = lambda _: None) -> None:
        self.config = config
        self.power_on_count = 0
        self._bench = bench
        self._changed = changed
        self._powered = False
        self._process: subprocess.Popen[bytes] | None = None
        self._sample: tuple[float, float] | None = None  # (supply clock, CPU seconds)
        self._watts = 0.0

    @property
    def powered(self) -> bool:
        """Whether the supply feeds the board, over all its inputs."""
        return self._powered

    @property
    def pid(self) -> int | None:
        """Process id of the board's QEMU while it runs; one whose power was cut is as good as dead at once."""
        return self._process.pid if self._powered and self._process and self._process.poll() is None else None

    def set_powered(self, on: bool) -> None:
        """Start QEMU, or kill it with SIGKILL: anything gentler would hide what a power cut does."""
        if on == self._powered:
            return
        self._powered = on
        if on:
            self._start()
        elif self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._changed(f"{self.config.name}: power {'on' if on else 'cut'}")

    def power_w(self, now_s: float) -> float:
        """Watts now: idle plus the share of full load that QEMU's CPU time stands for, at most full load."""
        process = self._process
        if not self._powered or process is None:
            return 0.0
        if self._sample is not None and now_s - self._sample[0] < _WINDOW_S:
            return self._watts
        try:
            cpu_s = process_cpu_s(process.pid) if process.poll() is None else None
        except OSError:
            cpu_s = None
        if cpu_s is None:
            if self._watts != STANDBY_W:
                self._changed(f"{self.config.name}: QEMU ended by itself with code {process.returncode}")
            self._sample, self._watts = (now_s, 0.0), STANDBY_W
            return STANDBY_W
        config = self.config
        if self._sample is not None:
            cores = max(0.0, cpu_s - self._sample[1]) / (now_s - self._sample[0])
            self._watts = config.idle_w + (config.full_w - config.idle_w) * min(cores / config.full_cpu_cores, 1.0)
        self._sample = (now_s, cpu_s)
        return self._watts

    def close(self) -> None:
        """Cut the power and wait until the process is gone."""
        self.set_powered(False)
        self._reap()

    def last_words(self) -> str:
        """The last lines QEMU itself wrote, for an error message."""
        try:
            return "\n".join(self.config.log.read_text(errors="replace").splitlines()[-5:])
        except OSError:
            return ""

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._reap()  # a killed QEMU holds its disk's lock for a few milliseconds more
        argv = qemu_argv(self.config, self._bench)
        program = find_tool(argv[0])
        if program is None:
            raise BenchError(f"{argv[0]} is not installed", hint="sudo apt-get install qemu-system-arm")
        self.power_on_count += 1
        self._sample, self._watts = None, self.config.idle_w
        with self.config.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(os.getpid()),  # no thread holds a lock here: one-threaded supervisor
            )


def process_cpu_s(pid: int) -> float:
    """CPU seconds a process used so far, to the nanosecond (its ticks in /proc have 10 ms). OSError when it is gone."""
    return time.clock_gettime(~pid << 3 | 2)
