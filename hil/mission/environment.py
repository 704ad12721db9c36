"""What a mission's timeline is compiled from: orbit, stations, link, power, faults, heat; values and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from hil.errors import UsageError
from hil.mission import frames
from hil.mission.eps import EpsConfig, ShedConfig
from hil.mission.faults import FaultPlan, FaultRate
from hil.mission.frames import Station
from hil.mission.orbit import Orbit
from hil.mission.radio import LinkEnvironment
from hil.mission.relay import Relay
from hil.mission.solar_array import ArrayConfig
from hil.mission.thermal import ThermalConfig


@dataclass(frozen=True, slots=True)
class PowerEnvironment:
    """The satellite's power side: array, battery and bus, load shedding, and what the board is expected to draw."""

    array: ArrayConfig
    eps: EpsConfig
    shed: ShedConfig | None = None
    board_idle_w: float = 0.0
    board_full_w: float = 0.0


@dataclass(frozen=True, slots=True)
class MissionEnvironment:
    """Everything the timeline is made from, and nothing else. Times in seconds, `start` an instant in UTC."""

    name: str
    orbit: Orbit
    stations: tuple[Station, ...]
    start: datetime
    duration_s: float
    link: LinkEnvironment
    power: PowerEnvironment | None = None
    seed: int = 0
    step_s: float = 10.0
    faults: FaultPlan | None = None
    relay: Relay | None = None
    thermal: ThermalConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", frames.utc(self.start))
        if self.relay is not None and self.relay.orbit != self.orbit:
            raise UsageError(f"mission {self.name}: its orbit is not that of the satellite its relay leads to")
        if self.relay is not None and self.link.window is not None:
            raise UsageError(f"mission {self.name}: a link window has no station for a relay to start from")
        if not 0 < self.duration_s <= 400 * frames.DAY_S:
            raise UsageError(f"mission {self.name}: duration_s is {self.duration_s}", hint="above zero, up to 400 days")
        if not 0.1 <= self.step_s <= 600:
            raise UsageError(f"mission {self.name}: step_s is {self.step_s}", hint="0.1..600 s; 10 is a good value")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` reads them back to an equal environment."""
        return {
            "name": self.name,
            "orbit": self.orbit.as_dict(),
            "stations": [asdict(station) for station in self.stations],
            "start": self.start.isoformat(),
            "duration_s": self.duration_s,
            "link": asdict(self.link),
            "power": None if self.power is None else asdict(self.power),
            "seed": self.seed,
            "step_s": self.step_s,
            "faults": None if self.faults is None else asdict(self.faults),
            "relay": None if self.relay is None else self.relay.as_dict(),
            "thermal": None if self.thermal is None else asdict(self.thermal),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MissionEnvironment:
        """Inverse of `as_dict`, also after a round trip through JSON."""
        power, plan = values["power"], values["faults"]
        return cls(
            name=values["name"],
            orbit=Orbit.from_dict(values["orbit"]),
            stations=tuple(Station(**{**s, "mask_table": _rows(s["mask_table"])}) for s in values["stations"]),
            start=datetime.fromisoformat(values["start"]),
            duration_s=values["duration_s"],
            link=LinkEnvironment.from_dict(values["link"]),
            power=power
            and PowerEnvironment(
                array=ArrayConfig.from_dict(power["array"]),
                eps=EpsConfig.from_dict(power["eps"]),
                shed=power["shed"] and ShedConfig(**power["shed"]),
                board_idle_w=power["board_idle_w"],
                board_full_w=power["board_full_w"],
            ),
            seed=values["seed"],
            step_s=values["step_s"],
            relay=values["relay"] and Relay.from_dict(values["relay"]),
            thermal=values["thermal"] and ThermalConfig.from_dict(values["thermal"]),
            faults=plan and FaultPlan(**{**plan, "rates": tuple(FaultRate(**rate) for rate in plan["rates"])}),
        )


def _rows(values: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(a), float(b)) for a, b in values)
