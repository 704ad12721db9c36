"""SSH through a bench on another host: bytes under the lease, keys and pinned host keys at the client."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import emulated_line
import pytest
import sshd
from host import free_ports
from sshd import Sshd
from test_daemon import Lab, until
from test_remote import changed, opened

from hil.client import Bench, Board, attach
from hil.client.remote import Address, load_remote, ssh_stream
from hil.drivers import broker
from hil.drivers.ssh import Detached, ShellTimeout, get, host_key, pin, put
from hil.errors import BenchError, BoardError, HilError, UsageError
from hil.model import LinkState

HIL = [str(Path(sys.executable).parent / "hil")]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


def wired(lab: Lab, port: int) -> None:
    """Give b1 an SSH port of this host. Key and pins of the bench file are the bench host's: nobody here has them."""
    wire = f"{{address: 127.0.0.1, port: {port}, user: board, key: /nowhere/id, known_hosts: /nowhere/known_hosts}}"
    changed(lab, "b1: {", f"b1: {{mgmt: {wire}, ")


@pytest.fixture
def url(lab: Lab, server: Sshd, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bench as anna sees it, who has a key of the board."""
    wired(lab, server.port)
    monkeypatch.setenv("HIL_BENCH_KEY", str(server.key))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return opened(lab, monkeypatch)


def trusted(server: Sshd, known_hosts: Path, key_of: Sshd | None = None) -> None:
    """Pin the board's host key on the client."""
    pin(known_hosts, "127.0.0.1", server.port, host_key((key_of or server).login), replace=True)


@pytest.fixture
def far(url: str, server: Sshd) -> Iterator[Bench]:
    bench = load_remote(url)
    wire = bench.file.boards["b1"].mgmt
    assert wire is not None
    trusted(server, wire.known_hosts)
    with attach(bench) as daemon:
        yield daemon


def test_shell_and_files_of_a_board_from_another_host(far: Bench, tmp_path: Path) -> None:
    with far.lease(["b1"]) as lease:
        board = far.board("b1", lease)
        assert board.shell.run(["printf", "%s|", "a b", "$HOME"], 10).stdout == "a b|$HOME|"
        assert board.shell.run(["sh", "-c", "head -c 3000000 /dev/zero"], 20).stdout == "\0" * 3_000_000
        source, target, back = tmp_path / "source", tmp_path / "target", tmp_path / "back"
        source.write_bytes(random.Random(1).randbytes(5_000_000))
        put(board.shell, source, str(target))
        assert target.read_bytes() == source.read_bytes()
        get(board.shell, str(target), back)
        assert back.read_bytes() == source.read_bytes()
        process = board.shell.start(["cat"])
        process.write(b"there and back", 5)
        assert process.read(5) == b"there and back"
        process.kill()


def test_the_command_line_from_another_host(url: str, server: Sshd, tmp_path: Path) -> None:
    def hil(*words: str, fails: str = "") -> str:
        done = subprocess.run([*HIL, *words, "--bench", url], capture_output=True, text=True, timeout=60, check=False)
        assert fails in done.stderr if fails else done.returncode == 0, done.stderr
        return done.stdout

    hil("board", "trust", "b1", "--yes", fails="board b1 is not leased by this user")
    hil("lease", "acquire", "b1")
    hil("board", "put", "--board", "b1", str(server.key), "x", fails="hil board trust")
    seen = host_key(server.login).fingerprint
    assert seen in hil("board", "trust", "b1", "--fingerprint", seen)
    source = tmp_path / "file"
    source.write_bytes(b"data")
    hil("board", "put", "--board", "b1", str(source), str(tmp_path / "there"))
    assert (tmp_path / "there").read_bytes() == b"data"
    if sshd_has_client():
        assert hil("board", "ssh", "--board", "b1", "echo 'a  b'; cat " + str(tmp_path / "there")) == "a  b\ndata"
    hil("lease", "release", "b1")
    hil("board", "put", "--board", "b1", str(source), "x", fails="not leased by this user")


def sshd_has_client() -> bool:
    return any(os.access(Path(folder) / "ssh", os.X_OK) for folder in os.get_exec_path())


@pytest.fixture
def payload(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Bench, Path]]:
    """The bench from afar, and its payload broker: the board's server is behind that, in another namespace."""
    directory = tmp_path_factory.mktemp("board")
    with contextlib.ExitStack() as stack:
        try:
            line = stack.enter_context(emulated_line.line())
        except BenchError as error:
            pytest.skip(f"no network namespaces here: {error.message}")
        line.link.close()  # the daemon owns it from here
        inside, ground = line.inside, line.ground
        board = stack.enter_context(sshd.serve(directory, address=emulated_line.BOARD, inside=inside, broker=ground))
        at = f"address: {board.address}, port: {board.port}, user: board, key: /nowhere/id, known_hosts: /nowhere/known"
        changed(
            lab, "boards:\n", f"links: {{air: {{driver: user-space, address: 'unix://{line.control}'}}}}\nboards:\n"
        )
        changed(lab, "b1: {", f"b1: {{payload: {{{at}, link: air, broker: {ground}}}, ")
        monkeypatch.setenv("HIL_BENCH_KEY", str(board.key))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        bench = load_remote(opened(lab, monkeypatch))
        wire = bench.file.boards["b1"].payload
        assert wire is not None
        pin(wire.known_hosts, board.address, board.port, host_key(board.login, broker=ground), replace=True)
        yield stack.enter_context(attach(bench)), ground
        with lab.attach() as local:
            local.stop(force=True)  # before its link and its board go


