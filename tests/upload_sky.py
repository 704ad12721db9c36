"""A flight over contacts of two minutes, without daemon, board and sky: for uploads by both protocols.

The board's SSH server and its CFDP receiver are real; the UDP line to it carries nothing between contacts.
"""

from __future__ import annotations

import hashlib
import json
import random
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hil.client.shell import ATTEMPT_S, KeptShell
from hil.drivers import cfdp
from hil.drivers.ssh import Shell
from hil.inference import onboard
from hil.model import LinkState, Span

RATE_BPS, CLOCK_RATE = 16e3, 150.0  # 2.4 Mbit/s of wall time: the file takes 1.1 s
CONTACT_S, GAP_S = 120.0, 5000.0
SIZE = 300_007


def prepare(directory: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board's directory as a mission finds it, a file of `SIZE` bytes to bring, and a UDP port that is free."""
    directory.mkdir()
    shutil.copy(str(onboard.__file__), directory / "onboard.py")
    source.write_bytes(random.Random(5).randbytes(SIZE))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(cfdp, "PORT", probe.getsockname()[1])


class Board:
    """What a step asks of `hil.client.Board`, over `dial(timeout_s)`; its console boots as soon as anybody looks."""

    def __init__(self, dial: Callable[[float], Shell]) -> None:
        self._kept = KeptShell("vb1", dial)
        self.payload_shell = dial
        self.reconnect, self.disconnect = self._kept.reconnect, self._kept.drop
        self.console = SimpleNamespace(mark=lambda: 7, expect=self._expect)
        self.cut: Exception | None = None  # its power was, and nobody has accepted it
        self.accepted = 0
        self.looked: list[int | None] = []
        self.attempt_s = ATTEMPT_S

    @property
    def shell(self) -> Any:
        if self.cut is not None:
            raise self.cut
        return self._kept.get(self.attempt_s)

    def accept_power_cut(self) -> None:
        self.cut = None
        self.accepted += 1
        self._kept.expect_boot()

    def _expect(self, pattern: str, timeout_s: float, *, since: int | None, death: object) -> Any:
        self.looked.append(since)
        return SimpleNamespace(t_mono=time.monotonic())


@dataclass(frozen=True)
class Pass:
    """A contact."""

    station: str
    aos_s: float
    los_s: float

    @property
    def duration_s(self) -> float:
        return self.los_s - self.aos_s


class Sky:
    """A flight over contacts of two minutes, and a UDP line that carries nothing between them."""

    def __init__(self, directory: Path, board: Any, source: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.progress: list[float] = []
        self.contacts = [Pass(f"s{n}", n * GAP_S, n * GAP_S + CONTACT_S) for n in range(1, 30)]
        self._at = (0.0, 1.0, time.monotonic())  # mission time and rate since
        self.silent = False
        self.power = "on"
        self.lost = self.sent_up = 0
        self.line, self._far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.line.bind(("127.0.0.1", 0))
        self._stop = threading.Event()
        self._relay = threading.Thread(target=self._carry, daemon=True)
        self._relay.start()
        timeline = SimpleNamespace(
            contacts=self.contacts,
            opening=lambda contact: Span(contact.aos_s, contact.los_s),
            contact_at=self.contact_at,
            environment=SimpleNamespace(orbit=SimpleNamespace(period_s=5400.0)),
            link_at=self.link_at,
            mean_rate_bps=lambda *_: RATE_BPS,
        )
        model = SimpleNamespace(file=source, sha256=hashlib.sha256(source.read_bytes()).hexdigest())
        file = SimpleNamespace(model=model, link=SimpleNamespace(acquisition_s=0.0))
        self.flying: Any = SimpleNamespace(
            board_name="vb1",
            board=board,
            type=SimpleNamespace(
                onboard_dir=str(directory),
                runtime_python=sys.executable,
                boot=SimpleNamespace(timeout_s=5.0, firmware="U-Boot", kernel="Starting", login="login:", death=()),
            ),
            journal=SimpleNamespace(path=directory.parent / "events.jsonl"),
            payload=SimpleNamespace(jump=(), broker=Path("payload.sock"), address="10.42.0.2"),
            mission=SimpleNamespace(path=Path("m.yaml"), file=file),
            timeline=timeline,
            flight=SimpleNamespace(
                state=lambda: {
                    "t_mission": self.now,
                    "rate": self._at[1],
                    "upload_bytes": 0.0,
                    "soc": 0.3,
                    "power": {"state": self.power},
                },
                clock=lambda rate, cause: self.clock(rate, cause),
                progress=lambda kind, value: self.progress.append(value),
            ),
            clock=self.clock,
            go_to=lambda t_s, cause: self.move(t_s, 1.0),
            wait=self.wait,
            event=lambda kind, **fields: self.events.append({"kind": kind, **fields}),
            say=lambda line: None,
            connect_payload_udp=self.connect,
        )

    @property
    def now(self) -> float:
        t_s, rate, since = self._at
        return t_s + (time.monotonic() - since) * rate

    def move(self, t_s: float, rate: float) -> None:
        self._at = (t_s, rate, time.monotonic())

    def clock(self, rate: float, cause: str) -> float:
        self.move(self.now, rate)
        return rate

    def wait(self, what: str, condition: Any, **_: Any) -> None:
        if "link" not in what:
            while not condition():
                time.sleep(0.01)
            return
        self.move(max(self.now, self.contact.aos_s), self._at[1])

    @property
    def contact(self) -> Pass:
        return next(contact for contact in self.contacts if contact.los_s > self.now)

    def contact_at(self, t_s: float) -> Pass | None:
        return next((contact for contact in self.contacts if contact.aos_s <= t_s < contact.los_s), None)

    def daemon_tells(self, kind: str) -> None:
        """An event of the daemon in the journal."""
        with self.flying.journal.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "on_mono": time.monotonic()}) + "\n")

    @property
    def up(self) -> bool:
        return any(contact.aos_s <= self.now < contact.los_s for contact in self.contacts)

    def link_at(self, t_s: float, scale: float = 1.0) -> dict[str, LinkState]:
        up = any(contact.aos_s <= t_s < contact.los_s for contact in self.contacts)
        state = LinkState(delay_s=0.002, rate_bps=RATE_BPS * scale) if up else LinkState(outage=True)
        return {"uplink": state, "downlink": state}

    def connect(self, port: int) -> socket.socket:
        self._far.connect(("127.0.0.1", port))
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(self.line.getsockname())
        return sock

    def counter(self) -> int:
        """What the ground has put on the line: waits for this relay, where a kernel's counter would not be behind."""
        while select.select([self.line], [], [], 0)[0]:
            time.sleep(0.005)
        time.sleep(0.01)
        return self.sent_up

    def _carry(self) -> None:
        ground = None
        while not self._stop.is_set():
            for sock in select.select([self.line, self._far], [], [], 0.05)[0]:
                try:
                    data, peer = sock.recvfrom(65536, socket.MSG_DONTWAIT)
                except (BlockingIOError, ConnectionRefusedError):  # nobody listens on the board
                    continue
                if sock is self.line:
                    ground = peer
                    self.sent_up += len(data) + cfdp.OVERHEAD_BYTES
                if self.silent or not self.up:
                    self.lost += 1
                elif sock is self._far and ground is not None:
                    self.line.sendto(data, ground)
                else:
                    try:
                        self._far.send(data)
                    except ConnectionRefusedError:
                        self.lost += 1

    def close(self) -> None:
        self._stop.set()
        self._relay.join()
        self.line.close()
        self._far.close()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]
