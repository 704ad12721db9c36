"""From a bench file's `virtual:` section to what the supervisor starts."""

from __future__ import annotations

import re
from pathlib import Path

from hil import paths
from hil.errors import UsageError
from hil.inventory.bench import Bench, VirtualBoardWire, VirtualSupply
from hil.inventory.bench_link import NetemSshWire, UserSpaceWire
from hil.virtual.inputs import InputWire
from hil.virtual.supervisor import BoardWire, VirtualBench
from hil.virtual.supply import supply_model


def virtual_bench(bench: Bench) -> VirtualBench:
    """The supervisor's configuration. Raises UsageError when the bench has no virtual part or it does not fit."""
    virtual = bench.file.virtual
    if virtual is None:
        raise UsageError(
            f"{bench.path} describes a real bench: it has no `virtual:` section",
            hint="`hil virtual` is for fixtures/benches/virtual.yaml and files like it",
        )
    model, port, tty = _supply(bench, virtual.supply)
    box, in_user_space = _link(bench)
    brokers = {board.payload.broker for board in bench.file.boards.values() if board.payload is not None}
    if len(brokers) > 1:
        raise UsageError(f"{bench.path}: the boards of a virtual bench share one payload broker")
    network = virtual.payload_network
    return VirtualBench(
        name=bench.name,
        cache=paths.cache_dir(),
        state=bench.state_dir,
        runtime=bench.runtime_dir,
        boards=tuple(_wire(bench, name) for name in virtual.boards),
        supply_model=model,
        supply_port=port,
        supply_tty=tty,
        linkbox_mgmt_port=None if box is None else box.port,
        userspace_link=None if in_user_space is None else in_user_space.control,
        userspace_seed=None if in_user_space is None else in_user_space.seed,
        userspace_log=None if in_user_space is None else in_user_space.log,
        payload_host=network.host if network is not None else "",
        payload_prefix=network.prefix if network is not None else 0,
        broker=next(iter(brokers), None),
    )


def _link(bench: Bench) -> tuple[NetemSshWire | None, UserSpaceWire | None]:
    """The link to play: as a QEMU box or in user space; neither when the bench has none."""
    virtual = bench.file.virtual
    if virtual is None or virtual.link_box is None:
        return None, None
    link = bench.file.links.get(virtual.link_box.link)
    if virtual.payload_network is not None:
        if isinstance(link, UserSpaceWire):
            return None, link
        if isinstance(link, NetemSshWire) and link.host == "127.0.0.1":
            return link, None
    raise UsageError(
        f"{bench.path}: `virtual.link_box.link` must name a link at ssh://root@127.0.0.1:PORT, or one in user space",
        hint="and `virtual.payload_network` must say which network lies behind it",
    )


def _supply(bench: Bench, virtual: VirtualSupply) -> tuple[str, int | None, Path | None]:
    """(model, port, serial link) of the supply to play; one of the last two is None."""
    wire = bench.file.supplies.get(virtual.supply)
    address = wire.address if wire is not None else ""
    tcp = re.fullmatch(r"tcp://127\.0\.0\.1:(\d+)", address)
    serial = re.fullmatch(r"serial://(/[^?]+)(?:\?.*)?", address)
    if wire is None or not (tcp or serial):
        raise UsageError(
            f"{bench.path}: `virtual.supply.supply` must name a supply at tcp://127.0.0.1:PORT",
            hint="or, for one that is played on a serial port, at serial://${runtime}/NAME",
        )
    name = virtual.model or wire.dialect
    channels = supply_model(name).channels
    for board_name, board in bench.file.boards.items():
        for feed in (feed for feed in board.power if feed.supply == virtual.supply):
            channel, needed_v = feed.channel, bench.types[board.type].limits(feed.rail).voltage_nominal_v
            if channel not in channels:
                raise UsageError(f"{bench.path}: a virtual {name} has no channel {channel}")
            if channels[channel].max_v < needed_v:
                raise UsageError(
                    f"{bench.path}: channel {channel} of a virtual {name} gives at most {channels[channel].max_v:g} V, "
                    f"but {board_name} needs {needed_v:g} V",
                    hint="wire the board to another channel, or play another model",
                )
    return name, int(tcp[1]) if tcp else None, Path(serial[1]) if serial else None


def _wire(bench: Bench, name: str) -> BoardWire:
    virtual = bench.file.virtual
    if virtual is None or name not in bench.file.boards:
        raise UsageError(f"{bench.path}: `virtual.boards.{name}` has no board of that name under `boards:`")
    board = bench.file.boards[name]
    wire = virtual.boards[name]
    modelled = bench.types[board.type].modelled_power
    if modelled is None:
        raise UsageError(f"board type {board.type} has no `modelled_power`: it cannot be played by `hil virtual`")
    if board.mgmt is None or board.mgmt.address != "127.0.0.1":
        raise UsageError(f"{bench.path}: virtual board {name} needs `mgmt:` at 127.0.0.1")
    return BoardWire(
        name=name,
        inputs=_inputs(bench, name, wire),
        mgmt_port=board.mgmt.port,
        memory_mib=wire.memory_mib,
        cpus=wire.cpus,
        idle_w=modelled.idle_w,
        full_w=modelled.full_w,
        full_cpu_cores=modelled.full_cpu_cores,
        payload_address=board.payload.address if board.payload is not None else "",
    )


def _inputs(bench: Bench, name: str, wire: VirtualBoardWire) -> tuple[InputWire, ...]:
    """The board's inputs: one for each of its channels, or the one that is named. What it draws is spread over them by
    the `power_max_w` of their envelopes: modelled."""
    board = bench.file.boards[name]
    board_type = bench.types[board.type]
    feeds = [feed for feed in board.power if wire.channel in (None, feed.channel)]
    if not feeds:
        raise UsageError(
            f"{bench.path}: `virtual.boards.{name}.channel` is {wire.channel}, but the board's `power:` names "
            f"{', '.join(str(feed.channel) for feed in board.power)}"
        )
    played = bench.file.virtual.supply.supply if bench.file.virtual is not None else ""
    for feed in feeds:
        if feed.supply != played:
            raise UsageError(
                f"{bench.path}: channel {feed.channel} of {feed.supply} feeds {name}, but `hil virtual` plays {played} "
                "alone",
                hint="wire the virtual board to channels of one supply",
            )
    limits = [board_type.limits(feed.rail) for feed in feeds]
    whole_w = sum(limit.power_max_w for limit in limits)
    return tuple(
        InputWire(feed.channel, limit.undervoltage_lockout_v, limit.power_max_w / whole_w)
        for feed, limit in zip(feeds, limits, strict=True)
    )
