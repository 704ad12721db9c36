"""A programmable supply without the hardware: a TCP server that speaks a real dialect in front of modelled channels.

What is modelled, and labelled so wherever it is reported: the output stage is an ideal constant-voltage source that
turns into a constant-current source at its limit; the terminal voltage follows with one time constant while on
(`RISE_TAU_S`) and decays with another when off (`DECAY_TAU_S`, output capacitance and bleeder); OVP and OCP trip at
once and latch. A load is told about its power exactly at the edges: output off, trip, or a voltage below its lock-out.

The dialect is the Rigol DP800 series' as its programming guide writes it, in long and short forms. Replies carry the
resolution of a plain DP832 (10 mV, 1 mA). Nothing here was compared with an instrument.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import itertools
import math
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from hil.errors import BenchError, UsageError

RISE_TAU_S = 0.005  # modelled: terminal voltage towards a new set point, output on
DECAY_TAU_S = 0.050  # modelled: terminal voltage towards zero, output off
TICK_S = 0.010
RETURN_MARGIN_V = 0.5  # a load starts only this far above its lock-out
RETURN_DWELL_S = 0.05  # modelled: power-good delay of a load after a brown-out, so that a weak source makes it hiccup
ERROR_QUEUE_LENGTH = 20
MAX_MESSAGE_BYTES = 4096
_SUBSTEP_S = 0.001
_SETTLED_S = 0.6  # after twelve of the longer time constants nothing moves any more


# ---------------------------------------------------------------------------------------------------------- loads
@runtime_checkable
class Load(Protocol):
    """What hangs on a channel: a constant-power consumer with an under-voltage lock-out.

    `set_powered` is called from the server's event loop at each edge and must not block. `power_w` may be called every
    10 ms; `now_s` is the supply's monotonic clock.
    """

    undervoltage_lockout_v: float

    def power_w(self, now_s: float) -> float: ...

    def set_powered(self, on: bool) -> None: ...


@runtime_checkable
class OhmicLoad(Protocol):
    """A load whose current follows the voltage: `resistance_ohm` instead of a constant power."""

    resistance_ohm: float


class ResistiveLoad:
    """A resistor. It has no lock-out and draws V / R."""

    undervoltage_lockout_v = 0.0

    def __init__(self, resistance_ohm: float) -> None:
        self.resistance_ohm = resistance_ohm
        self.powered = False

    def power_w(self, now_s: float) -> float:
        return 0.0

    def set_powered(self, on: bool) -> None:
        self.powered = on


class RecordedLoad:
    """A constant-power profile since power on: `profile` is (seconds, watts) steps, each held until the next.

    Keeps its edges as (time, powered) in `edges`, so that a test can see exactly when the board lost its power.
    """

    def __init__(
        self,
        profile: Sequence[tuple[float, float]],
        undervoltage_lockout_v: float = 8.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not profile or any(b[0] < a[0] for a, b in itertools.pairwise(profile)):
            raise UsageError("a recorded load needs (seconds, watts) steps with rising times")
        self.profile = tuple(profile)
        self.undervoltage_lockout_v = undervoltage_lockout_v
        self.powered = False
        self.edges: list[tuple[float, bool]] = []
        self._clock = clock
        self._since_s = 0.0

    def power_w(self, now_s: float) -> float:
        if not self.powered:
            return 0.0
        age = now_s - self._since_s
        watts = self.profile[0][1]
        for start, value in self.profile:
            if start > age:
                break
            watts = value
        return watts

    def set_powered(self, on: bool) -> None:
        self.powered = on
        self._since_s = self._clock()
        self.edges.append((self._since_s, on))


# --------------------------------------------------------------------------------------------------------- models
@dataclass(frozen=True, slots=True)
class ChannelModel:
    """Limits of one channel: settable maxima, protection range, steps of set point and reading."""

    rated_v: float
    rated_a: float
    max_v: float
    max_a: float
    max_ovp_v: float
    max_ocp_a: float


@dataclass(frozen=True, slots=True)
class SupplyModel:
    """A supply the server can be. `identity` is its `*IDN?` answer; the serial number says that it is virtual."""

    name: str
    identity: str
    channels: Mapping[int, ChannelModel]
    decimals_v: int = 2
    decimals_a: int = 3
    decimals_w: int = 2


_DP832 = SupplyModel(
    name="rigol-dp800",
    identity="RIGOL TECHNOLOGIES,DP832,VIRTUAL000000001,00.01.16",
    channels={
        1: ChannelModel(30.0, 3.0, 32.0, 3.2, 33.0, 3.3),
        2: ChannelModel(30.0, 3.0, 32.0, 3.2, 33.0, 3.3),
        3: ChannelModel(5.0, 3.0, 5.3, 3.2, 5.5, 3.3),
    },
)
MODELS: Mapping[str, SupplyModel] = {_DP832.name: _DP832}


def supply_model(name: str) -> SupplyModel:
    """The model called `name`; UsageError lists the known ones."""
    try:
        return MODELS[name]
    except KeyError:
        raise UsageError(f"no virtual supply model {name!r}", hint=f"known models: {', '.join(MODELS)}") from None


# -------------------------------------------------------------------------------------------------------- physics
class Channel:
    """One output: set points, protections and the terminal voltage over time. Time is a parameter."""

    def __init__(self, model: ChannelModel, load: Load | None, now_s: float) -> None:
        self.model = model
        self.load = load
        self.voltage_set_v = 0.0
        self.current_limit_a = model.rated_a
        self.ovp_level_v = model.max_ovp_v
        self.ocp_level_a = model.max_ocp_a
        self.ovp_enabled = False
        self.ocp_enabled = False
        self.ovp_tripped = False
        self.ocp_tripped = False
        self.output_on = False
        self.terminal_v = 0.0
        self.current_a = 0.0
        self.mode: Literal["CV", "CC", "UR"] = "CV"
        self.load_powered = False
        self._time_s = now_s
        self._on_before_trip = False
        self._return_s = now_s

    def switch(self, on: bool, now_s: float) -> None:
        """Turn the output on or off. A latched trip keeps it off until cleared."""
        self.advance(now_s)
        if on and (self.ovp_tripped or self.ocp_tripped):
            return
        self.output_on = on
        self._on_before_trip = False
        self._settle(now_s)

    def clear_trip(self, now_s: float, *, ovp: bool = False, ocp: bool = False, restore: bool = False) -> None:
        """Forget a latched trip. With `restore` the output returns to what it was before, if nobody switched since."""
        self.advance(now_s)
        self.ovp_tripped = self.ovp_tripped and not ovp
        self.ocp_tripped = self.ocp_tripped and not ocp
        if restore and self._on_before_trip and not (self.ovp_tripped or self.ocp_tripped):
            self.switch(True, now_s)

    def advance(self, now_s: float) -> None:
        """Move the terminal voltage to `now_s`, trip what must trip, tell the load about its edges."""
        elapsed = now_s - self._time_s
        self._time_s = now_s
        watts = self._demand_w(now_s)
        # Both time constants are integrated exactly; small steps are only needed where an edge may lie in between.
        moving = self.output_on and (self.mode != "CV" or self.terminal_v != self.voltage_set_v)
        steps = max(1, math.ceil(min(elapsed, _SETTLED_S) / _SUBSTEP_S)) if moving else 1
        step_s = min(elapsed, _SETTLED_S) / steps
        for _ in range(steps):
            powered = self.load_powered
            self._move(watts, step_s)
            self._settle(now_s)
            if self.load_powered != powered:
                watts = self._demand_w(now_s)

    def _demand_w(self, now_s: float) -> float:
        if self.load is None or not self.load_powered or isinstance(self.load, OhmicLoad):
            return 0.0
        return max(0.0, self.load.power_w(now_s))

    def _move(self, watts: float, step_s: float) -> None:
        """One step of the terminal voltage towards where the source and the load meet."""
        if not self.output_on:
            self.mode, self.current_a = "CV", 0.0
            self.terminal_v *= math.exp(-step_s / DECAY_TAU_S)
            if self.terminal_v < 1e-4:
                self.terminal_v = 0.0
            return
        target, self.current_a, self.mode = self._operating_point(watts)
        self.terminal_v += (target - self.terminal_v) * (1.0 - math.exp(-step_s / RISE_TAU_S))
        if abs(target - self.terminal_v) < 1e-4:
            self.terminal_v = target

    def _operating_point(self, watts: float) -> tuple[float, float, Literal["CV", "CC", "UR"]]:
        """(voltage the terminal tends to, current, regulation).

        A constant-power load that wants more than the limit has no stable point on a current source: less voltage
        makes it draw more, so the voltage collapses until the load locks out.
        """
        limit, wanted_v = self.current_limit_a, self.voltage_set_v
        if isinstance(self.load, OhmicLoad):
            ohm = self.load.resistance_ohm
            if wanted_v / ohm <= limit:
                return wanted_v, self.terminal_v / ohm, "CV"
            return limit * ohm, min(limit, self.terminal_v / ohm), "CC"
        if watts <= 0.0:
            return wanted_v, 0.0, "CV"
        demand_a = watts / max(self.terminal_v, 0.1)
        if demand_a <= limit:
            return wanted_v, demand_a, "CV"
        return 0.0, limit, "CC"

    def _settle(self, now_s: float) -> None:
        """Trips first, then the load's edges: what a real output stage would do before anybody can ask."""
        if self.output_on and self.ovp_enabled and self.terminal_v > self.ovp_level_v + 1e-9:
            self.ovp_tripped, self.output_on, self._on_before_trip = True, False, True
        if self.output_on and self.ocp_enabled and self.current_a > self.ocp_level_a + 1e-9:
            self.ocp_tripped, self.output_on, self._on_before_trip = True, False, True
        if not self.output_on:
            self.current_a = 0.0
        if self.load is None:
            return
        lockout = self.load.undervoltage_lockout_v
        if self.load_powered and (not self.output_on or self.terminal_v < lockout):
            self._return_s = now_s + RETURN_DWELL_S if self.output_on else now_s
            self._power_load(False)
        elif not self.load_powered and self.output_on and self.terminal_v > 0:
            # A margin, else the load would flutter at its lock-out.
            margin = RETURN_MARGIN_V if lockout > 0 else 0.0
            if self.terminal_v >= lockout + margin and now_s >= self._return_s:
                self._power_load(True)

    def _power_load(self, on: bool) -> None:
        self.load_powered = on
        if not on and not isinstance(self.load, OhmicLoad):
            self.current_a = 0.0
        if self.load is not None:
            self.load.set_powered(on)


