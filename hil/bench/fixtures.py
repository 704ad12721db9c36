"""The bench's instruments as its file wires them, and a board's owner made of what is wired to it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from hil.bench.arrayflight import ArraySource
from hil.bench.board import BoardOwner, Channel
from hil.bench.console_reader import PortReader
from hil.bench.consoles import Console
from hil.bench.crosscheck import CrossCheck, cross_check
from hil.bench.heart import Heart
from hil.bench.leases import boot_clock
from hil.bench.levels import CutTimes, Layers, SupplyWatchdog
from hil.bench.links import link_driver
from hil.bench.pacing import Pacing
from hil.bench.player import LinkOwner
from hil.bench.powervalues import PowerSample
from hil.bench.safety import Envelope, InstrumentLock, Intent, IntentJournal, finish_leftovers
from hil.drivers.dialects import dialect
from hil.drivers.scpi import ScpiSupply
from hil.drivers.serial_port import LineSettings
from hil.drivers.solar import leave_array
from hil.errors import BenchError
from hil.inventory import Bench
from hil.inventory.bench import ConsoleWire, PowerWire
from hil.inventory.board_type import BoardType
from hil.model import Setpoint

log = logging.getLogger("hil.daemon")


class Fixtures:
    """Supplies, links and the journal of what may be on: one of each a daemon, shared by its boards."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._state_dir = bench.state_dir
        self._locks = [InstrumentLock(address) for address in _addresses(bench)]
        self._console_reader = PortReader()
        self._pacing = Pacing()
        self.intents = IntentJournal(self._state_dir / "intent.jsonl")
        self.supplies = {name: ScpiSupply(wire.dialect, wire.address) for name, wire in bench.file.supplies.items()}
        self._watchdogs = {
            name: SupplyWatchdog(self.supplies[name], wire.watchdog_s) for name, wire in bench.file.supplies.items()
        }
        self.cut_times = CutTimes(self._state_dir / "time-to-off.json")
        self.links = {
            name: LinkOwner(name, link_driver(name, bench.file.links[name]), self._state_dir / f"link-{name}.touched")
            for name in bench.file.links
        }

    async def take(self) -> None:
        """Make sure that nobody else drives them, and end what a dead run left on. Raises BenchError."""
        for lock in self._locks:
            lock.acquire()
        for left in await asyncio.to_thread(finish_leftovers, self.intents):
            log.warning("switched off a leftover of a dead run: %s", left)
        for link in self.links.values():
            if link.touched:
                log.warning("clearing link %s, left by a dead run", link.name)
                # One that does not answer must not keep the boards from being switched: whoever leases one is told.
                with contextlib.suppress(BenchError):
                    await link.clear()

    def let_go(self) -> None:
        """Others may drive them."""
        for lock in self._locks:
            lock.release()

    def board(
        self,
        name: str,
        heart: Heart,
        *,
        on_event: Callable[[BoardOwner, str, dict[str, Any]], None],
        on_sample: Callable[[BoardOwner, PowerSample], None],
        on_failure: Callable[[BoardOwner, BaseException], None],
        on_cut: Callable[[BoardOwner], None],
        on_console_error: Callable[[BenchError], None],
    ) -> BoardOwner:
        """The owner of board `name` with all that is wired to it; nothing is switched."""
        _, wires, board_type = self._bench.board(name)
        console = None
        if wires.console is not None:
            console = Console(
                name,
                wires.console.port,
                _line_settings(wires.console),
                self._state_dir / "console",
                on_error=on_console_error,
                reader=self._console_reader,
            )
        channels = tuple(self._make_channel(name, board_type, wire) for wire in wires.power)
        return BoardOwner(
            name,
            wires,
            board_type,
            channels,
            console,
            None if wires.payload is None else self.links[wires.payload.link],
            self.intents,
            heart,
            on_event=on_event,
            on_sample=on_sample,
            on_failure=on_failure,
            on_cut=on_cut,
            # Rises over restarts too: the end of a daemon is a power cut that nobody was left to count.
            first_epoch=int(boot_clock() * 1000),
        )

    def _make_channel(self, board: str, board_type: BoardType, wire: PowerWire) -> Channel:
        supply, limits = self._bench.file.supplies[wire.supply], board_type.limits(wire.rail)
        outlet = wire.outlet or supply.outlet or ""
        intent = Intent(board, supply.address, supply.dialect, wire.channel, limits.off_voltage_v, outlet)
        driver = self.supplies[wire.supply]
        array: ArraySource | None = None
        before_on: Callable[[], Coroutine[Any, Any, None]] | None = None
        if wire.source == "array":
            array = ArraySource(driver, wire.channel)
        elif driver.dialect.has("sas_mode"):
            # A flight that ended by its daemon's death leaves the array's curve behind: not for the next board.
            before_on = functools.partial(leave_array, driver, wire.channel)
        return Channel(
            supply=driver,
            number=wire.channel,
            intent=intent,
            on_delay_s=wire.on_delay_s,
            envelope=Envelope.of(limits),
            nominal=Setpoint(limits.voltage_nominal_v, limits.current_max_a),
            layers=Layers(outlet, self._watchdogs[wire.supply], supply.accept_level),
            main=wire.on_bus,
            pacing=self._pacing,
            meter=self._make_meter(board) if wire.rail is None else None,
            rail=wire.rail or "",
            converter_efficiency=wire.converter_efficiency,
            array=array,
            before_on=before_on,
        )

    def _make_meter(self, board: str) -> CrossCheck | None:
        wires = self._bench.file.boards[board]
        if wires.meter is None:
            return None
        return cross_check(wires.meter, self.supplies.get(wires.meter.supply or ""), wires.mgmt)


def _addresses(bench: Bench) -> list[str]:
    return sorted(
        {wire.address for wire in bench.file.supplies.values()} | {wire.address for wire in bench.file.links.values()}
    )


def lease_groups(bench: Bench) -> dict[str, tuple[str, ...]]:
    """For each board the boards that share a supply with it whose channels are not independent."""
    groups: dict[str, tuple[str, ...]] = {}
    for name, wire in bench.file.supplies.items():
        if not dialect(wire.dialect).lease_group:
            continue
        on_it = tuple(
            board for board, wires in bench.file.boards.items() if any(feed.supply == name for feed in wires.power)
        )
        if len(on_it) > 1:
            # A board on two such supplies ties the boards of both together.
            joined = tuple(dict.fromkeys(other for board in on_it for other in (*groups.get(board, ()), *on_it)))
            groups.update(dict.fromkeys(joined, joined))
    return groups


def _line_settings(wire: ConsoleWire) -> LineSettings:
    return LineSettings(wire.baud, wire.data_bits, wire.parity, wire.stop_bits, wire.flow, wire.combined_uart)
