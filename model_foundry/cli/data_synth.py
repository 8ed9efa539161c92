"""`foundry data synth KIND`: synthetic rows, the same bytes for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import click

from model_foundry.errors import UsageError

# The kinds of data/synth/writing.py, spelt out so that --help reads no data module; a test compares them.
KINDS = ("chat", "instruction", "preference", "kto", "text", "geography", "arithmetic", "pattern")

USUAL_HELDOUT = 40


@click.command()
@click.argument("kind", type=click.Choice(KINDS), metavar="KIND")
@click.option("--rows", "num_rows", type=click.IntRange(min=1), default=1000, show_default=True, help="How many rows.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which rows.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where they go.")
@click.option("--heldout", type=click.Path(path_type=Path), metavar="FILE", help="Where questions to hold out go.")
@click.option("--heldout-rows", type=click.IntRange(min=1), help="How many questions; default 40.")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def command(
    kind: str, num_rows: int, seed: int, out: Path, heldout: Path | None, heldout_rows: int | None, as_json: bool
) -> None:
    """Write synthetic rows of KIND for tests and demonstrations.

    KIND is chat, instruction, preference, kto or text, of which there is no end; or geography, arithmetic or pattern,
    whose answers are known: with --heldout FILE they come with questions for evaluation.file that training never sees.
    The suffix of --out chooses the kind of file (.jsonl, .json, .csv, .tsv, .parquet; also .gz, .zst, .bz2 and .xz).
    """
    from model_foundry.data.synth.writing import write_synthetic

    if heldout_rows is not None and heldout is None:
        raise UsageError("--heldout-rows says how many questions, and --heldout not where", hint="Add --heldout FILE.")
    number = USUAL_HELDOUT if heldout_rows is None else heldout_rows
    done = write_synthetic(kind, out, num_rows=num_rows, seed=seed, heldout=heldout, num_heldout=number)
    if as_json:
        facts = {"kind": kind, "seed": seed, "out": str(out), "rows": done.num_rows}
        facts |= {"heldout": None if heldout is None else str(heldout), "heldout_rows": done.num_heldout}
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    click.echo(f"{out}: {done.num_rows:,} {kind} rows, seed {seed}")
    if heldout is not None:
        click.echo(f"{heldout}: {done.num_heldout:,} questions to hold out")
