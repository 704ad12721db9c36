"""What the bench's own host says of itself: versions, room on its disks, load, and whether its clock is disciplined."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import hil

DISK_FREE_BYTES = 1 << 30
TIME_ERROR = 5  # adjtimex(2): the kernel does not hold its clock for synchronised


class _Timex(ctypes.Structure):
    """`struct timex` of adjtimex(2), as far as it is read here; the kernel writes all of it."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 32),
    )


@dataclass(frozen=True, slots=True)
class ClockState:
    """The kernel's view of its clock; `error_s` is the largest error that it still allows for."""

    synchronized: bool
    error_s: float


def _adjtimex(timex: _Timex) -> int:
    return int(ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)))


def kernel_clock(adjtimex: Callable[[_Timex], int] = _adjtimex) -> ClockState:
    """What adjtimex(2) says, whichever daemon disciplines the clock. Changes nothing. Raises OSError."""
    timex = _Timex()
    state = adjtimex(timex)
    if state < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    return ClockState(state != TIME_ERROR, timex.maxerror / 1e6)


def host_checks(
    directories: Iterable[Path], clock: Callable[[], ClockState] = kernel_clock
) -> list[tuple[str, bool | None, str]]:
    """(what, ok, found): the rows of the doctor's table about this host. `directories` need room for records."""
    free = {path: shutil.disk_usage(path).free for path in directories}
    tight, least = min(free.items(), key=lambda item: item[1])
    return [
        ("versions", None, f"hil {hil.__version__}, Python {platform.python_version()}, Linux {platform.release()}"),
        ("disk space", least > DISK_FREE_BYTES, f"{least / 1e9:.1f} GB free in {tight}"),
        ("load", None, f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"),
        ("clock", None, _said(clock)),
    ]


def _said(clock: Callable[[], ClockState]) -> str:
    try:
        state = clock()
    except OSError as error:
        return f"not known to be synchronised: {error}; durations do not depend on it"
    if not state.synchronized:
        return "not synchronised: the UTC in records is what this host believes; durations do not depend on it"
    return f"synchronised, within {state.error_s * 1e3:.1f} ms"
