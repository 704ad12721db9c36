"""A second meter that only measures: the board's own INA226 or INA3221, read from sysfs through any `run`.

The kernel's hwmon interface: `inN_label` names a rail, `inN_input` is millivolts, `currN_input` milliamperes,
`power1_input` microwatts where the chip computes them. Found by label or by the chip's name, never by hwmon number,
which changes from boot to boot. The board measures behind its own converters: what the supply shows beyond it is the
carrier's overhead, and a meter that shows more than the supply is a fault of one of the two.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hil.drivers.codec import ReplyError
from hil.errors import BenchError, UsageError
from hil.model import Reading

#: Chips that these drivers serve.
CHIPS = ("ina226", "ina219", "ina3221")
Run = Callable[[Sequence[str]], str]

_LIST = (
    "for d in /sys/class/hwmon/hwmon*; do "
    'for f in "$d"/name "$d"/in*_label; do [ -r "$f" ] && printf "%s %s\\n" "$f" "$(cat "$f")"; done; '
    "done; true"
)


@dataclass(frozen=True, slots=True)
class Rail:
    """One measured rail: its directory below /sys/class/hwmon, its channel there and its name."""

    directory: str
    channel: int
    label: str


def find_rail(run: Run, label: str = "") -> Rail:
    """The rail called `label` (say `VDD_IN`), or the only channel of a single-channel chip.

    `run` runs a command on the board and returns what it printed. UsageError names the rails that are there.
    """
    rails = list(_rails(run(["sh", "-c", _LIST])))
    found = [rail for rail in rails if rail.label == label] if label else rails
    if len(found) != 1:
        names = ", ".join(rail.label for rail in rails) or "none"
        raise UsageError(
            f"the board has {'no' if not found else 'several'} current meter{'s' if len(found) > 1 else ''}"
            f"{f' called {label!r}' if label else ''}",
            hint=f"its rails: {names}",
        )
    return found[0]


def _rails(listing: str) -> list[Rail]:
    """What the listing names: every labelled channel of a chip we know, or channel 1 of one without labels.

    The INA2xx driver has the shunt at `in0` and the bus at `in1`; the INA3221's bus channels are 1 to 3.
    """
    chips: dict[str, str] = {}
    labels: dict[str, list[tuple[int, str]]] = {}
    for line in listing.splitlines():
        path, _, value = line.strip().partition(" ")
        directory, _, name = path.rpartition("/")
        if name == "name":
            chips[directory] = value
        elif found := re.fullmatch(r"in(\d+)_label", name):
            labels.setdefault(directory, []).append((int(found.group(1)), value))
    rails = []
    for directory, chip in sorted(chips.items()):
        if chip in CHIPS:
            named = [(n, text) for n, text in labels.get(directory, []) if n >= 1 and not text.startswith("sum of")]
            rails += [Rail(directory, n, text) for n, text in named if n <= 3] or [Rail(directory, 1, chip)]
    return rails


class BoardMeter:
    """Volts, amperes and watts of one rail. Measures only: there is nothing to set."""

    def __init__(self, run: Run, rail: Rail, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.rail = rail
        self._run = run
        self._clock = clock

    def measure(self) -> Reading:
        """One sample; blocking. `output_on` is true because the board answered. ReplyError for anything else."""
        base = f"{self.rail.directory}/"
        volts_file, amps_file = f"{base}in{self.rail.channel}_input", f"{base}curr{self.rail.channel}_input"
        start = self._clock()
        printed = self._run(["cat", volts_file, amps_file])
        end = self._clock()
        try:
            millivolts, milliamperes = (int(word) for word in printed.split())
        except ValueError:
            raise ReplyError(f"{self.rail.label}: expected millivolts and milliamperes, got {printed!r}") from None
        volts, amperes = millivolts / 1000.0, milliamperes / 1000.0
        return Reading((start + end) / 2, volts, amperes, volts * amperes, True, end - start)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two meters on one board: watts of each, and the share by which the board's may lie below the supply's.

    `share` and `offset_w` are what the two may be wrong by together.
    """

    supply_w: float
    board_w: float
    overhead_max: float
    share: float = 0.03
    offset_w: float = 0.2

    @property
    def finding(self) -> str:
        """Why they cannot both be right, or an empty text. A board cannot take more than its supply gives."""
        if self.board_w > self.supply_w * (1.0 + self.share) + self.offset_w:
            return f"the second meter shows {self.board_w:g} W, more than the supply's {self.supply_w:g} W"
        if self.board_w < self.supply_w * (1.0 - self.overhead_max) * (1.0 - self.share) - self.offset_w:
            return (
                f"the second meter shows {self.board_w:g} W of the supply's {self.supply_w:g} W: more than "
                f"{self.overhead_max:.0%} lost on the way"
            )
        return ""


def compare(supply: Reading, board: Reading, *, overhead_max: float = 0.35, apart_max_s: float = 0.5) -> Comparison:
    """Two readings side by side; BenchError when they were not taken at the same time."""
    if abs(supply.time_s - board.time_s) > apart_max_s:
        raise BenchError(f"the two meters were read {abs(supply.time_s - board.time_s):.2f} s apart; compare none")
    return Comparison(supply.power_w, board.power_w, overhead_max)
