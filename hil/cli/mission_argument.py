"""How a command is told its mission: a file or the bare name of one that comes with hil, and one of its cases."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hil.cli.options import FIXTURES
from hil.errors import UsageError

if TYPE_CHECKING:
    from hil.inventory import Mission

F = TypeVar("F", bound=Callable[..., Any])

SHIPPED = FIXTURES / "missions"


def mission_argument(function: F) -> F:
    """Adds the parameters `mission_file` and `case`, for `load_named`."""
    case = click.option("--case", metavar="NAME", help="one of the mission's cases (also MISSION#NAME)")
    return click.argument("mission_file", metavar="MISSION", type=click.Path(dir_okay=False, path_type=Path))(
        case(function)
    )


def load_named(mission_file: Path, case: str | None = None) -> Mission:
    """A path, or the bare name of a mission that comes with hil; `#CASE` at its end chooses a case.

    Raises UsageError when there is no such mission or case, or the file is wrong.
    """
    from hil.inventory import load_mission

    name, _, chosen = (mission_file.name, "", "") if mission_file.exists() else mission_file.name.partition("#")
    path, case = mission_file.with_name(name), case or chosen or None
    if path.is_file():
        return load_mission(path, case)
    shipped = SHIPPED / f"{name}.yaml"
    if len(path.parts) == 1 and shipped.is_file():
        return load_mission(shipped, case)
    known = [item.stem for item in sorted(SHIPPED.glob("*.yaml"))]
    near = difflib.get_close_matches(name.removesuffix(".yaml"), known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"no mission {mission_file}", hint=f"{hint}`hil mission list` names those that come with hil")
