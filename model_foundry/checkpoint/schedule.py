"""When to save: pure functions of the step. Knows nothing of time, disks or runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

Schedule = Literal["linear", "log", "explicit"]


def should_save(
    step: int, *, total_steps: int, schedule: Schedule = "linear", every: int = 0, at: Collection[int] = ()
) -> bool:
    """Whether to save after optimizer step `step` (1-based). The last step is always saved.

    Args:
        every: distance under the linear schedule; 0 saves only the end.
        at: steps of the explicit schedule. Under log the steps are the powers of two.
    """
    if step < 1 or step > total_steps:
        return False
    return step == total_steps or _RULES[schedule](step, every, at)


def save_steps(
    *, total_steps: int, schedule: Schedule = "linear", every: int = 0, at: Collection[int] = ()
) -> list[int]:
    """Every step that `should_save` names, ascending; for a plan before the run."""
    return [
        step
        for step in range(1, total_steps + 1)
        if should_save(step, total_steps=total_steps, schedule=schedule, every=every, at=at)
    ]


_RULES: dict[str, Callable[[int, int, Collection[int]], bool]] = {
    "linear": lambda step, every, at: every > 0 and step % every == 0,
    "log": lambda step, every, at: step & (step - 1) == 0,
    "explicit": lambda step, every, at: step in at,
}
