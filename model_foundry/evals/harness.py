"""Tasks of the lm-evaluation-harness (EleutherAI; Gao et al.), where it is installed: it asks, our target answers.

The harness brings prompts, data and metrics; likelihoods come from the target, on plain text without a chat template,
as its published numbers do. Tasks that are answered in words are left to suites of ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from model_foundry.errors import DataError, FoundryError, UsageError
from model_foundry.evals.measures import Measured, measure_of, measured_stats
from model_foundry.evals.results import RowResult, SuiteResult
from model_foundry.evals.suite import Suite
from model_foundry.evals.targets import Continuation, Target

_LIKELIHOODS = ("multiple_choice",)


def run_harness(suite: Suite, target: Target, *, batch_size: int) -> SuiteResult:
    """Run the suite's tasks.

    Raises:
        UsageError: the harness is not installed, or has no such task. DataError: a task's data cannot be had.
    """
    started = time.perf_counter()
    if target.no_likelihoods is not None:
        missing = dict.fromkeys(suite.tasks, target.no_likelihoods)
        return SuiteResult(
            suite.name, suite.kind, suite.digest, target.describe(), {}, (), missing, about=suite.about
        )  # fmt: skip
    manager, evaluator = require_tasks(suite), _import("lm_eval.evaluator")
    model = _model_class()(target, batch_size=batch_size)
    try:
        tasks = manager.load(list(suite.tasks))["tasks"]
        _require_likelihoods(tasks)
        found = evaluator.simple_evaluate(
            model, tasks=list(tasks.values()), limit=suite.max_rows, bootstrap_iters=0, task_manager=manager,
            log_samples=True, random_seed=suite.decoding.seed,
        )  # fmt: skip
    except FoundryError:
        raise
    except Exception as error:
        what = f"the harness failed ({type(error).__name__}: {error})"
        hint = "Its tasks fetch their data from the Hugging Face hub; without one, name a task with local data."
        raise DataError(what, where=f"suite {suite.name}", hint=hint) from error
    metrics, rows = _collected(found["samples"], seed=suite.decoding.seed)
    return SuiteResult(
        suite=suite.name, kind=suite.kind, digest=suite.digest, target=target.describe(), metrics=metrics, rows=rows,
        seconds=time.perf_counter() - started, about=suite.about, seed=suite.decoding.seed,
    )  # fmt: skip


def require_tasks(suite: Suite) -> Any:
    """The harness's task manager, which knows all tasks of the suite.

    Raises:
        UsageError: the harness is not installed, or has no such task.
    """
    manager = _import("lm_eval.tasks").TaskManager()
    paths = [task for task in suite.tasks if task.endswith((".yaml", ".yml"))]
    unknown = [task for task in suite.tasks if task not in manager.all_tasks and task not in paths]
    if unknown:
        hint = "lm-eval ls tasks lists them; a task of your own is a path to its YAML."
        raise UsageError(f"the harness has no task {', '.join(unknown)}", where=f"suite {suite.name}", hint=hint)
    return manager


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        hint = "Install it with: pip install lm-eval; or leave the suite out."
        raise UsageError(f"the lm-evaluation-harness is not installed ({error})", where="kind: harness", hint=hint)\
            from error  # fmt: skip


def _model_class() -> Any:
    """The harness's model interface over a target; made here because its base class is the harness's."""
    base: Any = _import("lm_eval.api.model").LM

    class TargetModel(base):
        def __init__(self, target: Target, *, batch_size: int) -> None:
            super().__init__()
            self._target, self.batch_size = target, batch_size

        def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            endings = [_ending(*request.args) for request in requests]
            # Whether an ending is also what would be written greedily is not known here; multiple choice does not ask.
            return [(each.logprob, False) for each in self._target.likelihoods(endings)]

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            return [
                each.logprob for each in self._target.likelihoods([Continuation(None, r.args[0]) for r in requests])
            ]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            raise UsageError("tasks that are answered in words are not run", where="kind: harness")

    return TargetModel


def _require_likelihoods(tasks: Mapping[str, Any]) -> None:
    """Raises: UsageError: a task wants more than likelihoods of choices."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE not in _LIKELIHOODS:
            hint = "Use multiple choice tasks; for answers in words or texts write a suite of the kind answers or text."
            what = f"the task {name} ({task.OUTPUT_TYPE}) is not scored by the likelihoods of choices"
            raise UsageError(what, where="kind: harness", hint=hint)


def _ending(context: str, ending: str) -> Continuation:
    """White space between the two belongs to the ending, as tokenizers put it there."""
    kept = context.rstrip()
    return Continuation(None, context + ending, len(kept))


def _collected(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], *, seed: int
) -> tuple[dict[str, Measured], tuple[RowResult, ...]]:
    """Each task's metrics over its documents, all documents in one column of rows."""
    flat = [(task, sample) for task, each in samples.items() for sample in each]
    metrics: dict[str, Measured] = {}
    for task, each in samples.items():
        for name in dict.fromkeys(metric for sample in each for metric in sample.get("metrics", ())):
            values = [
                sample.get(name) if own == task and isinstance(sample.get(name), int | float) else None
                for own, sample in flat
            ]
            stats = np.array([[0.0, 0.0] if v is None or math.isnan(v) else [float(v), 1.0] for v in values])
            better = "lower" if name == "brier_score" else "higher"
            measure = measure_of(f"{task}.{name}", unit="share", better=better)
            if stats.any():
                metrics[f"{task}.{name}"] = measured_stats(measure, stats, seed=seed)
    rows = tuple(
        RowResult(f"{task} {sample.get('doc_id', place)}", str(_prompt(sample)), str(sample.get("target", "")), ())
        for place, (task, sample) in enumerate(flat)
    )
    return metrics, rows


def _prompt(sample: Mapping[str, Any]) -> str:
    arguments = sample.get("arguments")
    try:
        first = arguments["gen_args_0"] if isinstance(arguments, Mapping) else arguments[0]  # type: ignore[index]
        return first["arg_0"] if isinstance(first, Mapping) else first[0]
    except (KeyError, IndexError, TypeError):
        return str(sample.get("doc", ""))
