"""The certificate's arithmetic, and its verdicts on links whose faults the test chooses."""

from __future__ import annotations

import contextlib
import json
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sshd import USER, Sshd

from hil.bench import certificate, far_end
from hil.bench.certificate import QUICK, Certifier, Echoes, Limits, Plan, Probe, Quantiles, wilson
from hil.bench.far_end import on_board
from hil.cli import link as link_cli
from hil.cli import link_certify
from hil.drivers import link_agent, link_backends
from hil.drivers.link_agent import OVERHEAD_BYTES, Tally
from hil.drivers.link_backends import Backend
from hil.errors import BenchError, UsageError
from hil.inventory.bench import SshWire
from hil.model import Applied, Criterion, Direction, LinkState

LIMITS = Limits(0.1e-3, 0.5e-3, 5e-3)
PLAN = Plan(probes=50, delays_s=(0.02,), rate_window_s=1.0, loss_packets=1000, edges=4, edge_gap_s=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.mark.parametrize(
    ("lost", "sent", "z", "low", "high"),
    [
        (10, 100, 1.96, 0.0552, 0.1744),  # Newcombe (1998) gives this form's values for small tables
        (0, 1000, 1.96, 0.0, 0.00383),
        (1000, 1000, 1.96, 0.99617, 1.0),
        (0, 0, 1.96, 0.0, 1.0),
    ],
)
def test_wilson(lost: int, sent: int, z: float, low: float, high: float) -> None:
    assert wilson(lost, sent, z) == pytest.approx((low, high), abs=1e-4)


def test_quantiles_are_nearest_ranks() -> None:
    found = Quantiles.of(range(1, 101))
    assert (found.p50, found.p90, found.p99, found.maximum, found.count) == (50, 90, 99, 100, 100)
    assert Quantiles.of([3.0]).p99 == 3.0
    assert math.isnan(Quantiles.of([]).p50)


def test_observed_edges_lie_between_the_packets_around_them() -> None:
    sent = [index * 0.001 for index in range(100)]
    # Lost from packet 31 to 60, though the outage was to begin at 30 ms and end at 60 ms.
    seen = certificate._observed([0.030, 0.060], sent, [[0, 30], [61, 99]])
    assert seen == pytest.approx([0.0005, 0.0005])
    assert certificate._observed([0.030, 0.060], sent, [[0, 99]]) == []
    assert certificate._observed([0.030], sent, [[0, 45]]) == pytest.approx([0.0155])
    # Both took effect two milliseconds before they were due.
    assert certificate._observed([0.033, 0.063], sent, [[0, 30], [61, 99]]) == pytest.approx([-0.0025, -0.0025])


def test_a_tally_counts_what_came_how_often_and_in_which_order() -> None:
    tally = Tally()
    for at_ns, number in enumerate([0, 1, 3, 2, 2, 7]):
        tally.add(number, 100, at_ns)
    report = tally.report()
    assert report["ranges"] == [[0, 3], [7, 7]]
    assert (report["packets"], report["duplicates"], report["late"]) == (6, 1, 1)
    assert (report["frames_bytes"], report["first_ns"], report["last_ns"]) == (6 * (100 + OVERHEAD_BYTES), 0, 5)


# ---------------------------------------------------------------------------------------------------------------------
# The agent and its probes, on the loopback


@pytest.fixture
def agent() -> Iterator[Probe]:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 0))
    threading.Thread(target=link_agent.serve, args=(server,), daemon=True).start()
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect(server.getsockname())
    yield Probe(client)
    client.close()


def test_echoes_tell_both_ways_and_trains_are_counted(agent: Probe) -> None:
    assert agent.alive(20)
    echoes = agent.echoes(20, gap_s=0.001)
    assert (len(echoes.uplink), len(echoes.downlink), echoes.late, echoes.duplicates) == (20, 20, 0, 0)
    for up, down, both in zip(echoes.uplink, echoes.downlink, echoes.round_trip, strict=True):
        assert up > 0
        assert down > 0
        assert both == pytest.approx(up + down, abs=1e-6)
    down = agent.train("downlink", 30, 0.001, 200)()
    assert down["ranges"] == [[0, 29]]
    assert down["frames_bytes"] == 30 * (200 + OVERHEAD_BYTES)
    sent, report = agent.stream(0.001, time.monotonic() + 0.03)
    assert report()["ranges"] == [[0, len(sent) - 1]]


def test_the_agent_runs_on_a_board_that_has_nothing_of_ours_and_ends_with_the_connection(server: Sshd) -> None:
    mgmt = SshWire(address=server.address, port=server.port, user=USER, key=server.key, known_hosts=server.known_hosts)
    with on_board(mgmt, None, server.address) as far:
        assert not far.one_clock
        echoes = far.path.echoes(10, gap_s=0.001)
        assert len(echoes.round_trip) == 10
        assert far.path.train("uplink", 20, 0.001, 100)()["packets"] == 20
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        deadline = time.monotonic() + 20
        while True:
            try:
                sock.bind(("", far_end.PORT))  # nobody has it any more
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts


