"""A report in a screenful of plain text, for the end of a run and for `foundry report`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_foundry.run.figures import SHIPPING, check_value, label, share_text
from model_foundry.run.report import PAGE_NAME, Report

_COLUMN_GAP = "  "
_WIDTH = 110


def summary_text(report: Report, *, run_dir: Path | None = None, width: int = _WIDTH) -> str:
    """Checks as a table, answers before and after, notes, and where the page is."""
    lines = [f"{report.run_id}: {report.verdict} · {SHIPPING[report.verdict]}"]
    if report.checks:
        lines += ["", *_check_table(report, width=width)]
    if report.evaluation.get("cases"):
        lines += ["", *_evaluation_lines(report.evaluation)]
    if report.notes:
        lines += ["", *(f"note: {note}" for note in report.notes)]
    if run_dir is not None:
        lines += ["", f"Report: {run_dir / PAGE_NAME}"]
    return "\n".join(lines)


def _check_table(report: Report, *, width: int) -> list[str]:
    rows = [
        ("pass" if check.passed else "FAIL", label(check.name), check_value(check.value, check.bound), check.bound)
        for check in report.checks
    ]
    head = ("", "check", "value", "bound")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [_row(head, widths)]
    for row, check in zip(rows, report.checks, strict=True):
        lines.append(_row(row, widths))
        if not check.passed:
            indent = " " * (widths[0] + len(_COLUMN_GAP))
            lines += textwrap.wrap(check.evidence, width, initial_indent=indent, subsequent_indent=indent)
    return lines


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    return _COLUMN_GAP.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _evaluation_lines(evaluation: Mapping[str, Any]) -> list[str]:
    cases = evaluation["cases"]
    counts = ", ".join(
        f"{sum(case['change'] == name for case in cases)} {name}" for name in ("improved", "same", "worse")
    )
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    lines = [f"{len(cases)} held-out questions: {counts}"]
    width = max((len(label(name)) for name in before), default=0)
    lines += [
        f"  {label(name):<{width}} {share_text(before[name]):>7} → {share_text(after[name])}"
        for name in before
        if name in after
    ]
    return lines
