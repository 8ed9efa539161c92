"""What several processes compute, beside what one does: `torchrun -m tests.several_ranks MODELS RESULTS.json`.

Rank 0 measures and writes the results, the others follow its engine. Real processes, real FSDP, gloo.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from model_foundry.engine.ranks import Ranks, joined
from model_foundry.engine.sharded_engine import ShardedEngine, follow
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import FoundryError
from model_foundry.types import AdamParams, Datum, LoraConfig, MuonParams, OptimizerKind, SamplingParams
from tests.tiny_models import random_comparisons, random_data

OPTIONS = {"device": "cpu", "dtype": "float32", "num_threads": 1}
STEP = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0, eps=1e-6)
"""AdamW divides by a gradient's size: with a smaller eps the last bit of a sum next to nothing is a part of a step."""
LENGTHS = ((12, 30, 7, 21, 5), (9,), (40, 3, 3))  # the second has fewer rows than there are ranks
LORA = LoraConfig(r=4, lora_alpha=8.0)
MUON_STEP = MuonParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0)
# name: (folder, adapter, the engine's options); "muon" in the name: trained by it; "pairs": on preferences
CASES: dict[str, tuple[str, LoraConfig | None, dict[str, Any]]] = {
    "full": ("llama", None, {}),
    "full in pieces": ("llama-tied", None, {"micro_batch_tokens": 16, "gradient_checkpointing": True}),
    "dropout of the model": ("qwen3-dropout", None, {}),
    "lora with dropout": ("llama-tied", LoraConfig(r=4, lora_alpha=8.0, lora_dropout=0.1), {}),
    "dora": ("qwen2", LoraConfig(r=4, lora_alpha=8.0, use_dora=True), {}),
    "lora in bfloat16": ("llama", LORA, {"dtype": "bfloat16"}),
    "muon": ("llama-tied", None, {}),
    "muon on experts": ("moe-balanced", None, {}),
    "float16": ("llama-tied", None, {"dtype": "float16"}),
    "experts": ("moe-balanced", None, {}),
    "experts in pieces": ("moe-balanced", None, {"micro_batch_tokens": 16}),
    "lora on experts": ("moe-balanced", LORA, {}),
    "pairs": ("llama-tied", LORA, {}),
    "pairs in pieces, every weight": ("llama", None, {"micro_batch_tokens": 40}),
}
PAIRS = ((12, 9, 4), (3, 2, 20), (1, 60, 60), (30, 4, 4), (8, 5, 3))
"""(shared, better, worse); those of the third stand apart."""


def batches(step: int, *, of_pairs: bool = False) -> list[list[Datum]]:
    if of_pairs:
        return [random_comparisons(PAIRS[:count], seed=10 * step) for count in (5, 1)]
    return [random_data(LENGTHS[(step + n) % 3], seed=10 * step + n) for n in range(2)]


def lightened(batch: list[Datum], dtype: torch.dtype) -> list[Datum]:
    """Weights that the first loss scale of float16 is made for: those of a run add up to one."""
    share = 2.0**-8 if dtype == torch.float16 else 1.0
    return [
        replace(row, loss_inputs={**row.loss_inputs, "weights": row.loss_inputs["weights"] * share}) for row in batch
    ]


def train(
    engine: TorchEngine, model_id: str, steps: Sequence[int], *, of_pairs: bool = False
) -> list[dict[str, float]]:
    """The step is that of the optimizer that the model was created with."""
    records, update_by = [], MUON_STEP if engine.state_facts(model_id)["optimizer"] == "muon" else STEP
    loss_fn = "dpo_sigmoid" if of_pairs else "cross_entropy"
    for step in steps:
        outputs = [
            engine.forward_backward(model_id, lightened(batch, engine.dtype), loss_fn=loss_fn, logprobs="all")
            for batch in batches(step, of_pairs=of_pairs)
        ]
        update = engine.optim_step(model_id, update_by)
        records.append({
            "loss": math.fsum(each.loss_sum for each in outputs),
            "router_loss": math.fsum(each.router_loss for each in outputs),
            "grad_norm": update.grad_norm,
            "logprobs": float(np.concatenate([row for each in outputs for row in each.logprobs]).sum()),
        })  # fmt: skip
    validation = engine.forward(model_id, random_data((8, 20, 4), seed=99))
    return [*records, {"loss": validation.loss_sum}]


def final(engine: TorchEngine, model_id: str) -> dict[str, np.ndarray]:
    tensors = {**engine.trained_tensors(model_id), **engine.state_tensors(model_id)}
    return {name: tensor.cpu().float().numpy().copy() for name, tensor in tensors.items()}


