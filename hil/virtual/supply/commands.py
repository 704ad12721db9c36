"""Handlers that most dialects share: IEEE 488.2, a channel's numbers and switches, measurements."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from hil.virtual.supply.instrument import Instrument
from hil.virtual.supply.language import Handler, Request, Row, ScpiFault, boolean, query_only, real, set_only
from hil.virtual.supply.physics import Channel

Pick = Callable[[Request], Sequence[Channel]]
Show = Callable[[float], str]


def fixed(decimals: int) -> Show:
    """Plain decimals."""
    return lambda value: f"{value:.{decimals}f}"


def exponent(value: float) -> str:
    """The NR3 form of Keysight's instruments."""
    return f"{value:+.8E}"


def onoff(value: bool) -> str:
    return "ON" if value else "OFF"


def digit(value: bool) -> str:
    return "1" if value else "0"


def constant(text: str) -> Handler:
    def handle(request: Request) -> str | None:
        query_only(request)
        return text

    return handle


def nothing(request: Request) -> str | None:
    """Accepted and without effect here."""
    set_only(request)
    return None


def queue_entry(code: int, text: str) -> str:
    return f'{code},"{text}"'


def signed_entry(code: int, text: str) -> str:
    return f'{code:+d},"{text}"'


def common(box: Instrument, entry: Callable[[int, str], str] = queue_entry) -> list[Row]:
    """IEEE 488.2 and `SYSTem:ERRor?`, with the maker's way to write a queue entry."""

    def clear_status(request: Request) -> str | None:
        set_only(request)
        box.errors.clear()
        box.event_status = 0
        return None

    def reset(request: Request) -> str | None:
        set_only(request)
        box.reset()
        return None

    def complete(request: Request) -> str | None:
        if request.query:
            return "1"
        box.event_status |= 1
        return None

    def event_status(request: Request) -> str | None:
        query_only(request)
        value, box.event_status = box.event_status, 0
        return str(value)

    def error(request: Request) -> str | None:
        query_only(request)
        return entry(*box.pop_error())

    def status_byte(request: Request) -> str | None:
        query_only(request)
        return str((4 if box.errors else 0) | (32 if box.event_status else 0))

    return [
        (":*IDN", constant(box.model.identity)),
        (":*CLS", clear_status),
        (":*RST", reset),
        (":*OPC", complete),
        (":*ESR", event_status),
        (":*STB", status_byte),
        (":*TST", constant("0")),
        (":SYSTem:ERRor[:NEXT]", error),
        (":SYSTem:VERSion", constant("1999.0")),
    ]


def accessors(attribute: str) -> tuple[Callable[[Channel], Any], Callable[[Channel, object], None]]:
    """How to read and write a path such as `ovp.level` of a channel."""
    owner, _, name = attribute.rpartition(".")

    def write(channel: Channel, value: object) -> None:
        setattr(getattr(channel, owner) if owner else channel, name, value)

    return operator.attrgetter(attribute), write


