"""Private unix sockets of the daemon."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from hil.errors import UsageError

PATH_BYTES = 107


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
