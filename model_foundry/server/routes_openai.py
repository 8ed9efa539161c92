"""OpenAI's API as far as it is here: /v1/models, /v1/chat/completions, /v1/completions."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from model_foundry.errors import DataError
from model_foundry.server.answering import Answering, Answers, Sampling
from model_foundry.server.catalog import ServedModel
from model_foundry.server.json_route import StrictJsonRoute
from model_foundry.server.openai_answers import ChatForm, CompletionForm, Form, collect, sse
from model_foundry.server.problems import Problem
from model_foundry.server.routes_generate import note_usage, stops
from model_foundry.server.schemas import ChatRequest, CompletionRequest, ModelCard, ModelList, OpenAIBody, OpenAIError
from model_foundry.server.streaming import stream, while_connected
from model_foundry.types import Message

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIError, "description": text}
    for status, text in {
        400: "a field that does not fit, or is not done here", 401: "no key, or not one of this server's",
        404: "no such model", 413: "too long a body", 429: "too many requests", 503: "the queue is full",
        504: "too late",
    }.items()
}  # fmt: skip
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "As in OpenAI's API"}
}
DEFAULT_COMPLETION_TOKENS = 16


def router(answering: Answering) -> APIRouter:
    routes = APIRouter(prefix="/v1", route_class=StrictJsonRoute, tags=["OpenAI"])

    @routes.get("/models", response_model=ModelList, responses={401: ERRORS[401]}, summary="What is served")
    async def models() -> Any:
        return ModelList(data=[_card(model, answering) for model in answering.catalog])

    @routes.get(
        "/models/{model}", response_model=ModelCard, responses={s: ERRORS[s] for s in (401, 404)}, summary="One model"
    )
    async def one_model(model: str) -> Any:
        return _card(answering.catalog.find(model), answering)

    @routes.post(
        "/chat/completions", response_class=Response, responses=ERRORS | STREAMED, summary="Go on with a conversation"
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = answering.catalog.find(body.model)
        top = (body.top_logprobs or 0) if body.logprobs else None
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        sampling = _sampling(body, limit, top)

        async def open_answers() -> Answers:
            prompt = await asyncio.to_thread(_chat_prompt, model, body)
            return await answering.open(model, [prompt], sampling, client=request.state.visit.client)

        return await _answer(body, request, model, ChatForm(model, with_logprobs=top is not None), open_answers)

    @routes.post("/completions", response_class=Response, responses=ERRORS | STREAMED, summary="Go on with a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model = answering.catalog.find(body.model)
        limit = body.max_tokens if body.max_tokens is not None else DEFAULT_COMPLETION_TOKENS
        sampling = _sampling(body, limit, body.logprobs)

        async def open_answers() -> Answers:
            prompts = await asyncio.to_thread(_plain_prompts, model, body)
            return await answering.open(model, prompts, sampling, client=request.state.visit.client)

        return await _answer(
            body, request, model, CompletionForm(model, with_logprobs=body.logprobs is not None), open_answers
        )

    return routes


async def _answer(body: OpenAIBody, request: Request, model: ServedModel, form: Form, open_answers: Any) -> Response:
    request.state.visit.model = model.name
    if body.stream:
        answers = await while_connected(request, _as_openai(open_answers()))
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        events = sse(form, answers, with_usage=with_usage, on_end=lambda: note_usage(request, answers))
        return stream(request, events, close=answers.close)

    async def work() -> dict[str, Any]:
        answers = await _as_openai(open_answers())
        try:
            return await collect(form, answers)
        finally:
            note_usage(request, answers)

    return JSONResponse(await while_connected(request, work()))


async def _as_openai(opening: Any) -> Answers:
    """A limit that was passed is a bad request in OpenAI's words."""
    try:
        return await opening
    except Problem as problem:
        if problem.status == 422:
            problem.status = 400
        raise


def _sampling(body: OpenAIBody, max_tokens: int | None, top_logprobs: int | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=body.seed,
        stop=stops(body.stop),
        n=body.n or 1,
        top_logprobs=top_logprobs,
    )


def _chat_prompt(model: ServedModel, body: ChatRequest) -> np.ndarray:
    messages = [
        Message(
            "system" if message.role == "developer" else message.role,
            message.text,
            {} if message.name is None else {"name": message.name},
        )
        for message in body.messages
    ]
    try:
        return model.chat_prompt(messages)
    except DataError as error:
        raise Problem(400, str(error), param="messages", code="prompt_refused") from None


def _plain_prompts(model: ServedModel, body: CompletionRequest) -> list[np.ndarray]:
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    vocab_size = model.renderer.tokenizer.vocab_size
    prompts = []
    for each in prompt if several else [prompt]:
        if isinstance(each, str):
            try:
                prompts.append(model.plain_prompt(each))
            except DataError as error:
                raise Problem(400, str(error), param="prompt", code="prompt_refused") from None
        elif max(each) >= vocab_size:
            raise Problem(400, f"token {max(each)} is not in the vocabulary of {vocab_size}", param="prompt")
        else:
            prompts.append(np.array(each, dtype=np.int32))
    return prompts


def _card(model: ServedModel, answering: Answering) -> ModelCard:
    return ModelCard(
        id=model.name,
        created=model.created,
        parent=model.parent,
        checkpoint=model.checkpoint,
        max_model_len=answering.backend.context,
    )
