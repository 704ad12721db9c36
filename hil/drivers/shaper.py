"""One direction of a link in user space: what becomes of each packet, decided when it comes. No clock and no I/O.

The order of things is a radio's: packets wait for the transmitter, which takes each its length over the rate; then they
are under way for the delay, as it is when they leave. Loss is decided at the entrance: what is under way arrives.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hil.drivers.link import LinkCounters, bottleneck_packets
from hil.model import LinkState

Fate = Literal["sent", "corrupted", "duplicate", "lost", "outage", "overflow"]


@dataclass(slots=True, order=True)
class Packet:
    """A packet under way; ordered by when it is due, then by when it came."""

    due_s: float
    number: int
    in_s: float
    frame: bytes
    fate: Fate


@dataclass(frozen=True, slots=True)
class Point:
    """A state that holds from an instant on; delays between two points without an outage are interpolated."""

    at_s: float
    state: LinkState


class Shaper:
    """Takes frames with `offer`, gives them back with `take` when they are due. All times on one clock of the caller.

    `seed` makes losses, jitter, duplicates and corruption the same for the same packets. `record` hears of packets that
    never come out.
    """

    def __init__(self, seed: int, record: Callable[[Packet], None] = lambda packet: None) -> None:
        self._random = random.Random(seed)  # noqa: S311  (chance that can be repeated is what is wanted)
        self._record = record
        self._points: list[Point] = [Point(0.0, LinkState())]
        self._starts = [0.0]
        self._under_way: list[Packet] = []
        self._leaving: deque[float] = deque()  # when each packet that waits for the rate will have left
        self._free_s = self._last_due_s = 0.0
        self._number = 0
        self._sent_bytes = self._sent_packets = self._dropped = self._overflowed = self._backlog_bytes = 0

    def set(self, state: LinkState) -> None:
        """This state from now on, whatever was planned. Packets under way keep their times."""
        self.plan([Point(0.0, state)])

    def plan(self, points: Sequence[Point]) -> None:
        """These states, each from its instant on; the first one before its instant as well. Raises ValueError."""
        starts = [point.at_s for point in points]
        if not points or starts != sorted(starts):
            raise ValueError("a plan needs points in the order of time")
        self._points, self._starts = list(points), starts

    def state_at(self, t_s: float) -> LinkState:
        """The state at an instant, its delay as set: not interpolated."""
        return self._points[max(0, bisect_right(self._starts, t_s) - 1)].state

    def delay_at(self, t_s: float) -> float:
        """The delay of a packet that leaves at an instant, seconds."""
        index = max(0, bisect_right(self._starts, t_s) - 1)
        here = self._points[index]
        if index + 1 == len(self._points):
            return here.state.delay_s
        there = self._points[index + 1]
        if t_s < here.at_s or here.state.outage or there.state.outage:
            return here.state.delay_s
        part = (t_s - here.at_s) / (there.at_s - here.at_s)
        return here.state.delay_s + part * (there.state.delay_s - here.state.delay_s)

    def offer(self, frame: bytes, now_s: float) -> None:
        """A frame comes in."""
        state = self.state_at(now_s)
        chance = self._random.random
        if state.outage:
            self._drop(frame, now_s, "outage")
            return
        if state.loss and chance() < state.loss:
            self._drop(frame, now_s, "lost")
            return
        fate: Fate = "sent"
        if state.corrupt and chance() < state.corrupt:
            frame, fate = self._corrupted(frame), "corrupted"
        self._send(frame, now_s, state, fate)
        if state.duplicate and chance() < state.duplicate:
            self._send(frame, now_s, state, "duplicate")

    def next_due_s(self) -> float | None:
        """When the next packet is due; None without any under way."""
        return self._under_way[0].due_s if self._under_way else None

    def take(self, now_s: float) -> Packet | None:
        """The next packet that is due, or None."""
        if not self._under_way or self._under_way[0].due_s > now_s:
            return None
        packet = heapq.heappop(self._under_way)
        size = len(packet.frame)
        self._backlog_bytes -= size
        self._sent_bytes += size
        self._sent_packets += 1
        return packet

    def counters(self) -> LinkCounters:
        """What it has done; `dropped` holds loss and overflow, `overlimits` overflow alone."""
        return LinkCounters(
            self._sent_bytes,
            self._sent_packets,
            self._dropped,
            self._overflowed,
            self._backlog_bytes,
            len(self._under_way),
        )

    def _send(self, frame: bytes, now_s: float, state: LinkState, fate: Fate) -> None:
        leaves_s = now_s
        if state.rate_bps:
            while self._leaving and self._leaving[0] <= now_s:
                self._leaving.popleft()
            if len(self._leaving) >= bottleneck_packets(state):
                self._overflowed += 1
                self._drop(frame, now_s, "overflow")
                return
            leaves_s = max(now_s, self._free_s) + 8 * len(frame) / state.rate_bps
            self._free_s = leaves_s
            self._leaving.append(leaves_s)
        due_s = leaves_s + self.delay_at(leaves_s)
        if state.jitter_s:
            due_s = max(leaves_s, due_s + self._random.uniform(-state.jitter_s, state.jitter_s))
        if not state.reorder:
            due_s = max(due_s, self._last_due_s)
        self._last_due_s = max(due_s, self._last_due_s)
        heapq.heappush(self._under_way, Packet(due_s, self._count(), now_s, frame, fate))
        self._backlog_bytes += len(frame)

    def _drop(self, frame: bytes, now_s: float, fate: Fate) -> None:
        self._dropped += 1
        self._record(Packet(now_s, self._count(), now_s, frame, fate))

    def _count(self) -> int:
        self._number += 1
        return self._number

    def _corrupted(self, frame: bytes) -> bytes:
        """One bit of it turned, as netem does."""
        changed = bytearray(frame)
        bit = self._random.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)
