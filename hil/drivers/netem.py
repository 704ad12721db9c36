"""Link emulation by Linux tc/netem on a box with two bridged ports, driven over SSH.

Each state is sent whole (netem keeps some parameters from the change before, and resets others), into one persistent
`tc -batch` process, and read back in the same exchange: the answer proves that the kernel has it. Our queueing
disciplines carry handle 1a5:, so that hil never removes what somebody else put there.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hil.drivers import ingress
from hil.drivers.link import LinkCounters, queue_limit
from hil.errors import BenchError, UsageError
from hil.model import Applied, Direction, LinkState

if TYPE_CHECKING:
    import paramiko

_T = TypeVar("_T")

HANDLE = "1a5:"
"""Handle of the qdiscs that hil makes. The same handle at each change keeps the packets that are under way."""

ORDERED_BPS = 100_000_000_000
"""Stands for "not limited" where packets must keep their order: a full frame takes it 0.12 us."""

# Leaving `corrupt` out would keep the old value, and some versions of tc refuse "0%": this rounds to 0 in the kernel.
_NO_PERCENT = "0.000000001%"


# ---------------------------------------------------------------------------------------------------------------------
# Codec


@dataclass(frozen=True, slots=True)
class Qdisc:
    """One root qdisc as `tc -s -j qdisc show` lists it. Handle "0:" is the kernel's own default."""

    kind: str
    handle: str
    options: Mapping[str, Any]
    counters: LinkCounters

    @property
    def ours(self) -> bool:
        return self.kind == "netem" and self.handle == HANDLE

    @property
    def foreign(self) -> bool:
        """Somebody put it there on purpose, and it was not hil."""
        return not self.ours and self.handle != "0:"


def wire_rate_bps(state: LinkState) -> int:
    """The rate that netem is given for `state`: netem keeps the order of packets exactly where a rate is set.

    Raises UsageError for what netem cannot do.
    """
    if state.rate_bps == 0:
        return 0 if state.reorder else ORDERED_BPS
    if state.reorder:
        raise UsageError(
            "netem keeps packets in order where a rate is set: `reorder` cannot be had with it",
            hint="leave the rate away, or use a user-space link",
        )
    return max(8, round(state.rate_bps))  # below one byte a second tc would send 0, which means "not limited"


