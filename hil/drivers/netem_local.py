"""Link emulation by this host's own netem, over netlink: a change and its read-back take some tens of microseconds.

For benches whose link crosses this host: two bridged ports, or one port with `ingress:` for the way back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hil.drivers import ingress, offloads
from hil.drivers.link import LinkCounters, queue_limit
from hil.drivers.netem import HANDLE, ORDERED_BPS, port_warnings, wire_rate_bps
from hil.drivers.netlink import (
    Netem,
    QdiscMessage,
    RouteSocket,
    decode_netem,
    delete_root,
    encode_netem,
    get_root,
    parse_qdisc,
    set_root,
)
from hil.errors import BenchError
from hil.model import Applied, Direction, LinkState

_HANDLE = int(HANDLE.rstrip(":"), 16) << 16
_CAP_NET_ADMIN = 12


def netem_of(state: LinkState, seed: int | None = None) -> Netem:
    """The complete parameters for `state`. Raises UsageError for what netem cannot do."""
    return Netem(
        limit=queue_limit(state),
        latency_ns=round(state.delay_s * 1e9),
        jitter_ns=round(state.jitter_s * 1e9),
        loss=state.effective_loss,
        duplicate=state.duplicate,
        corrupt=state.corrupt,
        rate_bytes_s=wire_rate_bps(state) // 8,
        seed=seed,
    )


def state_of(netem: Netem) -> LinkState:
    """The state (but for its queue) that a netem has; 100 % loss reads as an outage."""
    loss = netem.loss if isinstance(netem.loss, float) else 0.0
    rate_bps = 8.0 * netem.rate_bytes_s
    return LinkState(
        delay_s=netem.latency_ns / 1e9,
        jitter_s=netem.jitter_ns / 1e9,
        loss=0.0 if loss == 1.0 else loss,
        rate_bps=0.0 if rate_bps == ORDERED_BPS else rate_bps,
        duplicate=netem.duplicate,
        corrupt=netem.corrupt,
        outage=loss == 1.0,
        reorder=rate_bps == 0,
    )


def difference(asked: Netem, root: QdiscMessage | None) -> str:
    """What the kernel has that was not asked for, as text; empty when it agrees to the last bit."""
    if root is None or root.handle != _HANDLE or root.kind != "netem":
        return f"root qdisc {_described(root)} instead of netem {HANDLE}"
    got, want = decode_netem(root.options), decode_netem(encode_netem(asked))
    names = [name for name in Netem.__dataclass_fields__ if name != "seed"]
    return "; ".join(
        f"{name} {getattr(got, name)} instead of {getattr(want, name)}"
        for name in names
        if getattr(got, name) != getattr(want, name)
    )


@dataclass(slots=True)
class NetemLocal:
    """The link emulator on this host's own ports: `interfaces` names the one whose egress shapes each direction.

    `seed` makes the kernel's losses repeatable where it can (Linux 6.6); it is sent when hil's qdisc is made and never
    again, since netem starts the pattern anew each time. `replace_foreign` permits to replace somebody else's root
    qdisc, which `clear` does not bring back. Everything is BenchError with the kernel's own words.
    """

    name: str
    interfaces: Mapping[Direction, str]
    seed: int | None = None
    replace_foreign: bool = False
    clock: Callable[[], float] = time.monotonic
    connect: Callable[[], RouteSocket] = RouteSocket
    _socket: RouteSocket | None = None
    _indices: dict[Direction, int] = field(default_factory=dict)
    _seeded: set[int] = field(default_factory=set)
    _switched_off: dict[str, list[str]] = field(default_factory=dict)

    @property
    def lead_s(self) -> float:
        """None: the kernel has a state some 20 us after it was sent."""
        return 0.0

    def open(self) -> None:
        """Find the ports; refuse one with a qdisc that hil did not make; switch segmentation offloads off."""
        if self._socket is not None:
            return
        with self._told("open"):
            for interface in self.interfaces.values():
                self._lead_arrivals(interface)
            self._socket = self.connect()
            self._indices = {d: self._socket.ifindex(ingress.device(i)) for d, i in self.interfaces.items()}
            for direction, root in self._roots().items():
                if self._foreign(root) and not self.replace_foreign:
                    self.close()
                    port = self.interfaces[direction]
                    raise BenchError(
                        f"link {self.name}: {port} has a root qdisc that hil did not make: {_described(root)}",
                        hint=f"if nobody needs it: tc qdisc del dev {port} root; or `replace_qdisc: true` for the link",
                    )
            self._stop_offloads()

    def apply(self, states: Mapping[Direction, LinkState], scheduled_s: float) -> dict[Direction, Applied]:
        """Put complete states on the ports and read them back, in one exchange with the kernel."""
        self.open()
        wanted = {d: netem_of(state, self._seed_for(d)) for d, state in states.items()}
        changes = [set_root(self._indices[d], _HANDLE, "netem", encode_netem(netem)) for d, netem in wanted.items()]
        with self._told("apply"):
            sock = self._opened()
            sent_s = self.clock()
            sequences = sock.send([*changes, *(get_root(self._indices[d]) for d in wanted)])
            acknowledged_s = self.clock()  # the kernel works while we send; a refusal is told by what it answers
            answers = list(sock.receive(sequences).values())[len(changes) :]
        for (direction, netem), bodies in zip(wanted.items(), answers, strict=True):
            wrong = difference(netem, parse_qdisc(bodies[0]) if bodies else None)
            if wrong:
                raise BenchError(f"link {self.name}: {self.interfaces[direction]} reads back {wrong}")
            self._seeded.add(self._indices[direction])
        verified_s = self.clock()
        return {direction: Applied(scheduled_s, sent_s, acknowledged_s, verified_s) for direction in states}

    def state(self) -> dict[Direction, LinkState | None]:
        """What each direction has now; None where hil has not shaped it."""
        return {d: state_of(decode_netem(q.options)) if q and _ours(q) else None for d, q in self._roots().items()}

    def counters(self) -> dict[Direction, LinkCounters]:
        """Counters of each direction's root qdisc; they restart at 0 when the link is cleared."""
        nothing = LinkCounters(0, 0, 0, 0, 0, 0)
        return {
            d: nothing
            if q is None
            else LinkCounters(q.sent_bytes, q.sent_packets, q.drops, q.overlimits, q.backlog, q.qlen)
            for d, q in self._roots().items()
        }

    def seeds(self) -> dict[Direction, int | None]:
        """The seed of each direction's losses as the kernel tells it; None before Linux 6.6 and where nothing is."""
        return {d: decode_netem(q.options).seed if q and _ours(q) else None for d, q in self._roots().items()}

    def clear(self) -> list[str]:
        """Remove what hil put on the ports, bring back offloads that it switched off; verified by reading back."""
        ours = {d: self.interfaces[d] for d, q in self._roots().items() if q and _ours(q)}
        if ours:
            with self._told("clear"), contextlib.closing(self.connect()) as sock:
                sock.ask(*(delete_root(self._indices[d], _HANDLE) for d in ours))
        self._seeded.clear()
        if left := [self.interfaces[d] for d, q in self._roots().items() if q and _ours(q)]:
            raise BenchError(f"link {self.name}: {', '.join(left)} is still shaped after clearing")
        for port, names in self._switched_off.items():
            with contextlib.suppress(OSError):
                offloads.switch(port, names, on=True)
        self._switched_off.clear()
        self.close()
        for interface in self.interfaces.values():
            arrivals = ingress.port_of(interface)
            if arrivals is not None and _exists(ingress.device(interface)):
                _run(self.name, ingress.take_down(arrivals))
        return list(ours.values())

    def preflight(self) -> dict[str, Any]:
        """Facts of this host for the run's provenance: kernel, netem, per port qdisc and offloads; and `warnings`."""
        netem, may = netem_module(), may_administer()
        interfaces: dict[str, dict[str, Any]] = {}
        with contextlib.closing(self.connect()) as sock:
            for interface in self.interfaces.values():
                interfaces[interface] = self._port_facts(sock, interface)
        clocksource = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        source = clocksource.read_text().strip() if clocksource.exists() else "unknown"
        warnings = [] if may else ["no CAP_NET_ADMIN: this process may not shape anything"]
        return {
            "backend": "netem over netlink",
            "kernel": platform.release(),
            "netem": netem,
            "clocksource": source,
            "interfaces": interfaces,
            "seed": self.seed,
            "warnings": warnings + port_warnings(netem, source, interfaces),
        }

    def close(self) -> None:
        """Let go of the socket; the link stays as it is."""
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()

    def _roots(self) -> dict[Direction, QdiscMessage | None]:
        if self._socket is None:  # a look needs no set-up, and must not refuse
            with self._told("ask"), contextlib.closing(self.connect()) as sock:
                found: dict[Direction, QdiscMessage | None] = {}
                for direction, interface in self.interfaces.items():
                    there = ingress.port_of(interface) is None or _exists(ingress.device(interface))
                    self._indices[direction] = sock.ifindex(ingress.device(interface)) if there else 0
                    found[direction] = sock.root(self._indices[direction]) if there else None
                return found
        with self._told("ask"):
            answers = self._opened().ask(*(get_root(self._indices[d]) for d in self.interfaces))
            return {d: parse_qdisc(b[0]) if b else None for d, b in zip(self.interfaces, answers, strict=True)}

    def _opened(self) -> RouteSocket:
        if self._socket is None:
            raise OSError(errno.EBADF, "the link is not open")
        return self._socket

    def _foreign(self, root: QdiscMessage | None) -> bool:
        return root is not None and root.handle != 0 and not _ours(root)

    def _seed_for(self, direction: Direction) -> int | None:
        if self.seed is None or self._indices[direction] in self._seeded:
            return None
        return self.seed + (direction == "downlink")  # the two directions do not lose alike

    def _port_facts(self, sock: RouteSocket, interface: str) -> dict[str, Any]:
        port = ingress.port_of(interface)
        try:
            found = offloads.read(port or interface)
            made = port is None or _exists(ingress.device(interface))  # an ifb device is made when the link is opened
            root = sock.root(sock.ifindex(ingress.device(interface))) if made else None
        except OSError as error:
            raise self._error("preflight", error) from error
        return {"qdisc": _described(root), "foreign": self._foreign(root), "offloads": found}

    def _stop_offloads(self) -> None:
        for interface in self.interfaces.values():
            port = ingress.port_of(interface) or interface
            on = [name for name, value in (offloads.read(port) or {}).items() if value]
            for name in on:
                with contextlib.suppress(OSError):  # fixed on by the driver: preflight warns of it
                    offloads.switch(port, [name], on=False)
                    self._switched_off.setdefault(port, []).append(name)

    def _lead_arrivals(self, interface: str) -> None:
        port = ingress.port_of(interface)
        if port is not None and not _exists(ingress.device(interface)):
            try:
                _run(self.name, ingress.set_up(port))
            except BenchError:
                with contextlib.suppress(BenchError):
                    _run(self.name, ingress.take_down(port)[1:])  # only the device: the rest may be somebody else's
                raise

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """OSError becomes a BenchError in the kernel's words, and the socket is given up."""
        try:
            yield
        except OSError as error:
            self.close()
            raise self._error(what, error) from error

    def _error(self, what: str, error: OSError) -> BenchError:
        hints = {
            errno.ENOENT: "this kernel has no netem: `modprobe sch_netem`, or a link of another driver",
            errno.EPERM: "hil must run as root here, or with CAP_NET_ADMIN",
            errno.ENODEV: "check uplink_interface and downlink_interface in the bench file",
        }
        number = errno.errorcode.get(error.errno or 0, str(error.errno))
        ports = ", ".join(self.interfaces.values())
        said = error.strerror or str(error)
        return BenchError(
            f"link {self.name}: {what} on {ports}: {number}: {said}", hint=hints.get(error.errno or 0, "")
        )


