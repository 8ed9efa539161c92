"""`foundry config`: check a configuration without loading a model, print the schema."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from model_foundry.cli.arguments import load_command_config, warn
from model_foundry.config.fields import names_file, names_hub, schema_fields
from model_foundry.config.load import Resolved, config_digest, json_schema
from model_foundry.config.problems import Problem, raise_problems
from model_foundry.config.schema import COMMAND_SCHEMAS

_FOR = click.option(
    "--command", "verb", type=click.Choice(list(COMMAND_SCHEMAS)), default="train", help="Whose configuration it is."
)


@click.group()
def command() -> None:
    """Check a configuration, print its schema."""


@command.command()
@click.argument("arguments", nargs=-1, metavar="CONFIG [KEY=VALUE]...")
@_FOR
@click.option("--explain", is_flag=True, help="Print every field with where its value came from.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def check(arguments: tuple[str, ...], verb: str, explain: bool, as_json: bool) -> None:
    """Check keys, values, rules between fields and that the files exist; loads no model.

    Prints the digest, which is equal for configurations that compute the same thing.
    """
    resolved = load_command_config(COMMAND_SCHEMAS[verb], arguments, os.environ)
    files = _existing_files(resolved)
    if verb == "train" and "data.train_file" not in files:
        raise_problems([Problem("data.train_file is not given", str(resolved.path or "configuration"), _WRITE_ONE)])
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


_WRITE_ONE = "Write data: {train_file: rows.jsonl}, or data.train_file=rows.jsonl on the command line"


def _existing_files(resolved: Resolved[Any]) -> dict[str, str]:
    """The input files that the configuration names, by field; one error for all that are missing."""
    files, problems = {}, []
    for dotted, spec in schema_fields(type(resolved.config)).items():
        value = resolved.value(dotted)
        if names_hub(value) and spec.input_folder:
            files[dotted] = str(value)  # whether the hub has it is asked when it is fetched
        if not names_file(spec, value):
            continue
        files[dotted] = str(value)
        path = Path(str(value))
        if not (path.is_file() or (spec.input_folder and path.is_dir())):
            kind = "is a folder" if path.is_dir() else "does not exist"
            problems.append(Problem(f"{dotted} names {value}, which {kind}", resolved.places[dotted]))
    raise_problems(problems)
    return files


@command.command()
@_FOR
@click.option("--json", "as_json", is_flag=True, help="Accepted for evenness: a schema is JSON anyway.")
def schema(verb: str, as_json: bool) -> None:
    """Print the JSON Schema of a command's configuration, for editors and programs."""
    click.echo(json.dumps(json_schema(COMMAND_SCHEMAS[verb]), indent=2))
