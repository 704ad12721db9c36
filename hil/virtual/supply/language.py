"""The command language of IEEE 488.2 and SCPI-99: headers, paths, parameters, one interpreter for a table of commands.

No I/O and no instrument: a table maps headers in the manuals' notation, `[:SOURce[<n>]]:VOLTage[:LEVel]`, to handlers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass


class ScpiFault(Exception):
    """An error for the instrument's queue."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


@dataclass(slots=True)
class Request:
    """One command as it arrived: numbers of its header by name, parameters, and whether it asks."""

    numbers: Mapping[str, int]
    arguments: list[str]
    query: bool


Handler = Callable[[Request], str | None]
Row = tuple[str, Handler]


class Interpreter:
    """Runs program messages against a table. `tick` lets time pass around each unit; `fail` queues an error."""

    def __init__(
        self,
        rows: Iterable[Row],
        fail: Callable[[int, str], None],
        tick: Callable[[], None],
    ) -> None:
        self._rows = [(pattern(notation), handler) for notation, handler in rows]
        self._fail = fail
        self._tick = tick
        self._found: dict[str, tuple[Handler, dict[str, int]] | None] = {}

    def run(self, message: str) -> str | None:
        """Run one program message (units separated by `;`) and return the answers joined by `;`, or None."""
        answers: list[str] = []
        path = ""
        for unit in split(message, ";"):
            if not unit:
                continue
            self._tick()
            try:
                answer, path = self._unit(unit, path)
            except ScpiFault as error:
                self._fail(error.code, error.text)
                answer = None
            if answer is not None:
                answers.append(answer)
            else:
                self._tick()  # what was set takes effect before anybody can ask
        return ";".join(answers) if answers else None

    def _unit(self, text: str, path: str) -> tuple[str | None, str]:
        header, _, rest = text.partition(" ")
        query = header.endswith("?")
        name = header.rstrip("?").upper()
        rest = rest.strip()
        arguments = split(rest, ",") if rest else []
        # A header without a leading colon continues at the level of the one before it, else starts at the root.
        candidates = [":" + name.lstrip(":")] if name[:1] in ":*" else [f"{path}:{name}", f":{name}"]
        for candidate in candidates:
            found = self._look_up(candidate)
            if found is not None:
                handler, numbers = found
                following = path if name.startswith("*") else candidate.rpartition(":")[0]
                return handler(Request(numbers, arguments, query)), following
        raise ScpiFault(-113, "Undefined header")

    def _look_up(self, header: str) -> tuple[Handler, dict[str, int]] | None:
        if header not in self._found:
            if len(self._found) > 1000:  # whoever sends noise fills no memory
                self._found.clear()
            self._found[header] = self._search(header)
        return self._found[header]

    def _search(self, header: str) -> tuple[Handler, dict[str, int]] | None:
        for expression, handler in self._rows:
            found = expression.fullmatch(header)
            if found:
                return handler, {key: int(value) for key, value in found.groupdict().items() if value}
        return None


@functools.lru_cache(maxsize=1024)
def pattern(notation: str) -> re.Pattern[str]:
    """`[:SOURce[<n>]]:VOLTage[:LEVel]` as an expression over upper-case headers: short and long forms."""

    def keyword(match: re.Match[str]) -> str:
        word = match.group(0)
        short = re.match(r"[A-Z*]+", word)
        brief = short.group(0) if short else word
        return f"(?:{re.escape(word.upper())}|{re.escape(brief)})"

    text = re.sub(r"<([a-z])>", lambda m: chr(ord(m.group(1)) - ord("a") + 1), notation)
    text = re.sub(r"\*?[A-Za-z]+", keyword, text)
    # Brackets written by the notation become optional groups; the groups made above contain none.
    text = text.replace("[", "(?:").replace("]", ")?")
    text = re.sub(r"[\x01-\x1a]", lambda m: f"(?P<{chr(ord(m.group(0)) + ord('a') - 1)}>\\d+)", text)
    return re.compile(text)


def split(text: str, separator: str) -> list[str]:
    """Parts between separators that stand in no quotes and no parentheses, stripped."""
    if "(" not in text and '"' not in text and "'" not in text:
        return [part.strip() for part in text.split(separator)]
    parts, start, depth, quote = [], 0, 0, ""
    for index, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == separator and depth <= 0:
            parts.append(text[start:index].strip())
            start = index + 1
    return [*parts, text[start:].strip()]


# --- parameters -------------------------------------------------------------------------------------------------------
def query_only(request: Request) -> None:
    if not request.query:
        raise ScpiFault(-113, "Undefined header")


def set_only(request: Request) -> None:
    if request.query:
        raise ScpiFault(-113, "Undefined header")


def real(arguments: list[str], low: float, high: float) -> float:
    """The one number given; MIN and MAX stand for the range."""
    if not arguments:
        raise ScpiFault(-109, "Missing parameter")
    if len(arguments) > 1:
        raise ScpiFault(-108, "Parameter not allowed")
    word = arguments[0].upper()
    if word in ("MIN", "MINIMUM"):
        return low
    if word in ("MAX", "MAXIMUM"):
        return high
    value = number(word)
    if not low <= value <= high:
        raise ScpiFault(-222, "Data out of range")
    return value


def number(word: str) -> float:
    """A decimal number, with a unit's letter or without."""
    found = re.fullmatch(r"([-+.\dE]+?|NAN|INF)\s*(M?)(V|A|S|W)?", word.upper())
    if not found:
        raise ScpiFault(-104, "Data type error")
    try:
        return float(found[1]) * (1e-3 if found[2] else 1.0)
    except ValueError:
        raise ScpiFault(-104, "Data type error") from None


def boolean(arguments: list[str]) -> bool:
    if not arguments:
        raise ScpiFault(-109, "Missing parameter")
    word = arguments[0].upper()
    if len(arguments) > 1 or word not in ("ON", "OFF", "1", "0"):
        raise ScpiFault(-224, "Illegal parameter value")
    return word in ("ON", "1")


def word(arguments: list[str], *allowed: str) -> str:
    """One keyword of `allowed` (written as `SHORtlong`), as its short form in capitals."""
    if not arguments:
        raise ScpiFault(-109, "Missing parameter")
    given = arguments[0].upper().strip("\"'")
    for choice in allowed:
        short = re.match(r"[A-Z0-9]+", choice)
        brief = short.group(0) if short else choice.upper()
        if given in (brief, choice.upper()):
            return brief
    raise ScpiFault(-224, "Illegal parameter value")


def channel_list(text: str) -> list[int]:
    """The numbers in `(@1,3:5)`."""
    found = re.fullmatch(r"\(\s*@\s*([\d\s,:]+)\)", text)
    if not found:
        raise ScpiFault(-104, "Data type error")
    numbers: list[int] = []
    for part in found[1].split(","):
        first, colon, last = part.strip().partition(":")
        if not first.strip().isdigit() or (colon and not last.strip().isdigit()):
            raise ScpiFault(-104, "Data type error")
        numbers += range(int(first), (int(last) if colon else int(first)) + 1)
    return numbers
