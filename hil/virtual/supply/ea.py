"""EA Elektro-Automatik PS/PSI, and its photovoltaic function: a lock first, values with units, writes that take time.

From the maker's programming guide: the lock, the minimum gap, that writes are not executed on receipt, and the idle
time-out that drops the connection and not the output. Unverified: the form of `MEASure:ARRay?`, the status bits, that
asking for errors acknowledges alarms, the commands that load a table and set the irradiance.

Here a write takes effect 5 ms after it arrived. Alarms (OVP, OCP, OPP) switch the output off and stay until
`SYSTem:ERRor?` or `:ALL?` was asked or `SYSTem:ALARm:ACKnowledge` sent; the output stays off until it is switched on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hil.virtual.supply.commands import Handlers, common, onoff, queue_entry, selected
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
    split,
    word,
)
from hil.virtual.supply.physics import ChannelModel
from hil.virtual.supply.solar import CurveError, table

IDLE_TIMEOUT_S = 5.0
EXECUTION_S = 0.005
PV_POINTS = 4096
PV_SPAN = 1.25  # the table reaches to 125 % of the rated voltage
PV_LOADING_S = 2.0


class ElektroAutomatik:
    """The PS/PSI language; `photovoltaic` adds the array function of the PSI and PSB."""

    def __init__(self, box: Instrument, *, photovoltaic: bool = False) -> None:
        self.box = box
        h = Handlers(
            box,
            selected(box),
            volts=lambda v: f"{v:.2f} V",
            amperes=lambda a: f"{a:.2f} A",
            watts=lambda w: f"{w:.1f} W",
        )
        rows = [*self._source(h), *self._system(), *common(box)]
        if photovoltaic:
            rows += self._array_rows()
        self._interpreter = Interpreter(rows, box.push_error, box.tick)
        self._pending: list[tuple[float, str]] = []
        self._executing = False
        self._locked = False
        self._array_due_s = math.inf
        box.idle_timeout_s = IDLE_TIMEOUT_S
        self.reset()

    def execute(self, message: str) -> str | None:
        """Queries at once; settings `EXECUTION_S` later, in order."""
        self.box.tick()
        if any(unit.partition(" ")[0].endswith("?") for unit in split(message, ";")):
            return self._interpreter.run(message)
        self._pending.append((self.box.clock() + EXECUTION_S, message))
        return None

    def tick(self, now_s: float) -> None:
        if self._executing:  # each command lets time pass around it; the next one waits its turn
            return
        self._executing = True
        try:
            while self._pending and self._pending[0][0] <= now_s + 1e-9:
                self._interpreter.run(self._pending.pop(0)[1])
        finally:
            self._executing = False
        self._alarms()
        if self._array_due_s <= now_s:
            self._array_due_s = math.inf
            self._load_array()

    def reset(self) -> None:
        self._alarmed: set[str] = set()
        self._counts = {"ovp": 0, "ocp": 0, "opp": 0}
        self._function = "NONE"
        self._level = 0
        self._table = [0.0] * PV_POINTS
        self._irradiance = 100.0
        self._array_due_s = math.inf
        for channel in self.box.channels.values():
            channel.ovp.enabled = channel.ocp.enabled = channel.opp.enabled = True
            channel.opp.level = channel.model.max_power_w * 1.1
            channel.curve = None

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def _alarms(self) -> None:
        channel = self.box.channels[1]
        for name in ("ovp", "ocp", "opp"):
            if getattr(channel, name).tripped and name not in self._alarmed:
                self._alarmed.add(name)
                self._counts[name] += 1

    def _guarded(self, handler: Handler) -> Handler:
        """Settings are refused until remote control was taken."""

        def handle(request: Request) -> str | None:
            if not request.query and not self._locked:
                raise ScpiFault(-221, "Settings conflict")
            return handler(request)

        return handle

    def _source(self, h: Handlers) -> list[Row]:
        plain: list[Row] = [
            ("[:SOURce]:VOLTage[:LEVel][:IMMediate][:AMPLitude]", h.voltage()),
            ("[:SOURce]:CURRent[:LEVel][:IMMediate][:AMPLitude]", h.current()),
            ("[:SOURce]:POWer[:LEVel][:IMMediate][:AMPLitude]", h.level("power_limit_w", "max_power_w", h.watts, 1)),
            ("[:SOURce]:VOLTage:PROTection[:LEVel]", h.ovp_level()),
            ("[:SOURce]:CURRent:PROTection[:LEVel]", h.ocp_level()),
            ("[:SOURce]:POWer:PROTection[:LEVel]", self._power_protection),
            (":OUTPut[:STATe]", h.output(onoff)),
            (":*RST", self._reset),
        ]
        rows = [(notation, self._guarded(handler)) for notation, handler in plain]
        return [
            *rows,
            (":MEASure[:SCALar]:VOLTage[:DC]", h.measured("v")),
            (":MEASure[:SCALar]:CURRent[:DC]", h.measured("a")),
            (":MEASure[:SCALar]:POWer[:DC]", h.measured("w")),
            (":MEASure[:SCALar]:ARRay", self._array(h)),
        ]

    def _system(self) -> list[Row]:
        return [
            (":SYSTem:LOCK[:STATe]", self._lock),
            (":SYSTem:LOCK:OWNer", self._owner),
            (":SYSTem:ERRor[:NEXT]", self._next_error),
            (":SYSTem:ERRor:ALL", self._all_errors),
            (":SYSTem:COMMunicate:LAN:TIMeout", self._timeout),
            (":SYSTem:ALARm:ACKnowledge", self._acknowledged),
            (":SYSTem:ALARm:COUNt:OVOLtage", self._count("ovp")),
            (":SYSTem:ALARm:COUNt:OCURrent", self._count("ocp")),
            (":SYSTem:ALARm:COUNt:OPOWer", self._count("opp")),
            (":STATus:QUEStionable[:CONDition]", self._questionable),
            (":STATus:OPERation[:CONDition]", self._operation),
        ]

    def _reset(self, request: Request) -> str | None:
        set_only(request)
        self.box.reset()
        return None

    def _power_protection(self, request: Request) -> str | None:
        channel = self.box.channels[1]
        top = channel.model.max_power_w * 1.1
        if request.query:
            return f"{channel.opp.level:.1f} W"
        channel.opp.level = round(real(request.arguments, 0.0, top), 1)
        return None

    def _array(self, h: Handlers) -> Handler:
        one = h.measured("v", "a", "w")
        return lambda request: (one(request) or "").replace(",", ", ")

    def _lock(self, request: Request) -> str | None:
        if request.query:
            return onoff(self._locked)
        self._locked = boolean(request.arguments)
        return None

    def _owner(self, request: Request) -> str | None:
        query_only(request)
        return "REMOTE" if self._locked else "NONE"

    def _timeout(self, request: Request) -> str | None:
        if request.query:
            return f"{self.box.idle_timeout_s:g}"
        self.box.idle_timeout_s = real(request.arguments, 0.0, 65_535.0)
        return None

    def _acknowledge(self) -> None:
        self._alarmed.clear()
        self.box.channels[1].clear_all(self.box.clock())

    def _acknowledged(self, request: Request) -> str | None:
        set_only(request)
        self._acknowledge()
        return None

    def _next_error(self, request: Request) -> str | None:
        query_only(request)
        self._acknowledge()
        return queue_entry(*self.box.pop_error())

    def _all_errors(self, request: Request) -> str | None:
        query_only(request)
        self._acknowledge()
        entries = [queue_entry(*self.box.pop_error())]
        while self.box.errors:
            entries.append(queue_entry(*self.box.pop_error()))
        return ", ".join(entries)

    def _count(self, name: str) -> Handler:
        def handle(request: Request) -> str | None:
            query_only(request)
            value, self._counts[name] = self._counts[name], 0
            return str(value)

        return handle

    def _questionable(self, request: Request) -> str | None:
        """Bit 0 OVP, 1 OCP, 2 OPP, 9 remote, 10 output on."""
        query_only(request)
        channel = self.box.channels[1]
        bits = channel.ovp.tripped | channel.ocp.tripped << 1 | channel.opp.tripped << 2
        return str(bits | self._locked << 9 | channel.output_on << 10)

    def _operation(self, request: Request) -> str | None:
        """Bit 8 constant voltage, 10 constant current."""
        query_only(request)
        channel = self.box.channels[1]
        return "0" if not channel.output_on else str(1024 if channel.mode == "CC" else 256)

    # --- photovoltaic: the table is the mode --------------------------------------------------------------------------
    def _array_rows(self) -> list[Row]:
        rows: Sequence[Row] = (
            ("[:FUNCtion]:GENerator:SELect", self._select),
            ("[:FUNCtion]:GENerator:XY:LEVel", self._table_level),
            ("[:FUNCtion]:GENerator:XY:DATA", self._table_data),
            ("[:FUNCtion]:GENerator:XY:SUBMit", self._submit),
            ("[:FUNCtion:GENerator[:PV]]:IRRadiation", self._irradiate),
        )
        return [(notation, self._guarded(handler)) for notation, handler in rows]

    def _select(self, request: Request) -> str | None:
        if request.query:
            return self._function
        channel = self.box.channels[1]
        choice = word(request.arguments, "PV", "NONE")
        if choice == "PV" and channel.output_on:
            raise ScpiFault(-221, "Settings conflict")
        self._function = choice
        self._table = [0.0] * PV_POINTS  # the table is lost on leaving, and empty on entering
        channel.curve, self._array_due_s = None, math.inf
        if choice == "NONE":
            channel.switch(False, self.box.clock())
        return None

    def _in_function(self) -> None:
        if self._function != "PV":
            raise ScpiFault(-221, "Settings conflict")

    def _table_level(self, request: Request) -> str | None:
        """Which point is meant, and with a second parameter its amperes at once."""
        self._in_function()
        if request.query:
            return str(self._level)
        self._level = int(real(request.arguments[:1], 0, PV_POINTS - 1))
        if len(request.arguments) > 1:
            self._table[self._level] = real(request.arguments[1:], 0.0, self.box.channels[1].model.max_a)
        return None

    def _table_data(self, request: Request) -> str | None:
        """Amperes of the point at the level that was set; several go to the points after it."""
        self._in_function()
        top = self.box.channels[1].model.max_a
        if request.query:
            return f"{self._table[self._level]:.2f} A"
        if self._level + len(request.arguments) > PV_POINTS:
            raise ScpiFault(-223, "Too much data")
        values = [real([text], 0.0, top) for text in request.arguments]
        self._table[self._level : self._level + len(values)] = values
        return None

    def _submit(self, request: Request) -> str | None:
        set_only(request)
        self._in_function()
        self._array_due_s = self.box.clock() + PV_LOADING_S
        return None

    def _irradiate(self, request: Request) -> str | None:
        self._in_function()
        if request.query:
            return f"{self._irradiance:g}"
        self._irradiance = real(request.arguments, 0.0, 100.0)
        if self.box.channels[1].curve is not None:
            self._load_array()
        return None

    def _load_array(self) -> None:
        channel = self.box.channels[1]
        span = channel.model.rated_v * PV_SPAN / (PV_POINTS - 1)
        last = max((k for k in range(PV_POINTS) if self._table[k] > 0.0), default=0)
        keep = sorted({*range(0, last, max(1, last // 512)), last, min(last + 1, PV_POINTS - 1)})
        try:
            curve = table((k * span, self._table[k] if k <= last else 0.0) for k in keep)
            channel.curve = curve.scaled(self._irradiance / 100.0)
        except CurveError:
            self.box.push_error(-221, "Settings conflict")


_PSI = ChannelModel(80.0, 60.0, 81.6, 61.2, 88.0, 66.0, max_power_w=1500.0)

MODELS = (
    SupplyModel(
        name="ea-psi",
        identity="EA Elektro-Automatik GmbH & Co. KG, PSI 9080-60 DT, VIRTUAL011, V2.25 20.08.2020 V2.29",
        channels={1: _PSI},
        vendor=ElektroAutomatik,
        decimals_v=2,
        decimals_a=2,
        known="programming guide; MEAS:ARR?, status bits and acknowledgement unverified",
    ),
    SupplyModel(
        name="ea-pv",
        identity="EA Elektro-Automatik GmbH & Co. KG, PSI 9080-60 DT, VIRTUAL012, V2.25 20.08.2020 V2.29",
        channels={1: _PSI},
        vendor=lambda box: ElektroAutomatik(box, photovoltaic=True),
        decimals_v=2,
        decimals_a=2,
        known="as ea-psi; loading of the table and irradiance unverified",
    ),
)