class Handlers:
    """Makes handlers for one instrument; `pick` finds the channels a command means and takes them off its arguments."""

    def __init__(self, box: Instrument, pick: Pick, *, volts: Show, amperes: Show, watts: Show) -> None:
        self.box = box
        self.pick = pick
        self.volts, self.amperes, self.watts = volts, amperes, watts

    def level(
        self,
        attribute: str,
        top: str,
        show: Show,
        decimals: int,
        *,
        low: float = 0.0,
    ) -> Handler:
        """A number of a channel: set within its range on its grid, or read back (`MIN`, `MAX` ask for the range).

        `attribute` is a path from the channel, `top` names the limit in its model.
        """
        read, write = accessors(attribute)

        def handle(request: Request) -> str | None:
            channels = self.pick(request)
            if request.query:
                values = [
                    real(request.arguments, low, getattr(c.model, top)) if request.arguments else read(c)
                    for c in channels
                ]
                return ",".join(map(show, values))
            # every channel is checked before any is changed
            wanted = [real(request.arguments, low, getattr(c.model, top)) for c in channels]
            for channel, value in zip(channels, wanted, strict=True):
                write(channel, round(value, decimals))
            return None

        return handle

    def voltage(self) -> Handler:
        return self.level("voltage_set_v", "max_v", self.volts, self.box.model.decimals_v)

    def current(self) -> Handler:
        return self.level("current_limit_a", "max_a", self.amperes, self.box.model.decimals_a)

    def ovp_level(self) -> Handler:
        places = self.box.model.decimals_v
        return self.level("ovp.level", "max_ovp_v", self.volts, places, low=10.0**-places)

    def ocp_level(self) -> Handler:
        places = self.box.model.decimals_a
        return self.level("ocp.level", "max_ocp_a", self.amperes, places, low=10.0**-places)

    def span(self, attribute: str, low: float, high: float, show: Show, scale: float = 1.0) -> Handler:
        """A number of a channel with a range that is the same for all, `scale` wire units each SI unit."""
        read, write = accessors(attribute)

        def handle(request: Request) -> str | None:
            channels = self.pick(request)
            if request.query:
                return ",".join(
                    show(real(request.arguments, low, high) if request.arguments else read(c) * scale) for c in channels
                )
            value = real(request.arguments, low, high) / scale
            for channel in channels:
                write(channel, value)
            return None

        return handle

    def flag(self, attribute: str, show: Callable[[bool], str] = digit) -> Handler:
        """A switch of a channel."""
        read, write = accessors(attribute)

        def handle(request: Request) -> str | None:
            channels = self.pick(request)
            if request.query:
                return ",".join(show(read(c)) for c in channels)
            value = boolean(request.arguments)
            for channel in channels:
                write(channel, value)
            return None

        return handle

    def told(self, attribute: str, show: Callable[[bool], str] = digit) -> Handler:
        """A flag that can only be asked, such as a trip."""
        read = operator.attrgetter(attribute)

        def handle(request: Request) -> str | None:
            query_only(request)
            return ",".join(show(read(c)) for c in self.pick(request))

        return handle

    def measured(self, *what: str) -> Handler:
        """`v`, `a`, `w` at the terminals, in this order."""

        def one(channel: Channel, name: str) -> str:
            if name == "v":
                return self.volts(channel.terminal_v)
            if name == "a":
                return self.amperes(channel.current_a)
            return self.watts(channel.terminal_v * channel.current_a)

        def handle(request: Request) -> str | None:
            query_only(request)
            return ",".join(one(channel, name) for channel in self.pick(request) for name in what)

        return handle

    def clear(self, *kinds: str, restore: bool = False) -> Handler:
        """Forget trips: `ovp`, `ocp`, `other`."""

        def handle(request: Request) -> str | None:
            set_only(request)
            for channel in self.pick(request):
                channel.clear_trip(
                    self.box.clock(),
                    ovp="ovp" in kinds,
                    ocp="ocp" in kinds,
                    other="other" in kinds,
                    restore=restore,
                )
            return None

        return handle

    def output(self, show: Callable[[bool], str] = digit, *, refuse_tripped: bool = True) -> Handler:
        """The output switch; a tripped channel refuses to come on unless its maker says otherwise."""

        def handle(request: Request) -> str | None:
            channels = self.pick(request)
            if request.query:
                return ",".join(show(c.enabled) for c in channels)
            state = boolean(request.arguments)
            if state and refuse_tripped and any(c.tripped for c in channels):
                raise ScpiFault(-221, "Settings conflict")
            for channel in channels:
                channel.switch(state, self.box.clock())
            return None

        return handle


def one_channel(box: Instrument, number: int) -> Channel:
    """A channel by number, or the error a maker gives for one that is not there."""
    try:
        return box.channels[number]
    except KeyError:
        raise ScpiFault(-224, "Illegal parameter value") from None


def selected(box: Instrument) -> Pick:
    """Every command means the channel that was selected before."""
    return lambda request: (box.channels[box.selected],)


def select_handler(box: Instrument, *prefixes: str) -> Handler:
    """`INSTrument` by number or name: `CH2`, `OUT2`, `2`."""

    def handle(request: Request) -> str | None:
        if request.query:
            return str(box.selected)
        if not request.arguments:
            raise ScpiFault(-109, "Missing parameter")
        name = request.arguments[0].upper()
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        if not name.isdigit():
            raise ScpiFault(-224, "Illegal parameter value")
        one_channel(box, int(name))
        box.selected = int(name)
        return None

    return handle
