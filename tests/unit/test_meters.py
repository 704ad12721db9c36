"""The board's own current meters: found by name, read in SI units, compared with the supply."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hil.drivers.codec import ReplyError
from hil.drivers.meters import BoardMeter, Rail, Run, compare, find_rail
from hil.errors import BenchError, UsageError
from hil.model import Reading

JETSON = {
    "hwmon0/name": "thermal_fan_est",
    "hwmon3/name": "ina3221",
    "hwmon3/in1_label": "VDD_IN",
    "hwmon3/in2_label": "VDD_CPU_GPU_CV",
    "hwmon3/in3_label": "VDD_SOC",
    "hwmon3/in7_label": "sum of shunt voltages",
    "hwmon3/in1_input": "19152",
    "hwmon3/curr1_input": "260",
    "hwmon3/in2_input": "19144",
    "hwmon3/curr2_input": "48",
}
SINGLE = {"hwmon1/name": "ina226", "hwmon1/in0_input": "1", "hwmon1/in1_input": "12040", "hwmon1/curr1_input": "1503"}


def on(tmp_path: Path, files: dict[str, str]) -> Run:
    """A board whose /sys/class/hwmon is a directory here; commands really run."""
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")

    def run(argv: Sequence[str]) -> str:
        argv = [word.replace("/sys/class/hwmon", str(tmp_path)) for word in argv]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    return run


def test_a_rail_is_found_by_its_label_and_read(tmp_path: Path) -> None:
    run = on(tmp_path, JETSON)
    rail = find_rail(run, "VDD_IN")
    assert (rail.channel, rail.label, Path(rail.directory).name) == (1, "VDD_IN", "hwmon3")
    reading = BoardMeter(run, rail, clock=clock(10.0, 10.2)).measure()
    assert (reading.voltage_v, reading.current_a, reading.time_s) == (19.152, 0.26, 10.1)
    assert reading.power_w == pytest.approx(4.97952)
    assert reading.exchange_s == pytest.approx(0.2)


def test_a_chip_without_labels_has_one_rail(tmp_path: Path) -> None:
    run = on(tmp_path, SINGLE)
    reading = BoardMeter(run, find_rail(run)).measure()
    assert (reading.voltage_v, reading.current_a) == (12.04, 1.503)


def test_a_rail_that_is_not_there_or_not_the_only_one_names_those_that_are(tmp_path: Path) -> None:
    run = on(tmp_path, JETSON)
    for label in ("VDD_NONE", ""):
        with pytest.raises(UsageError) as caught:
            find_rail(run, label)
        assert caught.value.hint == "its rails: VDD_IN, VDD_CPU_GPU_CV, VDD_SOC"


@pytest.mark.parametrize("printed", ["", "12040", "12040 x", "1 2 3"])
def test_what_is_no_measurement_is_an_error(printed: str) -> None:
    meter = BoardMeter(lambda argv: printed, Rail("/sys/class/hwmon/hwmon1", 1, "VDD_IN"))
    with pytest.raises(ReplyError, match="VDD_IN: expected millivolts"):
        meter.measure()


@pytest.mark.parametrize(("board_w", "wrong"), [(9.0, ""), (10.4, ""), (10.6, "more than the supply"), (6.0, "lost")])
def test_two_meters_that_cannot_both_be_right_are_found(board_w: float, wrong: str) -> None:
    finding = compare(reading(10.0, 1.0), reading(board_w, 1.3)).finding
    assert wrong in finding
    assert bool(wrong) == bool(finding)


def test_readings_of_different_times_are_not_compared() -> None:
    with pytest.raises(BenchError, match="apart"):
        compare(reading(10.0, 1.0), reading(9.0, 2.0))


def reading(power_w: float, time_s: float) -> Reading:
    return Reading(time_s, 10.0, power_w / 10, power_w, True)


def clock(*times: float) -> Callable[[], float]:
    left = iter(times)
    return lambda: next(left)
