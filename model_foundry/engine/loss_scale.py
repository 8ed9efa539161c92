"""The loss scale of float16: gradients too small for the type are lifted into it (Micikevicius et al. 2018, part 3.2).

Losses are multiplied by it before the backward pass and gradients divided by it before the step, so what it changes is
which of them a float16 can hold. Too large, and a gradient overflows: that step is skipped and the scale halved. After
many steps without one it is doubled. It knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from model_foundry.errors import CheckpointError

INITIAL_SCALE = 2.0**16
GROWTH_STEPS = 2000
LEAST_SCALE = 1.0
"""Below this it is not the scale that makes gradients overflow."""
LARGEST_SCALE = 2.0**32


@dataclass(slots=True)
class LossScale:
    """`good_steps`: steps in a row, since it last changed, that did not overflow."""

    value: float = INITIAL_SCALE
    good_steps: int = 0

    def after(self, *, skipped: bool) -> None:
        """What a step means for the next ones."""
        if skipped:
            self.value, self.good_steps = max(LEAST_SCALE, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = min(LARGEST_SCALE, self.value * 2), 0

    def facts(self) -> dict[str, Any]:
        """For the checkpoint; JSON values."""
        return asdict(self)

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any] | None, where: str) -> LossScale:
        """That of a checkpoint; a fresh one where it was written in another type.

        Raises:
            CheckpointError: it is none.
        """
        if facts is None:
            return cls()
        value, good_steps = facts.get("value"), facts.get("good_steps")
        if not (isinstance(value, float) and LEAST_SCALE <= value <= LARGEST_SCALE and isinstance(good_steps, int)):
            raise CheckpointError(f"the loss scale is {dict(facts)}", where=where)
        return cls(value, good_steps)
