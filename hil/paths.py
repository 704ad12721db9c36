"""Where hil keeps things: cache (rebuildable), state (survives a reboot), runtime (sockets, dies with the session)."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from hil.errors import UsageError


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/hil` or `~/.cache/hil`; created when absent."""
    return _made(_base("XDG_CACHE_HOME", ".cache") / "hil")


def bench_id(name: str, path: Path) -> str:
    """Identity of a bench file: its name and a short hash of where it lies, so that two checkouts do not collide."""
    return f"{name}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"


def state_dir(bench: str) -> Path:
    """`$XDG_STATE_HOME/hil/<bench-id>`: leases, intent journal, logs."""
    return _made(_base("XDG_STATE_HOME", ".local/state") / "hil" / bench)


def runtime_dir(bench: str) -> Path:
    """Directory of the bench's unix sockets: 0700, ours, and short (a unix socket path holds 107 bytes).

    Raises UsageError when somebody else owns it or others may enter it.
    """
    root = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(root) if root else Path(f"/tmp/hil-{os.getuid()}")  # noqa: S108  (owner and mode are checked below)
    path = _made(base / "hil" / bench)
    for directory in (path, path.parent) if root else (path, path.parent, base):
        info = directory.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise UsageError(
                f"runtime directory {directory} is not private to this user",
                hint=f"remove it or set XDG_RUNTIME_DIR to a directory that only user {os.getuid()} can enter",
            )
    return path


def _base(variable: str, default: str) -> Path:
    value = os.environ.get(variable)
    return Path(value) if value and os.path.isabs(value) else Path.home() / default


def _made(path: Path) -> Path:
    # Path.mkdir(parents=True) gives the parents the umask's mode; ours must all be private.
    for directory in (*reversed(path.parents), path):
        if not directory.exists():
            directory.mkdir(mode=0o700, exist_ok=True)
    return path
