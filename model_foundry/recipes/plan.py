"""What a run will do, before it does it: rows, steps, parameters, memory by part, disk, and time from a measured pass.

The longest real batch is tried on the real model, so that a run that cannot fit fails now and not in an hour.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.atomic import free_bytes
from model_foundry.engine.base import LocalEngine
from model_foundry.engine.branches import laid_lengths
from model_foundry.engine.pieces import split_by_tokens
from model_foundry.evals.rehearsal import Asked
from model_foundry.models.config import ModelConfig, is_native
from model_foundry.models.folder import read_config
from model_foundry.models.memory import MemoryEstimate, estimate_memory
from model_foundry.models.tiled_attention import is_for
from model_foundry.recipes.gatekeeping import gate_facts
from model_foundry.recipes.shape_plan import shape_text
from model_foundry.recipes.supervised import is_save_due
from model_foundry.recipes.work import Work
from model_foundry.run.progress import duration

logger = logging.getLogger(__name__)
PASS_SHARE_OF_STEP = 0.97
"""The rest of a step is the optimizer and the record."""
FORWARD_SHARE_OF_PASS = 0.4
"""A pass without gradients beside one with them."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The longest batch, done once: its tokens, seconds, and the pieces it needed."""

    num_tokens: int
    seconds: float
    num_pieces: int
    peak_bytes: int


def try_longest_batch(engine: LocalEngine, model_id: str, work: Work) -> Trial:
    """One forward and backward pass of the longest batch; nothing of it remains.

    Raises:
        OutOfMemoryError: not even one row of it fits.
    """
    batch, objective = work.longest_batch(), work.objective
    seconds, pieces = float("inf"), 1
    for _ in range(2):  # the first pass also warms caches up; the second is what a step takes
        started = time.perf_counter()
        output = engine.forward_backward(model_id, batch, loss_fn=objective.loss_fn, loss_config=objective.loss_config)
        pieces = output.num_micro_batches
        seconds = min(seconds, time.perf_counter() - started)
        engine.discard_gradients(model_id)
    num_tokens = sum(datum.num_tokens for datum in batch)
    return Trial(num_tokens, seconds, pieces, engine.peak_memory_bytes())


def predict_memory(
    work: Work, engine: LocalEngine, model_id: str, *, process_bytes: int, asked: Asked, piece_tokens: int | None
) -> MemoryEstimate | None:
    """The peak by part, from shapes alone; None for what transformers or MLX runs, and several processes.

    Args:
        piece_tokens: pieces of at most so many tokens; None: whole batches.
    """
    raw = read_config(work.source.folder)
    config = work.config
    if not is_native(raw) or engine.implementation == "transformers" or engine.world_size > 1 or engine.kind != "torch":
        return None
    shape = ModelConfig.from_hf(raw)
    batch = work.longest_batch()
    lengths = [datum.num_tokens for datum in batch]
    pieces = split_by_tokens(lengths, piece_tokens)
    piece = max(pieces, key=lambda rows: sum(lengths[row] for row in rows))
    reads = engine.attention != "flash"  # whose kernel reads each branch as a row
    tiled = (
        engine.attention == "eager"
        and is_for(engine.device, engine.dtype)
        and not any(datum.branches for datum in batch)
    )
    new = work.sampling.max_tokens
    due = sum(int((batch[row].loss_inputs["weights"] != 0).sum()) for row in piece)
    adapted = None
    if work.lora is not None:
        names = engine.trained_tensors(model_id)
        # Experts stand one by one in the names and together in the kinds.
        places = {re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in names}
        adapted = [kind for kind in shape.linear_kinds if any(f".{kind}." in place for place in places)]
    return estimate_memory(
        shape,
        lora=work.lora,
        rows=[length for row in piece for length in laid_lengths(batch[row], reads_branches=reads)],
        dtype_bytes=engine.dtype.itemsize,
        adapted=adapted,
        num_due_tokens=due,
        gradient_checkpointing=config.training.gradient_checkpointing,
        process_bytes=process_bytes,
        packed=engine.quantization != "none",
        optimizer=config.training.optimizer,
        num_threads=engine.num_threads or 1,
        held_out_rows=max(_held_out_rows(work, piece_tokens), _largest_piece(asked.read, piece_tokens), key=sum),
        sampled_rows=max([len(tokens) + new for _, tokens in work.prompts], [*asked.sampled], key=sum),
        loaded_again=True,
        keeps_probabilities=not tiled or bool(shape.attention_dropout),
    )


