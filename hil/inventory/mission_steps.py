"""What a mission does, in order: the steps of a mission file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from hil.inventory.yaml_file import Strict

Positive = Annotated[float, Field(gt=0)]


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
