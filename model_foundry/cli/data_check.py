"""`foundry data check FILE|CONFIG`: refuse data that would train something else than was meant."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.config.commands import ROWS_SCHEMAS
from model_foundry.config.load import Resolved
from model_foundry.config.schema import TrainConfig

_WIDTH = 110
_HELP = """Refuse data that would train something else than was meant.

FILE is rows in any format, or a folder of them; CONFIG is a training configuration. model=NAME says whose tokenizer
and chat template to look with. Nothing is trained and no weights are loaded. Exit code 0: every check passed; 1: the
data is refused, with the rows named; 2: it could not be looked at.
"""


@click.command(help=_HELP)
@click.option("--report", type=click.Path(path_type=Path), help="Write the verdict as JSON to this file as well.")
@takes_config(ROWS_SCHEMAS, subject="data.train_file", subject_name="FILE")
def command(resolved: Resolved[TrainConfig], *, as_json: bool, report: Path | None) -> int:
    from model_foundry.checkpoint.atomic import atomic_write
    from model_foundry.recipes.gatekeeping import check_data
    from model_foundry.run.directory import utc_now

    with rendering_progress() as on_progress:
        verdict = check_data(resolved.config, now=utc_now(), on_progress=on_progress)
    values = verdict.as_dict()
    text = json.dumps(values, indent=2, ensure_ascii=False)
    if report is not None:
        atomic_write(report, text + "\n")
    click.echo(text if as_json else verdict_text(values))
    return 0 if verdict.passed else 1


@contextmanager
def rendering_progress(*, patience_seconds: float = 2.0) -> Iterator[Callable[[int, int], None]]:
    """A progress bar (plain lines where there is no terminal) for work that takes longer than a moment."""
    from model_foundry.run.progress import open_progress

    with open_progress() as progress:
        started, is_shown = time.monotonic(), False

        def on_progress(done: int, total: int) -> None:
            nonlocal is_shown
            if not is_shown and time.monotonic() - started >= patience_seconds:
                progress.start(total, "rows", done_steps=done)
                is_shown = True
            elif is_shown:
                progress.advance(done)

        yield on_progress


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """The verdict as a person reads it: facts, a line for each check, and what was found where one failed."""
    from model_foundry.run.figures import check_value, label

    facts, checks = verdict["facts"], verdict["checks"]
    lines = [
        f"{facts['file']}: {facts['rows']:,} rows of format {facts['format']}, {facts['tokens']:,} tokens, "
        f"{facts['trained_tokens']:,} of them trained (template {facts['template']}, train_on {facts['train_on']})",
        "",
    ]
    cells = [(label(check["name"]), check_value(check["value"], check["bound"]), check["bound"]) for check in checks]
    widths = [max(len(row[column]) for row in cells) for column in range(2)]
    for check, (name, value, bound) in zip(checks, cells, strict=True):
        word = "pass" if check["passed"] else "FAIL"
        lines.append(f"{word}  {name:<{widths[0]}}  {value:<{widths[1]}}  {bound}")
        if not check["passed"]:
            lines += _indented(check["evidence"])
            for example in check["examples"]:
                found = f"{example['where']}: {example['problem']}"
                lines += _indented(f"{found} | {example['excerpt']}" if example["excerpt"] else found, first="- ")
    failed = sum(not check["passed"] for check in checks)
    lines += ["", f"refused: {failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"]
    return "\n".join(lines)


def _indented(text: str, *, first: str = "") -> list[str]:
    indent = " " * 6
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=indent + first, subsequent_indent=indent + " " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return lines or [indent + first]
