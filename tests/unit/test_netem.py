"""The netem driver against a box made of its own rules: exact batch lines, read-back, complaints, lost connections."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hil.drivers import netem
from hil.drivers.link import LinkCounters, queue_limit
from hil.drivers.netem import HANDLE, Lost, NetemSsh, parse_qdiscs, tc_line
from hil.errors import BenchError, UsageError
from hil.model import LinkState

DEFAULT = {"kind": "fq_codel", "handle": "0:", "root": True, "options": {"limit": 10240}, "bytes": 42, "packets": 1}

# ---------------------------------------------------------------------------------------------------------------------
# A box: what iproute2 6.1 and kernel 6.1 answer, as recorded from a link box


@dataclass
class Box:
    """Keeps one root qdisc a port over all sessions, as a machine does."""

    roots: dict[str, dict[str, Any]] = field(default_factory=lambda: {"eth0": dict(DEFAULT), "eth1": dict(DEFAULT)})
    heard: list[str] = field(default_factory=list)
    complain: str = ""
    forget: str = ""  # an option that this box silently drops
    cut_after: int = 10**9  # lines until the connection dies
    sessions: int = 0
    ran: list[str] = field(default_factory=list)
    ingress_says: str = "done"

    def told_ifb(self, command: str) -> str:
        """A shell on the box that makes, finds and removes the ifb device of eth1."""
        if "link add" in command:
            if self.ingress_says == "done":
                self.roots["hi-eth1"] = dict(DEFAULT)
            return self.ingress_says
        if "link del" in command:
            self.roots.pop("hi-eth1", None)
            return ""
        return "there" if "hi-eth1" in self.roots else ""

    def connect(self) -> FakeSession:
        self.sessions += 1
        return FakeSession(self)

    def obey(self, line: str) -> list[str]:
        """One batch line's output lines."""
        self.heard.append(line)
        words = line.split()
        port = words[words.index("dev") + 1]
        if port not in self.roots:
            return [f'Cannot find device "{port}"', f"Command failed -:{len(self.heard)}"]
        match words[1]:
            case "show":
                return [json.dumps([self.roots[port]])]
            case "del":
                assert words[4:] == ["root", "handle", HANDLE]
                self.roots[port] = dict(DEFAULT)
            case "replace":
                if self.complain:
                    return [self.complain, f"Command failed -:{len(self.heard)}"]
                assert words[4:7] == ["root", "handle", HANDLE]
                self.roots[port] = kernel_netem(words[7:], self.forget)
        return []


