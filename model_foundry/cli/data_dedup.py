"""`foundry data dedup IN --out OUT`: the rows of a file without those that repeat an earlier one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from model_foundry.data.distinct import Distinct

SECONDS_BETWEEN_LINES = 5.0


@click.command()
@click.argument("source", metavar="IN")
@click.option("--out", "target", metavar="OUT", required=True, type=click.Path(path_type=Path), help="Where they go.")
@click.option("--dropped", metavar="FILE", type=click.Path(path_type=Path), help="JSON Lines of what is left out, why.")
@click.option("--threshold", default=0.8, show_default=True, help="Similarity from which rows are alike, 0.1 to 1.")
@click.option("--field", "only_field", metavar="NAME", help="Compare this field alone.")
@click.option("--from", "from_format", metavar="FORMAT", default="auto", help="The format to read, if not detected.")
@click.option("--seed", default=0, show_default=True, help="Of the hashes that find candidates.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def command(
    source: str, target: Path, dropped: Path | None, threshold: float, only_field: str | None, from_format: str,
    seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Write the rows of IN to OUT without exact and near duplicates; the first of each group stays.

    IN is a file of rows (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md; also .gz, .zst, .bz2 and .xz), a folder of
    these, or hf://datasets/ORG/NAME. OUT's suffix chooses the kind of file.

    Exact: the same text but for case and white space. Near: the share of word triples in common (Jaccard similarity)
    reaches the threshold, and the questions are alike too. System messages and lines that many rows share do not
    count. foundry data check counts duplicates the same way.
    """
    from model_foundry.data.distinct import write_distinct_rows

    done = write_distinct_rows(
        source, target, dropped=dropped, threshold=threshold, seed=seed, only_field=only_field, format=from_format,
        on_progress=_progress(),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(done.as_dict(), ensure_ascii=False))
        return
    for line in _lines(done):
        click.echo(line)


def _lines(done: Distinct) -> list[str]:
    lines = [f"{count:,} files not read: {reason}" for reason, count in done.skipped_files.items()]
    lines += [f"{row} is {similarity:.2f} like {first}" for row, first, similarity in done.examples]
    if done.num_near > len(done.examples):
        lines.append(f"and {done.num_near - len(done.examples):,} more that are only alike")
    lines.append(f"{done.num_exact:,} rows equal an earlier one, {done.num_near:,} are {done.threshold:g} like one")
    if done.dropped is not None:
        lines.append(f"{done.dropped}: {done.num_exact + done.num_near:,} rows dropped, with the reason")
    lines.append(f"{done.target}: {done.num_kept:,} of {done.num_read:,} rows kept")
    return lines


def _progress() -> Callable[[str, int, int | None], None]:
    """Says on stderr how many rows were read, how fast, and how long a pass still takes, every few seconds."""
    start = said = time.monotonic()
    before = ""

    def progress(doing: str, num_rows: int, total: int | None) -> None:
        nonlocal start, said, before
        now = time.monotonic()
        if doing != before:
            before, start = doing, now
        if now - said < SECONDS_BETWEEN_LINES or now == start:
            return
        said = now
        rate = num_rows / (now - start)
        line = f"{num_rows:,} rows {doing}, {rate:,.0f} a second"
        click.echo(line if total is None else f"{line}, {(total - num_rows) / rate:.0f} s left", err=True)

    return progress
