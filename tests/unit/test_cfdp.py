"""CFDP class 2 between two real entities over UDP: losses of every kind, outages between contacts, refusals."""

from __future__ import annotations

import binascii
import contextlib
import importlib.util
import itertools
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastcrc
import pytest

from hil.drivers import cfdp, cfdp_entity
from hil.drivers.cfdp import CfdpUpload, start_receiver
from hil.drivers.ssh import Detached, ShellTimeout
from hil.drivers.ssh.detached import _LEAD, _START
from hil.errors import BoardError, UsageError
from hil.model import Completed

EOF, FINISHED, ACK, METADATA, NAK, PROMPT, KEEP_ALIVE = 4, 5, 6, 7, 8, 9, 12
UP, DOWN = True, False
Drop = Callable[[bool, int | None], bool]  # (towards the board, directive or None for file data) -> lost
AGAIN_S = 0.15


class Link:
    """A receiver on a thread, and a UDP relay in front of it that loses what `drop` says."""

    def __init__(self, directory: Path, drop: Drop) -> None:
        self.drop = drop
        self.outage = threading.Event()
        self.lost = 0
        self._directory = directory
        self.receiver = self._start()
        self._board, self._near, self._far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3))
        for sock in (self._board, self._near):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            sock.bind(("127.0.0.1", 0))
        self._far.connect(self._board.getsockname())
        self._stop, self._settled = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._relay, self._receive)]
        for thread in self._threads:
            thread.start()

    def _start(self) -> cfdp_entity.Receiver:
        state = self._directory / "state.json"
        return cfdp_entity.Receiver(self._directory, AGAIN_S, tell_s=0.02, state=state, keep_s=0.02)

    def reboot(self) -> tuple[int, int] | None:
        """The receiver is gone with all it had in memory; another one takes up what it finds."""
        self.settle()
        self.receiver = self._start()
        known = self.receiver.resume()
        self._settled.clear()
        self._threads[1] = threading.Thread(target=self._receive, daemon=True)
        self._threads[1].start()
        return known

    def socket(self) -> socket.socket:
        """A ground socket; another one a contact, as after another acquisition."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(self._near.getsockname())
        return sock

    def _relay(self) -> None:
        ground = None
        while not self._stop.is_set():
            for sock in select.select([self._near, self._far], [], [], 0.05)[0]:
                if sock is self._near:
                    data, ground = self._near.recvfrom(65536)
                else:
                    data = self._far.recv(65536)
                directive = None if data[0] >> 4 & 1 else data[cfdp._header(data)]
                if self.outage.is_set() or self.drop(sock is self._near, directive):
                    self.lost += 1
                elif sock is self._near:
                    self._far.send(data)
                elif ground is not None:
                    self._near.sendto(data, ground)

    def _receive(self) -> None:
        while not self._settled.is_set() and not self.receiver.done:
            peer = self._far.getsockname()
            answers: list[bytes] = []
            if select.select([self._board], [], [], 0.02)[0]:
                answers += self.receiver.datagram(self._board.recv(65536))
            answers += self.receiver.tick()
            for answer in answers:
                self._board.sendto(answer, peer)
        self.receiver.files.close()

    def wait(self) -> None:
        """Until the receiver has ended by itself."""
        self._threads[1].join(5)
        assert self.receiver.done

    def settle(self) -> None:
        """End the receiver, whatever it would still say; its file is closed."""
        self._settled.set()
        self._threads[1].join()

    def close(self) -> None:
        self._stop.set()
        self._settled.set()
        for thread in self._threads:
            thread.join()
        for sock in (self._board, self._near, self._far):
            sock.close()


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    between = Link(tmp_path, lambda up, directive: False)
    yield between
    between.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(3).randbytes(200_003))
    return path


def send(link: Link, source: Path, target: Path, **options: float) -> CfdpUpload:
    upload = CfdpUpload(source, str(target), ask_again_s=AGAIN_S)
    with link.socket() as sock:
        upload.run(sock, rate_bps=options.get("rate_bps", 20e6), silence_s=10)
    return upload


def test_a_file_arrives(link: Link, source: Path, tmp_path: Path) -> None:
    upload = send(link, source, tmp_path / "target")
    assert upload.complete
    link.wait()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    (contact,) = upload.contacts
    assert (contact.sent_bytes, contact.resent_bytes, contact.naks) == (200_003, 0, 0)
    pdus = -(-200_003 // (cfdp_entity.MAX_PDU_BYTES - 17))
    assert contact.wire_bytes >= 200_003 + pdus * (13 + cfdp.OVERHEAD_BYTES)


@pytest.mark.parametrize("seed", range(3))
def test_a_lossy_link_costs_repetition_only(link: Link, source: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    link.drop = lambda up, directive: chance.random() < 0.15
    upload = send(link, source, tmp_path / "target")
    assert upload.complete
    link.drop = lambda up, directive: False
    assert (tmp_path / "target").stat().st_size == 200_003
    link.settle()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    (contact,) = upload.contacts
    assert contact.sent_bytes - contact.resent_bytes == 200_003
    assert 0 < contact.resent_bytes < 200_003
    assert contact.resent_bytes / cfdp_entity.MAX_PDU_BYTES < contact.resent_pdus <= contact.resent_bytes


@pytest.mark.parametrize(("up", "directive"), [(UP, METADATA), (UP, EOF), (DOWN, ACK), (DOWN, FINISHED), (UP, ACK)])
@pytest.mark.parametrize("times", [1, 3])
def test_a_lost_directive_is_made_good(
    link: Link, source: Path, tmp_path: Path, up: bool, directive: int, times: int
) -> None:
    """Each of them in turn, its first one or the first three: the transaction ends all the same."""
    seen = [0]

    def drop(towards_board: bool, kind: int | None) -> bool:
        if (towards_board, kind) != (up, directive):
            return False
        seen[0] += 1
        return seen[0] <= times

    link.drop = drop
    assert send(link, source, tmp_path / "target").complete
    link.settle()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert seen[0] > 0


def test_a_gap_and_a_lost_acknowledgement_of_the_end(link: Link, source: Path, tmp_path: Path) -> None:
    """The receiver waits for a gap to be filled when the EOF comes again: the library alone would not answer it."""
    lost = {"data": 0, "ack": 0}

    def drop(up: bool, directive: int | None) -> bool:
        if up and directive is None and lost["data"] < 5:
            lost["data"] += 1
            return True
        if not up and directive in (ACK, NAK) and lost["ack"] < 4:
            lost["ack"] += 1
            return True
        return False

    link.drop = drop
    assert send(link, source, tmp_path / "target").complete
    link.settle()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_contacts_with_outages_between(link: Link, source: Path, tmp_path: Path) -> None:
    """Each contact ends in loss of signal while the sender still sends; timers run out many times in between."""
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    for count in range(20):
        link.outage.clear()
        stop = threading.Event()
        los = [threading.Timer(0.25, link.outage.set), threading.Timer(0.3, stop.set)]
        for timer in los:
            timer.start()
        with link.socket() as sock:
            contact = upload.run(sock, rate_bps=2e6, stop=stop, silence_s=10)
        for timer in los:
            timer.cancel()
        if contact.complete:
            break
        assert count < 15
        time.sleep(2 * AGAIN_S)
    assert upload.complete
    assert len(upload.contacts) >= 3
    assert sum(contact.sent_bytes - contact.resent_bytes for contact in upload.contacts) == 200_003
    assert upload.contacts[0].start_offset == 0
    for before, after in itertools.pairwise(upload.contacts):
        assert before.start_offset <= before.offset == after.start_offset
    assert upload.contacts[-1].offset == 200_003
    assert link.lost > 5
    link.settle()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_the_file_is_on_the_disk_before_the_ground_hears_that_it_is_whole(source: Path, tmp_path: Path) -> None:
    receiver = cfdp_entity.Receiver(tmp_path, AGAIN_S)
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        sender = threading.Thread(target=lambda: upload.run(near, rate_bps=50e6), daemon=True)
        sender.start()
        finished = False
        while not finished:
            for answer in receiver.datagram(far.recv(65536)):
                if answer[cfdp._header(answer)] == FINISHED:
                    finished = True
                    assert (tmp_path / "target").read_bytes() == source.read_bytes()
                far.send(answer)
        sender.join()
    assert upload.complete


def test_the_rate_is_kept(source: Path, tmp_path: Path) -> None:
    """Never exceeded; nearly reached in the best of some, because a busy host slows everybody down."""
    for _ in range(5):
        with contextlib.closing(Link(tmp_path, lambda up, directive: False)) as link:
            (contact,) = send(link, source, tmp_path / "target", rate_bps=2e6).contacts
        at_least_s = contact.wire_bytes * 8 / 2e6
        assert at_least_s * 0.95 < contact.duration_s
        if contact.duration_s < at_least_s * 1.5 + 0.5:
            break
    assert contact.duration_s < at_least_s * 1.5 + 0.5


def test_a_file_outside_the_directory_is_refused(link: Link, source: Path, tmp_path: Path) -> None:
    with pytest.raises(BoardError, match="FILESTORE_REJECTION"):
        send(link, source, tmp_path.parent / "elsewhere")
    assert not (tmp_path.parent / "elsewhere").exists()


def test_nobody_there_ends_in_silence(source: Path, tmp_path: Path) -> None:
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, socket.socket(type=socket.SOCK_DGRAM) as sock:
        silent.bind(("127.0.0.1", 0))
        sock.connect(silent.getsockname())
        contact = upload.run(sock, rate_bps=50e6, silence_s=0.3)
    assert not contact.complete
    assert contact.duration_s < 5


def test_a_new_transaction_replaces_an_abandoned_one(link: Link, source: Path, tmp_path: Path) -> None:
    first = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    stop = threading.Event()
    with link.socket() as sock:
        first.run(sock, rate_bps=5e6, stop=stop, on_progress=lambda offset: stop.set() if offset > 60_000 else None)
    assert 60_000 < first.offset < first.total
    source.write_bytes(random.Random(4).randbytes(50_000))
    assert send(link, source, tmp_path / "target").complete
    link.settle()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def send_until(upload: CfdpUpload, link: Link, offset: int) -> None:
    stop = threading.Event()
    with link.socket() as sock:
        upload.run(sock, rate_bps=5e6, stop=stop, on_progress=lambda at: stop.set() if at > offset else None)


def test_a_transaction_goes_on_after_a_reboot_from_what_is_on_the_disk(
    link: Link, source: Path, tmp_path: Path
) -> None:
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    send_until(upload, link, 80_000)
    sent, confirmed = upload.sent_to, upload.offset
    link.settle()
    kept = json.loads((tmp_path / "state.json").read_text())["offset"]
    with (tmp_path / "target").open("r+b") as torn:
        torn.truncate(kept)  # what was not synced is gone
    known = link.reboot()
    assert known is not None
    assert known[1] == kept
    assert upload.take_up(known)
    assert 0 < known[1] == upload.offset <= max(confirmed, known[1]) <= sent
    with link.socket() as sock:
        contact = upload.run(sock, rate_bps=20e6, silence_s=10)
    assert contact.complete
    assert contact.start_offset == known[1]
    # What the line's buffer kept for the new receiver need not be sent again: it is not the whole that is.
    assert contact.resent_bytes <= sent - known[1] + cfdp_entity.MAX_PDU_BYTES
    link.settle()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_a_reboot_right_behind_the_acknowledgement_of_the_end(source: Path, tmp_path: Path) -> None:
    """The ground has sent all and has the receipt of the end: only a receiver that kept it asks for what is lacking."""

    def receiver() -> cfdp_entity.Receiver:
        return cfdp_entity.Receiver(tmp_path, AGAIN_S, state=tmp_path / "state.json")

    upload, stop, lost = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S), threading.Event(), 0
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def contact() -> threading.Thread:
        thread = threading.Thread(target=lambda: upload.run(near, rate_bps=50e6, stop=stop), daemon=True)
        thread.start()
        return thread

    with near, far:
        sender, before, receipt = contact(), receiver(), None
        while receipt is None:
            data = far.recv(65536)
            if data[0] >> 4 & 1 and lost < 3:
                lost += 1
                continue
            receipt = next((item for item in before.datagram(data) if item[cfdp._header(item)] == ACK), None)
            if receipt is None:
                list(before.tick())  # the board is cut with its acknowledgement: it does not get to this any more
        before.files.close()
        far.send(receipt)
        stop.set()
        sender.join()
        assert upload.sent_to == upload.total
        after = receiver()
        assert upload.take_up(after.resume())
        stop.clear()
        sender, deadline = contact(), time.monotonic() + 10
        while not upload.complete:  # its last word may be lost in a full queue: nobody is left to say it again
            assert time.monotonic() < deadline, "neither the end nor a gap is known there"
            heard = select.select([far], [], [], 0.01)[0]
            for answer in [*(after.datagram(far.recv(65536)) if heard else ()), *after.tick()]:
                far.send(answer)
        sender.join()
    assert upload.complete
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_what_is_not_this_transaction_is_not_taken_up(link: Link, source: Path, tmp_path: Path) -> None:
    state, target = tmp_path / "state.json", tmp_path / "target"
    assert link.receiver.resume() is None
    upload = CfdpUpload(source, str(target), ask_again_s=AGAIN_S)
    assert not upload.take_up((upload._handler.transaction_seq_num.value, 0)), "nothing was sent yet"
    send_until(upload, link, 80_000)
    link.settle()
    kept = state.read_text()
    another = CfdpUpload(source, str(target), ask_again_s=AGAIN_S)
    known = link.reboot()
    assert known is not None
    assert not another.take_up(known)
    for broken in ("", "{}", "[]", kept[:40], kept.replace('"metadata": "', '"metadata": "ff')):
        link.settle()
        state.write_text(broken)
        assert link.reboot() is None
    link.settle()
    state.write_text(kept)
    target.write_bytes(b"short")
    assert link.reboot() is None


def test_the_ground_asks_a_receiver_that_does_not_know_where_it_is_now(source: Path, tmp_path: Path) -> None:
    receiver = cfdp_entity.Receiver(tmp_path, AGAIN_S)
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=0.05)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        stop = threading.Event()
        sender = threading.Thread(target=lambda: upload.run(near, rate_bps=50e6, stop=stop), daemon=True)
        sender.start()
        prompts = 0
        # Each contact begins so, and goes on so, when all was sent.
        while prompts < 2 or upload.sent_to < upload.total:
            data = far.recv(65536)
            prompt = not data[0] >> 4 & 1 and data[cfdp._header(data)] == PROMPT
            answers = list(receiver.datagram(data))
            if prompt:
                (answer,) = answers
                assert answer[cfdp._header(answer)] == KEEP_ALIVE
                prompts += 1
            else:
                for item in answers:
                    if item[cfdp._header(item)] == ACK:
                        far.send(item)  # of the end of the file; nothing more comes down
        stop.set()
        sender.join()
    assert upload.sent_to == upload.total


def test_a_receiver_that_is_gone_ends_the_contact(source: Path, tmp_path: Path) -> None:
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    quiet = [0.0]
    with socket.socket(type=socket.SOCK_DGRAM) as silent, socket.socket(type=socket.SOCK_DGRAM) as sock:
        silent.bind(("127.0.0.1", 0))
        sock.connect(silent.getsockname())

        def rate() -> float:  # an outage in the contact is no sign of it
            quiet[0] = quiet[0] or time.monotonic()
            return 0.0 if time.monotonic() - quiet[0] < 0.4 else 1e5

        contact = upload.run(sock, rate_bps=rate, deaf_s=0.2)
    assert contact.duration_s > 0.4
    assert upload.sent_to < upload.total


def test_gaps_of_an_abandoned_transaction_are_forgotten(link: Link, source: Path, tmp_path: Path) -> None:
    first = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    link.drop = lambda up, directive: not up or (directive is None and random.random() < 0.5)
    with link.socket() as sock:
        first.run(sock, rate_bps=20e6, silence_s=0.2)
    link.drop = lambda up, directive: False
    source.write_bytes(random.Random(4).randbytes(50_000))
    assert send(link, source, tmp_path / "target").complete
    link.settle()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_what_is_there_without_a_gap_is_told_while_the_file_still_goes_up(
    link: Link, source: Path, tmp_path: Path
) -> None:
    """The request for the first gap is lost: it is asked for again, and not only behind the end of the file."""
    seen, lost, stop = [], {"data": 0, "nak": 0}, threading.Event()

    def drop(up: bool, directive: int | None) -> bool:
        kind = "data" if up and directive is None else "nak" if directive == NAK else None
        if kind is None or lost[kind]:
            return False
        lost[kind] += 1
        return True

    def progress(offset: int) -> None:
        seen.append(offset)
        if offset > 100_000:
            stop.set()

    link.drop = drop
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    with link.socket() as sock:
        contact = upload.run(sock, rate_bps=1.5e6, stop=stop, on_progress=progress)
    assert lost == {"data": 1, "nak": 1}
    assert seen == sorted(set(seen))
    assert (contact.start_offset, contact.offset, contact.complete) == (0, seen[-1], False)
    assert 100_000 < contact.offset <= contact.sent_bytes - contact.resent_bytes < 200_003
    assert contact.resent_pdus >= 1
    link.settle()
    assert (tmp_path / "target").read_bytes()[: contact.offset] == source.read_bytes()[: contact.offset]


def test_the_receiver_waits_for_a_ground_that_is_behind_the_horizon(source: Path, tmp_path: Path) -> None:
    receiver = cfdp_entity.Receiver(tmp_path, 0.002, tell_s=0.001)
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        stop = threading.Event()
        sender = threading.Thread(target=lambda: upload.run(near, rate_bps=50e6, stop=stop), daemon=True)
        sender.start()
        while receiver.user.finished is None:
            list(receiver.datagram(far.recv(65536)))  # nothing of what it answers goes down
        stop.set()
        sender.join()
        while select.select([far], [], [], 0)[0]:  # a full queue would lose the ground's last word
            far.recv(65536)
        for _ in range(100):  # its word that the file is whole, again and again
            time.sleep(0.003)
            told = list(receiver.tick())
            assert not receiver.done
        assert told
        answers = threading.Thread(target=upload.run, args=(near,), kwargs={"rate_bps": 50e6}, daemon=True)
        answers.start()
        while not receiver.done:
            for answer in receiver.tick():
                far.send(answer)
            if select.select([far], [], [], 0.005)[0]:
                for answer in receiver.datagram(far.recv(65536)):
                    far.send(answer)
        answers.join()
    assert upload.complete


def test_a_socket_that_is_shut_down_ends_the_upload(link: Link, source: Path, tmp_path: Path) -> None:
    upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
    with link.socket() as sock:
        hang_up = threading.Timer(0.1, sock.shutdown, (socket.SHUT_RDWR,))
        hang_up.start()
        with pytest.raises(BoardError, match="hung up"):
            upload.run(sock, rate_bps=1e6)


def test_a_rate_of_nothing_is_silence(link: Link, source: Path, tmp_path: Path) -> None:
    upload, stop = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S), threading.Event()
    threading.Timer(0.2, stop.set).start()
    with link.socket() as sock:
        assert upload.run(sock, rate_bps=lambda: 0.0, stop=stop).wire_bytes == 0
        assert upload.run(sock, rate_bps=lambda: 50e6).complete


def test_noise_on_the_port_is_ignored(link: Link, source: Path, tmp_path: Path) -> None:
    for data in (b"", b"\0", b"hello", bytes(20), os.urandom(1400)):
        assert list(link.receiver.datagram(data)) == []
    assert send(link, source, tmp_path / "target").complete


def test_the_archive_receives_with_nothing_installed(source: Path, tmp_path: Path) -> None:
    """As a board runs it: its own interpreter, isolated, without the packages of this environment."""
    pyz = cfdp.archive(tmp_path / "cfdp.pyz")
    assert pyz.stat().st_size < 1_000_000
    argv = [sys.executable, "-I", "-S", str(pyz), "receive", "--host", "127.0.0.1", "--port", "0"]
    argv += ["--directory", str(tmp_path), "--ask-again-s", str(AGAIN_S)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as board:
        assert board.stdout is not None
        try:
            port = json.loads(board.stdout.readline())["ready"]
            upload = CfdpUpload(source, str(tmp_path / "target"), ask_again_s=AGAIN_S)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(("127.0.0.1", port))
                assert upload.run(sock, rate_bps=50e6, silence_s=10).complete
            assert json.loads(board.stdout.readline()) == {"finished": "NO_ERROR"}
            assert board.wait(10) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                board.kill()
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_the_measured_rate_of_a_receiver_has_its_disk_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk that takes 100 s to sync nothing is quick, by a clock that only the disk moves far."""
    measure = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/cfdp_receiver.py"))["main"]
    clock, on_disk = [0.0], [0.0]

    def fsync(descriptor: int) -> None:
        on_disk[0] += 100.0

    def monotonic() -> float:
        clock[0] += 1e-3
        return clock[0] + on_disk[0]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(measure.__globals__, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setitem(measure.__globals__, "SPAN_S", 0.5)
    measure(str(cfdp.archive(tmp_path / "cfdp.pyz")))
    told = json.loads(capsys.readouterr().out)
    assert told["value"] < 500 * 8 * 1500 / 100
    assert [path.name for path in tmp_path.iterdir()] == ["cfdp.pyz"]


class LocalShell:
    """Runs what a board would; its line fails at the words `fails_at`."""

    name = "here"

    def __init__(self, fails_at: str) -> None:
        self._fails_at = fails_at

    def run(self, argv: list[str], timeout_s: float = 20.0, *, check: bool = False) -> Completed:
        if self._fails_at in " ".join(argv):
            raise ShellTimeout("the line is down")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=check)
        return Completed(tuple(argv), done.stdout, done.stderr, done.returncode, 0.0)


