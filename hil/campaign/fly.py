"""Fly one mission on one board: lease, run directory, the mission's steps in order, safe end, verdict and report."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hil.bench.journal import Journal
from hil.campaign import behind_array
from hil.campaign.cfdp_rate import check_sender_rates
from hil.campaign.finish import Finished, finish
from hil.campaign.flying import Flying, Say, TimeIsUp
from hil.campaign.pace import Pace
from hil.campaign.plot import clock_text
from hil.campaign.provenance import add_provenance, write_provenance
from hil.campaign.step_table import STEPS
from hil.campaign.verdict import check_criteria
from hil.client import attach
from hil.client.http import DaemonGone
from hil.drivers import cfdp
from hil.errors import BenchError, BoardError, HilError, SafetyError, UsageError
from hil.inference.client import LinkLost
from hil.inventory import Bench, Mission
from hil.inventory.environment import environment
from hil.mission import timeline_file
from hil.mission.compile import compile_timeline

if TYPE_CHECKING:
    from hil import client
    from hil.client import Flight
    from hil.inventory.bench import BenchBoard
    from hil.inventory.board_type import BoardType
    from hil.mission.timeline import Timeline

_CUT_S = 3.0  # a cut of a reachable instrument takes a few tenths of a second


def fly(
    bench: Bench,
    mission: Mission,
    *,
    board_name: str | None = None,
    runs: Path = Path("runs"),
    pace: Pace | None = None,
    say: Say = lambda line: None,
    on_run: Callable[[Path], None] = lambda run: None,
    on_flight: Callable[[Flight, Path], None] = lambda flight, run: None,
) -> Finished:
    """Fly `mission` on a board of `bench`; returns the verdict and where the record lies. `pace`: wishes for its clock.

    Whatever happens, the board ends in its safe state and the record is evaluated; a fault of the bench makes the
    verdict `infra`, never `pass`. `on_run` is called with the run's directory before the bench is
    touched, and may refuse (HilError) to fly; `on_flight` once the clock runs, for a progress display.
    Raises UsageError before anything is touched when mission and bench do not fit.
    """
    pace = Pace.of(mission) if pace is None else pace
    name, wires, board_type = bench.board(board_name)
    check_criteria(mission.file.criteria, str(mission.path), mission.file.reports)
    environment(mission, board_type)
    check_features(bench, mission, name)
    if behind_array.input_limits(bench, name) is not None:
        behind_array.check_pace(mission, name, pace)
    check_model(mission)
    check_protocols(mission, board_type, pace)
    run = create_run(runs, bench, mission)
    write_provenance(run, bench, mission, name)
    add_provenance(run, clock=pace.facts(mission))
    say(f"run {run}")
    interrupted, began_s = threading.Event(), time.time()
    with Journal(run / "events.jsonl", "campaign") as journal:
        try:
            on_run(run)
            with attach(bench) as daemon, daemon.lease([name]) as lease:
                add_provenance(run, fixtures=_examine(daemon, name, wires, journal))
                board = daemon.board(name, lease)
                flight = daemon.flight(name, mission.reference, run, lease, pace.start_s)
                on_flight(flight, run)
                flying = Flying(
                    mission=mission,
                    board_name=name,
                    wires=wires,
                    type=board_type,
                    timeline=_timeline(run),
                    board=board,
                    flight=flight,
                    journal=journal,
                    say=say,
                    interrupted=interrupted,
                    pace=pace,
                    features=bench.features(name),
                )
                try:
                    with flying.watched():
                        _fly_steps(flying)
                except BaseException:
                    interrupted.set()
                    with contextlib.suppress(BenchError):  # it is in the journal; what ended the steps is told
                        _safe_end(flying)
                    raise
                interrupted.set()
                _safe_end(flying)
        except HilError as error:
            journal.write("error", arm=_arm(error), message=str(error))
            say(f"error: {error}")
            for cut in _cuts_by_dead_man(bench, began_s, isinstance(error, DaemonGone)):
                journal.write("dead_man_cut", **cut)
                say(f"  the dead-man cut {cut['address']}: {cut['reason']}")
        except KeyboardInterrupt:
            journal.write("error", arm="interrupted", message="interrupted by the operator")
            say("interrupted: the board is off, the record is kept")
        except Exception as error:
            journal.write("error", arm="bench", message=f"{type(error).__name__}: {error}")
            finish(run)
            raise
    return finish(run)


def _fly_steps(flying: Flying) -> None:
    """The mission's steps in order, as far as the flight's end; the one in which that falls is not finished."""
    steps = flying.mission.file.steps
    try:
        for index, step in enumerate(steps):
            flying.check_time()
            flying.say(f"step {index + 1}/{len(steps)}: {step.kind}")
            flying.event("step_started", step=step.kind, index=index)
            _fly_step(flying, STEPS[step.kind], getattr(step, step.kind))
            flying.event("step_finished", step=step.kind, index=index, ok=True)
    except TimeIsUp:
        flying.event("time_is_up", until_s=flying.pace.until_s, step=step.kind, index=index)
        flying.say(f"  the flight ends here, as asked: {clock_text(flying.end_s)} of the mission")


def _fly_step(flying: Flying, act: Callable[[Flying, Any], None], step: Any) -> None:
    """One step; what looks like the board's failure is the bench's when the bench broke under it."""
    try:
        act(flying, step)
    except (BoardError, LinkLost):
        flying.flight.state()  # raises what made the flight fail
        flying.board.check()  # and this that the power was cut, the lease is over or the daemon gone
        raise


def check_features(bench: Bench, mission: Mission, name: str) -> None:
    """Refuse to fly a mission that as a whole needs what board and bench do not have."""
    lacking = sorted(set(mission.file.requires) - bench.features(name))
    if lacking:
        raise UsageError(
            f"{mission.path}: the mission requires {', '.join(lacking)}, which board {name} lacks on this bench",
            hint="`features:` of the board in the bench file says what a bench adds to its board's type",
        )


def check_model(mission: Mission) -> None:
    """Refuse to fly a model file that is absent or not the one the mission names. Without an upload none is needed."""
    model = mission.file.model
    if not any(step.kind == "upload" for step in mission.file.steps):
        return
    if not model.file.is_file():
        raise UsageError(
            f"{mission.path}: model file {model.file} does not exist",
            hint="`hil virtual images` puts the demo's model into the cache; for your own, set model.file and sha256",
        )
    with model.file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if model.sha256 is None:
        raise UsageError(
            f"{mission.path}: the mission does not say which file it flies: model.sha256 is not written down",
            hint=f"{model.file} has SHA-256 {found}: if it is the right one, write that",
        )
    if found != model.sha256:
        raise UsageError(
            f"{mission.path}: model file {model.file} has SHA-256 {found}, the mission names {model.sha256}",
            hint="fly the right file, or write its hash into the mission",
        )


def check_protocols(mission: Mission, board_type: BoardType, pace: Pace) -> None:
    """Refuse to fly an upload by a protocol whose package is not installed here, or too fast for the board."""
    if any(step.upload is not None and step.upload.protocol == "cfdp" for step in mission.file.steps):
        cfdp.require()
        if board_type.cfdp_receiver is not None:
            check_sender_rates(mission, compile_timeline(environment(mission, board_type)), board_type, pace)


def create_run(runs: Path, bench: Bench, mission: Mission) -> Path:
    """Make the run directory, with copies of what defines the run."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    run = (runs / f"{stamp}-{mission.name}-{secrets.token_hex(2)}").resolve()
    try:
        (run / "console").mkdir(parents=True)
        shutil.copyfile(mission.path, run / "mission.yaml")
        if mission.file.case is not None:
            _write_case(run / "mission.yaml", mission.file.case)
        shutil.copyfile(bench.path, run / "bench.yaml")
        if mission.orbit_path is not None:
            shutil.copyfile(mission.orbit_path, run / f"orbit{mission.orbit_path.suffix}")
    except OSError as error:
        raise UsageError(f"cannot create run directory {run}: {error}", hint="--runs DIR names another place") from None
    return run


