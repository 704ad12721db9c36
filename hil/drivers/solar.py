"""Hardware solar-array simulators: a curve checked before it is sent, programmed at once, and read back.

The curve is the exponential model that the instruments themselves compute (Britton, Lunscher and Tanju, ESA WPP-054,
1993) between open circuit, short circuit and the point of maximum power. What makes no curve is refused here, because
an instrument that refuses it keeps playing the old one. Entering or leaving the mode switches the output off on some
models and forgets its settings: it is refused while the output is on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hil.drivers.codec import ReadbackError
from hil.drivers.dialects import ChannelRange, Operation
from hil.drivers.dialogue import Dialogue, Pause, Steps
from hil.drivers.scpi import ScpiSupply
from hil.errors import SafetyError, UsageError

#: Points of the table of instruments whose array mode is a table, from 0 to 125 % of the rated voltage.
TABLE_POINTS = 4096
TABLE_SPAN = 1.25
#: How long an instrument with a table is left alone after its mode was entered, and after a table was handed over:
#: until it has loaded, an output that goes on has the plain set voltage.
TABLE_PAUSE_S = 2.0
#: Points that are sent in one turn of the supply, 2 s of an instrument that wants 15 ms between messages: what else is
#: to be said to it, its closing too, waits no longer.
TABLE_TURN = 64


@dataclass(frozen=True, slots=True)
class Curve:
    """Volts and amperes of an array: open circuit, short circuit, maximum power."""

    voc_v: float
    isc_a: float
    vmp_v: float
    imp_a: float

    def check(self) -> None:
        """UsageError when the four values make no array's curve, saying which relation fails.

        Beside 0 < Imp < Isc and 0 < Vmp < Voc the knee must lie above the straight line from (0, Isc) to (Voc, 0), and
        the model's exponent must exist and exceed 1: otherwise power has its maximum somewhere else.
        """
        values = (self.voc_v, self.isc_a, self.vmp_v, self.imp_a)
        if not all(math.isfinite(value) for value in values):
            raise UsageError(f"the values of an array curve must be finite numbers, got {values}")
        if not 0 < self.imp_a < self.isc_a:
            raise UsageError(f"an array curve needs 0 < Imp < Isc, got Imp {self.imp_a:g} A, Isc {self.isc_a:g} A")
        if not 0 < self.vmp_v < self.voc_v:
            raise UsageError(f"an array curve needs 0 < Vmp < Voc, got Vmp {self.vmp_v:g} V, Voc {self.voc_v:g} V")
        knee = self.vmp_v / self.voc_v + self.imp_a / self.isc_a
        if knee <= 1.0:
            raise UsageError(f"an array curve needs Vmp/Voc + Imp/Isc > 1, got {knee:.3f}: its knee bends inwards")
        base = 2.0 - 2.0 ** self._exponent_argument()
        if not 0 < base < 1 or math.log(base) / math.log(self.imp_a / self.isc_a) <= 1.0:
            raise UsageError(
                f"no array curve passes through Voc {self.voc_v:g} V, Isc {self.isc_a:g} A and "
                f"{self.vmp_v:g} V x {self.imp_a:g} A",
                hint="move the point of maximum power towards Voc and Isc",
            )

    def current_a(self, voltage_v: float) -> float:
        """Amperes at a voltage, 0 beyond open circuit. Found by bisection of the model's V(I)."""
        if voltage_v >= self.voc_v:
            return 0.0
        low, high = 0.0, self.isc_a
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.voltage_v(middle) > voltage_v else (low, middle)
        return (low + high) / 2

    def voltage_v(self, current_a: float) -> float:
        """Volts at a current between 0 and Isc."""
        rs = (self.voc_v - self.vmp_v) / self.imp_a
        n = math.log(2.0 - 2.0 ** self._exponent_argument()) / math.log(self.imp_a / self.isc_a)
        bent = self.voc_v * math.log(2.0 - (current_a / self.isc_a) ** n) / math.log(2.0)
        return (bent - rs * (current_a - self.isc_a)) / (1.0 + rs * self.isc_a / self.voc_v)

    def _exponent_argument(self) -> float:
        rs = (self.voc_v - self.vmp_v) / self.imp_a
        return (self.vmp_v * (1.0 + rs * self.isc_a / self.voc_v) + rs * (self.imp_a - self.isc_a)) / self.voc_v


