"""A configuration written down: as YAML that reads back the same, as a digest, as a JSON Schema."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from model_foundry.config.fields import schema_fields, schema_sections
from model_foundry.config.yaml_text import resolve_plain

NOT_IN_DIGEST = frozenset({"run_dir", "work_dir", "logging", "gate"})
"""Where a run lies, what it prints and what data it would refuse do not change what it computes."""
DATA_NOT_IN_DIGEST = frozenset({"processes", "loader_processes"})
"""Of the section `data`: how many read and pack changes when a chunk is ready, and not what is in it."""

_SAFE_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-")
_WORDS_OF_OLD_YAML = frozenset({"y", "n", "yes", "no", "on", "off"})


def dump_yaml(
    config: BaseModel, *, provenance: Mapping[str, str] | None = None, header: Sequence[str] = (), help: bool = False
) -> str:
    """Every field with its value, and as a comment its default where it differs, so nothing depends on a version.

    Args:
        provenance: adds where each value that isn't a default came from.
        header: comment lines for the top.
        help: adds each field's help above it.
    """
    lines = [f"# {line}".rstrip() for line in header]
    lines += _section_lines(config, type(config), "", provenance or {}, help)
    return "\n".join(lines) + "\n"


def _section_lines(
    config: BaseModel, root: type[BaseModel], prefix: str, provenance: Mapping[str, str], help: bool
) -> Iterator[str]:
    fields, sections = schema_fields(root), schema_sections(root)
    indent = "  " * prefix.count(".")
    for name in type(config).model_fields:
        path, value = f"{prefix}{name}", getattr(config, name)
        if path in sections and value is not None:
            if help and sections[path]:
                yield f"{indent}# {sections[path]}"
            yield f"{indent}{name}:"
            yield from _section_lines(value, root, f"{path}.", provenance, help)
            continue
        default = fields[path].default if path in fields else None
        if help and path in fields:
            yield f"{indent}# {fields[path].help} ({fields[path].expected})"
        if value == default:
            yield f"{indent}{name}: {format_value(value)}  # default"
        else:
            origin = provenance.get(path, "default")
            source = "" if origin == "default" else f"{origin}; "
            yield f"{indent}{name}: {format_value(value)}  # {source}default {format_value(default)}"


def format_value(value: Any) -> str:
    """One value as YAML on one line, the same to readers of YAML 1.1 and 1.2."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{format_value(key)}: {format_value(item)}" for key, item in value.items()) + "}"
    return _format_text(str(value))


def _format_text(text: str) -> str:
    plain = _SAFE_PLAIN.issuperset(text) and text[:1] not in ("-", ".") and isinstance(resolve_plain(text), str)
    # A leading digit may be a date or base sixty to an old reader, some words truth values.
    if plain and not text[:1].isdigit() and text.lower() not in _WORDS_OF_OLD_YAML:
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**31).rstrip("\n")


def config_digest(config: BaseModel) -> str:
    """SHA-256, hexadecimal, of all that can change the outcome: NOT_IN_DIGEST and DATA_NOT_IN_DIGEST are left out."""
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_IN_DIGEST}
    if isinstance(data := values.get("data"), dict):
        values["data"] = {key: value for key, value in data.items() if key not in DATA_NOT_IN_DIGEST}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration file, `inherits` included."""
    described = schema.model_json_schema()
    parents = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    described["properties"] = {
        "inherits": {**parents, "description": "A profile, a path, or a list of these; later ones win."},
        **described["properties"],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}
