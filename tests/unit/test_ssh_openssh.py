"""SSH against a real OpenSSH server: the kept helper, signals, files both ways, jump hosts, agents, first contact."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest
import sshd as openssh
from sshd import Sshd

from hil.bench.shutdown import _over_ssh
from hil.client import shell as shells
from hil.drivers.ssh import (
    Detached,
    Download,
    Login,
    SftpError,
    Shell,
    ShellLost,
    ShellTimeout,
    Upload,
    get,
    hashing,
    host_key,
    pin,
    pinned,
    put,
)
from hil.drivers.ssh.sftp import RemoteFile
from hil.drivers.ssh.transfer import Progress
from hil.errors import BenchError, BoardError, UsageError
from hil.inventory.bench import SshWire


@pytest.fixture
def shell(server: Sshd) -> Iterator[Shell]:
    with server.connect(timeout_s=10) as connected:
        yield connected


def warm(shell: Shell) -> Shell:
    """With its helper up."""
    deadline = time.monotonic() + 30
    while not shell._worker._ready:
        shell.run(["true"], 30)
        assert time.monotonic() < deadline, "the helper never came up"
    return shell


@pytest.fixture(params=["channel", "helper"])
def either(request: pytest.FixtureRequest, server: Sshd) -> Iterator[Shell]:
    """A shell whose commands have channels of their own, and one whose helper starts them: the results are the same."""
    if request.param == "channel":
        with server.connect(timeout_s=10, python=None) as plain:
            yield plain
    else:
        with server.connect(timeout_s=10) as helped:
            yield warm(helped)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_arguments_streams_and_status(either: Shell) -> None:
    words = ["a b", "$HOME", "'", '"', "*", ";", "", "\\", "ü\n"]
    done = either.run(["printf", "<%s>", *words], 5)
    assert done.stdout == "".join(f"<{word}>" for word in words)
    done = either.run(["sh", "-c", "echo out; echo err >&2; exit 3"], 5)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)


def test_what_cannot_be_started_is_told_as_the_shell_tells_it(either: Shell, tmp_path: Path) -> None:
    done = either.run(["no-such-program"], 5)
    assert done.returncode == 127
    assert "not found" in done.stderr
    (tmp_path / "plain").write_text("echo hello")
    assert either.run([str(tmp_path / "plain")], 5).returncode == 126
    (tmp_path / "plain").chmod(0o755)
    assert either.run([str(tmp_path / "plain")], 5).stdout == "hello\n"  # no #!: the shell runs it


def test_a_signal_is_not_a_lost_connection(either: Shell) -> None:
    for name, number in (("KILL", 9), ("TERM", 15), ("HUP", 1)):
        assert either.run(["sh", "-c", f"kill -{name} $$"], 5).returncode == -number
    with pytest.raises(BoardError, match="ended with status -9") as raised:
        either.run(["sh", "-c", "kill -KILL $$"], 5, check=True)
    assert not isinstance(raised.value, ShellLost)


def test_pipes_break_as_elsewhere(either: Shell) -> None:
    """Python ignores SIGPIPE and would pass that on to what its helper starts."""
    done = either.run(["sh", "-c", "yes | head -n 1"], 5)
    assert (done.stdout, done.stderr, done.returncode) == ("y\n", "", 0)


def test_a_command_that_ends_at_once_does_not_end_its_connection(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy host may hold whoever ends a command's input until its channel is gone: OpenSSH forgives no word of it."""

    def late(channel: paramiko.Channel) -> None:
        with channel.lock:
            message = channel._send_eof()
        channel.status_event.wait(5)
        while not channel.closed:
            time.sleep(0.001)
        channel.transport._send_user_message(message)

    monkeypatch.setattr(paramiko.Channel, "shutdown_write", late)
    with server.connect(timeout_s=10, python=None) as shell:
        for _ in range(3):
            assert shell.run(["true"], 5).returncode == 0


def test_output_is_streamed_while_the_command_runs(either: Shell, tmp_path: Path) -> None:
    """It goes on when its first line has come, and not before."""
    seen: list[tuple[str, bytes]] = []
    go_on = tmp_path / "go-on"

    def hear(stream: str, data: bytes) -> None:
        seen.append((stream, data))
        go_on.touch()

    script = f"echo one; until [ -e {go_on} ]; do sleep 0.02; done; echo two >&2"
    done = either.run(["sh", "-c", script], 30, on_output=hear)
    assert seen == [("stdout", b"one\n"), ("stderr", b"two\n")]
    assert (done.stdout, done.stderr) == ("one\n", "two\n")


