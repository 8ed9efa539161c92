"""`foundry config`: check a configuration without loading a model, print the schema."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from model_foundry.cli.arguments import config_arguments, load_command_config, warn
from model_foundry.config.commands import COMMAND_SCHEMAS, METHOD_SCHEMAS
from model_foundry.config.fields import names_file, names_hub, schema_fields
from model_foundry.config.load import Resolved, config_digest, json_schema, names_method
from model_foundry.config.problems import Problem, raise_problems
from model_foundry.config.recognise import Recognised, recognise_command
from model_foundry.errors import ConfigError

_COMMANDS = click.Choice(list(COMMAND_SCHEMAS))


@click.group()
def command() -> None:
    """Check a configuration, print its schema."""


@command.command()
@click.argument("arguments", nargs=-1, metavar="CONFIG [KEY=VALUE]...")
@click.option("--command", "verb", type=_COMMANDS, help="Whose configuration it is; told by its keys if not given.")
@click.option("--explain", is_flag=True, help="Print every field with where its value came from.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def check(arguments: tuple[str, ...], verb: str | None, explain: bool, as_json: bool) -> None:
    """Check keys, values, rules between fields and that the files exist; loads no model.

    Says which command's configuration it was taken for. Prints the digest, which is equal for configurations that
    compute the same thing.
    """
    if verb is None:
        path, overrides = config_arguments(arguments)
        found = Recognised("train")
        if not names_method(path=path, overrides=overrides):
            by_default = {name: schema for name, schema in COMMAND_SCHEMAS.items() if " method=" not in name}
            found = recognise_command(path, overrides, by_default)
        with _taken_for(found):
            resolved, files = _checked(found.command, arguments)
        verb = found.command
    else:
        resolved, files = _checked(verb, arguments)
    digest = config_digest(resolved.config)
    if as_json:
        values = {"valid": True, "command": verb, "digest": digest, "files": files}
        click.echo(json.dumps(values | {"warnings": list(resolved.warnings)}))
        return
    warn(resolved)
    if explain:
        click.echo(resolved.explain())
    click.echo(f"valid for foundry {verb}: {resolved.summary()}")
    for dotted, name in files.items():
        click.echo(f"{dotted}: {name}")
    click.echo(f"digest: {digest}")


@contextmanager
def _taken_for(found: Recognised) -> Iterator[None]:
    """Says with a problem which command the configuration was taken for, and how to have it judged otherwise."""
    try:
        yield
    except ConfigError as error:
        others = f" (its keys would also do for {', '.join(found.others)})" if found.others else ""
        said = f"It was taken for a configuration of foundry {found.command}{others}; --command NAME chooses another"
        hint = f"{error.hint}. {said}" if error.hint else said
        raise ConfigError(error.what, where=error.where, hint=hint) from error


def _checked(verb: str, arguments: Sequence[str]) -> tuple[Resolved[Any], dict[str, str]]:
    is_training = verb.startswith("train")  # whose methods have schemas of their own
    resolved = load_command_config(METHOD_SCHEMAS if is_training else COMMAND_SCHEMAS[verb], arguments, os.environ)
    files = _existing_files(resolved)
    if is_training and "data.train_file" not in files:
        raise_problems([Problem("data.train_file is not given", str(resolved.path or "configuration"), _WRITE_ONE)])
    return resolved, files


_WRITE_ONE = "Write data: {train_file: rows.jsonl}, or data.train_file=rows.jsonl on the command line"


def _existing_files(resolved: Resolved[Any]) -> dict[str, str]:
    """The input files that the configuration names, by field; one error for all that are missing."""
    files, problems = {}, []
    for dotted, spec in schema_fields(type(resolved.config)).items():
        value = resolved.value(dotted)
        named = {f"{dotted}[{index}]": item for index, item in enumerate(value)} if isinstance(value, tuple) else None
        for shown, item in ({dotted: value} if named is None else named).items():
            if names_hub(item) and spec.input_folder:
                files[shown] = str(item)  # whether the hub has it is asked when it is fetched
            if not names_file(spec, item):
                continue
            files[shown] = str(item)
            path = Path(str(item)).expanduser()
            if not (path.is_file() or (spec.input_folder and path.is_dir())):
                kind = "is a folder" if path.is_dir() else "does not exist"
                problems.append(Problem(f"{shown} names {item}, which {kind}", resolved.places[dotted]))
    raise_problems(problems)
    return files


@command.command()
@click.option("--command", "verb", type=_COMMANDS, default="train", help="Whose schema to print.")
@click.option("--json", "as_json", is_flag=True, help="Accepted for evenness: a schema is JSON anyway.")
def schema(verb: str, as_json: bool) -> None:
    """Print the JSON Schema of a command's configuration, for editors and programs."""
    click.echo(json.dumps(json_schema(COMMAND_SCHEMAS[verb]), indent=2))
