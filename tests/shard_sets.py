"""Small corpora, packed, and what comes out of their shards again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.data.shards.build import PackReport, build_shards
from model_foundry.data.shards.plan import PackOptions, RendererSource
from model_foundry.data.shards.reader import PackedShards

TEXT = "the quick brown fox asks what a lazy dog answers to 12 questions, naïve 数学 <b> don't"
WORDS = TEXT.split()


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*texts: str) -> dict[str, Any]:
    """A row of the format messages, the roles taking turns."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def chats(lengths: Sequence[int], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose answers have so many words."""
    chance = np.random.default_rng(seed)
    return [
        chat(f"question {number}", " ".join(chance.choice(WORDS, size=length))) for number, length in enumerate(lengths)
    ]


def texts(lengths: Sequence[int], *, seed: int = 0) -> list[dict[str, Any]]:
    """Documents of so many words."""
    chance = np.random.default_rng(seed)
    return [{"text": " ".join(chance.choice(WORDS, size=length))} for length in lengths]


def pack(
    source: Path, out: Path, folder: Path, *, template: str = "auto", processes: int = 1, **options: Any
) -> PackReport:
    return build_shards(source, out, PackOptions(**options), RendererSource(folder, template), num_processes=processes)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows_of(shards: PackedShards, *, together: bool = True) -> list[tuple[int, list[int], list[float]]]:
    """(record, ids, weights) of every row, in the order of the input; the pieces of a split one put together."""
    pieces = []
    for number in range(shards.num_bins):
        found = shards.bin(number)
        ends = [*found.starts[1:].tolist(), len(found.tokens)]
        places = zip(found.rows.tolist(), found.pieces.tolist(), found.starts.tolist(), ends, strict=True)
        for row, piece, start, end in places:
            pieces.append(((row, piece), found.tokens[start:end].tolist(), found.weights[start:end].tolist()))
    rows: list[tuple[int, list[int], list[float]]] = []
    for (row, piece), ids, weights in sorted(pieces, key=lambda each: each[0]):
        if piece and together:
            assert rows[-1][0] == row
            rows[-1] = (row, rows[-1][1] + ids, rows[-1][2] + weights)
        else:
            rows.append((row, ids, weights))
    return rows


def stream_of(shards: PackedShards) -> list[int]:
    """Every token of the stream."""
    return [token for number in range(shards.num_bins) for token in shards.bin(number).tokens.tolist()]
