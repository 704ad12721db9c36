"""Uploads to an OpenSSH server that is killed in the middle and comes up in another boot, and through a jump host."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sshd
from sshd import Sshd
from upload_sky import SIZE, Board, Sky, prepare

from hil.campaign import upload
from hil.drivers import cfdp
from hil.drivers.ssh import Shell
from hil.errors import HilError
from hil.inventory.mission_steps import UploadStep


class Machine:
    """A board's SSH server that can lose its power. What is in `directory` is its disk."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.boots = 0
        self.server: Sshd | None = None
        self._running = contextlib.ExitStack()
        self.boot()

    def boot(self) -> None:
        self.boots += 1
        port = None if self.server is None else self.server.port
        serving = sshd.serve(self.directory, port=port, boot_id=f"boot-{self.boots}")
        self.server = self._running.enter_context(serving)

    def cut(self) -> None:
        """Without power: the server and all that was started over it; back a moment later."""
        self._running.close()
        with contextlib.suppress(OSError):
            os.killpg(int((self.directory / "on-board/.cfdp/group").read_text().split()[0]), signal.SIGKILL)
        threading.Timer(0.5, self.boot).start()

    def connect(self, timeout_s: float, **options: Any) -> Shell:
        assert self.server is not None
        return self.server.connect(timeout_s=timeout_s, **options)

    def close(self) -> None:
        self._running.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    try:
        sshd.find()
    except HilError as error:
        pytest.skip(f"no OpenSSH server here, and none can be fetched: {error.message}")
    machine = Machine(tmp_path / "machine")
    yield machine
    machine.close()


@contextlib.contextmanager
def over(board: Board, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sky]:
    directory, source = machine.directory / "on-board", tmp_path / "model.bin"
    prepare(directory, source, monkeypatch)
    monkeypatch.setattr(upload, "ASK_AGAIN_S", 0.2)
    monkeypatch.setattr(upload, "TELL_S", 0.0)
    monkeypatch.setattr(cfdp, "KEEP_S", 0.05)
    sky = Sky(directory, board, source)
    sky.flying.payload.broker = None
    sky.flying.type.boot.timeout_s = 30.0
    try:
        yield sky
    finally:
        sky.close()
        board.disconnect()


@pytest.mark.parametrize("protocol", ["sftp", "cfdp"])
def test_a_power_cut_in_an_upload_does_not_end_it(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(upload, "SILENCE_S", 0.5)
    with over(Board(machine.connect), machine, tmp_path, monkeypatch) as sky:
        tell = sky.flying.flight.progress

        def progress(kind: str, value: float) -> None:
            tell(kind, value)
            if value >= 120_000 and machine.boots == 1:
                machine.cut()

        sky.flying.flight.progress = progress
        # SFTP is as fast as this host: a contact of 12 s. CFDP keeps to the rate, 2.4 Mbit/s at 150.
        rate = 10.0 if protocol == "sftp" else 150.0
        asked = {"protocol": protocol, "clock_rate": rate, "chunk_bytes": 1 << 15, "max_contacts": 25}
        upload.upload(sky.flying, UploadStep.model_validate(asked))
        assert machine.boots == 2
        (rebooted,), (done,) = sky.of("upload_rebooted"), sky.of("upload_done")
        assert (rebooted["cause"], rebooted["protocol"]) == ("reboot", protocol)
        assert rebooted["bytes_acked"] >= 120_000
        assert (done["reboots"], done["sha256_ok"]) == (1, True)
        windows = sky.of("upload_window")
        assert sum(event["bytes_acked_end"] - event["bytes_acked_start"] for event in windows) == SIZE
        assert sum(event["bytes_sent"] - event["bytes_resent"] for event in windows) == SIZE
    assert (machine.directory / "on-board/model.gguf").read_bytes() == (tmp_path / "model.bin").read_bytes()


def test_a_whole_upload_through_a_jump_host(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Management and payload both: another server stands between, and without it nothing gets through."""
    (tmp_path / "gate").mkdir()
    with sshd.serve(tmp_path / "gate") as gate:
        board = Board(lambda timeout_s: machine.connect(timeout_s, jump=[gate.login]))
        with over(board, machine, tmp_path, monkeypatch) as sky:
            upload.upload(sky.flying, UploadStep.model_validate({"clock_rate": 10.0, "max_contacts": 25}))
            assert sky.of("upload_done")[0]["sha256_ok"]
            assert len(sky.of("activated")) == 1
            before = gate.log.read_text().count("Accepted publickey for board")
            assert before >= 2
            board.payload_shell(20.0).close()
            assert gate.log.read_text().count("Accepted publickey for board") == before + 1
    assert (machine.directory / "on-board/model.gguf").read_bytes() == (tmp_path / "model.bin").read_bytes()