def _write_case(copy: Path, case: str) -> None:
    """Say in the run's copy of the mission which of its cases was flown."""
    kept = [line for line in copy.read_text(encoding="utf-8").splitlines() if not line.startswith("case:")]
    copy.write_text("\n".join([*kept, "", "# which of the cases was flown", f"case: {case}", ""]), encoding="utf-8")


def _examine(daemon: client.Bench, name: str, wires: BenchBoard, journal: Journal) -> list[dict[str, Any]]:
    """What the doctor finds of this board's fixtures. Raises BenchError when one of them cannot fly."""
    ours = {name, *(wire.supply for wire in wires.power)} | ({wires.payload.link} if wires.payload else set())
    checks = [check for check in daemon.doctor() if check["fixture"] in ours]
    journal.write("doctor", checks=checks)
    bad = [f"{check['fixture']}: {check['what']}: {check['found']}" for check in checks if check["ok"] is False]
    if bad:
        raise BenchError(f"board {name} cannot fly:\n  " + "\n  ".join(bad), hint="`hil doctor` asks again")
    return checks


def _timeline(run: Path) -> Timeline:
    return timeline_file.load(run / "timeline.npz")


def _cuts_by_dead_man(bench: Bench, since_s: float, awaited: bool) -> list[dict[str, Any]]:
    """What the bench's dead-man wrote down since: why it cut, what the daemon did, whether all is off.

    `awaited`: the daemon is gone, so it may be at work now. On a bench of another host its log is there.
    """
    log, give_up_s = bench.state_dir / "deadman.log", time.monotonic() + (_CUT_S if awaited else 0.0)
    while True:
        with contextlib.suppress(OSError, ValueError):
            told: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
            if found := [cut for cut in told if cut["t_wall"] >= since_s]:
                return [{"cut_wall_s" if name == "t_wall" else name: cut[name] for name in cut} for cut in found]
        if time.monotonic() > give_up_s:
            return []
        time.sleep(0.1)


def _arm(error: HilError) -> str:
    arms: tuple[tuple[type[HilError], str], ...] = (
        (SafetyError, "safety"),
        (BenchError, "bench"),
        (BoardError, "board"),
        (UsageError, "usage"),
    )
    return next((arm for kind, arm in arms if isinstance(error, kind)), "bench")


def _safe_end(flying: Flying) -> None:
    """End the flight and switch the board off, each step even when the one before failed."""
    failures = []
    for what, act in (("end the flight", flying.flight.end), ("switch the board off", flying.board.power.off)):
        try:
            act()
        except HilError as error:
            failures.append(f"{what}: {error.message}")
    if failures:
        message = f"board {flying.board_name}: the orderly end failed: {'; '.join(failures)}"
        flying.journal.write("error", arm="bench", message=message)
        raise BenchError(
            message,
            hint="the dead-man switches the output off when the daemon is gone; check with `hil board power read`",
        )
