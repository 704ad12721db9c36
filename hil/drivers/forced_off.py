"""Switching outputs off on a blocking line, for who has no event loop: the dead-man, and a start that finds a dead run.

It says the same words as the driver (`dialogue`), and never raises for a fault of the instrument.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hil.drivers.codec import InstrumentError
from hil.drivers.dialects import Dialect, dialect
from hil.drivers.dialogue import Dialogue, Pause, Say, Steps, T
from hil.drivers.transport import BlockingLine, open_blocking, parse_any_address


@dataclass(frozen=True, slots=True)
class ForcedOff:
    """Outcome of `force_off`: last measured volts a channel (None: never answered), and how it went.

    `command_s` is when the off command last went out, `elapsed_s` when everything was verified or given up, both
    counted from the call.
    """

    off: bool
    voltages_v: Mapping[int, float | None]
    attempts: int
    command_s: float
    elapsed_s: float
    trouble: str = ""


def force_off(
    address: str,
    dialect_name: str,
    channels: Sequence[int],
    off_voltage_v: float,
    deadline_s: float,
    *,
    attempt_s: float = 0.5,
    clock: Callable[[], float] = time.monotonic,
) -> ForcedOff:
    """Switch channels off and verify measured volts below `off_voltage_v`, within `deadline_s` seconds from now.

    Blocking and without an event loop, for the dead-man. Off commands for all channels go out before anything is read,
    and again on each new connection: switching off twice is harmless. Never raises for a fault of the instrument.
    """
    speak = dialect(dialect_name)
    talk = Dialogue(speak)
    serial = parse_any_address(address).kind == "serial"
    start = clock()
    end = start + deadline_s
    pending = set(channels)
    volts: dict[int, float | None] = dict.fromkeys(channels)
    attempts, command_s, trouble = 0, 0.0, ""
    while pending and clock() < end:
        attempts += 1
        line = None
        try:
            line = open_blocking(address, speak.terminator, speak.baud, max(0.05, min(attempt_s, end - clock())))
            said = _Blocking(line, speak, end, attempt_s, clock)
            if speak.has("take_remote") and (serial or "remote_on_serial_only" not in speak.quirks):
                said.run(talk.tell("take_remote"))  # not read back: off may be obeyed all the same
            for ch in channels:
                said.run(talk.switch_off(ch))
            command_s = clock() - start
            while pending and clock() < end:
                for ch in sorted(pending):
                    if on := said.run(talk.output_on(ch)):
                        said.run(talk.switch_off(ch))
                        command_s = clock() - start
                    volts[ch] = value = said.run(talk.measured_voltage(ch))
                    if value < off_voltage_v and not on:  # a shorted output has no volts either
                        pending.discard(ch)
                if pending:
                    time.sleep(0.01)
        except (OSError, InstrumentError) as error:
            trouble = str(error) or type(error).__name__
            time.sleep(min(0.02, max(0.0, end - clock())))
        finally:
            if line is not None:
                line.close()
    still = [f"{volts[ch]} V on channel {ch}, not verified off" for ch in sorted(pending) if volts[ch] is not None]
    trouble = "; ".join(filter(None, [*still, trouble]))
    return ForcedOff(not pending, volts, attempts, command_s, clock() - start, trouble if pending else "")


class _Blocking:
    """Runs dialogues on a blocking line: each answer within `attempt_s`, nothing after `end_s`."""

    def __init__(
        self, line: BlockingLine, speak: Dialect, end_s: float, attempt_s: float, clock: Callable[[], float]
    ) -> None:
        self._line, self._speak, self._end_s, self._attempt_s, self._clock = line, speak, end_s, attempt_s, clock
        self._last_s = -math.inf
        self._stray = 0

    def run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                reply = ""
                if isinstance(step, Pause):
                    time.sleep(step.seconds)
                else:
                    reply = self._exchange(step)
                step = steps.send(reply)
        except StopIteration as done:
            result: T = done.value
            return result

    def _exchange(self, step: Say) -> str:
        time.sleep(max(0.0, self._last_s + self._speak.min_gap_s - self._clock()))
        if self._stray:
            self._line.drop(self._stray)
        self._line.send((step.text + self._speak.terminator).encode("latin-1"))
        reply = ""
        if step.frame is not None:
            reply = self._line.read(min(self._end_s, self._clock() + self._attempt_s), step.frame)
        self._stray = step.stray
        self._last_s = self._clock()
        return reply
