"""A run's suites and questions before and after training, and the page on which people read both."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from model_foundry.config.commands import RunConfig
from model_foundry.config.schema import DEFAULT_SUITES, TrainConfig
from model_foundry.evals.bounds import Bound
from model_foundry.evals.kinds import other_batch_size
from model_foundry.evals.measures import measured
from model_foundry.evals.rehearsal import Asked
from model_foundry.evals.results import RowResult, SuiteResult
from model_foundry.evals.suite import QUESTION_METRICS, QUESTIONS, Suite, questions_digest
from model_foundry.evals.targets import RowTooLongError
from model_foundry.evals.text_scores import ANSWER_SCORES, Wanted
from model_foundry.models.folder import read_config
from model_foundry.recipes.preparation import context_of
from model_foundry.recipes.session import Session
from model_foundry.recipes.suites import (
    FOLDER,
    ask_suite,
    assess,
    keep_result,
    kept_result,
    load_suites,
    metric_bounds,
    rehearse_suites,
    write_assessment,
)
from model_foundry.recipes.targets import engine_target
from model_foundry.recipes.work import Work
from model_foundry.run.directory import RunDirectory
from model_foundry.types import Check

logger = logging.getLogger(__name__)
Bounds = Mapping[str, Mapping[str, Bound]]


def suites_of(config: RunConfig) -> tuple[tuple[Suite, ...], Bounds]:
    """The suites that a run is asked, and the bounds that its criteria set on what they measure.

    Raises:
        ConfigError: a suite is broken, or a criterion is on a metric that none of them measures.
    """
    if not isinstance(config, TrainConfig):
        return (), {}
    has_questions = config.evaluation.file is not None
    suites = load_suites(config.evaluation.suites, max_rows=config.evaluation.max_rows, with_questions=has_questions)
    own = (Suite(QUESTIONS, "answers", (), QUESTION_METRICS),) if has_questions else ()
    return suites, metric_bounds(config.criteria.metrics, (*own, *suites))


def rehearsed(work: Work, suites: Sequence[Suite]) -> Asked:
    """What is held at once when the suites and the held-out questions are asked.

    Raises:
        FoundryError: a suite cannot be asked of this model, and somebody asked for it.
    """
    config = work.config
    if not isinstance(config, TrainConfig):
        return Asked()
    size, new = config.evaluation.batch_size, config.evaluation.max_new_tokens
    prompts = sorted((len(work.renderer.prompt(question.messages)) for question in work.questions), reverse=True)
    most = max(size, other_batch_size(size)) if config.evaluation.noise else size
    asked = Asked(sampled=tuple(length + new for length in prompts[:most]))
    try:
        context = context_of(read_config(work.source.folder))
        return asked.or_more(rehearse_suites(suites, work.renderer, context=context, batch_size=size))
    except RowTooLongError:
        if not _nobody_asked(config):
            raise
        return asked


def _nobody_asked(config: TrainConfig) -> bool:
    """Whether the suites are those that every run is asked."""
    bounded = any(not title.startswith(f"{QUESTIONS}.") for title in config.criteria.metrics)
    return config.evaluation.suites == DEFAULT_SUITES and not bounded


def suite_results(
    run: RunDirectory, session: Session, suites: Sequence[Suite], when: str, *, reuse: bool
) -> dict[str, SuiteResult]:
    """Each suite's result on the model as it is now, kept in the run's folder.

    A suite that is asked by default and does not fit the model's context is left out, and that is said.

    Args:
        reuse: take what an interrupted run has kept of the same suite.
    """
    config, results = session.work.config, {}
    if not isinstance(config, TrainConfig):
        return {}
    target = engine_target(session.work.source.name, session.engine, session.model_id, session.work.renderer)
    for suite in suites:
        path = run.path / FOLDER / f"{when}-{suite.name}.json"
        result = kept_result(path, suite) if reuse else None
        if result is None:
            again = config.evaluation.noise and when == "before"
            try:
                result = ask_suite(
                    suite, target, batch_size=config.evaluation.batch_size, again=again, when=f"{when} training"
                )
            except RowTooLongError as error:
                if not _nobody_asked(config):
                    raise
                logger.warning("%s; nobody asked for this suite, so it is left out: %s", suite.name, error.what)
                continue
            keep_result(path, result)
        results[suite.name] = result
    return results


def assess_run(
    run: RunDirectory,
    session: Session,
    suites: Sequence[Suite],
    bounds: Bounds,
    *,
    before: Mapping[str, SuiteResult],
    after: Mapping[str, SuiteResult],
    answers: tuple[Sequence[str], Sequence[str]] | None,
    checks: Sequence[Check],
) -> tuple[tuple[Check, ...], Path | None]:
    """The run's checks and those of its suites; evaluation.html, where anything was asked.

    Args:
        answers: to the held-out questions, before and after.
        checks: those that were made already.
    """
    config = session.work.config
    if answers is not None and isinstance(config, TrainConfig):
        first, last = ({QUESTIONS: _questions_result(session.work, config, texts)} for texts in answers)
        before, after = first | dict(before), last | dict(after)
    assessment = assess(suites, after=after, before=before, bounds=bounds, further=checks)
    if not after:
        return assessment.checks, None
    facts = {"model": run.run_id, "against": session.work.source.name}
    return assessment.checks, write_assessment(run.path / FOLDER, facts, assessment)


def _questions_result(work: Work, config: TrainConfig, texts: Sequence[str]) -> SuiteResult:
    """Answers to the held-out questions as a suite's result, comparable with every other asked the same."""
    assert config.evaluation.file is not None
    digest = questions_digest(
        Path(config.evaluation.file), system=config.evaluation.system, max_new_tokens=config.evaluation.max_new_tokens
    )
    stats = {
        name: [ANSWER_SCORES[name](text, Wanted((q.answer,))) for q, text in zip(work.questions, texts, strict=True)]
        for name in QUESTION_METRICS
    }
    rows = tuple(
        RowResult(question.source, question.prompt, question.answer, (("answer", text),))
        for question, text in zip(work.questions, texts, strict=True)
    )
    return SuiteResult(
        suite=QUESTIONS, kind="answers", digest=digest, target={"name": work.source.name},
        metrics={name: measured(name, each, seed=work.config.seed) for name, each in stats.items()}, rows=rows,
        about="The run's held-out questions, kept out of training.", seed=work.config.seed,
    )  # fmt: skip
