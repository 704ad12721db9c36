"""Uploads: in order, a bounded part unconfirmed, resumed where the board's file is proven good."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hil.drivers.ssh.hashing import Landing, board_sha256, local_sha256
from hil.drivers.ssh.sftp import RemoteFile, SftpError
from hil.drivers.ssh.shell import Shell
from hil.drivers.ssh.transfer import Attempt, Progress, sftp_channel, watched

_LARGE_WRITE = 255 << 10  # one answer for each is what a fast link waits for; OpenSSH takes no more at once


def put(
    shell: Shell, source: Path, target: str, *, stall_s: float = 30.0, on_progress: Callable[[int], None] | None = None
) -> Attempt:
    """Copy a file to the board: to `<target>.part`, resumed if a part is there, hashed there, then moved into place.

    Both ends hash while the file is on its way, and the board writes it to disk. Needs `head`, `dd`, `sha256sum` and an
    SFTP server on the board, no Python. Raises as `Upload.run` and `Upload.activate`.
    """
    # The landing syncs as it goes; the server, which cannot write meanwhile, only at the end.
    upload = Upload(source, target, onboard=None, window_bytes=4 << 20, write_bytes=_LARGE_WRITE, sync_bytes=1 << 60)
    with ThreadPoolExecutor(1) as beside, Landing.beside(shell, upload.part, target, stall_s) as landing:
        sha256 = beside.submit(lambda: upload.sha256)

        def progress(offset: int) -> None:
            landing.reached(offset, stall_s)
            if on_progress:
                on_progress(offset)

        attempt = upload.run(shell, stall_s=stall_s, on_progress=progress)
        landing.finish(upload.total, sha256.result(), stall_s)
    return attempt


class Upload:
    """One file on its way to a board, over as many connections as it takes. Not for use by two threads at once.

    It writes `<target>.part` in order with at most `window_bytes` unconfirmed, so a cut costs at most that much again.
    Within one boot the file's size tells how far it got. After a reboot, or in a new process, nothing is believed: the
    board hashes what it has and the upload resumes after the last `chunk_bytes` chunk that is right. It hashes with
    `PYTHON ONBOARD chunk-hash FILE OFFSET LENGTH`; `onboard` None: with `head` and `sha256sum`.
    """

    def __init__(
        self,
        source: Path,
        target: str,
        *,
        onboard: str | None = "/opt/hil/onboard.py",
        python: str = "python3",
        chunk_bytes: int = 1 << 20,
        window_bytes: int = 512 << 10,
        write_bytes: int = 32000,  # with its header it fits one 32 KiB channel packet
        sync_bytes: int = 4 << 20,  # a power cut costs about this much, where the server can sync; the end is synced
    ) -> None:
        self.source, self.target, self.part = source, target, f"{target}.part"
        self.total = source.stat().st_size
        self.attempts: list[Attempt] = []
        self.high_water = 0
        self._onboard = None if onboard is None else (python, onboard)
        self._chunk = chunk_bytes
        self._window, self._write, self._sync = window_bytes, write_bytes, sync_bytes
        self._boot_id = ""
        self._sha256 = ""

    @property
    def sha256(self) -> str:
        """Hex digest of the source file (read once)."""
        if not self._sha256:
            self._sha256 = local_sha256(self.source, self.total)
        return self._sha256

    @property
    def complete(self) -> bool:
        """True when the board has confirmed every byte; not yet verified nor activated."""
        return bool(self.attempts) and self.attempts[-1].complete

    def run(
        self,
        shell: Shell,
        *,
        stall_s: float,
        stop: threading.Event | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Attempt:
        """Upload over `shell` until done or `stop` is set (loss of signal); returns what was achieved.

        `on_progress(offset)` gets the confirmed size. No confirmation for `stall_s`, or a lost connection: the shell is
        aborted and ShellTimeout or ShellLost raised; the attempt is in `attempts` all the same. On `stop` the shell is
        aborted only if a call hangs. SftpError when the board refuses.
        """
        stop = stop or threading.Event()
        progress = Progress(time.monotonic())
        # Asked beside the opening of the file: on a long link each costs several round trips of a short contact.
        with ThreadPoolExecutor(1) as beside, shell.guarded(), sftp_channel(shell, stall_s) as channel:
            asked = beside.submit(shell.boot_id, stall_s)
            with shell.limited(stall_s, lambda: f"opening {self.part}"):
                remote = RemoteFile(channel, self.part, stall_s, write=True)
                size = remote.size()
            boot_id = asked.result()
            start = self._verified(shell, boot_id, size, stall_s)
            if size > start:
                with shell.limited(stall_s, lambda: f"truncating {self.part}"):
                    remote.truncate(start)
            self._boot_id = boot_id
            progress.offset = progress.sent_to = start
            with watched(shell, progress, stop, stall_s, f"upload of {self.source.name}"):
                try:
                    self._stream(remote, progress, stop, on_progress)
                    if progress.offset == self.total:
                        remote.close()
                except SftpError:
                    self._boot_id = ""  # writes behind the refused one may have landed: its size proves nothing now
                    raise
                finally:
                    self.attempts.append(progress.ended(start, progress.sent_to - start, self.high_water, self.total))
                    self.high_water = max(self.high_water, progress.sent_to)
        return self.attempts[-1]

    def activate(self, shell: Shell, timeout_s: float) -> None:
        """Have the board check the whole file's SHA-256 and only then put it in place, durably."""
        if self._onboard is not None:
            argv = [*self._onboard, "activate", self.part, self.target, self.sha256]
            shell.run(argv, timeout_s, check=True)
            return
        with Landing.beside(shell, self.part, self.target, timeout_s) as landing:
            landing.finish(self.total, self.sha256, timeout_s)

    def _stream(
        self, remote: RemoteFile, progress: Progress, stop: threading.Event, on_progress: Callable[[int], None] | None
    ) -> None:
        pending: dict[int, int] = {}  # request -> offset after it; the server answers in order
        with self.source.open("rb") as source:
            source.seek(progress.offset)
            unsynced, write = 0, min(self._write, remote.most_write_bytes)
            # A sync may be answered after the last write: nothing may be left unanswered when the file is closed.
            while (progress.offset < self.total or pending) and not stop.is_set():
                while progress.sent_to < self.total and progress.sent_to - progress.offset < self._window:
                    data = source.read(min(write, self.total - progress.sent_to))
                    # Counted before it is handed over: a cut inside `write` leaves unknown how much left.
                    at, progress.sent_to = progress.sent_to, progress.sent_to + len(data)
                    pending[remote.write(at, data)] = progress.sent_to
                    unsynced += len(data)
                    if (unsynced >= self._sync or progress.sent_to == self.total) and remote.can_sync:
                        pending[remote.sync()], unsynced = progress.sent_to, 0
                    if stop.is_set():
                        return
                    self._confirm(remote, 0.0, pending, progress, on_progress)
                self._confirm(remote, 0.2, pending, progress, on_progress)

    def _confirm(
        self,
        remote: RemoteFile,
        wait_s: float,
        pending: dict[int, int],
        progress: Progress,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        for number in remote.acknowledged(wait_s):
            progress.offset = pending.pop(number)
            progress.moved_s = time.monotonic()
            if on_progress:
                on_progress(progress.offset)

    def _verified(self, shell: Shell, boot_id: str, size: int, timeout_s: float) -> int:
        """How many leading bytes of the board's file are known to be right."""
        size = min(size, self.total)
        if boot_id == self._boot_id or size == 0:
            return size

        def good(length: int) -> bool:
            if self._onboard is None:
                printed = board_sha256(shell, self.part, length, timeout_s)
            else:
                argv = [*self._onboard, "chunk-hash", self.part, "0", str(length)]
                # Hashing is quick beside the link, but an emulated board reads its disk slowly.
                printed = shell.run(argv, timeout_s + length / 5e6, check=True).stdout
            return local_sha256(self.source, length) in printed

        if good(size):
            return size
        low, high = 0, (size - 1) // self._chunk  # chunks known good; chunks that may be
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if good(middle * self._chunk) else (low, middle - 1)
        return low * self._chunk
