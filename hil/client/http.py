"""HTTP to the daemon over its unix socket, or TLS: JSON both ways, the daemon's errors raised as the same classes.

The standard library's client on purpose: a test session must not pay for importing more, and a call takes well under
a millisecond on a connection that is kept open.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hil.bench.sockets import error_from
from hil.errors import BenchError

if TYPE_CHECKING:
    from hil.client.remote import Address

TOKEN_HEADER = "X-Hil-Token"  # noqa: S105  (a header's name)


class DaemonGone(BenchError):
    """Nobody answers on the bench's socket."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class Http:
    """Calls to one daemon; usable from several threads, each call on a connection of its own from a small pool."""

    def __init__(
        self,
        path: Path | str,
        timeout_s: float = 30.0,
        *,
        open_: Callable[[float], http.client.HTTPConnection] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._timeout_s = timeout_s
        self._open = open_ or (lambda timeout_s: _UnixConnection(Path(path), timeout_s))
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    @classmethod
    def remote(cls, address: Address) -> Http:
        """To a bench on another host."""
        from hil.client.remote import TlsConnection

        return cls(
            str(address),
            open_=lambda timeout_s: TlsConnection(address, timeout_s),
            headers={"Authorization": f"Bearer {address.user_token}"},
        )

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        return self.call("GET", path, timeout_s=timeout_s)

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """The decoded answer. Raises what the daemon raised, or DaemonGone, or BenchError after `timeout_s`."""
        headers = dict(self._headers)
        if token is not None:
            headers[TOKEN_HEADER] = token
        status, answer = self._exchange(
            method, path, None if body is None else json.dumps(body).encode(), headers, timeout_s or self._timeout_s
        )
        try:
            value = json.loads(answer) if answer else None
        except ValueError:
            raise BenchError(f"the daemon answered {method} {path} with {answer[:200]!r}") from None
        if status >= 400:
            raise error_from(value, f"{method} {path}: status {status}")
        return value

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> tuple[int, bytes]:
        with self._connection(timeout_s) as connection:
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                return response.status, response.read()
            except TimeoutError:
                connection.close()
                raise BenchError(
                    f"the bench daemon did not answer {method} {path} within {timeout_s:g} s",
                    hint="hil bench status; its log is named there",
                ) from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise DaemonGone(
                    f"no bench daemon answers on {self.path}: {error}",
                    hint="the dead-man has switched its outputs off; start it again (hil bench serve)",
                ) from error

    @contextlib.contextmanager
    def _connection(self, timeout_s: float) -> Iterator[http.client.HTTPConnection]:
        with self._lock:
            connection = self._idle.pop() if self._idle else self._open(timeout_s)
        connection.timeout = timeout_s
        if connection.sock is not None:
            # Readable while nothing is asked: the daemon closed it, or another one has taken its place.
            if select.select([connection.sock], [], [], 0)[0]:
                connection.close()
            else:
                connection.sock.settimeout(timeout_s)
        try:
            yield connection
        except BaseException:
            connection.close()  # a half-read answer must not become the next call's
            raise
        with self._lock:
            self._idle.append(connection)
