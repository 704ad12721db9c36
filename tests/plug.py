"""A Tasmota outlet on loopback, for tests of what an outlet is cut for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlsplit


class Plug:
    """Answers at `address`; `on_cut` is called when it is switched off. While `broken` it answers and obeys nothing."""

    def __init__(self, on_cut: Callable[[], object] = lambda: None) -> None:
        self.on = True
        self.broken = False
        self.on_cut = on_cut
        plug = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                words = parse_qs(urlsplit(self.path).query)["cmnd"][0].split()
                if len(words) == 2 and not plug.broken:
                    plug.on = words[1] == "On"
                    if not plug.on:
                        plug.on_cut()
                body = json.dumps({"POWER": "ON" if plug.on else "OFF"}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"tasmota://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
