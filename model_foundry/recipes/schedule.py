"""Learning rates as pure functions of the step, so that a resumed run needs nothing but its step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Linear warm-up to `peak`, then a shape that falls towards `peak × min_ratio`, which the step after the last would
    have: a last step at a rate of 0 would train nothing.

    Attributes:
        shape: constant, linear, cosine (Loshchilov and Hutter 2017) or wsd (warm-up, stable, decay; Hu et al. 2024).
        decay_steps: the last steps, in which wsd decays.
    """

    peak: float
    shape: str
    warmup_steps: int
    total_steps: int
    decay_steps: int = 0
    min_ratio: float = 0.0

    def at(self, step: int) -> float:
        """The rate of step 1, 2, …, total_steps."""
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        left = SHAPES[self.shape](self, step)
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * left)

    def progress(self, step: int) -> float:
        """Share of the way from the end of the warm-up to the end of the run, 0 at its first step."""
        return (step - 1 - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)


def _stable_then_linear(rate: LearningRate, step: int) -> float:
    into_decay = step - (rate.total_steps - rate.decay_steps)
    return 1.0 if into_decay <= 0 else 1.0 - into_decay / (rate.decay_steps + 1)


SHAPES: dict[str, Callable[[LearningRate, int], float]] = {
    "constant": lambda _rate, _step: 1.0,
    "linear": lambda rate, step: 1.0 - rate.progress(step),
    "cosine": lambda rate, step: 0.5 * (1.0 + math.cos(math.pi * rate.progress(step))),
    "wsd": _stable_then_linear,
}
"""What is left of the peak after the warm-up, from 1 down to 0."""
