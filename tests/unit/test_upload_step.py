"""The upload step by both protocols: a real SSH server, a real CFDP receiver over UDP that contacts cut."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from console_board import ShellBoard
from pydantic import ValidationError
from test_ssh import BoardServer, make_key, pin
from upload_sky import CLOCK_RATE, CONTACT_S, RATE_BPS, SIZE, Board, Pass, Sky, prepare

from hil.campaign import fly, reboots, upload
from hil.campaign.pace import Pace
from hil.client.console import Console
from hil.client.console_shell import ConsoleShell
from hil.drivers import cfdp
from hil.drivers.ssh import Detached, Shell, ShellLost
from hil.errors import BenchError, BoardError, UsageError
from hil.inventory.mission_steps import UploadStep
from hil.model import Completed, LinkState, Span


@pytest.fixture
def board(tmp_path: Path) -> Iterator[BoardServer]:
    server = BoardServer(make_key(tmp_path / "host"), make_key(tmp_path / "id"))
    pin(tmp_path, server)
    yield server
    server.close()


@pytest.fixture
def sky(board: BoardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sky]:
    directory, source = tmp_path / "on-board", tmp_path / "model.bin"
    prepare(directory, source, monkeypatch)
    monkeypatch.setattr(upload, "ASK_AGAIN_S", 0.1)
    known, key = tmp_path / "known_hosts", tmp_path / "id"

    def dial(timeout_s: float) -> Shell:  # without the helper: it would ask this host which boot it is in
        return Shell.connect(
            "127.0.0.1", board.port, "root", key, known, timeout_s=timeout_s, sndbuf=65536, python=None
        )

    client = Board(dial)
    sky = Sky(directory, client, source)
    monkeypatch.setattr(
        upload.broker,
        "counters",
        lambda path: {"lo": {"tx_bytes": time.monotonic_ns()}, "payload0": {"tx_bytes": sky.counter()}},
    )
    yield sky
    sky.close()
    client.disconnect()


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
    deadline = time.monotonic() + 20
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
    upload.upload(sky.flying, step(clock_rate=10.0))  # a contact of twelve seconds: nothing cuts it
    (window,), (done,) = sky.of("upload_window"), sky.of("upload_done")
    assert (window["protocol"], done["protocol"]) == ("sftp", "sftp")
    assert (window["bytes_acked_start"], window["bytes_acked_end"], window["bytes_sent"]) == (0, SIZE, SIZE)
    assert (window["bytes_resent"], window["cut_by_los"]) == (0, False)
    fields = set(window), set(done)
    sky.events.clear()
    state = sky.flying.flight.state
    sky.flying.flight.state = lambda: {**state(), "upload_bytes": float(SIZE)}
    sky.progress.clear()
    upload.upload(sky.flying, step(protocol="cfdp"))
    assert (set(sky.of("upload_window")[0]), set(sky.of("upload_done")[0])) == fields
    assert min(sky.progress) > SIZE, "what a second upload brings comes on top"
    assert sky.progress[-1] == 2 * SIZE


def reboot(board: BoardServer, loses: Callable[[], None]) -> None:
    """The board goes down, `loses` what it does, and is up in another boot."""
    loses()
    board.boot_id = "boot-2"
    BoardServer.cut(board)


def reboot_at(board: BoardServer, count: int, loses: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the board has written `count` bytes that came over SFTP."""
    board.cut_at = board.written + count

    def cut() -> None:
        if board.boot_id == "boot-1":
            board.cut_at = None
            reboot(board, loses)

    monkeypatch.setattr(board, "cut", cut)


def assert_whole(sky: Sky, tmp_path: Path) -> None:
    assert (tmp_path / "on-board/model.gguf").read_bytes() == (tmp_path / "model.bin").read_bytes()
    windows = sky.of("upload_window")
    assert sum(event["bytes_acked_end"] - event["bytes_acked_start"] for event in windows) == SIZE
    assert windows[-1]["bytes_acked_end"] == SIZE
    assert len(sky.of("activated")) == 1


