"""One training run from its configuration to its report: the order in which everything else is called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import torch

from model_foundry.checkpoint.store import FINAL, Checkpoint
from model_foundry.config.commands import RunConfig
from model_foundry.config.load import config_digest, dump_yaml
from model_foundry.config.schema import TrainConfig
from model_foundry.engine.platform import resident_memory_bytes
from model_foundry.errors import FoundryError, InterruptedRunError, RunError
from model_foundry.recipes import supervised
from model_foundry.recipes.before_after import assess_run, rehearsed, suite_results, suites_of
from model_foundry.recipes.interruption import leave_on_signals, stop_on_signals
from model_foundry.recipes.methods import prepare_work
from model_foundry.recipes.plan import plan_text, warn_of_disk
from model_foundry.recipes.preparation import require_same_data
from model_foundry.recipes.proof import held_out_bits
from model_foundry.recipes.reporting import compared, held_out_answers, make_report, prove
from model_foundry.recipes.saving import RunSaver, load_checkpoint
from model_foundry.recipes.session import Session, begin, open_session
from model_foundry.recipes.shape_plan import plan_of_config, plan_too_large
from model_foundry.recipes.work import Work
from model_foundry.run.directory import Outcome, RunDirectory, is_run, require_free, utc_now
from model_foundry.run.logs import run_logging
from model_foundry.run.metrics import MetricsLog
from model_foundry.run.progress import open_progress
from model_foundry.run.receipts import receipt
from model_foundry.run.report import JSON_NAME as REPORT_NAME
from model_foundry.run.report import Report, read_report, write_report
from model_foundry.run.spikes import losses_of
from model_foundry.run.trackers import Trackers, open_trackers

logger = logging.getLogger(__name__)

Resume = Literal["never", "auto", "must"]


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


def plan_run(config: RunConfig) -> dict[str, Any]:
    """The plan of `--dry-run`: reads the data, loads the model, tries the longest batch, writes nothing.

    Of a model whose weights are not here it says what config.json does: parameters, memory, which machines fit.
    """
    with run_logging(level=config.logging.level):
        suites, _ = suites_of(config)
        plan = plan_of_config(config) if isinstance(config, TrainConfig) else plan_too_large(config)
        if plan is not None:
            return plan
        work = prepare_work(config, now=utc_now())
        plan = open_session(work, asked=rehearsed(work, suites)).plan
        warn_of_disk(plan, config.run_dir)
        return plan


def run_training(
    config: RunConfig, *, resume: Resume = "never", now: datetime | None = None, piece_tokens: int | None = None
) -> Report:
    """Train, prove and report.

    Args:
        now: the date that a chat template may print; default today. A resumed run keeps its own.
        piece_tokens: as another run recorded it, to end with its bits; default what the free memory takes.
        resume: `auto` goes on with the run in run_dir if there is one; `must` requires one. A run that has finished is
            not run again: its report comes back.

    Raises:
        RunError: the directory holds another run, or none. InterruptedRunError: stopped by a signal, after saving.
    """
    exists = is_run(config.run_dir)
    if resume == "must" and not exists:
        raise RunError("holds no run to resume", where=str(config.run_dir), hint="Start it with: foundry train CONFIG")
    digest, text = config_digest(config), dump_yaml(config)
    if exists and resume == "never":
        RunDirectory.read(config.run_dir).require_config(digest, text)
        raise RunError(
            "already holds a run of this configuration",
            where=str(config.run_dir),
            hint="Go on with it: --resume auto; or start another: run_dir=…",
        )
    try:
        with leave_on_signals():
            if exists:
                with RunDirectory.open(config.run_dir) as run:
                    run.require_config(digest, text)
                    return _in_run(run, config, digest, piece_tokens=piece_tokens)
            require_free(config.run_dir)
            with run_logging(level=config.logging.level):
                # All that can be wrong with what was asked for shows here, before there is a run to be in the way.
                suites, _ = suites_of(config)
                work = prepare_work(config, now=now or utc_now())
                session = open_session(work, asked=rehearsed(work, suites), piece_tokens_before=piece_tokens)
                warn_of_disk(session.plan, config.run_dir)
                start = _receipt(session.work, digest)
            with RunDirectory.create(config.run_dir, config_yaml=text, digest=digest, receipt=start) as run:
                return _in_run(run, config, digest, session=session)
    except KeyboardInterrupt:
        if not is_run(config.run_dir):
            raise InterruptedRunError("interrupted before the run began") from None
        hint = f"Go on with: foundry resume {config.run_dir}"
        raise InterruptedRunError("interrupted; it goes on from its last checkpoint", hint=hint) from None


def _in_run(
    run: RunDirectory,
    config: RunConfig,
    digest: str,
    *,
    session: Session | None = None,
    piece_tokens: int | None = None,
) -> Report:
    """Everything that happens in the run's folder, its outcome noted whatever it is; without a session it goes on."""
    with run_logging(run.log_path, level=config.logging.level):
        resumed = session is None
        try:
            if session is None:
                if (report := _finished_report(run)) is not None:
                    logger.info("%s has finished already; foundry verify run %s runs it again", run.path, run.path)
                    return report
                work = prepare_work(config, now=datetime.fromisoformat(run.facts.get("now") or utc_now().isoformat()))
                require_same_data(run.facts["receipt"], _receipt(work, digest), where=str(run.path))
                session = open_session(
                    work,
                    asked=rehearsed(work, suites_of(config)[0]),
                    engine_before=run.facts.get("engine", "torch"),
                    compiling_before=run.facts.get("compiling"),
                    piece_tokens_before=run.facts.get("piece_tokens", piece_tokens),
                )
            run.record(
                engine=session.engine.kind,
                config=config.model_dump(mode="json"),
                now=session.work.now.isoformat(),
                renderer=session.work.renderer.name,
                compiling=run.facts.get("compiling") or session.plan["compiling"],
                piece_tokens=run.facts.get("piece_tokens", session.piece_tokens),
                total_steps=session.work.total_steps,
                world_sizes=sorted({*run.facts.get("world_sizes", []), session.engine.world_size}),
            )
            report = _train_and_prove(run, session, digest, resumed=resumed)
        except (KeyboardInterrupt, InterruptedRunError) as error:
            _note(run, "interrupted", str(error) or "interrupted")
            raise
        except Exception as error:
            # To the file alone: the command line says it on the console.
            logger.debug("the run failed", exc_info=True)
            _note(run, "failed", str(error))
            raise
        run.record_outcome("finished")
        return report


