"""What B7 and B8 share: prompts, the model as a bfloat16 GGUF for llama.cpp, and the table."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, Options, Result, Rounds, report, table
from benchmarks.questions import question
from model_foundry.export.gguf import write_gguf
from model_foundry.export.merge import plan_merge
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer


def prompts(model: Path, *, num_prompts: int, seed: int, num_tokens: int | None = None) -> list[list[int]]:
    """Plain questions of some 50 tokens, each another; or of exactly so many tokens, repeated until they are."""
    tokenizer, drawn = Tokenizer.load(model), random.Random(seed)
    rows = []
    for number in range(num_prompts):
        row = tokenizer.encode(f"{number}. {question(drawn)}")
        while num_tokens is not None and len(row) < num_tokens:
            row += tokenizer.encode(f" {question(drawn)}")
        rows.append(list(map(int, row[:num_tokens])))
    return rows


def write_bfloat16(path: Path, model: Path) -> Path:
    """The model for llama.cpp, at the precision of the others."""
    tokenizer = Tokenizer.load(model)
    write_gguf(
        path, plan_merge(model, None), format="bf16", tokenizer=tokenizer,
        chat_template=Renderer(tokenizer).template_text, stop_token_ids=(), name="benchmark",
    )  # fmt: skip
    return path


def rate(result: Result) -> float:
    return result["num_tokens"] / result["seconds"]


def cpu_rate(result: Result) -> float:
    return result["num_tokens"] / result["cpu_seconds"]


def show(name: str, rounds: Rounds, *, num_tokens: int, options: Options, extra: dict[str, Any]) -> None:
    """Check that every answer is whole, then print rates and the ratios to `ours`."""
    for peer, results in rounds.results.items():
        if any(result["num_tokens"] != num_tokens for result in results):
            raise BenchmarkError(f"{peer} made {results[0]['num_tokens']} tokens instead of {num_tokens}")
    names: Sequence[str] = list(rounds.results)
    figures: dict[str, Any] = {
        "tokens_per_second": {peer: rounds.median(peer, rate) for peer in names},
        "tokens_per_cpu_second": {peer: rounds.median(peer, cpu_rate) for peer in names},
        **extra,
    }
    lines = []
    for peer in names:
        line = [peer, f"{rounds.median(peer, rate):.0f}", f"{rounds.median(peer, cpu_rate):.0f}", ""]
        if "ours" in names and peer != "ours":
            ratio = rounds.ratio("ours", peer, rate)
            figures.setdefault("ours_over", {})[peer] = ratio
            line[-1] = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(line)
    report(name, figures=figures, rounds=rounds, options=options)
    table(["peer", "tokens/s", "tokens/s of processor time", "ours is faster by"], lines)
