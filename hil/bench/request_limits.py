"""What a request must keep to before the API looks at it: a body of bounded, told length, and a time to come in."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from hil.bench.sockets import describe_error
from hil.errors import HilError, UsageError

log = logging.getLogger("hil.requests")

# Read on the loop that also regulates power: 1 MiB takes it some 40 ms.
BODY_BYTES = 64 << 10
# Where a client has more to say: rows of a flight's record, in batches.
LONG_BODIES = {"/v1/flight/record": 1 << 20}
# From a request's first byte to its last one. A client that trickles would keep a connection, and what it has sent.
REQUEST_S = 20.0
# The application's own shape, as ASGI servers and applications know it.
Scope = dict[str, Any]
Asgi = Callable[[Scope, Any, Any], Any]


def bounded(app: Asgi) -> Asgi:
    """`app` behind limits of a body's bytes: 413 for a longer one, 411 for one that does not tell its length.

    Judged by the header alone: a server never hands on more bytes than that.
    """

    async def serve(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            length = headers.get(b"content-length")
            if length is None and b"transfer-encoding" in headers:
                await refuse(send, 411, UsageError(f"{_call(scope)}: a body without Content-Length is not taken"))
                return
            limit = LONG_BODIES.get(scope["path"], BODY_BYTES)
            if length is not None and int(length) > limit:
                error = UsageError(
                    f"{_call(scope)}: a body of {int(length)} bytes is too long, at most {limit} are taken",
                    hint="send it in parts; files go to a board over its shell",
                )
                await refuse(send, 413, error)
                return
        await app(scope, receive, send)

    return serve


async def refuse(send: Any, status: int, error: HilError) -> None:
    """Answer with `error` in the form of every error of the daemon."""
    body = json.dumps({"error": describe_error(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def in_time(protocol: Callable[..., asyncio.Protocol]) -> Callable[..., asyncio.Protocol]:
    """The server's HTTP protocol, whose connection is dropped when a request takes longer to come in: uvicorn bounds
    only the time between requests.
    """
    return lambda **arguments: _InTime(protocol(**arguments))


class _InTime(asyncio.Protocol):
    """Passes everything on to `inner`, uvicorn's protocol, and looks after each piece whether the request is whole."""

    def __init__(self, inner: asyncio.Protocol) -> None:
        self._inner = inner
        self._transport: asyncio.BaseTransport | None = None
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        cycle: Any = getattr(self._inner, "cycle", None)  # of the latest request whose head is whole
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            self._in()
        elif self._late is None:
            self._late = asyncio.get_running_loop().call_later(REQUEST_S, self._drop)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._in()
        self._inner.connection_lost(error)

    def _in(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _drop(self) -> None:
        log.info("a request that was not whole after %g s was dropped", REQUEST_S)
        if isinstance(self._transport, asyncio.Transport):
            self._transport.abort()


def _call(scope: Scope) -> str:
    return f"{scope['method']} {scope['path']}"
