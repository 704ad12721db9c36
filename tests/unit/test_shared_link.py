"""Two boards behind one link box: the end of one's lease must not change the link under the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hil.bench.daemon import Daemon
from hil.bench.leases import Ended
from hil.bench.player import BOTH_OUT, LinkOwner
from hil.errors import BenchError
from hil.inventory import load_bench

ROOT = Path(__file__).parents[2]


class Box:
    """A link box that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def apply(self, states: Any, scheduled_s: float) -> dict[Any, Any]:
        self.told.append("outage" if states is BOTH_OUT else "apply")
        return {}

    def clear(self) -> None:
        self.told.append("clear")

    def close(self) -> None: ...


def bench_with(tmp_path: Path, on_lease_end: str) -> Daemon:
    content = yaml.safe_load((ROOT / "fixtures/benches/virtual.yaml").read_text())
    del content["virtual"]
    content["board_types"] = str(ROOT / "boards")
    first = content["boards"]["vb1"]
    del first["console"]
    first["on_lease_end"] = on_lease_end
    content["boards"]["vb2"] = {**first, "power": [{"supply": "psu1", "channel": 2}]}
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(content))
    return Daemon(load_bench(path))


def ended(tmp_path: Path, leased: tuple[str, ...], on_lease_end: str) -> list[str]:
    """What the box hears when vb1's lease ends while `leased` are leased."""
    box = Box()

    async def body() -> None:
        daemon = bench_with(tmp_path, on_lease_end)
        daemon._fixtures.links["box1"] = LinkOwner("box1", box)  # type: ignore[arg-type]
        daemon.boards.make(daemon._heart)
        daemon._desk = SimpleNamespace(leases=lambda: [SimpleNamespace(boards=leased)])  # type: ignore[assignment]
        await daemon.boards.owners["vb2"].set_link(dict(BOTH_OUT))
        box.told.clear()
        if on_lease_end == "hold":
            loop = SimpleNamespace(state="on", overruns=0, disarm_latch_up=lambda: None)
            daemon.boards.owners["vb1"]._loops = [(loop, None)]  # type: ignore[list-item]
        await daemon.boards.end(Ended("vb1", "L1", "released"))

    run(body)
    return box.told


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(body(), 10)

    asyncio.run(bounded())


@pytest.mark.parametrize(("on_lease_end", "alone"), [("off", ["clear"]), ("hold", ["outage"])])
def test_the_link_is_touched_only_when_nobody_else_drives_over_it(
    tmp_path: Path, on_lease_end: str, alone: list[str]
) -> None:
    assert ended(tmp_path, (), on_lease_end) == alone
    assert ended(tmp_path, ("vb2",), on_lease_end) == []


def test_the_link_of_a_flight_belongs_to_it_whichever_board_asks(tmp_path: Path) -> None:
    async def body() -> None:
        daemon = bench_with(tmp_path, "off")
        daemon.boards.make(daemon._heart)
        daemon.operations.held = lambda token, name: daemon.boards.owners[name]  # type: ignore[method-assign]
        daemon.boards.flight = SimpleNamespace(state="running", board=daemon.boards.owners["vb1"])  # type: ignore[assignment]
        with pytest.raises(BenchError, match="belongs to the flight of board vb1"):
            await daemon.operations.set_link("vb2", None, "token")

    run(body)
