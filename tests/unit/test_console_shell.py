"""Commands and files over a console: real shells on a terminal, with a kernel that writes between their bytes."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import tty
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from console_board import ShellBoard
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.client import console_frames as frames
from hil.client.console import Console, Unheard
from hil.client.console_shell import ConsoleShell
from hil.errors import BenchError, BoardError, UsageError
from hil.inference import client as llm

SHELLS = [("dash", "-i"), ("bash", "--norc", "-i"), ("bash", "--norc", "--posix", "-i")]


@pytest.fixture(params=SHELLS, ids=" ".join)
def shell(request: pytest.FixtureRequest) -> Iterator[Console]:
    if shutil.which(request.param[0]) is None:
        pytest.skip(f"no {request.param[0]} here")
    with ShellBoard(request.param) as board:
        console = Console.on_port(board.path)
        yield console
        console.close()


def test_results_are_exact(shell: Console, tmp_path: Path) -> None:
    assert shell.run("printf abc").stdout == "abc"
    assert shell.run("echo out; echo err >&2; exit 7").returncode == 7
    done = shell.run("echo one; echo two >&2")
    assert (done.stdout, done.returncode) == ("one\ntwo\n", 0)
    assert shell.run("true").stdout == ""
    assert shell.run("printf 'tab\\there\\n\\n\\n'").stdout == "tab\there\n\n\n"
    assert shell.run("echo 'quotes \" and $HOME'").stdout == 'quotes " and $HOME\n'
    assert shell.run("cat").stdout == ""  # it has no input to wait for
    assert shell.run(f"cd {tmp_path} && pwd").stdout == f"{tmp_path}\n"
    assert shell.run("pwd").stdout != f"{tmp_path}\n"  # each in a subshell


def test_what_a_terminal_would_not_leave_alone(shell: Console) -> None:
    assert shell.run("printf 'gr\u00fc\u00df dich\\n'").stdout == "grüß dich\n"
    assert shell.run("echo hello!world !!").stdout == "hello!world !!\n"
    assert shell.run("echo a\tb; echo c\necho d").stdout == "a b\nc\nd\n"
    assert shell.run("printf 'a\\rb\\033[1mc\\n'").stdout == "a\rb\x1b[1mc\n"
    assert shell.run("(").returncode != 0  # a syntax error is the command's own, not the shell's
    assert shell.run("echo fine").stdout == "fine\n"


def test_a_large_output(shell: Console) -> None:
    assert shell.run("seq 20000").stdout == "".join(f"{n}\n" for n in range(1, 20001))


def test_check_and_time_out(shell: Console) -> None:
    with pytest.raises(BoardError, match=r"(?s)`cat /no/such` ended with status 1.*No such file"):
        shell.run("cat /no/such", check=True)
    began = time.monotonic()
    with pytest.raises(BoardError, match="`sleep 60` did not end in time and was interrupted"):
        shell.run("sleep 60", timeout_s=0.3)
    assert shell.run("echo back").stdout == "back\n"
    assert time.monotonic() - began < 5


def test_a_command_that_takes_longer_than_the_patience(shell: Console) -> None:
    done = shell.run("sleep 1.3; echo done")
    assert done.stdout == "done\n"
    assert shell.run("echo next").stdout == "next\n"


@pytest.mark.parametrize("typed", ["rm -rf /half/typed", "echo 'open quote", "cat <<EOF\ntext", "cat", "sleep 100"])
def test_a_half_typed_line_or_a_running_program_is_done_away_with(
    typed: str, shell: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hil.client.console.WAKE_S", 0.4)
    shell.send(typed, end="" if typed.startswith("rm") else "\n")
    assert shell.run("echo clean").stdout == "clean\n"


def test_files_there_and_back(shell: Console, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(60_001)
    target = tmp_path / "a file's name"
    shell.put(data, str(target))
    assert target.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == [target.name], "no part of it stays behind"
    assert shell.get(str(target)) == data
    shell.put(b"", str(tmp_path / "empty"))
    assert (tmp_path / "empty").read_bytes() == b""
    assert shell.get(str(tmp_path / "empty")) == b""
    with pytest.raises(BoardError, match=r"No such file|cannot open"):
        shell.get("/no/such/file")
    with pytest.raises(BoardError, match=r"directory/file.*([Nn]o such file|nonexistent)"):
        shell.put(b"x", "/no/such/directory/file", timeout_s=2)
    assert shell.run("echo usable").stdout == "usable\n"


def test_metrics_over_the_console(shell: Console) -> None:
    text = "# HELP board_up 1 when up\nboard_up 1\n"

    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    assert shell.fetch(f"{base}/metrics") == text
    with pytest.raises(BoardError, match="404"):
        shell.fetch(f"{base}/nothing")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("argv", SHELLS[:2], ids=" ".join)
def test_nothing_is_wrong_while_the_kernel_logs(argv: tuple[str, ...], tmp_path: Path) -> None:
    with ShellBoard(argv, lines_per_s=200) as board:
        console = Console.on_port(board.path)
        for number in range(25):
            done = console.run(f"echo a{number}; echo b{number}; exit {number}")
            assert (done.stdout, done.returncode) == (f"a{number}\nb{number}\n", number)
        data = random.Random(4).randbytes(8_000)
        console.put(data, str(tmp_path / "file"))
        assert console.get(str(tmp_path / "file")) == data
        assert board.inside > 5  # some of them tore a line apart
        console.close()


@pytest.mark.soak
def test_a_thousand_commands_under_200_kernel_lines_a_second() -> None:
    with ShellBoard(lines_per_s=200, seed=7) as board:
        console = Console.on_port(board.path)
        for number in range(1000):
            done = console.run(f"echo a{number}; seq {number % 50}; exit {number % 256}")
            wanted = f"a{number}\n" + "".join(f"{n}\n" for n in range(1, number % 50 + 1))
            assert (done.stdout, done.returncode) == (wanted, number % 256)
        assert board.inside > 200
        console.close()


def test_a_uart_that_drops_bytes_never_makes_a_wrong_command(tmp_path: Path) -> None:
    with ShellBoard(drop=0.004) as board:
        console = Console.on_port(board.path, pace_bytes=16)
        for number in range(10):
            while True:
                with contextlib.suppress(Unheard):
                    assert console.run(f"echo {number} >> {tmp_path}/ran; echo {number}", 5).stdout == f"{number}\n"
                    break
        console.close()
    ran = (tmp_path / "ran").read_text().split()
    assert ran == [str(number) for number in range(10)]
    assert os.listdir(tmp_path) == ["ran"]


def test_a_death_string_ends_a_command(tmp_path: Path) -> None:
    with ShellBoard() as board:
        console = Console.on_port(board.path, death=("Kernel panic",))
        console.run("true")
        threading.Timer(0.2, board.kernel, ["[  1.0] Kernel panic - not syncing\r\n"]).start()
        with pytest.raises(BoardError, match="said 'Kernel panic'"):
            console.run("sleep 20", 10)
        console.close()


def test_only_what_a_terminal_echoes_can_be_typed() -> None:
    console = Console.on_port("/dev/null")
    for text in ("", "tab\t", "ünder", "x" * 4001):
        with pytest.raises(UsageError, match="can be typed"):
            console.type(text)
    with pytest.raises(UsageError, match=r"console\.put"), ShellBoard() as board:
        Console.on_port(board.path).run("echo " + "x" * 4000)


def login_board(tmp_path: Path, password: str = "") -> Path:
    """A getty of sorts: a prompt, perhaps a password, a pause in which what is typed is dropped, and a shell."""
    script = tmp_path / "getty.sh"
    check = (
        f"""printf 'Password: '; stty -echo; read -r P; stty echo; echo
      if [ "$P" != '{password}' ]; then echo; echo 'Login incorrect'; continue; fi"""
        if password
        else ""
    )
    script.write_text(
        f"""stty kill '^U'
        while :; do
          printf '\\nvb1 login: '; read -r U || exit; [ -n "$U" ] || continue
          {check}
          if [ "$U" != root ]; then echo 'Login incorrect'; continue; fi
          echo 'Last login: never'; sleep 0.2
          while read -r -t 0.05 X; do :; done
          exec bash --norc -i
        done"""
    )
    return script


def prompted(console: Console, prompt: str) -> None:
    """Wait for the first prompt; one that the kernel tore apart is asked for again."""
    for _ in range(10):
        with contextlib.suppress(BoardError):
            console.expect(prompt, 5)
            return
        console.send("")
    pytest.fail(f"no {prompt!r} in ten tries")


@pytest.mark.parametrize(("password", "half_typed"), [("", ""), ("secret", ""), ("", "roo"), ("secret", "nobody\n")])
@pytest.mark.parametrize("noise", [0, 100])
def test_login(password: str, half_typed: str, noise: int, tmp_path: Path) -> None:
    with ShellBoard(("bash", str(login_board(tmp_path, password))), lines_per_s=noise) as board:
        console = Console.on_port(board.path)
        prompted(console, "login" if noise else "login:")
        console.send(half_typed, end="")
        console.login("root", password or None, timeout_s=90)
        assert console.run("echo in").stdout == "in\n"
        console.login("root", password or None, timeout_s=90)  # a shell that is there is left as it is
        assert console.run("echo $$").returncode == 0
        console.close()


UBOOT = """
import os, sys, time, tty
tty.setraw(0)
def say(text): os.write(1, text.replace("\\n", "\\r\\n").encode())
say("U-Boot 2023.01\\n")
say("Hit any key to stop autoboot:  2 ")
import select
for second in "10":
    if select.select([0], [], [], 0.4)[0]: break
    say("\\b\\b\\b " + second + " ")
