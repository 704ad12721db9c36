"""Traffic control over rtnetlink: the kernel's own messages, byte for byte, with a complete TCA_NETEM encoding.

Written out because the libraries at hand send only a part of netem (no loss models, no 64-bit delay or rate, no slot,
no seed), and netem keeps from one change to the next what a message leaves out. Standard library only, so that the same
file runs inside a small box. Sources: linux/pkt_sched.h, linux/rtnetlink.h, net/sched/sch_netem.c of Linux 6.18.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

RTM_NEWLINK, RTM_GETLINK = 16, 18
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_ECHO, _NLM_F_REPLACE, _NLM_F_CREATE = 0x1, 0x4, 0x8, 0x100, 0x400
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_NLMSG_ERROR = 2
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_TC_H_ROOT = 0xFFFFFFFF
_IFLA_IFNAME = 3
_TCA_KIND, _TCA_OPTIONS, _TCA_STATS2 = 1, 2, 7
_STATS_BASIC, _STATS_QUEUE = 1, 3
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

# Attributes of netem, after its fixed part.
_CORR, _REORDER, _CORRUPT, _LOSS, _RATE, _ECN, _RATE64 = 1, 3, 4, 5, 6, 7, 8
_LATENCY64, _JITTER64, _SLOT, _SEED = 10, 11, 12, 14
_LOSS_STATES, _LOSS_GILBERT = 1, 2
_U32 = 0xFFFFFFFF
_TICK_NS = 64  # of the fixed part's delay and jitter; the 64-bit attributes are in nanoseconds


# ---------------------------------------------------------------------------------------------------------------------
# netem's parameters


@dataclass(frozen=True, slots=True)
class GilbertElliott:
    """Loss by a two-state chain, stepped a packet: good -> bad with `p`, back with `r`.

    `bad_loss` of the packets are lost in the bad state (1-h in tc's words), `good_loss` in the good one (1-k).
    """

    p: float
    r: float
    bad_loss: float = 1.0
    good_loss: float = 0.0


@dataclass(frozen=True, slots=True)
class FourStates:
    """Loss by netem's four-state chain; the transition probabilities by their state numbers."""

    p13: float
    p31: float
    p32: float
    p14: float
    p23: float


@dataclass(frozen=True, slots=True)
class Slot:
    """Packets leave in slots, as on a channel shared by time: a slot every min..max ns, so many packets or bytes each.

    0 packets or bytes: no limit.
    """

    min_delay_ns: int = 0
    max_delay_ns: int = 0
    max_packets: int = 0
    max_bytes: int = 0
    dist_delay_ns: int = 0
    dist_jitter_ns: int = 0


@dataclass(frozen=True, slots=True)
class Netem:
    """Everything that netem can be told but for delay tables. Shares and correlations are 0..1, the rate is in bytes/s.

    `reorder` of the packets are sent at once (every `gap`th, when that is set). `seed` starts the pattern of losses
    anew at every change that carries it: send it once.
    """

    limit: int = 1000
    latency_ns: int = 0
    jitter_ns: int = 0
    loss: float | GilbertElliott | FourStates = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0
    gap: int = 0
    rate_bytes_s: int = 0
    packet_overhead: int = 0
    cell_size: int = 0
    cell_overhead: int = 0
    delay_correlation: float = 0.0
    loss_correlation: float = 0.0
    duplicate_correlation: float = 0.0
    reorder_correlation: float = 0.0
    corrupt_correlation: float = 0.0
    ecn: bool = False
    slot: Slot = field(default_factory=Slot)
    seed: int | None = None


def _share(value: float) -> int:
    return round(value * _U32)


def _fraction(raw: int) -> float:
    return raw / _U32


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def encode_netem(netem: Netem) -> bytes:
    """The payload of TCA_OPTIONS: the fixed part and every attribute, zeros included, so that nothing old stays."""
    random_loss = netem.loss if isinstance(netem.loss, float | int) else 0.0
    fixed = struct.pack(
        "=6I",
        min(_U32, netem.latency_ns // _TICK_NS),
        netem.limit,
        _share(random_loss),
        netem.gap,
        _share(netem.duplicate),
        min(_U32, netem.jitter_ns // _TICK_NS),
    )
    correlations = (netem.delay_correlation, netem.loss_correlation, netem.duplicate_correlation)
    slot = netem.slot
    attributes = [
        _attribute(_CORR, struct.pack("=3I", *map(_share, correlations))),
        _attribute(_REORDER, struct.pack("=2I", _share(netem.reorder), _share(netem.reorder_correlation))),
        _attribute(_CORRUPT, struct.pack("=2I", _share(netem.corrupt), _share(netem.corrupt_correlation))),
        # The kernel takes the larger of the two rates.
        _attribute(
            _RATE,
            struct.pack(
                "=IiIi", min(_U32, netem.rate_bytes_s), netem.packet_overhead, netem.cell_size, netem.cell_overhead
            ),
        ),
        _attribute(_RATE64, struct.pack("=Q", netem.rate_bytes_s if netem.rate_bytes_s > _U32 else 0)),
        _attribute(_LATENCY64, struct.pack("=q", netem.latency_ns)),
        _attribute(_JITTER64, struct.pack("=q", netem.jitter_ns)),
        _attribute(_ECN, struct.pack("=I", netem.ecn)),
        _attribute(
            _SLOT,
            struct.pack(
                "=qqiiqq",
                slot.min_delay_ns,
                slot.max_delay_ns,
                slot.max_packets,
                slot.max_bytes,
                slot.dist_delay_ns,
                slot.dist_jitter_ns,
            ),
        ),
    ]
    match netem.loss:
        case GilbertElliott(p, r, bad_loss, good_loss):
            # The kernel's h is the share that passes in the bad state, its k1 the share lost in the good one.
            model = struct.pack("=4I", *map(_share, (p, r, 1.0 - bad_loss, good_loss)))
            attributes.append(_attribute(_LOSS, _attribute(_LOSS_GILBERT, model)))
        case FourStates(p13, p31, p32, p14, p23):
            model = struct.pack("=5I", *map(_share, (p13, p31, p32, p14, p23)))
            attributes.append(_attribute(_LOSS, _attribute(_LOSS_STATES, model)))
    if netem.seed is not None:
        attributes.append(_attribute(_SEED, struct.pack("=Q", netem.seed)))
    return fixed + b"".join(attributes)


def attributes(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in a payload as (type, value). Raises ValueError when it is cut short."""
    at = 0
    while at + 4 <= len(payload):
        length, kind = struct.unpack_from("=HH", payload, at)
        if length < 4 or at + length > len(payload):
            raise ValueError(f"attribute of {length} bytes in {len(payload) - at}")
        yield kind & _TYPE_MASK, payload[at + 4 : at + length]
        at += length + -length % 4


def decode_netem(options: bytes) -> Netem:
    """What a kernel says of its netem (TCA_OPTIONS of a dump). Raises ValueError when it is not that."""
    if len(options) < 24:
        raise ValueError(f"netem options of {len(options)} bytes")
    latency, limit, loss, gap, duplicate, jitter = struct.unpack_from("=6I", options)
    found = dict(attributes(options[24:]))

    def values(kind: int, form: str) -> tuple[int, ...]:
        raw = found.get(kind, b"")
        size = struct.calcsize(form)
        return struct.unpack(form, raw[:size].ljust(size, b"\0"))

    delay_corr, loss_corr, duplicate_corr = map(_fraction, values(_CORR, "=3I"))
    reorder, reorder_corr = map(_fraction, values(_REORDER, "=2I"))
    corrupt, corrupt_corr = map(_fraction, values(_CORRUPT, "=2I"))
    rate, packet_overhead, cell_size, cell_overhead = values(_RATE, "=IiIi")
    no_packets = 0x7FFFFFFF  # how the kernel says "no limit"
    low, high, packets, size, *spread = values(_SLOT, "=qqiiqq")
    packets, size = (0 if value == no_packets else value for value in (packets, size))
    return Netem(
        limit=limit,
        latency_ns=values(_LATENCY64, "=q")[0] if _LATENCY64 in found else latency * _TICK_NS,
        jitter_ns=values(_JITTER64, "=q")[0] if _JITTER64 in found else jitter * _TICK_NS,
        loss=_loss_model(found.get(_LOSS, b"")) or _fraction(loss),
        duplicate=_fraction(duplicate),
        corrupt=corrupt,
        reorder=reorder,
        gap=gap,
        rate_bytes_s=max(rate, values(_RATE64, "=Q")[0]),
        packet_overhead=packet_overhead,
        cell_size=cell_size,
        cell_overhead=cell_overhead,
        delay_correlation=delay_corr,
        loss_correlation=loss_corr,
        duplicate_correlation=duplicate_corr,
        reorder_correlation=reorder_corr,
        corrupt_correlation=corrupt_corr,
        ecn=bool(values(_ECN, "=I")[0]),
        slot=Slot(low, high, packets, size, *spread),
        seed=values(_SEED, "=Q")[0] if _SEED in found else None,
    )


def _loss_model(payload: bytes) -> GilbertElliott | FourStates | None:
    for kind, raw in attributes(payload):
        if kind == _LOSS_GILBERT and len(raw) >= 16:
            p, r, h, k1 = map(_fraction, struct.unpack_from("=4I", raw))
            return GilbertElliott(p, r, 1.0 - h, k1)
        if kind == _LOSS_STATES and len(raw) >= 20:
            return FourStates(*map(_fraction, struct.unpack_from("=5I", raw)))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Messages


@dataclass(frozen=True, slots=True)
class Request:
    """One netlink message without its header: type, flags beyond REQUEST and ACK, body."""

    kind: int
    flags: int
    body: bytes


@dataclass(frozen=True, slots=True)
class QdiscMessage:
    """What the kernel says of one qdisc; `options` raw. Counters as the kernel has them."""

    ifindex: int
    handle: int
    parent: int
    kind: str
    options: bytes
    sent_bytes: int = 0
    sent_packets: int = 0
    qlen: int = 0
    backlog: int = 0
    drops: int = 0
    overlimits: int = 0


def _tcmsg(ifindex: int, handle: int, parent: int) -> bytes:
    return struct.pack("=BxxxiIII", socket.AF_UNSPEC, ifindex, handle, parent, 0)


def set_root(ifindex: int, handle: int, kind: str, options: bytes) -> Request:
    """Make the root qdisc this one, or change it in place (its packets stay) when kind and handle are the same."""
    body = _tcmsg(ifindex, handle, _TC_H_ROOT) + _attribute(_TCA_KIND, kind.encode() + b"\0")
    return Request(RTM_NEWQDISC, _NLM_F_REPLACE | _NLM_F_CREATE, body + _attribute(_TCA_OPTIONS, options))


def get_root(ifindex: int) -> Request:
    """Ask for the root qdisc; the kernel's own default has handle 0, or is not told."""
    # Without ECHO the answer goes to those who listen to all changes, but not to us.
    return Request(RTM_GETQDISC, _NLM_F_ECHO, _tcmsg(ifindex, 0, _TC_H_ROOT))


def delete_root(ifindex: int, handle: int) -> Request:
    """Remove the root qdisc, if it has this handle."""
    return Request(RTM_DELQDISC, 0, _tcmsg(ifindex, handle, _TC_H_ROOT))


def get_link(name: str) -> Request:
    """Ask for an interface by its name."""
    return Request(
        RTM_GETLINK, 0, struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _attribute(_IFLA_IFNAME, name.encode() + b"\0")
    )


def parse_qdisc(body: bytes) -> QdiscMessage:
    """The body of an RTM_NEWQDISC. Raises ValueError when it is cut short."""
    if len(body) < 20:
        raise ValueError(f"qdisc message of {len(body)} bytes")
    ifindex, handle, parent = struct.unpack_from("=4xiII", body)
    found = dict(attributes(body[20:]))
    stats = dict(attributes(found.get(_TCA_STATS2, b"")))
    sent_bytes, sent_packets = struct.unpack("=QI", stats.get(_STATS_BASIC, b"")[:12].ljust(12, b"\0"))
    qlen, backlog, drops, _, overlimits = struct.unpack("=5I", stats.get(_STATS_QUEUE, b"")[:20].ljust(20, b"\0"))
    return QdiscMessage(
        ifindex=ifindex,
        handle=handle,
        parent=parent,
        kind=found.get(_TCA_KIND, b"").rstrip(b"\0").decode(errors="replace"),
        options=found.get(_TCA_OPTIONS, b""),
        sent_bytes=sent_bytes,
        sent_packets=sent_packets,
        qlen=qlen,
        backlog=backlog,
        drops=drops,
        overlimits=overlimits,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The socket


class RouteSocket:
    """An rtnetlink socket of the network namespace in which it was made. The kernel acts while we send."""

    def __init__(self, timeout_s: float = 2.0) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(timeout_s)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):  # short acknowledgements, with the kernel's own words
            with contextlib.suppress(OSError):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def send(self, requests: Iterable[Request]) -> range:
        """Send all in one call and return their sequence numbers. What the kernel can do, it has done on return."""
        first, packet = self._sequence + 1, b""
        for request in requests:
            self._sequence += 1
            flags = _NLM_F_REQUEST | _NLM_F_ACK | request.flags
            packet += struct.pack("=IHHII", 16 + len(request.body), request.kind, flags, self._sequence, 0)
            packet += request.body + bytes(-len(request.body) % 4)
        self._socket.send(packet)
        return range(first, self._sequence + 1)

    def receive(self, sequences: range) -> dict[int, list[bytes]]:
        """The bodies that answer each request. Raises OSError with the kernel's number and words for a refusal.

        Every acknowledgement is awaited before one is raised: answers are never left behind for the next exchange.
        """
        answers: dict[int, list[bytes]] = {number: [] for number in sequences}
        open_, refused = set(sequences), list[OSError]()
        while open_:
            for kind, flags, sequence, body in _messages(self._socket.recv(1 << 16)):
                if sequence not in open_:
                    continue
                if kind == _NLMSG_ERROR:
                    open_.discard(sequence)
                    if (error := _refusal(flags, body)) is not None:
                        refused.append(error)
                else:
                    answers[sequence].append(body)
        if refused:
            raise refused[0]
        return answers

    def ask(self, *requests: Request) -> list[list[bytes]]:
        """Send and receive: the bodies that answer each request, in order."""
        sequences = self.send(requests)
        return list(self.receive(sequences).values())

    def ifindex(self, name: str) -> int:
        """The number of an interface. Raises OSError (ENODEV) when there is none of that name."""
        (bodies,) = self.ask(get_link(name))
        if not bodies:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return int(struct.unpack_from("=4xi", bodies[0])[0])

    def root(self, ifindex: int) -> QdiscMessage | None:
        """The root qdisc; the kernel's own default has handle 0, or is None."""
        (bodies,) = self.ask(get_root(ifindex))
        return parse_qdisc(bodies[0]) if bodies else None

    def close(self) -> None:
        self._socket.close()


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    at = 0
    while at + 16 <= len(data):
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data, at)
        if length < 16:
            return
        yield kind, flags, sequence, data[at + 16 : at + length]
        at += length + -length % 4


def _refusal(flags: int, body: bytes) -> OSError | None:
    """What an acknowledgement says: None for "done"."""
    (number,) = struct.unpack_from("=i", body)
    if number == 0:
        return None
    said = os.strerror(-number)
    if flags & _NLM_F_ACK_TLVS and flags & _NLM_F_CAPPED:
        words = dict(attributes(body[20:])).get(1, b"").rstrip(b"\0").decode(errors="replace")
        said = f"{words} ({said})" if words else said
    return OSError(-number, said)
