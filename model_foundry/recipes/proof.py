"""After the last step: measure what the run claims, as checks.

Each function measures one thing on the real artefacts and hands it to `evals.criteria` to be judged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from model_foundry.client.local import TrainingClient
from model_foundry.config.preference import DpoConfig
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.config.schema import TrainConfig
from model_foundry.engine.base import LocalEngine
from model_foundry.errors import FoundryError
from model_foundry.evals import criteria
from model_foundry.evals.before_after import Comparison
from model_foundry.evals.compression import (
    bits_check,
    gzip_bits_per_byte,
    unigram_bits_per_byte,
    unigram_check,
    xz_bits_per_byte,
)
from model_foundry.evals.preference import pairs_preferred
from model_foundry.recipes import supervised
from model_foundry.recipes.measure_memory import MemoryTask, measure, task_of
from model_foundry.recipes.plan import piece_limit
from model_foundry.recipes.saving import load_checkpoint
from model_foundry.recipes.work import Work
from model_foundry.run.directory import RunDirectory
from model_foundry.run.metrics import CLOCK, read_metrics
from model_foundry.run.progress import open_progress
from model_foundry.types import Check, LoraConfig, SamplingParams

logger = logging.getLogger(__name__)
PROBE_NEW_TOKENS = 16


def loss_check(work: Work, records: list[dict[str, Any]]) -> Check | None:
    bound = work.config.criteria.loss_fall
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    return None if bound is None else criteria.loss_fall(losses, bound=bound)


def answers_check(work: Work, comparison: Comparison | None) -> Check | None:
    config = work.config
    if not isinstance(config, TrainConfig) or comparison is None or config.criteria.answers_improved is None:
        return None
    bound = config.criteria.answers_improved
    return criteria.answers_improved(comparison, bound=bound)


def parameters_check(work: Work, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Check | None:
    config = work.config
    if not isinstance(config, TrainConfig) or work.lora is None or config.criteria.parameters_changed is None:
        return None
    bound = config.criteria.parameters_changed
    first, last = ({name: t.cpu().numpy() for name, t in tensors.items()} for tensors in (before, after))
    return criteria.parameters_changed(first, last, bound=bound, weight_decay=work.config.training.weight_decay)


def memory_check(work: Work, engine: LocalEngine, model_id: str) -> tuple[Check | None, dict[str, Any]]:
    """LoRA and full fine-tuning on the same longest batch, each in a fresh process; the peaks go into the report."""
    config = work.config
    if not isinstance(config, TrainConfig) or work.lora is None or config.criteria.memory_saving is None:
        return None, {}
    bound = config.criteria.memory_saving
    peaks: dict[str, int | None] = {}
    for name, lora in (("lora", work.lora), ("full", None)):
        logger.info("measuring the memory of %s in a process of its own", "LoRA" if lora else "full fine-tuning")
        try:
            peaks[name] = measure(memory_task(work, engine, model_id, lora=lora)).peak
        except FoundryError as error:
            logger.warning("%s", error)
            peaks[name] = None
    how = "each in a process of its own, two steps of the longest batch, interpreter and libraries included"
    check = criteria.memory_saving(lora_bytes=peaks["lora"], full_bytes=peaks["full"], bound=bound, how=how)
    return check, {"lora_bytes": peaks["lora"], "full_bytes": peaks["full"]}


def memory_task(work: Work, engine: LocalEngine, model_id: str, *, lora: LoraConfig | None) -> MemoryTask:
    """The longest batch as this run computes it, in the pieces that it has come to."""
    return task_of(
        work.longest_batch(),
        folder=str(work.source.folder.resolve()),
        lora=lora,
        device=engine.device.type,
        dtype=str(engine.dtype).removeprefix("torch."),
        num_threads=engine.num_threads,
        implementation=engine.implementation,
        attention=engine.attention,
        quantization="none" if lora is None else engine.quantization,
        engine=engine.kind,
        gradient_checkpointing=work.config.training.gradient_checkpointing,
        micro_batch_tokens=piece_limit(work, engine, model_id),
        loss_fn=work.objective.loss_fn,
    )


def artefacts_check(work: Work, engine: LocalEngine, model_id: str, final: Path, sample: np.ndarray) -> Check:
    """Load the final weights from the disk into a second model; it must say what the trained one says."""
    problems: dict[str, str | None] = {}
    part = "adapter" if work.lora is not None else "model"
    context = engine.describe(model_id)["context"] or PROBE_NEW_TOKENS + len(sample)
    params = SamplingParams(max_tokens=min(PROBE_NEW_TOKENS, context - 1), stop_token_ids=work.renderer.stop_token_ids)
    sample = sample[: context - params.max_tokens]
    try:
        if work.lora is not None:
            loaded = engine.create_model(work.source.folder, lora=None, adapter=final / part, trainable=False)
        else:
            loaded = engine.create_model(final / part, lora=None, trainable=False)
        mine, theirs = (engine.sample(each, [sample], params)[0].tokens for each in (model_id, loaded))
        engine.delete_model(loaded)
        same = np.array_equal(mine, theirs) or work.lora is None
        problems[f"{final.name}/{part}"] = None if same else "answers differently from the trained model"
    except FoundryError as error:
        problems[f"{final.name}/{part}"] = str(error)
    return criteria.artefacts_load(problems)


def held_out_bits(work: Work, records: list[dict[str, Any]]) -> dict[str, float]:
    """Bits per byte of the held-out text: what the model needs at the end, and what simpler ways need."""
    held_out = work.held_out
    measured = [record for record in records if record["kind"] == "validation" and "bits_per_byte" in record]
    if held_out is None or held_out.text is None or not measured:
        return {}
    text = held_out.text.encode()
    datums = [datum for batch in work.validation_batches() for datum in batch]
    tokens = np.concatenate([datum.loss_inputs["target_tokens"] for datum in datums])
    return {
        "this model": measured[-1]["bits_per_byte"],
        "token frequencies": unigram_bits_per_byte(work.token_counts(), tokens, num_bytes=len(text)),
        "gzip -9": gzip_bits_per_byte(text),
        "xz -9e": xz_bits_per_byte(text),
    }


def text_checks(work: Work, bits: Mapping[str, float]) -> tuple[Check, ...]:
    """What is asked of the held-out text's bits per byte."""
    config = work.config
    if not isinstance(config, ExperimentConfig) or not bits:
        return ()
    criteria_asked, found = config.criteria, bits["this model"]
    checks = []
    if criteria_asked.bits_per_byte is not None:
        checks.append(bits_check(found, bound=criteria_asked.bits_per_byte))
    if criteria_asked.below_unigram is not None:
        checks.append(unigram_check(found, bits["token frequencies"], bound=criteria_asked.below_unigram))
    return tuple(checks)


