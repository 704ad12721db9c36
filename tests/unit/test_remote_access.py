"""A bench over the network, without a bench: tokens, the pinned certificate, HTTP and raw streams on one port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hil.bench.remote import RemoteServer, Users, certificate, fingerprint, guarded
from hil.client.http import DaemonGone, Http
from hil.client.remote import Address, StreamRelay, _log_in_from_here, load_remote
from hil.errors import BenchError, UsageError

URL = "https://lab.example:7443#" + "ab" * 32


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Says who asks and for what."""
    body = json.dumps({"user": scope["state"]["user"], "path": scope["path"]}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


class Served:
    """A server on a thread of its own."""

    def __init__(self, directory: Path) -> None:
        self.users = Users(directory)
        self.token = self.users.add("anna", 0.0)
        self.tls = certificate(directory, "test")
        self._stream = directory / "s.sock"
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def address(self, pinned: str | None = None, token: str | None = None) -> Address:
        return Address("127.0.0.1", self.port, pinned or fingerprint(self.tls[0]), token or self.token)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _socket(self, stream: str, board: str) -> Path:
        if (stream, board) != ("console", "b1"):
            raise UsageError(f"no stream {stream} of {board}")
        return self._stream

    def _serve(self, ready: threading.Event) -> None:
        async def body() -> None:
            self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
            async with await asyncio.start_unix_server(echo, self._stream):
                remote = RemoteServer(app, self.users, self.tls, self._socket)
                server, self.port = await remote.start("127.0.0.1", 0)
                ready.set()
                await self._over.wait()
                server.close()

        asyncio.run(body())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path)
    yield server
    server.close()


def test_the_api_knows_who_asks(served: Served) -> None:
    http = Http.remote(served.address())
    for _ in range(3):
        assert http.get("/v1/leases") == {"user": "anna", "path": "/v1/leases"}
    for method, path in (("POST", "/v1/stop"), ("POST", "/v1/flights")):
        with pytest.raises(UsageError, match="for the bench's own host"):
            http.call(method, path, {})
    served.users.remove("anna")
    with pytest.raises(UsageError, match="no such user token"):
        http.get("/v1/leases")
    http.close()
    for wrong in ("guess", " "):
        http = Http.remote(served.address(token=wrong))
        with pytest.raises(UsageError, match="no such user token"):
            http.get("/v1/leases")
        http.close()


def test_nothing_is_told_to_another_server(served: Served) -> None:
    http = Http.remote(served.address(pinned="0" * 64))
    with pytest.raises(BenchError, match="shows another certificate"):
        http.get("/v1/leases")
    served.close()
    with pytest.raises(DaemonGone, match=r"no bench daemon answers on https://127\.0\.0\.1"):
        Http.remote(served.address()).get("/v1/leases")


