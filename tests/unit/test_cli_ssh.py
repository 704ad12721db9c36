"""`hil board ssh|trust|put|get` against a real OpenSSH server."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sshd as openssh
from sshd import Sshd

import hil.cli
import hil.cli.lease
import hil.client
from hil.cli.ssh import _opener, _shell
from hil.client.http import DaemonGone
from hil.drivers.ssh import host_key, pin, pinned
from hil.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]
BENCH = """
schema: 1
name: lab
board_types: {types}
supplies: {{psu: {{driver: scpi, dialect: rigol-dp800, address: "tcp://127.0.0.1:1"}}}}
boards:
  b1:
    type: virtual-arm64
    power: [{{supply: psu, channel: 1}}]
    mgmt: {{address: 127.0.0.1, port: {port}, user: {user}, key: {key}, known_hosts: {known}}}
  b2:
    type: virtual-arm64
    power: [{{supply: psu, channel: 2}}]
    mgmt:
      address: 127.0.0.1
      port: {port}
      user: {user}
      key: {key}
      known_hosts: {known}2
      jump: [{{address: 127.0.0.1, port: {port}, user: {user}, key: {key}, known_hosts: {known}}}]
"""


@pytest.fixture
def known(server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bench's known_hosts, empty at first; HIL_BENCH is set."""
    path = tmp_path / "known_hosts"
    text = BENCH.format(types=ROOT / "boards", port=server.port, user=openssh.USER, key=server.key, known=path)
    (tmp_path / "bench.yaml").write_text(text)
    monkeypatch.setenv("HIL_BENCH", str(tmp_path / "bench.yaml"))
    return path


def run(*arguments: str | Path) -> int:
    return hil.cli.run([str(argument) for argument in arguments])


def test_trust_wants_somebody_to_ask(server: Sshd, known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("board", "trust", "b1") == ExitCode.USAGE
    printed = capsys.readouterr()
    assert host_key(server.login).fingerprint in printed.out
    assert "--fingerprint" in printed.err
    assert not known.exists()


def test_trust_pins_the_key_with_the_right_fingerprint_only(
    server: Sshd, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = host_key(server.login)
    assert run("board", "trust", "b1", "--fingerprint", "SHA256:wrong") == ExitCode.BENCH
    assert not known.exists()
    assert run("board", "trust", "b1", "--fingerprint", key.fingerprint) == 0
    assert pinned(known, "127.0.0.1", server.port) == (key,)
    assert run("board", "trust", "b1") == 0  # nothing to ask: it is the same key
    assert "already pinned" in capsys.readouterr().out


def test_trust_asks_before_it_goes_through_a_jump_host(server: Sshd, known: Path) -> None:
    assert run("board", "trust", "b2", "--yes") == 0
    for path in (known, known.with_name(f"{known.name}2")):
        assert pinned(path, "127.0.0.1", server.port) == (host_key(server.login),)


def test_trust_replaces_a_key_only_when_told(server: Sshd, known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "AAAAC3NzaC1lZDI1NTE5AAAAIJfyL8vbgBLtHTPwOHiJ0cNnTUMMPPvBeRkXzJzoFaRO"
    known.write_text(f"[127.0.0.1]:{server.port} ssh-ed25519 {other}\n")
    assert run("board", "trust", "b1", "--yes") == ExitCode.USAGE
    assert "--replace" in capsys.readouterr().err
    assert run("board", "trust", "b1", "--yes", "--replace") == 0
    assert pinned(known, "127.0.0.1", server.port) == (host_key(server.login),)


@pytest.mark.parametrize("board", ["b1", "b2"])
def test_the_openssh_command_gets_in_and_keeps_words_apart(
    server: Sshd, known: Path, board: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("board", "trust", board, "--yes") == 0
    ran: list[str] = []

    def execute(program: str, argv: list[str]) -> None:
        done = subprocess.run([program, "-F", "none", *argv[1:]], capture_output=True, text=True, check=False)
        ran.append(done.stdout or done.stderr)

    monkeypatch.setattr(os, "execvp", execute)
    run("board", "ssh", "--board", board, "--", "printf", "<%s>", "a b", "$HOME", "*")
    run("board", "ssh", "--board", board, "--", "echo one | tr o 0")
    assert ran == ["<a b><$HOME><*>", "0ne\n"]


@pytest.fixture
def leased(server: Sshd, known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is not there: its board has a real shell."""
    pin(known, "127.0.0.1", server.port, host_key(server.login))

    @contextlib.contextmanager
    def attach(_: object) -> Iterator[SimpleNamespace]:
        with server.connect(timeout_s=10) as shell:
            yield SimpleNamespace(board=lambda name, lease: SimpleNamespace(shell=shell))

    monkeypatch.setattr(hil.client, "attach", attach)
    monkeypatch.setattr(hil.cli.lease, "held_lease", lambda *_: contextlib.nullcontext(SimpleNamespace(ttl_s=3600.0)))


@pytest.mark.usefixtures("leased")
def test_files_go_there_and_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, there, here = tmp_path / "a file", tmp_path / "board", tmp_path / "here"
    source.write_bytes(os.urandom(300_000))
    there.mkdir()
    here.mkdir()
    assert run("board", "put", "--board", "b1", source, f"{there}/") == 0
    assert (there / "a file").read_bytes() == source.read_bytes()
    assert run("board", "get", "--board", "b1", there / "a file", here) == 0
    assert (here / "a file").read_bytes() == source.read_bytes()
    assert "300000 bytes" in capsys.readouterr().out
    assert run("board", "get", "--board", "b1", there / "nothing", here) == ExitCode.FAIL


def test_a_plane_that_is_not_wired_is_told(known: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("board", "put", "--board", "b1", "--plane", "payload", __file__, "x") == ExitCode.USAGE
    assert "no payload port" in capsys.readouterr().err


class KeptLease:
    """A lease that ends unless it is renewed; the first call of all is lost on its way."""

    ttl_s = 0.06

    def __init__(self) -> None:
        self.renewed = 0

    def renew(self) -> None:
        self.renewed += 1
        if self.renewed == 1:
            raise DaemonGone("nobody answers")


@pytest.mark.parametrize("way", ["opener", "shell"])
def test_a_long_session_keeps_its_lease(known: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    lease = KeptLease()
    held = SimpleNamespace(opener=lambda plane: None, shell=None)
    client = SimpleNamespace(board=lambda name, lease: held)
    monkeypatch.setattr(hil.client, "attach", lambda bench: contextlib.nullcontext(client))
    monkeypatch.setattr(hil.cli.lease, "held_lease", lambda *what: contextlib.nullcontext(lease))
    bench: Any = SimpleNamespace(url="https://far")
    with _opener(bench, "b1", "mgmt") if way == "opener" else _shell(os.environ["HIL_BENCH"], "b1", "mgmt"):
        deadline = time.monotonic() + 20
        while lease.renewed < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    seen = lease.renewed
    time.sleep(0.1)
    assert lease.renewed <= seen + 1
