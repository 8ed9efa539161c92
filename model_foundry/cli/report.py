"""`foundry report RUN`: say how a run did, and write its page again from what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
def command(run: Path, as_json: bool) -> int:
    """Print a run's checks and answers, and write report.html again.

    RUN is a run's folder. The page is made from report.json and metrics.jsonl; nothing is measured again. Exit code 1
    when a check failed.
    """
    from model_foundry.errors import RunError
    from model_foundry.run.directory import is_run
    from model_foundry.run.report import read_report, write_page

    if not run.is_dir() or not (is_run(run) or (run / "report.json").exists()):
        raise RunError("holds no run", where=str(run), hint="`foundry runs` lists the runs there are.")
    report = read_report(run)
    write_page(run)
    return show_report(report, run_dir=run, as_json=as_json)


def show_report(report: Any, *, run_dir: Path, as_json: bool) -> int:
    """Print a `Report`; the exit code that its checks give."""
    from model_foundry.run.report import FAILED
    from model_foundry.run.summary import summary_text

    if as_json:
        click.echo((run_dir / "report.json").read_text(encoding="utf-8").rstrip("\n"))
    else:
        click.echo(summary_text(report, run_dir=run_dir))
    return 1 if report.verdict == FAILED else 0
