"""Turns what validation found into one error: for each problem the place, the value and what was expected."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from model_foundry.config.commands import COMMAND_SCHEMAS, METHOD_SCHEMAS
from model_foundry.config.fields import FieldSpec, schema_fields, schema_sections, section_of
from model_foundry.config.suggest import close, field_like
from model_foundry.config.tree import Branch, Node, find, to_plain
from model_foundry.errors import ConfigError

SHOWN_CHARACTERS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: a sentence without a full stop, its place, and what helps."""

    what: str
    where: str
    hint: str | None = None

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        return text if self.hint is None else f"{text}. {self.hint}"


def raise_problems(problems: list[Problem]) -> None:
    """One ConfigError for all of them; nothing when there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise ConfigError(problems[0].what, where=problems[0].where, hint=problems[0].hint)
    lines = "".join(f"\n  {problem}" for problem in problems)
    raise ConfigError(f"{len(problems)} problems in the configuration:{lines}")


def problems_of(error: ValidationError, *, schema: type[BaseModel], tree: Branch) -> list[Problem]:
    """Each field that failed once, in the order of the file's lines."""
    found: dict[str, tuple[int, Problem]] = {}
    for item in error.errors(include_url=False):
        path, rest = _split_location(item["loc"], schema)
        if item["type"] == "rule":
            named = (item.get("ctx") or {}).get("field", "")
            path = tuple(str(named).split(".")) if "." in str(named) else (*path, str(named))
            problem = Problem(item["msg"], find(tree, path).origin.place)
        else:
            problem = _field_problem(path, rest, item, schema, find(tree, path))
        found.setdefault(".".join(path), (find(tree, path).origin.line or 0, problem))
    return [problem for _, problem in sorted(found.values(), key=lambda entry: entry[0])]


def _split_location(loc: tuple[Any, ...], schema: type[BaseModel]) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Pydantic's location as the path of a field and what lies below it (list index, union branch)."""
    known: type[BaseModel] | None = schema
    for depth, key in enumerate(loc):
        info = known.model_fields.get(str(key)) if known is not None else None
        known = section_of(info.annotation) if info is not None else None
        if known is None:
            return tuple(map(str, loc[: depth + 1])), loc[depth + 1 :]
    return tuple(map(str, loc)), ()


def _field_problem(
    path: tuple[str, ...], rest: tuple[Any, ...], item: Any, schema: type[BaseModel], node: Node
) -> Problem:
    dotted, place = ".".join(path), node.origin.place
    spec = schema_fields(schema).get(dotted)
    if item["type"] == "extra_forbidden":
        return Problem(f"unknown key {dotted}", place, unknown_key_hint(dotted, schema))
    if item["type"] == "missing":
        return Problem(f"{dotted} is required", place)
    if spec is None:
        return _section_problem(dotted, node, schema)
    indexes = [key for key in rest if isinstance(key, int)]
    value = item["input"] if indexes else to_plain(node)
    shown = f"{dotted}{''.join(f'[{index}]' for index in indexes)}"
    return Problem(f"{shown} is {show(value)}; expected {spec.expected}", place, _value_hint(spec, value))


def _section_problem(dotted: str, node: Node, schema: type[BaseModel]) -> Problem:
    value = to_plain(node)
    fields = schema_fields(schema)
    names = [spec.name for spec in fields.values() if spec.section == dotted]
    hint = f"Its fields are {', '.join(names)}"
    if value is None and f"{dotted}.enabled" in fields:
        hint = f"To switch it off write {dotted}.enabled: false; to leave it at its defaults remove the line"
    elif value is None:
        hint = "To leave it at its defaults remove the line"
    return Problem(f"{dotted} is {show(value)}; expected a section of fields", node.origin.place, hint)


def unknown_key_hint(dotted: str, schema: type[BaseModel]) -> str | None:
    """What the unknown key may have meant: a field like it, or of another command, or one that its section has."""
    if dotted.rpartition(".")[2] == "inherits":
        return "inherits stands at the top of a file"
    for command, other in COMMAND_SCHEMAS.items():
        if other is not schema and (dotted in schema_fields(other) or dotted in schema_sections(other)):
            is_method = command == "train" and schema in METHOD_SCHEMAS.values()
            return f"It belongs to foundry {'train method=sft' if is_method else command}"
    if like := field_like(dotted, schema):
        return f"Did you mean {like}?"
    section = dotted.rpartition(".")[0]
    while section and section not in schema_sections(schema):
        section = section.rpartition(".")[0]
    return f"{f'{section} has' if section else 'There are'} {', '.join(_names_in(section, schema))}"


def _names_in(section: str, schema: type[BaseModel]) -> list[str]:
    """Fields, and then sections, that stand right in a section; "" is the top."""
    paths = (*schema_fields(schema), *schema_sections(schema))
    return [path.rpartition(".")[2] for path in paths if path.rpartition(".")[0] == section]


def _value_hint(spec: FieldSpec, value: Any) -> str | None:
    choices = [str(choice) for choice in get_args(spec.annotation) if isinstance(choice, str)]
    if isinstance(value, str) and choices:
        like = close(value.lower(), choices)
        return f"Did you mean {like}?" if like else None
    if isinstance(value, str) and spec.expected.startswith("a list"):
        return f"Write a list: [{value}]"
    return None


def show(value: Any) -> str:
    """A value as it would be typed, shortened."""
    if isinstance(value, float):
        return repr(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