def through(relay: StreamRelay, data: bytes) -> bytes:
    """What comes back for `data`."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(relay.path))
        threading.Thread(target=client.sendall, args=(data,), daemon=True).start()
        got = b""
        while len(got) < len(data):
            more = client.recv(1 << 16)
            if not more:
                break
            got += more
        return got


def test_a_stream_comes_through_whole_in_both_directions_at_once(served: Served) -> None:
    relay = StreamRelay(served.address(), "console", "b1")
    data = bytes(range(256)) * 8000
    assert through(relay, data) == data
    assert through(relay, b"again") == b"again"
    relay.close()
    assert not relay.path.exists()


def test_a_user_who_is_removed_loses_streams_and_places_in_line(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hil.bench.remote.USER_TICK_S", 0.05)
    bert = served.users.add("bert", 0.0)
    relays = [StreamRelay(served.address(token=token), "console", "b1") for token in (served.token, bert)]
    streams = []
    for relay in relays:
        streams.append(socket.socket(socket.AF_UNIX))
        streams[-1].settimeout(10)
        streams[-1].connect(str(relay.path))
        streams[-1].sendall(b"x")
        assert streams[-1].recv(1) == b"x"
    served.users.remove("anna")
    assert streams[0].recv(1) == b""
    streams[1].sendall(b"y")
    assert streams[1].recv(1) == b"y"
    for item in (*streams, *relays):
        item.close()


def test_a_call_of_a_user_who_is_removed_has_no_client_any_more(tmp_path: Path) -> None:
    users = Users(tmp_path)
    token = users.add("anna", 0.0)
    left: list[str] = []

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        users.remove("anna")
        left.append((await receive())["type"])

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": True}

    headers = [(b"authorization", b"Bearer " + token.encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/leases", "headers": headers}
    asyncio.run(guarded(waits, users)(scope, receive, None))
    assert left == ["http.disconnect"]


@pytest.mark.parametrize(
    ("board", "token", "pinned", "says"),
    [
        ("b2", None, None, "no stream console of b2"),
        ("b1", "guess", None, "no such user token"),
        ("b1", None, "0" * 64, "another certificate"),
    ],
)
def test_a_stream_that_is_refused_says_why(
    served: Served, board: str, token: str | None, pinned: str | None, says: str
) -> None:
    relay = StreamRelay(served.address(pinned, token), "console", board)
    assert says in json.loads(through(relay, b"x" * 5000).split(b"\n")[0])["error"]["message"]
    relay.close()


def closed(sock: socket.socket, within_s: float) -> bool:
    sock.settimeout(within_s)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_connections_are_few_and_mute_ones_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that never get as far as TLS: every one costs the daemon a descriptor."""
    monkeypatch.setattr("hil.bench.remote.CONNECTIONS", 3)
    http = Http.remote(served.address())
    assert http.get("/v1/leases")["user"] == "anna"
    monkeypatch.setattr("hil.bench.remote.HANDSHAKE_S", 0.3)
    monkeypatch.setattr("hil.bench.remote.FIRST_BYTE_S", 0.2)
    raw = [socket.create_connection(("127.0.0.1", served.port))]
    raw.append(served.address().connect(5))
    assert closed(socket.create_connection(("127.0.0.1", served.port)), 5)
    assert closed(raw[1], 5)
    assert http.get("/v1/leases")["user"] == "anna"  # it has spoken: it stays
    more = Http.remote(served.address())
    assert more.get("/v1/leases")["user"] == "anna"
    more.close()
    http.close()
    for sock in raw:
        sock.close()


@pytest.mark.parametrize(
    "begins",
    [b"GET /", b"GET / HTTP/1.1\r\nX-A: ", b"POST /v1/leases HTTP/1.1\r\nContent-Length: 900\r\n\r\n"],
    ids=["line", "head", "body"],
)
def test_a_request_that_trickles_is_dropped(served: Served, monkeypatch: pytest.MonkeyPatch, begins: bytes) -> None:
    """Whether its head or its body takes for ever; one before it on the same connection was in time."""
    monkeypatch.setattr("hil.bench.request_limits.REQUEST_S", 0.3)
    sock = served.address().connect(10)
    whole = b"GET /v1/leases HTTP/1.1\r\nAuthorization: Bearer " + served.token.encode() + b"\r\n\r\n"
    sock.sendall(whole)
    assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    time.sleep(0.4)  # nobody asks for anything: that is allowed
    head = begins.replace(b"\r\n", b"\r\nAuthorization: Bearer " + served.token.encode() + b"\r\n", 1)
    sock.sendall(head)
    assert dropped(sock), "ten seconds of trickling were taken"
    sock.close()


def dropped(sock: socket.socket) -> bool:
    """Whether the connection ends while bytes of a request trickle."""
    try:
        for _ in range(200):
            sock.sendall(b"x")
            sock.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                if not sock.recv(4096):
                    return True
    except OSError:
        return True
    return False


