"""What a mission needs from a bench and whether it is sound, before any instrument is touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hil.campaign import behind_array, plan
from hil.campaign.cfdp_rate import sender_rates
from hil.campaign.evidence import NoEvidence
from hil.campaign.feasible import Outlook, outlook
from hil.campaign.measures_timeline import OF_TIMELINE
from hil.campaign.verdict import check_criteria
from hil.drivers import cfdp, solar
from hil.errors import UsageError
from hil.inventory.environment import environment
from hil.mission import budget
from hil.mission.compile import compile_timeline
from hil.mission.eps import GAIN_LIMIT, EpsModel

if TYPE_CHECKING:
    from hil.inventory import Bench, BoardType, Mission
    from hil.inventory.board_type import SupplyLimits
    from hil.mission.timeline import Timeline

# The demo's eclipse must be survived at idle and must not be survived under full inference, both with a margin.
IDLE_MARGIN = 1.2
FULL_MARGIN = 0.8
# The shortest period of power loop and player on any bench; a slow instrument makes it longer.
LOOP_PERIOD_S = 0.1
PLANES = frozenset({"console", "payload", "mgmt"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked: what, whether it holds (None: cannot be said, or a remark), and what was found."""

    what: str
    ok: bool | None
    found: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """What a mission finds on a bench: features, and the fastest rate that its link emulator was seen to carry.

    `array`: the limits of the power unit's input, where the board hangs on a simulated solar array.
    """

    features: frozenset[str]
    link_limit_bps: float | None = None
    array: SupplyLimits | None = None

    @classmethod
    def of(cls, bench: Bench, board_name: str | None = None) -> Place:
        """The place of one board of a bench."""
        name, wires, _ = bench.board(board_name)
        link = None if wires.payload is None else bench.file.links[wires.payload.link]
        limit_bps = None if link is None else link.rate_limit_bps
        return cls(bench.features(name), limit_bps, behind_array.input_limits(bench, name))


def check_mission(mission: Mission, board: BoardType, place: Place | None = None) -> list[Finding]:
    """Every finding about `mission` flown with `board`. Without a place it is one with all planes and no more.

    Raises UsageError when the mission cannot be compiled at all.
    """
    place = Place(frozenset(board.features) | PLANES) if place is None else place
    timeline = compile_timeline(environment(mission, board))
    kinds = [step.kind for step in mission.file.steps]
    findings = [_features(mission, place), _elements(timeline), _contacts(timeline)]
    if "upload" in kinds:
        findings.append(_upload(mission, timeline))
    if any(step.upload is not None and step.upload.protocol == "cfdp" for step in mission.file.steps):
        findings += [_cfdp(), _cfdp_rate(mission, timeline, board)]
    findings += [_rates(mission, timeline, place), _edges(mission, timeline)]
    if place.array is not None:
        findings += [_array(mission, timeline, place.array), _sunlight(timeline)]
    else:
        findings += [_envelope(board, mission), _bus_range(board, mission), _balance(timeline), _sunlight(timeline)]
        findings.append(_loop(timeline, board))
        if "eclipse" in kinds:
            findings += [_eclipse(timeline), _platform(timeline)]
    thermal = timeline.environment.thermal
    if thermal is not None and thermal.cutoff is not None and place.array is None:
        findings.append(_thermal(mission, timeline, board))
    return [*findings, _wall_time(mission, timeline, board), *_criteria(mission, place, timeline), _model(mission)]


def _features(mission: Mission, place: Place) -> Finding:
    """What the mission as a whole cannot do without; a step or a criterion may need more."""
    needed = set(mission.file.requires) | {"console"}  # without mgmt, the console carries commands and small files
    if any(step.upload is not None and step.upload.preload_bytes for step in mission.file.steps):
        needed.add("mgmt")
    if any(step.kind in {"upload", "query", "loss_of_signal", "check"} for step in mission.file.steps):
        needed.add("payload")
    lacking = sorted(needed - place.features)
    found = f"needs {', '.join(sorted(needed))}" + (f"; the bench has no {', '.join(lacking)}" if lacking else "")
    return Finding("features", not lacking, found, {"needed": sorted(needed), "lacking": lacking})


