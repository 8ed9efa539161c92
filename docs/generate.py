"""Writes docs/configuration.md and docs/cli.md from the schema and the commands: `python docs/generate.py`.

A test compares the pages with what this would write, so they are never older than the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import click
from pydantic import BaseModel

from model_foundry.cli.main import VERBS, main
from model_foundry.config.commands import COMMAND_SCHEMAS
from model_foundry.config.dump import format_value
from model_foundry.config.fields import FieldSpec, schema_fields, schema_sections
from model_foundry.config.schema import TrainConfig
from model_foundry.config.sources import PROFILE_FOLDER, profile_names

DOCS = Path(__file__).parent
GENERATED = "<!-- Written by docs/generate.py. Edit the schema or the command, then run it. -->"

CONFIGURATION_HEAD = f"""{GENERATED}

# Configuration

A configuration is a YAML file, and every field has a default. Layers lie over each other, later ones winning field by
field:

    defaults < inherits < the file < environment variables < key=value on the command line

```yaml
inherits: chat              # a profile, a path relative to this file, or a list of these (later ones win)
run_dir: runs/mine
data:
  train_file: rows.jsonl    # relative to the working directory if it is there, else to this file
training:
  learning_rate: 5e-5
```

- On the command line a field is its dotted name: `foundry train run.yaml training.learning_rate=5e-5`. Values are YAML:
  `training.save_at=[10,20]`, `lora.target_modules=[q_proj,v_proj]`, `criteria.loss_fall=null`.
- In the environment it is the section and the field, `TRAINING_LEARNING_RATE=5e-5`; a field outside any section starts
  with `FOUNDRY_`, `FOUNDRY_SEED=1`. A variable that nearly names a field is warned of.
- An unknown key is an error with a suggestion, and every problem is reported at once with its file and line.
- Numbers and words follow YAML 1.2: `5e-5` is a number, `no` and `on` are words. A key given twice is an error.
- Secrets are no part of a configuration. Trackers and hubs read them from the environment; nothing writes them down.
- `foundry config check run.yaml` checks a configuration and that its files exist, and prints its digest.
  `foundry train run.yaml --explain` says where each value comes from, `foundry train run.yaml --print-config` prints
  all of it as YAML, `foundry config schema` prints a JSON Schema for editors.
"""

CLI_HEAD = f"""{GENERATED}

# Command line

    foundry VERB [CONFIG] [KEY=VALUE ...] [options]

CONFIG is a YAML file and KEY=VALUE overrides one field of it; see [configuration](configuration.md).

| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | a criterion or a check did not hold |
| 2 | the command line, the configuration or the data cannot be used |
| 3 | failed or interrupted |

Errors are one paragraph on stderr: where, what, and what to do next. With `--json` they are also an object on stdout,
`{{"error": {{"kind", "what", "where", "hint", "exit_code"}}}}`. `FOUNDRY_DEBUG=1` adds the traceback.
"""


def configuration_page() -> str:
    """docs/configuration.md."""
    parts = [CONFIGURATION_HEAD]
    parts += ["## Fields\n", "\n".join(_which_commands()), ""]
    fields, sections = schema_fields(TrainConfig), schema_sections(TrainConfig)
    for section in ["", *sections]:
        inside = [spec for spec in fields.values() if spec.section == section]
        parts += [f"### {section or 'Top level'}\n", *([f"{sections[section]}\n"] if section else []), _table(inside)]
    for command, schema in COMMAND_SCHEMAS.items():
        specs = schema_fields(schema).items()
        own = [spec for path, spec in specs if path not in fields or _differs(spec, fields, schema)]
        if own:
            parts += [f"### Only in `foundry {command}`\n", _table(own)]
    parts.append("## Profiles\n")
    for name in profile_names():
        text = (PROFILE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        about, _, body = text.partition("\n")
        parts += [f"### {name}\n", f"{about.removeprefix('# ')}\n", f"```yaml\n{body.rstrip()}\n```\n"]
    return "\n".join(parts).rstrip("\n") + "\n"


def _differs(spec: FieldSpec, fields: Mapping[str, FieldSpec], schema: type[BaseModel]) -> bool:
    """Whether a method of training takes other values for a field, or has another default."""
    usual = fields[spec.path]
    is_method = issubclass(schema, TrainConfig) and spec.path != "method"
    return is_method and (spec.expected, spec.default) != (usual.expected, usual.default)


def _which_commands() -> Iterator[str]:
    yield "| Command | Reads |"
    yield "|---|---|"
    for command, schema in COMMAND_SCHEMAS.items():
        yield f"| `foundry {command}` | {', '.join(f'`{name}`' for name in schema.model_fields)} |"


def _table(specs: list[FieldSpec]) -> str:
    rows = ["| Field | Takes | Default | |", "|---|---|---|---|"]
    for spec in specs:
        rows.append(f"| `{spec.name}` | {spec.expected} | `{format_value(spec.default)}` | {_cell(spec.help)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def cli_page() -> str:
    """docs/cli.md. Loads every verb."""
    context = click.Context(main, info_name="foundry")
    parts = [
        CLI_HEAD,
        "\n".join(
            [
                "| Verb | |",
                "|---|---|",
                *(f"| [{verb}](#foundry-{verb}) | {line} |" for verb, (_, line) in VERBS.items()),
            ]
        ),
        "",
    ]
    for verb in VERBS:
        command = main.get_command(context, verb)
        assert command is not None, verb
        parts += _command_parts(command, click.Context(command, info_name=verb, parent=context))
    return "\n".join(parts).rstrip("\n") + "\n"


def _command_parts(command: click.Command, context: click.Context) -> list[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    level = "##" if context.parent is not None and context.parent.parent is None else "###"
    parts = [f"{level} {context.command_path}\n", f"    {usage}\n", f"{_help(command)}\n"]
    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    if options:
        rows = [f"| `{_flag(option)}` | {_cell(_option_help(option))} |" for option in options]
        parts.append("\n".join(["| Option | |", "|---|---|", *rows]) + "\n")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            parts += _command_parts(child, click.Context(child, info_name=name, parent=context))
    return parts


def _help(command: click.Command) -> str:
    """The paragraphs of a command's help; \\b marks one whose lines stay as they are."""
    paragraphs = (command.help or "").split("\f")[0].split("\n\n")
    kept = []
    for paragraph in paragraphs:
        if paragraph.startswith("\b"):
            kept.append("\n".join(f"    {line}" for line in paragraph.removeprefix("\b").strip("\n").splitlines()))
        else:
            kept.append(" ".join(paragraph.split()))
    return "\n\n".join(kept)


def _flag(option: click.Option) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} {'/'.join(map(str, option.type.choices))}"
    return f"{names} {option.metavar or option.type.name.upper()}"


def _option_help(option: click.Option) -> str:
    shown = (
        not option.is_flag and isinstance(option.default, (str, int, float)) and not isinstance(option.default, bool)
    )
    return f"{option.help or ''}{f' Default: {option.default}.' if shown else ''}".strip()


PAGES = {"configuration.md": configuration_page, "cli.md": cli_page}


def write() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote {DOCS / name}")


if __name__ == "__main__":
    write()
