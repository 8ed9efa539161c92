"""`foundry data VERB`: a table of what can be done with data before it is trained on."""

from __future__ import annotations

import click

from model_foundry.cli.lazy import LazyGroup

VERBS: dict[str, tuple[str, str]] = {
    "check": ("model_foundry.cli.data_check:command", "Refuse data that would train something else than was meant."),
    "inspect": ("model_foundry.cli.data_inspect:command", "Show rows as the model will see them, token by token."),
    "convert": ("model_foundry.cli.data_convert:command", "Write rows in another format."),
    "extract": ("model_foundry.cli.data_extract:command", "Functions and comments out of folders of code."),
    "dedup": ("model_foundry.cli.data_dedup:command", "Remove exact and near duplicates."),
    "pack": ("model_foundry.cli.data_pack:command", "Tokenise once into packed, memory-mapped shards."),
    "synth": ("model_foundry.cli.data_synth:command", "Write synthetic rows for tests."),
}
"""Verb -> (module:attribute of its click command, help line)."""


@click.command(cls=LazyGroup, table=VERBS)
def command() -> None:
    """Check, inspect, convert, deduplicate and pack training data."""
