"""What a mission does, in order: the steps of a mission file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hil.inventory.bench import Name
from hil.inventory.yaml_file import Strict

Positive = Annotated[float, Field(gt=0)]


class BootStep(Strict):
    """Power on, firmware, kernel, login, SSH."""


class UploadStep(Strict):
    """Send the model over the payload link, one contact after the other, and activate it after its hash agrees.

    `protocol: sftp` connects in each contact and resumes, after a reboot too; `chunk_bytes` bounds what a cut costs.
    `cfdp` is CFDP class 2 over UDP (CCSDS 727.0-B-5): it keeps to the link's rate and sends again what the board names
    as missing. `preload_bytes` of the file are put on the board over mgmt beforehand, with SFTP only (a shorter flight,
    labelled in the report).
    """

    protocol: Literal["sftp", "cfdp"] = "sftp"
    clock_rate: Positive = 60.0
    chunk_bytes: int = Field(default=1 << 20, ge=1 << 14)
    max_contacts: int = Field(default=50, ge=1)
    contact_share: float = Field(default=1.0, gt=0, le=1, description="use only the first part of every contact")
    preload_bytes: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> UploadStep:
        if self.protocol == "cfdp" and self.preload_bytes:
            raise ValueError("a CFDP transaction sends the whole file: preload_bytes needs protocol: sftp")
        return self


class ServeStep(Strict):
    """Start the model server on the board and wait until it is healthy."""

    timeout_s: Positive = 120.0


class QueryStep(Strict):
    """Ask every prompt, `repeat` times round, over the payload link inside contacts at clock rate 1.

    With `admit_margin_s` a query is started only if its predicted time (the longest so far; before the first answer
    `first_estimate_s`) ends that long before loss of signal, else in the next contact. A query that was admitted and
    then lost the signal all the same is counted as a false admission and the flight goes on.
    """

    prompts: tuple[str, ...] = Field(min_length=1)
    max_tokens: int = Field(ge=1)
    timeout_s: Positive = 120.0
    repeat: int = Field(default=1, ge=1, le=100_000)
    admit_margin_s: float | None = Field(default=None, ge=0)
    first_estimate_s: Positive = 30.0
    pad_to_bytes: int | None = Field(default=None, ge=1, le=1_000_000, description="filler before a shorter prompt")


class LossOfSignalStep(Strict):
    """Ask `before_los_s` before loss of signal; the answer is kept on board and delivered in the next contact."""

    prompt: str
    max_tokens: int = Field(ge=1)
    before_los_s: Positive = 6.0
    repeat: int = Field(default=1, ge=1, le=100_000)


class EclipseStep(Strict):
    """Fly an eclipse under continuous inference until the load is shed, then until it is restored."""

    clock_rate: Positive = 60.0
    prompt: str
    max_tokens: int = Field(ge=1)
    near_shed_v: Positive = Field(default=0.3, description="clock rate 1 this close to the shed voltage")


class CheckStep(Strict):
    """After the power cut: the board has booted by itself; ask the first prompt again, greedily."""


class RunStep(Strict):
    """Run a program of the lab on the board, and keep what it measures.

    Every line of its standard output that is JSON `{"measure": NAME, "value": number | true | false | text, "unit": U}`
    becomes an event; criteria judge it as `reported.NAME.last` and so on. `reports` lists the names with their units
    (empty: true, false or text); a line that says otherwise is the board's failure, and so is an exit code other than 0
    unless `may_fail`. `files` (relative to the mission file) are put on the board over mgmt beforehand, into the
    directory that `{programs}` stands for in `argv`; `{python}` is the board's interpreter, `{model}` the flown model.

    `during` waits for a contact or an eclipse first. With `power_cuts` the board loses its power that many times while
    the program runs, each time after a moment drawn from `cut_after_s` by the mission's seed; after each the board
    boots and the program is started again, the last time to its end. Without the features of `requires` on the bench
    the step is skipped, and every criterion that needs it is missing.
    """

    name: Name
    argv: tuple[str, ...] = Field(min_length=1)
    files: tuple[str, ...] = ()
    reports: dict[Name, str] = Field(default_factory=dict)
    plane: Literal["mgmt", "payload"] = "mgmt"
    during: Literal["any", "contact", "eclipse"] = "any"
    timeout_s: Positive = 600.0
    clock_rate: Positive = 1.0
    may_fail: bool = False
    power_cuts: int = Field(default=0, ge=0, le=10_000)
    cut_after_s: tuple[Positive, Positive] = (2.0, 10.0)
    requires: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> RunStep:
        if self.cut_after_s[1] < self.cut_after_s[0]:
            raise ValueError("cut_after_s is [earliest, latest]")
        if self.plane == "payload" and self.during != "contact":
            raise ValueError("plane: payload needs during: contact")
        if self.power_cuts and self.plane == "payload":
            raise ValueError("a program whose power is cut is started over mgmt")
        return self


class CruiseStep(Strict):
    """Fly on for `orbits` or `hours`, idle or under continuous inference: power cycling as the orbit brings it.

    A load that is shed is waited for, booted and set to work again; near the shed voltage and in boots the rate is 1.
    With `shutdown_before_eclipse_s` the board is shut down in order that long before every eclipse, its output is off
    in the dark, and it is booted in sunlight: a satellite without a battery. That span must suffice for the shutdown.
    """

    orbits: Positive | None = None
    hours: Positive | None = None
    clock_rate: Positive = 60.0
    load: Literal["idle", "inference"] = "idle"
    shutdown_before_eclipse_s: Positive | None = None
    near_shed_v: Positive = Field(default=0.3, description="clock rate 1 this close to the shed voltage")
    prompt: str = "Write a short story about a satellite."
    max_tokens: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> CruiseStep:
        if (self.orbits is None) == (self.hours is None):
            raise ValueError("give exactly one of orbits, hours")
        return self


class DutyCycleStep(Strict):
    """Inference until the thermal model says that the board is too hot, rest until it may go on, `bursts` times.

    Needs `thermal.cutoff`. Thermal time does not scale, so the clock rate is 1. A burst that is not ended by the model
    within `burst_timeout_s`, or a rest within `rest_timeout_s`, ends the step as the board's failure.
    """

    bursts: int = Field(ge=1, le=10_000)
    clock_rate: Literal[1] = 1
    prompt: str
    max_tokens: int = Field(default=64, ge=1)
    burst_timeout_s: Positive = 1_800.0
    rest_timeout_s: Positive = 7_200.0


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
    run: RunStep | None = None
    cruise: CruiseStep | None = None
    duty_cycle: DutyCycleStep | None = None
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
