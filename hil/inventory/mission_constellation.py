"""A constellation in a mission file: copies of the mission's orbit or a file of many, and the links between them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hil.inventory.yaml_file import Strict

Positive = Annotated[float, Field(gt=0)]


class IslOutagePlan(Strict):
    """A satellite out of order (all its links), or with `other` one link. Mission hours; no duration: for good."""

    satellite: int = Field(ge=0)
    other: int | None = Field(default=None, ge=0)
    start_h: float = Field(default=0.0, ge=0)
    duration_h: Positive | None = None


class IslPlan(Strict):
    """Inter-satellite links.

    `ring`: neighbours in the plane; `grid`: also the nearest in both adjacent planes; `mesh`: everyone within
    `max_range_km`. `acquisition_s` after a link (re)appears; `processing_s` is added per link.
    """

    topology: Literal["ring", "grid", "mesh"] = "ring"
    rate_bps: Positive
    acquisition_s: float = Field(default=0.0, ge=0)
    processing_s: float = Field(default=0.0, ge=0)
    max_range_km: Positive | None = None
    grazing_altitude_km: float = Field(default=80.0, ge=0)
    outages: tuple[IslOutagePlan, ...] = ()
    reacquire_after_eclipse: bool = Field(default=False, description="acquisition_s again after each eclipse of an end")

    @model_validator(mode="after")
    def _reach(self) -> IslPlan:
        if self.topology == "mesh" and self.max_range_km is None:
            raise ValueError("a mesh needs max_range_km: how far a terminal reaches")
        return self


class ConstellationPlan(Strict):
    """Satellites spread evenly from the mission's orbit, which is the first of the first plane, or those of `omm`.

    Walker notation i:T/P/F: T = planes x satellites_per_plane, F = phasing. `raan_spread_deg` 360 is a delta pattern,
    180 a star. One plane is a ring. `omm`: a file of many messages, beside the mission file; its order is the ring's.
    Satellites are numbered plane by plane from 0. `target`: the board flies on this one, and is reached through the
    inter-satellite links whenever any station sees any satellite; without it the board flies on the mission's orbit
    and has only that satellite's own passes.
    """

    planes: int = Field(default=1, ge=1, le=1_000)
    satellites_per_plane: int | None = Field(default=None, ge=2, le=10_000)
    phasing: int = Field(default=0, ge=0)
    raan_spread_deg: float = Field(default=360.0, gt=0, le=360)
    omm: str | None = None
    isl: IslPlan | None = None
    target: int | None = Field(default=None, ge=0)
    step_s: float = Field(default=60.0, ge=1, le=300)

    @model_validator(mode="after")
    def _whole(self) -> ConstellationPlan:
        if (self.satellites_per_plane is None) == (self.omm is None):
            raise ValueError("give exactly one of satellites_per_plane, omm")
        if self.omm is not None and self.planes != 1:
            raise ValueError(
                "planes are made from the mission's orbit; the satellites of an omm file stand as they are"
            )
        if self.phasing >= self.planes:
            raise ValueError(f"phasing must be below planes ({self.planes})")
        if self.target is not None and self.isl is None:
            raise ValueError("target is reached over inter-satellite links: add isl")
        if self.target is not None and self.satellites_per_plane is not None:
            count = self.planes * self.satellites_per_plane
            if self.target >= count:
                raise ValueError(f"target must be below the number of satellites ({count})")
        return self
