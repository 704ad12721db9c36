"""A mission: orbit, stations, link, electrical power, workload, steps and acceptance criteria, one YAML.

One module a section: mission_orbit, mission_constellation, mission_link, mission_power, mission_faults, mission_steps.
"""

from __future__ import annotations

import difflib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hil import paths
from hil.errors import UsageError
from hil.inventory import yaml_file
from hil.inventory.bench import Name
from hil.inventory.mission_constellation import ConstellationPlan
from hil.inventory.mission_faults import FaultPlan
from hil.inventory.mission_link import LinkPlan
from hil.inventory.mission_orbit import OrbitSource, Station, Utc
from hil.inventory.mission_power import PowerPlan, ThermalPlan
from hil.inventory.mission_steps import Step
from hil.inventory.yaml_file import Strict

Positive = Annotated[float, Field(gt=0)]


class ModelFile(Strict):
    """The language model that is flown: a GGUF file on the ground and its SHA-256.

    A mission may be planned for a file that a lab has yet to fetch: then `sha256` is null, and `size_bytes` says what
    `mission check` plans with. Such a mission is not flown until the hash is written down.
    """

    file: Path
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    size_bytes: int | None = Field(default=None, gt=0, description="for planning while the file is absent")
    title: str
    system_prompt: str | None = Field(
        default=None, description="sent with every question, also when empty; null: the chat template's own"
    )


class CriterionSpec(Strict):
    """One acceptance criterion: a measure of the record (see docs/missions.md) and its bound."""

    name: Name
    measure: str
    min: float | None = None
    max: float | None = None
    equals: float | str | bool | None = None
    unit: str = ""
    clock_rate: float | None = Field(default=None, description="valid only if measured at this clock rate")
    requires: tuple[Name, ...] = Field(
        default=(), description="features without which the bench cannot show this: it is then missing"
    )

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
    constellation: ConstellationPlan | None = None
    stations: dict[Name, Station] = Field(default_factory=dict, description="none only with a link window")
    link: LinkPlan
    power: PowerPlan
    thermal: ThermalPlan | None = None
    faults: FaultPlan | None = None
    model: ModelFile
    steps: tuple[Step, ...] = Field(min_length=1)
    criteria: tuple[CriterionSpec, ...] = Field(min_length=1)
    sources: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    unknown: tuple[str, ...] = Field(default=(), description="facts that nobody published")
    requires: tuple[Name, ...] = Field(default=(), description="features of board and bench that the mission needs")
    cases: dict[Name, dict[str, Any]] = Field(
        default_factory=dict, description="variants: keys laid over this file's; mappings merge, null takes a key away"
    )
    case: Name | None = Field(default=None, description="which of the cases is flown; null: the file as it is written")
    clock: Literal["scaled", "real"] = "scaled"

    @model_validator(mode="after")
    def _unique(self) -> MissionFile:
        names = [item.name for item in self.criteria]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"criteria named twice: {', '.join(twice)}")
        for case, over in self.cases.items():
            fixed = sorted({"schema", "name", "cases", "case"} & set(over))
            if fixed:
                raise ValueError(f"case {case} must not change {', '.join(fixed)}")
        return self

    @model_validator(mode="after")
    def _reachable(self) -> MissionFile:
        if not self.stations and self.link.window_h is None:
            raise ValueError("stations: needs at least one, or a link with window_h and every_h")
        late = [outage.start_h for outage in self.link.outages if outage.start_h >= self.duration_h]
        if late:
            raise ValueError(f"link.outages: {late[0]:g} h is behind the mission's end at {self.duration_h:g} h")
        return self

    @model_validator(mode="after")
    def _one_unit_a_report(self) -> MissionFile:
        for step in self.steps:
            for name, unit in (step.run.reports if step.run is not None else {}).items():
                if self.reports[name] != unit:
                    raise ValueError(f"reports: {name} is in {self.reports[name]!r} and in {unit!r}")
        return self

    @property
    def reports(self) -> dict[str, str]:
        """What the programs of the run steps report: name and unit, empty for true, false or text."""
        return {name: unit for step in self.steps if step.run is not None for name, unit in step.run.reports.items()}


class Mission:
    """A checked mission: its file with the chosen case laid over it, where it lies and the orbit file it refers to."""

    def __init__(self, path: Path, file: MissionFile, orbit_path: Path | None) -> None:
        self.path = path
        self.file = file
        self.orbit_path = orbit_path
        """The TLE or OMM file; None for Keplerian and sun-synchronous designs."""

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def start(self) -> datetime:
        return self.file.start

    @property
    def reference(self) -> Path:
        """What `load_mission` makes the same mission from: the path, with `#CASE` where a case is chosen."""
        return self.path if self.file.case is None else self.path.with_name(f"{self.path.name}#{self.file.case}")


def load_mission(path: Path, case: str | None = None) -> Mission:
    """Read a mission file, or one of its cases: `case`, or a path that ends in `#CASE`.

    Raises UsageError with file, line and the next step.
    """
    if "#" in path.name and not path.exists():
        name, _, case = path.name.rpartition("#")
        path = path.with_name(name)
    file = read_mission_file(path, case)
    kind = next(iter(file.orbit.model_fields_set))
    orbit_path = None
    if kind in {"tle", "omm"}:
        orbit_path = (path.parent / getattr(file.orbit, kind)).resolve()
        if not orbit_path.is_file():
            _, lines = yaml_file.read(path)
            raise UsageError(f"{path}:{lines[('orbit', kind)]}: no {kind.upper()} file {orbit_path}")
    return Mission(path=path.resolve(), file=file, orbit_path=orbit_path)


def read_mission_file(path: Path, case: str | None = None) -> MissionFile:
    """The mission file at `path` alone, with `case` (default: what its key `case` says) laid over it."""
    data, lines = yaml_file.read(path)
    variables = {"cache": str(paths.cache_dir()), "mission_dir": str(path.resolve().parent)}
    file = yaml_file.build(path, data, lines, MissionFile, variables)
    case = case or file.case
    if case is None:
        return file
    if case not in file.cases:
        known = ", ".join(file.cases) or "none"
        near = difflib.get_close_matches(case, file.cases, n=1, cutoff=0.4)
        raise UsageError(
            f"{path}: no case {case!r}", hint=f"did you mean {near[0]!r}?" if near else f"its cases: {known}"
        )
    data, lines = yaml_file.overlay(data, lines, ("cases", case))
    return yaml_file.build(path, {**data, "case": case}, lines, MissionFile, variables)
