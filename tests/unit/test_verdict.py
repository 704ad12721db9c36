"""From a (synthetic) record to verdict.json and JUnit: every verdict, and that nothing but a whole record can pass."""

from __future__ import annotations

import json
import shutil
import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_run

from hil.campaign import derive, junit, measures, record, verdict
from hil.errors import BenchError, ExitCode, UsageError
from hil.inference import metrics
from hil.inventory import load_board_type, load_mission
from hil.inventory.environment import environment
from hil.inventory.mission import CriterionSpec, read_mission_file
from hil.mission import timeline_file
from hil.mission.compile import compile_timeline
from hil.model import Criterion, Span, Verdict, VerdictFile

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run.write(tmp_path_factory.mktemp("synthetic") / "run")


@pytest.fixture
def run(flown: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic run that a test may damage."""
    return Path(shutil.copytree(flown, tmp_path / "run"))


def judge(run: Path, *criteria: CriterionSpec) -> VerdictFile:
    return verdict.evaluate(record.read(run), criteria or verdict.mission_of(run).criteria)


def row(judged: VerdictFile, name: str) -> Criterion:
    return next(item for item in judged.criteria if item.name == name)


def edit(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Rewrite the journal; `change` returns an event, or None to drop it."""
    path = run / "events.jsonl"
    changed = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in changed if event is not None))


def sql(run: Path, statement: str) -> None:
    with closing(sqlite3.connect(run / "telemetry.sqlite")) as database, database:
        assert database.execute(statement).rowcount > 0


def test_whole_flight_passes(run: Path) -> None:
    judged = judge(run)
    assert {item.name: item.verdict for item in judged.criteria if item.verdict != "pass"} == {}
    assert judged.verdict == "pass"
    assert len(judged.criteria) == len(verdict.mission_of(run).criteria) + 2


Change = Callable[[dict[str, Any]], dict[str, Any] | None]


def put(kind: str, **fields: Any) -> Change:
    """Overwrite fields of all events of a kind; `as_kind` makes another kind of them."""
    new = {"kind" if key == "as_kind" else key: value for key, value in fields.items()}
    return lambda event: {**event, **new} if event["kind"] == kind else event


def drop(kind: str, **matching: Any) -> Change:
    """Take away all events of a kind that hold these fields."""
    return lambda e: None if e["kind"] == kind and all(e.get(k) == v for k, v in matching.items()) else e


def fault(kind: str, **fields: Any) -> Change:
    """Make a journal line that no measure needs into one that tells of a fault."""
    return put("contact", as_kind=kind, **fields)


def instead_of_the_boot(arm: str) -> Change:
    """The flight ended by an error where the board would have booted after the load shed."""
    error = {"kind": "error", "arm": arm, "message": "ended"}
    return lambda event: {**event, **error} if event.get("cause") == "load restored" else event


LEAK = {"stored_j": 0, "mppt_loss_j": 0, "resistance_loss_j": 0, "charge_loss_j": 0, "bus_loss_j": 0, "curtailed_j": 0}

