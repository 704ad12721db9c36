"""How images are made: content-addressed builds, Debian packages and wheels fetched without installing them.

An artefact is a directory `cache/images/<name>-<key>`; the key is a hash of everything that goes into it (the recipe),
so a changed recipe is a new artefact and a finished one is never touched again. It is made in a hidden directory beside
its final place and renamed when complete: whoever finds the final name finds a whole image, however the builder died.
Nothing here needs root, installs a package or starts a service.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hil.errors import BenchError, UsageError

Progress = Callable[[str], None]

APT_LISTS_FRESH_S = 12 * 3600.0
"""Package lists younger than this are not fetched again."""

TOOL_PACKAGES: Mapping[str, str] = {
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mkenvimage": "u-boot-tools",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "fakeroot": "fakeroot",
    "ssh-keygen": "openssh-client",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "unshare": "util-linux",
    "ip": "iproute2",
}
"""Which Debian package carries a program."""


def require_tools(*names: str) -> None:
    """Raise UsageError naming the Debian packages to install when a program is not on PATH (or in /sbin)."""
    missing = [name for name in names if find_tool(name) is None]
    if missing:
        packages = sorted({TOOL_PACKAGES.get(name, name) for name in missing})
        raise UsageError(
            f"the virtual bench needs {', '.join(missing)}, which this machine does not have",
            hint=f"on Debian: sudo apt-get install --no-install-recommends {' '.join(packages)}",
        )


def find_tool(name: str) -> str | None:
    """Path of a program; also looks into the sbin directories that an ordinary user's PATH leaves out."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def build(
    cache: Path, name: str, recipe: Mapping[str, object], make: Callable[[Path], None], progress: Progress
) -> Path:
    """Return the artefact directory for `recipe`, calling `make(directory)` to fill it when it does not exist yet.

    `recipe` must be JSON-able and name every input: package names, hashes, file contents, a version of the code.
    Concurrent builders wait for each other. Raises BenchError when the disk is full; whatever `make` raises passes
    through, and then nothing is left that could be taken for an image.
    """
    images = cache / "images"
    target = images / f"{name}-{recipe_key(recipe)}"
    if target.is_dir():
        return target
    with locked(images / f".{name}.lock", lambda: progress(f"{name}: waiting for another build of it")):
        if target.is_dir():
            return target
        for stale in images.glob(f".{name}-*.partial"):
            shutil.rmtree(stale, ignore_errors=True)  # an interrupted build's; we hold the lock, so nobody is in it
        partial = images / f".{target.name}.partial"
        progress(f"{name}: building")
        started = time.monotonic()
        try:
            with disk_errors(f"building {name}", images):
                partial.mkdir()
                make(partial)
                _sync_tree(partial)
                partial.rename(target)
                _sync(images)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        progress(f"{name}: built in {time.monotonic() - started:.0f} s")
    return target


