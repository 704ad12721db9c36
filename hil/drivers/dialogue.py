"""What is said to a supply for each operation, and how its answers are read, without any I/O.

Every method is a generator: it yields messages and pauses, is sent the replies, and returns the result. Whoever owns a
line runs it: the daemon's driver on the event loop, the dead-man on a blocking socket. So both say the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from hil.drivers.codec import (
    LINE,
    ErrorEntry,
    Frame,
    Identity,
    InstrumentRefused,
    parse_error_entry,
    parse_flag,
    parse_identity,
    parse_register,
    parse_values,
    parse_word,
)
from hil.drivers.dialects.base import Capabilities, ChannelRange, Dialect, Operation
from hil.errors import BenchError, SafetyError

MAX_ERRORS = 32
LIST_LATE_S = 0.5  # a list that should have ended may still run for so long

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Say:
    """One message without terminator. `frame` None: no answer is expected. `stray` bytes may follow the answer."""

    text: str
    frame: Frame | None = None
    stray: int = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """Let the instrument work for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class LoadedList:
    """What the instrument says of the list that it was told. Volts, seconds."""

    voltage_v: float
    dwell_s: float
    count: float
    ends_low: bool
    voltage_mode: str
    current_mode: str

    def differs(self, low_v: float, seconds: float, step_v: float) -> list[str]:
        """What is not as in a dip to `low_v` for `seconds` that ends by itself; empty when all is."""
        wrong = {
            f"{self.voltage_v:g} V instead of {low_v:g} V": abs(self.voltage_v - low_v) > step_v * 0.5 + 1e-9,
            # an N6700 keeps a dwell to within 40 ppm
            f"{self.dwell_s:g} s instead of {seconds:g} s": abs(self.dwell_s - seconds) > 1e-4 * seconds,
            f"{self.count:g} times": self.count != 1,
            "stays at its last step": self.ends_low,
            f"voltage mode {self.voltage_mode}": self.voltage_mode != "LIST",
            f"current mode {self.current_mode}": self.current_mode != "FIXED",
        }
        return [what for what, is_wrong in wrong.items() if is_wrong]


Steps = Generator[Say | Pause, str, T]
Protection = Literal["ovp", "ocp", "opp"]
PROTECTIONS: tuple[Protection, ...] = ("ovp", "ocp", "opp")

#: Bits of `*ESR?` that mean a refusal, for instruments without an error queue.
_EVENT_BITS = ((0x20, "command error"), (0x10, "execution error"), (0x08, "verify time-out"), (0x04, "query error"))


def _op(text: str) -> Any:
    """An operation's name put together from parts; the command table is the check."""
    return text


