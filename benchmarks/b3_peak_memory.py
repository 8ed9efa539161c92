"""B3: peak memory above the loaded model for optimizer steps of 4,096 tokens (8 rows of 512), LoRA, bfloat16.

Each peer runs in a fresh process. Before its first step it returns what is freed and restarts the kernel's peak counter
(VmHWM); the figure is the peak after two steps less what was resident then.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Peer, Result, model_folder, parse, report, run_rounds, table
from benchmarks.training import ROWS_PER_STEP, check_agreement, write_data

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
# What stands beside what: checkpointing trades time for memory, so like is compared with like.
COMPARED = {"ours": "trl-fast", "ours-checkpointed": "trl-default"}


def peak_above_model(result: Result) -> float:
    return result["peak_bytes"] - result["loaded_bytes"]


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
    report("b3", figures={"peak_bytes_above_model": peaks, "ratios": ratios}, rounds=rounds, options=options)
    lines = []
    for name, peak in peaks.items():
        theirs = COMPARED.get(name, "")
        ratio = ratios.get(f"{name} / {theirs}")
        lines.append([name, f"{peak / 1e6:.0f}", f"{ratio['median']:.2f} of {theirs}" if ratio else ""])
    table(["peer", "peak above the model, MB", "ratio"], lines)
    return 0
