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
from model_foundry.engine.ranks import Ranks, current
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.evals.rehearsal import Asked
from model_foundry.models.memory import MemoryEstimate
from model_foundry.recipes.compiling import choose_compiling
from model_foundry.recipes.gatekeeping import enforce
from model_foundry.recipes.plan import (
    Trial,
    memory_hint,
    piece_limit,
    pieces_that_fit,
    plan_facts,
    predict_memory,
    try_longest_batch,
)
from model_foundry.recipes.work import Work
from model_foundry.run.machine import memory_facts

logger = logging.getLogger(__name__)
USED_SHARE = 0.9
"""Of the memory that is free, what a run may count on."""


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
    def piece_tokens(self) -> int:
        """What the memory has the passes split at, in tokens; 0 where it takes whole batches. The last bits depend on
        it, so a run records it."""
        return self.engine.state_facts(self.model_id)["max_piece_tokens"] or 0

    @property
    def client(self) -> TrainingClient:
        return TrainingClient(self.engine, self.model_id)


def begin(session: Session) -> Session:
    """The session with what its work asks the model before the first step; the model is as it starts."""
    facts = session.engine.describe(session.model_id)
    facts["piece_tokens"] = piece_limit(session.work, session.engine, session.model_id)
    return replace(session, work=session.work.begun(session.client, facts))


def open_session(
    work: Work,
    *,
    asked: Asked | None = None,
    engine_before: EngineKind | None = None,
    compiling_before: Mapping[str, Any] | None = None,
    piece_tokens_before: int | None = None,
) -> Session:
    """Load the model and try the longest batch on it.

    Args:
        asked: what the questions and suites will hold at once, for the plan's memory.
        engine_before: what the run was trained by until now; its last bits are that engine's.
        compiling_before: what it recorded about compiling, for the same reason.
        piece_tokens_before: what it recorded as `Session.piece_tokens`, for the same reason; None: nothing.

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
    engine: LocalEngine = open_engine(choice.name, options) if ranks is None else _sharded(ranks, options)
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
    if piece_tokens_before:
        engine.limit_pieces(model_id, piece_tokens_before)
    memory = _fit(
        work, engine, model_id,
        process_bytes=process_bytes, asked=asked or Asked(), may_split=piece_tokens_before is None,
    )  # fmt: skip
    trial = try_longest_batch(engine, model_id, work)
    if trial.num_pieces > 1:
        why = "as this run was begun" if piece_tokens_before else "to fit the memory"
        logger.warning("the longest batch is computed in %s pieces %s", trial.num_pieces, why)
    plan = plan_facts(work, engine.describe(model_id), trial, memory)
    compiling = choose_compiling(work, engine, model_id, seconds=plan["seconds"], before=compiling_before)
    plan["compiling"] = None if compiling is None else compiling.as_dict()
    return Session(work, engine, model_id, process_bytes, memory, trial, plan)


def _sharded(ranks: Ranks, options: Mapping[str, Any]) -> LocalEngine:
    # Loading torch's sharded tensors takes a second, which one process does not need to wait for.
    from model_foundry.engine.sharded_engine import ShardedEngine

    return ShardedEngine(ranks, **options)


def _fit(
    work: Work, engine: LocalEngine, model_id: str, *, process_bytes: int, asked: Asked, may_split: bool
) -> MemoryEstimate | None:
    """The predicted peak, with the batch in pieces where that is what the free memory takes.

    Linux gives memory that it does not have, and ends whoever uses it: a batch that is too large must not be tried.

    Args:
        may_split: whether the memory that is free decides; a run that was begun goes on as it was.
    """

    def predicted(piece_tokens: int | None, asked: Asked = asked) -> MemoryEstimate | None:
        return predict_memory(
            work, engine, model_id, process_bytes=process_bytes, asked=asked, piece_tokens=piece_tokens
        )

    limit = piece_limit(work, engine, model_id)
    memory, available = predicted(limit), memory_facts()["available_bytes"]
    if memory is None or available is None or engine.device.type != "cpu" or not isinstance(engine, TorchEngine):
        return memory
    room = resident_memory_bytes() + round(USED_SHARE * available)
    if may_split and limit is None and memory.total > room:
        lengths = [datum.num_tokens for datum in work.longest_batch()]
        tokens = pieces_that_fit(lengths, lambda tokens: _total(predicted(tokens)), room_bytes=room)
        if tokens is not None:
            words = "the whole batch would take %.1f GB, and %.1f GB are free: it is split at %s tokens"
            logger.warning(words, memory.total / 1e9, available / 1e9, f"{tokens:,}")
            engine.limit_pieces(model_id, tokens)
            limit, memory = tokens, predicted(tokens)
    if memory is not None and memory.total > room:
        unasked, unsampled = (_total(predicted(limit, each)) for each in (Asked(), replace(asked, sampled=())))
        hint = memory_hint(
            memory, unasked=unasked, unsampled=unsampled,
            gradient_checkpointing=work.config.training.gradient_checkpointing,
        )  # fmt: skip
        logger.warning("%.1f GB are predicted and %.1f GB are free: %s", memory.total / 1e9, available / 1e9, hint)
    return memory


def _total(memory: MemoryEstimate | None) -> int:
    return 0 if memory is None else memory.total
