"""`foundry generate CONFIG`: turns a configuration into a job, and shows what it would cost, does or did."""

from __future__ import annotations

import json
import math
import os
import sys
from itertools import islice
from typing import TYPE_CHECKING

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.cli.corpora import open_corpus, open_language
from model_foundry.config.generate import GenerateConfig
from model_foundry.config.load import Resolved
from model_foundry.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from model_foundry.data.code.units import CodeUnit
    from model_foundry.generate.client import Client
    from model_foundry.generate.pacing import Pacing
    from model_foundry.generate.report import Report
    from model_foundry.generate.requests import Recipe
    from model_foundry.generate.run import Job

KEY_VARIABLE = "ANTHROPIC_API_KEY"
URL_VARIABLE = "ANTHROPIC_BASE_URL"


@click.command(help="Make a data set from code through a batch API, never paid twice.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent and what it would cost, and stop.")
@click.option("--max-cost", type=float, metavar="USD", help="Hard ceiling in dollars; the same as max_cost=USD.")
@click.option("--resend-uncertain", is_flag=True, help="Send again what may have been billed, at its own cost.")
@click.option("--cancel", "is_cancel", is_flag=True, help="Cancel what is under way; what was done is kept.")
@click.option("--status", "is_status", is_flag=True, help="Say how things stand, also while another process works.")
@takes_config(GenerateConfig)
def command(
    resolved: Resolved[GenerateConfig],
    *,
    as_json: bool,
    dry_run: bool,
    max_cost: float | None,
    resend_uncertain: bool,
    is_cancel: bool,
    is_status: bool,
) -> int:
    from model_foundry.generate import run

    if dry_run + is_cancel + is_status > 1:
        raise UsageError("--dry-run, --cancel and --status: one at a time")
    config = resolved.config
    job = make_job(config, max_cost=max_cost)
    if is_status:
        return _show(run.status(job), as_json=as_json, is_status=True)
    if dry_run:
        estimate = run.dry_run(job, read_units(config), client=_client(config, required=False))
        click.echo(json.dumps(estimate.as_dict(), indent=2) if as_json else "\n".join(estimate.lines()))
        return 0
    client = _client(config, required=True)
    assert client is not None
    asker = run.Asker(say=_say, ask=_ask if sys.stdin.isatty() and sys.stderr.isatty() else None)
    try:
        if is_cancel:
            report = run.cancel(job, client=client, pacing=_pacing(config), asker=asker)
        else:
            report = run.generate(
                job,
                read_units(config),
                client=client,
                pacing=_pacing(config),
                asker=asker,
                resend_uncertain=resend_uncertain,
            )
    finally:
        client.close()
    return _show(report, as_json=as_json)


def make_job(config: GenerateConfig, *, max_cost: float | None = None) -> Job:
    """The job of a configuration; everything in it is a plain value."""
    from model_foundry.generate.batches import BatchLimits
    from model_foundry.generate.client import DEFAULT_BASE_URL
    from model_foundry.generate.dataset import RowRules, standard_filters
    from model_foundry.generate.pricing import nano
    from model_foundry.generate.run import Job

    generation, rows, output = config.generation, config.rows, config.output
    ceiling = config.max_cost if max_cost is None else max_cost
    if ceiling is not None and not 0 < ceiling < math.inf:
        what = "allows nothing" if ceiling <= 0 else "is no ceiling"
        raise UsageError(f"--max-cost {ceiling:g} {what}", hint="Give a sum above 0, or --dry-run")
    recipe = make_recipe(config)
    filters = standard_filters(
        open_language(config.corpus.language, config.corpus.grammar),
        min_chars=rows.min_question_chars,
        max_chars=rows.max_question_chars,
        refusals=rows.refusals,
        check_syntax=rows.syntax,
    )
    return Job(
        recipe=recipe,
        rules=RowRules(
            voices=tuple(recipe.prompt.voices),
            prompt=recipe.prompt.label,
            filters=filters,
            duplicate_threshold=rows.near_duplicates,
            seed=config.seed,
        ),
        output=output.file,
        ledger=output.ledger or output.file.with_name(f"{output.file.stem}.ledger.sqlite"),
        settings={
            "corpus.language": config.corpus.language,
            URL_VARIABLE: os.environ.get(URL_VARIABLE) or DEFAULT_BASE_URL,
        },
        batch=generation.mode == "batch",
        ceiling=None if ceiling is None else nano(ceiling),
        tries=generation.tries,
        count_sample=generation.count_sample,
        limits=BatchLimits(
            max_requests=generation.batch_requests,
            max_bytes=generation.batch_bytes,
            poll_seconds=generation.poll_seconds,
            settle_seconds=generation.settle_seconds,
        ),
    )


