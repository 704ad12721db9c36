"""Which link emulators this host can be, and why not the others: asked before anybody writes a bench file."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hil.drivers.netem_local import may_administer, netem_module

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to emulate a link here. `why` says what it rests on, or what is missing."""

    driver: str
    usable: bool
    why: str


def backends() -> tuple[Backend, ...]:
    """What this host can do by itself, the most faithful first. Changes nothing; loads no module.

    A user-space link comes before netem in QEMU: the emulated processor's timers are later than a process's.
    """
    return _netem(), _user_space(), _netem_box()


def chosen(found: tuple[Backend, ...]) -> Backend | None:
    """The one to prefer: the first that works."""
    return next((backend for backend in found if backend.usable), None)


def told(found: tuple[Backend, ...]) -> str:
    """One line: which is the best here and why, and why not those before it."""
    best = chosen(found)
    reasons = [f"not {item.driver}: {item.why}" for item in (found if best is None else found[: found.index(best)])]
    return "; ".join(["none works here" if best is None else f"{best.driver} is best here: {best.why}", *reasons])


def _netem() -> Backend:
    module = netem_module()
    facts = [f"kernel {platform.release()}", f"sch_netem {module}", _tc_version()]
    lacking = []
    if module == "missing":
        lacking.append("this kernel has no sch_netem")
    if not may_administer():
        lacking.append("no CAP_NET_ADMIN: run as root")
    return Backend("netem", not lacking, "; ".join(lacking or facts))


def _netem_box() -> Backend:
    """A box of the lab's own always works, and better than what QEMU plays."""
    qemu = shutil.which("qemu-system-x86_64", path=_PATH)
    if qemu is None:
        return Backend("netem-ssh", False, "no qemu-system-x86_64 to play a box (a real one works from any host)")
    return Backend("netem-ssh", True, f"{qemu} can play the box; its emulated timers are late by about a millisecond")


def _user_space() -> Backend:
    tun = Path("/dev/net/tun")
    if not tun.exists():
        return Backend("user-space", False, "no /dev/net/tun: sudo modprobe tun (between QEMU sockets it works)")
    if not os.access(tun, os.R_OK | os.W_OK):
        return Backend("user-space", False, f"{tun} may not be opened: sudo chmod 666 {tun}")
    processors = os.cpu_count() or 1
    return Backend("user-space", processors > 1, f"{tun} opens; {processors} processors")


def _tc_version() -> str:
    tool = shutil.which("tc", path=_PATH)
    if tool is None:
        return "no tc (not needed)"
    done = subprocess.run([tool, "-V"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "tc of unknown version"
