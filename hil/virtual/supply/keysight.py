"""Keysight E36300 and N6700: channel lists, protections that keep the enable, the N6700's watchdog, output lists.

Setting, measuring, OVP, OCP, watchdog and the N6700's list and clear follow the makers' guides; the E36300's
`OUTPut:PROTection:CLEar`, `MEASure:POWer?` and the status bits of the E36300 are unverified; its list is as published
drivers use it.

A protection shuts the output down and leaves its enable as it was: `OUTPut?` goes on saying 1, and
`OUTPut:PROTection:CLEar` brings the board back to life unless the output was switched off first. Any message feeds the
N6700's watchdog; when it fires, bit 11 of the questionable condition is the only honest answer.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from hil.virtual.supply.commands import (
    Handlers,
    common,
    digit,
    exponent,
    nothing,
    one_channel,
    select_handler,
    signed_entry,
)
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.language import (
    Handler,
    Interpreter,
    Request,
    Row,
    ScpiFault,
    boolean,
    channel_list,
    number,
    query_only,
    real,
    set_only,
    word,
)
from hil.virtual.supply.physics import Channel, ChannelModel
from hil.virtual.supply.sequence import Sequence, Step

WATCHDOG = "watchdog"
WATCHDOG_DELAY_S = 60.0


class Channels:
    """How Keysight names channels: a list as the last parameter; without one the selected channel, where there is one.

    `required` is the mainframe's rule: no list, no command.
    """

    def __init__(self, box: Instrument, *, required: bool) -> None:
        self._box = box
        self._required = required

    def numbers(self, request: Request) -> list[int]:
        """Takes the list off the parameters."""
        if request.arguments and request.arguments[-1].startswith("("):
            found = channel_list(request.arguments.pop())
        elif self._required:
            raise ScpiFault(-109, "Missing parameter")
        else:
            found = [self._box.selected]
        for each in found:
            one_channel(self._box, each)
        return found

    def pick(self, request: Request) -> SequenceOf[Channel]:
        return [self._box.channels[n] for n in self.numbers(request)]


def source_rows(h: Handlers) -> list[Row]:
    """Set points, output, measurements and protections as all of them have."""
    return [
        ("[:SOURce]:VOLTage[:LEVel][:IMMediate][:AMPLitude]", h.voltage()),
        ("[:SOURce]:CURRent[:LEVel][:IMMediate][:AMPLitude]", h.current()),
        (":OUTPut[:STATe]", h.output(refuse_tripped=False)),
        (":OUTPut:PROTection:CLEar", h.clear("ovp", "ocp", "other")),
        (":MEASure[:SCALar]:VOLTage[:DC]", h.measured("v")),
        (":MEASure[:SCALar]:CURRent[:DC]", h.measured("a")),
        ("[:SOURce]:VOLTage:PROTection[:LEVel]", h.ovp_level()),
        ("[:SOURce]:CURRent:PROTection:STATe", h.flag("ocp.enabled")),
        ("[:SOURce]:CURRent:PROTection:DELay[:TIME]", h.span("ocp.delay_s", 0.0, 0.255, exponent)),
        (":SYSTem:REMote", nothing),
        (":SYSTem:LOCal", nothing),
    ]


def mainframe_rows(box: Instrument, channels: Channels, module: str) -> list[Row]:
    """What sits in the slots: every one holds the same `module`."""

    def count(request: Request) -> str | None:
        query_only(request)
        return str(len(box.channels))

    def model(request: Request) -> str | None:
        query_only(request)
        return ",".join(f'"{module}"' for _ in channels.numbers(request))

    return [(":SYSTem:CHANnel[:COUNt]", count), (":SYSTem:CHANnel:MODel", model)]


def handlers(box: Instrument, channels: Channels) -> Handlers:
    return Handlers(box, channels.pick, volts=exponent, amperes=exponent, watts=exponent)


@dataclass(frozen=True, slots=True)
class ListModel:
    """What a list may be: steps, repetitions, seconds a step, and how finely a dwell of so many seconds is kept."""

    steps: int
    count: int
    dwell_min_s: float
    dwell_max_s: float
    dwell_step_s: Callable[[float], float]


def _decades(seconds: float) -> float:
    """An N6700 keeps 1 us up to 0.262144 s, 10 us up to ten times that, and so on."""
    return float(1e-6 * 10 ** sum(seconds > 0.262144 * 10**decade for decade in range(3)))


N6700_LIST = ListModel(512, 4096, 0.0, 262.144, _decades)
E36300_LIST = ListModel(100, 256, 0.01, 3600.0, lambda seconds: 0.01)  # the step is assumed


class Lists:
    """Output lists: points are loaded, the channel put into list mode, initiated and triggered.

    A list goes on while its output is tripped. Ended by an abort it leaves what was set before it, whatever
    `LIST:TERMinate:LAST` says.
    """

    def __init__(self, box: Instrument, channels: Channels, model: ListModel = N6700_LIST) -> None:
        self._box = box
        self._channels = channels
        self._model = model
        self.forget()

    def status(self, n: int) -> int:
        """Bits 4 and 6 of the operation register: waiting for a trigger, initiated or playing."""
        waiting = n in self._armed
        return (16 if waiting else 0) | (64 if waiting or n in self._box.sequences else 0)

    def forget(self) -> None:
        numbers = tuple(self._box.model.channels)
        # one step at the least until told otherwise
        self._points: dict[tuple[int, str], tuple[float, ...]] = {
            (n, what): (value,)
            for n in numbers
            for what, value in (("VOLT", 0.0), ("CURR", 0.0), ("DWEL", max(0.001, self._model.dwell_min_s)))
        }
        self._mode = {(n, what): "FIX" for n in numbers for what in ("VOLT", "CURR")}
        self._count = dict.fromkeys(numbers, 1)
        self._keep_last = dict.fromkeys(numbers, False)
        self._source = dict.fromkeys(numbers, "IMM")
        self._armed: set[int] = set()
        self._before: dict[int, tuple[float, float]] = {}

    def rows(self) -> list[Row]:
        return [
            ("[:SOURce]:LIST:VOLTage[:LEVel]", self._list("VOLT")),
            ("[:SOURce]:LIST:CURRent[:LEVel]", self._list("CURR")),
            ("[:SOURce]:LIST:DWELl", self._list("DWEL")),
            ("[:SOURce]:LIST:COUNt", self._counted),
            ("[:SOURce]:LIST:STEP", nothing),
            ("[:SOURce]:LIST:TERMinate:LAST", self._terminate),
            ("[:SOURce]:VOLTage:MODE", self._set_mode("VOLT")),
            ("[:SOURce]:CURRent:MODE", self._set_mode("CURR")),
            (":TRIGger[:TRANsient]:SOURce", self._trigger_source),
            (":INITiate[:IMMediate][:TRANsient]", self._initiate),
            (":TRIGger[:TRANsient][:IMMediate]", self._trigger),
            (":*TRG", self._bus_trigger),
            (":ABORt[:TRANsient]", self._abort),
        ]

    def _list(self, what: str) -> Handler:
        def handle(request: Request) -> str | None:
            numbers = self._channels.numbers(request)
            if request.query:
                return ",".join(exponent(v) for n in numbers for v in self._points[n, what])
            values = tuple(number(text) for text in request.arguments)
            if not 1 <= len(values) <= self._model.steps:
                raise ScpiFault(-223, "Too much data") if values else ScpiFault(-109, "Missing parameter")
            for n in numbers:
                limits, lists = self._box.channels[n].model, self._model
                low = lists.dwell_min_s if what == "DWEL" else 0.0
                top = {"VOLT": limits.max_v, "CURR": limits.max_a, "DWEL": lists.dwell_max_s}[what]
                if not all(low <= value <= top for value in values):
                    raise ScpiFault(-222, "Data out of range")
                steps = [lists.dwell_step_s(value) if what == "DWEL" else 1e-3 for value in values]
                self._points[n, what] = tuple(round(v / s) * s for v, s in zip(values, steps, strict=True))
            return None

        return handle

    def _counted(self, request: Request) -> str | None:
        numbers = self._channels.numbers(request)
        if request.query:
            return ",".join(str(self._count[n] or "9.9E37") for n in numbers)
        forever = bool(request.arguments) and request.arguments[0].upper() in ("INF", "INFINITY")
        count = 0 if forever else int(real(request.arguments, 1, self._model.count))
        self._count.update(dict.fromkeys(numbers, count))
        return None

    def _terminate(self, request: Request) -> str | None:
        numbers = self._channels.numbers(request)
        if request.query:
            return ",".join(digit(self._keep_last[n]) for n in numbers)
        self._keep_last.update(dict.fromkeys(numbers, boolean(request.arguments)))
        return None

    def _set_mode(self, what: str) -> Handler:
        def handle(request: Request) -> str | None:
            numbers = self._channels.numbers(request)
            if request.query:
                return ",".join(self._mode[n, what] for n in numbers)
            mode = word(request.arguments, "FIXed", "STEP", "LIST")
            self._mode.update({(n, what): mode for n in numbers})
            return None

        return handle

    def _trigger_source(self, request: Request) -> str | None:
        numbers = self._channels.numbers(request)
        if request.query:
            return ",".join(self._source[n] for n in numbers)
        self._source.update(dict.fromkeys(numbers, word(request.arguments, "BUS", "IMMediate")))
        return None

    def _initiate(self, request: Request) -> str | None:
        set_only(request)
        for n in self._channels.numbers(request):
            self._armed.add(n)
            if self._source[n] == "IMM":
                self._start(n)
        return None

    def _trigger(self, request: Request) -> str | None:
        set_only(request)
        for n in self._channels.numbers(request):
            self._start(n)
        return None

    def _bus_trigger(self, request: Request) -> str | None:
        set_only(request)
        for n in sorted(self._armed):
            if self._source[n] == "BUS":
                self._start(n)
        return None

    def _abort(self, request: Request) -> str | None:
        set_only(request)
        for n in self._channels.numbers(request) if request.arguments else tuple(self._box.channels):
            self._armed.discard(n)
            if self._box.sequences.pop(n, None) is not None:
                channel = self._box.channels[n]
                channel.voltage_set_v, channel.current_limit_a = self._before[n]
        return None

    def _start(self, n: int) -> None:
        if n not in self._armed:
            raise ScpiFault(-211, "Trigger ignored")
        self._armed.discard(n)
        channel = self._box.channels[n]
        playing = [what for what in ("VOLT", "CURR") if self._mode[n, what] == "LIST"]
        if not playing:
            raise ScpiFault(-221, "Settings conflict")
        columns = {what: self._points[n, what] for what in (*playing, "DWEL")}
        length = max(map(len, columns.values()))
        columns = {what: points * length if len(points) == 1 else points for what, points in columns.items()}
        if any(len(points) != length for points in columns.values()):
            raise ScpiFault(-226, "Lists not same length")
        kept = (None,) * length
        rows = zip(columns.get("VOLT", kept), columns.get("CURR", kept), columns["DWEL"], strict=True)
        steps = tuple(Step(*row) for row in rows)
        self._before[n] = (channel.voltage_set_v, channel.current_limit_a)
        last = None if self._keep_last[n] else Step(*self._before[n], 0.0)
        self._box.sequences[n] = Sequence(steps, self._box.clock(), self._count[n], last)


class E36300:
    """A bench supply with three outputs; the list of channels may be left out."""

    def __init__(self, box: Instrument) -> None:
        self.box = box
        self._channels = Channels(box, required=False)
        h = handlers(box, self._channels)
        self._lists = Lists(box, self._channels, E36300_LIST)
        rows = [
            *common(box, signed_entry),
            *source_rows(h),
            *self._lists.rows(),
            (":INSTrument[:SELect]", select_handler(box, "CH", "OUT")),
            (":INSTrument:NSELect", select_handler(box)),
            (":APPLy", self._apply),
            ("[:SOURce]:VOLTage:PROTection:TRIPped", h.told("ovp.tripped")),
            ("[:SOURce]:CURRent:PROTection:TRIPped", h.told("ocp.tripped")),
            ("[:SOURce]:VOLTage:PROTection:CLEar", h.clear("ovp", "other")),
            ("[:SOURce]:CURRent:PROTection:CLEar", h.clear("ocp", "other")),
            (":STATus:QUEStionable:INSTrument:ISUMmary<n>:CONDition", self._summary),
        ]
        self._interpreter = Interpreter(rows, box.push_error, box.tick)
        self.reset()

    def execute(self, message: str) -> str | None:
        return self._interpreter.run(message)

    def tick(self, now_s: float) -> None:
        pass

    def reset(self) -> None:
        self._lists.forget()
        for channel in self.box.channels.values():
            channel.ovp.enabled = True  # its over-voltage protection cannot be switched off

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def _apply(self, request: Request) -> str | None:
        arguments = request.arguments
        if not arguments:
            raise ScpiFault(-109, "Missing parameter")
        name = arguments.pop(0).upper().removeprefix("CH").removeprefix("OUT")
        if not name.isdigit():
            raise ScpiFault(-224, "Illegal parameter value")
        channel = one_channel(self.box, int(name))
        if request.query:
            return f'"{channel.voltage_set_v:+.5E},{channel.current_limit_a:+.5E}"'
        volts = real(arguments[:1], 0.0, channel.model.max_v)
        amperes = real(arguments[1:], 0.0, channel.model.max_a) if len(arguments) > 1 else channel.current_limit_a
        channel.voltage_set_v, channel.current_limit_a = round(volts, 3), round(amperes, 3)
        return None

    def _summary(self, request: Request) -> str | None:
        """Bit 0 constant current, bit 1 constant voltage, bit 9 OVP, bit 10 OCP: unverified."""
        query_only(request)
        channel = one_channel(self.box, request.numbers["n"])
        regulating = 0 if not channel.output_on else 1 if channel.mode == "CC" else 2
        return str(regulating | (512 if channel.ovp.tripped else 0) | (1024 if channel.ocp.tripped else 0))


class N6700:
    """A mainframe of modules: a channel list with every command, status registers, coupled trips, the watchdog."""

    def __init__(self, box: Instrument) -> None:
        self.box = box
        self._channels = Channels(box, required=True)
        h = handlers(box, self._channels)
        self._lists = Lists(box, self._channels)
        rows = [
            *common(box, signed_entry),
            *source_rows(h),
            *self._lists.rows(),
            *mainframe_rows(box, self._channels, "N6752A"),
            (":MEASure[:SCALar]:POWer[:DC]", h.measured("w")),
            (":STATus:OPERation:CONDition", self._operation),
            (":STATus:QUEStionable:CONDition", self._questionable),
            (":OUTPut:PROTection:COUPle", self._couple),
            (":OUTPut:PROTection:WDOG[:STATe]", self._watchdog_state),
            (":OUTPut:PROTection:WDOG:DELay", self._watchdog_delay),
        ]
        self._interpreter = Interpreter(rows, box.push_error, box.tick)
        self._watchdog = False
        self._watchdog_delay_s = WATCHDOG_DELAY_S
        self._fed_s = box.clock()
        self._coupled = False
        self.reset()

    def execute(self, message: str) -> str | None:
        self.box.tick()  # a watchdog that is due fires before this message may feed it
        self._fed_s = self.box.clock()
        return self._interpreter.run(message)

    def tick(self, now_s: float) -> None:
        channels = self.box.channels.values()
        if self._watchdog and now_s - self._fed_s > self._watchdog_delay_s:
            for channel in channels:
                if channel.enabled and WATCHDOG not in channel.shutdown:
                    channel.trip(WATCHDOG, now_s)
        if self._coupled and any(c.tripped for c in channels):
            for channel in channels:
                if channel.output_on:
                    channel.trip("coupled", now_s)

    def reset(self) -> None:
        self._lists.forget()
        self._watchdog, self._watchdog_delay_s, self._coupled = False, WATCHDOG_DELAY_S, False
        for channel in self.box.channels.values():
            channel.ovp.enabled = True

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def _operation(self, request: Request) -> str | None:
        """Bit 0 constant voltage, bit 1 constant current, bit 2 off, and the list's."""
        query_only(request)

        def bits(n: int) -> int:
            channel = self.box.channels[n]
            regulating = 4 if not channel.output_on else 2 if channel.mode == "CC" else 1
            return regulating | self._lists.status(n)

        return ",".join(str(bits(n)) for n in self._channels.numbers(request))

    def _questionable(self, request: Request) -> str | None:
        """Bit 0 over-voltage, bit 1 over-current, bit 11 protection: watchdog or coupled."""
        query_only(request)
        found = self._channels.pick(request)
        bits = [(1 if c.ovp.tripped else 0) | (2 if c.ocp.tripped else 0) | (2048 if c.shutdown else 0) for c in found]
        return ",".join(map(str, bits))

    def _couple(self, request: Request) -> str | None:
        if request.query:
            return digit(self._coupled)
        self._coupled = boolean(request.arguments)
        return None

    def _watchdog_state(self, request: Request) -> str | None:
        if request.query:
            return digit(self._watchdog)
        self._watchdog = boolean(request.arguments)
        return None

    def _watchdog_delay(self, request: Request) -> str | None:
        if request.query:
            given = request.arguments
            return f"{real(given, 1.0, 3600.0) if given else self._watchdog_delay_s:g}"
        self._watchdog_delay_s = float(round(real(request.arguments, 1.0, 3600.0)))
        return None


_N6752A = ChannelModel(50.0, 10.0, 51.0, 10.2, 55.0, 10.2, max_power_w=100.0)

MODELS = (
    SupplyModel(
        name="keysight-e36300",
        identity="Keysight Technologies,E36312A,VIRTUAL00000003,2.1.0-1.0.4-1.12",
        channels={
            1: ChannelModel(6.0, 5.0, 6.18, 5.15, 6.6, 5.5),
            2: ChannelModel(25.0, 1.0, 25.75, 1.03, 27.5, 1.1),
            3: ChannelModel(25.0, 1.0, 25.75, 1.03, 27.5, 1.1),
        },
        vendor=E36300,
        keeps_enable=True,
        trips_in_cc=True,
        known="programming guide; OUTP:PROT:CLE and status bits unverified, lists as in published drivers",
    ),
    SupplyModel(
        name="keysight-n6700",
        identity="Keysight Technologies,N6700C,VIRTUAL00000004,E.02.07.3223",
        channels=dict.fromkeys((1, 2, 3, 4), _N6752A),
        vendor=N6700,
        keeps_enable=True,
        trips_in_cc=True,
        known="programming guide; MEAS:POW? unverified",
    ),
)
