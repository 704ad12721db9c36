"""Steps that fly on for long: `cruise` through orbits and their power cuts, `duty_cycle` by the thermal model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hil.campaign import steps
from hil.campaign.flying import RECOVERED_V, Flying
from hil.errors import BenchError, BoardError, UsageError
from hil.inventory.mission_steps import CruiseStep, DutyCycleStep, ServeStep
from hil.mission.shadow import Eclipse

_LOOK_S = 0.2  # wall seconds between looks at the flight
_POWER_DOWN = r"reboot: Power down|System halted"
_POWER_DOWN_S = 60.0
_QUIET_S = 60.0  # the next burst must not begin while the last one's answer is still being made


# --- cruise -----------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What a cruise counts."""

    sheds: int = 0
    boots_after_shed: int = 0
    shutdowns: int = 0


def cruise(flying: Flying, step: CruiseStep) -> None:
    """Fly on as long as the step says; a board that lost its power is waited for, booted and set to work again."""
    began, state = time.monotonic(), flying.flight.state()
    period_s = flying.timeline.environment.orbit.period_s
    start_s, soc = state["t_mission"], state["soc"]
    end_s = start_s + (step.hours * 3600.0 if step.hours is not None else (step.orbits or 0.0) * period_s)
    if end_s > flying.timeline.duration_s:
        raise BenchError(
            f"the cruise would end {(end_s - flying.timeline.duration_s) / 3600:.1f} h behind the mission's time span",
            hint="raise duration_h",
        )
    tally = _Tally()
    while flying.flight.state()["t_mission"] < end_s:
        with _load(flying, step):
            ended_by = _fly_until(flying, step, end_s)
        if ended_by == "shed":
            _ride_out(flying, step, end_s, tally)
        elif isinstance(ended_by, Eclipse):
            _sleep_through(flying, step, ended_by, tally)
    flying.clock(1.0, cause="cruise over")
    state = flying.flight.state()
    flying.event(
        "cruise",
        t_start_mono=began,
        wall_s=time.monotonic() - began,
        orbits=(state["t_mission"] - start_s) / period_s,
        load=step.load,
        soc_start=soc,
        soc_end=state["soc"],
        sheds=tally.sheds,
        boots_after_shed=tally.boots_after_shed,
        shutdowns=tally.shutdowns,
    )
    flying.say(f"  {(state['t_mission'] - start_s) / period_s:.1f} orbits, {tally.sheds} load sheds")


@contextmanager
def _load(flying: Flying, step: CruiseStep) -> Iterator[None]:
    if step.load == "idle":
        yield
        return
    with steps.continuous_inference(flying, step, "cruise") as load:
        yield
    flying.event("inference_load", **load)


def _fly_until(flying: Flying, step: CruiseStep, end_s: float) -> Eclipse | str:
    """Fly at the step's rate until the end, a load shed, or an eclipse to shut down for; says which it was."""
    slowed_v: float | None = None
    while True:
        state = flying.flight.state()
        now_s, power = state["t_mission"], state["power"]
        flying.check_time()
        if now_s >= end_s:
            return "end"
        if power["state"] == "shed":
            return "shed"
        if power["state"] != "on":
            flying.board.check()  # says who cut the power
        ahead = _eclipse_ahead(flying, step, now_s)
        until_s = end_s if ahead is None else min(end_s, ahead.penumbra_entry_s - _margin_s(step))
        if ahead is not None and now_s >= until_s < end_s:
            return ahead
        aos_s = _gap_end(flying, now_s)
        if min(until_s, aos_s) - now_s > 2 * steps.LEAD_S:
            flying.go_to(min(until_s, aos_s - steps.LEAD_S), "next contact", as_now=True)
            continue
        wanted = min(flying.pace.rate_of(step.clock_rate), max((until_s - now_s) / (2 * _LOOK_S), 1.0))
        if slowed_v is not None and power["watched_v"] < slowed_v + RECOVERED_V:
            wanted = 1.0  # the daemon slowed the clock near the shed voltage; until that recovers it stays so
        if wanted != state["rate"]:
            flying.clock(step.clock_rate, cause="cruise", at_most=wanted)
        flying.pause(min(_LOOK_S, max((until_s - now_s) / wanted, 0.01)))
        after = flying.flight.state()
        if after["rate"] < wanted:
            slowed_v = after["power"]["watched_v"]


def _gap_end(flying: Flying, now_s: float) -> float:
    """When the gap between contacts ends that the operator wants skipped; now, if there is no such gap."""
    if not flying.pace.contacts_only or flying.timeline.contact_at(now_s) is not None:
        return now_s
    following = flying.timeline.next_contact(now_s)
    return math.inf if following is None else following.aos_s


def _margin_s(step: CruiseStep) -> float:
    return step.shutdown_before_eclipse_s or 0.0


def _eclipse_ahead(flying: Flying, step: CruiseStep, now_s: float) -> Eclipse | None:
    """The next eclipse that the board must be shut down for; one that has begun is too late to care for."""
    if step.shutdown_before_eclipse_s is None:
        return None
    return next((item for item in flying.timeline.eclipses if item.penumbra_entry_s > now_s), None)


