"""Two results of one suite side by side, and whether what was trained should be shipped.

A metric changed for sure only where the interval of its change over the same rows excludes zero, and the change is more
than asking again makes (`noise`). A run falls behind where a guarded metric got worse for sure by more than is borne.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_foundry.errors import DataError
from model_foundry.evals import statistics
from model_foundry.evals.bounds import Bound
from model_foundry.evals.measures import MEASURES, Measure, Measured, value_text
from model_foundry.evals.results import SuiteResult
from model_foundry.types import Check

BETTER, WORSE, SAME, UNCLEAR = "better", "worse", "same", "unclear"
_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Change:
    """How a metric differs between two results on the same rows.

    Attributes:
        delta: after minus before, in the metric's unit; where zero is best, of the distances from it.
        interval: 95 %, paired by row; None where there is none, and `why` says why.
        noise: how far the metric moves by itself.
        verdict: better, worse, same (not a row differs), or unclear.
        rows: each row's own verdict.
    """

    measure: Measure
    before: float
    after: float
    delta: float
    interval: tuple[float, float] | None
    why: str
    noise: float
    verdict: str
    rows: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "before": _number(self.before), "after": _number(self.after), "delta": _number(self.delta),
            "interval": None if self.interval is None else list(self.interval), "why": self.why, "noise": self.noise,
            "unit": self.measure.unit, "better": self.measure.better, "verdict": self.verdict,
            "counts": {name: self.rows.count(name) for name in (BETTER, SAME, WORSE)},
        }  # fmt: skip

    def text(self) -> str:
        """62.0 % → 31.0 % (-31.0 %, 95 % interval -45.2 % to -16.8 %)."""
        unit = self.measure.unit
        values = f"{value_text(self.before, unit)} → {value_text(self.after, unit)}"
        if self.interval is None:
            return f"{values} (no interval: {self.why})"
        low, high = (value_text(end, unit, signed=True) for end in self.interval)
        return f"{values} ({value_text(self.delta, unit, signed=True)}, 95 % interval {low} to {high})"


def changes(before: SuiteResult, after: SuiteResult) -> dict[str, Change]:
    """How each metric that both have differs.

    Raises:
        DataError: the results are not of the same rows.
    """
    return {name: change_of(before, after, name) for name in after.metrics if name in before.metrics}


def change_of(before: SuiteResult, after: SuiteResult, metric: str) -> Change:
    """How a metric that both have differs; resampled by the seed of what is after.

    Raises:
        DataError: the results are not of the same rows.
    """
    if before.digest != after.digest or len(before.rows) != len(after.rows):
        what = f"the two results of {after.suite} are not of the same rows and decoding"
        raise DataError(what, hint="Evaluate both with the same suite, then compare.")
    noise = max(before.noise.get(metric, 0.0), after.noise.get(metric, 0.0))
    return _change(before.metrics[metric], after.metrics[metric], noise=noise, seed=after.seed)


def _change(before: Measured, after: Measured, *, noise: float, seed: int) -> Change:
    measure = after.measure
    delta = abs(after.value) - abs(before.value) if measure.better == "zero" else after.value - before.value
    kept = (before.stats != 0).any(axis=1) | (after.stats != 0).any(axis=1)
    found, why = None, ""
    if not kept.any():
        why = "no row has what it needs"
    elif (
        kept.sum() > 1
        and measure.is_yes_no
        and (before.stats[kept][:, 1] == 1).all()
        and (after.stats[kept][:, 1] == 1).all()
    ):
        found = statistics.paired_share_interval(before.stats[kept][:, 0], after.stats[kept][:, 0])
    else:
        found = statistics.paired_interval(before.stats, after.stats, _judged(measure), seed=seed)
        why = "" if found else statistics.why_none(int(kept.sum()))
    rows = tuple(
        _way(measure, one, two) for one, two in zip(before.row_values(), after.row_values(), strict=True)
    )  # fmt: skip
    verdict = _verdict(measure, before.value, after.value, delta, found, noise)
    if np.array_equal(before.stats, after.stats):
        verdict = SAME
    return Change(measure, before.value, after.value, delta, found, why, noise, verdict, rows)


def _judged(measure: Measure) -> statistics.Combine:
    """What of a metric's sums gets better or worse: where zero is best, the distance from it."""
    if measure.better != "zero":
        return measure.combine
    return lambda sums: np.abs(measure.combine(sums))


