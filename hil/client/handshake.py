"""The first words on a stream of the daemon: one line of JSON each way."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any


def ask(sock: socket.socket, asked: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Say what is wanted; the answer, and bytes of the stream that came with it. Raises OSError or ValueError."""
    sock.sendall(json.dumps(asked).encode() + b"\n")
    data = b""
    while b"\n" not in data:
        more = sock.recv(4096)
        if not more:
            raise ConnectionError("the daemon closed it")
        data += more
    line, _, rest = data.partition(b"\n")
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError("not a handshake")
    return answer, rest
