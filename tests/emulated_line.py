"""Two network namespaces with a user-space link between them: what crosses a slow, long, lossy link, for tests.

Both ends are this host's kernel, so TCP is real; the link between is `hil.drivers.userspace_link`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hil.drivers import broker, userspace_link
from hil.drivers.userspace_link import UserSpaceLink

GROUND, BOARD = "10.42.0.1", "10.42.0.2"


@dataclass(frozen=True, slots=True)
class Line:
    """`ground` is the broker that hands out sockets there; `inside`: the words that start a program at the far end.

    `control` is where another owner finds the link, once `link` is closed.
    """

    ground: Path
    inside: tuple[str, ...]
    link: UserSpaceLink
    control: Path


@contextlib.contextmanager
def line() -> Iterator[Line]:
    """The two ends and the link, unshaped at first."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hil-")))
        ends = {}
        for name, own, other in (("ground", GROUND, BOARD), ("board", BOARD, GROUND)):
            process = broker.start(
                directory / name, tap=f"{name}0", address=f"{own}/24", neighbours={other: broker.GROUND_MAC}
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            ends[name] = process.pid
        relay = userspace_link.start(
            directory / "control",
            ground=f"broker:{directory / 'ground'}:ground0",
            board=f"broker:{directory / 'board'}:board0",
            seed=1,
        )
        stack.callback(relay.wait)
        stack.callback(relay.send_signal, signal.SIGTERM)
        link = UserSpaceLink("line", directory / "control")
        stack.callback(link.close)
        link.open()
        # As the same user, who is root in there: an ordinary user's namespace is entered this way as well.
        inside = ("nsenter", f"--target={ends['board']}", "--user", "--net", "--preserve-credentials")
        subprocess.run([*inside, "true"], check=True, env=os.environ)
        yield Line(directory / "ground", inside, link, directory / "control")
