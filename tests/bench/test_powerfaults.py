"""Faults made on purpose through client, daemon and command line, on a supply whose terminals are watched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Host
from matrix import NORMAL_W, Lab, MakeLab, until

from hil.bench.levels import CutTimes
from hil.client import attach
from hil.errors import BenchError, UsageError

HIL = Path(sys.executable).with_name("hil")


@pytest.fixture
def pty() -> Iterator[tuple[int, Path]]:
    """A board's serial port: the board's end, and the path of the host's."""
    master, slave = os.openpty()
    tty.setraw(slave)
    yield master, Path(os.ttyname(slave))
    os.close(master)
    os.close(slave)


@pytest.fixture
def console(pty: tuple[int, Path]) -> Path:
    return pty[1]


def hil(lab: Lab, *words: object) -> subprocess.CompletedProcess[str]:
    """The command line, as a person would use it."""
    argv = [str(HIL), *map(str, words), "--bench", str(lab.bench.path)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def test_a_client_dips_the_bus_and_knows_what_was_reached(make_lab: MakeLab) -> None:
    lab = make_lab()
    with lab.powered() as (daemon, _, board):
        meter = lab.meter()
        for _ in range(10):  # never shorter; as good as not longer in the best of some, on a busy host
            done = board.power.brown_out(4.0, 0.1)
            assert (done.low_v, done.asked_s, done.lockout, done.output_on) == (11.0, 0.1, False, True)
            assert done.reached_s >= 0.1
            lowest_v = min(volts for _, volts, _, _ in meter.samples)
            if done.reached_s < 0.2 and done.command_s < 0.05 and lowest_v < 11.1:
                break
        meter.stop()
        assert lowest_v == pytest.approx(11.0, abs=0.1)
        assert done.reached_s < 0.2
        assert 0 < done.command_s < 0.05
        board.check()  # its own doing: nobody lost the board
        watcher_epoch = daemon.status()["boards"]["b1"]["power_epoch"]
        assert board.power.brown_out(8.0, 0.6).lockout
        assert daemon.status()["boards"]["b1"]["power_epoch"] == watcher_epoch + 1
        board.check()
        with pytest.raises(UsageError, match=r"ends at -1 V, below the board's 0 V"):
            board.power.brown_out(16.0, 0.1)
        with pytest.raises(BenchError, match="under a lease"):
            daemon.board("b1").power.brown_out(4.0, 0.1)
        assert lab.truth.is_on


def test_a_supply_with_a_list_dips_for_ten_milliseconds(make_lab: MakeLab) -> None:
    lab = make_lab(model="keysight-n6700")
    assert hil(lab, "lease", "acquire", "b1").returncode == 0
    assert "output on" in hil(lab, "board", "power", "on").stdout
    said = hil(lab, "board", "power", "dip", "--depth-v", 4, "--duration-s", 0.01).stdout
    assert said.startswith("b1: 11 V by the instrument's list, 10 ms as read back\n")
    dip = json.loads(hil(lab, "board", "power", "dip", "--depth-v", 4, "--duration-s", 0.01, "--json").stdout)
    assert (dip["by"], dip["reached_s"], dip["trips"], dip["output_on"]) == ("list", 0.01, [], True)
    assert lab.truth.is_on
    assert hil(lab, "lease", "release", "b1").returncode == 0
    assert not lab.truth.is_on


def test_a_client_lives_through_a_latch_up(make_lab: MakeLab) -> None:
    lab = make_lab()
    with lab.powered() as (_, _, board):
        lab.load(24.0)  # 1.6 A
        done = board.power.latch_up(1.2, 0.2, 0.5, wait_s=30)
        assert lab.truth.is_on
        assert 0.2 <= done.held_s < 5  # a tick longer on an idle host
        assert done.peak_a == pytest.approx(1.6, abs=0.05)
        assert done.energy_above_j == pytest.approx(0.4 * 15.0 * done.held_s, rel=0.15)
        assert 0.5 <= done.off_s < 20
        lab.load(NORMAL_W)
        with pytest.raises(BenchError, match="did not draw more than 2 A"):
            board.power.latch_up(2.0, 0.1, 0.5, wait_s=0.5)
        board.check()


def test_a_cut_at_a_console_line_is_done_by_the_daemon(make_lab: MakeLab, pty: tuple[int, Path]) -> None:
    master, path = pty
    lab = make_lab(console=path)
    with lab.powered() as (daemon, lease, board):
        until(lambda: daemon.status()["boards"]["b1"]["console"]["connected"], 30, "for the console")
        os.write(master, b"U-Boot 2026.01\r\n")
        armed = board.power.cut_at(r"writing slot (\d)", delay_s=0.05)
        with pytest.raises(UsageError, match="armed"):
            board.power.cut_at("again")
        os.write(master, b"verifying\r\nwriting slot 1: 50 %\r\n")
        done = armed.wait(30)
        assert not lab.truth.is_on
        assert done.matched == "writing slot 1"
        assert done.overshoot_bytes < 20
        assert 0 < done.latency_s < 10
        assert "cut at 'writing slot" in lab.cut_by()
        board.check()  # the cut was its own doing

        board.power.on()
        second = board.power.cut_at(byte_offset=1000)
        lease.release()
        report = daemon.http.get("/v1/boards/b1/power/cut-at?wait_s=30")
        assert report["state"] == "disarmed"
        with pytest.raises(BenchError):
            second.wait(1)


def test_the_command_line_disturbs_and_measures(make_lab: MakeLab, console: Path, host: Host) -> None:
    lab = make_lab(console=console)
    asked = hil(lab, "doctor")
    assert "channel 1: level" in asked.stdout
    assert "C (dead-man, OVP and OCP)" in asked.stdout
    assert "not measured: hil doctor --measure-off b1" in asked.stdout
    measured = hil(lab, "doctor", "--measure-off", "b1", "--json")
    assert measured.returncode == 0, measured.stdout + measured.stderr
    cuts = {cut.layer: cut.seconds for cut in CutTimes(lab.bench.state_dir / "time-to-off.json").read("b1")}
    assert list(cuts) == ["off command", "daemon killed", "daemon stopped"]
    (row,) = [row for row in json.loads(measured.stdout)["checks"] if row["what"] == "time to off"]
    assert row["found"].startswith("off command 0.")
    with attach(lab.bench) as daemon:
        assert daemon.leases() == []
    assert not lab.truth.is_on

    assert hil(lab, "lease", "acquire", "b1").returncode == 0
    assert hil(lab, "doctor", "--measure-off", "b1").returncode == 3  # somebody uses the bench
    assert "output on" in hil(lab, "board", "power", "on").stdout
    dip = json.loads(hil(lab, "board", "power", "dip", "--depth-v", 3, "--duration-s", 0.05, "--json").stdout)
    assert (dip["low_v"], dip["by"]) == (12.0, "writes")
    refused = hil(lab, "board", "power", "dip", "--depth-v", 30, "--duration-s", 0.05)
    assert (refused.returncode, "below the board's 0 V" in refused.stderr) == (4, True)
    latched = hil(lab, "board", "power", "latch-up", "--threshold-a", 1, "--hold-s", 0, "--off-s", 0.5, "--added-a", 1)
    assert "held_s" in latched.stdout, latched.stderr
    late = hil(lab, "board", "power", "cut-at", "--pattern", "never", "--timeout-s", 0.2)
    assert (late.returncode, "did not come within 0.2 s" in late.stderr) == (3, True)
    assert hil(lab, "board", "line", "reset", "press").returncode == 4
    assert hil(lab, "lease", "release", "b1").returncode == 0
    assert not lab.truth.is_on
    for layer, limit_s in (("off command", 2.0), ("daemon killed", 2.0), ("daemon stopped", 4.0)):
        host.excuses(layer, cuts[layer], limit_s)
    assert cuts["daemon stopped"] > 1.0  # it must be silent for a while first


def test_hardware_is_only_cut_with_consent(make_lab: MakeLab) -> None:
    lab = make_lab()
    kind = lab.directory / "types/loaded.yaml"
    kind.write_text(kind.read_text().replace("hardware: virtual", "hardware: not run on hardware"))
    refused = hil(lab, "doctor", "--measure-off", "b1")
    assert refused.returncode in (2, 4), refused.stdout
    assert not lab.journal.exists()


def test_a_supply_below_the_accepted_level_does_not_power_a_board(make_lab: MakeLab) -> None:
    lab = make_lab(model="siglent-spd3303x")
    with attach(lab.bench) as daemon, daemon.lease(["b1"]) as lease:
        with pytest.raises(BenchError, match="level D and this bench accepts C or better") as caught:
            daemon.board("b1", lease).power.on()
        assert "accept_level: D" in caught.value.hint
        (row,) = [row for row in daemon.doctor() if row["what"] == "channel 1: level"]
        assert row["ok"] is False
        assert "no over-voltage protection" in row["found"]
    assert not lab.truth.is_on


def test_an_outlet_is_switched_on_again_by_a_person_only(make_lab: MakeLab) -> None:
    lab = make_lab(outlet=True)
    assert lab.plug is not None
    with lab.powered() as (daemon, _, board):
        assert "B (outlet or relay" in str(daemon.doctor())
        assert board.power.outlet() is True
        with pytest.raises(UsageError, match="switch it off first"):
            board.power.outlet(False)
        board.power.off()
        assert board.power.outlet(False) is False
        rows = [row for row in daemon.doctor() if row["what"] == "channel 1: outlet"]
        assert [row["ok"] for row in rows] == [False]
        assert board.power.outlet(True) is True
        board.power.on()
        assert lab.truth.is_on
