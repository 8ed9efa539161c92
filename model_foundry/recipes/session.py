"""A run's model while the run is under way: loaded, tried on its longest batch, with the plan that came of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model_foundry.client.local import TrainingClient
from model_foundry.config.schema import TrainConfig
from model_foundry.engine.base import EngineKind, LocalEngine
from model_foundry.engine.choose import choose_engine, open_engine
from model_foundry.engine.platform import resident_memory_bytes
from model_foundry.engine.ranks import current
from model_foundry.engine.sharded_engine import ShardedEngine
from model_foundry.models.memory import MemoryEstimate
from model_foundry.recipes.compiling import choose_compiling
from model_foundry.recipes.gatekeeping import enforce
from model_foundry.recipes.plan import Trial, plan_facts, predict_memory, try_longest_batch
from model_foundry.recipes.work import Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """The engine that holds the model, and what was found out about both."""

    work: Work
    engine: LocalEngine
    model_id: str
    process_bytes: int
    memory: MemoryEstimate | None
    trial: Trial
    plan: dict[str, Any]

    @property
    def client(self) -> TrainingClient:
        return TrainingClient(self.engine, self.model_id)


def begin(session: Session) -> Session:
    """The session with what its work asks the model before the first step; the model is as it starts."""
    facts = session.engine.describe(session.model_id)
    return replace(session, work=session.work.begun(session.client, facts))


def open_session(
    work: Work, *, engine_before: EngineKind | None = None, compiling_before: Mapping[str, Any] | None = None
) -> Session:
    """Load the model and try the longest batch on it.

    Args:
        engine_before: what the run was trained by until now; its last bits are that engine's.
        compiling_before: what it recorded about compiling, for the same reason.

    Raises:
        CheckFailedError: the gate refuses the rows.
    """
    if work.gate is not None and isinstance(work.config, TrainConfig):
        enforce(work.gate, work.config)
    ranks = current()
    options = work.engine_options()
    choice = choose_engine(
        engine_before or work.config.engine, folder=work.source.folder, options=options,
        optimizer=work.config.training.optimizer, num_processes=1 if ranks is None else ranks.size,
        loss_fn=work.objective.loss_fn,
    )  # fmt: skip
    engine: LocalEngine = open_engine(choice.name, options) if ranks is None else ShardedEngine(ranks, **options)
    why = choice.why if engine_before is None else "as this run was begun"
    logger.info("engine: %s on %s (%s)", engine.kind, engine.device.type, why)
    process_bytes = resident_memory_bytes()
    base_name = work.source.name if work.source.adapter is None else str(work.source.folder)
    model_id = engine.create_model(
        work.source.folder,
        lora=work.lora,
        seed=work.config.seed,
        adapter=work.source.adapter,
        base_name=base_name,
        optimizer=work.config.training.optimizer,
    )
    memory = predict_memory(work, engine, model_id, process_bytes=process_bytes)
    trial = try_longest_batch(engine, model_id, work)
    if trial.num_pieces > 1:
        logger.warning("the longest batch is computed in %s pieces to fit the memory", trial.num_pieces)
    plan = plan_facts(work, engine.describe(model_id), trial, memory)
    compiling = choose_compiling(work, engine, model_id, seconds=plan["seconds"], before=compiling_before)
    plan["compiling"] = None if compiling is None else compiling.as_dict()
    return Session(work, engine, model_id, process_bytes, memory, trial, plan)
