"""An OpenSSH server for tests and benchmarks: for one made-up user, apart from the host's own.

It runs in a user namespace whose only user is `board`, so it works for root and for everybody else and no service is
started. Where the host has no `sshd`, Debian's package is unpacked into the cache once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from host import free_ports

from hil import paths
from hil.drivers.ssh import Login, Shell, host_key, pin
from hil.virtual import artefacts

USER = "board"


@dataclass(frozen=True, slots=True)
class Sshd:
    """A running server and what a client needs to log in."""

    address: str
    port: int
    key: Path
    known_hosts: Path
    log: Path

    @property
    def login(self) -> Login:
        return Login(self.address, self.port, USER, self.key, self.known_hosts)

    def connect(self, **options: object) -> Shell:
        """A shell there; options as `Shell.connect` takes them."""
        return Shell.connect(self.address, self.port, USER, self.key, self.known_hosts, **options)  # type: ignore[arg-type]


def find() -> Path:
    """The root of a tree with `usr/sbin/sshd`: the host's or one in the cache. BenchError when none can be had."""
    if artefacts.find_tool("sshd"):
        return Path("/")
    architecture = artefacts.run_tool(["dpkg", "--print-architecture"], "asking for the architecture").strip()
    packages = ["openssh-server", "openssh-sftp-server", "libwrap0"]

    def make(tree: Path) -> None:
        debs = artefacts.fetch_debs(paths.cache_dir(), packages, architecture, print, dependencies=False)
        artefacts.unpack_debs(debs.files, tree)

    return artefacts.build(paths.cache_dir(), "sshd", {"packages": packages, "arch": architecture}, make, print)


@contextlib.contextmanager
def serve(
    directory: Path,
    *,
    address: str = "127.0.0.1",
    inside: Sequence[str] = (),
    broker: Path | None = None,
    port: int | None = None,
    boot_id: str = "",
) -> Iterator[Sshd]:
    """Run a server whose keys and log are in `directory`.

    `inside`: the words that start it in another network namespace, to which `broker` leads. `port`: a free one unless
    given. `boot_id` is what the kernel seems to say there: another one after a "reboot", which ends all connections.
    """
    tree = find()
    for name in ("host", "id"):
        if not (directory / name).exists():
            artefacts.run_tool(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], "making keys")
    if port is None:
        (port,) = free_ports(1)
    (directory / "passwd").write_text(f"{USER}:x:1000:1000::{directory}:/bin/sh\n")
    (directory / "sshd_config").write_text(_configuration(tree, directory, address, port))
    (directory / "boot_id").write_text(f"{boot_id}\n")
    boot = 'mount --bind "$1/boot_id" /proc/sys/kernel/random/boot_id && ' if boot_id else ""
    inner = f'mount --bind "$1/passwd" /etc/passwd && {boot}shift && exec unshare --map-user=1000 --map-group=1000 "$@"'
    sshd = artefacts.find_tool("sshd") if tree == Path("/") else tree / "usr/sbin/sshd"
    libraries = ":".join(sorted({str(path.parent) for path in tree.glob("usr/lib/*/libwrap.so*")}))
    found = Sshd(address, port, directory / "id", directory / "known_hosts", directory / "sshd.log")
    with found.log.open("wb") as log:
        process = subprocess.Popen(
            [
                *inside,
                *("unshare", "-r", "-m", "sh", "-c", inner, "sh", str(directory)),
                *(str(sshd), "-D", "-e", "-f", str(directory / "sshd_config")),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "LD_LIBRARY_PATH": libraries},
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                key = host_key(found.login, broker=broker, timeout_s=5)
                pin(found.known_hosts, address, port, key, replace=True)
                break
            except Exception:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"sshd did not come up: {found.log.read_text()}") from None
                time.sleep(0.05)
        yield found
    finally:
        # Sessions whose client vanished without a word, as in an outage, would stay for ever.
        with contextlib.suppress(OSError):
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(pid), signal.SIGTERM)
        process.terminate()
        process.wait()


def _configuration(tree: Path, directory: Path, address: str, port: int) -> str:
    helpers = tree / "usr/lib/openssh"
    lines = [
        f"Port {port}",
        f"ListenAddress {address}",
        f"HostKey {directory}/host",
        f"AuthorizedKeysFile {directory}/id.pub",
        "PidFile none",
        "UsePAM no",
        "StrictModes no",
        "MaxSessions 64",
        f"Subsystem sftp {helpers}/sftp-server",
    ]
    for option, name in (("SshdSessionPath", "sshd-session"), ("SshdAuthPath", "sshd-auth")):
        if (helpers / name).exists():
            lines.append(f"{option} {helpers}/{name}")
    return "\n".join(lines) + "\n"
