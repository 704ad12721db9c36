"""The bench over a network: TLS with the bench's own certificate, a token a user, the same API as on the unix socket.

Only a bench file with `remote:` opens a port. A client pins the certificate's fingerprint; ALPN tells a raw stream (a
console) from HTTP on the one port. Whoever may enter the bench's state directory makes and revokes tokens.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hil.bench.journal import utc_text
from hil.bench.pumps import pump, until_one_ends
from hil.bench.request_limits import Asgi, Scope, in_time, refuse
from hil.bench.sockets import describe_error
from hil.errors import BenchError, HilError, UsageError

log = logging.getLogger("hil.remote")

STREAM_PROTOCOL = "hil-stream/1"
HANDSHAKE_S = 10.0
HANDSHAKE_BYTES = 4096
FIRST_BYTE_S = 10.0
USER_TICK_S = 1.0
CONNECTIONS = 256
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
CERTIFICATE_DAYS = 3650
# What names files of the bench's host, or ends its daemon.
LOCAL_ONLY = frozenset({("POST", "/v1/stop"), ("POST", "/v1/flights")})
_UNKNOWN = UsageError("this bench knows no such user token", hint="hil bench token add USER, on its host")


class Users:
    """Who may come over the network: `users.json` with a hash of each user's token; a change counts at once."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "users.json"
        self._seen: tuple[int, int] | None = None
        self._users: dict[str, dict[str, str]] = {}

    def add(self, user: str, now_s: float) -> str:
        """A new token for `user`, shown once; one that the user had is void. Raises UsageError for a poor name."""
        if not user.isprintable() or not user.strip() or len(user) > 60 or ":" in user:
            raise UsageError(f"{user!r} is no user name", hint="up to 60 printable characters, no colon")
        token = secrets.token_urlsafe(32)
        users = self._read()
        users[user] = {"sha256": _hashed(token), "added": utc_text(now_s)}
        self._write(users)
        return token

    def remove(self, user: str) -> None:
        """The user's token is void from now on. Raises UsageError for an unknown one."""
        users = self._read()
        if users.pop(user, None) is None:
            raise UsageError(f"no user {user!r}", hint=f"users: {', '.join(users) or 'none'}")
        self._write(users)

    def list(self) -> dict[str, str]:
        """User -> since when."""
        return {user: entry["added"] for user, entry in self._read().items()}

    def whose(self, token: str) -> str | None:
        """The user whose token this is."""
        hashed, found = _hashed(token), None
        for user, entry in self._read().items():
            if hmac.compare_digest(entry["sha256"], hashed):
                found = user
        return found

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            info = self._path.stat()
            seen = (info.st_mtime_ns, info.st_ino)
            if seen != self._seen:
                self._users, self._seen = json.loads(self._path.read_text(encoding="utf-8")), seen
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise BenchError(
                f"cannot read {self._path}: {error}", hint="hil bench token add USER after removing it"
            ) from error
        return dict(self._users)

    def _write(self, users: dict[str, dict[str, str]]) -> None:
        fresh = self._path.with_suffix(".new")
        _write_private(fresh, json.dumps(users, indent=1).encode())
        fresh.rename(self._path)


def certificate(state_dir: Path, name: str) -> tuple[Path, Path]:
    """(certificate, private key) of the bench as PEM files; made at first use, kept for good: clients pin it."""
    made, key_file = state_dir / "tls-certificate.pem", state_dir / "tls-key.pem"
    if not made.exists():
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"hil bench {name}")])
        now = datetime.datetime.now(datetime.UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
            .sign(key, hashes.SHA256())
        )
        _write_private(
            key_file,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )
        _write_private(made, built.public_bytes(serialization.Encoding.PEM))
    return made, key_file


