"""B4: pretraining a small Llama from scratch, every weight, in tokens a second beside HF Trainer and litgpt.

A vocabulary of 8,192 is learnt from the documentation of the installed packages, and a fresh model of 17 million
parameters trained on it: float32 weights, bfloat16 products, eight rows of 512 tokens a step, AdamW, the same ids in
the same order. Rows are of one length, so the peer gets them as one batch without any padding.
`hf-trainer` computes in bfloat16 by autocast, `hf-trainer-best` with our allocator settings besides. `litgpt` is its
own `pretrain`, compiled as it comes, and `litgpt-best` has the allocator too. It takes part where it is installed, in
an environment of its own, for its pins are not ours:

    python3 -m venv build/litgpt && build/litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chat_rows import ChatRow, write_rows
from benchmarks.documentation_chats import write_chats
from benchmarks.harness import ROOT, BenchmarkError, Options, Peer, parse, report, run_rounds, say, table
from benchmarks.training import check_agreement, tokens_per_second, utilisation
from model_foundry.models.architecture import Architecture, to_config
from model_foundry.models.initialise import write_fresh_model
from model_foundry.tokenizer.training import train_tokenizer

VOCAB_SIZE, CONTEXT, ROWS_PER_STEP, NUM_PROBE_ROWS = 8192, 512, 8, 8
TEXT_BYTES = 2_000_000
LEARNING_RATE = 1e-3
FLOPS_PER_PARAMETER = 6
HF: Mapping[str, Any] = {
    "trainer": "hf",
    "dtype": "float32",
    "equal_rows": True,
    "arguments": {"bf16": True, "train_sampling_strategy": "sequential"},
}
PEERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ours": ("ours", {"dtype": "bfloat16", "allocator": "tuned"}),
    "hf-trainer": ("hf_trainer", HF),
    "hf-trainer-best": ("hf_trainer", {**HF, "allocator": "tuned"}),
}
LITGPT_PYTHON = ROOT / "build" / "litgpt" / "bin" / "python"
LITGPT_PEERS: dict[str, Mapping[str, Any]] = {"litgpt": {}, "litgpt-best": {"allocator": "tuned"}}


def write_work(folder: Path, *, options: Options) -> dict[str, Any]:
    """A fresh model with its tokenizer, and rows of exactly CONTEXT tokens after another in the text."""
    write_chats(folder / "text.jsonl", num_bytes=TEXT_BYTES, seed=options.seed)
    lines = (folder / "text.jsonl").read_text(encoding="utf-8").splitlines()
    texts = ["\n".join(message["content"] for message in json.loads(line)["messages"]) for line in lines]
    tokenizer = train_tokenizer(texts, vocab_size=VOCAB_SIZE).tokenizer
    tokenizer.save(folder / "tokenizer")
    shape = Architecture(
        architecture="llama", vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT,
        num_hidden_layers=8, hidden_size=384, num_attention_heads=6,
    )  # fmt: skip
    write_fresh_model(folder / "model", to_config(shape), seed=options.seed, tokenizer_from=folder / "tokenizer")
    wanted, ids = options.num_rows + NUM_PROBE_ROWS, []
    for text in texts:
        ids += map(int, tokenizer.encode(text))
        if len(ids) > wanted * CONTEXT:
            break
    cuts = [ids[first : first + CONTEXT] for first in range(0, len(ids) - CONTEXT, CONTEXT)]
    if len(cuts) < wanted:
        raise BenchmarkError(f"the text gives {len(cuts)} rows of {CONTEXT} tokens; ask for fewer with --rows")
    rows = [ChatRow(cut, cut) for cut in cuts]
    write_rows(folder / "rows.jsonl", rows[: options.num_rows])
    write_rows(folder / "probe.jsonl", rows[-NUM_PROBE_ROWS:])
    return {
        "model": str(folder / "model"),
        "rows": str(folder / "rows.jsonl"),
        "probe": str(folder / "probe.jsonl"),
        "rows_per_step": ROWS_PER_STEP,
        "learning_rate": LEARNING_RATE,
        "lora": None,
    }


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, about=__doc__, num_rows=96)
    with tempfile.TemporaryDirectory() as folder:
        work = write_work(Path(folder), options=options)
        peers = [Peer(name, worker, {**work, **spec}) for name, (worker, spec) in PEERS.items()]
        if LITGPT_PYTHON.exists():
            peers += [
                Peer(name, "litgpt_pretrain", {**work, **spec}, str(LITGPT_PYTHON))
                for name, spec in LITGPT_PEERS.items()
            ]
        else:
            say(f"litgpt is left out: there is no {LITGPT_PYTHON} (benchmarks/b4_pretraining.py says how to make it)")
        rounds = run_rounds(options.choose(peers), options=options)
    losses = check_agreement(rounds, dtype="bfloat16")
    machine = max((rounds.machine[0], rounds.machine[-1]), key=lambda found: found["gflops_bfloat16"])
    figures: dict[str, Any] = {"tokens_per_second": {}, "ours_over": {}, "mfu": {}, "loss_before": losses}
    lines = []
    for name, results in rounds.results.items():
        rate, size = rounds.median(name, tokens_per_second), results[0]["num_parameters"]
        share = utilisation(rate, num_parameters=size, flops_per_parameter=FLOPS_PER_PARAMETER, machine=machine)
        figures["tokens_per_second"][name], figures["mfu"][name] = round(rate, 1), round(share, 3)
        line = [name, f"{rate:.0f}", f"{share:.0%}", f"{losses[name]:.4f} -> {results[0]['loss_after']:.4f}", ""]
        if name != "ours" and "ours" in rounds.results:
            ratio = figures["ours_over"][name] = rounds.ratio("ours", name, tokens_per_second)
            line[-1] = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(line)
    report("b4", figures=figures, rounds=rounds, options=options)
    table(["peer", "tokens/s", "MFU (6N)", "probe loss", "ours is faster by"], lines)
    return 0
