"""Suites before and after training, and of one model against another: asked, kept, compared, judged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from model_foundry.checkpoint.atomic import atomic_write
from model_foundry.errors import ConfigError, DataError, FoundryError
from model_foundry.evals.bounds import Bound, parse_bound
from model_foundry.evals.gguf_target import GgufTarget
from model_foundry.evals.harness import run_harness
from model_foundry.evals.kinds import Asking
from model_foundry.evals.measures import MEASURES
from model_foundry.evals.page import render_evaluation
from model_foundry.evals.rehearsal import Asked, rehearse
from model_foundry.evals.results import SuiteResult, read_result, run_suite
from model_foundry.evals.suite import QUESTIONS, Suite, load_suite
from model_foundry.evals.targets import EngineTarget, OnProgress, Target
from model_foundry.evals.verdict import Change, Verdict, changes, guard_check, judge, threshold_checks
from model_foundry.rendering import Renderer
from model_foundry.run.progress import open_progress
from model_foundry.types import Check

logger = logging.getLogger(__name__)
FOLDER = "evaluation"


def load_suites(names: Sequence[str], *, max_rows: int | None, with_questions: bool = False) -> tuple[Suite, ...]:
    """The suites by name or path, each with its first `max_rows` rows.

    Args:
        with_questions: the questions of `evaluation.file` are asked as well, as a suite of that name.

    Raises:
        ConfigError: there is no such suite, one is broken, two have one name, or `max_rows` has nothing to cut.
        DataError: rows cannot be used.
    """
    if max_rows is not None and not names:
        hint = "Name suites (evaluation.suites), or leave it out: the questions of evaluation.file are all asked."
        raise ConfigError("cuts suites, and none is asked", where="evaluation.max_rows", hint=hint)
    suites = tuple(load_suite(name).limited(max_rows) for name in names)
    twice = sorted({suite.name for suite in suites if sum(other.name == suite.name for other in suites) > 1})
    if twice:
        raise ConfigError(f"two suites are called {twice[0]}", where="evaluation.suites", hint="Rename one's file.")
    if with_questions and any(suite.name == QUESTIONS for suite in suites):
        what = f"a suite is called {QUESTIONS}, and so are those of evaluation.file"
        raise ConfigError(what, where="evaluation.suites", hint="Rename the suite's file.")
    return suites


def metric_bounds(metrics: Mapping[str, str], suites: Sequence[Suite]) -> dict[str, dict[str, Bound]]:
    """`criteria.metrics` by suite.

    Raises:
        ConfigError: a metric that no suite measures, or a bound that cannot be read.
    """
    known = {f"{suite.name}.{name}": name for suite in suites for name in suite.metrics}
    harness = {suite.name for suite in suites if suite.kind == "harness"}
    bounds: dict[str, dict[str, Bound]] = {}
    for title, text in metrics.items():
        # A suite's name may have dots itself.
        suite = max((each.name for each in suites if title.startswith(f"{each.name}.")), key=len, default="")
        name = title[len(suite) + 1 :]
        where = f"criteria.metrics.{title}"
        if title not in known and suite not in harness:
            listed = ", ".join(known) or "none, because no suite is asked (evaluation.suites)"
            raise ConfigError(f"no suite that is asked measures {title}", where=where, hint=f"Measured: {listed}.")
        unit, span = (MEASURES[name].unit, MEASURES[name].span) if name in MEASURES else ("share", None)
        bounds.setdefault(suite, {})[name] = parse_bound(text, unit=unit, where=where, span=span)
    return bounds


@dataclass(frozen=True, slots=True)
class Assessment:
    """Suites on one model, beside what they were on another, what changed, and the checks that follow."""

    after: Mapping[str, SuiteResult]
    before: Mapping[str, SuiteResult]
    changes: Mapping[str, Mapping[str, Change]]
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        return judge(self.checks)

    def as_dict(self) -> dict[str, Any]:
        found = self.changes
        suites = {
            name: {
                "after": result.as_dict(),
                "before": self.before[name].as_dict() if name in self.before else None,
                "changes": {metric: change.as_dict() for metric, change in found.get(name, {}).items()},
                "row_changes": {metric: list(change.rows) for metric, change in found.get(name, {}).items()},
            }
            for name, result in self.after.items()
        }
        return {
            "ship": self.verdict.ship,
            "verdict": self.verdict.text,
            "reasons": list(self.verdict.reasons),
            "checks": [check.as_dict() for check in self.checks],
            "suites": suites,
        }


def assess(
    suites: Sequence[Suite],
    *,
    after: Mapping[str, SuiteResult],
    before: Mapping[str, SuiteResult],
    bounds: Mapping[str, Mapping[str, Bound]],
    further: Sequence[Check] = (),
) -> Assessment:
    """Every bound of the suites and of the criteria on what is after, and that nothing guarded fell behind."""
    checks, found = list(further), changed(before, after)
    for suite in suites:
        result = after[suite.name]
        checks += threshold_checks(suite.name, dict(suite.thresholds) | dict(bounds.get(suite.name, {})), result)
        if suite.name in found:
            reasons = {**before[suite.name].missing, **result.missing}
            check = guard_check(suite.name, suite.guard, found[suite.name], reasons=reasons)
            checks += [] if check is None else [check]
    for name in bounds.keys() - {suite.name for suite in suites}:  # a run's own questions
        checks += threshold_checks(name, bounds[name], after[name])
    return Assessment(after, before, found, tuple(checks))


def changed(before: Mapping[str, SuiteResult], after: Mapping[str, SuiteResult]) -> dict[str, Mapping[str, Change]]:
    """What differs in each suite that both have."""
    return {name: changes(before[name], result) for name, result in after.items() if name in before}


def ask_suites(
    suites: Sequence[Suite], target: Target, *, batch_size: int, again: bool, when: str = ""
) -> dict[str, SuiteResult]:
    """Each suite's result on a target, with progress; none is asked where one cannot be."""
    if isinstance(target, EngineTarget | GgufTarget):
        rehearse_suites(suites, target.renderer, context=target.context, batch_size=batch_size)
    return {suite.name: ask_suite(suite, target, batch_size=batch_size, again=again, when=when) for suite in suites}


