"""`foundry data convert IN OUT --to FORMAT`: rows in another format or another kind of file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from model_foundry.data.convert import Converted

SECONDS_BETWEEN_LINES = 5.0


@click.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--to", "to_format", metavar="FORMAT", help="The format to write; without it only the file changes.")
@click.option("--from", "from_format", metavar="FORMAT", default="auto", help="The format to read, if not detected.")
@click.option("--lossy", is_flag=True, help="Write what can be written, and count what is lost or left out.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def command(
    source: str, target: Path, to_format: str | None, from_format: str, lossy: bool, as_json: bool
) -> None:  # fmt: skip
    """Write the rows of IN to OUT in another format.

    IN is a file of rows (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md; also .gz, .zst, .bz2 and .xz), a folder of
    these, or hf://datasets/ORG/NAME. OUT's suffix chooses the kind of file. FORMAT is messages, sharegpt, alpaca,
    input_output, prompt_completion, text, preference or kto.

    Each row is read back before it counts as written. A row that would lose something is refused unless --lossy says
    otherwise; fields that no format reads go along.
    """
    from model_foundry.data.convert import convert_rows

    done = convert_rows(
        source, target, to_format=to_format, from_format=from_format, lossy=lossy, on_progress=_progress()
    )
    if as_json:
        click.echo(json.dumps(done.as_dict(), ensure_ascii=False))
        return
    for line in _lines(done):
        click.echo(line)


def _lines(done: Converted) -> list[str]:
    lines = [f"{count:,} files not read: {reason}" for reason, count in done.skipped_files.items()]
    for reason, count in done.lost.items():
        lines.append(f"lost in {count:,} rows: {reason} (as in {', '.join(done.examples[reason])})")
    for reason, count in done.left_out.items():
        lines.append(f"left out {count:,} rows: {reason} (as in {', '.join(done.examples[reason])})")
    formats = done.to_format if done.from_format == done.to_format else f"{done.from_format} to {done.to_format}"
    lines.append(f"{done.target}: {done.num_written:,} rows, {formats}")
    return lines


def _progress() -> Callable[[int], None]:
    """Says on stderr how many rows were read and how fast, every few seconds."""
    start = said = time.monotonic()

    def progress(num_rows: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            said = now
            click.echo(f"{num_rows:,} rows read, {num_rows / (now - start):,.0f} a second", err=True)

    return progress
