"""One training run from its configuration to its report: the order in which everything else is called."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import torch

from model_foundry.checkpoint.atomic import atomic_write
from model_foundry.client.local import TrainingClient
from model_foundry.config.load import config_digest, dump_yaml
from model_foundry.config.schema import TrainConfig
from model_foundry.engine.platform import resident_memory_bytes
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import FoundryError, InterruptedRunError, RunError
from model_foundry.evals.before_after import Comparison, compare
from model_foundry.evals.generation import answer_questions
from model_foundry.models.memory import MemoryEstimate
from model_foundry.recipes import proof, sft
from model_foundry.recipes.plan import Trial, plan_facts, plan_text, predict_memory, try_longest_batch
from model_foundry.recipes.preparation import Prepared, prepare, require_same_data
from model_foundry.recipes.saving import RunSaver, load_checkpoint
from model_foundry.run.directory import RunDirectory, is_run, utc_now
from model_foundry.run.logs import run_logging
from model_foundry.run.metrics import MetricsLog
from model_foundry.run.progress import open_progress
from model_foundry.run.receipts import receipt
from model_foundry.run.report import Report, write_report
from model_foundry.run.trackers import Trackers, open_trackers
from model_foundry.types import Check

logger = logging.getLogger(__name__)

Resume = Literal["never", "auto", "must"]


@dataclass(slots=True)
class _Session:
    """What is open while a run is under way."""

    prepared: Prepared
    engine: TorchEngine
    model_id: str
    process_bytes: int
    memory: MemoryEstimate | None
    trial: Trial
    plan: dict[str, Any]

    @property
    def client(self) -> TrainingClient:
        return TrainingClient(self.engine, self.model_id)


@dataclass(slots=True)
class _Recorder:
    """Sends the loop's records to metrics.jsonl and the trackers, and its saves to the disk."""

    metrics: MetricsLog
    trackers: Trackers
    saver: RunSaver

    def append(self, record: dict[str, Any]) -> None:
        self.metrics.append(record)
        self.trackers.log(record)

    def save(self, step: int) -> None:
        self.metrics.sync()
        self.saver.save(step)

    def before_update(self) -> None:
        self.saver.before_update()


def plan_run(config: TrainConfig) -> dict[str, Any]:
    """The plan of `--dry-run`: reads the data, loads the model, tries the longest batch, writes nothing."""
    with run_logging(level=config.logging.level):
        return _open_session(prepare(config, now=utc_now())).plan


def run_training(config: TrainConfig, *, resume: Resume = "never", now: datetime | None = None) -> Report:
    """Train, prove and report.

    Args:
        now: the date that a chat template may print; default today. A resumed run keeps its own.
        resume: `auto` goes on with the run in run_dir if there is one; `must` requires one.

    Raises:
        RunError: the directory holds another run, or none. InterruptedRunError: stopped by a signal, after saving.
    """
    exists = is_run(config.run_dir)
    if resume == "must" and not exists:
        raise RunError("holds no run to resume", where=str(config.run_dir), hint="Start it with: foundry train CONFIG")
    if exists and resume == "never":
        raise RunError(
            "already holds a run",
            where=str(config.run_dir),
            hint="Go on with it: --resume auto; or start another: run_dir=…",
        )
    digest, text = config_digest(config), dump_yaml(config)
    if exists:
        with RunDirectory.open(config.run_dir) as run:
            run.require_config(digest, text)
            return _in_run(run, config, digest, resumed=True)
    with run_logging(level=config.logging.level):
        prepared = prepare(config, now=now or utc_now())
        start = _receipt(prepared, digest)
    with RunDirectory.create(config.run_dir, config_yaml=text, digest=digest, receipt=start) as run:
        run.record(config=config.model_dump(mode="json"), now=prepared.now.isoformat(), renderer=prepared.renderer.name)
        return _in_run(run, config, digest, resumed=False, prepared=prepared)


def _in_run(
    run: RunDirectory, config: TrainConfig, digest: str, *, resumed: bool, prepared: Prepared | None = None
) -> Report:
    with run_logging(run.log_path, level=config.logging.level):
        try:
            if prepared is None:
                prepared = prepare(config, now=datetime.fromisoformat(run.facts["now"]))
                require_same_data(run.facts["receipt"], _receipt(prepared, digest), where=str(run.path))
            report = _train_and_prove(run, prepared, digest, resumed=resumed)
        except InterruptedRunError as error:
            run.record_outcome("interrupted", message=str(error))
            raise
        except KeyboardInterrupt:
            run.record_outcome("interrupted", message="Ctrl-C twice; the step under way is lost")
            raise
        except FoundryError as error:
            logger.error("%s", error)
            run.record_outcome("failed", message=str(error))
            raise
        run.record_outcome("finished")
        return report