def _held_out_rows(work: Work, piece_tokens: int | None) -> list[int]:
    """Tokens of each row of the largest piece that is read without gradients: held-out rows, a reference's pairs."""
    largest: list[int] = []
    for batch in (*work.validation_batches(), *work.batches_read_before):
        largest = max(largest, _largest_piece([datum.num_tokens for datum in batch], piece_tokens), key=sum)
    return largest


def _largest_piece(lengths: Sequence[int], piece_tokens: int | None) -> list[int]:
    return max(([lengths[row] for row in rows] for rows in split_by_tokens(lengths, piece_tokens)), key=sum)


def piece_limit(work: Work, engine: LocalEngine, model_id: str) -> int | None:
    """Tokens of a piece at most, as asked for or as memory has it; None: batches are whole."""
    limits = (work.config.training.micro_batch_tokens, engine.state_facts(model_id)["max_piece_tokens"])
    return min((each for each in limits if each), default=None)


def memory_hint(memory: MemoryEstimate, *, unasked: int, unsampled: int, gradient_checkpointing: bool) -> str:
    """What to change where the memory is too small: the part that makes the peak.

    Args:
        unasked, unsampled: bytes at the peak without questions and suites, and without those that are answered.
    """
    if unsampled < memory.total:
        return "answering makes the peak; lower evaluation.batch_size or evaluation.max_new_tokens"
    if unasked < memory.total:
        return "reading the choices of suites makes the peak; ask suites of shorter rows (evaluation.suites)"
    if memory.activations + memory.logits < memory.weights + memory.gradients + memory.optimizer:
        return "the model itself makes the most of it; take a smaller one"
    return "lower data.max_length" + ("" if gradient_checkpointing else ", or set training.gradient_checkpointing")


