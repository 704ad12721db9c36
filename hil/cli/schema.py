"""`hil schema board|bench|mission`: JSON Schema of the YAML files, for editors."""

from __future__ import annotations

import click

from hil.cli.options import print_json


@click.command()
@click.argument("what", type=click.Choice(["board", "bench", "mission"]))
def schema(what: str) -> None:
    """Print the JSON Schema of a board type, bench or mission file."""
    from pydantic import BaseModel

    from hil.inventory.bench import BenchFile
    from hil.inventory.board_type import BoardType
    from hil.inventory.mission import MissionFile

    models: dict[str, type[BaseModel]] = {"board": BoardType, "bench": BenchFile, "mission": MissionFile}
    print_json(models[what].model_json_schema())