def _train_and_prove(run: RunDirectory, prepared: Prepared, digest: str, *, resumed: bool) -> Report:
    with sft.stop_on_signals() as stop, run.open_metrics() as metrics:
        session = _open_session(prepared)
        engine, model_id = session.engine, session.model_id
        run.record(total_steps=prepared.total_steps)
        logger.info("the plan:\n%s", plan_text(session.plan))
        start_tensors = _copied(engine.trained_tensors(model_id)) if prepared.lora is not None else {}
        before = _answers(run, session, "before", reuse=True)
        done = _restore(run, session, metrics, digest) if resumed else 0
        if done < prepared.total_steps:
            with _open_trackers(run, prepared, resume_step=done if resumed else None) as trackers:
                _train(run, session, metrics, trackers, stop, first_step=done + 1)
        peak_bytes = engine.peak_memory_bytes()
        after = _answers(run, session, "after", reuse=False)
        comparison = _compare(prepared, before, after)
        checks, memory = _prove(run, session, start_tensors, comparison, metrics.read())
        report = _report(run, session, comparison, checks, memory | {"measured_bytes": peak_bytes}, metrics.read())
        page = write_report(run.path, report)
        logger.info("report: %s", page)
        return report


def _open_trackers(run: RunDirectory, prepared: Prepared, *, resume_step: int | None) -> Trackers:
    config = prepared.config
    return open_trackers(
        config.logging.report_to,
        run_dir=run.path,
        project=config.logging.project,
        run_id=run.run_id,
        config=config.model_dump(mode="json"),
        resume_step=resume_step,
    )


def _train(
    run: RunDirectory,
    session: _Session,
    metrics: MetricsLog,
    trackers: Trackers,
    stop: Callable[[], bool],
    *,
    first_step: int,
) -> None:
    prepared = session.prepared
    saver = RunSaver(run, session.engine, session.model_id, prepared)
    recorder = _Recorder(metrics, trackers, saver)
    with saver.saver, open_progress(log_steps=prepared.config.logging.log_steps) as progress:
        progress.start(prepared.total_steps, "train", done_steps=first_step - 1)
        sft.train(
            session.client,
            prepared,
            recorder,
            progress,
            first_step=first_step,
            stop=stop,
            memory_bytes=resident_memory_bytes,
        )
        metrics.sync()
        saver.save(prepared.total_steps, final=True)


def _open_session(prepared: Prepared) -> _Session:
    """Load the model and try the longest batch on it."""
    config = prepared.config
    engine = TorchEngine(
        device=config.model.device,
        dtype=config.model.dtype,
        num_threads=config.training.num_threads,
        micro_batch_tokens=config.training.micro_batch_tokens,
        implementation=config.model.implementation,
        gradient_checkpointing=config.training.gradient_checkpointing,
    )
    process_bytes = resident_memory_bytes()
    base_name = config.model.name if prepared.source.adapter is None else str(prepared.source.folder)
    model_id = engine.create_model(
        prepared.source.folder,
        lora=prepared.lora,
        seed=config.seed,
        adapter=prepared.source.adapter,
        base_name=base_name,
    )
    memory = predict_memory(prepared, engine, process_bytes=process_bytes)
    trial = try_longest_batch(engine, model_id, prepared)
    if trial.num_pieces > 1:
        logger.warning("the longest batch is computed in %s pieces to fit the memory", trial.num_pieces)
    plan = plan_facts(prepared, engine.describe(model_id), trial, memory)
    return _Session(prepared, engine, model_id, process_bytes, memory, trial, plan)


def _restore(run: RunDirectory, session: _Session, metrics: MetricsLog, digest: str) -> int:
    """Load the newest checkpoint that verifies; the step it stands at, 0 when there is none."""
    prepared = session.prepared
    checkpoint = run.checkpoints.newest_valid(lambda sentence: logger.warning("%s; taking the one before it", sentence))
    step = 0
    if checkpoint is not None:
        step = load_checkpoint(checkpoint, session.engine, session.model_id, prepared, logger.warning)
        logger.info("resuming from %s, step %s of %s", checkpoint.name, step, prepared.total_steps)
    else:
        logger.info("no checkpoint yet: starting from step 1")
    metrics.truncate_after(step if checkpoint is not None else -1)
    run.record_resume(_receipt(prepared, digest), from_step=step)
    return step


