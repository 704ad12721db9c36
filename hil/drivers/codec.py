"""The words of bench instruments without any I/O: errors, how replies are cut out of bytes, how they are read.

Every parser is strict about what it takes for a value and lenient about how makers write it. What it does not know it
refuses: garbage must never count as a measurement or as "no error".
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

from hil.drivers.dialects.base import Reply
from hil.errors import BenchError, SafetyError

MAX_REPLY_BYTES = 4096
#: A reply without terminator and without known length is over when the line has been silent for so long.
SILENCE_S = 0.1


# --------------------------------------------------------------------------------------------------------- errors
class InstrumentError(BenchError):
    """Talking to an instrument failed; the message names the address."""


class InstrumentTimeout(InstrumentError):
    """No answer within the deadline. The session is poisoned."""


class InstrumentClosed(InstrumentError):
    """The instrument refused, reset or ended the connection."""


class ReplyError(InstrumentError):
    """An answer that makes no sense here: garbage, out of step, or in an unknown form."""


class InstrumentRefused(InstrumentError):
    """The instrument queued errors; `entries` holds all of them."""

    def __init__(self, message: str, entries: tuple[ErrorEntry, ...], *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.entries = entries


class ReadbackError(SafetyError):
    """What was set did not come back: the instrument is not in the state that was asked for."""


# --------------------------------------------------------------------------------------------------------- framing
@dataclass(frozen=True, slots=True)
class Frame:
    """Where a reply ends: at the terminator (`length` 0), after so many bytes, or (-1) when the line falls silent."""

    length: int = 0


LINE = Frame()
SILENCE = Frame(-1)


class Inbox:
    """Bytes in, complete replies out."""

    def __init__(self, terminator: bytes = b"\n", limit: int = MAX_REPLY_BYTES) -> None:
        self._terminator = terminator or b"\n"
        self._limit = limit
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes as they arrive; ReplyError when they outgrow any sensible answer."""
        self._buffer += data
        if len(self._buffer) > self._limit:
            self._buffer.clear()
            raise ReplyError(f"a reply of more than {self._limit} bytes without an end")

    def take(self, frame: Frame) -> str | None:
        """The next reply without its end, or None while it is not complete. Silence is for the caller to judge."""
        end, skip = frame.length, 0
        if frame.length == 0:
            end, skip = self._buffer.find(self._terminator), len(self._terminator)
        elif frame.length < 0:
            end = len(self._buffer) or -1
        if end < 0 or len(self._buffer) < end:
            return None
        reply = self._buffer[:end].decode("latin-1")
        del self._buffer[: end + skip]
        return reply.strip() if frame.length <= 0 else reply

    def drop(self, count: int) -> None:
        """Forget up to `count` bytes that are known to follow a reply."""
        del self._buffer[:count]


# ---------------------------------------------------------------------------------------------------------- values
@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """One entry of an instrument's error queue or error registers."""

    code: int
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.text}"


@dataclass(frozen=True, slots=True)
class Identity:
    """The four fields of `*IDN?`; serial and firmware are empty where an instrument has none."""

    maker: str
    model: str
    serial: str
    firmware: str

    def __str__(self) -> str:
        return ",".join((self.maker, self.model, self.serial, self.firmware))


def parse_error_entry(reply: str) -> ErrorEntry | None:
    """None for "no error" in any of its four forms (`0,"No error"`, `+0,…`, `0 No Error`, `0  No Error`).

    An unknown form raises ReplyError: it must never count as "fine".
    """
    found = re.fullmatch(r'([+-]?\d+)(?:\s*,\s*|\s+)"?(.*?)"?', reply.strip())
    if not found:
        raise ReplyError(f"error queue entry in an unknown form: {reply!r}")
    code, text = int(found.group(1)), found.group(2)
    if code == 0:
        if not re.match(r"no error\b", text, re.IGNORECASE):
            raise ReplyError(f"error queue entry in an unknown form: {reply!r}")
        return None
    return ErrorEntry(code, text)


def parse_numbers(reply: str, count: int) -> tuple[float, ...]:
    """Exactly `count` finite, comma-separated numbers without units; ReplyError otherwise (9.9E37 means overload)."""
    try:
        values = tuple(map(float, reply.split(",")))
    except ValueError:
        raise ReplyError(f"expected {count} number(s), got {reply!r}") from None
    return _finite(values, count, reply)


