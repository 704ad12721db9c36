"""Control lines of a board (power button, reset, recovery), asserted by a GPIO of this host or by a USB relay.

    gpio:///dev/gpiochip0?line=17&active=low&drive=open-drain    `active` high or low, `drive` push-pull or open-drain
    lcus:///dev/ttyUSB1?relay=2                                  a relay of an LCUS board, its contact across the button

A GPIO is held by this process from first use to `close` (extra `gpiod`), so that nobody else can drive it; it is made
inactive before it is given back, because what a chip does with a line that nobody holds is its own affair. A relay is
opened for each switch. Blocking: the daemon calls these on a thread. Not run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from hil.drivers.codec import InstrumentClosed
from hil.drivers.outlets import LcusRelay, outlet_for
from hil.errors import UsageError


class Line(Protocol):
    """One control line. `InstrumentClosed` when its hardware cannot be reached."""

    def set(self, active: bool) -> None:
        """Assert the line, or let go of it."""
        ...

    def close(self) -> None:
        """Let go of it and give the hardware back."""
        ...


def line_for(address: str) -> Line:
    """The line behind an address; nothing is opened yet. UsageError when the address is not understood."""
    parts = urlsplit(address)
    if parts.scheme == "lcus":
        relay = outlet_for(address)
        if isinstance(relay, LcusRelay):
            return RelayLine(relay)
    words = {key: values[0] for key, values in parse_qs(parts.query).items()}
    number = words.pop("line", "")
    active, drive = words.pop("active", "high"), words.pop("drive", "push-pull")
    well_formed = parts.scheme == "gpio" and not parts.netloc and len(parts.path) > 1 and number.isdigit() and not words
    if not well_formed or active not in ("high", "low") or drive not in ("push-pull", "open-drain"):
        raise UsageError(
            f"line address {address!r} is not understood",
            hint="write gpio:///dev/gpiochip0?line=17&active=low&drive=open-drain or lcus:///dev/ttyUSB1?relay=2",
        )
    return GpioLine(parts.path, int(number), active_low=active == "low", open_drain=drive == "open-drain")


class RelayLine:
    """A relay across a button: closed presses it. Nothing tells whether it obeyed."""

    def __init__(self, relay: LcusRelay) -> None:
        self._relay = relay

    def set(self, active: bool) -> None:
        self._relay.switch(active)

    def close(self) -> None:
        self.set(False)


class GpioLine:
    """A line of a GPIO character device. `library` is the module `gpiod`, imported at first use without."""

    def __init__(self, chip: str, offset: int, *, active_low: bool, open_drain: bool, library: Any = None) -> None:
        self._chip, self._offset = chip, offset
        self._active_low, self._open_drain = active_low, open_drain
        self._library = library
        self._request: Any = None

    def set(self, active: bool) -> None:
        gpiod = self._need_library()
        value = gpiod.line.Value.ACTIVE if active else gpiod.line.Value.INACTIVE
        if self._request is None:
            self._request = self._tried(lambda: self._asked_for(gpiod))
        self._tried(lambda: self._request.set_value(self._offset, value))

    def close(self) -> None:
        if self._request is not None:
            request = self._request
            self.set(False)
            self._request = None
            self._tried(request.release)

    def _asked_for(self, gpiod: Any) -> Any:
        kinds = gpiod.line.Drive
        settings = gpiod.LineSettings(
            direction=gpiod.line.Direction.OUTPUT,
            drive=kinds.OPEN_DRAIN if self._open_drain else kinds.PUSH_PULL,
            active_low=self._active_low,
            output_value=gpiod.line.Value.INACTIVE,  # asking for a line must not press the button
        )
        return gpiod.request_lines(self._chip, consumer="hil", config={self._offset: settings})

    def _tried(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            raise InstrumentClosed(
                f"line {self._offset} of {self._chip}: {error.strerror or error}",
                hint="does the chip exist, may this user open it, does another process hold the line (gpioinfo)?",
            ) from error

    def _need_library(self) -> Any:
        if self._library is None:
            try:
                import gpiod
                import gpiod.line
            except ImportError:
                raise UsageError("GPIO lines need the Python package gpiod", hint="pip install 'hil[gpiod]'") from None
            self._library = gpiod
        return self._library