def test_a_time_out_kills_the_group_and_the_next_command_works(either: Shell, tmp_path: Path) -> None:
    marker = tmp_path / "pids"
    with pytest.raises(ShellTimeout, match="did not end in time and was killed"):
        either.run(["sh", "-c", f"sleep 61 & echo $$ $! >{marker}; wait"], 1.0)
    deadline = time.monotonic() + 15
    for pid in marker.read_text().split():
        while _alive(int(pid)):
            assert time.monotonic() < deadline, f"{pid} still runs"
            time.sleep(0.02)
    assert either.run(["echo", "still here"], 5).stdout == "still here\n"


def test_much_output_on_both_streams(either: Shell) -> None:
    done = either.run(["sh", "-c", "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2"], 20)
    assert (len(done.stdout), len(done.stderr)) == (3_000_000, 3_000_000)


def test_a_busy_helper_delays_nobody(shell: Shell, tmp_path: Path) -> None:
    """Each of the commands ends when all four run: one after the other they never would."""
    warm(shell)
    results: list[str] = []
    all_run = f"until [ $(ls {tmp_path} | wc -l) = 4 ]; do sleep 0.02; done"
    scripts = [f"touch {tmp_path}/{n}; {all_run}; echo {n}" for n in range(4)]
    threads = [
        threading.Thread(target=lambda script=script: results.append(shell.run(["sh", "-c", script], 30).stdout))
        for script in scripts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["0\n", "1\n", "2\n", "3\n"]


def test_a_board_without_python_does_without(server: Sshd) -> None:
    with server.connect(timeout_s=10, python="no-such-python") as shell:
        for _ in range(8):
            assert shell.run(["echo", "hello"], 5).stdout == "hello\n"
        assert not shell._worker._ready


def test_a_killed_helper_is_told_and_replaced(shell: Shell) -> None:
    warm(shell)
    with pytest.raises(ShellLost):
        shell.run(["sh", "-c", "kill -KILL $PPID; sleep 1"], 5)
    assert shell.run(["echo", "on"], 5).stdout == "on\n"
    warm(shell)


def test_a_background_process_is_polled_and_read(shell: Shell) -> None:
    process = shell.start(["sh", "-c", "echo one; echo two >&2; read line; echo $line; exit 5"])
    deadline = time.monotonic() + 20
    while process.output() != ("one\n", "two\n"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None
    process.write(b"three\n", 5)
    process.close_stdin()
    done = process.wait(5)
    assert (done.stdout, done.stderr, done.returncode) == ("one\nthree\n", "two\n", 5)
    assert process.poll() == 5
    killed = shell.start(["sleep", "62"])
    killed.kill()
    deadline = time.monotonic() + 15
    while _alive(killed.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_detached_command_outlives_its_connection(server: Sshd, tmp_path: Path) -> None:
    where, go_on = str(tmp_path / "job"), tmp_path / "go-on"
    with server.connect(timeout_s=10) as first:
        wait = f"until [ -e {go_on} ]; do sleep 0.05; done"
        job = Detached.start(first, ["sh", "-c", f"echo begun; {wait}; echo done; echo oh >&2; exit 6"], where)
        assert job.poll(first) is None
        first.abort()
    with server.connect(timeout_s=10) as second:
        go_on.touch()
        done = job.wait(second, 10, poll_s=0.05)
        assert (done.stdout, done.stderr, done.returncode) == ("begun\ndone\n", "oh\n", 6)
        job = Detached.start(second, ["sleep", "63"], where)
        assert job.poll(second) is None
        job.kill(second)
        assert job.poll(second) == 137
        shutil.rmtree(where)  # as a reboot empties a tmpfs
        with pytest.raises(BoardError, match="gone without a status"):
            job.poll(second)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(random.Random(11).randbytes(3_000_001))
    return path


def test_a_file_there_and_back(shell: Shell, source: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "it's on board", tmp_path / "back"
    assert put(shell, source, str(there)).complete
    assert there.read_bytes() == source.read_bytes()
    attempt = get(shell, str(there), back)
    assert (attempt.complete, attempt.sent_bytes, attempt.resent_bytes) == (True, 3_000_001, 0)
    assert back.read_bytes() == source.read_bytes()
    assert not list(tmp_path.glob("*.part"))
    source.write_bytes(b"")
    put(shell, source, str(there))
    get(shell, str(there), back)
    assert back.read_bytes() == b""


def test_a_part_on_the_board_is_taken_up_if_it_is_right(shell: Shell, source: Path, tmp_path: Path) -> None:
    part = tmp_path / "target.part"
    part.write_bytes(source.read_bytes()[:2_000_000] + b"damaged" * 1000)
    assert put(shell, source, str(tmp_path / "target")).start_offset == 1 << 20
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_a_download_is_taken_up_after_a_stop_and_after_a_cut(server: Sshd, source: Path, tmp_path: Path) -> None:
    download, stop = Download(str(source), tmp_path / "here", window_bytes=200_000), threading.Event()
    with server.connect(timeout_s=10) as shell:
        first = download.run(
            shell, stall_s=5, stop=stop, on_progress=lambda offset: stop.set() if offset > 900_000 else None
        )
    assert not first.complete
    with server.connect(timeout_s=10) as shell, pytest.raises(ShellLost):
        download.run(shell, stall_s=5, on_progress=lambda offset: shell.abort() if offset > 1_500_000 else None)
    second = download.attempts[-1]
    assert second.start_offset == first.offset
    assert second.resent_bytes <= 200_000 + 131_072
    assert (tmp_path / "here.part").stat().st_size == second.offset
    with server.connect(timeout_s=10) as shell:
        assert download.run(shell, stall_s=5).complete
        download.activate(shell, 10)
    assert (tmp_path / "here").read_bytes() == source.read_bytes()


def test_a_server_that_answers_short_and_out_of_order_is_asked_for_the_rest(tmp_path: Path) -> None:
    content = random.Random(5).randbytes(250_000)

    class Remote:
        """Answers at most 40,000 bytes a request, the last request first."""

        received = 0

        def __init__(self) -> None:
            self.asked: list[tuple[int, int, int]] = []
            self.count = 0

        def read(self, offset: int, length: int) -> int:
            self.count += 1
            self.asked.append((self.count, offset, length))
            return self.count

        def arrived(self, wait_s: float) -> list[tuple[int, bytes]]:
            number, offset, length = self.asked.pop()
            return [(number, content[offset : offset + min(length, 40_000)])]

    download, seen = Download("x", tmp_path / "x"), list[int]()
    download.total = len(content)
    with (tmp_path / "x.part").open("wb") as part:
        download._stream(Remote(), part.fileno(), Progress(0.0), threading.Event(), seen.append)  # type: ignore[arg-type]
    assert (tmp_path / "x.part").read_bytes() == content
    assert seen == sorted(seen)
    assert seen[-1] == 250_000


def test_a_found_part_is_hashed_before_it_is_believed(shell: Shell, source: Path, tmp_path: Path) -> None:
    part = tmp_path / "here.part"
    part.write_bytes(source.read_bytes()[:1_000_000])
    assert get(shell, str(source), tmp_path / "here").start_offset == 1_000_000
    part.write_bytes(b"something else" * 1000)
    assert get(shell, str(source), tmp_path / "here").start_offset == 0
    assert (tmp_path / "here").read_bytes() == source.read_bytes()


def test_a_file_that_changed_meanwhile_is_not_accepted(shell: Shell, source: Path, tmp_path: Path) -> None:
    download = Download(str(source), tmp_path / "here")
    download.run(shell, stall_s=5)
    with source.open("r+b") as stream:
        stream.write(b"changed")
    with pytest.raises(BoardError, match="has SHA-256"):
        download.activate(shell, 10)
    assert not list(tmp_path.glob("here*"))


def test_a_file_that_grows_is_got_as_long_as_it_was(shell: Shell, source: Path, tmp_path: Path) -> None:
    """The board hashed all of it meanwhile, more than what was asked for."""
    content = source.read_bytes()
    download = Download(str(source), tmp_path / "here")
    download.run(shell, stall_s=5)
    with source.open("ab") as stream:
        stream.write(b"a further line")
    download.activate(shell, 10, hashlib.sha256(source.read_bytes()).hexdigest())
    assert (tmp_path / "here").read_bytes() == content


def test_what_an_earlier_contact_left_here_is_hashed_again(shell: Shell, source: Path, tmp_path: Path) -> None:
    download, stop = Download(str(source), tmp_path / "here", window_bytes=200_000), threading.Event()
    download.run(shell, stall_s=5, stop=stop, on_progress=lambda offset: stop.set())
    with download.part.open("r+b") as part:
        part.write(b"damaged")
    assert download.run(shell, stall_s=5).complete
    with pytest.raises(BoardError, match="has SHA-256"):
        download.activate(shell, 10, hashlib.sha256(source.read_bytes()).hexdigest())
    assert not list(tmp_path.glob("here*"))


def test_no_room_here_is_not_the_boards_fault(
    shell: Shell, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        if offset > 1_000_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:50_000], offset)  # as a disk that is nearly full takes what it has room for

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(BenchError, match=r"here\.part: No space left on device"):
        get(shell, str(source), tmp_path / "here")
    part = (tmp_path / "here.part").read_bytes()
    assert len(part) < 1_200_000
    assert part == source.read_bytes()[: len(part)]


TOOLS = ("cat", "dd", "head", "mv", "sh", "sha256sum", "sync")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A directory with what a small board has: no openssl."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for tool in TOOLS:
        (directory / tool).symlink_to(shutil.which(tool) or "")
    return directory


def script(directory: Path, name: str, text: str) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def land(tools: Path, part: Path, lines: str) -> subprocess.CompletedProcess[str]:
    """The board's end of an upload, told `lines`."""
    return subprocess.run(
        ["/bin/sh", "-c", hashing._LAND, "sh", str(part), str(part.with_suffix(""))],
        input=lines,
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize("openssl", ["none", "broken", "real"])
def test_a_board_hashes_with_what_it_has(tools: Path, tmp_path: Path, source: Path, openssl: str) -> None:
    if openssl == "broken":
        script(tools, "openssl", "exit 1")
    elif openssl == "real":
        (tools / "openssl").symlink_to(shutil.which("openssl") or "")
    content = source.read_bytes()
    part = tmp_path / "target.part"
    part.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    for argv, expected in (
        ([hashing._HASH_HEAD, "sh", "1000001", str(part)], hashlib.sha256(content[:1_000_001]).hexdigest()),
        ([hashing._HASH_WHOLE, "sh", str(part)], digest),
    ):
        done = subprocess.run(
            ["/bin/sh", "-c", *argv], env={"PATH": str(tools)}, capture_output=True, text=True, check=True
        )
        assert done.stdout.split(" ")[0].strip() == expected
    done = land(tools, part, f"0 1\n1 2\n0 0\n{digest}\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "target").read_bytes() == content
    assert not part.exists()


def test_a_slow_disk_has_done_with_the_part_before_it_is_moved(tools: Path, tmp_path: Path, source: Path) -> None:
    """The sync beside the reading would not find it, and take that for a disk that failed."""
    part = tmp_path / "target.part"
    part.write_bytes(source.read_bytes())
    script(tools, "sync", f'[ -e {part}.first ] || {{ : >{part}.first; sleep 0.2; }}; head -c 0 "$1"')
    (tools / "sleep").symlink_to(shutil.which("sleep") or "")
    done = land(tools, part, f"0 3\n0 0\n{hashlib.sha256(part.read_bytes()).hexdigest()}\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "target").exists()


def test_nothing_lands_but_what_was_meant_to(tools: Path, tmp_path: Path, source: Path) -> None:
    content = source.read_bytes()
    part, target = tmp_path / "target.part", tmp_path / "target"
    digest = hashlib.sha256(content).hexdigest()
    part.write_bytes(content[:-1] + b"!")
    done = land(tools, part, f"0 3\n0 0\n{digest}\n")
    assert (done.returncode, done.stdout.strip()) == (9, hashlib.sha256(part.read_bytes()).hexdigest())
    part.write_bytes(content)
    for cut_off in ("", "0 1\n", "0 3\n", "0 3\n0 0\n", f"0 3\n0 0\n{digest[:20]}"):
        assert land(tools, part, cut_off).returncode != 0
    assert land(tools, part, f"0 1\n1 1\n0 0\n{digest}\n").returncode == 9  # a block was left out
    script(tools, "sync", "exit 1")  # a disk that failed: told once, perhaps to the sync beside the upload
    assert land(tools, part, f"0 3\n0 0\n{digest}\n").returncode == -signal.SIGTERM
    script(tools, "sync", f"[ -e {part}.told ] && exit 1; touch {part}.told")  # and to the last one
    assert land(tools, part, f"0 3\n0 0\n{digest}\n").returncode == -signal.SIGTERM
    assert part.read_bytes() == content
    assert not target.exists()


def test_an_upload_that_is_damaged_on_its_way_is_not_put_in_place(
    shell: Shell, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, stream = source.read_bytes(), Upload._stream

    def damaging(upload: Upload, remote: RemoteFile, *rest: Any) -> None:
        write = remote.write
        monkeypatch.setattr(remote, "write", lambda offset, data: write(offset, data if offset else b"!" + data[1:]))
        stream(upload, remote, *rest)

    monkeypatch.setattr(Upload, "_stream", damaging)
    (tmp_path / "target").write_bytes(b"what was there before")
    with pytest.raises(BoardError, match=rf"target\.part has SHA-256 .* not {hashlib.sha256(content).hexdigest()}"):
        put(shell, source, str(tmp_path / "target"))
    assert (tmp_path / "target").read_bytes() == b"what was there before"
    monkeypatch.undo()
    assert put(shell, source, str(tmp_path / "target")).start_offset == 0  # the damage is found by hash
    assert (tmp_path / "target").read_bytes() == content


def test_a_board_whose_disk_fails_says_so(
    shell: Shell, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_LAND", f"sync() {{ false; }}\n{hashing._LAND}")
    with pytest.raises(BoardError, match=r"sync failed on the board: .*target\.part was not put in place") as raised:
        put(shell, source, str(tmp_path / "target"))
    assert "dmesg" in raised.value.hint
    assert not (tmp_path / "target").exists()


def test_a_put_that_fails_leaves_nothing_running(shell: Shell, source: Path, tmp_path: Path) -> None:
    with pytest.raises(SftpError, match="No such file"):
        put(shell, source, str(tmp_path / "nowhere" / "target"))
    with pytest.raises(SftpError, match="No such file"):
        get(shell, str(tmp_path / "nowhere"), tmp_path / "here")
    deadline = time.monotonic() + 20
    while any(str(tmp_path / "nowhere").encode() in words for words in _command_lines()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert put(shell, source, str(tmp_path / "target")).complete


def _command_lines() -> Iterator[bytes]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield (process / "cmdline").read_bytes()


def test_a_download_of_nothing_says_so(shell: Shell, tmp_path: Path) -> None:
    with pytest.raises(SftpError, match="nowhere: No such file"):
        get(shell, str(tmp_path / "nowhere"), tmp_path / "here")
    assert shell.run(["true"], 5).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# A link that fails


class Relay:
    """Passes bytes between a client and the server; can be silent (an outage) for a while or for good."""

    def __init__(self, port: int) -> None:
        self._far = port
        self.open = threading.Event()
        self.open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._far))
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.open.wait()
                target.sendall(data)

    def close(self) -> None:
        self.open.set()
        for sock in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def relay(server: Sshd) -> Iterator[Relay]:
    between = Relay(server.port)
    yield between
    between.close()


def through(relay: Relay, server: Sshd) -> Shell:
    pin(server.known_hosts, "127.0.0.1", relay.port, host_key(server.login), replace=True)
    return Shell.connect("127.0.0.1", relay.port, openssh.USER, server.key, server.known_hosts, timeout_s=10)


@pytest.mark.parametrize("helped", [False, True])
def test_an_outage_shorter_than_the_limit_is_only_slow(relay: Relay, server: Sshd, helped: bool) -> None:
    with through(relay, server) as shell:
        if helped:
            warm(shell)
        relay.open.clear()
        began = time.monotonic()
        threading.Timer(0.6, relay.open.set).start()
        done = shell.run(["echo", "late"], 30)
        assert done.stdout == "late\n"
        assert time.monotonic() - began > 0.5


@pytest.mark.parametrize("helped", [False, True])
def test_an_outage_longer_than_the_limit_ends_the_call_in_time(
    relay: Relay, server: Sshd, helped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hil.drivers.ssh import shell as module

    monkeypatch.setattr(module, "_GRACE_S", 0.3)
    with through(relay, server) as shell:
        if helped:
            warm(shell)
        relay.open.clear()
        began = time.monotonic()
        with pytest.raises(ShellTimeout):
            shell.run(["true"], 0.3)
        assert time.monotonic() - began < 15
        with pytest.raises((ShellLost, ShellTimeout)):
            shell.run(["true"], 0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Ways in


def test_through_two_jump_hosts(server: Sshd) -> None:
    with server.connect(timeout_s=10, jump=[server.login, server.login]) as shell:
        assert shell.run(["echo", "far"], 5).stdout == "far\n"
        shell.abort()
    with pytest.raises(ShellLost):
        shell.run(["true"], 5)


def test_a_jump_host_that_fails_is_the_benchs_fault(server: Sshd) -> None:
    nobody = Login("127.0.0.1", 1, "x", server.key, server.known_hosts)
    with pytest.raises(BenchError, match="jump host"):
        server.connect(timeout_s=5, jump=[nobody])
    with pytest.raises(BoardError, match="through"):
        Shell.connect("127.0.0.1", 1, "x", server.key, server.known_hosts, jump=[server.login], timeout_s=5)


def test_keys_of_an_agent(server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    where = ("127.0.0.1", server.port, openssh.USER, None, server.known_hosts)
    with pytest.raises(BenchError, match="no SSH agent"):
        Shell.connect(*where, timeout_s=5)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        deadline = time.monotonic() + 20
        while not (tmp_path / "agent").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(BenchError, match="does not accept any key of the SSH agent"):
            Shell.connect(*where, timeout_s=5)
        subprocess.run(["ssh-add", "-q", str(server.key)], check=True, env={**os.environ})
        with Shell.connect(*where, timeout_s=5) as shell:
            assert shell.run(["echo", "in"], 5).stdout == "in\n"
    finally:
        agent.terminate()
        agent.wait()


def test_first_contact_pins_a_key_once(server: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "new" / "known_hosts"
    key = host_key(server.login)
    printed = subprocess.run(
        ["ssh-keygen", "-lf", str(server.log.parent / "host.pub")], capture_output=True, text=True, check=True
    ).stdout
    assert key.fingerprint == printed.split()[1]
    assert pinned(known, "127.0.0.1", server.port) == ()
    assert pin(known, "127.0.0.1", server.port, key)
    assert not pin(known, "127.0.0.1", server.port, key)
    assert pinned(known, "127.0.0.1", server.port) == (key,)
    with Shell.connect("127.0.0.1", server.port, openssh.USER, server.key, known, timeout_s=5) as shell:
        assert shell.run(["true"], 5).returncode == 0
    assert host_key(server.login, [server.login]) == key  # as seen through a jump host


def test_another_key_is_pinned_only_when_asked(server: Sshd, tmp_path: Path) -> None:
    known, key = tmp_path / "known_hosts", host_key(server.login)
    other = "AAAAC3NzaC1lZDI1NTE5AAAAIJfyL8vbgBLtHTPwOHiJ0cNnTUMMPPvBeRkXzJzoFaRO"
    known.write_text(f"# mine\nboard1,[127.0.0.1]:{server.port} ssh-ed25519 {other}\nelsewhere ssh-ed25519 {other}\n")
    with pytest.raises(UsageError, match="has another key pinned") as raised:
        pin(known, "127.0.0.1", server.port, key)
    assert "--replace" in raised.value.hint
    assert pin(known, "127.0.0.1", server.port, key, replace=True)
    assert pinned(known, "127.0.0.1", server.port) == (key,)
    assert known.read_text().splitlines()[:3] == [
        "# mine",
        f"board1 ssh-ed25519 {other}",
        f"elsewhere ssh-ed25519 {other}",
    ]


def test_wires_of_a_bench_file_lead_through_their_jump_hosts(server: Sshd) -> None:
    at = {"address": server.address, "port": server.port, "user": openssh.USER}
    at |= {"key": server.key, "known_hosts": server.known_hosts}
    wire = SshWire.model_validate({**at, "jump": [at]})
    asked: list[int] = []
    with shells.connect(wire, timeout_s=10, guard=lambda: asked.append(1)) as shell:
        assert len(shell._clients) == 2
        assert shell.run(["echo", "far"], 5).stdout == "far\n"
    assert asked == [1]
    _over_ssh(wire, "echo down >&2")
    with pytest.raises(BenchError, match="jump host"):
        _over_ssh(SshWire.model_validate({**at, "jump": [{**at, "port": 1}]}), "true")
