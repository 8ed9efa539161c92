"""Our shards: `build_shards` in this process, as `foundry data pack` calls it; loading the tokenizer is in the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers.packing import Clock, rows_digest, use_one_core
from benchmarks.workers.process import resident_bytes, run_worker
from model_foundry.data.shards.build import build_shards
from model_foundry.data.shards.plan import PackOptions, RendererSource
from model_foundry.data.shards.reader import PackedShards


def pack(spec: dict[str, Any]) -> dict[str, Any]:
    use_one_core()
    out = Path(spec["scratch"]) / "shards"
    options = PackOptions(max_length=spec["max_length"])
    clock = Clock()
    report = build_shards(Path(spec["rows"]), out, options, RendererSource(Path(spec["model"])), num_processes=1)
    timed = clock.stop()
    shards = PackedShards.open(out)
    rows: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * report.index.counts.num_records
    for number in range(shards.num_bins):
        found = shards.bin(number)
        for row, start, end in zip(found.rows, found.starts, [*found.starts[1:], len(found.tokens)], strict=True):
            rows[row] = (found.tokens[start:end], found.weights[start:end])
    return {
        **timed,
        "num_tokens": report.index.num_tokens,
        "num_rows": report.index.counts.num_rows,
        "fill": report.index.fill,
        "digest": rows_digest(rows),
        "peak_bytes": resident_bytes("VmHWM"),
    }


if __name__ == "__main__":
    run_worker(pack)
