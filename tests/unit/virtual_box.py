"""A virtual instrument with a hand-wound clock and a short way to type, for tests of the virtual supply."""

from __future__ import annotations

from hil.virtual.supply import Channel, Instrument, Load, supply_model

TICK_S = 0.01


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Box:
    """An instrument, its clock and a short way to type. `gap_s` passes before each message."""

    def __init__(self, model: str, load: Load | None = None, channel: int = 1, gap_s: float = 0.0) -> None:
        self.clock = Clock()
        self.gap_s = gap_s
        self.instrument = Instrument(supply_model(model), {channel: load} if load else {}, self.clock)

    def type(self, *messages: str) -> str | None:
        """The answer to the last message."""
        answer = None
        for message in messages:
            self.wait(self.gap_s)
            answer = self.instrument.execute(message)
        return answer

    def wait(self, seconds: float) -> None:
        """Let time pass in ticks of 10 ms, as the server does."""
        end = self.clock.now + seconds
        while self.clock.now < end - 1e-9:
            self.clock.now = min(end, self.clock.now + TICK_S)
            self.instrument.tick()

    def channel(self, number: int = 1) -> Channel:
        """The truth behind the language."""
        return self.instrument.channels[number]