def unasked() -> None:
    """Nobody ends a loading."""


async def play_array(
    supply: ScpiSupply, ch: int, curve: Curve, *, scale: float = 1.0, go_on: Callable[[], object] = unasked
) -> None:
    """Make channel `ch` an array with this curve at `scale` (0.01..1) of its light; the output stays as it is.

    A table takes minutes: `go_on` is asked between its turns, and what it raises ends the loading. UsageError, with
    nothing sent, when the curve makes no sense or leaves the channel's range. SafetyError when the mode would have to
    change while the output is on, ReadbackError when the instrument plays something else.
    """
    curve.check()
    await supply.open()
    limits = _checked(supply, ch, curve)
    if not 0.01 <= scale <= 1.0:
        raise UsageError(f"the light of an array must be 0.01 to 1 of full, got {scale:g}; nothing was sent")
    talk = Dialogue(supply.dialect)
    if supply.dialect.has("sas_point"):
        amperes = await asyncio.to_thread(table_currents, curve, limits.rated_v)  # some 0.3 s of arithmetic
        await supply.converse(_begin_table(talk, ch))
        for first in range(0, len(amperes), TABLE_TURN):
            go_on()
            await supply.converse(_points(talk, ch, first, amperes[first : first + TABLE_TURN]))
        await supply.converse(_end_table(talk, ch, scale))
    else:
        await supply.converse(_play(talk, ch, curve, limits, scale))
    await _raise_refused(supply)


async def dim_array(supply: ScpiSupply, ch: int, curve: Curve, scale: float) -> None:
    """Another light, 0.01..1, on the array that `ch` plays already with this curve at full light; its output may be on.

    Where the instrument has a scale only that is sent, never its table. SafetyError when the channel plays an array no
    more, ReadbackError when it plays something else.
    """
    talk = Dialogue(supply.dialect)
    limits = _checked(supply, ch, curve)
    await supply.converse(_dim(talk, ch, curve, limits, scale))
    await _raise_refused(supply)


async def plays_array(supply: ScpiSupply, ch: int) -> bool:
    """Whether channel `ch` is in its array mode, whatever its output."""
    talk = Dialogue(supply.dialect)
    return (await supply.converse(talk.word("sas_mode", ch))) == "SAS"


async def disarm_ocp(supply: ScpiSupply, ch: int) -> None:
    """Switch off an over-current protection that acts where the channel regulates current, and read that back.

    An array does that at every point left of its maximum: it would be a trip wherever a power unit looks for it.
    """
    talk = Dialogue(supply.dialect)
    if not talk.dialect.has("set_ocp_state"):
        return
    await supply.converse(talk.tell("set_ocp_state", ch, on=False))
    if await supply.converse(talk.flag("get_ocp_state", ch)):
        raise ReadbackError(f"the over-current protection of channel {ch} of {supply.address} stays enabled")


async def leave_array(supply: ScpiSupply, ch: int) -> None:
    """Make channel `ch` an ordinary supply again; its output must be off."""
    await supply.open()
    await supply.converse(_switch_mode(Dialogue(supply.dialect), ch, "FIXED"))


async def _raise_refused(supply: ScpiSupply) -> None:
    if entries := await supply.errors():
        raise ReadbackError(
            f"{supply.address} refused the array curve: {'; '.join(map(str, entries))}",
            hint="it goes on playing the last curve that it took; switch the output off",
        )


def _checked(supply: ScpiSupply, ch: int, curve: Curve) -> ChannelRange:
    can = supply.capabilities
    if not can.solar_array:
        raise UsageError(f"{can.model} at {supply.address} is no solar-array simulator; nothing was sent")
    limits = can.channels.get(ch)
    if limits is None:
        raise UsageError(f"{can.model} at {supply.address} has no channel {ch}")
    if curve.voc_v > limits.voltage_max_v or curve.isc_a > limits.current_max_a:
        raise UsageError(
            f"Voc {curve.voc_v:g} V and Isc {curve.isc_a:g} A leave channel {ch}'s {limits.voltage_max_v:g} V and "
            f"{limits.current_max_a:g} A; nothing was sent"
        )
    return limits


