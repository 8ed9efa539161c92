"""B10: a file of chats to packed token ids and masks on the disk, one core, beside datasets.map with TRL's packing.

Each side reads the same JSON Lines, renders the model's chat template, tokenises, marks what the assistant says, packs
best-fit decreasing into 2,048 tokens and writes the result. Ids and masks of every row must be the same on all sides
(rows with control tokens in people's text are left out: the peers read them as such, we do not).
MB/s are megabytes of the JSON Lines by the clock on the wall; processor time is told beside it, for busy machines.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.documentation_chats import write_chats
from benchmarks.harness import BenchmarkError, Peer, Result, model_folder, parse, report, run_rounds, say, table
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer

MAX_LENGTH = 2048
BYTES_PER_ROW = 650
NUM_ROWS = 36_000
SPOKEN = "message['content'] + '<|im_end|>'"
"""What the assistant says, in the template of the model that is measured with."""


def marked_template(model: Path) -> str:
    """The model's template with `{% generation %}` around what the assistant says; it writes the same text."""
    template = Renderer(Tokenizer.load(model)).template_text
    spoken = (
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ " + SPOKEN + " }}{% endgeneration %}"
        "{% else %}{{ " + SPOKEN + " }}{% endif %}{{ '\n' }}"
    )
    plain = "{{'<|im_start|>' + message['role'] + '\n' + " + SPOKEN + " + '\n'}}"
    if plain not in template:
        raise BenchmarkError("the model's chat template is not the one that this benchmark knows how to mark")
    return template.replace(plain, spoken)


def main(arguments: Sequence[str]) -> int:
    options = replace(parse(arguments, about=__doc__, num_rows=NUM_ROWS), num_threads=1)
    model = model_folder(options)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "chats.jsonl"
        control = Tokenizer.load(model).special_tokens
        num_rows = write_chats(
            rows, num_bytes=options.num_rows * BYTES_PER_ROW, seed=options.seed, without=list(control)
        )
        num_bytes = rows.stat().st_size
        say(f"{num_rows:,} chats, {num_bytes / 1e6:.1f} MB")
        common = {"rows": str(rows), "model": str(model), "max_length": MAX_LENGTH}
        theirs = {**common, "template": marked_template(model)}
        peers = [
            Peer("ours", "pack_ours", common),
            Peer("trl", "pack_trl", {**theirs, "batched": False}),
            Peer("trl-batched", "pack_trl", {**theirs, "batched": True}),
        ]
        rounds = run_rounds(options.choose(peers), options=options)

    def megabytes(result: Result) -> float:
        return num_bytes / 1e6 / result["seconds"]

    def cpu_megabytes(result: Result) -> float:
        return num_bytes / 1e6 / result["cpu_seconds"]

    firsts = {name: results[0] for name, results in rounds.results.items()}
    if len({result["digest"] for results in rounds.results.values() for result in results}) != 1:
        raise BenchmarkError("the peers made other ids or masks")
    figures = {
        "megabytes": num_bytes / 1e6,
        "max_length": MAX_LENGTH,
        "megabytes_per_second": {name: rounds.median(name, megabytes) for name in firsts},
        "megabytes_per_cpu_second": {name: rounds.median(name, cpu_megabytes) for name in firsts},
        "same_ids_and_masks": True,
        "fill": {name: result["fill"] for name, result in firsts.items()},
        "rows_kept": {name: result["num_rows"] / num_rows for name, result in firsts.items()},
        "peak_megabytes": {name: result["peak_bytes"] / 1e6 for name, result in firsts.items()},
    }
    if "ours" in firsts:
        others = [name for name in firsts if name != "ours"]
        figures["ratio"] = {name: rounds.ratio("ours", name, megabytes) for name in others}
        figures["cpu_ratio"] = {name: rounds.ratio("ours", name, cpu_megabytes) for name in others}
    report("b10", figures=figures, rounds=rounds, options=options)
    lines = [
        [name, f"{rounds.median(name, megabytes):.2f}", f"{rounds.median(name, cpu_megabytes):.2f}"]
        + [f"{result['fill']:.2%}", f"{result['num_rows'] / num_rows:.2%}", f"{result['peak_bytes'] / 1e6:.0f}"]
        for name, result in firsts.items()
    ]
    table(["peer", "MB/s", "MB/s of processor time", "fill", "rows kept", "peak MB"], lines)
    return 0
