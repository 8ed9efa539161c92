"""The seam between HTTP and whoever computes: a prompt of tokens in, pieces of text with their tokens out.

A back end knows neither chats nor HTTP. Everything here runs in the event loop's thread; a back end keeps its own
threads to itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from model_foundry.errors import FoundryError

Finish = Literal["stop", "length"]


class BackendError(FoundryError):
    """The back end failed on a request through no fault of the request's."""


class PromptRefusedError(FoundryError):
    """The back end cannot take this prompt or these parameters."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """One answer to compute.

    Attributes:
        prompt: int32 [T], T ≥ 1.
        max_tokens: at least 1; prompt and answer fit the context.
        adapter: the adapter on top of the base, or None.
        top_logprobs: how many alternatives to report with each token; None reports no probabilities.
        client: who asks. A prompt that is computed already is not found by others.
    """

    prompt: np.ndarray
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_token_ids: tuple[int, ...]
    adapter: str | None = None
    top_logprobs: int | None = None
    client: str = ""


@dataclass(frozen=True, slots=True)
class TokenProb:
    """A token with its log-probability in nats, and the likeliest tokens in its place, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What came since the last piece.

    Attributes:
        text: whole characters only; may be empty.
        num_tokens: tokens that were computed for it, an end-of-turn token included.
        tokens: their probabilities, where they were asked for; without the end-of-turn token.
        finish: set on the last piece.
        cached_tokens: prompt tokens that were not computed again.
    """

    text: str = ""
    num_tokens: int = 0
    tokens: tuple[TokenProb, ...] = field(default=())
    finish: Finish | None = None
    cached_tokens: int = 0


class Backend(Protocol):
    """Runs one base model, and adapters on top of it."""

    kind: str
    context: int
    """Most tokens of prompt and answer together."""
    num_slots: int
    """Answers computed together."""

    def stream(self, request: TokenRequest) -> AsyncGenerator[Piece, None]:
        """Compute an answer. Closing the iterator frees its place.

        Raises:
            PromptRefusedError: before the first piece. BackendError: at any time.
        """
        ...

    async def add_adapter(self, name: str, folder: Path) -> None:
        """Raises: ModelError: it does not fit, or this back end takes none."""
        ...

    async def remove_adapter(self, name: str) -> None:
        """Forget it once nothing uses it."""
        ...

    def alive(self) -> bool: ...

    def gauges(self) -> dict[str, int]:
        """What is going on inside, by name: numbers for /stats and /metrics."""
        ...

    def describe(self) -> dict[str, Any]:
        """What computes, in words."""
        ...

    def close(self) -> None: ...
