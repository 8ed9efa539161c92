"""A rehearsal: a suite asked of nobody, to learn before any model has worked for minutes that it cannot be asked.

Prompts and endings become tokens and are held against the context as they will be; answers are empty. What does not
fit, has no tokens or is not installed shows at once, and so does how much is asked in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from model_foundry.errors import DataError
from model_foundry.evals.harness import require_tasks
from model_foundry.evals.kinds import ASK, Asking, other_batch_size
from model_foundry.evals.suite import Decoding, Suite
from model_foundry.evals.targets import (
    Continuation,
    Likelihood,
    Messages,
    OnProgress,
    Reply,
    by_tokens,
    ending_tokens,
    num_bytes_of,
    require_room,
)
from model_foundry.rendering import Renderer

WHOLE_LIKELIHOODS = {"accuracy", "margin"}
"""Metrics of choices that compare likelihoods of whole endings."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What asking holds at once, in tokens of each row.

    Attributes:
        read: the largest pass over endings.
        sampled: the largest batch of answers, prompts included.
    """

    read: tuple[int, ...] = ()
    sampled: tuple[int, ...] = ()

    def or_more(self, other: Asked) -> Asked:
        """The larger of each."""
        return Asked(max(self.read, other.read, key=sum), max(self.sampled, other.sampled, key=sum))


class Rehearsal:
    """A target that says nothing and finds every token as unlikely as any other; `asked` counts."""

    kind = "rehearsal"
    name = "rehearsal"
    no_likelihoods: str | None = None

    def __init__(self, renderer: Renderer, *, context: int | None) -> None:
        self._renderer, self._context, self.asked = renderer, context, Asked()

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind}

    def generate(
        self, prompts: Sequence[Messages], decoding: Decoding, *, batch_size: int, on_progress: OnProgress | None = None
    ) -> tuple[Reply, ...]:
        lengths = sorted((len(self._renderer.prompt(messages)) for messages in prompts), reverse=True)
        require_room(lengths[0] if lengths else 0, decoding.max_new_tokens, self._context)
        sampled = tuple(length + decoding.max_new_tokens for length in lengths[:batch_size])
        self.asked = self.asked.or_more(Asked(sampled=sampled))
        return (Reply("", 0, is_cut=False),) * len(prompts)

    def likelihoods(
        self, continuations: Sequence[Continuation], *, on_progress: OnProgress | None = None
    ) -> tuple[Likelihood, ...]:
        rows = [ending_tokens(self._renderer, each) for each in continuations]
        lengths = [len(tokens) for tokens, _ in rows]
        require_room(max(lengths, default=0), 0, self._context)
        batches = (tuple(lengths[index] for index in batch) for batch in by_tokens(lengths))
        self.asked = self.asked.or_more(Asked(read=max(batches, default=(), key=sum)))
        return tuple(
            Likelihood(float(num_read - len(tokens)), len(tokens) - num_read, num_bytes_of(each))
            for each, (tokens, num_read) in zip(continuations, rows, strict=True)
        )


def rehearse(suite: Suite, renderer: Renderer, *, context: int | None, batch_size: int = 16) -> Asked:
    """Ask a suite of nobody, and return what would be held at once.

    Raises:
        RowTooLongError: a row does not fit the context. DataError: an ending has no tokens, or begins another that it
        is weighed against. MissingExtraError or UsageError: what a metric or the harness needs is not installed.
    """
    target = Rehearsal(renderer, context=context)
    if suite.kind == "harness":
        require_tasks(suite)
    else:
        # The second time, in other batches, is asked in larger ones where the batches are small.
        ASK[suite.kind](suite, target, Asking(max(batch_size, other_batch_size(batch_size))))
    if suite.kind == "choices" and {*suite.metrics} & WHOLE_LIKELIHOODS:
        _require_parting(suite, renderer)
    return target.asked


def _require_parting(suite: Suite, renderer: Renderer) -> None:
    """Refuse a choice whose tokens begin another's: its likelihood is a factor of the other's, whatever is known."""
    for row in suite.rows:
        endings = [ending_tokens(renderer, Continuation(row.prompts[0], choice))[0] for choice in row.choices]
        for (one, first), (other, second) in permutations(zip(row.choices, endings, strict=True), 2):
            if len(first) < len(second) and np.array_equal(first, second[: len(first)]):
                what = f"the tokens of {one!r} begin those of {other!r}, so it is likelier whatever the model knows"
                hint = "Close each choice with a full stop, or measure accuracy_per_byte alone (metrics:)."
                raise DataError(what, where=f"suite {suite.name}, {row.source}", hint=hint)
