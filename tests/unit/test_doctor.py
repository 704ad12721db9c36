"""The doctor's rows about the host, and about boards' ports: versions, clock, disk, who answers."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import hil
from hil import inventory
from hil.bench.doctor import Check, _planes, _supply
from hil.bench.host import ClockState, host_checks, kernel_clock
from hil.cli import doctor as cli_doctor
from hil.drivers.scpi import ScpiSupply
from hil.inventory.bench import BenchBoard
from hil.virtual.supply import VirtualSupply

ROOT = Path(__file__).resolve().parents[2]
DIPS = {
    "keysight-n6700": "its own list, 10 to 500 ms in steps of 0.001 ms; longer ones are metered as they go",
    "rs-hmp": "two writes, measured: its arbitrary sequence cannot be read back before it runs",
    "tti-cpx": "two writes, measured: it has no list that we know",
}


@pytest.mark.parametrize("name", sorted(DIPS))
def test_a_supply_says_how_it_dips_and_why_something_is_not_asked(name: str) -> None:
    async def ask() -> list[Check]:
        async with VirtualSupply(name) as virtual:
            supply = ScpiSupply(name, f"tcp://127.0.0.1:{virtual.port}")
            try:
                return await _supply("psu1", supply, name)
            finally:
                await supply.close()

    found = {check.what: check for check in asyncio.run(ask())}
    assert found["dips"].found.startswith(DIPS[name])
    assert found["dips"].ok is None
    told = found.get("CV or CC")
    assert (told.found if told else "").startswith("unknown: its limit register" if name == "tti-cpx" else "")
    assert (told is not None) == (name == "tti-cpx")


def test_a_virtual_bench_that_is_not_up_is_the_first_thing_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    virtual = inventory.load_bench(ROOT / "fixtures/benches/virtual.yaml")
    (row,) = cli_doctor._virtual(virtual)
    assert (row["what"], row["ok"]) == ("virtual bench", False)
    assert f"hil virtual up {virtual.path}" in row["found"]
    monkeypatch.setattr("hil.virtual.supervisor.status", lambda bench: {"running": True})
    assert cli_doctor._virtual(virtual)[0]["ok"] is True
    assert cli_doctor._virtual(inventory.load_bench(ROOT / "fixtures/benches/jetson-rigol.yaml")) == []


Usage = namedtuple("Usage", "total used free")


def rows(clock: ClockState | OSError, *directories: Path) -> dict[str, tuple[bool | None, str]]:
    def asked() -> ClockState:
        if isinstance(clock, OSError):
            raise clock
        return clock

    return {what: (ok, found) for what, ok, found in host_checks(directories or [Path.cwd()], asked)}


def test_the_kernel_says_what_it_thinks_of_its_clock() -> None:
    state = kernel_clock()
    assert 0 < state.error_s < 20  # the kernel gives up at 16 s

    def says(timex: Any, state: int) -> int:
        timex.maxerror = 2500
        return state

    assert kernel_clock(lambda timex: says(timex, 0)) == ClockState(True, 0.0025)
    assert kernel_clock(lambda timex: says(timex, 5)) == ClockState(False, 0.0025)
    with pytest.raises(OSError, match="adjtimex"):
        kernel_clock(lambda timex: -1)


@pytest.mark.parametrize(
    ("clock", "says"),
    [
        (ClockState(True, 0.0012), "synchronised, within 1.2 ms"),
        (ClockState(False, 16.0), "not synchronised: "),
        (PermissionError(1, "adjtimex"), "not known to be synchronised: "),
    ],
)
def test_the_clock_is_told_and_stops_nothing(clock: ClockState | OSError, says: str) -> None:
    ok, found = rows(clock)["clock"]
    assert ok is None
    assert found.startswith(says)


def test_the_fullest_disk_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = {tmp_path: 5e8, Path("/"): 5e12}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e13, 0, free[path]))
    assert rows(ClockState(True, 0.1), tmp_path, Path("/"))["disk space"] == (False, f"0.5 GB free in {tmp_path}")
    free[tmp_path] = 2e9
    assert rows(ClockState(True, 0.1), tmp_path, Path("/"))["disk space"][0] is True
    assert f"hil {hil.__version__}, Python 3." in rows(ClockState(True, 0.1), tmp_path)["versions"][1]


def board(tmp_path: Path, port: int) -> BenchBoard:
    ssh = {"address": "127.0.0.1", "port": port, "key": tmp_path / "key", "known_hosts": tmp_path / "known_hosts"}
    return BenchBoard.model_validate(
        {
            "type": "x",
            "power": [{"supply": "psu1", "channel": 1}],
            "mgmt": ssh,
            "payload": {**ssh, "link": "box1", "broker": tmp_path / "broker.sock"},
        }
    )


def test_a_boards_ports_are_asked_only_when_it_is_on(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        wires = board(tmp_path, server.getsockname()[1])

        def answer() -> None:
            client, _ = server.accept()
            client.sendall(b"SSH-2.0-test\r\n")
            client.close()

        threading.Thread(target=answer, daemon=True).start()
        found = {check.what: check for check in _planes("b1", wires, True)}
        assert found["mgmt"].ok is True
        assert "SSH-2.0-test" in found["mgmt"].found
        assert found["payload broker"].ok is False
        assert found["pinned host keys"].ok is False
        found = {check.what: check for check in _planes("b1", wires, False)}
        assert (found["mgmt"].ok, found["mgmt"].found) == (None, "not asked: the board is off")
    found = {check.what: check for check in _planes("b1", wires, True)}
    assert found["mgmt"].ok is False
    assert "refused" in found["mgmt"].found
