"""A board that goes down in the middle of a step and comes up again: noticed by its boot id, and waited for."""

from __future__ import annotations

import contextlib

from hil.bench.journal import read_events
from hil.campaign import steps
from hil.campaign.flying import Flying
from hil.errors import BenchError, BoardError

# Wall seconds for the board to say which boot it is in, over a connection that stands.
ASK_S = 10.0


class Reboots:
    """Notices reboots of the flown board from now on: a watchdog's, a brown-out's, and after a shed load.

    While a load is shed mission time runs at `clock_rate`; a board that boots is waited for at rate 1.
    """

    def __init__(self, flying: Flying, clock_rate: float) -> None:
        self._flying, self._clock_rate = flying, clock_rate
        self._sheds = self._shed_count()
        self._console = flying.board.console.mark()
        self._boot_id = self._ask()

    def since(self) -> str | None:
        """Why the board rebooted since the last call, once it is up again; None when it did not.

        Waits for a load that is shed, and then for the boot within the board type's time. Raises BoardError when the
        board does not come back, BenchError when its power was cut otherwise than by load shedding.
        """
        cause = None
        while True:
            try:
                if self._shed_count() > self._sheds:
                    cause = "load shed"
                    self._ride_out()
                boot_id = self._ask()
                self._console = self._flying.board.console.mark()
                break
            except BenchError:
                if self._shed_count() == self._sheds:
                    raise  # else its power went while we asked
        if boot_id != self._boot_id:
            cause = cause or "reboot"
        self._boot_id = boot_id
        return cause

    def _ride_out(self) -> None:
        """The load was shed: until it is restored and the board has booted by itself."""
        flying = self._flying
        self._sheds = self._shed_count()
        flying.board.accept_power_cut()
        if flying.flight.state()["power"]["state"] == "shed":
            steps.await_restored(flying, self._clock_rate)
        flying.clock(1.0, cause="boot")
        powered = steps.switched_on(flying, "load_restored")
        steps.await_boot(flying, self._console, powered, cause="load restored")

    def _ask(self) -> str:
        """The boot that the board is in, waited for as long as its type may take to boot."""
        flying = self._flying
        with contextlib.suppress(BoardError):  # the connection is gone, or hangs
            return flying.board.shell.boot_id(ASK_S)
        timeout_s = flying.type.boot.timeout_s
        try:
            return flying.board.reconnect(timeout_s).boot_id(ASK_S)
        except BoardError as error:
            raise BoardError(
                f"board {flying.board_name} went down and was not back after {timeout_s:g} s: {error.message}",
                hint="its console log says why; `boot.timeout_s` of the board type bounds the wait",
            ) from error

    def _shed_count(self) -> int:
        return sum(event["kind"] == "load_shed" for event in read_events(self._flying.journal.path))
