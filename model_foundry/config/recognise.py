"""Which command a configuration is for: the one whose schema knows the most of what is written there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from model_foundry.config.fields import schema_fields, schema_sections
from model_foundry.config.sources import read_file, read_overrides
from model_foundry.config.tree import Branch, leaves, merge


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a configuration was taken for.

    Attributes:
        command: the first of those whose schema knows the most of its keys.
        others: the rest of them: the keys alone do not tell these apart.
    """

    command: str
    others: tuple[str, ...] = ()


def recognise_command(
    path: Path | None, overrides: Sequence[str], schemas: Mapping[str, type[BaseModel]]
) -> Recognised:
    """Judge by keys alone, those of inherited files included; values are not looked at.

    Fewest unknown keys first; among equals, keys that few commands have say more than those that all have.

    Raises:
        ConfigError, UsageError: a file or an argument cannot be read, whatever it is for.
    """
    known: dict[str, set[str]] = {}
    keys: set[str] = set()
    for command, schema in schemas.items():
        tree = Branch() if path is None else read_file(path, schema)
        given, _ = read_overrides(overrides, schema)
        written = {dotted for dotted, _ in leaves(merge(tree, given))}
        known[command] = {dotted for dotted in written if _is_known(dotted, schema)}
        keys |= written
    meaning = {key: 1 / (sum(key in names for names in known.values()) or 1) for key in sorted(keys)}
    ranks = {
        command: (len(names), round(sum(meaning[key] for key in sorted(names)), 9)) for command, names in known.items()
    }
    best = [command for command, rank in ranks.items() if rank == max(ranks.values())]
    return Recognised(best[0], tuple(best[1:]))


def _is_known(dotted: str, schema: type[BaseModel]) -> bool:
    """Whether it is a field, a section, or an entry of a field that is a mapping of any names."""
    fields, parts = schema_fields(schema), dotted.split(".")
    is_entry = any(".".join(parts[:length]) in fields for length in range(1, len(parts)))
    return is_entry or dotted in fields or dotted in schema_sections(schema)