else:
    say("\\nStarting kernel ...\\n"); time.sleep(60)
typed, line = os.read(0, 100), b""
if sys.argv[1:] == ["late"]:
    while b" " not in typed: typed += os.read(0, 100)
    line = b" "
say("\\n=> " + line.decode()); status = "0"
while True:
    for byte in os.read(0, 16):
        if byte == 0x15: line = b""
        elif byte in (10, 13):
            text, line = line.decode(), b""
            say("\\n")
            for part in text.split(";"):
                word, _, rest = part.strip().partition(" ")
                if word == "echo": say(rest.replace("'", "").replace("$?", status) + "\\n"); status = "0"
                elif word == "printenv": say("bootdelay=2\\n"); status = "0"
                elif word: say(f"Unknown command '{word}' - try 'help'\\n"); status = "1"
            say("=> ")
        else: line += bytes([byte]); os.write(1, bytes([byte]))
"""


# Late: the first line typed has stopped the firmware, the key meant to stop it arrives behind the prompt.
@pytest.mark.parametrize("key", ["in time", "late"])
def test_u_boot(key: str) -> None:
    with ShellBoard(("python3", "-c", UBOOT, key)) as board:
        console = Console.on_port(board.path, pace_bytes=8)
        console.expect("U-Boot 20", 5)
        console.uboot(timeout_s=10)
        done = console.uboot_run("printenv bootdelay", 5)
        assert (done.stdout, done.returncode) == ("bootdelay=2\n", 0)
        assert console.uboot_run("nonsense", 5).returncode == 1
        console.send("half typed", end="")
        console.uboot(timeout_s=5)
        assert console.uboot_run("printenv", 5).stdout == "bootdelay=2\n"
        console.close()


def test_no_more_is_typed_than_the_echo_allows() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    pieces: list[bytes] = []

    def echo() -> None:
        while sum(map(len, pieces)) < 101:
            pieces.append(os.read(master, 4096))
            time.sleep(0.002)
            for byte in pieces[-1]:
                os.write(master, bytes([byte]))

    thread = threading.Thread(target=echo)
    thread.start()
    console = Console.on_port(os.ttyname(slave), pace_bytes=8)
    console.type("x" * 100)
    thread.join()
    assert b"".join(pieces) == b"x" * 100 + b"\n"
    assert max(map(len, pieces)) <= 8
    console.close()
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        (b"\r\n# \r\n# \r\n# ", b"# "),
        (b"\r\n[root@b ~]# [   12.3] usb: new\r\n\r\n[root@b ~]# \r\n[root@b ~]# ", b"[root@b ~]# "),
        (b"[   12.3] a\r\n[   12.3] a\r\n[   12.4] b\r\n", b""),
        (b"", b""),
        (b"one\r\ntwo\r\n", b""),
    ],
)
def test_the_prompt_is_what_comes_again(said: bytes, prompt: bytes) -> None:
    assert frames.prompt_among(said) == prompt


# --- pure parts -------------------------------------------------------------------------------------------------------

NOISE = [b"[   12.345678] usb 1-1: new\r\n", b"echo\n", b"e\r\n", b"\n", b"echo one; echo\r\n"]


@settings(max_examples=60, deadline=None)
@given(
    inserted=st.lists(st.tuples(st.integers(0, 19), st.sampled_from(NOISE)), max_size=4),
    before=st.sampled_from([b"", b"# ", b"\x15\b \b", b"root@e:~# ", b"\x1b[?2004h# "]),
    cut=st.integers(1, 30),
)
def test_an_echo_is_seen_through_insertions(inserted: list[tuple[int, bytes]], before: bytes, cut: int) -> None:
    typed = b"echo one; echo two!!"
    stream = typed
    for at, noise in sorted(inserted, reverse=True):
        stream = stream[:at] + noise + stream[at:]
    stream = before + stream
    echo = frames.Echo(typed)
    for at in range(0, len(stream), cut):
        assert not echo.complete or at >= len(stream) - cut
        echo.feed(stream[at : at + cut])
    assert echo.complete


@given(lost=st.integers(0, 19), data=st.data())
def test_an_echo_that_lacks_a_byte_is_none(lost: int, data: st.DataObject) -> None:
    typed = b"rm -rf /tmp/a/b/*.py"
    at = data.draw(st.integers(0, 19))
    echo = frames.Echo(typed)
    shortened = typed[:lost] + typed[lost + 1 :]
    echo.feed(b"# " + shortened[:at] + b"[ 1.0] noise\r\n" + shortened[at:])
    assert not echo.complete


@given(st.binary(max_size=3000))
def test_cksum_is_that_of_posix(data: bytes) -> None:
    # From the standard's definition, bit by bit.
    crc = 0
    length = len(data).to_bytes((len(data).bit_length() + 7) // 8, "little")
    for byte in data[:200] + length if len(data) <= 200 else b"":
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    if len(data) <= 200:
        assert frames.posix_cksum(data) == crc ^ 0xFFFFFFFF


def test_cksum_is_that_of_the_program() -> None:
    data = zlib.compress(os.urandom(100_000))
    told = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout.split()
    assert frames.posix_cksum(data) == int(told[0])


def test_a_frame_that_was_changed_is_not_believed() -> None:
    text = base64.b64encode(b"hello, board").decode()
    total = f"HIL-n-S-{frames.posix_cksum(text.encode())}-{len(text)}-1."
    collected = frames.Frames("n")
    assert collected.feed(f"HIL-n-1-{text[:-4]}AAAA.\r\n{total}") is None
    assert collected.feed(f"HIL-n-1-{text[:3]}[ 1.0] x\r\n{text[3:]}.\r\n{total}") is None
    assert collected.feed(f"HIL-n-1-{text}.\r\n{total}") == b"hello, board"


@pytest.mark.parametrize(
    ("printed", "result"),
    [
        ("HIL-n-6-<abc 0>-n", None),
        ("HIL-n-5-<abc 0", ("abc", 0)),
        ("HIL-n-6-<a\r\nb 0", None),
        ("HIL-n-5-<a\r\nb 0", ("a\nb", 0)),
        ("HIL-n-5-<a[ 1.0] x\r\nbc 0", None),
        ("HIL-n-6-<abc 17", ("abc", 17)),
        ("HIL-n-5-<\u00fcbc 0", None),
        ("HIL-other-5-<abc 0", None),
    ],
)
def test_a_result_has_the_length_that_was_told(printed: str, result: object) -> None:
    assert frames.text_of(printed, "n") == result


# --- a board without a management address -----------------------------------------------------------------------------


@pytest.fixture(params=[0, 150], ids=["quiet", "logging"])
def far_shell(request: pytest.FixtureRequest) -> Iterator[ConsoleShell]:
    with ShellBoard(lines_per_s=request.param) as board:
        shell = ConsoleShell.connect(Console.on_port(board.path), 10, sys.executable)
        yield shell
        shell.close()


def test_a_shell_over_the_console(far_shell: ConsoleShell, tmp_path: Path) -> None:
    done = far_shell.run(["printf", "%s|", "a b", "$HOME", "it's"], 10)
    assert (done.argv[0], done.stdout, done.returncode) == ("printf", "a b|$HOME|it's|", 0)
    assert far_shell.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with pytest.raises(BoardError, match="ended with status 1"):
        far_shell.run(["false"], 10, check=True)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 20)
    far_shell.put(source, str(target))
    assert far_shell.get(str(target)) == source.read_bytes()
    os.truncate(source, 5 << 20)
    with pytest.raises(BenchError, match="too large for the console"):
        far_shell.put(source, str(target))


def test_a_process_over_the_console(far_shell: ConsoleShell, tmp_path: Path) -> None:
    process = far_shell.start(["sh", "-c", "echo begun; sleep 1; echo ended; exit 3"])
    assert process.running
    done = process.wait(10)
    assert (done.stdout, done.stderr, done.returncode) == ("begun\nended\n", "", 3)
    endless = far_shell.start(["sh", "-c", f"echo $$ >{tmp_path}/pid; exec sleep 1000"])
    deadline = time.monotonic() + 5
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    endless.kill()
    while _runs(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(BoardError, match="still runs after 0 s"):
        far_shell.start(["sleep", "1000"]).wait(0.0)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_http_over_the_console(far_shell: ConsoleShell) -> None:
    body = random.Random(9).randbytes(20_000)

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            heard = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"length": len(heard)}).encode())

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    reply = llm.request(far_shell.forward, "GET", f"{base}/x", timeout_s=20)
    assert reply.status == 200
    assert reply.body == body
    told = llm.request(far_shell.forward, "POST", f"{base}/x", {"text": "y" * 5000}, timeout_s=20)
    assert told.json()["length"] > 5000
    assert far_shell.run(["echo", "free"], 10).stdout == "free\n"
    server.shutdown()
    server.server_close()
    with pytest.raises(BoardError, match="refused"):
        far_shell.forward("127.0.0.1", server.server_port)
    with pytest.raises(llm.LinkLost):
        llm.request(far_shell.forward, "GET", base, timeout_s=10)
    assert far_shell.run(["echo", "still free"], 10).stdout == "still free\n"


class TearingBoard(ShellBoard):
    """Its kernel writes into the first word that a relay says."""

    torn = 0

    def _say(self, data: bytes) -> None:
        for word in (b"-A-0.", b"-X-"):
            at = data.find(word)
            if at >= 0 and not self.torn:
                self.torn += 1
                data = data[: at + 2] + self._message() + data[at + 2 :]
        super()._say(data)


def test_a_torn_first_word_of_a_forward_is_asked_for_again() -> None:
    with TearingBoard() as board:
        shell = ConsoleShell.connect(Console.on_port(board.path), 10, sys.executable)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            shell.forward("127.0.0.1", port).close()  # the relay is on the board now
            listener.accept()[0].close()
            board.torn = 0
            stream = shell.forward("127.0.0.1", port, timeout_s=5)
            assert board.torn == 1
            peer, _ = listener.accept()
            stream.sendall(b"there")
            assert peer.recv(10) == b"there"
            peer.close()
            assert stream.recv(10) == b""
            stream.close()
        board.torn = 0
        with pytest.raises(BoardError, match="refused"):
            shell.forward("127.0.0.1", port, timeout_s=5)
        assert board.torn == 1
        assert shell.run(["echo", "free"], 10).stdout == "free\n"
        shell.close()


def test_a_forward_that_nothing_carries_says_so() -> None:
    with ShellBoard() as board:
        shell = ConsoleShell.connect(Console.on_port(board.path), 10, "no-such-python")
        with pytest.raises(
            BoardError, match=r"nothing that leads to 127\.0\.0\.1:9 answered within 0\.3 s\n.*no-such-python"
        ):
            shell.forward("127.0.0.1", 9, timeout_s=0.3)
        assert shell.run(["echo", "free"], 10).stdout == "free\n"
        shell.close()


def test_a_call_waits_for_its_turn(far_shell: ConsoleShell) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    stream = far_shell.forward("127.0.0.1", listener.getsockname()[1])
    failures: list[BaseException] = []

    def other() -> None:
        try:
            far_shell.run(["true"], 0.2)
        except BoardError as error:
            failures.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "busy with another call" in str(failures[0])
    stream.settimeout(0.3)
    with pytest.raises(TimeoutError):
        stream.recv(10)
    peer, _ = listener.accept()
    peer.sendall(b"late")
    stream.settimeout(5)
    assert stream.recv(10) == b"late"
    peer.close()
    assert stream.recv(10) == b""
    stream.close()
    assert far_shell.run(["echo", "turn"], 10).stdout == "turn\n"
    listener.close()


def test_a_file_that_came_otherwise_does_not_take_its_place(tmp_path: Path) -> None:
    fake = tmp_path / "sha256sum"
    fake.write_text("#!/bin/sh\necho 0000\n")
    fake.chmod(0o755)
    with ShellBoard(env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}) as board:
        console = Console.on_port(board.path)
        with pytest.raises(BoardError, match="came with another SHA-256"):
            console.put(b"data", str(tmp_path / "file"))
        assert not (tmp_path / "file").exists()
        console.close()
