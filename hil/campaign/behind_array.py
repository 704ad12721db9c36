"""What a mission may ask of a board behind a solar-array simulator: its battery is real, and no model stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hil.campaign.evidence import Measure, Measured, NoEvidence
from hil.errors import UsageError
from hil.mission.solar_array import SasCurve, sas_rows

if TYPE_CHECKING:
    from hil.campaign.pace import Pace
    from hil.campaign.record import Record
    from hil.inventory import Bench, Mission
    from hil.inventory.board_type import SupplyLimits
    from hil.inventory.mission_steps import Step
    from hil.mission.timeline import Timeline

#: Steps that wait for what only the models do, and what that is.
STEPS: Mapping[str, str] = {
    "eclipse": "the modelled battery's load shedding",
    "duty_cycle": "the modelled heat of the board",
}
_CARRIED = "needs the board without power, but an array that is off leaves it the unit's battery"
_UNIT = "the real power unit's, which this bench does not see"
_DRAWN = "drawn from the array, which charges the unit's battery too: what the board took of it is not measured"
#: Prefixes of measures that need what is not there, and why; the first that fits.
_LACKING: tuple[tuple[str, str], ...] = (
    ("eclipse.", f"load shedding and bus voltage are {_UNIT}"),
    ("cruise.soc", f"the state of charge is {_UNIT}"),
    ("cruise.sheds", f"load shedding is {_UNIT}"),
    ("cruise.restored", f"load shedding is {_UNIT}"),
    ("recover.boot_ok", f"load shedding is {_UNIT}"),
    ("board.below_lockout", f"the board's voltage is {_UNIT}"),
    ("duty.", "no heat of the board is modelled"),
    ("power.inference_minus_idle", f"power is {_DRAWN}"),
    ("power.max", f"power is {_DRAWN}"),
    ("energy.j_per_token", f"energy is {_DRAWN}"),
    ("energy.gap", f"energy is {_DRAWN}"),
    ("energy.ledger", "no battery is modelled"),
    ("energy.fed", "no battery is modelled"),
)


def lacking(measure: str) -> str:
    """Why a measure has no evidence of a board behind an array; empty when it has."""
    why = next((why for prefix, why in _LACKING if measure.startswith(prefix)), "")
    return f"behind a solar-array simulator: {why}" if why else ""


def flown(record: Record) -> bool:
    """Whether this record is of a board behind an array."""
    return record.meta.get("power_source") == "array"


def guarded(measure: Measure) -> Measure:
    """The measure, without evidence where there is none behind an array."""
    why = lacking(measure.name)
    if not why:
        return measure

    def of(record: Record) -> Measured:
        if flown(record):
            raise NoEvidence(why)
        return measure.of(record)

    return replace(measure, of=of)


def input_limits(bench: Bench, board: str | None) -> SupplyLimits | None:
    """The limits of the power unit's input, when the board hangs on an array; else None."""
    _, wires, kind = bench.board(board)
    wire = wires.power[0]
    return kind.limits(wire.rail) if wire.source == "array" else None


def refused(step: Step) -> str:
    """Why a board behind an array cannot fly a step; empty when it can."""
    if step.kind in STEPS:
        return f"`{step.kind}` waits for {STEPS[step.kind]}"
    if step.cruise is not None and step.cruise.shutdown_before_eclipse_s is not None:
        return f"`cruise` with `shutdown_before_eclipse_s` {_CARRIED}"
    if step.run is not None and step.run.power_cuts:
        return f"`run` with `power_cuts` {_CARRIED}"
    return ""


def check_pace(mission: Mission, board: str, pace: Pace) -> None:
    """Refuse to fly a board behind an array otherwise than in real time, gaps and all. Raises UsageError."""
    if pace.rate != 1.0 or pace.contacts_only:
        raise UsageError(
            f"{mission.path}: board {board} hangs on an array, before a real battery: that follows no faster clock "
            "and no skip",
            hint="fly it with --rate 1 and without --contacts-only; --from and --until bound what that takes",
        )
    for index, step in enumerate(mission.file.steps, 1):
        if why := refused(step):
            raise UsageError(
                f"{mission.path}: step {index}: {why}; board {board} hangs on an array, before a real power unit",
                hint="leave that out; a plain `cruise` flies through eclipses; a board is cut by its `lines`",
            )


def brightest(timeline: Timeline) -> SasCurve:
    """The mission's array at its brightest. Raises UsageError for one without a curve or light."""
    power = timeline.environment.power
    if power is None:
        raise UsageError("the mission has no `power:`, hence no array")
    (row,) = sas_rows(power.array, np.array([float(timeline.array_w.max())])).tolist()
    return SasCurve(*row)
