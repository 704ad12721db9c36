"""TCA_NETEM byte for byte, and the driver on it; what needs a kernel runs in a namespace with a qdisc the host has."""

from __future__ import annotations

import errno
import json
import struct
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hil.drivers import ingress, netem_local, netlink, offloads
from hil.drivers.netem_local import NetemLocal, netem_of, state_of
from hil.drivers.netlink import (
    FourStates,
    GilbertElliott,
    Netem,
    QdiscMessage,
    Request,
    Slot,
    decode_netem,
    encode_netem,
    parse_qdisc,
    set_root,
)
from hil.errors import BenchError, UsageError
from hil.model import LinkState

H = 0x1A5 << 16


def words(text: str) -> bytes:
    """Bytes from hexadecimal words; what follows `#` is a comment."""
    return bytes.fromhex("".join(line.partition("#")[0] for line in text.splitlines()))


# ---------------------------------------------------------------------------------------------------------------------
# Bytes: little-endian, written by hand from linux/pkt_sched.h


def test_golden_bytes_of_a_whole_netem() -> None:
    asked = Netem(
        limit=1000,
        latency_ns=7_400_001,
        jitter_ns=100_000,
        loss=0.25,
        duplicate=0.5,
        corrupt=1.0,
        rate_bytes_s=5_000_000_000,
        packet_overhead=-14,
        cell_size=53,
        cell_overhead=5,
        seed=0x1122334455667788,
    )
    assert encode_netem(asked) == words(
        """
        a9c30100 e8030000 00000040 00000000 00000080 1a060000   # latency 115625 ticks, limit, loss, gap, dup, jitter
        1000 0100 00000000 00000000 00000000                    # CORR: delay, loss, duplicate
        0c00 0300 00000000 00000000                             # REORDER: probability, correlation
        0c00 0400 ffffffff 00000000                             # CORRUPT
        1400 0600 ffffffff f2ffffff 35000000 05000000           # RATE: what does not fit 32 bits says so by all ones
        0c00 0800 00f2052a 01000000                             # RATE64 5e9
        0c00 0a00 41ea7000 00000000                             # LATENCY64 7400001
        0c00 0b00 a0860100 00000000                             # JITTER64
        0800 0700 00000000                                      # ECN
        2c00 0c00 0000000000000000 0000000000000000 00000000 00000000 0000000000000000 0000000000000000  # SLOT
        0c00 0e00 88776655 44332211                             # PRNG_SEED
        """
    )


def test_golden_bytes_of_loss_models_and_slots() -> None:
    gilbert = encode_netem(Netem(loss=GilbertElliott(0.25, 0.5, bad_loss=0.25, good_loss=0.125)))
    assert gilbert.endswith(words("1800 0500 1400 0200 00000040 00000080 ffffffbf 00000020"))
    assert gilbert[8:12] == bytes(4)  # no random loss besides
    states = encode_netem(Netem(loss=FourStates(0.25, 0.5, 0, 0, 1.0)))
    assert states.endswith(words("1c00 0500 1800 0100 00000040 00000080 00000000 00000000 ffffffff"))
    slot = encode_netem(Netem(slot=Slot(1, 2, 3, 4, 5, 6)))
    assert slot.endswith(
        words("2c00 0c00 0100000000000000 0200000000000000 03000000 04000000 0500000000000000 0600000000000000")
    )


def test_golden_bytes_of_the_messages() -> None:
    root = set_root(3, H, "netem", b"\1\2\3\4")
    assert (root.kind, root.flags) == (36, 0x500)
    tcmsg = words("00000000 03000000 0000a501 ffffffff 00000000")
    assert root.body == tcmsg + words("0a00 0100 6e6574656d00 0000 0800 0200 01020304")
    assert netlink.delete_root(3, H) == Request(37, 0, tcmsg)
    asked = words("00000000 03000000 00000000 ffffffff 00000000")
    assert netlink.get_root(3) == Request(38, 8, asked)


shares = st.floats(0, 1)
ns = st.integers(0, 2**40)
losses = st.one_of(
    shares,
    st.builds(GilbertElliott, shares, shares, shares, shares),
    st.builds(FourStates, shares, shares, shares, shares, shares),
)


