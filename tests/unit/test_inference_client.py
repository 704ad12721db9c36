"""The inference client against a real HTTP server on loopback that streams as llama.cpp does, faults included."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hil.errors import BenchError, BoardError, HilError, SafetyError, UsageError
from hil.inference import client, mailbox, onboard

# Recorded from llama.cpp (xllamacpp 2026.10.11549, SmolLM2-135M Q4_1), identifiers shortened.
HEAD = '"created":1795434000,"id":"chatcmpl-1","model":"smollm2","object":"chat.completion.chunk"'


def chunk(delta: str, finish: str = "null") -> str:
    return f'data: {{"choices":[{{"finish_reason":{finish},"index":0,"delta":{delta}}}],{HEAD}}}\n\n'


ROLE = chunk('{"role":"assistant","content":null}')
WORDS = [chunk(json.dumps({"content": word})) for word in ("The", " Earth", " is", " round", ".")]
STOP = chunk("{}", '"stop"')
USAGE = (
    f'data: {{"choices":[],{HEAD},"usage":{{"completion_tokens":6,"prompt_tokens":31,"total_tokens":37}},'
    '"timings":{"cache_n":0,"prompt_n":31,"prompt_ms":620.0,"predicted_n":6,"predicted_ms":240.0}}\n\n'
)
DONE = "data: [DONE]\n\n"
DIALOGUE = [ROLE, *WORDS, STOP, USAGE, DONE]
QUESTION = [{"role": "user", "content": "What shape is the Earth?"}]


@dataclass
class Server:
    """Answers one connection with what `script` does to the socket; keeps the request it read."""

    base: str
    requests: list[bytes] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve(script: Callable[[socket.socket], None]) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(f"http://127.0.0.1:{listener.getsockname()[1]}")

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
                head, _, body = request.partition(b"\r\n\r\n")
                length = next(
                    (int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-l")), 0
                )
                while len(body) < length:
                    body += connection.recv(65536)
                server.requests.append(head + b"\r\n\r\n" + body)
                script(connection)
            server.ended.set()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield server
        thread.join(30)
        assert not thread.is_alive()


def stream(connection: socket.socket, parts: list[str] | list[bytes], *, pause_s: float = 0.0) -> None:
    """Send a chunked 200 response without its end; each part is one HTTP chunk, as llama.cpp writes them."""
    connection.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nServer: llama.cpp\r\n\r\n"
    )
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        time.sleep(pause_s)


def end(connection: socket.socket) -> None:
    connection.sendall(b"0\r\n\r\n")


def plain(host: str, port: int, timeout_s: float) -> socket.socket:
    return socket.create_connection((host, port), timeout_s)


def ask(server: Server, **options: Any) -> client.ChatResult:
    return client.stream_chat(plain, server.base, QUESTION, 16, **{"timeout_s": 30.0, **options})


def test_answer_tokens_and_times_are_taken_at_the_socket() -> None:
    def script(connection: socket.socket) -> None:
        time.sleep(0.05)  # the server's prompt processing
        stream(connection, DIALOGUE, pause_s=0.01)
        end(connection)

    heard: list[tuple[str, float]] = []
    with serve(script) as server:
        before = time.monotonic()
        result = ask(server, seed=7, api_key="orbit", on_token=lambda text, t: heard.append((text, t)))
        after = time.monotonic()

    assert result.answer == "The Earth is round."
    assert (result.tokens, result.server_tokens, result.finish_reason) == (5, 6, "stop")
    assert result.timings.prompt_tps == pytest.approx(50.0)
    assert result.timings.decode_tps == pytest.approx(25.0)
    assert before <= result.t_connect <= result.t_send
    assert result.t_first is not None
    assert result.t_send + 0.05 <= result.t_first < result.t_last <= after
    # The role chunk came 10 ms before the first word: it must not count as the first token.
    assert [text for text, _ in heard] == ["The", " Earth", " is", " round", "."]
    assert heard[0][1] == result.t_first
    assert result.duration_s == result.t_last - result.t_send
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert b"Authorization: Bearer orbit" in head
    sent = json.loads(body)
    assert sent["stream_options"] == {"include_usage": True}
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.0, 7, 16)


def test_role_chunk_is_not_the_first_token() -> None:
    def script(connection: socket.socket) -> None:
        stream(connection, [ROLE], pause_s=0.15)
        for part in DIALOGUE[1:]:
            data = part.encode()
            connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        end(connection)

    with serve(script) as server:
        result = ask(server)
    assert result.ttft_s is not None
    assert result.ttft_s >= 0.15


@pytest.mark.parametrize("size", [1, 3, 7])
def test_events_and_characters_cut_anywhere(size: int) -> None:
    data = "".join([ROLE, chunk('{"content":"Über"}'), ": ping\n\n", chunk('{"content":" 轨道"}'), STOP, DONE])
    raw = data.replace("\n\n", "\r\n\r\n").encode()

    def script(connection: socket.socket) -> None:
        stream(connection, [raw[i : i + size] for i in range(0, len(raw), size)])
        end(connection)

    with serve(script) as server:
        result = ask(server)
    assert (result.answer, result.tokens, result.server_tokens) == ("Über 轨道", 2, None)


def test_connection_reset_keeps_the_partial_answer() -> None:
    def script(connection: socket.socket) -> None:
        stream(connection, DIALOGUE[:3], pause_s=0.02)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with serve(script) as server, pytest.raises(client.LinkLost) as caught:
        ask(server)
    assert isinstance(caught.value, BenchError)
    assert caught.value.reason == "closed"
    assert caught.value.partial is not None
    assert (caught.value.partial.answer, caught.value.partial.tokens) == ("The Earth", 2)


def test_clean_close_without_done_is_a_loss_too() -> None:
    def script(connection: socket.socket) -> None:
        stream(connection, DIALOGUE[:4])
        end(connection)

    with serve(script) as server, pytest.raises(client.LinkLost) as caught:
        ask(server)
    assert caught.value.reason == "closed"
    assert caught.value.partial is not None
    assert caught.value.partial.tokens == 3


@pytest.mark.parametrize("limits", [{"timeout_s": 0.8}, {"timeout_s": 60.0, "silence_s": 0.3}])
def test_silence_ends_in_time_with_the_partial_answer(limits: dict[str, float]) -> None:
    silent = threading.Event()

    def script(connection: socket.socket) -> None:
        stream(connection, DIALOGUE[:2])
        silent.wait(60)

    with serve(script) as server:
        start = time.monotonic()
        with pytest.raises(client.LinkLost) as caught:
            ask(server, **limits)
        took = time.monotonic() - start
        silent.set()
    assert caught.value.reason == "silence"
    assert caught.value.partial is not None
    assert caught.value.partial.answer == "The"
    assert 0.3 <= took < 20.0


def test_deadline_holds_even_when_bytes_keep_trickling() -> None:
    over = threading.Event()

    def script(connection: socket.socket) -> None:
        try:
            stream(connection, [WORDS[0]] * 2000, pause_s=0.02)
        except OSError:
            over.set()

    with serve(script) as server:
        start = time.monotonic()
        with pytest.raises(client.LinkLost):
            ask(server, timeout_s=0.4)
        assert time.monotonic() - start < 20.0
    assert over.is_set()


def test_caller_may_stop_in_mid_answer() -> None:
    class Enough(Exception):
        pass

    def stop(text: str, t_s: float) -> None:
        raise Enough

    def script(connection: socket.socket) -> None:
        stream(connection, DIALOGUE[:3])
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""  # the client hung up, perhaps with our bytes unread

    with serve(script) as server:
        with pytest.raises(Enough):
            ask(server, on_token=stop)
        assert server.ended.wait(30)


def respond(status: str, body: str) -> Callable[[socket.socket], None]:
    text = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    return lambda connection: connection.sendall(text.encode())


def test_refusal_is_the_boards_error_and_quotes_it() -> None:
    loading = respond("503 Service Unavailable", '{"error":{"message":"Loading model","code":503}}')
    with serve(loading) as server, pytest.raises(BoardError, match=r"503.*Loading model"):
        ask(server)


@pytest.mark.parametrize(
    "line", ['data: {"error":{"message":"context full"}}\n\n', 'error: {"error":{"message":"context full"}}\n\n']
)
def test_error_inside_the_stream(line: str) -> None:
    def script(connection: socket.socket) -> None:
        stream(connection, [ROLE, WORDS[0], line])
        end(connection)

    with serve(script) as server, pytest.raises(BoardError, match="context full"):
        ask(server)


def test_garbage_is_the_boards_error() -> None:
    def script(connection: socket.socket) -> None:
        stream(connection, ["data: <html>\n\n"])
        end(connection)

    with serve(script) as server, pytest.raises(BoardError, match="not a chat chunk"):
        ask(server)


def test_no_connection() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, not listening: refused, and nobody else gets the port
        base = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(client.LinkLost) as caught:
            client.stream_chat(plain, base, QUESTION, 4, timeout_s=10.0)
    assert (caught.value.reason, caught.value.partial) == ("connect", None)


def test_forward_to_a_port_that_nothing_listens_on_yet() -> None:
    def refused(host: str, port: int, timeout_s: float) -> socket.socket:
        raise BoardError(f"ssh: nothing listens on {host}:{port}")

    assert not client.health(refused, "http://127.0.0.1:8080")
    with pytest.raises(client.LinkLost, match="nothing listens") as caught:
        client.stream_chat(refused, "http://127.0.0.1:8080", QUESTION, 4)
    assert caught.value.reason == "connect"


@pytest.mark.parametrize("kind", [UsageError, SafetyError])
def test_what_is_not_the_links_fault_passes(kind: type[HilError]) -> None:
    def refused(host: str, port: int, timeout_s: float) -> socket.socket:
        raise kind("no")

    with pytest.raises(kind):
        client.health(refused, "http://127.0.0.1:8080")


def test_health_and_metrics() -> None:
    with serve(respond("200 OK", '{"status":"ok"}')) as server:
        assert client.health(plain, server.base)
    with serve(respond("503 Service Unavailable", "{}")) as server:
        assert not client.health(plain, server.base)
    with serve(respond("200 OK", "llamacpp:tokens_predicted_total 6\n")) as server:
        assert client.metrics_text(plain, server.base) == "llamacpp:tokens_predicted_total 6\n"


@pytest.fixture
def mailbox_base(tmp_path: Path) -> Iterator[str]:
    """The real on-board mailbox on loopback, with the recorded dialogue as its model server."""

    def script(connection: socket.socket) -> None:
        stream(connection, DIALOGUE)
        end(connection)

    with serve(script) as server:
        box = onboard.Mailbox(tmp_path, server.base)
        http = ThreadingHTTPServer(("127.0.0.1", 0), onboard._handler(box, None))
        threads = [threading.Thread(target=work, daemon=True) for work in (box.work, http.serve_forever)]
        for thread in threads:
            thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        http.server_close()
        box.stop()


def test_mailbox_keeps_the_answer_and_delivers_it_once(mailbox_base: str) -> None:
    letter = mailbox.submit(plain, mailbox_base, "q1", QUESTION, 16, temperature=0.0, seed=7)
    assert letter.id == "q1"
    assert letter.deliveries == 0
    again = mailbox.submit(plain, mailbox_base, "q1", QUESTION, 16, temperature=0.0, seed=7)
    assert again.id == "q1"
    kept = mailbox.fetch(plain, mailbox_base, "q1", wait_s=5.0)
    assert (kept.state, kept.answer, kept.tokens, kept.attempts) == ("done", "The Earth is round.", 6, 1)
    for _ in range(2):
        assert mailbox.acknowledge(plain, mailbox_base, "q1", "contact-1").deliveries == 1
    with pytest.raises(BoardError, match="another token"):
        mailbox.acknowledge(plain, mailbox_base, "q1", "contact-2")


def test_mailbox_refusals_are_quoted(mailbox_base: str) -> None:
    mailbox.submit(plain, mailbox_base, "q1", QUESTION, 16)
    with pytest.raises(BoardError, match=r"409.*other content"):
        mailbox.submit(plain, mailbox_base, "q1", QUESTION, 17)
    with pytest.raises(BoardError, match=r"404.*no query nothing"):
        mailbox.fetch(plain, mailbox_base, "nothing")
    mailbox.fetch(plain, mailbox_base, "q1", wait_s=5.0)
