"""datasets.map and TRL's packing: a row at a time as SFTTrainer prepares its data, or batched, which is faster.

The tokenizer is loaded before the clock starts. The chat template marks what the assistant says, as TRL asks of a
template for its assistant masks.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import AutoTokenizer
from trl import pack_dataset

from benchmarks.workers.packing import Clock, rows_digest, use_one_core
from benchmarks.workers.process import resident_bytes, run_worker

PACKAGES = ("datasets", "tokenizers", "transformers", "trl")


def pack(spec: dict[str, Any]) -> dict[str, Any]:
    use_one_core()
    datasets.disable_progress_bars()
    scratch = Path(spec["scratch"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        made: Any = tokenizer.apply_chat_template(
            rows["messages"], chat_template=spec["template"], tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        return {name: made[name] for name in ("input_ids", "assistant_masks")}

    clock = Clock()
    rows = Dataset.from_json(spec["rows"], cache_dir=str(scratch / "cache"))
    assert isinstance(rows, Dataset)
    encoded = rows.map(encode, batched=spec["batched"], remove_columns=rows.column_names)
    packed = pack_dataset(encoded, spec["max_length"], "bfd")
    packed.save_to_disk(scratch / "packed")
    timed = clock.stop()
    num_tokens = sum(map(len, packed["input_ids"]))
    return {
        **timed,
        "num_tokens": num_tokens,
        "num_rows": sum(map(len, packed["seq_lengths"])),
        "fill": num_tokens / (len(packed) * spec["max_length"]),
        "digest": rows_digest(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)),
        "peak_bytes": resident_bytes("VmHWM"),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    run_worker(pack)
