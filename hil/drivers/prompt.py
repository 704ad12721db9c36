"""Run this process as promptly as the host lets it: packets that wait for the processor are late on the link."""

from __future__ import annotations

import contextlib
import ctypes
import os

_PR_SET_TIMERSLACK = 29
_PRIORITY = 10


def be_prompt(*, inherited: bool = False) -> str:
    """Ask for real-time scheduling, else for a better share; returns what was granted, for the record.

    `inherited`: by the processes that this one starts as well. Not with a single processor: whatever spins there with
    real-time priority stops everything else.
    """
    _exact_timers()
    if (os.cpu_count() or 1) > 1:
        with contextlib.suppress(OSError):
            policy = os.SCHED_RR if inherited else os.SCHED_RR | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(0, policy, os.sched_param(_PRIORITY))
            return "real-time"
    return raise_share()


def raise_share(niceness: int = -15) -> str:
    """Ask for a better share of the processor and punctual timers; returns what was granted.

    For what runs as long as a flight: a busy process with real-time priority starves its neighbours for up to 0.95 s
    of every second, and a bench daemon that is silent for one is taken for dead.
    """
    _exact_timers()
    with contextlib.suppress(OSError):
        os.nice(niceness)
        return "raised"
    return "ordinary"


def _exact_timers() -> None:
    with contextlib.suppress(OSError):
        # Wake when asked, not up to 50 us later.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
