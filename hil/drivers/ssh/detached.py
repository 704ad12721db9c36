"""A command on the board that outlives its connection: for work over a link that comes and goes."""

from __future__ import annotations

import posixpath
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hil.drivers.ssh.connection import ShellTimeout
from hil.errors import BoardError
from hil.model import Completed

_BOOT = "/proc/sys/kernel/random/boot_id"
# The shell that starts it leads the process group, also after its own end; `status` appears whole or not at all. Its
# output is there, and empty, before it runs: whoever asks at once must not find none, or an earlier command's.
_START = f"""
mkdir -p "$1" && cd "$1" && rm -f status && : >stdout && : >stderr && read -r boot <{_BOOT} || exit
echo "$$ $boot" >group || exit
where=$1; shift
{{ cd - >/dev/null; "$@" </dev/null >"$where/stdout" 2>"$where/stderr"; echo $? >"$where/status.new"
  mv "$where/status.new" "$where/status"; }} </dev/null >/dev/null 2>&1 &
"""
# Over SSH a command leads a process group of its own; over a console it belongs to the shell's, and not every small
# system has `setsid`.
_LEAD = """
script=$1; shift
if kill -0 -$$ 2>/dev/null; then eval "$script"
elif command -v setsid >/dev/null; then setsid sh -c "$script" sh "$@" & wait $!
elif ! command -v python3 >/dev/null; then echo "neither setsid nor python3 is on the PATH" >&2; exit 127
else
  python3 -c 'import os, sys; os.setsid(); os.execvp("sh", sys.argv[1:])' sh -c "$script" sh "$@" & wait $!
fi
"""
# In another boot its number may be that of a stranger.
_OURS = f'read -r group boot <"$1/group" && read -r now <{_BOOT} && test "$boot" = "$now"'
_POLL = f"""
test -d "$1" || exit 9
cat "$1/status" 2>/dev/null && exit
{_OURS} && kill -0 -"$group" 2>/dev/null && exit 8
cat "$1/status" 2>/dev/null || exit 9
"""
# Nobody is left to write the status of a whole group that was killed.
_KILL = f"""
test -e "$1/status" && exit
{_OURS} && kill -KILL -"$group" 2>/dev/null
echo 137 >"$1/status.new" && mv "$1/status.new" "$1/status"
"""


class Commands(Protocol):
    """A shell of the board that runs commands to their end: over SSH, or over its console."""

    name: str

    def run(self, argv: Sequence[str], timeout_s: float, check: bool = False) -> Completed: ...


@dataclass(frozen=True, slots=True)
class Detached:
    """A handle that any later connection can use: `directory` on the board holds output and status.

    `directory` belongs to this command alone; on a tmpfs it also tells a reboot from an end. Its status is 128 + the
    signal when one ended it, as the shell that waits for it counts.
    """

    directory: str
    argv: tuple[str, ...]

    @classmethod
    def start(cls, shell: Commands, argv: Sequence[str], directory: str, timeout_s: float = 20.0) -> Detached:
        """Start `argv` and leave it; what an earlier command left in `directory` is replaced."""
        if not posixpath.isabs(directory):
            raise ValueError("directory must be absolute")
        shell.run(["sh", "-c", _LEAD, "sh", _START, directory, *argv], timeout_s, check=True)
        return cls(directory, tuple(argv))

    def poll(self, shell: Commands, timeout_s: float = 20.0) -> int | None:
        """Its status if it has ended, None while it runs. Raises BoardError when it vanished: reboot, or killed."""
        done = shell.run(["sh", "-c", _POLL, "sh", self.directory], timeout_s)
        if done.returncode == 8:
            return None
        if done.returncode != 0 or not done.stdout.strip().isdigit():
            raise BoardError(f"{shell.name}: `{self.argv[0]}` in {self.directory} is gone without a status")
        return int(done.stdout)

    def output(self, shell: Commands, timeout_s: float = 20.0) -> tuple[str, str]:
        """stdout and stderr so far."""
        read = [shell.run(["cat", f"{self.directory}/{name}"], timeout_s, check=True) for name in ("stdout", "stderr")]
        return read[0].stdout, read[1].stdout

    def wait(self, shell: Commands, timeout_s: float, poll_s: float = 0.2) -> Completed:
        """Wait for its end over this connection; it goes on when the connection or `timeout_s` ends."""
        began = time.monotonic()
        while (status := self.poll(shell)) is None:
            if time.monotonic() - began > timeout_s:
                raise ShellTimeout(f"{shell.name}: `{self.argv[0]}` still runs after {timeout_s:g} s")
            time.sleep(poll_s)
        return Completed(self.argv, *self.output(shell), status, time.monotonic() - began)

    def kill(self, shell: Commands, timeout_s: float = 20.0) -> None:
        """Kill it and what it started, status 137 then; no error when it has ended."""
        shell.run(["sh", "-c", _KILL, "sh", self.directory], timeout_s, check=True)
