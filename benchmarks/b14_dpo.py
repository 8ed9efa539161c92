"""B14: preference training (DPO, LoRA) on pairs with long prompts, in pairs a second.

Prompts of 384 tokens, two answers of 64 each, two pairs a step; everyone gets the same token ids, the same adapter
(rank 16 on every linear layer) and bfloat16 weights. What the reference costs is counted on every side: ours and
`trl-precomputed` ask it once before the first step, the other peers in every step. `trl-default` is DPOTrainer as it
comes (gradient checkpointing, bfloat16 autocast); the others have neither, and our allocator settings.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chat_rows import fixed_rows
from benchmarks.harness import (
    BenchmarkError,
    Options,
    Peer,
    Result,
    Rounds,
    model_folder,
    parse,
    report,
    run_rounds,
    table,
)
from benchmarks.training import LORA, NUM_WARM_UP_STEPS, check_learned
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer

PROMPT_TOKENS, ANSWER_TOKENS = 384, 64
PAIRS_PER_STEP = 2
LEARNING_RATE = 1e-4
TOLERANCE = 0.01
BEST = {"gradient_checkpointing": False, "bf16": False}
PEERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ours": ("ours_dpo", {"allocator": "tuned"}),
    "trl-default": ("trl_dpo", {}),
    "trl-best": ("trl_dpo", {"allocator": "tuned", "arguments": BEST}),
    "trl-precomputed": ("trl_dpo", {"allocator": "tuned", "arguments": {**BEST, "precompute_ref_log_probs": True}}),
}


def write_pairs(folder: Path, *, model: Path, options: Options) -> dict[str, Any]:
    """The pairs as ids: the same beginning, two continuations."""
    renderer = Renderer(Tokenizer.load(model))
    length = PROMPT_TOKENS + ANSWER_TOKENS
    rows = fixed_rows(renderer, num_rows=2 * options.num_rows, num_tokens=length, seed=options.seed)
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for chosen, other in zip(rows[::2], rows[1::2], strict=True):
            ids = chosen.input_ids
            pair = {
                "prompt_ids": ids[:PROMPT_TOKENS],
                "chosen_ids": ids[PROMPT_TOKENS:],
                "rejected_ids": other.input_ids[PROMPT_TOKENS:],
            }
            file.write(json.dumps(pair) + "\n")
    return {
        "model": str(model),
        "pairs": str(path),
        "rows_per_step": PAIRS_PER_STEP,
        "learning_rate": LEARNING_RATE,
        "lora": LORA,
        "dtype": "bfloat16",
    }


def pairs_per_second(result: Result) -> float:
    """Over the time of the optimizer steps, warm-up left out, and the share that each pair has of the reference's."""
    steps = result["seconds"][NUM_WARM_UP_STEPS:]
    per_pair = sum(steps) / (PAIRS_PER_STEP * len(steps))
    return 1.0 / (per_pair + result["notes"]["reference_seconds"] / result["notes"]["num_pairs"])


def check_agreement(rounds: Rounds) -> dict[str, float]:
    """How likely each peer finds the first step's better answers: nobody may compute something else."""
    found = {name: results[0]["notes"]["first_logps"] for name, results in rounds.results.items()}
    for name, results in rounds.results.items():
        for result in results:
            check_learned(name, result)
    middle = sorted(found.values())[len(found) // 2]
    if any(abs(each / middle - 1) > TOLERANCE for each in found.values()):
        raise BenchmarkError(f"the peers do not compute the same log-probabilities: {found}")
    return found


def show(options: Options, data: Mapping[str, Any]) -> None:
    peers = [Peer(name, worker, {**data, **spec}) for name, (worker, spec) in PEERS.items()]
    rounds = run_rounds(options.choose(peers), options=options)
    figures: dict[str, Any] = {"pairs_per_second": {}, "ours_over": {}, "first_logps": check_agreement(rounds)}
    lines = []
    for name, results in rounds.results.items():
        rate = rounds.median(name, pairs_per_second)
        figures["pairs_per_second"][name] = round(rate, 3)
        peak = rounds.median(name, lambda result: result["peak_bytes"]) / 1e9
        line = [
            name,
            f"{rate:.3f}",
            f"{peak:.2f} GB",
            f"{results[0]['loss_before']:.4f} -> {results[0]['loss_after']:.4f}",
            "",
        ]
        if name != "ours" and "ours" in rounds.results:
            ratio = rounds.ratio("ours", name, pairs_per_second)
            figures["ours_over"][name] = ratio
            line[-1] = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(line)
    report("b14", figures=figures, rounds=rounds, options=options)
    table(["peer", "pairs/s", "peak", "loss", "ours is faster by"], lines)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=8)
    with tempfile.TemporaryDirectory() as folder:
        show(options, write_pairs(Path(folder), model=model_folder(options), options=options))
    return 0
