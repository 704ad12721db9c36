"""ITECH IT6500: one channel with over-voltage, over-current and over-power trips, each with a delay.

Power protection is from the IT6512C's guide; everything else is how such supplies usually are: unverified.
"""

from __future__ import annotations

from hil.virtual.supply.commands import Handlers, common, fixed, nothing, selected
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.language import Interpreter, Request, Row, query_only
from hil.virtual.supply.physics import ChannelModel


class It6500:
    """The IT6500's language. Over a serial line it wants `SYSTem:REMote` first; over TCP it does not care."""

    def __init__(self, box: Instrument) -> None:
        self.box = box
        h = Handlers(box, selected(box), volts=fixed(3), amperes=fixed(3), watts=fixed(2))
        rows: list[Row] = [
            *common(box),
            (":SYSTem:REMote", nothing),
            (":SYSTem:LOCal", nothing),
            (":SYSTem:RWLock", nothing),
            ("[:SOURce]:VOLTage[:LEVel][:IMMediate][:AMPLitude]", h.voltage()),
            ("[:SOURce]:CURRent[:LEVel][:IMMediate][:AMPLitude]", h.current()),
            (":OUTPut[:STATe]", h.output()),
            (":MEASure[:SCALar][:VOLTage][:DC]", h.measured("v")),
            (":MEASure[:SCALar]:CURRent[:DC]", h.measured("a")),
            (":MEASure[:SCALar]:POWer[:DC]", h.measured("w")),
            ("[:SOURce]:VOLTage:PROTection[:LEVel]", h.ovp_level()),
            ("[:SOURce]:CURRent:PROTection[:LEVel]", h.ocp_level()),
            ("[:SOURce]:POWer:PROTection[:LEVel]", h.level("opp.level", "max_power_w", fixed(2), 2)),
            (":PROTection:CLEar", h.clear("ovp", "ocp", "other")),
            (":OUTPut:PROTection:CLEar", h.clear("ovp", "ocp", "other")),
            (":STATus:QUEStionable:CONDition", self._questionable),
            (":STATus:OPERation:CONDition", self._operation),
        ]
        for what, name in (("VOLTage", "ovp"), ("CURRent", "ocp"), ("POWer", "opp")):
            rows += [
                (f"[:SOURce]:{what}:PROTection:STATe", h.flag(f"{name}.enabled")),
                (f"[:SOURce]:{what}:PROTection:DELay", h.span(f"{name}.delay_s", 0.0, 10.0, fixed(3))),
                (f"[:SOURce]:{what}:PROTection:TRIGgered", h.told(f"{name}.tripped")),
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

    def _questionable(self, request: Request) -> str | None:
        """Bit 0 over-voltage, 1 over-current, 2 over-power."""
        query_only(request)
        channel = self.box.channels[1]
        return str(channel.ovp.tripped | channel.ocp.tripped << 1 | channel.opp.tripped << 2)

    def _operation(self, request: Request) -> str | None:
        """Bit 3 constant voltage, bit 4 constant current, bit 5 output on."""
        query_only(request)
        channel = self.box.channels[1]
        if not channel.output_on:
            return "0"
        return str(32 | (16 if channel.mode == "CC" else 8))


MODELS = (
    SupplyModel(
        name="itech-it6500",
        identity="ITECH Ltd., IT6512C, VIRTUAL010, 1.01-1.00",
        channels={1: ChannelModel(80.0, 60.0, 80.0, 60.0, 88.0, 66.0, max_power_w=1200.0)},
        vendor=It6500,
        port=30000,
        known="POW:PROT from the programming guide; the rest unverified",
    ),
)
