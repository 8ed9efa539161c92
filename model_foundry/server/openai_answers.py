"""Answers in the shapes of OpenAI's API: chat completions and completions, whole or as chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from model_foundry.server.answering import Answers
from model_foundry.server.backends.base import TokenProb
from model_foundry.server.catalog import ServedModel
from model_foundry.server.routes_generate import usage
from model_foundry.server.streaming import DONE, event
from model_foundry.tokenizer import Tokenizer

NO_PROBABILITY = -9999.0
"""What OpenAI's API says for a probability of zero, whose logarithm JSON cannot write."""


class Form(Protocol):
    """The shape of an answer."""

    name: str
    model: ServedModel

    def opening(self, index: int) -> dict[str, Any] | None:
        """A first chunk before any text, or None."""
        ...

    def chunk(self, index: int, text: str, tokens: tuple[TokenProb, ...], finish: str | None) -> dict[str, Any]: ...

    def choice(self, index: int, text: str, tokens: tuple[TokenProb, ...], finish: str | None) -> dict[str, Any]: ...

    def kind(self, *, streamed: bool) -> str: ...


class ChatForm:
    name = "chatcmpl"

    def __init__(self, model: ServedModel, *, with_logprobs: bool) -> None:
        self.model, self._with_logprobs = model, with_logprobs

    def kind(self, *, streamed: bool) -> str:
        return "chat.completion.chunk" if streamed else "chat.completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, text: str, tokens: tuple[TokenProb, ...], finish: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or finish is None else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def choice(self, index: int, text: str, tokens: tuple[TokenProb, ...], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish,
        }  # fmt: skip

    def _logprobs(self, tokens: tuple[TokenProb, ...]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        tokenizer = self.model.renderer.tokenizer
        content = []
        for each in tokens:
            top = [_entry(tokenizer, token, logprob) for token, logprob in each.top]
            content.append({**_entry(tokenizer, each.token, each.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


class CompletionForm:
    name = "cmpl"

    def __init__(self, model: ServedModel, *, with_logprobs: bool) -> None:
        self.model, self._with_logprobs = model, with_logprobs
        self._offsets: dict[int, int] = {}

    def kind(self, *, streamed: bool) -> str:
        return "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def chunk(self, index: int, text: str, tokens: tuple[TokenProb, ...], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(index, tokens), "finish_reason": finish}

    choice = chunk

    def _logprobs(self, index: int, tokens: tuple[TokenProb, ...]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        tokenizer, offset = self.model.renderer.tokenizer, self._offsets.get(index, 0)
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in tokens:
            text = tokenizer.decode([each.token])
            out["tokens"].append(text)
            out["token_logprobs"].append(_logprob(each.logprob))
            out["top_logprobs"].append({tokenizer.decode([token]): _logprob(value) for token, value in each.top})
            out["text_offset"].append(offset)
            offset += len(text)
        self._offsets[index] = offset
        return out


async def collect(form: Form, answers: Answers) -> dict[str, Any]:
    """The whole answer."""
    texts = [""] * answers.count
    tokens: list[list[TokenProb]] = [[] for _ in texts]
    finishes: list[str | None] = [None] * answers.count
    async with aclosing(answers.deltas()) as deltas:
        async for delta in deltas:
            texts[delta.index] += delta.piece.text
            tokens[delta.index] += delta.piece.tokens
            finishes[delta.index] = delta.piece.finish or finishes[delta.index]
    choices = [form.choice(index, text, tuple(tokens[index]), finishes[index]) for index, text in enumerate(texts)]
    return _head(form, streamed=False) | {"choices": choices, "usage": usage(answers)}


async def sse(form: Form, answers: Answers, *, with_usage: bool, on_end: Callable[[], None]) -> AsyncIterator[bytes]:
    """The answer as chunks; the usage in one of its own where it was asked for."""
    head = _head(form, streamed=True)
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    try:
        async with aclosing(answers.deltas()) as deltas:
            for index in range(answers.count):
                opening = form.opening(index)
                if opening is not None:
                    yield event(head | {"choices": [opening]} | extra)
            async for delta in deltas:
                piece = delta.piece
                if piece.text or piece.tokens or piece.finish is not None:
                    chunk = form.chunk(delta.index, piece.text, piece.tokens, piece.finish)
                    yield event(head | {"choices": [chunk]} | extra)
        if with_usage:
            yield event(head | {"choices": [], "usage": usage(answers)})
        yield DONE
    finally:
        on_end()


def _head(form: Form, *, streamed: bool) -> dict[str, Any]:
    return {
        "id": f"{form.name}-{uuid.uuid4().hex}",
        "object": form.kind(streamed=streamed),
        "created": int(time.time()),
        "model": form.model.name,
    }


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token])
    return {"token": text, "logprob": _logprob(logprob), "bytes": list(text.encode("utf-8"))}


def _logprob(value: float) -> float:
    return max(float(value), NO_PROBABILITY) if value == value else NO_PROBABILITY