def kernel_netem(words: list[str], forget: str = "") -> dict[str, Any]:
    """The JSON of the qdisc that these words of a batch line make; 64 ns ticks, shares in 2^-32."""
    assert words[0] == "netem"
    options: dict[str, Any] = {"ecn": False, "gap": 0}
    rest = words[1:]
    while rest:
        name = rest.pop(0)
        values = [rest.pop(0)]
        if name == "delay" and rest and rest[0].endswith("us"):
            values.append(rest.pop(0))
        match name:
            case "limit":
                options["limit"] = int(values[0])
            case "delay":
                delay, jitter = ([_microseconds(value) for value in values] + [0.0])[:2]
                if values[0] != "0us":  # without a delay tc shows no jitter either
                    options["delay"] = {"delay": delay, "jitter": jitter, "correlation": 0}
            case "loss" | "duplicate" | "corrupt":
                percent = float(values[0].removesuffix("%"))
                assert percent != 0, "some versions of tc refuse a zero percentage"
                share = round(percent / 100 * (2**32 - 1)) / (2**32 - 1)
                if share:
                    key = "loss-random" if name == "loss" else name
                    options[key] = {name: float(f"{share:.6g}"), "correlation": 0}
            case "rate":
                bits = int(values[0].removesuffix("bit"))
                if bits >= 8:
                    options["rate"] = {"rate": bits // 8, "packetoverhead": 0}
            case _:
                raise AssertionError(f"unknown word {name}")
    options.pop(forget, None)
    return {"kind": "netem", "handle": HANDLE, "root": True, "options": options, "bytes": 0, "packets": 0, "drops": 0}


def _microseconds(text: str) -> float:
    ticks = int(int(text.removesuffix("us")) / 0.064)
    return float(f"{int(ticks * 0.064) / 1e6:.6g}")


class FakeSession:
    def __init__(self, box: Box) -> None:
        self.box, self.lines, self.closed = box, list[str](), False

    def send(self, text: str) -> None:
        assert text.endswith("\n")
        for line in text.splitlines():
            if self.box.cut_after <= 0:
                self.box.cut_after = 10**9
                self.closed = True
            if self.closed:
                raise Lost("connection reset")
            self.box.cut_after -= 1
            self.lines += self.box.obey(line)

    def readline(self, deadline_s: float) -> str:
        if self.closed or not self.lines:
            raise Lost("no answer in time")
        return self.lines.pop(0)

    def run(self, command: str, timeout_s: float) -> str:
        self.box.ran.append(command)
        if "ifb" in command or "[ -e" in command:
            return self.box.told_ifb(command)
        if "ethtool -K" in command:
            return ""
        if "ethtool" in command:
            return "== eth1\ntcp-segmentation-offload: off\n== eth0\ntcp-segmentation-offload: on\n"
        return "6.1.0\ntc utility, iproute2-6.1.0\nloaded\ntsc\n"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def box() -> Box:
    return Box()


def driver(box: Box, clock: Callable[[], float] = time.monotonic) -> NetemSsh:
    return NetemSsh("box1", {"uplink": "eth1", "downlink": "eth0"}, box.connect, clock=clock)


# ---------------------------------------------------------------------------------------------------------------------
# Codec


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (
            LinkState(),
            "qdisc replace dev eth0 root handle 1a5: netem limit 10 delay 0us corrupt 0.000000001% "
            "rate 100000000000bit",
        ),
        (
            LinkState(jitter_s=0.001, reorder=True),
            "qdisc replace dev eth0 root handle 1a5: netem limit 10 delay 1us 1000us corrupt 0.000000001% rate 0bit",
        ),
        (
            LinkState(delay_s=0.005050250, rate_bps=300e3),
            "qdisc replace dev eth0 root handle 1a5: netem limit 10 delay 5050us corrupt 0.000000001% rate 300000bit",
        ),
        (
            LinkState(delay_s=0.0074, jitter_s=0.0001, loss=0.0525, duplicate=0.005, corrupt=1e-6, rate_bps=5e9),
            "qdisc replace dev eth0 root handle 1a5: netem limit 10 delay 7400us 100us loss 5.25% duplicate 0.5% "
            "corrupt 0.0001% rate 5000000000bit",
        ),
        (
            LinkState(delay_s=0.0074, loss=0.01, rate_bps=9600, outage=True),
            "qdisc replace dev eth0 root handle 1a5: netem limit 10 delay 7400us loss 100% "
            "corrupt 0.000000001% rate 9600bit",
        ),
        (
            LinkState(loss=1e-14, rate_bps=1),
            "qdisc replace dev eth0 root handle 1a5: netem limit 10 delay 0us loss 0.000000001% "
            "corrupt 0.000000001% rate 8bit",
        ),
    ],
)
def test_batch_lines(state: LinkState, line: str) -> None:
    assert tc_line("eth0", state, 10) == line


def test_reordering_where_netem_keeps_the_order_is_refused() -> None:
    with pytest.raises(UsageError, match="in order"):
        tc_line("eth0", LinkState(rate_bps=1e6, reorder=True), 10)


def test_an_interface_name_cannot_smuggle_words_into_the_batch() -> None:
    for name in ("eth0 root", "eth0\nqdisc", "", "-force", "a" * 16):
        with pytest.raises(ValueError, match="interface"):
            tc_line(name, LinkState(), 10)


def test_queue_holds_what_is_in_flight_and_the_bottleneck_buffer() -> None:
    assert queue_limit(LinkState(delay_s=0.3)) == 10_000
    assert queue_limit(LinkState(delay_s=0.007, rate_bps=300e3)) == 1 + 256
    assert queue_limit(LinkState(delay_s=0.03, rate_bps=5e9)) == 12_385 + 103_204
    frames_per_s = 18e6 / (8 * 1514)
    in_flight, buffer = math.ceil(0.2 * frames_per_s), math.ceil(0.25 * frames_per_s)
    assert queue_limit(LinkState(delay_s=0.1, jitter_s=0.1, rate_bps=18e6)) == in_flight + buffer
    assert queue_limit(LinkState(delay_s=0.1, jitter_s=0.1, rate_bps=18e6, queue_packets=7)) == in_flight + 7


