"""Faults of a flight with a real emulated board: `hil mission fly` ends with the right code, safe, and says why.

The supply is asked through a plain socket, the link box through plain ssh.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benches import (
    HIL,
    ROOT,
    SHORT,
    Fly,
    assert_off,
    assert_safe,
    bench_up,
    has_netem,
    is_on,
    row,
    stop_daemon,
    until,
    verdict,
    write_bench,
    write_mission,
)
from host import Host

from hil.bench.journal import read_events
from hil.client import attach
from hil.inventory import Bench
from hil.virtual.images import uboot_environment, write_environment_flash

pytestmark = pytest.mark.xdist_group("boards")

STEP_S = 60.0
CUT_S = 2.0  # what the dead-man has from the daemon's death to a discharged output


def steps(*wanted: dict[str, Any]) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["steps"] = list(wanted)

    return change


# ------------------------------------------------------------------------------------------------------------- Ctrl-C
def assert_interrupted(fly: Fly, at_step: str) -> None:
    fly.interrupt()
    assert fly.wait(30) == 2, fly.said
    assert "interrupted" in fly.said
    assert "Traceback" not in fly.said
    assert_safe(fly.bench)
    events = read_events(fly.run / "events.jsonl")
    assert [event["arm"] for event in events if event["kind"] == "error"] == ["interrupted"]
    assert [event["step"] for event in events if event["kind"] == "step_started"][-1] == at_step
    assert [event["verified_v"] < 0.6 for event in events if event["kind"] == "board_off"] == [True]
    assert [event["why"] for event in events if event["kind"] == "flight_ended"] == ["requested"]
    assert "torn" not in [event["kind"] for event in events]
    assert verdict(fly.run)["verdict"] == "infra"
    assert "interrupted by the operator" in row(fly.run, "bench-in-order")["evidence"]
    assert (fly.run / "report.html").stat().st_size > 1000


def test_ctrl_c_while_the_board_boots(lab: Bench, tmp_path: Path) -> None:
    with Fly(lab, SHORT, tmp_path / "runs") as fly:
        fly.reaches("boot", STEP_S)
        log = fly.run / "console/vb1.log"
        until(lambda: b"Starting kernel" in log.read_bytes(), STEP_S, "the kernel to start")
        assert is_on(lab)
        assert_interrupted(fly, "boot")


@pytest.mark.soak  # at any moment in test_soak.py; this one looks at what was not activated
def test_ctrl_c_while_the_model_goes_up(lab: Bench, tmp_path: Path) -> None:
    mission = write_mission(
        tmp_path, "up", steps({"boot": {}}, {"upload": {"clock_rate": 60, "preload_bytes": 0}}, {"end": {}})
    )
    with Fly(lab, mission, tmp_path / "runs") as fly:
        fly.reaches("upload", STEP_S)
        with attach(lab) as daemon:
            until(lambda: daemon.status()["flight"]["upload_bytes"] > 500_000, STEP_S, "half a megabyte on the board")
        assert has_netem(lab)
        assert_interrupted(fly, "upload")
        assert "activated" not in {event["kind"] for event in read_events(fly.run / "events.jsonl")}
        assert row(fly.run, "activated-once")["verdict"] == "missing"


# --------------------------------------------------------------------------------------------------- a daemon that dies
def test_a_daemon_killed_in_flight_leaves_the_board_off_and_the_run_infra(
    lab: Bench, tmp_path: Path, host: Host
) -> None:
    with Fly(lab, SHORT, tmp_path / "runs") as fly:
        fly.reaches("boot", STEP_S)
        until(lambda: is_on(lab), STEP_S, "output on")
        with attach(lab) as daemon:
            pid = daemon.status()["pid"]
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_on(lab), 30, "output off")
        host.excuses("off", time.monotonic() - killed, CUT_S)
        assert fly.wait(120) == 3, fly.said
        assert "Traceback" not in fly.said
        assert verdict(fly.run)["verdict"] == "infra"
        assert {event["arm"] for event in fly.events("error")} == {"bench"}
        (cut,) = fly.events("dead_man_cut")
        assert (cut["reason"].startswith("the daemon"), cut["off"]) == (True, True)
    assert has_netem(lab), "the dead-man cuts power; the link waits for the next daemon"
    attach(lab).close()
    assert_safe(lab)


# ---------------------------------------------------------------------------------------------- a board that is broken
def without_link(content: dict[str, Any]) -> None:
    """No link box, no payload: what a test of power and console needs, up in a second."""
    del content["links"], content["boards"]["vb1"]["payload"]
    del content["virtual"]["link_box"], content["virtual"]["payload_network"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench whose board, and board type, a test may break in its own way."""
    directory = tmp_path_factory.mktemp("broken")
    shutil.copy(ROOT / "boards/virtual-arm64.yaml", directory)

    def change(content: dict[str, Any]) -> None:
        without_link(content)
        content["board_types"] = str(directory)

    with bench_up(write_bench(directory, "broken", change)) as bench:
        yield bench