def _switch_mode(talk: Dialogue, ch: int, wanted: str) -> Steps[bool]:
    """Whether the mode had to be switched; SafetyError when the output is on and it would have to be."""
    if (yield from talk.word("sas_mode", ch)) == wanted:
        return False
    if (yield from talk.output_on(ch)):
        raise SafetyError(
            f"channel {ch} is on; switching between supply and array would cut it or change it under the board",
            hint="switch the output off first",
        )
    yield from talk.tell("sas_enter" if wanted == "SAS" else "sas_leave", ch)
    if (yield from talk.word("sas_mode", ch)) != wanted:
        raise ReadbackError(f"channel {ch} did not enter its {wanted.lower()} mode")
    return True


def _play(talk: Dialogue, ch: int, curve: Curve, limits: ChannelRange, scale: float) -> Steps[None]:
    yield from _switch_mode(talk, ch, "SAS")
    yield from _four_values(talk, ch, curve, limits, scale)


def _begin_table(talk: Dialogue, ch: int) -> Steps[None]:
    if (yield from _switch_mode(talk, ch, "SAS")):
        yield Pause(TABLE_PAUSE_S)


def _points(talk: Dialogue, ch: int, first: int, amperes: Sequence[float]) -> Steps[None]:
    for index, value in enumerate(amperes, first):
        yield from talk.tell("sas_point", ch, index=index, a=value)


def _end_table(talk: Dialogue, ch: int, scale: float) -> Steps[None]:
    yield from _still_array(talk, ch)  # leaving the mode loses the table
    yield from talk.tell("sas_submit", ch)
    yield Pause(TABLE_PAUSE_S)
    yield from _scale(talk, ch, scale)


def _still_array(talk: Dialogue, ch: int) -> Steps[None]:
    if (yield from talk.word("sas_mode", ch)) != "SAS":
        raise SafetyError(
            f"channel {ch} plays an array no more",
            hint="somebody left its mode, or the instrument was restarted: what it feeds now is not the mission's",
        )


def _dim(talk: Dialogue, ch: int, curve: Curve, limits: ChannelRange, scale: float) -> Steps[None]:
    yield from _still_array(talk, ch)
    if talk.dialect.has("sas_scale"):
        yield from _scale(talk, ch, scale)
    else:
        yield from _four_values(talk, ch, curve, limits, scale)


def _four_values(talk: Dialogue, ch: int, curve: Curve, limits: ChannelRange, scale: float) -> Steps[None]:
    if not talk.dialect.has("sas_scale"):
        curve = Curve(curve.voc_v, curve.isc_a * scale, curve.vmp_v, curve.imp_a * scale)
    yield from talk.tell("sas_curve", ch, voc=curve.voc_v, isc=curve.isc_a, vmp=curve.vmp_v, imp=curve.imp_a)
    if talk.dialect.has("sas_submit"):
        yield from talk.tell("sas_submit", ch)
    if talk.dialect.has("sas_scale"):
        yield from _scale(talk, ch, scale)
    yield from _agree(talk, ch, "sas_get_voc", curve.voc_v, limits.voltage_step_v, "V")
    yield from _agree(talk, ch, "sas_get_vmp", curve.vmp_v, limits.voltage_step_v, "V")
    yield from _agree(talk, ch, "sas_get_isc", curve.isc_a, limits.current_step_a, "A")
    yield from _agree(talk, ch, "sas_get_imp", curve.imp_a, limits.current_step_a, "A")


def _scale(talk: Dialogue, ch: int, scale: float) -> Steps[None]:
    yield from talk.tell("sas_scale", ch, percent=scale * 100.0)
    yield from _agree(talk, ch, "sas_get_scale", scale * 100.0, 0.5, "%")


def table_currents(curve: Curve, rated_v: float) -> list[float]:
    """The currents of an array table, amperes: 4096 points from 0 to 125 % of the rated voltage."""
    step_v = rated_v * TABLE_SPAN / (TABLE_POINTS - 1)
    return [curve.current_a(index * step_v) for index in range(TABLE_POINTS)]


def _agree(talk: Dialogue, ch: int, ask: Operation, wanted: float, step: float, unit: str) -> Steps[None]:
    read = yield from talk.value(ask, ch)
    if abs(read - wanted) > step + 1e-9:
        raise ReadbackError(
            f"channel {ch}: {ask.removeprefix('sas_get_')} was set to {wanted:g} {unit} but reads back {read:g} {unit}",
            hint="the instrument goes on playing the last curve that it took",
        )