class Dialogue:
    """The sentences of one dialect. Channels are the instrument's own numbers, from 1."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._questions: dict[tuple[Operation, int], tuple[Say, ...]] = {}

    # --------------------------------------------------------------------------------------------- sentences
    def tell(self, operation: Operation, ch: int = 0, **values: float | bool) -> Steps[None]:
        """Say something that has no answer."""
        for text in self.dialect.messages(operation, ch, **values):
            yield Say(text)

    def ask(self, operation: Operation, ch: int = 0) -> Steps[str]:
        """Ask, and return the reply as it came."""
        said = self._questions.get((operation, ch))
        if said is None:
            reply = self.dialect.command(operation).reply
            *before, last = self.dialect.messages(operation, ch)
            frame = Frame(reply.length) if reply.length else LINE
            said = (*(Say(text) for text in before), Say(last, frame, reply.stray))
            self._questions[operation, ch] = said
        answer = ""
        for message in said:
            answer = yield message
        return answer

    def values(self, operation: Operation, ch: int = 0) -> Steps[tuple[float, ...]]:
        """Ask for numbers."""
        reply = yield from self.ask(operation, ch)
        return parse_values(reply, self.dialect.commands[operation].reply, ch)

    def value(self, operation: Operation, ch: int = 0) -> Steps[float]:
        """Ask for one number."""
        return (yield from self.values(operation, ch))[0]

    def flag(self, operation: Operation, ch: int = 0) -> Steps[bool]:
        """Ask for yes or no."""
        reply = yield from self.ask(operation, ch)
        return parse_flag(reply, self.dialect.commands[operation].reply, ch)

    def word(self, operation: Operation, ch: int = 0) -> Steps[str]:
        """Ask for one of the words of the command's reply, as we call it."""
        reply = yield from self.ask(operation, ch)
        return parse_word(reply, self.dialect.commands[operation].reply, ch)

    # ----------------------------------------------------------------------------------------------- opening
    def identify(self) -> Steps[Identity]:
        """Empty the status, ask who it is."""
        if self.dialect.has("clear_status"):
            yield from self.tell("clear_status")
        return parse_identity((yield from self.ask("identify")))

    def take_remote(self, serial: bool) -> Steps[None]:
        """Take the remote control where settings are refused without it; BenchError when it is not given."""
        if not self.dialect.has("take_remote") or ("remote_on_serial_only" in self.dialect.quirks and not serial):
            return
        yield from self.tell("take_remote")
        if self.dialect.has("get_remote"):
            owner = yield from self.word("get_remote", 1)
            if owner != "REMOTE":
                raise BenchError(
                    f"the instrument refuses remote control (it says {owner})",
                    hint="leave its menu and unlock it at the front panel",
                )

    def limits(self, capabilities: Capabilities) -> Steps[Capabilities]:
        """The record with the channel ranges that the instrument itself names."""
        if capabilities.limits != "ask":
            return capabilities
        found: dict[int, ChannelRange] = {}
        count = len(capabilities.channels)
        if self.dialect.has("channel_count"):
            count = int((yield from self.value("channel_count")))
        for ch, known in capabilities.channels.items():
            if ch > count:
                break
            volts = yield from self.value("max_voltage", ch)
            amperes = yield from self.value("max_current", ch)
            ovp_v = (yield from self.value("max_ovp", ch)) if self.dialect.has("max_ovp") else known.ovp_max_v
            found[ch] = replace(
                known, voltage_max_v=volts, current_max_a=amperes, ovp_max_v=ovp_v, rated_v=volts, rated_a=amperes
            )
        return replace(capabilities, channels=MappingProxyType(found))

    def check_independent(self) -> Steps[None]:
        """SafetyError when the channels are coupled: what is set on one would appear on the other."""
        if self.dialect.has("get_tracking") and (yield from self.flag("get_tracking")):
            raise SafetyError(
                "its channels are coupled in series or in parallel", hint="set independent mode at the front panel"
            )

    # ---------------------------------------------------------------------------------------------- outputs
    def output_on(self, ch: int) -> Steps[bool]:
        """Whether the channel feeds its terminals: its own switch, the master's, and no trip behind its back."""
        on = yield from self.flag("get_output", ch)
        if on and self.dialect.has("get_master"):
            on = yield from self.flag("get_master")
        if on and "output_reply_lies" in self.dialect.quirks:
            on = not (yield from self.trips(ch))
        return on

    def dip(
        self, dips: Mapping[int, tuple[float, float]], seconds: float, clock: Callable[[], float]
    ) -> Steps[dict[int, tuple[float, float, float]]]:
        """Another voltage for a while on each of `dips`: channel to volts (low, back), with nothing asked in between.

        By channel (when its low voltage was written, seconds until its old one was, volts read back).
        """
        began: dict[int, float] = {}
        lasted: dict[int, float] = {}
        for ch, (low_v, _) in dips.items():
            yield from self.tell("set_voltage", ch, v=low_v)
            began[ch] = clock()
        for ch, (_, back_v) in dips.items():
            yield Pause(max(0.0, began[ch] + seconds - clock()))
            yield from self.tell("set_voltage", ch, v=back_v)
            lasted[ch] = clock() - began[ch]
        found = {}
        for ch in dips:
            found[ch] = (began[ch], lasted[ch], (yield from self.value("get_voltage", ch)))
        return found

    def load_list(self, ch: int, low_v: float, seconds: float) -> Steps[LoadedList]:
        """Tell the instrument a dip as a list of one step, and ask all of it back. It is not started."""
        yield from self.tell("load_list", ch, v=low_v, t=seconds)
        volts = yield from self.value("get_list_voltage", ch)
        dwell_s = yield from self.value("get_list_dwell", ch)
        count = yield from self.value("get_list_count", ch)
        ends_low = yield from self.flag("get_list_last", ch)
        voltage_mode = yield from self.word("get_voltage_mode", ch)
        return LoadedList(volts, dwell_s, count, ends_low, voltage_mode, (yield from self.word("get_current_mode", ch)))

    def play_lists(
        self, channels: Sequence[int], seconds: float, clock: Callable[[], float]
    ) -> Steps[dict[int, tuple[float, bool]]]:
        """Start the lists and say nothing while they play; by channel (started, whether it ended as far as said)."""
        began = {}
        for ch in channels:
            yield from self.tell("start_list", ch)
            began[ch] = clock()
        yield Pause(seconds)
        found = {}
        for ch in channels:
            found[ch] = (began[ch], (yield from self._list_ended(ch)))
        return found

    def _list_ended(self, ch: int) -> Steps[bool]:
        if not self.dialect.has("list_running"):
            yield Pause(LIST_LATE_S / 5)  # no question for it: what it needs to begin
            return True
        for _ in range(10):
            if not (yield from self.flag("list_running", ch)):
                return True
            yield Pause(LIST_LATE_S / 10)
        return False

    def stop_list(self, ch: int) -> Steps[str]:
        """End a list, running or not, and go back to the set point; the mode of the voltage then."""
        yield from self.tell("abort_list", ch)
        yield from self.tell("fix_voltage", ch)
        return (yield from self.word("get_voltage_mode", ch))

    def switch_off(self, ch: int) -> Steps[None]:
        """Off. The master stays: other channels may feed other boards."""
        return (yield from self.tell("set_output", ch, on=False))

    def switch_on(self, ch: int, all_channels: Sequence[int]) -> Steps[None]:
        """On. A master that is off is only closed when no other channel would go on with it (SafetyError)."""
        master_on = True
        if self.dialect.has("set_master"):
            master_on = yield from self.flag("get_master")
            for other in () if master_on else all_channels:
                if other != ch and (yield from self.flag("get_output", other)):
                    raise SafetyError(
                        f"the master switch is off and channel {other} is selected: it would go on with channel {ch}",
                        hint=f"deselect channel {other} at the instrument when nothing depends on it",
                    )
        yield from self.tell("set_output", ch, on=True)
        if not master_on:
            yield from self.tell("set_master", on=True)

    def measured(self, ch: int) -> Steps[tuple[float, float, float]]:
        """Volts, amperes and watts; watts are the product where the instrument does not measure them."""
        if self.dialect.has("measure"):
            volts, amperes, watts = yield from self.values("measure", ch)
            return volts, amperes, watts
        volts = yield from self.value("measure_voltage", ch)
        amperes = yield from self.value("measure_current", ch)
        return volts, amperes, volts * amperes

    def measured_voltage(self, ch: int) -> Steps[float]:
        """Volts alone."""
        if self.dialect.has("measure_voltage"):
            return (yield from self.value("measure_voltage", ch))
        return (yield from self.values("measure", ch))[0]

    def regulation(self, ch: int) -> Steps[str]:
        """`CV`, `CC`, `UR` (unregulated), or `unknown` where the instrument does not say."""
        if not self.dialect.has("regulation"):
            return "unknown"
        return (yield from self.word("regulation", ch))

    # ------------------------------------------------------------------------------------------- protections
    def trips(self, ch: int) -> Steps[tuple[str, ...]]:
        """What is latched: any of `ovp`, `ocp`, `opp`, `watchdog`."""
        found = []
        seen: dict[str, str] = {}  # several bits of one register are one question, which matters if reading clears it
        for name in (*PROTECTIONS, "watchdog"):
            operation: Operation = _op(f"{name}_tripped")
            if not self.dialect.has(operation):
                continue
            text = self.dialect.commands[operation].text
            if text not in seen:
                seen[text] = yield from self.ask(operation, ch)
            if parse_flag(seen[text], self.dialect.commands[operation].reply, ch):
                found.append(name)
        return tuple(found)

    def protect(self, ch: int, name: Protection, level: float) -> Steps[tuple[float | None, bool]]:
        """Set a threshold and switch it on; (threshold as read back or None, whether it is on)."""
        read: float | None = None
        enabled = True
        if self.dialect.has(_op(f"set_{name}_level")):
            yield from self.tell(_op(f"set_{name}_level"), ch, v=level, a=level, w=level)
        if self.dialect.has(_op(f"set_{name}_state")):
            yield from self.tell(_op(f"set_{name}_state"), ch, on=True)
        if self.dialect.has(_op(f"get_{name}_level")):
            read = yield from self.value(_op(f"get_{name}_level"), ch)
        if self.dialect.has(_op(f"get_{name}_state")):
            enabled = yield from self.flag(_op(f"get_{name}_state"), ch)
        return read, enabled

    def delay_ocp(self, ch: int, seconds: float) -> Steps[float]:
        """Set how long an over-current must last and return the delay as read back, both in seconds.

        The unit is milliseconds on some models of a family and seconds on others: the instrument's own maximum tells.
        """
        unit_s = 1.0
        if self.dialect.has("max_ocp_delay"):
            highest = yield from self.value("max_ocp_delay", ch)
            if 10 < highest < 100:
                raise BenchError(f"a longest fuse delay of {highest:g}: neither seconds nor milliseconds make sense")
            unit_s = 1e-3 if highest >= 100 else 1.0
        yield from self.tell("set_ocp_delay", ch, t=seconds / unit_s)
        return (yield from self.value("get_ocp_delay", ch)) * unit_s

    def clear(self, ch: int) -> Steps[None]:
        """Clear the latched protections. The output is off already: that is the caller's first duty."""
        if self.dialect.has("abort_list"):
            yield from self.tell("abort_list", ch)  # a list goes on while the output is tripped
        said: set[str] = set()
        for name in PROTECTIONS:
            operation: Operation = _op(f"clear_{name}")
            if self.dialect.has(operation) and (text := self.dialect.commands[operation].text) not in said:
                said.add(text)
                yield from self.ask(operation, ch) if text.endswith("?") else self.tell(operation, ch)

    def can_clear(self, name: str) -> bool:
        """Whether a trip of this kind has a clear; without one it ends when the output is switched on again."""
        return self.dialect.has(_op(f"clear_{'ovp' if name == 'watchdog' else name}"))

    # ------------------------------------------------------------------------------------------------ errors
    def drain(self) -> Steps[tuple[ErrorEntry, ...]]:
        """All errors, oldest first; InstrumentRefused when the queue does not end after 32 entries."""
        if self.dialect.errors == "none":
            return ()
        if self.dialect.errors == "registers":
            return (yield from self._registers())
        entries: list[ErrorEntry] = []
        for _ in range(MAX_ERRORS):
            entry = parse_error_entry((yield from self.ask("error")))
            if entry is None:
                return tuple(entries)
            entries.append(entry)
        raise InstrumentRefused(f"the error queue does not end: {'; '.join(map(str, entries[-3:]))}", tuple(entries))

    def _registers(self) -> Steps[tuple[ErrorEntry, ...]]:
        entries = []
        execution = parse_register((yield from self.ask("execution_error")), "bits")
        query = parse_register((yield from self.ask("query_error")), "bits")
        event = parse_register((yield from self.ask("event_status")), "bits")
        for number, what in ((execution, "execution error"), (query, "query error")):
            if number:
                entries.append(ErrorEntry(number, what))
        told = {entry.text for entry in entries}
        entries += [ErrorEntry(bit, what) for bit, what in _EVENT_BITS if event & bit and what not in told]
        return tuple(entries)