# What is done to the record, the criterion it must turn, and into what.
DAMAGE: list[tuple[str, Change, str, Verdict]] = [
    ("no hash", drop("upload_done"), "model-hash", "missing"),
    ("wrong hash", put("upload_done", sha256_ok=False), "model-hash", "fail"),
    ("wrong file activated", put("activated", sha256="0" * 64), "activated-once", "fail"),
    ("activated before the hash", put("activated", t_mono=1.0), "activated-once", "fail"),
    ("chunk and a byte resent", put("upload_window", bytes_resent=(1 << 20) + 1), "resent-per-cut", "fail"),
    ("never cut", put("upload_window", cut_by_los=False, bytes_resent=1 << 30), "resent-per-cut", "missing"),
    ("delivered twice", put("mailbox", deliveries=2, duplicates=1), "delivered-exactly-once", "fail"),
    ("answered before loss of signal", put("mailbox", los_during=False), "interrupted-by-los", "fail"),
    ("never shed", drop("load_shed"), "shed-once", "fail"),
    ("eclipse never flown", lambda e: None if e.get("step") == "eclipse" or e["kind"] == "load_shed" else e,
     "shed-once", "missing"),
    ("never restored", drop("load_restored"), "boots-again", "missing"),
    ("no boot after the cut", drop("boot", cause="load restored"), "boots-again", "fail"),
    ("interrupted while it boots", instead_of_the_boot("interrupted"), "boots-again", "missing"),
    ("daemon gone while it boots", instead_of_the_boot("bench"), "boots-again", "missing"),
    ("did not boot", instead_of_the_boot("board"), "boots-again", "fail"),
    ("no cut before the check", drop("load_shed"), "identical-answer", "missing"),
    ("off not verified", put("board_off", verified_v=3.3), "off-verified", "fail"),
    ("shed not verified", put("load_shed", verified_v=3.3), "off-verified", "fail"),
    ("off never measured", drop("board_off"), "off-verified", "missing"),
    ("tokens lost", put("query", server_tokens=40), "tokens-agree", "fail"),
    ("no tokens", put("query", tokens=0), "answers", "fail"),
    ("field missing", lambda e: {k: v for k, v in e.items() if k != "deliveries"}, "delivered-exactly-once", "missing"),
    ("field of a wrong type", put("board_off", verified_v="low"), "off-verified", "missing"),
    ("not a number", put("board_off", verified_v=float("nan")), "off-verified", "invalid"),
    ("leaking ledger", put("flight_ended", ledger={"generated_j": 9, "delivered_j": 8, **LEAK}),
     "energy-ledger-closes", "fail"),
    ("daemon killed", drop("flight_ended"), "bench-in-order", "infra"),
    ("daemon killed, sheds unknown", drop("flight_ended"), "shed-once", "missing"),
    ("never flown", drop("flight_started"), "bench-in-order", "infra"),
    ("dead-man died", fault("deadman", alive=False), "bench-in-order", "infra"),
    ("supply lost", fault("error", arm="bench", message="supply gone"), "bench-in-order", "infra"),
    ("interrupted", fault("error", arm="interrupted", message="^C"), "bench-in-order", "infra"),
    ("bench could not measure", fault("invalid", reason="gain 0.6"), "bench-in-order", "invalid"),
    ("board misbehaved", fault("error", arm="board", message="panic"), "board-in-order", "fail"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "name", "expected"), [item[1:] for item in DAMAGE], ids=[item[0] for item in DAMAGE]
)
def test_damaged_journal(run: Path, change: Change, name: str, expected: Verdict) -> None:
    edit(run, change)
    judged = judge(run)
    assert row(judged, name).verdict == expected, row(judged, name)
    assert judged.verdict != "pass"


@pytest.mark.parametrize(
    ("statement", "name", "expected"),
    [
        ("UPDATE qdisc SET sent_bytes = 0", "crossed-netem", "fail"),
        ("DELETE FROM qdisc", "crossed-netem", "missing"),
        ("UPDATE power SET voltage_v = 9.9 WHERE state = 'on' AND soc < 0.5", "no-brown-out", "fail"),
        ("DELETE FROM power", "no-brown-out", "missing"),
        ("UPDATE power SET power_w = 5.0", "power-rises-with-inference", "fail"),
        ("DELETE FROM power", "power-rises-with-inference", "missing"),
        ("UPDATE clock SET rate = 60", "answers", "invalid"),
        ("DELETE FROM clock", "answers", "invalid"),
    ],
)  # fmt: skip
def test_damaged_telemetry(run: Path, statement: str, name: str, expected: Verdict) -> None:
    sql(run, statement)
    judged = judge(run)
    assert row(judged, name).verdict == expected, row(judged, name)
    assert judged.verdict != "pass"