def _answers(run: RunDirectory, session: _Session, when: str, *, reuse: bool) -> list[str]:
    """Greedy answers to the held-out questions, kept in the run's folder."""
    prepared = session.prepared
    if not prepared.questions:
        return []
    path = run.path / "evaluation" / f"{when}.json"
    if reuse and path.is_file():
        return list(json.loads(path.read_text()))
    evaluation = prepared.config.evaluation
    logger.info("asking %s held-out questions %s training", len(prepared.questions), when)
    answers = answer_questions(
        prepared.questions,
        lambda prompts, params: session.client.sample(prompts, params).result(),
        prepared.renderer,
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
    )
    texts = [answer.text for answer in answers]
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, json.dumps(texts, ensure_ascii=False, indent=1) + "\n")
    return texts


def _compare(prepared: Prepared, before: list[str], after: list[str]) -> Comparison | None:
    if not prepared.questions:
        return None
    return compare(
        [question.prompt for question in prepared.questions],
        expected=[question.answer for question in prepared.questions],
        before=before,
        after=after,
        sources=[question.source for question in prepared.questions],
        seed=prepared.config.seed,
    )


def _prove(
    run: RunDirectory,
    session: _Session,
    start: Mapping[str, torch.Tensor],
    comparison: Comparison | None,
    records: list[dict[str, Any]],
) -> tuple[tuple[Check, ...], dict[str, Any]]:
    """Every check that the criteria ask for."""
    prepared, engine, model_id = session.prepared, session.engine, session.model_id
    end = engine.trained_tensors(model_id)
    memory, peaks = proof.memory_check(prepared, engine)
    probe = prepared.train.datums[0].tokens
    final = run.checkpoints.open("final")
    checks = (
        proof.loss_check(prepared, records),
        proof.answers_check(prepared, comparison),
        memory,
        proof.parameters_check(prepared, start, end) if start else None,
        proof.artefacts_check(prepared, engine, model_id, final.path, probe[: max(1, len(probe) // 2)]),
        proof.replay_check(prepared, engine, run, proof.everything(engine, model_id)),
    )
    return tuple(check for check in checks if check is not None), peaks


def _report(
    run: RunDirectory,
    session: _Session,
    comparison: Comparison | None,
    checks: tuple[Check, ...],
    memory: dict[str, Any],
    records: list[dict[str, Any]],
) -> Report:
    prepared, facts = session.prepared, run.facts
    steps = [record for record in records if record["kind"] == "step"]
    seconds = sum(record["clock"]["seconds"] for record in steps)
    predicted = None if session.memory is None else session.memory.as_dict()
    return Report(
        run_id=run.run_id,
        checks=checks,
        training={
            "model": prepared.source.name,
            "method": prepared.config.method,
            "steps": prepared.total_steps,
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
        data=prepared.data_summary(),
        memory=memory | ({} if predicted is None else {"predicted_bytes": predicted.pop("total"), "parts": predicted}),
        reproduce={
            "commands": [f"foundry verify run {run.path}", f"foundry chat {run.path}"],
            "config_digest": facts["config_digest"],
            "seed": prepared.config.seed,
            "code_sha256": facts["receipt"]["code"]["sha256"],
            "model_fingerprint": prepared.model_fingerprint,
            "renderer": prepared.renderer.name,
        },
        machine=facts["receipt"]["machine"],
        notes=_notes(facts, session),
    )


def _notes(facts: Mapping[str, Any], session: _Session) -> tuple[str, ...]:
    notes = [f"Resumed from step {each['from_step']}." for each in facts.get("resumed", [])]
    if session.trial.num_pieces > 1:
        notes.append(f"Memory was short: the longest batch is computed in {session.trial.num_pieces} pieces.")
    return tuple(notes)


def _receipt(prepared: Prepared, digest: str) -> dict[str, Any]:
    return receipt(
        argv=sys.argv,
        config_digest=digest,
        data_files=prepared.data_files(),
        model_fingerprint=prepared.model_fingerprint,
        torch_facts={"version": torch.__version__, "num_threads": torch.get_num_threads()},
    )


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
