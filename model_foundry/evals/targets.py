"""Who is asked: one interface over an engine's model, a GGUF file and a served model.

A target continues conversations, and where it can, says how likely a given ending is. What it can't say it says in
words (`no_likelihoods`): a metric that needs it is then reported as not measured, with that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from model_foundry.errors import DataError, EngineError
from model_foundry.evals.suite import Decoding
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Datum, ForwardBackwardOutput, Message, SampledSequence, SamplingParams

Messages = Sequence[Message]
OnProgress = Callable[[int, int, int], None]
"""Told after every batch: how many are done, how many tokens were computed for them, and how many there are in all."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `is_cut`: it ran into the limit instead of ending."""

    text: str
    num_tokens: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Continuation:
    """An ending whose likelihood is asked for: after a conversation, or of a text from its beginning on.

    Attributes:
        messages: what it answers; None where `text` stands alone.
        start: of a text alone: characters before this are read and not counted.
    """

    messages: tuple[Message, ...] | None
    text: str
    start: int = 0


@dataclass(frozen=True, slots=True)
class Likelihood:
    """`logprob` in nats, summed over `num_tokens` tokens, which stand for `num_bytes` of UTF-8."""

    logprob: float
    num_tokens: int
    num_bytes: int


class Target(Protocol):
    """A model that answers."""

    name: str
    kind: str
    no_likelihoods: str | None
    """Why it can't say how likely an ending is; None where it can."""

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values."""
        ...

    def generate(
        self, prompts: Sequence[Messages], decoding: Decoding, *, batch_size: int, on_progress: OnProgress | None = None
    ) -> tuple[Reply, ...]:
        """Answer each conversation, in their order."""
        ...

    def likelihoods(
        self, continuations: Sequence[Continuation], *, on_progress: OnProgress | None = None
    ) -> tuple[Likelihood, ...]:
        """How likely each ending is, in their order."""
        ...


class Model(Protocol):
    """What is needed of an engine's client: tokens in, numbers out."""

    def sample(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> Sequence[SampledSequence]: ...

    def forward(self, data: Sequence[Datum]) -> ForwardBackwardOutput: ...


MAX_BATCH_TOKENS = 2048
"""Tokens of one pass over endings, so that an evaluation needs no more memory than a small training step."""


class EngineTarget:
    """A model that an engine of ours holds.

    Args:
        context: the longest row that the model reads, in tokens, where it has a limit.
    """

    kind = "engine"
    no_likelihoods: str | None = None

    def __init__(
        self, name: str, model: Model, renderer: Renderer, *, context: int | None, facts: dict[str, Any] | None = None
    ) -> None:
        self.name, self._model, self.renderer, self.context = name, model, renderer, context
        self._facts = facts or {}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "renderer": self.renderer.name, **self._facts}

    def generate(
        self, prompts: Sequence[Messages], decoding: Decoding, *, batch_size: int, on_progress: OnProgress | None = None
    ) -> tuple[Reply, ...]:
        rows = [self.renderer.prompt(messages) for messages in prompts]
        require_room(max((len(row) for row in rows), default=0), decoding.max_new_tokens, self.context)
        params = SamplingParams(
            max_tokens=decoding.max_new_tokens, temperature=decoding.temperature, top_p=decoding.top_p,
            seed=decoding.seed, stop_token_ids=self.renderer.stop_token_ids,
        )  # fmt: skip
        replies: dict[int, Reply] = {}
        num_tokens = 0
        for batch in by_length([len(row) for row in rows], batch_size):
            sequences = self._model.sample([rows[index] for index in batch], params)
            if len(sequences) != len(batch):
                raise EngineError(f"the sampler answered {len(sequences)} of {len(batch)} prompts")
            for index, sequence in zip(batch, sequences, strict=True):
                text = self.renderer.reply(sequence.tokens).strip()
                replies[index] = Reply(text, len(sequence.tokens), sequence.stop_reason == "length")
                num_tokens += len(sequence.tokens)
            if on_progress is not None:
                on_progress(len(replies), num_tokens, len(prompts))
        return tuple(replies[index] for index in range(len(rows)))

    def likelihoods(
        self, continuations: Sequence[Continuation], *, on_progress: OnProgress | None = None
    ) -> tuple[Likelihood, ...]:
        rows = [ending_tokens(self.renderer, each) for each in continuations]
        require_room(max((len(tokens) for tokens, _ in rows), default=0), 0, self.context)
        found: dict[int, Likelihood] = {}
        num_tokens = 0
        for batch in by_tokens([len(tokens) for tokens, _ in rows]):
            data = [_datum(*rows[index]) for index in batch]
            output = self._model.forward(data)
            for index, datum, logprobs in zip(batch, data, output.logprobs, strict=True):
                due = datum.loss_inputs["weights"] > 0
                num_bytes = num_bytes_of(continuations[index])
                found[index] = Likelihood(float(logprobs[due].sum()), int(due.sum()), num_bytes)
                num_tokens += datum.num_tokens
            if on_progress is not None:
                on_progress(len(found), num_tokens, len(continuations))
        return tuple(found[index] for index in range(len(rows)))


