"""The one reader of all consoles: it keeps the cost of reading bounded, however many boards talk at once.

A UART hands over a few bytes at a time, and waking up for each of them would cost a core for some dozen boards. A port
that was silent is read at once, and so is one that was just written to, because somebody waits for the answer. One that
goes on talking is read in rounds with all others that do, the rarer the more they are: some milliseconds later, from
the driver's buffer, which holds 4 KiB or more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from hil.drivers.serial_port import Port

BULK_BYTES = 1024  # a read of this much says that waiting would only fill the driver's buffer
ROUND_S = 0.001
ROUND_PER_PORT_S = 0.00025  # at some 25 us a read, a tenth of a core; 64 ports: a round every 16 ms
HURRY_S = 0.02


@dataclass(slots=True, eq=False)
class Watched:
    """A port that is read. `received` gets its bytes, `lost` the error with which it went away, as the last thing."""

    port: Port
    received: Callable[[bytes], None]
    lost: Callable[[OSError], None]
    hurried_until_s: float = 0.0


class PortReader:
    """Reads many ports on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._talking: dict[int, Watched] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, port: Port, received: Callable[[bytes], None], lost: Callable[[OSError], None]) -> Watched:
        """Read `port` from now on."""
        watched = Watched(port, received, lost)
        asyncio.get_running_loop().add_reader(port.fileno(), self._ready, watched)
        return watched

    def remove(self, watched: Watched) -> None:
        """Read it no more; the caller closes the port afterwards."""
        number = watched.port.fileno()
        self._talking.pop(number, None)
        asyncio.get_running_loop().remove_reader(number)

    def hurry(self, watched: Watched) -> None:
        """Something was written to it: what it answers is wanted at once."""
        watched.hurried_until_s = self._clock() + HURRY_S
        if self._talking.pop(watched.port.fileno(), None) is not None:
            asyncio.get_running_loop().add_reader(watched.port.fileno(), self._ready, watched)

    def _ready(self, watched: Watched) -> None:
        count = self._take(watched)
        if 0 <= count < BULK_BYTES and self._clock() >= watched.hurried_until_s:
            loop = asyncio.get_running_loop()
            loop.remove_reader(watched.port.fileno())
            self._talking[watched.port.fileno()] = watched
            if self._timer is None:
                self._timer = loop.call_later(ROUND_S, self._round)

    def _round(self) -> None:
        loop = asyncio.get_running_loop()
        for number, watched in tuple(self._talking.items()):
            if self._talking.get(number) is not watched:
                continue  # removed by what another one's bytes set off
            count = self._take(watched)
            if (count == 0 or count >= BULK_BYTES) and self._talking.pop(number, None) is not None:
                loop.add_reader(number, self._ready, watched)
        self._timer = None
        if self._talking:
            self._timer = loop.call_later(max(ROUND_S, ROUND_PER_PORT_S * len(self._talking)), self._round)

    def _take(self, watched: Watched) -> int:
        """How many bytes were there; -1 when the port is gone."""
        try:
            data = watched.port.read()
        except OSError as error:
            self.remove(watched)
            watched.lost(error)
            return -1
        if data:
            watched.received(data)
        return len(data)
