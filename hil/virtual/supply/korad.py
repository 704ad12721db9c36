"""Korad and Tenma KA3005P: no terminators, replies of fixed length, a status of one raw byte, no errors at all.

From drivers of this family, not from the maker. A command ends when the line falls silent, or with its `?`. Commands
closer than 80 ms are lost (here: closer than 40 ms, so that a host's jitter does not decide). `ISET1?` answers a sixth
byte that means nothing. `OVP1` and `OCP1` are switches: the thresholds are the set points themselves. `OUT1` means on.
"""

from __future__ import annotations

import math
import re

from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.physics import ChannelModel

GAP_S = 0.080
LOST_WITHIN_S = GAP_S / 2
STRAY = "K"


class Ka3005p:
    """One channel."""

    def __init__(self, box: Instrument) -> None:
        self.box = box
        self._heard_s = -math.inf
        self._memory: dict[int, tuple[float, float]] = {}
        self.reset()

    def reset(self) -> None:
        self._beep = False

    def tick(self, now_s: float) -> None:
        # its thresholds follow the set points; without current limiting the ideal source never exceeds the voltage
        channel = self.box.channels[1]
        channel.ovp.level = channel.voltage_set_v + 0.05

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def execute(self, message: str) -> str | None:
        self.box.tick()
        now = self.box.clock()
        lost = now - self._heard_s < LOST_WITHIN_S - 1e-9
        self._heard_s = now
        if lost:
            return None
        if message.endswith("?"):
            return self._query(message)
        self._set(message)
        self.box.tick()
        return None

    def _query(self, text: str) -> str | None:
        channel = self.box.channels[1]
        answers = {
            "*IDN?": self.box.model.identity,
            "VSET1?": f"{channel.voltage_set_v:05.2f}",
            "ISET1?": f"{channel.current_limit_a:05.3f}{STRAY}",
            "VOUT1?": f"{channel.terminal_v:05.2f}",
            "IOUT1?": f"{channel.current_a:05.3f}",
            "STATUS?": chr(self._status()),
        }
        return answers.get(text)  # what it does not know it does not answer

    def _status(self) -> int:
        """Bit 0 constant voltage, bit 4 beep, bit 5 OCP armed, bit 6 output on, bit 7 OVP armed."""
        channel = self.box.channels[1]
        bits = (channel.mode == "CV") | self._beep << 4 | channel.ocp.enabled << 5
        return bits | channel.output_on << 6 | channel.ovp.enabled << 7

    def _set(self, text: str) -> None:
        channel, now = self.box.channels[1], self.box.clock()
        level = re.fullmatch(r"([VI])SET1:(\d+(?:\.\d*)?)", text)
        switch = re.fullmatch(r"(OUT|OVP|OCP|BEEP)([01])", text)
        memory = re.fullmatch(r"(SAV|RCL)([1-5])", text)
        if level:
            self._level(level[1], float(level[2]))
        elif switch and switch[1] == "OUT":
            channel.clear_all(now)  # switching is the only way to end a trip
            channel.switch(switch[2] == "1", now)
        elif switch and switch[1] == "BEEP":
            self._beep = switch[2] == "1"
        elif switch:
            (channel.ovp if switch[1] == "OVP" else channel.ocp).enabled = switch[2] == "1"
        elif memory and memory[1] == "SAV":
            self._memory[int(memory[2])] = (channel.voltage_set_v, channel.current_limit_a)
        elif memory:
            saved = self._memory.get(int(memory[2]))
            if saved is not None:
                channel.voltage_set_v, channel.current_limit_a = saved
                channel.switch(False, now)

    def _level(self, what: str, value: float) -> None:
        """Out of range is ignored: it says nothing, and the old value stays."""
        channel = self.box.channels[1]
        if what == "V" and value <= channel.model.max_v:
            channel.voltage_set_v = round(value, 2)
        elif what == "I" and value <= channel.model.max_a:
            channel.current_limit_a = round(value, 3)


MODELS = (
    SupplyModel(
        name="korad-ka3005p",
        identity="KORADKA3005PV2.0",
        channels={1: ChannelModel(30.0, 5.0, 31.0, 5.1, math.inf, math.inf)},
        vendor=Ka3005p,
        decimals_v=2,
        trips_in_cc=True,
        reply_end=b"",
        command_end=False,
        known="other drivers' experience; the loss of early commands is assumed",
    ),
)