def test_reading_from_before_switching_on_is_no_brown_out(run: Path) -> None:
    sql(run, "UPDATE power SET voltage_v = 0 WHERE t_mono = (SELECT min(t_mono) FROM power WHERE state = 'on')")
    assert row(judge(run), "no-brown-out").verdict == "pass"
    sql(run, "UPDATE power SET voltage_v = 0 WHERE t_mono = (SELECT max(t_mono) FROM power WHERE state = 'on')")
    assert row(judge(run), "no-brown-out").measured == 1


def test_lockout_of_an_unknown_board(run: Path) -> None:
    (run / "provenance.json").unlink()
    assert row(judge(run), "no-brown-out").verdict == "missing"


def test_other_answer_after_the_power_cut(tmp_path: Path) -> None:
    judged = judge(synthetic_run.write(tmp_path / "run", answer_after="1. Pluto"))
    assert row(judged, "identical-answer").verdict == "fail"
    assert judged.verdict == "fail"


def test_bounds_are_kept_or_broken(run: Path) -> None:
    def one(**bounds: Any) -> Criterion:
        return row(judge(run, CriterionSpec(name="x", measure="query.duration_s.max", **bounds)), "x")

    longest = one(max=100).measured
    assert longest == pytest.approx(7.5)
    assert one(max=longest, min=longest, equals=longest).verdict == "pass"
    assert one(max=7).verdict == "fail"
    assert one(min=8).verdict == "fail"
    assert one(equals=7.4).verdict == "fail"
    assert one(min=7, max=8).limit == ">= 7, <= 8"
    assert one(max=100, clock_rate=2).verdict == "invalid"


def test_no_criteria_never_pass(run: Path) -> None:
    assert verdict.evaluate(record.read(run), []).verdict == "missing"


