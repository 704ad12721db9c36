"""Power and thermal sections of mission files: what they become, and where a wrong one is told to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hil.errors import UsageError
from hil.inventory import load_board_type, load_mission
from hil.inventory.environment import environment
from hil.mission.budget import orbit_balance
from hil.mission.compile import compile_timeline
from hil.mission.environment import MissionEnvironment
from hil.mission.eps import ConverterLoss, EpsModel
from hil.mission.solar_array import SasCurve
from hil.mission.thermal import Cutoff, ThermalModel

ROOT = Path(__file__).resolve().parents[2]
BOARD = load_board_type(ROOT / "boards" / "virtual-arm64.yaml")
CURVE = {"voc_v": 20.0, "isc_a": 2.4, "vmp_v": 17.0, "imp_a": 2.2}
THERMAL = {
    "nodes": {
        "chip": {"heat_capacity_j_per_k": 80, "board_share": 0.9},
        "panel": {"heat_capacity_j_per_k": 260, "board_share": 0.1, "constant_w": 2},
    },
    "couplings": [{"between": ["chip", "panel"], "conductance_w_per_k": 3}],
    "radiators": [{"node": "panel", "area_m2": 0.03, "sides": 2, "earth_view_factor": 0.3}],
    "cutoff": {"node": "chip", "off_c": 60, "on_c": 30},
}


def written(tmp_path: Path, power: dict[str, Any] | None = None, thermal: dict[str, Any] | None = None) -> Path:
    """The shipped mission with sections of its power replaced; the file's text is plain YAML again."""
    data = yaml.safe_load((ROOT / "fixtures/missions/star-compute-qwen3.yaml").read_text(encoding="utf-8"))
    data["orbit"] = {"tle": str(ROOT / "fixtures/tle/ref_qwen3_535_ltdn1030.tle")}
    data["duration_h"] = 2
    data["power"].update(power or {})
    if thermal is not None:
        data["thermal"] = thermal
    path = tmp_path / "mission.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def made(
    tmp_path: Path, power: dict[str, Any] | None = None, thermal: dict[str, Any] | None = None
) -> MissionEnvironment:
    made = environment(load_mission(written(tmp_path, power, thermal)), BOARD)
    assert MissionEnvironment.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    return made


def test_every_key_of_the_power_section_has_its_effect(tmp_path: Path) -> None:
    battery = {
        "cells_series": 2, "capacity_wh": 37.5, "resistance_ohm": 0.2, "charge_c_rate": 0.5, "charge_efficiency": 0.97,
        "polarization": {"resistance_ohm": 0.1, "time_constant_s": 30}, "charge_cell_v": 4.1, "initial_soc": 0.8,
        "ocv": [[0, 3.0], [0.5, 3.75], [1, 4.5]],
    }  # fmt: skip
    array = {
        "area_m2": 0.1, "efficiency": 0.3, "degradation": 0.9, "pointing": 0.8, "temperature_c": 78,
        "power_coefficient_per_k": -0.003, "current_coefficient_per_k": 0.001, "distance_scaling": True,
        "mppt_efficiency": 0.95,
    }  # fmt: skip
    bus = {"regulated_v": 16.0, "converter": {"p0_w": 0.5, "k1": 0.02, "k2_per_w": 0.001}}
    shed = {"voltage_v": 6.0, "restore_voltage_v": 7.0, "restore_soc": 0.4, "hold_s": 3, "dwell_s": 4}
    power = made(tmp_path, {"battery": battery, "array": array, "bus": bus, "shed": shed, "platform_w": 7}).power
    assert power is not None
    eps = power.eps
    assert eps.capacity_ah == pytest.approx(37.5 / 2 / 3.75)
    assert (eps.cells_series, eps.resistance_ohm, eps.polarization_ohm, eps.polarization_s) == (2, 0.2, 0.1, 30)
    assert (eps.charge_max_c, eps.charge_efficiency, eps.charge_cell_v, eps.initial_soc) == (0.5, 0.97, 4.1, 0.8)
    assert eps.ocv == ((0, 3.0), (0.5, 3.75), (1, 4.5))
    assert (eps.regulated_bus_v, eps.converter) == (16.0, ConverterLoss(0.5, 0.02, 0.001))
    assert (eps.mppt_efficiency, eps.platform_w, eps.direct) == (0.95, 7, None)
    assert power.array.full_sun_w == pytest.approx(1361 * 0.1 * 0.3 * 0.9 * 0.8 * (1 - 0.003 * 50))
    assert power.array.current_coefficient_per_k == 0.001
    assert power.array.distance_scaling
    assert power.shed is not None
    assert (power.shed.shed_v, power.shed.restore_v, power.shed.restore_soc) == (6.0, 7.0, 0.4)
    assert (power.shed.hold_s, power.shed.dwell_s) == (3, 4)


