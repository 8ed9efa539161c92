"""A group of commands as a table, each imported only when it is asked for, so that `--help` is instant."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """Lists its commands from `table`; imports one only to run it.

    Args:
        table: name -> (module:attribute of its click command, help line).
        noun: what a name is called in the error for an unknown one.
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], noun: str = "verb", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table
        self._noun = noun

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._table:
            return None
        module, _, attribute = self._table[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        command.name = cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in self._table and not word.startswith("-"):
            import difflib

            from model_foundry.errors import UsageError

            near = difflib.get_close_matches(word, self._table, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"{self._noun.capitalize()}s: {', '.join(self._table)}"
            raise UsageError(f"there is no {self._noun} '{word}'", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(f"{self._noun.capitalize()}s"):
            formatter.write_dl([(name, line) for name, (_, line) in self._table.items()])