def _elements(timeline: Timeline) -> Finding:
    orbit, days = timeline.environment.orbit, timeline.duration_s / 86_400.0
    cautions = orbit.warnings(timeline.start, days=days)
    if not orbit.tracked:
        return Finding("orbital elements", True, f"{orbit.name}: a design orbit, which does not age")
    age = orbit.age_days(timeline.start)
    found = "; ".join(item.message for item in cautions) or f"{orbit.name}: {age:.1f} days old at the start"
    return Finding("orbital elements", None if cautions else True, found, {"age_days": round(age, 2)})


def _contacts(timeline: Timeline) -> Finding:
    minutes = sum(c.duration_s for c in timeline.contacts) / 60
    data = {"contacts": len(timeline.contacts), "minutes": round(minutes, 1)}
    return Finding("contacts", bool(timeline.contacts), f"{len(timeline.contacts)}, {minutes:.0f} min in all", data)


def _upload(mission: Mission, timeline: Timeline) -> Finding:
    need = plan.upload(mission, timeline)
    what = "upload fits the contacts"
    if need is None:
        return Finding(what, None, "the model file is absent and model.size_bytes is not given: its size is unknown")
    data = {"bytes": need.bytes, "contacts": need.contacts, "allowed": need.allowed}
    carried = f"the {need.allowed} contacts that it may use carry {need.carried_bits / 8e6:.1f} MB"
    if need.contacts is None:
        return Finding(what, False, f"{need.bytes / 1e6:.1f} MB to send, {carried}", data)
    return Finding(what, True, f"{need.bytes / 1e6:.1f} MB need {need.contacts} contacts at best; {carried}", data)


def _cfdp() -> Finding:
    try:
        cfdp.require()
    except UsageError as lack:
        return Finding("CFDP", False, f"{lack.message}: {lack.hint}")
    return Finding("CFDP", True, "cfdp-py is installed; the board needs its Python, and UDP through the payload link")


def _cfdp_rate(mission: Mission, timeline: Timeline, board: BoardType) -> Finding:
    """The sender does not wait for a receiver that is too slow: what that loses is asked for and sent again."""
    rates = sender_rates(mission, timeline, board)
    worst = max(rates, key=lambda rate: rate.needed_bps)
    told = f"{worst.place} sends {_bps(worst.needed_bps)} at clock rate {worst.clock_rate:g}"
    data = {"needed_bps": worst.needed_bps, "limit_bps": worst.limit_bps, "clock_rate": worst.highest_clock_rate}
    if board.cfdp_receiver is None:
        return Finding("CFDP receiver", None, f"{told}; the board type does not say what its receiver takes", data)
    takes = f"{board.name} takes {_bps(board.cfdp_receiver.rate_bps)} ({board.cfdp_receiver.source})"
    return Finding("CFDP receiver", worst.fits, f"{told}; {takes}{'' if worst.fits else f': {worst.advice}'}", data)


def _rates(mission: Mission, timeline: Timeline, place: Place) -> Finding:
    """The rates that the emulator must carry: those of the link times the clock's."""
    scale = max((plan.rate_of(step) for step in mission.file.steps if step.kind == "upload"), default=1.0)
    up, down = float(timeline.uplink_bps.max()), float(timeline.downlink_bps.max())
    needed = max(up * scale, down)  # what comes down in an upload are acknowledgements
    told = f"up {_bps(up)}, down {_bps(down)}"
    told += f"; at clock rate {scale:g} it is {_bps(up * scale)} up" if scale != 1 else ""
    limit = place.link_limit_bps
    data = {"uplink_bps": up, "downlink_bps": down, "clock_rate": scale, "needed_bps": needed, "limit_bps": limit}
    if limit is None:
        return Finding("link rates", None, f"{told}; the bench file does not say what its emulator carries", data)
    return Finding("link rates", needed <= limit, f"{told}; the bench's emulator carries {_bps(limit)}", data)


def _bps(rate: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.3g} bit/s"


def _edges(mission: Mission, timeline: Timeline) -> Finding:
    """Edges that follow one another faster than the loop would be applied late, as one."""
    scale = max((plan.rate_of(step) for step in mission.file.steps), default=1.0)
    gaps = [after.t_s - before.t_s for before, after in pairwise(timeline.edges) if after.t_s > before.t_s]
    if not gaps:
        return Finding("spacing of edges", True, "fewer than two edges")
    shortest = min(gaps) / scale
    told = (
        f"{min(gaps):.3g} s of mission time, {shortest:.3g} s at clock rate {scale:g}; the loop takes {LOOP_PERIOD_S} s"
    )
    # Two edges within one period are both applied, the first late: its lateness is measured, not hidden.
    return Finding("spacing of edges", True if shortest >= LOOP_PERIOD_S else None, told, {"shortest_s": shortest})


