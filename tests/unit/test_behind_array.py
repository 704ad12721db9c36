"""Bench files, missions, criteria and reports of a board behind a solar-array simulator: what is refused or missing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import synthetic_run
import yaml

from hil.bench.arrayflight import array_plan
from hil.campaign import behind_array, record, report, verdict
from hil.campaign.check import Finding, Place, check_mission
from hil.campaign.evidence import NoEvidence
from hil.campaign.fly import fly
from hil.campaign.measures import MEASURES
from hil.campaign.pace import Pace
from hil.cli import flight_display
from hil.drivers.dialects import DIALECTS
from hil.errors import UsageError
from hil.inventory import Mission, load_bench, load_board_type, load_mission
from hil.inventory.bench import ARRAY_DIALECTS
from hil.inventory.environment import environment
from hil.mission.compile import compile_timeline

ROOT = Path(__file__).resolve().parents[2]
BOARD = load_board_type(ROOT / "boards/jetson-orin-nano.yaml")
SLEEP = {"cruise": {"orbits": 1, "shutdown_before_eclipse_s": 60}}
CUT = {"run": {"name": "selftest", "argv": ["true"], "power_cuts": 2}}
CURVE = {"voc_v": 22.0, "isc_a": 2.3, "vmp_v": 18.0, "imp_a": 2.1}


INPUT = {
    "voltage_min_v": 12, "voltage_nominal_v": 18, "voltage_max_v": 26, "undervoltage_lockout_v": 8, "current_max_a": 3,
    "power_max_w": 60, "overvoltage_protection_v": 28, "overcurrent_protection_a": 3.2,
}  # fmt: skip


def bench_with(tmp_path: Path, **changes: Any) -> Path:
    """A Jetson behind a power unit on an array, as docs/supplies.md has it; `changes` are the board's."""
    types = tmp_path / "types"
    types.mkdir(exist_ok=True)
    kind = yaml.safe_load((ROOT / "boards/jetson-orin-nano.yaml").read_text()) | {"name": "orin-unit"}
    (types / "orin-unit.yaml").write_text(yaml.safe_dump(kind | {"rails": {"array": INPUT}}))
    supplies = {
        name: {"driver": "scpi", "dialect": spoken, "address": f"tcp://192.0.2.{index}:5025"}
        for index, (name, spoken) in enumerate((("sas1", "keysight-mp4300"), ("psu1", "rigol-dp800")), 1)
    }
    wire = {"supply": "sas1", "channel": 1, "rail": "array", "source": "array"}
    board = {"type": "orin-unit", "power": [wire], "console": {"port": "/dev/ttyUSB0"}} | changes
    content = {"schema": 1, "name": "sas", "board_types": str(types), "supplies": supplies, "boards": {"orin1": board}}
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def mission_with(tmp_path: Path, curve: dict[str, float] | None, steps: list[Any] | None = None) -> Mission:
    """The short mission, half a day of it, with an array of this curve."""
    content = yaml.safe_load((ROOT / "fixtures/missions/short.yaml").read_text())
    content["orbit"]["tle"] = str(ROOT / "fixtures/tle" / Path(content["orbit"]["tle"]).name)
    content["duration_h"] = 12
    content["steps"] = steps or [step for step in content["steps"] if "eclipse" not in step]
    if curve is not None:
        content["power"]["array"] = {"curve": curve, "degradation": 0.85, "pointing": 0.95}
    path = tmp_path / "mission.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_mission(path)


# --- bench file ------------------------------------------------------------------------------------------------------


def test_a_board_on_an_array_has_the_limits_of_its_power_unit(tmp_path: Path) -> None:
    bench = load_bench(bench_with(tmp_path))
    name, wires, kind = bench.board()
    (wire,) = wires.power
    assert (wire.source, wire.on_bus) == ("array", True)
    limits = behind_array.input_limits(bench, name)
    assert limits is not None
    assert limits == kind.rails[wire.rail or ""]
    assert behind_array.input_limits(load_bench(ROOT / "fixtures/benches/jetson-rigol.yaml"), None) is None