@given(
    st.builds(
        Netem,
        limit=st.integers(0, 2**32 - 1),
        latency_ns=ns,
        jitter_ns=ns,
        loss=losses,
        duplicate=shares,
        corrupt=shares,
        reorder=shares,
        gap=st.integers(0, 1000),
        rate_bytes_s=st.integers(0, 2**40),
        packet_overhead=st.integers(-100, 100),
        delay_correlation=shares,
        ecn=st.booleans(),
        slot=st.builds(Slot, ns, ns, st.integers(0, 1000), st.integers(0, 1000), ns, ns),
        seed=st.none() | st.integers(0, 2**64 - 1),
    )
)
def test_what_is_encoded_reads_back(asked: Netem) -> None:
    once = decode_netem(encode_netem(asked))
    assert decode_netem(encode_netem(once)) == once  # shares are rounded to 2^-32, once
    for name in ("limit", "latency_ns", "jitter_ns", "gap", "rate_bytes_s", "packet_overhead", "ecn", "slot", "seed"):
        assert getattr(once, name) == getattr(asked, name)
    assert once.duplicate == pytest.approx(asked.duplicate, abs=2**-32)
    assert type(once.loss) is type(asked.loss)


def test_an_old_kernel_without_64_bit_delays_reads_back_in_ticks() -> None:
    assert decode_netem(struct.pack("=6I", 100, 1000, 0, 0, 0, 2)) == Netem(1000, latency_ns=6400, jitter_ns=128)


@given(st.binary(max_size=80))
def test_torn_options_are_an_error_and_never_a_hang(raw: bytes) -> None:
    try:
        decode_netem(raw)
    except ValueError:
        return


@pytest.mark.parametrize(
    "state",
    [
        LinkState(),
        LinkState(reorder=True),
        LinkState(delay_s=0.0074, jitter_s=1e-4, loss=0.05, duplicate=0.01, corrupt=1e-6, rate_bps=2e6),
        LinkState(delay_s=0.3, rate_bps=5e10, outage=True),
    ],
)
def test_states_and_netems_are_each_others_inverse(state: LinkState) -> None:
    got = state_of(decode_netem(encode_netem(netem_of(state))))
    for name in LinkState.__dataclass_fields__:
        assert getattr(got, name) == pytest.approx(getattr(state, name), rel=1e-9, abs=1e-9), name


# ---------------------------------------------------------------------------------------------------------------------
# The driver against a kernel of its own rules


class Kernel:
    """One root qdisc an interface; netem as given, but for what it is told to forget."""

    def __init__(self) -> None:
        self.roots: dict[int, tuple[int, str, bytes]] = {}
        self.names = {"lo": 1}
        self.refuse: OSError | None = None
        self.forget: dict[str, Any] = {}
        self.heard: list[Request] = []

    def connect(self) -> Any:
        return self

    def close(self) -> None: ...

    def ifindex(self, name: str) -> int:
        if name not in self.names:
            raise OSError(errno.ENODEV, "No such device")
        return self.names[name]

    def send(self, requests: Any) -> range:
        self.pending = list(requests)
        self.heard += self.pending
        return range(len(self.pending))

    def receive(self, sequences: range) -> dict[int, list[bytes]]:
        return {number: self._obey(request) for number, request in enumerate(self.pending)}

    def ask(self, *requests: Request) -> list[list[bytes]]:
        return list(self.receive(self.send(requests)).values())

    def root(self, ifindex: int) -> QdiscMessage | None:
        (bodies,) = self.ask(netlink.get_root(ifindex))
        return parse_qdisc(bodies[0]) if bodies else None

    def _obey(self, request: Request) -> list[bytes]:
        ifindex, handle = struct.unpack_from("=4xiI", request.body)
        found = dict(netlink.attributes(request.body[20:]))
        if request.kind == netlink.RTM_NEWQDISC:
            if self.refuse is not None:
                raise self.refuse
            changed = {**_fields(decode_netem(found[2])), **self.forget}
            self.roots[ifindex] = handle, found[1].rstrip(b"\0").decode(), encode_netem(Netem(**changed))
        elif request.kind == netlink.RTM_DELQDISC:
            assert self.roots.pop(ifindex)[0] == handle
        elif ifindex in self.roots:
            handle, kind, options = self.roots[ifindex]
            return [set_root(ifindex, handle, kind, options).body]
        return []


