"""The link box of the virtual bench: a small Linux with two bridged ports and tc/netem, in a QEMU of its own.

It stands where a lab puts a two-port emulator between the ground station and the board. Its outer port is a TAP (the
payload broker's, so the host kernel's TCP is the ground end), its inner port a stream socket to the board's QEMU, its
third port is for management only: SSH on 127.0.0.1, keys only, no way out (`restrict=on`).

It has its own kernel because the host's may lack `sch_netem`, and because then nothing here needs root.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hil.drivers.broker import die_with_parent
from hil.drivers.prompt import raise_share
from hil.errors import BenchError
from hil.virtual.artefacts import (
    Progress,
    build,
    copy_modules,
    fetch_debs,
    find_tool,
    kernel_image,
    sha256_file,
    ssh_key,
    trust_host,
    unpack_debs,
    write_initramfs,
)

#: Debian packages whose files make up the box; the libraries they need come along.
PACKAGES = ("linux-image-cloud-amd64", "busybox-static", "iproute2", "dropbear-bin", "ethtool")

#: Kernel modules the box loads; what they depend on is found from their own `depends=` entries.
MODULES = ("virtio_pci", "virtio_net", "bridge", "sch_netem", "ifb", "sch_ingress", "cls_u32", "act_mirred")

QEMU = "qemu-system-x86_64"
"""The program that is the link box."""

_TOOLS = ("bin/busybox", "sbin/tc", "sbin/ip", "sbin/ethtool", "usr/sbin/dropbear")

_READY = b"hil-linkbox: ready"

#: One MAC a port: QEMU gives every first NIC the same one, and a bridge between equal addresses eats the traffic.
_PORT_MACS = ("52:54:00:4c:42:00", "52:54:00:4c:42:01", "52:54:00:4c:42:02")

# The box's whole user space. `/sbin/...` in full: busybox's shell prefers its own `ip` and `tc` applets.
_INIT = """\
#!/bin/busybox sh
export PATH=/sbin:/bin:/usr/sbin
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs dev /dev
$bb mkdir -p /dev/pts
$bb mount -t devpts devpts /dev/pts
exec </dev/console >/dev/console 2>&1
for module in $($bb cat /modules/order); do $bb insmod /modules/$module || echo "hil-linkbox: no $module"; done
$bb hostname linkbox
/sbin/ip link set lo up
for port in eth0 eth1 eth2; do
  # Without this one packet may be 64 KiB: netem would lose 44 segments at once and count one.
  /sbin/ethtool -K $port tso off gso off gro off tx off rx off sg off >/dev/null 2>&1
  echo 1 >/proc/sys/net/ipv6/conf/$port/disable_ipv6
done
/sbin/ip link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
echo 1 >/proc/sys/net/ipv6/conf/br0/disable_ipv6
/sbin/ip link set eth0 master br0 up
/sbin/ip link set eth1 master br0 up
/sbin/ip link set br0 up
/sbin/ip address add 10.0.2.15/24 dev eth2
/sbin/ip link set eth2 up
/usr/sbin/dropbear -E -r /etc/dropbear/host_key -s -j -k -p 22 && echo "hil-linkbox: ready"
while :; do $bb sleep 3600; done
"""


# ---------------------------------------------------------------------------------------------------------------------
# The image


@dataclass(frozen=True, slots=True)
class LinkBoxImage:
    """Kernel and initramfs of a link box. The initramfs holds the box's host key: it is made per cache, mode 0600."""

    kernel: Path
    initrd: Path


def ensure_image(cache: Path, mgmt_port: int, progress: Progress) -> LinkBoxImage:
    """Build the link box's image unless the cache has it, and pin its host key for 127.0.0.1:`mgmt_port`.

    Seconds when packages must be fetched, else milliseconds. Raises what the artefact builder raises.
    """
    client_key, host_key = ssh_key(cache, "id_ed25519"), ssh_key(cache, "linkbox_host_ed25519")
    trust_host(cache, "127.0.0.1", mgmt_port, host_key)
    authorized = client_key.with_suffix(".pub").read_text()
    recipe = {
        "version": 1,
        "packages": PACKAGES,
        "modules": MODULES,
        "tools": _TOOLS,
        "init": _INIT,
        "authorized": authorized,
        "host_key": sha256_file(host_key),
    }

    def make(directory: Path) -> None:
        debs = fetch_debs(cache, PACKAGES, "amd64", progress)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            unpacked, tree = Path(scratch, "unpacked"), Path(scratch, "tree")
            wanted = re.compile(r"(linux-image-|busybox|iproute2|dropbear-bin|ethtool|lib|zlib1g)")
            unpack_debs([deb for deb in debs.files if wanted.match(deb.name)], unpacked)
            _fill(tree, unpacked, authorized, host_key.read_bytes())
            write_initramfs(tree, directory / "initrd")
            shutil.copyfile(kernel_image(unpacked), directory / "vmlinuz")
        (directory / "initrd").chmod(0o600)

    built = build(cache, "linkbox", recipe, make, progress)
    return LinkBoxImage(built / "vmlinuz", built / "initrd")


