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
    pointing_loss_db: float = Field(default=0.5, ge=0, lt=200)
    atmosphere_zenith_db: float = Field(default=0.3, ge=0, lt=200, description="scaled by 1/sin(elevation)")
    other_losses_db: float = Field(default=1.0, ge=0, lt=200, description="polarisation, cabling, rain")
    margin_db: float = Field(default=1.0, ge=0, lt=200, description="kept above a mode's threshold")
    hysteresis_db: float = Field(default=1.0, ge=0, lt=200, description="needed above that to step up")


class Bursts(Strict):
    """Fading as a two-state process in time (Gilbert-Elliott), seeded by the mission's seed."""

    good_mean_s: Positive = Field(ge=1e-3, lt=1e7)
    bad_mean_s: Positive = Field(ge=1e-3, lt=1e7)
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
        if self.max_rate_bps is not None and self.budget is None:
            raise ValueError("max_rate_bps caps a budget: with rate_bps it says nothing")
        return self


class ScheduledOutage(Strict):
    """Both directions silent from `start_h` (mission hours) for `duration_s`."""

    start_h: float = Field(ge=0)
    duration_s: Positive


class RandomOutages(Strict):
    """Poisson arrivals over the whole mission with exponential durations, seeded by the mission's seed."""

    per_day: Positive = Field(le=1e5)
    mean_s: Positive = Field(lt=1e7)


class LinkPlan(Strict):
    """Both directions, and how long after AOS and each handover the modem needs to lock.

    `window_h`, `every_h`: a link that is not tied to passes (a crew network, a relay) is open for `window_h` hours
    every `every_h` hours from the mission's start, with `one_way_delay_s`. The stations are not looked at then.
    """

    uplink: LinkRates
    downlink: LinkRates
    acquisition_s: float = Field(default=0.0, ge=0, lt=3600)
    processing_s: float = Field(default=0.0, ge=0, lt=3600)
    jitter_s: float = Field(default=0.0, ge=0, lt=3600)
    handover: Literal["keep-current", "highest"] = "keep-current"
    outages: tuple[ScheduledOutage, ...] = ()
    random_outages: RandomOutages | None = None
    window_h: Positive | None = None
    every_h: Positive | None = None
    one_way_delay_s: float | None = Field(default=None, ge=0, lt=3600)

    @model_validator(mode="after")
    def _window(self) -> LinkPlan:
        given = [name for name in ("window_h", "every_h", "one_way_delay_s") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"{', '.join(given)}: window_h, every_h and one_way_delay_s go together")
        if self.window_h is not None and self.every_h is not None and self.window_h >= self.every_h:
            raise ValueError(f"window_h {self.window_h:g} is not below every_h {self.every_h:g}")
        if given and (self.uplink.budget is not None or self.downlink.budget is not None):
            raise ValueError("a window has no geometry to budget: give both directions a rate_bps")
        return self
