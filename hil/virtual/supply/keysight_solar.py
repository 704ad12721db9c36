"""Keysight E4360 and MP4300 solar-array simulators: four parameters on one line are one curve, bad ones change nothing.

From the makers' guides, except the tables' points (`MEMory:TABLe:CURRent|VOLTage`) and the error of an impossible
curve: unverified. On the E4360 a curve takes effect 30 ms after its line; the MP4300 changes at once, and switching it
between fixed and array mode turns the output off and forgets the settings. Parameters sent one by one are four curves:
each that is possible is played, each that is not leaves the last one and an error.
"""

from __future__ import annotations

from hil.virtual.supply.commands import Handlers, common, exponent, signed_entry
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.keysight import Channels, Lists, handlers, mainframe_rows, source_rows
from hil.virtual.supply.language import (
    Handler,
    Interpreter,
    Request,
    Row,
    ScpiFault,
    number,
    query_only,
    real,
    set_only,
    word,
)
from hil.virtual.supply.physics import ChannelModel
from hil.virtual.supply.solar import Curve, CurveError, exponential, table

E4360_UPDATE_S = 0.030
TABLES = 30
TABLE_POINTS = 4096
_PARAMETERS = {"VOC": "max_v", "VMP": "max_v", "ISC": "max_a", "IMP": "max_a"}
_MODES = {"FIX": "FIXed", "SAS": "SAS", "TABL": "TABLe"}


