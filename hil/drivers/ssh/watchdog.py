"""One thread for the time limits of many calls: a timer thread a call would cost as much as a short command."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_IDLE_S = 10.0  # the thread ends when there was nothing to watch for this long


class Watchdog:
    """Calls back when a deadline passes before its body is left. Any number of bodies, from any threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[object, tuple[float, Callable[[], None]]] = {}
        self._wakes_s = 0.0
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limit(self, timeout_s: float, action: Callable[[], None]) -> Iterator[None]:
        """Call `action` on the watching thread if the body takes longer than `timeout_s`."""
        ticket, due_s = object(), time.monotonic() + timeout_s
        with self._changed:
            self._due[ticket] = (due_s, action)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="hil-ssh-limits", daemon=True)
                self._thread.start()
            elif due_s < self._wakes_s:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._due.pop(ticket, None)

    def _watch(self) -> None:
        idle_since = time.monotonic()
        while True:
            with self._changed:
                now = time.monotonic()
                passed = [ticket for ticket, (due_s, _) in self._due.items() if due_s <= now]
                actions = [self._due.pop(ticket)[1] for ticket in passed]
                if not actions:
                    if self._due:
                        idle_since = now
                    elif now - idle_since >= _IDLE_S:
                        self._thread = None
                        return
                    self._wakes_s = min([due_s for due_s, _ in self._due.values()], default=now + _IDLE_S)
                    self._changed.wait(self._wakes_s - now)
                    continue
            for action in actions:
                action()