def test_the_payload_port_from_another_host_goes_through_the_link(
    payload: tuple[Bench, Path], lab: Lab, tmp_path: Path
) -> None:
    far, ground = payload
    before = broker.counters(ground)["ground0"]
    lease = far.lease(["b1"])
    board = far.board("b1", lease)
    shell = board.payload_shell()
    assert shell.run(["printf", "%s|", "a b"], 10).stdout == "a b|"
    source, target, back = tmp_path / "source", tmp_path / "target", tmp_path / "back"
    source.write_bytes(random.Random(2).randbytes(2_000_000))
    put(shell, source, str(target))
    get(shell, str(target), back)
    assert back.read_bytes() == source.read_bytes()
    after = broker.counters(ground)["ground0"]
    assert all(after[name] - before[name] > 2_000_000 for name in ("tx_bytes", "rx_bytes")), "not through the namespace"
    board.link.set(LinkState(delay_s=0.3))
    began = time.monotonic()
    assert shell.run(["true"], 20).returncode == 0
    assert time.monotonic() - began > 0.6, "up and down the link"
    board.link.set(LinkState(outage=True))
    with pytest.raises(ShellTimeout):
        shell.run(["true"], 0.5)
    board.link.clear()
    with lab.attach() as local:
        again = board.payload_shell()
        stream = ssh_stream(Address.of(far.inventory.url or ""), "b1", "payload", lease.token, 10)
        assert stream.recv(4) == b"SSH-"
        with local.lease(["b1"], preempt=True, reason="it is somebody's turn"):
            stream.settimeout(10)
            with contextlib.suppress(ConnectionError):
                while stream.recv(4096):
                    pass
            until(lambda: not again.alive)
            with pytest.raises(BenchError, match="somebody's turn"):
                board.payload_shell()
        stream.close()