def test_the_dialects_that_play_arrays_are_those_with_a_model_that_does() -> None:
    able = [name for name, known in DIALECTS.items() if any(model.solar_array for _, model in known.models)]
    assert set(able) == set(ARRAY_DIALECTS)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"power": [{"supply": "psu1", "channel": 1, "source": "array"}]}, "rigol-dp800, which is no solar-array sim"),
        (
            {"power": [{"supply": "sas1", "channel": 1, "source": "array"}, {"supply": "psu1", "channel": 1}]},
            "a board on an array has that channel alone",
        ),
        ({"power": [{"supply": "sas1", "channel": 1, "source": "array", "follows_bus": True}]}, "an array is no bus"),
        (
            {"power": [{"supply": "sas1", "channel": 1, "source": "array", "converter_efficiency": 0.9}]},
            "an array is no bus",
        ),
        ({"power": [{"supply": "sas1", "channel": 1, "source": "sun"}]}, "'supply' or 'array'"),
        ({"meter": {"supply": "psu1", "channel": 2}}, "between an array and the board lies a battery"),
    ],
)
def test_wiring_that_makes_no_array_is_refused_with_its_line(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=rf"bench\.yaml:\d+: .*{why}"):
        load_bench(bench_with(tmp_path, **changes))


# --- missions --------------------------------------------------------------------------------------------------------


def found_of(tmp_path: Path, mission: Mission) -> dict[str, Finding]:
    bench = load_bench(bench_with(tmp_path))
    return {item.what: item for item in check_mission(mission, bench.board()[2], Place.of(bench))}


def test_a_mission_is_checked_for_the_array_and_not_for_a_battery_that_nobody_models(tmp_path: Path) -> None:
    found = found_of(tmp_path, mission_with(tmp_path, CURVE))
    array = found["a solar-array simulator can play the array"]
    assert array.ok is True
    assert array.data == {"voc_v": 22.0, "isc_a": pytest.approx(2.3 * 0.85 * 0.95, rel=1e-3)}
    assert "a supply can play the power system" not in found
    assert "energy of an orbit at idle" not in found
    assert found["criterion shed-once"].ok is False
    assert "the real power unit's" in found["criterion shed-once"].found


@pytest.mark.parametrize(
    ("curve", "steps", "why"),
    [
        (None, None, "add `curve: {voc_v, isc_a, vmp_v, imp_a}`"),
        ({**CURVE, "voc_v": 60.0}, None, "the power unit's input takes"),
        (
            CURVE,
            [{"boot": {}}, {"eclipse": {"prompt": "Hi.", "max_tokens": 4}}, {"end": {}}],
            "`eclipse` waits for the modelled battery's load sheddi",
        ),
        (CURVE, [{"boot": {}}, SLEEP, CUT, {"end": {}}], "`cruise` with `shutdown_before_eclipse_s` needs the board"),
        (CURVE, [{"boot": {}}, CUT, {"end": {}}], "`run` with `power_cuts` needs the board without power, but an ar"),
        ({"voc_v": 25.0, "isc_a": 3.2, "vmp_v": 24.9, "imp_a": 3.19}, None, "and 64.1 W; the power unit's input"),
        ({"voc_v": 22.0, "isc_a": 2.3, "vmp_v": 11.2, "imp_a": 1.16}, None, "no array curve passes through"),
    ],
)
def test_a_mission_that_the_array_cannot_play_is_told_before(
    tmp_path: Path, curve: dict[str, float] | None, steps: list[Any] | None, why: str
) -> None:
    found = found_of(tmp_path, mission_with(tmp_path, curve, steps))["a solar-array simulator can play the array"]
    assert found.ok is False
    assert why in found.found


def test_such_a_flight_is_in_real_time_gaps_and_all(tmp_path: Path) -> None:
    mission = mission_with(tmp_path, CURVE)
    behind_array.check_pace(mission, "orin1", Pace(rate=1.0))
    for pace in (Pace(), Pace(rate=60.0), Pace(rate=1.0, contacts_only=True)):
        with pytest.raises(UsageError, match=r"mission\.yaml: board orin1 hangs on an array, .*\n.*--rate 1 and"):
            behind_array.check_pace(mission, "orin1", pace)
    waiting = mission_with(
        tmp_path, CURVE, [{"boot": {}}, {"eclipse": {"prompt": "Hi.", "max_tokens": 4}}, {"end": {}}]
    )
    with pytest.raises(UsageError, match="step 2: `eclipse` waits for the modelled battery's"):
        behind_array.check_pace(waiting, "orin1", Pace(rate=1.0))
    for step, why in ((SLEEP, "`cruise` with `shutdown_before_eclipse_s`"), (CUT, "`run` with `power_cuts`")):
        cutting = mission_with(tmp_path, CURVE, [{"boot": {}}, step, {"end": {}}])
        with pytest.raises(UsageError, match=f"step 2: {why} needs the board without power"):
            behind_array.check_pace(cutting, "orin1", Pace(rate=1.0))
    going_on = [{"boot": {}}, {"cruise": {"orbits": 1}}, {"run": {"name": "selftest", "argv": ["true"]}}, {"end": {}}]
    behind_array.check_pace(mission_with(tmp_path, CURVE, going_on), "orin1", Pace(rate=1.0))