def compare(ranks: Ranks, models: Path) -> dict[str, Any]:
    """Both engines on every case: records, how far apart the tensors end, answers, and the share that rank 0 holds."""
    results: dict[str, Any] = {}
    for name, (folder, lora, options) in CASES.items():
        alone, together = TorchEngine(**OPTIONS | options), ShardedEngine(ranks, **OPTIONS | options)
        sides = []
        for engine in (alone, together):
            kind = "muon" if "muon" in name else "adamw"
            model_id = engine.create_model(models / folder, lora=lora, seed=5, optimizer=kind)
            fresh = final(engine, model_id)
            records = train(engine, model_id, range(3), of_pairs="pairs" in name)
            prompts = [np.array([5, 9, 11], dtype=np.int32), np.array([7], dtype=np.int32)]
            answers = engine.sample(model_id, prompts, SamplingParams(max_tokens=6, stop_token_ids=(2,)))
            sides.append((records, final(engine, model_id), [each.tokens.tolist() for each in answers], fresh))
        model = together._held_model(model_id)
        assert model.optimizer is not None
        weights = list(model.language_model.parameters())
        moments = [shard.holder.to_local() for shard in model.optimizer.state_shards().values()]
        results[name] = {
            "alone": sides[0][0],
            "together": sides[1][0],
            "same start": all(np.array_equal(sides[0][3][key], sides[1][3][key]) for key in sides[0][3]),
            "apart": max(float(np.abs(sides[0][1][key] - sides[1][1][key]).max()) for key in sides[0][1]),
            "names": [sorted(side[1]) for side in sides],
            "answers": [side[2] for side in sides],
            "held": {
                "weights": sum(cast(DTensor, each).to_local().numel() for each in weights)
                / sum(each.numel() for each in weights),
                "moments": sum(each.numel() for each in moments) / model.optimizer.num_remembered,
            },
        }
        together.delete_model(model_id)
    return results


STATES: tuple[tuple[str, LoraConfig | None, OptimizerKind], ...] = (
    ("llama-tied", None, "adamw"),
    ("moe-balanced", None, "adamw"),
    ("moe-balanced", None, "muon"),
    ("moe-balanced", LORA, "adamw"),
)


def states(ranks: Ranks, models: Path, root: Path) -> dict[str, Any]:
    """Saved by one kind of engine and read by the other: warnings, and the records of two more steps."""
    results: dict[str, Any] = {}
    for folder, lora, optimizer in STATES:
        alone, together = TorchEngine(**OPTIONS), ShardedEngine(ranks, **OPTIONS)
        for name, writer, reader in (
            ("1 to n", alone, together),
            ("n to 1", together, alone),
            ("n to n", together, together),
        ):
            written = writer.create_model(models / folder, lora=lora, seed=5, optimizer=optimizer)
            train(writer, written, range(2))
            place = Path(tempfile.mkdtemp(dir=root))
            writer.save_state(written, place)
            read = reader.create_model(models / folder, lora=lora, seed=77, optimizer=optimizer)
            warnings = reader.load_state(read, place, optimizer=True)
            before, after = final(writer, written), final(reader, read)
            results[f"{folder} {'full' if lora is None else 'lora'} {optimizer} {name}"] = {
                "warnings": warnings,
                "same bits": all(np.array_equal(before[key], after[key]) for key in before),
                "went on": train(writer, written, range(2, 4)),
                "resumed": train(reader, read, range(2, 4)),
                "files": sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()),
            }
    return results


def refusals(ranks: Ranks, models: Path, root: Path) -> dict[str, Any]:
    """What is refused, in words, with the engine going on afterwards."""
    engine = ShardedEngine(ranks, **OPTIONS)
    model_id = engine.create_model(models / "llama", lora=LORA)
    empty = root / "empty"
    empty.mkdir()
    attempts: dict[str, Callable[[], object]] = {
        "gpt2": lambda: engine.create_model(models / "gpt2", lora=LORA),
        "nf4": lambda: ShardedEngine(ranks, **OPTIONS, quantization="nf4"),
        "transformers": lambda: ShardedEngine(ranks, **OPTIONS, implementation="transformers"),
        "muon": lambda: engine.create_model(models / "llama", lora=LORA, optimizer="muon"),
        "no such adapter": lambda: engine.create_model(models / "llama", lora=None, adapter=empty),
        "no such checkpoint": lambda: engine.load_state(model_id, empty, optimizer=True),
        "a token outside": lambda: engine.forward(model_id, [Datum.from_row(np.array([1, 9999]), np.ones(2))]),
        "a ruinous step": lambda: engine.optim_step(model_id, AdamParams(learning_rate=math.nan)),
    }
    said: dict[str, Any] = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except FoundryError as error:
            said[name] = str(error)
    said["still there"] = engine.forward(model_id, random_data((4,))).loss_sum
    return said


def skips(ranks: Ranks, models: Path) -> dict[str, Any]:
    """A gradient that is not finite on one rank alone: every rank skips the step, and nothing changes."""
    engine = ShardedEngine(ranks, **OPTIONS)
    model_id = engine.create_model(models / "llama", lora=None)
    data = random_data((30, 6), seed=1)
    data[1].loss_inputs["weights"][0] = np.inf
    before = final(engine, model_id)
    engine.forward_backward(model_id, data)
    update = engine.optim_step(model_id, STEP)
    after = final(engine, model_id)
    train(engine, model_id, range(1))
    return {
        "skipped": update.skipped,
        "step": update.step,
        "unchanged": all(np.array_equal(before[name], after[name]) for name in before),
        "next step": engine.optim_step(model_id, STEP).step,
    }


def main() -> None:
    torch.set_num_threads(1)
    models, results = Path(sys.argv[1]), Path(sys.argv[2])
    with joined() as ranks, tempfile.TemporaryDirectory() as root:
        if not ranks.is_first:
            return follow(ranks)
        measured = {
            "compared": compare(ranks, models),
            "states": states(ranks, models, Path(root)),
            "refusals": refusals(ranks, models, Path(root)),
            "skips": skips(ranks, models),
        }
        results.write_text(json.dumps(measured))
    return None


if __name__ == "__main__":
    main()