shares = st.floats(0, 1).map(lambda value: round(value, 6))
states = st.builds(
    LinkState,
    delay_s=st.floats(0, 0.9),
    jitter_s=st.floats(0, 0.1),
    loss=shares,
    rate_bps=st.one_of(st.just(0.0), st.floats(8, 2e10)),
    duplicate=shares,
    corrupt=shares,
    outage=st.booleans(),
    queue_packets=st.integers(0, 5000),
)


@given(states)
def test_what_the_kernel_made_of_a_line_reads_back_as_the_state(state: LinkState) -> None:
    limit = queue_limit(state)
    made = kernel_netem(tc_line("eth0", state, limit).split()[7:])
    qdisc = parse_qdiscs(json.dumps([made]))[""]
    assert netem.difference(state, limit, qdisc) == ""
    got, got_limit = netem.netem_state(qdisc.options)
    assert got_limit == limit
    assert got.effective_loss == pytest.approx(state.effective_loss, rel=1e-5, abs=1e-9)
    assert got.delay_s == pytest.approx(state.delay_s, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"delay_s": 0.0102}, "delay_s 0.01 instead of 0.0102"),
        ({"rate_bps": 2.1e6}, "rate_bps 2e+06 instead of 2.1e+06"),
        ({"rate_bps": 0.0}, "rate_bps 2e+06 instead of 1e+11"),
        ({"loss": 0.051}, "effective_loss 0.05 instead of 0.051"),
        ({"outage": True}, "effective_loss 0.05 instead of 1"),
        ({"duplicate": 0.01}, "duplicate 0 instead of 0.01"),
        ({"corrupt": 0.01}, "corrupt 0 instead of 0.01"),
    ],
)
def test_a_wrong_read_back_is_named(change: dict[str, Any], says: str) -> None:
    made = kernel_netem(tc_line("eth0", LinkState(delay_s=0.01, rate_bps=2e6, loss=0.05), 300).split()[7:])
    qdisc = parse_qdiscs(json.dumps([made]))[""]
    asked = LinkState(**({"delay_s": 0.01, "rate_bps": 2e6, "loss": 0.05} | change))
    assert netem.difference(asked, 300, qdisc).startswith(says.split(" instead")[0].rsplit(" ", 1)[0])
    assert says.split("instead of ")[1] in netem.difference(asked, 300, qdisc)


def test_leftovers_that_were_never_ours_are_noticed() -> None:
    made = kernel_netem(tc_line("eth0", LinkState(), 300).split()[7:])
    made["options"]["reorder"] = {"reorder": 0.25}
    assert "an unasked reorder" in netem.difference(LinkState(), 300, parse_qdiscs(json.dumps([made]))[""])
    assert netem.difference(LinkState(), 299, parse_qdiscs(json.dumps([made]))[""]).startswith(
        "limit 300 instead of 299"
    )


def test_parse_of_a_recorded_answer() -> None:
    recorded = (
        '[{"kind":"netem","handle":"1a5:","root":true,"refcnt":2,"options":{"limit":1000,"delay":{"delay":0.005049,'
        '"jitter":9.9e-05,"correlation":0},"loss-random":{"loss":0.0525,"correlation":0},"duplicate":{"duplicate":0.005,'
        '"correlation":0},"rate":{"rate":250000,"packetoverhead":0,"cellsize":0,"celloverhead":0},"ecn":false,"gap":0},'
        '"bytes":1514,"packets":2,"drops":3,"overlimits":0,"requeues":0,"backlog":66,"qlen":1}]'
    )
    qdisc = parse_qdiscs(recorded)[""]
    assert qdisc.ours
    assert netem.netem_state(qdisc.options) == (
        LinkState(delay_s=0.005049, jitter_s=9.9e-05, loss=0.0525, rate_bps=2e6, duplicate=0.005),
        1000,
    )
    assert qdisc.counters == LinkCounters(1514, 2, 3, 0, 66, 1)


