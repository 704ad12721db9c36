"""What both ends of the daemon's interface share: private unix sockets and the form of an error in JSON."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hil.errors import BenchError, BoardError, HilError, SafetyError, UsageError

PATH_BYTES = 107
# The most special first: a SafetyError is a BenchError too.
ARMS: Mapping[str, type[HilError]] = {
    "safety": SafetyError,
    "bench": BenchError,
    "board": BoardError,
    "usage": UsageError,
}


def describe_error(error: HilError) -> dict[str, str]:
    """`{"arm", "message", "hint"}`: an error's form in every answer of the daemon."""
    arm = next((name for name, kind in ARMS.items() if isinstance(error, kind)), "bench")
    return {"arm": arm, "message": error.message, "hint": error.hint}


def error_from(value: Any, context: str) -> HilError:
    """The error again: an instance of the same class, from `{"error": {…}}` or the inner object."""
    error = value.get("error", value) if isinstance(value, dict) else None
    if not isinstance(error, dict) or "message" not in error:
        return BenchError(f"{context}: {value!r}")
    arm = ARMS.get(str(error.get("arm")), BenchError)
    return arm(str(error["message"]), hint=str(error.get("hint") or ""))


def bind_unix(path: Path) -> socket.socket:
    """A stream socket bound to `path`, for its owner alone; what a dead process left there is removed.

    Only the holder of the bench's lock may call this. Raises UsageError when the path is too long.
    """
    if len(os.fsencode(path)) > PATH_BYTES:
        raise UsageError(
            f"socket path {path} is longer than {PATH_BYTES} bytes", hint="set XDG_RUNTIME_DIR to a short directory"
        )
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        listener.bind(os.fspath(path))
    finally:
        os.umask(old)
    listener.setblocking(False)
    return listener
