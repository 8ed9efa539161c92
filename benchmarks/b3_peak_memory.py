"""B3: peak memory above the loaded model for optimizer steps of 4,096 tokens (8 rows of 512), LoRA, bfloat16.

Each peer runs in a fresh process. Before its first step it returns what is freed and restarts the kernel's peak counter
(VmHWM); the figure is the peak after two steps less what was resident then. The loss alone is measured the same way:
4,096 hidden states through the head to a loss and its gradient, against full logits and against TRL's own function.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import (
    BenchmarkError,
    Options,
    Peer,
    Result,
    model_folder,
    parse,
    report,
    run_rounds,
    run_worker,
    table,
)
from benchmarks.training import LOSS_TOLERANCE, ROWS_PER_STEP, check_agreement, write_data

TOKENS_PER_ROW = 512
NUM_STEPS = 2
# Each step is then the same eight rows, so the first step's loss is comparable and the last one's is below it.
IN_ORDER = {"train_sampling_strategy": "sequential"}
PEERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ours": ("ours", {}),
    "ours-checkpointed": ("ours", {"gradient_checkpointing": True}),
    "trl-default": ("hf_trainer", {"trainer": "trl", "arguments": IN_ORDER}),
    "trl-fast": (
        "hf_trainer",
        {"trainer": "trl", "arguments": {**IN_ORDER, "gradient_checkpointing": False, "bf16": False}},
    ),
}
LOSS_WAYS = ("ours", "full-logits", "trl")
# What stands beside what: checkpointing trades time for memory, so like is compared with like.
COMPARED = {"ours": "trl-fast", "ours-checkpointed": "trl-default"}


def peak_above_model(result: Result) -> float:
    return result["peak_bytes"] - result["loaded_bytes"]


def loss_alone(options: Options) -> dict[str, Result]:
    """One process a way; memory repeats to a few pages, so one run is enough."""
    spec = {"num_tokens": ROWS_PER_STEP * TOKENS_PER_ROW, "dtype": "bfloat16"}
    found = {way: run_worker("loss_part", {**spec, "way": way}, options=options) for way in LOSS_WAYS}
    losses = [result["loss"] for result in found.values()]
    if max(losses) / min(losses) - 1 > LOSS_TOLERANCE["bfloat16"]:
        raise BenchmarkError(f"the losses differ: { {way: result['loss'] for way, result in found.items()} }")
    if not all(result["grad_norm"] > 0 for result in found.values()):
        raise BenchmarkError("a gradient is zero")
    return found


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=ROWS_PER_STEP * NUM_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), model=model_folder(options), options=options, tokens_per_row=TOKENS_PER_ROW)
        del data["probe"]
        peers = [Peer(name, worker, {**data, "dtype": "bfloat16", **spec}) for name, (worker, spec) in PEERS.items()]
        rounds = run_rounds(options.choose(peers), options=options)
    check_agreement(rounds, dtype="bfloat16")
    peaks = {name: rounds.median(name, peak_above_model) for name in rounds.results}
    ratios = {
        f"{ours} / {theirs}": rounds.ratio(ours, theirs, peak_above_model)
        for ours, theirs in COMPARED.items()
        if {ours, theirs} <= set(peaks)
    }
    alone = loss_alone(options)
    figures = {"peak_bytes_above_model": peaks, "ratios": ratios, "loss_alone": alone}
    report("b3", figures=figures, rounds=rounds, options=options)
    lines = []
    for name, peak in peaks.items():
        theirs = COMPARED.get(name, "")
        ratio = ratios.get(f"{name} / {theirs}")
        lines.append([name, f"{peak / 1e6:.0f}", f"{ratio['median']:.2f} of {theirs}" if ratio else ""])
    table(["peer", "peak above the model, MB", "ratio"], lines)
    print()
    lines = [[way, f"{found['peak_bytes'] / 1e6:.0f}", f"{found['seconds']:.2f}"] for way, found in alone.items()]
    table(["the loss alone", "peak, MB", "seconds"], lines)
    return 0
