"""Rohde & Schwarz HMP and NGE100: a selected channel, a master switch, electronic fuses that can be linked.

From the makers' manuals; the NGE's energy counter, power reading and CV/CC bits are unverified. An output is on only
when its own selection and the master switch are. A fuse trips when the channel is in current limit for its delay; a
linked channel goes with it. The NGE's manual asks for settings and queries in separate messages: here a message with
both is answered with the values from before it, which is an assumption about what goes wrong.
"""

from __future__ import annotations

from hil.virtual.supply.commands import (
    Handlers,
    common,
    digit,
    fixed,
    nothing,
    one_channel,
    select_handler,
    selected,
)
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.language import (
    Interpreter,
    Request,
    Row,
    ScpiFault,
    boolean,
    number,
    query_only,
    real,
    set_only,
    split,
    word,
)
from hil.virtual.supply.physics import Channel, ChannelModel
from hil.virtual.supply.sequence import Sequence, Step

LINKED = "linked fuse"
ARB_STEPS = 128
_DWELL_MIN_S, _DWELL_MAX_S = 0.06, 10.0


class RohdeSchwarz:
    """The HMP's language; `nge` makes it the NGE100's."""

    def __init__(self, box: Instrument, *, nge: bool = False) -> None:
        self.box = box
        self._nge = nge
        h = Handlers(box, selected(box), volts=fixed(3), amperes=fixed(3 if nge else 4), watts=fixed(3))
        rows = [*common(box), *self._source(h), *self._protection(h), *self._arb_rows()]
        rows += self._nge_rows(h) if nge else [("[:SOURce]:VOLTage:PROTection:MODE", self._ovp_mode)]
        self._interpreter = Interpreter(rows, box.push_error, box.tick)
        self._select = select_handler(box, "OUTPUT", "OUTP", "OUT")
        self.reset()

    def execute(self, message: str) -> str | None:
        units = split(message, ";")
        asks = [unit.partition(" ")[0].endswith("?") for unit in units if unit]
        if self._nge and any(asks) and not all(asks):
            queries = ";".join(u for u in units if u.partition(" ")[0].endswith("?"))
            answer = self._interpreter.run(queries)
            self._interpreter.run(";".join(u for u in units if u and not u.partition(" ")[0].endswith("?")))
            return answer
        return self._interpreter.run(message)

    def tick(self, now_s: float) -> None:
        for number_, channel in self.box.channels.items():
            if not channel.ocp.tripped:
                continue
            for other in self._links[number_]:
                if self.box.channels[other].output_on:
                    self.box.channels[other].trip(LINKED, now_s)

    def reset(self) -> None:
        self._links: dict[int, set[int]] = {n: set() for n in self.box.channels}
        self._arb: tuple[Step, ...] = ()
        self._arb_repeat = 1
        self._loaded: dict[int, tuple[Step, ...]] = {}
        self._measured_mode = True
        now = self.box.clock()
        for channel in self.box.channels.values():
            channel.set_master(False, now)
            channel.ovp.enabled = not self._nge  # the HMP's has a level only

    def trip(self, number_: int, kind: str) -> None:
        trip_channel(self.box.channels[number_], kind, self.box.clock())

    @property
    def _channel(self) -> Channel:
        return self.box.channels[self.box.selected]

    def _source(self, h: Handlers) -> list[Row]:
        return [
            (":SYSTem:REMote", nothing),
            (":SYSTem:LOCal", nothing),
            (":SYSTem:RWLock", nothing),
            (":SYSTem:MIX", nothing),
            (":INSTrument[:SELect]", self._instrument),
            (":INSTrument:NSELect", self._number),
            ("[:SOURce]:VOLTage[:LEVel][:IMMediate][:AMPLitude]", h.voltage()),
            ("[:SOURce]:CURRent[:LEVel][:IMMediate][:AMPLitude]", h.current()),
            (":APPLy", self._apply),
            (":OUTPut[:STATe]", self._output),
            (":OUTPut:SELect", self._select_output),
            (":OUTPut:GENeral", self._general),
            (":MEASure[:SCALar][:VOLTage][:DC]", h.measured("v")),
            (":MEASure[:SCALar]:CURRent[:DC]", h.measured("a")),
        ]

    def _protection(self, h: Handlers) -> list[Row]:
        # The NGE100 counts its fuse delay in milliseconds; other models of the house use seconds.
        return [
            ("[:SOURce]:VOLTage:PROTection:LEVel", h.ovp_level()),
            ("[:SOURce]:VOLTage:PROTection:TRIPped", h.told("ovp.tripped")),
            ("[:SOURce]:VOLTage:PROTection:CLEar", h.clear("ovp")),
            (":FUSE[:STATe]", h.flag("ocp.enabled")),
            (":FUSE:TRIPped", self._fuse_tripped),
            *([(":FUSE:TRIPped:CLEar", h.clear("ocp", "other"))] if self._nge else []),
            (":FUSE:DELay", h.span("ocp.delay_s", 0.0, 250.0, fixed(0), scale=1000.0)),
            (":FUSE:LINK", self._link),
            (":FUSE:UNLink", self._unlink),
            (":STATus:QUEStionable:INSTrument:ISUMmary<n>:CONDition", self._summary),
        ]

    def _nge_rows(self, h: Handlers) -> list[Row]:
        return [
            ("[:SOURce]:VOLTage:PROTection[:STATe]", h.flag("ovp.enabled")),
            ("[:SOURce]:VOLTage:PROTection:DELay", h.span("ovp.delay_s", 0.0, 10.0, fixed(3))),
            (":MEASure[:SCALar]:POWer", h.measured("w")),
            (":MEASure[:SCALar]:ENERgy", self._energy),
        ]

    def _instrument(self, request: Request) -> str | None:
        answer = self._select(request)
        return f"OUTP{answer}" if answer is not None else None

    def _number(self, request: Request) -> str | None:
        return self._select(request)

    def _apply(self, request: Request) -> str | None:
        channel, arguments = self._channel, request.arguments
        if request.query:
            return f"{channel.voltage_set_v:.3f}, {channel.current_limit_a:.{3 if self._nge else 4}f}"
        volts = real(arguments[:1], 0.0, channel.model.max_v)
        amperes = real(arguments[1:2], 0.0, channel.model.max_a) if len(arguments) > 1 else channel.current_limit_a
        if len(arguments) > 2:
            name = arguments[2].upper().removeprefix("OUTP").removeprefix("OUT")
            channel = one_channel(self.box, int(name) if name.isdigit() else 0)
        channel.voltage_set_v, channel.current_limit_a = round(volts, 3), round(amperes, 4)
        return None

    def _output(self, request: Request) -> str | None:
        """The selected channel. On the HMP it takes the master switch with it when it is switched on."""
        channel, now = self._channel, self.box.clock()
        if request.query:
            return digit(channel.output_on)
        state = boolean(request.arguments)
        if state and channel.tripped:
            raise ScpiFault(-221, "Settings conflict")
        channel.switch(state, now)
        if state and not self._nge:
            self._master(True)
        return None

    def _select_output(self, request: Request) -> str | None:
        """The selected channel's own switch; switching it off mends a blown fuse on the HMP, which has no clear for it.

        That is unverified. A tripped channel does not come on.
        """
        channel, now = self._channel, self.box.clock()
        if request.query:
            return digit(channel.enabled)
        state = boolean(request.arguments)
        if state and channel.tripped:
            raise ScpiFault(-221, "Settings conflict")
        channel.switch(state, now)
        if not state and not self._nge:
            channel.clear_trip(now, ovp=False, ocp=True, other=True)
        return None

    def _general(self, request: Request) -> str | None:
        if request.query:
            return digit(self._channel.master)
        self._master(boolean(request.arguments))
        return None

    def _master(self, on: bool) -> None:
        for channel in self.box.channels.values():
            channel.set_master(on, self.box.clock())

    def _ovp_mode(self, request: Request) -> str | None:
        """`MEASured` compares the terminals, `PROTected` refuses the set point too: unverified, kept only."""
        if request.query:
            return "MEAS" if self._measured_mode else "PROT"
        self._measured_mode = word(request.arguments, "MEASured", "PROTected") == "MEAS"
        return None

    def _fuse_tripped(self, request: Request) -> str | None:
        query_only(request)
        return digit(self._channel.ocp.tripped or LINKED in self._channel.shutdown)

    def _link(self, request: Request) -> str | None:
        links = self._links[self.box.selected]
        if request.query:
            return ",".join(map(str, sorted(links)))
        other = int(real(request.arguments, 1, 99))
        one_channel(self.box, other)
        links.add(other)
        return None

    def _unlink(self, request: Request) -> str | None:
        set_only(request)
        self._links[self.box.selected].discard(int(real(request.arguments, 1, 99)))
        return None

    def _summary(self, request: Request) -> str | None:
        """Bit 0 constant current, bit 1 constant voltage, bit 9 OVP tripped, bit 10 fuse tripped."""
        query_only(request)
        channel = one_channel(self.box, request.numbers["n"])
        regulating = 0 if not channel.output_on else 1 if channel.mode == "CC" else 2
        fuse = channel.ocp.tripped or LINKED in channel.shutdown
        return str(regulating | (512 if channel.ovp.tripped else 0) | (1024 if fuse else 0))

    def _energy(self, request: Request) -> str | None:
        query_only(request)
        return f"{self._channel.energy_j / 3600.0:.6f}"

    # --- arbitrary waveform -------------------------------------------------------------------------------------------
    def _arb_rows(self) -> list[Row]:
        return [
            (":ARBitrary:DATA", self._arb_data),
            (":ARBitrary:REPetitions", self._repetitions),
            (":ARBitrary:TRANsfer", self._transfer),
            (":ARBitrary:STARt", self._start_arb),
            (":ARBitrary:STOP", self._stop_arb),
            (":ARBitrary:CLEar", self._clear_arb),
        ]

    def _arb_data(self, request: Request) -> str | None:
        set_only(request)
        values = [number(text) for text in request.arguments]
        if not values or len(values) % 3:
            raise ScpiFault(-109, "Missing parameter")
        if len(values) // 3 > ARB_STEPS:
            raise ScpiFault(-223, "Too much data")
        model = self._channel.model
        points = list(zip(values[::3], values[1::3], values[2::3], strict=True))
        for volts, amperes, dwell in points:
            fits = 0.0 <= volts <= model.max_v and 0.0 <= amperes <= model.max_a
            if not (fits and _DWELL_MIN_S <= dwell <= _DWELL_MAX_S):
                raise ScpiFault(-222, "Data out of range")
        self._arb = tuple(Step(volts, amperes, dwell) for volts, amperes, dwell in points)
        return None

    def _repetitions(self, request: Request) -> str | None:
        if request.query:
            return str(self._arb_repeat)
        self._arb_repeat = int(real(request.arguments, 0, 255))
        return None

    def _arb_channel(self, request: Request) -> int:
        set_only(request)
        found = int(real(request.arguments, 1, 99)) if request.arguments else self.box.selected
        one_channel(self.box, found)
        return found

    def _transfer(self, request: Request) -> str | None:
        if not self._arb:
            raise ScpiFault(-221, "Settings conflict")
        self._loaded[self._arb_channel(request)] = self._arb
        return None

    def _start_arb(self, request: Request) -> str | None:
        channel = self._arb_channel(request)
        if channel not in self._loaded:
            raise ScpiFault(-221, "Settings conflict")
        self.box.sequences[channel] = Sequence(self._loaded[channel], self.box.clock(), self._arb_repeat)
        return None

    def _stop_arb(self, request: Request) -> str | None:
        self.box.sequences.pop(self._arb_channel(request), None)
        return None

    def _clear_arb(self, request: Request) -> str | None:
        self._loaded.pop(self._arb_channel(request), None)
        return None


_HMP4040 = ChannelModel(32.0, 10.0, 32.05, 10.01, 32.5, 10.01, max_power_w=160.0)
_NGE103B = ChannelModel(32.0, 3.0, 32.0, 3.0, 32.5, 3.0, max_power_w=33.6)

MODELS = (
    SupplyModel(
        name="rs-hmp",
        identity="ROHDE&SCHWARZ,HMP4040,VIRTUAL006,HW50020003/SW2.62",
        channels=dict.fromkeys((1, 2, 3, 4), _HMP4040),
        vendor=RohdeSchwarz,
        decimals_a=4,
        trips_in_cc=True,
        known="user manual; port unverified",
    ),
    SupplyModel(
        name="rs-nge",
        identity="Rohde&Schwarz,NGE103B,5601.3800k03/VIRTUAL007,1.54",
        channels=dict.fromkeys((1, 2, 3), _NGE103B),
        vendor=lambda box: RohdeSchwarz(box, nge=True),
        trips_in_cc=True,
        known="user manual; energy, power, CV/CC bits and port unverified",
    ),
)
