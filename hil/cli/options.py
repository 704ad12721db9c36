"""Options that several commands share: the bench file, the board, JSON output."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import hil
from hil.errors import UsageError
from hil.inventory import Bench, load_bench, yaml_file

F = TypeVar("F", bound=Callable[..., Any])

# The files that come with hil: beside the package in a checkout, the way it is installed today.
FIXTURES = Path(hil.__file__).resolve().parents[1] / "fixtures"
VIRTUAL_BENCH = FIXTURES / "benches" / "virtual.yaml"


def bench_option(function: F) -> F:
    """`--bench FILE`, or HIL_BENCH; `https://HOST:PORT#FINGERPRINT` for a bench on another host."""
    return click.option("--bench", "bench_file", metavar="FILE", envvar="HIL_BENCH", help="bench file [env HIL_BENCH]")(
        function
    )


def board_option(function: F) -> F:
    """`--board NAME`; not needed when the bench has one board."""
    return click.option("--board", "board_name", metavar="NAME", help="board (not needed if there is one)")(function)


def json_option(function: F) -> F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="JSON on standard output")(function)


def the_bench(bench_file: str | None) -> Bench:
    """The bench a command works on. Hardware is never driven implicitly: no bench named is an error."""
    if not bench_file:
        raise UsageError(
            "no bench named",
            hint=f"--bench FILE or HIL_BENCH=FILE; for the virtual one: HIL_BENCH={os.path.relpath(VIRTUAL_BENCH)}",
        )
    if bench_file.startswith("https://"):
        from hil.client.remote import load_remote

        return load_remote(bench_file)
    path = Path(bench_file)
    if not path.is_file():
        raise UsageError(
            f"no bench file at {path.resolve()} (`--bench`, or HIL_BENCH)",
            hint=f"{yaml_file.neighbours(path)}; the virtual bench: {os.path.relpath(VIRTUAL_BENCH)}",
        )
    return load_bench(path)


def print_json(value: object) -> None:
    """Indented JSON with stable key order as given."""
    click.echo(json.dumps(value, indent=2, default=str))


def utc(iso: Any) -> str:
    """A datetime as `2026-03-20T00:00:00.000Z`."""
    return str(iso.strftime("%Y-%m-%dT%H:%M:%S.") + f"{iso.microsecond // 1000:03d}Z")
