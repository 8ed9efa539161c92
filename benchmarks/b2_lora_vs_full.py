"""B2: how much faster LoRA is than full fine-tuning, in our code and in PEFT's. Arithmetic allows 1.5 at most.

Both sides train bfloat16 weights on the same packed steps of eight rows, with the same allocator settings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Peer, model_folder, parse, report, run_rounds, table
from benchmarks.training import check_agreement, tokens_per_second, write_data

SIDES: dict[str, tuple[str, Mapping[str, Any]]] = {"ours": ("ours", {}), "peft": ("hf_trainer", {"trainer": "hf"})}
# A rate that suits an adapter tears whole weights apart.
FULL = {"lora": None, "learning_rate": 2e-5}


def peers(data: Mapping[str, Any]) -> list[Peer]:
    common = {**data, "dtype": "bfloat16", "allocator": "tuned"}
    return [
        Peer(f"{side}-{kind}", worker, {**common, **spec, **change})
        for side, (worker, spec) in SIDES.items()
        for kind, change in (("lora", {}), ("full", FULL))
    ]


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=40)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), model=model_folder(options), options=options)
        rounds = run_rounds(options.choose(peers(data)), options=options)
    losses = check_agreement(rounds, dtype="bfloat16")
    rates = {name: round(rounds.median(name, tokens_per_second), 1) for name in rounds.results}
    ratios = {
        side: rounds.ratio(f"{side}-lora", f"{side}-full", tokens_per_second)
        for side in SIDES
        if {f"{side}-lora", f"{side}-full"} <= set(rates)
    }
    figures = {"tokens_per_second": rates, "lora_over_full": ratios, "loss_before": losses}
    report("b2", figures=figures, rounds=rounds, options=options)
    lines = [
        [side, f"{rates[f'{side}-lora']:.0f}", f"{rates[f'{side}-full']:.0f}"]
        + [f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"]
        for side, ratio in ratios.items()
    ]
    table(["code", "LoRA tokens/s", "full tokens/s", "LoRA over full"], lines)
    return 0
