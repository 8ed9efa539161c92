"""`foundry service`: the training service, and the keys of its clients."""

from __future__ import annotations

import click

from model_foundry.cli.lazy import LazyGroup

VERBS: dict[str, tuple[str, str]] = {
    "run": ("model_foundry.cli.service_run:command", "Start the service; what `foundry service` does without a verb."),
    "keys": ("model_foundry.cli.service_keys:command", "Mint, list and revoke API keys."),
    "import": (
        "model_foundry.cli.service_import:command",
        "Let clients go on from what was trained here.",
    ),
}
"""Verb -> (module:attribute of its click command, help line)."""


class _ServiceGroup(LazyGroup):
    """`foundry service base_model=NAME` means `foundry service run base_model=NAME`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_verb = bool(args) and (args[0] in VERBS or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if is_verb else ["run", *args])


@click.command(cls=_ServiceGroup, table=VERBS)
def command() -> None:
    """Train LoRA models for clients of the Tinker protocol, over one base, durably."""