def num_bytes_of(continuation: Continuation) -> int:
    """UTF-8 bytes that a likelihood is of."""
    return len(continuation.text[continuation.start :].encode())


def ending_tokens(renderer: Renderer, continuation: Continuation) -> tuple[np.ndarray, int]:
    """int32 [T] of the whole row, and how many tokens at its front are read and not counted.

    An answer has the tokens that training would give it, without the end of its turn. A text alone begins after the
    token that begins texts (BOS, else end-of-text), so that its first token counts too.

    Raises:
        DataError: an ending without tokens, or a text for a tokenizer that has no token to begin it with.
    """
    if continuation.messages is not None:
        tokens, num_read = _answer_tokens(renderer, continuation.messages, continuation.text)
    else:
        tokens, num_read = _text_tokens(renderer.tokenizer, continuation.text, continuation.start)
    if len(tokens) <= num_read:
        raise DataError(f"the ending {continuation.text!r} has no tokens")
    return np.asarray(tokens, dtype=np.int32), num_read


def _answer_tokens(renderer: Renderer, messages: Messages, answer: str) -> tuple[np.ndarray, int]:
    row = renderer.render([*messages, Message("assistant", answer)], train_on="last_assistant")
    turn = np.flatnonzero(row.weights)
    if not len(turn):
        return row.tokens, len(row.tokens)
    ends = (int(place) for place in turn if int(row.tokens[place]) in renderer.stop_token_ids)
    return row.tokens[: next(ends, int(turn[-1]) + 1)], int(turn[0])


def _text_tokens(tokenizer: Tokenizer, text: str, start: int) -> tuple[list[int], int]:
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise DataError("the tokenizer has neither BOS nor end-of-text, so a text's first token has no likelihood")
    before = [first, *tokenizer.encode(text[:start])]
    # In the middle of a text, a tokenizer that puts a space before a text's first word must not.
    return [*before, *tokenizer.encode(text[start:], first=start == 0)], len(before)


def _datum(tokens: np.ndarray, num_read: int) -> Datum:
    weights = np.ones(len(tokens), dtype=np.float32)
    weights[:num_read] = 0
    return Datum.from_row(tokens, weights)


class RowTooLongError(DataError):
    """A suite's longest row does not fit the model's context."""


def require_room(num_prompt_tokens: int, num_new_tokens: int, context: int | None) -> None:
    """Raises: RowTooLongError: the longest row does not fit the model's context."""
    if context is not None and num_prompt_tokens + num_new_tokens > context:
        new = f" and {num_new_tokens} new ones" if num_new_tokens else ""
        raise RowTooLongError(
            f"{num_prompt_tokens} tokens of the longest row{new} exceed the model's context of {context:,}",
            hint="Lower max_new_tokens, or leave the suite out: evaluation.suites=[…]",
        )


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of rows of similar length, the same on every call."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def by_tokens(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of rows of similar length, each of MAX_BATCH_TOKENS or one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batch and sum(lengths[each] for each in batch) + lengths[index] > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
