"""The expect engine: find a bounded pattern in a byte stream, abort on a death string, quote what was seen last.

Pure: it is fed bytes and asked. A pattern must be bounded, because an unbounded one (`.*`) matches more or less
depending on how the bytes happened to be cut into chunks, and would search everything again at each new byte.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hil.errors import BoardError, UsageError

MAX_WIDTH = 4096
QUOTED_BYTES = 600


@dataclass(frozen=True, slots=True)
class Match:
    """A pattern found. `offset` is the stream offset of the first byte after it, `t_mono` when it was seen here.

    `before` is what came between the start of the search and the match; all text is UTF-8 with replacement.
    """

    text: str
    groups: tuple[str | None, ...]
    before: str
    offset: int
    t_mono: float


class Pattern:
    """A compiled pattern with its greatest width in bytes. Raises UsageError when it is wrong or unbounded."""

    __slots__ = ("regex", "source", "width")

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self.regex = re.compile(source.encode())
        except re.error as error:
            raise UsageError(f"pattern {source!r} is not a regular expression: {error}") from None
        least, self.width = _widths(source.encode())
        if self.width > MAX_WIDTH:
            raise UsageError(
                f"pattern {source!r} is unbounded",
                hint=f"write a bound: .{{0,80}} instead of .*, at most {MAX_WIDTH} bytes in all",
            )
        if least == 0:
            raise UsageError(f"pattern {source!r} also matches no text at all", hint="it would be found at once")
        if _looks_ahead(source.encode()):
            raise UsageError(
                f"pattern {source!r} looks ahead, at bytes that may not have come yet",
                hint="match them too and take what you want from a group: Match.groups",
            )


class Search:
    """One search through a stream that starts at offset `start`; `feed` every later byte, then ask `found`.

    Keeps only what a match may still need and what a time-out quotes, unless `keep` (then `before` is complete).
    """

    def __init__(self, pattern: Pattern, death: Iterable[Pattern] = (), *, start: int, keep: int = 1 << 20) -> None:
        self.pattern = pattern
        self._death = tuple(death)
        self._widest = max(item.width for item in (pattern, *self._death))
        self._keep = max(keep, self._widest, QUOTED_BYTES)
        self._buffer = bytearray()
        self._base = start
        self._searched = 0

    @property
    def end(self) -> int:
        """Stream offset behind the last byte fed."""
        return self._base + len(self._buffer)

    def feed(self, data: bytes | bytearray) -> None:
        self._buffer += data
        if len(self._buffer) > 2 * self._keep and self._searched > self._keep:
            cut = len(self._buffer) - self._keep
            cut = min(cut, self._searched)
            del self._buffer[:cut]
            self._base += cut
            self._searched -= cut

    def found(self, now_s: float) -> Match | None:
        """The match, or None so far. Raises BoardError when a death string comes first."""
        match = self.pattern.regex.search(self._buffer, self._searched)
        end = len(self._buffer) if match is None else match.start()
        for death in self._death:
            hit = death.regex.search(self._buffer, self._searched, end)
            if hit is not None:
                raise BoardError(
                    f"the console said {hit.group().decode('utf-8', 'replace')!r} while waiting for "
                    f"{self.pattern.source!r}; last bytes:\n{self.last(until=hit.end() + QUOTED_BYTES)}"
                )
        if match is None:
            # A match that is still incomplete can begin at most one width before the end.
            self._searched = max(self._searched, len(self._buffer) - self._widest + 1)
            return None
        return Match(
            text=_text(match.group()),
            groups=tuple(None if group is None else _text(group) for group in match.groups()),
            before=_text(self._buffer[: match.start()]),
            offset=self._base + match.end(),
            t_mono=now_s,
        )

    def rest(self, offset: int) -> bytearray:
        """What it holds from stream offset `offset` on, for the next search."""
        return self._buffer[max(offset - self._base, 0) :]

    def last(self, until: int | None = None) -> str:
        """The newest bytes, quoted."""
        return quote(self._buffer if until is None else self._buffer[:until])


def quote(data: bytes | bytearray) -> str:
    """The end of `data` for a person: indented lines, control characters escaped."""
    tail = bytes(data[-QUOTED_BYTES:])
    if not tail:
        return "    (nothing at all)"
    text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in _text(tail).replace("\r", ""))
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _widths(source: bytes) -> tuple[int, int]:
    # The standard library knows the least and greatest width of a pattern but offers it only here.
    parser: Any = importlib.import_module("re._parser")
    least, greatest = parser.parse(source).getwidth()
    return int(least), int(greatest)


def _looks_ahead(source: bytes) -> bool:
    parser: Any = importlib.import_module("re._parser")

    def within(item: Any) -> bool:
        if isinstance(item, tuple) and len(item) == 2 and str(item[0]) in ("ASSERT", "ASSERT_NOT"):
            direction, inner = item[1]
            return bool(direction > 0) or within(inner)
        if isinstance(item, (tuple, list, parser.SubPattern)):
            return any(within(part) for part in item)
        return False

    return within(parser.parse(source))


def _text(data: bytes | bytearray) -> str:
    return bytes(data).decode("utf-8", "replace")