def _fill(tree: Path, unpacked: Path, authorized_keys: str, host_key: bytes) -> None:
    """Lay out the box's root file system: the tools, their libraries, the modules, keys and `init`."""
    for directory in ("proc", "sys", "tmp", "run", "dev"):
        (tree / directory).mkdir(parents=True)
    for source, target in {**{tool: tool for tool in _TOOLS}, **_libraries(unpacked, _TOOLS)}.items():
        _install(unpacked / source, tree / target)
    (tree / "bin/sh").symlink_to("busybox")
    order = copy_modules(unpacked, MODULES, tree / "modules")
    texts = {
        "modules/order": "\n".join(order) + "\n",
        "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
        "etc/group": "root:x:0:\n",
        "etc/shells": "/bin/sh\n",
        "root/.ssh/authorized_keys": authorized_keys,
        "init": _INIT,
    }
    for name, text in texts.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / "etc/dropbear").mkdir(mode=0o700)
    (tree / "etc/dropbear/host_key").write_bytes(dropbear_host_key(host_key))
    (tree / "init").chmod(0o755)
    for private in ("root", "root/.ssh"):
        (tree / private).chmod(0o700)
    for private in ("root/.ssh/authorized_keys", "etc/dropbear/host_key"):
        (tree / private).chmod(0o600)


def _install(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)


def _libraries(unpacked: Path, tools: Iterable[str]) -> dict[str, str]:
    """Shared libraries the tools need, transitively: path in `unpacked` -> path in the box.

    Found by the names inside the files: a name that only looks like a dependency costs some bytes, which is cheaper
    than parsing ELF.
    """
    by_name: dict[str, Path] = {}
    for directory in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"):
        for path in (unpacked / directory).glob("*.so*"):
            by_name.setdefault(path.name, path)
    found = {"ld-linux-x86-64.so.2"}
    todo = [unpacked / tool for tool in tools]
    while todo:
        names = re.findall(rb"([\w+-]+\.so(?:\.\d+)+)\0", todo.pop().read_bytes())
        for name in {raw.decode() for raw in names} - found:
            if name in by_name:
                found.add(name)
                todo.append(by_name[name])
    targets = {name: f"lib/x86_64-linux-gnu/{name}" for name in found}
    targets["ld-linux-x86-64.so.2"] = "lib64/ld-linux-x86-64.so.2"  # the interpreter's path inside each binary
    return {str(by_name[name].relative_to(unpacked)): target for name, target in targets.items()}


