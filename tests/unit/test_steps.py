"""Steps of a mission that must end when nothing comes of them, on a flight that says what it is told to say."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from console_board import ShellBoard

from hil.campaign import endurance, program, steps, upload
from hil.campaign.admission import Admission
from hil.campaign.pace import Pace
from hil.client.console import Console
from hil.client.console_shell import ConsoleShell
from hil.errors import BenchError, BoardError, UsageError
from hil.inference.client import LinkLost
from hil.inventory.mission_steps import CruiseStep, DutyCycleStep, QueryStep, RunStep
from hil.model import Span


def flying(power: str, t_mission: float, *, modelled: bool = True) -> Any:
    state = {"t_mission": t_mission, "power": {"state": power, "power_w": 7.2}}
    kind = SimpleNamespace(
        power=SimpleNamespace(inference_w=15.0), modelled_power=SimpleNamespace() if modelled else None
    )
    return SimpleNamespace(board_name="vb1", flight=SimpleNamespace(state=lambda: state), type=kind)


def test_an_eclipse_without_shedding_ends_with_its_end_and_says_what_was_drawn() -> None:
    assert steps._is_shed(flying("shed", 150.0), 100.0)
    assert not steps._is_shed(flying("on", 99.0), 100.0)
    with pytest.raises(BoardError, match=r"vb1: the eclipse is over .* drew 7\.2 W .* says 15 W") as caught:
        steps._is_shed(flying("on", 101.0), 100.0)
    assert "is the host busy" in caught.value.hint
    with pytest.raises(BoardError) as caught:
        steps._is_shed(flying("on", 101.0, modelled=False), 100.0)
    assert "measure the board" in caught.value.hint


# --- programs ---------------------------------------------------------------------------------------------------------


def report(measure: Any, value: Any, unit: Any = "") -> str:
    return json.dumps({"measure": measure, "value": value, "unit": unit})


def test_reports_are_read_from_between_other_lines() -> None:
    lines = [
        "loading",
        report("loss", 1.5, "nat"),
        '{"step": 3}',
        "[1]",
        report("ok", True),
        report("hash", "ab12"),
        "3",
    ]
    assert program.read_reports("\n".join(lines)) == [
        program.Report("loss", 1.5, "nat"),
        program.Report("ok", True, ""),
        program.Report("hash", "ab12", ""),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (report("loss", 1.5), "a number needs a unit"),
        (report("ok", True, "s"), "must have none"),
        (report("loss", None, "nat"), "a number needs a unit"),
        (report("loss", [1], "nat"), "a number needs a unit"),
        (report(3, 1.0, "s"), "must be text"),
    ],
)
def test_a_report_that_is_none_is_refused(line: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        program.read_reports(line)


def test_a_program_keeps_to_what_the_mission_declares() -> None:
    loss = program.Report("loss", 1.5, "nat")
    program.check_reports([loss, program.Report("extra", True, "")], {"loss": "nat"})
    with pytest.raises(ValueError, match="loss was reported in 'nat', the mission declares 'bit'"):
        program.check_reports([loss], {"loss": "bit"})
    with pytest.raises(ValueError, match="hash was declared and not reported"):
        program.check_reports([loss], {"loss": "nat", "hash": ""})


def test_power_cuts_come_when_the_seed_says() -> None:
    moments = program.cut_moments(7, "train", 50, (2.0, 5.0))
    assert moments == program.cut_moments(7, "train", 50, (2.0, 5.0))
    assert moments != program.cut_moments(8, "train", 50, (2.0, 5.0))
    assert moments != program.cut_moments(7, "other", 50, (2.0, 5.0))
    assert all(2.0 <= moment <= 5.0 for moment in moments)
    assert max(moments) - min(moments) > 2.0


class Bench:
    """A flight, a board and a shell that say what they are told to say, and remember what they were told."""

    def __init__(self, tmp_path: Path, stdout: str = "", returncode: int = 0, features: frozenset[str] = frozenset()):
        self.events: list[dict[str, Any]] = []
        self.commands: list[list[str]] = []
        self.done = SimpleNamespace(stdout=stdout, stderr="it broke", returncode=returncode)
        shell = SimpleNamespace(run=self._run)
        self.flying: Any = SimpleNamespace(
            board_name="vb1",
            board=SimpleNamespace(shell=shell),
            type=SimpleNamespace(onboard_dir="/var/lib/hil", runtime_python="/usr/bin/python3"),
            mission=SimpleNamespace(path=tmp_path / "m.yaml", file=SimpleNamespace(seed=1)),
            features=features,
            event=lambda kind, **fields: self.events.append({"kind": kind, **fields}),
            say=lambda line: None,
        )

    def _run(self, argv: list[str], **_: Any) -> Any:
        self.commands.append(list(argv))
        return self.done

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]


def step(**keys: Any) -> RunStep:
    return RunStep.model_validate({"name": "train", "argv": ["{python}", "{programs}/train.py", "{model}"], **keys})


def test_a_program_runs_and_its_reports_are_journaled(tmp_path: Path) -> None:
    bench = Bench(tmp_path, report("loss", 1.5, "nat"))
    program.run(bench.flying, step(reports={"loss": "nat"}))
    assert bench.commands[-1] == ["/usr/bin/python3", "/var/lib/hil/programs/train.py", "/var/lib/hil/model.gguf"]
    assert bench.kinds() == ["reported", "run_done"]
    told = bench.events[0]
    assert (told["run"], told["name"], told["value"], told["unit"]) == ("train", "loss", 1.5, "nat")


def test_a_program_that_fails_is_the_boards_failure_unless_it_may(tmp_path: Path) -> None:
    with pytest.raises(BoardError, match="train ended with exit code 3\n  it broke"):
        program.run(Bench(tmp_path, returncode=3).flying, step(reports={"loss": "nat"}))
    bench = Bench(tmp_path, report("loss", 2.0, "nat"), returncode=3)
    program.run(bench.flying, step(may_fail=True, reports={"loss": "nat"}))
    assert bench.kinds() == ["reported", "run_done"]
    assert bench.events[-1]["returncode"] == 3


def test_a_program_that_reports_nothing_it_declared_is_the_boards_failure(tmp_path: Path) -> None:
    with pytest.raises(BoardError, match="loss was declared and not reported"):
        program.run(Bench(tmp_path).flying, step(reports={"loss": "nat"}))


def test_a_program_without_its_bench_is_left_out_loudly(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    program.run(bench.flying, step(requires=["isl", "object-store"]))
    assert bench.events == [{"kind": "step_skipped", "run": "train", "lacking": ["isl", "object-store"]}]
    assert bench.commands == []
    with pytest.raises(UsageError, match=r"no file .*absent\.py"):
        program.run(Bench(tmp_path, features=frozenset({"isl"})).flying, step(requires=["isl"], files=["absent.py"]))


# --- admission --------------------------------------------------------------------------------------------------------


def test_a_query_is_admitted_by_the_longest_so_far() -> None:
    rule = Admission(first_estimate_s=30.0, margin_s=20.0)
    assert not rule.admits(49.9)
    assert rule.admits(50.0)
    rule.taken_s += [4.0, 90.0, 5.0]
    assert rule.predicted_s == 90.0
    assert not rule.admits(109.0)
    assert rule.admits(110.0)
    assert Admission(30.0, None).admits(0.1)
    assert not Admission(30.0, None).admits(0.0)


class Sky:
    """Contacts of a minute, an hour apart; every query takes `query_s` of mission time, or ends in silence at LOS."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, query_s: list[float]) -> None:
        self.now, self.takes, self.events = 0.0, iter(query_s), []
        self.asked: list[float] = []
        self.flying: Any = SimpleNamespace(
            flight=SimpleNamespace(state=lambda: {"t_mission": self.now}),
            timeline=SimpleNamespace(opening=lambda contact: Span(contact.los_s - 60.0, contact.los_s)),
            answers={},
            event=lambda kind, **fields: self.events.append((kind, fields)),
            say=lambda line: None,
        )
        monkeypatch.setattr(steps, "enter_contact", self.enter)
        monkeypatch.setattr(steps, "_ask", self.ask)

    def enter(self, flying: Any) -> Any:
        self.now = (self.now // 3600 + 1) * 3600.0
        return SimpleNamespace(los_s=self.now + 60.0)

    def ask(self, flying: Any, prompt: str, *_: Any, predicted_s: float | None, **__: Any) -> Any:
        self.asked.append(self.now)
        took = next(self.takes)
        left = 60.0 - self.now % 3600
        self.now += min(took, left + 1.0)
        if took > left:
            raise LinkLost("silence", "silence")
        return SimpleNamespace(duration_s=took, answer=prompt, predicted_s=predicted_s)


def ask(margin_s: float | None, count: int) -> QueryStep:
    return QueryStep(prompts=("a",), max_tokens=4, repeat=count, admit_margin_s=margin_s, first_estimate_s=10.0)


def test_a_query_that_would_not_end_in_time_waits_for_the_next_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    sky = Sky(monkeypatch, [15.0] * 5)
    steps.query(sky.flying, ask(20.0, 5))
    # 60 s - 2 x 15 s = 30 s are less than 15 + 20: two a contact
    assert sky.asked == [3600.0, 3615.0, 7200.0, 7215.0, 10800.0]
    assert sky.events == []


def test_a_false_admission_is_journaled_and_the_flight_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sky = Sky(monkeypatch, [10.0, 55.0, 12.0])
    steps.query(sky.flying, ask(20.0, 3))
    assert [kind for kind, _ in sky.events] == ["query_lost"]
    assert sky.events[0][1]["predicted_s"] == 10.0
    assert sky.asked == [3600.0, 3610.0, 7200.0]
    with pytest.raises(LinkLost):
        steps.query(Sky(monkeypatch, [10.0, 55.0]).flying, ask(None, 2))


# --- duty cycle and cruise --------------------------------------------------------------------------------------------


def test_bursts_follow_the_thermal_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look is a second of the model: hot after three of load, cool after five of rest."""
    heat = {"now": 0.0, "busy": False, "may": True}
    events: list[dict[str, Any]] = []

    def state() -> dict[str, Any]:
        heat["now"] += 1.0 if heat["busy"] else -0.6
        heat["may"] = heat["now"] < 3.0 if heat["may"] else heat["now"] < 0.5
        return {"thermal": {"nodes": {"board": heat["now"]}, "may_run": heat["may"]}}

    def wait(what: str, condition: Any, **_: Any) -> Any:
        while not condition():
            pass

    @contextmanager
    def load(flying: Any, step: Any, name: str, **_: Any) -> Any:
        heat["busy"] = True
        yield {"tokens": 5, "t_start_mono": time.monotonic(), "t_quiet_mono": time.monotonic() + 3, "wall_s": 1.0}
        heat["busy"] = False

    monkeypatch.setattr(steps, "continuous_inference", load)
    sky: Any = SimpleNamespace(
        board_name="vb1",
        clock=lambda rate, cause: rate,
        flight=SimpleNamespace(state=state),
        wait=wait,
        event=lambda kind, **fields: events.append({"kind": kind, **fields}),
        say=lambda line: None,
    )
    endurance.duty_cycle(sky, DutyCycleStep(bursts=3, prompt="x"))
    bursts = [event for event in events if event["kind"] == "burst"]
    assert [event["index"] for event in bursts] == [0, 1, 2]
    assert all(event["end_c"]["board"] >= 3.0 > event["start_c"]["board"] for event in bursts)
    assert all(event["start_c"]["board"] < 1.0 for event in bursts[1:])
    assert all(2.0 < event["stop_s"] <= 3.0 for event in bursts)


def test_a_duty_cycle_without_a_thermal_model_is_refused(tmp_path: Path) -> None:
    sky: Any = SimpleNamespace(
        mission=SimpleNamespace(path=tmp_path / "m.yaml"),
        clock=lambda rate, cause: rate,
        flight=SimpleNamespace(state=lambda: {"thermal": None}),
        wait=lambda what, condition, **_: condition(),
    )
    with pytest.raises(UsageError, match="the mission has none"):
        endurance.duty_cycle(sky, DutyCycleStep(bursts=1, prompt="x"))


CONTACTS = (SimpleNamespace(aos_s=2000.0, los_s=2500.0), SimpleNamespace(aos_s=8000.0, los_s=8400.0))


class Orbit:
    """Mission time that runs at the rate that was asked for, a quarter second a look; the load is shed at `shed_s`."""

    def __init__(self, shed_s: float = float("inf"), pace: Pace | None = None) -> None:
        self.now, self.rate, self.power, self.shed_s = 100.0, 1.0, "on", shed_s
        self.jumps: list[tuple[float, float]] = []
        self.pace = Pace() if pace is None else pace
        self.rates: list[float] = []
        self.events: list[dict[str, Any]] = []
        self.boots = 0
        orbit = SimpleNamespace(period_s=5700.0)
        self.flying: Any = SimpleNamespace(
            timeline=SimpleNamespace(
                environment=SimpleNamespace(orbit=orbit),
                duration_s=20_000.0,
                eclipses=(),
                contact_at=lambda t_s: next((c for c in CONTACTS if c.aos_s <= t_s < c.los_s), None),
                next_contact=lambda t_s: next((c for c in CONTACTS if c.aos_s > t_s), None),
            ),
            flight=SimpleNamespace(state=self.state),
            pace=self.pace,
            go_to=self.go_to,
            board=SimpleNamespace(
                check=lambda: None, accept_power_cut=lambda: None, console=SimpleNamespace(mark=lambda: 0)
            ),
            clock=self.clock,
            check_time=lambda: None,
            pause=self.pause,
            wait=self.wait,
            event=lambda kind, **fields: self.events.append({"kind": kind, **fields}),
            say=lambda line: None,
        )

    def state(self) -> dict[str, Any]:
        if self.power == "on" and self.now >= self.shed_s:
            self.power, self.shed_s = "shed", float("inf")
        return {
            "t_mission": self.now,
            "rate": self.rate,
            "soc": 0.9,
            "power": {"state": self.power, "watched_v": 15.0, "power_w": 5.0},
        }

    def clock(self, rate: float, cause: str, at_most: float = float("inf")) -> float:
        self.rate = min(self.pace.rate_of(rate), at_most)
        self.rates.append(self.rate)
        return self.rate

    def go_to(self, t_s: float, cause: str, as_now: bool = False) -> None:
        assert as_now, "the board works on, it is not idle"
        self.jumps.append((self.now, t_s))
        self.now = t_s

    def pause(self, wall_s: float) -> None:
        self.now += (wall_s + 0.07) * self.rate  # asking the daemon takes time too

    def wait(self, what: str, condition: Any, **_: Any) -> Any:
        for _ in range(100):
            self.pause(1.0)
        self.power = "on"
        return condition()


def test_a_cruise_flies_its_orbits_and_does_not_overshoot(monkeypatch: pytest.MonkeyPatch) -> None:
    sky = Orbit()
    endurance.cruise(sky.flying, CruiseStep(orbits=2, clock_rate=60))
    (told,) = sky.events
    assert told["orbits"] == pytest.approx(2.0, abs=1 / 5700)
    assert told["sheds"] == 0
    assert max(sky.rates) == 60
    assert sky.rates[-1] == 1
    with pytest.raises(BenchError, match=r"2\.\d h behind the mission"):
        endurance.cruise(Orbit().flying, CruiseStep(hours=8))


def test_a_cruise_at_the_operators_rate_does_not_overshoot_either() -> None:
    sky = Orbit(pace=Pace(rate=110.0))
    endurance.cruise(sky.flying, CruiseStep(orbits=2, clock_rate=60))
    (told,) = sky.events
    assert told["orbits"] == pytest.approx(2.0, abs=1 / 5700)
    assert max(sky.rates) == 110
    assert sky.jumps == []


def test_a_cruise_of_contacts_only_skips_the_gaps_between_them() -> None:
    sky = Orbit(pace=Pace(contacts_only=True))
    endurance.cruise(sky.flying, CruiseStep(orbits=2, clock_rate=60))
    ((a, b), (c, d), (e, f)) = sky.jumps
    assert (a, b, d, f) == (100.0, 1999.0, 7999.0, 11_500.0)
    assert 2500 <= c < 2515
    assert 8400 <= e < 8415
    (told,) = sky.events
    assert told["orbits"] == pytest.approx(2.0, abs=1 / 5700)


def test_a_cruise_rides_out_a_load_shed(monkeypatch: pytest.MonkeyPatch) -> None:
    sky = Orbit(shed_s=3000.0)
    monkeypatch.setattr(steps, "switched_on", lambda flying, kind: 0.0)
    monkeypatch.setattr(steps, "await_boot", lambda *_, **__: setattr(sky, "boots", sky.boots + 1))
    endurance.cruise(sky.flying, CruiseStep(orbits=2, clock_rate=60))
    assert (sky.events[-1]["sheds"], sky.events[-1]["boots_after_shed"], sky.boots) == (1, 1, 1)
    assert 1.0 in sky.rates[:-1], "a board boots at clock rate 1"


def test_a_prompt_is_padded_to_its_size() -> None:
    assert steps.padded("Hi?", None) == "Hi?"
    assert steps.padded("Hi?", 2) == "Hi?"
    for size in (4, 64, 1024, 4096):
        told = steps.padded("Hi?", size)
        assert len(told.encode()) == size
        assert told.endswith("\nHi?")


def test_a_burst_ends_at_the_next_token_and_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that gives a token every 50 ms, for ever."""
    recorded: list[str] = []

    def stream(*_: Any, on_token: Any, **__: Any) -> None:
        while True:
            time.sleep(0.05)
            on_token("x", time.monotonic())

    monkeypatch.setattr(steps.llm, "stream_chat", stream)
    sky: Any = SimpleNamespace(
        board=SimpleNamespace(shell=SimpleNamespace(forward=None)),
        flight=SimpleNamespace(record_tokens=lambda name, n, plane: recorded.append(name)),
        mission=SimpleNamespace(file=SimpleNamespace(seed=1, model=SimpleNamespace(system_prompt=None))),
    )
    with steps.continuous_inference(sky, DutyCycleStep(bursts=1, prompt="x"), "duty") as load:
        began = time.monotonic()
        while len(recorded) < 3:
            assert time.monotonic() - began < 20
            time.sleep(0.01)
        stopped = time.monotonic()
    assert 0.0 < load["t_quiet_mono"] - stopped < 10
    assert load["tokens"] == len(recorded) >= 3
    assert load["wall_s"] >= 0.1


# --- a board without a management port --------------------------------------------------------------------------------


class ConsoleBoard:
    """A board whose shell is its console's: a real shell on a terminal."""

    def __init__(self, console: ShellBoard) -> None:
        self.shell = ConsoleShell.connect(Console.on_port(console.path), 10, sys.executable)


def test_small_files_go_over_the_console_and_large_ones_are_refused(tmp_path: Path) -> None:
    with ShellBoard() as terminal:
        board = ConsoleBoard(terminal)
        source, target = tmp_path / "onboard.py", tmp_path / "there.py"
        source.write_text("print('here')\n")
        ran: list[list[str]] = []
        run = board.shell.run
        board.shell.run = lambda argv, **options: ran.append(argv) or run(argv, **options)  # type: ignore[func-returns-value,method-assign]
        steps.put_file(board.shell, source, str(target))
        assert target.read_text() == source.read_text()
        assert ran[-1] == ["sync"], "a power cut right afterwards would leave an empty file"
        flight = SimpleNamespace(
            board=board, board_name="vb1", mission=SimpleNamespace(path="m.yaml"), say=lambda text: None
        )
        with pytest.raises(UsageError, match="no mgmt port, and its console is too slow") as caught:
            upload.preload(flight, SimpleNamespace(), 1000)  # type: ignore[arg-type]
        assert "mgmt" in caught.value.hint
        board.shell.close()
