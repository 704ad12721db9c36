"""What takes long: a flight that is interrupted, or whose daemon dies, at any moment. `make soak` runs it.

A seed chooses the moment; it is printed and in the test's name, so that a failure can be repeated.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from benches import SHORT, Fly, assert_off, assert_safe, is_on, until, verdict
from host import Host

from hil.bench.journal import read_events
from hil.client import attach
from hil.inventory import Bench

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("boards"), pytest.mark.timeout(900)]

SHORT_S = 120.0  # the short flight takes 135 s where it takes least
SEEDS = range(6)


def fly_until_random_moment(fly: Fly, seed: int) -> None:
    moment = random.Random(seed).uniform(1.0, SHORT_S)
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline:
        assert fly.process.poll() is None, fly.said
        time.sleep(0.05)
    print(f"seed {seed}: {moment:.2f} s after the start, {fly.said.splitlines()[-1]}")


@pytest.mark.parametrize("seed", SEEDS)
def test_ctrl_c_at_any_moment_ends_safely(lab: Bench, tmp_path: Path, seed: int) -> None:
    with Fly(lab, SHORT, tmp_path / "runs") as fly:
        fly_until_random_moment(fly, seed)
        fly.interrupt()
        assert fly.wait(30) == 2, fly.said
        assert "Traceback" not in fly.said
        assert_safe(lab)
        assert [event["arm"] for event in fly.events("error")] == ["interrupted"]
        assert verdict(fly.run)["verdict"] == "infra"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_daemon_that_dies_at_any_moment_leaves_the_board_off(
    lab: Bench, tmp_path: Path, host: Host, seed: int, number: int
) -> None:
    with Fly(lab, SHORT, tmp_path / "runs") as fly:
        fly_until_random_moment(fly, seed)
        with attach(lab) as daemon:
            pid = daemon.status()["pid"]
        was_on = is_on(lab)
        began = time.monotonic()
        os.kill(pid, number)
        until(lambda: not is_on(lab), 10, "output off")
        host.excuses("off", time.monotonic() - began, 2.0)
        if number == signal.SIGSTOP and not was_on:
            os.kill(pid, signal.SIGKILL)  # with nothing on, nobody had a reason to
        assert fly.wait(120) == 3, fly.said
        assert "Traceback" not in fly.said
        assert_off(lab)
        assert verdict(fly.run)["verdict"] == "infra"
        assert read_events(fly.run / "events.jsonl")
    attach(lab).close()
    assert_safe(lab)
