"""B8: eight samples of 128 tokens for one prompt of 512, beside HF `generate` with `num_return_sequences`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.generation import prompts, show
from benchmarks.harness import Peer, model_folder, parse, run_rounds

PROMPT_TOKENS, MAX_TOKENS = 512, 128


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=8)
    model = model_folder(options)
    (prompt,) = prompts(model, num_prompts=1, seed=options.seed, num_tokens=PROMPT_TOKENS)
    common: dict[str, Any] = {"model": str(model), "max_tokens": MAX_TOKENS, "temperature": 1.0, "allocator": "tuned"}
    common |= {"samples": options.num_rows, "prompts": [prompt] * options.num_rows}
    peers = [
        Peer("ours", "generate", {**common, "peer": "ours", "invariant": True}),
        Peer("ours-free", "generate", {**common, "peer": "ours", "invariant": False}),
        Peer("hf", "generate", {**common, "peer": "hf"}),
    ]
    rounds = run_rounds(options.choose(peers), options=options)
    show(
        "b8", rounds, num_tokens=options.num_rows * MAX_TOKENS, options=options, extra={"prompt_tokens": PROMPT_TOKENS}
    )
    return 0
