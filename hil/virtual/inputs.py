"""The power inputs of a virtual board, each on a channel: it runs while all are fed, and each carries its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hil.virtual.supply.loads import INPUT_CAPACITANCE_F, UNDERVOLTAGE_LOCKOUT_V


class Fed(Protocol):
    """What the inputs feed: `hil.virtual.board.VirtualBoard`."""

    def set_powered(self, on: bool) -> None: ...

    def power_w(self, now_s: float) -> float: ...


@dataclass(frozen=True, slots=True)
class InputWire:
    """An input on a channel of the bench's supply: fed while its voltage is not below the lock-out.

    `share` of the board's watts is drawn through it. Modelled: nobody measures how a real board spreads its load.
    """

    channel: int
    undervoltage_lockout_v: float = UNDERVOLTAGE_LOCKOUT_V
    share: float = 1.0


class PowerInput:
    """A `Load` of the virtual supply. It draws nothing until all inputs are fed, but what charges its capacitors."""

    def __init__(self, wire: InputWire, board: Fed, changed: Callable[[], None]) -> None:
        self.undervoltage_lockout_v = wire.undervoltage_lockout_v
        self.input_capacitance_f = INPUT_CAPACITANCE_F
        self.powered = False
        self._share = wire.share
        self._board = board
        self._changed = changed

    def set_powered(self, on: bool) -> None:
        """The supply's word on this input; the board's power is that of all."""
        self.powered = on
        self._changed()

    def power_w(self, now_s: float) -> float:
        """Watts through this input now."""
        return self._share * self._board.power_w(now_s)


def power_inputs(board: Fed, wires: Sequence[InputWire]) -> dict[int, PowerInput]:
    """The loads to hang on the supply's channels: `board` is powered when all are fed, and cut with the first one."""
    inputs: dict[int, PowerInput] = {}

    def changed() -> None:
        board.set_powered(all(item.powered for item in inputs.values()))

    inputs |= {wire.channel: PowerInput(wire, board, changed) for wire in wires}
    return inputs
