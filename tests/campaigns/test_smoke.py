"""The smoke test a lab runs first on every board: `pytest tests/campaigns --bench FILE`.

It boots the board, runs a command on each of its ports and cuts its power in the middle of a boot. What a board lacks
by its bench file (a console, a port) is skipped and named.
"""

from __future__ import annotations

import pytest

from hil.client import Board
from hil.model import LinkState


def boot(board: Board) -> None:
    """From power on to a login prompt, within the time its board type gives it."""
    board.power.on()
    board.console.expect(board.type.boot.login, timeout_s=board.type.boot.timeout_s)


def needs(board: Board, *ports: str) -> None:
    for port in ports:
        if getattr(board.wires, port) is None:
            pytest.skip(f"board {board.name} has no {port} in its bench file")


def test_boots_and_answers_on_every_port(board: Board) -> None:
    needs(board, "console", "mgmt")
    boot(board)
    shell = board.reconnect(timeout_s=board.type.boot.timeout_s)
    done = shell.run(["uname", "-m"], timeout_s=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == board.type.arch
    supply = board.type.supply
    reading = board.power.read()
    assert reading.output_on
    assert supply.voltage_min_v <= reading.voltage_v <= supply.voltage_max_v
    assert 0 < reading.power_w <= supply.power_max_w

    needs(board, "payload")
    delay_s = 0.05
    board.link.set(LinkState(delay_s=delay_s, rate_bps=1e6))
    payload = board.payload_shell(timeout_s=30)
    try:
        done = payload.run(["cat", "/proc/sys/kernel/random/boot_id"], timeout_s=20, check=True)
        assert done.duration_s > 2 * delay_s, "the command went around the emulated link"
        assert done.stdout == shell.run(["cat", "/proc/sys/kernel/random/boot_id"], timeout_s=20, check=True).stdout
    finally:
        payload.abort()


def test_boots_after_a_power_cut_in_its_firmware(board: Board) -> None:
    needs(board, "console", "mgmt")
    board.power.on()
    board.console.expect(board.type.boot.firmware, timeout_s=board.type.boot.timeout_s)
    off = board.power.off()
    assert off.voltage_v < board.type.supply.off_voltage_v
    boot(board)
    uptime = board.reconnect(timeout_s=board.type.boot.timeout_s).run(["cat", "/proc/uptime"], timeout_s=20, check=True)
    assert 0 < float(uptime.stdout.split()[0]) < board.type.boot.timeout_s