def rehearse_suites(suites: Sequence[Suite], renderer: Renderer, *, context: int | None, batch_size: int) -> Asked:
    """What is held at once when they are asked.

    Raises:
        FoundryError: one of them cannot be; see `rehearsal.rehearse`.
    """
    asked = Asked()
    for suite in suites:
        with _placed(suite):
            asked = asked.or_more(rehearse(suite, renderer, context=context, batch_size=batch_size))
    return asked


@contextmanager
def _placed(suite: Suite) -> Iterator[None]:
    """Errors that say where they are from: the suite."""
    try:
        yield
    except DataError as error:
        raise type(error)(error.what, where=error.where or f"suite {suite.name}", hint=error.hint) from error


def ask_suite(suite: Suite, target: Target, *, batch_size: int, again: bool, when: str = "") -> SuiteResult:
    left_out = f", {suite.num_left_out} left out" if suite.num_left_out else ""
    size = f"{len(suite.rows)} rows{left_out}" if suite.kind not in ("text", "harness") else suite.kind
    logger.info("suite %s%s: %s (%s)", suite.name, f" {when}" if when else "", suite.about or suite.kind, size)
    with _placed(suite):
        if suite.kind == "harness":
            return run_harness(suite, target, batch_size=batch_size)
        with _shown(suite.name) as on_progress:
            result = run_suite(suite, target, asking=Asking(batch_size, on_progress=on_progress), again=again)
    if result.num_left_out > suite.num_left_out:
        logger.info("suite %s: %s further windows of the text are left out", suite.name, f"{result.num_left_out:,}")
    return result


@contextmanager
def _shown(name: str) -> Iterator[OnProgress]:
    """A bar or lines; a suite that asks several times begins a new count each time."""
    started = perf_counter()
    with open_progress() as progress:
        begun = False

        def show(done: int, num_tokens: int, total: int) -> None:
            nonlocal begun, started
            if not begun:
                progress.start(total, name)
                begun, started = True, perf_counter() if done == 0 else started
            progress.advance(done, tokens_per_second=num_tokens / max(1e-6, perf_counter() - started))
            if done >= total:
                begun, started = False, perf_counter()

        yield show


def kept_result(path: Path, suite: Suite) -> SuiteResult | None:
    """A result that was kept in a file, where it is of this very suite."""
    if not path.is_file():
        return None
    try:
        result = read_result(json.loads(path.read_bytes()), where=str(path))
    except (ValueError, DataError) as error:
        logger.warning("%s is asked again: %s", suite.name, error)
        return None
    has_all = set(suite.metrics) <= {*result.metrics, *result.missing}
    return result if result.digest == suite.digest and has_all else None


def keep_result(path: Path, result: SuiteResult) -> None:
    write_json(path, result.as_dict())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Raises: FoundryError: the disk does not take it."""
    write_text(path, json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise FoundryError(f"cannot be written ({error.strerror or error})", where=str(path)) from error


def write_assessment(
    folder: Path, facts: Mapping[str, Any], assessment: Assessment, *, name: str = "evaluation"
) -> Path:
    """NAME.json and, made from it, NAME.html; the page's path."""
    values = {**facts, **assessment.as_dict()}
    write_json(folder / f"{name}.json", values)
    page = folder / f"{name}.html"
    write_text(page, render_evaluation(values))
    return page
