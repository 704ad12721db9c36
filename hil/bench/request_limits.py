"""What a request must keep to before the API looks at it: a body of bounded, told length."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hil.bench.sockets import describe_error
from hil.errors import HilError, UsageError

# Read on the loop that also regulates power: 1 MiB takes it some 40 ms.
BODY_BYTES = 64 << 10
# Where a client has more to say: rows of a flight's record, in batches.
LONG_BODIES = {"/v1/flight/record": 1 << 20}
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


def _call(scope: Scope) -> str:
    return f"{scope['method']} {scope['path']}"