def test_direct_transfer_gets_the_curve_as_it_operates(tmp_path: Path) -> None:
    array = {"curve": CURVE, "conversion": "direct", "degradation": 0.9, "temperature_c": 60}
    power = made(tmp_path, {"array": array}).power
    assert power is not None
    assert power.array.bol_w == pytest.approx(SasCurve(**CURVE).max_power()[2])
    assert power.eps.direct == power.array.operating_curve
    assert power.eps.direct is not None
    assert power.eps.direct.max_power()[2] == pytest.approx(power.array.full_sun_w)


def test_without_a_battery_the_board_lives_by_the_sun(tmp_path: Path) -> None:
    battery = {"cells_series": 4, "capacity_wh": 0, "resistance_ohm": 0}
    shed = {"voltage_v": 11, "restore_voltage_v": 12, "restore_soc": 0}
    array = {"bol_w": 60}
    power = {"battery": battery, "bus": {"regulated_v": 12}, "shed": shed, "array": array}
    environment = made(tmp_path, power)
    assert environment.power is not None
    model = EpsModel(environment.power.eps)
    assert model.step(1.0, 15.0, environment.power.array.full_sun_w).bus_voltage_v == 12
    assert model.step(1.0, 15.0, 0.0).collapsed
    balance = orbit_balance(compile_timeline(environment))
    assert balance.closes
    assert "off for" in balance.message


def test_the_thermal_section_becomes_the_model(tmp_path: Path) -> None:
    thermal = made(tmp_path, thermal=THERMAL).thermal
    assert thermal is not None
    assert [node.name for node in thermal.nodes] == ["chip", "panel"]
    assert thermal.cutoff == Cutoff("chip", 60, 30)
    state = ThermalModel(thermal).step(3_600.0, 35.0)
    assert state.nodes["chip"] > state.nodes["panel"] > 20.0
    assert not state.may_run
    assert made(tmp_path).thermal is None


@pytest.mark.parametrize(
    ("power", "key", "message"),
    [
        (
            {"battery": {"cells_series": 4, "capacity_wh": -10.4, "resistance_ohm": 0.3}},
            "capacity_wh",
            "greater than or",
        ),
        (
            {"battery": {"cells_series": 4, "capacity_wh": 10, "resistance_ohm": -1}},
            "resistance_ohm",
            "greater than or",
        ),
        (
            {"battery": {"cells_series": 4, "capacity_wh": 9, "resistance_ohm": 1, "ocv": [[0, 3], [1, 2]]}},
            "battery",
            "must rise strictly",
        ),
        ({"battery": {"cells_series": 4, "capacity_wh": 0, "resistance_ohm": 0}}, "power", "without a battery"),
        ({"array": {"bol_w": -5}}, "bol_w", "greater than or"),
        ({"array": {"pointing": 0.9}}, "array", "give either bol_w"),
        ({"array": {"bol_w": 44, "area_m2": 0.1, "efficiency": 0.3}}, "array", "give either bol_w"),
        ({"array": {"bol_w": 44, "conversion": "direct"}}, "array", "needs curve"),
        ({"array": {"bol_w": 60, "curve": CURVE}}, "array", "its curve gives 37.4 W at most, its size 60.0 W"),
        ({"array": {"curve": {**CURVE, "vmp_v": 21}}}, "curve", "no I-V curve"),
        ({"bus": {"converter": {"k1": 0.1}}}, "bus", "need regulated_v"),
        (
            {
                "bus": {"regulated_v": 12},
                "battery": {"cells_series": 4, "capacity_wh": 0, "resistance_ohm": 0},
                "shed": {"voltage_v": 11, "restore_voltage_v": 12.5, "restore_soc": 0},
            },
            "power",
            "above bus.regulated_v",
        ),
        ({"shed": {"voltage_v": 13, "restore_voltage_v": 13, "restore_soc": 0.3}}, "shed", "must be above voltage_v"),
    ],
)
def test_a_wrong_power_section_is_told_with_its_line(
    tmp_path: Path, power: dict[str, Any], key: str, message: str
) -> None:
    path = written(tmp_path, power)
    lines = path.read_text(encoding="utf-8").splitlines()
    expected = next(number for number, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:"))
    with pytest.raises(UsageError, match=message) as caught:
        load_mission(path)
    assert caught.value.message.startswith(f"{path}:{expected}:")


def test_a_wrong_thermal_section_is_told_with_its_line(tmp_path: Path) -> None:
    too_much = {**THERMAL, "nodes": {name: {**node, "board_share": 0.9} for name, node in THERMAL["nodes"].items()}}
    path = written(tmp_path, thermal=too_much)
    line = path.read_text(encoding="utf-8").splitlines().index("thermal:") + 1
    with pytest.raises(UsageError, match="add up to more than 1") as caught:
        load_mission(path)
    assert caught.value.message.startswith(f"{path}:{line}:")
