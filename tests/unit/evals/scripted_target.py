"""A target whose answers and likelihoods are written down: what is tested is what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from model_foundry.evals.suite import Decoding
from model_foundry.evals.targets import Continuation, Likelihood, Messages, OnProgress, Reply


class ScriptedTarget:
    """Answers by what the user says last, in words; likelihoods by what is asked and the ending."""

    kind = "scripted"
    name = "scripted"

    def __init__(
        self,
        answer: Callable[[str, Decoding, int], str] = lambda prompt, decoding, batch_size: "",
        likelihood: Callable[[str, str], float] | None = None,
    ) -> None:
        self._answer, self._likelihood = answer, likelihood
        self.no_likelihoods: str | None = None if likelihood else "it only writes"

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind}

    def generate(
        self, prompts: Sequence[Messages], decoding: Decoding, *, batch_size: int, on_progress: OnProgress | None = None
    ) -> tuple[Reply, ...]:
        texts = [self._answer(messages[-1].content, decoding, batch_size) for messages in prompts]
        return tuple(Reply(text, len(text.split()), len(text.split()) >= decoding.max_new_tokens) for text in texts)

    def likelihoods(
        self, continuations: Sequence[Continuation], *, on_progress: OnProgress | None = None
    ) -> tuple[Likelihood, ...]:
        assert self._likelihood is not None
        found = []
        for each in continuations:
            text = each.text[each.start :]
            asked = "" if each.messages is None else each.messages[-1].content
            found.append(Likelihood(self._likelihood(asked, text), max(1, len(text.split())), len(text.encode())))
        return tuple(found)