def _fields(netem: Netem) -> dict[str, Any]:
    return {name: getattr(netem, name) for name in Netem.__dataclass_fields__}


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def local(kernel: Kernel, **more: Any) -> NetemLocal:
    return NetemLocal("l1", {"uplink": "lo"}, connect=kernel.connect, **more)


def test_a_state_is_applied_and_read_back_in_one_exchange(kernel: Kernel) -> None:
    ticks = iter([10.0, 10.1, 10.2])
    link = local(kernel, clock=lambda: next(ticks))
    state = LinkState(delay_s=0.01, rate_bps=2e6)
    applied = link.apply({"uplink": state}, 9.0)["uplink"]
    assert (applied.scheduled_s, applied.sent_s, applied.acknowledged_s, applied.verified_s) == (9.0, 10.0, 10.1, 10.2)
    assert [item.kind for item in kernel.heard[-2:]] == [netlink.RTM_NEWQDISC, netlink.RTM_GETQDISC]
    assert link.state() == {"uplink": state}
    assert link.clear() == ["lo"]
    assert link.state() == {"uplink": None}
    assert kernel.roots == {}


@pytest.mark.parametrize(("name", "value"), [("rate_bytes_s", 0), ("limit", 999), ("latency_ns", 9_999_999)])
def test_a_kernel_that_has_something_else_is_an_error(kernel: Kernel, name: str, value: int) -> None:
    kernel.forget = {name: value}
    with pytest.raises(BenchError, match=rf"lo reads back {name} {value} instead of"):
        local(kernel).apply({"uplink": LinkState(delay_s=0.01, rate_bps=300e3)}, 0)


def test_a_refusal_is_told_in_the_kernels_words(kernel: Kernel) -> None:
    kernel.refuse = OSError(errno.ENOENT, "Specified qdisc kind is unknown (No such file or directory)")
    with pytest.raises(BenchError, match="apply on lo: ENOENT: Specified qdisc kind is unknown") as raised:
        local(kernel).apply({"uplink": LinkState()}, 0)
    assert "modprobe sch_netem" in raised.value.hint


def test_a_foreign_root_qdisc_is_refused_unless_told_and_never_removed(kernel: Kernel) -> None:
    kernel.roots[1] = 0x77 << 16, "tbf", b""
    link = local(kernel)
    with pytest.raises(BenchError, match="lo has a root qdisc that hil did not make: tbf 77:"):
        link.apply({"uplink": LinkState()}, 0)
    assert link.clear() == []
    assert kernel.roots[1][1] == "tbf"
    told = local(kernel, replace_foreign=True)
    told.apply({"uplink": LinkState()}, 0)
    assert kernel.roots[1][1] == "netem"


def test_the_seed_is_sent_once(kernel: Kernel) -> None:
    link = local(kernel, seed=5)
    link.apply({"uplink": LinkState(loss=0.1)}, 0)
    assert link.seeds() == {"uplink": 5}
    link.apply({"uplink": LinkState(loss=0.2)}, 0)
    assert link.seeds() == {"uplink": None}  # of this kernel: it tells what it was sent last


def test_a_port_that_is_not_there(kernel: Kernel) -> None:
    kernel.names.clear()
    with pytest.raises(BenchError, match="ENODEV") as raised:
        local(kernel).open()
    assert "uplink_interface" in raised.value.hint


def test_reordering_with_a_rate_is_refused_before_anything_is_sent(kernel: Kernel) -> None:
    with pytest.raises(UsageError):
        local(kernel).apply({"uplink": LinkState(rate_bps=1e6, reorder=True)}, 0)
    assert netlink.RTM_NEWQDISC not in [item.kind for item in kernel.heard]


# ---------------------------------------------------------------------------------------------------------------------
# Offloads and ingress