def tc_line(interface: str, state: LinkState, limit: int) -> str:
    """The batch line that puts `state` on the egress of `interface`: complete, in integers, without a zero percentage.

    Microseconds and bit/s (whole bytes) are what every version of tc takes. Raises ValueError for a name that tc could
    read as something else.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,14}", interface):
        raise ValueError(f"not an interface name: {interface!r}")
    words = [f"qdisc replace dev {interface} root handle {HANDLE} netem limit {limit}"]
    delay_us, jitter_us = round(state.delay_s * 1e6), round(state.jitter_s * 1e6)
    # tc shows no jitter where there is no delay, and what does not show cannot be verified.
    words.append(f"delay {max(1, delay_us)}us {jitter_us}us" if jitter_us else f"delay {delay_us}us")
    for name, share in (("loss", state.effective_loss), ("duplicate", state.duplicate)):
        if share > 0:
            words.append(f"{name} {_percent(share)}")
    words.append(f"corrupt {_percent(state.corrupt) if state.corrupt > 0 else _NO_PERCENT}")
    words.append(f"rate {wire_rate_bps(state)}bit")
    return " ".join(words)


def _percent(share: float) -> str:
    text = f"{share * 100:.9f}".rstrip("0").rstrip(".")
    return f"{text}%" if float(text) else _NO_PERCENT


def parse_qdiscs(text: str) -> dict[str, Qdisc]:
    """Root qdiscs out of the JSON of `tc -s -j qdisc show [dev X]`: interface name ("" when asked for one) -> qdisc.

    Raises ValueError when it is not that.
    """
    found = {}
    for item in json.loads(text):
        if not item.get("root"):
            continue
        counters = LinkCounters(
            sent_bytes=item.get("bytes", 0),
            sent_packets=item.get("packets", 0),
            dropped=item.get("drops", 0),
            overlimits=item.get("overlimits", 0),
            backlog_bytes=item.get("backlog", 0),
            backlog_packets=item.get("qlen", 0),
        )
        found[item.get("dev", "")] = Qdisc(item["kind"], item["handle"], item.get("options", {}), counters)
    return found


def netem_state(options: Mapping[str, Any]) -> tuple[LinkState, int]:
    """The LinkState (but for its queue) and the limit that a netem qdisc has, from its JSON options.

    100 % loss reads as an outage.
    """
    delay = options.get("delay", {})
    loss = float(options.get("loss-random", {}).get("loss", 0.0))
    rate_bps = 8.0 * options.get("rate", {}).get("rate", 0)
    state = LinkState(
        delay_s=float(delay.get("delay", 0.0)),
        jitter_s=float(delay.get("jitter", 0.0)),
        loss=0.0 if loss == 1.0 else loss,
        rate_bps=0.0 if rate_bps == ORDERED_BPS else rate_bps,
        duplicate=float(options.get("duplicate", {}).get("duplicate", 0.0)),
        corrupt=float(options.get("corrupt", {}).get("corrupt", 0.0)),
        outage=loss == 1.0,
        reorder=rate_bps == 0,
    )
    return state, int(options.get("limit", 0))


def difference(asked: LinkState, limit: int, qdisc: Qdisc | None) -> str:
    """What the kernel has that was not asked for, as text; empty when it agrees but for tick and print rounding."""
    if qdisc is None:
        return "there is no root qdisc"
    if not qdisc.ours:
        return f"the root qdisc is {qdisc.kind} {qdisc.handle}, not netem {HANDLE}"
    got, got_limit = netem_state(qdisc.options)
    wrong = []
    # tc's ticks are 64 ns and it prints whole microseconds with six significant digits.
    rates = float(wire_rate_bps(asked)), 8.0 * qdisc.options.get("rate", {}).get("rate", 0)
    for name, want, have, step in (
        ("delay_s", asked.delay_s, got.delay_s, 2e-6),
        ("jitter_s", asked.jitter_s, got.jitter_s, 2e-6),
        ("rate_bps", *rates, 8.0),
        ("effective_loss", asked.effective_loss, got.effective_loss, 1e-9),
        ("duplicate", asked.duplicate, got.duplicate, 1e-9),
        ("corrupt", asked.corrupt, got.corrupt, 1e-9),
    ):
        if abs(want - have) > step + 1e-5 * want:
            wrong.append(f"{name} {have:g} instead of {want:g}")
    if got_limit != limit:
        wrong.append(f"limit {got_limit} instead of {limit}")
    # Loss models, slots, reordering and ECN are never ours; a leftover would bend every result.
    for name in ("reorder", "loss-state", "loss-gemodel", "slot"):
        if name in qdisc.options:
            wrong.append(f"an unasked {name}")
    return "; ".join(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# Transport


class Lost(Exception):
    """The connection to the box ended or does not answer; a new one may work."""


class Session(Protocol):
    """One running `tc -batch` on the box. Its stdout and stderr arrive in order in one stream."""

    def send(self, text: str) -> None:
        """Send all of `text`. Raises Lost."""

    def readline(self, deadline_s: float) -> str:
        """The next line, without its end; `deadline_s` on `time.monotonic()`. Raises Lost, also when none comes."""

    def run(self, command: str, timeout_s: float) -> str:
        """Run another command beside it and return what it prints. Raises Lost."""

    def close(self) -> None:
        """Give it up. Never raises."""


class SshSession:
    """`tc -force -batch -` over SSH; the output streams are one, so that errors keep their place among the answers."""

    def __init__(self, client: paramiko.SSHClient, sock: socket.socket, sudo: str, timeout_s: float) -> None:
        self._client, self._sock = client, sock
        self._buffer = bytearray()
        transport = client.get_transport()
        assert transport is not None
        self._transport = transport
        with _lost_when_broken(self, timeout_s):
            self._channel = transport.open_session(timeout=timeout_s)
            # /sbin in full: some shells prefer an applet of theirs. -s and -j hold for every `show` in the batch.
            self._channel.exec_command(f"exec {sudo}/sbin/tc -s -j -force -batch - 2>&1")

    def send(self, text: str) -> None:
        with _lost_when_broken(self, 5.0):
            self._channel.sendall(text.encode())

    def readline(self, deadline_s: float) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            self._channel.settimeout(max(0.001, deadline_s - time.monotonic()))
            with _lost_when_broken(self, None):
                data = self._channel.recv(1 << 16)
            if not data:
                said = self._buffer.decode(errors="replace").strip()
                raise Lost(f"tc ended: {said}" if said else "tc ended")
            self._buffer += data
        line = self._buffer[:end].decode(errors="replace")
        del self._buffer[: end + 1]
        return line

    def run(self, command: str, timeout_s: float) -> str:
        with _lost_when_broken(self, timeout_s):
            channel = self._transport.open_session(timeout=timeout_s)
            channel.settimeout(timeout_s)
            channel.exec_command(f"{command} 2>&1")
            printed = b"".join(iter(lambda: channel.recv(1 << 16), b""))
            # Its close must have come before ours goes out: some servers (dropbear) end the whole connection when
            # they hear of a channel that they have forgotten.
            ends_s = time.monotonic() + 1.0
            while not channel.closed and time.monotonic() < ends_s:
                time.sleep(0.001)
            channel.close()
            return printed.decode(errors="replace")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._client.close()
        with contextlib.suppress(OSError):
            self._sock.close()


@contextlib.contextmanager
def _lost_when_broken(session: SshSession, limit_s: float | None) -> Iterator[None]:
    """Raise Lost for whatever a dead connection raises; with `limit_s`, close the session when the body hangs."""
    import paramiko

    watchdog = threading.Timer(limit_s, session.close) if limit_s is not None else None
    if watchdog:
        watchdog.daemon = True
        watchdog.start()
    try:
        yield
    except TimeoutError as error:
        raise Lost("no answer in time") from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise Lost(str(error) or "connection lost") from error
    finally:
        if watchdog:
            watchdog.cancel()


def ssh_connector(
    *, host: str, port: int, user: str, key: Path, known_hosts: Path, timeout_s: float = 10.0
) -> Callable[[], Session]:
    """A function that opens an SshSession to the box. It raises Lost, or BenchError for wrong keys and pins."""
    from hil.drivers.ssh import ShellLost, ShellTimeout, dial

    def connect() -> Session:
        try:
            sock = socket.create_connection((host, port), timeout_s)
            client = dial(sock, host=host, port=port, user=user, key=key, known_hosts=known_hosts, timeout_s=timeout_s)
        except (OSError, ShellLost, ShellTimeout) as error:
            raise Lost(str(error)) from error
        return SshSession(client, sock, "" if user == "root" else "sudo -n ", timeout_s)

    return connect


# ---------------------------------------------------------------------------------------------------------------------
# The driver


@dataclass(slots=True)
class NetemSsh:
    """The link emulator on a netem box: `interfaces` names the port whose egress shapes each direction.

    Blocking; calls from several threads take turns. A dropped connection is opened again once a call; then, and when
    tc refuses or reads back something else, BenchError says what happened in tc's own words.

    A direction whose interface is `ingress:PORT` is shaped on arrival. `replace_foreign` permits to replace somebody
    else's root qdisc, which `clear` does not bring back.
    """

    name: str
    interfaces: Mapping[Direction, str]
    connect: Callable[[], Session]
    timeout_s: float = 5.0
    clock: Callable[[], float] = time.monotonic
    replace_foreign: bool = False
    sudo: str = ""
    _session: Session | None = None
    _checked: bool = False
    _switched_off: dict[str, list[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _answered_s: deque[float] = field(default_factory=lambda: deque(maxlen=16))

    @property
    def lead_s(self) -> float:
        """Half of the quickest of the last answers: the box changes its link between a state's sending and its answer.

        The quickest, because what made others slower may have come before the change or after it.
        """
        return min(self._answered_s, default=0.0) / 2

    @classmethod
    def at(
        cls,
        name: str,
        *,
        host: str,
        port: int,
        user: str,
        key: Path,
        known_hosts: Path,
        uplink_interface: str,
        downlink_interface: str,
        timeout_s: float = 5.0,
        replace_foreign: bool = False,
    ) -> NetemSsh:
        """The emulator behind an SSH address, as a bench file describes it. Does not connect yet."""
        connect = ssh_connector(host=host, port=port, user=user, key=key, known_hosts=known_hosts)
        interfaces: dict[Direction, str] = {"uplink": uplink_interface, "downlink": downlink_interface}
        sudo = "" if user == "root" else "sudo -n "
        return cls(name, interfaces, connect, timeout_s, replace_foreign=replace_foreign, sudo=sudo)

    def open(self) -> None:
        """Connect and switch segmentation offloads off.

        Refuses (BenchError) when a port is missing or has a qdisc that hil did not make.
        """
        with self._lock:
            self._retried(lambda session: None)

    def apply(self, states: Mapping[Direction, LinkState], scheduled_s: float) -> dict[Direction, Applied]:
        """Put complete states on the link and read them back; times are on the driver's clock (`time.monotonic`).

        Directions that are left out stay as they are. BenchError when the box does not have exactly what was asked.
        """
        limits = {direction: queue_limit(state) for direction, state in states.items()}
        changes = [tc_line(self._device(d), state, limits[d]) for d, state in states.items()]
        # Every change before the first read-back: both directions change together.
        batch = "\n".join(changes + [self._show(direction) for direction in states]) + "\n"

        def exchange(session: Session) -> dict[Direction, tuple[float, float, Qdisc | None]]:
            sent_s = self.clock()
            session.send(batch)
            return {direction: (sent_s, *self._answer(session, direction)) for direction in states}

        applied: dict[Direction, Applied] = {}
        with self._lock:
            answers = self._retried(exchange)
            if answers:
                self._answered_s.append(min(acknowledged_s - sent_s for sent_s, acknowledged_s, _ in answers.values()))
            for direction, (sent_s, acknowledged_s, qdisc) in answers.items():
                wrong = difference(states[direction], limits[direction], qdisc)
                if wrong:
                    port = self.interfaces[direction]
                    raise BenchError(f"link {self.name}: {port} reads back {wrong}", hint="see `hil link show`")
                applied[direction] = Applied(scheduled_s, sent_s, acknowledged_s, self.clock())
        return applied

    def state(self) -> dict[Direction, LinkState | None]:
        """What each direction has now; None where hil has not shaped it."""
        return {d: netem_state(q.options)[0] if q and q.ours else None for d, q in self._qdiscs().items()}

    def counters(self) -> dict[Direction, LinkCounters]:
        """Counters of each direction's root qdisc; they restart at 0 when the box does or the link is cleared."""
        nothing = LinkCounters(0, 0, 0, 0, 0, 0)
        return {direction: qdisc.counters if qdisc else nothing for direction, qdisc in self._qdiscs().items()}

    def clear(self) -> list[str]:
        """Remove what hil put on the ports and nothing else; returns their names. Verified by reading back."""

        def exchange(session: Session) -> list[str]:
            roots = self._ask(session)
            ours = [direction for direction, qdisc in roots.items() if qdisc and qdisc.ours]
            if ours:
                session.send("".join(f"qdisc del dev {self._device(d)} root handle {HANDLE}\n" for d in ours))
                left = [self.interfaces[d] for d, qdisc in self._ask(session).items() if qdisc and qdisc.ours]
                if left:
                    raise BenchError(f"link {self.name}: {', '.join(left)} is still shaped after clearing")
            self._undo(session)
            return [self.interfaces[direction] for direction in ours]

        with self._lock:
            return self._retried(exchange, foreign_ok=True)

    def preflight(self) -> dict[str, Any]:
        """Facts of the box for the run's provenance: kernel, tc, netem, per port qdisc and offloads; and `warnings`.

        Offloads are None when the box has no ethtool; netem is "loaded", "module" or "missing".
        """
        script = (
            "uname -r; /sbin/tc -V; "
            "if [ -d /sys/module/sch_netem ]; then echo loaded; "
            "elif /sbin/modprobe -n -q sch_netem 2>/dev/null; then echo module; else echo missing; fi; "
            "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
        )
        ports = list(self.interfaces.values())

        def exchange(session: Session) -> dict[str, Any]:
            kernel, tc, netem, clocksource, *_ = [*session.run(script, self.timeout_s).splitlines(), *["unknown"] * 4]
            offloads = self._offloads(session)
            roots = {self.interfaces[direction]: qdisc for direction, qdisc in self._ask(session).items()}
            interfaces = {port: _port_facts(roots[port], offloads.get(ingress.port_of(port) or port)) for port in ports}
            facts = {
                "backend": "netem over SSH",
                "kernel": kernel,
                "tc": tc,
                "netem": netem,
                "clocksource": clocksource,
                "interfaces": interfaces,
            }
            return facts | {"warnings": port_warnings(netem, clocksource, interfaces)}

        with self._lock:
            return self._retried(exchange, foreign_ok=True)

    def close(self) -> None:
        """Drop the connection and leave the link as it is."""
        with self._lock:
            self._drop()

    def _qdiscs(self) -> dict[Direction, Qdisc | None]:
        with self._lock:
            return self._retried(self._ask, foreign_ok=True)

    def _retried(self, exchange: Callable[[Session], _T], *, foreign_ok: bool = False) -> _T:
        """Run one exchange, on a fresh connection if the one we have turns out to be gone; once."""
        for attempt in (1, 2):
            try:
                if self._session is None:
                    self._session, self._checked = self.connect(), False
                if not (self._checked or foreign_ok):
                    self._lead_arrivals(self._session)
                    self._refuse_foreign(self._ask(self._session))
                    self._stop_offloads(self._session)
                    self._checked = True
                return exchange(self._session)
            except Lost as error:
                self._drop()
                if attempt == 2:
                    raise BenchError(
                        f"link {self.name}: the netem box is lost: {error}",
                        hint="is it powered and reachable? on the virtual bench: `hil virtual status`",
                    ) from error
            except BaseException:
                self._drop()  # answers to a broken exchange must not be taken for those to the next
                raise
        raise AssertionError("unreachable")

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _refuse_foreign(self, roots: Mapping[Direction, Qdisc | None]) -> None:
        for direction, qdisc in roots.items():
            if qdisc and qdisc.foreign and not self.replace_foreign:
                port = self.interfaces[direction]
                raise BenchError(
                    f"link {self.name}: {port} has a root qdisc that hil did not make: {qdisc.kind} {qdisc.handle}",
                    hint=f"if nobody needs it, on the box: tc qdisc del dev {port} root; "
                    "or `replace_qdisc: true` for the link",
                )

    def _device(self, direction: Direction) -> str:
        """Where the direction's qdisc sits."""
        return ingress.device(self.interfaces[direction])

    def _offloads(self, session: Session) -> dict[str, dict[str, bool]]:
        ports = dict.fromkeys(ingress.port_of(name) or name for name in self.interfaces.values())
        asked = "; ".join(f"echo '== {port}'; /sbin/ethtool -k {shlex.quote(port)} 2>/dev/null" for port in ports)
        return parse_offloads(session.run(asked, self.timeout_s))

    def _stop_offloads(self, session: Session) -> None:
        """Switch off what is on; what the driver does not let go of stays, and preflight warns of it."""
        for port, features in self._offloads(session).items():
            if on := [name for name, value in features.items() if value]:
                switches = "; ".join(f"{self.sudo}/sbin/ethtool -K {shlex.quote(port)} {name} off" for name in on)
                session.run(switches, self.timeout_s)
                self._switched_off.setdefault(port, []).extend(on)

    def _lead_arrivals(self, session: Session) -> None:
        """Make the ifb devices for `ingress:` interfaces, unless they are there."""
        for port in filter(None, map(ingress.port_of, self.interfaces.values())):
            there = f"[ -e /sys/class/net/{shlex.quote(ingress.device('ingress:' + port))} ] && echo there"
            if session.run(there, self.timeout_s).strip() == "there":
                continue
            said = session.run(self._script(ingress.set_up(port)) + " && echo done", self.timeout_s).strip()
            if said != "done":
                session.run(self._script(ingress.take_down(port)[1:]), self.timeout_s)
                raise BenchError(f"link {self.name}: ingress of {port}: the box says: {said}", hint=_hint(said))

    def _undo(self, session: Session) -> None:
        """Take ifb devices down and bring offloads back that this driver switched off; the next use makes them anew."""
        arrivals = list(filter(None, map(ingress.port_of, self.interfaces.values())))
        if arrivals or self._switched_off:
            self._checked = False
        for port in arrivals:
            there = f"[ -e /sys/class/net/{shlex.quote(ingress.device('ingress:' + port))} ] && "
            session.run(there + self._script(ingress.take_down(port)), self.timeout_s)
        for port, names in self._switched_off.items():
            words = "; ".join(f"{self.sudo}/sbin/ethtool -K {shlex.quote(port)} {name} on" for name in names)
            session.run(words, self.timeout_s)
        self._switched_off.clear()

    def _script(self, commands: list[list[str]]) -> str:
        """One command whose standard error is one stream as well."""
        return "{ " + " && ".join(f"{self.sudo}/sbin/{shlex.join(argv)}" for argv in commands) + "; } 2>&1"

    def _ask(self, session: Session) -> dict[Direction, Qdisc | None]:
        session.send("".join(self._show(direction) + "\n" for direction in self.interfaces))
        return {direction: self._answer(session, direction)[1] for direction in self.interfaces}

    def _show(self, direction: Direction) -> str:
        return f"qdisc show dev {self._device(direction)}"

    def _answer(self, session: Session, direction: Direction) -> tuple[float, Qdisc | None]:
        """When the answer to one `show` came, and the port's root qdisc. Lines before it are complaints: BenchError."""
        deadline_s = time.monotonic() + self.timeout_s
        complaints: list[str] = []
        while not (line := session.readline(deadline_s)).startswith("["):
            # tc ends each complaint so; when the `show` itself failed there is no more to come.
            if line.startswith("Command failed") and any("Cannot find device" in text for text in complaints):
                break
            complaints.append(line.strip())
        arrived_s = self.clock()
        said = "; ".join(text for text in complaints if text and not text.startswith("Command failed"))
        if "Cannot find device" in said and not self._checked and ingress.port_of(self.interfaces[direction]):
            return arrived_s, None  # its ifb device is made when the link is opened
        if complaints:
            raise BenchError(f"link {self.name}: {self.interfaces[direction]}: tc says: {said}", hint=_hint(said))
        try:
            return arrived_s, parse_qdiscs(line).get("")
        except (ValueError, KeyError) as error:
            raise BenchError(f"link {self.name}: cannot read tc's answer ({error!r}): {line[:200]}") from error


