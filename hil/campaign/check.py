"""What a mission needs and whether it is sound, before any instrument is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hil.campaign.verdict import check_criteria
from hil.errors import UsageError
from hil.inventory.environment import environment
from hil.mission import budget
from hil.mission.timeline import compile_timeline

if TYPE_CHECKING:
    from hil.inventory import BoardType, Mission
    from hil.mission.timeline import Timeline

# The demo's eclipse must be survived at idle and must not be survived under full inference, both with a margin.
IDLE_MARGIN = 1.2
FULL_MARGIN = 0.8


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: what, whether it holds, and what was found."""

    what: str
    ok: bool
    found: str


def check_mission(mission: Mission, board: BoardType) -> list[Finding]:
    """Every finding about `mission` flown with `board`. Raises UsageError when it cannot be compiled at all."""
    timeline = compile_timeline(environment(mission, board))
    findings = [
        Finding(
            "contacts",
            bool(timeline.contacts),
            f"{len(timeline.contacts)}, {sum(c.duration_s for c in timeline.contacts) / 60:.0f} min in all",
        ),
        _balance(timeline),
        _criteria(mission),
        _model(mission),
    ]
    kinds = [step.kind for step in mission.file.steps]
    if "upload" in kinds:
        findings.insert(1, _upload(mission, timeline))
    if "eclipse" in kinds:
        findings[-2:-2] = [_eclipse(timeline), _platform(timeline)]
    return findings


def _upload(mission: Mission, timeline: Timeline) -> Finding:
    step = next(item.upload for item in mission.file.steps if item.upload is not None)
    if not mission.file.model.file.is_file():
        return Finding("upload fits the contacts", False, "the model file is absent, its size is unknown")
    left = mission.file.model.file.stat().st_size - step.preload_bytes
    rate_bps = mission.file.link.uplink.rate_bps
    if rate_bps is None:
        return Finding("upload fits the contacts", False, "the uplink has no fixed rate")
    needed_s = left * 8 / rate_bps
    lost_s = mission.file.link.acquisition_s
    usable = [
        max(contact.duration_s * step.contact_share - lost_s * len(contact.spans), 0.0)
        for contact in timeline.contacts[: step.max_contacts]
    ]
    return Finding(
        "upload fits the contacts",
        sum(usable) > needed_s,
        f"{left / 1e6:.1f} MB need {needed_s:.0f} s of contact; the first {len(usable)} give {sum(usable):.0f} s",
    )


def _balance(timeline: Timeline) -> Finding:
    balance = budget.orbit_balance(timeline)
    return Finding("energy of an orbit at idle", balance.closes, balance.message)


def _eclipse(timeline: Timeline) -> Finding:
    need = budget.eclipse_budget(timeline)
    ok = need.idle_wh * IDLE_MARGIN < need.usable_wh < need.full_wh * FULL_MARGIN
    return Finding(
        "an eclipse is survived idle, and sheds the load under full inference",
        ok,
        f"idle {need.idle_wh:.2f} Wh x {IDLE_MARGIN} < usable {need.usable_wh:.2f} Wh < "
        f"full {need.full_wh:.2f} Wh x {FULL_MARGIN}",
    )


def _platform(timeline: Timeline) -> Finding:
    forecast = budget.shed_forecast(timeline)
    if forecast is None:
        return Finding("the platform survives the shed eclipse", False, "there is no eclipse")
    return Finding(
        "the platform survives the shed eclipse",
        not forecast.platform_lost,
        f"lowest state of charge {forecast.lowest_soc:.1%}"
        + (", the battery is empty before sunrise" if forecast.platform_lost else ""),
    )


def _criteria(mission: Mission) -> Finding:
    what = f"{len(mission.file.criteria)} acceptance criteria"
    try:
        check_criteria(mission.file.criteria, str(mission.path), mission.file.reports)
    except UsageError as error:
        return Finding(what, False, str(error))
    return Finding(what, True, "all of them can be judged")


def _model(mission: Mission) -> Finding:
    from hil.campaign.fly import check_model

    try:
        check_model(mission)
    except UsageError as error:
        return Finding("model file", False, str(error))
    return Finding("model file", True, f"{mission.file.model.file} agrees with its SHA-256")
