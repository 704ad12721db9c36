"""The board types that come with hil: each says where it was tried, holds together, and reads its board's console."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from hil.campaign.check import check_mission
from hil.client.expect import Pattern
from hil.inventory import load_bench, load_mission
from hil.inventory.board_type import BoardType, load_board_type

ROOT = Path(__file__).resolve().parents[2]
TYPES = {path.stem: load_board_type(path) for path in sorted((ROOT / "boards").glob("*.yaml"))}
EVERY = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)

# first line of the firmware, of the kernel, the prompt: as such boards print them
CONSOLES = {
    "jetson-agx-orin": (
        "Jetson UEFI firmware (version 5.0-35550185 built on 2023-12-07T00:00:00+00:00)",
        "[    0.000000] Linux version 5.10.120-tegra (buildbrain@mobile) #1 SMP PREEMPT",
        "orin login: ",
    ),
    "jetson-orin-nano": (
        "Jetson UEFI firmware (version 36.3.0-gcid-36191598 built on 2024-05-06T16:58:48+00:00)",
        "[    0.000000] Linux version 5.15.136-tegra (buildbrain@mobile) #1 SMP PREEMPT",
        "orin login: ",
    ),
    "raspberry-pi-5": (
        "  0.97 RPi: BOOTSYS release VERSION:26826259 DATE: 2024/09/23 TIME: 14:02:56",
        "[    0.000000] Booting Linux on physical CPU 0x0000000000 [0x414fd0b1]",
        "raspberrypi login: ",
    ),
    "virtual-arm64": ("U-Boot 2023.01+dfsg-2 (Jan 01 2023)", "Starting kernel ...", "vb1 login: "),
}


@EVERY
def test_it_says_where_it_was_tried_and_is_named_as_its_file(kind: BoardType) -> None:
    assert TYPES[kind.name] is kind
    assert kind.hardware == ("virtual" if kind.modelled_power else "not run on hardware")
    assert kind.power.source


@EVERY
def test_its_work_fits_its_envelope(kind: BoardType) -> None:
    limits, power = kind.supply, kind.power
    assert power.idle_w < power.inference_w <= limits.power_max_w
    assert power.inference_w / limits.voltage_min_v <= limits.current_max_a <= limits.overcurrent_protection_a
    # what the supply may be off by at the nominal voltage must not read as a voltage out of bounds
    assert limits.voltage_nominal_v - limits.on_tolerance_v >= limits.undervoltage_lockout_v
    assert limits.voltage_nominal_v + limits.on_tolerance_v < limits.overvoltage_protection_v
    # as it is switched on, so that a ramp ends before the verification gives up
    assert limits.voltage_nominal_v / limits.slew_v_per_s < limits.on_timeout_s


@EVERY
def test_it_reads_its_console(kind: BoardType) -> None:
    patterns = [Pattern(source).regex for source in (kind.boot.firmware, kind.boot.kernel, kind.boot.login)]
    said = CONSOLES[kind.name]
    for number, line in enumerate(said):
        assert [bool(pattern.search(line.encode())) for pattern in patterns] == [n == number for n in range(3)], line
    for death in kind.boot.death:
        assert not Pattern(death).regex.search("\n".join(said).encode())
    assert any(Pattern(death).regex.search(b"---[ end Kernel panic - not syncing: VFS") for death in kind.boot.death)


@pytest.mark.parametrize("name", TYPES)
def test_it_can_stand_in_a_bench(name: str, tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "fixtures/benches/jetson-rigol.yaml").read_text())
    content["board_types"] = str(ROOT / "boards")
    content["boards"]["orin1"]["type"] = name
    content["boards"]["orin1"].pop("meter")
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(content))
    _, _, kind = load_bench(tmp_path / "bench.yaml").board()
    assert kind == TYPES[name]


def test_a_board_with_a_fixed_input_is_not_flown_from_a_battery_bus(tmp_path: Path) -> None:
    """A Raspberry Pi takes 5 V and nothing else."""
    data = yaml.safe_load((ROOT / "fixtures/missions/short.yaml").read_text())
    data["orbit"]["tle"] = str(ROOT / "fixtures/tle" / Path(data["orbit"]["tle"]).name)
    data |= {"duration_h": 6, "cases": {"regulated": {"power": {"bus": {"regulated_v": 5.1}}}}}
    path = tmp_path / "mission.yaml"
    path.write_text(yaml.safe_dump(data))
    for case, fits in ((None, False), ("regulated", True)):
        findings = check_mission(load_mission(path, case), TYPES["raspberry-pi-5"])
        assert {item.what: item.ok for item in findings}["the bus within the board's voltages"] is fits
