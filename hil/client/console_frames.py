"""How a command's result crosses a console on which a kernel also writes: echoes, frames, check sums; pure.

A kernel message may stand anywhere in what a program prints, also in the middle of a line, and ends with a line feed.
So nothing is believed that is not proven: an echo is the typed text with whole insertions taken out, a result has the
length that the board told, and where it has not it comes again in base64, in numbered frames under a check sum.
"""

from __future__ import annotations

import base64
import binascii
import collections
import re
import zlib

_PLAIN = re.compile(r"[A-Za-z0-9 _./:;=,+@%^~\"'$(){}\[\]|&<>*?#`\\-]+\Z")
_STAMP = re.compile(rb"\[ *\d+\.\d+\]")  # how a kernel message begins
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
CLEAN = re.compile(r"[\x20-\x7e\t\n]*\Z")

# Shell functions that a session defines once, for any POSIX shell with base64, cksum and dd. Closing marks are printed
# twice: a message may tear one.
#   hil_r NONCE COMMAND: run it apart from this shell; HIL_H keeps output and status, printed with their length
#   hil_p NONCE: print HIL_H again, in frames        hil_s NONCE FILE SIZE INDEX: print a piece of a file, in frames
#   hil_f NONCE: print the frames of HIL_B again     hil_w NONCE FILE: write numbered lines of base64 to a file
PRELUDE = (
    "hil_r(){ HIL_H=$( (eval \"$2\") </dev/null 2>&1; echo \" $?\"); "
    "printf 'HIL-%s-%s-<%s>-%s-LIH\\n-%s-LIH\\n' \"$1\" \"${#HIL_H}\" \"$HIL_H\" \"$1\" \"$1\"; }",
    "hil_f(){ set -- \"$1\" $(printf '%s' \"$HIL_B\"|cksum); printf '%s\\n' \"$HIL_B\"|{ N=0; "
    "while read -r L; do N=$((N+1)); echo \"HIL-$1-$N-$L.\"; done; "
    "S=\"HIL-$1-S-$2-$3-$N.\"; printf '%s\\n' \"$S\" \"$S\"; }; }",
    "hil_p(){ HIL_B=$(printf '%s' \"$HIL_H\"|base64); hil_f \"$1\"; }; "
    "hil_s(){ HIL_B=$(dd if=\"$2\" bs=\"$3\" skip=\"$4\" count=1 2>/dev/null|base64); hil_f \"$1\"; }",
    "hil_w(){ { N=0; echo \"HIL-$1-A-0.\" >&4; while read -r K L M; do if [ \"$K\" = . ]; then break; fi; "
    "if [ \"$K\" = $((N+1)) ] && [ \"${#L}\" = \"$M\" ]; then N=$K; echo \"$L\"; fi; "
    "echo \"HIL-$1-A-$N.\" >&4; done|base64 -d >\"$2\"; } 4>&1; echo \"HIL-$1-W.\"; }",
)  # fmt: skip


def as_line(command: str) -> str:
    """The command as one word to `eval`, quoted; in base64 when a line editor would not leave it as it is."""
    if _PLAIN.match(command):
        return "'" + command.replace("'", "'\\''") + "'"
    return f'"$(echo {base64.b64encode(command.encode()).decode()}|base64 -d)"'


