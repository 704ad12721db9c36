"""One long flight of the steps for endurance: programs under power cuts, bursts by the thermal model, orbits of cruise.

Its record is read with the standard library, not with the code that wrote or judged it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benches import ROOT, Fly, assert_safe, verdict, write_mission

from hil.inventory import Bench

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("boards"), pytest.mark.timeout(1500)]

PROGRAMS = ROOT / "fixtures/programs"
FLIGHT_S = 1200.0


def endurance(content: dict[str, Any]) -> None:
    """The short mission's orbit and small battery, with other steps."""
    train = {
        "name": "train",
        "files": [str(PROGRAMS / "train_char.py")],
        "argv": ["{python}", "{programs}/train_char.py", "--dir", "{programs}/train", "--steps", "400"],
        "reports": {"resumed_exactly": "", "lost_steps": "steps", "resumes": "starts"},
        "power_cuts": 2,
        "cut_after_s": [2.5, 4.0],
    }
    golden = {
        "name": "golden",
        "files": [str(PROGRAMS / "golden.py")],
        "argv": ["{python}", "{programs}/golden.py", "--flips", "30", "--width", "16"],
        "reports": {"unflagged_wrong_answers": "answers"},
        "during": "contact",
        "plane": "payload",
    }
    absent = {"name": "ring", "argv": ["x"], "requires": ["isl"], "reports": {"job_done": ""}}
    prompt = "Write a short story about a satellite."
    content["thermal"] = {
        "nodes": {"board": {"heat_capacity_j_per_k": 4.0, "initial_c": 30, "board_share": 1.0}},
        "radiators": [{"node": "board", "area_m2": 0.015, "emissivity": 0.9}],
        "cutoff": {"node": "board", "off_c": 60, "on_c": 40},
    }
    content["steps"] = [
        {"boot": None},
        {"run": train},
        {"run": absent},
        {"upload": {"clock_rate": 60, "preload_bytes": 94371840}},
        {"serve": None},
        {"query": {"prompts": ["Hi."], "max_tokens": 4, "repeat": 3, "admit_margin_s": 20, "pad_to_bytes": 24}},
        {"run": golden},
        {"duty_cycle": {"bursts": 2, "prompt": prompt, "burst_timeout_s": 300, "rest_timeout_s": 300}},
        {"cruise": {"orbits": 1, "clock_rate": 120, "load": "inference", "near_shed_v": 0.04}},
        {"cruise": {"orbits": 1, "clock_rate": 120, "shutdown_before_eclipse_s": 120, "near_shed_v": 0.04}},
        {"end": None},
    ]
    content["criteria"] = [
        {"name": "cuts", "measure": "run.cuts", "min": 2},
        {"name": "exact", "measure": "reported.resumed_exactly.all", "equals": True},
        {"name": "lost", "measure": "reported.lost_steps.max", "max": 10, "unit": "steps"},
        {"name": "unflagged", "measure": "reported.unflagged_wrong_answers.max", "max": 0, "clock_rate": 1},
        {"name": "queries", "measure": "query.count", "min": 3},
        {"name": "false-admissions", "measure": "query.false_admits_share", "max": 0},
        {"name": "bursts", "measure": "duty.bursts", "equals": 2},
        {"name": "stops", "measure": "duty.stop_s.max", "max": 5},
        {"name": "shed", "measure": "cruise.sheds", "min": 1},
        {"name": "restored", "measure": "cruise.restored_ok", "equals": True},
        {"name": "orbits", "measure": "cruise.orbits", "min": 2, "max": 2.1},
        {"name": "margin", "measure": "cruise.shutdown_margin_s.min", "min": 30},
        {"name": "resumed", "measure": "cruise.resume_s.max", "max": 180},
        {"name": "ledger", "measure": "energy.ledger_residual_share", "max": 1e-6},
        {"name": "sunlight", "measure": "timeline.sunlit_share", "min": 0.5, "max": 0.7},
        {"name": "ring", "measure": "reported.job_done.all", "equals": True},
    ]


@pytest.fixture(scope="module")
def flown(lab: Bench, tmp_path_factory: pytest.TempPathFactory) -> Fly:
    directory: Path = tmp_path_factory.mktemp("endurance")
    mission = write_mission(directory, "endurance", endurance)
    with Fly(lab, mission, directory / "runs") as fly:
        fly.wait(FLIGHT_S)
    print(fly.said)
    return fly


def test_only_what_the_bench_cannot_show_is_missing(flown: Fly) -> None:
    rows = {item["name"]: item for item in verdict(flown.run)["criteria"]}
    assert {name: item["verdict"] for name, item in rows.items() if item["verdict"] != "pass"} == {"ring": "missing"}
    assert flown.process.returncode == 6, flown.said
    (skipped,) = flown.events("step_skipped")
    assert (skipped["run"], skipped["lacking"]) == ("ring", ["isl"])
    assert_safe(flown.bench)


def test_the_board_lost_its_power_while_it_computed(flown: Fly) -> None:
    cuts = flown.events("run_cut")
    assert [cut["while_running"] for cut in cuts] == [True, True]
    assert all(2.5 <= cut["after_s"] <= 4.0 for cut in cuts)
    told = {event["name"]: event["value"] for event in flown.events("reported") if event["run"] == "train"}
    assert told["resumes"] >= 1, "at least one checkpoint was found after a cut"
    causes = [event["cause"] for event in flown.events("boot")]
    assert causes.count("power cut in train") == 2


def test_bursts_begin_cool_and_end_hot(flown: Fly) -> None:
    bursts = flown.events("burst")
    assert len(bursts) == 2
    for burst in bursts:
        assert burst["end_c"]["board"] >= 59.5
        assert burst["start_c"]["board"] < 45
        assert burst["tokens"] > 0
    assert bursts[1]["rest_s"] > 5


def test_the_cruises_shed_slept_and_came_back(flown: Fly) -> None:
    first, second = flown.events("cruise")
    assert first["sheds"] == len(flown.events("load_shed")) >= 1
    assert second["shutdowns"] == len(flown.events("shut_down")) == len(flown.events("resumed")) >= 1
    assert second["sheds"] == 0
    console = (flown.run / "console/vb1.log").read_bytes()
    assert console.count(b"reboot: Power down") == second["shutdowns"]
