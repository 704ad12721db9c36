"""A bench on another host: `https://HOST:PORT#FINGERPRINT`.

Its certificate is pinned by the fingerprint; the user's token comes from HIL_BENCH_TOKEN. HIL_BENCH_KEY names the SSH
key for its boards; without it, the bench file's path where such a file is here, or the SSH agent's keys.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import select
import socket
import ssl
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hil import paths
from hil.bench.sockets import describe_error, error_from
from hil.client.handshake import ask
from hil.client.http import DaemonGone, Http
from hil.errors import BenchError, UsageError

if TYPE_CHECKING:
    from hil import inventory

TOKEN_VARIABLE = "HIL_BENCH_TOKEN"  # noqa: S105  (a variable's name)
KEY_VARIABLE = "HIL_BENCH_KEY"  # a file's name
STREAM_PROTOCOL = "hil-stream/1"
CONNECT_S = 10.0
CHUNK_BYTES = 1 << 16
_ID = re.compile(r"[\w-][\w.-]{0,100}")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a bench listens, the certificate it must show, and the token that says who we are."""

    host: str
    port: int
    fingerprint: str
    user_token: str

    @classmethod
    def of(cls, url: str) -> Address:
        """From `https://HOST:PORT#FINGERPRINT` and the environment. Raises UsageError that says what is missing."""
        parts = urlsplit(url)
        pinned = re.sub(r"^sha256[:=]|[:\s]", "", parts.fragment.lower())
        try:
            port = parts.port
        except ValueError:
            port = None
        if not parts.hostname or port is None or parts.path.strip("/"):
            raise UsageError(f"{url!r} is no bench's address", hint="https://HOST:PORT#FINGERPRINT")
        if not re.fullmatch(r"[0-9a-f]{64}", pinned):
            raise UsageError(
                f"{url} does not say which certificate the bench has",
                hint="append # and the fingerprint that `hil bench token add` and `hil bench status` print there",
            )
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise UsageError(
                f"no user token for {parts.hostname}",
                hint=f"set {TOKEN_VARIABLE}; `hil bench token add USER` makes one there",
            )
        return cls(parts.hostname, port, pinned, token)

    def connect(self, timeout_s: float | None, protocol: str = "http/1.1") -> ssl.SSLSocket:
        """A connection to that very bench. Raises BenchError when another certificate is shown, OSError otherwise."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the certificate itself is pinned: no name and no authority is needed
        context.verify_mode = ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols([protocol])
        raw = socket.create_connection((self.host, self.port), timeout=CONNECT_S if timeout_s is None else timeout_s)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wrapped = context.wrap_socket(raw, server_hostname=self.host)
        except BaseException:
            raw.close()
            raise
        shown = hashlib.sha256(wrapped.getpeercert(binary_form=True) or b"").hexdigest()
        if not hmac.compare_digest(shown, self.fingerprint):
            wrapped.close()
            raise BenchError(
                f"{self} shows another certificate (sha256 {shown})",
                hint="nothing was told to it; ask the bench's host for its fingerprint: hil bench status",
            )
        return wrapped

    def __str__(self) -> str:
        return f"https://{self.host}:{self.port}"


class TlsConnection(http.client.HTTPConnection):
    """HTTP over a connection whose certificate is pinned."""

    def __init__(self, address: Address, timeout_s: float) -> None:
        super().__init__(address.host, address.port, timeout=timeout_s)
        self._address = address

    def connect(self) -> None:
        self.sock = self._address.connect(self.timeout)


def load_remote(url: str) -> inventory.Bench:
    """The bench behind `url` as its host describes it. Raises UsageError, or BenchError when it does not answer."""
    from hil.inventory.bench import Bench, BenchFile
    from hil.inventory.board_type import BoardType

    address = Address.of(url)
    connection = Http.remote(address)
    try:
        told = connection.get("/v1/bench", timeout_s=CONNECT_S)
    finally:
        connection.close()
    if not _ID.fullmatch(str(told["id"])):
        raise BenchError(f"{address} calls itself {told['id']!r}", hint="no directory here can be named after that")
    identity = f"{told['id']}-{hashlib.sha256(str(address).encode()).hexdigest()[:8]}"
    _log_in_from_here(told["file"], paths.state_dir(identity))
    return Bench(
        path=Path(told["path"]),
        id=identity,
        file=BenchFile.model_validate(told["file"]),
        types={name: BoardType.model_validate(item) for name, item in told["types"].items()},
        url=url,
    )


def _log_in_from_here(file: dict[str, Any], state_dir: Path) -> None:
    """Keys and pinned host keys are this host's: SSH is spoken from here to the board, the bench passes bytes on.

    Boards may have the same private addresses, on two benches or behind two jump hosts: each has its own `known_hosts`.
    """
    given = os.environ.get(KEY_VARIABLE)
    for name, board in file["boards"].items():
        for wire in (board.get("mgmt"), board.get("payload")):
            for hop in () if wire is None else (wire, *wire.get("jump", ())):
                hop["known_hosts"] = str(state_dir / f"known_hosts-{name}")
                told = hop.get("key")
                hop["key"] = given or (told if told and os.access(told, os.R_OK) else None)


def ssh_stream(address: Address, board: str, plane: str, token: str, timeout_s: float) -> socket.socket:
    """A connected socket that leads, through the bench, to the SSH port of a board's plane or its first jump host.

    It ends with the lease of `token`. Raises what the bench says against it, TimeoutError when it does not reach the
    board in time, DaemonGone when the bench itself does not answer.
    """
    try:
        far = address.connect(timeout_s, STREAM_PROTOCOL)
    except OSError as error:
        raise DaemonGone(f"no bench daemon answers on {address}: {error}") from error
    try:
        far.settimeout(timeout_s)
        far.sendall(json.dumps({"user_token": address.user_token, "stream": "ssh", "board": board}).encode() + b"\n")
        answer, rest = ask(far, {"stream": "ssh", "board": board, "plane": plane, "token": token})
        if "error" in answer:
            raise error_from(answer, f"a stream to board {board}")
    except TimeoutError:
        far.close()
        raise
    except (OSError, ValueError) as error:
        far.close()
        raise BenchError(f"{address} ended the stream to board {board}: {error}") from error
    except BaseException:
        far.close()
        raise
    ours, theirs = socket.socketpair()

    def relay() -> None:
        with theirs, far, contextlib.suppress(OSError):
            _shuttle(theirs, far, rest)

    threading.Thread(target=relay, name=f"hil-ssh-{board}", daemon=True).start()
    return ours


class StreamRelay:
    """A private unix socket here that leads to a stream of the bench: what reads consoles needs to know no TLS."""

    def __init__(self, address: Address, stream: str, board: str) -> None:
        self._address = address
        self._asked = {"user_token": address.user_token, "stream": stream, "board": board}
        self._directory = tempfile.TemporaryDirectory(prefix="hil-")  # 0700
        self.path = Path(self._directory.name) / f"{stream}.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, name=f"hil-relay-{board}", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._directory.cleanup()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._relay, args=(client,), name="hil-relay", daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client:
            try:
                far = self._address.connect(CONNECT_S, STREAM_PROTOCOL)
            except BenchError as error:
                _farewell(client, json.dumps({"error": describe_error(error)}).encode() + b"\n")
                return
            except OSError:
                return  # the client sees its connection end
            with far, contextlib.suppress(OSError):
                far.sendall(json.dumps(self._asked).encode() + b"\n")
                _shuttle(client, far)


def _farewell(client: socket.socket, data: bytes) -> None:
    """Last words. Closed with bytes unread, the socket would be reset and the words lost."""
    client.settimeout(CONNECT_S)
    with contextlib.suppress(OSError):
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        while client.recv(CHUNK_BYTES):
            pass


def _shuttle(client: socket.socket, far: ssl.SSLSocket, down: bytes = b"") -> None:
    """Bytes both ways until one side ends; `down` waits for the client already.

    On one thread, because two must not use one TLS connection; neither direction waits for the other.
    """
    client.setblocking(False)
    far.setblocking(False)
    to_client, to_far = bytearray(down), bytearray()
    while True:
        moved = False
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if len(to_client) < CHUNK_BYTES:  # more may be decrypted than the socket shows
                data = far.recv(CHUNK_BYTES)
                if not data:
                    break
                to_client += data
                moved = True
        with contextlib.suppress(BlockingIOError):
            if to_client:
                del to_client[: client.send(to_client)]
                moved = True
        with contextlib.suppress(BlockingIOError):
            if len(to_far) < CHUNK_BYTES:
                data = client.recv(CHUNK_BYTES)
                if not data:
                    break
                to_far += data
                moved = True
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if to_far:
                del to_far[: far.send(to_far)]
                moved = True
        if not moved:
            reads = [far] * (len(to_client) < CHUNK_BYTES) + [client] * (len(to_far) < CHUNK_BYTES)
            select.select(reads, [client] * bool(to_client) + [far] * bool(to_far), [])
    client.settimeout(CONNECT_S)
    client.sendall(to_client)
    far.settimeout(CONNECT_S)
    far.sendall(to_far)