def _ride_out(flying: Flying, step: CruiseStep, end_s: float, tally: _Tally) -> None:
    """The load was shed: wait until it is restored and the board has booted by itself, or the cruise is over."""
    tally.sheds += 1
    flying.board.accept_power_cut()
    flying.say(f"  load shed, state of charge {flying.flight.state()['soc']:.0%}")
    start = flying.board.console.mark()
    rate = flying.clock(step.clock_rate, cause="recharge")
    left_s = end_s - flying.flight.state()["t_mission"]

    def settled() -> str | None:
        state = flying.flight.state()
        if state["power"]["state"] == "on":
            return "on"
        return "over" if state["t_mission"] >= end_s else None

    if flying.wait("the load is restored", settled, timeout_s=left_s / rate + 120, every_s=0.05) == "over":
        return
    flying.clock(1.0, cause="boot")
    steps.await_boot(flying, start, steps.switched_on(flying, "load_restored"), cause="load restored")
    tally.boots_after_shed += 1
    _work_again(flying, step)


def _sleep_through(flying: Flying, step: CruiseStep, eclipse: Eclipse, tally: _Tally) -> None:
    """Shut the board down in order before an eclipse, fly through it without it, and boot it in sunlight."""
    flying.clock(1.0, cause="shutdown")
    mark = flying.board.console.mark()
    flying.board.shell.run(["sh", "-c", "sync; (sleep 0.2; poweroff) >/dev/null 2>&1 &"], timeout_s=20, check=True)
    flying.board.disconnect()
    flying.board.console.expect(_POWER_DOWN, _POWER_DOWN_S, since=mark)
    down_s = flying.flight.state()["t_mission"]
    flying.board.power.off()
    tally.shutdowns += 1
    flying.event("shut_down", before_eclipse_s=eclipse.penumbra_entry_s - down_s)
    flying.say(f"  shut down in order {eclipse.penumbra_entry_s - down_s:.0f} s before the eclipse")
    rate = flying.clock(step.clock_rate, cause="eclipse, board off")
    left_s = eclipse.penumbra_exit_s - down_s
    flying.wait(
        "sunlight",
        lambda: flying.flight.state()["t_mission"] >= eclipse.penumbra_exit_s,
        timeout_s=left_s / rate + 120,
        every_s=0.05,
    )
    flying.clock(1.0, cause="boot")
    began, start = time.monotonic(), flying.board.console.mark()
    flying.board.power.on()
    steps.await_boot(flying, start, steps.switched_on(flying, "board_on"), cause="sunrise")
    _work_again(flying, step)
    took_s = time.monotonic() - began
    flying.event("resumed", resume_s=took_s, wall_s=took_s)


def _work_again(flying: Flying, step: CruiseStep) -> None:
    if step.load == "inference":
        steps.serve(flying, ServeStep())


# --- duty cycle -------------------------------------------------------------------------------------------------------


def duty_cycle(flying: Flying, step: DutyCycleStep) -> None:
    """Inference until the thermal model forbids it, rest until it allows it again, as often as the step says."""
    flying.clock(1.0, cause="duty cycle")
    for index in range(step.bursts):
        rested = time.monotonic()
        flying.wait("the thermal model lets the board run", lambda: _may_run(flying), timeout_s=step.rest_timeout_s)
        start = _thermal(flying)["nodes"]
        rest_s = time.monotonic() - rested
        with steps.continuous_inference(flying, step, "duty", quiet_within_s=_QUIET_S) as load:
            flying.wait(
                "the thermal model ends the burst",
                lambda: not _may_run(flying),
                timeout_s=step.burst_timeout_s,
                every_s=_LOOK_S,
            )
            stopped, end = time.monotonic(), _thermal(flying)["nodes"]
        if not load["tokens"]:
            raise BoardError(f"board {flying.board_name}: no token in a burst of {load['wall_s']:.0f} s")
        flying.event("inference_load", **load)
        flying.event(
            "burst",
            index=index,
            t_start_mono=load["t_start_mono"],
            wall_s=stopped - load["t_start_mono"],
            rest_s=rest_s,
            tokens=load["tokens"],
            stop_s=load["t_quiet_mono"] - stopped,
            start_c=start,
            end_c=end,
        )
        flying.say(f"  burst {index + 1}: {stopped - load['t_start_mono']:.1f} s, {load['tokens']} tokens")


def _may_run(flying: Flying) -> bool:
    return bool(_thermal(flying)["may_run"])


def _thermal(flying: Flying) -> dict[str, Any]:
    """Nodes in degrees Celsius and `may_run`, as the flight's thermal model has them now."""
    thermal = flying.flight.state().get("thermal")
    if not thermal:
        raise UsageError(
            f"{flying.mission.path}: a duty_cycle step obeys the thermal model, and the mission has none",
            hint="add `thermal:` with nodes and a cutoff",
        )
    value: dict[str, Any] = thermal
    return value
