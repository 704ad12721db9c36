"""A helper process kept on the board that starts commands: a channel and a login shell for each cost milliseconds.

It is a few lines of Python sent over one channel when a connection turns out to carry several commands, and gone with
it; a board without Python does without, call by call over channels of their own, with the same results.
"""

from __future__ import annotations

import json
import shlex
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import paramiko

# Calls over a channel of their own before the helper is sent: short connections and slow links are spared its price.
CALLS_BEFORE = 2
_HEADER = struct.Struct(">cI")
# Frames towards us: `r` ready, `p` process id, `o` stdout, `e` stderr, `x` exit status (negative: a signal).
# The process id waits 10 ms for something to go with: a short command costs one packet back, not two.
# What cannot be started is left to `sh`, which knows the proper message and status.
_SOURCE = """
import json, os, select, signal, struct, sys

def frame(kind, data=b""):
    return struct.pack(">cI", kind, len(data)) + data

def say(data):
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest):]

def spawn(argv, actions):
    return os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions, setsid=True,
                           setsigdef=[signal.SIGPIPE, signal.SIGXFSZ])

say(frame(b"r"))
for line in sys.stdin.buffer:
    argv = [word.encode("utf-8", "surrogateescape") for word in json.loads(line)]
    out, err = os.pipe(), os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
               (os.POSIX_SPAWN_DUP2, out[1], 1), (os.POSIX_SPAWN_DUP2, err[1], 2)]
    try:
        pid = spawn(argv, actions)
    except (OSError, ValueError):
        pid = spawn([b"/bin/sh", b"-c", b'exec "$@"', b"sh", *argv], actions)
    os.close(out[1])
    os.close(err[1])
    held = frame(b"p", b"%d" % pid)
    names, poll = {out[0]: b"o", err[0]: b"e"}, select.poll()
    for fd in names:
        poll.register(fd, select.POLLIN)
    while names:
        ready = poll.poll(10 if held else None)
        if not ready:
            say(held)
            held = b""
        for fd, _ in ready:
            data = os.read(fd, 65536)
            if data:
                say(held + frame(names[fd], data))
                held = b""
            else:
                poll.unregister(fd)
                os.close(fd)
                del names[fd]
    say(held + frame(b"x", b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
"""


class Worker:
    """The helper of one connection. One command at a time: a caller that finds it busy uses a channel of its own.

    `open_channel(command, timeout_s)` starts a command line in the far login shell.
    """

    def __init__(self, open_channel: Callable[[str, float], paramiko.Channel], python: str | None = "python3") -> None:
        self._open, self._python = open_channel, python
        self._busy = threading.Lock()
        self._calls = 0
        self._channel: paramiko.Channel | None = None
        self._ready = False
        self._buffer = bytearray()
        self.pid = 0

    def claim(self, timeout_s: float) -> bool:
        """Whether it takes the next command; then `run` and `release` must follow. Sends the helper when it is time."""
        if self._python is None or not self._busy.acquire(blocking=False):
            return False
        usable = False
        try:
            usable = self._usable(timeout_s)
        finally:
            if not usable:
                self._busy.release()
        return usable

    def release(self) -> None:
        """The command is over."""
        self._busy.release()

    def _usable(self, timeout_s: float) -> bool:
        self._calls += 1
        if self._channel is None:
            if self._calls > CALLS_BEFORE:
                self._channel = self._open(
                    f"exec {self._python} -I -S -c {shlex.quote(_SOURCE)} 2>/dev/null", timeout_s
                )
            return False
        if not self._ready:
            if self._channel.closed or self._channel.eof_received:
                self._python = None  # there is no Python, or one that cannot do it
                return False
            self._ready = self._channel.recv_ready() and self._channel.recv(_HEADER.size)[:1] == b"r"
        return self._ready

    def run(self, argv: Sequence[str], deadline_s: float, sink: Callable[[str, bytes], None]) -> int:
        """Run one command to its end; `sink` gets ("stdout" or "stderr", bytes) as they come. Returns its status.

        Raises TimeoutError past `deadline_s` (then `pid` is what to kill, if known) and EOFError when the helper or
        the connection ended; the helper is given up in both cases and a later call sends another.
        """
        assert self._channel is not None
        self.pid = 0
        try:
            self._channel.settimeout(max(deadline_s - time.monotonic(), 0.001))
            self._channel.sendall(json.dumps(list(argv)).encode() + b"\n")
            while True:
                kind, data = self._frame(deadline_s)
                if kind == b"x":
                    return int(data)
                if kind == b"p":
                    self.pid = int(data)
                else:
                    sink("stdout" if kind == b"o" else "stderr", data)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Give the helper up, with whatever it may still say."""
        channel, self._channel = self._channel, None
        self._ready, self._calls = False, 0
        self._buffer.clear()
        if channel is not None:
            channel.close()

    def _frame(self, deadline_s: float) -> tuple[bytes, bytes]:
        assert self._channel is not None
        while True:
            if len(self._buffer) >= _HEADER.size:
                kind, length = _HEADER.unpack_from(self._buffer)
                end = _HEADER.size + length
                if len(self._buffer) >= end:
                    data = bytes(memoryview(self._buffer)[_HEADER.size : end])
                    del self._buffer[:end]
                    return kind, data
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._channel.settimeout(left_s)
            received = self._channel.recv(1 << 17)
            if not received:
                raise EOFError("connection lost")
            self._buffer += received
