"""Whether a board's CFDP receiver takes what upload steps send it: the uplink's rate times the mission clock's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hil.campaign.pace import Pace
from hil.errors import UsageError
from hil.inventory.environment import line_of

if TYPE_CHECKING:
    from hil.inventory import BoardType, Mission
    from hil.mission.timeline import Timeline


@dataclass(frozen=True, slots=True)
class SenderRate:
    """One `upload` step with `protocol: cfdp`: `place` is its file, line and number; rates are of Ethernet frames.

    `highest_clock_rate` is what the receiver's measured rate allows; None when that is unknown, below 1 when the link
    alone is too fast for the board.
    """

    place: str
    clock_rate: float
    needed_bps: float
    limit_bps: float | None
    highest_clock_rate: float | None

    @property
    def fits(self) -> bool | None:
        """None: nobody has measured what the board takes."""
        return None if self.limit_bps is None else self.needed_bps <= self.limit_bps

    @property
    def advice(self) -> str:
        """What to write instead, for a step that does not fit."""
        if self.highest_clock_rate is None or self.highest_clock_rate < 1:
            return "the link alone is too fast for its receiver: `protocol: sftp`, which keeps to the board's pace"
        return f"write `clock_rate: {self.highest_clock_rate:g}` there, or `protocol: sftp`"


def sender_rates(mission: Mission, timeline: Timeline, board: BoardType, pace: Pace | None = None) -> list[SenderRate]:
    """Every CFDP upload of a mission on a board, at the rates of the file or those that `pace` asks for."""
    pace = Pace.of(mission) if pace is None else pace
    uplink_bps = float(timeline.uplink_bps.max())
    limit_bps = None if board.cfdp_receiver is None else board.cfdp_receiver.rate_bps
    found = []
    for index, step in enumerate(mission.file.steps):
        if step.upload is None or step.upload.protocol != "cfdp":
            continue
        clock_rate = pace.rate_of(step.upload.clock_rate)
        highest = None if limit_bps is None or uplink_bps <= 0 else limit_bps / uplink_bps
        found.append(
            SenderRate(
                place=f"{mission.path}:{line_of(mission, 'steps', index)}: step {index + 1} (upload)",
                clock_rate=clock_rate,
                needed_bps=uplink_bps * clock_rate,
                limit_bps=limit_bps,
                highest_clock_rate=None if highest is None else float(math.floor(highest)) if highest >= 1 else highest,
            )
        )
    return found


def check_sender_rates(mission: Mission, timeline: Timeline, board: BoardType, pace: Pace) -> None:
    """Raises UsageError for an upload that would send faster than the board's receiver was measured to take."""
    for rate in sender_rates(mission, timeline, board, pace):
        if rate.fits is False and board.cfdp_receiver is not None:
            raise UsageError(
                f"{rate.place}: CFDP would send {rate.needed_bps / 1e6:.3g} Mbit/s at clock rate {rate.clock_rate:g}; "
                f"the receiver on a {board.name} takes {board.cfdp_receiver.rate_bps / 1e6:.3g} Mbit/s "
                f"({board.cfdp_receiver.source})",
                hint=rate.advice,
            )
