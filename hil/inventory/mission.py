"""A mission: orbit, stations, link, electrical power, workload, steps and acceptance criteria, one YAML."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, Field, model_validator

from hil import paths
from hil.errors import UsageError
from hil.inventory import yaml_file
from hil.inventory.bench import Name
from hil.inventory.yaml_file import Strict

Utc = Annotated[AwareDatetime, AfterValidator(lambda value: value.astimezone(UTC))]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class OrbitSource(Strict):
    """Exactly one of: a TLE file (path relative to the mission file)."""

    tle: str


class Station(Strict):
    """A ground station, WGS-84 geodetic."""

    latitude_deg: float = Field(ge=-90, le=90)
    longitude_deg: float = Field(ge=-180, le=180)
    altitude_m: float = Field(default=0.0, ge=-500, le=9000)
    mask_deg: float = Field(default=5.0, ge=0, lt=90)


class LinkRates(Strict):
    """One direction of the radio link, as published or assumed."""

    rate_bps: Positive
    loss: Share = 0.0


class LinkPlan(Strict):
    """Both directions, and how long after AOS the modem needs to lock."""

    uplink: LinkRates
    downlink: LinkRates
    acquisition_s: float = Field(default=0.0, ge=0)


class Array(Strict):
    """Solar array at the bus: beginning-of-life watts and what is left of them."""

    bol_w: float = Field(ge=0)
    degradation: Share = 1.0
    pointing: Share = 1.0


class Battery(Strict):
    """Battery of the satellite, NMC cells in series; capacity in Wh at the cells."""

    cells_series: int = Field(ge=1)
    capacity_wh: Positive
    resistance_ohm: float = Field(ge=0)
    charge_c_rate: Positive = 1.0
    initial_soc: Share = 1.0


class Shed(Strict):
    """Load shedding: the board's power is really cut. Dwell is wall time: a board's rails discharge in real time."""

    voltage_v: Positive
    hold_s: float = Field(default=2.0, ge=0)
    restore_voltage_v: Positive
    restore_soc: Share
    dwell_s: float = Field(default=5.0, ge=0)


class PowerPlan(Strict):
    """The satellite's electrical power system. `platform_w` is everything but the board, modelled."""

    platform_w: float = Field(ge=0)
    array: Array
    battery: Battery
    shed: Shed


class ModelFile(Strict):
    """The language model that is flown: a GGUF file on the ground and its SHA-256."""

    file: Path
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    title: str
    system_prompt: str | None = Field(
        default=None, description="sent with every question, also when empty; null: the chat template's own"
    )


class BootStep(Strict):
    """Power on, firmware, kernel, login, SSH."""


class UploadStep(Strict):
    """Send the model over the payload link, one contact after the other, and activate it after its hash agrees.

    `preload_bytes` of the file are put on the board over mgmt beforehand (a shorter flight, labelled in the report).
    """

    clock_rate: Positive = 60.0
    chunk_bytes: int = Field(default=1 << 20, ge=1 << 14)
    max_contacts: int = Field(default=50, ge=1)
    contact_share: float = Field(default=1.0, gt=0, le=1, description="use only the first part of every contact")
    preload_bytes: int = Field(default=0, ge=0)


class ServeStep(Strict):
    """Start the model server on the board and wait until it is healthy."""

    timeout_s: Positive = 120.0


class QueryStep(Strict):
    """Ask over the payload link inside a contact at clock rate 1."""

    prompts: tuple[str, ...] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    timeout_s: Positive = 120.0


class LossOfSignalStep(Strict):
    """Ask `before_los_s` before loss of signal; the answer is kept on board and delivered in the next contact."""

    prompt: str
    max_tokens: int = Field(ge=1)
    before_los_s: Positive = 6.0


class EclipseStep(Strict):
    """Fly an eclipse under continuous inference until the load is shed, then until it is restored."""

    clock_rate: Positive = 60.0
    prompt: str
    max_tokens: int = Field(ge=1)
    near_shed_v: Positive = Field(default=0.3, description="clock rate 1 this close to the shed voltage")


class CheckStep(Strict):
    """After the power cut: the board has booted by itself; ask the first prompt again, greedily."""


class EndStep(Strict):
    """Output off, verified; link cleared; lease released."""


class Step(Strict):
    """One step of the mission; exactly one key."""

    boot: BootStep | None = None
    upload: UploadStep | None = None
    serve: ServeStep | None = None
    query: QueryStep | None = None
    loss_of_signal: LossOfSignalStep | None = None
    eclipse: EclipseStep | None = None
    check: CheckStep | None = None
    end: EndStep | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: object) -> object:
        # `- boot:` without a value reads as null; it means the step with its defaults.
        if isinstance(value, dict):
            return {key: {} if item is None else item for key, item in value.items()}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Step:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"a step has exactly one key, got {sorted(self.model_fields_set) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        return next(iter(self.model_fields_set))


class CriterionSpec(Strict):
    """One acceptance criterion: a measure of the record (see docs/missions.md) and its bound."""

    name: Name
    measure: str
    min: float | None = None
    max: float | None = None
    equals: float | str | bool | None = None
    unit: str = ""
    clock_rate: float | None = Field(default=None, description="valid only if measured at this clock rate")

    @model_validator(mode="after")
    def _bounded(self) -> CriterionSpec:
        if self.min is None and self.max is None and self.equals is None:
            raise ValueError("needs at least one of min, max, equals")
        return self


class MissionFile(Strict):
    """The mission file as written."""

    schema_: int = Field(alias="schema", ge=1, le=1)
    name: Name
    title: str
    seed: int = Field(ge=0)
    start: Utc
    duration_h: Positive
    orbit: OrbitSource
    stations: dict[Name, Station] = Field(min_length=1)
    link: LinkPlan
    power: PowerPlan
    model: ModelFile
    steps: tuple[Step, ...] = Field(min_length=1)
    criteria: tuple[CriterionSpec, ...] = Field(min_length=1)
    sources: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    clock: Literal["scaled", "real"] = "scaled"

    @model_validator(mode="after")
    def _unique(self) -> MissionFile:
        names = [item.name for item in self.criteria]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"criteria named twice: {', '.join(twice)}")
        return self


class Mission:
    """A checked mission: its file, where it lies and the orbit text it refers to."""

    def __init__(self, path: Path, file: MissionFile, tle_path: Path) -> None:
        self.path = path
        self.file = file
        self.tle_path = tle_path

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def start(self) -> datetime:
        return self.file.start


def load_mission(path: Path) -> Mission:
    """Read a mission file; raises UsageError with file, line and the next step."""
    file = yaml_file.load(
        path, MissionFile, {"cache": str(paths.cache_dir()), "mission_dir": str(path.resolve().parent)}
    )
    tle_path = (path.parent / file.orbit.tle).resolve()
    if not tle_path.is_file():
        _, lines = yaml_file.read(path)
        raise UsageError(f"{path}:{lines[('orbit', 'tle')]}: no TLE file {tle_path}")
    return Mission(path=path.resolve(), file=file, tle_path=tle_path)
