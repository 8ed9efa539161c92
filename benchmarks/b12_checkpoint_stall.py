"""B12: how long a save stops the training loop. LoRA, a checkpoint after every optimizer step, beside HF Trainer.

The stall is the time between the end of a step and the moment the loop may begin the next one. Both sides save the
adapter, the optimizer and what resuming needs; ours also hashes and syncs every byte to the disk, HF Trainer neither.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Peer, Result, model_folder, parse, report, run_rounds, table
from benchmarks.training import ROWS_PER_STEP, check_agreement, write_data

SAVES: Mapping[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
PEERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ours": ("ours", {"save_steps": 1}),
    "hf-trainer": ("hf_trainer", {"trainer": "hf", "arguments": SAVES}),
}


def stall(result: Result) -> float:
    """The median save of a run, the first left out: it creates folders and warms the page cache."""
    return statistics.median(result["save_seconds"][1:])


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=ROWS_PER_STEP * 6)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), model=model_folder(options), options=options)
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
