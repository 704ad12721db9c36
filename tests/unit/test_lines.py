"""Control lines: what is asked of the GPIO library and what is said to a relay board, word by word. No hardware."""

from __future__ import annotations

import errno
import os
import tty
from types import SimpleNamespace
from typing import Any

import pytest

from hil.drivers.codec import InstrumentClosed
from hil.drivers.lines import GpioLine, line_for
from hil.errors import UsageError

gpiod = pytest.importorskip("gpiod")
ACTIVE, INACTIVE = gpiod.line.Value.ACTIVE, gpiod.line.Value.INACTIVE


class Library:
    """The module `gpiod` with its own enumerations and settings, and a request that writes down what is asked."""

    line = gpiod.line
    LineSettings = gpiod.LineSettings

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.failure: OSError | None = None

    def request_lines(self, path: str, *, consumer: str, config: dict[int, Any]) -> Any:
        if self.failure is not None:
            raise self.failure
        self.said.append((path, consumer, config))
        return SimpleNamespace(
            set_value=lambda line, value: self.said.append((line, value)), release=lambda: self.said.append("release")
        )


def test_a_gpio_is_asked_for_inactive_then_pressed_released_and_given_back() -> None:
    library = Library()
    line = GpioLine("/dev/gpiochip1", 17, active_low=True, open_drain=True, library=library)
    line.close()
    assert library.said == []  # never used, never touched
    line.set(True)
    line.set(False)
    line.close()
    line.close()
    (path, consumer, config), *rest = library.said
    assert (path, consumer, list(config)) == ("/dev/gpiochip1", "hil", [17])
    assert config[17] == gpiod.LineSettings(
        direction=gpiod.line.Direction.OUTPUT,
        drive=gpiod.line.Drive.OPEN_DRAIN,
        active_low=True,
        output_value=INACTIVE,
    )
    assert rest == [(17, ACTIVE), (17, INACTIVE), (17, INACTIVE), "release"]


def test_a_line_that_somebody_else_holds_is_said() -> None:
    library = Library()
    library.failure = OSError(errno.EBUSY, "Device or resource busy")
    with pytest.raises(InstrumentClosed, match="line 3 of /dev/gpiochip0: Device or resource busy") as caught:
        GpioLine("/dev/gpiochip0", 3, active_low=False, open_drain=False, library=library).set(True)
    assert "gpioinfo" in caught.value.hint


def test_the_real_library_says_that_there_is_no_such_chip() -> None:
    with pytest.raises(InstrumentClosed, match="No such file"):
        line_for("gpio:///dev/gpiochip999?line=1").set(True)


def test_a_relay_closes_and_opens_its_contact() -> None:
    master, slave = os.openpty()
    tty.setraw(slave)
    line = line_for(f"lcus://{os.ttyname(slave)}?relay=2")
    line.set(True)
    assert os.read(master, 16) == bytes.fromhex("a00201a3")
    line.close()
    assert os.read(master, 16) == bytes.fromhex("a00200a2")
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(
    "address",
    [
        "gpio:///dev/gpiochip0",
        "gpio:///dev/gpiochip0?line=x",
        "gpio:///dev/gpiochip0?line=1&active=maybe",
        "gpio:///dev/gpiochip0?line=1&drive=open-source",
        "gpio:///dev/gpiochip0?line=1&pull=up",
        "gpio://host/dev/gpiochip0?line=1",
        "usb:///dev/ttyUSB0?relay=1",
    ],
)
def test_an_address_that_is_not_understood_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="not understood"):
        line_for(address)
