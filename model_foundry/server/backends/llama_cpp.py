"""The llama.cpp back end: a GGUF file, asked with token ids through llama.cpp's own server code, in this process.

llama.cpp batches by itself. A thread waits for each answer; the places that `Admission` gives out bound their number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from model_foundry.errors import ModelError
from model_foundry.models.llama_cpp import LlamaServer
from model_foundry.server.backends.base import BackendError, Piece, PromptRefusedError, TokenProb, TokenRequest

logger = logging.getLogger(__name__)


class LlamaCppBackend:
    """A GGUF file.

    Args:
        context: most tokens of prompt and answer together, for each of `num_slots` answers.

    Raises:
        ModelError: llama.cpp refuses the file. MissingExtraError: it is not installed.
    """

    kind = "llama.cpp"

    def __init__(self, path: Path, *, context: int, num_slots: int, num_threads: int | None = None) -> None:
        self.path, self.context, self.num_slots = path, context, num_slots
        self._server = LlamaServer(path, context=context, num_slots=num_slots, num_threads=num_threads)
        self._threads = ThreadPoolExecutor(num_slots, thread_name_prefix="foundry-llama")
        self._closed = False
        self._only_client: str | None = None
        self._several_ask = False

    async def stream(self, request: TokenRequest) -> AsyncGenerator[Piece, None]:
        loop = asyncio.get_running_loop()
        if self._only_client is None:
            self._only_client = request.client
        elif request.client != self._only_client and not self._several_ask:
            self._several_ask = True
            logger.info("several clients ask: from now on no prompt is kept, so that none is found for another")
        # Its slots are anybody's.
        asked = _asked(request) | {"cache_prompt": not self._several_ask}
        answers: asyncio.Queue[Any] = asyncio.Queue()
        stopped = False

        def on_answer(answer: Any) -> bool:
            loop.call_soon_threadsafe(answers.put_nowait, answer)
            return stopped or self._closed  # true ends it

        def ask() -> None:
            try:
                self._server.complete(asked, on_answer)
            except Exception as error:
                loop.call_soon_threadsafe(answers.put_nowait, error)
            loop.call_soon_threadsafe(answers.put_nowait, None)

        running = loop.run_in_executor(self._threads, ask)
        counted = 0
        try:
            while (answer := await answers.get()) is not None:
                piece = _piece(answer, request, counted)
                counted += piece.num_tokens
                yield piece
                if piece.finish is not None:
                    return
            raise BackendError("llama.cpp ended without a reason", where=str(self.path))
        finally:
            stopped = True
            await asyncio.shield(running)  # the place is free when the thread is

    async def add_adapter(self, name: str, folder: Path) -> None:
        hint = "Export it merged (foundry export RUN --to gguf), or serve the base with backend=torch."
        raise ModelError("a GGUF file is served without further adapters", where=name, hint=hint)

    async def remove_adapter(self, name: str) -> None:
        raise ModelError("a GGUF file is served without further adapters", where=name)

    def alive(self) -> bool:
        return not self._closed

    def gauges(self) -> dict[str, int]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {"backend": self.kind, "context": self.context}

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)


def _asked(request: TokenRequest) -> dict[str, Any]:
    """The request in llama.cpp's words. Its own extra samplers are switched off: only what was asked for counts."""
    asked = {
        "prompt": [int(token) for token in request.prompt],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.top_logprobs is not None:
        asked |= {"logprobs": max(1, request.top_logprobs), "n_probs": max(1, request.top_logprobs)}
    return asked


def _piece(answer: Any, request: TokenRequest, counted: int) -> Piece:
    if isinstance(answer, Exception):
        raise BackendError(f"llama.cpp failed ({answer})")
    if "error" in answer:
        error = answer["error"]
        refused = error.get("code") == 400
        raise (PromptRefusedError if refused else BackendError)(f"llama.cpp: {error.get('message', 'no reason given')}")
    choice = answer["choices"][0]
    finish, usage = choice.get("finish_reason"), answer.get("usage") or {}
    tokens = _probabilities(choice, request)
    if finish is None:
        return Piece(choice["text"], max(1, len(tokens)), tokens)
    # What it computed but did not send as pieces (half characters, the end-of-turn token) is in its own count.
    left = max(0, int(usage.get("completion_tokens", counted)) - counted)
    cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))
    return Piece(choice["text"], left, tokens, finish, cached)


def _probabilities(choice: Any, request: TokenRequest) -> tuple[TokenProb, ...]:
    if request.top_logprobs is None:
        return ()
    entries = (choice.get("logprobs") or {}).get("content") or []
    return tuple(
        TokenProb(
            int(entry["id"]),
            float(entry["logprob"]),
            tuple((int(top["id"]), float(top["logprob"])) for top in entry["top_logprobs"][: request.top_logprobs]),
        )
        for entry in entries
    )
