"""Benches, board types and missions as files: what a wrong file is told."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from hil.errors import UsageError
from hil.inventory import load_bench, load_mission, yaml_file
from hil.inventory.bench import JumpHost
from hil.inventory.board_type import load_board_type

ROOT = Path(__file__).resolve().parents[2]
VIRTUAL = ROOT / "fixtures/benches/virtual.yaml"


@pytest.fixture
def bench_text() -> str:
    return VIRTUAL.read_text().replace("name: virtual\n", f"name: virtual\nboard_types: {ROOT / 'boards'}\n")


def _load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "bench.yaml"
    path.write_text(text)
    return load_bench(path)


def _line_of(text: str, needle: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), 1) if needle in line)


def test_the_example_of_a_real_bench_loads() -> None:
    bench = load_bench(ROOT / "fixtures/benches/jetson-rigol.yaml")
    _, board, board_type = bench.board()
    assert board.mgmt is not None
    assert board.mgmt.key == Path.home() / ".ssh/hil_ed25519"
    assert board_type.hardware == "not run on hardware"
    assert board_type.supply.overcurrent_protection_a <= 3.0  # what a DP832 channel can give


@pytest.mark.parametrize("name", ["short", "star-compute-qwen3"])
def test_the_shipped_missions_load(name: str) -> None:
    mission = load_mission(ROOT / f"fixtures/missions/{name}.yaml")
    kinds = [step.kind for step in mission.file.steps]
    assert (kinds[0], kinds[-1]) == ("boot", "end")


def test_a_step_with_two_keys_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "fixtures/missions/short.yaml").read_text().replace("../tle", str(ROOT / "fixtures/tle"))
    path = tmp_path / "mission.yaml"
    path.write_text(text.replace("  - boot:\n", "  - {boot: {}, serve: {}}\n"))
    with pytest.raises(UsageError, match=rf"mission\.yaml:{_line_of(text, '- boot')}: .*exactly one key"):
        load_mission(path)


def test_a_rate_with_its_unit_as_text_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "fixtures/missions/short.yaml").read_text().replace("../tle", str(ROOT / "fixtures/tle"))
    path = tmp_path / "mission.yaml"
    path.write_text(text.replace("rate_bps: 300000", "rate_bps: 300 kbit/s"))
    with pytest.raises(UsageError, match=r"`link\.uplink\.rate_bps` must be a plain number"):
        load_mission(path)


def test_the_shipped_bench_loads() -> None:
    bench = load_bench(VIRTUAL)
    name, board, board_type = bench.board()
    assert (name, board.type, board_type.arch) == ("vb1", "virtual-arm64", "aarch64")
    assert bench.file.supplies["psu1"].port == 15025
    assert (bench.file.links["box1"].user, bench.file.links["box1"].port) == ("root", 15122)
    assert "${" not in board.console.port  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("wrong", "right", "parts"),
    [
        (
            "dialekt: rigol-dp800",
            "dialect: rigol-dp800",
            ["unknown key `supplies.psu1.dialekt`", "mean `dialect`"],
        ),
        ("baud: 115200 bit/s", "baud: 115200", ["`boards.vb1.console.baud`", "the unit is in the key's name"]),
        ("type: virtual-arm46", "type: virtual-arm64", ["no board type", "did you mean 'virtual-arm64'"]),
        ("supply: psu2, channel", "supply: psu1, channel", ["no supply 'psu2'", "did you mean 'psu1'"]),
        ("link: box9\n      address", "link: box1\n      address", ["no link 'box9'"]),
        ('port: "${rumtime}/vb1.console"', 'port: "${runtime}/vb1.console"', ["unknown variable", "${runtime}"]),
        ("type: virtual-arm64\n    type: x", "type: virtual-arm64", ["stands twice"]),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, bench_text: str, wrong: str, right: str, parts: list[str]) -> None:
    assert right in bench_text
    text = bench_text.replace(right, wrong, 1)
    with pytest.raises(UsageError) as caught:
        _load(tmp_path, text)
    for part in parts:
        assert part in str(caught.value)
    line = int(str(caught.value).split("bench.yaml:")[1].split(":")[0])
    assert wrong.splitlines()[-1 if "twice" in parts[0] else 0].split(",")[0].strip() in text.splitlines()[line - 1]


SAFE = """
    address: tcp://127.0.0.1:15025
    outlet: tasmota://192.0.2.30/1
    watchdog_s: 10
    accept_level: B
