"""Ask one model the questions of a file and score its answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.config.schema import EvaluateConfig, EvaluationSection
from model_foundry.errors import ConfigError
from model_foundry.evals.generation import answer_questions, read_questions
from model_foundry.evals.metrics import mean_scores, score
from model_foundry.recipes.conversation import Reader, run_of, stored_section
from model_foundry.run.directory import RunDirectory
from model_foundry.run.logs import run_logging

logger = logging.getLogger(__name__)
NUM_RESAMPLES = 4000


def evaluate_model(config: EvaluateConfig) -> dict[str, Any]:
    """Scores, their interval, and every case, as JSON values.

    Raises:
        ConfigError: no questions are named, and the model is no run that has some.
    """
    with run_logging(level="info"):
        path, evaluation = _questions(config)
        questions = read_questions(path, system=evaluation.system)
        reader = Reader(config.model, engine=config.engine)
        answers = answer_questions(
            questions,
            lambda prompts, params: reader.sample(list(prompts), params),
            reader.renderer,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
            on_progress=lambda done: logger.info("%s of %s answered", done, len(questions)),
        )
    scores = [score(answer.text, question.answer) for answer, question in zip(answers, questions, strict=True)]
    return {
        "model": config.model.name,
        "file": str(path),
        "num_questions": len(questions),
        "num_cut": sum(answer.is_cut for answer in answers),
        "scores": mean_scores(scores),
        "exact_interval": _interval([each.exact for each in scores], seed=config.seed),
        "cases": [
            {
                "prompt": question.prompt,
                "expected": question.answer,
                "answer": answer.text,
                "scores": each.as_dict(),
                "source": question.source,
            }
            for question, answer, each in zip(questions, answers, scores, strict=True)
        ],
    }


def _interval(values: list[float], *, seed: int) -> list[float]:
    """95 % bootstrap interval of the mean (Efron and Tibshirani 1993)."""
    random = np.random.Generator(np.random.Philox(key=seed))
    means = np.array(values)[random.integers(0, len(values), size=(NUM_RESAMPLES, len(values)))].mean(axis=1)
    return [float(each) for each in np.quantile(means, [0.025, 0.975])]


def _questions(config: EvaluateConfig) -> tuple[Path, EvaluationSection]:
    """The questions and how to ask them; what is left open is taken from the run that is asked."""
    evaluation, run = config.evaluation, run_of(config.model.name)
    if evaluation.file is not None:
        return evaluation.file, evaluation
    if run is not None:
        stored, started_in = stored_section(RunDirectory.read(run).facts, "evaluation")
        if stored["file"] is not None:
            update = {name: value for name, value in stored.items() if name not in evaluation.model_fields_set}
            return started_in / stored["file"], evaluation.model_copy(update=update)
    hint = 'Set evaluation.file=FILE.jsonl with one {"prompt": …, "answer": …} a line.'
    raise ConfigError("no questions are named", where="evaluation.file", hint=hint)