def _envelope(board: BoardType, mission: Mission) -> Finding:
    limits, full_w = board.supply, board.power.inference_w
    battery, shed = mission.file.power.battery, mission.file.power.shed
    low_v = mission.file.power.bus.regulated_v or min(shed.voltage_v, battery.cells_series * battery.charge_cell_v)
    current_a = full_w / low_v
    ok = full_w <= limits.power_max_w and current_a <= limits.current_max_a
    found = (
        f"{board.name} draws {full_w:g} W in inference, {current_a:.2f} A at {low_v:g} V; "
        f"its envelope ends at {limits.power_max_w:g} W and {limits.current_max_a:g} A ({board.power.source})"
    )
    return Finding("the board's power", ok, found, {"full_w": full_w, "current_a": round(current_a, 3)})


def _bus_range(board: BoardType, mission: Mission) -> Finding:
    limits, power = board.supply, mission.file.power
    low, high = power.shed.voltage_v, power.battery.cells_series * power.battery.charge_cell_v
    if power.bus.regulated_v is not None:
        low = high = power.bus.regulated_v
    ok = limits.undervoltage_lockout_v <= low and high <= limits.voltage_max_v
    found = (
        f"the bus feeds {low:g} to {high:g} V; {board.name} takes "
        f"{limits.undervoltage_lockout_v:g} to {limits.voltage_max_v:g} V"
    )
    return Finding("the bus within the board's voltages", ok, found, {"low_v": low, "high_v": high})


def _loop(timeline: Timeline, board: BoardType) -> Finding:
    """What the power loop refuses before a flight, as far as the mission alone decides it."""
    what, power = "a supply can play the power system", timeline.environment.power
    if power is None:
        return Finding(what, False, "the mission has no `power:`")
    eps, full_w = EpsModel(power.eps), power.board_full_w or board.power.inference_w
    floor_v = max(board.supply.voltage_min_v, power.shed.shed_v if power.shed else 0.0)
    gain = max(eps.gain(full_w), eps.gain(full_w, floor_v))
    found = f"the loop's gain is {gain:.3f} at {full_w:g} W, at most {GAIN_LIMIT} is flown"
    return Finding(what, gain <= GAIN_LIMIT, found, {"gain": round(gain, 4)})


def _array(mission: Mission, timeline: Timeline, limits: SupplyLimits) -> Finding:
    """What a flight on a solar-array simulator refuses, as far as mission and bench file decide it."""
    what = "a solar-array simulator can play the array"
    if refused := [why for step in mission.file.steps if (why := behind_array.refused(step))]:
        return Finding(what, False, f"{'; '.join(refused)}: the board hangs on an array, before a real power unit")
    try:
        curve = behind_array.brightest(timeline)
        solar.Curve(curve.voc_v, curve.isc_a, curve.vmp_v, curve.imp_a).check()
    except UsageError as error:
        return Finding(what, False, str(error))
    watts = curve.vmp_v * curve.imp_a
    ok = limits.voltage_min_v <= curve.voc_v <= limits.voltage_max_v and curve.isc_a <= limits.current_max_a
    ok = ok and watts <= limits.power_max_w
    found = (
        f"at its brightest Voc {curve.voc_v:.2f} V, Isc {curve.isc_a:.3f} A and {watts:.1f} W; the power unit's input "
        f"takes {limits.voltage_min_v:g} to {limits.voltage_max_v:g} V, {limits.current_max_a:g} A and "
        f"{limits.power_max_w:g} W; flown with --rate 1 only"
    )
    return Finding(what, ok, found, {"voc_v": round(curve.voc_v, 4), "isc_a": round(curve.isc_a, 4)})


def _balance(timeline: Timeline) -> Finding:
    balance = budget.orbit_balance(timeline)
    data = {"available_wh": round(balance.available_wh, 3), "needed_wh": round(balance.needed_wh, 3)}
    return Finding("energy of an orbit at idle", balance.closes, balance.message, data)