def parse_tagged(reply: str, pattern: str) -> tuple[float, ...]:
    """The numbers that the groups of `pattern` find in the whole reply (`12.00V`, `VP1 13`); ReplyError otherwise."""
    found = _compiled(pattern).fullmatch(reply.strip())
    if found is None:
        raise ReplyError(f"expected something like {pattern!r}, got {reply!r}")
    values = tuple(map(float, found.groups()))
    return _finite(values, len(values), reply)


def parse_switch(reply: str) -> bool:
    """ON, OFF, YES, NO, 1 or 0."""
    word = reply.strip().upper()
    if word in ("ON", "YES", "1", "+1"):
        return True
    if word in ("OFF", "NO", "0", "+0"):
        return False
    raise ReplyError(f"expected ON or OFF, got {reply!r}")


def parse_register(reply: str, form: str) -> int:
    """A status register: a decimal or `0x…` integer (`bits`), or one raw byte (`byte`)."""
    if form == "byte":
        if len(reply) != 1:
            raise ReplyError(f"expected one raw byte, got {reply!r}")
        return ord(reply)
    try:
        value = int(reply, 16) if reply[:2] in ("0x", "0X") else int(float(reply))
    except (ValueError, OverflowError):
        raise ReplyError(f"expected a status register, got {reply!r}") from None
    if not 0 <= value <= 0xFFFFFFFF:
        raise ReplyError(f"expected a status register, got {reply!r}")
    return value


def parse_flag(reply: str, form: Reply, ch: int) -> bool:
    """Yes or no, by the form of the reply: a word, or the bit of channel `ch` in a register."""
    reply = _part(reply, form)
    if form.form in ("bits", "byte"):
        mask = form.masks[ch - 1] if len(form.masks) > 1 else form.masks[0]
        return bool(parse_register(reply, form.form) & mask)
    return parse_switch(reply)


def parse_word(reply: str, form: Reply, ch: int) -> str:
    """Our name for what the instrument says; ReplyError when it is none of the words or bits of the form.

    A mask may be written for channel 1 and shifted for the others: `masks` then holds the shift of each channel.
    """
    reply = _part(reply, form)
    if form.form in ("bits", "byte"):
        value = parse_register(reply, form.form) >> (form.masks[ch - 1] if form.masks else 0)
        for mask, name in form.words:
            if isinstance(mask, int) and value & mask == mask:
                return name
    else:
        word = reply.strip().upper()
        for said, name in form.words:
            if said == word:
                return name
    raise ReplyError(f"expected one of {', '.join(str(said) for said, _ in form.words)}, got {reply!r}")


def parse_values(reply: str, form: Reply, ch: int) -> tuple[float, ...]:
    """The numbers of a reply, by its form."""
    if form.pattern:
        return parse_tagged(reply, form.pattern.replace("{ch}", str(ch)))
    return parse_numbers(reply, form.count)


def parse_identity(reply: str) -> Identity:
    """The answer to `*IDN?`: four fields, or one word without commas from the few that know no better."""
    fields = [part.strip() for part in reply.split(",")]
    if len(fields) == 1 and re.fullmatch(r"[A-Z][\w .+/-]{3,60}", reply.strip()):
        return Identity(reply.strip(), reply.strip(), "", "")
    if len(fields) < 4 or not fields[0] or not fields[1]:
        raise ReplyError(f"*IDN? answered {reply!r} instead of maker,model,serial,firmware")
    return Identity(fields[0], fields[1], fields[2], ",".join(fields[3:]))


def _part(reply: str, form: Reply) -> str:
    if form.part < 0:
        return reply
    parts = reply.split(",")
    if len(parts) <= form.part:
        raise ReplyError(f"expected at least {form.part + 1} words, got {reply!r}")
    return parts[form.part]


def _finite(values: tuple[float, ...], count: int, reply: str) -> tuple[float, ...]:
    if len(values) != count or not all(math.isfinite(value) and abs(value) < 1e9 for value in values):
        raise ReplyError(f"expected {count} finite number(s), got {reply!r}")
    return values


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)
