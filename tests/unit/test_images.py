"""Artefacts of the virtual bench: whole or absent, offline, pinned; no network and no emulator needed."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from hil.errors import BenchError, UsageError
from hil.virtual import artefacts, images
from hil.virtual.board import BoardConfig, VirtualBoard, payload_mac, prepare, process_cpu_s, qemu_argv
from hil.virtual.inputs import InputWire
from hil.virtual.supervisor import BoardWire, VirtualBench, status, up


def quiet(_: str) -> None:
    """A progress callback that says nothing."""


def test_a_build_happens_once_and_again_when_the_recipe_changes(tmp_path: Path) -> None:
    made: list[int] = []

    def build(version: int) -> Path:
        def make(directory: Path) -> None:
            made.append(version)
            (directory / "image").write_text(str(version))

        return artefacts.build(tmp_path, "disk", {"version": version}, make, quiet)

    first, again, second = build(1), build(1), build(2)
    assert made == [1, 2]
    assert first == again != second
    assert ((first / "image").read_text(), (second / "image").read_text()) == ("1", "2")


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        (directory / "image").write_text("half")
        raise BenchError("download failed")

    with pytest.raises(BenchError, match="download failed"):
        artefacts.build(tmp_path, "disk", {}, make, quiet)
    assert [path.name for path in (tmp_path / "images").iterdir()] == [".disk.lock"]


def test_a_build_killed_in_the_middle_is_never_used(tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
from hil.virtual import artefacts
def make(directory):
    (directory / "image").write_text("half")
    print("busy", flush=True)
    time.sleep(60)
artefacts.build(Path({str(tmp_path)!r}), "disk", {{}}, make, lambda _: None)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == b"busy\n"
        builder.send_signal(signal.SIGKILL)
    assert list((tmp_path / "images").glob("disk-*")) == []
    done = artefacts.build(tmp_path, "disk", {}, lambda d: (d / "image").write_text("whole") and None, quiet)
    assert (done / "image").read_text() == "whole"
    assert list((tmp_path / "images").glob(".*.partial")) == []


def test_a_second_builder_waits_and_takes_the_first_ones_result(tmp_path: Path) -> None:
    busy, finish, made, said = threading.Event(), threading.Event(), [], []

    def make(directory: Path) -> None:
        made.append(1)
        busy.set()
        finish.wait(5)

    def wait_message(text: str) -> None:
        said.append(text)
        finish.set()

    first = threading.Thread(target=artefacts.build, args=(tmp_path, "disk", {}, make, quiet))
    first.start()
    assert busy.wait(5)
    artefacts.build(tmp_path, "disk", {}, make, wait_message)
    first.join()
    assert made == [1]
    assert said == ["disk: waiting for another build of it"]


def test_a_full_disk_is_a_bench_error_that_says_where(tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BenchError, match=f"disk full while building disk.*{tmp_path}") as caught:
        artefacts.build(tmp_path, "disk", {}, make, quiet)
    assert "XDG_CACHE_HOME" in caught.value.hint


def test_a_missing_program_names_its_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "find_tool", lambda name: None if "qemu" in name else "/bin/true")
    with pytest.raises(UsageError, match="qemu-system-aarch64") as caught:
        artefacts.require_tools("qemu-system-aarch64", "tar")
    assert caught.value.hint.endswith("qemu-system-arm")


def test_third_party_and_disabled_sources_are_left_out() -> None:
    text = """
Types: deb deb-src
# a comment
URIs: http://mirror/debian
Suites: bookworm bookworm-updates
Components: main
Architectures: amd64
Signed-By: /k.gpg

Types: deb
URIs: http://other/node
Suites: nodistro
Components: main

