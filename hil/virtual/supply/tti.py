"""Aim-TTi CPX: a short language of its own, answers that name what was asked, trips that only `TRIPRST` forgets.

From the maker's manual, with QL, PL and MX alike; port 9221 and the numbers of execution errors are unverified. An
unknown command sets bit 5 of the event status, a value out of range bit 4 and an execution error number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hil.virtual.supply.commands import accessors, one_channel
from hil.virtual.supply.instrument import Instrument, SupplyModel, trip_channel
from hil.virtual.supply.language import ScpiFault
from hil.virtual.supply.physics import Channel, ChannelModel

OUT_OF_RANGE = 115
WRONG_STATE = 116
_COMMAND = re.compile(r"(\*?[A-Z]+?)(\d)?(V|O)?(\?)?(?:\s+(\S+))?")
_PLAIN = re.compile(r"(\*[A-Z]+|OPALL|TRIPRST|EER|QER|IFLOCK|IFUNLOCK|LOCAL|ADDRESS|CONFIG)(\?)?(?:\s+(\S+))?")


@dataclass(frozen=True, slots=True)
class _Level:
    """A number of an output: where a channel and its model keep it, the tag of its answer, its decimals."""

    path: str
    top: str
    tag: str
    places: int


_LEVELS = {
    "V": _Level("voltage_set_v", "max_v", "V", 2),
    "I": _Level("current_limit_a", "max_a", "I", 3),
    "OVP": _Level("ovp.level", "max_ovp_v", "VP", 2),
    "OCP": _Level("ocp.level", "max_ocp_a", "CP", 3),
}


@dataclass(frozen=True, slots=True)
class _Unit:
    """A command for one output: `V1O?` is number 1, kind O, asking."""

    channel: Channel
    number: str
    kind: str | None
    asks: bool
    value: str | None


class Cpx:
    """Two outputs with voltage, current and both trips each."""

    def __init__(self, box: Instrument) -> None:
        self.box = box
        self.reset()

    def reset(self) -> None:
        self._execution_error = 0
        self._query_error = 0
        for channel in self.box.channels.values():
            channel.ovp.enabled = channel.ocp.enabled = True  # they have levels only

    def tick(self, now_s: float) -> None:
        pass

    def trip(self, number: int, kind: str) -> None:
        trip_channel(self.box.channels[number], kind, self.box.clock())

    def execute(self, message: str) -> str | None:
        answers: list[str] = []
        for unit in message.split(";"):
            text = unit.strip().upper()
            if not text:
                continue
            self.box.tick()
            try:
                answer = self._unit(text)
            except ScpiFault as error:
                self._fail(error.code)
                answer = None
            self.box.tick()
            if answer is not None:
                answers.append(answer)
        return "\r\n".join(answers) if answers else None

    def _fail(self, code: int) -> None:
        """Positive: an execution error with that number. Negative: a command error. No queue keeps them."""
        if code > 0:
            self._execution_error = code
            self.box.event_status |= 16
        else:
            self.box.event_status |= 32

    def _unit(self, text: str) -> str | None:
        plain = _PLAIN.fullmatch(text)
        if plain:
            return self._plain(plain[1], bool(plain[2]), plain[3])
        found = _COMMAND.fullmatch(text)
        if not found or not found[2]:
            raise ScpiFault(-100, "Command error")
        name, number, kind, asks, value = found.groups()
        unit = _Unit(one_channel(self.box, int(number)), number, kind, bool(asks), value)
        if name in _LEVELS:
            return self._level(name, unit)
        if name == "OP":
            return self._output(unit)
        if name == "LSR":
            return self._limits(unit)
        raise ScpiFault(-100, "Command error")

    def _plain(self, name: str, asks: bool, value: str | None) -> str | None:
        box, now = self.box, self.box.clock()
        if asks:
            return self._plain_query(name)
        if name == "*CLS":
            box.event_status = self._execution_error = self._query_error = 0
        elif name == "*RST":
            box.reset()
        elif name == "*OPC":
            box.event_status |= 1
        elif name == "OPALL":
            state = _state(value)
            for channel in box.channels.values():
                channel.switch(state, now)
        elif name == "TRIPRST":
            for channel in box.channels.values():
                channel.clear_all(now)
        elif name not in ("IFLOCK", "IFUNLOCK", "LOCAL", "CONFIG"):
            raise ScpiFault(-100, "Command error")
        return None

    def _plain_query(self, name: str) -> str:
        box = self.box
        if name == "*IDN":
            return box.model.identity
        if name == "*ESR":
            # a refusal put in from outside ends in the queue this maker does not have
            if box.errors:
                box.errors.clear()
            value, box.event_status = box.event_status, 0
            return str(value)
        if name == "EER":
            number, self._execution_error = self._execution_error, 0
            return str(number)
        if name == "QER":
            number, self._query_error = self._query_error, 0
            return str(number)
        answers = {"*OPC": "1", "*TST": "0", "*STB": "0", "IFLOCK": "1", "CONFIG": "2"}
        if name not in answers:
            raise ScpiFault(-100, "Command error")
        return answers[name]

    def _level(self, name: str, unit: _Unit) -> str | None:
        """A number of the output: set, read back with its tag, or measured at the terminals."""
        level, channel = _LEVELS[name], unit.channel
        read, write = accessors(level.path)
        if unit.asks and unit.kind == "O" and name in ("V", "I"):
            return f"{channel.terminal_v:.2f}V" if name == "V" else f"{channel.current_a:.3f}A"
        if unit.asks:
            return f"{level.tag}{unit.number} {read(channel):.{level.places}f}"
        if unit.kind and (name, unit.kind) != ("V", "V"):  # `V1V` waits until it is there
            raise ScpiFault(-100, "Command error")
        write(channel, round(_value(unit.value, getattr(channel.model, level.top)), level.places))
        return None

    def _output(self, unit: _Unit) -> str | None:
        channel = unit.channel
        if unit.asks:
            return "1" if channel.output_on else "0"
        state = _state(unit.value)
        if state and channel.tripped:
            raise ScpiFault(WRONG_STATE, "tripped")
        channel.switch(state, self.box.clock())
        return None

    def _limits(self, unit: _Unit) -> str:
        """Bit 0 constant voltage, 1 constant current, 2 over-voltage trip, 3 over-current trip."""
        channel = unit.channel
        if not unit.asks:
            raise ScpiFault(-100, "Command error")
        regulating = 0 if not channel.output_on else 2 if channel.mode == "CC" else 1
        return str(regulating | (4 if channel.ovp.tripped else 0) | (8 if channel.ocp.tripped else 0))


def _state(value: str | None) -> bool:
    if value not in ("0", "1"):
        raise ScpiFault(OUT_OF_RANGE if value else -100, "illegal state")
    return value == "1"


def _value(text: str | None, top: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        raise ScpiFault(-100, "Command error") from None
    if not 0.0 <= value <= top:
        raise ScpiFault(OUT_OF_RANGE, "out of range")
    return value


_CPX400 = ChannelModel(60.0, 20.0, 60.0, 20.0, 66.0, 22.0, max_power_w=420.0)

MODELS = (
    SupplyModel(
        name="tti-cpx",
        identity="THURLBY THANDAR, CPX400DP, VIRTUAL008, 1.00 - 1.00",
        channels={1: _CPX400, 2: _CPX400},
        vendor=Cpx,
        decimals_v=2,
        reply_end=b"\r\n",
        port=9221,
        known="instruction manual; port and execution error numbers unverified",
    ),
)
