"""Several runs side by side: what each ended with, and what the suites that they share found, row by row.

Reads the evaluation files of runs; asks nobody. The first run is what the others are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_foundry.errors import DataError
from model_foundry.evals.measures import value_text
from model_foundry.evals.page import interval_drawing, page_of
from model_foundry.evals.results import SuiteResult, read_result
from model_foundry.evals.verdict import Change, change_of
from model_foundry.run.charts import escape


@dataclass(frozen=True, slots=True)
class Beside:
    """One metric of several runs.

    Attributes:
        values: of each run; None where it has none.
        unlike: runs whose value is of other rows or other decoding than the first one's, and cannot be compared.
        against_first: how each further run differs from the first that has the metric.
    """

    name: str
    unit: str
    values: tuple[float | None, ...]
    unlike: tuple[bool, ...]
    against_first: tuple[Change | None, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "metric": self.name, "unit": self.unit, "values": list(self.values), "unlike": list(self.unlike),
            "against_first": [None if each is None else each.as_dict() for each in self.against_first],
        }  # fmt: skip

    def cell(self, place: int) -> str:
        """The value as people read it; ± marks a difference for sure."""
        if self.values[place] is None:
            return "–"
        text = value_text(self.values[place], self.unit)
        if self.unlike[place]:
            return f"{text} (other rows or decoding)"
        change = self.against_first[place]
        return text if change is None else f"{text} {change.verdict}"


def results_of(run: Path) -> dict[str, SuiteResult]:
    """The newest result of each suite in a run's folder.

    Raises:
        DataError: a file cannot be read.
    """
    found: dict[str, SuiteResult] = {}
    for path in sorted((run / "evaluation").glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(
                f"is not JSON ({error})", where=str(path), hint="Evaluate again: foundry evaluate"
            ) from error
        suites = values.get("suites") if isinstance(values, dict) else None
        for name, suite in (suites or {}).items():
            result = read_result(suite["after"], where=str(path))
            if not _is_of_a_part(run, result):
                found[name] = result
    return found


def _is_of_a_part(run: Path, result: SuiteResult) -> bool:
    """Whether a result is of a checkpoint or an adapter in the run's folder, and not of the run."""
    asked = Path(str(result.target.get("name", ""))).expanduser()
    return asked.exists() and run.resolve() in asked.resolve().parents


def side_by_side(runs: Sequence[Mapping[str, SuiteResult]]) -> tuple[Beside, ...]:
    """Every metric that a run has, in the order in which they were found."""
    found: list[Beside] = []
    for suite in dict.fromkeys(suite for run in runs for suite in run):
        results = [run.get(suite) for run in runs]
        metrics = dict.fromkeys(metric for each in results if each is not None for metric in each.metrics)
        found += [_beside(results, suite, metric) for metric in metrics]
    return tuple(found)


def _beside(results: Sequence[SuiteResult | None], suite: str, metric: str) -> Beside:
    """One metric of the runs, each held against the first that has it."""
    having = [each if each is not None and metric in each.metrics else None for each in results]
    place, first = next((place, each) for place, each in enumerate(having) if each is not None)
    values = [None if each is None else each.metrics[metric].value for each in having]
    unlike = tuple(each is not None and each.digest != first.digest for each in having)
    against = tuple(
        None if each is None or unlike[index] or index == place else change_of(first, each, metric)
        for index, each in enumerate(having)
    )
    return Beside(
        f"{suite}.{metric}", first.metrics[metric].measure.unit,
        tuple(None if value is None or value != value else value for value in values), unlike, against,
    )  # fmt: skip


def render_comparison(
    names: Sequence[str], metrics: Sequence[Beside], ended: Sequence[tuple[str, Sequence[str]]],
    differences: Sequence[tuple[str, Sequence[str]]],
) -> str:  # fmt: skip
    """A page: what the runs measured, what they ended with, and how their configurations differ from the first's."""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    measured = "".join(_metric_row(each) for each in metrics)
    numbers = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td class=num>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in ended
    )
    configs = "".join(
        f"<h3>{escape(name)}</h3><ul>{''.join(f'<li><code>{escape(line)}</code></li>' for line in lines)}</ul>"
        if lines
        else f"<h3>{escape(name)}</h3><p>The same configuration as the first.</p>"
        for name, lines in differences
    )
    nothing = "<p>No suite has been asked of these runs: foundry evaluate RUN --suite NAME.</p>"
    table = f'<table class="metrics"><thead><tr><th>Metric</th>{head}</tr></thead><tbody>{measured}</tbody></table>'
    body = (
        f'<header class="none"><p class="run">{len(names)} runs</p><h1>Side by side</h1></header>'
        f"<section><h2>Suites</h2>{table if measured else nothing}</section>"
        f'<section><h2>Training ended with</h2><table class="facts"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{numbers}</tbody></table></section>"
        f"<section><h2>Configuration, beside the first</h2>{configs}</section>"
    )
    return page_of("Runs side by side", body)


def _metric_row(each: Beside) -> str:
    cells = []
    for place, change in enumerate(each.against_first):
        drawn = ""
        if change is not None and change.interval is not None:
            drawn = "<br>" + interval_drawing(change.delta, change.interval, change.noise, change.verdict)
            drawn += f"<small>{escape(change.text())}</small>"
        kind = "" if change is None else f' class="{escape(change.verdict)}"'
        cells.append(f"<td><b{kind}>{escape(each.cell(place))}</b>{drawn}</td>")
    return f"<tr><td>{escape(each.name)}</td>{''.join(cells)}</tr>"
