"""What a power loop is given and what it tells: the flight that closes it, bounds and times, samples, the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from hil.bench.deadman import ArmedOutput
from hil.bench.safety import Intent

State = Literal["off", "on", "shed", "tripped"]
OnEvent = Callable[[str, dict[str, Any]], None]
OnCut = Callable[[str], None]


# ---------------------------------------------------------------------------------------------- what a flight brings
class EpsStateLike(Protocol):
    """The part of `hil.mission.eps.EpsState` that the loop reads."""

    @property
    def soc(self) -> float: ...
    @property
    def bus_voltage_v(self) -> float: ...
    @property
    def watched_v(self) -> float: ...
    @property
    def battery_power_w(self) -> float: ...
    @property
    def array_used_w(self) -> float: ...
    @property
    def collapsed(self) -> bool: ...


class EpsLike(Protocol):
    """`hil.mission.eps.EpsModel`: mission seconds and watts in, state out; `gain` is the loop's own feedback."""

    @property
    def state(self) -> EpsStateLike: ...

    def step(self, dt_s: float, board_w: float, array_w: float) -> EpsStateLike: ...

    def gain(self, board_w: float, voltage_v: float | None = None) -> float: ...


class ClockLike(Protocol):
    """`hil.mission.clock.MissionClock`."""

    @property
    def rate(self) -> float: ...

    def mission_s(self, wall_s: float) -> float: ...

    def flown_s(self, from_wall_s: float, to_wall_s: float) -> float: ...


class ShedLike(Protocol):
    """`hil.mission.eps.ShedConfig`: hold in mission seconds, dwell in wall seconds."""

    @property
    def shed_v(self) -> float: ...
    @property
    def hold_s(self) -> float: ...
    @property
    def restore_v(self) -> float: ...
    @property
    def restore_soc(self) -> float: ...
    @property
    def dwell_s(self) -> float: ...


class Heartbeat(Protocol):
    """`hil.bench.deadman.Deadman`."""

    @property
    def alive(self) -> bool: ...

    def beat(self, source: str) -> None: ...

    async def arm(self, output: ArmedOutput) -> None: ...

    async def disarm(self, intent: Intent) -> None: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the loop must keep to in a flight, wall seconds; beyond it the record does not show the mission.

    `period_s`: the slowest loop. `lateness_s`: from a tick's schedule to its acknowledged set point. `gap_s`: between
    two measurements of an output that is on.
    """

    period_s: float = 1.0
    lateness_s: float = 1.0
    gap_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Flight:
    """What closes the loop. `array_w` and `sunlit` are functions of mission seconds.

    `planned_w` is the largest board load the mission plans with: the gain is judged by it before the flight. The board
    may be fed over several channels: the bus feeds some, the others are modelled behind a converter. Where a channel
    is the satellite's array (`hil.bench.arrayflight`) nothing else is modelled: there is no `eps`.
    """

    eps: EpsLike | None
    clock: ClockLike
    array_w: Callable[[float], float]
    sunlit: Callable[[float], float]
    planned_w: float
    shed: ShedLike | None = None
    bounds: Bounds = Bounds()


@dataclass(slots=True)
class PowerLedger:
    """What one flight measured, and what the battery model was told of it. Joules.

    `metered_j` is wall energy, `gap_j` the part of it that lies between samples further apart than the bound: drawn
    straight between them, not measured. `metered_mission_j` and `fed_j` are mission energy, as measured and as fed to
    the model through the filter; `converter_j` is what the modelled converters of channels that the bus does not feed
    took besides, in skips too; `assumed_j` is what skips fed without a measurement. `writes` are set points that were
    sent, `writes_skipped` those below the supply's resolution. `compared` readings of a second meter, if there is one,
    were held against the supply's. All channels of the board count into one ledger.
    """

    metered_j: float = 0.0
    gap_j: float = 0.0
    metered_mission_j: float = 0.0
    fed_j: float = 0.0
    converter_j: float = 0.0
    assumed_j: float = 0.0
    samples: int = 0
    lost_samples: int = 0
    longest_gap_s: float = 0.0
    latest_s: float = 0.0
    overruns: int = 0
    writes: int = 0
    writes_skipped: int = 0
    meter: str = ""
    compared: int = 0


@dataclass(frozen=True, slots=True)
class PowerSample:
    """One tick. Volts, amperes, watts and joules are measured at the supply; None without a flight.

    `energy_j` integrates over wall time and is what tokens are divided by; `mission_energy_j` over mission time.
    `bus_voltage_v`, `soc`, `array_w`, `array_used_w`, `battery_w` and `gain` are the model's.
    """

    t_mono: float
    board: str
    state: State
    voltage_set_v: float
    current_limit_a: float
    voltage_v: float
    current_a: float
    power_w: float
    energy_j: float
    mission_energy_j: float
    lateness_s: float
    t_mission: float | None = None
    rate: float | None = None
    soc: float | None = None
    bus_voltage_v: float | None = None
    array_w: float | None = None
    array_used_w: float | None = None
    battery_w: float | None = None
    sunlit: float | None = None
    gain: float | None = None

    def row(self) -> dict[str, Any]:
        """Column names and values of the recorder's `power` table."""
        return {name: getattr(self, name) for name in _COLUMNS}


_COLUMNS = tuple(item.name for item in fields(PowerSample))  # of numbers and words: `asdict` would copy each deeply


@dataclass(frozen=True, slots=True)
class Tuning:
    """Times of the loop, wall seconds. `filter_s` is the time constant of the fed-back current."""

    period_min_s: float = 0.1
    filter_s: float = 0.3
    stale_s: float = 2.0
    breach_s: float = 0.2
    overrun_s: float = 0.25
    pulse_s: float = 0.2
    step_budget_s: float = 4.0  # an await that takes longer than this counts as hung: the heartbeat stops
    off_timeout_s: float = 5.0
