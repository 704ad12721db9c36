"""What uploads and downloads share: where an attempt stands and who aborts it when nothing moves."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hil.drivers.ssh.connection import ShellLost, ShellTimeout
from hil.drivers.ssh.inbox import Inbox
from hil.drivers.ssh.shell import Shell
from hil.errors import BoardError

if TYPE_CHECKING:
    import paramiko


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one contact achieved. `offset` is the confirmed size; bytes are payload, without protocol.

    `resent_bytes`: what this contact moved again because an earlier one was cut before it was confirmed.
    """

    start_offset: int
    offset: int
    sent_bytes: int
    resent_bytes: int
    duration_s: float
    complete: bool


@dataclass(slots=True)
class Progress:
    """Where one attempt stands; written by the transferring thread, read by its watcher."""

    began_s: float
    moved_s: float = 0.0
    offset: int = 0
    sent_to: int = 0

    def ended(self, start: int, moved_bytes: int, reached_before: int, total: int) -> Attempt:
        """This attempt at its end. What lies below `reached_before`, where an earlier one got to, was moved again."""
        again = max(0, min(reached_before, self.sent_to) - start)
        return Attempt(start, self.offset, moved_bytes, again, time.monotonic() - self.began_s, self.offset == total)


@contextlib.contextmanager
def sftp_channel(shell: Shell, timeout_s: float) -> Iterator[paramiko.Channel]:
    """A channel with the board's SFTP server, closed at the end."""
    channel = shell.subsystem("sftp", timeout_s)
    channel.in_buffer = Inbox()  # type: ignore[assignment]  # the server says nothing before it is spoken to
    try:
        yield channel
    finally:
        # Saying goodbye blocks when the link died with the socket's buffer full.
        with contextlib.suppress(BoardError), shell.limited(1.0, lambda: "closing sftp"):
            channel.close()


@contextlib.contextmanager
def watched(shell: Shell, progress: Progress, stop: threading.Event, stall_s: float, doing: str) -> Iterator[None]:
    """Abort the connection when nothing is confirmed for `stall_s`, or when `stop` finds the transfer stuck."""
    import paramiko

    done, stalled = threading.Event(), threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            if stop.is_set() and not done.wait(0.5):
                shell.abort()
                return
            if time.monotonic() - progress.moved_s > stall_s:
                stalled.set()
                shell.abort()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    progress.moved_s = time.monotonic()
    watcher.start()
    try:
        yield
    except (paramiko.SSHException, OSError, EOFError) as error:
        if stop.is_set():
            return
        where = f"{shell.name}: {doing} at {progress.offset} bytes"
        if stalled.is_set() or isinstance(error, TimeoutError):
            shell.abort()
            raise ShellTimeout(f"{where}: nothing confirmed for {stall_s:g} s") from error
        raise ShellLost(f"{where}: {error or 'connection lost'}") from error
    finally:
        done.set()
        watcher.join()
