"""B7: sixteen prompts, 128 greedy tokens each, bfloat16, in tokens a second.

`ours` is the invariant mode, as it comes on a CPU; `ours-free` the same without; `ours-one-by-one` answers one request
after another. HF `generate` gets all prompts in one padded batch. llama.cpp's own server runs in its process, with a
slot for each request. The bandwidth share is of `alone`: one sequence reads every weight once a token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generation import prompts, rate, show, write_bfloat16
from benchmarks.harness import Peer, model_folder, parse, run_rounds
from model_foundry.models.config import ModelConfig
from model_foundry.models.folder import read_config

MAX_TOKENS = 128


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=16)
    model = model_folder(options)
    asked = prompts(model, num_prompts=options.num_rows, seed=options.seed)
    common: dict[str, Any] = {"model": str(model), "max_tokens": MAX_TOKENS, "temperature": 0.0, "samples": 1}
    common |= {"prompts": asked, "num_requests": len(asked), "allocator": "tuned"}
    one = {"prompts": asked[:1], "num_requests": 1}
    with tempfile.TemporaryDirectory() as folder:
        gguf = write_bfloat16(Path(folder) / "model.gguf", model)
        peers = [
            Peer("ours", "generate", {**common, "peer": "ours", "invariant": True}),
            Peer("ours-free", "generate", {**common, "peer": "ours", "invariant": False}),
            Peer("ours-one-by-one", "generate", {**common, "peer": "ours", "invariant": True, "max_sequences": 1}),
            Peer("hf", "generate", {**common, "peer": "hf"}),
            Peer("llama.cpp", "generate", {**common, "peer": "llama.cpp", "gguf": str(gguf)}),
            Peer("alone", "generate", {**common, **one, "peer": "ours", "invariant": True}),
            Peer("alone-free", "generate", {**common, **one, "peer": "ours", "invariant": False}),
        ]
        rounds = run_rounds(options.choose(peers), options=options)
    num_bytes = 2 * ModelConfig.from_hf(read_config(model)).num_parameters
    # A copy reads and writes; decoding only reads.
    bandwidth = 1e9 * max(found["bandwidth_gb_s"] for found in rounds.machine)
    single = [name for name in ("alone", "alone-free") if name in rounds.results]
    extra = {"bandwidth_share": {name: rounds.median(name, rate) * num_bytes / bandwidth for name in single}}
    for name in single:
        for result in rounds.results[name]:
            result["num_tokens"] *= len(asked)
            result["seconds"] *= len(asked)
            result["cpu_seconds"] *= len(asked)
    show("b7", rounds, num_tokens=len(asked) * MAX_TOKENS, options=options, extra=extra)
    for name, share in extra["bandwidth_share"].items():
        print(f"{name}: {share:.2f} of the machine's memory bandwidth")
    return 0
