"""B&K Precision 9130B: three channels by selection, over-voltage protection, one command that switches all outputs.

From the maker's manual as other drivers use it; `CHANnel:OUTPut` and the port are unverified. It has no over-current
trip. What ends an over-voltage trip is unverified too: here switching the output off.
"""

from __future__ import annotations

from hil.virtual.supply.commands import (
    Handlers,
    common,
    digit,
    fixed,
    nothing,
    select_handler,
    selected,
)
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.language import Handler, Interpreter, Request, ScpiFault, boolean, query_only, real
from hil.virtual.supply.physics import ChannelModel


class Bk9130b:
    """The 9130B's language."""

    def __init__(self, box: Instrument) -> None:
        self.box = box
        h = Handlers(box, selected(box), volts=fixed(3), amperes=fixed(3), watts=fixed(3))
        self._select = select_handler(box, "CH")
        rows = [
            *common(box),
            (":SYSTem:REMote", nothing),
            (":SYSTem:LOCal", nothing),
            (":INSTrument[:SELect]", self._instrument),
            (":INSTrument:NSELect", self._select),
            ("[:SOURce]:VOLTage[:LEVel][:IMMediate][:AMPLitude]", h.voltage()),
            ("[:SOURce]:CURRent[:LEVel][:IMMediate][:AMPLitude]", h.current()),
            ("[:SOURce]:CHANnel:OUTPut[:STATe]", self._channel_output),
            (":OUTPut[:STATe]", self._all_outputs),
            (":MEASure[:SCALar][:VOLTage][:DC]", h.measured("v")),
            (":MEASure[:SCALar]:CURRent[:DC]", h.measured("a")),
            (":MEASure[:SCALar]:POWer[:DC]", h.measured("w")),
            (":MEASure[:SCALar]:VOLTage:ALL[:DC]", self._measure_all("v")),
            (":MEASure[:SCALar]:CURRent:ALL[:DC]", self._measure_all("a")),
            ("[:SOURce]:VOLTage:PROTection[:LEVel]", h.ovp_level()),
            ("[:SOURce]:VOLTage:PROTection:STATe", h.flag("ovp.enabled")),
            (":APPly:VOLTage", self._apply("voltage_set_v", "max_v")),
            (":APPly:CURRent", self._apply("current_limit_a", "max_a")),
            (":STATus:QUEStionable:CONDition", self._questionable),
        ]
        self._interpreter = Interpreter(rows, box.push_error, box.tick)

    def execute(self, message: str) -> str | None:
        return self._interpreter.run(message)

    def tick(self, now_s: float) -> None:
        pass

    def reset(self) -> None:
        pass

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def _instrument(self, request: Request) -> str | None:
        answer = self._select(request)
        return f"CH{answer}" if answer is not None else None

    def _switch(self, number: int, state: bool) -> None:
        channel, now = self.box.channels[number], self.box.clock()
        channel.switch(state and not channel.tripped, now)
        if not state:
            channel.clear_all(now)

    def _channel_output(self, request: Request) -> str | None:
        channel = self.box.channels[self.box.selected]
        if request.query:
            return digit(channel.output_on)
        state = boolean(request.arguments)
        if state and channel.tripped:
            raise ScpiFault(-221, "Settings conflict")
        self._switch(self.box.selected, state)
        return None

    def _all_outputs(self, request: Request) -> str | None:
        if request.query:
            return digit(any(c.output_on for c in self.box.channels.values()))
        state = boolean(request.arguments)
        for number in self.box.channels:
            self._switch(number, state)
        return None

    def _measure_all(self, what: str) -> Handler:
        def handle(request: Request) -> str | None:
            query_only(request)
            found = self.box.channels.values()
            return ", ".join(f"{c.terminal_v if what == 'v' else c.current_a:.3f}" for c in found)

        return handle

    def _apply(self, attribute: str, top: str) -> Handler:
        def handle(request: Request) -> str | None:
            channels = tuple(self.box.channels.values())
            if request.query:
                return ", ".join(f"{getattr(c, attribute):.3f}" for c in channels)
            pairs = list(zip(channels, request.arguments, strict=False))
            values = [real([text], 0.0, getattr(c.model, top)) for c, text in pairs]
            for (channel, _), value in zip(pairs, values, strict=True):
                setattr(channel, attribute, round(value, 3))
            return None

        return handle

    def _questionable(self, request: Request) -> str | None:
        """Bit 0 over-voltage of the selected channel: unverified."""
        query_only(request)
        return digit(self.box.channels[self.box.selected].ovp.tripped)


_MAIN = ChannelModel(30.0, 3.0, 30.0, 3.0, 33.0, 3.0)

MODELS = (
    SupplyModel(
        name="bk-9130b",
        identity="BK PRECISION, 9130B, VIRTUAL009, 1.04-1.00",
        channels={1: _MAIN, 2: _MAIN, 3: ChannelModel(5.0, 3.0, 5.0, 3.0, 6.0, 3.0)},
        vendor=Bk9130b,
        known="other drivers' use of the manual; trips, status bits and port unverified",
    ),
)
