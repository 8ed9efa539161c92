"""`foundry runs`: what runs there are and how far they came; `foundry runs compare`: how they differ.

Looks only: no run is locked or changed, running ones included.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from model_foundry.errors import FoundryError, RunError, UsageError

if TYPE_CHECKING:
    from model_foundry.run.directory import RunDirectory

_MAX_DEPTH = 3
_LIST = "list"
_DEFAULT_FOLDER = Path("runs")
# What a run ends with, in the order in which it is compared; the clock's numbers come last because they vary.
_FINAL_NUMBERS = ("step", "loss", "validation_loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")
_CLOCK_NUMBERS = ("seconds", "tokens_per_second", "memory_bytes")


class _RunsGroup(click.Group):
    """`foundry runs DIR` is `foundry runs list DIR`: the folder takes the place of a subcommand's name."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        is_help = any(word in ("-h", "--help") for word in args)
        if not is_help and (not words or words[0] not in self.commands):
            args = [_LIST, *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_RunsGroup,
    subcommand_metavar="[DIR] [--json] | compare A B [C]... [--json]",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def command() -> None:
    """List the runs in DIR (default: runs), or compare some.

    A run is a folder with a run.json; folders are searched three deep.
    """


@command.command(_LIST)
@click.argument("folder", type=click.Path(path_type=Path), default=_DEFAULT_FOLDER, metavar="[DIR]")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
def list_command(folder: Path, as_json: bool) -> None:
    """List the runs in a folder, oldest first."""
    if not folder.is_dir() and folder != _DEFAULT_FOLDER:
        raise UsageError("there is no such folder", where=str(folder), hint="foundry runs DIR looks elsewhere")
    rows = sorted((_facts(path) for path in find_runs(folder)), key=lambda row: (row["started"] or "", row["run"]))
    if as_json:
        click.echo(json.dumps({"runs": rows}, indent=2))
    elif rows:
        click.echo(_table([_HEADINGS, *(_cells(row) for row in rows)]))
    else:
        click.echo(f"no runs in {folder}")


@command.command("compare")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="A B [C]...")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the comparison as a page.")
def compare_command(runs: tuple[Path, ...], as_json: bool, html: Path | None) -> None:
    """Show how runs differ from the first: their configurations, the numbers that they ended with, their suites."""
    from model_foundry.checkpoint.atomic import atomic_write
    from model_foundry.evals.across import render_comparison, results_of, side_by_side
    from model_foundry.run.directory import RunDirectory, config_differences

    if len(runs) < 2:
        raise UsageError("one run alone cannot be compared", hint="foundry runs compare A B")
    opened = [RunDirectory.read(path) for path in runs]
    texts = [_config_text(run) for run in opened]
    differences = [config_differences(texts[0], text) for text in texts[1:]]
    ended = [_last_numbers(run) for run in opened]
    metrics = side_by_side([results_of(path) for path in runs])
    names = [name for name in (*_FINAL_NUMBERS, *_CLOCK_NUMBERS) if any(name in each for each in ended)]
    rows = [(name, [_number(each.get(name)) for each in ended]) for name in names]
    titles = [f"{_letter(place)}: {path}" for place, path in enumerate(runs)]
    if html is not None:
        page = render_comparison(titles, metrics, rows, list(zip(titles[1:], differences, strict=True)))
        try:
            atomic_write(html, page.encode("utf-8", "replace"))
        except OSError as error:
            raise UsageError(f"the page cannot be written ({error.strerror or error})", where=str(html)) from error
    if as_json:
        facts: dict[str, Any] = {
            "runs": [
                {"run": str(path), "ended": end, "config_differences": list(differ)}
                for path, end, differ in zip(runs, ended, [(), *differences], strict=True)
            ],
            "metrics": [each.as_dict() for each in metrics],
        }
        click.echo(json.dumps(facts, indent=2))
        return
    for place, lines in enumerate(differences, start=1):
        click.echo(
            f"configuration (a → {_letter(place)}):" if lines else f"configuration of {_letter(place)}: the same"
        )
        for line in lines:
            click.echo(f"  {line}")
    table = [["", *titles], *([name, *cells] for name, cells in rows)]
    table += [[each.name, *(each.cell(place) for place in range(len(runs)))] for each in metrics]
    click.echo(_table(table))
    if html is not None:
        click.echo(f"Page: {html}")


