"""What an operator asks of the mission clock: checked, followed by every step, brought to the daemon and recorded."""

from __future__ import annotations

import ast
import json
import math
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hil.bench.journal import Journal, read_events
from hil.campaign import endurance, program, steps, upload
from hil.campaign import fly as flying_module
from hil.campaign.flying import RECOVERED_V, Flying, TimeIsUp
from hil.campaign.pace import Pace
from hil.client.bench import Bench as Client
from hil.errors import UsageError
from hil.inventory import Mission, load_bench, load_mission
from hil.inventory.environment import environment
from hil.mission import timeline_file
from hil.mission.clock import MissionClock
from hil.mission.compile import compile_timeline
from hil.model import Reading

ROOT = Path(__file__).resolve().parents[2]
SHORT = ROOT / "fixtures/missions/short.yaml"
HOUR = 3600.0


class Daemon:
    """A flight as the daemon keeps it, on an invented wall clock; speaks the client's HTTP without a socket."""

    def __init__(self, duration_s: float = 48 * HOUR) -> None:
        self.wall_s = 1000.0
        self.clock = MissionClock(0.0, self.wall_s)
        self.duration_s = duration_s
        self.asked: list[tuple[str, Any]] = []
        self.bus_v: Callable[[float], float] = lambda t_s: 16.0
        self.on_start: Callable[[dict[str, Any]], None] = lambda body: None

    @property
    def now_s(self) -> float:
        return self.clock.mission_s(self.wall_s)

    @property
    def rates(self) -> list[float]:
        return [body["rate"] for what, body in self.asked if what == "clock" and "rate" in body]

    @property
    def skips(self) -> list[float]:
        return [body["skip_to"] for what, body in self.asked if what == "clock" and "skip_to" in body]

    def pass_wall(self, seconds: float) -> None:
        """Wall time passes; as the real one, it forbids a fast clock near the shed voltage of 13.5 V."""
        while seconds > 1e-9:
            part = min(seconds, 0.1)
            self.wall_s += part
            seconds -= part
            if self.clock.rate > 1 and self.bus_v(self.now_s) < 13.5:
                self.clock.set_rate(1.0, self.wall_s)

    def get(self, path: str, timeout_s: float = 0.0) -> Any:
        if path == "/v1/doctor":
            return {"checks": []}
        assert path == "/v1/flight"
        self.wall_s += 0.002  # what a request costs
        # the bus is regulated: it tells nothing of the battery
        power = {"state": "on", "bus_voltage_v": 12.0, "watched_v": self.bus_v(self.now_s), "power_w": 6.5}
        return {"t_mission": self.now_s, "rate": self.clock.rate, "power": power, "link": {"up": True}}

    def call(self, method: str, path: str, body: Any = None, *, token: str | None = None, timeout_s: float = 0) -> Any:
        self.wall_s += 0.002
        self.asked.append((path.removeprefix("/v1/flight/"), body))
        if path == "/v1/leases":
            return {"lease": "1", "token": "t", "boards": body["boards"]}
        if path == "/v1/flights":
            self.clock = MissionClock(body["start_s"], self.wall_s)
            self.on_start(body)
        if path == "/v1/flight/clock" and "rate" in body:
            self.clock.set_rate(body["rate"], self.wall_s)
        elif path == "/v1/flight/clock":
            if body["skip_to"] > self.duration_s:
                raise UsageError("the mission ends before")
            if body["skip_to"] > self.now_s:
                self.clock.skip_to(body["skip_to"], self.wall_s)
        if "/power" in path:
            return {"power_epoch": 1, **{field.name: 0.0 for field in fields(Reading)}}
        return {"t_mission": self.now_s, "rate": self.clock.rate}

    def close(self) -> None: ...


