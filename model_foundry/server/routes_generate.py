"""/generate and /generate/stream: one prompt, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from model_foundry.errors import DataError
from model_foundry.server.answering import Answering, Answers, Sampling
from model_foundry.server.catalog import ServedModel
from model_foundry.server.json_route import StrictJsonRoute
from model_foundry.server.problems import Problem
from model_foundry.server.schemas import Detail, GenerateRequest, GenerateResponse
from model_foundry.server.streaming import DONE, event, stream, while_connected
from model_foundry.types import Message

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Detail, "description": text}
    for status, text in {
        400: "not JSON", 401: "no key, or not one of this server's", 404: "no such model", 413: "too long a body",
        422: "a field that does not fit", 429: "too many requests", 503: "the queue is full", 504: "too late",
    }.items()
}  # fmt: skip


def router(answering: Answering, *, default_max_tokens: int) -> APIRouter:
    routes = APIRouter(route_class=StrictJsonRoute, tags=["generate"])

    async def open_answers(body: GenerateRequest, request: Request) -> Answers:
        model = answering.catalog.find(body.model)
        request.state.visit.model = model.name
        prompt = await asyncio.to_thread(_prompt, model, body)
        sampling = Sampling(
            max_tokens=body.max_tokens
            if body.max_tokens is not None
            else _default(answering, prompt, default_max_tokens),
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            seed=body.seed,
            stop=stops(body.stop),
        )
        return await answering.open(model, [prompt], sampling, client=request.state.visit.client)

    @routes.post("/generate", response_model=GenerateResponse, responses=ERRORS, summary="Answer a prompt")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        async def work() -> dict[str, Any]:
            answers = await open_answers(body, request)
            text, finish = "", None
            async with aclosing(answers.deltas()) as deltas:
                async for delta in deltas:
                    text += delta.piece.text
                    finish = delta.piece.finish or finish
            note_usage(request, answers)
            return {
                "text": text, "model": answers.model.name, "finish_reason": finish, "usage": usage(answers),
            }  # fmt: skip

        return JSONResponse(await while_connected(request, work()))

    @routes.post(
        "/generate/stream",
        responses=ERRORS
        | {200: {"content": {"text/event-stream": {}}, "description": "Pieces of text, then the usage"}},
        response_class=Response,
        summary="Answer a prompt piece by piece (server-sent events)",
    )
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        answers = await while_connected(request, open_answers(body, request))
        return stream(request, _events(answers, request), close=answers.close)

    return routes


async def _events(answers: Answers, request: Request) -> AsyncIterator[bytes]:
    finish = None
    try:
        async with aclosing(answers.deltas()) as deltas:
            async for delta in deltas:
                finish = delta.piece.finish or finish
                if delta.piece.text:
                    yield event({"text": delta.piece.text})
        yield event({"text": "", "model": answers.model.name, "finish_reason": finish, "usage": usage(answers)})
        yield DONE
    finally:
        note_usage(request, answers)


def _prompt(model: ServedModel, body: GenerateRequest) -> np.ndarray:
    raw = body.raw if body.raw is not None else not model.has_template
    try:
        if not raw:
            system = [] if body.system is None else [Message("system", body.system)]
            return model.chat_prompt([*system, Message("user", body.prompt)])
        if body.system is not None:
            raise Problem(422, "a raw prompt takes no system message", param="system")
        return model.plain_prompt(body.prompt)
    except DataError as error:
        raise Problem(422, str(error), param="prompt", code="prompt_refused") from None


def _default(answering: Answering, prompt: np.ndarray, tokens: int) -> int:
    """The default length, or what the context leaves of it."""
    return max(1, min(tokens, answering.limits.max_tokens, answering.backend.context - len(prompt)))


def stops(value: str | list[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def usage(answers: Answers) -> dict[str, Any]:
    return {
        "prompt_tokens": answers.prompt_tokens,
        "completion_tokens": answers.completion_tokens,
        "total_tokens": answers.prompt_tokens + answers.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answers.cached_tokens},
    }


def note_usage(request: Request, answers: Answers) -> None:
    """For the log."""
    visit = request.state.visit
    visit.prompt_tokens, visit.completion_tokens = answers.prompt_tokens, answers.completion_tokens
