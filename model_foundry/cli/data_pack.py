"""`foundry data pack FILE --out FOLDER`: tokenise once, into packed shards that training reads by memory map."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.data import PackConfig
from model_foundry.config.load import Resolved

if TYPE_CHECKING:
    from model_foundry.data.shards.build import PackProgress, PackReport
    from model_foundry.data.shards.reader import ShardStats

SECONDS_BETWEEN_LINES = 5.0
WANTED_FILL = 0.99
_HELP = """Tokenise FILE once into packed, memory-mapped shards.

FILE is rows or text: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md; also .gz, .zst, .bz2 and .xz), a folder
of these, or hf://datasets/ORG/NAME. model=NAME says whose tokenizer and chat template. kind=rows packs conversations
into bins of max_length tokens; kind=text makes one stream of documents, for pretraining. The corpus may be larger than
memory.

If it is cut short, give the same command again: it goes on, and ends with the same bytes.
"""


@click.command(help=_HELP)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="Where the shards go.")
@takes_config(PackConfig, subject="source", subject_name="FILE")
def command(resolved: Resolved[PackConfig], *, as_json: bool, out: Path) -> int:
    from model_foundry.data.files import local_path
    from model_foundry.data.shards.build import build_shards
    from model_foundry.data.shards.plan import PackOptions, RendererSource
    from model_foundry.data.shards.reader import PackedShards
    from model_foundry.errors import UsageError
    from model_foundry.models.finder import resolve_tokenizer

    config = resolved.config
    if config.source is None:
        raise UsageError("no FILE is named", hint="For example: foundry data pack rows.jsonl --out shards")
    options = PackOptions(
        kind=config.kind, max_length=config.max_length, overlength=config.overlength, train_on=config.train_on,
        bad_records=config.bad_records, format=config.format, text_field=config.text_field,
        separator=config.separator, shard_tokens=config.shard_tokens,
        part=config.part, validation_share=config.validation_share,
    )  # fmt: skip
    report = build_shards(
        local_path(config.source),
        out,
        options,
        RendererSource(resolve_tokenizer(config.model.name), config.model.template),
        num_processes=config.processes,
        on_progress=_progress(),
        say=lambda line: click.echo(line, err=True),
    )
    stats = PackedShards.open(out).stats()
    if as_json:
        click.echo(json.dumps(facts_of(report, stats, out), ensure_ascii=False))
    else:
        for line in _lines(report, stats, out):
            click.echo(line)
    return 0


def facts_of(report: PackReport, stats: ShardStats, out: Path) -> dict[str, Any]:
    """What was packed, as JSON values."""
    index = report.index
    return {
        "out": str(out),
        "kind": index.kind,
        "max_length": index.max_length,
        "tokens": stats.num_tokens,
        "trained_tokens": stats.num_trained_tokens,
        "rows": stats.num_rows,
        "bins": stats.num_bins,
        "fill": stats.fill,
        "lengths": list(stats.lengths),
        "shards": len(index.shards),
        **{key: value for key, value in index.counts.as_json().items() if key != "rows"},
        "went_on": report.went_on,
        "processes": report.num_processes,
        "seconds": round(report.seconds, 3),
        "new_tokens": report.num_new_tokens,
    }


def _lines(report: PackReport, stats: ShardStats, out: Path) -> list[str]:
    index, counts = report.index, report.index.counts
    noun, unit = ("rows", "bins") if index.kind == "rows" else ("documents", "chunks")
    lines = [f"lost {count:,} of {counts.num_records:,} records: {why}" for why, count in counts.lost.items()]
    lines += [f"  {example}" for example in counts.first_lost]
    said = {
        f"rows cut to {index.max_length:,} tokens": counts.num_truncated,
        f"rows split into pieces of {index.max_length:,} tokens": counts.num_split,
        "rows with control tokens in their text, encoded as plain text": counts.num_escaped,
    }
    lines += [f"{what}: {count:,}" for what, count in said.items() if count]
    trained = f", {stats.num_trained_tokens:,} of them trained" if index.kind == "rows" else ""
    lines.append(f"{stats.num_tokens:,} tokens of {stats.num_rows:,} {noun}{trained}")
    low, middle, high = stats.lengths[0], stats.lengths[3], stats.lengths[-1]
    lines.append(f"{noun} of {low:,} to {high:,} tokens, {middle:,} in the middle")
    lines.append(f"{stats.num_bins:,} {unit} of {index.max_length:,} tokens, {stats.fill:.2%} full")
    if stats.fill < WANTED_FILL and index.kind == "rows":
        lines.append("  few rows fit beside each other; a larger max_length fills better")
    if report.num_new_tokens:
        rates = f"{report.num_new_tokens / report.seconds:,.0f} tokens/s, "
        rates += f"{report.num_new_bytes / 1e6 / report.seconds:.1f} MB/s of input"
        lines.append(f"packed in {_duration(report.seconds)} by {report.num_processes}: {rates}")
    elif report.went_on:
        lines.append("was packed already, from the same input in the same way")
    num_shards = len(index.shards)
    return [*lines, f"{out}: {num_shards:,} shard{'' if num_shards == 1 else 's'}"]


def _progress() -> Callable[[PackProgress], None]:
    """Says on stderr how far it is, how fast and how long it will take, every few seconds."""
    start = said = time.monotonic()
    first_bytes: int | None = None

    def progress(now: PackProgress) -> None:
        nonlocal said, first_bytes
        first_bytes = now.num_bytes if first_bytes is None else first_bytes
        clock = time.monotonic()
        if clock - said < SECONDS_BETWEEN_LINES:
            return
        said = clock
        parts = [f"{now.num_bytes / 1e6:,.1f} of {now.total_bytes / 1e6:,.1f} MB", f"{now.num_records:,} records"]
        parts.append(f"{now.num_tokens / now.seconds:,.0f} tokens/s")
        if now.num_bytes > first_bytes:
            seconds_left = (now.total_bytes - now.num_bytes) * (clock - start) / (now.num_bytes - first_bytes)
            parts.append(f"{_duration(seconds_left)} left")
        click.echo(" · ".join(parts), err=True)

    return progress


def _duration(seconds: float) -> str:
    from model_foundry.run.progress import duration

    return duration(seconds)
