"""`foundry rl [CONFIG] [KEY=VALUE]...`: reinforcement learning through a training service."""

from __future__ import annotations

import json

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.load import Resolved
from model_foundry.config.rl import RLConfig


@click.command(help="Train on arithmetic by reward alone, through a training service here or at service.url.")
@click.option("--resume", is_flag=True, help="Go on with the run in run_dir.")
@takes_config(RLConfig)
def command(resolved: Resolved[RLConfig], *, as_json: bool, resume: bool) -> int:
    from model_foundry.recipes.rl_run import run_rl

    summary = run_rl(resolved.config, resume=resume)
    if as_json:
        click.echo(json.dumps(summary, indent=2))
        return 0
    click.echo(
        f"reward {summary['reward_first']:.2f} in the first steps, {summary['reward_last']:.2f} in the last; held out "
        f"{summary['held_out_before']:.2f} before, {summary['held_out_after']:.2f} after; {summary['seconds']:.0f} s"
    )
    click.echo(f"page: {summary['page']}")
    click.echo(f"model: {summary['path']}")
    return 0
