"""The gate itself: rows, renderer and thresholds in, every check's verdict out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from model_foundry.data.gate import row_checks, set_checks, token_checks
from model_foundry.data.gate.reading import Reading
from model_foundry.data.gate.subject import HeldOut, Subject, with_answers
from model_foundry.data.gate.verdict import GateCheck, GatePolicy, GateReport
from model_foundry.data.tokenise import Overlength, TokenisedSet, TrainOn, attempt_rows
from model_foundry.rendering import Renderer

CHECKS: dict[str, Callable[[Subject], GateCheck]] = {
    "rows_readable": row_checks.rows_readable,
    "roles_known": row_checks.roles_known,
    "fields_read": row_checks.fields_read,
    "text_intact": row_checks.text_intact,
    "template_accepts": row_checks.template_accepts,
    "turns_filled": row_checks.turns_filled,
    "answers_differ": row_checks.answers_differ,
    "answers_trained": token_checks.answers_trained,
    "prompts_untrained": token_checks.prompts_untrained,
    "end_of_turn_trained": token_checks.end_of_turn_trained,
    "trained_as_generated": token_checks.trained_as_generated,
    "bos_not_doubled": token_checks.bos_not_doubled,
    "end_not_doubled": token_checks.end_not_doubled,
    "control_tokens": token_checks.control_tokens,
    "rows_kept": token_checks.rows_kept,
    "duplicates": set_checks.duplicates,
    "apart_from_validation": set_checks.apart_from("validation"),
    "apart_from_evaluation": set_checks.apart_from("evaluation"),
}
"""Every check by name, in the order of the report."""


def make_subject(
    reading: Reading,
    renderer: Renderer,
    *,
    max_length: int,
    overlength: Overlength = "drop",
    train_on: TrainOn = "assistant",
    policy: GatePolicy | None = None,
    held_out: tuple[HeldOut, ...] = (),
    data: TokenisedSet | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Subject:
    """Render what was read, unless `data` holds it already, rendered with the same settings.

    Args:
        on_progress: as for `attempt_rows`.

    Raises:
        TemplateError: there is no template for conversations, or one that does what it must not.
    """
    rendered = with_answers(reading.rows)
    problems = ()
    if data is None:
        data, problems = attempt_rows(
            rendered, renderer, max_length=max_length, overlength=overlength, train_on=train_on,
            on_progress=on_progress,
        )  # fmt: skip
    for row in reading.rows.rows:
        if row.tools or any(turn.extra for turn in (*row.messages, *row.chosen, *row.rejected)):
            reading.unread.look_at_turns(row, template=renderer.template_text)
    return Subject(
        reading=reading,
        rendered=rendered,
        data=data,
        problems=problems,
        renderer=renderer,
        train_on=train_on,
        max_length=max_length,
        policy=policy or GatePolicy(),
        held_out=held_out,
    )


def judge(subject: Subject) -> GateReport:
    """Run every check."""
    return GateReport(tuple(check(subject) for check in CHECKS.values()), {**subject.reading.facts, **_facts(subject)})


def _facts(subject: Subject) -> dict[str, Any]:
    data = subject.data
    return {
        "rows": subject.reading.num_records,
        "rendered": len(subject.rendered.rows),
        "trained_rows": len(data.datums),
        "tokens": data.num_tokens,
        "trained_tokens": data.num_trained_tokens,
        "template": subject.renderer.name,
        "train_on": subject.train_on,
        "max_length": subject.max_length,
    }
