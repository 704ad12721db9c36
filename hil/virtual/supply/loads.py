"""What hangs on an output: constant power with a lock-out, a resistor, a recorded profile, an inrush of capacitors."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from hil.errors import UsageError

UNDERVOLTAGE_LOCKOUT_V = 8.5  # a 12 V to 19 V compute board's converter, modelled
INPUT_CAPACITANCE_F = 220e-6  # behind its jack, modelled


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


@runtime_checkable
class CapacitiveLoad(Protocol):
    """A load with capacitors at its input: they draw an inrush at power on and hold the load up after power off."""

    input_capacitance_f: float


class ResistiveLoad:
    """A resistor. It has no lock-out and draws V / R."""

    undervoltage_lockout_v = 0.0

    def __init__(self, resistance_ohm: float) -> None:
        if not resistance_ohm > 0.0:
            raise UsageError(f"a resistor of {resistance_ohm:g} ohm is no load", hint="give ohms above zero")
        self.resistance_ohm = resistance_ohm
        self.powered = False

    def power_w(self, now_s: float) -> float:
        return 0.0

    def set_powered(self, on: bool) -> None:
        self.powered = on


class RecordedLoad:
    """A constant-power profile since power on: `profile` is (seconds, watts) steps, each held until the next.

    One step is a plain constant-power load; several are a boot, or what a meter recorded. `input_capacitance_f` adds
    the inrush and the hold-up of the board's input capacitors; without it the load starts and ends with the output.
    Keeps its edges as (time, powered) in `edges`, so that a test can see exactly when the board lost its power.
    """

    def __init__(
        self,
        profile: Sequence[tuple[float, float]],
        undervoltage_lockout_v: float = UNDERVOLTAGE_LOCKOUT_V,
        clock: Callable[[], float] = time.monotonic,
        input_capacitance_f: float = 0.0,
    ) -> None:
        if not profile or any(b[0] < a[0] for a, b in itertools.pairwise(profile)):
            raise UsageError("a recorded load needs (seconds, watts) steps with rising times")
        self.profile = tuple(profile)
        self.undervoltage_lockout_v = undervoltage_lockout_v
        self.input_capacitance_f = input_capacitance_f
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


BOOT_PROFILE = ((0.0, 12.0), (3.0, 5.0))
DEFAULT_LOAD_LABEL = "modelled board: 12 W for 3 s after power on, then 5 W; locks out below 8.5 V"


def default_loads() -> dict[int, Load]:
    """What `hil virtual supply` hangs on channel 1 when no bench says otherwise; labelled as modelled."""
    return {1: RecordedLoad(BOOT_PROFILE)}


def read_profile(path: Path) -> tuple[tuple[float, float], ...]:
    """(seconds, watts) rows of a CSV file; a first line without numbers is its header. UsageError with file:line."""
    rows: list[tuple[float, float]] = []
    try:
        with path.open(newline="") as handle:
            for number, row in enumerate(csv.reader(handle), 1):
                if not row or row[0].lstrip().startswith("#"):
                    continue
                try:
                    rows.append((float(row[0]), float(row[1])))
                except (ValueError, IndexError):
                    if number == 1:
                        continue
                    raise UsageError(f"{path}:{number}: a row is `seconds,watts`, not {','.join(row)!r}") from None
    except OSError as error:
        raise UsageError(f"cannot read the recorded load {path}: {error.strerror or error}") from error
    if not rows:
        raise UsageError(f"{path} holds no `seconds,watts` row")
    return tuple(rows)


_FORMS = "none, board, resistive:OHM, cp:WATTS or recorded:FILE.csv, with `CHANNEL=` before it for another channel"


def parse_load(text: str) -> tuple[int, Load | None]:
    """(channel, load) of a `--load` option such as `cp:15`, `2=resistive:10` or `none`. UsageError lists the forms."""
    channel, _, form = text.rpartition("=") if "=" in text.partition(":")[0] else ("1", "", text)
    kind, _, value = form.partition(":")
    if not channel.isdigit():
        raise UsageError(f"--load {text}: {channel!r} is no channel number", hint=f"loads are {_FORMS}")
    if kind == "none" and not value:
        return int(channel), None
    if kind == "board" and not value:
        return int(channel), RecordedLoad(BOOT_PROFILE, input_capacitance_f=INPUT_CAPACITANCE_F)
    if kind == "recorded" and value:
        return int(channel), RecordedLoad(read_profile(Path(value)))
    try:
        amount = float(value)
        if kind == "resistive":
            return int(channel), ResistiveLoad(amount)
        if kind == "cp" and amount >= 0.0:
            return int(channel), RecordedLoad(((0.0, amount),))
    except ValueError:
        pass
    raise UsageError(f"--load {text} is not understood", hint=f"loads are {_FORMS}")
