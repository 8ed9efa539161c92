"""The fields of a schema as a flat table: dotted path, type in words, default, help.

Everything that lists fields (errors, environment names, docs, dumps) reads this table, so they can't disagree.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from model_foundry.config.section import HubName, InputFile, InputRows

SCALAR_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", Path: "a path"}


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One leaf field of a schema.

    Attributes:
        path: dotted, `training.learning_rate`.
        variable: the environment variable that sets it.
        expected: the type and bounds in words.
        text_only: takes text or a path and no list, so a number typed there is meant as text.
        input_file: may name a file that must exist (`names_file` decides by the value).
        input_folder: that may be a folder as well.
    """

    path: str
    variable: str
    annotation: Any
    default: Any
    help: str
    expected: str
    text_only: bool
    input_file: bool
    input_folder: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]


@functools.cache
def schema_fields(schema: type[BaseModel]) -> dict[str, FieldSpec]:
    """Every leaf field by dotted path, in the order of the schema."""
    return dict(_walk(schema, ""))


@functools.cache
def schema_sections(schema: type[BaseModel]) -> dict[str, str]:
    """Every section's dotted path and help."""
    return {
        path: _one_line(info.description)
        for path, info in _infos(schema, "")
        if section_of(info.annotation) is not None
    }


def names_file(spec: FieldSpec, value: object) -> bool:
    """Whether this value names an input file: any path does, a template only when it ends in .jinja."""
    if not spec.input_file or value is None or names_hub(value):
        return False
    return "a path" in spec.expected or str(value).endswith(".jinja")


def names_hub(value: object) -> bool:
    """Whether this value is the address of a data set on the hub."""
    return isinstance(value, str) and value.startswith("hf://")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field's annotation (`X` or `X | None`), None for a leaf."""
    for part in _alternatives(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _infos(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in schema.model_fields.items():
        yield f"{prefix}{name}", info
        section = section_of(info.annotation)
        if section is not None:
            yield from _infos(section, f"{prefix}{name}.")


def _walk(schema: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldSpec]]:
    for path, info in _infos(schema, prefix):
        if section_of(info.annotation) is not None:
            continue
        default = info.get_default(call_default_factory=True, validated_data={})
        alternatives = [_unwrap(part) for part in _alternatives(info.annotation)]
        yield (
            path,
            FieldSpec(
                path=path,
                variable=path.upper().replace(".", "_") if "." in path else f"FOUNDRY_{path.upper()}",
                annotation=info.annotation,
                default=None if default is PydanticUndefined else default,
                help=_one_line(info.description),
                expected=describe(info.annotation, info.metadata),
                text_only=all(part in (str, Path, type(None)) for part in alternatives),
                input_file=any(mark in (InputFile, InputRows) for mark in _markers(info)),
                input_folder=InputRows in _markers(info),
            ),
        )


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type and its bounds in words: `a number above 0 and at most 10`."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        if HubName in extra:
            return "an address hf://datasets/…"
        return describe(inner, [*metadata, *extra])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe(part, metadata) for part in get_args(annotation))
    if annotation is type(None):
        return "null"
    if annotation is bool:
        return "true or false"
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(annotation) in (tuple, list):
        return f"a list, each {describe(get_args(annotation)[0])}"
    if get_origin(annotation) in (dict, Mapping):
        return f"a mapping, each value {describe(get_args(annotation)[1])}"
    name = SCALAR_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
    return f"{name}{_bounds(metadata)}"


def _bounds(metadata: Sequence[Any]) -> str:
    limits: dict[str, Any] = {}
    for item in metadata:
        for part in item.metadata if isinstance(item, FieldInfo) else (item,):
            limits |= {key: getattr(part, key) for key in ("ge", "gt", "le", "lt") if hasattr(part, key)}
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']:g} to {limits['le']:g}"
    words = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}
    said = [f"{words[key]} {int(limit) if limit == int(limit) else limit}" for key, limit in limits.items()]
    return f" {' and '.join(said)}" if said else ""


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    annotation = _unwrap(annotation)
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _unwrap(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _markers(info: FieldInfo) -> list[Any]:
    nested = [part for part in get_args(info.annotation) if get_origin(part) is Annotated]
    return [*info.metadata, *(mark for part in nested for mark in get_args(part)[1:])]


def _one_line(text: str | None) -> str:
    """A docstring's lines as one: it becomes a comment, and a cell of a table."""
    return " ".join((text or "").split())