class FakeLink:
    """Remembers its state; `late_s` is how long an edge takes, `lead_s` what it thinks that it does."""

    def __init__(self, late_s: float = 0.0, lead_s: float = 0.0) -> None:
        self.lead_s = lead_s
        self.states: dict[Direction, LinkState] = {}
        self.late_s = late_s
        self.edges: list[tuple[float, bool]] = []
        self.cleared = 0

    def preflight(self) -> dict[str, Any]:
        return {"backend": "fake", "warnings": []}

    def apply(self, states: Mapping[Direction, LinkState], scheduled_s: float) -> dict[Direction, Applied]:
        self.states.update(states)
        at_s = scheduled_s - self.lead_s + self.late_s  # by schedule: how busy this host is must not matter
        self.edges.append((at_s, states["uplink"].outage))
        return dict.fromkeys(states, Applied(scheduled_s, scheduled_s, at_s, at_s))

    def clear(self) -> list[str]:
        self.states.clear()
        self.cleared += 1
        return []


class FakeProbe:
    """A path that does what the link's state says, with the faults it is given."""

    def __init__(self, link: FakeLink, **faults: Any) -> None:
        self.link, self.faults = link, faults
        self.random = random.Random(1)

    def state(self, direction: Direction) -> LinkState:
        return self.link.states.get(direction, LinkState())

    def echoes(self, count: int, wait_s: float = 1.0) -> Echoes:
        noise = self.faults.get("noise_s", 20e-6)
        found = Echoes(count)
        for _ in range(count - int(self.faults.get("missing", 0))):
            up, down = (
                0.0002 + self.random.uniform(-noise, noise) + self.state(d).delay_s * self.faults.get("delay_gain", 1.0)
                for d in ("uplink", "downlink")
            )
            found.uplink.append(up)
            found.downlink.append(down)
            found.round_trip.append(up + down)
        found.late = self.faults.get("late", 0)
        return found

    def train(self, direction: Direction, count: int, gap_s: float, size: int) -> Callable[[], dict[str, Any]]:
        state, frame = self.state(direction), size + OVERHEAD_BYTES
        loss = self.faults.get("loss", state.effective_loss)
        came = sum(self.random.random() >= loss for _ in range(count))
        bps = state.rate_bps * self.faults.get("rate_gain", 1.0) or 8 * frame / gap_s
        report = {"packets": came, "duplicates": 0, "late": 0, "first_ns": 0, "first_bytes": frame}
        report |= {"frames_bytes": came * frame, "last_ns": round((came - 1) * frame * 8 / bps * 1e9) if came else 0}
        return lambda: report

    def stream(self, gap_s: float, until_s: float, size: int = 64) -> tuple[list[float], Callable[[], dict[str, Any]]]:
        start_s = time.monotonic()
        sent = [start_s + index * gap_s for index in range(int((until_s - start_s) / gap_s))]
        time.sleep(max(0.0, until_s - time.monotonic()))

        def report() -> dict[str, Any]:
            came, edges = [], sorted(self.link.edges)
            for number, at_s in enumerate(sent):
                dark = [outage for edge_s, outage in edges if edge_s <= at_s][-1:] == [True]
                if not dark:
                    came.append([number, number])
            return {"ranges": came}

        return sent, report


def certify(link: FakeLink, one_clock: bool = True, **faults: Any) -> certificate.Certificate:
    probe: Any = FakeProbe(link, **faults)
    return Certifier(link, probe, LIMITS, one_clock, PLAN).measure()  # type: ignore[arg-type]


def verdicts(found: certificate.Certificate, prefix: str) -> set[str]:
    return {row.verdict for row in found.criteria if row.name.startswith(prefix)}


@pytest.mark.parametrize("one_clock", [True, False])
def test_a_good_link_passes_and_is_left_clear(one_clock: bool) -> None:
    link = FakeLink()
    found = certify(link, one_clock)
    assert found.verdict == "pass", [row for row in found.criteria if row.verdict != "pass"]
    assert {row.name.split(" ")[0] for row in found.criteria} == {
        *("baseline", "delay", "rate", "loss", "outage", "edge", "negative")
    }
    assert link.states == {}
    assert link.cleared == 2
    assert json.loads(json.dumps(found.as_json()))["backend"] == "fake"


@pytest.mark.parametrize(
    ("faults", "criterion"),
    [
        ({"delay_gain": 1.01}, "delay"),
        ({"late": 1}, "delay"),
        ({"rate_gain": 0.98}, "rate"),
        ({"loss": 0.0}, "loss"),
        ({"loss": 0.0}, "outage"),
    ],
)
def test_each_fault_fails_its_own_criterion(faults: dict[str, Any], criterion: str) -> None:
    found = certify(FakeLink(), **faults)
    assert found.verdict == "fail"
    assert criterion in {row.name.split(" ")[0] for row in found.criteria if row.verdict == "fail"}


def test_a_path_that_loses_probes_is_refused() -> None:
    assert verdicts(certify(FakeLink(), missing=3), "baseline") == {"invalid"}


def test_a_late_edge_fails() -> None:
    found = certify(FakeLink(late_s=0.008))
    assert verdicts(found, "edge") == {"fail"}
    assert found.verdict == "fail"