def _note(run: RunDirectory, outcome: Outcome, message: str) -> None:
    """Note how the run ended; a disk that is full must not hide why it ended."""
    with suppress(FoundryError):
        run.record_outcome(outcome, message=message)


def _finished_report(run: RunDirectory) -> Report | None:
    """The report of a run that is finished and whole, else None."""
    if (run.facts.get("outcome") or {}).get("state") != "finished" or not (run.path / REPORT_NAME).is_file():
        return None
    newest = run.checkpoints.newest_valid(lambda sentence: logger.warning("%s", sentence))
    return None if newest is None or newest.name != FINAL else read_report(run.path)


def _train_and_prove(run: RunDirectory, session: Session, digest: str, *, resumed: bool) -> Report:
    engine, model_id, config = session.engine, session.model_id, session.work.config
    checkpoint = _newest_checkpoint(run) if resumed else None
    step = 0 if checkpoint is None else checkpoint.step
    trackers = open_trackers(
        config.logging.report_to, run_dir=run.path, project=config.logging.project, run_id=run.run_id,
        config=config.model_dump(mode="json"), resume_step=step if resumed else None,
    )  # fmt: skip
    with trackers, run.open_metrics() as metrics:
        logger.info("the plan:\n%s", plan_text(session.plan))
        session = begin(session)
        work = session.work
        start_tensors = _copied(engine.trained_tensors(model_id)) if work.lora is not None else {}
        suites, bounds = suites_of(config)
        before = held_out_answers(run, session, "before", reuse=True)
        wants_noise = isinstance(config, TrainConfig) and config.evaluation.noise
        again = held_out_answers(run, session, "again", reuse=True) if wants_noise else []
        suites_before = suite_results(run, session, suites, "before", reuse=True)
        suites = [suite for suite in suites if suite.name in suites_before]
        if resumed:
            _restore(run, session, metrics, checkpoint, digest)
        done = step if step == work.total_steps else _train(run, session, metrics, trackers, first_step=step + 1)
        if done < work.total_steps:
            trackers.close("interrupted")
            raise InterruptedRunError(
                f"interrupted; saved at step {done} of {work.total_steps}",
                hint=f"Go on with: foundry resume {run.path}",
            )
        peak_bytes = engine.peak_memory_bytes()
        after = held_out_answers(run, session, "after", reuse=False)
        suites_after = suite_results(run, session, suites, "after", reuse=False)
        comparison = compared(work, before, after, again=again)
        bits = held_out_bits(work, metrics.read())
        checks, memory = prove(run, session, start_tensors, comparison, bits, metrics.read())
        checks, answers_page = assess_run(
            run, session, suites, bounds, before=suites_before, after=suites_after,
            answers=(before, after) if before else None, checks=checks,
        )  # fmt: skip
        report = make_report(
            run, session, comparison, bits, checks, memory | {"measured_bytes": peak_bytes}, metrics.read()
        )
        page = write_report(run.path, report)
        logger.info("report: %s", page)
        if answers_page is not None:
            logger.info("answers side by side: %s", answers_page)
        return report