def _verdict(
    measure: Measure, before: float, after: float, delta: float, interval: tuple[float, float] | None, noise: float
) -> str:
    if interval is None or not math.isfinite(delta) or abs(delta) <= noise:
        return UNCLEAR
    if interval[0] <= 0 <= interval[1]:
        return UNCLEAR
    return _way(measure, before, after)


def _way(measure: Measure, before: float | None, after: float | None) -> str:
    if before is None or after is None or abs(after - before) <= _TOLERANCE:
        return SAME
    if measure.better == "zero":
        return SAME if abs(abs(after) - abs(before)) <= _TOLERANCE else BETTER if abs(after) < abs(before) else WORSE
    return BETTER if (after > before) == (measure.better == "higher") else WORSE


def fell_behind(change: Change, *, borne: float) -> bool:
    """Whether a metric got worse for sure by more than is borne."""
    if change.verdict != WORSE or change.interval is None:
        return False
    loss = -change.interval[1] if change.measure.better == "higher" else change.interval[0]
    return loss > borne


def guard_check(
    suite: str, guard: Mapping[str, float], found: Mapping[str, Change], *, reasons: Mapping[str, str] | None = None
) -> Check | None:
    """The check that nothing guarded fell behind; None where nothing is guarded. What one side lacks fails it.

    Args:
        found: what changed, of what was measured on both sides.
        reasons: why a metric is missing, where that is known.
    """
    if not guard:
        return None
    watched = {name: found[name] for name in guard if name in found}
    unsaid = "it was not measured on both sides"
    lost = {name: (reasons or {}).get(name, unsaid) for name in guard if name not in found}
    lost |= {
        name: "it has no value any more"
        for name, change in watched.items()
        if math.isfinite(change.before) and not math.isfinite(change.after)
    }
    behind = [name for name, change in watched.items() if fell_behind(change, borne=guard[name])]
    borne = ", ".join(f"{name} {value_text(amount, MEASURES[name].unit)}" for name, amount in guard.items())
    words = [f"{name} cannot be judged: {reason}" for name, reason in lost.items()]
    words += [f"{name} {change.text()}" for name, change in watched.items() if name in behind or not (behind or lost)]
    return Check(
        name=f"{suite}: not behind",
        passed=not (behind or lost),
        value=f"{len(behind)} of {len(guard)} fell behind" + (f", {len(lost)} cannot be judged" if lost else ""),
        bound=f"not worse for sure by more than: {borne}",
        evidence="; ".join(words) + ".",
    )


def threshold_checks(suite: str, thresholds: Mapping[str, Bound], result: SuiteResult) -> tuple[Check, ...]:
    """A check for each bound. What could not be measured fails, and says why."""
    return tuple(_threshold(f"{suite}.{name}", name, bound, result) for name, bound in thresholds.items())


def _threshold(title: str, name: str, bound: Bound, result: SuiteResult) -> Check:
    if name not in result.metrics:
        reason = result.missing.get(name, "it was not measured")
        return Check(title, False, None, bound.text, f"Cannot be judged: {reason}.")
    metric = result.metrics[name]
    unit = metric.measure.unit
    if not math.isfinite(metric.value):
        return Check(title, False, None, bound.text, f"Cannot be judged: {metric.why}.")
    if metric.interval is None:
        spread = metric.why
    else:
        spread = "95 % interval {} to {}".format(*(value_text(end, unit) for end in metric.interval))
    passed = bound.holds(metric.value, interval=metric.interval)
    evidence = f"{value_text(metric.value, unit)} over {metric.num_rows} rows ({spread})."
    return Check(title, passed, metric.value, bound.text, evidence)


@dataclass(frozen=True, slots=True)
class Verdict:
    """SHIP or DON'T SHIP, with the reasons; `ship` is None where nothing was asked for that could fail."""

    ship: bool | None
    reasons: tuple[str, ...]

    @property
    def text(self) -> str:
        return "NOT JUDGED" if self.ship is None else "SHIP" if self.ship else "DON'T SHIP"


def judge(checks: Sequence[Check]) -> Verdict:
    """Ship where every check held."""
    if not checks:
        return Verdict(None, ("there is no bound, and no guarded metric with something to compare it with",))
    failed = [check for check in checks if not check.passed]
    reasons = tuple(f"{check.name}: {check.evidence} Wanted: {check.bound}." for check in failed)
    return Verdict(not failed, reasons or (f"all {len(checks)} checks held",))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
