"""The client: errors as the same classes, connections that went away, leases that are renewed or lost, cheap import."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hil.bench.request_limits import LONG_BODIES
from hil.bench.sockets import bind_unix, describe_error, error_from
from hil.client.bench import Lease
from hil.client.flight import Flight
from hil.client.http import DaemonGone, Http
from hil.errors import BenchError, BoardError, HilError, SafetyError, UsageError

Answer = tuple[int, Any]


class Daemon:
    """Answers on a unix socket with whatever `answer(method, path, body, token)` says."""

    def __init__(self, path: Path) -> None:
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.answer: Callable[[str, str], Answer] = lambda method, path: (200, {})
        self.open: list[socket.socket] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                outer.open.append(self.request)
                super().setup()

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append(
                    (self.command, self.path, json.loads(body) if body else None, self.headers.get("X-Hil-Token"))
                )
                status, value = outer.answer(self.command, self.path)
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if value == b"bye":
                    self.send_header("Connection", "close")
                    self.close_connection = True
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = handle_any

            def log_message(self, *_: object) -> None: ...

            def address_string(self) -> str:
                return "client"

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

        self.server = Server(os.fspath(path), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.asked]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path / "api.sock")
    yield daemon
    daemon.close()


@pytest.fixture
def client(tmp_path: Path, daemon: Daemon) -> Iterator[Http]:
    client = Http(tmp_path / "api.sock", timeout_s=20.0)
    yield client
    client.close()


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("kind", [UsageError, BenchError, BoardError, SafetyError])
def test_an_error_arrives_as_the_class_it_was(kind: type[HilError], daemon: Daemon, client: Http) -> None:
    sent = kind("the cable is out", hint="plug it in")
    daemon.answer = lambda method, path: (409, {"error": describe_error(sent)})
    with pytest.raises(kind) as caught:
        client.get("/v1/status")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint) == (sent.message, sent.hint)


@pytest.mark.parametrize("value", [{"detail": "Not Found"}, [], "text", None, {"error": 3}])
def test_an_error_in_an_unknown_form_is_the_benchs(value: object) -> None:
    assert type(error_from(value, "GET /x")) is BenchError


def test_one_connection_serves_many_calls_and_a_closed_one_is_replaced(daemon: Daemon, client: Http) -> None:
    for _ in range(3):
        assert client.call("POST", "/v1/x", {"a": 1}, token="t") == {}
    assert len(daemon.open) == 1
    assert daemon.asked[0] == ("POST", "/v1/x", {"a": 1}, "t")
    daemon.answer = lambda method, path: (200, b"bye")
    with pytest.raises(BenchError, match="answered"):
        client.get("/v1/x")
    daemon.answer = lambda method, path: (200, {"ok": 1})
    assert client.get("/v1/x") == {"ok": 1}
    assert len(daemon.open) == 2


def test_a_daemon_that_is_not_there_or_does_not_answer(tmp_path: Path) -> None:
    path = tmp_path / "none.sock"
    with pytest.raises(DaemonGone, match="no bench daemon answers"):
        Http(path).get("/v1/status")
    listener = bind_unix(path)
    listener.listen()
    with pytest.raises(BenchError, match=r"did not answer GET /v1/status within 0\.05 s"):
        Http(path, timeout_s=0.05).get("/v1/status")
    listener.close()


def test_a_socket_is_private_and_replaces_what_a_dead_daemon_left(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    first = bind_unix(path)
    first.close()
    second = bind_unix(path)
    assert path.stat().st_mode & 0o777 == 0o600
    second.listen()
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(os.fspath(path))
    second.close()
    with pytest.raises(UsageError, match="longer than 107 bytes"):
        bind_unix(tmp_path / ("x" * 120))


GRANTED = {"lease": "L1", "token": "secret", "boards": ["b1"], "ttl_s": 0.06}


def test_a_lease_is_renewed_until_it_is_released(daemon: Daemon, client: Http) -> None:
    with Lease(client, GRANTED) as lease:
        until(lambda: daemon.paths().count("/v1/leases/L1/renew") >= 3)
        lease.check("b1")
        with pytest.raises(UsageError, match="not for board b2"):
            lease.check("b2")
    assert daemon.asked[-1][:2] == ("DELETE", "/v1/leases/L1")
    assert {token for *_, token in daemon.asked} == {"secret"}
    with pytest.raises(BenchError, match="was released"):
        lease.check("b1")


def test_a_lost_lease_stops_its_loser_and_does_not_hide_the_tests_own_error(daemon: Daemon, client: Http) -> None:
    daemon.answer = lambda method, path: (409, {"error": describe_error(BenchError("this lease is over"))})
    lease = Lease(client, GRANTED)

    def lost() -> bool:
        try:
            lease.check("b1")
        except BenchError as error:
            return "over" in error.message
        return False

    until(lost)
    with pytest.raises(ZeroDivisionError), lease:
        raise ZeroDivisionError
    assert "DELETE" not in [method for method, *_ in daemon.asked]


def test_a_restarted_daemon_is_found_again_by_the_lease(tmp_path: Path, daemon: Daemon, client: Http) -> None:
    lease = Lease(client, {**GRANTED, "ttl_s": 0.3})
    until(lambda: daemon.asked)
    daemon.close()
    (tmp_path / "api.sock").unlink()
    time.sleep(0.11)  # a renewal falls into the gap
    again = Daemon(tmp_path / "api.sock")
    until(lambda: again.asked)
    lease.check("b1")
    lease.release()
    again.close()


def test_tokens_are_sent_in_batches_with_their_own_times(daemon: Daemon, client: Http) -> None:
    flight = Flight(client, "b1", "secret")
    before = time.monotonic()
    for _ in range(100):
        flight.record_tokens("q", 1, "payload")
    flight.progress("upload_bytes", 5)
    assert time.monotonic() - before < 2  # some microseconds each: none of them waits for the daemon
    flight.end()
    flight.end()
    sent = [body for _, path, body, _ in daemon.asked if path == "/v1/flight/record"]
    tokens = [row for body in sent if body["table"] == "tokens" for row in body["rows"]]
    assert len(tokens) == 100
    assert len(sent) < 20  # three on an idle host
    assert all(before <= row["t_mono"] <= time.monotonic() for row in tokens)
    assert daemon.paths().count("/v1/flight/end") == 1


def test_many_tokens_are_sent_in_calls_that_the_daemon_takes(daemon: Daemon, client: Http) -> None:
    flight = Flight(client, "b1", "secret")
    with flight._send_lock:  # the daemon hangs for a while
        for _ in range(25_000):
            flight.record_tokens("a-query-with-a-name-of-some-length", 1, "payload")
    flight.end()
    sent = [body for _, path, body, _ in daemon.asked if path == "/v1/flight/record"]
    assert sum(len(body["rows"]) for body in sent) == 25_000
    assert max(len(json.dumps(body)) for body in sent) < LONG_BODIES["/v1/flight/record"] / 2


def test_rows_that_could_not_be_sent_are_not_silent(daemon: Daemon, client: Http) -> None:
    def answer(method: str, path: str) -> Answer:
        return (409, {"error": describe_error(BenchError("disk full"))}) if path.endswith("record") else (200, {})

    daemon.answer = answer
    flight = Flight(client, "b1", "secret")
    flight.record_tokens("q", 1, "payload")
    with pytest.raises(BenchError, match="disk full"):
        flight.end()
    assert daemon.paths()[-1] == "/v1/flight/end"  # safe all the same


def test_a_failed_flight_raises_where_its_state_is_asked(daemon: Daemon, client: Http) -> None:
    error = describe_error(SafetyError("no measurement for 2 s"))
    daemon.answer = lambda method, path: (200, {"state": "running", "error": error if method == "GET" else None})
    flight = Flight(client, "b1", "secret")
    with pytest.raises(SafetyError, match="no measurement"):
        flight.state()
    flight.end()


def test_importing_the_client_imports_no_server_and_no_physics() -> None:
    code = (
        "import sys, hil.client\n"
        "heavy = {'fastapi', 'uvicorn', 'pydantic', 'numpy', 'paramiko', 'prometheus_client', 'httpx'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
