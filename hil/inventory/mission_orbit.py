"""Where the satellite flies and who hears it: orbit and ground stations of a mission file."""

from __future__ import annotations

from datetime import UTC
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from hil.inventory.yaml_file import Strict

Utc = Annotated[AwareDatetime, AfterValidator(lambda value: value.astimezone(UTC))]


class KeplerElements(Strict):
    """Mean elements of a design orbit. Give exactly one of the three sizes; the epoch is the mission's start if absent.

    Angles in degrees, TEME of epoch. `altitude_km` is the semi-major axis less the equatorial radius 6378.137 km;
    `mean_motion_rev_day` is the one a TLE has (Kozai's), the other two sizes are converted to it.
    """

    altitude_km: float | None = Field(default=None, gt=60)
    semi_major_axis_km: float | None = Field(default=None, gt=6_438)
    mean_motion_rev_day: float | None = Field(default=None, gt=0.05, lt=18)
    inclination_deg: float = Field(ge=0, le=180)
    eccentricity: float = Field(default=1e-4, ge=0, lt=1)
    raan_deg: float = 0.0
    argument_of_perigee_deg: float = 0.0
    mean_anomaly_deg: float = 0.0
    bstar: float = 0.0
    epoch: Utc | None = None

    @model_validator(mode="after")
    def _one_size(self) -> KeplerElements:
        given = [self.altitude_km, self.semi_major_axis_km, self.mean_motion_rev_day]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of altitude_km, semi_major_axis_km, mean_motion_rev_day")
        return self


class SunSynchronous(Strict):
    """A circular sun-synchronous design orbit; local mean solar time of one node, hours."""

    altitude_km: float = Field(ge=200, le=5_900)
    ltan_h: float | None = Field(default=None, ge=0, le=24)
    ltdn_h: float | None = Field(default=None, ge=0, le=24)
    epoch: Utc | None = None

    @model_validator(mode="after")
    def _one_node(self) -> SunSynchronous:
        if (self.ltan_h is None) == (self.ltdn_h is None):
            raise ValueError("give exactly one of ltan_h, ltdn_h")
        return self


class OrbitSource(Strict):
    """Exactly one of: a TLE file, a CCSDS 502 OMM file (.json or .xml), Keplerian elements, a sun-synchronous design.

    File paths are relative to the mission file.
    """

    tle: str | None = None
    omm: str | None = None
    kepler: KeplerElements | None = None
    sso: SunSynchronous | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> OrbitSource:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of tle, omm, kepler, sso")
        return self


def _row(value: tuple[float, float]) -> tuple[float, float]:
    azimuth, elevation = value
    if not 0 <= azimuth <= 360 or not -5 <= elevation < 90:
        raise ValueError(f"azimuth {azimuth:g} must be within 0..360, elevation {elevation:g} within -5 to below 90")
    return value


MaskRow = Annotated[tuple[float, float], AfterValidator(_row)]


class Station(Strict):
    """A ground station, WGS-84 geodetic, with the lowest elevation at which it is used.

    `mask_table` replaces `mask_deg`: rows [azimuth_deg, elevation_deg], linear between them and around north.
    """

    latitude_deg: float = Field(ge=-90, le=90)
    longitude_deg: float = Field(ge=-180, le=360)
    altitude_m: float = Field(default=0.0, ge=-500, le=9000)
    mask_deg: float = Field(default=5.0, ge=-5, lt=90)
    mask_table: tuple[MaskRow, ...] = ()

    @model_validator(mode="after")
    def _one_elevation_an_azimuth(self) -> Station:
        seen: dict[float, float] = {}
        for azimuth, elevation in self.mask_table:
            if seen.setdefault(azimuth % 360.0, elevation) != elevation:
                raise ValueError(
                    f"mask_table has two elevations at azimuth {azimuth:g} (360 is 0); write a wall as 89.9 and 90"
                )
        return self
