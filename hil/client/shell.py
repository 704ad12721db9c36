"""A board's shells: from the wires of a bench file, and one that is kept, connected again and notices a reboot."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from hil.errors import BoardError

if TYPE_CHECKING:
    from hil.client.console_shell import ConsoleShell
    from hil.drivers.ssh import Login, Shell
    from hil.drivers.ssh.connection import Opener
    from hil.inventory.bench import JumpHost, SshWire

    AnyShell: TypeAlias = Shell | ConsoleShell

ATTEMPT_S = 20.0
BETWEEN_S = 0.2  # between two attempts at a board that boots


class Rebooted(BoardError):
    """The board is up again after a reboot that nobody announced: what ran there is gone."""


def login(wire: SshWire | JumpHost) -> Login:
    """Where and as whom to log in, as the bench file says."""
    from hil.drivers.ssh import Login

    return Login(wire.address, wire.port, wire.user, wire.key, wire.known_hosts)


def connect(
    wire: SshWire,
    *,
    broker: Path | None = None,
    timeout_s: float = ATTEMPT_S,
    guard: Callable[[], None] | None = None,
    opener: Opener | None = None,
) -> Shell:
    """A new connection over the wire and its jump hosts. Raises as `Shell.connect` does."""
    from hil.drivers.ssh import Shell

    return Shell.connect(
        wire.address,
        wire.port,
        wire.user,
        wire.key,
        wire.known_hosts,
        jump=[login(hop) for hop in wire.jump],
        broker=broker,
        timeout_s=timeout_s,
        guard=guard,
        opener=opener,
    )


def openssh(hops: Sequence[Login], pipe: Sequence[str] = ()) -> list[str]:
    """The command line of OpenSSH's `ssh` to the last of `hops` through the others, with the same keys and pins.

    `pipe`: a command whose standard input and output lead to the first of them.
    """
    *before, last = hops
    pins = ["-o", "StrictHostKeyChecking=yes", "-o", f"UserKnownHostsFile={last.known_hosts}"]
    key = [] if last.key is None else ["-i", str(last.key), "-o", "IdentitiesOnly=yes"]
    argv = ["ssh", *key, "-p", str(last.port), *pins]
    # What ssh would expand in the inner command line is doubled, but for the two words meant for it.
    if before:
        inner = shlex.join(openssh(before, pipe)).replace("%", "%%")
        argv += ["-o", f"ProxyCommand={inner} -W %h:%p"]
    elif pipe:
        argv += ["-o", "ProxyCommand={}".format(shlex.join(pipe).replace("%", "%%"))]
    return [*argv, f"{last.user}@{last.host}"]


class KeptShell:
    """One connection at a time, made by `dial(timeout_s)`; `boot_id` is the boot that its user knows of."""

    def __init__(self, name: str, dial: Callable[[float], AnyShell]) -> None:
        self._name, self._dial = name, dial
        self._shell: AnyShell | None = None
        self.boot_id: str | None = None

    def get(self, timeout_s: float = ATTEMPT_S) -> AnyShell:
        """The shell, connected again if it was lost.

        Raises Rebooted, once, when the board that answers then is in another boot than before; the next call goes on.
        """
        if self._shell is not None and self._shell.alive:
            return self._shell
        known = self.boot_id
        shell = self.reconnect(timeout_s)
        if known is not None and self.boot_id != known:
            raise Rebooted(
                f"board {self._name} rebooted by itself since the last call",
                hint="`board.reconnect()` after a reboot that is wanted; its console log says why it went down",
            )
        return shell

    def reconnect(self, timeout_s: float) -> AnyShell:
        """A new connection, tried until it stands, to whatever boot. Raises the last BoardError in the end."""
        self.drop()
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                shell = self._dial(min(max(left_s, 1.0), ATTEMPT_S))
                try:
                    self.boot_id = shell.boot_id(min(max(left_s, 1.0), ATTEMPT_S))
                except BaseException:
                    shell.abort()
                    raise
                self._shell = shell
                return shell
            except BoardError:
                if time.monotonic() + BETWEEN_S > deadline:
                    raise
                time.sleep(BETWEEN_S)

    def expect_boot(self) -> None:
        """The next boot is wanted: its power was cut on purpose."""
        self.boot_id = None

    def drop(self) -> None:
        """Drop the connection without a farewell; never blocks for long."""
        if self._shell is not None:
            with contextlib.suppress(OSError):
                self._shell.abort()
            self._shell = None