"""


def test_what_stands_behind_a_supply_and_a_boards_lines_are_read(tmp_path: Path, bench_text: str) -> None:
    lines = "lines: {reset: 'gpio:///dev/gpiochip0?line=17&active=low', power-button: 'lcus:///dev/ttyUSB1?relay=2'}"
    text = bench_text.replace("    address: tcp://127.0.0.1:15025\n", SAFE[1:], 1)
    text = text.replace("channel: 1}]", f"channel: 1, outlet: 'lcus:///dev/ttyUSB0'}}]\n    {lines}", 1)
    bench = _load(tmp_path, text)
    supply, board = bench.file.supplies["psu1"], bench.file.boards["vb1"]
    assert (supply.outlet, supply.watchdog_s, supply.accept_level) == ("tasmota://192.0.2.30/1", 10.0, "B")
    assert board.power[0].outlet == "lcus:///dev/ttyUSB0"
    assert sorted(board.lines) == ["power-button", "reset"]
    plain = _load(tmp_path, bench_text).file.supplies["psu1"]
    assert (plain.outlet, plain.watchdog_s, plain.accept_level) == (None, 5.0, "C")


@pytest.mark.parametrize(
    ("right", "wrong", "key"),
    [
        ("accept_level: B", "accept_level: E", r"supplies\.psu1\.accept_level"),
        ("watchdog_s: 10", "watchdog_s: -1", r"supplies\.psu1\.watchdog_s"),
        ("tasmota://192.0.2.30/1", "http://192.0.2.30/1", r"supplies\.psu1\.outlet"),
        ("channel: 1}]", "channel: 1, rail: aux}]", "no rail 'aux'"),
        ("channel: 1}]", "channel: 1}]\n    lines: {reset: /dev/gpiochip0}", r"boards\.vb1\.lines\.reset"),
    ],
)
def test_a_wrong_layer_is_named(tmp_path: Path, bench_text: str, right: str, wrong: str, key: str) -> None:
    text = bench_text.replace("    address: tcp://127.0.0.1:15025\n", SAFE[1:], 1)
    assert right in text
    with pytest.raises(UsageError, match=key):
        _load(tmp_path, text.replace(right, wrong, 1))


def test_a_rail_has_an_envelope_of_its_own(tmp_path: Path) -> None:
    text = (ROOT / "boards/virtual-arm64.yaml").read_text()
    aux = (
        "rails:\n  aux: {voltage_min_v: 4.5, voltage_nominal_v: 5, voltage_max_v: 5.5, undervoltage_lockout_v: 4, "
        "current_max_a: 1, power_max_w: 5, overvoltage_protection_v: 6, overcurrent_protection_a: 1.2}\n"
    )
    path = tmp_path / "virtual-arm64.yaml"
    path.write_text(text.replace("\nboot:", f"\n{aux}\nboot:", 1))
    kind = load_board_type(path)
    assert (kind.limits("aux").voltage_nominal_v, kind.limits(None).voltage_nominal_v) == (5.0, 15.0)


def test_a_missing_wire_is_named(tmp_path: Path, bench_text: str) -> None:
    text = bench_text.replace("    power: [{supply: psu1, channel: 1}]\n", "")
    with pytest.raises(UsageError, match=r"bench\.yaml:\d+: `boards\.vb1\.power` is missing"):
        _load(tmp_path, text)


def test_two_boards_on_one_channel_are_refused(tmp_path: Path, bench_text: str) -> None:
    block = "  vb2:\n    type: virtual-arm64\n    power: [{supply: psu1, channel: 1}]\n\nvirtual:"
    with pytest.raises(UsageError, match="channel 1 of supply psu1 already feeds board vb1"):
        _load(tmp_path, bench_text.replace("\nvirtual:", block, 1))


@pytest.mark.parametrize(
    ("meter", "problem"),
    [
        ("{}", "a meter is a `rail` of the board, or a `supply` with its `channel`"),
        ("{rail: VDD_IN, supply: psu1, channel: 2}", "a meter is a `rail`"),
        ("{supply: psu1}", "a meter is a `rail`"),
        ("{supply: psu9, channel: 2}", "no supply 'psu9' on this bench"),
        ("{supply: psu1, channel: 1}", "channel 1 of supply psu1 feeds board vb1"),
    ],
)
def test_a_meter_that_cannot_compare_is_refused(tmp_path: Path, bench_text: str, meter: str, problem: str) -> None:
    wired = "    power: [{supply: psu1, channel: 1}]\n"
    assert _load(tmp_path, bench_text.replace(wired, f"{wired}    meter: {{supply: psu1, channel: 2}}\n"))
    assert _load(tmp_path, bench_text.replace(wired, f"{wired}    meter: {{rail: VDD_IN}}\n"))
    with pytest.raises(UsageError, match=problem) as caught:
        _load(tmp_path, bench_text.replace(wired, f"{wired}    meter: {meter}\n"))
    assert re.search(r"bench\.yaml:\d+", str(caught.value))


def test_a_rail_needs_a_way_to_the_board(tmp_path: Path, bench_text: str) -> None:
    block = "  vb2:\n    type: virtual-arm64\n    power: [{supply: psu1, channel: 2}]\n    meter: {rail: A}\n\nvirtual:"
    with pytest.raises(UsageError, match="read over `mgmt`, which this board has not"):
        _load(tmp_path, bench_text.replace("\nvirtual:", block, 1))


def test_an_absent_file_names_its_neighbour() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*virtual\.yaml"):
        load_bench(VIRTUAL.with_name("virtul.yaml"))


def test_yaml_syntax_error_has_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"bench\.yaml:2: not valid YAML"):
        _load(tmp_path, "schema: 1\n\tname: x\n")


MERGING = """\
base: &base
  voltage_v: 12
  rails: {a: 1, b: 2}