def _letter(place: int) -> str:
    return chr(ord("a") + place) if place < 26 else str(place + 1)


def find_runs(folder: Path) -> list[Path]:
    """Folders with a run.json in `folder` and three levels below; links and hidden folders are not followed."""
    from model_foundry.run.directory import is_run

    if is_run(folder):
        return [folder]
    found: list[Path] = []
    for base, names, _ in os.walk(folder):
        depth = len(Path(base).relative_to(folder).parts)
        runs = [name for name in names if is_run(Path(base, name))]
        found.extend(Path(base, name) for name in runs)
        deeper = depth + 1 < _MAX_DEPTH
        names[:] = [name for name in names if deeper and name not in runs and not name.startswith(".")]
    return found


_HEADINGS = ["run", "state", "step", "loss", "checks", "size", "started"]


def _cells(row: dict[str, Any]) -> list[str]:
    if row["error"]:
        return [row["run"], f"unreadable: {row['error']}"]
    total = "" if row["total_steps"] is None else f"/{row['total_steps']}"
    step = "–" if row["step"] is None else f"{row['step']}{total}"
    checks = "–" if row["checks"] is None else f"{row['checks']['passed']}/{row['checks']['total']}"
    started = (row["started"] or "–").replace("T", " ")[:16]
    return [row["run"], row["state"], step, _number(row["loss"]), checks, size_text(row["size_bytes"]), started]


def _facts(path: Path) -> dict[str, Any]:
    """One run as JSON values; a run that cannot be read is a row that says so, not the end of the list."""
    from model_foundry.run.directory import RunDirectory

    row: dict[str, Any] = dict.fromkeys(("state", "step", "total_steps", "loss", "checks", "size_bytes", "started"))
    row = {"run": str(path), **row, "error": None}
    try:
        run = RunDirectory.read(path)
        last = _last_numbers(run)
        facts = run.facts
        return {
            **row,
            "state": str(run.state),
            "step": last.get("step"),
            "total_steps": facts.get("total_steps"),
            "loss": last.get("loss"),
            "checks": _checks(run),
            "size_bytes": run.size_bytes(),
            "started": facts.get("clock", {}).get("created"),
        }
    except (FoundryError, OSError) as error:
        return {**row, "error": str(error)}


def _last_numbers(run: RunDirectory) -> dict[str, Any]:
    """The numbers of the last training step, the last validation loss among them; {} before the first step."""
    from model_foundry.run.metrics import read_metrics

    if not run.metrics_path.exists():
        return {}
    ended: dict[str, Any] = {}
    for record in read_metrics(run.metrics_path):
        if record.get("kind") == "step":
            ended.update({key: record[key] for key in _FINAL_NUMBERS if key in record})
            ended.update({key: value for key, value in record.get("clock", {}).items() if key in _CLOCK_NUMBERS})
        elif record.get("kind") == "validation":
            ended["validation_loss"] = record.get("loss")
    return ended


def _checks(run: RunDirectory) -> dict[str, int] | None:
    path = run.path / "report.json"
    if not path.is_file():
        return None
    try:
        checks = json.loads(path.read_bytes())["checks"]
        return {"passed": sum(bool(check["passed"]) for check in checks), "total": len(checks)}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"is not a report ({error})", where=str(path), hint="foundry report RUN writes it again"
        ) from error


def _config_text(run: RunDirectory) -> str:
    try:
        return run.config_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot be read ({error})", where=str(run.config_path)) from error


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size_text(num_bytes: int) -> str:
    """Bytes as people write them: 812 B, 60.1 MB."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    num_columns = max(len(row) for row in rows)
    # A row that is only a remark must not widen the columns of the others.
    full = [row for row in rows if len(row) == num_columns]
    widths = [max(len(row[index]) for row in full) for index in range(num_columns)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join(lines)
