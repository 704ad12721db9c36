"""`hil board power`: measure, switch, dip, latch up, cut at a place on the console; control lines and outlets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hil.cli.options import bench_option, board_option, json_option, print_json, the_bench

if TYPE_CHECKING:
    from hil.client import Board


@contextlib.contextmanager
def _leased(bench_file: str | None, board_name: str | None) -> Iterator[Board]:
    """The board under the lease that `hil lease acquire` stored."""
    from hil.cli.lease import held_lease
    from hil.client import attach

    bench = the_bench(bench_file)
    name, _, _ = bench.board(board_name)
    with attach(bench) as client, held_lease(client, bench, name) as lease:
        yield client.board(name, lease)


def _say(values: Any, as_json: bool) -> None:
    if as_json:
        print_json(values)
        return
    for key, value in values.items():
        click.echo(f"{key:16} {f'{value:.4g}' if isinstance(value, float) else value}")


@click.group()
def power() -> None:
    """Measure, or switch and disturb. All but `read` need a lease: `hil lease acquire BOARD` first."""


def _switching(action: str, help_: str) -> None:
    @power.command(action, help=help_)
    @bench_option
    @board_option
    @json_option
    def command(bench_file: str | None, board_name: str | None, as_json: bool) -> None:
        with _leased(bench_file, board_name) as board:
            getattr(board.power, action)()
        _read(bench_file, board_name, as_json)


_switching("on", "On through the start sequence; limits are read back before the output goes on.")
_switching("off", "Off, verified by measurement.")
_switching("cycle", "Off, the board's off dwell, and on again.")


@power.command()
@bench_option
@board_option
@json_option
def read(bench_file: str | None, board_name: str | None, as_json: bool) -> None:
    """Measure; needs no lease."""
    _read(bench_file, board_name, as_json)


def _read(bench_file: str | None, board_name: str | None, as_json: bool) -> None:
    from hil.client import attach

    bench = the_bench(bench_file)
    name, _, _ = bench.board(board_name)
    with attach(bench) as client:
        reading = client.board(name).power.read()
    if as_json:
        print_json(asdict(reading))
        return
    click.echo(
        f"{name}: output {'on' if reading.output_on else 'off'}  {reading.voltage_v:.3f} V  "
        f"{reading.current_a:.3f} A  {reading.power_w:.2f} W"
    )


@power.command()
@bench_option
@board_option
@click.option("--depth-v", required=True, type=float, help="how far below the present voltage")
@click.option("--duration-s", required=True, type=float, help="0.01 to 60")
@json_option
def dip(bench_file: str | None, board_name: str | None, depth_v: float, duration_s: float, as_json: bool) -> None:
    """Lower the bus for a while; prints what the supply reached, and who timed it."""
    with _leased(bench_file, board_name) as board:
        done = board.power.brown_out(depth_v, duration_s)
    if as_json:
        print_json(asdict(done))
        return
    for name, dip in ((board.name, done), *((f"{board.name} {name}", dip) for name, dip in done.others.items())):
        click.echo(f"{name}: {dip.low_v:g} V {dip.played}")
        _say({key: value for key, value in asdict(dip).items() if key != "others"}, as_json)


@power.command("latch-up")
@bench_option
@board_option
@click.option("--threshold-a", required=True, type=float, help="current above which the protection counts")
@click.option("--hold-s", required=True, type=float, help="how long it must stay above")
@click.option("--off-s", required=True, type=float, help="rest before the restart, at least the board's off dwell")
@click.option("--added-a", default=0.0, show_default=True, help="emulated current, added to the measured one")
@click.option("--wait-s", default=60.0, show_default=True, help="give up after this without a cut")
@click.option("--input", "of_input", help="of a board on several channels: watch this one alone (`main`, or its rail)")
@json_option
def latch_up(
    bench_file: str | None,
    board_name: str | None,
    threshold_a: float,
    hold_s: float,
    off_s: float,
    added_a: float,
    wait_s: float,
    of_input: str | None,
    as_json: bool,
) -> None:
    """Cut when the current stays too high, rest, start again."""
    with _leased(bench_file, board_name) as board:
        done = board.power.latch_up(threshold_a, hold_s, off_s, added_a=added_a, wait_s=wait_s, input=of_input)
    _say(asdict(done), as_json)


@power.command("cut-at")
@bench_option
@board_option
@click.option("--pattern", help="regular expression on the console")
@click.option("--byte-offset", type=int, help="so many bytes of console output from now on")
@click.option("--delay-s", default=0.0, show_default=True, help="between the place and the cut")
@click.option("--timeout-s", default=120.0, show_default=True, help="how long to wait for the place")
@click.option("--on", "switch_on", is_flag=True, help="power the board (again) once the cut is armed")
@json_option
def cut_at(
    bench_file: str | None,
    board_name: str | None,
    pattern: str | None,
    byte_offset: int | None,
    delay_s: float,
    timeout_s: float,
    switch_on: bool,
    as_json: bool,
) -> None:
    """Cut the power at a place on the console, in the daemon; waits for it."""
    with _leased(bench_file, board_name) as board:
        if switch_on:
            board.power.off()
        armed = board.power.cut_at(pattern, byte_offset=byte_offset, delay_s=delay_s, timeout_s=timeout_s)
        try:
            if switch_on:
                board.power.on()
            done = armed.wait(timeout_s + delay_s + 10.0)
        finally:
            armed.disarm()
    _say(asdict(done), as_json)


@click.command()
@bench_option
@board_option
@click.argument("name", required=False)
@click.argument("action", required=False, type=click.Choice(["press", "hold", "release"]))
@click.option("--hold-s", default=0.2, show_default=True, help="how long `press` presses")
@json_option
def line(
    bench_file: str | None, board_name: str | None, name: str | None, action: str | None, hold_s: float, as_json: bool
) -> None:
    """Press, hold or release a control line (power-button, reset, recovery); without NAME list them."""
    from hil.client import attach

    if name is not None:
        with _leased(bench_file, board_name) as board:
            if action in (None, "press"):
                board.press(name, hold_s)
            elif action == "hold":
                board.hold_line(name)
            else:
                board.release_line(name)
    bench = the_bench(bench_file)
    chosen, _, _ = bench.board(board_name)
    with attach(bench) as client:
        state = client.http.get(f"/v1/boards/{chosen}/lines")
    if as_json:
        print_json(state)
        return
    words = {True: "asserted", False: "released", None: "not used yet"}
    for known, entry in state.items():
        click.echo(f"{known:16} {words[entry['asserted']]:14} {entry['address']}")


@click.command()
@bench_option
@board_option
@click.argument("action", type=click.Choice(["read", "on", "off"]))
def outlet(bench_file: str | None, board_name: str | None, action: str) -> None:
    """The outlet behind the board's supply. The bench itself only ever switches it off."""
    from hil.client import attach

    if action == "read":
        bench = the_bench(bench_file)
        with attach(bench) as client:
            said = client.board(bench.board(board_name)[0]).power.outlet()
    else:
        with _leased(bench_file, board_name) as board:
            said = board.power.outlet(action == "on")
    click.echo({True: "on", False: "off", None: "cannot say"}[said])