def test_an_edge_that_comes_too_early_fails() -> None:
    found = certify(FakeLink(lead_s=0.008))
    assert verdicts(found, "edge") == {"fail"}


def test_edges_sent_ahead_by_what_they_take_are_in_time() -> None:
    assert verdicts(certify(FakeLink(late_s=0.008, lead_s=0.008)), "edge") == {"pass"}


def test_a_noisy_baseline_is_refused_and_nothing_else_is_measured() -> None:
    link = FakeLink()
    found = certify(link, noise_s=2e-3)
    assert found.verdict == "invalid"
    assert {row.name.split(" ")[0] for row in found.criteria} == {"baseline"}
    assert link.cleared == 2


def test_a_measurement_that_cannot_fail_is_invalid() -> None:
    """A probe that always tells what was claimed passes everything, the wrong setting included."""

    class Flatterer(FakeProbe):
        def echoes(self, count: int, wait_s: float = 1.0) -> Echoes:
            found = Echoes(count)
            for _ in range(count):
                shaped = any(state.delay_s for state in self.link.states.values())
                up = 0.0002 + (0.02 if shaped and self.state("uplink").delay_s else 0.0)
                down = 0.0002 + (0.02 if shaped and self.state("downlink").delay_s else 0.0)
                found.uplink.append(up)
                found.downlink.append(down)
            return found

    link = FakeLink()
    probe: Any = Flatterer(link)
    found = Certifier(link, probe, LIMITS, True, PLAN).measure()  # type: ignore[arg-type]
    assert verdicts(found, "delay") == {"pass"}
    assert verdicts(found, "negative control") == {"invalid"}
    assert found.verdict == "invalid"


def test_the_link_is_cleared_when_the_measurement_breaks() -> None:
    link = FakeLink()

    class Broken(FakeProbe):
        def train(self, *_: Any) -> Any:
            raise BenchError("gone")

    probe: Any = Broken(link)
    with pytest.raises(BenchError, match="gone"):
        Certifier(link, probe, LIMITS, True, PLAN).measure()  # type: ignore[arg-type]
    assert link.states == {}


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_backends_prefer_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Backend("netem", False, "no module"), Backend("user-space", True, "ok"), Backend("netem-ssh", True, "q"))
    monkeypatch.setattr(link_backends, "backends", lambda: found)
    lines = CliRunner().invoke(link_cli.link, ["backends"]).output.splitlines()
    assert [line.split()[:2] for line in lines] == [["NO", "netem"], ["use", "user-space"], ["ok", "netem-ssh"]]
    as_json = json.loads(CliRunner().invoke(link_cli.link, ["backends", "--json"]).output)
    assert as_json["chosen"] == "user-space"
    assert link_backends.chosen(found[:1]) is None
    assert link_backends.told(found) == "user-space is best here: ok; not netem: no module"
    assert link_backends.told(found[:1]) == "none works here; not netem: no module"


def test_this_hosts_backends_are_told_with_a_reason() -> None:
    found = link_backends.backends()
    assert [item.driver for item in found] == ["netem", "user-space", "netem-ssh"]
    assert all(item.why for item in found)


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("fail", 1), ("invalid", 6)])
def test_certify_exits_by_its_verdict_and_writes_it_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verdict: Any, code: int
) -> None:
    asked: list[Any] = []

    def certify(bench: Any, board: Any, plan: Any, say: Any) -> certificate.Certificate:
        asked.append(plan)
        return certificate.Certificate(verdict, (), {"backend": "fake"})

    monkeypatch.setattr(link_certify, "certify", certify)
    out = tmp_path / "certificate.json"
    value = link_cli.link.main(["certify", "--quick", "--out", str(out), "--json"], standalone_mode=False)
    assert value == code
    assert asked == [QUICK]
    assert json.loads(out.read_text()) == {"schema": 1, "verdict": verdict, "criteria": [], "backend": "fake"}


def test_a_certificate_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        link_certify.write(certificate.Certificate("pass", (), {}), tmp_path / "none" / "c.json")


# ---------------------------------------------------------------------------------------------------------------------
# Before a flight


def test_a_flight_that_asks_for_it_keeps_its_certificate_and_needs_it_to_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    verdict: Any = "pass"

    def certify(bench: Any, board: Any, plan: Any, say: Any) -> certificate.Certificate:
        row = Criterion("delay uplink", verdict, 0.1, "0.5 ms", "s", None, "error 100 ms")
        return certificate.Certificate(verdict, (row,), {"backend": "fake"})

    monkeypatch.setattr(link_certify, "certify", certify)
    bench: Any = None
    link_certify.for_flight(bench, None, tmp_path, print)
    assert json.loads((tmp_path / "certificate.json").read_text())["verdict"] == "pass"
    verdict = "fail"
    with pytest.raises(BenchError, match="certificate is fail: delay uplink: error 100 ms"):
        link_certify.for_flight(bench, None, tmp_path, print)
    assert json.loads((tmp_path / "certificate.json").read_text())["verdict"] == "fail"
