"""Every exception hil raises: one root, three arms, so that a lab's fault never counts as the board's.

`UsageError`  you asked wrongly; the message says what to write instead (CLI exit 4).
`BenchError`  the lab broke; JUnit error, verdict `infra`, retried (CLI exit 3).
`BoardError`  the device under test misbehaved; JUnit failure, verdict `fail` (CLI exit 1).

`SafetyError` is a `BenchError` that also forces the safe state. A message names the board, fixture, file and line
where they are known, and the next step: pass it as `hint`.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `hil` command; 0 to 5 agree with pytest's."""

    PASS = 0
    FAIL = 1
    INTERRUPTED = 2
    BENCH = 3
    USAGE = 4
    NOTHING_COLLECTED = 5
    INVALID = 6


class HilError(Exception):
    """Root of hil's errors. `hint` is the next step for the person who reads it."""

    exit_code: ExitCode = ExitCode.BENCH

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  next: {self.hint}" if self.hint else self.message


class UsageError(HilError):
    """The request, a file or an option is wrong; nothing was touched."""

    exit_code = ExitCode.USAGE


class BenchError(HilError):
    """The lab broke: an instrument, a wire, the daemon, the host. Says nothing about the board."""

    exit_code = ExitCode.BENCH


class SafetyError(BenchError):
    """A limit or a protection was violated or cannot be verified: the bench goes to its safe state."""


class BoardError(HilError):
    """The board under test misbehaved while the bench was in order."""

    exit_code = ExitCode.FAIL
