"""B12: how much longer a training loop takes for a save. LoRA, a checkpoint after every second step, beside HF Trainer.

Every step trains on the same rows. The stall is the median time from the end of a step that saved to the end of the
next, less the same after a step that did not: so a save that works beside the next step is charged for what it takes
away from it. Both sides save the adapter, the optimizer and what resuming needs; ours also hashes every byte and syncs
it to the disk, HF Trainer does neither.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Peer, Result, model_folder, parse, report, run_rounds, table
from benchmarks.training import check_agreement, write_data

SAVE_STEPS, NUM_STEPS = 2, 16
TOKENS_PER_ROW, ROWS = 64, 4
SAVES: Mapping[str, Any] = {
    "save_strategy": "steps",
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "train_sampling_strategy": "sequential",
}
PEERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ours": ("ours", {"save_steps": SAVE_STEPS}),
    "hf-trainer": ("hf_trainer", {"trainer": "hf", "arguments": SAVES}),
}


def stall(result: Result) -> float:
    """Seconds a save adds. The first two intervals are left out: kernels and folders are made in them."""
    ends = result["ends"]
    after_save, after_none = [], []
    for step in range(2, len(ends) - 1):
        interval = ends[step + 1] - ends[step]
        (after_save if step + 1 in result["saved_after"] else after_none).append(interval)
    return statistics.median(after_save) - statistics.median(after_none)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=ROWS * NUM_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(
            Path(folder),
            model=model_folder(options),
            options=options,
            tokens_per_row=TOKENS_PER_ROW,
            rows_per_step=ROWS,
        )
        del data["probe"]
        common = {**data, "dtype": "bfloat16", "allocator": "tuned"}
        peers = [Peer(name, worker, {**common, **spec}) for name, (worker, spec) in PEERS.items()]
        rounds = run_rounds(options.choose(peers), options=options)
    check_agreement(rounds, dtype="bfloat16")
    stalls = {name: rounds.median(name, stall) for name in rounds.results}
    figures: dict[str, Any] = {"stall_seconds": stalls}
    if set(PEERS) <= set(stalls):
        figures["ratio"] = rounds.ratio("ours", "hf-trainer", stall)
    report("b12", figures=figures, rounds=rounds, options=options)
    table(["peer", "stall a save, ms"], [[name, f"{seconds * 1000:.0f}"] for name, seconds in stalls.items()])
    return 0
