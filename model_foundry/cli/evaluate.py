"""`foundry evaluate RUN|MODEL|ADAPTER|GGUF|URL`: suites on anything that answers, and SHIP or DON'T SHIP."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.load import Resolved
from model_foundry.config.schema import EvaluateConfig

if TYPE_CHECKING:
    from model_foundry.evals.results import SuiteResult
    from model_foundry.evals.verdict import Change
    from model_foundry.recipes.evaluation import Evaluation

_WIDTH = 110


@click.command(
    help="Ask a model suites of questions and judge the answers: SHIP (exit code 0) or DON'T SHIP (1), with the "
    "reasons, JSON and a page. A run brings its own questions and is compared with what it was trained from. A "
    "server's key is FOUNDRY_API_KEY."
)
@click.option("--suite", "suites", multiple=True, metavar="NAME|FILE",
              help="A suite that comes along, your own YAML, or all; may be repeated.")  # fmt: skip
@click.option("--against", metavar="MODEL", help="Compare with this one: a model, run, GGUF file, URL, base or none.")
@click.option("--show", type=click.IntRange(min=0), default=3, show_default=True, help="Answers to print a suite.")
@takes_config(EvaluateConfig, subject="model.name", subject_name="RUN|MODEL|ADAPTER|GGUF|URL")
def command(
    resolved: Resolved[EvaluateConfig], *, as_json: bool, show: int, suites: tuple[str, ...], against: str | None
) -> int:
    from model_foundry.recipes.evaluation import evaluate_model

    config = resolved.config
    if suites:
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"suites": suites})})
    if against is not None:
        config = config.model_copy(update={"against": against})
    evaluation = evaluate_model(config)
    if as_json:
        click.echo(json.dumps(evaluation.as_dict(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        click.echo("\n".join(_lines(evaluation, show=show)))
    return 1 if evaluation.assessment.verdict.ship is False else 0


def _lines(evaluation: Evaluation, *, show: int) -> list[str]:
    assessment = evaluation.assessment
    beside = "" if evaluation.against is None else f" · beside {evaluation.against}"
    lines = [f"{evaluation.model}{beside}"]
    found = assessment.changes
    for name, result in assessment.after.items():
        lines += ["", *_suite_lines(name, result, found.get(name, {}), show=show)]
    verdict = assessment.verdict
    lines += ["", verdict.text]
    for reason in verdict.reasons:
        lines += textwrap.wrap(reason, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [*lines, "", f"Page: {evaluation.page}"]


def _suite_lines(name: str, result: SuiteResult, found: Mapping[str, Change], *, show: int) -> list[str]:
    from model_foundry.evals.measures import value_text

    left_out = f", {result.num_left_out} left out" if result.num_left_out else ""
    lines = [f"{name}: {len(result.rows)} rows{left_out}, {result.seconds:.1f} s"]
    width = max((len(metric) for metric in (*result.metrics, *result.missing)), default=0)
    for metric, measured in result.metrics.items():
        unit = measured.measure.unit
        if metric in found:
            lines.append(f"  {metric:<{width}}  {found[metric].verdict:<7}  {found[metric].text()}")
            continue
        spread = measured.why if measured.interval is None else "95 % interval {} to {}".format(
            *(value_text(end, unit) for end in measured.interval)
        )  # fmt: skip
        lines.append(f"  {metric:<{width}}  {value_text(measured.value, unit)} ({spread})")
    lines += [f"  {metric:<{width}}  not measured: {reason}" for metric, reason in result.missing.items()]
    for row in result.rows[:show]:
        texts = " | ".join(_short(text) for _, text in row.shown)
        lines.append(f"    {_short(row.prompt or row.source)} → {texts or '–'}")
    return lines


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 60 else f"{words[:59]}…"
