"""`foundry data inspect FILE|CONFIG`: show rows as the model will see them, token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from model_foundry.cli.arguments import takes_config
from model_foundry.cli.data_check import rendering_progress
from model_foundry.config.commands import ROWS_SCHEMAS
from model_foundry.config.load import Resolved
from model_foundry.config.schema import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from model_foundry.data.inspection import Histogram, Inspection, ShownRow

TERMINAL_ROWS, PAGE_ROWS = 4, 40
_BAR_WIDTH, _MAX_BARS = 46, 16
_HELP = """Show rows as the model will see them, token by token, with what is trained and what would be left out.

FILE is rows in any format, or a folder of them; CONFIG is a training configuration. model=NAME says whose tokenizer
and chat template to look with. Nothing is trained and no weights are loaded; the gate's verdict is shown and refuses
nothing here.
"""


@click.command(help=_HELP)
@click.option("--rows", type=click.IntRange(min=0), help="How many rows to show, spread evenly over the file.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page that needs no network to this file.")
@takes_config(ROWS_SCHEMAS, subject="data.train_file", subject_name="FILE")
def command(resolved: Resolved[TrainConfig], *, as_json: bool, rows: int | None, html: Path | None) -> None:
    from model_foundry.data.gate.judge import judge
    from model_foundry.data.inspection import inspect_rows
    from model_foundry.recipes.gatekeeping import read_subject
    from model_foundry.run.directory import utc_now

    with rendering_progress() as on_progress:
        subject = read_subject(resolved.config, now=utc_now(), on_progress=on_progress)
    verdict = judge(subject)
    shown = inspect_rows(subject, verdict, num_shown=TERMINAL_ROWS if rows is None else rows)
    if as_json:
        click.echo(json.dumps(shown.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print(shown)
    if html is not None:
        from model_foundry.checkpoint.atomic import atomic_write
        from model_foundry.run.inspection_page import render_inspection

        page = inspect_rows(subject, verdict, num_shown=PAGE_ROWS if rows is None else rows)
        atomic_write(html, render_inspection(page).encode("utf-8", "replace"))
        click.echo(f"page: {html}", err=as_json)


def _print(inspection: Inspection) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    facts = inspection.gate.facts
    console.print(f"[bold]{_plain(facts['file'])}[/]", soft_wrap=True)
    share = facts["trained_tokens"] / max(1, facts["tokens"])
    console.print(
        f"{facts['rows']:,} rows of format {facts['format']} · {facts['tokens']:,} tokens, {share:.0%} of them trained"
        f" · template {facts['template']} · train_on {facts['train_on']}"
    )
    for line in _figures(inspection):
        console.print(line)
    _print_verdict(console, inspection)
    _print_lengths(console, inspection.histogram)
    _print_left_out(console, inspection)
    _print_rows(console, inspection)


def _figures(inspection: Inspection) -> Iterator[str]:
    statistics = inspection.statistics
    for title, counts in (
        ("turns", statistics["roles"]),
        ("code", statistics["code_languages"]),
        ("not read", statistics["ignored_fields"]),
    ):
        if counts:
            yield f"{title}: " + ", ".join(f"{_plain(name)} {count:,}" for name, count in list(counts.items())[:10])
    if total := inspection.num_exact + inspection.num_near:
        share = total / statistics["num_rows"]
        yield f"repeats: {inspection.num_exact:,} exact, {inspection.num_near:,} near ({share:.1%})"


def _print_verdict(console: Console, inspection: Inspection) -> None:
    gate = inspection.gate
    if gate.passed:
        console.print(f"[green]gate: all {len(gate.checks)} checks passed[/]")
        return
    console.print(f"[red]gate: {len(gate.failed)} of {len(gate.checks)} checks failed[/]")
    for check in gate.failed:
        console.print(f"[red]  {check.name}[/]: {_plain(check.evidence)}")
        for example in check.examples:
            console.print(f"    {_plain(str(example))}", style="dim")


def _print_lengths(console: Console, histogram: Histogram | None) -> None:
    if histogram is None:
        return
    found = histogram.percentiles
    console.print(
        f"\n[bold]tokens a row[/]  shortest {found['min']:,.0f} · median {found['p50']:,.0f} · "
        f"95 % {found['p95']:,.0f} · longest {found['max']:,.0f} · limit {histogram.limit:,}"
    )
    every = -(-len(histogram.kept) // _MAX_BARS)
    bars = [
        (histogram.edges[i], sum(histogram.kept[i : i + every]), sum(histogram.lost[i : i + every]))
        for i in range(0, len(histogram.kept), every)
    ]
    most = max(kept + lost for _, kept, lost in bars)
    for left, kept, lost in bars:
        sizes = [round(_BAR_WIDTH * count / most) or int(count > 0) for count in (kept, lost)]
        bar = f"[green]{'█' * sizes[0]}[/][red]{'█' * sizes[1]}[/]"
        counts = f"{kept + lost:,}" + (f" ({lost:,} left out)" if lost else "")
        console.print(f"{left:>7,}+ {bar} {counts if kept + lost else ''}")


def _print_left_out(console: Console, inspection: Inspection) -> None:
    if inspection.left_out:
        console.print("\n[bold]left out[/]")
    for each in inspection.left_out:
        console.print(f"[red]{each.count:,}[/] {_plain(each.reason)}")
        for example in each.examples[:3]:
            console.print(f"    {_plain(example)}", style="dim")


def _print_rows(console: Console, inspection: Inspection) -> None:
    if not inspection.rows:
        return
    console.print(
        f"\n[bold]{len(inspection.rows)} of {inspection.num_rows:,} rows[/], spread evenly over the file: ", end=""
    )
    marks = not console.is_terminal or console.no_color
    console.print(
        "⟦trained⟧ not trained" if marks else "[black on green]trained[/] [dim]not trained[/] [magenta]control token[/]"
    )
    for row in inspection.rows:
        notes = "".join(f" · [red]{_plain(note)}[/]" for note in row.notes)
        console.rule(
            f"{_plain(row.source)} · {row.num_tokens:,} tokens, {row.num_trained:,} trained{notes}", align="left"
        )
        console.print(_tokens(row, marks=marks))
        if row.num_tokens > len(row.tokens):
            console.print(f"… {row.num_tokens - len(row.tokens):,} more tokens", style="dim")


def _tokens(row: ShownRow, *, marks: bool) -> Text:
    """The row's tokens side by side, by colour; what a terminal would obey is shown as a character instead.

    Args:
        marks: put what is trained between ⟦ and ⟧, for where there are no colours.
    """
    from rich.text import Text

    text = Text()
    was_trained = False
    for token in row.tokens:
        if marks and token.is_trained != was_trained:
            text.append("⟦" if token.is_trained else "⟧")
        was_trained = token.is_trained
        shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in token.text.replace("\n", "↵\n"))
        style = "dim"
        if token.is_special:
            style = "bold magenta on green" if token.is_trained else "magenta"
        elif token.is_trained:
            style = "black on green"
        text.append(shown, style=style)
    return text.append("⟧" if marks and was_trained else "")


def _plain(text: object) -> str:
    """Text that rich prints as it stands, without characters that a terminal obeys."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else " " for c in str(text)))
