"""The `links:` of a bench file: which emulator stands between ground and board, by which driver it is reached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from hil.inventory.yaml_file import Strict

File = Annotated[Path, AfterValidator(Path.expanduser)]
Interface = Annotated[
    str,
    Field(
        pattern=r"^(ingress:)?[a-zA-Z0-9_.-]{1,15}$",
        description="shaped on its egress; `ingress:NAME` shapes what arrives there, through an ifb device",
    ),
]


class _Link(Strict):
    rate_limit_bps: float | None = Field(
        default=None, gt=0, description="what it was seen to carry, for `mission check`"
    )


class _Netem(_Link):
    uplink_interface: Interface
    downlink_interface: Interface
    replace_qdisc: bool = Field(
        default=False, description="replace a root qdisc that hil did not make; it is not brought back"
    )


class NetemSshWire(_Netem):
    """A netem box driven over SSH: two ports in a bridge, each shaped on its egress."""

    driver: Literal["netem-ssh"]
    address: str = Field(pattern=r"^ssh://[^@]+@[^:/]+:\d+$")
    key: File
    known_hosts: File

    @property
    def user(self) -> str:
        return self.address.removeprefix("ssh://").partition("@")[0]

    @property
    def host(self) -> str:
        return self.address.partition("@")[2].rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


class NetemWire(_Netem):
    """This host's own netem: the link crosses two of its ports, or one with `ingress:` for the way back."""

    driver: Literal["netem"]
    seed: int | None = Field(default=None, ge=0, description="makes losses repeat, where the kernel can (Linux 6.6)")

    @property
    def address(self) -> str:
        """What it claims of this host."""
        return f"netem:{self.uplink_interface}+{self.downlink_interface}"


class UserSpaceWire(_Link):
    """A process that passes frames in user space (`hil link serve`), driven over its control socket."""

    driver: Literal["user-space"]
    address: str = Field(pattern=r"^unix:///.+$", description="unix:///PATH of its control socket")
    seed: int | None = Field(default=None, ge=0, description="of its losses, where `hil virtual up` starts it")
    log: File | None = Field(default=None, description="a line a packet, where `hil virtual up` starts it")

    @property
    def control(self) -> Path:
        return Path(self.address.removeprefix("unix://"))


_TAGS = {"netem-ssh": "NetemSshWire", "netem": "NetemWire", "user-space": "UserSpaceWire"}


def _tag(value: Any) -> str | None:
    driver = value.get("driver") if isinstance(value, dict) else getattr(value, "driver", None)
    return _TAGS.get(driver) if isinstance(driver, str) else None


LinkWire = Annotated[
    Annotated[NetemSshWire, Tag("NetemSshWire")]
    | Annotated[NetemWire, Tag("NetemWire")]
    | Annotated[UserSpaceWire, Tag("UserSpaceWire")],
    Discriminator(
        _tag,
        custom_error_type="link_driver",
        custom_error_message=f"`driver` must be one of {', '.join(_TAGS)}",
    ),
]