def test_order_of_verdicts_and_exit_codes() -> None:
    assert verdict.worst(["pass", "missing", "invalid", "infra", "fail"]) == "fail"
    assert verdict.worst(["pass", "missing", "invalid", "infra"]) == "infra"
    assert verdict.worst(["pass", "missing", "invalid"]) == "invalid"
    assert verdict.worst(["pass", "missing"]) == "missing"
    assert verdict.worst(["pass", "pass"]) == "pass"
    assert verdict.worst([]) == "missing"
    codes = {item: verdict.exit_code(item) for item in verdict.WORST_FIRST}
    assert codes == {
        "fail": ExitCode.FAIL,
        "infra": ExitCode.BENCH,
        "invalid": ExitCode.INVALID,
        "missing": ExitCode.INVALID,
        "pass": ExitCode.PASS,
    }


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (CriterionSpec(name="x", measure="query.duration.max", max=1), r"did you mean 'query\.duration_s\.max'"),
        (CriterionSpec(name="x", measure="query.duration_s.max", max=1, unit="ms"), "'s', not ms"),
        (CriterionSpec(name="x", measure="query.duration_s.max", equals=True), "a number in 's'"),
        (CriterionSpec(name="x", measure="upload.sha256_ok", min=1), "true or false"),
    ],
)
def test_criteria_that_cannot_be_judged(run: Path, spec: CriterionSpec, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        judge(run, spec)


def test_every_mission_of_the_repository_names_known_measures() -> None:
    missions = sorted((ROOT / "fixtures/missions").glob("*.yaml"))
    assert missions
    for path in missions:
        file = read_mission_file(path)
        verdict.check_criteria(file.criteria, str(path), file.reports)


def test_documentation_lists_every_measure() -> None:
    text = (ROOT / "docs/missions.md").read_text().split("\n## Measures\n")[1]
    for measure in measures.MEASURES.values():
        assert f"| `{measure.name}` | {measure.unit or 'true/false'} | {measure.definition} |" in text
    assert text.count("| `") == len(measures.MEASURES)


def test_every_measure_without_evidence_is_missing(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"schema":1,"t_mono":1.0,"t_wall":"","source":"x","kind":"nothing"}\n')
    empty = record.read(tmp_path)
    for measure in measures.MEASURES.values():
        with pytest.raises(measures.NoEvidence):
            measure.of(empty)


def test_verdict_file_has_the_documented_form(run: Path) -> None:
    path = run / "verdict.json"
    verdict.write(path, judge(run))
    content = json.loads(path.read_text())
    assert list(content) == ["schema", "verdict", "criteria"]
    assert (content["schema"], content["verdict"]) == (1, "pass")
    keys = ["name", "verdict", "measured", "limit", "unit", "clock_rate", "evidence"]
    assert all(list(item) == keys for item in content["criteria"])
    boots = next(item for item in content["criteria"] if item["name"] == "boots")
    assert boots["clock_rate"] == 1.0
    assert boots["limit"] == "<= 60"


def test_goodput_counts_only_open_link_time(flown: Path) -> None:
    kept = record.read(flown)
    found = measures.MEASURES["upload.goodput_share"].of(kept)
    # 98.4 MB in 44.3 s of contact at 18 Mbit/s; the invented flight leaves the link open all that time.
    assert found.value == pytest.approx(98_362_432 * 8 / (18e6 * 43 * 1.03), rel=0.01)


def test_what_an_upload_cost_needs_every_contact_to_say_it(run: Path) -> None:
    def of(name: str) -> float | bool | str:
        return measures.MEASURES[f"upload.{name}"].of(record.read(run)).value

    # The invented flight leaves the link open for the window and a second of running on.
    assert of("goodput_bps") == pytest.approx(98_362_432 * 8 / (60 * 43 * 1.03), rel=0.03)
    for name in ("wire_bytes", "resent_bytes", "retransmissions"):
        with pytest.raises(measures.NoEvidence):
            of(name)
    edit(run, put("upload_window", bytes_on_wire=26_000_000, bytes_resent=1_000, retransmissions=3))
    assert (of("wire_bytes"), of("resent_bytes"), of("retransmissions")) == (104e6, 4_000.0, 12.0)
    edit(run, put("upload_window", bytes_on_wire=None))
    with pytest.raises(measures.NoEvidence, match="no counter of its own"):
        of("wire_bytes")
    sql(run, "DELETE FROM link")
    with pytest.raises(measures.NoEvidence, match="no applied uplink state"):
        of("goodput_bps")


def test_idle_is_a_ready_board_that_nobody_asks(flown: Path) -> None:
    kept = record.read(flown)
    idle = derive.idle_samples(kept)
    busy = derive.inference_samples(kept)
    assert not np.any(idle & busy)
    # The invented board draws 5 W idle, 6.5 W and more in uploads, boots and model loads, 14.6 W in inference.
    assert np.mean(kept.power.power_w[idle]) == pytest.approx(5.0, abs=0.15)
    assert np.mean(kept.power.power_w[busy]) == pytest.approx(14.6, abs=0.15)
    steps = {step.label: step for step in derive.steps(kept)}
    for name in ("boot", "upload", "serve", "loss_of_signal", "eclipse", "end"):
        assert not np.any(idle & derive.within(kept.power.t_mono, [steps[name]])), name


def test_nothing_passes_in_an_outage(flown: Path) -> None:
    kept = record.read(flown)
    (first, *_) = kept.of("upload_window")
    start = first["t_start_mono"]
    assert derive.capacity_bits(kept, "uplink", Span(start + 1, start + 2)) == pytest.approx(18e6)
    assert derive.capacity_bits(kept, "uplink", Span(first.t_mono + 0.5, first.t_mono + 0.9)) == 0
    assert derive.capacity_bits(kept, "uplink", Span(0, 1)) is None
    assert derive.open_s(kept, "uplink", Span(start + 1, start + 2)) == pytest.approx(1.0)
    assert derive.open_s(kept, "uplink", Span(first.t_mono + 0.5, first.t_mono + 0.9)) == 0


def test_energy_is_integrated_with_interpolated_ends() -> None:
    t = np.array([0.0, 1.0, 2.0, 3.0])
    w = np.array([0.0, 10.0, 10.0, 20.0])
    assert metrics.energy_j(t, w, 0.5, 2.5) == pytest.approx(3.75 + 10 + 6.25)
    assert metrics.energy_j(t, w, -0.1, 2.5) is None
    assert metrics.energy_j(np.array([0.0, 5.0]), np.array([1.0, 1.0]), 1.0, 2.0) is None


def test_counter_reset_is_not_a_loss() -> None:
    assert metrics.gained(np.array([5.0, 9.0, 2.0, 4.0])) == 8.0


def test_quantile_is_a_measured_value() -> None:
    assert metrics.quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert metrics.quantile(list(range(1, 101)), 0.99) == 99
    with pytest.raises(ValueError, match="nothing"):
        metrics.quantile([], 0.5)


def test_energy_per_token_by_light_adds_up(flown: Path) -> None:
    kept = record.read(flown)
    parts = {item.phase: item for item in derive.per_phase(kept)}
    assert parts["eclipse"].tokens > 50
    assert parts["sun"].tokens > 50
    assert sum(item.tokens for item in parts.values()) == int(np.sum(kept.tokens.n))
    for item in parts.values():
        assert item.energy_j / item.seconds == pytest.approx(14.6, rel=0.05)


def test_junit_tells_board_and_bench_apart(run: Path) -> None:
    def damage(event: dict[str, Any]) -> dict[str, Any] | None:
        if event["kind"] == "mailbox":
            return {**event, "deliveries": 2}
        if event["kind"] == "step_finished" and event["step"] in ("check", "end"):
            return None
        if event["kind"] == "board_off":
            return {**event, "kind": "error", "arm": "bench", "message": "supply \x00 gone\nnext: look"}
        return event

    edit(run, damage)
    kept, path = record.read(run), run / "junit.xml"
    judged = judge(run)
    junit.write(path, kept, judged)
    suite = ET.parse(path).getroot()[0]
    cases = {f"{case.get('classname')}.{case.get('name')}": case for case in suite.iter("testcase")}
    assert cases["synthetic.criteria.delivered-exactly-once"].find("failure") is not None
    assert cases["synthetic.criteria.off-verified"].find("error").get("type") == "missing"  # type: ignore[union-attr]
    assert cases["synthetic.criteria.bench-in-order"].find("error").get("type") == "infra"  # type: ignore[union-attr]
    assert cases["synthetic.criteria.boots"].find("failure") is None
    assert cases["synthetic.criteria.boots"].find("error") is None
    assert cases["synthetic.steps.8-end"].find("error").get("message") == "supply ? gone"  # type: ignore[union-attr]
    assert len(cases) == int(suite.get("tests", "0")) == 8 + len(judged.criteria)
    assert int(suite.get("failures", "0")) == 1
    properties = {item.get("name"): item.get("value") for item in suite.iter("property")}
    assert properties["model.sha256"] == synthetic_run.SHA
    assert (properties["hil"], properties["run"], properties["verdict"]) == ("0.1.0", run.name, "fail")


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run"):
        record.read(tmp_path / "absent")
    with pytest.raises(UsageError, match="neither"):
        record.read(tmp_path)
    (tmp_path / "telemetry.sqlite").write_bytes(b"not a database at all, but long enough to look like one" * 20)
    with pytest.raises(BenchError, match="cannot be read"):
        record.read(tmp_path)


# --- what a lab's programs report, and features -----------------------------------------------------------------------


def told(run: Path, *values: tuple[Any, str], name: str = "loss") -> None:
    """Append reports of a program to the journal, in the first seconds of the flight's query step."""
    asked = next(event for event in record.read(run).of("query"))
    with (run / "events.jsonl").open("a") as journal:
        for value, unit in values:
            event = {"schema": 1, "t_mono": asked.t_mono, "t_wall": "", "source": "campaign", "kind": "reported"}
            event |= {"run": "train", "name": name, "value": value, "unit": unit}
            journal.write(json.dumps({**event, "t_start_mono": asked["t_send_mono"], "wall_s": 1.0}) + "\n")


def reported(run: Path, measure: str, unit: str = "nat", **bounds: Any) -> Criterion:
    spec = CriterionSpec(name="x", measure=measure, **bounds)
    return row(verdict.evaluate(record.read(run), [spec], {"loss": unit}), "x")


@pytest.mark.parametrize(
    ("statistic", "value"), [("last", 2.0), ("min", 1.0), ("max", 3.0), ("p95", 3.0), ("count", 3.0)]
)
def test_reports_are_judged_by_their_statistic(run: Path, statistic: str, value: float) -> None:
    told(run, (1.0, "nat"), (3.0, "nat"), (2.0, "nat"))
    found = reported(run, f"reported.loss.{statistic}", equals=value)
    assert (found.verdict, found.measured) == ("pass", value)
    assert found.unit == ("values" if statistic == "count" else "nat")
    assert reported(run, f"reported.loss.{statistic}", max=value - 0.5).verdict == "fail"


def test_reports_without_a_unit_are_true_false_or_text(run: Path) -> None:
    told(run, (True, ""), (False, ""))
    assert reported(run, "reported.loss.all", "", equals=True).verdict == "fail"
    assert reported(run, "reported.loss.last", "", equals=False).verdict == "pass"
    told(run, ("ab12", ""))
    assert reported(run, "reported.loss.last", "", equals="ab12").verdict == "pass"
    assert reported(run, "reported.loss.last", "", equals="ab13").verdict == "fail"
    assert reported(run, "reported.loss.max", "nat", max=1).verdict == "missing"


def test_a_report_in_another_unit_is_no_evidence(run: Path) -> None:
    assert reported(run, "reported.loss.last", max=9).verdict == "missing"
    told(run, (1.0, "bit"))
    assert reported(run, "reported.loss.last", max=9).verdict == "missing"


def test_a_report_has_the_clock_rate_of_its_run(run: Path) -> None:
    told(run, (1.0, "nat"))
    assert reported(run, "reported.loss.last", max=9, clock_rate=1).verdict == "pass"
    assert reported(run, "reported.loss.last", max=9, clock_rate=2).verdict == "invalid"


def test_a_name_that_no_program_reports_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match="programs report loss"):
        reported(run, "reported.lost.last", max=1)


