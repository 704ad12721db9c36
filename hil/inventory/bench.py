"""A bench: which instance of which board is wired to what. The one file a lab writes to use hil."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from hil import paths
from hil.errors import UsageError
from hil.inventory import yaml_file
from hil.inventory.bench_link import LinkWire
from hil.inventory.board_type import BoardType, load_board_type
from hil.inventory.yaml_file import Location, Strict

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,40}\Z")
_CONSOLE = re.compile(
    r"(?!\w+://).+\Z|(socket|rfc2217)://(\[[0-9a-fA-F:.]+\]|[^/:@]+):(?P<number>\d{1,5})/?\Z|unix:///.+\Z"
)
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,40}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
File = Annotated[Path, AfterValidator(Path.expanduser)]
# Both become words of a command line of `ssh`: never an option, and nothing that ends a word of a shell.
SshAddress = Annotated[str, Field(pattern=r"^[A-Za-z0-9_:][A-Za-z0-9_.:%-]*$")]
SshUser = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@+\\-]*$")]
#: Those of `hil.drivers.dialects` that play arrays; a test holds the two together.
ARRAY_DIALECTS = ("keysight-e4360", "keysight-mp4300", "chroma-62000h-s", "ea-pv")
Outlet = Annotated[str, Field(pattern=r"^(tasmota://[^/]+(/\d+)?|lcus:///[^?]+(\?relay=\d+)?)$")]


class SupplyWire(Strict):
    """A programmable supply: its dialect and where it listens.

    `tcp://HOST:PORT`, `serial:///dev/NAME?baud=9600` (`baud` is optional) or `visa://RESOURCE` (extra `visa`).
    """

    driver: Literal["scpi"]
    dialect: str
    address: str = Field(
        pattern=r"^(tcp://([^:/]+|\[[0-9a-fA-F:]+\]):\d+|serial:///[^?]+(\?baud=\d+)?|visa://\S+::\S+)$"
    )
    outlet: Outlet | None = Field(
        default=None, description="the mains outlet behind it, cut when its output does not go off: tasmota://HOST/1"
    )
    watchdog_s: float = Field(
        default=5.0, ge=0, description="its own output watchdog, where it has one, cuts after this silence; 0: unused"
    )
    accept_level: Literal["A", "B", "C", "D"] = Field(
        default="C", description="lowest capability level (docs/safety.md) that boards may be powered with"
    )

    @property
    def host(self) -> str:
        """Of a `tcp://` address."""
        return self.address.removeprefix("tcp://").rpartition(":")[0]

    @property
    def port(self) -> int:
        """Of a `tcp://` address."""
        return int(self.address.rpartition(":")[2])


class PowerWire(Strict):
    """One supply channel that feeds a board; several are switched in order, off in reverse order.

    In a flight the channels that the satellite's bus feeds follow its voltage. The others stay at their nominal one and
    hang, in the model, on a converter between bus and channel. `source: array`: the channel of a solar-array simulator
    is the satellite's array, and feeds a real power unit with a battery that the board hangs behind.
    """

    supply: Name
    channel: int = Field(ge=1)
    on_delay_s: float = Field(default=0.0, ge=0, le=60)
    rail: Name | None = Field(default=None, description="which of the board type's `rails`; its `supply` without")
    outlet: Outlet | None = Field(default=None, description="a relay in this channel's line, instead of the supply's")
    follows_bus: bool | None = Field(
        default=None, description="whether the satellite's bus feeds it; unless told, the main input only and no `rail`"
    )
    converter_efficiency: float = Field(
        default=1.0, gt=0, le=1, description="modelled in a flight: of the converter before a channel off the bus"
    )

    source: Literal["supply", "array"] = Field(
        default="supply", description="array: a flight plays the mission's solar array; the board has no other channel"
    )

    @property
    def on_bus(self) -> bool:
        """Whether a flight moves the channel's voltage."""
        if self.source == "array":
            return True
        return self.rail is None if self.follows_bus is None else self.follows_bus

    @model_validator(mode="after")
    def _converted(self) -> PowerWire:
        if self.source == "array" and (self.follows_bus is not None or self.converter_efficiency != 1.0):
            raise ValueError(
                "an array is no bus and stands before every converter: leave `follows_bus` and `converter_efficiency` "
                "out beside `source: array`"
            )
        if self.on_bus and self.converter_efficiency != 1.0:
            raise ValueError(
                "no converter stands before a channel that follows the bus: give `follows_bus: false` or no "
                "`converter_efficiency`"
            )
        return self