def read_units(config: GenerateConfig) -> list[CodeUnit]:
    """The pieces of code of a configuration's corpus; says what was left out."""
    corpus = open_corpus(config.corpus)
    most = config.generation.max_requests
    units = list(islice(corpus.units, most))
    left_out = "; the rest is left for later" if most is not None and len(units) == most else ""
    if most is None:
        left_out = "".join(f"; {count:,} left out: {reason}" for reason, count in corpus.skipped.items())
    _say(f"corpus      {len(units):,} pieces of {corpus.language.name}{left_out}")
    return units


def make_recipe(config: GenerateConfig) -> Recipe:
    """The words, the model and the price of a configuration's requests."""
    from model_foundry.generate.pricing import find_price
    from model_foundry.generate.prompts import SYSTEM, VOICES, Prompt, choose_template
    from model_foundry.generate.requests import Recipe

    generation, prompt, price = config.generation, config.prompt, config.price
    given = {
        "input": price.input,
        "output": price.output,
        "cache_write": price.cache_write,
        "cache_read": price.cache_read,
        "batch_share": price.batch_share,
        "date": price.date,
    }
    return Recipe(
        model=generation.model,
        max_tokens=generation.max_tokens,
        prompt=Prompt(
            version=prompt.version,
            system=SYSTEM if prompt.system is None else prompt.system,
            template=choose_template(prompt.version, prompt.template),
            voices=dict(prompt.voices) or VOICES,
            questions_per_voice=prompt.questions_per_voice,
            about=config.corpus.about,
            concepts=config.corpus.concepts,
        ),
        price=find_price(generation.model, given=given),
        structured=generation.structured,
        effort=None if generation.effort == "default" else generation.effort,
        thinking=None if generation.thinking == "default" else generation.thinking,
    )


def _pacing(config: GenerateConfig) -> Pacing:
    from model_foundry.generate.pacing import Pacing

    generation = config.generation
    return Pacing(max_wait_seconds=generation.max_wait_seconds, max_tries=generation.max_failures, say=_say)


def _client(config: GenerateConfig, *, required: bool) -> Client | None:
    """A client with the key of the environment; None where there is no key and none is needed."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        if not required:
            return None
        raise ConfigError(
            "there is no API key",
            where=KEY_VARIABLE,
            hint=f"Put it into the environment: export {KEY_VARIABLE}=…; --dry-run needs none",
        )
    from model_foundry.generate.client import Client

    return Client(
        api_key=key,
        base_url=os.environ.get(URL_VARIABLE) or None,
        timeout_seconds=config.generation.timeout_seconds,
    )


def _show(report: Report, *, as_json: bool, is_status: bool = False) -> int:
    click.echo(json.dumps(report.as_dict(), indent=2) if as_json else "\n".join(report.lines()))
    return 0 if is_status or report.is_done else 1


def _say(line: str) -> None:
    click.echo(line, err=True)


def _ask(question: str) -> bool:
    try:
        return click.confirm(question, default=False, err=True)
    except click.Abort:
        return False