class SolarArray:
    """The E4360's language; `mp4300` adds irradiance and bandwidth and changes what a mode switch does."""

    def __init__(self, box: Instrument, *, mp4300: bool = False) -> None:
        self.box = box
        self._mp4300 = mp4300
        self._channels = Channels(box, required=not mp4300)
        h = handlers(box, self._channels)
        self._lists = Lists(box, self._channels)
        rows = [*common(box, signed_entry), *self._mode_rows(), *source_rows(h), *self._table_rows()]
        rows += [*self._lists.rows(), *self._protection_rows(h)]
        rows += mainframe_rows(box, self._channels, "MP4362A" if mp4300 else "E4362A")
        if mp4300:
            rows += [("[:SOURce]:CURRent:SAS:SCALe", self._scale), ("[:SOURce]:CURRent:SAS:BWIDth", self._bandwidth)]
        self._interpreter = Interpreter(rows, box.push_error, box.tick)
        self.reset()

    def execute(self, message: str) -> str | None:
        answer = self._interpreter.run(message)
        self._commit()
        return answer

    def tick(self, now_s: float) -> None:
        for due in [due for due in self._due if due[0] <= now_s + 1e-9]:
            self._due.remove(due)
            _, n, curve = due
            if self._mode[n] != "FIX":
                self.box.channels[n].curve = curve

    def reset(self) -> None:
        self._lists.forget()
        numbers = tuple(self.box.model.channels)
        self._parameters = {n: dict.fromkeys(_PARAMETERS, 0.0) for n in numbers}
        self._mode = dict.fromkeys(numbers, "FIX")
        self._playing: dict[int, Curve] = {}  # the last curve that was possible, before scaling
        self._table_of = dict.fromkeys(numbers, "")
        self._scaled = dict.fromkeys(numbers, 100.0)
        self._band = dict.fromkeys(numbers, "DCDC_20UF")
        self._touched: set[int] = set()
        self._tables: dict[str, dict[str, list[float]]] = {}
        self._editing = ""
        self._due: list[tuple[float, int, Curve]] = []
        for channel in self.box.channels.values():
            channel.ovp.enabled = True
            channel.curve = None

    def trip(self, number_: int, kind: str) -> None:
        trip_channel(self.box.channels[number_], kind, self.box.clock())

    def _protection_rows(self, h: Handlers) -> list[Row]:
        return [
            ("[:SOURce]:VOLTage:PROTection:TRIPped", h.told("ovp.tripped")),
            (":STATus:QUEStionable:CONDition", self._questionable),
            (":STATus:OPERation:CONDition", self._operation),
            (":MEASure[:SCALar]:POWer[:DC]", h.measured("w")),
        ]

    def _mode_rows(self) -> list[Row]:
        return [
            ("[:SOURce]:CURRent:MODE", self._set_mode),
            ("[:SOURce]:CURRent:SAS:ISC", self._parameter("ISC")),
            ("[:SOURce]:CURRent:SAS:IMP", self._parameter("IMP")),
            ("[:SOURce]:VOLTage:SAS:VOC", self._parameter("VOC")),
            ("[:SOURce]:VOLTage:SAS:VMP", self._parameter("VMP")),
            ("[:SOURce]:CURRent:TABLe:NAME", self._use_table),
        ]

    # --- mode and parameters ------------------------------------------------------------------------------------------
    def _set_mode(self, request: Request) -> str | None:
        numbers = self._channels.numbers(request)
        if request.query:
            return ",".join(self._mode[n] for n in numbers)
        if request.arguments and request.arguments[0].upper().startswith("DTAB"):
            return None  # how finely a table is played: no effect here
        mode = word(request.arguments, *_MODES.values())
        for n in numbers:
            if mode == self._mode[n]:
                continue
            channel = self.box.channels[n]
            if self._mp4300 and "FIX" in (mode, self._mode[n]):
                channel.switch(False, self.box.clock())
                channel.defaults()
                channel.ovp.enabled = True
            self._mode[n] = mode
            channel.curve = None if mode == "FIX" else channel.curve
            if mode != "FIX":
                self._touched.add(n)
        return None

    def _parameter(self, name: str) -> Handler:
        def handle(request: Request) -> str | None:
            numbers = self._channels.numbers(request)
            if request.query:
                return ",".join(exponent(self._parameters[n][name]) for n in numbers)
            for n in numbers:
                top: float = getattr(self.box.channels[n].model, _PARAMETERS[name])
                self._parameters[n][name] = real(request.arguments, 0.0, top)
                self._touched.add(n)
            return None

        return handle

    def _scale(self, request: Request) -> str | None:
        numbers = self._channels.numbers(request)
        if request.query:
            return ",".join(f"{self._scaled[n]:g}" for n in numbers)
        self._scaled.update(dict.fromkeys(numbers, real(request.arguments, 1.0, 100.0)))
        self._touched.update(numbers)
        return None

    def _bandwidth(self, request: Request) -> str | None:
        numbers = self._channels.numbers(request)
        if request.query:
            return ",".join(f'"{self._band[n]}"' for n in numbers)
        choice = word(request.arguments, "DCDC_20UF", "SHUNTSW")
        self._band.update(dict.fromkeys(numbers, choice))
        return None

    def _commit(self) -> None:
        """At the end of a line: what it changed becomes one curve a channel, or one error and no change."""
        touched, self._touched = self._touched, set()
        for n in sorted(touched):
            if self._mode[n] == "FIX" or (self._mode[n] == "SAS" and not all(self._parameters[n].values())):
                continue
            try:
                self._playing[n] = self._wanted(n)
            except CurveError:
                self.box.push_error(-221, "Settings conflict")
                continue
            delay_s = 0.0 if self._mp4300 else E4360_UPDATE_S
            share = self._scaled[n] / 100.0
            self._due.append((self.box.clock() + delay_s, n, self._playing[n].scaled(share)))
        self.box.tick()

    def _wanted(self, n: int) -> Curve:
        if self._mode[n] == "TABL":
            points = self._tables.get(self._table_of[n], {})
            volts, amperes = points.get("VOLT", []), points.get("CURR", [])
            if len(volts) != len(amperes):
                raise CurveError("lists not of the same length")
            return table(zip(volts, amperes, strict=True))
        p = self._parameters[n]
        return exponential(p["VOC"], p["ISC"], p["VMP"], p["IMP"])

    # --- tables -------------------------------------------------------------------------------------------------------
    def _table_rows(self) -> list[Row]:
        return [
            (":MEMory:TABLe:SELect", self._edit_table),
            (":MEMory:TABLe:CURRent[:MAGNitude]", self._points("CURR")),
            (":MEMory:TABLe:VOLTage[:MAGNitude]", self._points("VOLT")),
            (":MEMory:TABLe:DELete", self._delete_table),
            (":MEMory:TABLe:CATalog", self._catalogue),
        ]

    def _edit_table(self, request: Request) -> str | None:
        if request.query:
            return self._editing
        name = _name(request)
        if name not in self._tables and len(self._tables) >= TABLES:
            raise ScpiFault(-225, "Out of memory")
        self._tables.setdefault(name, {})
        self._editing = name
        return None

    def _points(self, what: str) -> Handler:
        def handle(request: Request) -> str | None:
            if self._editing not in self._tables:
                raise ScpiFault(-221, "Settings conflict")
            held = self._tables[self._editing].setdefault(what, [])
            if request.query:
                return ",".join(map(exponent, held))
            values = [number(text) for text in request.arguments]
            if len(values) > TABLE_POINTS:
                raise ScpiFault(-223, "Too much data")
            held[:] = values
            return None

        return handle

    def _delete_table(self, request: Request) -> str | None:
        set_only(request)
        name = _name(request)
        if name in self._table_of.values():
            raise ScpiFault(-221, "Settings conflict")
        self._tables.pop(name, None)
        return None

    def _catalogue(self, request: Request) -> str | None:
        query_only(request)
        return ",".join(f'"{name}"' for name in sorted(self._tables)) or '""'

    def _use_table(self, request: Request) -> str | None:
        numbers = self._channels.numbers(request)
        if request.query:
            return ",".join(f'"{self._table_of[n]}"' for n in numbers)
        name = _name(request)
        if name not in self._tables:
            raise ScpiFault(-224, "Illegal parameter value")
        self._table_of.update(dict.fromkeys(numbers, name))
        self._touched.update(numbers)
        return None

    def _questionable(self, request: Request) -> str | None:
        query_only(request)
        found = self._channels.pick(request)
        return ",".join(str(c.ovp.tripped | c.ocp.tripped << 1 | bool(c.shutdown) << 11) for c in found)

    def _operation(self, request: Request) -> str | None:
        query_only(request)
        found = self._channels.pick(request)
        return ",".join("4" if not c.output_on else "2" if c.mode == "CC" else "1" for c in found)


def _name(request: Request) -> str:
    name = request.arguments[0].strip("\"'").upper() if request.arguments else ""
    if not name:
        raise ScpiFault(-109, "Missing parameter")
    return name


MODELS = (
    SupplyModel(
        name="keysight-e4360",
        identity="Keysight Technologies,E4360A,VIRTUAL00000016,A.01.09",
        channels=dict.fromkeys((1, 2), ChannelModel(120.0, 5.0, 130.0, 5.0, 143.0, 5.0, max_power_w=600.0)),
        vendor=SolarArray,
        keeps_enable=True,
        trips_in_cc=True,
        known="user's guide; points of tables and the error of an impossible curve unverified",
    ),
    SupplyModel(
        name="keysight-mp4300",
        identity="Keysight Technologies,MP4302A,VIRTUAL00000017,1.0.4",
        channels=dict.fromkeys((1, 2), ChannelModel(160.0, 10.0, 160.0, 10.0, 176.0, 10.0, max_power_w=1000.0)),
        vendor=lambda box: SolarArray(box, mp4300=True),
        keeps_enable=True,
        trips_in_cc=True,
        known="programming guide; limits and the error of an impossible curve unverified",
    ),
)
