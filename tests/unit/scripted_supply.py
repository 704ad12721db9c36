"""A supply's line that knows the whole dialogue in advance, and a driver on it, for wire-exact tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from hil.drivers.codec import LINE, Frame
from hil.drivers.dialects import dialect
from hil.drivers.scpi import ScpiSupply

T = TypeVar("T")
Exchange = tuple[str, str | Exception | None]
Script = Sequence[Exchange]


class ScriptedLine:
    """A transport: (sent, reply) pairs, where None is no reply. Checks text, terminator and frame of every message."""

    def __init__(self, script: Script, terminator: str) -> None:
        self.script = list(script)
        self.terminator = terminator
        self.reply: str | Exception | None = None
        self.rest = 0
        self.up = False
        self.connects = 0
        self.dropped = 0

    async def connect(self, deadline_s: float) -> None:
        self.connects += 1
        self.up, self.rest = True, 0

    def alive(self) -> bool:
        return self.up

    def write(self, data: bytes) -> None:
        sent = data.decode("latin-1")
        assert sent.endswith(self.terminator)
        sent = sent.removesuffix(self.terminator)
        assert self.script, f"nothing more was expected, got {sent!r}"
        expected, self.reply = self.script.pop(0)
        assert sent == expected, f"expected {expected!r}, got {sent!r}"

    async def read(self, deadline_s: float, frame: Frame = LINE) -> str:
        reply, self.reply = self.reply, None
        if isinstance(reply, Exception):
            raise reply
        assert reply is not None, "the script has no reply here"
        if frame.length > 0:
            assert len(reply) >= frame.length
            self.rest = len(reply) - frame.length
            return reply[: frame.length]
        return reply

    def unread(self) -> int:
        return self.rest

    def drop(self, count: int) -> None:
        self.dropped += min(count, self.rest)
        self.rest -= min(count, self.rest)

    def close(self) -> None:
        self.up = False


class Ticking:
    """A clock that goes on by itself, a little with every look, so that gaps and settling take no real time."""

    def __init__(self, step_s: float = 0.05) -> None:
        self.now_s = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


def scripted(name: str, *exchanges: Exchange, address: str = "tcp://192.0.2.1:5025") -> tuple[ScpiSupply, ScriptedLine]:
    """A driver of dialect `name` on a scripted line."""
    line = ScriptedLine(exchanges, dialect(name).terminator)
    return ScpiSupply(name, address, transport=line, clock=Ticking()), line


def play(
    name: str, action: Callable[[ScpiSupply], Awaitable[T]], *exchanges: Exchange, address: str = "tcp://192.0.2.1:5025"
) -> T:
    """Open, do, and require that the script was used up to its last line."""
    supply, line = scripted(name, *exchanges, address=address)

    async def steps() -> T:
        await supply.open()
        try:
            return await action(supply)
        finally:
            assert line.script == []

    return asyncio.run(steps())
