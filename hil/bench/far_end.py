"""Who answers probes at the board's end of a link: a process on this host in the board's place, or the board itself."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hil.bench.certificate import Probe
from hil.drivers import broker, link_agent, userspace_link
from hil.drivers.ssh import Login, Shell
from hil.errors import BenchError
from hil.inventory.bench import SshWire

PORT = 4711
_START_S = 20.0
_GROUND, _FAR, _PREFIX = "10.42.0.1", "10.42.0.2", 24
_FAR_MAC = "52:54:00:99:00:02"
# The program comes first on the agent's standard input; the end of that input is the agent's end.
_BOOT = (
    "import sys; text = sys.stdin.buffer.read(int(sys.argv[1])); sys.argv = ['agent', sys.argv[2]]; "
    "exec(compile(text, 'link_agent.py', 'exec'), {'__name__': '__main__'})"
)


@dataclass(frozen=True, slots=True)
class FarEnd:
    """A far end that answers. `one_clock`: it is on this host, so that delays can be told one-way."""

    path: Probe
    what: str
    one_clock: bool


@contextlib.contextmanager
def behind_stream(
    inner: Path, broker_socket: Path | None, *, address: str, prefix: int, mac: str, ground: str
) -> Iterator[FarEnd]:
    """Plug into a stream socket where a board's QEMU would be; the board must be off. BenchError when it is taken."""
    argv = [sys.executable, "-m", "hil.drivers.link_agent", str(PORT), "--stream", str(inner)]
    argv += ["--address", f"{address}/{prefix}", "--mac", mac, "--ground", f"{ground}={broker.GROUND_MAC}"]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if not select.select([process.stdout], [], [], _START_S)[0] or process.stdout.readline() != b"ready\n":
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip().splitlines()
            raise BenchError(f"no far end behind {inner}: {said[-1] if said else 'it did not start'}")
        yield _answering(broker_socket, address, f"a process of this host in the board's place, at {inner}", True)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@contextlib.contextmanager
def on_board(mgmt: SshWire, broker_socket: Path | None, address: str) -> Iterator[FarEnd]:
    """Run the agent on the board, started over its management port; it needs a `python3` there."""
    text = Path(link_agent.__file__).read_bytes()
    jump: Sequence[Login] = [Login(hop.address, hop.port, hop.user, hop.key, hop.known_hosts) for hop in mgmt.jump]
    with Shell.connect(mgmt.address, mgmt.port, mgmt.user, mgmt.key, mgmt.known_hosts, jump=jump) as shell:
        process = shell.start(["python3", "-c", _BOOT, str(len(text)), str(PORT)])
        process.write(text, _START_S)
        if (said := process.read(_START_S)) != b"ready\n":
            raise BenchError(f"the board's agent said {said!r} instead of ready", hint="is python3 on the board?")
        try:
            yield _answering(broker_socket, address, f"an agent on the board at {mgmt.address}", False)
        finally:
            process.kill()


@contextlib.contextmanager
def user_space_bench(directory: Path, seed: int | None = None) -> Iterator[tuple[userspace_link.UserSpaceLink, FarEnd]]:
    """A link in user space between two namespaces of this host, with nothing else: for hosts that have no bench."""
    with contextlib.ExitStack() as stack:
        payload, inner, control = directory / "payload.sock", directory / "inner.sock", directory / "link.sock"
        ground = broker.start(payload, tap="payload0", address=f"{_GROUND}/{_PREFIX}", neighbours={_FAR: _FAR_MAC})
        stack.callback(_end, ground)
        process = userspace_link.start(
            control, ground=f"broker:{payload}:payload0", board=f"listen:{inner}", seed=seed, with_parent=True
        )
        stack.callback(_end, process)
        link = userspace_link.UserSpaceLink("user-space", control)
        stack.callback(link.close)
        far = stack.enter_context(
            behind_stream(inner, payload, address=_FAR, prefix=_PREFIX, mac=_FAR_MAC, ground=_GROUND)
        )
        yield link, far


def _answering(broker_socket: Path | None, address: str, what: str, one_clock: bool) -> FarEnd:
    """The far end, once it answers."""
    ends_s = time.monotonic() + _START_S
    path = Probe(broker.connect_udp(broker_socket, address, PORT))
    if not path.alive(ends_s - time.monotonic()):
        raise BenchError(
            f"nothing answers at {address} behind the link",
            hint="is the emulator up, is the payload network wired through it, and is no outage left on it?",
        )
    return FarEnd(path, what, one_clock)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait()
