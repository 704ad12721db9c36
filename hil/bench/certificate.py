"""A link emulator's certificate: what it was asked for, next to what packets saw, against the path without it.

Five things are held against limits that the backend must meet: delay, rate, loss, order, and when an edge takes effect.
The bare path is measured first: when that alone strays further than a limit, nothing can be certified and the verdict
is `invalid`. At the end comes a negative control: the link is set wrong on purpose, and the same check must notice.

With one clock at both ends (the far end runs on this host) delays are one-way; else round trips with only one direction
shaped. The far end's own time is taken off either way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from hil.drivers.link import DIRECTIONS, LinkEmulator
from hil.drivers.link_agent import HEADER, OVERHEAD_BYTES, Tally, prepare, receive, send_train
from hil.drivers.prompt import be_prompt
from hil.errors import BenchError
from hil.model import Criterion, Direction, LinkState, Verdict

CLEAR = LinkState()
WILSON_Z = 3.2905
"""Of a 99.9 % interval: a good link fails a certificate of ten loss checks once in a hundred."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a backend must meet. Seconds; `rate` as a share; an edge as packets see it, early or late."""

    delay_p50_s: float
    delay_p99_s: float
    edge_p99_s: float
    rate: float = 0.01


NETEM_LOCAL = Limits(0.1e-3, 0.5e-3, 5e-3)
NETEM_REMOTE = Limits(0.1e-3, 0.5e-3, 5e-3)
USER_SPACE = Limits(0.3e-3, 2e-3, 5e-3)
EMULATED = Limits(1.5e-3, 5e-3, 5e-3)
"""Of a box whose processor is emulated: its timers are late by about a millisecond."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. The default takes about a minute and a half."""

    probes: int = 300
    delays_s: tuple[float, ...] = (0.005, 0.02, 0.12)
    rate_bps: float = 2e6
    rate_window_s: float = 10.0
    loss: float = 0.05
    loss_packets: int = 4000
    edges: int = 40
    edge_gap_s: float = 0.25
    seed: int = 1


QUICK = Plan(probes=150, delays_s=(0.02,), rate_window_s=3.0, loss_packets=2000, edges=10, edge_gap_s=0.2)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of a set of measured values, in their own unit."""

    p50: float
    p90: float
    p99: float
    maximum: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles:
        """Nearest-rank quantiles; nan without values."""
        ordered = sorted(values)
        if not ordered:
            return cls(math.nan, math.nan, math.nan, math.nan, 0)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

        return cls(at(0.5), at(0.9), at(0.99), ordered[-1], len(ordered))


@dataclass(frozen=True, slots=True)
class Certificate:
    """The verdict with everything it rests on; `as_json` is the content of `certificate.json`."""

    verdict: Verdict
    criteria: tuple[Criterion, ...]
    facts: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Schema 1."""
        rows = [asdict(row) for row in self.criteria]
        return {"schema": 1, "verdict": self.verdict, "criteria": rows, **self.facts}


def wilson(lost: int, sent: int, z: float = WILSON_Z) -> tuple[float, float]:
    """Wilson's interval of a share, `lost` of `sent` (E. B. Wilson, 1927)."""
    if sent == 0:
        return 0.0, 1.0
    share, z2 = lost / sent, z * z
    middle = (share + z2 / (2 * sent)) / (1 + z2 / sent)
    half = z / (1 + z2 / sent) * math.sqrt(share * (1 - share) / sent + z2 / (4 * sent * sent))
    return max(0.0, middle - half), min(1.0, middle + half)


# ---------------------------------------------------------------------------------------------------------------------
# Probes


@dataclass(slots=True)
class Echoes:
    """Delays in seconds: one-way as told by both ends' clocks, and the round trip without the far end's own time."""

    sent: int
    uplink: list[float] = field(default_factory=list)
    downlink: list[float] = field(default_factory=list)
    round_trip: list[float] = field(default_factory=list)
    late: int = 0
    duplicates: int = 0


