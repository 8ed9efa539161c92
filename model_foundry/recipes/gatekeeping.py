"""The gate before a run: a configuration's data judged with its own renderer, and what becomes of the verdict.

`foundry data check` asks for the verdict alone; `preparation` asks with the rows and datums that it has anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from model_foundry.config.commands import RunConfig
from model_foundry.config.gate import GateSection
from model_foundry.config.schema import TrainConfig
from model_foundry.data.gate.judge import judge, make_subject
from model_foundry.data.gate.reading import Reading, read_attentively
from model_foundry.data.gate.subject import HeldOut, Subject
from model_foundry.data.gate.verdict import GatePolicy, GateReport
from model_foundry.data.rows import Row
from model_foundry.data.tokenise import TokenisedSet
from model_foundry.errors import CheckFailedError, ConfigError
from model_foundry.evals.generation import Question, read_questions
from model_foundry.models.finder import resolve_tokenizer
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message

logger = logging.getLogger(__name__)
OnProgress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    """Progress that nobody watches."""


def check_data(config: TrainConfig, *, now: datetime, on_progress: OnProgress = _silent) -> GateReport:
    """Judge a configuration's training rows, whatever is wrong with them; loads no weights.

    Args:
        on_progress: gets the rows rendered so far and all of them.

    Raises:
        ConfigError: no training rows are named. DataError: there is no such file, or what is held out cannot be read.
        ModelError, TemplateError: there is no such model, or it has no chat template.
    """
    return judge(read_subject(config, now=now, on_progress=on_progress))


def read_subject(config: TrainConfig, *, now: datetime, on_progress: OnProgress = _silent) -> Subject:
    """What the gate judges, read and rendered; arguments and errors as for `check_data`."""
    data = config.data
    if data.train_file is None:
        hint = "Name a file of rows: foundry data check FILE.jsonl"
        raise ConfigError("no training rows are named", where="data.train_file", hint=hint)
    reading = read_attentively(data.train_file, format=data.format)
    validation = None
    if data.validation_file is not None:
        validation = read_attentively(data.validation_file, format=data.format)
        validation.require()
    questions: Sequence[Question] = ()
    if config.evaluation.file is not None:
        questions = read_questions(config.evaluation.file, system=config.evaluation.system)
    tokenizer = Tokenizer.load(resolve_tokenizer(config.model.name))
    renderer = Renderer(tokenizer, config.model.template, now=now)
    return subject_of(config, reading, renderer, validation=validation, questions=questions, on_progress=on_progress)


def subject_of(
    config: TrainConfig,
    reading: Reading,
    renderer: Renderer,
    *,
    validation: Reading | None,
    questions: Sequence[Question],
    data: TokenisedSet | None = None,
    on_progress: OnProgress = _silent,
) -> Subject:
    """Rows, datums and thresholds together; `data` are the datums where they have been made already."""
    held_out = []
    if validation is not None:
        held_out.append(HeldOut("validation", str(config.data.validation_file), validation.rows.rows))
    if questions:
        rows = tuple(Row((*each.messages, Message("assistant", each.answer)), source=each.source) for each in questions)
        held_out.append(HeldOut("evaluation", str(config.evaluation.file), rows, by_question=True))
    return make_subject(
        reading,
        renderer,
        max_length=config.data.max_length,
        overlength=config.data.overlength,
        train_on=config.data.train_on,
        policy=policy_of(config.gate, allow_control_tokens=config.data.allow_control_tokens),
        held_out=tuple(held_out),
        data=data,
        on_progress=on_progress,
    )


def policy_of(gate: GateSection, *, allow_control_tokens: bool) -> GatePolicy:
    """The thresholds as the gate takes them."""
    return GatePolicy(
        min_cases=gate.min_cases,
        max_lost_share=gate.max_lost_share,
        max_duplicate_share=gate.max_duplicate_share,
        similarity=gate.similarity,
        max_overlap_share=gate.max_overlap_share,
        max_short_overlap_share=gate.max_short_overlap_share,
        max_quoted_share=gate.max_quoted_share,
        max_empty_share=gate.max_empty_share,
        max_mismatch_share=gate.max_mismatch_share,
        max_special_share=gate.max_special_share,
        max_damaged_share=gate.max_damaged_share,
        unread_fields=gate.unread_fields,
        allow_control_tokens=allow_control_tokens,
    )


def gate_facts(report: GateReport | None, config: RunConfig) -> dict[str, Any]:
    """What the gate found, for plans and reports; nothing where there are no rows to judge."""
    if report is None or not isinstance(config, TrainConfig):
        return {}
    return report.as_dict() | {"action": config.gate.action}


def enforce(report: GateReport, config: TrainConfig) -> None:
    """Let data through that passed; what did not is refused, or under `gate.action: warn` said and let through.

    Raises:
        CheckFailedError: naming each check that failed, with a row of each.
    """
    if report.passed:
        logger.info("the gate: %s checks passed", len(report.checks))
        return
    if config.gate.action == "refuse":
        failed = "".join(f"\n  {check.sentence()}" for check in report.failed)
        raise CheckFailedError(
            f"the gate refuses these rows, {len(report.failed)} of {len(report.checks)} checks failed:{failed}\n",
            where=str(config.data.train_file),
            hint="foundry data check CONFIG says all of it; gate.action=warn trains on them all the same",
        )
    for check in report.failed:
        logger.warning("the gate would refuse %s: %s", config.data.train_file, check.sentence())
