"""Virtual benches and flights for tests: ports of their own, a supply asked by plain socket, `hil` as a process."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import prometheus
import pytest
import yaml
from host import free_ports

from hil.bench.journal import read_events
from hil.inventory import Bench, load_bench
from hil.virtual import supervisor
from hil.virtual.config import virtual_bench

ROOT = Path(__file__).resolve().parents[2]
HIL = Path(sys.executable).with_name("hil")
SHORT = ROOT / "fixtures/missions/short.yaml"

T = TypeVar("T")
Change = Callable[[dict[str, Any]], object]


def until(condition: Callable[[], T], timeout_s: float, what: str) -> T:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain for {what}"
        time.sleep(0.05)
    return value


def write_bench(directory: Path, name: str, change: Change = lambda content: None) -> Path:
    """The shipped virtual bench with ports of its own; `change` may alter the file's content."""
    text = (ROOT / "fixtures/benches/virtual.yaml").read_text()
    metrics, *ports = free_ports(4)
    for shipped, port in zip(("15025", "15122", "15022"), ports, strict=True):
        assert shipped in text
        text = text.replace(shipped, str(port))
    content = yaml.safe_load(text) | {"name": name, "board_types": str(ROOT / "boards"), "metrics_port": metrics}
    change(content)
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def write_mission(directory: Path, name: str, change: Change = lambda content: None) -> Path:
    """The short mission, altered."""
    content = yaml.safe_load(SHORT.read_text())
    content["name"] = name
    content["orbit"]["tle"] = str((SHORT.parent / content["orbit"]["tle"]).resolve())
    change(content)
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@contextmanager
def bench_up(path: Path) -> Iterator[Bench]:
    """A virtual bench that is up, and down again at the end whatever happened."""
    bench = load_bench(path)
    config = virtual_bench(bench)
    supervisor.up(config)
    try:
        yield bench
    finally:
        stop_daemon(bench)
        supervisor.down(config)
        shutil.rmtree(bench.runtime_dir)


def stop_daemon(bench: Bench) -> None:
    """End the bench's daemon, if one runs."""
    from hil.client import attach
    from hil.client.http import DaemonGone

    try:
        with attach(bench, start=False) as daemon:
            daemon.stop(force=True)
    except DaemonGone:
        pass


def ask_supply(bench: Bench, *questions: str) -> list[str]:
    """What the supply itself says, asked through a plain socket: nothing of hil in between."""
    wire = bench.file.supplies["psu1"]
    with socket.create_connection((wire.host, wire.port), timeout=5) as sock, sock.makefile() as answers:
        sock.sendall("".join(f"{question}\n" for question in questions).encode())
        return [answers.readline().strip() for _ in questions]


def is_on(bench: Bench) -> bool:
    """Whether the supply feeds the board."""
    return ask_supply(bench, ":OUTP? CH1") == ["ON"]


def assert_off(bench: Bench) -> None:
    """The supply says that channel 1 is off, and measures next to nothing there."""
    state, volts = ask_supply(bench, ":OUTP? CH1", ":MEAS:VOLT? CH1")
    assert state == "OFF"
    assert float(volts) < 0.6


def has_netem(bench: Bench) -> bool:
    """Whether the link box shapes anything, by its own `tc` through plain ssh."""
    link = bench.file.links["box1"]
    command = ["ssh", "-i", link.key, "-p", str(link.port), "-o", f"UserKnownHostsFile={link.known_hosts}"]
    command += ["-o", "BatchMode=yes", f"{link.user}@{link.host}", "tc qdisc show"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    assert "qdisc" in shown
    return "netem" in shown


def assert_safe(bench: Bench) -> None:
    """Off by the supply's own word, link as it was, nobody holds the board."""
    from hil.client import attach

    assert_off(bench)
    if bench.file.links:
        assert not has_netem(bench)
    with attach(bench) as daemon:
        assert daemon.leases() == []
        assert daemon.status()["boards"]["vb1"]["state"] == "off"


def verdict(run: Path) -> dict[str, Any]:
    """verdict.json of a run."""
    value: dict[str, Any] = json.loads((run / "verdict.json").read_text())
    return value


def row(run: Path, name: str) -> dict[str, Any]:
    """One criterion of it."""
    return next(item for item in verdict(run)["criteria"] if item["name"] == name)


class Fly:
    """`hil mission fly` as a process, as a person would run it."""

    def __init__(self, bench: Bench, mission: Path, runs: Path) -> None:
        self.bench = bench
        self.began_s = time.time()
        self._runs = runs
        self._log = runs.with_name(f"{runs.name}.log")
        argv = [HIL, "mission", "fly", mission, "--bench", bench.path, "--runs", runs]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        """Its output so far."""
        return self._log.read_text()

    @property
    def run(self) -> Path:
        """The run directory, as soon as there is one."""
        return self._until(lambda: next((path.parent for path in self._runs.glob("*/events.jsonl")), None), 30, "a run")

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """The journal so far."""
        return [event for event in read_events(self.run / "events.jsonl") if not kinds or event["kind"] in kinds]

    def reaches(self, step: str, timeout_s: float) -> None:
        """Wait until a step of the mission has begun."""
        self._until(
            lambda: any(event["step"] == step for event in self.events("step_started")), timeout_s, f"step {step}"
        )

    def wait(self, timeout_s: float) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hil mission fly still runs after {timeout_s:g} s:\n{self.said}")

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.interrupt()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)

    def __enter__(self) -> Fly:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _until(self, condition: Callable[[], T | None], timeout_s: float, what: str) -> T:
        def check() -> T | None:
            ended = self.process.poll()
            value = condition()
            assert value or ended is None, f"it ended with {ended} before {what}:\n{self.said}"
            return value

        found = until(check, timeout_s, what)
        assert found is not None
        return found


@dataclass(frozen=True)
class Airborne:
    """The shared short flight under way, and the Prometheus that scrapes its daemon all along."""

    bench: Bench
    fly: Fly
    server: prometheus.Prometheus


@dataclass(frozen=True)
class Flown:
    """The shared short flight after its end: its exit code, its record, and Prometheus with what it scraped."""

    bench: Bench
    run: Path
    exit_code: int
    said: str
    server: prometheus.Prometheus
    began_s: float
    ended_s: float
