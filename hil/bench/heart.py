"""The dead-man of the moment, as the daemon holds it: a new one takes the place of one that died."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from hil.bench.deadman import ArmedOutput, Deadman
from hil.bench.safety import Intent
from hil.errors import BenchError


class Heart:
    """The dead-man of the moment: a new one takes the place of one that died, once no output hangs on it.

    `until_off` returns when every output is verified off, SafetyError when that does not come about.
    """

    def __init__(self, make: Callable[[], Deadman], until_off: Callable[[], Awaitable[None]]) -> None:
        self._make = make
        self._until_off = until_off
        self._deadman: Deadman | None = None
        self._starting = asyncio.Lock()

    @property
    def armed(self) -> bool:
        return self._deadman is not None and self._deadman.armed

    @property
    def alive(self) -> bool:
        return self._deadman is not None and self._deadman.alive

    @property
    def pid(self) -> int | None:
        return self._deadman.pid if self._deadman is not None and self._deadman.alive else None

    def beat(self, source: str) -> None:
        if self._deadman is not None:
            self._deadman.beat(source)

    async def arm(self, output: ArmedOutput) -> None:
        await self._need().arm(output)

    async def disarm(self, intent: Intent) -> None:
        await self._need().disarm(intent)

    async def ensure(self) -> None:
        """Start a dead-man unless one lives. Raises SafetyError when it does not come up."""
        async with self._starting:
            if not self.alive:
                # With a new one at hand the power loops would not notice that nobody watches what is on.
                await self._until_off()
                await self._replace()

    async def hand_over(self, left: Sequence[Intent]) -> None:
        """Have a dead-man go on trying to switch these off when this process is gone."""
        async with self._starting:
            if not self.alive:
                await self._replace()
        for intent in left:
            await self.arm(ArmedOutput("leftover", intent))

    async def _replace(self) -> None:
        if self._deadman is not None:
            await self._deadman.kill()
        self._deadman = self._make()
        await self._deadman.start()

    async def died(self) -> None:
        """Return when the present dead-man has died."""
        await self._need().dead.wait()

    async def stop(self) -> None:
        """Let it end. Only with every output verified off."""
        if self._deadman is not None:
            await self._deadman.stop()

    def _need(self) -> Deadman:
        if self._deadman is None:
            raise BenchError("the dead-man was not started")
        return self._deadman