def test_offloads_by_port() -> None:
    text = "== eth0\ntcp-segmentation-offload: on\ngeneric-receive-offload: off [fixed]\n== eth1\n"
    assert netem.parse_offloads(text) == {"eth0": {"tso": True, "gro": False}}


# ---------------------------------------------------------------------------------------------------------------------
# Driver


def test_exact_dialogue_of_one_change_of_both_directions(box: Box) -> None:
    ticks = iter([10.0, 10.005, 10.006, 10.007, 10.008])
    link = driver(box, lambda: next(ticks, 11.0))
    link._session, link._checked = box.connect(), True
    up, down = LinkState(delay_s=0.005, rate_bps=300e3), LinkState(outage=True)
    applied = link.apply({"uplink": up, "downlink": down}, scheduled_s=9.9)
    assert box.heard == [
        "qdisc replace dev eth1 root handle 1a5: netem limit 257 delay 5000us corrupt 0.000000001% rate 300000bit",
        "qdisc replace dev eth0 root handle 1a5: netem limit 10000 delay 0us loss 100% corrupt 0.000000001% "
        "rate 100000000000bit",
        "qdisc show dev eth1",
        "qdisc show dev eth0",
    ]
    first, second = applied["uplink"], applied["downlink"]
    assert (first.scheduled_s, first.sent_s, first.acknowledged_s, first.verified_s) == (9.9, 10.0, 10.005, 10.007)
    assert (second.acknowledged_s, second.verified_s) == (10.006, 10.008)
    assert link.lead_s == pytest.approx(0.0025)  # half of the first answer's time: the change lies before it
    assert link.state() == {"uplink": LinkState(delay_s=0.005, rate_bps=300e3), "downlink": LinkState(outage=True)}


def test_the_lead_follows_the_quickest_of_the_last_answers(box: Box) -> None:
    now, step_s = 0.0, 0.0

    def clock() -> float:
        return now

    link = driver(box, clock)
    assert link.lead_s == 0.0  # nothing is known yet
    link.open()
    read = FakeSession.readline

    def slow(session: FakeSession, deadline_s: float) -> str:
        nonlocal now
        now += step_s
        return read(session, deadline_s)

    leads = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FakeSession, "readline", slow)
        for took_s in [0.030, 0.010, *[0.020] * 16]:
            step_s = took_s
            link.apply({"uplink": LinkState(delay_s=0.01)}, now)
            leads.append(link.lead_s)
    assert leads[:3] == pytest.approx([0.015, 0.005, 0.005])
    assert leads[-1] == pytest.approx(0.010)  # a quick one is forgotten after sixteen others: routes change


def test_tc_is_quoted_when_it_complains(box: Box) -> None:
    box.complain = "Error: Specified qdisc kind is unknown."
    with pytest.raises(BenchError, match=r"box1: eth1: tc says: Error: Specified qdisc kind is unknown\.") as raised:
        driver(box).apply({"uplink": LinkState()}, 0)
    assert "modprobe sch_netem" in raised.value.hint


def test_a_port_that_is_not_there(box: Box) -> None:
    del box.roots["eth1"]
    with pytest.raises(BenchError, match='Cannot find device "eth1"') as raised:
        driver(box).open()
    assert "uplink_interface" in raised.value.hint


def test_a_kernel_that_has_something_else_is_an_error(box: Box) -> None:
    box.forget = "rate"
    with pytest.raises(BenchError, match=r"eth1 reads back rate_bps 0 instead of 300000"):
        driver(box).apply({"uplink": LinkState(rate_bps=300e3)}, 0)


def test_a_dropped_connection_is_dialled_again_once(box: Box) -> None:
    link = driver(box)
    link.open()
    box.cut_after = 1
    assert link.apply({"uplink": LinkState(delay_s=0.01)}, 0)["uplink"].verified_s > 0
    assert box.sessions == 2

    def refuse() -> FakeSession:
        raise Lost("no route")

    box.cut_after = 0
    link.connect = refuse
    with pytest.raises(BenchError, match="box1: the netem box is lost: no route"):
        link.apply({"uplink": LinkState()}, 0)


