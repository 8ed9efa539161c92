"""Models that only transformers runs: one answer after another, behind the interface of a running batch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import EngineError, ModelError
from model_foundry.types import SamplingParams


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """As in `engine.continuous`."""

    number: int
    token: int
    logprob: float
    finish: str | None
    top: tuple[tuple[int, float], ...] = ()
    cached_tokens: int = 0


@dataclass(slots=True)
class _Answer:
    number: int
    params: SamplingParams
    tokens: Iterator[tuple[int, int, float]]
    num_generated: int = 0


class OneByOne:
    """First come, first served. What the model is to answer with was loaded with it: no adapters by name."""

    def __init__(self, engine: TorchEngine, model_id: str) -> None:
        self._engine, self._model_id = engine, model_id
        self._queue: deque[_Answer] = deque()
        self._numbers = itertools.count()

    def add(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        *,
        adapter: str | None = None,
        top_logprobs: int = 0,
        client: str = "",
    ) -> int:
        """Raises: EngineError: an adapter, or other tokens' probabilities, which are not to be had this way."""
        if adapter is not None:
            raise EngineError(f"there is no adapter {adapter!r}")
        if top_logprobs:
            raise EngineError("this model reports the chosen token's probability only", hint="Set top_logprobs=0.")
        number = next(self._numbers)
        self._queue.append(_Answer(number, params, self._engine.stream(self._model_id, [prompt], params)))
        return number

    def cancel(self, number: int) -> None:
        self._queue = deque(answer for answer in self._queue if answer.number != number)

    def step(self) -> list[TokenEvent]:
        if not self._queue:
            return []
        answer = self._queue[0]
        _, token, logprob = next(answer.tokens)
        answer.num_generated += 1
        finish = "stop" if token in answer.params.stop_token_ids else None
        if finish is None and answer.num_generated == answer.params.max_tokens:
            finish = "length"
        if finish is not None:
            self._queue.popleft()
        return [TokenEvent(answer.number, token, logprob, finish)]

    def add_adapter(self, name: str, folder: Path) -> None:
        hint = "Serve it as the model: foundry serve RUN."
        raise ModelError("only the native decoder takes adapters beside each other", where=name, hint=hint)

    def remove_adapter(self, name: str) -> None:
        raise EngineError(f"there is no adapter {name!r}")

    @property
    def num_running(self) -> int:
        return min(1, len(self._queue))

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._queue) - 1)

    @property
    def cache_tokens_used(self) -> int:
        return 0
