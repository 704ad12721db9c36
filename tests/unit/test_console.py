"""Consoles: nothing lost, many readers, one writer, ports that come and go; and the expect engine."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
import tty
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from console_board import ShellBoard
from hypothesis import given
from hypothesis import strategies as st

from hil.bench.consoles import Console as Server
from hil.bench.consoles import LineIndex, Ring
from hil.client.bench import Board as ClientBoard
from hil.client.console import Console
from hil.client.expect import Pattern, Search
from hil.errors import BenchError, BoardError, UsageError
from hil.inventory.bench import ConsoleWire


class Board:
    """The far end of a serial line: a pseudo terminal whose slave is linked at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plug_in()

    def plug_in(self) -> None:
        self.master, self.slave = os.openpty()
        tty.setraw(self.slave)
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(os.ttyname(self.slave))

    def unplug(self) -> None:
        os.close(self.slave)
        os.close(self.master)

    def say(self, data: bytes) -> None:
        os.write(self.master, data)

    def hear(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += os.read(self.master, count - len(data))
        return data


@asynccontextmanager
async def serving(tmp_path: Path, board: Board | None = None, **more: int) -> AsyncIterator[Server]:
    errors: list[BenchError] = []
    console = Server("vb1", str(tmp_path / "port"), 115200, tmp_path / "log", on_error=errors.append, **more)

    def authorize(token: str) -> None:
        if token != "right":
            raise BenchError("this lease is over")

    await console.serve(tmp_path / "c.sock", authorize)
    console.start()
    try:
        yield console
    finally:
        await console.stop()


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def client(tmp_path: Path, token: str | None = None, death: tuple[str, ...] = ()) -> Console:
    return Console.served("vb1", tmp_path / "c.sock", lambda: token, death)


def run(scenario: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario, 60)

    asyncio.run(bounded())


def test_the_log_begins_with_the_first_byte_even_from_before_the_daemon(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Board(tmp_path / "port")
        board.say(b"U-Boot 2023\r\n")
        async with serving(tmp_path) as console:
            await until(lambda: console.ring.end == 13)
            before = time.monotonic()
            board.say(b"login: ")
            await until(lambda: console.ring.end == 20)
            assert console.last_line == "login:"
        assert (tmp_path / "log/vb1.log").read_bytes() == b"U-Boot 2023\r\nlogin: "
        lines = [json.loads(line) for line in (tmp_path / "log/vb1.lines.jsonl").read_text().splitlines()]
        assert [(line["offset"], line["length"]) for line in lines] == [(0, 13), (13, 7)]
        assert lines[0]["t_mono"] < before <= lines[1]["t_mono"]

    run(scenario())


def test_a_port_that_appears_later_vanishes_and_returns(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as console:
            await until(lambda: console.reason != "not opened yet")
            with pytest.raises(BenchError, match="is not there: No such file"):
                await console.write(b"x")
            board = Board(tmp_path / "port")
            board.say(b"one")
            await until(lambda: console.ring.end == 3)
            board.unplug()
            await until(lambda: not console.connected)
            board.plug_in()
            board.say(b"two")
            await until(lambda: console.ring.end == 6)
            assert console.ring.since(0)[1] == b"onetwo"

    run(scenario())


def test_many_readers_and_only_the_lease_writes(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Board(tmp_path / "port")
        async with serving(tmp_path) as console:
            await until(lambda: console.connected)
            readers = [client(tmp_path) for _ in range(3)]
            writer = client(tmp_path, "right")
            for each in (*readers, writer):
                await asyncio.to_thread(each.mark)
            await asyncio.to_thread(writer.send, "boot")
            assert await asyncio.to_thread(board.hear, 5) == b"boot\n"
            board.say(b"starting\r\nlogin: ")
            for each in (*readers, writer):
                match = await asyncio.to_thread(each.expect, "log(in): ", 5)
                assert (match.text, match.groups, match.before) == ("login: ", ("in",), "starting\r\n")
                assert match.offset == console.ring.end
            with pytest.raises(BenchError, match="needs a lease"):
                readers[0].send("evil")
            with pytest.raises(BenchError, match="lease is over"):
                await asyncio.to_thread(client(tmp_path, "wrong").mark)
            for each in (*readers, writer):
                each.close()

    run(scenario())


def test_since_goes_back_and_says_when_bytes_are_gone(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Board(tmp_path / "port")
        async with serving(tmp_path, ring_bytes=1000) as console:
            reader = client(tmp_path)
            board.say(b"first login: ")
            await until(lambda: console.ring.end == 13)
            mark = await asyncio.to_thread(reader.mark)
            assert mark == 13
            assert (await asyncio.to_thread(reader.expect, "login", 1, since=0)).before == "first "
            for _ in range(5):
                end = console.ring.end
                board.say(b"x" * 1000)
                await until(lambda end=end: console.ring.end == end + 1000)  # type: ignore[misc]
            with pytest.raises(BenchError, match="no longer in the daemon's memory"):
                await asyncio.to_thread(client(tmp_path).expect, "login", 1, since=0)
            reader.close()

    run(scenario())


def test_commands_files_and_the_log_through_the_daemon(tmp_path: Path) -> None:
    async def scenario() -> None:
        with ShellBoard() as board:  # a kernel's line would tear the echo that is looked for
            (tmp_path / "port").symlink_to(board.path)
            async with serving(tmp_path) as console:
                await until(lambda: console.connected)
                mine, other = client(tmp_path, "right"), client(tmp_path)
                await asyncio.to_thread(other.mark)
                done = await asyncio.to_thread(mine.run, "echo one; exit 3", 10)
                assert (done.stdout, done.returncode) == ("one\n", 3)
                await asyncio.to_thread(mine.put, b"data" * 500, str(tmp_path / "file"), 20)
                assert await asyncio.to_thread(mine.get, str(tmp_path / "file")) == b"data" * 500
                with pytest.raises(BenchError, match="needs a lease"):
                    await asyncio.to_thread(other.run, "true")
                heard = await asyncio.to_thread(other.read_available)
                assert b"echo one; exit 3" in heard
                for each in (mine, other):
                    each.close()
        assert b"echo one; exit 3" in (tmp_path / "log/vb1.log").read_bytes()

    run(scenario())


def test_a_time_out_quotes_the_last_bytes_and_a_death_string_aborts(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Board(tmp_path / "port")
        async with serving(tmp_path) as console:
            reader = client(tmp_path, death=("Kernel panic",))
            await asyncio.to_thread(reader.mark)
            board.say(b"Loading\x00 kernel\r\n")
            with pytest.raises(BoardError, match=r"(?s)'login:' did not come within 0.05 s.*Loading\\x00 kernel"):
                await asyncio.to_thread(reader.expect, "login:", 0.05)
            # A time-out consumes nothing: what came is still there for the next expect.
            assert (await asyncio.to_thread(reader.expect, "kernel", 1)).before == "Loading\x00 "
            board.say(b"Kernel panic - not syncing\r\nlogin:")
            with pytest.raises(BoardError, match=r"(?s)board vb1: .* said 'Kernel panic' while .*not syncing"):
                await asyncio.to_thread(reader.expect, "login:", 5)
            assert console.connected
            reader.close()

    run(scenario())


def test_a_full_disk_ends_the_log_loudly_and_not_the_console(tmp_path: Path) -> None:
    async def scenario() -> None:
        board = Board(tmp_path / "port")
        (tmp_path / "log").mkdir()
        (tmp_path / "log/vb1.log").symlink_to("/dev/full")
        errors: list[BenchError] = []
        console = Server("vb1", str(tmp_path / "port"), 115200, tmp_path / "log", on_error=errors.append)
        console.start()
        board.say(b"hello")
        await until(lambda: console.ring.end == 5)
        assert "No space left" in errors[0].message
        await console.stop()

    run(scenario())


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a.*b", r"unbounded.*\.\{0,80\} instead of"),
        ("x+", "unbounded"),
        ("(", "not a regular expression"),
        ("(a|b)?", "no text at all"),
        ("a{5000}", "unbounded"),
        ("login(?!:)", "looks ahead"),
        ("a(b(?=.*c))", "looks ahead"),
    ],
)
def test_patterns_without_bound_are_refused(pattern: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){why}"):
        Pattern(pattern)


def test_a_look_back_is_bounded_and_allowed() -> None:
    search = Search(Pattern("(?<!last )login: ?"), start=0)
    search.feed(b"last login: never\r\nvb1 lo")
    assert search.found(0.0) is None
    search.feed(b"gin: ")
    found = search.found(0.0)
    assert found is not None
    assert found.offset == 30


@given(
    pieces=st.permutations([b"log", b"login: ", b"xx" * 20, b"pan", b"panic"]),
    take=st.integers(1, 5),
    cuts=st.sets(st.integers(0, 60)),
    start=st.integers(0),
)
def test_how_the_stream_is_cut_changes_nothing(pieces: list[bytes], take: int, cuts: set[int], start: int) -> None:
    stream = b"".join(pieces[:take])
    chunks = [stream[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(stream)]) if a < b]
    whole = Search(Pattern("login: "), [Pattern("panic")], start=start)
    whole.feed(stream)
    cut = Search(Pattern("login: "), [Pattern("panic")], start=start, keep=1)

    def outcome(search: Search) -> object:
        try:
            found = search.found(0.0)
        except BoardError:
            return "death"
        return found and found.offset

    result = None
    for chunk in chunks:
        cut.feed(chunk)
        result = result or outcome(cut)
        if result is not None:
            break
    assert result == outcome(whole)


@given(chunks=st.lists(st.binary(max_size=40), max_size=30))
def test_ring_and_line_index_lose_nothing(chunks: list[bytes]) -> None:
    ring, index = Ring(limit=50), LineIndex()
    stream = b"".join(chunks)
    lines = []
    for number, chunk in enumerate(chunks):
        ring.append(chunk)
        lines += index.feed(chunk, float(number))
    assert ring.end == len(stream)
    assert ring.since(0) == (ring.start, stream[ring.start :])
    assert ring.start <= max(0, len(stream) - 50)
    lines += index.rest()
    assert b"".join(stream[offset : offset + length] for _, offset, length in lines) == stream
    assert all(stream[offset : offset + length].count(b"\n") <= 1 for _, offset, length in lines)


def test_a_board_without_mgmt_has_its_shell_on_the_console(tmp_path: Path) -> None:
    epoch = [1]
    lease: Any = SimpleNamespace(token="right", check=lambda name: None, power_epochs={})

    def power_epoch(board: str, token: str, known: int | None) -> int:
        if epoch[0] != 1:
            raise BenchError("the power of board vb1 was cut")
        return epoch[0]

    bench: Any = SimpleNamespace(
        console_socket=lambda name: tmp_path / "c.sock", power_epoch=power_epoch, inventory=SimpleNamespace(url="")
    )
    wires: Any = SimpleNamespace(mgmt=None, payload=None, console=ConsoleWire(port="/dev/unused"))
    kind: Any = SimpleNamespace(boot=SimpleNamespace(death=()), runtime_python=sys.executable)

    def work() -> None:
        board = ClientBoard(bench, "vb1", wires, kind, lease)
        mark = board.console.mark()
        assert board.shell.run(["uname", "-s"], 10).stdout == "Linux\n"
        assert "uname" in board.console.expect("uname -s", 5, since=mark).text  # the console's own stream reads on
        first = board.shell
        assert board.shell is first
        board.disconnect()
        assert board.shell is not first
        epoch[0] = 2
        with pytest.raises(BenchError, match="was cut"):
            board.shell.run(["true"], 10)

    async def scenario() -> None:
        with ShellBoard() as terminal:
            (tmp_path / "port").symlink_to(terminal.path)
            async with serving(tmp_path) as console:
                await until(lambda: console.connected)
                await asyncio.to_thread(work)

    run(scenario())
