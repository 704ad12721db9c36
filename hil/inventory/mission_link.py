"""The radio link of a mission file: fixed rates or a link budget, bursts, outages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hil.inventory.yaml_file import Strict

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class LinkBudget(Strict):
    """What decides the rate of one direction. Sources of the equations: hil/mission/radio.py."""

    frequency_ghz: Positive
    eirp_dbw: float
    g_over_t_db_k: float
    bandwidth_hz: Positive = Field(description="symbol rate x (1 + roll-off); the ladder's rates follow from it")
    rolloff: float = Field(default=0.2, ge=0, le=1)
    pointing_loss_db: float = Field(default=0.5, ge=0)
    atmosphere_zenith_db: float = Field(default=0.3, ge=0, description="scaled by 1/sin(elevation)")
    other_losses_db: float = Field(default=1.0, ge=0)
    margin_db: float = Field(default=1.0, ge=0)
    hysteresis_db: float = Field(default=1.0, ge=0)


class Bursts(Strict):
    """Fading as a two-state process in time (Gilbert-Elliott), seeded by the mission's seed."""

    good_mean_s: Positive
    bad_mean_s: Positive
    loss_bad: Share = 1.0


class LinkRates(Strict):
    """One direction of the radio link: a published or assumed fixed rate, or a budget. `loss` is the residual share."""

    rate_bps: Positive | None = None
    budget: LinkBudget | None = None
    max_rate_bps: Positive | None = Field(default=None, description="cap of a budget's rate")
    loss: Share = 0.0
    bursts: Bursts | None = None

    @model_validator(mode="after")
    def _one_rate(self) -> LinkRates:
        if (self.rate_bps is None) == (self.budget is None):
            raise ValueError("give exactly one of rate_bps, budget")
        return self


class ScheduledOutage(Strict):
    """Both directions silent from `start_h` (mission hours) for `duration_s`."""

    start_h: float = Field(ge=0)
    duration_s: Positive


class RandomOutages(Strict):
    """Poisson arrivals over the whole mission with exponential durations, seeded by the mission's seed."""

    per_day: Positive
    mean_s: Positive


class LinkPlan(Strict):
    """Both directions, and how long after AOS and each handover the modem needs to lock.

    `window_h`, `every_h`: a link that is not tied to passes (a crew network, a relay) is open for `window_h` hours
    every `every_h` hours from the mission's start, with `one_way_delay_s`.
    """

    uplink: LinkRates
    downlink: LinkRates
    acquisition_s: float = Field(default=0.0, ge=0)
    processing_s: float = Field(default=0.0, ge=0)
    jitter_s: float = Field(default=0.0, ge=0)
    handover: Literal["keep-current", "highest"] = "keep-current"
    outages: tuple[ScheduledOutage, ...] = ()
    random_outages: RandomOutages | None = None
    window_h: Positive | None = None
    every_h: Positive | None = None
    one_way_delay_s: float | None = Field(default=None, ge=0)