class Echo:
    """Follows a board's echo of `typed` through a stream in which other text may be inserted.

    `seen` is how much of it has come: the longest beginning of `typed` that the stream holds, in order, with nothing in
    between but lines (up to their line feed), carriage returns and the shell's `prompt`: it comes when the shell is
    ready, which may be while we type.
    """

    def __init__(self, typed: bytes, prompt: bytes = b"") -> None:
        self._typed = typed
        self._prompt = prompt
        self.seen = 0
        # How far the echo may have come if the next byte goes on with it; if a line is being inserted; and, with how
        # much of the prompt has come, if that is.
        self._active: set[int] = set()
        self._interrupted: set[int] = set()
        self._prompted: set[tuple[int, int]] = set()

    @property
    def complete(self) -> bool:
        return self.seen == len(self._typed)

    def feed(self, data: bytes) -> None:
        typed, end = self._typed, len(self._typed)
        for byte in data:
            if self.seen == end:
                return
            active = self._active
            following = {at + 1 for at in active if typed[at] == byte}
            if typed[0] == byte:
                following.add(1)
            if self._prompt:
                following |= self._through_prompt(byte)
            if byte == 13:
                following |= active
            else:
                self._interrupted |= active
            if byte == 10:
                following |= self._interrupted
            self._active = following
            if following:
                self.seen = max(self.seen, max(following))

    def _through_prompt(self, byte: int) -> set[int]:
        """The positions at which a prompt has just ended."""
        begun = {(at, 0) for at in self._active} | self._prompted
        gone_on = {(at, count + 1) for at, count in begun if self._prompt[count] == byte}
        self._prompted = {(at, count) for at, count in gone_on if count < len(self._prompt)}
        return {at for at, count in gone_on if count == len(self._prompt)}


def prompt_among(said: bytes) -> bytes:
    """The prompt that a shell printed again and again, once for each empty line; b"" when none stands out."""
    parts = [_STAMP.split(part, maxsplit=1)[0].strip(b"\r") for part in said.split(b"\n")]
    often = collections.Counter(part for part in parts if 0 < len(part) <= 120).most_common(1)
    return often[0][0] if often and often[0][1] > 1 else b""


def text_of(printed: str, nonce: str) -> tuple[str, int] | None:
    """(output, status) from what `hil_r` printed up to its closing mark; None when a byte is missing or too much."""
    found = re.search(rf"HIL-{nonce}-(\d{{1,9}})-<", printed)
    if found is None:
        return None
    body = printed[found.end() :].replace("\r\n", "\n")
    if len(body) != int(found[1]) or CLEAN.match(body) is None:
        return None
    return split_status(body)


def split_status(body: str) -> tuple[str, int] | None:
    output, _, status = body.rpartition(" ")
    return (output, int(status)) if re.fullmatch(r"\d{1,3}", status) else None


class Frames:
    """Collects the frames that `hil_f` prints, as often as it takes."""

    def __init__(self, nonce: str) -> None:
        self._frame = re.compile(rf"HIL-{nonce}-(\d{{1,9}})-([A-Za-z0-9+/=]*)\.")
        self._sum = re.compile(rf"HIL-{nonce}-S-(\d{{1,10}})-(\d{{1,9}})-(\d{{1,9}})\.")
        self._lines: dict[int, str] = {}

    def feed(self, printed: str) -> bytes | None:
        """The bytes that they carry, once all have come and the check sum agrees."""
        for number, line in self._frame.findall(printed):
            self._lines[int(number)] = line
        told = self._sum.search(printed)
        if told is None or any(number not in self._lines for number in range(1, int(told[3]) + 1)):
            return None
        text = "\n".join(self._lines[number] for number in range(1, int(told[3]) + 1)).encode()
        if (posix_cksum(text), len(text)) != (int(told[1]), int(told[2])):
            self._lines.clear()  # one of them is wrong, and which is not known
            return None
        try:
            return base64.b64decode(text)
        except binascii.Error:
            return None


def posix_cksum(data: bytes) -> int:
    """The CRC of POSIX `cksum`: CRC-32 with the most significant bit first, over the data and its length."""
    size, length = len(data), bytearray()
    while size:
        length.append(size & 0xFF)
        size >>= 8
    crc = zlib.crc32((data + length).translate(_REVERSED), 0xFFFFFFFF)
    return int(f"{crc:032b}"[::-1], 2)


def upload_line(number: int, piece: bytes) -> bytes:
    """One line for `hil_w`: its number, base64, and how long that is."""
    text = base64.b64encode(piece)
    return b"%d %s %d\n" % (number, text, len(text))