def _train(run: RunDirectory, session: Session, metrics: MetricsLog, trackers: Trackers, *, first_step: int) -> int:
    """The loop with its saves, until the last of them is on the disk; the last step done."""
    work = session.work
    saver = RunSaver(run, session.engine, session.model_id, work)
    recorder = _Recorder(metrics, trackers, saver)
    log_steps = work.config.logging.log_steps
    records = metrics.read()
    with stop_on_signals() as stop, saver.saver, open_progress(log_steps=log_steps) as progress:
        progress.start(work.total_steps, "train", done_steps=first_step - 1)
        done = supervised.train(
            session.client, work, recorder, progress,
            first_step=first_step, skipped_in_a_row=supervised.trailing_skips(records), losses=losses_of(records),
            stop=stop, memory_bytes=resident_memory_bytes,
        )  # fmt: skip
        metrics.sync()
        if done == work.total_steps:
            saver.save(done, final=True)
    if stop() and done == work.total_steps:
        raise KeyboardInterrupt
    return done


def _newest_checkpoint(run: RunDirectory) -> Checkpoint | None:
    """The newest checkpoint that verifies to the last byte; those passed over are named in the log."""
    return run.checkpoints.newest_valid(lambda sentence: logger.warning("%s; taking the one before it", sentence))


def _restore(
    run: RunDirectory, session: Session, metrics: MetricsLog, checkpoint: Checkpoint | None, digest: str
) -> None:
    """Load the checkpoint, and take back what was recorded after it."""
    work, step = session.work, 0
    if checkpoint is not None:
        step = load_checkpoint(checkpoint, session.engine, session.model_id, work, logger.warning)
        logger.info("resuming from %s, step %s of %s", checkpoint.name, step, work.total_steps)
    else:
        logger.info("no checkpoint yet: starting from step 1")
    metrics.truncate_after(step if checkpoint is not None else -1)
    run.record_resume(_receipt(work, digest), from_step=step)


def _receipt(work: Work, digest: str) -> dict[str, Any]:
    num_threads = work.config.training.num_threads or torch.get_num_threads()
    return receipt(
        argv=sys.argv,
        config_digest=digest,
        data_files=work.data_files(),
        model_fingerprint=work.model_fingerprint,
        torch_facts={"version": torch.__version__, "num_threads": num_threads},
    )


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
