"""What a suite found out about a model, and how that is kept: values with intervals, rows with answers and scores.

A result keeps each row's statistics, so that two of the same suite can be compared later, row by row.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from model_foundry.errors import DataError
from model_foundry.evals.kinds import ASK, Asking, Outcome, Shown, finite
from model_foundry.evals.measures import Measured, measure_of, measured, measured_stats
from model_foundry.evals.suite import Suite
from model_foundry.evals.suite_rows import SuiteRow
from model_foundry.evals.targets import Target

FORMAT = 1


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row as people read it."""

    source: str
    prompt: str
    expected: str
    shown: Shown

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source, "prompt": self.prompt, "expected": self.expected,
            "answers": [{"what": what, "text": text} for what, text in self.shown],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """A suite's measurements on one target.

    Attributes:
        digest: of what was asked; only results of one digest can be compared.
        metrics: by name.
        missing: what was to be measured and could not be, each with the reason.
        noise: how far each metric moved when all was asked again, in other batches; {} where that was not done.
        seed: of the resampling.
    """

    suite: str
    kind: str
    digest: str
    target: Mapping[str, Any]
    metrics: Mapping[str, Measured]
    rows: tuple[RowResult, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)
    num_left_out: int = 0
    seconds: float = 0.0
    about: str = ""
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "suite": self.suite,
            "kind": self.kind,
            "about": self.about,
            "digest": self.digest,
            "target": dict(self.target),
            "metrics": {name: each.as_dict() for name, each in self.metrics.items()},
            "missing": dict(self.missing),
            "noise": dict(self.noise),
            "num_rows": len(self.rows),
            "num_left_out": self.num_left_out,
            "seconds": self.seconds,
            "seed": self.seed,
            "rows": [
                {**row.as_dict(), "scores": scores} for row, scores in zip(self.rows, self.row_scores(), strict=True)
            ],
        }

    def row_scores(self) -> list[dict[str, float | None]]:
        columns = {name: each.row_values() for name, each in self.metrics.items()}
        return [{name: values[place] for name, values in columns.items()} for place in range(len(self.rows))]


def run_suite(suite: Suite, target: Target, *, asking: Asking, again: bool = False) -> SuiteResult:
    """Ask a suite.

    Args:
        again: ask it twice, to see how far the metrics move by themselves.

    Raises:
        FoundryError: the target fails, a row does not fit its context, or what a metric needs is not installed.
    """
    started = time.perf_counter()
    outcome = finite(ASK[suite.kind](suite, target, asking), where=f"suite {suite.name}")
    metrics = _metrics(outcome, seed=suite.decoding.seed)
    noise: dict[str, float] = {}
    if again and suite.generates:
        second = ASK[suite.kind](suite, target, Asking(asking.batch_size, again=True, on_progress=asking.on_progress))
        repeated = _metrics(second, seed=suite.decoding.seed)
        noise = {name: abs(repeated[name].value - each.value) for name, each in metrics.items()}
        noise = {name: value for name, value in noise.items() if np.isfinite(value)}
    rows = outcome.rows if outcome.rows is not None else suite.rows
    return SuiteResult(
        suite=suite.name,
        kind=suite.kind,
        digest=suite.digest,
        target=target.describe(),
        metrics=metrics,
        rows=tuple(_row(row, shown) for row, shown in zip(rows, outcome.shown, strict=True)),
        missing=outcome.missing,
        noise=noise,
        num_left_out=suite.num_left_out + outcome.num_left_out,
        seconds=time.perf_counter() - started,
        about=suite.about,
        seed=suite.decoding.seed,
    )


def read_result(values: Any, *, where: str) -> SuiteResult:
    """A result as `as_dict` wrote it.

    Raises:
        DataError: it is none.
    """
    try:
        seed = int(values.get("seed", 0))
        metrics = {
            str(name): measured_stats(
                measure_of(str(name), unit=str(each["unit"]), better=str(each["better"])),
                np.array(each["stats"], dtype=np.float64),
                seed=seed,
            )
            for name, each in values["metrics"].items()
        }
        rows = tuple(
            RowResult(
                str(row["source"]), str(row["prompt"]), str(row["expected"]),
                tuple((str(each["what"]), str(each["text"])) for each in row["answers"]),
            )
            for row in values["rows"]
        )  # fmt: skip
        if values["format"] != FORMAT or any(len(each.stats) != len(rows) for each in metrics.values()):
            raise ValueError("another format")
        return SuiteResult(
            suite=str(values["suite"]), kind=str(values["kind"]), digest=str(values["digest"]),
            target=dict(values["target"]), metrics=metrics, rows=rows, missing=dict(values["missing"]),
            noise=dict(values["noise"]), num_left_out=int(values["num_left_out"]),
            seconds=float(values["seconds"]), about=str(values["about"]), seed=seed,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        hint = "Evaluate again: foundry evaluate"
        raise DataError(f"is no result of a suite ({error!r})", where=where, hint=hint) from error


def _metrics(outcome: Outcome, *, seed: int) -> dict[str, Measured]:
    return {name: measured(name, rows, seed=seed) for name, rows in outcome.stats.items()}


def _row(row: SuiteRow, shown: Shown) -> RowResult:
    return RowResult(row.source, row.prompt, " / ".join(row.wanted.answers), shown)
