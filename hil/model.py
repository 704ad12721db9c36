"""Values that every layer shares. SI units, the unit in the name; frozen, so that they can cross threads and tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["pass", "fail", "invalid", "infra", "missing"]
Direction = Literal["uplink", "downlink"]  # uplink: ground to board; downlink: board to ground


@dataclass(frozen=True, slots=True)
class Reading:
    """One measurement of one supply channel.

    `time_s` is `time.monotonic()` at the middle of the exchange; `exchange_s` its length, so that a reader can judge
    how stale the sample may be. `output_on` is what the instrument itself reports.
    """

    time_s: float
    voltage_v: float
    current_a: float
    power_w: float
    output_on: bool
    exchange_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Setpoint:
    """What a supply channel is asked to be: bus voltage and current limit."""

    voltage_v: float
    current_limit_a: float


@dataclass(frozen=True, slots=True)
class LinkState:
    """The complete state of one direction of one link; always applied whole.

    `delay_s` one-way; `rate_bps` bits per second, 0 = not limited; `loss` the share of packets lost at random (0..1).
    An outage is 100 % loss, not a link that is down: senders notice nothing but silence, as in orbit.
    `queue_packets` may wait for the rate, 0 = a quarter of a second of them. Packets keep their order, whatever the
    jitter and however far the delay falls, unless `reorder`.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    rate_bps: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    outage: bool = False
    queue_packets: int = 0
    reorder: bool = False

    def __post_init__(self) -> None:
        for name in ("delay_s", "jitter_s", "rate_bps", "queue_packets"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"LinkState.{name} must be finite and >= 0, got {value!r}")
        for name in ("loss", "duplicate", "corrupt"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"LinkState.{name} must be within 0..1, got {value!r}")

    @property
    def effective_loss(self) -> float:
        """Loss as the emulator must apply it: 1.0 in an outage."""
        return 1.0 if self.outage else self.loss


@dataclass(frozen=True, slots=True)
class Applied:
    """Proof that a setpoint arrived: `time.monotonic()` values; `verified_s` is when the read-back agreed."""

    scheduled_s: float
    sent_s: float
    acknowledged_s: float
    verified_s: float

    @property
    def lateness_s(self) -> float:
        """How long after its schedule the setpoint was acknowledged."""
        return self.acknowledged_s - self.scheduled_s


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open interval [start_s, end_s) in mission or wall seconds, with a label."""

    start_s: float
    end_s: float
    label: str = ""

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Completed:
    """A finished remote command. `stdout` and `stderr` are text decoded as UTF-8 with replacement."""

    argv: tuple[str, ...]
    stdout: str
    stderr: str
    returncode: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Criterion:
    """One evaluated acceptance criterion of `verdict.json`."""

    name: str
    verdict: Verdict
    measured: float | str | None
    limit: str
    unit: str
    clock_rate: float | None = None
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class VerdictFile:
    """The content of `verdict.json` (schema 1). Only `pass` is green."""

    verdict: Verdict
    criteria: tuple[Criterion, ...] = field(default_factory=tuple)
    schema: int = 1