@pytest.mark.parametrize(
    ("boot_s", "variable", "value", "says"),
    [
        pytest.param(
            12.0,
            "bootcmd",
            "echo Nothing to boot",
            r"'Starting kernel' did not come within .*Nothing to boot\n\s*=> ",
            id="nothing-to-boot",
            marks=pytest.mark.soak,  # it waits for its time-out
        ),
        pytest.param(
            60.0,
            "bootargs",
            "console=ttyAMA0,115200 rdinit=/nothing root=/dev/none",
            r"said 'Kernel panic - not syncing' while waiting for 'login:'",
            id="kernel-panic",
        ),
    ],
)
def test_a_board_that_never_boots_is_quoted(
    broken: Bench, tmp_path: Path, boot_s: float, variable: str, value: str, says: str
) -> None:
    kind = Path(broken.file.board_types) / "virtual-arm64.yaml"
    kind.write_text(re.sub(r"(?m)^  timeout_s: .*$", f"  timeout_s: {boot_s}", kind.read_text()))
    environment, changes = re.subn(f"(?m)^{variable}=.*$", f"{variable}={value}", uboot_environment("vb1", "", ""))
    assert changes == 1
    write_environment_flash(broken.state_dir / "vb1.env.img", environment)
    mission = write_mission(tmp_path, "boot", steps({"boot": {}}, {"end": {}}))
    with Fly(broken, mission, tmp_path / "runs") as fly:
        assert fly.wait(STEP_S) == 1, fly.said
        assert_safe(broken)
        (error,) = fly.events("error")
        assert error["arm"] == "board"
        assert re.search(f"(?s)board vb1.*{says}", error["message"]), error["message"]
        assert re.search(f"(?s)board vb1.*{says}", fly.said), fly.said
        assert verdict(fly.run)["verdict"] == "fail"
        assert row(fly.run, "board-in-order")["verdict"] == "fail"
        assert row(fly.run, "bench-in-order")["verdict"] == "pass"
        assert row(fly.run, "boots")["verdict"] == "missing"
        case = ET.parse(fly.run / "junit.xml").find(".//testcase[@name='1-boot']")
        assert case is not None
        assert case.find("failure") is not None


# ---------------------------------------------------------------------------------------------------------- a full disk
FLY_ON_A_SMALL_DISK = """
disk=$1 keep=$2 size=$3 hil=$4; shift 4
mount -t tmpfs -o size=$size tmpfs "$disk"
{ until grep -qs U-Boot "$disk"/*/console/*.log; do sleep 0.1; done; cat /dev/zero >"$disk"/filler; } 2>/dev/null &
"$hil" mission fly "$@" --runs "$disk"
echo "code $?"
kill $! 2>/dev/null; wait
cp -r "$disk"/*-boot-* "$keep"
"""


@pytest.mark.parametrize("size", ["60k", "4m"], ids=["at-start", "in-flight"])
def test_a_full_disk_is_said_and_ends_safely(broken: Bench, tmp_path: Path, size: str) -> None:
    """The runs lie on a tiny file system, in a mount namespace of its own, which needs no root. It is full from the
    start, or as soon as the board boots.
    """
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this host lets nobody mount a file system in a namespace of his own")
    disk, keep = tmp_path / "disk", tmp_path / "keep"
    disk.mkdir()
    keep.mkdir()
    mission = write_mission(tmp_path, "boot", steps({"boot": {}}, {"end": {}}))
    stop_daemon(broken)  # the next one must see the same file systems
    argv = ["unshare", "-rm", "sh", "-c", FLY_ON_A_SMALL_DISK, "sh", disk, keep, size, HIL, mission]
    argv += ["--bench", broken.path]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=STEP_S, check=False)
    said = done.stdout + done.stderr
    stop_daemon(broken)
    assert "code 3\n" in said, said
    # The last write may fit in part: then it is told how much of it did.
    assert re.search("No space left on device|bytes were stored", said), said
    assert re.search("free disk space|free space and run again", said), said
    assert "Traceback" not in said
    assert_off(broken)
    # With room again, what was recorded is judged: never a pass, and which it is depends on what still fitted.
    (run,) = keep.iterdir()
    again = subprocess.run([HIL, "campaign", "report", run], capture_output=True, text=True, timeout=30, check=False)
    assert (again.returncode, verdict(run)["verdict"]) in {(3, "infra"), (6, "invalid")}, again.stderr
    assert re.search("No space left on device|disk is full", row(run, "bench-in-order")["evidence"])
