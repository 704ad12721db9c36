"""What hil runs on a board: model server, store-and-forward mailbox, file checks. One file, copied there by SFTP.

Needs Python 3.10 and its standard library; `serve-model` alone also needs xllamacpp. Results are one JSON object on
standard output; exit code 0 done, 1 refused (a hash is wrong), 2 usage, 3 the board could not.

    python3 onboard.py serve-model MODEL [--port 8080] [--threads 1] [--detach LOG]
    python3 onboard.py mailbox --dir /var/lib/hil/mailbox [--port 8081] [--server http://127.0.0.1:8080] [--detach LOG]
    python3 onboard.py verify FILE SHA256
    python3 onboard.py chunk-hash FILE OFFSET LENGTH
    python3 onboard.py activate PART FINAL SHA256

The mailbox's rules
  POST /v1/queries {"id", "messages", "max_tokens", ...}  accepted once per id: 202 new, 200 known, 409 other content
  GET  /v1/queries                                        what is not delivered yet
  GET  /v1/queries/ID[?wait_s=S]                          state queued | running | done | failed | delivered, and answer
  POST /v1/queries/ID/ack {"delivery": TOKEN}             the caller has the answer on its own disk; the same token may
                                                          be sent again, another one gets 409: delivered exactly once
An accepted query and a finished answer are on disk before anybody hears of them. A query that a power cut interrupted
runs again from its beginning, by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 2**20
MAX_BODY_BYTES = 2**20
MAX_WAIT_S = 300.0
RETRY_S = 1.0
READ_TIMEOUT_S = 600.0

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FORWARDED = ("max_tokens", "temperature", "seed", "top_p", "top_k", "stop", "cache_prompt")


# --- files ------------------------------------------------------------------------------------------------------------


def file_sha256(path: Path, offset: int = 0, length: int | None = None) -> tuple[str, int]:
    """Hex SHA-256 of `length` bytes from `offset` (None: to the end) and how many bytes there were."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as handle:
        handle.seek(offset)
        while length is None or done < length:
            block = handle.read(BLOCK_BYTES if length is None else min(BLOCK_BYTES, length - done))
            if not block:
                break
            digest.update(block)
            done += len(block)
    return digest.hexdigest(), done


def activate(part: Path, final: Path, sha256: str) -> dict[str, Any]:
    """Put a received file in service: hash, fsync, rename over `final`, fsync the directory. ValueError: wrong hash.

    Asked again after a reboot in the midst of it: when `part` is gone, `final` must be the file.
    """
    file = final if final.exists() and not part.exists() else part
    found, size = file_sha256(file)
    if found != sha256.lower():
        raise ValueError(f"{file} has SHA-256 {found}, expected {sha256}")
    if file == part:
        _sync(part)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, final)
    _sync(final.parent)
    return {"path": str(final), "sha256": found, "bytes": size}


