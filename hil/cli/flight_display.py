"""Live progress of a flight: a table that updates itself on a terminal, plain lines elsewhere; then the verdict."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hil.errors import HilError
from hil.inventory import Bench, Mission

if TYPE_CHECKING:
    from hil.campaign.finish import Finished
    from hil.campaign.pace import Pace
    from hil.client import Flight

PLAIN_EVERY_S = 5.0


def fly_with_display(
    bench: Bench,
    mission: Mission,
    *,
    board_name: str | None = None,
    runs: Path,
    pace: Pace | None = None,
    certify: bool = False,
) -> Finished:
    """Fly and show it; prints the verdict table and where the record lies. `certify`: first measure the link."""
    from hil.campaign.fly import fly

    console = Console(highlight=False)
    display = _Display(console, mission.file.title)

    def certified(run: Path) -> None:
        from hil.cli import link_certify

        if certify:
            link_certify.for_flight(bench, board_name, run, display.say)

    with display:
        finished = fly(
            bench,
            mission,
            board_name=board_name,
            runs=runs,
            pace=pace,
            say=display.say,
            on_run=certified,
            on_flight=display.watch,
        )
    print_verdict(console, finished)
    return finished


def print_verdict(console: Console, finished: Finished) -> None:
    """The verdict table, the overall verdict and the run directory."""
    table = Table(title=None, box=None, pad_edge=False)
    for name, justify in (("", "left"), ("criterion", "left"), ("measured", "right"), ("limit", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    colours = {"pass": "green", "fail": "red", "infra": "magenta", "invalid": "yellow", "missing": "yellow"}
    for item in finished.criteria:
        measured = f"{item.measured:.6g}" if isinstance(item.measured, float) else str(item.measured)
        table.add_row(Text(item.verdict, colours[item.verdict]), item.name, f"{measured} {item.unit}", item.limit)
    console.print(table)
    console.print(Text(f"verdict: {finished.verdict}", f"bold {colours[finished.verdict]}"))
    for message in finished.errors:
        console.print(Text(message, "red"))
    console.print(f"run:     {finished.run}", soft_wrap=True)
    console.print(f"report:  {finished.run / 'report.html'}", soft_wrap=True)


class _Display:
    """Polls the daemon twice a second for as long as the flight lasts; says what the steps say."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._started = time.monotonic()
        self._lines: deque[str] = deque(maxlen=12)
        self._state: dict[str, Any] | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._live = (
            Live(console=console, refresh_per_second=4, get_renderable=self._render) if _is_live(console) else None
        )

    def __enter__(self) -> _Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread:
            self._thread.join(timeout=5)
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        if self._live:
            self._lines.append(line)
        else:
            self._console.print(f"[{time.monotonic() - self._started:6.1f} s] {line}", markup=False, soft_wrap=True)

    def watch(self, flight: Flight, run: Path) -> None:
        self._thread = threading.Thread(target=self._poll, args=(flight.state,), name="hil-display", daemon=True)
        self._thread.start()

    def _poll(self, state: Callable[[], dict[str, Any]]) -> None:
        printed = 0.0
        while not self._done.wait(0.5):
            try:
                self._state = state()
            except HilError:
                continue  # between flights, or the daemon is gone: the steps report that
            if self._live is None and time.monotonic() - printed >= PLAIN_EVERY_S:
                printed = time.monotonic()
                self.say("  " + "  ".join(f"{name} {value}" for name, value in _fields(self._state)))

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, value in _fields(self._state) if self._state else ():
            table.add_row(Text(name, "dim"), value)
        steps = Text("\n".join(self._lines))
        return Group(Text(f"{self._title}   {time.monotonic() - self._started:.0f} s", "bold"), steps, Text(), table)


def _is_live(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def _fields(state: dict[str, Any]) -> list[tuple[str, str]]:
    power, link, phase = state["power"], state["link"], state["phase"]
    sun = phase["sunlit"]
    radio = "down"
    if link["up"]:
        rate = link["rate_bps"] / state["rate"]
        radio = f"up {link['delay_s'] * 1e3:.2f} ms {rate / 1e3:.0f} kbit/s"
        if state["rate"] != 1:
            radio += f" (x{state['rate']:g} on the wire)"
    return [
        ("mission", f"{state['utc']} x{state['rate']:g}"),
        ("phase", f"{phase['label']}, {'sun' if sun >= 1 else 'eclipse' if sun <= 0 else f'penumbra {sun:.0%}'}"),
        ("bus", f"{power['voltage_v']:.2f} V {power['current_a']:.2f} A {power['power_w']:.1f} W ({power['state']})"),
        ("charge", "the real battery's, behind the array" if state["soc"] is None else f"{state['soc']:.1%}"),
        ("link", radio),
        ("uploaded", f"{state['upload_bytes'] / 1e6:.1f} MB"),
        ("tokens", str(state["tokens"])),
    ]