def pieces_that_fit(lengths: Sequence[int], predicted: Callable[[int | None], int], *, room_bytes: int) -> int | None:
    """Tokens of the largest piece with which the predicted peak fits, or is lowest; None: whole batches do as well.

    Args:
        lengths: tokens of each row of the longest batch. Below the longest row nothing is to be had.
        predicted: bytes at the peak with pieces of at most so many tokens.
    """
    tokens, size, lowest = None, sum(lengths), predicted(None)
    while lowest > room_bytes and size > max(lengths):
        size = max(max(lengths), size // 2)
        if (smaller := predicted(size)) >= lowest:  # what makes the peak is no piece
            break
        tokens, lowest = size, smaller
    return tokens


def plan_facts(work: Work, facts: Mapping[str, Any], trial: Trial, memory: MemoryEstimate | None) -> dict[str, Any]:
    """The plan as JSON values. `facts` are the engine's on the model."""
    config = work.config
    saves = [step for step in range(1, work.total_steps) if is_save_due(work, step)]
    limit = config.training.save_total_limit
    kept = len(saves) if limit is None else min(len(saves), limit)
    checkpoint_bytes = facts["checkpoint_bytes"]
    read_before = sum(datum.num_tokens for batch in work.batches_read_before for datum in batch)
    tokens = work.epochs * work.tokens_per_epoch / PASS_SHARE_OF_STEP + read_before * FORWARD_SHARE_OF_PASS
    seconds = tokens / trial.num_tokens * trial.seconds
    return {
        "model": work.source.name,
        "engine": facts["engine"],
        "implementation": facts["implementation"],
        "device": facts["device"],
        "dtype": facts["dtype"],
        "num_threads": facts["num_threads"],
        "world_size": facts["world_size"],
        "base_parameters": facts["base_parameters"],
        "trained_parameters": facts["trained_parameters"],
        "data": work.data_summary(),
        "gate": gate_facts(work.gate, config),
        "epochs": work.epochs,
        "steps": work.total_steps,
        "batches_per_epoch": work.micro_batches_per_epoch,
        "tokens": round(work.epochs * work.tokens_per_epoch),
        "warmup_steps": work.learning_rate.warmup_steps,
        "longest_batch_tokens": trial.num_tokens,
        "pieces_of_the_longest_batch": trial.num_pieces,
        "tokens_per_second": trial.num_tokens / trial.seconds,
        "seconds": seconds,
        "memory": None if memory is None else memory.as_dict(),
        "measured_peak_bytes": trial.peak_bytes,
        "checkpoints_kept": kept + 1,
        "checkpoint_bytes": checkpoint_bytes,
        "disk_bytes": (kept + 2) * checkpoint_bytes,
        "save_steps": saves[:20],
        "saves": len(saves) + 1,
    }


def warn_of_disk(plan: Mapping[str, Any], run_dir: Path) -> None:
    """Say before a run begins that its checkpoints will not find room where it is to lie."""
    free = free_bytes(run_dir)
    if plan["disk_bytes"] > free:
        words = "%s: the run writes up to %s, and %s are free there: %s"
        hint = "free some space, lower training.save_total_limit, or choose another run_dir"
        logger.warning(words, run_dir, _size(plan["disk_bytes"]), _size(free), hint)


def plan_text(plan: Mapping[str, Any]) -> str:
    """The plan as a person reads it."""
    if "ways" in plan:
        return shape_text(plan)
    train = plan["data"]["train"]
    share = plan["trained_parameters"] / plan["base_parameters"]
    processes = f"{plan['world_size']} processes, each with " if plan["world_size"] > 1 else ""
    threads = "" if plan["num_threads"] is None else f", {processes}{plan['num_threads']} threads"
    lines = [
        f"model       {plan['model']} · {plan['base_parameters']:,} parameters · {plan['implementation']} by "
        f"{plan['engine']}, {plan['dtype']} on {plan['device']}{threads}",
        f"trained     {plan['trained_parameters']:,} parameters ({share:.2%})",
        *(_text_lines(plan) if train.get("kind") == "text" else _row_lines(plan)),
        f"steps       {plan['steps']:,} · {plan['batches_per_epoch']:,} batches an epoch · "
        f"{plan['warmup_steps']} of warm-up · the longest batch has {plan['longest_batch_tokens']:,} tokens",
    ]
    if plan["memory"] is not None:
        parts = [f"{name} {_size(size)}" for name, size in plan["memory"].items() if name != "total"]
        lines.append(f"memory      {_size(plan['memory']['total'])} predicted: {' · '.join(parts)}")
    else:
        why = "several processes share the model" if plan["world_size"] > 1 else "transformers runs this architecture"
        why = why if plan["engine"] == "torch" else "MLX's memory is measured only"
        lines.append(f"memory      no prediction: {why}")
    pieces = plan["pieces_of_the_longest_batch"]
    split = f", in {pieces} pieces" if pieces > 1 else ""
    lines += [
        f"            {_size(plan['measured_peak_bytes'])} measured on the longest batch{split}",
        f"disk        {_size(plan['disk_bytes'])} at most: {plan['saves']} saves of {_size(plan['checkpoint_bytes'])}, "
        f"{plan['checkpoints_kept']} kept",
        *_compiling_lines(plan),
        f"time        about {duration(plan['seconds'])} at {plan['tokens_per_second']:,.0f} tokens/s (measured)",
    ]
    return "\n".join(lines)


def _compiling_lines(plan: Mapping[str, Any]) -> list[str]:
    if (compiling := plan.get("compiling")) is None:
        return []
    return [f"compile     {'on' if compiling['on'] else 'off'}: {compiling['why']}"]


def _row_lines(plan: Mapping[str, Any]) -> list[str]:
    train = plan["data"]["train"]
    return [
        f"rows        {train['kept']:,} of {train['rows']:,} kept · {train['dropped']:,} dropped · "
        f"{train['truncated']:,} truncated · format {train['format']}",
        f"gate        {_gate_line(plan['gate'])}",
        f"tokens      {plan['tokens']:,} over {plan['epochs']:g} epochs · {train['tokens']:,} an epoch, "
        f"{train['trained_tokens'] / train['tokens']:.0%} of them trained",
    ]


def _text_lines(plan: Mapping[str, Any]) -> list[str]:
    train, held_out = plan["data"]["train"], plan["data"].get("validation")
    lost = sum(train["lost"].values())
    aside = "none held out"
    if held_out is not None:
        measured, tokens = held_out["measured_tokens"], held_out["tokens"]
        first = f"the first {measured:,} of {tokens:,} tokens measured" if measured < tokens else f"{tokens:,} tokens"
        aside = f"{held_out['documents']:,} held out ({first})"
        if shared := held_out.get("trained_on_too"):
            aside += f", of which {shared:,} are trained on too"
    return [
        f"text        {train['documents']:,} documents, {aside}, {lost:,} lost",
        f"tokens      {plan['tokens']:,} over {plan['epochs']:.4g} epochs · {train['tokens']:,} an epoch, "
        f"in chunks of {train['chunk_tokens']:,}",
    ]


def _gate_line(gate: Mapping[str, Any]) -> str:
    failed = [check["name"] for check in gate["checks"] if not check["passed"]]
    if not failed:
        return f"{len(gate['checks'])} checks passed"
    return f"{len(failed)} of {len(gate['checks'])} checks failed, and gate.action is warn: {', '.join(failed)}"


def _size(num_bytes: float) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e7 else f"{num_bytes / 1e3:,.0f} kB"