def pairs_check(work: Work, records: list[dict[str, Any]]) -> Check | None:
    config = work.config
    if not isinstance(config, DpoConfig) or config.criteria.pairs_preferred is None:
        return None
    return pairs_preferred(records, bound=config.criteria.pairs_preferred)


class _Kept:
    """Keeps the records of a replay as metrics.jsonl would hold them; saves nothing."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def append(self, record: dict[str, Any]) -> None:
        # Through JSON and back, which writes a loss that is not a number as null.
        self.records.append(orjson.loads(orjson.dumps(without_clock(record), option=orjson.OPT_SERIALIZE_NUMPY)))

    def save(self, step: int) -> None:
        del step

    def before_update(self) -> None: ...


def replay_check(work: Work, engine: LocalEngine, run: RunDirectory, final: Mapping[str, torch.Tensor]) -> Check | None:
    """Repeat the last steps in a second model, from the first checkpoint within `replay_steps` of the end, or from the
    start when the run is no longer than that, and compare every bit.

    Args:
        final: weights and moments of the trained model by name.
    """
    limit = work.config.criteria.replay_steps
    if limit == 0:
        return None
    total = work.total_steps
    near = [each.name for each in run.checkpoints.list() if total - limit <= each.step < total]
    if not near and limit < total:
        return criteria.replay_identical(from_step=0, num_steps=0, compared=(), differences=())
    logger.info("repeating the last steps from %s", near[0] if near else "the start")
    model_id = engine.create_model(
        work.source.folder, lora=work.lora, seed=work.config.seed, adapter=work.source.adapter,
        optimizer=work.config.training.optimizer,
    )  # fmt: skip
    if run.facts.get("piece_tokens"):
        engine.limit_pieces(model_id, run.facts["piece_tokens"])
    try:
        step = -1
        if near:
            step = load_checkpoint(run.checkpoints.open(near[0]), engine, model_id, work, logger.warning)
        records = read_metrics(run.metrics_path)
        kept = _Kept()
        with open_progress() as progress:
            progress.start(total, "replay", done_steps=max(0, step))
            supervised.train(
                TrainingClient(engine, model_id), work, kept, progress, first_step=max(0, step) + 1,
                skipped_in_a_row=supervised.trailing_skips([each for each in records if each["step"] <= step]),
            )  # fmt: skip
        again = everything(engine, model_id)
        differences = [name for name, tensor in final.items() if not _same_bits(tensor, again[name])]
    except FoundryError as error:
        step, kept, records, differences = max(0, step), _Kept(), [], [str(error)]
    finally:
        engine.delete_model(model_id)
    logged = [without_clock(record) for record in records if record["step"] > step]
    differences += ["metrics.jsonl"] if logged != kept.records else []
    return criteria.replay_identical(
        from_step=max(0, step),
        num_steps=total - max(0, step),
        compared=("weights", "optimizer state", "metrics"),
        differences=differences,
    )


def without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != CLOCK}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit: unlike `torch.equal`, a NaN equals itself and 0 is not -0."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def everything(engine: LocalEngine, model_id: str) -> dict[str, torch.Tensor]:
    """Trained weights and optimizer moments, live views."""
    return {**engine.trained_tensors(model_id), **engine.state_tensors(model_id)}