class Wall(threading.Event):
    """`Flying.interrupted` on the daemon's invented wall clock."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__()
        self.daemon = daemon

    def wait(self, timeout: float | None = None) -> bool:
        self.daemon.pass_wall(timeout or 0.0)
        return self.is_set()


@pytest.fixture(scope="module")
def mission() -> Mission:
    return load_mission(SHORT)


def flown(daemon: Daemon, pace: Pace, tmp_path: Path) -> Flying:
    from hil.client.flight import Flight

    return Flying(
        mission=SimpleNamespace(),  # type: ignore[arg-type]
        board_name="vb1",
        wires=SimpleNamespace(),  # type: ignore[arg-type]
        type=SimpleNamespace(power=SimpleNamespace(idle_w=6.0)),  # type: ignore[arg-type]
        timeline=SimpleNamespace(duration_s=daemon.duration_s),  # type: ignore[arg-type]
        board=SimpleNamespace(check=lambda: None),  # type: ignore[arg-type]
        flight=Flight(daemon, "vb1", "t"),  # type: ignore[arg-type]
        journal=Journal(tmp_path / "events.jsonl", "campaign"),
        say=lambda line: None,
        interrupted=Wall(daemon),
        pace=pace,
    )


# --- what may be asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12.5", 45_000.0), ("12.5h", 45_000.0), ("0", 0.0), ("2026-01-01T03:00:00Z", 3600.0),
     ("2026-01-01T11:00:00+08:00", 3600.0)],
)  # fmt: skip
def test_a_mission_time_is_hours_or_utc(mission: Mission, text: str, seconds: float) -> None:
    assert Pace.of(mission, start=text).start_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rate": 0.5}, "--rate 0.5 cannot be flown"),
        ({"rate": math.inf}, "--rate inf cannot be flown"),
        ({"rate": math.nan}, "--rate nan cannot be flown"),
        ({"rate": 1001.0}, "--rate 1001 cannot be flown"),
        ({"start": "noon"}, "'noon' is not a mission time"),
        ({"start": "nan"}, "'nan' is not a mission time"),
        ({"start": "2026-01-01T12:00:00"}, "is not a mission time"),
        ({"start": "2025-12-31T00:00:00Z"}, "--from 2025-12-31T00:00:00Z is before the start of .*short.yaml"),
        ({"start": "-1"}, "--from -1 is before the start"),
        ({"start": "48"}, "--from 48 is the mission's end: nothing is left"),
        ({"until": "48.1"}, "--until 48.1 is after the end"),
        ({"until": "0"}, "--until 0 is not after the start"),
        ({"start": "5", "until": "5"}, "--until 5 is not after --from 5"),
    ],
)
def test_nonsense_is_refused_and_says_what_would_do(mission: Mission, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Pace.of(mission, **asked)
    assert caught.value.hint or "nothing is left" in message


def test_a_mission_in_real_time_is_not_scaled(mission: Mission) -> None:
    real = SimpleNamespace(path=Path("m.yaml"), file=mission.file.model_copy(update={"clock": "real"}))
    with pytest.raises(UsageError, match="flown in real time, --rate 60 would scale it"):
        Pace.of(real, rate=60.0)  # type: ignore[arg-type]
    pace = Pace.of(real)  # type: ignore[arg-type]
    assert pace.rate_of(60.0) == 1.0
    assert not pace.flies_gaps


# --- what the steps then do ------------------------------------------------------------------------------------------


def test_without_a_wish_steps_have_their_rates_and_gaps_are_skipped(tmp_path: Path) -> None:
    daemon = Daemon()
    flying = flown(daemon, Pace(), tmp_path)
    assert flying.clock(60.0, "upload") == 60.0
    flying.go_to(5 * HOUR, "next contact")
    assert daemon.skips == [5 * HOUR]
    assert daemon.asked[-1][1]["assumed_board_w"] == 6.0


def test_a_rate_replaces_that_of_scaled_steps_and_never_real_time(tmp_path: Path) -> None:
    flying = flown(Daemon(), Pace(rate=30.0), tmp_path)
    assert [flying.clock(rate, "x") for rate in (60.0, 1.0, 5.0)] == [30.0, 1.0, 30.0]


def test_a_step_near_its_end_may_bound_the_rate(tmp_path: Path) -> None:
    flying = flown(Daemon(), Pace(rate=30.0), tmp_path)
    assert flying.clock(60.0, "cruise", at_most=4.0) == 4.0


def test_a_jump_may_take_the_board_as_it_is(tmp_path: Path) -> None:
    daemon = Daemon()
    flown(daemon, Pace(), tmp_path).go_to(HOUR, "next contact", as_now=True)
    assert daemon.asked[-1][1]["assumed_board_w"] is None


@pytest.mark.parametrize("rate", [1.0, 10.0, 60.0, 1000.0])
def test_with_a_rate_gaps_are_flown_to_the_second(tmp_path: Path, rate: float) -> None:
    daemon = Daemon()
    flying = flown(daemon, Pace(rate=rate), tmp_path)
    before_s = daemon.wall_s
    flying.go_to(HOUR, "next contact")
    assert daemon.skips == []
    assert 0 <= daemon.now_s - HOUR < 0.05
    assert daemon.clock.rate == 1.0
    assert daemon.rates == sorted(daemon.rates, reverse=True)
    assert max(daemon.rates, default=1.0) == rate
    assert daemon.wall_s - before_s < HOUR / rate + 20


def test_contacts_only_skips_what_a_rate_alone_would_fly(tmp_path: Path) -> None:
    daemon = Daemon()
    flying = flown(daemon, Pace(rate=30.0, contacts_only=True), tmp_path)
    flying.go_to(HOUR, "next contact")
    assert daemon.skips == [HOUR]
    assert flying.clock(60.0, "upload") == 30.0


def test_near_shedding_a_gap_is_flown_in_real_time_until_the_bus_has_recovered(tmp_path: Path) -> None:
    daemon = Daemon()
    # 16 V, then a dip around 1000 s to 13.4 V for 100 mission seconds, a slow recovery, 16 V again from 1400 s on
    daemon.bus_v = lambda t_s: 16.0 if t_s < 1000 else 13.4 if t_s < 1100 else min(13.4 + (t_s - 1100) / 100, 16.0)
    flying = flown(daemon, Pace(rate=60.0), tmp_path)
    flying.go_to(HOUR, "next contact")
    assert 0 <= daemon.now_s - HOUR < 0.05
    slow = [s for s in daemon.clock.segments if s.rate == 1.0 and 1000 <= s.mission_start_s < 1200]
    assert len(slow) == 1, "slowed once, not tried again and again"
    after = daemon.clock.segments[daemon.clock.segments.index(slow[0]) + 1]
    assert after.rate == 60.0
    assert daemon.bus_v(after.mission_start_s) >= 13.4 + RECOVERED_V


def test_the_flight_ends_where_it_was_asked_to(tmp_path: Path) -> None:
    daemon = Daemon()
    flying = flown(daemon, Pace(until_s=2 * HOUR), tmp_path)
    flying.go_to(HOUR, "next contact")
    with pytest.raises(TimeIsUp):
        flying.go_to(3 * HOUR, "next contact")
    assert daemon.skips == [HOUR, 2 * HOUR], "not a second beyond"
    with pytest.raises(TimeIsUp):
        flying.clock(60.0, "upload")
    with pytest.raises(TimeIsUp):
        flying.wait("something", lambda: False, timeout_s=60)


def test_without_an_end_a_step_beyond_the_mission_is_still_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the mission ends before"):
        flown(Daemon(duration_s=HOUR), Pace(), tmp_path).go_to(2 * HOUR, "next contact")


@pytest.mark.parametrize("module", [steps, endurance, program, upload], ids=lambda module: module.__name__)
def test_no_step_goes_around_the_pace(module: ModuleType) -> None:
    """A step that asks the flight's clock itself would ignore the operator; back to real time is always allowed."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            target = ast.unparse(node.func)
            assert not target.endswith("flight.skip_to"), ast.unparse(node)
            if target.endswith("flight.clock"):
                assert ast.unparse(node.args[0]) == "1.0", ast.unparse(node)


