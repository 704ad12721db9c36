"""What `mission check` says of missions and benches that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hil.campaign import fly
from hil.campaign.check import Finding, Place, check_mission
from hil.campaign.pace import Pace
from hil.drivers import cfdp
from hil.errors import UsageError
from hil.inventory import BoardType, load_bench, load_board_type, load_mission
from hil.inventory.board_type import CfdpReceiver

ROOT = Path(__file__).resolve().parents[2]
BOARD = load_board_type(ROOT / "boards/virtual-arm64.yaml")
ALL = frozenset({*BOARD.features, "console", "payload", "mgmt"})


def check(
    tmp_path: Path, change: dict[str, Any], place: Place | None = None, board: BoardType = BOARD
) -> dict[str, Finding]:
    """The short mission, a day of it, with a case laid over it."""
    data = yaml.safe_load((ROOT / "fixtures/missions/short.yaml").read_text())
    data["orbit"]["tle"] = str(ROOT / "fixtures/tle" / Path(data["orbit"]["tle"]).name)
    data["duration_h"] = 12
    data["model"] = {"file": str(tmp_path / "absent.gguf"), "title": "none", "size_bytes": 98_000_000}
    data["cases"] = {"it": change}
    path = tmp_path / "mission.yaml"
    path.write_text(yaml.safe_dump(data))
    return {item.what: item for item in check_mission(load_mission(path, "it"), board, place)}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    found = check(tmp_path, {"requires": ["thermal-chamber"]}, Place(ALL - {"payload"}))
    assert found["features"].ok is False
    assert found["features"].data["lacking"] == ["payload", "thermal-chamber"]
    assert check(tmp_path, {}, Place(ALL))["features"].ok is True


def test_an_upload_is_planned_with_the_size_of_an_absent_file(tmp_path: Path) -> None:
    found = check(tmp_path, {})["upload fits the contacts"]
    assert (found.ok, found.data["bytes"], found.data["contacts"]) == (True, 98_000_000 - 88_080_384, 1)
    big = check(tmp_path, {"model": {"size_bytes": 5_000_000_000}})["upload fits the contacts"]
    assert (big.ok, big.data["contacts"]) == (False, None)
    assert check(tmp_path, {"model": {"size_bytes": None}})["upload fits the contacts"].ok is None


def test_a_link_faster_than_the_emulator_is_said(tmp_path: Path) -> None:
    found = check(tmp_path, {}, Place(ALL, 10e6))["link rates"]
    assert (found.ok, found.data["needed_bps"]) == (False, 60 * 300e3)
    assert check(tmp_path, {}, Place(ALL, 20e6))["link rates"].ok is True
    assert check(tmp_path, {}, Place(ALL))["link rates"].ok is None


def test_a_clock_that_is_too_fast_for_the_boards_cfdp_receiver_is_said_with_its_place_and_the_rate_to_write(
    tmp_path: Path,
) -> None:
    """The uplink of the mission has 300 kbit/s."""
    steps: list[dict[str, Any]] = [{"boot": None}, {"upload": {"protocol": "cfdp"}}, {"end": None}]
    receiver = CfdpReceiver(rate_bps=2.0e6, source="measured here")
    slow = BOARD.model_copy(update={"cfdp_receiver": receiver})
    found = check(tmp_path, {"steps": steps}, board=slow)["CFDP receiver"]
    assert (found.ok, found.data["needed_bps"], found.data["clock_rate"]) == (False, 60 * 300e3, 6)
    lines = (tmp_path / "mission.yaml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "protocol: cfdp" in text)
    assert f"mission.yaml:{line - 1}: step 2 (upload) sends 18 Mbit/s at clock rate 60" in found.found
    assert "write `clock_rate: 6` there" in found.found
    assert "2 Mbit/s (measured here)" in found.found
    steps[1]["upload"]["clock_rate"] = 6
    found = check(tmp_path, {"steps": steps}, board=slow)["CFDP receiver"]
    assert (found.ok, "write" in found.found) == (True, False)
    mission = load_mission(tmp_path / "mission.yaml", "it")
    fly.check_protocols(mission, slow, Pace.of(mission))
    with pytest.raises(UsageError, match=r"mission\.yaml:\d+: step 2 \(upload\): CFDP would send 12 Mbit/s") as caught:
        fly.check_protocols(mission, slow, Pace.of(mission, rate=40))
    assert "`clock_rate: 6`" in caught.value.hint
    slower = BOARD.model_copy(update={"cfdp_receiver": CfdpReceiver(rate_bps=0.2e6, source="x")})
    assert "`protocol: sftp`" in check(tmp_path, {"steps": steps}, board=slower)["CFDP receiver"].found
    unknown = BOARD.model_copy(update={"cfdp_receiver": None})
    assert check(tmp_path, {"steps": steps}, board=unknown)["CFDP receiver"].ok is None


def test_a_bus_that_would_harm_the_board_is_said(tmp_path: Path) -> None:
    found = check(tmp_path, {"power": {"battery": {"cells_series": 5}}})["the bus within the board's voltages"]
    assert found.ok is False
    assert found.data["high_v"] == pytest.approx(21.0)


def test_what_the_power_loop_would_refuse_is_said_before_a_flight(tmp_path: Path) -> None:
    what = "a supply can play the power system"
    found = check(tmp_path, {})[what]
    assert found.ok is True
    assert found.data["gain"] == pytest.approx(0.3 * 15.0 / 13.2**2, abs=1e-4)
    soft = check(tmp_path, {"power": {"battery": {"resistance_ohm": 6.0}}})[what]
    assert (soft.ok, soft.data["gain"]) == (False, pytest.approx(6.0 * 15.0 / 13.2**2, abs=1e-4))
    curve = {"voc_v": 20, "isc_a": 2.75, "vmp_v": 17.5, "imp_a": 2.515}
    direct = check(tmp_path, {"power": {"array": {"conversion": "direct", "curve": curve}}})[what]
    assert direct.ok is True, "the battery holds the bus"


def test_an_array_that_cannot_feed_the_load_is_said_in_watt_hours(tmp_path: Path) -> None:
    found = check(tmp_path, {"power": {"array": {"bol_w": 12}}})["energy of an orbit at idle"]
    assert found.ok is False
    assert "Wh short" in found.found


@pytest.mark.parametrize(
    ("criterion", "ok", "why"),
    [
        ({"measure": "duty.bursts", "min": 1}, False, "no step gives duty.bursts; it takes one of duty_cycle"),
        ({"measure": "upload.goodput_share", "min": 0.9, "clock_rate": 1}, False, "its step runs at 60"),
        ({"measure": "power.max_w", "max": 12, "requires": ["fast-meter"]}, False, "the bench has no fast-meter"),
        ({"measure": "timeline.sunlit_share", "min": 0.9}, False, "timeline.sunlit_share is 0.6"),
        ({"measure": "timeline.passes_per_day", "min": 5}, True, "timeline.passes_per_day is"),
        ({"measure": "reported.loss.last", "max": 1.5}, False, "its step is left out: the bench has no gpu"),
        ({"measure": "boot.login_s.max", "max": 60, "clock_rate": 1}, None, ""),
    ],
)
def test_a_criterion_that_cannot_be_shown_says_why(
    tmp_path: Path, criterion: dict[str, Any], ok: bool | None, why: str
) -> None:
    run = {"name": "train", "argv": ["x"], "reports": {"loss": "nat"}, "requires": ["gpu"]}
    steps = [{"boot": None}, {"upload": {"clock_rate": 60}}, {"run": run}, {"end": None}]
    found = check(tmp_path, {"steps": steps, "criteria": [{"name": "it", **criterion}]}, Place(ALL))
    if ok is None:
        assert "criterion it" not in found
        assert found["1 acceptance criteria"].ok is True
    else:
        assert found["criterion it"].ok is ok
        assert why in found["criterion it"].found


def test_an_upload_by_cfdp_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [{"boot": None}, {"upload": {"protocol": "cfdp"}}, {"end": None}]
    assert "CFDP" not in check(tmp_path, {})
    assert check(tmp_path, {"steps": steps})["CFDP"].ok is True
    monkeypatch.setattr(cfdp.importlib.util, "find_spec", lambda name: None)
    found = check(tmp_path, {"steps": steps})["CFDP"]
    assert found.ok is False
    assert "hil[cfdp]" in found.found


def test_the_place_is_that_of_the_bench_file() -> None:
    place = Place.of(load_bench(ROOT / "fixtures/benches/virtual.yaml"))
    assert place.features == ALL
    assert place.link_limit_bps == 40e6


@pytest.mark.parametrize(
    ("area_m2", "ok", "says"),
    [(0.015, True, "of work, then"), (0.2, False, "is never reached"), (0.009, False, "never cools again")],
)
def test_a_duty_cycle_is_planned_by_the_thermal_model(tmp_path: Path, area_m2: float, ok: bool, says: str) -> None:
    thermal = {
        "nodes": {"board": {"heat_capacity_j_per_k": 21.4, "initial_c": 30, "board_share": 1.0}},
        "radiators": [{"node": "board", "area_m2": area_m2}],
        "cutoff": {"node": "board", "off_c": 60, "on_c": 30},
    }
    steps = [{"boot": None}, {"serve": None}, {"duty_cycle": {"bursts": 3, "prompt": "x"}}, {"end": None}]
    found = check(tmp_path, {"thermal": thermal, "steps": steps})
    assert found["thermal duty cycle"].ok is ok
    assert says in found["thermal duty cycle"].found
    planned = next(item for item in found["wall time"].data["steps"] if item["step"] == "duty_cycle")
    assert planned["basis"] == ("planned" if ok else "limit")
    if ok:
        run_s, cool_s = (found["thermal duty cycle"].data[key] for key in ("run_s", "cool_s"))
        assert planned["wall_s"] == pytest.approx(3 * run_s + 2 * cool_s)


def test_the_command_looks_at_all_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hil.cli import run

    data = yaml.safe_load((ROOT / "fixtures/missions/short.yaml").read_text())
    data |= {"duration_h": 12, "cases": {"small": {"power": {"array": {"bol_w": 12}}}, "same": {"title": "same"}}}
    data["orbit"]["tle"] = str(ROOT / "fixtures/tle" / Path(data["orbit"]["tle"]).name)
    path = tmp_path / "mission.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    assert run(["mission", "check", str(path), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    balance = {
        name: next(item["ok"] for item in found if item["what"] == "energy of an orbit at idle")
        for name, found in {"": told["findings"], **told["cases"]}.items()
    }
    assert balance == {"": True, "small": False, "same": True}
    assert run(["mission", "check", f"{path}#small"]) == 1
    assert "case" not in capsys.readouterr().out
    run(["mission", "check", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert any("Wh short" in line for line in lines[lines.index("case small") : lines.index("case same")])
    assert lines[lines.index("case same") + 1 :] == []
