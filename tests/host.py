"""Whether the host itself stood still while a test measured a time: then nothing was measured."""

from __future__ import annotations

import threading
import time

import pytest

STALL_S = 0.5


class Host:
    """Watches how much longer than asked a short sleep takes, on a thread that does nothing else."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._worst_s = 0.0
        self._thread = threading.Thread(target=self._watch, name="host-watch", daemon=True)
        self._thread.start()

    def excuses(self, what: str, seconds: float, limit_s: float) -> None:
        """A time over its limit counts only if the host ran: otherwise nothing was measured, and the test says so."""
        if seconds >= limit_s and self._worst_s > STALL_S:
            pytest.skip(f"{what} took {seconds:.2f} s, but the host stood still for {self._worst_s:.2f} s meanwhile")
        assert seconds < limit_s, f"{what} took {seconds:.2f} s (worst delay of the host {self._worst_s:.3f} s)"

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        pause_s = 0.02
        while not self._stop.is_set():
            began = time.monotonic()
            time.sleep(pause_s)
            self._worst_s = max(self._worst_s, time.monotonic() - began - pause_s)
