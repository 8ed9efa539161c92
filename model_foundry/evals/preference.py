"""The criterion of preference training: how many pairs end with the better answer ahead. Knows records, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model_foundry.evals.criteria import MAX_WINDOW_STEPS
from model_foundry.types import Check

ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"


def pairs_preferred(records: Sequence[Mapping[str, Any]], *, bound: float) -> Check:
    """More than the share `bound` of the pairs must end with a higher reward for the better answer.

    The last measurement of the validation pairs counts; without any, the last steps: a fifth of the run, at most 20.
    """
    said = f"> {bound:.0%}".replace("%", " %")
    held_out = [record for record in records if record["kind"] == "validation" and record.get(ACCURACY) is not None]
    steps = [record for record in records if record["kind"] == "step" and record.get(ACCURACY) is not None]
    if not held_out and not steps:
        return Check("pairs_preferred", False, None, said, "Cannot be measured: there is no record of a pair.")
    window = max(1, min(MAX_WINDOW_STEPS, len(steps) // 5))
    counted = held_out[-1:] or steps[-window:]
    share, margin = (sum(float(each[name]) for each in counted) / len(counted) for name in (ACCURACY, MARGIN))
    which = "validation pairs" if held_out else f"training pairs of the last {window} steps, for none were held out"
    evidence = f"{share:.1%} of the {which}, by {margin:.3f} on average.".replace("%", " %")
    return Check("pairs_preferred", share > bound, share, said, f"The better answer is ahead in {evidence}")
