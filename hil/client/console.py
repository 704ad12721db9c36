"""A board's console as a test holds it: expect, send, log in, run commands and move files, also while a kernel logs.

The stream begins where the console was first used or where the board's power was last switched on, whichever is
later: output of an earlier life of the board never satisfies an `expect`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hil.client import console_frames as frames
from hil.client.console_line import DaemonLine, Line, PortLine
from hil.client.expect import Match, Pattern, Search, quote
from hil.drivers.serial_port import LineSettings, open_port
from hil.errors import BenchError, BoardError, UsageError
from hil.model import Completed

__all__ = ["Console", "Match", "Unheard"]

LOGIN_TRY_S = 8.0
WATCH_S = 1.0  # how often a silent wait asks whether the board is still there to be waited for
ECHO_S = (0.3, 1.0, 3.0)  # how long an echo may make no progress, at each attempt
PROMPT_S = 0.1
QUIET_S = 1.0  # after so long a frame's end is asked for again: a kernel message may have torn it
WAKE_S = 3.0
MAX_TYPED = 4000  # a terminal takes 4095 characters a line
HELD_BYTES = 4 << 20  # of what nobody looked for yet
OUTPUT_BYTES = 64 << 20
PIECE_BYTES = 24576  # of a file on its way to the host: what is asked for again when it was torn
LINE_BYTES = 600  # of a file on its way to the board
WINDOW_LINES = 3  # so that less than 4 KiB wait in the board's terminal
ERASE, INTERRUPT = b"\x15", b"\x03"
PROMPT = r"[#$>%] ?(?:\x1b\[[0-9;?]{0,8}[A-Za-z] ?){0,4}\Z"
LOGIN = r"(?<![Ll]ast )login: ?"
LOGIN_S = 3.0
UBOOT_PROMPT = r"(?:=> |U-Boot> ) {0,80}\Z"  # a key that came too late to stop the firmware is echoed behind it


class Unheard(BoardError):
    """The board did not take what was typed as it was typed: nothing of it was executed, and it may be tried again."""


class Console:
    """One user's view of a board's console. Not for several threads at once.

    `guard` is asked before a call and after one that failed; it raises BenchError when the bench took the board away
    (`Board.check`). `pace_bytes`: how much is typed before its echo is waited for, where echoes are verified.
    """

    def __init__(
        self,
        board: str,
        line: Line,
        death: Iterable[str] = (),
        guard: Callable[[], None] | None = None,
        *,
        pace_bytes: int = 64,
        user: str = "root",
        password: str | None = None,
    ) -> None:
        self.board = board
        self.user, self.password = user, password
        self._line = line
        self._guard = guard or (lambda: None)
        self._death = tuple(death)
        self._pace = pace_bytes
        self._shell_ready = False
        self._prompt = b""
        # The newest bytes, up to `_stream_end`: what is behind the last match.
        self._held = bytearray()
        self._stream_end = 0

    @classmethod
    def served(
        cls,
        board: str,
        path: Path,
        token: Callable[[], str | None],
        death: Iterable[str] = (),
        guard: Callable[[], None] | None = None,
        *,
        pace_bytes: int = 64,
        user: str = "root",
        password: str | None = None,
    ) -> Console:
        """The daemon's stream at `path`; `token` gives the lease's token, or None for a reader."""
        line = DaemonLine(board, path, token)
        return cls(board, line, death, guard, pace_bytes=pace_bytes, user=user, password=password)

    @classmethod
    def on_port(
        cls, address: str, settings: LineSettings | None = None, death: Iterable[str] = (), *, pace_bytes: int = 64
    ) -> Console:
        """A port without a daemon: nothing logs it, and nobody else reads it. `address`: `hil.drivers.serial_port`."""
        line = PortLine(address, lambda: open_port(address, settings))
        return cls(address, line, death, pace_bytes=pace_bytes)

    # ------------------------------------------------------------------------------------------------- the stream
    def mark(self) -> int:
        """The stream's present end, for `expect(since=…)`."""
        self._guard()
        self._connect()
        self._receive_ready()
        return self._stream_end

    def seek(self, offset: int) -> None:
        """The next `expect` begins at this stream offset. Raises BenchError when the bytes are no longer there."""
        begin = self._stream_end - len(self._held)
        if self._line.connected and begin <= offset <= self._stream_end:
            del self._held[: offset - begin]
        else:
            self._disconnect()
            self._connect(offset)
        self._shell_ready = False

    def expect(
        self, pattern: str, timeout_s: float, *, since: int | None = None, death: Iterable[str] | None = None
    ) -> Match:
        """Wait until the console has said `pattern` (a bounded regular expression over its UTF-8 bytes).

        The next call goes on behind the match. Raises BoardError quoting the last bytes after `timeout_s`, or when a
        death string (board type's `boot.death`, or `death`) comes first; UsageError for an unbounded pattern.
        """
        self._guard()
        if since is not None:
            self.seek(since)
        search = self._search(pattern, self._death if death is None else death)
        match = self._await(search, timeout_s)
        if match is None:
            self._guard()  # a board whose power was cut is not to blame for its silence
            what = f"{pattern!r} did not come within {timeout_s:.3g} s"
            raise BoardError(f"board {self.board}: {what}; last bytes:\n{search.last()}")
        return match

    def find(self, pattern: str, timeout_s: float) -> Match | None:
        """As `expect`, but a time-out is no error: None, and nothing is consumed."""
        self._guard()
        return self._await(self._search(pattern, self._death), timeout_s)

    def send(self, text: str, end: str = "\n") -> None:
        """Write to the board, unverified; needs a lease."""
        self.write((text + end).encode())

    def write(self, data: bytes) -> None:
        """Write raw bytes to the board; needs a lease."""
        self._guard()
        self._shell_ready = False
        self._put(data)

    def type(self, text: str, end: str = "\n") -> None:
        """Type a line: at most `pace_bytes` beyond its echo, and `end` only once the echo of all of it was right.

        What a board drops or mangles is erased (Ctrl-U) and typed again, and never executed. Raises BoardError when no
        right echo comes, UsageError for text that a terminal would not echo as it is.
        """
        if not re.fullmatch(r"[\x20-\x7e]+", text) or len(text) > MAX_TYPED:
            raise UsageError(
                f"only printable ASCII of at most {MAX_TYPED} characters can be typed with its echo checked"
            )
        self._guard()
        self._shell_ready = False
        self._type(text, end)

    def _type(self, text: str, end: str = "\n") -> None:
        for patience_s in ECHO_S:
            if self._typed(text.encode(), patience_s):
                self._put(end.encode())
                return
            self._put(ERASE)
        self._guard()
        last = quote(self._held)
        raise Unheard(f"board {self.board}: its console did not echo {text[:60]!r} as typed; last bytes:\n{last}")

    def read_available(self) -> bytes:
        """What has come since the last expect, without waiting; it is consumed."""
        self._guard()
        self._connect()
        self._receive_ready()
        data = bytes(self._held)
        self._held.clear()
        return data

    def close(self) -> None:
        self._disconnect()

    # ------------------------------------------------------------------------------------------------- the dialogue
    def login(self, user: str | None = None, password: str | None = None, timeout_s: float = 30.0) -> None:
        """Log in at a login prompt; a shell that is there already is left as it is. Raises BoardError.

        `user` and `password` default to the bench file's. Tries again until a command answers: kernel messages may tear
        a prompt, a half-typed line may stand there, and `login` drops what was typed before its shell runs.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                self._login_once(user or self.user, self.password if password is None else password, left_s)
                return
            except BoardError:
                if time.monotonic() + 0.5 > deadline:
                    raise

    def _login_once(self, user: str, password: str | None, left_s: float) -> None:
        timeout_s = min(left_s, LOGIN_TRY_S)
        self._guard()
        self._put(ERASE + b"\n")
        # A prompt is the last thing said: a '#' in the middle of a kernel message is none.
        found = self._await(self._search(rf"{LOGIN}|[Pp]assword: ?\Z|{PROMPT}", self._death), timeout_s)
        said = "" if found is None else found.text
        if "assword" in said:
            self._put(b"\n")  # somebody left it there; that login fails and the prompt comes back
            said = self.expect(LOGIN, timeout_s).text
        if "login" in said:
            self._put(f"{user}\n".encode())
            if password is not None:
                self.expect(r"[Pp]assword: ?", timeout_s)
                self._put(f"{password}\n".encode())
            # Kernel messages may hide the prompt: then the shell is asked itself.
            self._await(self._search(PROMPT, self._death), LOGIN_S)
        self._wake_shell(timeout_s)

    def uboot(
        self, timeout_s: float = 30.0, *, stop: str = r"stop autoboot", key: str = " ", prompt: str = UBOOT_PROMPT
    ) -> None:
        """Stop U-Boot's autoboot with `key`, or find its prompt where it waits already. Raises BoardError."""
        self._guard()
        deadline = time.monotonic() + timeout_s
        self._put(ERASE + b"\r")
        while True:
            match = self._await(self._search(rf"{stop}|{prompt}", self._death), min(1.0, timeout_s))
            if match is not None and re.search(stop, match.text) is None:
                return
            if time.monotonic() > deadline:
                self._guard()
                raise BoardError(
                    f"board {self.board}: no U-Boot prompt within {timeout_s:.3g} s; last bytes:\n{quote(self._held)}"
                )
            if match is not None:
                self._put(key.encode())

    def uboot_run(self, command: str, timeout_s: float = 30.0) -> Completed:
        """Run a line of U-Boot's (hush) at its prompt, echo-verified, and return its output and status."""
        nonce = secrets.token_hex(4)
        started = time.monotonic()
        self.type(f"echo H'IL'-{nonce}-B; {command}; echo H'IL'-{nonce}-E-$?")
        self.expect(rf"HIL-{nonce}-B\r?\n", timeout_s)
        left_s = max(timeout_s - (time.monotonic() - started), 0.01)
        done = self.expect(rf"HIL-{nonce}-E-(\d{{1,3}})\r?\n", left_s)
        output = done.before.replace("\r\n", "\n")
        return Completed((command,), output, "", int(done.groups[0] or 0), time.monotonic() - started)

    # ------------------------------------------------------------------------------------------------- the shell
    def run(self, command: str, timeout_s: float = 30.0, check: bool = False) -> Completed:
        """Run a line of shell in a subshell, without input, and return its output: stderr is mixed in.

        Exact, also while the kernel logs: the output is kept on the board, comes with its length, and comes again under
        a check sum when anything stood in between. The command runs once. Past `timeout_s` it is interrupted and
        BoardError raised; `check`: also for a status other than 0.
        """
        started = time.monotonic()
        self._guard()
        self._wake_shell(timeout_s)
        nonce = secrets.token_hex(4)
        typed = f"hil_r {nonce} {frames.as_line(command)}"
        if len(typed) > MAX_TYPED:
            raise UsageError("the command is too long for a terminal's line", hint="put it in a file: console.put(…)")
        self._type(typed)
        output, status = self._result(nonce, command, started + timeout_s)
        done = Completed((command,), output, "", status, time.monotonic() - started)
        if check and status != 0:
            tail = "\n  ".join(output.strip().splitlines()[-6:])
            raise BoardError(f"board {self.board}: `{command}` ended with status {status}\n  {tail}")
        return done

    def _result(self, nonce: str, command: str, deadline_s: float) -> tuple[str, int]:
        """What `hil_r` printed; asked for again in frames when it did not come whole."""
        collected = frames.Frames(nonce)
        asked = 0
        wait_s = QUIET_S
        while True:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self._interrupt()
                raise BoardError(
                    f"board {self.board}: `{command}` did not end in time and was interrupted; last bytes:\n"
                    f"{quote(self._held)}"
                )
            end = rf"-{nonce}-LIH|HIL-{nonce}-S-\d{{1,10}}-\d{{1,9}}-\d{{1,9}}\."
            match = self._await(self._search(end, self._death, OUTPUT_BYTES), min(left_s, wait_s))
            result = None
            if match is not None and match.text.endswith("LIH"):
                result = frames.text_of(match.before, nonce)
            elif match is not None:
                asked -= 1
                body = collected.feed(match.before + match.text)
                result = None if body is None else frames.split_status(body.decode("utf-8", "replace"))
            if result is not None:
                self._let_pass(nonce, asked)
                return result
            if match is None:
                wait_s *= 2  # a long command: what is typed waits in the terminal until it ends
                self._guard()
            if asked <= 0 or (match is None and asked < 3):
                self._put(f"\nhil_p {nonce}\n".encode())  # also ends a line whose end was lost
                asked = max(asked, 0) + 1

    def _let_pass(self, nonce: str, asked: int) -> None:
        """Wait for what was asked for and turned out not to be needed, so that it is not in anybody's way."""
        for _ in range(asked):
            self._await(self._search(rf"HIL-{nonce}-S-\d{{1,10}}-", ()), QUIET_S)

    def put(self, source: Path | bytes, target: str, timeout_s: float = 60.0) -> None:
        """Write a small file to the board: lines of base64, and its SHA-256 compared before it takes its place.

        About 3 KiB are under way at a time. Raises BoardError when the board does not confirm in time.
        """
        data = source if isinstance(source, bytes) else source.read_bytes()
        self._guard()
        deadline = time.monotonic() + timeout_s
        self._wake_shell(timeout_s)
        nonce = secrets.token_hex(4)
        part = f"{target}.{nonce}.part"  # two users of a board may bring the same file at once
        self._type(f"hil_w {nonce} {frames.as_line(part)}")
        self._send_lines(nonce, data, deadline)
        quoted, wanted = shlex.quote(part), hashlib.sha256(data).hexdigest()
        left_s = max(deadline - time.monotonic(), 5.0)
        told = self.run(f"sha256sum < {quoted} && sync {quoted} 2>/dev/null || sync", left_s, check=True).stdout
        if wanted not in told:
            self.run(f"rm -f {quoted}", left_s)
            raise BoardError(f"board {self.board}: {target} came with another SHA-256: {told.strip()!r}")
        self.run(f"mv -f {quoted} {shlex.quote(target)}", left_s, check=True)

    def _send_lines(self, nonce: str, data: bytes, deadline_s: float) -> None:
        pieces = [data[at : at + LINE_BYTES] for at in range(0, len(data), LINE_BYTES)]
        there, sent = -1, 0
        while there < len(pieces):
            while there >= 0 and sent < len(pieces) and sent - there < WINDOW_LINES:
                self._put(frames.upload_line(sent + 1, pieces[sent]))
                sent += 1
            match = self._await(self._search(rf"HIL-{nonce}-(?:A-(\d{{1,9}})|W)\.", self._death), QUIET_S)
            if match is not None and match.text.endswith("W."):
                return  # it could not write: the check of the hash will say why
            if match is not None:
                there = max(there, int(match.groups[0] or 0))
                continue
            self._guard()
            if time.monotonic() > deadline_s:
                self._interrupt()
                raise BoardError(f"board {self.board}: the file stands at {max(there, 0)} of {len(pieces)} lines")
            # An answer was torn, or a line was lost: the board tells again how far it is, and we go on from there.
            sent = max(there, 0)
            self._put(b"? ? 0\n")
            there = max(there, 0)
        self._put(b". . 0\n")
        self._await(self._search(rf"HIL-{nonce}-W\.", self._death), QUIET_S)

    def get(self, path: str, timeout_s: float = 60.0) -> bytes:
        """Read a small file from the board, compared with its SHA-256. Raises BoardError when it cannot be read."""
        deadline = time.monotonic() + timeout_s
        quoted = shlex.quote(path)
        told = self.run(f"wc -c < {quoted} && sha256sum < {quoted}", timeout_s, check=True).stdout.split()
        size, wanted = int(told[0]), told[1]
        data = bytearray()
        for index in range(-(-size // PIECE_BYTES)):
            data += self._piece(path, index, deadline)
        if hashlib.sha256(data).hexdigest() != wanted:
            raise BoardError(f"board {self.board}: {path} changed while it was read")
        return bytes(data)

    def _piece(self, path: str, index: int, deadline_s: float) -> bytes:
        nonce = secrets.token_hex(4)
        collected = frames.Frames(nonce)
        self._type(f"hil_s {nonce} {frames.as_line(path)} {PIECE_BYTES} {index}")
        while time.monotonic() < deadline_s:
            search = self._search(rf"HIL-{nonce}-S-\d{{1,10}}-\d{{1,9}}-\d{{1,9}}\.", self._death, OUTPUT_BYTES)
            match = self._await(search, min(30.0, max(deadline_s - time.monotonic(), 0.0)))
            body = None if match is None else collected.feed(match.before + match.text)
            if body is not None:
                return body
            self._guard()
            self._type(f"hil_f {nonce}")
        self._interrupt()
        raise BoardError(f"board {self.board}: {path} did not come whole in time")

    def fetch(self, url: str, timeout_s: float = 20.0) -> str:
        """The text behind an `http://` address as the board sees it: its metrics, say. Raises BoardError."""
        where, limit = shlex.quote(url), max(int(timeout_s), 1)
        python = (
            f"import sys,urllib.request as u;sys.stdout.write(u.urlopen(sys.argv[1],timeout={limit}).read().decode())"
        )
        return self.run(
            f"if command -v curl >/dev/null; then curl -fsS --max-time {limit} {where}; "
            f"elif command -v wget >/dev/null; then wget -q -T {limit} -O - {where}; "
            f"else python3 -c {shlex.quote(python)} {where}; fi",
            timeout_s + 5.0,
            check=True,
        ).stdout

    def _wake_shell(self, timeout_s: float) -> None:
        """A shell that answers, with our functions; what was half typed or still runs in it is done away with."""
        if self._shell_ready and self._line.connected:
            return
        deadline = time.monotonic() + timeout_s
        for wake in (ERASE, INTERRUPT + ERASE, INTERRUPT * 2 + ERASE):
            nonce = secrets.token_hex(4)
            self._put(wake)
            if wake != ERASE:  # what is typed before the interrupt has done its work goes with it
                self._settle()
            self._put(f" stty rows 50 cols 4090 2>/dev/null;echo H'IL'-{nonce}-R\n".encode())
            wait_s = min(WAKE_S, max(deadline - time.monotonic(), 0.1))
            if self._await(self._search(rf"HIL-{nonce}-R\r?\n", self._death), wait_s) is None:
                self._guard()
                continue
            self._learn_prompt()
            for line in frames.PRELUDE:
                self._type(line)
            self._shell_ready = True
            return
        raise Unheard(
            f"board {self.board}: no shell answers at its console; last bytes:\n{quote(self._held)}",
            hint="has it booted? console.login() logs in",
        )

    def _learn_prompt(self) -> None:
        """See what the shell says to empty lines."""
        begin = len(self._held)
        for _ in range(4):  # one at a time: typed together, they would be echoed together
            self._put(b"\n")
            self._settle()
        self._prompt = frames.prompt_among(bytes(self._held[begin:]))

    def _settle(self) -> None:
        """Receive until nothing comes, or for a moment where a kernel goes on logging."""
        deadline = time.monotonic() + PROMPT_S
        while self._receive(0.02) and time.monotonic() < deadline:
            pass

    def _interrupt(self) -> None:
        self._shell_ready = False
        self._put(INTERRUPT)

    # ------------------------------------------------------------------------------------------------- its means
    def _search(self, pattern: str, death: Iterable[str], keep: int = 1 << 20) -> Search:
        self._connect()
        start = self._stream_end - len(self._held)
        return Search(_pattern(pattern), map(_pattern, death), start=start, keep=keep)

    def _await(self, search: Search, timeout_s: float) -> Match | None:
        """Feed the search until it finds; None after the time-out, and then nothing is consumed."""
        deadline = time.monotonic() + timeout_s
        search.feed(self._held)
        self._held = bytearray()
        asked_s, behind = time.monotonic(), 0
        try:
            while True:
                try:
                    match = search.found(time.monotonic())
                except BoardError as error:
                    raise BoardError(f"board {self.board}: {error.message}") from None
                if match is not None:
                    behind = match.offset
                    return match
                left_s = deadline - time.monotonic()
                data = self._heard(min(left_s, WATCH_S)) if left_s > 0 else b""
                if data:
                    self._stream_end += len(data)
                    search.feed(data)
                elif left_s <= 0:
                    return None
                elif time.monotonic() - asked_s > WATCH_S:
                    self._guard()
                    asked_s = time.monotonic()
        finally:
            self._held = search.rest(behind)

    def _typed(self, text: bytes, patience_s: float) -> bool:
        self._connect()
        self._receive_ready()
        echo = frames.Echo(text, self._prompt)
        deadline = time.monotonic() + patience_s
        sent = 0
        while not echo.complete:
            if sent < len(text) and sent - echo.seen < self._pace:
                upto = min(echo.seen + self._pace, len(text))
                self._put(text[sent:upto])
                sent = upto
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            data = self._receive(min(left_s, WATCH_S))
            if data:
                before = echo.seen
                echo.feed(data)
                if echo.seen > before:
                    deadline = time.monotonic() + patience_s
        return True

    def _put(self, data: bytes) -> None:
        self._connect()
        self._line.write(data)

    def _connect(self, since: int | None = None) -> None:
        if self._line.connected:
            return
        offset, rest = self._line.connect(since)
        self._held = bytearray(rest)
        self._stream_end = offset + len(rest)
        self._shell_ready = False

    def _heard(self, timeout_s: float) -> bytes:
        try:
            return self._line.receive(timeout_s)
        except BenchError:
            self._guard()  # it may know why the stream ended
            raise

    def _receive(self, timeout_s: float) -> bytes:
        data = self._heard(timeout_s)
        self._held += data
        self._stream_end += len(data)
        if len(self._held) > 2 * HELD_BYTES:
            del self._held[:-HELD_BYTES]
        return data

    def _receive_ready(self) -> None:
        self._connect()
        while self._receive(0):
            pass

    def _disconnect(self) -> None:
        self._line.close()
        self._held.clear()


@functools.lru_cache(maxsize=256)
def _pattern(source: str) -> Pattern:
    return Pattern(source)