def _sunlight(timeline: Timeline) -> Finding:
    """Eclipses of the mission, and whether they are those of the year's worst."""
    longest, _ = OF_TIMELINE["timeline.eclipse_s.max"][2](timeline)
    told = f"{len(timeline.eclipses)} eclipses, up to {longest / 60:.1f} min"
    try:
        share, _ = OF_TIMELINE["year.sunlit_share"][2](timeline)
        worst, _ = OF_TIMELINE["year.eclipse_s.max"][2](timeline)
        days, _ = OF_TIMELINE["year.eclipse_days"][2](timeline)
    except NoEvidence as lack:
        return Finding("sunlight", None, f"{told}; {lack}", {"eclipse_s": longest})
    year = f"over the year {share:.1%} sunlit, eclipses on {days:.0f} days, up to {worst / 60:.1f} min"
    data = {"eclipse_s": longest, "year_sunlit_share": share, "year_eclipse_s": worst, "year_eclipse_days": days}
    return Finding("sunlight", None, f"{told}; {year}", data)


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
    shed = budget.shed_forecast(timeline)
    if shed is None:
        return Finding("the platform survives the shed eclipse", False, "there is no eclipse")
    return Finding(
        "the platform survives the shed eclipse",
        not shed.platform_lost,
        f"lowest state of charge {shed.lowest_soc:.1%}"
        + (", the battery is empty before sunrise" if shed.platform_lost else ""),
    )


def _thermal(mission: Mission, timeline: Timeline, board: BoardType) -> Finding:
    """Whether a duty cycle gets hot and cool again, by the model with the board type's watts."""
    burst = plan.burst(timeline, board)
    data = {"run_s": burst.run_s, "cool_s": burst.cool_s}
    if burst.run_s is None:
        found = f"at {board.power.inference_w:g} W the cutoff is never reached"
        return Finding("thermal duty cycle", _cycles(mission, False), found, data)
    if burst.cool_s is None:
        found = f"hot after {_duration(burst.run_s)}, and at {board.power.idle_w:g} W it never cools again"
        return Finding("thermal duty cycle", _cycles(mission, False), found, data)
    found = f"from the initial temperatures {_duration(burst.run_s)} of work, then {_duration(burst.cool_s)} of rest"
    return Finding("thermal duty cycle", True, found, data)


def _cycles(mission: Mission, ok: bool) -> bool | None:
    """A cutoff that no step obeys is worth a remark only."""
    return ok if any(step.kind == "duty_cycle" for step in mission.file.steps) else None


def _wall_time(mission: Mission, timeline: Timeline, board: BoardType) -> Finding:
    parts = plan.wall_times(mission, timeline, board)
    known = sum(item.wall_s for item in parts if item.wall_s is not None)
    unknown = [item.step for item in parts if item.wall_s is None]
    told = ", ".join(f"{item.step} {_duration(item.wall_s)}" for item in parts)
    total = f"at most {_duration(known)}" + (f" and what {', '.join(unknown)} takes" if unknown else "")
    data = {"steps": [{"step": item.step, "wall_s": item.wall_s, "basis": item.basis} for item in parts]}
    return Finding("wall time", None, f"{total}: {told}", data)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _criteria(mission: Mission, place: Place, timeline: Timeline) -> list[Finding]:
    what = f"{len(mission.file.criteria)} acceptance criteria"
    try:
        check_criteria(mission.file.criteria, str(mission.path), mission.file.reports)
    except UsageError as error:
        return [Finding(what, False, str(error))]
    seen = outlook(mission.file, place.features, timeline, on_array=place.array is not None)
    decided = [item for item in seen if item.ok is not None]
    able = len(seen) - sum(item.ok is False for item in seen)
    head = Finding(
        what,
        True if able == len(seen) else None,
        "all of them can be judged" if able == len(seen) else f"{able} of them can be met on this bench",
        {item.name: {"ok": item.ok, "why": item.why} for item in seen},
    )
    return [head, *(_criterion(item) for item in decided)]


def _criterion(item: Outlook) -> Finding:
    return Finding(f"criterion {item.name}", item.ok, item.why)


def _model(mission: Mission) -> Finding:
    from hil.campaign.fly import check_model

    file = mission.file.model.file
    if not any(step.kind == "upload" for step in mission.file.steps):
        return Finding("model file", True, "no step uploads one")
    try:
        check_model(mission)
    except UsageError as error:
        return Finding("model file", False, str(error), {"file": str(file)})
    return Finding("model file", True, f"{file} agrees with its SHA-256", {"file": str(file)})
