"""Links of a bench file: every driver is read, chosen and played; mistakes are told with their line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hil.bench.links import link_driver
from hil.bench.safety import InstrumentLock
from hil.drivers.netem import NetemSsh
from hil.drivers.netem_local import NetemLocal
from hil.drivers.userspace_link import UserSpaceLink
from hil.errors import BenchError, UsageError
from hil.inventory import load_bench
from hil.inventory.bench import BenchFile
from hil.virtual.config import virtual_bench
from hil.virtual.supervisor import VirtualBench

ROOT = Path(__file__).resolve().parents[2]
USER_SPACE = {"driver": "user-space", "address": "unix://${runtime}/air.sock", "seed": 4}
NETEM = {"driver": "netem", "uplink_interface": "eth1", "downlink_interface": "ingress:eth1", "seed": 7}


def bench_file(directory: Path, link: dict[str, Any] | None) -> Path:
    content = yaml.safe_load((ROOT / "fixtures/benches/virtual.yaml").read_text())
    content["board_types"] = str(ROOT / "boards")
    if link is not None:
        content["links"]["box1"] = link
    path = directory / "bench.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(("link", "driver"), [(None, NetemSsh), (NETEM, NetemLocal), (USER_SPACE, UserSpaceLink)])
def test_the_file_names_the_driver(tmp_path: Path, link: dict[str, Any] | None, driver: type) -> None:
    bench = load_bench(bench_file(tmp_path, link))
    made = link_driver("box1", bench.file.links["box1"])
    assert isinstance(made, driver)
    if isinstance(made, NetemLocal):
        assert made.interfaces == {"uplink": "eth1", "downlink": "ingress:eth1"}
        assert made.seed == 7


@pytest.mark.parametrize(
    ("link", "says"),
    [
        (
            {**NETEM, "driver": "tc"},
            r"bench\.yaml:\d+: `links\.box1`: `driver` must be one of netem-ssh, netem, user-space",
        ),
        (
            {**NETEM, "upling_interface": "x"},
            r"unknown key `links\.box1\.upling_interface`; did you mean `uplink_interface`",
        ),
        ({**NETEM, "uplink_interface": "eth0; reboot"}, r"links\.box1\.uplink_interface"),
        ({"driver": "user-space", "address": "tcp://1.2.3.4:5"}, r"links\.box1\.address"),
        ({"driver": "netem", "uplink_interface": "eth0"}, r"`links\.box1\.downlink_interface` is missing"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, link: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_bench(bench_file(tmp_path, link))


def test_the_virtual_bench_plays_a_link_in_user_space(tmp_path: Path) -> None:
    bench = load_bench(bench_file(tmp_path, USER_SPACE))
    played = virtual_bench(bench)
    assert played.linkbox_mgmt_port is None
    assert played.userspace_link == bench.runtime_dir / "air.sock"
    assert played.userspace_seed == 4
    assert played.has_link
    assert VirtualBench.from_json(played.to_json()) == played
    with pytest.raises(UsageError, match="or one in user space"):
        virtual_bench(load_bench(bench_file(tmp_path, NETEM)))


def test_a_link_without_an_address_on_the_network_is_claimed_once(tmp_path: Path) -> None:
    for link in (NETEM, USER_SPACE):
        wire = load_bench(bench_file(tmp_path, link)).file.links["box1"]
        first, second = InstrumentLock(wire.address), InstrumentLock(wire.address)
        first.acquire()
        try:
            with pytest.raises(BenchError, match="another process"):
                second.acquire()
        finally:
            first.release()


def test_the_schema_knows_all_drivers() -> None:
    text = str(BenchFile.model_json_schema())
    assert all(driver in text for driver in ("netem-ssh", "user-space", "'const': 'netem'"))
