"""When the link fails on its own: fades as a two-state process in time, scheduled and random outages. All seeded.

Fades follow Gilbert and Elliott, but in time: good and bad sojourns are exponential in seconds. (Stepping the chain by
packets, as emulators offer, would tie the length of a fade to the traffic.) Each contact and direction draws from a
stream of its own, so that a longer contact, another station or another direction changes nobody else's fades.

Draws come from Python's `random.Random.random()`, whose sequence for a seed is promised to stay the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from hil.errors import UsageError
from hil.model import Span

DAY_S = 86_400.0
MAX_EVENTS = 200_000  # a timeline of more edges is a slip of the pen, not a mission


@dataclass(frozen=True, slots=True)
class Bursts:
    """Mean seconds between fades and within one, and the share of packets lost within one."""

    good_mean_s: float
    bad_mean_s: float
    loss_bad: float = 1.0

    def __post_init__(self) -> None:
        for name in ("good_mean_s", "bad_mean_s"):
            if not 1e-3 <= getattr(self, name) < 1e7:
                raise UsageError(f"bursts {name} is {getattr(self, name)}", hint="seconds, from 0.001")
        if not 0 <= self.loss_bad <= 1:
            raise UsageError(f"bursts loss_bad is {self.loss_bad}", hint="a share of packets, 0..1")


@dataclass(frozen=True, slots=True)
class RandomOutages:
    """Outages that arrive at random, `per_day` of them on average, exponential with a mean of `mean_s` seconds."""

    per_day: float
    mean_s: float

    def __post_init__(self) -> None:
        if not 0 < self.per_day <= 1e5:
            raise UsageError(f"random outages per_day is {self.per_day}", hint="above zero, up to 100,000")
        if not 0 < self.mean_s < 1e7:
            raise UsageError(f"random outages mean_s is {self.mean_s}", hint="seconds, above zero")


def fades(bursts: Bursts, start_s: float, end_s: float, seed: int, key: str) -> tuple[Span, ...]:
    """The bad sojourns that begin or last within [start_s, end_s), cut to it.

    `key` names contact and direction. The process is stationary: it is bad at `start_s` as often as at any other time.
    """
    stream = Random(f"fades:{seed}:{key}")  # noqa: S311  (weather, not secrets)
    bad = stream.random() < bursts.bad_mean_s / (bursts.good_mean_s + bursts.bad_mean_s)
    found, at_s = [], start_s
    while at_s < end_s:
        until_s = at_s + _sojourn(stream, bursts.bad_mean_s if bad else bursts.good_mean_s)
        if bad:
            found.append(Span(at_s, min(until_s, end_s), "fade"))
        at_s, bad = until_s, not bad
        _bound(len(found), "bursts")
    return tuple(found)


def outages(
    scheduled: tuple[Span, ...], random: RandomOutages | None, duration_s: float, seed: int
) -> tuple[Span, ...]:
    """All outages of a mission, disjoint and sorted. The label says why: `scheduled`, `random`.

    Overlapping ones are merged and keep the first one's label. A longer mission keeps the outages of a shorter one.
    """
    found = [Span(span.start_s, span.end_s, "scheduled") for span in scheduled]
    if random is not None:
        stream = Random(f"outages:{seed}")  # noqa: S311
        at_s = _sojourn(stream, DAY_S / random.per_day)
        while at_s < duration_s:
            found.append(Span(at_s, at_s + _sojourn(stream, random.mean_s), "random"))
            at_s += _sojourn(stream, DAY_S / random.per_day)
            _bound(len(found), "random outages")
    merged: list[Span] = []
    for span in sorted(found, key=lambda item: (item.start_s, item.end_s)):
        if merged and span.start_s <= merged[-1].end_s:
            merged[-1] = Span(merged[-1].start_s, max(merged[-1].end_s, span.end_s), merged[-1].label)
        else:
            merged.append(span)
    return tuple(span for span in merged if span.start_s < duration_s)


def _sojourn(stream: Random, mean_s: float) -> float:
    """Exponential, and never so short that its two ends are one instant."""
    return max(-mean_s * math.log1p(-stream.random()), 1e-5)


def _bound(count: int, what: str) -> None:
    if count > MAX_EVENTS:
        raise UsageError(f"{what}: more than {MAX_EVENTS} in one mission", hint="longer means, or a shorter mission")
