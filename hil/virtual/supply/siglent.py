"""Siglent SPD3303X: no protections over remote, commands that need 20 ms between them, a firmware that can crash.

Set, output, measure, status bits and the five-step timer are from the maker's guide; the port is unverified, and what a
command that comes too soon does is an assumption: it is lost. Half the documented gap is enough here, so that a host's
jitter does not decide. Storing twice within 50 ms crashes the real firmware until its mains switch is used; so it does
here, with the outputs as they were.
"""

from __future__ import annotations

import math
import re

from hil.virtual.supply.commands import (
    Handlers,
    common,
    fixed,
    nothing,
    one_channel,
    select_handler,
)
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.language import Interpreter, Request, ScpiFault, boolean, query_only, real, set_only, word
from hil.virtual.supply.physics import Channel, ChannelModel
from hil.virtual.supply.sequence import Sequence, Step

GAP_S = 0.020
LOST_WITHIN_S = GAP_S / 2
SAVE_GAP_S = 0.050
TIMER_STEPS = 5


class Spd3303x:
    """Two adjustable channels and a fixed one that can only be switched."""

    def __init__(self, box: Instrument) -> None:
        self.box = box
        h = Handlers(box, self._pick, volts=fixed(3), amperes=fixed(3), watts=fixed(3))
        rows = [
            *common(box, lambda code, text: f"{code}  {'No Error' if code == 0 else text}"),
            ("[:CH<n>]:VOLTage", h.voltage()),
            ("[:CH<n>]:CURRent", h.current()),
            (":OUTPut", self._output),
            (":OUTPut:TRACK", self._track),
            (":OUTPut:WAVE", nothing),
            (":MEASure:VOLTage", h.measured("v")),
            (":MEASure:CURRent", h.measured("a")),
            (":MEASure:POWEr", h.measured("w")),
            (":INSTrument", self._instrument),
            (":SYSTem:STATus", self._status),
            (":TIMEr:SET", self._timer_set),
            (":TIMEr", self._timer),
            (":*SAV", self._save),
            (":*RCL", self._recall),
            (":*LOCK", nothing),
            (":*UNLOCK", nothing),
        ]
        self._interpreter = Interpreter(rows, box.push_error, box.tick)
        self._heard_s = -math.inf
        self._saved_s = -math.inf
        self._memory: dict[int, tuple[tuple[float, float], ...]] = {}
        self._select = select_handler(box, "CH")
        self.reset()

    def execute(self, message: str) -> str | None:
        now = self.box.clock()
        lost = now - self._heard_s < LOST_WITHIN_S - 1e-9
        self._heard_s = now
        # A save is what its firmware cannot take, so it is not protected by the loss of early commands.
        if lost and not message.upper().startswith("*SAV"):
            self.box.tick()
            return None
        return self._interpreter.run(message)

    def tick(self, now_s: float) -> None:
        pass

    def reset(self) -> None:
        self._tracking = 0
        self._steps = {n: [Step(0.0, 0.0, 0.0)] * TIMER_STEPS for n in (1, 2)}

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def _number(self, request: Request) -> int:
        named = re.fullmatch(r"CH(\d+)", request.arguments[0].upper()) if request.arguments else None
        if named:
            del request.arguments[0]
            return int(named[1])
        return request.numbers.get("n", self.box.selected)

    def _pick(self, request: Request) -> tuple[Channel]:
        number = self._number(request)
        if number == 3:
            raise ScpiFault(-224, "Illegal parameter value")  # set by a switch on the rear, measured by nobody
        return (one_channel(self.box, number),)

    def _instrument(self, request: Request) -> str | None:
        answer = self._select(request)
        return f"CH{answer}" if answer is not None else None

    def _output(self, request: Request) -> str | None:
        set_only(request)  # there is no query: the status word has it
        channel = one_channel(self.box, self._number(request))
        channel.switch(boolean(request.arguments), self.box.clock())
        return None

    def _track(self, request: Request) -> str | None:
        set_only(request)
        self._tracking = int(word(request.arguments, "0", "1", "2"))
        return None

    def _status(self, request: Request) -> str | None:
        """Bits 0, 1: channel 1, 2 in constant current; 2-3 tracking (1 independent); 4, 5: channel 1, 2 on."""
        query_only(request)
        bits = {0: 1, 1: 2, 2: 3}[self._tracking] << 2
        for n in (1, 2):
            channel = self.box.channels[n]
            bits |= (channel.mode == "CC") << (n - 1) | channel.output_on << (n + 3)
        return f"0x{bits:02x}"

    def _timer_set(self, request: Request) -> str | None:
        n = self._number(request)
        model = one_channel(self.box, n).model
        index = int(real(request.arguments[:1], 1, TIMER_STEPS)) - 1
        if n not in self._steps:
            raise ScpiFault(-224, "Illegal parameter value")
        if request.query:
            step = self._steps[n][index]
            return f"{step.voltage_v:.3f},{step.current_a:.3f},{step.dwell_s:.0f}"
        volts, amperes = real(request.arguments[1:2], 0.0, model.max_v), real(request.arguments[2:3], 0.0, model.max_a)
        self._steps[n][index] = Step(volts, amperes, float(int(real(request.arguments[3:4], 0.0, 10_000.0))))
        return None

    def _timer(self, request: Request) -> str | None:
        set_only(request)
        n = self._number(request)
        one_channel(self.box, n)
        if not boolean(request.arguments):
            self.box.sequences.pop(n, None)
            return None
        steps = tuple(step for step in self._steps.get(n, ()) if step.dwell_s > 0.0)
        if steps:
            self.box.sequences[n] = Sequence(steps, self.box.clock(), 1, Step(None, None, 0.0, off=True))
        return None

    def _save(self, request: Request) -> str | None:
        set_only(request)
        slot = int(real(request.arguments, 1, 5))
        now = self.box.clock()
        if now - self._saved_s < SAVE_GAP_S:
            self.box.crashed = True
            return None
        self._saved_s = now
        channels = (self.box.channels[n] for n in (1, 2))
        self._memory[slot] = tuple((c.voltage_set_v, c.current_limit_a) for c in channels)
        return None

    def _recall(self, request: Request) -> str | None:
        set_only(request)
        for n, (volts, amperes) in enumerate(self._memory.get(int(real(request.arguments, 1, 5)), ()), 1):
            self.box.channels[n].voltage_set_v, self.box.channels[n].current_limit_a = volts, amperes
        return None


_MAIN = ChannelModel(32.0, 3.2, 32.0, 3.2, math.inf, math.inf)

MODELS = (
    SupplyModel(
        name="siglent-spd3303x",
        identity="Siglent Technologies,SPD3303X,VIRTUAL00000005,1.01.01.02.05,V3.0",
        channels={1: _MAIN, 2: _MAIN, 3: ChannelModel(3.3, 3.2, 3.3, 3.2, math.inf, math.inf)},
        vendor=Spd3303x,
        known="programming guide; port unverified; the loss of early commands is assumed",
    ),
)
