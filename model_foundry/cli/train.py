"""`foundry train CONFIG`."""

from __future__ import annotations

import json
from typing import Any

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.commands import METHOD_SCHEMAS, RunConfig
from model_foundry.config.load import Resolved

_ISO = ("%Y-%m-%dT%H:%M:%S.%f%z", "%Y-%m-%dT%H:%M:%S%z")


@click.command(help="Train a model, with proof: method=sft (fine-tuning), dpo (preferences) or pretrain.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop: rows, steps, memory, disk, time.")
@click.option("--resume", type=click.Choice(["never", "auto"]), default="never", help="auto: go on with what is there.")
@click.option("--now", type=click.DateTime(["%Y-%m-%d", *_ISO]), hidden=True, help="The date a template may print.")
@click.option("--piece-tokens", type=click.IntRange(0), hidden=True, help="As another run recorded it; 0: whole.")
@takes_config(METHOD_SCHEMAS)
def command(
    resolved: Resolved[RunConfig], *, as_json: bool, dry_run: bool, resume: Any, now: Any, piece_tokens: int | None
) -> int:
    from model_foundry.cli.report import show_report
    from model_foundry.recipes.plan import plan_text
    from model_foundry.recipes.training_run import plan_run, run_training

    if dry_run:
        plan = plan_run(resolved.config)
        click.echo(json.dumps(plan, indent=2) if as_json else plan_text(plan))
        return 0
    report = run_training(resolved.config, resume=resume, now=now, piece_tokens=piece_tokens)
    return show_report(report, run_dir=resolved.config.run_dir, as_json=as_json)
