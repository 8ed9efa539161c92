"""One run of `foundry rl`, from its configuration to its page: new, or gone on with."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_foundry.checkpoint import atomic
from model_foundry.checkpoint.store import FINAL, CheckpointStore
from model_foundry.client.service_client import ServiceClient
from model_foundry.client.training import ServiceTrainingClient
from model_foundry.config.load import config_digest, dump_yaml
from model_foundry.config.rl import RLConfig
from model_foundry.errors import FoundryError, InterruptedRunError, RunError
from model_foundry.models.runs import service_checkpoint
from model_foundry.recipes import rl
from model_foundry.recipes.arithmetic import Arithmetic
from model_foundry.recipes.interruption import leave_on_signals, stop_on_signals
from model_foundry.run.directory import RunDirectory, is_run, require_free
from model_foundry.run.logs import run_logging
from model_foundry.run.metrics import MetricsLog
from model_foundry.run.receipts import receipt
from model_foundry.run.rl_page import render_rl_page

logger = logging.getLogger(__name__)
PAGE_NAME = "report.html"


@dataclass(frozen=True, slots=True)
class _Recorder:
    run: RunDirectory
    metrics: MetricsLog

    def append(self, record: dict[str, Any]) -> None:
        self.metrics.append(record)

    def save(self, step: int, path: str) -> None:
        self.metrics.sync()
        self.run.record(position={"step": step, "path": path})


def run_rl(config: RLConfig, *, resume: bool) -> dict[str, Any]:
    """Train and report; what `foundry rl --json` prints.

    Raises:
        RunError: the folder holds another run, or one that is to be resumed.
        InterruptedRunError: stopped by a signal, after saving.
    """
    digest, text = config_digest(config), dump_yaml(config)
    exists = is_run(config.run_dir)
    if exists and not resume:
        RunDirectory.read(config.run_dir).require_config(digest, text)
        raise RunError("already holds a run of this configuration", where=str(config.run_dir),
                       hint="Go on with it: --resume; or start another: run_dir=…")  # fmt: skip
    if not exists:
        require_free(config.run_dir)
    start = receipt(argv=sys.argv, config_digest=digest)
    opened = (
        RunDirectory.open(config.run_dir)
        if exists
        else RunDirectory.create(config.run_dir, config_yaml=text, digest=digest, receipt=start)
    )
    with leave_on_signals(), opened as run, run_logging(run.log_path, level=config.logging.level):
        run.require_config(digest, text)
        position = run.facts.get("position")
        if exists:
            run.record_resume(start, from_step=position["step"] if position else 0)
        try:
            with _client(config) as client, run.open_metrics() as metrics:
                summary = _train(run, config, client, metrics, position)
        except (KeyboardInterrupt, InterruptedRunError) as error:
            run.record_outcome("interrupted", message=str(error) or "interrupted")
            raise
        except FoundryError as error:
            run.record_outcome("failed", message=str(error))
            raise
        run.record_outcome("finished")
        return summary


def _client(config: RLConfig) -> ServiceClient:
    where = config.service
    if where.url is not None:
        return ServiceClient(base_url=where.url)
    options = {"dtype": where.dtype} | ({} if where.num_threads is None else {"num_threads": where.num_threads})
    return ServiceClient(base_model=config.model.name, state_dir=config.run_dir / "service", options=options)


def _train(
    run: RunDirectory, config: RLConfig, client: ServiceClient, metrics: MetricsLog, position: dict[str, Any] | None
) -> dict[str, Any]:
    step = 0 if position is None else int(position["step"])
    model = _model(config, client, position)
    metrics.truncate_after(step if position is not None else -1)
    environment = Arithmetic(
        model.get_tokenizer(),
        operation=config.problems.operation,
        largest=config.problems.largest,
        num_held_out=config.problems.num_held_out,
        problems_per_step=config.training.problems_per_step,
        seed=config.seed,
    )
    run.record(total_steps=config.training.num_steps)
    if step < config.training.num_steps:
        with stop_on_signals() as stop:
            done = rl.train(
                model, environment, config, _Recorder(run, metrics), first_step=step + 1, stop=stop
            )  # fmt: skip
        if done < config.training.num_steps:
            hint = f"Go on with: foundry rl {run.config_path} --resume"
            raise InterruptedRunError(f"interrupted; saved at step {done} of {config.training.num_steps}", hint=hint)
    path = run.facts["position"]["path"]
    if config.service.url is None:
        keep_final(run, path, config.run_dir / "service")
    records = metrics.read()
    atomic.atomic_write(run.path / PAGE_NAME, render_rl_page(run.run_id, records, path=path))
    return _summary(run, records, path)


def _model(config: RLConfig, client: ServiceClient, position: dict[str, Any] | None) -> ServiceTrainingClient:
    if position is not None:
        logger.info("going on from %s", position["path"])
        return client.create_training_client_from_state_with_optimizer(position["path"]).result()
    return client.create_lora_training_client(
        config.model.name, rank=config.model.rank, seed=config.seed, train_unembed=False
    ).result()


def keep_final(run: RunDirectory, path: str, state_dir: Path) -> None:
    """The last checkpoint as the run's own, so that chat, export and serve take the run like any other."""
    stored = service_checkpoint(path, state_dir)
    checkpoint = CheckpointStore(stored.parent).open(stored.name)

    def write(folder: Path) -> None:
        for part in ("adapter", "state"):
            shutil.copytree(checkpoint.path / part, folder / part)

    run.checkpoints.save(FINAL, checkpoint.step, write, checkpoint.metadata)


def _summary(run: RunDirectory, records: list[dict[str, Any]], path: str) -> dict[str, Any]:
    steps = [record for record in records if record["kind"] == "step"]
    held_out = [record["reward"] for record in records if record["kind"] == "held_out"]
    few = max(1, min(5, len(steps) // 3))
    return {
        "run_dir": str(run.path),
        "path": path,
        "page": str(run.path / PAGE_NAME),
        "steps": len(steps),
        "reward_first": round(sum(record["reward"] for record in steps[:few]) / few, 4),
        "reward_last": round(sum(record["reward"] for record in steps[-few:]) / few, 4),
        "held_out_before": held_out[0],
        "held_out_after": held_out[-1],
        "seconds": round(sum(record["clock"]["seconds"] for record in steps), 1),
    }
