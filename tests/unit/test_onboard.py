"""The on-board program: mailbox semantics against a fake model server, across kill -9; file checks."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hil.inference import onboard

PROGRAM = Path(onboard.__file__)
QUESTION = {"id": "q1", "messages": [{"role": "user", "content": "Name three planets."}], "max_tokens": 8}


class FakeModel:
    """An OpenAI-compatible server; a closed `gate` holds back the second half of an answer, `status` is its reply."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.halfway = threading.Event()
        self.status = 200
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                model.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(model.status)
                self.end_headers()
                if model.status == 200:
                    model.answer(self.wfile.write)

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, write: Any) -> None:
        """First chunk empty, as llama.cpp's is."""

        def chunk(delta: dict[str, str], finish: str | None = None) -> None:
            value = {"choices": [{"delta": delta, "finish_reason": finish}]}
            write(b"data: " + json.dumps(value).encode() + b"\n\n")

        try:
            chunk({"role": "assistant", "content": ""})
            chunk({"content": "Mars"})
            self.halfway.set()
            self.gate.wait(10)
            chunk({"content": ", Venus"})
            chunk({}, "stop")
            write(b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\ndata: [DONE]\n\n')
        except OSError:
            pass  # the mailbox was killed


class MailboxProcess:
    """The mailbox as the board runs it: its own process, killed with SIGKILL."""

    def __init__(self, directory: Path, server: str) -> None:
        argv = [sys.executable, str(PROGRAM), "mailbox", "--host", "127.0.0.1", "--port", "0"]
        self.process = subprocess.Popen([*argv, "--dir", str(directory), "--server", server], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.port = int(json.loads(self.process.stdout.readline())["ready"].rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def model() -> Iterator[FakeModel]:
    fake = FakeModel()
    yield fake
    fake.gate.set()
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def start(tmp_path: Path, model: FakeModel) -> Iterator[Any]:
    running: list[MailboxProcess] = []

    def begin(server: str = "") -> MailboxProcess:
        running.append(MailboxProcess(tmp_path / "box", server or model.url))
        return running[-1]

    yield begin
    for box in running:
        if box.process.poll() is None:
            box.kill()


def test_answers_a_query_once_however_often_it_is_sent(start: Any, model: FakeModel) -> None:
    box = start()
    assert box.ask("POST", "/v1/queries", QUESTION)[0] == 202
    status, state = box.ask("GET", "/v1/queries/q1?wait_s=30")
    assert (status, state["state"], state["answer"]["text"]) == (200, "done", "Mars, Venus")
    assert state["answer"]["usage"]["completion_tokens"] == 2
    assert box.ask("POST", "/v1/queries", QUESTION) == (200, state)
    assert box.ask("POST", "/v1/queries", {**QUESTION, "max_tokens": 9})[0] == 409
    assert len(model.requests) == 1
    assert model.requests[0]["temperature"] == 0.0
    assert model.requests[0]["max_tokens"] == 8


def test_query_interrupted_by_power_loss_runs_again_and_is_delivered_once(start: Any, model: FakeModel) -> None:
    model.gate.clear()
    box = start()
    box.ask("POST", "/v1/queries", QUESTION)
    assert model.halfway.wait(30)
    box.kill()
    model.gate.set()
    box = start()  # nobody asks again: the mailbox itself goes on
    state = box.ask("GET", "/v1/queries/q1?wait_s=30")[1]
    assert state["answer"]["text"] == "Mars, Venus"
    assert len(model.requests) == 2
    assert box.ask("POST", "/v1/queries/q1/ack", {"delivery": "pass-2"})[1]["state"] == "delivered"


def test_answer_and_delivery_survive_power_loss(start: Any, model: FakeModel) -> None:
    box = start()
    box.ask("POST", "/v1/queries", QUESTION)
    before = box.ask("GET", "/v1/queries/q1?wait_s=30")[1]
    box.kill()
    box = start()
    assert box.ask("GET", "/v1/queries")[1] == {"queries": [{"id": "q1", "state": "done"}]}
    assert box.ask("GET", "/v1/queries/q1")[1] == before
    assert box.ask("POST", "/v1/queries/q1/ack", {"delivery": "a"})[0] == 200
    box.kill()
    box = start()
    assert box.ask("POST", "/v1/queries/q1/ack", {"delivery": "a"})[1]["deliveries"] == 1  # a lost reply, asked again
    assert box.ask("POST", "/v1/queries/q1/ack", {"delivery": "b"})[0] == 409
    status, state = box.ask("GET", "/v1/queries/q1")
    assert (status, state["state"], "answer" in state) == (200, "delivered", False)
    assert box.ask("GET", "/v1/queries")[1] == {"queries": []}
    assert len(model.requests) == 1


def test_caller_that_vanishes_does_not_stop_the_answer(start: Any, model: FakeModel) -> None:
    model.gate.clear()
    box = start()
    box.ask("POST", "/v1/queries", QUESTION)
    connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=10)
    connection.request("GET", "/v1/queries/q1?wait_s=60")
    assert model.halfway.wait(30)
    connection.close()  # loss of signal
    deadline = time.monotonic() + 30
    while box.ask("GET", "/v1/queries/q1")[1].get("tokens") != 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    state = box.ask("GET", "/v1/queries/q1")[1]
    assert (state["state"], state["tokens"]) == ("running", 1)
    assert box.ask("POST", "/v1/queries/q1/ack", {"delivery": "a"})[0] == 409
    model.gate.set()
    assert box.ask("GET", "/v1/queries/q1?wait_s=30")[1]["state"] == "done"


def test_queries_run_in_order_of_acceptance(start: Any, model: FakeModel) -> None:
    model.gate.clear()
    box = start()
    for name in ("zeta", "alpha", "mid"):
        box.ask("POST", "/v1/queries", {**QUESTION, "id": name, "messages": [{"role": "user", "content": name}]})
    assert model.halfway.wait(30)
    box.kill()
    model.gate.set()
    box = start()
    assert box.ask("GET", "/v1/queries/mid?wait_s=30")[1]["state"] == "done"
    assert [request["messages"][0]["content"] for request in model.requests] == ["zeta", "zeta", "alpha", "mid"]


def test_waits_for_a_model_server_that_still_loads(start: Any, model: FakeModel) -> None:
    model.status = 503
    box = start()
    box.ask("POST", "/v1/queries", QUESTION)
    deadline = time.monotonic() + 30
    while not model.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    model.status = 200
    answer = box.ask("GET", "/v1/queries/q1?wait_s=30")[1]["answer"]
    assert (answer["text"], answer["attempts"]) == ("Mars, Venus", 2)


def test_refusal_by_the_model_server_is_an_answer_too(start: Any, model: FakeModel) -> None:
    model.status = 400
    box = start()
    box.ask("POST", "/v1/queries", QUESTION)
    state = box.ask("GET", "/v1/queries/q1?wait_s=30")[1]
    assert state["state"] == "failed"
    assert "HTTP 400" in state["answer"]["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({**QUESTION, "id": "../etc/passwd"}, 400),
        ({**QUESTION, "id": ""}, 400),
        ({**QUESTION, "messages": "hello"}, 400),
        ([1, 2], 400),
    ],
)
def test_malformed_queries_are_refused(start: Any, body: Any, status: int) -> None:
    assert start().ask("POST", "/v1/queries", body)[0] == status


def test_unknown_ids_and_paths(start: Any) -> None:
    box = start()
    assert box.ask("GET", "/v1/queries/none")[0] == 404
    assert box.ask("GET", "/v1/queries/..%2F..%2Fetc")[0] == 404
    assert box.ask("GET", "/other")[0] == 404


def test_interrupted_write_leaves_the_old_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    onboard.write_durably(path, {"n": 1})

    def power_cut(source: object, target: object) -> None:
        raise OSError("power")

    monkeypatch.setattr(onboard.os, "replace", power_cut)
    with pytest.raises(OSError, match="power"):
        onboard.write_durably(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}


def test_activate_refuses_a_wrong_hash_and_keeps_what_was_there(tmp_path: Path) -> None:
    part, final = tmp_path / "m.part", tmp_path / "m.gguf"
    part.write_bytes(b"new model")
    final.write_bytes(b"old")
    assert onboard.main(["activate", str(part), str(final), "0" * 64]) == 1
    assert final.read_bytes() == b"old"
    assert onboard.main(["activate", str(part), str(final), hashlib.sha256(b"new model").hexdigest()]) == 0
    assert (final.read_bytes(), part.exists()) == (b"new model", False)


def test_activate_again_after_a_reboot_in_the_midst_of_it(tmp_path: Path) -> None:
    part, final = tmp_path / "m.part", tmp_path / "m.gguf"
    wanted = hashlib.sha256(b"new model").hexdigest()
    final.write_bytes(b"new model")
    assert onboard.main(["activate", str(part), str(final), wanted]) == 0
    assert final.read_bytes() == b"new model"
    final.write_bytes(b"old")
    assert onboard.main(["activate", str(part), str(final), wanted]) == 1
    assert final.read_bytes() == b"old"


def test_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f"
    file.write_bytes(bytes(range(256)) * 16)
    assert onboard.main(["chunk-hash", str(file), "256", "100"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "sha256": hashlib.sha256(bytes(range(100))).hexdigest(),
        "bytes": 100,
    }
    assert onboard.main(["verify", str(file), hashlib.sha256(file.read_bytes()).hexdigest().upper()]) == 0
    assert onboard.main(["verify", str(file), "00"]) == 1
    assert onboard.main(["verify", str(tmp_path / "none"), "00"]) == 3
