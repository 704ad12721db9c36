"""What the radio path makes of geometry: one-way delay, signal over noise, and what a link of the mission is made of.

Link budget of one direction, in dB (free-space loss: Recommendation ITU-R P.525):

    C/N0  = EIRP - FSPL - pointing - atmosphere(zenith) / sin(elevation) - other losses + G/T + 228.6 dB(W/K/Hz)
    Es/N0 = C/N0 - 10 log10(symbol rate),   symbol rate = bandwidth / (1 + roll-off)

The atmosphere is a flat layer, good above 5 degrees of elevation; below 1 degree it is held at the value of 1 degree.
Rain is not in it: give it as other losses, or as outages. Doppler stays in the modem and is ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hil.errors import UsageError
from hil.mission.bursts import Bursts, RandomOutages
from hil.mission.frames import Floats
from hil.mission.passes import Handover
from hil.model import Direction, LinkState, Span

SPEED_OF_LIGHT_M_S = 299_792_458.0
OUTAGE = LinkState(outage=True)
DIRECTIONS: tuple[Direction, Direction] = ("uplink", "downlink")
# The edges at which the state of a link jumps: whoever plays a timeline applies it anew at each of them.
LINK_EDGES = frozenset(
    {"aos", "los", "handover", "reroute", "rate", "burst_start", "burst_end", "outage_start", "outage_end"}
)
_BOLTZMANN_DB = 10.0 * math.log10(1.380649e-23)
_LOWEST_SIN = math.sin(math.radians(1.0))


def one_way_delay_s(range_m: float, processing_s: float = 0.0, range_rate_m_s: float = 0.0) -> float:
    """Vacuum light time of what is sent at the instant of `range_m`, plus a fixed processing time, seconds.

    Downwards that is all: only the station moves until arrival (neglected: 0.01 us from low orbit, 0.2 us from
    40,000 km). Upwards the satellite moves meanwhile: give its `range_rate_m_s`, which is taken to first order.
    """
    return range_m / SPEED_OF_LIGHT_M_S * (1.0 + range_rate_m_s / SPEED_OF_LIGHT_M_S) + processing_s


def free_space_loss_db(frequency_hz: float, range_m: Floats) -> Floats:
    """Loss between isotropic antennas, dB: 20 log10(4 pi d f / c)."""
    return np.asarray(20.0 * np.log10(4.0 * np.pi * frequency_hz / SPEED_OF_LIGHT_M_S * range_m), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class LinkBudget:
    """What decides the rate of one direction; the module's head has the equations.

    `margin_db` is kept above a mode's threshold; to climb, the signal must be `hysteresis_db` above that again.
    """

    frequency_hz: float
    eirp_dbw: float
    g_over_t_db_k: float
    bandwidth_hz: float
    rolloff: float = 0.2
    pointing_loss_db: float = 0.5
    atmosphere_zenith_db: float = 0.3
    other_losses_db: float = 1.0
    margin_db: float = 1.0
    hysteresis_db: float = 1.0

    def __post_init__(self) -> None:
        for name in ("frequency_hz", "bandwidth_hz"):
            if not 0 < getattr(self, name) < 1e13:
                raise UsageError(f"link budget {name} is {getattr(self, name)}", hint="hertz, above zero")
        for name in ("pointing_loss_db", "atmosphere_zenith_db", "other_losses_db", "margin_db", "hysteresis_db"):
            if not 0 <= getattr(self, name) < 200:
                raise UsageError(f"link budget {name} is {getattr(self, name)}", hint="dB, zero or more")
        if not 0 <= self.rolloff <= 1:
            raise UsageError(f"link budget rolloff is {self.rolloff}", hint="0..1; DVB-S2 has 0.35, 0.25 and 0.20")
        for name in ("eirp_dbw", "g_over_t_db_k"):
            if not -200 < getattr(self, name) < 200:
                raise UsageError(f"link budget {name} is {getattr(self, name)}", hint="a number of dB")

    @property
    def symbol_rate(self) -> float:
        """Symbols per second that fit the bandwidth."""
        return self.bandwidth_hz / (1.0 + self.rolloff)

    def c_n0_dbhz(self, range_m: Floats, elevation_deg: Floats) -> Floats:
        """Carrier to noise density, dBHz, at each slant range and elevation; arrays of one shape."""
        sine = np.maximum(np.sin(np.radians(elevation_deg)), _LOWEST_SIN)
        losses = self.pointing_loss_db + self.other_losses_db + self.atmosphere_zenith_db / sine
        gains = self.eirp_dbw + self.g_over_t_db_k - _BOLTZMANN_DB
        return np.asarray(gains - losses - free_space_loss_db(self.frequency_hz, range_m), dtype=np.float64)

    def es_n0_db(self, range_m: Floats, elevation_deg: Floats) -> Floats:
        """Energy per symbol to noise density, dB."""
        return self.c_n0_dbhz(range_m, elevation_deg) - 10.0 * math.log10(self.symbol_rate)


@dataclass(frozen=True, slots=True)
class Channel:
    """One direction of a link: a fixed rate, or a budget that decides it; exactly one of the two.

    `rate_bps` and `max_rate_bps` (the cap of a budget's rate) are bits per second of mission time; `loss` is the share
    of packets lost outside of fades.
    """

    rate_bps: float | None = None
    budget: LinkBudget | None = None
    max_rate_bps: float | None = None
    loss: float = 0.0
    bursts: Bursts | None = None

    def __post_init__(self) -> None:
        if (self.rate_bps is None) == (self.budget is None):
            raise UsageError("a link direction has a rate or a budget, not both or neither")
        for name in ("rate_bps", "max_rate_bps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e13:
                raise UsageError(f"link {name} is {value}", hint="give bits per second, above zero")
        if not 0 <= self.loss <= 1:
            raise UsageError(f"link loss is {self.loss}", hint="a share of packets, 0..1")

    @property
    def faded_loss(self) -> float:
        """Share of packets lost within a fade: what survives the fade still meets `loss`."""
        return 1.0 - (1.0 - self.loss) * (1.0 - (self.bursts.loss_bad if self.bursts else 0.0))


@dataclass(frozen=True, slots=True)
class LinkWindow:
    """A link that no pass decides (a relay, a crew network): open for `open_s` every `every_s` from the start.

    `one_way_delay_s` is constant: nothing is known of its path.
    """

    open_s: float
    every_s: float
    one_way_delay_s: float
    label: str = "window"

    def __post_init__(self) -> None:
        if not 0 < self.open_s < self.every_s:
            raise UsageError(
                f"link window: open for {self.open_s:g} s of every {self.every_s:g} s", hint="shorter than its period"
            )
        if not 0 <= self.one_way_delay_s < 3_600:
            raise UsageError(f"link window: one_way_delay_s is {self.one_way_delay_s}", hint="seconds, zero or more")

    def spans(self, duration_s: float) -> tuple[Span, ...]:
        """The openings that begin within a mission of this length, each in full."""
        count = math.ceil(duration_s / self.every_s)
        starts = (index * self.every_s for index in range(count))
        return tuple(Span(start_s, start_s + self.open_s, self.label) for start_s in starts)


@dataclass(frozen=True, slots=True)
class LinkEnvironment:
    """The radio link of a mission, both directions.

    `acquisition_s` is the silence after AOS and after each handover until the modem has locked. `processing_s` adds to
    each direction's delay. `outages` (mission seconds) silence both directions. With a `window` the contacts are its
    openings and no station is looked at.
    """

    uplink: Channel
    downlink: Channel
    jitter_s: float = 0.0
    processing_s: float = 0.0
    acquisition_s: float = 0.0
    handover: Handover = "keep-current"
    outages: tuple[Span, ...] = ()
    random_outages: RandomOutages | None = None
    window: LinkWindow | None = None

    def __post_init__(self) -> None:
        for name in ("jitter_s", "processing_s", "acquisition_s"):
            if not 0 <= getattr(self, name) < 3_600:
                raise UsageError(f"link {name} is {getattr(self, name)}", hint="seconds, zero or more")
        if self.handover not in ("keep-current", "highest"):
            raise UsageError(f"unknown handover rule {self.handover!r}", hint="keep-current or highest")
        for span in self.outages:
            if not 0 <= span.start_s < span.end_s:
                raise UsageError(f"an outage from {span.start_s:g} s to {span.end_s:g} s", hint="start before end")
        if self.window is not None and (self.uplink.budget or self.downlink.budget):
            raise UsageError("a link window has no geometry to budget", hint="give both directions a rate_bps")

    @classmethod
    def fixed(
        cls,
        uplink_bps: float,
        downlink_bps: float,
        *,
        uplink_loss: float = 0.0,
        downlink_loss: float = 0.0,
        **rest: Any,
    ) -> LinkEnvironment:
        """A link of two published rates, bits per second; `rest` are the fields that both directions share."""
        return cls(Channel(uplink_bps, loss=uplink_loss), Channel(downlink_bps, loss=downlink_loss), **rest)

    def capped(self, rate_bps: float) -> LinkEnvironment:
        """The same link behind something that carries no more than `rate_bps` in either direction."""

        def less(channel: Channel) -> Channel:
            if channel.rate_bps is not None:
                return replace(channel, rate_bps=min(channel.rate_bps, rate_bps))
            return replace(channel, max_rate_bps=min(channel.max_rate_bps or rate_bps, rate_bps))

        return replace(self, uplink=less(self.uplink), downlink=less(self.downlink))

    def channel(self, direction: Direction) -> Channel:
        return self.uplink if direction == "uplink" else self.downlink

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LinkEnvironment:
        """Inverse of `dataclasses.asdict`, also after a round trip through JSON."""
        random, window = values["random_outages"], values["window"]
        return cls(
            **{
                **values,
                "uplink": _channel(values["uplink"]),
                "downlink": _channel(values["downlink"]),
                "outages": tuple(Span(**span) for span in values["outages"]),
                "random_outages": random and RandomOutages(**random),
                "window": window and LinkWindow(**window),
            }
        )


def _channel(values: dict[str, Any]) -> Channel:
    budget, bursts = values["budget"], values["bursts"]
    return Channel(
        **{**values, "budget": budget and LinkBudget(**budget), "bursts": bursts and Bursts(**bursts)},
    )