def _runs(word: str) -> bool:
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in process.read_bytes():
                return True
    return False


@pytest.mark.parametrize("fails_at", ["cat /", "test -d"])
def test_a_receiver_whose_start_is_not_seen_is_not_left_there(tmp_path: Path, fails_at: str) -> None:
    shell: Any = LocalShell(fails_at)
    pyz = tmp_path / "mute.pyz"
    pyz.write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(ShellTimeout, match="the line is down"):
        start_receiver(shell, str(pyz), str(tmp_path), python=sys.executable)
    assert (tmp_path / ".cfdp/status").read_text() == "137\n"
    deadline = time.monotonic() + 5
    while _runs(str(pyz)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_output_of_a_detached_command_is_there_as_soon_as_it_is_left_alone(tmp_path: Path) -> None:
    """And is its own, not what an earlier one said."""
    where = tmp_path / "job"
    where.mkdir()
    (where / "stdout").write_text("ready, said the one before")
    before, begins, _ = _START.partition("{ cd -")
    assert begins
    subprocess.run(["sh", "-c", before, "sh", str(where), "true"], check=True)
    assert [(where / name).read_text() for name in ("stdout", "stderr")] == ["", ""]


def test_a_detached_command_leads_a_group_without_setsid(tmp_path: Path) -> None:
    """As over the console of a small system, whose shell every command belongs to."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "mkdir", "rm", "mv", "sleep"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    (tools / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tools / "python3").chmod(0o755)
    where = tmp_path / "job"
    argv = ["sh", "-c", _LEAD, "sh", _START, str(where), "sleep", "60"]
    subprocess.run(argv, env={"PATH": str(tools)}, check=True, timeout=20)
    group = int((where / "group").read_text().split()[0])
    assert group not in (os.getpgid(0), os.getpid())
    shell: Any = LocalShell("nothing of it")
    job = Detached(str(where), ("sleep", "60"))
    assert job.poll(shell) is None
    job.kill(shell)
    assert job.poll(shell) == 137


def test_a_system_that_cannot_make_a_group_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "sh").symlink_to(shutil.which("sh") or "")
    argv = ["sh", "-c", _LEAD, "sh", _START, str(tmp_path / "job"), "true"]
    done = subprocess.run(argv, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (127, "neither setsid nor python3 is on the PATH\n")
    assert not (tmp_path / "job").exists()


def test_a_group_of_an_earlier_boot_is_a_stranger_by_now(tmp_path: Path) -> None:
    """Its number was kept on the disk, and belongs to another service after the reboot."""
    shell: Any = LocalShell("nothing of it")
    job = Detached.start(shell, ["sleep", "60"], str(tmp_path / "job"))
    group, boot = (tmp_path / "job/group").read_text().split()
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / "job/group").write_text(f"{group} another-boot\n")
    with pytest.raises(BoardError, match="gone without a status"):
        job.poll(shell)
    job.kill(shell)
    assert _runs(job.directory)
    os.killpg(int(group), signal.SIGKILL)


def test_the_crcs_of_the_archive_are_those_of_fastcrc() -> None:
    names: dict[str, object] = {}
    exec(cfdp._CRC, names)
    crc32, crc16 = names["crc32"], names["crc16"]
    for data in (b"", b"123456789", os.urandom(1000)):
        assert crc32.iso_hdlc(data) == fastcrc.crc32.iso_hdlc(data)  # type: ignore[attr-defined]
        assert crc32.iso_hdlc(data, 7) == fastcrc.crc32.iso_hdlc(data, 7)  # type: ignore[attr-defined]
        assert crc16.ibm_3740(data) == fastcrc.crc16.ibm_3740(data)  # type: ignore[attr-defined]
    assert binascii.crc32(b"123456789") == 0xCBF43926  # the catalogue's check value


def test_without_the_extra_the_message_says_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="cfdp-py") as raised:
        CfdpUpload(source, "target")
    assert "hil[cfdp]" in raised.value.hint