def test_an_answer_that_came_too_late_is_never_read_as_the_next_one(box: Box) -> None:
    link = driver(box)
    link.open()
    assert isinstance(link._session, FakeSession)
    link._session.lines = []
    first = link._session
    box.complain = "Error: no."
    with pytest.raises(BenchError):
        link.apply({"uplink": LinkState(), "downlink": LinkState()}, 0)
    assert first.closed  # what is left unread in it is lost with it
    box.complain = ""
    link.apply({"uplink": LinkState()}, 0)


def test_a_foreign_root_qdisc_is_refused_and_kept(box: Box) -> None:
    foreign = {"kind": "tbf", "handle": "77:", "root": True, "options": {}}
    box.roots["eth0"] = foreign
    link = driver(box)
    with pytest.raises(BenchError, match=r"eth0 has a root qdisc that hil did not make: tbf 77:"):
        link.apply({"downlink": LinkState()}, 0)
    box.roots["eth1"] = kernel_netem(tc_line("eth1", LinkState(), 10).split()[7:])
    assert link.clear() == ["eth1"]
    assert box.roots["eth0"] is foreign
    assert "qdisc del dev eth1 root handle 1a5:" in box.heard
    assert not [line for line in box.heard if "replace" in line or "del dev eth0" in line]


def test_clear_of_an_untouched_box_changes_nothing(box: Box) -> None:
    assert driver(box).clear() == []
    assert [line for line in box.heard if "show" not in line] == []


def test_offloads_are_switched_off_when_the_link_is_opened_and_on_again_when_cleared(box: Box) -> None:
    link = driver(box)
    link.open()
    link.apply({"uplink": LinkState()}, 0)
    assert [line for line in box.ran if "ethtool -K" in line] == ["/sbin/ethtool -K eth0 tso off"]
    link.clear()
    assert box.ran[-1] == "/sbin/ethtool -K eth0 tso on"


def test_arrivals_at_a_port_are_shaped_through_a_device_that_goes_away_again(box: Box) -> None:
    link = NetemSsh("box1", {"uplink": "eth1", "downlink": "ingress:eth1"}, box.connect, sudo="sudo -n ")
    assert link.state() == {"uplink": None, "downlink": None}  # a look makes nothing
    assert "hi-eth1" not in box.roots
    link.apply({"downlink": LinkState(delay_s=0.01)}, 0)
    assert box.roots["hi-eth1"]["kind"] == "netem"
    made = next(line for line in box.ran if "link add" in line)
    assert made.startswith("{ sudo -n /sbin/ip link add hi-eth1 type ifb && ")
    assert "sudo -n /sbin/tc filter add dev eth1 parent ffff:" in made
    assert link.clear() == ["ingress:eth1"]
    assert "hi-eth1" not in box.roots
    link.apply({"downlink": LinkState(delay_s=0.02)}, 0)  # and is made again
    assert "hi-eth1" in box.roots


def test_an_ingress_that_somebody_else_has_is_refused(box: Box) -> None:
    box.ingress_says = "Error: Exclusivity flag on, cannot modify."
    with pytest.raises(BenchError, match="ingress of eth1: the box says: Error: Exclusivity flag"):
        NetemSsh("box1", {"downlink": "ingress:eth1"}, box.connect).open()
    assert box.ran[-1] == "{ /sbin/ip link del hi-eth1; } 2>&1"  # the other one's ingress stays


def test_a_foreign_root_qdisc_is_replaced_when_told(box: Box) -> None:
    box.roots["eth0"] = {"kind": "tbf", "handle": "77:", "root": True, "options": {}}
    link = driver(box)
    link.replace_foreign = True
    link.apply({"downlink": LinkState()}, 0)
    assert box.roots["eth0"]["kind"] == "netem"


def test_preflight_warns_of_what_bends_results(box: Box) -> None:
    facts = driver(box).preflight()
    assert (facts["kernel"], facts["netem"], facts["clocksource"]) == ("6.1.0", "loaded", "tsc")
    assert facts["interfaces"]["eth1"] == {"qdisc": "fq_codel 0:", "foreign": False, "offloads": {"tso": False}}
    (warning,) = facts["warnings"]
    assert warning.startswith("eth0: tso on: one loss may take 64 KiB")