def test_tokens_are_kept_as_hashes_and_a_new_one_voids_the_old(tmp_path: Path) -> None:
    users, other = Users(tmp_path), Users(tmp_path)
    first = users.add("anna", 0.0)
    assert other.whose(first) == "anna"
    second = users.add("anna", 1.0)
    users.add("bert", 2.0)
    assert [other.whose(token) for token in (first, second, "", "anna")] == [None, "anna", None, None]
    text = (tmp_path / "users.json").read_text()
    assert first not in text
    assert second not in text
    assert (tmp_path / "users.json").stat().st_mode & 0o777 == 0o600
    assert other.list() == {"anna": "1970-01-01T00:00:01.000Z", "bert": "1970-01-01T00:00:02.000Z"}
    with pytest.raises(UsageError, match="no user 'carl'"):
        users.remove("carl")
    for poor in ("", "a:b", "a\nb", "x" * 61):
        with pytest.raises(UsageError, match="no user name"):
            users.add(poor, 0.0)
    (tmp_path / "users.json").write_text("{")
    with pytest.raises(BenchError, match=r"cannot read .*users\.json"):
        other.whose(second)


def test_the_certificate_is_made_once(tmp_path: Path) -> None:
    made, key = certificate(tmp_path, "lab")
    before = fingerprint(made)
    assert fingerprint(certificate(tmp_path, "lab")[0]) == before
    assert len(before) == 64
    assert key.stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").mkdir()
    assert fingerprint(certificate(tmp_path / "other", "lab")[0]) != before


def test_keys_and_pins_are_those_of_the_host_that_logs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "id"
    mine.write_text("key")

    def file() -> dict[str, Any]:
        hop = {"address": "gate", "key": "/root/none/id", "known_hosts": "/there/known_hosts"}
        wire = {"address": "10.0.0.2", "key": str(mine), "known_hosts": "/there/known_hosts", "jump": [hop]}
        return {
            "boards": {
                "b1": {"mgmt": wire, "payload": {"address": "x", "known_hosts": "/there"}},
                "b2": {"mgmt": {**wire, "jump": []}},
            }
        }

    monkeypatch.delenv("HIL_BENCH_KEY", raising=False)
    told = file()
    _log_in_from_here(told, tmp_path)
    mgmt = told["boards"]["b1"]["mgmt"]
    assert (mgmt["key"], mgmt["jump"][0]["key"], told["boards"]["b1"]["payload"]["key"]) == (str(mine), None, None)
    assert mgmt["known_hosts"] == mgmt["jump"][0]["known_hosts"] == str(tmp_path / "known_hosts-b1")
    # The same private address: two machines, with a key each.
    assert told["boards"]["b2"]["mgmt"]["known_hosts"] == str(tmp_path / "known_hosts-b2")
    monkeypatch.setenv("HIL_BENCH_KEY", "~/lab")
    told = file()
    _log_in_from_here(told, tmp_path)
    assert {told["boards"]["b1"][plane]["key"] for plane in ("mgmt", "payload")} == {"~/lab"}


@pytest.mark.parametrize("told", ["../../x", "..", "a/b", "", "a\n"])
def test_a_bench_does_not_choose_where_its_state_is_kept(monkeypatch: pytest.MonkeyPatch, told: object) -> None:
    monkeypatch.setenv("HIL_BENCH_TOKEN", "t")
    monkeypatch.setattr(Http, "get", lambda *_, **__: {"id": told, "file": {"boards": {}}})
    with pytest.raises(BenchError, match="calls itself"):
        load_remote(URL)


def test_an_address_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIL_BENCH_TOKEN", "t")
    assert Address.of(URL) == Address("lab.example", 7443, "ab" * 32, "t")
    spaced = URL.replace("#", "#sha256:").replace("abab", "AB:AB:", 1)
    assert Address.of(spaced).fingerprint == "ab" * 32
    for url, says in (
        ("https://lab.example#" + "ab" * 32, "no bench's address"),
        ("https://lab.example:x#" + "ab" * 32, "no bench's address"),
        ("https://lab.example:7443", "which certificate"),
        ("https://lab.example:7443#abc", "which certificate"),
    ):
        with pytest.raises(UsageError, match=says):
            Address.of(url)
    monkeypatch.delenv("HIL_BENCH_TOKEN")
    with pytest.raises(UsageError, match="no user token"):
        Address.of(URL)
