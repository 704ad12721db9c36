"""The virtual bench's Ethernet switch: floods, learns, survives a board's power cycle, drops what nobody takes."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from hil.errors import BenchError
from hil.virtual import hub as module
from hil.virtual.hub import Hub

BOX, ONE, TWO = (bytes([2, 0, 0, 0, 0, n]) for n in (1, 2, 3))
BROADCAST = b"\xff" * 6


class Station:
    """One end of a cable."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @staticmethod
    async def plug(path: Path) -> Station:
        return Station(*await asyncio.open_unix_connection(str(path)))

    def send(self, to: bytes, sender: bytes, text: bytes) -> None:
        frame = to + sender + text
        self.writer.write(struct.pack(">I", len(frame)) + frame)

    async def text(self) -> bytes:
        (length,) = struct.unpack(">I", await asyncio.wait_for(self.reader.readexactly(4), 20))
        return (await self.reader.readexactly(length))[12:]


async def bench(tmp_path: Path) -> tuple[Hub, Station, asyncio.Server]:
    plugged: asyncio.Future[Station] = asyncio.get_running_loop().create_future()
    box = await asyncio.start_unix_server(lambda r, w: plugged.set_result(Station(r, w)), str(tmp_path / "box"))
    hub = Hub(tmp_path / "box", {"one": tmp_path / "one", "two": tmp_path / "two"})
    await hub.start()
    return hub, await plugged, box


def test_frames_reach_whom_they_are_for_and_boards_may_come_and_go(tmp_path: Path) -> None:
    async def scenario() -> None:
        hub, box, server = await bench(tmp_path)
        one, two = await Station.plug(tmp_path / "one"), await Station.plug(tmp_path / "two")
        one.send(BROADCAST, ONE, b"who")
        assert await box.text() == await two.text() == b"who"
        two.send(BROADCAST, TWO, b"me")
        assert await box.text() == await one.text() == b"me"
        box.send(TWO, BOX, b"for two")
        box.send(BROADCAST, BOX, b"for all")
        assert await two.text() == b"for two"
        assert await one.text() == b"for all"  # and nothing before it
        one.writer.close()  # power cut
        one = await Station.plug(tmp_path / "one")
        one.send(BOX, ONE, b"again")
        assert await box.text() == b"again"
        box.send(ONE, BOX, b"welcome")
        assert await one.text() == b"welcome"
        await hub.stop()
        server.close()
        assert not (tmp_path / "one").exists()

    asyncio.run(scenario())


def test_a_port_that_does_not_read_stops_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_BYTES", 10_000)

    async def scenario() -> None:
        hub, box, server = await bench(tmp_path)
        stuck, two = await Station.plug(tmp_path / "one"), await Station.plug(tmp_path / "two")
        stuck.send(BROADCAST, ONE, b"here")
        assert await box.text() == await two.text() == b"here"
        for _ in range(600):
            box.send(ONE, BOX, b"x" * 1400)
        box.send(BROADCAST, BOX, b"last")
        assert await two.text() == b"last"
        assert 0 < hub.dropped_frames < 601
        await hub.stop()
        server.close()

    asyncio.run(scenario())


def test_no_link_box_is_said(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="inner port"):
        asyncio.run(Hub(tmp_path / "none", {}).start())
