"""Radiation faults of a mission file: published rates that become a seeded schedule."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hil.inventory.bench import Name
from hil.inventory.yaml_file import Strict

Positive = Annotated[float, Field(gt=0)]


class FaultRate(Strict):
    """Arrivals of one kind of fault: per year as published, or a proton cross-section times `fluence_per_cm2_year`."""

    per_year: float | None = Field(default=None, ge=0)
    cross_section_cm2: float | None = Field(default=None, ge=0)
    source: str = ""

    @model_validator(mode="after")
    def _one(self) -> FaultRate:
        if (self.per_year is None) == (self.cross_section_cm2 is None):
            raise ValueError("give exactly one of per_year, cross_section_cm2")
        return self


class FaultPlan(Strict):
    """Which faults arrive how often; `saa_share` of them while inside the South Atlantic Anomaly."""

    rates: dict[Name, FaultRate] = Field(min_length=1)
    acceleration: Positive = Field(default=1.0, description="arrivals are this many times as frequent; labelled")
    saa_share: float = Field(default=0.9, ge=0, le=1)
    fluence_per_cm2_year: Positive = Field(default=1.19e9, description="150 rad(Si)/yr behind about 10 mm Al")
