"""An emulated board on two channels of its virtual bench: it boots when both feed it and dies with either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from benches import ROOT, bench_up, until, write_bench
from matrix import Truth

from hil.client import attach
from hil.virtual import supervisor
from hil.virtual.config import virtual_bench

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("boards"), pytest.mark.timeout(600)]


def two_inputs(directory: Path) -> Any:
    """The shipped bench without a link, its board with a second input of 5 V on channel 3."""
    kind = yaml.safe_load((ROOT / "boards/virtual-arm64.yaml").read_text()) | {"name": "two-inputs"}
    rail = {"voltage_min_v": 4.75, "voltage_nominal_v": 5.0, "voltage_max_v": 5.25, "undervoltage_lockout_v": 4.0}
    rail |= {"overvoltage_protection_v": 5.4, "power_max_w": 10.0, "current_max_a": 2.0}
    kind["rails"] = {"io5v": kind["supply"] | rail}
    types = directory / "types"
    types.mkdir()
    (types / "two-inputs.yaml").write_text(yaml.safe_dump(kind))

    def change(content: dict[str, Any]) -> None:
        content["board_types"] = str(types)
        del content["links"], content["virtual"]["link_box"], content["virtual"]["payload_network"]
        board = content["boards"]["vb1"]
        del board["payload"]
        board["type"] = "two-inputs"
        board["power"].append({"supply": "psu1", "channel": 3, "rail": "io5v", "on_delay_s": 0.5})
        content["virtual"]["boards"]["vb1"] = {}

    return change


def test_a_board_on_two_channels_boots_with_both_and_dies_with_either(tmp_path: Path) -> None:
    path = write_bench(tmp_path, "by-two", two_inputs(tmp_path))
    with bench_up(path) as bench, attach(bench) as daemon, daemon.lease(["vb1"]) as lease:
        config = virtual_bench(bench)
        truth = Truth(config.supply_control)

        def pid() -> int | None:
            found: int | None = supervisor.status(config)["boards"]["vb1"]["pid"]
            return found

        board = daemon.board("vb1", lease)
        assert pid() is None
        board.power.on()
        first = until(pid, 20, "for the emulator")
        board.console.expect("login:", timeout_s=180)
        channels = truth.do()["channels"]
        watts = [channels[number]["voltage_v"] * channels[number]["current_a"] for number in "13"]
        assert 5.0 * 0.95 <= sum(watts) <= 15.0 * 1.05
        assert watts[0] / sum(watts) == pytest.approx(0.75, abs=0.05)  # 30 W of the 40 W that both may carry

        truth.do("trip", channel=3, kind="ovp")
        until(lambda: pid() is None, 10, "for the death of the board")
        until(lambda: not os.path.exists(f"/proc/{first}") or zombie(first), 10, "for the end of its process")
        until(lambda: not truth.do()["channels"]["1"]["output_on"], 10, "for the other channel to follow")

        board.power.on()
        second = until(pid, 20, "for the emulator again")
        assert second != first
        board.power.brown_out(6.0, 0.3)  # 9 V: below the main input's lock-out, the rail stays at 5 V
        third = until(lambda: (new := pid()) not in (None, second) and new, 10, "for the board to start anew")
        assert third != second
        assert truth.do()["channels"]["3"]["output_on"]
        board.power.off()
        until(lambda: pid() is None, 10, "for the board to be off")
        truth.close()


def zombie(pid: int) -> bool:
    """Whether the process is dead and only not waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
