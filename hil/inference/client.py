"""Synchronous OpenAI-compatible streaming client whose TCP connection comes from whoever can reach the board.

`connect(host, port, timeout_s)` hands in a connected socket: the payload broker's, an SSH direct-tcpip channel, or a
plain one. Times are `time.monotonic()` at the socket: `t_send` right before the first request byte is written, `t_last`
when the last response byte was read. Tokens are counted here, one per streamed chunk with non-empty content: a server's
own counters move only when a request finishes, so what was made before a power cut would be lost.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import httpcore

from hil.errors import BenchError, BoardError, HilError, SafetyError, UsageError

LostReason = Literal["connect", "silence", "closed"]


class SocketLike(Protocol):
    """What `socket.socket` and `paramiko.Channel` have in common and this client needs."""

    def settimeout(self, timeout: float | None, /) -> None: ...
    def recv(self, nbytes: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> None: ...
    def close(self) -> None: ...


Connect = Callable[[str, int, float], SocketLike]
OnToken = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Timings:
    """The server's own view: tokens per second of prompt processing and of decoding; None where it told nothing."""

    prompt_tps: float | None = None
    decode_tps: float | None = None


@dataclass(frozen=True, slots=True)
class ChatResult:
    """One answer. `tokens`: content chunks counted here; `server_tokens`: the server's `usage.completion_tokens`.

    `t_first` is the first non-empty content (None when there was none). llama.cpp counts an end-of-text token that
    carries no content, so `server_tokens` may exceed `tokens` by one, and by more when it holds back half a character.
    """

    answer: str
    tokens: int
    server_tokens: int | None
    t_connect: float
    t_send: float
    t_first: float | None
    t_last: float
    finish_reason: str | None
    timings: Timings = field(default_factory=Timings)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: `t_first - t_send`."""
        return None if self.t_first is None else self.t_first - self.t_send

    @property
    def duration_s(self) -> float:
        """First byte up to last byte down: `t_last - t_send`. The TCP handshake is `t_send - t_connect`."""
        return self.t_last - self.t_send


class LinkLost(BenchError):
    """The connection went silent, was closed or never came up. What had arrived is in `partial`.

    The client cannot know whether the link or the board is to blame; who knows the link's state decides.
    """

    def __init__(self, message: str, reason: LostReason, partial: ChatResult | None = None, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.partial = partial


def stream_chat(
    connect: Connect,
    base: str,
    messages: Sequence[Mapping[str, str]],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    api_key: str | None = None,
    timeout_s: float = 120.0,
    silence_s: float | None = None,
    on_token: OnToken | None = None,
    extra: Mapping[str, Any] | None = None,
) -> ChatResult:
    """Ask `base` (`http://host:port`) and stream the answer; `on_token(text, t_s)` is called for every content chunk.

    `timeout_s` bounds the whole exchange from connect to last byte; `silence_s` additionally bounds the wait for any
    single byte. `extra` adds request fields (`ignore_eos`, `cache_prompt`, ...). Raises LinkLost with the partial
    answer, or BoardError when the server refuses, reports an error or sends something that is not a chat stream.
    """
    body: dict[str, Any] = {
        "messages": [dict(message) for message in messages],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"seed": seed} if seed is not None else {}),
        **(extra or {}),
    }
    wire = _Wire(connect, timeout_s, silence_s)
    chat = _Chat(on_token)
    try:
        with _exchange(wire, "POST", f"{base}/v1/chat/completions", body, api_key) as response:
            if response.status != 200:
                raise _refused(base, response.status, response.read())
            for event in _events(response.iter_stream()):
                chat.take(event, wire.t_read)
    except LinkLost as lost:
        lost.partial = chat.result(wire) if wire.t_first_write is not None else None
        raise
    if not chat.done:
        raise LinkLost(
            f"{base} closed the stream after {chat.tokens} tokens without ending it", "closed", chat.result(wire)
        )
    return chat.result(wire)


@dataclass(frozen=True, slots=True)
class Reply:
    """A small JSON or text exchange: HTTP status, body, and monotonic times of first byte up and last byte down."""

    status: int
    body: bytes
    t_send: float
    t_last: float

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; BoardError when it is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise BoardError(f"expected a JSON object, got {self.body[:200]!r}")
        return value


def request(
    connect: Connect,
    method: str,
    url: str,
    body: Mapping[str, Any] | None = None,
    *,
    api_key: str | None = None,
    timeout_s: float = 10.0,
) -> Reply:
    """One complete HTTP exchange on a connection of its own. Raises LinkLost; judges no status."""
    wire = _Wire(connect, timeout_s, None)
    with _exchange(wire, method, url, body, api_key) as response:
        content = response.read()
    return Reply(response.status, content, wire.t_send, wire.t_read)


def health(connect: Connect, base: str, *, timeout_s: float = 5.0) -> bool:
    """Whether the model server is loaded and ready (`/health` answers 200). False while it loads or is unreachable."""
    try:
        return request(connect, "GET", f"{base}/health", timeout_s=timeout_s).status == 200
    except LinkLost:
        return False


def metrics_text(connect: Connect, base: str, *, api_key: str | None = None, timeout_s: float = 5.0) -> str:
    """The model server's `/metrics` in Prometheus text form. Scraping resets llama.cpp's two throughput gauges."""
    reply = request(connect, "GET", f"{base}/metrics", api_key=api_key, timeout_s=timeout_s)
    if reply.status != 200:
        raise _refused(base, reply.status, reply.body)
    return reply.body.decode("utf-8", "replace")


class _Wire(httpcore.NetworkBackend):
    """Opens the connection by `connect`, holds every read and write to the deadline, and takes the times."""

    def __init__(self, connect: Connect, timeout_s: float, silence_s: float | None) -> None:
        self._connect = connect
        self._timeout_s = timeout_s
        self._silence_s = silence_s
        self.t_connect = time.monotonic()
        self.deadline_s = self.t_connect + timeout_s
        self.t_first_write: float | None = None
        self.t_read = self.t_connect

    @property
    def t_send(self) -> float:
        return self.t_connect if self.t_first_write is None else self.t_first_write

    def allowed_s(self) -> float:
        """Seconds the next read or write may take. Raises httpcore.ReadTimeout when the deadline has passed."""
        left = self.deadline_s - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout(f"{self._timeout_s:g} s are over")
        return left if self._silence_s is None else min(left, self._silence_s)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            sock = self._connect(host, port, self.allowed_s())
        except (UsageError, SafetyError):
            raise
        except HilError as error:
            # An SSH forward to a port that nothing listens on yet says so as the board's error.
            raise LinkLost(f"no connection to {host}:{port}: {error.message}", "connect") from error
        except (OSError, EOFError) as error:
            raise LinkLost(f"no connection to {host}:{port}: {error}", "connect") from error
        return _Stream(sock, self)


class _Stream(httpcore.NetworkStream):
    def __init__(self, sock: SocketLike, wire: _Wire) -> None:
        self._sock = sock
        self._wire = wire

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._sock.settimeout(self._wire.allowed_s())
        try:
            data = self._sock.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except (OSError, EOFError) as error:
            raise httpcore.ReadError(str(error)) from error
        if data:
            self._wire.t_read = time.monotonic()
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        self._sock.settimeout(self._wire.allowed_s())
        if self._wire.t_first_write is None:
            self._wire.t_first_write = time.monotonic()
        try:
            self._sock.sendall(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except (OSError, EOFError) as error:
            raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._sock.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        raise NotImplementedError("the connection handed in is private already: use an http:// address")

    def get_extra_info(self, info: str) -> Any:
        return None


@contextmanager
def _exchange(
    wire: _Wire, method: str, url: str, body: Mapping[str, Any] | None, api_key: str | None
) -> Iterator[httpcore.Response]:
    """One request on one connection, which is closed at the end; every transport fault becomes LinkLost."""
    content = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
    headers = [("Connection", "close"), ("Accept-Encoding", "identity")]
    if body is not None:
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
    if api_key:
        headers.append(("Authorization", f"Bearer {api_key}"))
    try:
        with (
            httpcore.ConnectionPool(network_backend=wire, max_connections=1, retries=0) as pool,
            pool.stream(method, url, headers=[("Host", _host(url)), *headers], content=content) as response,
        ):
            yield response
    except httpcore.TimeoutException as error:
        waited = time.monotonic() - wire.t_connect
        raise LinkLost(f"{url}: silence, given up after {waited:.1f} s", "silence") from error
    except (httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise LinkLost(f"{url}: connection lost: {error}", "closed") from error


def _host(url: str) -> str:
    return url.split("://", 1)[-1].split("/", 1)[0]


def _refused(base: str, status: int, body: bytes) -> BoardError:
    return BoardError(f"{base} answered {status}: {body[:300].decode('utf-8', 'replace')}")


def _events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event; comments and other fields are passed over, `error:` lines are kept.

    Lines are cut from bytes, so that a character split over two chunks stays whole.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.rstrip(b"\r").partition(b":")
            if name in (b"data", b"error"):
                yield value.removeprefix(b" ").decode("utf-8", "replace")


class _Chat:
    """Collects the answer from the stream's events."""

    def __init__(self, on_token: OnToken | None) -> None:
        self._on_token = on_token
        self._parts: list[str] = []
        self._t_first: float | None = None
        self._server_tokens: int | None = None
        self._finish: str | None = None
        self._timings = Timings()
        self.done = False

    @property
    def tokens(self) -> int:
        return len(self._parts)

    def take(self, data: str, t_s: float) -> None:
        if data.strip() == "[DONE]":
            self.done = True
            return
        chunk = self._parsed(data)
        for choice in chunk.get("choices") or ():
            # The first chunk carries the role and `content: null`: not a token.
            text = (choice.get("delta") or {}).get("content")
            self._finish = choice.get("finish_reason") or self._finish
            if text:
                if self._t_first is None:
                    self._t_first = t_s
                self._parts.append(text)
                if self._on_token:
                    self._on_token(text, t_s)
        if usage := chunk.get("usage"):
            self._server_tokens = int(usage["completion_tokens"])
        if timings := chunk.get("timings"):
            self._timings = Timings(
                prompt_tps=_per_second(timings, "prompt_n", "prompt_ms"),
                decode_tps=_per_second(timings, "predicted_n", "predicted_ms"),
            )

    def _parsed(self, data: str) -> dict[str, Any]:
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise BoardError(f"the model server streamed something that is not a chat chunk: {data[:200]!r}")
        if "error" in chunk or ("message" in chunk and "choices" not in chunk):
            raise BoardError(f"the model server reported: {json.dumps(chunk.get('error', chunk))[:300]}")
        return chunk

    def result(self, wire: _Wire) -> ChatResult:
        return ChatResult(
            answer="".join(self._parts),
            tokens=self.tokens,
            server_tokens=self._server_tokens,
            t_connect=wire.t_connect,
            t_send=wire.t_send,
            t_first=self._t_first,
            t_last=max(wire.t_read, wire.t_send),
            finish_reason=self._finish,
            timings=self._timings,
        )


def _per_second(timings: Mapping[str, Any], count: str, milliseconds: str) -> float | None:
    n, ms = timings.get(count), timings.get(milliseconds)
    if not isinstance(n, int | float) or not isinstance(ms, int | float) or ms <= 0:
        return None
    return 1000.0 * n / ms