def netem_module() -> str:
    """Whether this kernel has netem: "loaded", "module" (can be loaded) or "missing"."""
    if Path("/sys/module/sch_netem").is_dir():
        return "loaded"
    modules = Path("/lib/modules") / platform.release()
    with contextlib.suppress(OSError):
        if "/sch_netem.ko" in (modules / "modules.builtin").read_text():
            return "loaded"
    with contextlib.suppress(OSError):
        if "/sch_netem.ko" in (modules / "modules.dep").read_text():
            return "module"
    return "missing"


def may_administer() -> bool:
    """Whether this process has CAP_NET_ADMIN."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return os.geteuid() == 0


def _ours(root: QdiscMessage) -> bool:
    return root.kind == "netem" and root.handle == _HANDLE


def _described(root: QdiscMessage | None) -> str:
    return "none" if root is None else f"{root.kind} {root.handle >> 16:x}:"


def _exists(interface: str) -> bool:
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(interface) > 0
    return False


def _run(name: str, commands: list[list[str]]) -> None:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    for argv in commands:
        tool = shutil.which(argv[0], path=path)
        if tool is None:
            raise BenchError(f"link {name}: the program `{argv[0]}` is missing", hint="apt install iproute2")
        done = subprocess.run([tool, *argv[1:]], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"link {name}: `{' '.join(argv)}`: {(done.stderr or done.stdout).strip()}")
