"""B1: LoRA fine-tuning on chat of mixed length, in real tokens a second.

Every peer makes optimizer steps of eight rows from the same tokens with the same adapter (rank 16 on every linear
layer), bfloat16. `trl-default` is SFTTrainer as it comes (padded, gradient checkpointing, bfloat16 autocast). The
`…-best` peers have bfloat16 weights, no checkpointing, our allocator settings, and rows grouped by length or packed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Peer, model_folder, parse, report, run_rounds, table
from benchmarks.training import check_agreement, tokens_per_second, utilisation, write_data

BEST = {"gradient_checkpointing": False, "bf16": False}
PEERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ours": ("ours", {"dtype": "bfloat16", "allocator": "tuned"}),
    # The published checkpoint is bfloat16, and TRL keeps a checkpoint's type; ours was widened when it was converted.
    "trl-default": ("hf_trainer", {"trainer": "trl", "dtype": "bfloat16"}),
    "trl-best-grouped": (
        "hf_trainer",
        {
            "trainer": "trl",
            "dtype": "bfloat16",
            "allocator": "tuned",
            "arguments": {**BEST, "train_sampling_strategy": "group_by_length"},
        },
    ),
    "trl-best-packed": (
        "hf_trainer",
        {
            "trainer": "trl",
            "dtype": "bfloat16",
            "allocator": "tuned",
            "arguments": {**BEST, "packing": True, "max_length": 1024, "per_device_train_batch_size": 1},
        },
    ),
    "hf-packed": ("hf_trainer", {"trainer": "hf", "dtype": "bfloat16", "allocator": "tuned"}),
}
FLOPS_PER_PARAMETER = 4


def peers(data: Mapping[str, Any]) -> list[Peer]:
    return [Peer(name, worker, {**data, **spec}) for name, (worker, spec) in PEERS.items()]


def show(options: Options, data: Mapping[str, Any]) -> None:
    rounds = run_rounds(options.choose(peers(data)), options=options)
    losses = check_agreement(rounds, dtype="bfloat16")
    machine = max((rounds.machine[0], rounds.machine[-1]), key=lambda found: found["gflops_bfloat16"])
    figures: dict[str, Any] = {"tokens_per_second": {}, "ours_over": {}, "mfu": {}, "loss_before": losses}
    lines = []
    for name, results in rounds.results.items():
        rate = rounds.median(name, tokens_per_second)
        base = results[0]["num_parameters"] - results[0]["num_trainable"]
        share = utilisation(rate, num_parameters=base, flops_per_parameter=FLOPS_PER_PARAMETER, machine=machine)
        figures["tokens_per_second"][name], figures["mfu"][name] = round(rate, 1), round(share, 3)
        line = [name, f"{rate:.0f}", f"{share:.0%}", f"{losses[name]:.4f} -> {results[0]['loss_after']:.4f}", ""]
        if name != "ours" and "ours" in rounds.results:
            ratio = rounds.ratio("ours", name, tokens_per_second)
            figures["ours_over"][name] = ratio
            line[-1] = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(line)
    report("b1", figures=figures, rounds=rounds, options=options)
    table(["peer", "tokens/s", "MFU (4N)", "probe loss", "ours is faster by"], lines)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), model=model_folder(options), options=options)
        show(options, data)
    return 0