def test_sftp_goes_on_after_a_reboot_where_the_file_is_proven_good(
    sky: Sky, board: BoardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, good = tmp_path / "on-board/model.gguf.part", 3 * (1 << 15)

    def loses() -> None:
        with part.open("r+b") as file:
            file.seek(good + 100)
            file.write(bytes(10_000))  # a hole
        (tmp_path / "on-board/onboard.py").write_bytes(b"")

    reboot_at(board, 150_000, loses, monkeypatch)
    upload.upload(sky.flying, step(chunk_bytes=1 << 15, clock_rate=10))
    first, second = sky.of("upload_window")[:2]
    (rebooted,), (done,) = sky.of("upload_rebooted"), sky.of("upload_done")
    assert (rebooted["cause"], rebooted["bytes_acked"]) == ("reboot", first["bytes_acked_end"])
    assert "proven good" in rebooted["goes_on"]
    assert (first["cut_by_los"], first["complete"], first["after_reboot"]) == (False, False, False)
    assert second["after_reboot"]
    assert second["bytes_lost"] == first["bytes_acked_end"] - good
    assert second["bytes_resent"] >= second["bytes_lost"]
    assert done["reboots"] == 1
    assert_whole(sky, tmp_path)


@pytest.mark.parametrize("kept", [True, False])
def test_cfdp_goes_on_after_a_reboot(
    sky: Sky, board: BoardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    for name, value in (("TELL_S", 0.0), ("SILENCE_S", 0.3)):
        monkeypatch.setattr(upload, name, value)
    monkeypatch.setattr(cfdp, "KEEP_S", 0.05)
    state = tmp_path / "on-board/.cfdp-state.json"

    def loses() -> None:
        os.killpg(int((tmp_path / "on-board/.cfdp/group").read_text().split()[0]), signal.SIGKILL)
        assert_nobody_listens()
        if not kept:
            state.unlink()

    tell = sky.flying.flight.progress

    def progress(kind: str, value: float) -> None:
        tell(kind, value)
        if value >= 150_000 and board.boot_id == "boot-1":
            reboot(board, loses)

    sky.flying.flight.progress = progress
    upload.upload(sky.flying, step(protocol="cfdp"))
    windows, (rebooted,) = sky.of("upload_window"), sky.of("upload_rebooted")
    (after,) = [event for event in windows if event["after_reboot"]]
    confirmed = rebooted["bytes_acked"]
    assert confirmed >= 150_000
    if kept:
        at = int(rebooted["goes_on"].removeprefix("the transaction is continued at byte "))
        assert 0 < at <= confirmed
        assert after["bytes_lost"] == confirmed - at
    else:
        assert "a new transaction from byte 0 (nothing to take up: FileNotFoundError" in rebooted["goes_on"]
        assert after["bytes_lost"] == confirmed
    assert sum(event["bytes_resent"] for event in windows) >= after["bytes_lost"]
    assert sum(event["bytes_sent"] - event["bytes_resent"] for event in windows) == SIZE
    assert_whole(sky, tmp_path)
    assert not state.exists()
    assert_nobody_listens()


@pytest.mark.parametrize("durable", [True, False])
def test_a_reboot_behind_a_whole_file_is_looked_into(sky: Sky, tmp_path: Path, durable: bool) -> None:
    """A board whose directory is in its memory has lost the file, and the program that would have activated it."""
    directory = tmp_path / "on-board"
    with contextlib.closing(upload.Cfdp(sky.flying)) as carrier:
        (directory / "model.gguf.part").write_bytes((tmp_path / "model.bin").read_bytes())
        carrier._send._user.finished = SimpleNamespace(condition_code=SimpleNamespace(name="NO_ERROR"))
        assert carrier.complete
        if not durable:
            shutil.rmtree(directory)
        (directory / "onboard.py").unlink(missing_ok=True)
        told = carrier.resume()
        assert told == (
            "the file was complete" if durable else "a new transaction from byte 0 (the complete file is gone)"
        )
        assert carrier.complete == durable
        assert (carrier._job is None) == durable
        assert (directory / "onboard.py").exists()


@pytest.mark.parametrize("when", ["before", "after", "always"])
def test_a_reboot_in_the_activation_begins_it_again(
    sky: Sky, board: BoardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before the file is in service, or when it is and nobody heard so; not for ever."""
    run, downs = Shell.run, 0

    def goes_down(self: Shell, argv: Sequence[str], *args: Any, **options: Any) -> Completed:
        nonlocal downs
        if "activate" in argv and (downs == 0 or when == "always"):
            downs += 1
            if when == "after":
                run(self, argv, timeout_s=20, check=True)
            (tmp_path / "on-board/onboard.py").unlink()
            board.boot_id = f"boot-{1 + downs}"
            BoardServer.cut(board)
        return run(self, argv, *args, **options)

    monkeypatch.setattr(Shell, "run", goes_down)
    if when == "always":
        with pytest.raises(ShellLost):
            upload.upload(sky.flying, step(clock_rate=10))
        assert (downs, sky.of("activated")) == (upload.ACTIVATIONS, [])
        return
    upload.upload(sky.flying, step(clock_rate=10))
    (rebooted,), (done,) = sky.of("upload_rebooted"), sky.of("upload_done")
    assert (rebooted["goes_on"], done["reboots"]) == ("the activation is begun again", 1)
    assert_whole(sky, tmp_path)


def test_a_shed_load_in_an_upload_is_waited_for(
    sky: Sky, board: BoardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loses() -> None:
        sky.daemon_tells("load_shed")
        sky.power = "shed"
        sky.flying.board.cut = BenchError("the power of board vb1 was cut")
        threading.Timer(0.3, restored).start()

    def restored() -> None:
        sky.daemon_tells("load_restored")
        sky.power = "on"

    reboot_at(board, 100_000, loses, monkeypatch)
    upload.upload(sky.flying, step(clock_rate=10))
    (rebooted,), (boot,) = sky.of("upload_rebooted"), sky.of("boot")
    assert rebooted["cause"] == "load shed"
    assert boot["cause"] == "load restored"
    assert sky.flying.board.looked == [7, None, None], "the console is read from before the cut"
    assert sky.flying.board.accepted == 1
    assert_whole(sky, tmp_path)


def test_a_link_that_fails_in_one_boot_is_no_reboot(sky: Sky, board: BoardServer) -> None:
    board.cut_at = 100_000
    with pytest.raises(BoardError, match="payload link of vb1 failed before loss of signal"):
        upload.upload(sky.flying, step(clock_rate=10))
    assert sky.of("upload_rebooted") == []


def test_a_board_that_stays_down_ends_the_upload(sky: Sky, board: BoardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    sky.flying.type.boot.timeout_s = sky.flying.board.attempt_s = 0.4
    monkeypatch.setattr(reboots, "ASK_S", 1.0)  # of a server that is gone nothing comes, not even a refusal
    reboot_at(board, 100_000, board.stop_listening, monkeypatch)
    with pytest.raises(BoardError, match=r"vb1 went down and was not back after 0\.4 s"):
        upload.upload(sky.flying, step(clock_rate=10))


def test_a_power_cut_that_is_no_load_shed_ends_the_upload(
    sky: Sky, board: BoardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loses() -> None:
        sky.flying.board.cut = BenchError("the power of board vb1 was cut: requested")

    reboot_at(board, 100_000, loses, monkeypatch)
    with pytest.raises(BenchError, match="was cut: requested"):
        upload.upload(sky.flying, step(clock_rate=10))


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
    board: Any = SimpleNamespace(cfdp_receiver=None)
    fly.check_protocols(mission, board, Pace())
    monkeypatch.setattr(cfdp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="cfdp-py") as caught:
        fly.check_protocols(mission, board, Pace())
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
