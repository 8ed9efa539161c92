"""`foundry VERB [CONFIG] [key=value ...]`: how every verb reads its arguments.

Knows the order of the layers only through `load_config`, and nothing of what a verb does.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import BaseModel

from model_foundry.config.load import Resolved, config_digest, dump_yaml, load_config, schema_by_method
from model_foundry.config.sources import is_override
from model_foundry.errors import UsageError

T = TypeVar("T", bound=BaseModel)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What isn't `key=value`, and what is."""
    names = [argument for argument in arguments if not is_override(argument)]
    return names, [argument for argument in arguments if is_override(argument)]


def load_command_config(
    schema: type[T] | Mapping[str, type[T]],
    arguments: Sequence[str],
    environ: Mapping[str, str],
    *,
    subject: str | None = None,
) -> Resolved[T]:
    """Resolve a verb's configuration from its arguments.

    Args:
        schema: the verb's, or those of its methods by name.
        arguments: at most one CONFIG, and `key=value` overrides, in any order.
        subject: the field that a name without .yaml sets, for verbs that take one (`foundry chat RUN`: `model.name`).

    Raises:
        UsageError: two files, or an argument that is neither a file nor `key=value`.
        ConfigError: as `load_config`.
    """
    names, overrides = split_arguments(arguments)
    if subject is not None:
        subjects = [name for name in names if Path(name).suffix not in (".yaml", ".yml")]
        if len(subjects) > 1:
            raise UsageError(f"{' and '.join(subjects)}: one at a time")
        names = [name for name in names if name not in subjects]
        overrides = [*(f"{subject}={name}" for name in subjects), *overrides]
    path, overrides = config_arguments([*names, *overrides])
    if isinstance(schema, Mapping):
        schema = schema_by_method(schema, path=path, overrides=overrides, environ=environ)
    return load_config(schema, path=path, overrides=overrides, environ=environ)


def config_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """At most one CONFIG, and `key=value` overrides.

    Raises:
        UsageError: two files, or an argument that is neither a file nor `key=value`.
    """
    names, overrides = split_arguments(arguments)
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)}: one CONFIG at a time", hint="Overrides are written key=value")
    return (Path(names[0]).expanduser() if names else None), overrides


def takes_config(
    schema: type[BaseModel] | Mapping[str, type[BaseModel]],
    *,
    subject: str | None = None,
    subject_name: str = "MODEL|RUN",
) -> Callable[[Callable[..., Any]], Any]:
    """Give a click command its CONFIG, its overrides and the flags that go with them.

    `subject` is as for `load_command_config`, `subject_name` what the usage line calls it.

    The function receives `resolved` (first, positional) and `as_json`, then its own options. With --print-config or
    --explain it isn't called: the configuration is printed instead. Warnings go to stderr.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @click.argument("arguments", nargs=-1, metavar=_usage(subject and subject_name))
        @click.option("--print-config", is_flag=True, help="Print the resolved configuration as YAML and stop.")
        @click.option("--explain", is_flag=True, help="Print every field with where its value came from, and stop.")
        @click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
        @functools.wraps(function)
        def run(arguments: tuple[str, ...], print_config: bool, explain: bool, as_json: bool, **options: Any) -> Any:
            resolved = load_command_config(schema, arguments, os.environ, subject=subject)
            if print_config or explain:
                click.echo(_as_json(resolved) if as_json else _as_text(resolved, explain=explain))
                return 0
            warn(resolved)
            return function(resolved, as_json=as_json, **options)

        return run

    return decorate


def warn(resolved: Resolved[Any]) -> None:
    """Say a configuration's warnings on stderr."""
    for warning in resolved.warnings:
        click.echo(f"warning: {warning}", err=True)


def _usage(subject_name: str | None) -> str:
    return f"{f'[{subject_name}] ' if subject_name else ''}[CONFIG] [KEY=VALUE]..."


def _as_text(resolved: Resolved[Any], *, explain: bool) -> str:
    if explain:
        return resolved.explain()
    return dump_yaml(resolved.config, provenance=resolved.provenance).rstrip("\n")


def _as_json(resolved: Resolved[Any]) -> str:
    values = {
        "config": resolved.config.model_dump(mode="json"),
        "provenance": dict(resolved.provenance),
        "digest": config_digest(resolved.config),
        "warnings": list(resolved.warnings),
    }
    return json.dumps(values, indent=2)