other: &other {voltage_v: 9, name: other}
one: {<<: *base, name: one}
two:
  name: two
  <<: [*base, *other]
  rails: {c: 3}
"""


def test_merge_keys_are_expanded_and_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(MERGING)
    data, lines = yaml_file.read(path)
    assert data["one"] == {"voltage_v": 12, "rails": {"a": 1, "b": 2}, "name": "one"}
    assert data["two"] == {"voltage_v": 12, "rails": {"c": 3}, "name": "two"}
    assert lines["one", "voltage_v"] == 2
    assert lines["one", "rails", "b"] == 3
    assert lines["one", "name"] == 5
    assert lines["two", "voltage_v"] == 2
    assert lines["two", "rails", "c"] == 9
    assert ("two", "rails", "a") not in lines


def test_a_board_of_merged_wires_loads_and_a_wrong_one_names_the_line_it_is_written_on(
    tmp_path: Path, bench_text: str
) -> None:
    text = bench_text.replace("  vb1:\n", "  vb1: &first\n", 1)
    block = "  vb2:\n    <<: *first\n    power: [{supply: psu1, channel: 2}]\n\nvirtual:"
    text = text.replace("\nvirtual:", block, 1)
    bench = _load(tmp_path, text)
    assert bench.file.boards["vb2"].mgmt == bench.file.boards["vb1"].mgmt
    assert bench.file.boards["vb2"].power[0].channel == 2
    wrong = text.replace("    <<: *first\n", "    <<: *first\n    tipe: x\n")
    with pytest.raises(UsageError, match=rf"bench\.yaml:{_line_of(wrong, 'tipe')}: unknown key `boards.vb2.tipe`"):
        _load(tmp_path, wrong)
    wrong = text.replace("\n    type: virtual-arm64", "\n    type: virtual-arm65", 1)
    with pytest.raises(UsageError, match=rf"bench\.yaml:{_line_of(wrong, 'virtual-arm65')}: .*no board type"):
        _load(tmp_path, wrong)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb: {<<: 5}\n", 2, "`<<` takes a mapping"),
        ("a: &a\n  b: 1\n  <<: *a\n", 1, "an alias stands within what it stands for"),
        ("a: &a\n  - 1\n  - *a\n", 1, "an alias stands within what it stands for"),
        ("a: 1\n? [x, y]\n: 2\n", 2, "a key must be text"),
        ("a: &a {b: 1}\nc: {<<: *a, <<: *a, d: 1, d: 2}\n", 2, "`d` stands twice"),
        ("a: *b\n", 1, "not valid YAML: found undefined alias"),
    ],
)
def test_what_cannot_be_expanded_is_refused_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"odd\.yaml:{line}: .*{says}"):
        yaml_file.read(path)


def test_python_objects_in_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        _load(tmp_path, "schema: 1\nname: !!python/object/apply:os.getcwd []\n")


def test_an_envelope_out_of_order_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "boards/virtual-arm64.yaml").read_text().replace("voltage_min_v: 11.0", "voltage_min_v: 18.0")
    path = tmp_path / "board.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"board\.yaml:{_line_of(text, 'supply:')}: `supply`: need voltage_min_v <="):
        load_board_type(path)


@pytest.mark.parametrize("user", ["-oProxyCommand=x", "a b", "", "$(x)", "a;b", "a$(x)"])
def test_who_logs_in_where_is_no_option_and_no_shell_s_word(tmp_path: Path, user: str) -> None:
    """They end up on a command line of `ssh`, and the bench of another host says what they are."""
    for good in ("hil", "lab\\anna", "anna@LAB.EXAMPLE", "_svc-1"):
        assert JumpHost(address="fe80::1%usb0", user=good, known_hosts=tmp_path).user == good
    for wrong in ({"address": "h", "user": user}, {"address": user}):
        with pytest.raises(ValidationError, match=r"address|user"):
            JumpHost(**wrong, known_hosts=tmp_path)