class ConsoleWire(Strict):
    """The board's serial console: a tty's path, `socket://HOST:PORT`, `rfc2217://HOST:PORT` or `unix:///PATH`.

    `user` and `password` log in there; `pace_bytes` are typed before their echo is waited for (U-Boot drops more than
    its UART holds).
    """

    port: str
    baud: int = Field(default=115200, gt=0)
    data_bits: Literal[7, 8] = 8
    parity: Literal["none", "even", "odd"] = "none"
    stop_bits: Literal[1, 2] = 1
    flow: Literal["none", "hardware", "software"] = "none"
    combined_uart: bool = Field(default=False, description="take out the tags of NVIDIA's combined UART")
    user: str = "root"
    password: str | None = None
    pace_bytes: int = Field(default=64, ge=1, le=4000)

    @field_validator("port")
    @classmethod
    def _address(cls, value: str) -> str:
        found = _CONSOLE.match(value)
        if found is None or int(found["number"] or 1) > 65535:
            raise ValueError(
                f"console port {value!r} is not understood: write /dev/serial/by-id/NAME, socket://HOST:PORT, "
                "rfc2217://HOST:PORT or unix:///PATH"
            )
        return value


class JumpHost(Strict):
    """A machine that connections to a board go through. Without `key`: the keys of the SSH agent."""

    address: SshAddress
    port: Port = 22
    user: SshUser = "root"
    key: File | None = None
    known_hosts: File


class SshWire(JumpHost):
    """How to reach the board by SSH: the host key is pinned in `known_hosts` (`hil board trust`)."""

    jump: tuple[JumpHost, ...] = Field(default=(), description="machines on the way, the first one first")


class PayloadWire(SshWire):
    """The port behind the link emulator. `broker` is the socket of the process that owns the payload namespace."""

    link: Name
    broker: File | None = None


Line = Annotated[
    str, Field(pattern=r"^(gpio:///dev/gpiochip\d+\?line=\d+(&[a-z]+=[a-z-]+)*|lcus:///[^?]+(\?relay=\d+)?)$")
]


class Shutdown(Strict):
    """How long a board may take to shut down before its power is cut all the same."""

    timeout_s: float = Field(default=30.0, gt=0, le=300)


class ShutdownThenOff(Strict):
    """`on_lease_end: {shutdown_then_off: {timeout_s: 30}}`: the board type's `shutdown.command`, then off."""

    shutdown_then_off: Shutdown


# Unquoted, YAML reads `off` as a boolean.
OnLeaseEnd = Annotated[
    Literal["off", "hold"] | ShutdownThenOff, BeforeValidator(lambda value: "off" if value is False else value)
]


class MeterWire(Strict):
    """A second meter for a board: its own sensor (`rail`, read over `mgmt`), or a supply's channel that only measures.

    Beyond the bounds for `hold_s` a flight's record is invalid. `overhead_max`: the share of the supply's watts that
    may be lost before this meter; `share` and `offset_w`: what both may be wrong by.
    """

    rail: str | None = Field(default=None, min_length=1, description="label of the board's sensor, say VDD_IN")
    supply: Name | None = None
    channel: int | None = Field(default=None, ge=1)
    overhead_max: float = Field(default=0.35, ge=0, le=1)
    share: float = Field(default=0.03, ge=0, le=1)
    offset_w: float = Field(default=0.2, ge=0)
    hold_s: float = Field(default=3.0, ge=0)
    every_s: float = Field(default=1.0, ge=0.1)

    @model_validator(mode="after")
    def _one(self) -> MeterWire:
        if (self.rail is None) == (self.supply is None) or (self.supply is None) != (self.channel is None):
            raise ValueError("a meter is a `rail` of the board, or a `supply` with its `channel`")
        return self


class BenchBoard(Strict):
    """One board on the bench."""

    type: str
    power: tuple[PowerWire, ...] = Field(min_length=1)
    lines: dict[Name, Line] = Field(
        default_factory=dict,
        description="control lines by name (power-button, reset, recovery), asserted by GPIO or USB relay: "
        "gpio:///dev/gpiochip0?line=17&active=low&drive=open-drain or lcus:///dev/ttyUSB1?relay=2",
    )
    console: ConsoleWire | None = None
    payload: PayloadWire | None = None
    mgmt: SshWire | None = None
    meter: MeterWire | None = None
    features: tuple[Name, ...] = Field(
        default=(), description="what this bench adds: thermal-chamber, isl, object-store"
    )
    on_lease_end: OnLeaseEnd = Field(
        default="off",
        description="off, hold (power stays, the link is blocked) or {shutdown_then_off: {timeout_s: 30}}",
    )


