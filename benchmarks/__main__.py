"""`python -m benchmarks NAME [--rounds N …]`: the table of benchmarks, and the way in."""

from __future__ import annotations

import importlib
import sys

from benchmarks.harness import BenchmarkError
from model_foundry.errors import FoundryError

BENCHMARKS = {
    "b1": ("b1_lora_sft", "LoRA fine-tuning on chat of mixed length: real tokens a second beside TRL and HF Trainer"),
    "b2": ("b2_lora_vs_full", "LoRA against full fine-tuning, ours and PEFT's"),
    "b3": ("b3_peak_memory", "peak memory above the loaded model on 4k tokens, beside TRL"),
    "b4": ("b4_pretraining", "pretraining a small model from scratch, beside HF Trainer"),
    "b5": ("b5_tenants", "16 tenants with short requests, through the tinker SDK, beside a loop over PEFT adapters"),
    "b6": ("b6_round_trip", "the round trip of a future that does nothing, and how long the event loop stands still"),
    "b7": ("b7_generation", "batched generation, beside HF generate and llama.cpp; one sequence alone"),
    "b8": ("b8_samples", "eight samples of one long prompt, beside HF generate"),
    "b9": ("b9_start_up", "foundry --help, and the time to the first optimizer step"),
    "b10": (
        "b10_packed_shards",
        "JSON Lines to packed shards on one core, beside datasets.map with TRL's packing",
    ),
    "b11": ("b11_near_duplicates", "near-duplicates in 100,000 chat rows, beside datasketch and rensa"),
    "b12": ("b12_checkpoint_stall", "how long a save stops the training loop, beside HF Trainer"),
    "b13": ("b13_export", "the gate and the export of a merged, then a GGUF model: seconds, bytes, memory"),
    "b14": ("b14_dpo", "preference training (DPO) on pairs with long prompts, beside TRL's DPOTrainer"),
    "memory": ("memory_table", "peak memory as the plan predicts it, beside runs in fresh processes"),
    "serve": ("serve_load", "foundry serve under 1, 4, 16 and 64 clients of locust: latency, throughput, first text"),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in BENCHMARKS:
        for name, (_, about) in BENCHMARKS.items():
            print(f"  {name:6} {about}")
        return 0 if not arguments else 2
    module, _ = BENCHMARKS[arguments[0]]
    try:
        return importlib.import_module(f"benchmarks.{module}").main(arguments[1:])
    except (BenchmarkError, FoundryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