def test_flying_it_otherwise_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    bench, mission = load_bench(bench_with(tmp_path)), mission_with(tmp_path, CURVE)
    with pytest.raises(UsageError, match="fly it with --rate 1"):
        fly(bench, mission, runs=tmp_path / "runs", pace=Pace(rate=60.0))
    assert not (tmp_path / "runs").exists()


def test_a_display_shows_no_charge_that_nobody_knows() -> None:
    state = {
        "utc": "2026-01-01T00:00:00.000Z",
        "rate": 1.0,
        "phase": {"label": "sun", "sunlit": 1.0},
        "power": {"voltage_v": 21.0, "current_a": 0.5, "power_w": 10.5, "state": "on"},
        "link": {"up": False},
        "soc": None,
        "upload_bytes": 0,
        "tokens": 0,
    }
    assert dict(flight_display._fields(state))["charge"] == "the real battery's, behind the array"


def test_the_plan_is_the_brightest_curve_and_the_light_on_it(tmp_path: Path) -> None:
    timeline = compile_timeline(environment(mission_with(tmp_path, CURVE), BOARD))
    plan = array_plan(timeline)
    brightest = behind_array.brightest(timeline)
    assert (plan.curve.voc_v, plan.curve.isc_a) == (brightest.voc_v, brightest.isc_a)
    assert brightest.max_power()[2] == pytest.approx(timeline.array_w.max(), rel=1e-6)
    eclipse = timeline.eclipses[0]
    assert eclipse.umbra_entry_s is not None
    assert plan.light(eclipse.penumbra_entry_s - 1.0) == pytest.approx(1.0)
    assert 0.0 < plan.light((eclipse.penumbra_entry_s + eclipse.umbra_entry_s) / 2) < 1.0
    assert plan.light(eclipse.umbra_entry_s + 1.0) == 0.0
    with pytest.raises(UsageError, match="no I-V curve"):
        array_plan(compile_timeline(environment(mission_with(tmp_path, None), BOARD)))


# --- records ---------------------------------------------------------------------------------------------------------


def as_flown_on_an_array(run: Path) -> Path:
    """The synthetic run as if a simulator had fed it: nothing of the battery is in it."""
    with closing(sqlite3.connect(run / "telemetry.sqlite")) as database, database:
        database.execute("INSERT OR REPLACE INTO meta VALUES ('power_source', 'array')")
        database.execute("UPDATE power SET soc = NULL, bus_voltage_v = NULL, battery_w = NULL, gain = NULL")
    return run


def test_what_needs_the_satellites_battery_is_missing_and_says_why(tmp_path: Path) -> None:
    run = as_flown_on_an_array(synthetic_run.write(tmp_path / "run"))
    read = record.read(run)
    for name, why in (
        ("eclipse.min_bus_voltage_v", "bus voltage are the real power unit's"),
        ("eclipse.shed_count", "load shedding and bus voltage are the real power unit's"),
        ("energy.ledger_residual_share", "no battery is modelled"),
        ("energy.j_per_token.sun", "which charges the unit's battery too"),
        ("power.inference_minus_idle_w", "what the board took of it is not measured"),
        ("power.max_w", "what the board took of it is not measured"),
        ("energy.gap_share", "what the board took of it is not measured"),
        ("board.below_lockout_samples", "the board's voltage is the real power unit's"),
        ("cruise.soc_min", "the state of charge is the real power unit's"),
    ):
        with pytest.raises(NoEvidence, match=f"behind a solar-array simulator: .*{why}"):
            MEASURES[name].of(read)
    assert MEASURES["power.loop_lateness_s.p99"].of(read).value
    mission = verdict.mission_of(run)
    page = report.render(read, verdict.evaluate(read, mission.criteria), mission)
    assert "State of charge" not in page
    assert "array available, modelled" in page
    assert "what the board took of it is not measured" in page


def test_the_same_measures_have_evidence_on_a_bus(tmp_path: Path) -> None:
    read = record.read(synthetic_run.write(tmp_path / "run"))
    assert MEASURES["eclipse.min_bus_voltage_v"].of(read).value
    assert MEASURES["energy.j_per_token.sun"].of(read).value
