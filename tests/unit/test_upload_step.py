"""The upload step by both protocols: a real SSH server, a real CFDP receiver over UDP that contacts cut."""

from __future__ import annotations

import hashlib
import itertools
import random
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from console_board import ShellBoard
from pydantic import ValidationError
from test_ssh import BoardServer, connect, make_key, pin

from hil.campaign import fly, upload
from hil.client.console import Console
from hil.client.console_shell import ConsoleShell
from hil.drivers import cfdp
from hil.drivers.ssh import Detached
from hil.errors import BoardError, UsageError
from hil.inference import onboard
from hil.inventory.mission_steps import UploadStep
from hil.model import LinkState, Span

SIZE = 300_007
RATE_BPS, CLOCK_RATE = 16e3, 150.0  # 2.4 Mbit/s of wall time: the file takes 1.1 s
CONTACT_S, GAP_S = 120.0, 5000.0


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
        self.lost = self.sent_up = 0
        self.line, self._far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.line.bind(("127.0.0.1", 0))
        self._stop = threading.Event()
        self._relay = threading.Thread(target=self._carry, daemon=True)
        self._relay.start()
        timeline = SimpleNamespace(
            contacts=self.contacts,
            opening=lambda contact: Span(contact.aos_s, contact.los_s),
            link_at=self.link_at,
            mean_rate_bps=lambda *_: RATE_BPS,
        )
        model = SimpleNamespace(file=source, sha256=hashlib.sha256(source.read_bytes()).hexdigest())
        file = SimpleNamespace(model=model, link=SimpleNamespace(acquisition_s=0.0))
        self.flying: Any = SimpleNamespace(
            board_name="vb1",
            board=board,
            type=SimpleNamespace(onboard_dir=str(directory), runtime_python=sys.executable),
            payload=SimpleNamespace(jump=(), broker=Path("payload.sock"), address="10.42.0.2"),
            mission=SimpleNamespace(path=Path("m.yaml"), file=file),
            timeline=timeline,
            flight=SimpleNamespace(
                state=lambda: {"t_mission": self.now, "rate": self._at[1], "upload_bytes": 0.0},
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
        self.move(max(self.now, self.contact.aos_s), self._at[1])

    @property
    def contact(self) -> Pass:
        return next(contact for contact in self.contacts if contact.los_s > self.now)

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


@pytest.fixture
def board(tmp_path: Path) -> Iterator[BoardServer]:
    server = BoardServer(make_key(tmp_path / "host"), make_key(tmp_path / "id"))
    pin(tmp_path, server)
    yield server
    server.close()


@pytest.fixture
def sky(board: BoardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sky]:
    directory, source = tmp_path / "on-board", tmp_path / "model.bin"
    directory.mkdir()
    shutil.copy(str(onboard.__file__), directory / "onboard.py")
    source.write_bytes(random.Random(5).randbytes(SIZE))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(cfdp, "PORT", probe.getsockname()[1])
    monkeypatch.setattr(upload, "ASK_AGAIN_S", 0.1)
    with connect(board, tmp_path) as shell:
        client = SimpleNamespace(shell=shell, payload_shell=lambda timeout_s: connect(board, tmp_path, timeout_s))
        sky = Sky(directory, client, source)
        monkeypatch.setattr(
            upload.broker,
            "counters",
            lambda path: {"lo": {"tx_bytes": time.monotonic_ns()}, "payload0": {"tx_bytes": sky.counter()}},
        )
        yield sky
        sky.close()


def step(**keys: Any) -> UploadStep:
    return UploadStep.model_validate({"clock_rate": CLOCK_RATE, **keys})


def test_cfdp_brings_the_model_over_contacts_that_cut_it(sky: Sky, tmp_path: Path) -> None:
    upload.upload(sky.flying, step(protocol="cfdp"))
    assert (tmp_path / "on-board/model.gguf").read_bytes() == (tmp_path / "model.bin").read_bytes()
    assert not (tmp_path / "on-board/model.gguf.part").exists()
    windows, (done,) = sky.of("upload_window"), sky.of("upload_done")
    assert len(windows) >= 2
    assert [event["window"] for event in windows] == list(range(1, len(windows) + 1))
    assert [event["cut_by_los"] for event in windows] == [True] * (len(windows) - 1) + [False]
    assert {event["protocol"] for event in (*windows, done)} == {"cfdp"}
    for before, after in itertools.pairwise(windows):
        assert 0 < before["bytes_acked_end"] == after["bytes_acked_start"] < SIZE
    assert windows[-1]["bytes_acked_end"] == SIZE
    assert sum(event["bytes_sent"] - event["bytes_resent"] for event in windows) == SIZE
    assert done["bytes_sent"] == sum(event["bytes_sent"] for event in windows)
    for event in windows:
        at_most = RATE_BPS * CLOCK_RATE * CONTACT_S / CLOCK_RATE / 8
        assert event["bytes_sent"] < event["bytes_on_wire"] < 1.05 * at_most
    assert sum(event["bytes_on_wire"] for event in windows) == sky.sent_up
    assert sky.progress == sorted(sky.progress)
    assert sky.progress[-1] == SIZE
    assert len(sky.progress) >= 2
    assert (done["sha256_ok"], done["windows"], done["preloaded"]) == (True, len(windows), 0)
    assert len(sky.of("activated")) == 1
    assert_nobody_listens()


def assert_nobody_listens() -> None:
    deadline = time.monotonic() + 5
    while True:  # whoever was killed may need a moment to be gone
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind(("0.0.0.0", cfdp.PORT))
                return
            except OSError:
                assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_the_board_must_ask_for_again_is_counted(
    sky: Sky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss of signal a fifth early: what is sent into it is lost, named in the next contact and sent again."""
    early_s = CONTACT_S / 5
    sky.contacts[:] = [Pass(item.station, item.aos_s, item.los_s - early_s) for item in sky.contacts]
    monkeypatch.setattr(upload.steps, "SHORTEST_CONTACT_S", CONTACT_S - early_s)
    state = LinkState(delay_s=0.002, rate_bps=RATE_BPS * CLOCK_RATE)
    sky.flying.timeline.opening = lambda contact: Span(contact.aos_s, contact.los_s + early_s)
    sky.flying.timeline.link_at = lambda t_s, scale=1.0: {"uplink": state, "downlink": state}
    upload.upload(sky.flying, step(protocol="cfdp"))
    first, second = sky.of("upload_window")[:2]
    assert first["bytes_acked_end"] < first["bytes_sent"]
    assert second["bytes_resent"] >= 5_000
    assert second["retransmissions"] == pytest.approx(second["bytes_resent"] / 1383, abs=2)
    assert (tmp_path / "on-board/model.gguf").read_bytes() == (tmp_path / "model.bin").read_bytes()


def test_sftp_writes_down_the_same(sky: Sky, tmp_path: Path) -> None:
    upload.upload(sky.flying, step())
    (window,), (done,) = sky.of("upload_window"), sky.of("upload_done")
    assert (window["protocol"], done["protocol"]) == ("sftp", "sftp")
    assert (window["bytes_acked_start"], window["bytes_acked_end"], window["bytes_sent"]) == (0, SIZE, SIZE)
    assert (window["bytes_resent"], window["retransmissions"], window["cut_by_los"]) == (0, 0, False)
    fields = set(window), set(done)
    sky.events.clear()
    sky.flying.flight.state = lambda: {"t_mission": sky.now, "rate": sky._at[1], "upload_bytes": float(SIZE)}
    sky.progress.clear()
    upload.upload(sky.flying, step(protocol="cfdp"))
    assert (set(sky.of("upload_window")[0]), set(sky.of("upload_done")[0])) == fields
    assert min(sky.progress) > SIZE, "what a second upload brings comes on top"
    assert sky.progress[-1] == 2 * SIZE


def test_a_board_that_was_never_heard_ends_the_upload(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "SILENCE_S", 0.3)
    sky.silent = True
    with pytest.raises(BoardError, match=r"the CFDP entity on board vb1 runs, but nothing of it came") as caught:
        upload.upload(sky.flying, step(protocol="cfdp"))
    assert f"UDP port {cfdp.PORT} of 10.42.0.2" in caught.value.hint
    assert sky.of("activated") == []
    assert_nobody_listens()


def test_a_receiver_that_is_gone_is_told_from_a_silent_line(sky: Sky, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "SILENCE_S", 0.3)
    start = cfdp.start_receiver

    def start_and_kill(*args: Any, **options: Any) -> Detached:
        job = start(*args, **options)
        job.kill(sky.flying.board.shell)
        return job

    monkeypatch.setattr(cfdp, "start_receiver", start_and_kill)
    with pytest.raises(BoardError, match="the CFDP entity on board vb1 ended with status 137") as caught:
        upload.upload(sky.flying, step(protocol="cfdp"))
    assert "sftp" in caught.value.hint
    shutil.rmtree(Path(sky.flying.type.onboard_dir) / ".cfdp")  # as a reboot of a board with a tmpfs leaves it
    carrier = upload.Cfdp(sky.flying)
    carrier._job = Detached(str(Path(sky.flying.type.onboard_dir) / ".cfdp"), ("python3",))
    assert "there is no CFDP entity on board vb1 any more" in carrier._silence().message


def test_a_board_without_a_python_for_it_says_so(sky: Sky) -> None:
    sky.flying.type.runtime_python = "/usr/bin/python2.7-not-there"
    with pytest.raises(BoardError, match=r"the CFDP receiver does not start: .*not-there") as caught:
        upload.upload(sky.flying, step(protocol="cfdp"))
    assert "3.10 or newer" in caught.value.hint


def test_what_cannot_be_flown_is_refused(sky: Sky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="preload_bytes needs protocol: sftp"):
        step(protocol="cfdp", preload_bytes=1)
    sky.flying.payload.jump = (object(),)
    with pytest.raises(UsageError, match="no jump host"):
        upload.upload(sky.flying, step(protocol="cfdp"))
    mission: Any = SimpleNamespace(file=SimpleNamespace(steps=[SimpleNamespace(upload=step(protocol="cfdp"))]))
    fly.check_protocols(mission)
    monkeypatch.setattr(cfdp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="cfdp-py") as caught:
        fly.check_protocols(mission)
    assert "protocol: sftp" in caught.value.hint


def test_the_receiver_starts_over_a_console_too(tmp_path: Path) -> None:
    archive = cfdp.archive(tmp_path / "cfdp.pyz")
    with ShellBoard() as terminal:
        shell: Any = ConsoleShell.connect(Console.on_port(terminal.path), 10, sys.executable)
        job = cfdp.start_receiver(shell, str(archive), str(tmp_path), port=0, python=sys.executable)
        assert job.poll(shell) is None
        job.kill(shell)
        assert job.poll(shell) == 137
        shell.close()