def test_a_whole_run_through_a_jump_host_of_the_bench_and_of_another_host(
    lab: Lab, server: Sshd, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The board's own server is reached through another one, on this host and through the bench from afar."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with sshd.serve(tmp_path_factory.mktemp("gate")) as gate:
        known = tmp_path / "known_hosts"
        pin(known, "127.0.0.1", gate.port, host_key(gate.login))
        pin(known, "127.0.0.1", server.port, host_key(server.login))
        # One key opens both, as where somebody's key is on all machines of a lab.
        (Path(gate.key).parent / "id.pub").write_bytes((Path(server.key).parent / "id.pub").read_bytes())
        at = f"address: 127.0.0.1, user: board, key: {server.key}, known_hosts: {known}"
        wire = f"{{{at}, port: {server.port}, jump: [{{{at}, port: {gate.port}}}]}}"
        changed(lab, "b1: {", f"b1: {{mgmt: {wire}, ")
        url = opened(lab, monkeypatch)
        with lab.attach() as here, here.lease(["b1"]) as lease:
            drive(here.board("b1", lease), tmp_path / "here")
        monkeypatch.setenv("HIL_BENCH_KEY", str(server.key))
        bench = load_remote(url)
        mgmt = bench.file.boards["b1"].mgmt
        assert mgmt is not None
        shutil.copy(known, mgmt.known_hosts)
        with attach(bench) as far, far.lease(["b1"]) as lease:
            drive(far.board("b1", lease), tmp_path / "far")
        accepted = gate.log.read_text().count("Accepted publickey for board")
        assert accepted >= 4, "two connections each"


def drive(board: Board, directory: Path) -> None:
    """What a test of a lab does: power, commands, files, a job that outlives the connection."""
    directory.mkdir()
    board.power.on()
    assert board.shell.run(["printf", "%s", "a b"], 10).stdout == "a b"
    source, target, back = directory / "source", directory / "target", directory / "back"
    source.write_bytes(random.Random(3).randbytes(500_000))
    put(board.shell, source, str(target))
    job = Detached.start(board.shell, ["sh", "-c", "sleep 0.3; echo done"], str(directory / "job"))
    board.reconnect(20)
    assert job.wait(board.shell, 20).stdout == "done\n"
    get(board.shell, str(target), back)
    assert back.read_bytes() == source.read_bytes()
    board.power.off()


def test_a_hand_over_in_mid_stream_ends_the_stream(far: Bench, lab: Lab) -> None:
    lease = far.lease(["b1"])
    board = far.board("b1", lease)
    shell = board.shell
    said: list[HilError] = []
    ended: list[float] = []

    def work() -> None:
        try:
            shell.run(["sleep", "60"], 60)
        except HilError as error:
            said.append(error)
            ended.append(time.monotonic())

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    with lab.attach() as local:
        took = time.monotonic()
        with local.lease(["b1"], preempt=True, reason="release tonight"):
            thread.join(30)
            assert ended[0] - took < 30.0  # and the command takes 60
            assert "release tonight" in str(said[0])
            assert not shell.alive
            with pytest.raises(BenchError, match="release tonight"):
                board.reconnect(2)


def test_only_the_holder_of_a_lease_gets_a_stream(far: Bench, url: str) -> None:
    address = Address.of(url)
    with far.lease(["b2"]) as other:
        for token, says in (("guess", "lease"), (other.token, "not for board b1")):
            with pytest.raises(BenchError, match=says):
                ssh_stream(address, "b1", "mgmt", token, 5)
    lease = far.lease(["b1"])
    with pytest.raises(UsageError, match="b1 has no payload port"):
        ssh_stream(address, "b1", "payload", lease.token, 5)
    with pytest.raises(UsageError, match="no board 'b9'"):
        ssh_stream(address, "b9", "mgmt", lease.token, 5)
    with ssh_stream(address, "b1", "mgmt", lease.token, 5) as stream:
        assert stream.recv(4) == b"SSH-"
        lease.release()
        stream.settimeout(15)
        while stream.recv(4096):
            pass
    with pytest.raises(BenchError, match="was released"):
        ssh_stream(address, "b1", "mgmt", lease.token, 5)


def test_the_host_key_is_checked_by_the_client(
    far: Bench, server: Sshd, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wire = far.inventory.file.boards["b1"].mgmt
    assert wire is not None
    with sshd.serve(tmp_path_factory.mktemp("other")) as other:
        trusted(server, wire.known_hosts, key_of=other)
    with far.lease(["b1"]) as lease, pytest.raises(BenchError, match="another host key than the one pinned in"):
        far.board("b1", lease).reconnect(5)
    wire.known_hosts.unlink()
    with far.lease(["b1"]) as lease, pytest.raises(BenchError, match="hil board trust"):
        far.board("b1", lease).reconnect(5)


def test_a_lease_ends_a_stream_to_a_board_that_takes_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        wired(lab, deaf.getsockname()[1])
        url = opened(lab, monkeypatch)
        with attach(load_remote(url)) as daemon:
            lease = daemon.lease(["b1"])
            stream = ssh_stream(Address.of(url), "b1", "mgmt", lease.token, 5)
            peer, _ = deaf.accept()
            stream.settimeout(1.0)
            with pytest.raises(TimeoutError):
                stream.sendall(bytes(64 << 20))
            lease.release()
            with contextlib.suppress(ConnectionError):
                stream.settimeout(15.0)
                assert stream.recv(1) == b""
            peer.settimeout(15.0)
            with contextlib.suppress(ConnectionError):
                while peer.recv(1 << 20):
                    pass
            peer.close()


def test_a_board_that_does_not_answer_is_the_boards_fault(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    wired(lab, port)
    url = opened(lab, monkeypatch)
    with (
        attach(load_remote(url)) as daemon,
        daemon.lease(["b1"]) as lease,
        pytest.raises(BoardError, match=f"nothing answers at 127.0.0.1 port {port}: .*refused"),
    ):
        daemon.board("b1", lease).reconnect(2.0)
    with lab.attach() as local:
        local.stop()
    with pytest.raises(BenchError, match="no bench daemon answers on https"):
        ssh_stream(Address.of(url), "b1", "mgmt", "x", 5)
