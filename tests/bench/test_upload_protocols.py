"""The same few megabytes up by SFTP and by CFDP class 2 in one flight, each over contacts that cut it.

In the middle of the second the board reboots, as a watchdog would have it. The record is read with the standard
library, not with the code that wrote or judged it.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from benches import Fly, assert_safe, until, verdict, write_mission

from hil.client.shell import connect
from hil.drivers.ssh import Shell
from hil.errors import BoardError
from hil.inventory import Bench

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("boards"), pytest.mark.timeout(900)]

FLIGHT_S = 800.0
RATE = Path(__file__).parents[1] / "benchmarks/cfdp_receiver.py"
SIZE = 2_500_000
CLOCK_RATE = 5
# Half of it fits the end of the first contact, at 300 kbit/s of mission time.
UPLOAD = {"clock_rate": CLOCK_RATE, "contact_share": 0.04, "max_contacts": 10}


def windows(flown: Fly, protocol: str) -> list[dict[str, Any]]:
    return [event for event in flown.events("upload_window") if event["protocol"] == protocol]


def mgmt(lab: Bench) -> Shell:
    wire = lab.file.boards["vb1"].mgmt
    assert wire is not None
    return connect(wire, timeout_s=60)


@pytest.fixture(scope="module")
def flown(lab: Bench, tmp_path_factory: pytest.TempPathFactory) -> Fly:
    directory: Path = tmp_path_factory.mktemp("protocols")
    model = directory / "model.bin"
    model.write_bytes(random.Random(1).randbytes(SIZE))

    def change(content: dict[str, Any]) -> None:
        sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
        content["model"] = {"file": str(model), "sha256": sha256, "title": "2.5 MB of chance"}
        content["steps"] = [
            {"boot": None},
            {"upload": {**UPLOAD, "protocol": "sftp"}},
            # Enough contacts to reboot in between.
            {"upload": {**UPLOAD, "protocol": "cfdp", "contact_share": 0.02, "max_contacts": 30}},
            {
                "run": {
                    "name": "receiver",
                    "files": [str(RATE)],
                    "argv": ["{python}", "{programs}/cfdp_receiver.py", "{programs}/../cfdp.pyz"],
                    "reports": {"cfdp_receiver_rate": "bit/s"},
                }
            },
            {"end": None},
        ]
        content["criteria"] = [
            {"name": "model-hash", "measure": "upload.sha256_ok", "equals": True},
            {"name": "cut", "measure": "upload.windows_cut", "min": 2},
            {"name": "crossed-netem", "measure": "link.crossed_netem_share", "min": 1.0},
            {"name": "wire", "measure": "upload.wire_bytes", "min": 2 * SIZE, "max": 3 * SIZE},
            {"name": "resent", "measure": "upload.resent_bytes", "max": SIZE},
            {"name": "rebooted", "measure": "upload.reboots", "equals": 1},
            {"name": "retransmitted", "measure": "upload.retransmissions", "min": 0},
            {"name": "goodput", "measure": "upload.goodput_bps", "min": 100e3, "max": 300e3},
        ]

    with Fly(lab, write_mission(directory, "protocols", change), directory / "runs") as fly:
        until(lambda: len(windows(fly, "sftp")) > 0, FLIGHT_S, "SFTP's first contact")
        with mgmt(lab) as shell:
            # Long enough for the receiver to have put something on the disk.
            until(lambda: len(windows(fly, "cfdp")) == 3, FLIGHT_S, "CFDP's third contact")
            with contextlib.suppress(BoardError):  # at once and without a word to anybody, as a watchdog does it
                shell.run(["sh", "-c", "echo b >/proc/sysrq-trigger"], timeout_s=5)
        fly.wait(FLIGHT_S)
    print(fly.said)
    return fly


def test_both_bring_the_file(flown: Fly) -> None:
    assert verdict(flown.run)["verdict"] == "pass", flown.said
    assert flown.process.returncode == 0
    done = flown.events("upload_done")
    assert [(event["protocol"], event["size"], event["sha256_ok"]) for event in done] == [
        ("sftp", SIZE, True),
        ("cfdp", SIZE, True),
    ]
    assert len(flown.events("activated")) == 2
    assert_safe(flown.bench)


@pytest.mark.parametrize("protocol", ["sftp", "cfdp"])
def test_each_was_cut_and_resumed(flown: Fly, protocol: str) -> None:
    used = windows(flown, protocol)
    assert len(used) >= 2
    assert used[0]["cut_by_los"]
    assert [event["complete"] for event in used] == [False] * (len(used) - 1) + [True]
    for before, after in pairwise(used):
        assert before["bytes_acked_end"] == after["bytes_acked_start"]
        assert before["t_mission"] < after["t_mission"]
    assert used[0]["bytes_acked_end"] > 100_000
    assert used[-1]["bytes_acked_end"] == SIZE
    # In sum only: loss of signal leaves bytes in the ground's socket, and what came before it is confirmed after it.
    assert sum(event["bytes_on_wire"] for event in used) > SIZE
    open_s = sum(event["t_end_mono"] - event["t_start_mono"] for event in used)
    assert 1.05 * CLOCK_RATE * 300e3 * open_s >= 8 * SIZE, "faster than the link"


def test_the_reboot_was_noticed_and_the_transaction_continued(flown: Fly) -> None:
    (rebooted,) = flown.events("upload_rebooted")
    assert (rebooted["protocol"], rebooted["cause"]) == ("cfdp", "reboot")
    assert re.fullmatch(r"the transaction is continued at byte \d+", rebooted["goes_on"])
    after = next(event for event in windows(flown, "cfdp") if event["after_reboot"])
    assert after["bytes_lost"] < rebooted["bytes_acked"]
    (rate,) = flown.events("reported")
    assert rate["value"] > 0
    print(f"the receiver alone takes {rate['value'] / 1e6:.2f} Mbit/s on this board")


def test_the_report_compares_them(flown: Fly) -> None:
    page = (flown.run / "report.html").read_text()
    section = page.split('<section aria-labelledby="uploads">')[1].split("</section>")[0]
    assert '<th scope="row">sftp</th>' in section
    assert '<th scope="row">cfdp</th>' in section
    assert "–" not in section, "every figure of both is known"