def test_a_criterion_needs_the_features_of_the_bench_that_flew(run: Path) -> None:
    spec = CriterionSpec(name="x", measure="power.max_w", max=100, requires=("fast-meter",))
    assert row(judge(run, spec), "x").verdict == "missing"
    facts = json.loads((run / "provenance.json").read_text())
    facts["board"]["features"] = ["fast-meter"]
    (run / "provenance.json").write_text(json.dumps(facts))
    assert row(judge(run, spec), "x").verdict == "pass"


def test_what_was_computed_is_judged_from_the_timeline_of_the_run(run: Path) -> None:
    spec = CriterionSpec(name="x", measure="timeline.eclipse_count", min=1)
    assert row(judge(run, spec), "x").verdict == "missing"
    flown = load_mission(ROOT / "fixtures/missions/kepler-odc.yaml")
    timeline = compile_timeline(environment(flown, load_board_type(ROOT / "boards/virtual-arm64.yaml")))
    timeline_file.save(timeline, run / "timeline.npz")
    found = row(judge(run, spec), "x")
    assert (found.verdict, found.measured) == ("pass", 15.0)
    assert "computed, not measured" in found.evidence


def journal(run: Path, *events: dict[str, Any]) -> None:
    start = record.read(run).of("query")[0]["t_send_mono"]
    common = {
        "schema": 1,
        "t_mono": start + 2,
        "t_wall": "",
        "source": "campaign",
        "t_start_mono": start,
        "wall_s": 2.0,
    }
    with (run / "events.jsonl").open("a") as lines:
        for event in events:
            lines.write(json.dumps({**common, **event}) + "\n")


