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
    # named, because editors take a schema without a name for an older draft
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **models[what].model_json_schema()})
