"""What a channel has received and nobody has read, as the pieces that came: paramiko's own buffer copies them often."""

from __future__ import annotations

import threading
from collections import deque


class Inbox:
    """Takes the place of a channel's `in_buffer`, paramiko's `BufferedPipe`; its channel can have no `fileno` then."""

    def __init__(self) -> None:
        self._pieces = deque[bytes]()
        self._changed = threading.Condition(threading.Lock())
        self._closed = False

    def feed(self, data: bytes) -> None:
        """Take one packet's data; called on the transport's thread."""
        with self._changed:
            self._pieces.append(data)
            self._changed.notify()

    def read(self, most: int, timeout_s: float | None = None) -> bytes:
        """What is there, at most `most` bytes; waits for it. Empty once it is closed. Raises paramiko's PipeTimeout."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self._closed, timeout_s):
                from paramiko.buffered_pipe import PipeTimeout

                raise PipeTimeout
            taken, size = [], 0
            while self._pieces and size < most:
                taken.append(self._pieces.popleft())
                size += len(taken[-1])
            if size > most:
                keep = len(taken[-1]) - (size - most)
                self._pieces.appendleft(taken[-1][keep:])
                taken[-1] = taken[-1][:keep]
            return taken[0] if len(taken) == 1 else b"".join(taken)

    def read_ready(self) -> bool:
        """Whether `read` would return at once with something."""
        return bool(self._pieces)

    def close(self) -> None:
        """No more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._pieces))