BURSTS = [
    {"kind": "burst", "index": 0, "wall_s": 10.0, "rest_s": 0.0, "tokens": 100, "stop_s": 0.5},
    {"kind": "burst", "index": 1, "wall_s": 12.0, "rest_s": 30.0, "tokens": 108, "stop_s": 2.0},
]
CRUISES = [
    {"kind": "cruise", "orbits": 2.0, "sheds": 1, "boots_after_shed": 1, "soc_start": 1.0, "soc_end": 0.9},
    {"kind": "cruise", "orbits": 1.5, "sheds": 0, "boots_after_shed": 0, "soc_start": 0.9, "soc_end": 0.95},
]
OTHERS = [
    {"kind": "run_cut", "run": "train", "while_running": True},
    {"kind": "run_cut", "run": "train", "while_running": False},
    {"kind": "shut_down", "before_eclipse_s": 40.0},
    {"kind": "shut_down", "before_eclipse_s": 35.0},
    {"kind": "resumed", "resume_s": 20.0},
]


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("duty.bursts", 2.0),
        ("duty.on_s.min", 10.0),
        ("duty.on_s.max", 12.0),
        ("duty.rest_s.max", 30.0),
        ("duty.stop_s.max", 2.0),
        ("duty.tokens.min", 100.0),
        ("duty.tokens_rate_spread", 1.0 / 9.5),
        ("cruise.orbits", 3.5),
        ("cruise.sheds", 1.0),
        ("cruise.restored_ok", True),
        ("cruise.soc_drop.max", 0.1),
        ("cruise.shutdown_margin_s.min", 35.0),
        ("cruise.resume_s.max", 20.0),
        ("run.cuts", 1.0),
    ],
)
def test_measures_of_endurance(run: Path, measure: str, value: float) -> None:
    journal(run, *BURSTS, *CRUISES, *OTHERS)
    found = measures.MEASURES[measure].of(record.read(run))
    assert found.value == pytest.approx(value)


