"""What a run says of itself at its end: answers to held-out questions, checks, and the report they go into."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch

from model_foundry.checkpoint.atomic import atomic_write
from model_foundry.config.schema import TrainConfig
from model_foundry.errors import FoundryError
from model_foundry.evals.before_after import Comparison, compare
from model_foundry.evals.generation import answer_questions
from model_foundry.evals.kinds import other_batch_size
from model_foundry.recipes import proof
from model_foundry.recipes.gatekeeping import gate_facts
from model_foundry.recipes.session import Session
from model_foundry.recipes.work import Work
from model_foundry.run.directory import RunDirectory
from model_foundry.run.report import Report
from model_foundry.run.spikes import find_spikes, losses_of
from model_foundry.types import Check

logger = logging.getLogger(__name__)
MAX_SPIKES_NAMED = 8
_WHEN = {"before": "before training", "again": "once more, to see the noise", "after": "after training"}


def held_out_answers(run: RunDirectory, session: Session, when: str, *, reuse: bool) -> list[str]:
    """Greedy answers to the held-out questions, kept in the run's folder.

    Args:
        when: before, after, or again: before training once more, in batches composed otherwise.
    """
    work = session.work
    if not work.questions or not isinstance(work.config, TrainConfig):
        return []
    path = run.path / "evaluation" / f"{when}.json"
    if reuse and path.is_file():
        return list(json.loads(path.read_text()))
    evaluation = work.config.evaluation
    logger.info("asking %s held-out questions %s", len(work.questions), _WHEN[when])
    batch_size = other_batch_size(evaluation.batch_size) if when == "again" else evaluation.batch_size
    answers = answer_questions(
        work.questions,
        lambda prompts, params: session.client.sample(prompts, params).result(),
        work.renderer,
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=batch_size,
    )
    texts = [answer.text for answer in answers]
    try:
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, json.dumps(texts, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        hint = f"What was trained is saved; when there is room: foundry resume {run.path}"
        raise FoundryError(f"cannot be written ({error.strerror or error})", where=str(path), hint=hint) from error
    return texts


def compared(work: Work, before: list[str], after: list[str], *, again: list[str]) -> Comparison | None:
    """Before and after, with the noise of a second decoding where there was one."""
    if not work.questions:
        return None
    return compare(
        [question.prompt for question in work.questions],
        expected=[question.answer for question in work.questions],
        before=before,
        after=after,
        repeats=[again] if again else (),
        sources=[question.source for question in work.questions],
        seed=work.config.seed,
    )


def prove(
    run: RunDirectory,
    session: Session,
    start: Mapping[str, torch.Tensor],
    comparison: Comparison | None,
    bits: Mapping[str, float],
    records: list[dict[str, Any]],
) -> tuple[tuple[Check, ...], dict[str, Any]]:
    """Every check that the criteria ask for."""
    work, engine, model_id = session.work, session.engine, session.model_id
    end = engine.trained_tensors(model_id)
    memory, peaks = proof.memory_check(work, engine, model_id)
    final = run.checkpoints.open("final")
    checks = (
        proof.loss_check(work, records),
        *proof.text_checks(work, bits),
        proof.pairs_check(work, records),
        proof.answers_check(work, comparison),
        memory,
        proof.parameters_check(work, start, end) if start else None,
        proof.artefacts_check(work, engine, model_id, final.path, work.probe()),
        proof.replay_check(work, engine, run, proof.everything(engine, model_id)),
    )
    return tuple(check for check in checks if check is not None), peaks


def make_report(
    run: RunDirectory,
    session: Session,
    comparison: Comparison | None,
    bits: Mapping[str, float],
    checks: tuple[Check, ...],
    memory: dict[str, Any],
    records: list[dict[str, Any]],
) -> Report:
    work, facts = session.work, run.facts
    steps = [record for record in records if record["kind"] == "step"]
    seconds = sum(record["clock"]["seconds"] for record in steps)
    predicted = None if session.memory is None else session.memory.as_dict()
    return Report(
        run_id=run.run_id,
        checks=checks,
        training={
            "model": work.source.name,
            "method": work.config.method,
            "steps": work.total_steps,
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "seconds": seconds,
            "tokens": sum(record["tokens"] for record in steps),
            "tokens_per_second": sum(record["tokens"] for record in steps) / seconds,
            "skipped_steps": sum(record["skipped"] for record in steps),
            "trained_parameters": session.plan["trained_parameters"],
            "base_parameters": session.plan["base_parameters"],
        },
        evaluation={} if comparison is None else comparison.as_dict(),
        text=_text_facts(work, bits),
        data=work.data_summary(),
        gate=gate_facts(work.gate, work.config),
        memory=memory | ({} if predicted is None else {"predicted_bytes": predicted.pop("total"), "parts": predicted}),
        reproduce={
            "commands": [f"foundry verify run {run.path}", *_next_commands(work, run)],
            "config_digest": facts["config_digest"],
            "seed": work.config.seed,
            "code_sha256": facts["receipt"]["code"]["sha256"],
            "model_fingerprint": work.model_fingerprint,
            "renderer": work.renderer.name,
        },
        machine=facts["receipt"]["machine"],
        notes=_notes(facts, session, steps),
    )


def _text_facts(work: Work, bits: Mapping[str, float]) -> dict[str, Any]:
    if work.held_out is None or not bits:
        return {}
    return {"bits_per_byte": dict(bits), "bytes": work.held_out.num_bytes}


def _next_commands(work: Work, run: RunDirectory) -> list[str]:
    if isinstance(work.config, TrainConfig):
        return [f"foundry chat {run.path}"]
    return [f"foundry train model.name={run.path} data.train_file=chats.jsonl lora.enabled=false run_dir=runs/chat"]


def _notes(facts: Mapping[str, Any], session: Session, steps: list[dict[str, Any]]) -> tuple[str, ...]:
    num_skipped, config = sum(step["skipped"] for step in steps), session.work.config
    notes = [f"Resumed from step {each['from_step']}." for each in facts.get("resumed", [])]
    if isinstance(config, TrainConfig) and (unmeasured := config.unmeasured_criteria()):
        named = ", ".join(f"{name} (needs {needed})" for name, needed in unmeasured.items())
        notes.append(f"Not checked, for nothing in this run measures it: {named}.")
    gate = session.work.gate
    if gate is not None and gate.failed:
        failed = ", ".join(check.name for check in gate.failed)
        notes.append(f"The gate would refuse the training rows ({failed}); gate.action=warn let them in.")
    if num_skipped:
        notes.append(f"{num_skipped} steps were skipped: their gradients were not finite.")
    if spikes := find_spikes(losses_of(steps)):
        named = ", ".join(map(str, spikes[:MAX_SPIKES_NAMED])) + (", …" if len(spikes) > MAX_SPIKES_NAMED else "")
        notes.append(f"The loss spiked at {len(spikes)} of {len(steps)} steps: {named}.")
    if shared := session.work.data_summary().get("validation", {}).get("trained_on_too"):
        notes.append(f"{shared:,} held-out documents are trained on too: what is measured on them is memory.")
    if session.trial.num_pieces > 1:
        notes.append(f"Memory was short: the longest batch is computed in {session.trial.num_pieces} pieces.")
    return tuple(notes)
