"""`foundry service import RUN`: what was trained here, as a checkpoint that clients go on from."""

from __future__ import annotations

from pathlib import Path

import click

from model_foundry.config.service import ServiceConfig


@click.command(name="import")
@click.argument("run", metavar="RUN|CHECKPOINT|ADAPTER")
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=ServiceConfig().state_dir,
    show_default=True,
    help="The service's state; it must not be running.",
)
@click.option("--name", default="imported", show_default=True, help="Last part of its tinker:// path.")
@click.option(
    "--journal-url",
    envvar="FOUNDRY_JOURNAL_URL",
    help="The service's journal_url, where it keeps its journal in PostgreSQL.",
)
@click.option("--key", help="Whose it is, by the name of a minted key; default everybody's to read.")
def command(run: str, state_dir: Path, name: str, journal_url: str | None, key: str | None) -> int:
    """Copy an adapter into a service's state and print the path that clients load it by.

    With the optimizer's state where there is one, so that create_training_client_from_state_with_optimizer goes on.
    """
    from model_foundry.service.importing import import_checkpoint

    click.echo(import_checkpoint(run, state_dir=state_dir, name=name, key=key, journal_url=journal_url))
    return 0