# ----------------------------------------------------------------------------------------------------- fault hooks
FaultKind = Literal["silent", "late", "garbage", "drop", "half_open", "refuse", "ignore"]


@dataclass(slots=True)
class Fault:
    """A defect that a test puts in: applied to the next `count` commands whose text matches `match` (case ignored).

    silent: executed, not answered. late: answered after `delay_s`. garbage: answered with `text`. drop: the connection
    is reset instead of answering. half_open: from now on the connection takes everything and says nothing.
    refuse: error -221 and no effect. ignore: no effect and no error, which only a read-back finds.
    """

    kind: FaultKind
    match: str = "."
    count: int = 1
    delay_s: float = 0.0
    text: str = "\x00#?"

    def takes(self, command: str) -> bool:
        return self.count != 0 and re.search(self.match, command, re.IGNORECASE) is not None


# ------------------------------------------------------------------------------------------------------- commands
class ScpiFault(Exception):
    """An error for the instrument's queue."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


_Handler = Callable[["Instrument", int | None, list[str], bool], str | None]


class Instrument:
    """The supply behind the wire: channels, error queue and command interpreter. No I/O, time is a parameter."""

    def __init__(self, model: SupplyModel, loads: Mapping[int, Load], clock: Callable[[], float]) -> None:
        unknown = set(loads) - set(model.channels)
        if unknown:
            raise UsageError(f"{model.name} has no channel {', '.join(map(str, sorted(unknown)))} to put a load on")
        self.model = model
        self.clock = clock
        now = clock()
        self.channels = {number: Channel(limits, loads.get(number), now) for number, limits in model.channels.items()}
        self.selected = 1
        self.errors: deque[tuple[int, str]] = deque()
        self.event_status = 0
        self.faults: list[Fault] = []

    def tick(self) -> None:
        """Let time pass for all channels."""
        now = self.clock()
        for channel in self.channels.values():
            channel.advance(now)

    def push_error(self, code: int, text: str) -> None:
        """Queue an error; when full, the newest becomes -350 as SCPI says."""
        # Bit 5 of the event status: command errors; bit 4: execution errors; bit 3: device errors.
        self.event_status |= 32 if -200 < code <= -100 else 16 if -300 < code <= -200 else 8
        if len(self.errors) >= ERROR_QUEUE_LENGTH:
            self.errors[-1] = (-350, "Queue overflow")
        else:
            self.errors.append((code, text))

    def take_fault(self, command: str) -> Fault | None:
        for fault in self.faults:
            if fault.takes(command):
                fault.count -= 1
                return fault
        return None

    def execute(self, message: str) -> str | None:
        """Run one program message (units separated by `;`) and return the answers joined by `;`, or None."""
        answers: list[str] = []
        path = ""
        for unit in message.split(";"):
            text = unit.strip()
            if not text:
                continue
            self.tick()
            try:
                answer, path = self._unit(text, path)
            except ScpiFault as error:
                self.push_error(error.code, error.text)
                answer = None
            self.tick()
            if answer is not None:
                answers.append(answer)
        return ";".join(answers) if answers else None

    def _unit(self, text: str, path: str) -> tuple[str | None, str]:
        header, _, rest = text.partition(" ")
        query = header.endswith("?")
        name = header.rstrip("?").upper()
        arguments = [part.strip() for part in rest.split(",")] if rest.strip() else []
        # A header without a leading colon continues at the level of the one before it, else starts at the root.
        candidates = [":" + name.lstrip(":")] if name[:1] in ":*" else [f"{path}:{name}", f":{name}"]
        for candidate in candidates:
            found = _command(candidate)
            if found is not None:
                handler, suffix = found
                following = path if name.startswith("*") else candidate.rpartition(":")[0]
                return handler(self, suffix, arguments, query), following
        raise ScpiFault(-113, "Undefined header")


@functools.lru_cache(maxsize=256)
def _command(header: str) -> tuple[_Handler, int | None] | None:
    """The handler of an upper-case header from the root and the channel number in it."""
    for pattern, handler in _COMMANDS:
        found = pattern.fullmatch(header)
        if found:
            suffix = found.groupdict().get("n")
            return handler, int(suffix) if suffix else None
    return None


def _pattern(scpi: str) -> re.Pattern[str]:
    """`[:SOURce[<n>]]:VOLTage[:LEVel]` as an expression over upper-case headers: short and long forms."""

    def keyword(match: re.Match[str]) -> str:
        word = match.group(0)
        short = re.match(r"[A-Z*]+", word)
        brief = short.group(0) if short else word
        return f"(?:{re.escape(word.upper())}|{re.escape(brief)})"

    text = scpi.replace("<n>", "\0")
    text = re.sub(r"\*?[A-Za-z]+", keyword, text)
    # Brackets written by the notation become optional groups; the groups made above contain none.
    text = text.replace("[", "(?:").replace("]", ")?").replace("\0", r"(?P<n>\d+)")
    return re.compile(text)


def _channel(box: Instrument, suffix: int | None, arguments: list[str]) -> Channel:
    """The channel a command means: the header's suffix, a leading CHn argument (taken off), or the selected one."""
    number = suffix if suffix is not None else box.selected
    if arguments:
        named = re.fullmatch(r"CH(\d+)", arguments[0].upper())
        if named:
            number = int(named.group(1))
            del arguments[0]
    if number not in box.channels:
        raise ScpiFault(-224, "Illegal parameter value")
    return box.channels[number]


