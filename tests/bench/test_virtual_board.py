"""The virtual board for real: two boots of one board behind supply and link box, a power cut in between."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
import pytest
from host import free_ports

from hil.drivers import broker
from hil.paths import cache_dir, runtime_dir
from hil.virtual import supervisor
from hil.virtual.inputs import InputWire
from hil.virtual.supervisor import BoardWire, VirtualBench

pytestmark = pytest.mark.xdist_group("boards")

BOOT_S = 60.0
ADDRESS = "10.42.0.2"


@dataclass
class Rig:
    """The bench with a plain SCPI socket and the console's device file: nothing of hil's drivers in between."""

    bench: VirtualBench
    console: int
    scpi: socket.socket
    heard: bytearray = field(default_factory=bytearray)

    def send(self, command: str) -> None:
        self.scpi.sendall(command.encode() + b"\n")

    def ask(self, command: str) -> str:
        self.send(command)
        answer = b""
        while not answer.endswith(b"\n"):
            answer += self.scpi.recv(4096)
        return answer.decode().strip()

    def watts(self) -> float:
        return float(self.ask(":MEAS:POWE? CH1"))

    def expect(self, pattern: bytes, timeout_s: float = BOOT_S) -> bytes:
        """Everything the console said up to and with `pattern`."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, bytes(self.heard))):
            assert time.monotonic() < deadline, f"no {pattern!r}; the console ends with {bytes(self.heard[-600:])!r}"
            if select.select([self.console], [], [], 0.2)[0]:
                self.heard += os.read(self.console, 65536)
        said = bytes(self.heard[: found.end()])
        del self.heard[: found.end()]
        return said

    def type(self, line: str) -> None:
        os.write(self.console, line.encode() + b"\r")

    def ssh(self, *, payload: bool) -> paramiko.SSHClient:
        """Logged in as root with the cache's key; the host key must be the pinned one."""
        client = paramiko.SSHClient()
        client.load_host_keys(str(self.bench.cache / "keys/known_hosts"))
        deadline = time.monotonic() + BOOT_S
        while True:
            port = 22 if payload else self.bench.boards[0].mgmt_port
            try:
                if payload:
                    sock = broker.connect(self.bench.broker_socket, ADDRESS, port, 5.0)
                else:
                    sock = socket.create_connection(("127.0.0.1", port), 5.0)
                client.connect(
                    ADDRESS if payload else "127.0.0.1",
                    port,
                    "root",
                    key_filename=str(self.bench.cache / "keys/id_ed25519"),
                    sock=sock,
                    allow_agent=False,
                    look_for_keys=False,
                    banner_timeout=10,
                )
                return client
            except (paramiko.BadHostKeyException, paramiko.AuthenticationException):
                raise
            except (OSError, EOFError, paramiko.SSHException):
                if time.monotonic() > deadline:
                    raise

    def run(self, command: str, *, payload: bool = False) -> str:
        with self.ssh(payload=payload) as client:
            _, stdout, stderr = client.exec_command(command, timeout=30)
            text = stdout.read().decode()
            assert stdout.channel.recv_exit_status() == 0, stderr.read().decode()
            return text


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    state = tmp_path_factory.mktemp("vboard")
    supply, box, mgmt = free_ports(3)
    runtime = runtime_dir(f"vboard-{os.getpid()}")
    boards = (BoardWire("vb1", (InputWire(1),), mgmt, payload_address=ADDRESS),)
    bench = VirtualBench("vboard", cache_dir(), state, runtime, boards, supply_port=supply, linkbox_mgmt_port=box)
    supervisor.up(bench)
    console = os.open(runtime / "vb1.console", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(console)
    with socket.create_connection(("127.0.0.1", supply)) as scpi:
        yield Rig(bench, console, scpi)
    os.close(console)
    supervisor.down(bench)
    assert not supervisor.status(bench)["running"]
    left = {path.name for path in runtime.iterdir()}
    assert left <= {"virtual.lock", "virtual.up.lock"}, left
    for path in runtime.iterdir():
        path.unlink()
    runtime.rmdir()


@pytest.fixture(scope="module")
def booted(rig: Rig) -> Rig:
    """The board after its first power-on, at its login prompt."""
    assert rig.watts() == 0.0
    assert supervisor.status(rig.bench)["boards"]["vb1"]["pid"] is None
    rig.send(":APPL CH1,15,2.5")
    rig.send(":OUTP CH1,ON")
    first = rig.expect(rb"U-Boot 20\d\d")
    assert re.fullmatch(rb"\s*U-Boot 20\d\d", first), first  # from the first byte
    rig.expect(rb"Starting kernel")
    assert rig.watts() > 6.0  # booting is work
    rig.expect(rb"vb1 login: ")
    return rig


def test_answers_on_both_ports_with_pinned_keys(booted: Rig) -> None:
    assert booted.run("uname -m; hostname").split() == ["aarch64", "vb1"]
    assert booted.run("echo $SSH_CONNECTION", payload=True).split()[2] == ADDRESS


def test_an_idle_board_draws_idle_power(booted: Rig) -> None:
    readings: list[float] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (len(readings) < 10 or sorted(readings[-10:])[5] > 6.0):
        readings.append(booted.watts())
        time.sleep(0.06)
    assert sorted(readings[-10:])[5] < 6.0, readings[-20:]
    assert min(readings) >= 4.9


def test_the_console_lets_its_holder_in(booted: Rig) -> None:
    booted.type("")
    booted.expect(rb"login: ")
    booted.type("root")
    booted.expect(rb"# ")
    booted.type("echo from-$(id -un)")
    booted.expect(rb"from-root")
    booted.type("exit")
    booted.expect(rb"login: ")


def test_every_listener_is_on_loopback(booted: Rig) -> None:
    found = supervisor.status(booted.bench)
    pids = {found["pid"], found["boards"]["vb1"]["pid"], *(p["pid"] for p in found["parts"].values() if "pid" in p)}
    rows = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [row.split()[3] for row in rows if pids & {int(pid) for pid in re.findall(r"pid=(\d+)", row)}]
    assert sorted(int(local.rsplit(":", 1)[1]) for local in ours) == sorted(booted.bench.ports())
    assert {local.rsplit(":", 1)[0] for local in ours} == {"127.0.0.1"}


def test_a_power_cut_is_a_kill_and_the_disk_keeps_what_was_synced(booted: Rig) -> None:
    rig = booted
    rig.run("echo kept > /var/lib/hil/kept && sync /var/lib/hil/kept /var/lib/hil && echo lost > /var/lib/hil/lost")
    pid = supervisor.status(rig.bench)["boards"]["vb1"]["pid"]
    handle = os.pidfd_open(pid)
    rig.send(":OUTP CH1,OFF")
    assert select.select([handle], [], [], 15.0)[0], "QEMU survived the power cut"
    os.close(handle)
    assert rig.watts() == 0.0

    rig.heard.clear()
    rig.send(":OUTP CH1,ON")
    rig.expect(rb"Hit any key to stop autoboot")
    rig.type("")
    rig.expect(rb"=> ")
    rig.type("setenv mark left-by-test; saveenv; boot")
    rig.expect(rb"vb1 login: ")
    assert b"mark=left-by-test" in (rig.bench.state / "vb1.env.img").read_bytes()[:0x40000]
    # the same link box, a new connection of the board to it
    assert rig.run("cat /var/lib/hil/kept; test -s /var/lib/hil/lost || echo gone", payload=True) == "kept\ngone\n"
    assert supervisor.status(rig.bench)["boards"]["vb1"]["power_on_count"] == 2


def test_a_killed_supervisor_leaves_no_process(booted: Rig) -> None:
    """Last: it ends the bench."""
    found = supervisor.status(booted.bench)
    children = [found["boards"]["vb1"]["pid"], *(p["pid"] for p in found["parts"].values() if "pid" in p)]
    assert len(children) == 3
    handles = [os.pidfd_open(pid) for pid in children]
    os.kill(found["pid"], signal.SIGKILL)
    for handle in handles:
        assert select.select([handle], [], [], 20.0)[0], "a child survived its supervisor"
        os.close(handle)
    assert not supervisor.status(booted.bench)["running"]
    for path in Path(booted.bench.runtime).iterdir():
        path.unlink()  # sockets of the dead