def test_a_board_that_did_not_boot_after_a_shed_is_told(run: Path) -> None:
    journal(run, {**CRUISES[0], "boots_after_shed": 0})
    assert measures.MEASURES["cruise.restored_ok"].of(record.read(run)).value is False


def test_admissions_and_how_long_queries_took(run: Path) -> None:
    with pytest.raises(measures.NoEvidence, match="no query was subject to an admission rule"):
        measures.MEASURES["query.false_admits_share"].of(record.read(run))
    edit(run, put("query", predicted_s=8.0))
    assert measures.MEASURES["query.false_admits_share"].of(record.read(run)).value == 0.0
    journal(run, {"kind": "query_lost", "predicted_s": 8.0})
    asked = len(record.read(run).of("query"))
    assert measures.MEASURES["query.false_admits_share"].of(record.read(run)).value == pytest.approx(1 / (asked + 1))
    p95 = measures.MEASURES["query.duration_s.p95"].of(record.read(run)).value
    assert p95 == measures.MEASURES["query.duration_s.max"].of(record.read(run)).value
    longest = max(len(event["answer"].encode()) for event in record.read(run).of("query"))
    assert measures.MEASURES["query.answer_bytes.max"].of(record.read(run)).value == longest


@pytest.mark.parametrize(
    ("measure", "value"),
    [("energy.gap_share", 0.015), ("energy.fed_residual_share", 0.01), ("energy.meter_comparisons", 61.0)],
)
def test_measures_of_the_power_ledger(run: Path, measure: str, value: float) -> None:
    assert measures.MEASURES[measure].of(record.read(run)).value == pytest.approx(value)
