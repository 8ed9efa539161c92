"""`foundry service [CONFIG] [KEY=VALUE]...`: run the training service until it is stopped."""

from __future__ import annotations

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.load import Resolved
from model_foundry.config.service import ServiceConfig


@click.command(help="Run the training service; Ctrl-C or SIGTERM ends it with everything written down.")
@takes_config(ServiceConfig)
def command(resolved: Resolved[ServiceConfig], *, as_json: bool) -> int:
    from model_foundry.run.logs import run_logging
    from model_foundry.service.serve import serve

    config = resolved.config
    with run_logging(level=config.log_level):
        serve(config, announce=lambda url: click.echo(f'{{"url": "{url}"}}' if as_json else f"ready at {url}"))
    return 0