def test_offloads_of_the_loopback_are_read() -> None:
    found = offloads.read("lo")
    assert found is not None
    assert found["tso"] in (True, False)
    with pytest.raises(OSError, match=r"[Nn]o such device|not found|no interface"):
        offloads.read("nope0")


def test_ingress_is_a_device_of_its_own_that_can_be_undone() -> None:
    assert ingress.port_of("eth0") is None
    assert ingress.port_of("ingress:eth0") == "eth0"
    assert (
        ingress.device("ingress:enp0s31f6long") == "hi-s31f6long"[:15]
        or len(ingress.device("ingress:" + "x" * 15)) <= 15
    )
    made, undone = ingress.set_up("eth0"), ingress.take_down("eth0")
    assert made[0] == ["ip", "link", "add", "hi-eth0", "type", "ifb"]
    assert made[-1][-1] == "hi-eth0"
    assert undone[-1] == ["ip", "link", "del", "hi-eth0"]


_IN_NAMESPACE = """
import json, struct, subprocess
from hil.drivers import broker, netlink, offloads
from hil.drivers.netem_local import NetemLocal
from hil.errors import BenchError
from hil.model import LinkState

def tc(words):
    return subprocess.run(["tc", *words.split()], capture_output=True, text=True).stdout

broker.enter_namespace()
for words in ("add p0 type veth peer name p1", "set p0 up", "set p1 up"):
    subprocess.run(["ip", "link", *words.split()], check=True)
sock = netlink.RouteSocket()
index = sock.ifindex("p0")
made = sock.ask(netlink.set_root(index, 0x1a5 << 16, "pfifo", struct.pack("=I", 7)), netlink.get_root(index))[1]
found = {"qdisc": netlink.parse_qdisc(made[0]).kind, "tc": tc("qdisc show dev p0 root")}
refused = []
for request in (netlink.delete_root(index, 0x77 << 16), netlink.set_root(index, 0x1a5 << 16, "nonesuch", b"")):
    try:
        sock.ask(request)
    except OSError as error:
        refused.append(error.errno)
found["refused"] = refused
sock.ask(netlink.delete_root(index, 0x1a5 << 16))
before = tc("qdisc show"), offloads.read("p0")
link = NetemLocal("one", {"uplink": "p0", "downlink": "ingress:p0"})
found["facts"] = list(link.preflight()["interfaces"].values())
link.open()
found["filter"], found["offloads"] = tc("filter show dev p0 parent ffff:"), offloads.read("p0")
try:
    link.apply({"downlink": LinkState(delay_s=0.01)}, 0.0)
    found["netem"] = link.state()["downlink"].delay_s
except BenchError as error:
    found["netem"] = str(error)
link.clear()
found["undone"] = (tc("qdisc show"), offloads.read("p0")) == before
tc("qdisc add dev p0 ingress")
try:
    link.open()
except BenchError as error:
    found["foreign"] = str(error)
found["kept"] = "ingress" in tc("qdisc show dev p0")
print(json.dumps(found))
"""


def test_one_port_of_a_real_kernel_is_led_both_ways_and_left_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", _IN_NAMESPACE], capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr or "Unknown device type" in done.stderr or "namespace" in done.stderr:
        pytest.skip(f"this host has no namespaces or no veth: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["qdisc"] == "pfifo"
    assert "pfifo 1a5: root" in found["tc"]
    assert "limit 7p" in found["tc"]
    assert found["refused"] == [errno.EINVAL, errno.EINVAL]
    assert found["facts"][1]["offloads"] == found["facts"][0]["offloads"]
    assert "mirred" in found["filter"]
    assert found["offloads"]["tso"] is False
    assert found["netem"] == 0.01 or "ENOENT" in found["netem"]  # hosts without netem say so
    assert found["undone"]
    assert "Exclusivity" in found["foreign"]
    assert found["kept"]


def test_preflight_says_what_is_missing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netem_local, "netem_module", lambda: "missing")
    monkeypatch.setattr(netem_local, "may_administer", lambda: False)
    facts = local(kernel).preflight()
    assert facts["backend"] == "netem over netlink"
    assert facts["warnings"][0].startswith("no CAP_NET_ADMIN")
    assert "the kernel has no sch_netem" in facts["warnings"]
