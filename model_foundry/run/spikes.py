"""Loss spikes: steps whose loss stands far above those right before it.

A function of the losses alone, so a resumed run flags what the undisturbed one does. It judges nothing: a spike may be
a hard batch, and a run that keeps having them wants a lower learning rate or a look at its data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

WINDOW_STEPS = 32
MIN_STEPS = 8
DEVIATIONS = 8.0
MIN_RISE = 0.1


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss is over the median of the last WINDOW_STEPS finite ones by DEVIATIONS median absolute deviations,
    and by the share MIN_RISE of it; never within the first MIN_STEPS. A loss that is not a number is a spike.
    """
    recent = [each for each in before[-WINDOW_STEPS:] if math.isfinite(each)]
    if len(recent) < MIN_STEPS:
        return False
    if not math.isfinite(loss):
        return True
    middle = median(recent)
    deviation = median(abs(each - middle) for each in recent)
    return loss - middle > max(DEVIATIONS * deviation, MIN_RISE * abs(middle))


def losses_of(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The losses of a run's steps; null, as JSON has it for what is not a number, becomes one that is not."""
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    return [math.nan if loss is None else float(loss) for loss in losses]


def find_spikes(values: Sequence[float]) -> list[int]:
    """The steps, counted from 1, whose loss is a spike."""
    return [
        number + 1
        for number, loss in enumerate(values)
        if is_spike(loss, values[max(0, number - WINDOW_STEPS) : number])
    ]
