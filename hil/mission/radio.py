"""What the radio path makes of geometry: one-way delay, fixed rates, the time a modem needs to lock."""

from __future__ import annotations

from dataclasses import dataclass

from hil.errors import UsageError
from hil.mission.passes import Handover
from hil.model import LinkState

SPEED_OF_LIGHT_M_S = 299_792_458.0
OUTAGE = LinkState(outage=True)


def one_way_delay_s(range_m: float, processing_s: float = 0.0) -> float:
    """Vacuum light time over the slant range plus a fixed processing time, seconds.

    Geometric: the station's motion during the flight of the signal (3 m at most) is neglected.
    """
    return range_m / SPEED_OF_LIGHT_M_S + processing_s


@dataclass(frozen=True, slots=True)
class LinkEnvironment:
    """A radio link with published, fixed rates.

    `uplink_bps`, `downlink_bps` are bits per second of mission time; losses are shares of packets. `acquisition_s` is
    the silence after AOS and after each handover until the modem has locked. `processing_s` adds to each direction.
    """

    uplink_bps: float
    downlink_bps: float
    uplink_loss: float = 0.0
    downlink_loss: float = 0.0
    jitter_s: float = 0.0
    processing_s: float = 0.0
    acquisition_s: float = 0.0
    handover: Handover = "keep-current"

    def __post_init__(self) -> None:
        for name in ("uplink_bps", "downlink_bps"):
            if not 0 < getattr(self, name) < 1e13:
                raise UsageError(f"link {name} is {getattr(self, name)}", hint="give bits per second, above zero")
        for name in ("uplink_loss", "downlink_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"link {name} is {getattr(self, name)}", hint="a share of packets, 0..1")
        for name in ("jitter_s", "processing_s", "acquisition_s"):
            if not 0 <= getattr(self, name) < 3_600:
                raise UsageError(f"link {name} is {getattr(self, name)}", hint="seconds, zero or more")
        if self.handover not in ("keep-current", "highest"):
            raise UsageError(f"unknown handover rule {self.handover!r}", hint="keep-current or highest")
