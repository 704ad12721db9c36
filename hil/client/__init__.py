"""What pytest and the CLI hold: a bench, its boards, and a flight. Synchronous; everything goes through the daemon.

>>> with attach(bench) as daemon, daemon.lease(["vb1"]) as lease:    # doctest: +SKIP
...     board = daemon.board("vb1", lease)
...     board.power.on()
...     board.console.expect("login:", timeout_s=60)
"""

from hil.client.bench import Bench, Board, Lease, Link, Power
from hil.client.connect import attach
from hil.client.console import Console, Match
from hil.client.flight import Flight
from hil.client.shell import Rebooted

__all__ = ["Bench", "Board", "Console", "Flight", "Lease", "Link", "Match", "Power", "Rebooted", "attach"]
