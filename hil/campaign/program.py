"""The `run` step: a program of the lab on the board, its power cut if so asked for, and what it reports."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hil.campaign import steps
from hil.campaign.flying import Flying
from hil.errors import BenchError, BoardError, UsageError
from hil.inventory.mission_steps import RunStep
from hil.model import Completed

if TYPE_CHECKING:
    from hil.client.shell import AnyShell

_LEAD_S = 1.0  # mission seconds after an umbra's beginning at which a program starts
_TAIL = 400  # characters of its output that an error shows


@dataclass(frozen=True, slots=True)
class Report:
    """One thing that a program measured; an empty unit means true, false or text."""

    name: str
    value: float | bool | str
    unit: str


def read_reports(stdout: str) -> list[Report]:
    """The reports among a program's lines; every line that is not a JSON object with `measure` is its own business.

    Raises ValueError for one that is meant as a report and is none.
    """
    found = []
    for line in stdout.splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if not isinstance(told, dict) or "measure" not in told:
            continue
        found.append(_report(told, line.strip()))
    return found


def _report(told: dict[str, Any], line: str) -> Report:
    name, value, unit = told["measure"], told.get("value"), told.get("unit", "")
    if not isinstance(name, str) or not isinstance(unit, str):
        raise ValueError(f"measure and unit must be text: {line}")
    if isinstance(value, bool | str) and not unit:
        return Report(name, value, unit)
    if isinstance(value, int | float) and not isinstance(value, bool) and unit:
        return Report(name, float(value), unit)
    raise ValueError(f"a number needs a unit; true, false and text must have none: {line}")


def check_reports(reports: list[Report], declared: dict[str, str]) -> None:
    """Raises ValueError when a program reports under a declared name in another unit, or leaves a declared one out."""
    for report in reports:
        unit = declared.get(report.name, report.unit)
        if report.unit != unit:
            raise ValueError(f"{report.name} was reported in {report.unit!r}, the mission declares {unit!r}")
    absent = sorted(set(declared) - {report.name for report in reports})
    if absent:
        raise ValueError(f"{', '.join(absent)} was declared and not reported")


def cut_moments(seed: int, name: str, count: int, after_s: tuple[float, float]) -> list[float]:
    """Seconds into each run at which the power is cut: the same for the same mission, others for another step."""
    chance = random.Random(f"{seed} {name}")  # noqa: S311  (a schedule, not a secret)
    return [chance.uniform(*after_s) for _ in range(count)]


def run(flying: Flying, step: RunStep) -> None:
    """Put the files on the board, start the program when its moment has come, and journal what it reports."""
    lacking = sorted(set(step.requires) - flying.features)
    if lacking:
        flying.event("step_skipped", run=step.name, lacking=lacking)
        flying.say(f"  {step.name} is left out: the bench has no {', '.join(lacking)}")
        return
    programs = f"{flying.type.onboard_dir}/programs"
    _put_files(flying, step, programs)
    _await_moment(flying, step)
    argv = [
        part.replace("{programs}", programs)
        .replace("{python}", flying.type.runtime_python)
        .replace("{model}", steps.model_path(flying))
        for part in step.argv
    ]
    for after_s in cut_moments(flying.mission.file.seed, step.name, step.power_cuts, step.cut_after_s):
        _cut(flying, step, argv, after_s)
    if step.clock_rate != 1:
        flying.clock(step.clock_rate, cause=f"run {step.name}")
    _to_its_end(flying, step, argv)
    if step.clock_rate != 1:
        flying.clock(1.0, cause=f"run {step.name} over")


def _put_files(flying: Flying, step: RunStep, programs: str) -> None:
    shell = flying.board.shell
    shell.run(["mkdir", "-p", programs], timeout_s=20, check=True)
    for name in step.files:
        source = (flying.mission.path.parent / Path(name).expanduser()).resolve()
        if not source.is_file():
            raise UsageError(
                f"{flying.mission.path}: run {step.name}: no file {source}", hint="see `files` of the step"
            )
        steps.put_file(shell, source, f"{programs}/{source.name}")


def _await_moment(flying: Flying, step: RunStep) -> None:
    if step.during == "contact":
        steps.enter_contact(flying)
    elif step.during == "eclipse":
        now_s = flying.flight.state()["t_mission"]
        umbras = (item.umbra_entry_s for item in flying.timeline.eclipses if item.umbra_entry_s is not None)
        entry_s = next((t_s for t_s in umbras if t_s > now_s), None)
        if entry_s is None:
            raise BenchError("no full eclipse is left in the mission's time span", hint="raise duration_h")
        flying.go_to(entry_s + _LEAD_S, f"eclipse for {step.name}")


def _cut(flying: Flying, step: RunStep, argv: list[str], after_s: float) -> None:
    """Start the program, cut the board's power in the middle of it, and boot again."""
    process = flying.board.shell.start(argv)
    flying.pause(after_s)
    running = process.running
    start = flying.board.console.mark()
    flying.board.power.cycle()
    flying.event("run_cut", run=step.name, after_s=after_s, while_running=running)
    flying.say(f"  power cut {after_s:.1f} s into {step.name}{'' if running else ', which had ended before'}")
    steps.await_boot(flying, start, steps.switched_on(flying, "board_on"), cause=f"power cut in {step.name}")


def _to_its_end(flying: Flying, step: RunStep, argv: list[str]) -> None:
    shell, own = _shell(flying, step)
    started = time.monotonic()
    try:
        done = shell.run(argv, timeout_s=step.timeout_s)
    finally:
        if own:
            shell.abort()
    wall_s = time.monotonic() - started
    span = {"t_start_mono": started, "wall_s": wall_s}
    try:
        reports = read_reports(done.stdout)
        check_reports(reports, step.reports)
    except ValueError as error:
        _judge_exit(flying, step, done)  # a program that failed need not have reported
        if done.returncode == 0:
            raise BoardError(f"board {flying.board_name}: {step.name}: {error}") from None
        reports = []
    for report in reports:
        flying.event("reported", run=step.name, name=report.name, value=report.value, unit=report.unit, **span)
        flying.say(f"  {step.name}: {report.name} = {report.value} {report.unit}".rstrip())
    flying.event("run_done", run=step.name, returncode=done.returncode, reports=len(reports), **span)
    _judge_exit(flying, step, done)


def _shell(flying: Flying, step: RunStep) -> tuple[AnyShell, bool]:
    """The shell that starts the program, and whether it was opened for that alone."""
    if step.plane == "payload":
        return flying.board.payload_shell(timeout_s=20.0), True
    return flying.board.shell, False


def _judge_exit(flying: Flying, step: RunStep, done: Completed) -> None:
    if done.returncode != 0 and not step.may_fail:
        tail = (done.stderr or done.stdout).strip()[-_TAIL:]
        raise BoardError(f"board {flying.board_name}: {step.name} ended with exit code {done.returncode}\n  {tail}")
