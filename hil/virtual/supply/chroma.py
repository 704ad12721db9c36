"""Chroma 62000P, and the 62000H-S solar-array simulator: protections with levels only, curves that wait for a trigger.

Set, output, protections and measurements as other drivers use the maker's manual, the four curve parameters, `TRIGger`
and their rules from the 62000H-S manual. Unverified: `FETCh:STATus?`, `OUTPut:MODE`, the port, and what ends a trip:
no command for it is known, so here it is switching the output off.
"""

from __future__ import annotations

from hil.virtual.supply.commands import Handlers, common, fixed, nothing, selected
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
from hil.virtual.supply.physics import ChannelModel
from hil.virtual.supply.solar import CurveError, exponential

_PARAMETERS = {"VOC": "max_v", "VMP": "max_v", "ISC": "max_a", "IMP": "max_a"}


class Chroma:
    """The 62000P's language; `solar` makes it the 62000H-S's."""

    def __init__(self, box: Instrument, *, solar: bool = False) -> None:
        self.box = box
        h = Handlers(box, selected(box), volts=fixed(3), amperes=fixed(3), watts=fixed(2))
        rows: list[Row] = [
            *common(box),
            ("[:SOURce]:VOLTage[:LEVel]", h.voltage()),
            ("[:SOURce]:CURRent[:LEVel]", h.current()),
            ("[:SOURce]:VOLTage:PROTect:HIGH", h.ovp_level()),
            ("[:SOURce]:CURRent:PROTect:HIGH", h.ocp_level()),
            # both spellings of the keyword are found in drivers
            ("[:SOURce]:VOLTage:PROTection:HIGH", h.ovp_level()),
            ("[:SOURce]:CURRent:PROTection:HIGH", h.ocp_level()),
            ("[:SOURce]:POWer:PROTect:HIGH", h.level("opp.level", "max_power_w", fixed(2), 2)),
            (":CONFigure:OUTPut", self._output),
            (":CONFigure:REMote", nothing),
            (":CONFigure:BEEPer", nothing),
            (":MEASure:VOLTage", h.measured("v")),
            (":MEASure:CURRent", h.measured("a")),
            (":MEASure:POWer", h.measured("w")),
            (":FETCh:VOLTage", h.measured("v")),
            (":FETCh:CURRent", h.measured("a")),
            (":FETCh:POWer", h.measured("w")),
            (":FETCh:STATus", self._status),
        ]
        if solar:
            rows += [(f"[:SOURce]:SAS:{name}", self._parameter(name)) for name in _PARAMETERS]
            rows += [(":TRIGger", self._trigger), (":OUTPut:MODE", self._mode)]
        self._interpreter = Interpreter(rows, box.push_error, box.tick)
        self.reset()

    def execute(self, message: str) -> str | None:
        return self._interpreter.run(message)

    def tick(self, now_s: float) -> None:
        pass

    def reset(self) -> None:
        self._sas = dict.fromkeys(_PARAMETERS, 0.0)
        self._function = "FIX"
        for channel in self.box.channels.values():
            channel.ovp.enabled = channel.ocp.enabled = channel.opp.enabled = True
            channel.curve = None

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def _output(self, request: Request) -> str | None:
        channel, now = self.box.channels[1], self.box.clock()
        if request.query:
            return "ON" if channel.output_on else "OFF"
        state = boolean(request.arguments)
        if state and channel.tripped:
            raise ScpiFault(-221, "Settings conflict")
        channel.switch(state, now)
        if not state:
            channel.clear_all(now)
        return None

    def _status(self, request: Request) -> str | None:
        """Alarm bits (0 OVP, 1 OCP, 2 OPP), output, regulation."""
        query_only(request)
        channel = self.box.channels[1]
        bits = channel.ovp.tripped | channel.ocp.tripped << 1 | channel.opp.tripped << 2
        return f"{bits},{'ON' if channel.output_on else 'OFF'},{channel.mode}"

    # --- solar array --------------------------------------------------------------------------------------------------
    def _parameter(self, name: str) -> Handler:
        def handle(request: Request) -> str | None:
            if request.query:
                return f"{self._sas[name]:.3f}"
            top: float = getattr(self.box.channels[1].model, _PARAMETERS[name])
            self._sas[name] = round(real(request.arguments, 0.0, top), 3)
            return None

        return handle

    def _trigger(self, request: Request) -> str | None:
        """Take the four parameters over; an impossible set leaves the curve that is."""
        set_only(request)
        try:
            curve = exponential(self._sas["VOC"], self._sas["ISC"], self._sas["VMP"], self._sas["IMP"])
        except CurveError:
            raise ScpiFault(-221, "Settings conflict") from None
        self.box.channels[1].curve = curve
        self._function = "SAS"
        return None

    def _mode(self, request: Request) -> str | None:
        """`SAS` waits for the trigger, unless a curve is played already; `FIX` ends the curve."""
        channel = self.box.channels[1]
        if request.query:
            return self._function
        self._function = word(request.arguments, "FIXed", "SAS")
        if self._function == "FIX":
            channel.curve = None
        return None


MODELS = (
    SupplyModel(
        name="chroma-62000p",
        identity="CHROMA,62012P-80-60,VIRTUAL014,03.30.1",
        channels={1: ChannelModel(80.0, 60.0, 80.0, 60.0, 88.0, 63.0, max_power_w=1200.0)},
        vendor=Chroma,
        port=2101,
        known="other drivers' use of the manual; FETC:STAT?, port and the end of a trip unverified",
    ),
    SupplyModel(
        name="chroma-62000h-s",
        identity="CHROMA,62020H-150S,VIRTUAL015,01.10",
        channels={1: ChannelModel(150.0, 40.0, 150.0, 40.0, 165.0, 42.0, max_power_w=2000.0)},
        vendor=lambda box: Chroma(box, solar=True),
        port=2101,
        known="SAS parameters, TRIG and their rules from the manual; the rest as chroma-62000p",
    ),
)