def dropbear_host_key(openssh: bytes) -> bytes:
    """An ed25519 private key in dropbear's own file format, so that no foreign binary has to convert it.

    `openssh` is the file as ssh-keygen writes it. Format (dropbear `ed25519.c`): string "ssh-ed25519", then a string of
    seed and public key, 32 bytes each.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = serialization.load_ssh_private_key(openssh, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise BenchError("the link box's host key is not an ed25519 key", hint="delete it from the cache's keys/")
    raw = key.private_bytes_raw() + key.public_key().public_bytes_raw()
    kind = b"ssh-ed25519"
    return struct.pack(">I", len(kind)) + kind + struct.pack(">I", len(raw)) + raw


# ---------------------------------------------------------------------------------------------------------------------
# The process


@dataclass(frozen=True, slots=True)
class LinkBoxConfig:
    """How one link box is wired.

    `tap_fd` is the outer port (a TAP without virtual network header, from the payload broker); `inner_socket` the unix
    socket on which the box listens for the board's QEMU (`-netdev stream`); `mgmt_port` the port on 127.0.0.1 that
    leads to its SSH server; `console_log` gets what its kernel prints.
    """

    image: LinkBoxImage
    tap_fd: int
    inner_socket: Path
    mgmt_port: int
    console_log: Path
    memory_mib: int = 96
    qemu: str = QEMU


def qemu_argv(config: LinkBoxConfig) -> list[str]:
    """The command line of the box's QEMU. One port a line; checksums and segmentation stay off on all of them."""
    plain = "csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ufo=off,guest_ecn=off,"
    plain += "host_tso4=off,host_tso6=off,host_ufo=off,host_ecn=off,romfile="

    def nic(name: str, port: int) -> tuple[str, str]:
        return "-device", f"virtio-net-pci,netdev={name},mac={_PORT_MACS[port]},{plain}"

    argv = [config.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-M", "q35,usb=off,hpet=on"]
    argv += ["-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", str(config.memory_mib), "-no-reboot"]
    argv += ["-kernel", str(config.image.kernel), "-initrd", str(config.image.initrd)]
    argv += [
        "-append",
        "console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off random.trust_cpu=on tsc=reliable nokaslr",
    ]
    argv += ["-serial", f"file:{config.console_log}"]
    argv += ["-netdev", f"tap,id=outer,fd={config.tap_fd},vhost=off", *nic("outer", 0)]
    argv += ["-netdev", f"stream,id=inner,server=on,addr.type=unix,addr.path={config.inner_socket}", *nic("inner", 1)]
    forward = f"hostfwd=tcp:127.0.0.1:{config.mgmt_port}-10.0.2.15:22"
    argv += ["-netdev", f"user,id=mgmt,restrict=on,{forward}", *nic("mgmt", 2)]
    return argv


class LinkBox:
    """One link box process. `start()` returns when its SSH server answers; `kill()` ends it at once.

    Start it from the main thread: it asks the kernel to be killed when the thread that started it ends.
    """

    def __init__(self, config: LinkBoxConfig) -> None:
        self.config = config
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (a pipe that nobody reads would stop QEMU one day)
        self.boot_s = float("nan")

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self, timeout_s: float = 90.0) -> None:
        """Start the box and wait until its SSH server sends its banner. Raises BenchError with the console's end."""
        config = self.config
        if find_tool(config.qemu) is None:
            raise BenchError(f"{config.qemu} is not installed", hint="apt install qemu-system-x86")
        if len(os.fsencode(config.inner_socket)) > 107:
            raise BenchError(
                f"unix socket path is too long: {config.inner_socket}", hint="use a shorter runtime directory"
            )
        with contextlib.suppress(FileNotFoundError):
            config.inner_socket.unlink()
        config.console_log.unlink(missing_ok=True)
        began = time.monotonic()
        die_with_us = die_with_parent(os.getpid())

        def arrange() -> None:
            die_with_us()
            # Packets wait in it for the processor: it goes before the emulated boards that it serves. Not real time:
            # two boxes that boot at once on two cores leave nothing to their own timers, and their kernels give up.
            raise_share(-10)

        self._process = subprocess.Popen(
            qemu_argv(config),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            pass_fds=(config.tap_fd,),
            preexec_fn=arrange,
        )
        try:
            self._wait_for_ssh(began + timeout_s)
        except BaseException:
            self.kill()
            raise
        self.boot_s = time.monotonic() - began

    def kill(self) -> None:
        """End the box with SIGKILL and reap it; harmless when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()

    def _wait_for_ssh(self, deadline_s: float) -> None:
        """The forwarder accepts before the guest listens: only the server's banner proves it."""
        assert self._process is not None
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                self._stderr.seek(0)
                stderr = self._stderr.read().decode(errors="replace")
                raise BenchError(
                    f"the link box's QEMU ended with status {self._process.returncode}: {stderr.strip()}",
                    hint=f"is port {self.config.mgmt_port} taken? `ss -ltn` tells; see {self.config.console_log}",
                )
            # Asked only once it listens: user-mode networking keeps early attempts and delivers them all at once,
            # more than the server lets in before it knows who it is.
            if _is_ready(self.config.console_log) and _ssh_answers(self.config.mgmt_port):
                return
            time.sleep(0.05)
        port = self.config.mgmt_port
        raise BenchError(
            f"the link box did not answer on 127.0.0.1:{port}; its console ends with:\n{self._console_tail()}",
            hint="run `hil virtual down` and `hil virtual up` again; on a loaded host allow more time",
        )

    def _console_tail(self) -> str:
        try:
            return "\n".join(self.config.console_log.read_text(errors="replace").splitlines()[-12:])
        except OSError:
            return "(nothing printed)"


def _is_ready(console_log: Path) -> bool:
    try:
        return _READY in console_log.read_bytes()
    except OSError:
        return False


def _ssh_answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5) as probe:
        probe.settimeout(2.0)
        return probe.recv(4) == b"SSH-"
    return False