def _real(arguments: list[str], low: float, high: float) -> float:
    if not arguments:
        raise ScpiFault(-109, "Missing parameter")
    if len(arguments) > 1:
        raise ScpiFault(-108, "Parameter not allowed")
    word = arguments[0].upper()
    if word in ("MIN", "MINIMUM"):
        return low
    if word in ("MAX", "MAXIMUM"):
        return high
    try:
        value = float(word)
    except ValueError:
        raise ScpiFault(-104, "Data type error") from None
    if not low <= value <= high:
        raise ScpiFault(-222, "Data out of range")
    return value


def _bool(arguments: list[str]) -> bool:
    if not arguments:
        raise ScpiFault(-109, "Missing parameter")
    word = arguments[0].upper()
    if len(arguments) > 1 or word not in ("ON", "OFF", "1", "0"):
        raise ScpiFault(-224, "Illegal parameter value")
    return word in ("ON", "1")


def _onoff(value: bool) -> str:
    return "ON" if value else "OFF"


def _settable(attribute: str, limit: str, decimals: str) -> _Handler:
    """A number of a channel: set within its range on its grid, or read back (`MIN` and `MAX` ask for the range)."""

    def handle(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
        channel = _channel(box, suffix, arguments)
        high: float = getattr(channel.model, limit)
        places: int = getattr(box.model, decimals)
        low = 10.0**-places if limit in ("max_ovp_v", "max_ocp_a") else 0.0
        if query:
            value = _real(arguments, low, high) if arguments else getattr(channel, attribute)
            return f"{value:.{places}f}"
        setattr(channel, attribute, round(_real(arguments, low, high), places))
        return None

    return handle


def _flag(attribute: str) -> _Handler:
    def handle(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
        channel = _channel(box, suffix, arguments)
        if query:
            return _onoff(getattr(channel, attribute))
        setattr(channel, attribute, _bool(arguments))
        return None

    return handle


def _tripped(attribute: str) -> _Handler:
    def handle(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
        _query_only(query)
        return "YES" if getattr(_channel(box, suffix, arguments), attribute) else "NO"

    return handle


def _clear(kind: str, *, restore: bool = False) -> _Handler:
    def handle(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
        _set_only(query)
        channel = _channel(box, suffix, arguments)
        channel.clear_trip(box.clock(), ovp=kind == "ovp", ocp=kind == "ocp", restore=restore)
        return None

    return handle


def _query_only(query: bool) -> None:
    if not query:
        raise ScpiFault(-113, "Undefined header")


def _set_only(query: bool) -> None:
    if query:
        raise ScpiFault(-113, "Undefined header")


def _measured(*what: str) -> _Handler:
    def handle(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
        _query_only(query)
        channel, model = _channel(box, suffix, arguments), box.model
        volts = round(channel.terminal_v, model.decimals_v)
        amperes = round(channel.current_a, model.decimals_a)
        values = {
            "v": f"{volts:.{model.decimals_v}f}",
            "a": f"{amperes:.{model.decimals_a}f}",
            "w": f"{channel.terminal_v * channel.current_a:.{model.decimals_w}f}",
        }
        return ",".join(values[name] for name in what)

    return handle


def _output(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    everything = bool(arguments) and arguments[0].upper() == "ALL"
    if everything and not query:
        state = _bool(arguments[1:])
        for each in box.channels.values():
            each.switch(state, box.clock())
        return None
    channel = _channel(box, suffix, arguments)
    if query:
        return _onoff(channel.output_on)
    state = _bool(arguments)
    if state and (channel.ovp_tripped or channel.ocp_tripped):
        raise ScpiFault(-221, "Settings conflict")
    channel.switch(state, box.clock())
    return None


def _regulation(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    _query_only(query)
    return _channel(box, suffix, arguments).mode


def _apply(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    channel = _channel(box, suffix, arguments)
    model = box.model
    if query:
        volts = f"{channel.voltage_set_v:.{model.decimals_v}f}"
        amperes = f"{channel.current_limit_a:.{model.decimals_a}f}"
        if arguments:
            word = arguments[0].upper()
            if word not in ("VOLT", "VOLTAGE", "CURR", "CURRENT"):
                raise ScpiFault(-224, "Illegal parameter value")
            return volts if word.startswith("V") else amperes
        number = next(key for key, value in box.channels.items() if value is channel)
        return f"CH{number}:{channel.model.rated_v:g}V/{channel.model.rated_a:g}A,{volts},{amperes}"
    if not arguments:
        raise ScpiFault(-109, "Missing parameter")
    volts_v = _real(arguments[:1], 0.0, channel.model.max_v)
    amperes_a = _real(arguments[1:], 0.0, channel.model.max_a) if len(arguments) > 1 else channel.current_limit_a
    channel.voltage_set_v = round(volts_v, model.decimals_v)
    channel.current_limit_a = round(amperes_a, model.decimals_a)
    return None


def _select(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    if query:
        return str(box.selected)
    word = arguments[0].upper().removeprefix("CH") if arguments else ""
    if not word.isdigit() or int(word) not in box.channels:
        raise ScpiFault(-224, "Illegal parameter value")
    box.selected = int(word)
    return None


def _identify(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    _query_only(query)
    return box.model.identity


def _clear_status(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    _set_only(query)
    box.errors.clear()
    box.event_status = 0
    return None


def _reset(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    _set_only(query)
    now = box.clock()
    for channel in box.channels.values():
        channel.switch(False, now)
        channel.clear_trip(now, ovp=True, ocp=True)
        channel.voltage_set_v, channel.current_limit_a = 0.0, channel.model.rated_a
        channel.ovp_level_v, channel.ocp_level_a = channel.model.max_ovp_v, channel.model.max_ocp_a
        channel.ovp_enabled = channel.ocp_enabled = False
    return None


def _error(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    _query_only(query)
    code, text = box.errors.popleft() if box.errors else (0, "No error")
    return f'{code},"{text}"'


def _constant(text: str) -> _Handler:
    def handle(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
        _query_only(query)
        return text

    return handle


def _nothing(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    _set_only(query)
    return None


def _complete(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    if query:
        return "1"
    box.event_status |= 1
    return None


def _event_status(box: Instrument, suffix: int | None, arguments: list[str], query: bool) -> str | None:
    _query_only(query)
    value, box.event_status = box.event_status, 0
    return str(value)


_COMMANDS: tuple[tuple[re.Pattern[str], _Handler], ...] = tuple(
    (_pattern(scpi), handler)
    for scpi, handler in (
        (":*IDN", _identify),
        (":*CLS", _clear_status),
        (":*RST", _reset),
        (":*OPC", _complete),
        (":*ESR", _event_status),
        (":*TST", _constant("0")),
        (":SYSTem:ERRor[:NEXT]", _error),
        (":SYSTem:VERSion", _constant("1999.0")),
        (":SYSTem:REMote", _nothing),
        (":SYSTem:LOCal", _nothing),
        (":INSTrument:NSELect", _select),
        (":INSTrument[:SELEct]", _select),
        (":APPLy", _apply),
        ("[:SOURce[<n>]]:VOLTage[:LEVel][:IMMediate][:AMPLitude]", _settable("voltage_set_v", "max_v", "decimals_v")),
        ("[:SOURce[<n>]]:CURRent[:LEVel][:IMMediate][:AMPLitude]", _settable("current_limit_a", "max_a", "decimals_a")),
        ("[:SOURce[<n>]]:VOLTage:PROTection[:LEVel]", _settable("ovp_level_v", "max_ovp_v", "decimals_v")),
        ("[:SOURce[<n>]]:CURRent:PROTection[:LEVel]", _settable("ocp_level_a", "max_ocp_a", "decimals_a")),
        ("[:SOURce[<n>]]:VOLTage:PROTection:STATe", _flag("ovp_enabled")),
        ("[:SOURce[<n>]]:CURRent:PROTection:STATe", _flag("ocp_enabled")),
        ("[:SOURce[<n>]]:VOLTage:PROTection:TRIPped", _tripped("ovp_tripped")),
        ("[:SOURce[<n>]]:CURRent:PROTection:TRIPped", _tripped("ocp_tripped")),
        ("[:SOURce[<n>]]:VOLTage:PROTection:CLEar", _clear("ovp", restore=True)),
        ("[:SOURce[<n>]]:CURRent:PROTection:CLEar", _clear("ocp", restore=True)),
        (":OUTPut[:STATe]", _output),
        (":OUTPut:MODE", _regulation),
        (":OUTPut:CVCC", _regulation),
        (":OUTPut:OVP[:STATe]", _flag("ovp_enabled")),
        (":OUTPut:OCP[:STATe]", _flag("ocp_enabled")),
        (":OUTPut:OVP:VALue", _settable("ovp_level_v", "max_ovp_v", "decimals_v")),
        (":OUTPut:OCP:VALue", _settable("ocp_level_a", "max_ocp_a", "decimals_a")),
        (":OUTPut:OVP:QUES", _tripped("ovp_tripped")),
        (":OUTPut:OCP:QUES", _tripped("ocp_tripped")),
        (":OUTPut:OVP:ALAR", _tripped("ovp_tripped")),
        (":OUTPut:OCP:ALAR", _tripped("ocp_tripped")),
        (":OUTPut:OVP:CLEAR", _clear("ovp")),
        (":OUTPut:OCP:CLEAR", _clear("ocp")),
        (":MEASure[:VOLTage][:DC]", _measured("v")),
        (":MEASure:CURRent[:DC]", _measured("a")),
        (":MEASure:POWEr[:DC]", _measured("w")),
        (":MEASure:ALL[:DC]", _measured("v", "a", "w")),
    )
)


# --------------------------------------------------------------------------------------------------------- server
@dataclass(slots=True)
class _Wire:
    """State of one client connection."""

    buffer: bytearray = field(default_factory=bytearray)
    deaf: bool = False
    skipping: bool = False


class _Connection(asyncio.Protocol):
    def __init__(self, supply: VirtualSupply) -> None:
        self._supply = supply
        self._wire = _Wire()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"a stream transport was expected, got {type(transport).__name__}")
        self._transport = transport
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._supply.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._supply.connections.discard(self)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        wire = self._wire
        if wire.deaf:
            return
        wire.buffer += data
        while (end := wire.buffer.find(b"\n")) >= 0:
            line = bytes(wire.buffer[:end])
            del wire.buffer[: end + 1]
            if wire.skipping:  # the end of a message that was already given up
                wire.skipping = False
                continue
            if len(line) > MAX_MESSAGE_BYTES:
                self._supply.instrument.push_error(-223, "Too much data")
                continue
            self._message(line.decode("latin-1").strip())
            if wire.deaf or self._transport is None:
                return
        if len(wire.buffer) > MAX_MESSAGE_BYTES:
            wire.buffer.clear()
            if not wire.skipping:
                self._supply.instrument.push_error(-223, "Too much data")
            wire.skipping = True

    def _message(self, text: str) -> None:
        if not text:
            return
        box = self._supply.instrument
        fault = box.take_fault(text)
        kind = fault.kind if fault else None
        if fault and kind == "drop":
            self.abort()
            return
        if fault and kind == "half_open":
            self._wire.deaf = True
            return
        if fault and kind in ("refuse", "ignore"):
            if kind == "refuse":
                box.push_error(-221, "Settings conflict")
            return
        answer = box.execute(text)
        if fault and kind == "garbage":
            answer = fault.text
        if answer is None or kind == "silent":
            return
        if fault and kind == "late":
            asyncio.get_running_loop().call_later(fault.delay_s, self.send, answer)
        else:
            self.send(answer)

    def send(self, answer: str) -> None:
        if self._transport is not None:
            self._transport.write(answer.encode("latin-1") + b"\n")

    def abort(self) -> None:
        """Reset the connection, as a pulled plug on the far side of a firewall would look at best."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None


class VirtualSupply:
    """The server. `start` binds, `stop` cuts every load; between them a 10 ms tick lets time pass.

    `faults` belongs to tests in the same process; nothing on the wire reaches it.
    """

    def __init__(
        self,
        model: str = "rigol-dp800",
        loads: Mapping[int, Load] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.instrument = Instrument(supply_model(model), loads or {}, clock)
        self.connections: set[_Connection] = set()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None

    @property
    def faults(self) -> list[Fault]:
        return self.instrument.faults

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen on a loopback address; port 0 takes a free one (see `port`). BenchError when the port is taken."""
        _require_loopback(host)
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _Connection(self), host, port)
        except OSError as error:
            raise BenchError(
                f"the virtual supply cannot listen on {host}:{port}: {error.strerror or error}",
                hint="another supply may be running there; stop it or choose another port",
            ) from error
        self.port = int(self._server.sockets[0].getsockname()[1])
        self._ticker = loop.create_task(self._tick(), name="virtual-supply-tick")

    async def stop(self) -> None:
        """Switch every output off, drop the clients and close the port. Safe to call twice."""
        now = self.instrument.clock()
        for channel in self.instrument.channels.values():
            channel.switch(False, now)
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
            self._ticker = None
        self.drop_connections()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    def drop_connections(self) -> None:
        """Reset every client, as a power cycle of the network switch would."""
        for connection in tuple(self.connections):
            connection.abort()

    async def _tick(self) -> None:
        while True:
            self.instrument.tick()
            await asyncio.sleep(TICK_S)

    async def __aenter__(self) -> VirtualSupply:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()


async def serve_supply(
    model: str,
    host: str,
    port: int,
    loads: Mapping[int, Load],
    *,
    ready: Callable[[VirtualSupply], None] | None = None,
) -> None:
    """Serve until cancelled, then cut the loads. `ready` is called once the port is bound."""
    supply = VirtualSupply(model, loads)
    await supply.start(host, port)
    try:
        if ready is not None:
            ready(supply)
        await asyncio.Event().wait()
    finally:
        await supply.stop()


DEFAULT_LOAD_LABEL = "modelled board: 12 W for 3 s after power on, then 5 W; locks out below 8.5 V"


def default_loads() -> dict[int, Load]:
    """What `hil virtual supply` hangs on channel 1 when no bench says otherwise; labelled as modelled."""
    return {1: RecordedLoad(((0.0, 12.0), (3.0, 5.0)), undervoltage_lockout_v=8.5)}


def run_supply(model: str, port: int, *, announce: Callable[[str], None] = print) -> None:
    """Serve one supply on 127.0.0.1 until interrupted, with a default load on channel 1."""

    def ready(supply: VirtualSupply) -> None:
        announce(f"{supply.instrument.model.identity} on tcp://127.0.0.1:{supply.port}")
        announce(f"channel 1 carries a {DEFAULT_LOAD_LABEL}")

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve_supply(model, "127.0.0.1", port, default_loads(), ready=ready))


def _require_loopback(host: str) -> None:
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise UsageError(f"a virtual supply listens on loopback only, not on {host}", hint="use 127.0.0.1")


def iter_models() -> Iterable[str]:
    """Names for `hil virtual supply --model`."""
    return MODELS.keys()
