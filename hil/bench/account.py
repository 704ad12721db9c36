"""What the daemon tells about itself, its boards, its leases and those who wait: for clients, people and Prometheus."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import hil
from hil.bench.board import BoardOwner
from hil.bench.boards import Boards
from hil.bench.exporter import BenchMetrics, Exporter
from hil.bench.heart import Heart
from hil.bench.journal import utc_text
from hil.bench.lease_desk import LeaseDesk, Waiter
from hil.bench.leases import Lease, boot_clock
from hil.inventory import Bench

# Of a lease; `id` is told as `lease`, and what names its process for good is nobody's business.
PUBLIC = tuple(field.name for field in fields(Lease) if field.name not in ("id", "pid_start"))


class Account:
    """The daemon's account of itself. `metrics_port` and `remote` are told once they are served."""

    def __init__(self, bench: Bench, boards: Boards, desk: LeaseDesk, heart: Heart, busy: Callable[[], None]) -> None:
        self._bench = bench
        self._boards = boards
        self._desk = desk
        self._heart = heart
        self._busy = busy
        self._digest = hashlib.sha256(bench.path.read_bytes()).hexdigest()
        self._started_s = time.time()
        self.exporter = Exporter(self._metrics)
        self.metrics_port = 0
        self.remote: dict[str, str] | None = None

    def status(self) -> dict[str, Any]:
        self._busy()
        holders = {board: item for item in self._desk.leases() for board in item.boards}
        return {
            "bench": self._bench.name,
            "bench_file": str(self._bench.path),
            "bench_sha256": self._digest,
            "version": hil.__version__,
            "pid": os.getpid(),
            "up_s": time.time() - self._started_s,
            "metrics": f"http://127.0.0.1:{self.metrics_port}/metrics",
            "log": str(self._bench.state_dir / "daemon.log"),
            "remote": self.remote,
            "boards": {
                name: self._board_status(board, holders.get(name)) for name, board in self._boards.owners.items()
            },
            "flight": None if self._boards.flight is None else self._boards.flight.describe(),
            "deadman": {"alive": self._heart.alive, "armed": self._heart.armed, "pid": self._heart.pid},
        }

    def describe_bench(self) -> dict[str, Any]:
        """The bench file and its board types, for clients that cannot read them here."""
        return {
            "path": str(self._bench.path),
            "id": self._bench.id,
            "file": self._bench.file.model_dump(mode="json", by_alias=True, exclude_none=True),
            "types": {
                name: item.model_dump(mode="json", by_alias=True, exclude_none=True)
                for name, item in self._bench.types.items()
            },
        }

    def list_leases(self) -> list[dict[str, Any]]:
        """Who holds what, since when, until when unless renewed."""
        now_s = boot_clock()
        return [
            {
                "lease": item.id,
                **public(item),
                "since": _utc(item.acquired_s),
                "until": _utc(item.expires_s),
                "left_s": item.expires_s - now_s,
            }
            for item in self._desk.leases()
        ]

    def list_waiting(self) -> list[dict[str, Any]]:
        """Who waits for what since when, and why, in the order in which they are served."""
        return [_waiting(waiter, why) for waiter, why in self._desk.waiting()]

    def _board_status(self, board: BoardOwner, lease: Lease | None) -> dict[str, Any]:
        console = board.console
        return {
            "type": board.type.name,
            "state": board.state,
            "fault": board.fault,
            "power_epoch": board.power_epoch,
            "power": None if board.last is None else board.last.row(),
            "link": None if board.link is None else board.link_state(),
            "lease": None if lease is None else {"lease": lease.id, **public(lease)},
            "console": None
            if console is None
            else {
                "connected": console.connected,
                "bytes": console.ring.end,
                "last_line": console.last_line,
                "reason": "" if console.connected else console.reason,
            },
        }

    def _metrics(self) -> BenchMetrics:
        def one(board: BoardOwner) -> Any:
            flight = self._boards.flight_of(board)
            if flight is None:
                return board.metrics(None, "none")
            return board.metrics(flight.metrics(), flight.phase)

        return BenchMetrics(
            bench=self._bench.name,
            version=hil.__version__,
            deadman_alive=self._heart.alive,
            leases=len(self._desk.leases()),
            boards=tuple(one(board) for board in self._boards.owners.values()),
        )


def public(lease: Lease) -> dict[str, Any]:
    """A lease without what only its holder may know."""
    return {name: getattr(lease, name) for name in PUBLIC}


def _waiting(waiter: Waiter, why: str) -> dict[str, Any]:
    request = waiter.request
    return {
        "holder": request.holder,
        "any_of": [sorted(boards) for boards in waiter.wanted],
        "since": _utc(waiter.since_s),
        "until": _utc(waiter.since_s + request.wait_s),
        "priority": request.priority,
        "reason": request.reason,
        "why": why,
    }


def _utc(boot_s: float) -> str:
    """A moment of the leases' clock in UTC, by what the host's clock says now."""
    return utc_text(time.time() + boot_s - boot_clock())
