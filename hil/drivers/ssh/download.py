"""Downloads: many reads on their way at once, resumed after cuts where the local part is proven good."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hil.drivers.ssh.hashing import board_sha256, hashed_beside, local_sha256
from hil.drivers.ssh.sftp import RemoteFile
from hil.drivers.ssh.shell import Shell
from hil.drivers.ssh.transfer import Attempt, Progress, sftp_channel, watched
from hil.errors import BenchError, BoardError


def get(
    shell: Shell, source: str, target: Path, *, stall_s: float = 30.0, on_progress: Callable[[int], None] | None = None
) -> Attempt:
    """Copy a file from the board: to `<target>.part`, resumed if a part is there, then hashed and moved into place.

    Both ends hash while the file is on its way. Needs `head`, `sha256sum` and an SFTP server on the board. Raises as
    `Download.run` and `Download.activate`.
    """
    download = Download(source, target)
    with hashed_beside(shell, source, stall_s) as there:
        attempt = download.run(shell, stall_s=stall_s, on_progress=on_progress)
        download.activate(shell, stall_s, there(download.total))
    return attempt


class Download:
    """One file on its way from a board, over as many connections as it takes. Not for use by two threads at once.

    A part that this object wrote is believed; one that it finds must hash as the board's file does, else the download
    starts anew. `window_bytes` of reads are under way: more than rate x round trip fills the link.
    """

    def __init__(self, source: str, target: Path, *, window_bytes: int = 4 << 20, read_bytes: int = 1 << 17) -> None:
        self.source, self.target, self.part = source, target, target.with_name(f"{target.name}.part")
        self.attempts: list[Attempt] = []
        self.total = 0
        self._window, self._read = window_bytes, read_bytes
        self._believed = False
        self._asked_to = 0
        self._digest = hashlib.sha256()
        self._hashed = 0  # leading bytes of the part that went into the digest as they arrived

    @property
    def complete(self) -> bool:
        """True when every byte is here; not yet verified nor in place."""
        return bool(self.attempts) and self.attempts[-1].complete

    def run(
        self,
        shell: Shell,
        *,
        stall_s: float,
        stop: threading.Event | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Attempt:
        """Download over `shell` until done or `stop` is set; returns what was achieved.

        `on_progress(offset)` gets the size that is here without gaps. Nothing for `stall_s`, or a lost connection: the
        shell is aborted and ShellTimeout or ShellLost raised; the attempt is in `attempts` all the same. SftpError
        when the board refuses.
        """
        stop = stop or threading.Event()
        progress = Progress(time.monotonic())
        with shell.guarded(), sftp_channel(shell, stall_s) as channel:
            with shell.limited(stall_s, lambda: f"opening {self.source}"):
                remote = RemoteFile(channel, self.source, stall_s, write=False)
                self.total = remote.size()
            start = self._verified(shell, stall_s)
            self._digest, self._hashed = hashlib.sha256(), 0
            progress.offset = progress.sent_to = start
            descriptor = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(descriptor, start)
                self._believed = True
                with watched(shell, progress, stop, stall_s, f"download of {self.source}"):
                    self._stream(remote, descriptor, progress, stop, on_progress)
                    if progress.offset == self.total:
                        remote.close()
            finally:
                os.ftruncate(descriptor, progress.offset)  # what lies behind a gap is asked for again
                os.close(descriptor)
                self.attempts.append(progress.ended(start, progress.offset - start, self._asked_to, self.total))
                self._asked_to = max(self._asked_to, progress.sent_to)
        return self.attempts[-1]

    def activate(self, shell: Shell, timeout_s: float, there: str = "") -> None:
        """Compare SHA-256 with the board's file and only then put the local one in place.

        `there`: what the board hashed the whole file to during the download; when it is not what arrived, because the
        file grew perhaps, the board hashes anew as much as was asked for. Raises BoardError when they differ: the file
        changed meanwhile. The part is removed then.
        """
        found = self._digest.hexdigest() if self._hashed == self.total else local_sha256(self.part, self.total)
        if found != there:
            there = board_sha256(shell, self.source, self.total, timeout_s)
        if found != there:
            self.part.unlink()
            self._believed = False
            raise BoardError(f"{shell.name}: {self.source} has SHA-256 {there}, what arrived has {found}; again")
        self.part.replace(self.target)

    def _verified(self, shell: Shell, stall_s: float) -> int:
        """How many leading bytes of the local part are known to be right."""
        size = min(self.part.stat().st_size, self.total) if self.part.exists() else 0
        if size == 0 or self._believed:
            return size
        good = local_sha256(self.part, size) == board_sha256(shell, self.source, size, stall_s)
        return size if good else 0

    def _keep(self, descriptor: int, offset: int, data: bytes | memoryview) -> None:
        """Write what arrived, and hash it if it comes next; what came otherwise is hashed when it is complete."""
        try:
            written = os.pwrite(descriptor, data, offset)
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], offset + written)
        except OSError as error:
            raise BenchError(
                f"{self.part}: {error.strerror}", hint="make room there, or take another target"
            ) from error
        if offset == self._hashed:
            self._digest.update(data)
            self._hashed += len(data)

    def _stream(
        self,
        remote: RemoteFile,
        descriptor: int,
        progress: Progress,
        stop: threading.Event,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        pending: dict[int, tuple[int, int]] = {}  # request -> (offset, length)
        landed: dict[int, int] = {}  # offset -> end, of what arrived behind a gap
        while progress.offset < self.total and not stop.is_set():
            while progress.sent_to < self.total and progress.sent_to - progress.offset < self._window:
                length = min(self._read, self.total - progress.sent_to)
                pending[remote.read(progress.sent_to, length)] = (progress.sent_to, length)
                progress.sent_to += length
            received = remote.received
            answers = remote.arrived(0.2)
            if remote.received > received:
                progress.moved_s = time.monotonic()  # on a slow link one answer takes longer than a stall
            for number, data in answers:
                offset, length = pending.pop(number)
                if not data:
                    raise BoardError(f"{self.source} ended at {offset} of {self.total} bytes: it was cut meanwhile")
                self._keep(descriptor, offset, data)
                landed[offset] = offset + len(data)
                if len(data) < length:  # the server may answer short
                    rest = (offset + len(data), length - len(data))
                    pending[remote.read(*rest)] = rest
            before = progress.offset
            while progress.offset in landed:
                progress.offset = landed.pop(progress.offset)
            if on_progress and progress.offset > before:
                on_progress(progress.offset)