class Probe:
    """The payload path from the ground to the agent behind the link; `sock` is connected to it."""

    def __init__(self, sock: socket.socket, seed: int = 1) -> None:
        prepare(sock)
        self._socket = sock
        self._random = random.Random(seed)  # noqa: S311
        self._run = int.from_bytes(os.urandom(3), "big")  # the agent may remember earlier certificates

    def echoes(self, count: int, gap_s: float = 0.006, size: int = 64, wait_s: float = 1.0) -> Echoes:
        """Probes at random phases, not waiting for one before the next."""
        found, run, pending = Echoes(count), self._next(), set(range(count))
        padding, highest, due_s = bytes(size - HEADER.size), -1, time.monotonic()

        def answered(data: bytes, came_ns: int) -> None:
            nonlocal highest
            op, its_run, number, there_ns, back_ns = HEADER.unpack_from(data)
            if op != b"e" or its_run != run:
                return
            if number not in pending:
                found.duplicates += 1
                return
            pending.discard(number)
            found.late += number < highest
            highest = max(highest, number)
            found.uplink.append((there_ns - sent_ns[number]) / 1e9)
            found.downlink.append((came_ns - back_ns) / 1e9)
            found.round_trip.append((came_ns - sent_ns[number] - (back_ns - there_ns)) / 1e9)

        sent_ns: list[int] = []
        for number in range(count):
            self._listen_until(due_s, answered)
            due_s += self._random.uniform(0.2, 1.8) * gap_s
            sent_ns.append(time.time_ns())
            self._socket.send(HEADER.pack(b"E", run, number, 0, 0) + padding)
        self._listen_until(time.monotonic() + wait_s, answered, lambda: not pending)
        return found

    def alive(self, timeout_s: float) -> bool:
        """Whether the far end answers at all."""
        ends_s = time.monotonic() + timeout_s
        while time.monotonic() < ends_s:
            if self.echoes(1, wait_s=0.2).round_trip:
                return True
        return False

    def train(self, direction: Direction, count: int, gap_s: float, size: int) -> Callable[[], dict[str, Any]]:
        """Send a train through one direction; returns when it has been sent. What came is asked for afterwards, by the
        function returned, once the link is clear again.
        """
        run = self._next()
        if direction == "uplink":
            return self._uplink_train(run, count, gap_s, size)
        tally = Tally()

        def came(data: bytes, at_ns: int) -> None:
            op, its_run, number, _, _ = HEADER.unpack_from(data)
            if op == b"D" and its_run == run:
                tally.add(number, len(data), at_ns)

        self._socket.send(HEADER.pack(b"S", run, count, round(gap_s * 1e9), size))
        self._listen_until(time.monotonic() + count * gap_s + 0.6, came)
        return tally.report

    def stream(self, gap_s: float, until_s: float, size: int = 64) -> tuple[list[float], Callable[[], dict[str, Any]]]:
        """Numbered packets uplink until an instant: when each left (`time.monotonic`), and the count afterwards."""
        run, padding, sent, due_s = self._next(), bytes(size - HEADER.size), list[float](), time.monotonic()
        while due_s < until_s:
            if (pause_s := due_s - time.monotonic()) > 0:
                time.sleep(pause_s)
            due_s += gap_s
            packet = HEADER.pack(b"C", run, len(sent), 0, 0) + padding
            sent.append(time.monotonic())
            with contextlib.suppress(BlockingIOError):
                self._socket.send(packet)
        return sent, lambda: self._report(run)

    def _uplink_train(self, run: int, count: int, gap_s: float, size: int) -> Callable[[], dict[str, Any]]:
        counted = _Counted(self._socket)
        send_train(counted, None, run, count, round(gap_s * 1e9), size)  # type: ignore[arg-type]
        time.sleep(0.6)  # the bottleneck's queue empties
        return lambda: self._report(run)

    def _report(self, run: int) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def came(data: bytes, at_ns: int) -> None:
            op, its_run, *_ = HEADER.unpack_from(data)
            if op == b"r" and its_run == run:
                found.append(json.loads(data[HEADER.size :]))

        for _ in range(20):
            self._socket.send(HEADER.pack(b"R", run, 0, 0, 0))
            self._listen_until(time.monotonic() + 0.5, came, lambda: bool(found))
            if found:
                return found[0]
        raise BenchError("the far end of the link does not tell what it counted", hint="does it still run?")

    def _next(self) -> int:
        self._run += 1
        return self._run

    def _listen_until(
        self, end_s: float, take: Callable[[bytes, int], None], enough: Callable[[], bool] = lambda: False
    ) -> None:
        while not enough():
            left_s = end_s - time.monotonic()
            readable, _, _ = select.select([self._socket], [], [], max(0.0, left_s))
            if not readable:
                return
            with contextlib.suppress(ConnectionRefusedError):  # the agent is not up yet
                data, at_ns, _ = receive(self._socket)
                if len(data) >= HEADER.size:
                    take(data, at_ns)


