"""Rigol DP800 and DP2000: channels by header suffix, `CHn` or selection; clears that may energise the output.

From the programming guides' command tables, in long and short forms; `:MEASure:ALL?` and the timer are unverified.
Replies carry the resolution of a plain DP832 (10 mV, 1 mA) or a DP2031 (1 mV, 0.1 mA). The DP800's
`VOLTage|CURRent:PROTection:CLEar` brings back an output that was on before the trip, unless it was switched off since;
the DP2000's `CURRent:PROTection:CLEar` enables the output whatever it was before: taken literally, the dangerous case.
"""

from __future__ import annotations

import re

from hil.virtual.supply.commands import (
    Handlers,
    common,
    constant,
    fixed,
    nothing,
    one_channel,
    onoff,
    select_handler,
)
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.language import (
    Handler,
    Interpreter,
    Request,
    Row,
    ScpiFault,
    boolean,
    query_only,
    real,
    set_only,
    word,
)
from hil.virtual.supply.physics import Channel, ChannelModel
from hil.virtual.supply.sequence import Sequence, Step

TIMER_GROUPS = 2048
_DWELL_MAX_S = 99_999.0


def _yesno(value: bool) -> str:
    return "YES" if value else "NO"


class Rigol:
    """The DP800 series' language; `clear_enables` makes it the DP2000's."""

    def __init__(self, box: Instrument, *, clear_enables: bool = False) -> None:
        self.box = box
        self._clear_enables = clear_enables
        model = box.model
        h = Handlers(
            box,
            self.pick,
            volts=fixed(model.decimals_v),
            amperes=fixed(model.decimals_a),
            watts=fixed(model.decimals_w),
        )
        self._timer = {number: _Timer() for number in box.channels}
        self._interpreter = Interpreter([*common(box), *self._rows(h)], box.push_error, box.tick)

    def execute(self, message: str) -> str | None:
        return self._interpreter.run(message)

    def tick(self, now_s: float) -> None:
        pass

    def reset(self) -> None:
        self._timer = {number: _Timer() for number in self.box.channels}

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def pick(self, request: Request) -> tuple[Channel]:
        """The header's suffix, a leading CHn argument (taken off), or the selected channel."""
        return (one_channel(self.box, self._number(request)),)

    def _number(self, request: Request) -> int:
        named = re.fullmatch(r"CH(\d+)", request.arguments[0].upper()) if request.arguments else None
        if named:
            del request.arguments[0]
            return int(named[1])
        return request.numbers.get("n", self.box.selected)

    def _rows(self, h: Handlers) -> list[Row]:
        source = "[:SOURce[<n>]]"
        rows: list[Row] = []
        for what, name in (("VOLTage", "ovp"), ("CURRent", "ocp")):
            level, clear = (h.ovp_level() if name == "ovp" else h.ocp_level()), self._source_clear(name)
            rows += [
                (f"{source}:{what}:PROTection[:LEVel]", level),
                (f"{source}:{what}:PROTection:STATe", h.flag(f"{name}.enabled", onoff)),
                (f"{source}:{what}:PROTection:TRIPped", h.told(f"{name}.tripped", _yesno)),
                (f"{source}:{what}:PROTection:CLEar", clear),
                (f":OUTPut:{name.upper()}[:STATe]", h.flag(f"{name}.enabled", onoff)),
                (f":OUTPut:{name.upper()}:VALue", level),
                (f":OUTPut:{name.upper()}:QUES", h.told(f"{name}.tripped", _yesno)),
                (f":OUTPut:{name.upper()}:ALAR", h.told(f"{name}.tripped", _yesno)),
                (f":OUTPut:{name.upper()}:CLEar", h.clear(name, "other")),
            ]
        return [
            *rows,
            (":SYSTem:REMote", nothing),
            (":SYSTem:LOCal", nothing),
            (":INSTrument:NSELect", select_handler(self.box, "CH")),
            (":INSTrument[:SELEct]", select_handler(self.box, "CH")),
            (":APPLy", self._apply),
            (f"{source}:VOLTage[:LEVel][:IMMediate][:AMPLitude]", h.voltage()),
            (f"{source}:CURRent[:LEVel][:IMMediate][:AMPLitude]", h.current()),
            (":OUTPut[:STATe]", self._output),
            (":OUTPut:MODE", self._regulation),
            (":OUTPut:CVCC", self._regulation),
            (":MEASure[:VOLTage][:DC]", h.measured("v")),
            (":MEASure:CURRent[:DC]", h.measured("a")),
            (":MEASure:POWEr[:DC]", h.measured("w")),
            (":MEASure:ALL[:DC]", h.measured("v", "a", "w")),
            (":TIMEr[:STATe]", self._timer_state),
            (":TIMEr:GROUPs", self._timer_groups),
            (":TIMEr:CYCLEs", self._timer_cycles),
            (":TIMEr:ENDState", self._timer_end),
            (":TIMEr:PARAmeter", self._timer_parameter),
            (":SYSTem:LANGuage:TYPE", constant("EN")),
        ]

    def _source_clear(self, kind: str) -> Handler:
        def handle(request: Request) -> str | None:
            set_only(request)
            (channel,), now = self.pick(request), self.box.clock()
            channel.clear_trip(now, ovp=kind == "ovp", ocp=kind == "ocp", other=True, restore=not self._clear_enables)
            if self._clear_enables and not channel.tripped:
                channel.switch(True, now)
            return None

        return handle

    def _output(self, request: Request) -> str | None:
        box, arguments = self.box, request.arguments
        if arguments and arguments[0].upper() == "ALL" and not request.query:
            state = boolean(arguments[1:])
            for each in box.channels.values():
                each.switch(state, box.clock())
            return None
        (channel,) = self.pick(request)
        if request.query:
            return onoff(channel.output_on)
        state = boolean(arguments)
        if state and channel.tripped:
            raise ScpiFault(-221, "Settings conflict")
        channel.switch(state, box.clock())
        return None

    def _regulation(self, request: Request) -> str | None:
        query_only(request)
        return self.pick(request)[0].mode

    def _apply(self, request: Request) -> str | None:
        number = self._number(request)
        channel, model, arguments = one_channel(self.box, number), self.box.model, request.arguments
        if request.query:
            volts = f"{channel.voltage_set_v:.{model.decimals_v}f}"
            amperes = f"{channel.current_limit_a:.{model.decimals_a}f}"
            if arguments:
                return volts if word(arguments, "VOLTage", "CURRent") == "VOLT" else amperes
            return f"CH{number}:{channel.model.rated_v:g}V/{channel.model.rated_a:g}A,{volts},{amperes}"
        if not arguments:
            raise ScpiFault(-109, "Missing parameter")
        volts_v = real(arguments[:1], 0.0, channel.model.max_v)
        amperes_a = real(arguments[1:], 0.0, channel.model.max_a) if len(arguments) > 1 else channel.current_limit_a
        channel.voltage_set_v = round(volts_v, model.decimals_v)
        channel.current_limit_a = round(amperes_a, model.decimals_a)
        return None

    # --- timer: a list of set points, unverified --------------------------------------------------------------------
    def _timer_state(self, request: Request) -> str | None:
        number, box = self._number(request), self.box
        one_channel(box, number)
        if request.query:
            return onoff(number in box.sequences)
        if not boolean(request.arguments):
            box.sequences.pop(number, None)
            return None
        timer = self._timer[number]
        steps = tuple(timer.steps.get(k, Step(0.0, 0.0, 1.0)) for k in range(timer.groups))
        last = Step(None, None, 0.0, off=True) if timer.ends_off else None
        box.sequences[number] = Sequence(steps, box.clock(), timer.cycles, last)
        return None

    def _timer_of(self, request: Request) -> _Timer:
        number = self._number(request)
        one_channel(self.box, number)
        return self._timer[number]

    def _timer_groups(self, request: Request) -> str | None:
        timer = self._timer_of(request)
        if request.query:
            return str(timer.groups)
        timer.groups = int(real(request.arguments, 1, TIMER_GROUPS))
        return None

    def _timer_cycles(self, request: Request) -> str | None:
        timer = self._timer_of(request)
        if request.query:
            return f"N,{timer.cycles}" if timer.cycles else "I"
        forever = word(request.arguments[:1], "N", "I") == "I"
        timer.cycles = 0 if forever else int(real(request.arguments[1:], 1, 99_999))
        return None

    def _timer_end(self, request: Request) -> str | None:
        timer = self._timer_of(request)
        if request.query:
            return "OFF" if timer.ends_off else "LAST"
        timer.ends_off = word(request.arguments, "OFF", "LAST") == "OFF"
        return None

    def _timer_parameter(self, request: Request) -> str | None:
        number, arguments = self._number(request), request.arguments
        model, timer = one_channel(self.box, number).model, self._timer[number]
        index = int(real(arguments[:1], 0, TIMER_GROUPS - 1))
        if request.query:
            step = timer.steps.get(index, Step(0.0, 0.0, 1.0))
            return f"{index},{step.voltage_v:g},{step.current_a:g},{step.dwell_s:g}"
        volts, amperes = real(arguments[1:2], 0.0, model.max_v), real(arguments[2:3], 0.0, model.max_a)
        timer.steps[index] = Step(volts, amperes, real(arguments[3:4], 1.0, _DWELL_MAX_S))
        return None