def _hint(said: str) -> str:
    """What usually helps against one of tc's complaints."""
    if "qdisc kind is unknown" in said or "Unknown qdisc" in said:
        return "the box's kernel has no netem: on the box `modprobe sch_netem`"
    if "Operation not permitted" in said:
        return "the SSH user must be root there, or may run /sbin/tc by sudo without a password"
    if "Cannot find device" in said:
        return "check uplink_interface and downlink_interface in the bench file"
    return ""


def _port_facts(qdisc: Qdisc | None, offloads: Mapping[str, bool] | None) -> dict[str, Any]:
    described = f"{qdisc.kind} {qdisc.handle}" if qdisc else None
    return {"qdisc": described, "foreign": bool(qdisc and qdisc.foreign), "offloads": offloads}


def parse_offloads(text: str) -> dict[str, dict[str, bool]]:
    """Sections `== PORT` of `ethtool -k` output as port -> {"tso", "gso", "gro", "lro"} -> on; empty ones left out."""
    names = {
        "tcp-segmentation-offload": "tso",
        "generic-segmentation-offload": "gso",
        "generic-receive-offload": "gro",
        "large-receive-offload": "lro",
    }
    found: dict[str, dict[str, bool]] = {}
    port = ""
    for line in text.splitlines():
        if line.startswith("== "):
            port = line[3:].strip()
        elif (match := re.match(r"([a-z-]+): (on|off)", line.strip())) and match[1] in names:
            found.setdefault(port, {})[names[match[1]]] = match[2] == "on"
    return found


def port_warnings(netem: str, clocksource: str, interfaces: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the results should know about the box."""
    found = []
    if netem == "missing":
        found.append("the kernel has no sch_netem")
    if clocksource == "kvm-clock":
        found.append("the box keeps time by kvm-clock: delays may jitter")
    for port, facts in interfaces.items():
        if facts["foreign"]:
            found.append(f"{port} has a root qdisc that hil did not make ({facts['qdisc']}): hil will not shape it")
        if facts["offloads"] is None:
            found.append(f"{port}: offloads unknown (no ethtool on the box)")
        elif on := [name for name, value in facts["offloads"].items() if value]:
            found.append(
                f"{port}: {', '.join(on)} on: one loss may take 64 KiB; hil switches off what the driver lets it, "
                "once it shapes"
            )
    return found
