"""The emulated board as a lab without a management port has it: U-Boot, shell, files and shutdown over the console."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from benches import assert_off, stop_daemon

from hil.client import Board, attach
from hil.client.console_shell import ConsoleShell
from hil.inventory import Bench, load_bench

pytestmark = [pytest.mark.soak, pytest.mark.xdist_group("boards")]

SHUTDOWN_S = 40


@contextmanager
def rewired(lab: Bench, directory: Path, name: str, **change: Any) -> Iterator[Bench]:
    """The same supply, box and board under another bench file; `change` is of the board's wires, None takes one out."""
    content = yaml.safe_load(lab.path.read_text())
    del content["virtual"]
    content["name"] = name
    text = yaml.safe_dump(content).replace("${runtime}", str(lab.runtime_dir))
    content = yaml.safe_load(text)
    wires = content["boards"]["vb1"] | {"on_lease_end": {"shutdown_then_off": {"timeout_s": SHUTDOWN_S}}} | change
    content["boards"]["vb1"] = {wire: value for wire, value in wires.items() if value is not None}
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    stop_daemon(lab)  # a console and a supply have one owner
    bench = load_bench(path)
    try:
        yield bench
    finally:
        stop_daemon(bench)


def how_it_ended(bench: Bench) -> str:
    """The daemon's word on how the board was shut down."""
    lines = (bench.state_dir / "daemon.log").read_text().splitlines()
    return next(line for line in reversed(lines) if "shut down" in line or "shut it down" in line)


def boot_through_uboot(board: Board) -> None:
    """Stop the firmware, ask it something under its own shell, and let it boot."""
    board.power.on()
    board.console.uboot(timeout_s=board.type.boot.timeout_s)
    assert board.console.uboot_run("setenv hil 'a b'; echo $hil").stdout.strip() == "a b"
    assert board.console.uboot_run("false").returncode == 1
    board.console.type("boot")
    board.console.expect(board.type.boot.login, timeout_s=board.type.boot.timeout_s)


def test_a_board_without_a_management_port_is_driven_over_its_console(lab: Bench, tmp_path: Path) -> None:
    source = tmp_path / "noise.bin"
    source.write_bytes(random.Random(5).randbytes(20_000))
    with rewired(lab, tmp_path, "serial", mgmt=None) as bench, attach(bench) as daemon:
        with daemon.lease(["vb1"]) as lease:
            board = daemon.board("vb1", lease)
            boot_through_uboot(board)
            shell = board.reconnect(timeout_s=board.type.boot.timeout_s)
            assert isinstance(shell, ConsoleShell)
            assert shell.run(["uname", "-m"], timeout_s=20, check=True).stdout == "aarch64\n"
            assert shell.run(["sh", "-c", "printf '%s' \"$1\"; exit 3", "x", "a  b'\"$HOME"], 20).returncode == 3
            chatter = shell.start(["sh", "-c", "for i in $(seq 300); do echo line $i >/dev/kmsg; done; echo said"])
            shell.put(source, "/root/noise.bin")
            told = shell.run(["sha256sum", "/root/noise.bin"], timeout_s=20, check=True).stdout
            assert told.split()[0] == hashlib.sha256(source.read_bytes()).hexdigest()
            assert shell.get("/root/noise.bin") == source.read_bytes()
            assert chatter.wait(30).stdout.strip() == "said"
            with closing(shell.forward("127.0.0.1", 22)) as stream:
                assert stream.recv(8) == b"SSH-2.0-"
        assert "over its console" in how_it_ended(bench)
        assert f"after {SHUTDOWN_S}" not in how_it_ended(bench), "the console's last words were not recognised"
    assert_off(lab)


def test_a_lease_that_ends_shuts_the_board_down_over_its_management_port(lab: Bench, tmp_path: Path) -> None:
    with rewired(lab, tmp_path, "managed") as bench, attach(bench) as daemon:
        with daemon.lease(["vb1"]) as lease:
            board = daemon.board("vb1", lease)
            board.power.on()
            board.console.expect(board.type.boot.login, timeout_s=board.type.boot.timeout_s)
            shell = board.reconnect(timeout_s=board.type.boot.timeout_s)
            shell.run(["sh", "-c", "echo kept >/root/unsynced"], timeout_s=20, check=True)
        assert "shut down over its management port within" in how_it_ended(bench)
        assert_off(lab)
        with daemon.lease(["vb1"]) as lease:
            board = daemon.board("vb1", lease)
            board.power.on()
            shell = board.reconnect(timeout_s=board.type.boot.timeout_s)
            kept = shell.run(["cat", "/root/unsynced"], timeout_s=20, check=True).stdout
            assert kept == "kept\n", "an orderly shutdown loses nothing that was written"
    assert_off(lab)