class VirtualSupply(Strict):
    """Which supply of the bench file `hil virtual up` plays, and as which model: its dialect's, unless told."""

    supply: Name
    model: str | None = None


class VirtualLinkBox(Strict):
    """Which link of the bench file to play: netem in a QEMU box, or in user space, as its driver says."""

    link: Name


class VirtualBoardWire(Strict):
    """An emulated board. It hangs on all channels of its `power:` and runs while every one feeds it."""

    channel: int | None = Field(
        default=None, ge=1, description="hang it on this channel of its `power:` alone; the others carry nothing"
    )
    memory_mib: int = Field(default=1024, ge=256)
    cpus: int = Field(default=2, ge=1)


class PayloadNetwork(Strict):
    """The ground end of the payload network, inside the namespace."""

    host: str
    prefix: int = Field(ge=8, le=30)


class Virtual(Strict):
    """What `hil virtual up` starts. Nothing else reads this section."""

    supply: VirtualSupply
    payload_network: PayloadNetwork | None = None
    link_box: VirtualLinkBox | None = None
    boards: dict[Name, VirtualBoardWire]


class RemoteWire(Strict):
    """Where clients of other hosts come in: TLS, a token a user (`hil bench token add USER`)."""

    host: str = Field(default="127.0.0.1", description="the address to listen on; 0.0.0.0 is every network")
    port: int = Field(default=7443, ge=0, le=65535, description="0 takes a free one; `hil bench status` says which")


class BenchFile(Strict):
    """The bench file as written."""

    schema_: int = Field(alias="schema", ge=1, le=1)
    name: Name
    supplies: dict[Name, SupplyWire] = Field(min_length=1)
    links: dict[Name, LinkWire] = Field(default_factory=dict)
    boards: dict[Name, BenchBoard] = Field(min_length=1)
    board_types: str = "../../boards"
    remote: RemoteWire | None = Field(
        default=None, description="let users of other hosts in; without it nothing listens"
    )
    metrics_port: int = Field(default=0, ge=0, le=65535, description="127.0.0.1 port of /metrics; 0 takes a free one")
    virtual: Virtual | None = None

    @field_validator("supplies", "links", "boards")
    @classmethod
    def _names(cls, value: dict[str, object]) -> dict[str, object]:
        for name in value:
            if not _NAME.match(name):
                raise ValueError(f"name {name!r}: use small letters, digits, '.', '_', '-'")
        return value


@dataclass(frozen=True)
class Bench:
    """A checked bench: the file, its identity and the types of its boards."""

    path: Path
    id: str
    file: BenchFile
    types: dict[str, BoardType]
    url: str = ""  # of a bench on another host: `path`, and files that `file` names, are there

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def state_dir(self) -> Path:
        return paths.state_dir(self.id)

    @property
    def runtime_dir(self) -> Path:
        return paths.runtime_dir(self.id)

    @property
    def api_socket(self) -> Path:
        return self.runtime_dir / "api.sock"

    def board(self, name: str | None = None) -> tuple[str, BenchBoard, BoardType]:
        """The named board, or the only one. Raises UsageError that lists the boards."""
        boards = self.file.boards
        if name is None and len(boards) == 1:
            name = next(iter(boards))
        if name is None:
            raise UsageError(f"bench {self.name} has several boards", hint=f"choose one: --board {'|'.join(boards)}")
        if name not in boards:
            raise UsageError(f"bench {self.name} has no board {name!r}", hint=f"its boards: {', '.join(boards)}")
        return name, boards[name], self.types[boards[name].type]

    def features(self, name: str | None = None) -> frozenset[str]:
        """What a mission may require of a board here: features of its type and of the bench, and the wired planes."""
        _, wires, kind = self.board(name)
        wired = {"console": wires.console, "payload": wires.payload, "mgmt": wires.mgmt}
        return frozenset(
            (*kind.features, *wires.features, *(plane for plane, wire in wired.items() if wire is not None))
        )


