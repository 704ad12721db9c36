"""SSH to a board against a real SSH server in this process: commands, limits, pins, uploads cut at any place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from paramiko.buffered_pipe import PipeTimeout
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, MSG_CHANNEL_REQUEST, OPEN_SUCCEEDED
from typing_extensions import Buffer

from hil.client.shell import KeptShell, Rebooted
from hil.drivers.ssh import SftpError, Shell, ShellLost, ShellTimeout, Upload, sftp, transfer
from hil.drivers.ssh import shell as shell_module
from hil.drivers.ssh.inbox import Inbox
from hil.errors import BenchError, BoardError
from hil.inference import onboard

ONBOARD = str(Path(onboard.__file__))
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"

SFTP_OK, SFTP_FAILURE = 0, 4

# ---------------------------------------------------------------------------------------------------------------------
# A board's SSH server: commands run in /bin/sh here, files are written here


class BoardServer:
    """Serves on a port of 127.0.0.1 until closed. Its faults are attributes."""

    def __init__(self, host_key: Path, client_key: Path) -> None:
        self.host_key = paramiko.Ed25519Key(filename=str(host_key))
        self.allowed = paramiko.Ed25519Key(filename=str(client_key))
        self.boot_id = "boot-1"
        self.mute = threading.Event()  # commands are taken and never answered
        self.cut_at: int | None = None  # connection dies when this many bytes are written
        self.written = 0
        self.full_at: int | None = None
        self.transports: list[paramiko.Transport] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                transport = paramiko.Transport(sock)
                transport.add_server_key(self.host_key)
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files, board=self)
                self.transports.append(transport)
                policy = _Policy(self)
                policy.answer_first(transport)
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=policy, event=threading.Event())

    def cut(self) -> None:
        """Every connection dies at once."""
        for transport in self.transports:
            assert isinstance(transport.sock, socket.socket)
            with contextlib.suppress(OSError):
                transport.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.packetizer.close()
            transport.sock.close()

    def stop_listening(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # `close` alone leaves the waiting `accept` one more
        self.listener.close()

    def close(self) -> None:
        self.mute.clear()
        self.stop_listening()
        for transport in self.transports:
            transport.close()


class _Policy(paramiko.ServerInterface):
    def __init__(self, board: BoardServer) -> None:
        self.board = board
        self._commands: list[threading.Thread] = []

    def answer_first(self, transport: paramiko.Transport) -> None:
        """Start commands when their requests are answered: one that ends before that looks refused."""
        handle = transport._channel_handler_table[MSG_CHANNEL_REQUEST]

        def answer(channel: paramiko.Channel, message: paramiko.Message) -> None:
            handle(channel, message)
            while self._commands:
                self._commands.pop().start()

        transport._channel_handler_table = {**transport._channel_handler_table, MSG_CHANNEL_REQUEST: answer}

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL if key == self.board.allowed else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        threading.Thread(target=self._answer_http, daemon=True).start()
        return OPEN_SUCCEEDED

    def _answer_http(self) -> None:
        channel = self.board.transports[-1].accept(5)
        assert channel is not None
        channel.sendall(b"echo " + channel.recv(100))
        channel.close()

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        while self.board.mute.is_set() and not channel.closed:
            time.sleep(0.01)
        self._commands.append(threading.Thread(target=self._run, args=(channel, command.decode()), daemon=True))
        return True

    def _run(self, channel: paramiko.Channel, command: str) -> None:
        if command.endswith(f"exec {BOOT_ID} </dev/null"):
            command = f"echo {self.board.boot_id}"
        process = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # as sshd does
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdin is not None

        def pump_in(pipe: object) -> None:
            with contextlib.suppress(OSError, ValueError), process.stdin:  # type: ignore[union-attr]
                while data := channel.recv(4096):
                    process.stdin.write(data)  # type: ignore[union-attr]
                    process.stdin.flush()  # type: ignore[union-attr]

        def pump_err() -> None:
            with contextlib.suppress(OSError):
                while data := process.stderr.read1(65536):  # type: ignore[union-attr]
                    channel.sendall_stderr(data)

        threads = [threading.Thread(target=pump_in, args=(None,), daemon=True), threading.Thread(target=pump_err)]
        for thread in threads:
            thread.start()
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            while data := process.stdout.read1(65536):  # type: ignore[attr-defined]
                channel.sendall(data)
            threads[1].join()
            channel.send_exit_status(process.wait() & 0xFF)
            channel.close()


class _Files(paramiko.SFTPServerInterface):
    def __init__(self, server: paramiko.ServerInterface, board: BoardServer) -> None:
        super().__init__(server)
        self.board = board

    def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle | int:
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)
        return _File(self.board, descriptor)


class _File(paramiko.SFTPHandle):
    def __init__(self, board: BoardServer, descriptor: int) -> None:
        super().__init__()
        self.board, self.descriptor, self.dead = board, descriptor, False

    def write(self, offset: int, data: Buffer) -> int:
        data, full_at = bytes(data), self.board.full_at
        if self.dead or (full_at is not None and full_at <= offset < full_at + 16_000):
            return SFTP_FAILURE
        if self.board.cut_at is not None and self.board.written >= self.board.cut_at:
            self.dead = True  # what it received and did not write yet is lost with the connection
            self.board.cut()
            return SFTP_FAILURE
        os.pwrite(self.descriptor, data, offset)
        self.board.written += len(data)
        return SFTP_OK

    def stat(self) -> paramiko.SFTPAttributes:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self.descriptor))

    def chattr(self, attr: paramiko.SFTPAttributes) -> int:
        assert attr.st_size is not None
        os.ftruncate(self.descriptor, attr.st_size)
        return SFTP_OK

    def close(self) -> None:
        os.close(self.descriptor)


def make_key(path: Path) -> Path:
    key = Ed25519PrivateKey.generate()
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.OpenSSH, plain))
    return path


@pytest.fixture
def board(tmp_path: Path) -> Iterator[BoardServer]:
    server = BoardServer(make_key(tmp_path / "host"), make_key(tmp_path / "id"))
    pin(tmp_path, server)
    yield server
    server.close()


def pin(tmp_path: Path, server: BoardServer) -> None:
    line = f"[127.0.0.1]:{server.port} ssh-ed25519 {server.host_key.get_base64()}\n"
    (tmp_path / "known_hosts").write_text(line)


def connect(board: BoardServer, tmp_path: Path, timeout_s: float = 5) -> Shell:
    return Shell.connect(
        "127.0.0.1", board.port, "root", tmp_path / "id", tmp_path / "known_hosts", timeout_s=timeout_s, sndbuf=65536
    )


@pytest.fixture
def shell(board: BoardServer, tmp_path: Path) -> Iterator[Shell]:
    with connect(board, tmp_path) as connected:
        yield connected


# ---------------------------------------------------------------------------------------------------------------------
# Connecting


def test_an_unknown_host_key_is_refused(board: BoardServer, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").write_text("")
    with pytest.raises(BenchError, match="no pinned host key") as raised:
        connect(board, tmp_path)
    assert "hil board trust" in raised.value.hint


def test_another_host_key_is_refused(board: BoardServer, tmp_path: Path) -> None:
    board.host_key = paramiko.Ed25519Key(filename=str(make_key(tmp_path / "other")))
    with pytest.raises(BenchError, match="another host key than the one pinned") as raised:
        connect(board, tmp_path)
    assert "hil board trust" in raised.value.hint


def test_a_key_the_board_does_not_accept_is_the_benchs_fault(board: BoardServer, tmp_path: Path) -> None:
    make_key(tmp_path / "id")
    with pytest.raises(BenchError, match="does not accept the key"):
        connect(board, tmp_path)


def test_files_that_are_missing_are_named(board: BoardServer, tmp_path: Path) -> None:
    (tmp_path / "known_hosts").unlink()
    with pytest.raises(BenchError, match="known_hosts: no such file"):
        connect(board, tmp_path)


def test_a_board_that_does_not_listen_is_the_boards_fault(board: BoardServer, tmp_path: Path) -> None:
    board.stop_listening()
    with pytest.raises(BoardError, match="refused"):
        connect(board, tmp_path)


def test_a_silent_server_ends_in_a_time_out(tmp_path: Path, board: BoardServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        board.port = silent.getsockname()[1]
        pin(tmp_path, board)
        began = time.monotonic()
        with pytest.raises(ShellTimeout, match=r"no answer within 0\.3 s"):
            connect(board, tmp_path, timeout_s=0.3)
        assert time.monotonic() - began < 15


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_arguments_arrive_as_they_are(shell: Shell) -> None:
    words = ["a b", "$HOME", "'", '"', "*", ";", "", "\\", "ü\n"]
    done = shell.run(["printf", "<%s>", *words], 5)
    assert done.stdout == "".join(f"<{word}>" for word in words)
    assert (done.stderr, done.returncode, done.argv[0]) == ("", 0, "printf")


def test_streams_and_status_are_kept_apart(shell: Shell) -> None:
    done = shell.run(["sh", "-c", "echo out; echo err >&2; exit 3"], 5)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)
    with pytest.raises(BoardError, match=r"ended with status 3\n  err"):
        shell.run(["sh", "-c", "echo err >&2; exit 3"], 5, check=True)
    assert shell.run(["no-such-program"], 5).returncode == 127


def test_more_output_than_the_window_holds(shell: Shell) -> None:
    done = shell.run(["sh", "-c", "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2"], 10)
    assert (len(done.stdout), len(done.stderr)) == (3_000_000, 3_000_000)


def test_a_command_out_of_time_is_killed_with_its_children(shell: Shell, tmp_path: Path) -> None:
    marker = tmp_path / "pids"
    script = f"sleep 60 & echo $$ $! >{marker}; wait"
    began = time.monotonic()
    with pytest.raises(ShellTimeout, match="did not end in time and was killed"):
        shell.run(["sh", "-c", script], 1.0)
    assert time.monotonic() - began < 20
    deadline = time.monotonic() + 15
    for pid in marker.read_text().split():
        while _alive(int(pid)):
            assert time.monotonic() < deadline, f"{pid} still runs"
            time.sleep(0.01)
    assert shell.run(["echo", "still here"], 5).stdout == "still here\n"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_never_answers_hangs_nobody(
    board: BoardServer, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell_module, "_GRACE_S", 0.2)
    board.mute.set()
    began = time.monotonic()
    with pytest.raises(ShellTimeout):
        shell.run(["true"], 0.2)
    assert time.monotonic() - began < 15
    assert not shell.alive


def test_a_connection_that_dies_in_mid_command_is_lost(board: BoardServer, shell: Shell) -> None:
    threading.Timer(0.2, board.cut).start()
    began = time.monotonic()
    with pytest.raises(ShellLost, match="sleep 30"):
        shell.run(["sleep", "30"], 20)
    assert time.monotonic() - began < 15
    with pytest.raises(ShellLost):
        shell.run(["true"], 1)


def test_abort_frees_a_waiting_call(shell: Shell) -> None:
    threading.Timer(0.2, shell.abort).start()
    with pytest.raises(ShellLost):
        shell.run(["sleep", "30"], 20)


def test_a_process_beside_the_calls(shell: Shell) -> None:
    process = shell.start(["cat"])
    process.write(b"hello\n", 15)
    assert process.read(15) == b"hello\n"
    assert process.running
    assert _alive(process.pid)
    process.kill()
    deadline = time.monotonic() + 15
    while _alive(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert shell.start(["sh", "-c", "echo done; exit 4"]).wait(5).returncode == 4


def test_the_guard_is_asked_before_a_call_and_explains_a_failed_one(board: BoardServer, tmp_path: Path) -> None:
    asked: list[int] = []
    bench: list[BenchError] = []

    def guard() -> None:
        asked.append(1)
        if bench:
            raise bench[0]

    here = ("127.0.0.1", board.port, "root", tmp_path / "id", tmp_path / "known_hosts")
    with Shell.connect(*here, timeout_s=5, guard=guard) as shell:
        shell.run(["true"], 5)
        assert asked == [1]
        threading.Timer(0.3, lambda: (bench.append(BenchError("the power was cut")), board.cut())).start()
        with pytest.raises(BenchError, match="the power was cut"):
            shell.run(["sleep", "20"], 10)
        count = len(asked)
        with pytest.raises(BenchError, match="the power was cut"):
            shell.forward("127.0.0.1", 1)
        assert len(asked) == count + 1


def test_a_forwarded_stream(shell: Shell) -> None:
    with shell.forward("127.0.0.1", 8080) as stream:
        stream.sendall(b"GET /")
        assert stream.recv(100) == b"echo GET /"


# ---------------------------------------------------------------------------------------------------------------------
# Reboots


def test_a_lost_connection_is_made_again(board: BoardServer, tmp_path: Path) -> None:
    kept = KeptShell("b1", lambda timeout_s: connect(board, tmp_path, timeout_s))
    first = kept.get()
    assert kept.get() is first
    board.cut()
    _until(lambda: not first.alive)
    assert kept.get().run(["echo", "again"], 5).stdout == "again\n"
    kept.drop()


def test_a_reboot_by_itself_is_noticed_once(board: BoardServer, tmp_path: Path) -> None:
    kept = KeptShell("b1", lambda timeout_s: connect(board, tmp_path, timeout_s))
    first = kept.get()
    board.boot_id = "boot-2"
    board.cut()
    _until(lambda: not first.alive)
    with pytest.raises(Rebooted, match="b1 rebooted by itself"):
        kept.get()
    assert kept.get().run(["echo", "on"], 5).stdout == "on\n"
    kept.drop()


@pytest.mark.parametrize("how", ["expect_boot", "reconnect"])
def test_a_reboot_that_was_announced_is_not(board: BoardServer, tmp_path: Path, how: str) -> None:
    kept = KeptShell("b1", lambda timeout_s: connect(board, tmp_path, timeout_s))
    first = kept.get()
    board.boot_id = "boot-2"
    board.cut()
    _until(lambda: not first.alive)
    if how == "reconnect":
        kept.reconnect(5)
    else:
        kept.expect_boot()
    assert kept.get().boot_id() == kept.boot_id == "boot-2"
    kept.drop()


def test_a_board_that_boots_is_tried_until_it_answers(board: BoardServer, tmp_path: Path) -> None:
    tried: list[float] = []

    def dial(timeout_s: float) -> Shell:
        tried.append(timeout_s)
        if len(tried) < 3:
            raise ShellLost("connection refused")
        return connect(board, tmp_path, timeout_s)

    kept = KeptShell("b1", dial)
    assert kept.reconnect(5).alive
    assert len(tried) == 3
    kept.drop()
    tried.clear()
    with pytest.raises(ShellLost, match="refused"):
        kept.reconnect(0.3)
    assert len(tried) in (1, 2)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Uploads


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(random.Random(7).randbytes(1_500_001))
    return path


def upload_of(source: Path, target: Path) -> Upload:
    return Upload(
        source,
        str(target),
        onboard=ONBOARD,
        python=sys.executable,
        chunk_bytes=100_000,
        window_bytes=128_000,
        write_bytes=16_000,
    )


def test_an_upload_in_one_go(shell: Shell, source: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    upload = upload_of(source, tmp_path / "on-board")
    attempt = upload.run(shell, stall_s=5, on_progress=seen.append)
    assert attempt.complete
    assert upload.complete
    assert (attempt.start_offset, attempt.sent_bytes, attempt.resent_bytes) == (0, upload.total, 0)
    assert seen == sorted(seen)
    assert seen[-1] == upload.total
    assert Path(upload.part).read_bytes() == source.read_bytes()
    upload.activate(shell, 10)
    assert (tmp_path / "on-board").read_bytes() == source.read_bytes()


def test_cuts_cost_at_most_the_window_each(board: BoardServer, source: Path, tmp_path: Path) -> None:
    upload = upload_of(source, tmp_path / "on-board")
    cuts = 0
    while not upload.complete:
        board.cut_at = board.written + 400_000
        shell = connect(board, tmp_path)
        try:
            upload.run(shell, stall_s=5)
        except ShellLost:
            cuts += 1
        shell.abort()
    assert cuts == 3
    assert Path(upload.part).read_bytes() == source.read_bytes()
    assert [attempt.complete for attempt in upload.attempts] == [False, False, False, True]
    for before, after in zip(upload.attempts, upload.attempts[1:], strict=False):
        assert before.offset <= after.start_offset  # the board may hold more than it managed to confirm
        assert after.resent_bytes <= 128_000 + 16_000
    assert any(attempt.resent_bytes for attempt in upload.attempts)
    sent = sum(attempt.sent_bytes for attempt in upload.attempts)
    assert sent - sum(attempt.resent_bytes for attempt in upload.attempts) == upload.total


def test_stop_ends_an_attempt_without_an_error(shell: Shell, source: Path, tmp_path: Path) -> None:
    upload, stop = upload_of(source, tmp_path / "on-board"), threading.Event()

    def los(offset: int) -> None:
        if offset > 500_000:
            stop.set()

    attempt = upload.run(shell, stall_s=5, stop=stop, on_progress=los)
    assert not attempt.complete
    assert 500_000 < attempt.offset < upload.total
    assert upload.run(shell, stall_s=5).complete
    assert Path(upload.part).read_bytes() == source.read_bytes()


def test_after_a_reboot_only_what_hashes_right_is_kept(
    board: BoardServer, shell: Shell, source: Path, tmp_path: Path
) -> None:
    upload, stop = upload_of(source, tmp_path / "on-board"), threading.Event()
    upload.run(shell, stall_s=5, stop=stop, on_progress=lambda offset: stop.set() if offset > 800_000 else None)
    board.boot_id = "boot-2"
    with open(upload.part, "r+b") as part:  # what a power cut leaves: a length without its data
        part.seek(430_000)
        part.write(bytes(20_000))
    attempt = upload.run(shell, stall_s=5)
    assert attempt.start_offset == 400_000
    assert attempt.complete
    assert Path(upload.part).read_bytes() == source.read_bytes()


def test_a_new_process_believes_nothing(shell: Shell, source: Path, tmp_path: Path) -> None:
    part = tmp_path / "on-board.part"
    part.write_bytes(source.read_bytes()[:700_000])
    assert upload_of(source, tmp_path / "on-board").run(shell, stall_s=5).start_offset == 700_000
    part.write_bytes(b"another file" * 200_000)
    assert upload_of(source, tmp_path / "on-board").run(shell, stall_s=5).start_offset == 0
    assert part.read_bytes() == source.read_bytes()


def test_a_board_without_room_says_so(board: BoardServer, shell: Shell, source: Path, tmp_path: Path) -> None:
    board.full_at, upload = 320_000, upload_of(source, tmp_path / "on-board")
    with pytest.raises(SftpError, match=r"on-board\.part"):
        upload.run(shell, stall_s=5)
    board.full_at = None  # room again; behind the hole that the refusal left the file goes on
    assert upload.run(shell, stall_s=5).start_offset in (300_000, 320_000)  # whether later writes landed or not
    assert Path(upload.part).read_bytes() == source.read_bytes()
    with pytest.raises(SftpError, match="No such file"):
        upload_of(source, tmp_path / "nowhere" / "on-board").run(shell, stall_s=5)


def test_a_link_that_goes_silent_stalls_and_is_given_up(
    board: BoardServer, shell: Shell, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(_File, "write", lambda *_: over.wait(60))
    began = time.monotonic()
    upload = upload_of(source, tmp_path / "on-board")
    with pytest.raises(ShellTimeout, match=r"nothing confirmed for 2 s"):
        upload.run(shell, stall_s=2.0)  # which a busy host needs for the questions before it
    assert time.monotonic() - began < 20
    over.set()
    assert not shell.alive
    assert upload.attempts[-1].offset == 0


def test_nothing_is_activated_with_a_wrong_hash(shell: Shell, source: Path, tmp_path: Path) -> None:
    upload = upload_of(source, tmp_path / "on-board")
    upload.run(shell, stall_s=5)
    with open(upload.part, "r+b") as part:
        part.write(b"!")
    with pytest.raises(BoardError, match="SHA-256"):
        upload.activate(shell, 10)
    assert not (tmp_path / "on-board").exists()


def test_sftp_packets() -> None:
    packet = sftp.sftp_packet(6, 7, b"h", (1 << 33,), b"data")
    assert packet.hex() == "0000001a0600000007000000016800000002000000000000000464617461"
    decoder = sftp.SftpDecoder()
    stream = b"".join(struct.pack(">IBI", 9, 101, number) + bytes(4) for number in range(5))
    found = [item for at in range(len(stream)) for item in decoder.feed(stream[at : at + 1])]
    assert found == [(101, number, bytes(4)) for number in range(5)]
    with pytest.raises(EOFError, match="not an SFTP stream"):
        list(decoder.feed(b"Welcome to the board"))


def test_a_large_packet_comes_in_pieces() -> None:
    content = random.Random(3).randbytes(300_000)
    packets = [sftp.sftp_packet(101, 1, 0, b"", b""), *(sftp.sftp_packet(103, number, content) for number in (2, 3))]
    stream, decoder = b"".join(packets), sftp.SftpDecoder()
    found = [item for at in range(0, len(stream), 32_000) for item in decoder.feed(stream[at : at + 32_000])]
    assert [(kind, number, bytes(body[4:])) for kind, number, body in found] == [
        (101, 1, bytes(8)),
        (103, 2, content),
        (103, 3, content),
    ]


def test_an_inbox_gives_what_came_in_order_and_says_when_it_is_over() -> None:
    inbox = Inbox()
    with pytest.raises(PipeTimeout):
        inbox.read(10, 0.01)
    for piece in (b"abc", b"defg", b"hij"):
        inbox.feed(piece)
    assert (len(inbox), inbox.read_ready()) == (10, True)
    assert [inbox.read(5), inbox.read(1), inbox.read(100, 0.0)] == [b"abcde", b"f", b"ghij"]
    assert not inbox.read_ready()
    threading.Timer(0.02, inbox.feed, [b"late"]).start()
    assert inbox.read(100, 5.0) == b"late"
    inbox.feed(b"rest")
    inbox.close()
    assert [inbox.read(100, 5.0), inbox.read(100, None)] == [b"rest", b""]


class ScriptedChannel:
    """Answers every request with success; remembers what it got."""

    def __init__(self, extensions: bytes) -> None:
        self.requests: list[tuple[int, int, bytes]] = []
        self._decoder, self._answers = sftp.SftpDecoder(), bytearray()
        self._extensions = extensions

    def settimeout(self, timeout_s: float) -> None:
        pass

    def recv_ready(self) -> bool:
        return bool(self._answers)

    def sendall(self, data: bytes) -> None:
        for kind, number, body in self._decoder.feed(data):
            self.requests.append((kind, number, body))
            if kind == 1:
                answer = struct.pack(">BI", 2, 3) + self._extensions
            elif kind == 200 and body.startswith(b"\0\0\0\x12limits@openssh.com"):
                answer = struct.pack(">BI4Q", 201, number, 262_144, 261_120, 65_536, 0)
            elif kind == 3:
                answer = struct.pack(">BI", 102, number) + b"\0\0\0\1h"
            else:
                answer = struct.pack(">BII", 101, number, 0) + bytes(8)
            self._answers += struct.pack(">I", len(answer)) + answer

    def recv(self, size: int) -> bytes:
        if not self._answers:
            raise TimeoutError
        data = bytes(self._answers[:size])
        del self._answers[:size]
        return data


@pytest.mark.parametrize("extensions", [b"", b"\0\0\0\x11fsync@openssh.com\0\0\0\x011"])
def test_written_bytes_are_put_on_disk_where_the_server_can(extensions: bytes, source: Path) -> None:
    channel = ScriptedChannel(extensions)
    remote = sftp.RemoteFile(channel, "x.part", 1.0, write=True)  # type: ignore[arg-type]
    remote.most_write_bytes = 100_000
    upload = Upload(source, "x", write_bytes=100_000, window_bytes=400_000, sync_bytes=500_000)
    progress = transfer.Progress(0.0)
    upload._stream(remote, progress, threading.Event(), None)
    assert progress.offset == upload.total
    kinds = [kind for kind, _, _ in channel.requests]
    assert kinds.count(6) == 16
    syncs = [at for at, kind in enumerate(kinds) if kind == 200]
    assert [kinds[:at].count(6) for at in syncs] == ([5, 10, 15, 16] if extensions else [])


def test_writes_are_as_large_as_the_server_says(source: Path) -> None:
    for extensions, largest in ((b"", 32_768), (b"\0\0\0\x12limits@openssh.com\0\0\0\x011", 65_536)):
        channel = ScriptedChannel(extensions)
        remote = sftp.RemoteFile(channel, "x.part", 1.0, write=True)  # type: ignore[arg-type]
        upload = Upload(source, "x", write_bytes=255 << 10, window_bytes=400_000)
        upload._stream(remote, transfer.Progress(0.0), threading.Event(), None)
        written = [body for kind, _, body in channel.requests if kind == 6]
        assert max(struct.unpack_from(">I", body, 4 + 1 + 8)[0] for body in written) == largest
        assert b"".join(body[4 + 1 + 8 + 4 :] for body in written) == source.read_bytes()


def test_a_sync_answered_after_the_last_write_is_waited_for(tmp_path: Path) -> None:
    class SlowDisk(ScriptedChannel):
        """Answers one request at a time, and the sync only when asked for the third time."""

        asked = 0

        def recv(self, size: int) -> bytes:
            if self.requests[-1][0] == 200 and len(self._answers) == 21:
                self.asked += 1
                if self.asked < 3:
                    raise TimeoutError
            head = super().recv(4)
            return head + super().recv(int.from_bytes(head, "big"))

    source = tmp_path / "source"
    source.write_bytes(bytes(500_000))
    channel = SlowDisk(b"\0\0\0\x11fsync@openssh.com\0\0\0\x011")
    remote = sftp.RemoteFile(channel, "x.part", 1.0, write=True)  # type: ignore[arg-type]
    remote.most_write_bytes = 100_000
    upload = Upload(source, "x", write_bytes=100_000, window_bytes=400_000, sync_bytes=500_000)
    upload._stream(remote, transfer.Progress(0.0), threading.Event(), None)
    remote.close()
    assert [kind for kind, _, _ in channel.requests][-2:] == [200, 4]


def test_the_on_board_hash_is_the_one_compared(source: Path) -> None:
    done = subprocess.run(
        [sys.executable, ONBOARD, "chunk-hash", str(source), "0", "1000"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["sha256"] == hashlib.sha256(source.read_bytes()[:1000]).hexdigest()
