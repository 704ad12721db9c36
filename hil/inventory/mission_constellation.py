"""A constellation in a mission file: copies of the mission's orbit, and the links between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hil.inventory.yaml_file import Strict

Positive = Annotated[float, Field(gt=0)]


class IslPlan(Strict):
    """Inter-satellite links. `ring`: neighbours in the plane; `grid`: also the nearest in both adjacent planes."""

    topology: Literal["ring", "grid"] = "ring"
    rate_bps: Positive
    acquisition_s: float = Field(default=0.0, ge=0)
    max_range_km: Positive | None = None
    grazing_altitude_km: float = Field(default=80.0, ge=0)


class Constellation(Strict):
    """Satellites spread evenly from the mission's orbit, which is the first of the first plane.

    Walker notation i:T/P/F: T = planes x satellites_per_plane, F = phasing. `raan_spread_deg` 360 is a delta pattern,
    180 a star. One plane is a ring.
    """

    planes: int = Field(default=1, ge=1, le=1_000)
    satellites_per_plane: int = Field(ge=2, le=10_000)
    phasing: int = Field(default=0, ge=0)
    raan_spread_deg: float = Field(default=360.0, gt=0, le=360)
    isl: IslPlan | None = None
    step_s: Positive = 60.0

    @model_validator(mode="after")
    def _phased(self) -> Constellation:
        if self.phasing >= self.planes:
            raise ValueError(f"phasing must be below planes ({self.planes})")
        return self
