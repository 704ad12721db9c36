"""A board behind a serial line for tests: a real shell on a terminal, and a kernel that writes between its bytes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import signal
import subprocess
import termios
import threading
import time
import tty
from collections.abc import Sequence
from typing import Any


class ShellBoard:
    """`argv` on a terminal of its own; `path` is the host's end of the serial line.

    `lines_per_s`: kernel messages, each put between two bytes of what the shell prints at that moment, wherever that
    is. `drop`: the share of typed bytes that the UART loses. `fifo`: how many bytes it takes at a time.
    """

    def __init__(
        self,
        argv: Sequence[str] = ("dash", "-i"),
        *,
        lines_per_s: float = 0.0,
        drop: float = 0.0,
        seed: int = 1,
        env: dict[str, str] | None = None,
    ) -> None:
        self._chance = random.Random(seed)
        self.messages = 0
        self.inside = 0  # messages that tore a line of the shell's apart
        self._period_s = 1.0 / lines_per_s if lines_per_s else None
        self._drop = drop
        self._line, self._far = os.openpty()
        tty.setraw(self._far)
        self.path = os.ttyname(self._far)
        self._terminal, slave = os.openpty()
        self._shell = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", "PS1": "# ", **(env or {})},
        )
        os.close(slave)
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._up, daemon=True),
            threading.Thread(target=self._down, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> ShellBoard:
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.wait()
        for thread in self._threads:
            thread.join()
        for fd in (self._line, self._far, self._terminal):
            os.close(fd)

    def kernel(self, text: str) -> None:
        """Let the kernel say this now."""
        os.write(self._line, text.encode())

    def _message(self) -> bytes:
        self.messages += 1
        stamp = time.monotonic()
        texts = ("usb 1-1: new high-speed USB device", "HIL-0-1-AAAA.", "eth0: link up, 0 errors # ", "hil_r lost > ")
        return f"[{stamp:12.6f}] {self._chance.choice(texts)}\r\n".encode()

    def _up(self) -> None:
        due = time.monotonic()
        at_start = True
        while not self._end.is_set():
            wait_s = 0.1 if self._period_s is None else min(max(due - time.monotonic(), 0.0), 0.1)
            data = b""
            if select.select([self._terminal], [], [], wait_s)[0]:
                try:
                    data = os.read(self._terminal, 4096)
                except OSError:
                    return
            for _ in range(20):  # a busy host is late with them: what the shell says has its turn all the same
                if self._period_s is None or time.monotonic() < due:
                    break
                cut = self._chance.randint(0, len(data))
                if (cut > 0 and data[cut - 1 : cut] != b"\n") or (cut == 0 and not at_start):
                    self.inside += 1
                self._say(data[:cut] + self._message())
                data, at_start = data[cut:], True
                due += self._period_s
            else:
                due = time.monotonic()
            if data:
                self._say(data)
                at_start = data.endswith(b"\n")

    def _say(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data and not self._end.is_set():
                if select.select([], [self._line], [], 0.1)[1]:
                    data = data[os.write(self._line, data[:1024]) :]

    def _down(self) -> None:
        while not self._end.is_set():
            if not select.select([self._line], [], [], 0.1)[0]:
                continue
            data = os.read(self._line, 4096)
            kept = bytes(byte for byte in data if self._drop == 0.0 or self._chance.random() >= self._drop)
            with contextlib.suppress(OSError):
                os.write(self._terminal, kept)