Enabled: no
Types: deb
URIs: http://mirror/debian
Suites: bookworm-security
Components: main
"""
    kept = artefacts.parse_sources(text, "bookworm")
    assert kept == [
        "types: deb\nuris: http://mirror/debian\nsuites: bookworm bookworm-updates\ncomponents: main\n"
        "signed-by: /k.gpg\n"
    ]
    lines = (
        "deb [arch=amd64 signed-by=/k.gpg] http://m/debian bookworm main contrib # x\ndeb http://g cloud-bookworm main"
    )
    assert artefacts.parse_list(lines, "bookworm") == [
        "types: deb\nuris: http://m/debian\nsuites: bookworm\ncomponents: main contrib\nsigned-by: /k.gpg\n"
    ]


def test_packages_come_from_the_offline_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "offline"
    (folder / "wheels").mkdir(parents=True)
    (folder / "debs").mkdir()
    for name, depends in (("hil-one", "hil-two (>= 1)"), ("hil-two", "")):
        tree = tmp_path / name
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "usr/share").mkdir(parents=True)
        (tree / "usr/share" / name).write_text(name)
        control = f"Package: {name}\nVersion: 1:2.0\nArchitecture: arm64\nMaintainer: x <x@y>\nDescription: x\n"
        (tree / "DEBIAN/control").write_text(control + (f"Depends: {depends}\n" if depends else ""))
        subprocess.run(["dpkg-deb", "-b", "-Znone", tree, folder / "debs"], check=True, capture_output=True)
    artefacts.index_debs(folder / "debs")
    monkeypatch.setenv("HIL_OFFLINE", str(folder))
    debs = artefacts.fetch_debs(tmp_path / "cache", ["hil-one"], "arm64", quiet)
    assert {path.name for path in debs.files} == {"hil-one_1%3a2.0_arm64.deb", "hil-two_1%3a2.0_arm64.deb"}
    artefacts.merged_usr(tmp_path / "tree")
    artefacts.unpack_debs(debs.files, tmp_path / "tree")
    assert (tmp_path / "tree/usr/share/hil-two").read_text() == "hil-two"
    with pytest.raises(BenchError, match="hil-three"):
        artefacts.fetch_debs(tmp_path / "cache", ["hil-three"], "arm64", quiet)


def test_offline_folder_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIL_OFFLINE", str(tmp_path))
    with pytest.raises(UsageError, match="wheels/ and debs/"):
        artefacts.offline_dir()


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "offline"
    (folder / "wheels").mkdir(parents=True)
    (folder / "debs").mkdir()
    (folder / "wheels/hil_thing-1.0-py3-none-any.whl").write_bytes(b"tampered")
    monkeypatch.setenv("HIL_OFFLINE", str(folder))
    with pytest.raises(BenchError, match=r"(?i)hash"):
        artefacts.fetch_wheel(tmp_path / "cache", artefacts.Wheel("hil-thing", "1.0", "0" * 64), quiet)


def test_initramfs_unpacks_as_it_was_packed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/tool").write_bytes(b"x" * 1001)
    (tree / "bin/tool").chmod(0o755)
    (tree / "bin/sh").symlink_to("tool")
    artefacts.write_initramfs(tree, tmp_path / "initrd")
    packed = zlib.decompress((tmp_path / "initrd").read_bytes(), 31)
    listing = subprocess.run(["cpio", "-itvn", "--quiet"], input=packed, capture_output=True, check=True).stdout
    rows = [line.split() for line in listing.decode().splitlines()]
    assert {row[-1]: row[0] for row in rows if "->" not in row} == {
        "bin": "drwxr-xr-x",
        "bin/tool": "-rwxr-xr-x",
        "dev": "drwxr-xr-x",
        "dev/console": "crw-------",
        "dev/null": "crw-rw-rw-",
    }
    assert {row[2] for row in rows} == {"0"}
    assert any(row[-3:] == ["bin/sh", "->", "tool"] for row in rows)


def test_kernel_modules_come_after_what_they_need(tmp_path: Path) -> None:
    directory = tmp_path / "lib/modules/6.1/kernel"
    directory.mkdir(parents=True)
    for name, needs in (("virtio_net", "net_failover,virtio"), ("net_failover", "failover"), ("failover", "")):
        (directory / f"{name}.ko").write_bytes(b"\x7fELF\0depends=" + needs.encode() + b"\0")
    (directory.parent / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    order = artefacts.copy_modules(tmp_path, ["virtio-net"], tmp_path / "out")
    assert order == ["failover.ko", "net_failover.ko", "virtio_net.ko"]
    with pytest.raises(BenchError, match="no module ext9"):
        artefacts.copy_modules(tmp_path, ["ext9"], tmp_path / "out")


def test_host_keys_are_pinned_and_replaced(tmp_path: Path) -> None:
    old, new = artefacts.ssh_key(tmp_path, "a"), artefacts.ssh_key(tmp_path, "b")
    assert old == artefacts.ssh_key(tmp_path, "a")
    assert old.stat().st_mode & 0o777 == 0o600
    artefacts.trust_host(tmp_path, "10.42.0.2", 22, old)
    artefacts.trust_host(tmp_path, "127.0.0.1", 15022, old)
    known = artefacts.trust_host(tmp_path, "127.0.0.1", 15022, new)
    blob = {path: path.with_suffix(".pub").read_text().split()[1] for path in (old, new)}
    assert known.read_text().splitlines() == [
        f"10.42.0.2 ssh-ed25519 {blob[old]}",
        f"[127.0.0.1]:15022 ssh-ed25519 {blob[new]}",
    ]


def test_environment_flash_is_what_u_boot_checks(tmp_path: Path) -> None:
    flash = tmp_path / "env.img"
    images.write_environment_flash(flash, images.uboot_environment("vb1", "10.42.0.2/24", "10.42.0.1"))
    content = flash.read_bytes()
    assert len(content) == images.FLASH_BYTES
    environment = content[4 : images.UBOOT_ENV_BYTES]
    assert int.from_bytes(content[:4], "little") == zlib.crc32(environment)
    variables = dict(item.split(b"=", 1) for item in environment.split(b"\0\0")[0].split(b"\0"))
    assert variables[b"bootdelay"] == b"1"
    assert b"hil.payload=10.42.0.2/24" in variables[b"bootargs"]


def board_config(tmp_path: Path, name: str = "vb1") -> BoardConfig:
    master, flash = tmp_path / "master", tmp_path / "flash"
    if not master.exists():
        master.write_text("1")
    return BoardConfig(name, tmp_path, tmp_path, master, flash, 15022, payload_socket=tmp_path / "inner.sock")


def test_a_boards_disk_survives_until_its_master_changes(tmp_path: Path) -> None:
    config = board_config(tmp_path)
    assert len(prepare(config)) == 2
    config.disk.write_text("written by the board")
    assert prepare(config) == []
    assert config.disk.read_text() == "written by the board"
    assert prepare(config, fresh=True) != []
    assert config.disk.read_text() == "1"


def test_every_port_of_a_bench_has_its_own_mac(tmp_path: Path) -> None:
    words = [word for name in ("vb1", "vb2") for word in qemu_argv(board_config(tmp_path, name), "bench")]
    macs = [word.split("mac=")[1] for word in words if "mac=" in word]
    assert len(set(macs)) == 4
    assert payload_mac("bench", "vb1") in macs


def test_power_follows_cpu_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = VirtualBoard(board_config(tmp_path), "bench")
    cpu = iter([1.0, 1.0, 1.05, 2.05])
    monkeypatch.setattr("hil.virtual.board.process_cpu_s", lambda _: next(cpu))
    monkeypatch.setattr("hil.virtual.board.qemu_argv", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    assert board.power_w(0.0) == 0.0
    board.set_powered(True)
    try:
        assert board.power_w(0.0) == 5.0
        assert board.power_w(0.02) == 5.0  # too short a window: the last value stands and no CPU time is read
        assert board.power_w(0.1) == pytest.approx(5.0)
        assert board.power_w(0.2) == pytest.approx(10.0)  # 0.05 s in 0.1 s
        assert board.power_w(0.3) == pytest.approx(15.0)  # more cores than full load counts
        pid = board.pid
        assert pid is not None
    finally:
        board.close()
    assert board.power_w(0.4) == 0.0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_cpu_clock_counts_this_process() -> None:
    before = process_cpu_s(os.getpid())
    assert sum(range(200_000)) > 0
    assert 0 < process_cpu_s(os.getpid()) - before < 5


def virtual_bench(tmp_path: Path, port: int) -> VirtualBench:
    boards = (BoardWire("vb1", (InputWire(1), InputWire(2, 4.0, 0.2)), 15022),)
    return VirtualBench("t", tmp_path, tmp_path, tmp_path, boards, supply_port=port, broker=tmp_path / "b.sock")


def test_configuration_survives_the_way_to_the_supervisor(tmp_path: Path) -> None:
    bench = virtual_bench(tmp_path, 15025)
    assert VirtualBench.from_json(bench.to_json()) == bench


def test_a_taken_port_is_named_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hil.virtual.supervisor._build", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} .* the supply, is taken by \S.*\(pid {os.getpid()}\)"):
            up(virtual_bench(tmp_path, port))
    assert status(virtual_bench(tmp_path, port)) == {"running": False, "name": "t"}
