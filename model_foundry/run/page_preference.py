"""The charts of preference training on report.html: rewards, margins, accuracy, how likely the answers are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from model_foundry.run.charts import Series, line_chart, smoothed

_CHARTS = (
    ("Rewards", "reward", (("better answer", "rewards/chosen"), ("worse answer", "rewards/rejected"))),
    ("Reward margin", "better − worse", (("margin", "rewards/margins"),)),
    ("Pairs with the better answer ahead", "share", (("accuracy", "rewards/accuracies"),)),
    ("Answers", "log-probability, nats", (("better answer", "logps/chosen"), ("worse answer", "logps/rejected"))),
)


def preference_charts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A chart each, of training steps and of what was held out; none where no step has rewards."""
    steps = [record for record in records if record.get("kind") == "step" and "rewards/margins" in record]
    held_out = [record for record in records if record.get("kind") == "validation" and "rewards/margins" in record]
    if not steps:
        return []
    charts = []
    for title, unit, lines in _CHARTS:
        series = [_series(steps, held_out, name, key, place) for place, (name, key) in enumerate(lines, start=1)]
        charts.append(line_chart([one for each in series for one in each], title=title, x_label="step", y_label=unit))
    return charts


def _series(
    steps: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]], name: str, key: str, colour: int
) -> list[Series]:
    """One measure: its steps (smoothed where there are enough), and dots for what was held out."""
    points = _points(steps, key)
    series = [Series(name, smoothed(points) or points, colour=colour)]
    if measured := _points(held_out, key):
        series.append(Series(f"{name}, held out", measured, colour=colour + 2, has_dots=True))
    return series


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    values = ((record["step"], record.get(key)) for record in records)
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]
