"""A flight as the campaign holds it: its state, its clock, and the samples that only the client can count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from hil.bench.sockets import error_from
from hil.client.http import Http
from hil.errors import HilError

FLUSH_S = 0.2
BATCH_ROWS = 2000  # some 200 KiB: the daemon takes at most 1 MiB
END_TIMEOUT_S = 60.0


class Flight:
    """The flight that runs on the daemon. Usable from several threads.

    Tokens and progress are stamped when they are given and sent in batches by a thread, so that counting a token
    costs the client nothing; `end` sends the rest.
    """

    def __init__(self, http: Http, board: str, token: str, on_end: Callable[[], object] = lambda: None) -> None:
        self.board = board
        self._on_end = on_end
        self._http = http
        self._token = token
        self._rows: dict[str, list[dict[str, Any]]] = {"tokens": [], "progress": []}
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._wake = threading.Event()
        self._over = False
        self._error: HilError | None = None
        self._thread = threading.Thread(target=self._send_forever, name="hil-flight-record", daemon=True)
        self._thread.start()

    def state(self) -> dict[str, Any]:
        """t_mission, utc, rate, phase, contact, next_edges, power, soc, link, upload_bytes, tokens, state, invalid.

        Raises the error that made going on pointless: a supply or link box that is lost, a full disk.
        """
        value: dict[str, Any] = self._http.get("/v1/flight")
        if value.get("error"):
            raise error_from(value, "the flight failed")
        return value

    def clock(self, rate: float, cause: str = "") -> dict[str, Any]:
        """Run mission time `rate` times as fast from now on. Delay, loss and everything on the board stay real."""
        return self._call("clock", {"rate": rate, "cause": cause})

    def skip_to(self, t_s: float, *, assumed_board_w: float | None = None, cause: str = "") -> dict[str, Any]:
        """Jump forward to mission second `t_s`; the charge is advanced by model, the link is in outage meanwhile."""
        return self._call("clock", {"skip_to": t_s, "assumed_board_w": assumed_board_w, "cause": cause})

    def record_tokens(self, query: str, n: int, plane: str) -> None:
        """`n` content tokens of `query` have just come, over plane `payload` or `mgmt`."""
        self._add("tokens", {"t_mono": time.monotonic(), "query": query, "n": n, "plane": plane})

    def progress(self, kind: str, value: float) -> None:
        """A cumulative count of the workload, e.g. `upload_bytes` that the board has acknowledged."""
        self._add("progress", {"t_mono": time.monotonic(), "kind": kind, "value": value})

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event to the run's journal through the daemon."""
        self._call("event", {"kind": kind, **fields})

    def end(self) -> dict[str, Any]:
        """End the flight: load off and verified, link cleared, record closed. A second call does nothing."""
        if self._over:
            return {}
        self._over = True
        self._wake.set()
        self._thread.join()
        error: HilError | None = None
        try:
            self.flush()
        except HilError as caught:
            error = caught
        self._on_end()
        answer = self._call("end", {})
        if error is not None:
            raise error  # the flight is over and safe, but its record lacks rows
        return answer

    def flush(self) -> None:
        """Send what waits. Raises what the daemon raised for it."""
        with self._send_lock:
            with self._lock:
                rows, self._rows = self._rows, {"tokens": [], "progress": []}
            for table, batch in rows.items():
                for first in range(0, len(batch), BATCH_ROWS):
                    self._call("record", {"table": table, "rows": batch[first : first + BATCH_ROWS]})
            if self._error is not None:
                error, self._error = self._error, None
                raise error

    def _add(self, table: str, row: dict[str, Any]) -> None:
        with self._lock:
            self._rows[table].append(row)

    def _send_forever(self) -> None:
        while not self._wake.wait(FLUSH_S):
            try:
                self.flush()
            except HilError as error:
                self._error = error  # told by the next flush of the owner, at the latest by end()
                return

    def _call(self, what: str, body: object) -> dict[str, Any]:
        value: dict[str, Any] = self._http.call(
            "POST", f"/v1/flight/{what}", body, token=self._token, timeout_s=END_TIMEOUT_S
        )
        return value