def fingerprint(made: Path) -> str:
    """SHA-256 of the certificate, in hexadecimal: what clients pin."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(made.read_text("ascii"))).hexdigest()


def guarded(app: Asgi, users: Users) -> Asgi:
    """The API for other hosts: every request needs a user's token and is told whose it is (`state.user`)."""

    async def serve(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        token = _bearer(scope["headers"])
        user = users.whose(token)

        async def heard() -> Any:
            """A user who is removed while a call waits (in line for a lease) has left."""
            return await receive() if users.whose(token) is not None else {"type": "http.disconnect"}

        if user is None:
            await refuse(send, 401, _UNKNOWN)
        elif (scope["method"], scope["path"]) in LOCAL_ONLY:
            error = UsageError(f"{scope['path']} is for the bench's own host", hint="log in there")
            await refuse(send, 403, error)
        else:
            await app({**scope, "state": {**scope.get("state", {}), "user": user}}, heard, send)

    return serve


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        kind, _, token = value.partition(b" ")
        if name == b"authorization" and kind.lower() == b"bearer":
            return token.decode("latin-1").strip()
    return ""


class Front(asyncio.Protocol):
    """A new connection: passes on to one of the HTTP server or a raw stream, as its ALPN says.

    `places` holds those that count against `CONNECTIONS`. Made before the TLS handshake; what does not send a first
    byte in time has its place until then.
    """

    def __init__(
        self, http: Callable[[], asyncio.Protocol], stream: Callable[[], asyncio.Protocol], places: set[Front]
    ) -> None:
        if len(places) >= CONNECTIONS:
            raise ConnectionRefusedError("too many connections")  # asyncio closes it
        self._http = http
        self._stream = stream
        self._places = places
        self._places.add(self)
        self._transport: asyncio.Transport | None = None
        self._inner = asyncio.Protocol()
        self._late = asyncio.get_running_loop().call_later(HANDSHAKE_S + FIRST_BYTE_S, self._mute)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a stream transport is needed")
        # A peer that is gone without a word must not keep its place for ever.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, value)
        chosen = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        self._transport = transport
        self._inner = self._stream() if chosen == STREAM_PROTOCOL else self._http()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._late.cancel()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._leave()
        self._inner.connection_lost(error)

    def _mute(self) -> None:
        self._leave()
        if self._transport is not None:
            self._transport.abort()

    def _leave(self) -> None:
        self._late.cancel()
        self._places.discard(self)


class RemoteServer:
    """The bench's port. `sockets` gives the unix socket of a stream by its kind and board, or raises HilError."""

    def __init__(self, app: Asgi, users: Users, tls: tuple[Path, Path], sockets: Callable[[str, str], Path]) -> None:
        self._app = guarded(app, users)
        self._users = users
        self._sockets = sockets
        self._places: set[Front] = set()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.num_tickets = 0  # clients look for bytes that nobody asked for
        self._context.load_cert_chain(*tls)
        self._context.set_alpn_protocols([STREAM_PROTOCOL, "http/1.1"])

    async def start(self, host: str, port: int) -> tuple[asyncio.Server, int]:
        """Listen; returns the server and its port. Raises BenchError when the address is taken."""
        import uvicorn
        from uvicorn.server import ServerState

        config = uvicorn.Config(self._app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=3600)
        config.load()
        state = ServerState()
        served = in_time(config.http_protocol_class)

        def http() -> asyncio.Protocol:
            return served(config=config, server_state=state, app_state={})

        def stream() -> asyncio.Protocol:
            reader = asyncio.StreamReader(limit=HANDSHAKE_BYTES)
            return asyncio.StreamReaderProtocol(reader, self._stream)

        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(
                lambda: Front(http, stream, self._places),
                host,
                port,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_S,
            )
        except OSError as error:
            raise BenchError(f"cannot listen on {host}:{port}: {error}", hint="`remote:` of the bench file") from error
        return server, int(server.sockets[0].getsockname()[1])

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """First line `{"user_token", "stream", "board"}`; then bytes to and from that stream's own socket."""
        try:
            path, token = self._opened(await asyncio.wait_for(reader.readline(), HANDSHAKE_S))
            inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        except HilError as error:
            writer.write(json.dumps({"error": describe_error(error)}).encode() + b"\n")
        except (OSError, TimeoutError, ValueError) as error:
            log.info("a stream did not come about: %s", error)
        else:
            await until_one_ends(
                pump(reader, inner_writer), pump(inner_reader, writer), self._removed(token, writer.transport)
            )
            inner_writer.close()
        finally:
            writer.close()

    async def _removed(self, token: str, transport: asyncio.WriteTransport) -> None:
        """Ends the connection within a second after the user's token became void."""
        while self._users.whose(token) is not None:  # noqa: ASYNC110  (a file changes, from another process)
            await asyncio.sleep(USER_TICK_S)
        transport.abort()

    def _opened(self, line: bytes) -> tuple[Path, str]:
        asked = json.loads(line)
        token = str(asked.get("user_token")) if isinstance(asked, dict) else ""
        if self._users.whose(token) is None:
            raise _UNKNOWN
        return self._sockets(str(asked.get("stream")), str(asked.get("board"))), token


def _write_private(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