class _Counted:
    """A socket whose train packets are sent as ones to count."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, packet: bytes) -> None:
        self._socket.send(b"C" + packet[1:])


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


@dataclass(slots=True)
class Certifier:
    """Measures one link. `one_clock`: both ends tell the same time. `say` hears of each step."""

    link: LinkEmulator
    path: Probe
    limits: Limits
    one_clock: bool
    plan: Plan = field(default_factory=Plan)
    say: Callable[[str], None] = lambda line: None
    criteria: list[Criterion] = field(default_factory=list)
    bare: dict[Direction, float] = field(default_factory=dict)

    def measure(self) -> Certificate:
        """The whole certificate, the link cleared before and after. BenchError when the link or the path breaks."""
        began, load = time.time(), os.getloadavg()[0]
        preflight = self.link.preflight()
        self.link.clear()
        try:
            if self._baseline():
                for direction in DIRECTIONS:
                    self._delays(direction)
                    self._rate(direction)
                    self._loss(direction)
                    self._outage(direction)
                self._edges()
                self._negative_control()
        finally:
            self.link.clear()
        verdicts = [row.verdict for row in self.criteria]
        verdict: Verdict = "invalid" if "invalid" in verdicts else "fail" if "fail" in verdicts else "pass"
        facts = {
            "backend": preflight["backend"],
            "began": datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "duration_s": round(time.time() - began, 1),
            "delays": "one-way" if self.one_clock else "round trips, one direction shaped",
            "host": {"load": [load, os.getloadavg()[0]], "processors": os.cpu_count(), "kernel": os.uname().release},
            "limits": asdict(self.limits),
            "plan": asdict(self.plan),
            "preflight": preflight,
        }
        return Certificate(verdict, tuple(self.criteria), facts)

    def _baseline(self) -> bool:
        """The path with nothing on it; whether it is calm enough to certify anything."""
        echoes = self.path.echoes(self.plan.probes)
        calm = True
        for direction in DIRECTIONS:
            values = self._values(echoes, direction)
            middle = self.bare[direction] = Quantiles.of(values).p50
            stray = Quantiles.of(abs(value - middle) for value in values)
            quiet = stray.count >= 0.99 * echoes.sent and stray.p99 <= self.limits.delay_p99_s
            calm = calm and quiet
            told = f"bare path {_ms(middle)}, strays by {_told(stray)}"
            if not quiet:
                told += ": too noisy to certify against"
            self._note("baseline", direction, "pass" if quiet else "invalid", stray.p99, self.limits.delay_p99_s, told)
        return calm

    def _delays(self, direction: Direction) -> None:
        for delay_s in self.plan.delays_s:
            self._check_delay(f"delay {delay_s * 1e3:g} ms", direction, delay_s, delay_s)

    def _check_delay(self, name: str, direction: Direction, asked_s: float, set_s: float) -> bool:
        self._apply({direction: LinkState(delay_s=set_s)})
        echoes = self.path.echoes(self.plan.probes, wait_s=1.0 + 2 * set_s)
        errors = [value - self.bare[direction] - asked_s for value in self._values(echoes, direction)]
        stray, middle = Quantiles.of(map(abs, errors)), Quantiles.of(errors).p50
        good = stray.p50 <= self.limits.delay_p50_s and stray.p99 <= self.limits.delay_p99_s
        good = good and stray.count >= 0.99 * echoes.sent and echoes.late == echoes.duplicates == 0
        told = f"error {_told(stray)}, middle {middle * 1e3:+.3f} ms; {stray.count} of {echoes.sent} came, "
        told += f"{echoes.late} out of order, {echoes.duplicates} twice"
        limit = f"p50 {self.limits.delay_p50_s * 1e3:g} ms, p99 {self.limits.delay_p99_s * 1e3:g} ms"
        self._note(name, direction, "pass" if good else "fail", stray.p99, limit, told)
        return good

    def _rate(self, direction: Direction) -> None:
        self._check_rate(
            f"rate {self.plan.rate_bps / 1e6:g} Mbit/s", direction, self.plan.rate_bps, self.plan.rate_window_s
        )

    def _check_rate(self, name: str, direction: Direction, set_bps: float, window_s: float) -> bool:
        """Half again as much as the rate is sent; what comes out between the first and the last packet is the rate."""
        size, asked_bps = 1000, self.plan.rate_bps
        self._apply({direction: LinkState(rate_bps=set_bps, queue_packets=64)})
        gap_s = 8 * (size + OVERHEAD_BYTES) / (1.5 * asked_bps)
        report = self.path.train(direction, math.ceil(window_s / gap_s), gap_s, size)
        self._apply({})
        came = report()
        took_s = (came["last_ns"] - came["first_ns"]) / 1e9
        bps = 8 * (came["frames_bytes"] - came["first_bytes"]) / took_s if took_s > 0 else math.nan
        error = bps / asked_bps - 1
        good = bool(abs(error) <= self.limits.rate and came["late"] == came["duplicates"] == 0)
        told = f"{bps / 1e6:.4f} Mbit/s over {took_s:.1f} s, {error:+.2%}; {came['late']} out of order"
        limit = f"+-{self.limits.rate:.0%}"
        self._note(name, direction, "pass" if good else "fail", error, limit, told, unit="1")
        return good

    def _loss(self, direction: Direction) -> None:
        asked, sent = self.plan.loss, self.plan.loss_packets
        self._apply({direction: LinkState(loss=asked)})
        report = self.path.train(direction, sent, 0.8e-3, 64)
        self._apply({})
        came = report()
        lost = sent - (came["packets"] - came["duplicates"])
        low, high = wilson(lost, sent)
        good = low <= asked <= high and came["late"] == came["duplicates"] == 0
        told = f"{lost} of {sent} lost, {lost / sent:.2%}; {came['late']} out of order, {came['duplicates']} twice"
        limit = f"{asked:.2%} within {low:.2%}..{high:.2%}"
        self._note(f"loss {asked:.0%}", direction, "pass" if good else "fail", lost / sent, limit, told, unit="1")

    def _outage(self, direction: Direction) -> None:
        self._apply({direction: LinkState(outage=True)})
        report = self.path.train(direction, 200, 1e-3, 64)
        self._apply({})
        came = report()
        # Downlink the outage is there before the request; the far end hears it, its packets must not come.
        good = came["packets"] == 0
        told = f"{came['packets']} of 200 came through"
        self._note("outage", direction, "pass" if good else "fail", came["packets"], "0", told, unit="1")

    def _edges(self) -> None:
        """Outages begin and end at set instants while packets go up: when was it acknowledged, when did they see it."""
        plan = self.plan
        start_s = time.monotonic() + 0.5
        times = [start_s + index * plan.edge_gap_s for index in range(plan.edges)]
        late: list[float] = []
        failures: list[BaseException] = []

        def play() -> None:
            be_prompt()  # what is measured is the link, not this thread's turn on a busy host
            try:
                for index, at_s in enumerate(times):
                    time.sleep(max(0.0, at_s - self.link.lead_s - time.monotonic()))
                    states: dict[Direction, LinkState] = dict.fromkeys(DIRECTIONS, LinkState(outage=index % 2 == 0))
                    applied = self.link.apply(states, at_s)
                    late.append(max(one.lateness_s for one in applied.values()))
            except BaseException as error:
                failures.append(error)

        player = threading.Thread(target=play)
        player.start()
        sent, report = self.path.stream(1e-3, times[-1] + plan.edge_gap_s)
        player.join()
        if failures:
            raise failures[0]
        self._apply({})
        seen = _observed(times, sent, report()["ranges"])
        lateness, observed = Quantiles.of(late), Quantiles.of(map(abs, seen))
        # What packets saw is the truth; the answer, which holds the read-back too, is told beside it.
        good = observed.count == plan.edges
        good = good and observed.p99 <= self.limits.edge_p99_s + 1e-3  # packets are a millisecond apart
        told = f"acknowledged {_told(lateness)} after the schedule; packets saw it {_told(observed)} from it, "
        told += f"middle {Quantiles.of(seen).p50 * 1e3:+.3f} ms"
        self._note("edge", "uplink", "pass" if good else "fail", observed.p99, self.limits.edge_p99_s, told)

    def _negative_control(self) -> None:
        """A wrong delay and a wrong rate must be found wrong; if they pass, so does anything."""
        kept = len(self.criteria)
        wrong_s = 0.02 + 3 * self.limits.delay_p99_s
        fooled = [
            self._check_delay("control (meant to fail)", "uplink", 0.02, wrong_s),
            self._check_rate("control (meant to fail)", "uplink", self.plan.rate_bps * (1 - 5 * self.limits.rate), 3.0),
        ]
        told = "; ".join(row.evidence for row in self.criteria[kept:])
        del self.criteria[kept:]
        text = "a delay and a rate set wrong on purpose " + ("went unnoticed: " if any(fooled) else "were noticed: ")
        self._note("negative control", "uplink", "invalid" if any(fooled) else "pass", None, "noticed", text + told)

    def _values(self, echoes: Echoes, direction: Direction) -> list[float]:
        if not self.one_clock:
            return echoes.round_trip
        return echoes.uplink if direction == "uplink" else echoes.downlink

    def _apply(self, states: Mapping[Direction, LinkState]) -> None:
        self.link.apply({d: states.get(d, CLEAR) for d in DIRECTIONS}, time.monotonic())

    def _note(
        self,
        name: str,
        direction: Direction,
        verdict: Verdict,
        measured: float | None,
        limit: float | str,
        evidence: str,
        unit: str = "s",
    ) -> None:
        text = limit if isinstance(limit, str) else f"{limit * 1e3:g} ms"
        value = None if measured is None or math.isnan(measured) else measured
        self.criteria.append(Criterion(f"{name} {direction}", verdict, value, text, unit, None, evidence))
        self.say(f"{verdict:7} {name} {direction}: {evidence}")


def _observed(times: Sequence[float], sent: Sequence[float], ranges: Sequence[Sequence[int]]) -> list[float]:
    """How long after each edge the packets changed: from coming to missing, or back. Edges that none saw are left out.

    An edge sent ahead of its instant may come early: below zero, by half the distance of two edges at most.
    Between the last packet of the old state and the first of the new lies a gap: its middle is taken.
    """
    came = bytearray(len(sent))
    for first, last in ranges:
        came[first : last + 1] = b"\1" * (last + 1 - first)
    changes = [(n, came[n]) for n in range(1, len(sent)) if came[n] != came[n - 1]]
    found = []
    early_s = (times[1] - times[0]) / 2 if len(times) > 1 else math.inf
    for index, at_s in enumerate(times):
        until_s = times[index + 1] - early_s if index + 1 < len(times) else math.inf
        wanted = index % 2  # the first edge begins an outage
        for number, state in changes:
            middle_s = (sent[number] + sent[number - 1]) / 2
            if state == wanted and at_s - early_s <= middle_s < until_s:
                found.append(middle_s - at_s)
                break
    return found


def _ms(value: float) -> str:
    return f"{value * 1e3:.3f} ms"


def _told(quantiles: Quantiles) -> str:
    values = (quantiles.p50, quantiles.p90, quantiles.p99, quantiles.maximum)
    return "p50/p90/p99/max " + "/".join(f"{value * 1e3:.3f}" for value in values) + " ms"
