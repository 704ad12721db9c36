"""Safe YAML whose every complaint names file, line, the wrong key and the nearest right one."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from hil.errors import UsageError

M = TypeVar("M", bound=BaseModel)
MERGE = "tag:yaml.org,2002:merge"  # the key `<<`
Location = tuple[str | int, ...]


class Strict(BaseModel):
    """Base of every YAML model: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def load(path: Path, model: type[M], variables: Mapping[str, str] | None = None) -> M:
    """Read `path` into `model`; `${name}` in strings is replaced from `variables`.

    Raises UsageError naming file:line, the key and what to write instead.
    """
    data, lines = read(path)
    return build(path, data, lines, model, variables)


def build(
    path: Path,
    data: dict[str, Any],
    lines: dict[Location, int],
    model: type[M],
    variables: Mapping[str, str] | None = None,
) -> M:
    """What `read` gave, as `model`. Raises UsageError as `load` does."""
    if variables is not None:
        data = _substitute(data, variables, path, lines, ())
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UsageError(_explain(error, path, lines, model)) from None


def read(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """The mapping in `path` and the line of every key in it. Duplicate keys are an error.

    Aliases and merge keys (`<<: *other`) are expanded; what they bring has the lines on which it is written.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", hint=neighbours(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{path}:1: expected a mapping of keys to values")
    lines: dict[Location, int] = {(): 1}
    value = _construct(node, (), path, lines)
    return typing.cast("dict[str, Any]", value), lines


def overlay(
    data: dict[str, Any], lines: dict[Location, int], at: Location
) -> tuple[dict[str, Any], dict[Location, int]]:
    """`data` with the mapping at `at` laid over it: mappings merge, null takes a key away, all else replaces.

    The lines of what was replaced are those of the overlay, so that a complaint points at it.
    """
    over: Any = data
    for part in at:
        over = over[part]
    moved = {where[len(at) :]: line for where, line in lines.items() if where[: len(at)] == at and len(where) > len(at)}
    return _merged(data, over), {**lines, **moved}


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = {**below, **{key: _merged(below.get(key), item) for key, item in above.items()}}
    return {key: item for key, item in merged.items() if not (item is None and key in above)}


def _construct(
    node: yaml.Node, where: Location, path: Path, lines: dict[Location, int], within: tuple[yaml.Node, ...] = ()
) -> Any:
    if node in within:
        raise UsageError(f"{path}:{node.start_mark.line + 1}: an alias stands within what it stands for")
    within = (*within, node)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, where, path, lines, within)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*where, index)] = item.start_mark.line + 1
            items.append(_construct(item, (*where, index), path, lines, within))
        return items
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path}:{node.start_mark.line + 1}: {error}") from None


def _mapping(
    node: yaml.MappingNode, where: Location, path: Path, lines: dict[Location, int], within: tuple[yaml.Node, ...]
) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    below: list[yaml.Node] = []
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == MERGE:
            several = isinstance(value_node, yaml.SequenceNode)
            below += value_node.value if several else [value_node]
            continue
        key = None if isinstance(key_node, yaml.CollectionNode) else _construct(key_node, where, path, lines)
        if not isinstance(key, str | int):
            raise UsageError(f"{path}:{line}: a key must be text, got {key_node.value if key is None else key!r}")
        if key in result:
            first = lines[(*where, key)]
            raise UsageError(f"{path}:{line}: `{key}` stands twice (first on line {first})")
        lines[(*where, key)] = line
        result[key] = _construct(value_node, (*where, key), path, lines, within)
    for merged in below:  # what stands here comes before what is merged, and the first merged before the next
        if not isinstance(merged, yaml.MappingNode):
            raise UsageError(f"{path}:{merged.start_mark.line + 1}: `<<` takes a mapping, or a list of mappings")
        found: dict[Location, int] = {}
        for key, value in _construct(merged, where, path, found, within).items():
            if key not in result:
                result[key] = value
                at = (*where, key)
                lines.update({place: line for place, line in found.items() if place[: len(at)] == at})
    return result


def _substitute(value: Any, variables: Mapping[str, str], path: Path, lines: dict[Location, int], at: Location) -> Any:
    if isinstance(value, dict):
        return {key: _substitute(item, variables, path, lines, (*at, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(item, variables, path, lines, (*at, index)) for index, item in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    for name, replacement in variables.items():
        value = value.replace("${" + name + "}", replacement)
    if "${" in value:
        known = ", ".join("${" + name + "}" for name in variables)
        raise UsageError(f"{path}:{_line(lines, at)}: unknown variable in {value!r}; known: {known}")
    return value


def _line(lines: dict[Location, int], where: Location) -> int:
    while where not in lines:
        where = where[:-1]
    return lines[where]


def _explain(error: ValidationError, path: Path, lines: dict[Location, int], model: type[BaseModel]) -> str:
    messages = []
    # An unknown key first: what is "missing" is then usually the right spelling of it.
    for item in sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden"):
        where = tuple(part for part in item["loc"] if not _is_union_tag(part))
        line = _line(lines, where)
        dotted = ".".join(str(part) for part in where) or "the file"
        kind = item["type"]
        if kind == "extra_forbidden":
            allowed = _fields_at(model, where[:-1])
            near = difflib.get_close_matches(str(where[-1]), allowed, n=1, cutoff=0.4)
            instead = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(sorted(allowed))}"
            messages.append(f"{path}:{line}: unknown key `{dotted}`; {instead}")
        elif kind == "missing":
            messages.append(f"{path}:{line}: `{dotted}` is missing")
        elif kind in {"float_parsing", "int_parsing", "float_type", "int_type"}:
            messages.append(
                f"{path}:{line}: `{dotted}` must be a plain number, the unit is in the key's name; "
                f"got {item['input']!r}"
            )
        else:
            messages.append(f"{path}:{line}: `{dotted}`: {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(dict.fromkeys(messages))


def _is_union_tag(part: str | int) -> bool:
    # pydantic puts the name of the union's member or validator into the location; it is not a key of the file.
    return isinstance(part, str) and (part.startswith(("function-", "tagged-union")) or part[:1].isupper())


def _fields_at(model: type[BaseModel], where: Location) -> list[str]:
    candidates: list[Any] = [model]
    for part in where:
        following: list[Any] = []
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                field = candidate.model_fields.get(str(part))
                if field is not None:
                    following += _members(field.annotation)
            elif get_origin(candidate) in (dict, Mapping):
                following += _members(get_args(candidate)[1])
            elif get_origin(candidate) in (list, tuple):
                following += _members(get_args(candidate)[0])
        candidates = following
    return [
        field
        for candidate in candidates
        if isinstance(candidate, type) and issubclass(candidate, BaseModel)
        for field in candidate.model_fields
    ]


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _members(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for item in get_args(annotation) for member in _members(item)]
    return [annotation]


def neighbours(path: Path) -> str:
    """What else there is where no file is found at `path`, as a hint."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    names = sorted(item.name for item in path.parent.glob("*.yaml"))
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.4)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return f"YAML files in {path.parent.resolve()}: {', '.join(names) or 'none'}"
