"""Whether a board may still be driven, without asking: a stream of the daemon that ends when the answer may change."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

from hil.bench.sockets import error_from
from hil.client.handshake import ask
from hil.errors import BenchError

TIMEOUT_S = 10.0


class Watch:
    """A silent stream: the daemon ends it in the moment in which the lease is over or the board's power was cut."""

    def __init__(self, path: Path, board: str, token: str, power_epoch: int | None) -> None:
        """Raises what the daemon says against driving the board, BenchError when it hangs; OSError or ValueError when
        nobody is there who understands.
        """
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(TIMEOUT_S)
            self._sock.connect(os.fspath(path))
            asked = {"stream": "watch", "board": board, "token": token, "power_epoch": power_epoch}
            answer, _ = ask(self._sock, asked)
            if "power_epoch" not in answer:
                raise error_from(answer, f"watching board {board}")
            self.power_epoch = int(answer["power_epoch"])
            self._sock.setblocking(False)
        except BaseException as error:
            self._sock.close()
            if isinstance(error, TimeoutError):
                hint = "hil bench status; its log is named there"
                raise BenchError(f"the bench daemon did not answer within {TIMEOUT_S:g} s", hint=hint) from None
            raise

    @property
    def silent(self) -> bool:
        """True while nothing has changed."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        self._sock.close()


class Watches:
    """One watch a board and lease, opened when it is first needed and again after it ended. For several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._open: dict[tuple[str, str], Watch] = {}

    def power_epoch(self, board: str, token: str, known: int | None) -> int:
        """The board's power epoch, when `token` may drive it and `known` is no other. Raises as `Watch` does."""
        with self._lock:
            watch = self._open.get((board, token))
            if watch is None or not watch.silent or known not in (None, watch.power_epoch):
                self._drop_ended()
                self._open[board, token] = watch = Watch(self._path, board, token, known)
            return watch.power_epoch

    def close(self) -> None:
        with self._lock:
            for watch in self._open.values():
                watch.close()
            self._open.clear()

    def _drop_ended(self) -> None:
        for key in [key for key, watch in self._open.items() if not watch.silent]:
            with contextlib.suppress(OSError):
                self._open.pop(key).close()