# --- a whole flight --------------------------------------------------------------------------------------------------


@pytest.fixture
def bench_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Daemon, Callable[..., Path]]:
    """fly() against the invented daemon: the real client, steps that only move the clock."""
    bench, mission = load_bench(ROOT / "fixtures/benches/virtual.yaml"), load_mission(SHORT)
    daemon = Daemon()
    timeline = compile_timeline(environment(mission, bench.board("vb1")[2]))
    daemon.on_start = lambda body: timeline_file.save(timeline, Path(body["run_dir"]) / "timeline.npz")

    class Attached(Client):
        def __enter__(self) -> Attached:
            return self

    monkeypatch.setattr(flying_module, "attach", lambda bench: Attached(bench, daemon))  # type: ignore[arg-type]
    monkeypatch.setattr(flying_module, "check_model", lambda mission: None)
    monkeypatch.setattr(flying_module, "finish", lambda run: run)

    def brings(flying: Flying, step: Any) -> None:
        for hour in (10, 20, 30):
            flying.go_to(hour * HOUR, "next contact")
            flying.clock(step.clock_rate, "upload")
            flying.flight.clock(1.0, cause="upload window over")

    def nothing(flying: Flying, step: Any) -> None: ...

    monkeypatch.setattr(
        flying_module, "STEPS", {step.kind: nothing for step in mission.file.steps} | {"upload": brings}
    )

    def go(**asked: Any) -> Path:
        run: Path = flying_module.fly(bench, mission, runs=tmp_path, pace=Pace.of(mission, **asked))  # type: ignore[assignment]
        return run

    return daemon, go


