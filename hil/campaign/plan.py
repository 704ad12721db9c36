"""How long a mission's steps will take on a bench, and how many contacts an upload needs. Plans, not measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hil.errors import UsageError
from hil.inventory.mission_steps import ServeStep, Step
from hil.mission.thermal import Burst, burst_forecast

if TYPE_CHECKING:
    from hil.inventory import BoardType, Mission
    from hil.mission.timeline import Timeline

_HANDLING_S = 5.0  # around every contact: jump, connection, clock; seen on the virtual bench


@dataclass(frozen=True, slots=True)
class UploadNeed:
    """What an upload has to bring and what its contacts carry; `contacts` None when they do not suffice."""

    bytes: int
    contacts: int | None
    allowed: int
    carried_bits: float


@dataclass(frozen=True, slots=True)
class WallTime:
    """A step's wall seconds: `planned` from the mission's clock, or `limit`, its time-out. None: nobody can say."""

    step: str
    wall_s: float | None
    basis: str


def rate_of(step: Step) -> float:
    """The clock rate that a step runs at; 1 for those that cannot be scaled."""
    return float(getattr(getattr(step, step.kind), "clock_rate", 1.0))


def upload(mission: Mission, timeline: Timeline) -> UploadNeed | None:
    """The mission's first upload against the link's capacity; None when the file's size is unknown."""
    step = next(item.upload for item in mission.file.steps if item.upload is not None)
    model = mission.file.model
    size = model.file.stat().st_size if model.file.is_file() else model.size_bytes
    if size is None:
        return None
    left = max(size - step.preload_bytes, 0)
    contacts, carried = None, 0.0
    usable = timeline.contacts[: step.max_contacts]
    for index, contact in enumerate(usable):
        begin_s = contact.los_s - step.contact_share * contact.duration_s
        carried += timeline.capacity_bits("uplink", begin_s, contact.los_s)
        if contacts is None and carried >= left * 8:
            contacts = index + 1
    return UploadNeed(left, contacts, len(usable), carried)


def wall_times(mission: Mission, timeline: Timeline, board: BoardType) -> list[WallTime]:
    """Wall time of every step, in order."""
    return [_wall_time(step, mission, timeline, board) for step in mission.file.steps]


def _wall_time(step: Step, mission: Mission, timeline: Timeline, board: BoardType) -> WallTime:
    own: Any = getattr(step, step.kind)
    acquisition_s = mission.file.link.acquisition_s
    if step.kind == "boot":
        return WallTime("boot", board.boot.timeout_s, "limit")
    if step.kind == "upload":
        return WallTime("upload", _upload_s(mission, timeline, own), "planned")
    if step.kind == "query":
        count = len(own.prompts) * own.repeat
        return WallTime("query", acquisition_s + count * own.first_estimate_s, "planned")
    if step.kind == "loss_of_signal":
        return WallTime("loss_of_signal", own.repeat * (own.before_los_s + acquisition_s + _HANDLING_S), "planned")
    if step.kind == "eclipse":
        longest = max((item.duration_s for item in timeline.eclipses), default=0.0)
        # the dark, about as long again to recharge, and a boot
        return WallTime("eclipse", 2 * longest / own.clock_rate + board.boot.timeout_s, "planned")
    if step.kind == "cruise":
        period_s = timeline.environment.orbit.period_s
        seconds = own.hours * 3600.0 if own.hours is not None else own.orbits * period_s
        return WallTime("cruise", seconds / own.clock_rate, "planned")
    if step.kind == "duty_cycle":
        return _duty_cycle(own, timeline, board)
    if step.kind == "run":
        cuts = own.power_cuts * (own.cut_after_s[1] + board.boot.timeout_s)
        return WallTime(f"run {own.name}", own.timeout_s + cuts, "limit")
    if step.kind == "check":
        return WallTime("check", ServeStep().timeout_s + acquisition_s + _HANDLING_S, "limit")
    return WallTime(step.kind, getattr(own, "timeout_s", _HANDLING_S), "limit")


def burst(timeline: Timeline, board: BoardType) -> Burst:
    """The first burst and the rest after it, by the thermal model in the dark. Raises UsageError without a model."""
    thermal = timeline.environment.thermal
    if thermal is None or thermal.cutoff is None:
        raise UsageError(
            f"mission {timeline.environment.name} has no thermal cutoff", hint="a duty_cycle step needs one"
        )
    return burst_forecast(thermal, board.power.inference_w, board.power.idle_w)


def _duty_cycle(step: Any, timeline: Timeline, board: BoardType) -> WallTime:
    found = burst(timeline, board)
    if found.run_s is None or found.cool_s is None:
        return WallTime("duty_cycle", step.bursts * (step.burst_timeout_s + step.rest_timeout_s), "limit")
    return WallTime("duty_cycle", step.bursts * found.run_s + (step.bursts - 1) * found.cool_s, "planned")


def _upload_s(mission: Mission, timeline: Timeline, step: Any) -> float | None:
    need = upload(mission, timeline)
    if need is None or need.contacts is None:
        return None
    seconds = sum(item.duration_s for item in timeline.contacts[: need.contacts]) * step.contact_share
    return float(seconds / step.clock_rate + need.contacts * _HANDLING_S)
