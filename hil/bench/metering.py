"""What one supply channel measured: samples read, integrated to energy, filtered for the flight, judged for gaps."""

from __future__ import annotations

import math
from collections.abc import Callable

from hil.bench.powerflight import FlightPower
from hil.bench.powervalues import OnEvent, PowerLedger, Tuning
from hil.drivers.scpi import InstrumentError, Supply
from hil.errors import SafetyError
from hil.model import Reading


class Metering:
    """The samples of one channel. `board`: what its loop is called; `flown` and `ledger` change with a flight.

    `energy_j` is integrated over wall time by trapezoid from raw samples, `mission_energy_j` over mission time.
    """

    def __init__(
        self,
        board: str,
        supply: Supply,
        channel: int,
        tuning: Tuning,
        *,
        tell: OnEvent,
        clock: Callable[[], float],
    ) -> None:
        self.flown: FlightPower | None = None
        self.ledger = PowerLedger()
        self.energy_j = 0.0
        self.mission_energy_j = 0.0
        self.previous: Reading | None = None
        self._board = board
        self._supply = supply
        self._channel = channel
        self._tuning = tuning
        self._tell = tell
        self._clock = clock
        self._filtered_a = 0.0
        self._fresh_s = clock()
        self._lost = False

    async def read(self, energized: bool) -> Reading | None:
        """A reading, or None when the supply did not answer this time; SafetyError when that lasts while it is on."""
        try:
            reading = await self._supply.measure(self._channel)
        except InstrumentError as error:
            if not self._lost:
                self._lost = True
                self._tell("sample_lost", {"error": error.message})
            age = self._clock() - self._fresh_s
            self.ledger.lost_samples += 1
            if energized:
                self._judge_gap(age)
            if energized and age > self._tuning.stale_s:
                raise SafetyError(
                    f"{self._board}: no measurement for {age:.1f} s while the output is on: {error.message}",
                    hint="check the supply and its network; its output is switched off as soon as it answers",
                ) from error
            return None
        if self._lost:
            self._lost = False
            self._tell("sample_back", {"gap_s": self._clock() - self._fresh_s})
        self._fresh_s = self._clock()
        return reading

    def account(self, reading: Reading, energized: bool) -> None:
        """Energy by trapezoid from raw samples; the fed-back current through one pole."""
        self.ledger.samples += 1
        if self.previous is not None:
            dt = reading.time_s - self.previous.time_s
            joules = 0.5 * (reading.power_w + self.previous.power_w) * dt
            self.add_energy(joules, self.previous.time_s, reading.time_s)
            if energized and self._judge_gap(dt):
                self.ledger.gap_j += joules
            share = 1.0 - math.exp(-dt / self._tuning.filter_s)
            self._filtered_a += share * (reading.current_a - self._filtered_a)
        else:
            self._filtered_a = reading.current_a
        self.previous = reading

    def drawn_w(self, reading: Reading) -> float:
        """What a flight's model is fed: the filtered current at this reading's voltage."""
        return max(0.0, self._filtered_a * reading.voltage_v)

    def add_energy(self, joules: float, from_s: float, to_s: float) -> None:
        """Joules measured between two wall times, and in a flight what they are in mission time."""
        self.energy_j += joules
        if self.flown is not None:
            self.mission_energy_j += self.flown.metered(joules, from_s, to_s)

    def forget(self, reading: Reading) -> None:
        """Start anew from `reading`: the span of a switching sequence is not interpolated over."""
        self.previous = reading
        self._filtered_a = reading.current_a
        self.touch()

    def touch(self) -> None:
        """Samples are no older than this moment: what took the time was not a silent supply."""
        self._fresh_s = self._clock()

    def _judge_gap(self, gap_s: float) -> bool:
        """As `FlightPower.judge_gap`; counted without a flight too."""
        self.ledger.longest_gap_s = max(self.ledger.longest_gap_s, gap_s)
        return self.flown is not None and self.flown.judge_gap(self._board, gap_s)