def test_options_reach_the_daemon_and_the_record(bench_flight: tuple[Daemon, Callable[..., Path]]) -> None:
    daemon, go = bench_flight
    run = go(rate=20.0, contacts_only=True, start="2026-01-01T08:00:00Z", until="25")
    (start,) = [body for what, body in daemon.asked if what == "/v1/flights"]
    assert start["start_s"] == 6 * HOUR
    assert daemon.skips == [10 * HOUR, 20 * HOUR, 25 * HOUR]
    assert set(daemon.rates) == {20.0, 1.0}
    assert json.loads((run / "provenance.json").read_text())["clock"] == {
        "rate": 20.0,
        "contacts_only": True,
        "from_s": 21600.0,
        "from": "2026-01-01T08:00:00.000Z",
        "until_s": 90000.0,
        "until": "2026-01-02T03:00:00.000Z",
    }
    events = read_events(run / "events.jsonl")
    (end,) = [event for event in events if event["kind"] == "time_is_up"]
    assert (end["step"], end["t_mission"]) == ("upload", pytest.approx(25 * HOUR, abs=5))
    assert [event["step"] for event in events if event["kind"] == "step_finished"] == ["boot"]
    assert not [event for event in events if event["kind"] == "error"], "an end that was asked for is no error"
    assert ("end", {}) in daemon.asked, "in order: the daemon ended the flight"


def test_a_flight_without_wishes_is_the_missions_own(bench_flight: tuple[Daemon, Callable[..., Path]]) -> None:
    daemon, go = bench_flight
    run = go()
    assert daemon.skips == [10 * HOUR, 20 * HOUR, 30 * HOUR]
    assert set(daemon.rates) == {60.0, 1.0}
    assert json.loads((run / "provenance.json").read_text())["clock"]["rate"] is None
    finished = [e["step"] for e in read_events(run / "events.jsonl") if e["kind"] == "step_finished"]
    assert finished == [step.kind for step in load_mission(SHORT).file.steps]