def write_durably(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that after a power cut `path` holds either all of it or what was there before."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as handle:
        json.dump(value, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(fresh, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- model server -----------------------------------------------------------------------------------------------------


def serve_model(options: argparse.Namespace) -> int:
    """Run llama.cpp's OpenAI-compatible server until SIGTERM; prints a JSON line when the model is loaded."""
    import xllamacpp

    started = time.monotonic()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(options.model)
    parameters.model_alias = {options.alias or options.model.stem}
    parameters.hostnames = [options.host]
    parameters.port = options.port
    parameters.n_ctx = options.context
    parameters.n_parallel = 1  # one question at a time: the greedy answer must not depend on its neighbours
    # one thread: two collapse when they do not both get a core, and the board's power model counts one as full load
    parameters.cpuparams.n_threads = options.threads
    parameters.cpuparams_batch.n_threads = options.threads
    parameters.warmup = False
    parameters.fit_params = False  # it would load the model a first time just to ask how much memory there is
    parameters.endpoint_metrics = True
    parameters.ui = False
    if options.api_key_file:
        parameters.api_keys = [options.api_key_file.read_text().strip()]
    server = xllamacpp.Server(parameters)
    _print({"ready": server.listening_address, "load_s": round(time.monotonic() - started, 3)})
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(3600):
        pass
    os._exit(0)  # llama.cpp's own threads may be deep in a token; nothing of theirs needs saving


# --- mailbox ----------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A request the mailbox does not take; `status` is its HTTP code."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(Exception):
    """The model server is not there, still loading, or stopped in the middle of an answer: try again."""


class Mailbox:
    """Queries and answers on disk, and one thread that works them off in the order of acceptance.

    Files in `directory`: `ID.query.json`, `ID.answer.json`, `ID.delivered.json`.
    """

    def __init__(self, directory: Path, server: str, api_key: str | None = None) -> None:
        self._directory, self._server, self._key = directory, server.rstrip("/"), api_key
        self._changed = threading.Condition()
        self._waiting: list[str] = []
        self._running: tuple[str, int] | None = None  # (id, tokens so far)
        self._stop = False
        directory.mkdir(parents=True, exist_ok=True)
        for stale in directory.glob(".*.new"):
            stale.unlink()  # a write that a power cut interrupted; nobody was told it had happened
        queries = [json.loads(path.read_text()) for path in directory.glob("*.query.json")]
        self._next = 1 + max((query["sequence"] for query in queries), default=0)
        for query in sorted(queries, key=lambda item: int(item["sequence"])):
            if not self._path(query["id"], "answer").exists():
                self._waiting.append(query["id"])

    def submit(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Accept a query: (202 new or 200 known, its state). Refused 400 when malformed, 409 when the id is taken."""
        identity, messages = body.get("id"), body.get("messages")
        if not isinstance(identity, str) or not _ID.fullmatch(identity):
            raise Refused(400, "id must be 1 to 64 letters, digits, '.', '_' or '-'")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages must be a non-empty list")
        with self._changed:
            path = self._path(identity, "query")
            if path.exists():
                if json.loads(path.read_text())["body"] != body:
                    raise Refused(409, f"query {identity} exists with other content")
                return 200, self._state(identity)
            record = {"id": identity, "sequence": self._next, "accepted_unix_s": time.time(), "body": body}
            write_durably(path, record)
            self._next += 1
            self._waiting.append(identity)
            self._changed.notify_all()
            return 202, self._state(identity)

    def get(self, identity: str, wait_s: float = 0.0) -> dict[str, Any]:
        """State and, when there is one, answer; waits up to `wait_s` for the answer. Refused 404 when unknown."""
        deadline_s = time.monotonic() + min(max(wait_s, 0.0), MAX_WAIT_S)
        with self._changed:
            while True:
                state = self._state(identity)
                remaining_s = deadline_s - time.monotonic()
                if state["state"] not in ("queued", "running") or remaining_s <= 0:
                    return state
                self._changed.wait(remaining_s)

    def pending(self) -> list[dict[str, Any]]:
        """Every query that is not delivered, without its answer, in order of acceptance."""
        with self._changed:
            records = [json.loads(path.read_text()) for path in self._directory.glob("*.query.json")]
            states = [self._state(item["id"]) for item in sorted(records, key=lambda item: int(item["sequence"]))]
        return [{"id": s["id"], "state": s["state"]} for s in states if s["state"] != "delivered"]

    def acknowledge(self, identity: str, token: str) -> dict[str, Any]:
        """Mark an answer as delivered under `token`; again with the same token is harmless, another is Refused 409."""
        with self._changed:
            state = self._state(identity)
            if state["state"] in ("queued", "running"):
                raise Refused(409, f"query {identity} has no answer yet")
            path = self._path(identity, "delivered")
            if not path.exists():
                write_durably(path, {"delivery": token, "unix_s": time.time()})
            elif json.loads(path.read_text())["delivery"] != token:
                raise Refused(409, f"query {identity} was delivered before under another token")
            self._changed.notify_all()
            return self._state(identity)

    def work(self) -> None:
        """Answer queries until `stop`; runs in a thread of its own."""
        while True:
            with self._changed:
                while not self._waiting and not self._stop:
                    self._changed.wait()
                if self._stop:
                    return
                identity = self._waiting[0]
            query = json.loads(self._path(identity, "query").read_text())
            answer = self._answer_until_done(identity, query["body"])
            if answer is None:
                return
            answer["accepted_unix_s"] = query["accepted_unix_s"]
            with self._changed:
                while not self._keep(identity, answer):
                    self._changed.wait(RETRY_S)
                self._waiting.pop(0)
                self._running = None
                self._changed.notify_all()

    def stop(self) -> None:
        """Let `work` return after the attempt it is in."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def _keep(self, identity: str, answer: dict[str, Any]) -> bool:
        """Write an answer; False when the disk does not take it now (full: somebody may make room)."""
        try:
            write_durably(self._path(identity, "answer"), answer)
        except OSError as error:
            _print({"error": f"answer {identity} cannot be written: {error}"})
            return False
        return True

    def _answer_until_done(self, identity: str, body: dict[str, Any]) -> dict[str, Any] | None:
        attempts = 0
        while not self._stop:
            attempts += 1
            try:
                return {"id": identity, "attempts": attempts, **self._ask(identity, body)}
            except Interrupted:
                with self._changed:
                    self._running = None
                    self._changed.wait_for(lambda: self._stop, RETRY_S)
        return None

    def _ask(self, identity: str, body: dict[str, Any]) -> dict[str, Any]:
        """One attempt. The caller's connection plays no part in it."""
        started, text, first_s, last = time.monotonic(), [], None, {}
        with self._changed:
            self._running = (identity, 0)
        for chunk in self._stream(body):
            if "error" in chunk:
                return {"state": "failed", "error": chunk["error"]}
            last.update({key: chunk[key] for key in ("usage", "timings", "model") if chunk.get(key)})
            for choice in chunk.get("choices", []):
                if choice.get("finish_reason"):
                    last["finish_reason"] = choice["finish_reason"]
                if piece := choice.get("delta", {}).get("content"):
                    first_s = time.monotonic() - started if first_s is None else first_s
                    text.append(piece)
            with self._changed:
                self._running = (identity, len(text))
        if "finish_reason" not in last:
            raise Interrupted("the stream ended before the answer did")
        return {
            "state": "done",
            "text": "".join(text),
            **last,
            "first_token_s": first_s,
            "inference_s": time.monotonic() - started,
            "finished_unix_s": time.time(),
        }

    def _stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The model server's answer, an object a chunk; `{"error": text}` when it refuses the query for good."""
        import http.client
        import urllib.parse

        request = {"temperature": 0.0, **{key: body[key] for key in _FORWARDED if key in body}}
        request |= {"messages": body["messages"], "stream": True, "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = urllib.parse.urlsplit(self._server)
        connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port or 80, timeout=READ_TIMEOUT_S)
        try:
            connection.request("POST", f"{url.path}/v1/chat/completions", json.dumps(request), headers)
            response = connection.getresponse()
            if response.status >= 500:
                raise Interrupted(f"the model server answered {response.status}")
            if response.status != 200:
                yield {"error": f"HTTP {response.status}: {response.read(2000).decode(errors='replace')}"}
                return
            for line in response:
                if line.startswith(b"data: ") and line[6:].strip() != b"[DONE]":
                    yield json.loads(line[6:])
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Interrupted(str(error)) from error
        finally:
            connection.close()

    def _state(self, identity: str) -> dict[str, Any]:
        if not _ID.fullmatch(identity) or not self._path(identity, "query").exists():
            raise Refused(404, f"no query {identity}")
        answered, delivered = self._path(identity, "answer"), self._path(identity, "delivered")
        if delivered.exists():
            return {"id": identity, "state": "delivered", "deliveries": 1, **json.loads(delivered.read_text())}
        if answered.exists():
            answer = json.loads(answered.read_text())
            return {"id": identity, "state": answer["state"], "deliveries": 0, "answer": answer}
        if self._running is not None and self._running[0] == identity:
            return {"id": identity, "state": "running", "deliveries": 0, "tokens": self._running[1]}
        return {"id": identity, "state": "queued", "deliveries": 0}

    def _path(self, identity: str, kind: str) -> Path:
        return self._directory / f"{identity}.{kind}.json"


def serve_mailbox(options: argparse.Namespace) -> int:
    """Run the mailbox's HTTP server until it is killed; prints a JSON line when it listens."""
    from http.server import ThreadingHTTPServer

    key = options.api_key_file.read_text().strip() if options.api_key_file else None
    mailbox = Mailbox(options.dir, options.server, key)
    server = ThreadingHTTPServer((options.host, options.port), _handler(mailbox, key))
    server.daemon_threads = True
    threading.Thread(target=mailbox.work, daemon=True).start()
    _print({"ready": f"http://{options.host}:{server.server_address[1]}"})
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


def _handler(mailbox: Mailbox, key: str | None) -> Any:
    import urllib.parse
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve("GET")

        def do_POST(self) -> None:
            self._serve("POST")

        def log_message(self, format: str, *args: object) -> None:
            """Prompts and answers are nobody's log."""

        def _serve(self, method: str) -> None:
            try:
                status, value = self._route(method)
            except Refused as error:
                status, value = error.status, {"error": str(error)}
            except (ValueError, TypeError, AttributeError) as error:
                status, value = 400, {"error": f"bad request: {error}"}
            except OSError as error:
                status, value = 507, {"error": f"the mailbox cannot keep it: {error}"}
            data = json.dumps(value).encode()
            with contextlib.suppress(OSError):  # the caller may be behind the horizon by now
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def _route(self, method: str) -> tuple[int, dict[str, Any]]:
            length = int(self.headers.get("Content-Length") or 0)
            if length > MAX_BODY_BYTES:
                self.close_connection = True
                raise Refused(413, f"at most {MAX_BODY_BYTES} bytes")
            raw = self.rfile.read(length)
            url = urllib.parse.urlsplit(self.path)
            if url.path == "/health":
                return 200, {"status": "ok"}
            if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
                raise Refused(401, "an API key is needed")
            parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
            match (method, parts):
                case ("POST", ["v1", "queries"]):
                    return mailbox.submit(json.loads(raw))
                case ("GET", ["v1", "queries"]):
                    return 200, {"queries": mailbox.pending()}
                case ("GET", ["v1", "queries", identity]):
                    wait = urllib.parse.parse_qs(url.query).get("wait_s", ["0"])[0]
                    return 200, mailbox.get(identity, float(wait))
                case ("POST", ["v1", "queries", identity, "ack"]):
                    token = json.loads(raw or b"{}").get("delivery")
                    if not isinstance(token, str) or not token:
                        raise Refused(400, "delivery must be a token of the caller's choice")
                    return 200, mailbox.acknowledge(identity, token)
            raise Refused(404, f"nothing at {method} {url.path}")

    return Handler


# --- command line -----------------------------------------------------------------------------------------------------


def detach(log: Path) -> None:
    """Go on as a background process whose output goes to `log`; the caller's process prints {"pid"} and ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        _print({"pid": child})
        os._exit(0)
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)


def _print(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="onboard.py", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    model = commands.add_parser("serve-model")
    model.add_argument("model", type=Path)
    model.add_argument("--threads", type=int, default=1)
    model.add_argument("--context", type=int, default=1024, help="tokens the model sees at once")
    model.add_argument("--alias", help="the model's name in answers; default: the file's")
    mailbox = commands.add_parser("mailbox")
    mailbox.add_argument("--dir", type=Path, default=Path("/var/lib/hil/mailbox"))
    mailbox.add_argument("--server", default="http://127.0.0.1:8080")
    for command, port in ((model, 8080), (mailbox, 8081)):
        command.add_argument("--host", default="0.0.0.0")  # noqa: S104  (the payload link and mgmt both lead here)
        command.add_argument("--port", type=int, default=port)
        command.add_argument("--api-key-file", type=Path)
        command.add_argument("--detach", type=Path, metavar="LOG")

    verify = commands.add_parser("verify")
    verify.add_argument("file", type=Path)
    verify.add_argument("sha256")
    chunk = commands.add_parser("chunk-hash")
    chunk.add_argument("file", type=Path)
    chunk.add_argument("offset", type=int)
    chunk.add_argument("length", type=int)
    final = commands.add_parser("activate")
    final.add_argument("part", type=Path)
    final.add_argument("final", type=Path)
    final.add_argument("sha256")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    options = _parser().parse_args(argv)
    if getattr(options, "detach", None):
        detach(options.detach)
    try:
        match options.command:
            case "serve-model":
                return serve_model(options)
            case "mailbox":
                return serve_mailbox(options)
            case "verify":
                found, size = file_sha256(options.file)
                _print({"sha256": found, "bytes": size, "ok": found == options.sha256.lower()})
                return 0 if found == options.sha256.lower() else 1
            case "chunk-hash":
                found, size = file_sha256(options.file, options.offset, options.length)
                _print({"sha256": found, "bytes": size})
            case "activate":
                _print(activate(options.part, options.final, options.sha256))
    except ValueError as error:
        _print({"error": str(error)})
        return 1
    except (OSError, ImportError) as error:
        _print({"error": str(error)})
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