def recipe_key(recipe: Mapping[str, object]) -> str:
    """16 hex digits that change whenever the recipe does."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created); the kernel frees it when the holder dies."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def disk_errors(doing: str, where: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a BenchError that says where and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free_mib = shutil.disk_usage(where).free // 2**20
        raise BenchError(
            f"disk full while {doing}: {free_mib} MiB left on the file system of {where}",
            hint="free about 2 GiB there or point XDG_CACHE_HOME at a larger disk, then run the command again",
        ) from error


def run_tool(argv: Sequence[str | Path], doing: str, *, cwd: Path | None = None, stdin: bytes | None = None) -> str:
    """Run a program to its end and return what it printed; BenchError with its last lines when it fails."""
    words = [str(word) for word in argv]
    program = find_tool(words[0])
    if program is None:
        require_tools(words[0])
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        [program or words[0], *words[1:]], cwd=cwd, input=stdin, capture_output=True, env=environment, check=False
    )
    if done.returncode != 0:
        printed = (done.stdout + done.stderr).decode(errors="replace").strip()
        if "No space left on device" in printed:
            raise OSError(errno.ENOSPC, f"{words[0]}: {printed.splitlines()[-1]}")
        tail = "\n  ".join(printed.splitlines()[-6:])
        raise BenchError(f"{doing}: {words[0]} ended with code {done.returncode}\n  {tail}")
    return done.stdout.decode(errors="replace")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# --- offline folder ---------------------------------------------------------------------------------------------------


def offline_dir() -> Path | None:
    """The folder named by HIL_OFFLINE (`wheels/` and `debs/` inside), or None when the network may be used."""
    value = os.environ.get("HIL_OFFLINE")
    if not value:
        return None
    path = Path(value).resolve()
    if not (path / "wheels").is_dir() or not (path / "debs").is_dir():
        raise UsageError(
            f"HIL_OFFLINE={value}: no folder with wheels/ and debs/ inside",
            hint="fill one on a machine with internet: hil virtual images --fill-offline DIR",
        )
    return path


def index_debs(directory: Path) -> None:
    """Write the `Packages` file that makes a folder of .deb files a flat apt repository."""
    stanzas = []
    for deb in sorted(directory.glob("*.deb")):
        control = run_tool(["dpkg-deb", "-f", deb], f"reading {deb.name}").rstrip("\n")
        stanzas.append(f"{control}\nFilename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {sha256_file(deb)}\n")
    (directory / "Packages").write_text("\n".join(stanzas))


# --- Debian packages --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DebSet:
    """The .deb files of some packages and everything they depend on, for one architecture."""

    architecture: str
    files: tuple[Path, ...]

    def path_of(self, package: str) -> Path:
        """The file of one package; BenchError when the set does not hold it."""
        for file in self.files:
            if file.name.startswith(f"{package}_"):
                return file
        raise BenchError(f"package {package} is not among the downloaded {self.architecture} packages")


def fetch_debs(
    cache: Path, packages: Sequence[str], architecture: str, progress: Progress, *, dependencies: bool = True
) -> DebSet:
    """Download packages (no recommends) for `architecture` ("arm64", "amd64") from this machine's apt sources.

    Uses a private apt directory in the cache, so that no root is needed and the machine's own package state is neither
    read nor changed. What was downloaded before is not fetched again. With HIL_OFFLINE only that folder is used.
    """
    require_tools("apt-get", "dpkg-deb", "tar")
    root = cache / "downloads" / f"apt-{architecture}"
    with locked(root / ".lock"), disk_errors("downloading Debian packages", cache):
        config = _apt_root(root, architecture)
        apt = ["apt-get", "-q", "-y", "--no-install-recommends"]
        _apt_update(root, config, progress)
        wanted = list(packages)
        simulated = _apt(config, [*apt, "-s", "install", *wanted], f"resolving {', '.join(wanted)}")
        chosen = re.findall(r"^Inst (\S+) \((\S+) .*\[(\S+)\]\)", simulated, flags=re.M)
        if not dependencies:
            chosen = [item for item in chosen if item[0].split(":")[0] in wanted]
        files = tuple(root / "archives" / _deb_name(*item) for item in chosen)
        if not all(file.is_file() for file in files):
            progress(f"downloading {sum(not f.is_file() for f in files)} Debian packages ({architecture})")
            if dependencies:
                _apt(config, [*apt, "-d", "install", *wanted], f"downloading {', '.join(wanted)}")
            else:
                _apt(config, ["apt-get", "-q", "download", *wanted], "downloading", cwd=root / "archives")
        missing = [file.name for file in files if not file.is_file()]
        if missing or not files:
            raise BenchError(f"apt did not deliver {', '.join(missing) or wanted}")
    return DebSet(architecture, files)


def unpack_debs(debs: Sequence[Path], tree: Path) -> None:
    """Unpack packages into `tree` without running their scripts; a /bin -> usr/bin link in `tree` is kept."""
    tree.mkdir(parents=True, exist_ok=True)
    for deb in debs:
        # not `dpkg-deb -x`: it would replace the merged-/usr links by directories
        with subprocess.Popen(
            [find_tool("dpkg-deb") or "dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE
        ) as p:
            done = subprocess.run(
                ["tar", "-x", "-p", "--no-same-owner", "--keep-directory-symlink", "-C", tree],
                stdin=p.stdout,
                capture_output=True,
                check=False,
            )
        if done.returncode or p.returncode:
            text = done.stderr.decode(errors="replace").strip()
            if "No space left" in text:
                raise OSError(errno.ENOSPC, text)
            raise BenchError(f"unpacking {deb.name} failed: {text[-300:]}", hint=f"delete {deb} and run again")


def merged_usr(tree: Path) -> None:
    """Create the /bin, /sbin, /lib links of a merged-/usr system; call it before unpacking."""
    for name in ("bin", "sbin", "lib"):
        (tree / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (tree / name).is_symlink():
            (tree / name).symlink_to(f"usr/{name}")


def _deb_name(package: str, version: str, architecture: str) -> str:
    quoted = version.replace("_", "%5f").replace(":", "%3a")
    return f"{package.split(':')[0]}_{quoted}_{architecture}.deb"


def _apt_root(root: Path, architecture: str) -> Path:
    """A private apt directory: own lists, archives, empty package state; the machine's sources, keys and proxies."""
    for part in ("lists/partial", "archives/partial", "cache"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    sources = root / "debian.sources"
    text = _apt_sources()
    if not sources.is_file() or sources.read_text() != text:
        sources.write_text(text)
        (root / "updated").unlink(missing_ok=True)
    inherited = [
        line
        for line in run_tool(["apt-config", "dump"], "reading apt's configuration").splitlines()
        if re.match(r"Acquire::(http|https|ftp|Retries|ForceIPv4|ForceIPv6)\b", line)
    ]
    config = root / "apt.conf"
    config.write_text(
        "\n".join(
            [
                *inherited,
                f'APT::Architecture "{architecture}";',
                f'APT::Architectures {{ "{architecture}"; }};',
                'APT::Install-Recommends "false";',
                'APT::Sandbox::User "root";',  # the cache may be a directory that user _apt cannot enter
                'Acquire::Languages "none";',
                'Acquire::Retries "3";',
                'APT::Keep-Downloaded-Packages "true";',
                'pkgCacheGen::Essential "none";',  # we fetch what we name, not a whole Debian
                f'Dir::State::lists "{root / "lists"}";',
                f'Dir::State::status "{root / "status"}";',
                f'Dir::State::extended_states "{root / "extended_states"}";',
                f'Dir::Cache::archives "{root / "archives"}";',
                f'Dir::Cache "{root / "cache"}";',
                f'Dir::Etc::sourcelist "{sources}";',
                'Dir::Etc::sourceparts "/dev/null";',
                'Dir::Etc::parts "/dev/null";',  # hooks and clean-up rules of this machine are not for our cache
                'Dir::Etc::preferencesparts "/dev/null";',
                'Dir::Etc::preferences "/dev/null";',
                'Dir::Log "/dev/null";',
                'Debug::NoLocking "true";',  # we hold our own lock
            ]
        )
        + "\n"
    )
    return config


def _apt(config: Path, argv: Sequence[str], doing: str, *, cwd: Path | None = None) -> str:
    try:
        return run_tool([argv[0], "-c", config, *argv[1:]], doing, cwd=cwd)
    except BenchError as error:
        raise BenchError(error.message, hint="check the network and apt's sources, or set HIL_OFFLINE=DIR") from error


def _apt_update(root: Path, config: Path, progress: Progress) -> None:
    stamp = root / "updated"
    if stamp.is_file() and (offline_dir() is None and time.time() - stamp.stat().st_mtime < APT_LISTS_FRESH_S):
        return
    progress("fetching Debian package lists" if offline_dir() is None else "reading the offline folder's packages")
    _apt(config, ["apt-get", "-q", "update", "-o", "APT::Update::Error-Mode=any"], "fetching Debian package lists")
    stamp.touch()


def _apt_sources() -> str:
    """This machine's Debian sources as deb822, without third-party repositories (they lack architectures)."""
    offline = offline_dir()
    if offline is not None:
        return f"Types: deb\nURIs: copy:{offline / 'debs'}\nSuites: ./\nTrusted: yes\n"
    codename = _os_release().get("VERSION_CODENAME", "")
    stanzas = []
    etc = Path("/etc/apt")
    for path in sorted([etc / "sources.list", *etc.glob("sources.list.d/*")]):
        if path.is_file() and path.suffix in (".list", ".sources"):
            text = path.read_text(errors="replace")
            stanzas += parse_sources(text, codename) if path.suffix == ".sources" else parse_list(text, codename)
    if not stanzas:
        raise UsageError(
            f"no Debian source for {codename or 'this system'} in /etc/apt: images need Debian packages",
            hint="add a Debian 12 source to /etc/apt/sources.list.d, or set HIL_OFFLINE=DIR",
        )
    return "\n".join(stanzas)


def parse_sources(text: str, codename: str) -> list[str]:
    """Stanzas of a deb822 `.sources` file that offer binary packages of Debian `codename`, without `Architectures`."""
    kept = []
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n\s*\n", body.strip()):
        fields = {k.lower(): v.strip() for k, v in re.findall(r"^(\S+?):((?:.*)(?:\n[ \t].*)*)", stanza, flags=re.M)}
        suites = fields.get("suites", "").split()
        wanted = fields.get("enabled", "yes").lower() != "no" and "deb" in fields.get("types", "").split()
        if wanted and suites and all(s == codename or s.startswith(f"{codename}-") for s in suites):
            skip = ("architectures", "types", "enabled")
            lines = [f"{key}: {value}" for key, value in fields.items() if key not in skip]
            kept.append("\n".join(["types: deb", *lines]) + "\n")
    return kept


def parse_list(text: str, codename: str) -> list[str]:
    """The same for one-line `deb [options] uri suite component…` files, given as deb822."""
    kept = []
    for line in text.splitlines():
        found = re.match(r"^\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line)
        if not found or not (found[3] == codename or found[3].startswith(f"{codename}-")):
            continue
        lines = ["types: deb", f"uris: {found[2]}", f"suites: {found[3]}", f"components: {found[4].strip()}"]
        for option in (found[1] or "").split():
            key, _, value = option.partition("=")
            if key in ("signed-by", "trusted"):
                lines.append(f"{key}: {value}")
        kept.append("\n".join(lines) + "\n")
    return kept


def _os_release() -> dict[str, str]:
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        return {}
    return {key: value.strip('"') for key, value in re.findall(r"^(\w+)=(.*)$", text, flags=re.M)}


# --- wheels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel pinned by version and hash; `platform` as pip spells it ("any" when pure)."""

    project: str
    version: str
    sha256: str
    platform: str = "any"


def fetch_wheel(cache: Path, wheel: Wheel, progress: Progress) -> Path:
    """Download a wheel (never its dependencies) into the cache and return it; its SHA-256 must be the pinned one."""
    directory = cache / "downloads" / "wheels"
    directory.mkdir(parents=True, exist_ok=True)
    pattern = f"{wheel.project.replace('-', '_')}-{wheel.version}-*.whl"
    with locked(directory / ".lock"), disk_errors("downloading wheels", cache):
        for path in directory.glob(pattern):
            if sha256_file(path) == wheel.sha256:
                return path
            path.unlink()  # half a download, or somebody else's build
        requirements = directory / ".requirement.txt"
        requirements.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
        argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        argv += ["--require-hashes", "-r", str(requirements), "--dest", str(directory)]
        if wheel.platform != "any":
            argv += ["--platform", wheel.platform, "--python-version", "3.11", "--implementation", "cp"]
        offline = offline_dir()
        if offline is not None:
            argv += ["--no-index", "--find-links", str(offline / "wheels")]
        progress(f"downloading the wheel {wheel.project} {wheel.version}")
        try:
            run_tool(argv, f"downloading {wheel.project}")
        except BenchError as error:
            raise BenchError(error.message, hint="check the network, or set HIL_OFFLINE=DIR") from error
        for path in directory.glob(pattern):
            if sha256_file(path) == wheel.sha256:
                return path
    raise BenchError(f"pip reported success but left no {wheel.project} {wheel.version} with the pinned hash")


# --- initramfs --------------------------------------------------------------------------------------------------------


def write_initramfs(tree: Path, out: Path) -> None:
    """Pack `tree` as a gzipped newc cpio, everything owned by root, with /dev/console and /dev/null added."""
    with gzip.GzipFile(out, "wb", compresslevel=6, mtime=0) as stream:
        inode = 0

        def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
            nonlocal inode
            inode += 1
            encoded = name.encode() + b"\0"
            numbers = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
            header = b"070701" + b"".join(b"%08X" % number for number in numbers)
            stream.write(header + encoded + b"\0" * (-(len(header) + len(encoded)) % 4))
            stream.write(data + b"\0" * (-len(data) % 4))

        for path in sorted(tree.rglob("*")):
            mode, name = path.lstat().st_mode, str(path.relative_to(tree))
            if path.is_symlink():
                add(name, mode, os.readlink(path).encode())
            elif path.is_dir():
                add(name, mode)
            else:
                add(name, mode, path.read_bytes())
        if not (tree / "dev").is_dir():
            add("dev", 0o040755)
        add("dev/console", 0o020600, device=(5, 1))
        add("dev/null", 0o020666, device=(1, 3))
        add("TRAILER!!!", 0)


def copy_modules(kernel_tree: Path, names: Sequence[str], destination: Path) -> list[str]:
    """Copy kernel modules and what they depend on out of an unpacked kernel package, flat, into `destination`.

    Returns file names in an order in which `insmod` accepts them. A name that is built into the kernel is skipped;
    one that does not exist raises BenchError. Dependencies come from the modules' own `depends=` field, because
    modules.dep is only written when a kernel package is installed.
    """
    (release,) = [path for path in (kernel_tree / "lib/modules").iterdir() if path.is_dir()]
    files = {path.name.split(".ko")[0].replace("-", "_"): path for path in release.rglob("*.ko*")}
    builtin_file = release / "modules.builtin"
    listed = builtin_file.read_text().splitlines() if builtin_file.is_file() else []
    builtin = {Path(line).name.removesuffix(".ko").replace("-", "_") for line in listed}
    destination.mkdir(parents=True, exist_ok=True)
    order: list[str] = []

    def take(name: str) -> None:
        if name in builtin:
            return
        if name not in files:
            raise BenchError(f"the kernel in {kernel_tree} has no module {name}")
        data = files[name].read_bytes()
        found = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in found[1].decode().split(",") if found else []:
            if needed:
                take(needed.replace("-", "_"))
        if f"{name}.ko" not in order:
            (destination / f"{name}.ko").write_bytes(data)
            order.append(f"{name}.ko")

    for wanted in names:
        take(wanted.replace("-", "_"))
    return order


def kernel_image(kernel_tree: Path) -> Path:
    """The vmlinuz of an unpacked kernel package."""
    return next((kernel_tree / "boot").glob("vmlinuz-*"))


# --- keys -------------------------------------------------------------------------------------------------------------


def ssh_key(cache: Path, name: str) -> Path:
    """Path of the private ed25519 key `cache/keys/<name>`, made when absent; the public half lies beside it as .pub."""
    require_tools("ssh-keygen")
    keys = cache / "keys"
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = keys / name
    with locked(keys / ".lock"):
        if not path.is_file() or not path.with_suffix(".pub").is_file():
            fresh = keys / f".{name}.new"
            for stale in (fresh, Path(f"{fresh}.pub")):
                stale.unlink(missing_ok=True)
            run_tool(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"hil {name}", "-f", fresh], "making a key")
            Path(f"{fresh}.pub").replace(path.with_suffix(".pub"))
            fresh.replace(path)
    return path


def trust_host(cache: Path, host: str, port: int, host_key: Path) -> Path:
    """Pin a host key in `cache/keys/known_hosts` for `host` and `port`, replacing an older pin; returns that file."""
    known = cache / "keys" / "known_hosts"
    name = host if port == 22 else f"[{host}]:{port}"
    kind, blob = host_key.with_suffix(".pub").read_text().split()[:2]
    line = f"{name} {kind} {blob}"
    with locked(cache / "keys" / ".lock"):
        lines = known.read_text().splitlines() if known.is_file() else []
        if line not in lines:
            kept = [old for old in lines if not old.startswith(f"{name} ")]
            fresh = known.with_name(".known_hosts.new")
            fresh.write_text("\n".join([*kept, line]) + "\n")
            fresh.replace(known)
    return known


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
