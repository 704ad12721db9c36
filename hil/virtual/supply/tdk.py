"""TDK-Lambda Genesys: one channel, foldback as over-current protection, and answers that take their time.

The times are from the maker: 8 to 12 ms for most commands, 60 to 74 ms for `SYSTem:ERRor?`. The commands are those the
family shares with others: unverified.
"""

from __future__ import annotations

from hil.virtual.supply.commands import Handlers, common, fixed, onoff, selected
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.language import Interpreter, Request, Row, query_only
from hil.virtual.supply.physics import ChannelModel

ANSWER_S = 0.010
ERROR_S = 0.067


class Genesys:
    """The Genesys SCPI language."""

    def __init__(self, box: Instrument) -> None:
        self.box = box
        h = Handlers(box, selected(box), volts=fixed(3), amperes=fixed(3), watts=fixed(2))
        rows: list[Row] = [
            *common(box),
            ("[:SOURce]:VOLTage[:LEVel][:IMMediate][:AMPLitude]", h.voltage()),
            ("[:SOURce]:CURRent[:LEVel][:IMMediate][:AMPLitude]", h.current()),
            (":OUTPut[:STATe]", h.output(onoff)),
            (":OUTPut:PROTection:CLEar", h.clear("ovp", "ocp", "other")),
            (":MEASure[:SCALar]:VOLTage[:DC]", h.measured("v")),
            (":MEASure[:SCALar]:CURRent[:DC]", h.measured("a")),
            (":MEASure[:SCALar]:POWer[:DC]", h.measured("w")),
            ("[:SOURce]:VOLTage:PROTection[:LEVel]", h.ovp_level()),
            ("[:SOURce]:VOLTage:PROTection:TRIPped", h.told("ovp.tripped")),
            ("[:SOURce]:CURRent:PROTection:STATe", h.flag("ocp.enabled", onoff)),
            ("[:SOURce]:CURRent:PROTection:DELay", h.span("ocp.delay_s", 0.0, 25.5, fixed(1))),
            ("[:SOURce]:CURRent:PROTection:TRIPped", h.told("ocp.tripped")),
            (":STATus:OPERation:CONDition", self._operation),
            (":STATus:QUEStionable:CONDition", self._questionable),
            ("[:SOURce]:MODE", self._mode),
        ]
        self._interpreter = Interpreter(rows, box.push_error, box.tick)
        self.reset()

    def execute(self, message: str) -> str | None:
        asks_errors = "ERR" in message.upper()
        self.box.reply_delay_s = ERROR_S if asks_errors else ANSWER_S
        return self._interpreter.run(message)

    def tick(self, now_s: float) -> None:
        pass

    def reset(self) -> None:
        for channel in self.box.channels.values():
            channel.ovp.enabled = True

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def _mode(self, request: Request) -> str | None:
        query_only(request)
        channel = self.box.channels[1]
        return channel.mode if channel.output_on else "OFF"

    def _operation(self, request: Request) -> str | None:
        """Bit 0 constant voltage, bit 1 constant current."""
        query_only(request)
        channel = self.box.channels[1]
        return "0" if not channel.output_on else "2" if channel.mode == "CC" else "1"

    def _questionable(self, request: Request) -> str | None:
        """Bit 3 foldback (over-current), bit 4 over-voltage."""
        query_only(request)
        channel = self.box.channels[1]
        return str(channel.ocp.tripped << 3 | channel.ovp.tripped << 4)


MODELS = (
    SupplyModel(
        name="tdk-genesys",
        identity="TDK-LAMBDA,GENH30-25,VIRTUAL013,REV:1U:4.3",
        channels={1: ChannelModel(30.0, 25.0, 31.5, 26.25, 36.0, 26.25)},
        vendor=Genesys,
        trips_in_cc=True,
        port=8003,
        known="answer times from the maker; commands unverified",
    ),
)
