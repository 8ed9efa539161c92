"""A rehearsal: a suite asked of nobody, to learn before any model has worked for minutes that it cannot be asked.

Prompts and endings become tokens and are held against the context as they will be; answers are empty. What does not
fit, has no tokens or is not installed shows at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model_foundry.evals.harness import require_tasks
from model_foundry.evals.kinds import ASK, Asking
from model_foundry.evals.suite import Decoding, Suite
from model_foundry.evals.targets import (
    Continuation,
    Likelihood,
    Messages,
    OnProgress,
    Reply,
    ending_tokens,
    num_bytes_of,
    require_room,
)
from model_foundry.rendering import Renderer


class Rehearsal:
    """A target that says nothing and finds every token as unlikely as any other."""

    kind = "rehearsal"
    name = "rehearsal"
    no_likelihoods: str | None = None

    def __init__(self, renderer: Renderer, *, context: int | None) -> None:
        self._renderer, self._context = renderer, context

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind}

    def generate(
        self, prompts: Sequence[Messages], decoding: Decoding, *, batch_size: int, on_progress: OnProgress | None = None
    ) -> tuple[Reply, ...]:
        longest = max((len(self._renderer.prompt(messages)) for messages in prompts), default=0)
        require_room(longest, decoding.max_new_tokens, self._context)
        return (Reply("", 0, is_cut=False),) * len(prompts)

    def likelihoods(
        self, continuations: Sequence[Continuation], *, on_progress: OnProgress | None = None
    ) -> tuple[Likelihood, ...]:
        rows = [ending_tokens(self._renderer, each) for each in continuations]
        require_room(max((len(tokens) for tokens, _ in rows), default=0), 0, self._context)
        return tuple(
            Likelihood(float(num_read - len(tokens)), len(tokens) - num_read, num_bytes_of(each))
            for each, (tokens, num_read) in zip(continuations, rows, strict=True)
        )


def rehearse(suite: Suite, renderer: Renderer, *, context: int | None) -> None:
    """Ask a suite of nobody.

    Raises:
        RowTooLongError: a row does not fit the context. DataError: an ending has no tokens. MissingExtraError or
        UsageError: what a metric or the harness needs is not installed.
    """
    if suite.kind == "harness":
        require_tasks(suite)
    else:
        ASK[suite.kind](suite, Rehearsal(renderer, context=context), Asking())
