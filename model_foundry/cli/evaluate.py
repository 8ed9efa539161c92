"""`foundry evaluate MODEL|RUN`: ask held-out questions and score the answers."""

from __future__ import annotations

import json
from pathlib import Path

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.load import Resolved
from model_foundry.config.schema import EvaluateConfig


@click.command(help="Ask a model held-out questions and score the answers. A run brings its own questions.")
@click.option("--show", type=click.IntRange(min=0), default=5, show_default=True, help="Answers to print.")
@takes_config(EvaluateConfig, subject="model.name")
def command(resolved: Resolved[EvaluateConfig], *, as_json: bool, show: int) -> int:
    from model_foundry.recipes.evaluation import evaluate_model

    result = evaluate_model(resolved.config)
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return 0
    scores = result["scores"]
    low, high = result["exact_interval"]
    click.echo(f"{result['model']} · {result['num_questions']} questions from {Path(result['file'])}")
    click.echo(
        f"exact {scores['exact']:.1%} (95 % interval {low:.0%} to {high:.0%}) · F1 {scores['f1']:.3f} · "
        f"contains {scores['contains']:.1%} · {result['num_cut']} answers cut off"
    )
    for case in result["cases"][:show]:
        click.echo(f"  {'=' if case['scores']['exact'] else '≠'} {case['prompt']} → {case['answer']}")
    return 0
