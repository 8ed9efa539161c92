"""`foundry evaluate`: suites and questions on any model, beside what it is compared with, and a verdict."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from model_foundry.config.schema import EvaluateConfig, EvaluationSection, ModelSection
from model_foundry.errors import ConfigError
from model_foundry.evals.suite import Suite, builtin_suites, questions_suite
from model_foundry.recipes.conversation import run_of, stored_section
from model_foundry.recipes.suites import (
    FOLDER,
    Assessment,
    ask_suites,
    assess,
    load_suites,
    metric_bounds,
    write_assessment,
)
from model_foundry.recipes.targets import base_of, open_target
from model_foundry.run.directory import RunDirectory
from model_foundry.run.logs import run_logging

logger = logging.getLogger(__name__)
ALL, BASE, NONE = "all", "base", "none"
MAX_NAME_CHARS = 80
TRAINING_NAMES, TRAINING_PREFIXES = ("evaluation", "before", "again", "after"), ("before-", "after-")
"""What training calls its own files in the folder."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was asked, what came of it, and the page that shows it."""

    model: str
    against: str | None
    assessment: Assessment
    page: Path

    def as_dict(self) -> dict[str, Any]:
        return {"model": self.model, "against": self.against, "page": str(self.page), **self.assessment.as_dict()}


def evaluate_model(config: EvaluateConfig) -> Evaluation:
    """Ask the model, and what it is compared with, the same suites in the same way.

    Raises:
        ConfigError: no suite or question is named, a suite is broken, or a criterion is on something not measured.
    """
    with run_logging(level="info"):
        evaluation, path = _asked(config)
        suites = _suites(evaluation, path)
        if "seed" in config.model_fields_set:
            suites = tuple(suite.seeded(config.seed) for suite in suites)
        bounds = metric_bounds(_criteria(config, suites), suites)
        against = _against(config)
        size, noise = evaluation.batch_size, evaluation.noise
        before = {}
        if against is not None:
            section, now = against
            logger.info("asking %s first, to compare with", section.name)
            before = ask_suites(
                suites, open_target(section, engine=config.engine, now=now), batch_size=size, again=noise, when="before"
            )
        target = open_target(config.model, engine=config.engine)
        after = ask_suites(suites, target, batch_size=size, again=noise and not before)
        assessment = assess(suites, after=after, before=before, bounds=bounds)
        facts = {
            "model": _without_credentials(config.model.name),
            "against": None if against is None else against[0].name,
        }
        page = write_assessment(_folder(config), facts, assessment, name=_name(config, list(after)))
    return Evaluation(facts["model"] or "", facts["against"], assessment, page)


def _asked(config: EvaluateConfig) -> tuple[EvaluationSection, Path | None]:
    """How to ask, and the questions; what is left open is taken from the run that is asked."""
    evaluation, run = config.evaluation, run_of(config.model.name)
    given = evaluation.model_fields_set
    if run is None:
        return evaluation, evaluation.file
    facts = RunDirectory.read(run).facts
    if "evaluation" not in (facts.get("config") or {}):  # pretraining asks nothing
        return evaluation, evaluation.file
    stored, started_in = stored_section(facts, "evaluation")
    own = {name: value for name, value in stored.items() if name not in given and name in type(evaluation).model_fields}
    if given & {"file", "suites"}:  # what is asked was said: nothing is added to it
        about_suites = ("suites",) if "suites" in given else ("suites", "max_rows")
        own = {name: value for name, value in own.items() if name not in ("file", *about_suites)}
    if isinstance(own.get("suites"), list):
        own["suites"] = tuple(
            str(started_in / name) if name.endswith((".yaml", ".yml")) else name for name in own["suites"]
        )
    merged = evaluation.model_copy(update=own)
    file = merged.file
    return merged, None if file is None else started_in / file if "file" in own else Path(file)


def _criteria(config: EvaluateConfig, suites: Sequence[Suite]) -> dict[str, str]:
    """The bounds that were given, else those of the run's own criteria on what is asked."""
    run, metrics = run_of(config.model.name), config.criteria.metrics
    if run is None or "metrics" in config.criteria.model_fields_set:
        return metrics
    stored = (RunDirectory.read(run).facts.get("config") or {}).get("criteria") or {}
    own: dict[str, str] = stored.get("metrics") or {}
    kept = {title: text for title, text in own.items() if any(_measures(suite, title) for suite in suites)}
    if left := own.keys() - kept.keys():
        logger.info("the run's criteria on what is not asked now are left out: %s", ", ".join(sorted(left)))
    return kept


def _measures(suite: Suite, title: str) -> bool:
    name = title.removeprefix(f"{suite.name}.")
    return name != title and (suite.kind == "harness" or name in suite.metrics)


def _suites(evaluation: EvaluationSection, file: Path | None) -> tuple[Suite, ...]:
    names: Sequence[str] = evaluation.suites
    if file is not None and "suites" not in evaluation.model_fields_set:
        names = ()  # questions alone were asked for
    if ALL in names:
        names = [*dict.fromkeys([*(each for each in names if each != ALL), *builtin_suites()])]
    suites = load_suites(names, max_rows=evaluation.max_rows, with_questions=file is not None)
    if file is not None:
        own = questions_suite(file, system=evaluation.system, max_new_tokens=evaluation.max_new_tokens)
        suites = (own, *suites)
    if not suites:
        hint = f"Name suites (--suite NAME: {', '.join(builtin_suites())}, all), or evaluation.file=FILE.jsonl."
        raise ConfigError("nothing is asked", where="evaluation.suites", hint=hint)
    return suites


def _against(config: EvaluateConfig) -> tuple[ModelSection, datetime | None] | None:
    """What the model is compared with, loaded as the model itself is, and the date that its template saw."""
    if config.against == NONE:
        return None
    if config.against == BASE:
        return base_of(config.model)
    return config.model.model_copy(update={"name": config.against}), None


def _folder(config: EvaluateConfig) -> Path:
    """Where the page goes: a run's own folder, or one in it for each of its checkpoints and adapters."""
    if config.out is not None:
        return config.out
    run, name = run_of(config.model.name), config.model.name
    if run is None:
        return Path("runs") / FOLDER / _as_name(name)
    inside = Path(name).expanduser().absolute().relative_to(run.absolute())
    return run / FOLDER if inside == Path() else run / FOLDER / _as_name(str(inside))


def _name(config: EvaluateConfig, suites: Sequence[str]) -> str:
    """Of the page: another evaluation must not take the place of this one, nor of what training left."""
    if config.out is not None:
        return "evaluation"
    name = "+".join(suites)
    if name in TRAINING_NAMES or name.startswith(TRAINING_PREFIXES):
        name = f"suite-{name}"
    if config.against != BASE:
        name += f"-against-{_as_name(config.against)}"
    if len(name) > MAX_NAME_CHARS:
        name = f"{name[: MAX_NAME_CHARS - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _as_name(text: str) -> str:
    """Part of a file's name; where more than separators had to go, with a hash, or 模型甲 and 模型乙 were one."""
    plain = _without_credentials(text)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-.") or "model"
    if re.fullmatch(r"[A-Za-z0-9._:/\\#-]*", plain):
        return name
    return f"{name}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def _without_credentials(name: str) -> str:
    """An address may carry a name and a password, which belong into no page."""
    return re.sub(r"(?<=://)[^/@]*@", "", name)
