"""A board type: electrical limits, boot dialogue, paths and the figures a mission needs, one YAML under boards/."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from hil.inventory import yaml_file
from hil.inventory.yaml_file import Strict


class SupplyLimits(Strict):
    """What the board may be fed. The bench never leaves this envelope and says so instead of clamping."""

    voltage_min_v: float = Field(gt=0)
    voltage_nominal_v: float = Field(gt=0)
    voltage_max_v: float = Field(gt=0)
    undervoltage_lockout_v: float = Field(gt=0)
    current_max_a: float = Field(gt=0)
    power_max_w: float = Field(gt=0)
    overvoltage_protection_v: float = Field(gt=0)
    overcurrent_protection_a: float = Field(gt=0)
    inrush_s: float = Field(default=0.5, ge=0)
    slew_v_per_s: float = Field(default=50.0, gt=0)
    off_dwell_s: float = Field(default=5.0, ge=0)
    off_voltage_v: float = Field(default=0.6, gt=0)
    on_tolerance_v: float = Field(default=0.3, gt=0)
    on_timeout_s: float = Field(default=2.0, gt=0)
    inrush_current_max_a: float | None = Field(default=None, gt=0, description="highest current within `inrush_s`")
    inrush_energy_max_j: float | None = Field(default=None, gt=0, description="energy taken within `inrush_s`")
    energy_max_j: float | None = Field(default=None, gt=0, description="what one power-on may deliver in all")
    brownout_min_v: float = Field(default=0.0, ge=0, description="lowest voltage of a deliberate dip")

    @model_validator(mode="after")
    def _ordered(self) -> SupplyLimits:
        if not self.voltage_min_v <= self.voltage_nominal_v <= self.voltage_max_v < self.overvoltage_protection_v:
            raise ValueError(
                "need voltage_min_v <= voltage_nominal_v <= voltage_max_v < overvoltage_protection_v, got "
                f"{self.voltage_min_v} / {self.voltage_nominal_v} / {self.voltage_max_v} / "
                f"{self.overvoltage_protection_v}"
            )
        if self.undervoltage_lockout_v > self.voltage_min_v:
            raise ValueError("undervoltage_lockout_v must not be above voltage_min_v")
        return self


class Boot(Strict):
    """What the console prints from power on to a login, as regular expressions, and how long it may take."""

    firmware: str = "U-Boot"
    kernel: str = "Starting kernel"
    login: str = "login:"
    death: tuple[str, ...] = ("Kernel panic", "Unhandled fault")
    timeout_s: float = Field(default=120.0, gt=0)


class Shutdown(Strict):
    """How the board is shut down in order: what is run as root, and what shows that it is down.

    `done` is a bounded regular expression over its console, `down_w` what only a board that is down stays below.
    """

    command: str = "poweroff"
    done: str = "reboot: (Power down|System halted)"
    down_w: float | None = Field(default=None, gt=0)


class ModelledPower(Strict):
    """Virtual boards only: watts from the CPU time that the emulator really used. Labelled as modelled everywhere."""

    idle_w: float = Field(gt=0)
    full_w: float = Field(gt=0)
    full_cpu_cores: float = Field(default=1.0, gt=0)


class PowerFigures(Strict):
    """Watts that `mission check` plans with; measured or from a data sheet, `source` says which."""

    idle_w: float = Field(gt=0)
    inference_w: float = Field(gt=0)
    source: str


class CfdpReceiver(Strict):
    """What the CFDP receiver on this board keeps up with, in Ethernet bits a second; `source` says who measured it."""

    rate_bps: float = Field(gt=0)
    source: str


class BoardType(Strict):
    """One file under boards/."""

    schema_: int = Field(alias="schema", ge=1, le=1)
    name: str
    title: str
    arch: str
    features: tuple[str, ...] = ()
    hardware: str = Field(description="'virtual' or how far this file was tried on hardware")
    supply: SupplyLimits
    rails: dict[str, SupplyLimits] = Field(
        default_factory=dict, description="envelopes of further inputs that have a channel of their own"
    )
    boot: Boot = Boot()
    shutdown: Shutdown = Shutdown()
    power: PowerFigures
    modelled_power: ModelledPower | None = None
    cfdp_receiver: CfdpReceiver | None = Field(
        default=None, description="measured; without it nobody knows whether `protocol: cfdp` is too fast"
    )
    runtime_python: str = "/usr/bin/python3"
    onboard_dir: str = "/var/lib/hil"

    def limits(self, rail: str | None) -> SupplyLimits:
        """The envelope of one of the board's inputs; `None` is its main one."""
        return self.supply if rail is None else self.rails[rail]


def load_board_type(path: Path) -> BoardType:
    """Read a board type; raises UsageError with file and line."""
    return yaml_file.load(path, BoardType)
