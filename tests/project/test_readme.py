"""Commands in the documentation exist: each `make` target, each `foundry` verb and option, each configuration field."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from model_foundry.cli.main import main as cli
from model_foundry.config.schema import Section, TrainConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Names a reader fills in.
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*\Z|<.*>\Z|\[.*|…|\.\.\.")


def command_lines(path: Path) -> list[str]:
    """Lines of fenced and indented blocks, and inline code, that start with make or foundry."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += re.findall(r"^(?: {4,}|\t)\s*(?:\$ )?(\S.*)$", outside, flags=re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", outside)
    return [line for line in lines if re.match(r"(\S+=\S+ )*(make|foundry|\.venv/bin/foundry) ", line)]


def all_commands() -> list[tuple[str, str]]:
    return [(str(page.relative_to(ROOT)), line) for page in PAGES if page.is_file() for line in command_lines(page)]


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    """Follows the verbs from `foundry` down; returns the command and the words left over."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if PLACEHOLDER.match(words[0]):
            return command, []
        context = click.Context(command)
        # A group that is given an override does what its verb `run` does.
        words = ["run", *words] if "=" in words[0] else words
        child = command.get_command(context, words[0])
        if child is None and command.invoke_without_command:
            return command, words  # `foundry serve MODEL`, beside `foundry serve keys`
        assert child is not None, (
            f"no verb {words[0]!r} under {command.name}; there are {command.list_commands(context)}"
        )
        command, words = child, words[1:]
    return command, words


def field_exists(dotted: str) -> bool:
    schema: type[Section] = TrainConfig
    *sections, name = dotted.split(".")
    for section in sections:
        annotation = schema.model_fields[section].annotation if section in schema.model_fields else None
        if not isinstance(annotation, type) or not issubclass(annotation, Section):
            return False
        schema = annotation
    return name in schema.model_fields


def test_the_readme_shows_commands() -> None:
    """If the pattern stopped matching, every other test here would pass by looking at nothing."""
    readme = [line for page, line in all_commands() if page == "README.md"]
    assert any(line.startswith("make ") for line in readme)
    assert any("foundry " in line for line in readme)


def test_commands_are_found_however_they_are_set(tmp_path: Path) -> None:
    """Indented commands were never looked at, and a page of them was wrong unseen."""
    page = tmp_path / "page.md"
    page.write_text(
        "Call `make a` or\n\n    foundry b   # so\n    $ make c\n\n```sh\n$ foundry d\n```\n", encoding="utf-8"
    )
    assert sorted(command_lines(page)) == ["foundry b   # so", "foundry d", "make a", "make c"]


@pytest.mark.parametrize(("page", "line"), all_commands())
def test_a_documented_command_exists(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words = words[1:]
    program, *rest = words
    if program == "make":
        targets = set(
            re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        )
        named = [word for word in rest if "=" not in word and not word.startswith("-")]
        assert not set(named) - targets, f"{page}: `{line}` names no target of the Makefile"
        return
    command, arguments = resolve(rest)
    options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    for word in arguments:
        if word.startswith("--"):
            assert word.split("=")[0] in options | {"--help"}, f"{page}: `{line}`: {word} is not an option"
        elif "=" in word and not PLACEHOLDER.match(word) and command.name in {"train", "check"}:
            assert field_exists(word.split("=")[0]), f"{page}: `{line}`: {word.split('=')[0]} is not a field"
        elif word.endswith((".yaml", ".jsonl")) and "/" in word and not word.startswith("runs/"):
            assert (ROOT / word).exists(), f"{page}: `{line}`: {word} is not there"
