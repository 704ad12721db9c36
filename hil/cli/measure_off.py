"""How long a board really takes to be off: measured by cuts of the running bench, one layer after the other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hil.errors import BenchError, UsageError

if TYPE_CHECKING:
    from hil.bench.levels import TimeToOff
    from hil.client import Bench as Client
    from hil.inventory import Bench

LEASE_S = 600.0
PATIENCE_S = 60.0
LAYERS = ("off command", "daemon killed", "daemon stopped")


def measure_off(bench: Bench, board: str, say: Callable[[str], None]) -> list[TimeToOff]:
    """Power the board and cut it three times; seconds until the supply measured it off, kept in the state directory.

    The daemon is killed and stopped for it, so nobody else may use the bench: BenchError otherwise. Each time runs from
    the fault to the journal entry that follows a measured voltage below the board's off voltage.
    """
    from hil.bench.levels import CutTimes, TimeToOff
    from hil.client import attach

    name, _, _ = bench.board(board)
    with attach(bench) as client:
        _alone(client)
        supply = next((row["found"] for row in client.doctor() if row["what"] == "supply answers"), "")
        lease = client.lease([name], ttl_s=LEASE_S, reason="measuring time to off", pid=None, renew=False)
    granted = {"lease": lease.id, "token": lease.token, "boards": lease.boards, "ttl_s": LEASE_S}
    times, found = CutTimes(bench.state_dir / "time-to-off.json"), []
    try:
        for layer in LAYERS:
            seconds = _cut(bench, name, granted, layer)
            say(f"{name}: {layer}: off after {seconds:.2f} s")
            found.append(TimeToOff(name, layer, seconds, time.time(), supply))
            times.write(found[-1])
    finally:
        _give_back(bench, granted)
    return found


def _alone(client: Client) -> None:
    status = client.status()
    others = [name for name, state in status["boards"].items() if state["lease"] or state["state"] != "off"]
    if others or (status["flight"] and status["flight"].get("state") != "ended"):
        raise BenchError(
            f"in use: {', '.join(others) or 'a flight'}",
            hint="the daemon is killed for this; wait until nobody needs it",
        )


def _cut(bench: Bench, board: str, granted: dict[str, object], layer: str) -> float:
    from hil.client import Lease, attach

    with attach(bench) as client:
        power = client.board(board, Lease.stored(client.http, granted)).power
        power.on()
        if layer == "off command":
            answer = power.off_timed()
            return answer[1] - answer[0]
        began = time.monotonic()
        os.kill(int(client.status()["pid"]), signal.SIGKILL if layer == "daemon killed" else signal.SIGSTOP)
    return _until_closed(bench, board, began)


def _until_closed(bench: Bench, board: str, began: float) -> float:
    """Seconds until the dead-man has written that it measured the board off."""
    from hil.bench.safety import IntentJournal

    journal = IntentJournal(bench.state_dir / "intent.jsonl")
    while any(intent.board == board for intent in journal.open_intents()):
        if time.monotonic() - began > PATIENCE_S:
            raise BenchError(
                f"board {board} is not verified off {PATIENCE_S:g} s after its daemon's death",
                hint=f"switch it off by hand; {bench.state_dir / 'deadman.log'} says what the dead-man tried",
            )
        time.sleep(0.005)
    return time.monotonic() - began


def _give_back(bench: Bench, granted: dict[str, object]) -> None:
    from hil.client import Lease, attach

    with attach(bench) as client:
        Lease.stored(client.http, granted).release()


def consent(bench: Bench, board: str, yes: bool, ask: Callable[[str], bool]) -> None:
    """UsageError unless the board is virtual or a person agreed to its power being cut."""
    _, _, kind = bench.board(board)
    if kind.hardware == "virtual" or yes:
        return
    if not ask(f"{board} is hardware: its power is switched on and cut {len(LAYERS)} times. Go on?"):
        raise UsageError("not measured", hint="--yes where nobody can be asked")