class _Timer:
    """What the timer of a channel was told."""

    def __init__(self) -> None:
        self.groups = 1
        self.cycles = 1
        self.ends_off = False
        self.steps: dict[int, Step] = {}


MODELS = (
    SupplyModel(
        name="rigol-dp800",
        identity="RIGOL TECHNOLOGIES,DP832,VIRTUAL000000001,00.01.16",
        channels={
            1: ChannelModel(30.0, 3.0, 32.0, 3.2, 33.0, 3.3),
            2: ChannelModel(30.0, 3.0, 32.0, 3.2, 33.0, 3.3),
            3: ChannelModel(5.0, 3.0, 5.3, 3.2, 5.5, 3.3),
        },
        vendor=Rigol,
        decimals_v=2,
        port=5555,
        known="programming guide; :MEAS:ALL?, timer and port unverified",
    ),
    SupplyModel(
        name="rigol-dp2000",
        identity="RIGOL TECHNOLOGIES,DP2031,VIRTUAL000000002,00.01.00",
        channels={
            1: ChannelModel(32.0, 3.0, 33.6, 3.15, 35.2, 3.3),
            2: ChannelModel(32.0, 3.0, 33.6, 3.15, 35.2, 3.3),
            3: ChannelModel(6.0, 5.0, 6.3, 5.25, 6.6, 5.5),
        },
        vendor=lambda box: Rigol(box, clear_enables=True),
        decimals_a=4,
        port=5555,
        known="as the DP800 where the guides agree; limits and port unverified",
    ),
)
