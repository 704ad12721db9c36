"""What every link emulator is asked and answers: one complete state a direction, applied, acknowledged, read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hil.model import Applied, Direction, LinkState

FRAME_BYTES = 1514  # a full packet: 1500 and the Ethernet header
UNSHAPED_LIMIT = 10_000  # packets; 100 Mbit/s of full frames for 1.2 s
MIN_BUFFER, BUFFER_S = 256, 0.25  # the bottleneck's own buffer: holds one 256 KiB socket buffer, or a quarter second

DIRECTIONS: tuple[Direction, Direction] = ("uplink", "downlink")


@dataclass(frozen=True, slots=True)
class LinkCounters:
    """What one direction has done since hil began to shape it. `dropped` holds emulated loss and overflow alike."""

    sent_bytes: int
    sent_packets: int
    dropped: int
    overlimits: int
    backlog_bytes: int
    backlog_packets: int


class LinkEmulator(Protocol):
    """A link emulator, whatever its backend. Calls block; one user at a time. Errors are BenchError."""

    @property
    def lead_s(self) -> float:
        """How long a state is on its way before it takes effect, as far as is known: edges are sent so much earlier."""

    def open(self) -> None:
        """Connect, and refuse when the link cannot be shaped: nothing there, no rights, somebody else's qdisc."""

    def apply(self, states: Mapping[Direction, LinkState], scheduled_s: float) -> dict[Direction, Applied]:
        """Put complete states on the link, and return when the emulator has them, read back.

        `scheduled_s` and the times returned are of `time.monotonic()`. Directions left out stay as they are.
        """

    def state(self) -> dict[Direction, LinkState | None]:
        """What each direction has now; None where hil has not shaped it."""

    def counters(self) -> Mapping[Direction, LinkCounters]:
        """What passed and what was dropped."""

    def clear(self) -> list[str]:
        """Remove what hil added and nothing else; returns the names of what was removed."""

    def preflight(self) -> dict[str, Any]:
        """Facts for the run's provenance, among them `backend`, `netem` and `warnings`. Changes nothing."""

    def close(self) -> None:
        """Let go of the emulator; the link stays as it is."""


def bottleneck_packets(state: LinkState) -> int:
    """Packets that may wait for the link's rate: as asked, else a quarter of a second of full frames."""
    if state.queue_packets:
        return state.queue_packets
    if state.rate_bps == 0:
        return UNSHAPED_LIMIT
    return max(MIN_BUFFER, math.ceil(state.rate_bps / (8 * FRAME_BYTES) * BUFFER_S))


def queue_limit(state: LinkState) -> int:
    """Packets an emulator must hold that counts those in flight as well: rate x delay and the bottleneck's buffer.

    netem counts delayed packets against its limit, so a limit that ignores the delay drops packets nobody asked it to.
    """
    in_flight = math.ceil(state.rate_bps / (8 * FRAME_BYTES) * (state.delay_s + state.jitter_s))
    return in_flight + bottleneck_packets(state)
