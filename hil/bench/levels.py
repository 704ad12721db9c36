"""How well a channel is protected when software fails: its layers, the level they make, the measured time to off.

A: the supply's own watchdog, the dead-man, OVP and OCP. B: dead-man, OVP, OCP and a switched outlet or relay behind the
supply. C: dead-man, OVP and OCP. D: one of those is missing. A bench accepts C or better unless its file says
otherwise (`accept_level`), so that losing a layer is noticed by whoever would have relied on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from hil.drivers.codec import InstrumentError
from hil.drivers.dialects import Capabilities
from hil.drivers.outlets import outlet_for
from hil.errors import BenchError, HilError, SafetyError, UsageError

Level = Literal["A", "B", "C", "D"]
Key = tuple[str, int]
#: What a level is made of, in the order of the levels.
MEANING: Mapping[Level, str] = {
    "A": "supply watchdog, dead-man, OVP and OCP",
    "B": "outlet or relay, dead-man, OVP and OCP",
    "C": "dead-man, OVP and OCP",
    "D": "less than dead-man, OVP and OCP",
}


@dataclass(frozen=True, slots=True)
class CapabilityLevel:
    """A level, and what is missing for a better one."""

    level: Level
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join((f"{self.level} ({MEANING[self.level]})", *self.reasons))


def ocp_acts(capabilities: Capabilities, array: bool) -> bool:
    """Whether a channel has an over-current protection that is switched on.

    An array regulates current wherever a power unit looks for its maximum: a protection that acts there is left off,
    and the curve's short-circuit current, read back, is the limit.
    """
    return capabilities.ocp and not (array and capabilities.ocp_follows_limit)


def capability_level(
    capabilities: Capabilities,
    *,
    deadman: bool = True,
    outlet: str = "",
    watchdog_s: float | None = None,
    array: bool = False,
) -> CapabilityLevel:
    """The level of a channel. `outlet`: empty for none, `confirms` or `deaf`; `watchdog_s` 0: not to be armed.

    `array`: the channel is a solar array; see `ocp_acts`.
    """
    model = capabilities.model
    no_ocp = f"{model} has no over-current protection over remote"
    if capabilities.ocp:
        no_ocp = f"the over-current protection of {model} stays off: it would trip wherever an array limits the current"
    missing = tuple(
        reason
        for present, reason in (
            (capabilities.ovp, f"{model} has no over-voltage protection over remote"),
            (ocp_acts(capabilities, array), no_ocp),
            (deadman, "no dead-man process watches the daemon"),
        )
        if not present
    )
    if missing:
        return CapabilityLevel("D", missing)
    if capabilities.watchdog and watchdog_s != 0:
        return CapabilityLevel("A", ())
    unwatched = (
        "the bench file leaves the supply's watchdog off (`watchdog_s: 0`)"
        if capabilities.watchdog
        else f"{model} has no output watchdog: when the host dies, the output stays as it is"
    )
    if outlet:
        deaf = ("the relay behind it cannot tell whether it obeyed",) if outlet == "deaf" else ()
        return CapabilityLevel("B", (unwatched, *deaf))
    return CapabilityLevel("C", (unwatched, "no switched outlet or relay as a second cut"))


# ------------------------------------------------------------------------------------------------------------ layers
class _Watched(Protocol):
    """The part of `hil.drivers.scpi.Supply` that has to do with its watchdog."""

    @property
    def capabilities(self) -> Capabilities: ...

    async def arm_watchdog(self, delay_s: float) -> None: ...

    async def disarm_watchdog(self) -> None: ...


class SupplyWatchdog:
    """One supply's own watchdog, armed while any channel of this bench is on.

    The instrument has one for all outputs, and every message feeds it. It is armed and read back before each output
    on, and disarmed with the last output off: an instrument that nobody talks to must not cut what a person uses.
    """

    def __init__(self, supply: _Watched, delay_s: float) -> None:
        self.delay_s = delay_s
        self._supply = supply
        self._holders: set[Key] = set()
        self._lock = asyncio.Lock()

    async def hold(self, key: Key) -> bool:
        """Arm it for one channel; False when the supply has none or the bench file leaves it off."""
        if self._supply.capabilities.watchdog is None or self.delay_s == 0:
            return False
        async with self._lock:
            await self._supply.arm_watchdog(self.delay_s)
            self._holders.add(key)
        return True

    async def release(self, key: Key) -> None:
        """The channel is verified off. A watchdog that cannot be disarmed then harms nobody of ours: not an error."""
        async with self._lock:
            if key not in self._holders:
                return
            self._holders.discard(key)
            if not self._holders:
                with contextlib.suppress(InstrumentError, SafetyError):
                    await self._supply.disarm_watchdog()


@dataclass(frozen=True, slots=True)
class Layers:
    """What stands behind a channel besides the daemon, and the lowest level the lab accepts."""

    outlet: str = ""
    watchdog: SupplyWatchdog | None = None
    accept: Level = "C"

    async def level(self, capabilities: Capabilities, *, array: bool = False) -> CapabilityLevel:
        """The level now: an outlet that does not answer is none. SafetyError when it is lower than accepted.

        `array`: the channel is a solar array.
        """
        answer = await asyncio.to_thread(outlet_answer, self.outlet) if self.outlet else OutletAnswer("")
        watchdog_s = None if self.watchdog is None else self.watchdog.delay_s
        found = capability_level(capabilities, outlet=answer.kind, watchdog_s=watchdog_s, array=array)
        if answer.trouble:
            found = CapabilityLevel(found.level, (*found.reasons, answer.trouble))
        if found.level > self.accept:
            raise SafetyError(
                f"the channel has capability level {found.level} and this bench accepts {self.accept} or better: "
                f"{'; '.join(found.reasons)}",
                hint=f"restore what is missing, or consent with `accept_level: {found.level}` at the supply in the "
                "bench file",
            )
        return found


# ------------------------------------------------------------------------------------------------------------ outlet
@dataclass(frozen=True, slots=True)
class OutletAnswer:
    """What an outlet said when asked: `confirms` or `deaf`, empty when there is none or it did not answer."""

    kind: Literal["", "confirms", "deaf"]
    on: bool | None = None
    trouble: str = ""


def outlet_answer(address: str) -> OutletAnswer:
    """Ask an outlet for its state. Blocking; never raises for one that does not answer."""
    if not address:
        return OutletAnswer("")
    try:
        outlet = outlet_for(address)
        if not outlet.confirms:
            return OutletAnswer("deaf")
        return OutletAnswer("confirms", outlet.state())
    except HilError as error:
        return OutletAnswer("", None, f"its outlet is no layer: {error.message}")


@dataclass(frozen=True, slots=True)
class OutletCut:
    """A cut of last resort. `off` only when the outlet itself says so; `said` for the log."""

    off: bool
    said: str


def cut_outlet(address: str) -> OutletCut:
    """Switch an outlet off. Blocking; never raises: whoever calls this has nothing left to fall back to."""
    try:
        outlet = outlet_for(address)
        outlet.switch(False)
    except HilError as error:
        return OutletCut(False, f"outlet {address} failed: {error.message}")
    if outlet.confirms:
        return OutletCut(True, f"outlet {address} says off")
    return OutletCut(False, f"outlet {address} was told to switch off and cannot say whether it did")


# ------------------------------------------------------------------------------------------------ measured time to off
@dataclass(frozen=True, slots=True)
class TimeToOff:
    """One measured cut of a board: seconds from the fault until the terminals measured below the off voltage."""

    board: str
    layer: str
    seconds: float
    t_wall: float
    supply: str


class CutTimes:
    """The measured cuts of a bench, the newest a board and layer, as JSON in its state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, board: str) -> tuple[TimeToOff, ...]:
        """What was measured of a board; empty when nothing was."""
        return tuple(cut for cut in self._all() if cut.board == board)

    def write(self, cut: TimeToOff) -> None:
        """Keep a measurement in place of an older one. BenchError when the disk refuses."""
        kept = [other for other in self._all() if (other.board, other.layer) != (cut.board, cut.layer)]
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps([asdict(item) for item in (*kept, cut)], indent=1))
            os.replace(temporary, self._path)
        except OSError as error:
            raise BenchError(f"cannot write {self._path}: {error.strerror}") from error

    def said(self, board: str) -> str:
        """One line for people."""
        cuts = self.read(board)
        if not cuts:
            return f"not measured: hil doctor --measure-off {board}"
        return "; ".join(f"{cut.layer} {cut.seconds:.2f} s" for cut in cuts)

    def _all(self) -> list[TimeToOff]:
        try:
            raw: Any = json.loads(self._path.read_text())
            return [TimeToOff(**item) for item in raw]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self._path} is not readable: {error}", hint="remove it and measure again") from error
