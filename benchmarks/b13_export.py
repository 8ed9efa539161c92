"""B13: the parity gate and the export of a merged, then a GGUF model: seconds, bytes written over bytes needed, memory.

SmolLM2 with a random adapter of rank 16 on every linear layer. Writing is measured by itself in a process of its own
(one pass over the weights, memory bounded by one shard); then each export whole, with all that its gate measures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Peer, Result, model_folder, parse, report, run_rounds, table
from model_foundry.models.adapter import adapter_tensors, target_names, write_adapter
from model_foundry.models.language_model import load_language_model
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.targets import adapt
from model_foundry.types import LoraConfig

SHARD_BYTES = 64 << 20
FORMAT = "q8_0"
PHASES = ("write-merged", "write-gguf", "export-merged", "export-gguf")


def write_random_adapter(folder: Path, base: Path, *, seed: int) -> Path:
    model = load_language_model(base, dtype=torch.bfloat16)
    linears, lora = model.linears(), LoraConfig(r=16, lora_alpha=32)
    adapt(linears, lora, seed=seed, counter=DropoutCounter())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: value if "lora_A" in name else 0.04 * torch.randn(value.shape, generator=generator)
        for name, value in adapter_tensors(linears).items()
    }
    folder.mkdir()
    write_adapter(folder, tensors=tensors, lora=lora, targets=target_names(linears), base_model=str(base))
    return folder


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__)
    base = model_folder(options)
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_random_adapter(Path(folder, "adapter"), base, seed=options.seed)
        common = {"model": str(base), "adapter": str(adapter), "shard_bytes": SHARD_BYTES, "format": FORMAT}
        peers = [Peer(phase, "hand_over", {**common, "what": phase}) for phase in PHASES]
        rounds = run_rounds(options.choose(peers), options=options)
    keys = {
        "seconds": lambda result: result["seconds"],
        "written_over_needed": lambda result: result["written_bytes"] / result["needed_bytes"],
        "read_over_base": lambda result: result["read_bytes"] / result["base_bytes"],
        "peak_mb": lambda result: result["peak_bytes"] / 1e6,
    }
    figures: dict[str, Any] = {
        name: {key: rounds.median(name, value) for key, value in keys.items()} for name in rounds.results
    }
    report("b13", figures={"shard_bytes": SHARD_BYTES, "phases": figures}, rounds=rounds, options=options)
    rows = [[name, *_cells(values)] for name, values in figures.items()]
    table(["phase", "s", "written / needed", "read / base", "peak above start, MB"], rows)
    return 0


def _cells(values: Result) -> list[str]:
    return [f"{values['seconds']:.1f}", f"{values['written_over_needed']:.3f}", f"{values['read_over_base']:.3f}",
            f"{values['peak_mb']:.0f}"]  # fmt: skip
