"""The `hil` command: one module a command group, imported only when its command is used, so that help is instant."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

import click

from hil.errors import ExitCode, HilError

# command -> (module, one-line help); the module has a click command of the same name.
_COMMANDS = {
    "bench": ("hil.cli.bench", "Start, watch and stop the bench daemon."),
    "board": ("hil.cli.board", "List and show boards; power, control lines, console, ssh, files."),
    "campaign": ("hil.cli.campaign", "Reports and verdicts of runs."),
    "demo": ("hil.cli.demo", "Fly the Star-Compute mission on the virtual bench."),
    "doctor": ("hil.cli.doctor", "Check that the bench can fly; say why not."),
    "lease": ("hil.cli.lease", "Acquire, release and list leases: who drives which board."),
    "link": ("hil.cli.link", "Show, set, clear and certify the emulated link."),
    "mission": ("hil.cli.mission", "List, show, check, compile and fly missions."),
    "orbit": ("hil.cli.orbit", "Eclipses, passes, tracks and seasons of an orbit."),
    "schema": ("hil.cli.schema", "JSON Schema of the YAML files."),
    "virtual": ("hil.cli.virtual", "The virtual bench: images, up, down, status, supply."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(importlib.import_module(entry[0]), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in sorted(_COMMANDS.items())])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hil", message="hil %(version)s")
def cli() -> None:
    """Test AI computers as if they were already in orbit."""


def main(argv: list[str] | None = None) -> None:
    """Console entry point: prints a HilError as one message and exits with its code (see hil.errors.ExitCode)."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        result: Any = cli.main(argv, prog_name="hil", standalone_mode=False)
    except click.exceptions.Abort:
        return int(ExitCode.INTERRUPTED)
    except click.ClickException as error:
        error.show()
        return int(ExitCode.USAGE)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        return int(ExitCode.PASS)
    except HilError as error:
        click.echo(f"hil: {error}", err=True)
        return int(error.exit_code)
    except Exception:
        # Not 1: that is a board's failure. Whoever wrote hil is to blame here.
        traceback.print_exc()
        click.echo("hil: internal error; please report the lines above", err=True)
        return int(ExitCode.BENCH)
    return int(result) if isinstance(result, int) else int(ExitCode.PASS)
