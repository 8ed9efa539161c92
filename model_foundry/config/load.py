"""Configuration from its layers, with where every value came from.

defaults < inherits < file < environment < key=value. Later layers win key by key; lists and null replace. Of fields
that say one thing in several ways (`Section.alternatives`) the last layer that gives any decides.
The file format is `yaml_text`, the layers are `sources`, errors are worded in `problems`, output is `dump`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from model_foundry.config.dump import config_digest, dump_yaml, json_schema
from model_foundry.config.fields import FieldSpec, names_file, schema_fields
from model_foundry.config.problems import problems_of, raise_problems, show
from model_foundry.config.sources import lay, read_environment, read_file, read_overrides
from model_foundry.config.suggest import close
from model_foundry.config.tree import Branch, Leaf, Origin, find, leaves, map_leaves, merge, to_plain
from model_foundry.errors import ConfigError

__all__ = ["Resolved", "config_digest", "dump_yaml", "json_schema", "load_config", "names_method", "schema_by_method"]

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Resolved(Generic[T]):
    """A configuration that holds, and how it came about.

    Attributes:
        config: the frozen schema instance.
        provenance: for every field, `file x.yaml:12`, `profile chat`, `environment NAME`, `override` or `default`.
        places: the same as an error would point at it.
        hidden: for fields that several layers set, what the losing layers were, nearest first.
        warnings: sentences worth printing: names that nearly mean something, paths that mean two files.
        path: the file, if there was one.
    """

    config: T
    provenance: Mapping[str, str]
    places: Mapping[str, str] = field(default_factory=dict)
    hidden: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    path: Path | None = None

    def value(self, dotted: str) -> object:
        """The value of a field by its dotted path."""
        node: object = self.config
        for key in dotted.split("."):
            node = getattr(node, key, None)
        return node

    def explain(self) -> str:
        """One line a field: what it is and who said so."""
        rows = [(f"{path} = {show(self.value(path))}", path) for path in self.provenance]
        width = min(60, max(len(row) for row, _ in rows))
        lines = []
        for row, path in rows:
            hidden = self.hidden.get(path)
            over = f" (over {', '.join(hidden)})" if hidden else ""
            lines.append(f"{row:<{width}}  {self.provenance[path]}{over}")
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def summary(self) -> str:
        """One line: the file and what else had a say."""
        origins = list(self.provenance.values())
        profiles = sorted({origin for origin in origins if origin.startswith("profile ")})
        variables = [origin for origin in origins if origin.startswith("environment ")]
        num_overrides = origins.count("override")
        parts = [str(self.path) if self.path else "no file", *profiles, *variables]
        if num_overrides:
            parts.append(f"{num_overrides} override{'s' if num_overrides > 1 else ''}")
        return ", ".join(parts)


def load_config(
    schema: type[T], *, path: Path | None, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Resolved[T]:
    """Resolve a configuration.

    Relative input files mean the working directory if they exist there, else the folder of the YAML that names them.

    Args:
        schema: the command's schema.
        path: the YAML file, None for defaults only.
        overrides: `a.b=value`, the value read as a YAML scalar, list or mapping.
        environ: `SECTION_FIELD` and `FOUNDRY_FIELD` variables; none are read unless given.

    Raises:
        ConfigError: with every problem found, its place and what was expected.
        UsageError: an override that isn't `key=value`.
    """
    tree = Branch() if path is None else read_file(path, schema)
    from_environment, warnings = read_environment(environ or {}, schema)
    from_overrides, more_warnings = read_overrides(overrides, schema)
    warnings += more_warnings
    tree = lay(lay(tree, from_environment, schema), from_overrides, schema)
    tree = _adapt(tree, schema_fields(schema), warnings)
    try:
        config = schema.model_validate(to_plain(tree))
    except ValidationError as error:
        raise_problems(problems_of(error, schema=schema, tree=tree))
        raise
    return _resolved(config, tree, warnings, path)


def schema_by_method(
    schemas: Mapping[str, type[T]],
    *,
    path: Path | None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> type[T]:
    """The schema that the layers' `method` chooses; the first where none of them names one.

    Raises:
        ConfigError: there is no such method. As `load_config` for a file that cannot be read.
    """
    first = next(iter(schemas.values()))
    named = _method(first, path=path, overrides=overrides, environ=environ or {})
    if named is None:
        return first
    if named.value not in schemas:
        what = f"method is {show(named.value)}; expected one of {', '.join(schemas)}"
        like = close(str(named.value), list(schemas))
        raise ConfigError(what, where=named.origin.place, hint=f"Did you mean {like}?" if like else None)
    return schemas[named.value]


def names_method(*, path: Path | None, overrides: Sequence[str] = ()) -> bool:
    """Whether a file or an override says `method`, as training alone does.

    Raises:
        ConfigError, UsageError: one of them cannot be read.
    """
    return _method(BaseModel, path=path, overrides=overrides, environ={}) is not None


def _method(
    schema: type[BaseModel], *, path: Path | None, overrides: Sequence[str], environ: Mapping[str, str]
) -> Leaf | None:
    tree = Branch() if path is None else read_file(path, schema)
    tree = merge(merge(tree, read_environment(environ, schema)[0]), read_overrides(overrides, schema)[0])
    named = tree.children.get("method")
    return named if isinstance(named, Leaf) else None


def _adapt(tree: Branch, fields: Mapping[str, FieldSpec], warnings: list[str]) -> Branch:
    """Scalars of text fields as they were typed (`project: 007`), and input files found."""

    def change(dotted: str, leaf: Leaf) -> Leaf:
        spec = fields.get(dotted)
        if spec is None:
            return leaf
        value = leaf.value
        if spec.text_only and leaf.text and value is not None and not isinstance(value, str):
            value = leaf.text
        if isinstance(value, str) and names_file(spec, value) and not spec.expected.startswith("a list"):
            value = _find_file(dotted, value, leaf.origin, warnings)
        elif isinstance(value, list) and spec.input_file:
            value = [
                _find_file(dotted, item, leaf.origin, warnings) if isinstance(item, str) else item for item in value
            ]
        return Leaf(value, leaf.origin, leaf.text, leaf.hides)

    return map_leaves(tree, change)


def _find_file(dotted: str, value: str, origin: Origin, warnings: list[str]) -> str:
    path = Path(value).expanduser()
    if path.is_absolute() or origin.folder is None:
        return str(path)
    beside = origin.folder / path
    if not path.exists():
        return str(beside)
    if beside.exists() and not beside.samefile(path):
        warnings.append(f"{dotted}: {path} is both in the working directory and in {origin.folder}; the first is used")
    return str(path)


def _resolved(config: T, tree: Branch, warnings: list[str], path: Path | None) -> Resolved[T]:
    fields = schema_fields(type(config))
    set_by = {dotted: leaf for dotted, leaf in leaves(tree) if dotted in fields}
    # A field may itself be a mapping, and a whole section may be null: both have their origin higher up.
    origins = {}
    for dotted in fields:
        *above, key = dotted.split(".")
        node = set_by.get(dotted) or find(tree, (*above, key))
        parent = find(tree, tuple(above))
        is_mapping = isinstance(parent, Branch) and parent.children.get(key) is node
        origins[dotted] = node.origin if isinstance(node, Leaf) or is_mapping else Origin("default")
    return Resolved(
        config=config,
        provenance={dotted: origin.provenance for dotted, origin in origins.items()},
        places={dotted: origin.place for dotted, origin in origins.items()},
        hidden={
            dotted: tuple(origin.provenance for origin in leaf.hides) for dotted, leaf in set_by.items() if leaf.hides
        },
        warnings=tuple(warnings),
        path=path,
    )