def load_bench(path: Path) -> Bench:
    """Read and cross-check a bench file. Raises UsageError with file, line and the next step."""
    raw, lines = yaml_file.read(path)
    name = raw.get("name")
    identity = paths.bench_id(name if isinstance(name, str) and _NAME.match(name) else "bench", path)
    variables = {
        "cache": str(paths.cache_dir()),
        "state": str(paths.state_dir(identity)),
        "runtime": str(paths.runtime_dir(identity)),
        "bench_dir": str(path.resolve().parent),
    }
    file = yaml_file.load(path, BenchFile, variables)
    types = {}
    for board_name, board in file.boards.items():
        where: Location = ("boards", board_name)
        type_path = (path.parent / file.board_types / f"{board.type}.yaml").resolve()
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", board.type) or not type_path.is_file():
            known = sorted(item.stem for item in type_path.parent.glob("*.yaml"))
            raise UsageError(
                f"{path}:{lines[(*where, 'type')]}: `boards.{board_name}.type`: no board type {board.type!r}",
                hint=_nearest(board.type, known),
            )
        types[board.type] = load_board_type(type_path)
        for index, wire in enumerate(board.power):
            _known(path, lines, (*where, "power", index), "supply", wire.supply, list(file.supplies))
            if wire.rail is not None:
                known = list(types[board.type].rails)
                _known(path, lines, (*where, "power", index), "rail", wire.rail, known)
        if not any(wire.on_bus for wire in board.power):
            raise UsageError(
                f"{path}:{lines[(*where, 'power')]}: none of board {board_name}'s channels follows the satellite's bus",
                hint="the main input does, a channel without `rail:`; or say `follows_bus: true` at one",
            )
        if any(wire.source == "array" for wire in board.power):
            _array(path, lines, file, where, board)
        if board.meter is not None:
            _meter(path, lines, file, (*where, "meter"), board)
        if board.payload is not None:
            _known(path, lines, (*where, "payload", "link"), "link", board.payload.link, list(file.links))
    _one_board_a_channel(path, lines, file)
    return Bench(path=path.resolve(), id=identity, file=file, types=types)


def _array(path: Path, lines: dict[Location, int], file: BenchFile, where: Location, board: BenchBoard) -> None:
    """An array is a simulator's, the board's only channel, and nothing that a second meter could be held against."""
    for index, wire in enumerate(board.power):
        line = f"{path}:{lines[(*where, 'power', index)]}"
        if len(board.power) > 1:
            raise UsageError(
                f"{line}: a board on an array has that channel alone: the power unit behind it makes the voltages",
            )
        spoken = file.supplies[wire.supply].dialect
        if spoken not in ARRAY_DIALECTS:
            raise UsageError(
                f"{line}: supply {wire.supply} speaks {spoken}, which is no solar-array simulator",
                hint=f"`source: array` needs one of {', '.join(ARRAY_DIALECTS)}",
            )
    if board.meter is not None:
        raise UsageError(
            f"{path}:{lines[(*where, 'meter')]}: between an array and the board lies a battery: a second meter cannot "
            "be held against the channel",
        )


def _meter(path: Path, lines: dict[Location, int], file: BenchFile, where: Location, board: BenchBoard) -> None:
    """A second meter must be reachable, and measure without feeding anybody."""
    meter = board.meter
    if meter is None:
        return
    if meter.rail is not None and board.mgmt is None:
        raise UsageError(f"{path}:{lines[where]}: the meter's rail is read over `mgmt`, which this board has not")
    if sum(wire.rail is None for wire in board.power) > 1:
        raise UsageError(
            f"{path}:{lines[where]}: a meter is held against the channel of the board's main input, and this one has "
            "several"
        )
    if meter.supply is not None:
        _known(path, lines, where, "supply", meter.supply, list(file.supplies))
    for name, other in file.boards.items():
        if any((wire.supply, wire.channel) == (meter.supply, meter.channel) for wire in other.power):
            raise UsageError(
                f"{path}:{lines[where]}: channel {meter.channel} of supply {meter.supply} feeds board {name}: a meter "
                "that compares a channel with itself finds nothing",
            )


def _one_board_a_channel(path: Path, lines: dict[Location, int], file: BenchFile) -> None:
    owners: dict[tuple[str, int], str] = {}
    for board_name, board in file.boards.items():
        for index, wire in enumerate(board.power):
            other = owners.get((wire.supply, wire.channel))
            owners[wire.supply, wire.channel] = board_name
            if other is not None:
                raise UsageError(
                    f"{path}:{lines[('boards', board_name, 'power', index)]}: channel {wire.channel} of supply "
                    f"{wire.supply} already feeds board {other}"
                )


def _known(
    path: Path,
    lines: dict[Location, int],
    where: Location,
    what: str,
    name: str,
    all_: list[str],
) -> None:
    if name not in all_:
        raise UsageError(f"{path}:{lines[where]}: no {what} {name!r} on this bench", hint=_nearest(name, all_))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
