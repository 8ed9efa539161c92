"""From prompts to answers: checked against the limits, admitted to the batch, streamed until a stop or the deadline."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

import numpy as np

from model_foundry.config.serve import LimitsSection
from model_foundry.errors import BrokenModelError, FoundryError
from model_foundry.server.admission import Admission, OverloadedError, Ticket
from model_foundry.server.backends.base import Backend, BackendError, Piece, PromptRefusedError, TokenRequest
from model_foundry.server.catalog import Catalog, ServedModel
from model_foundry.server.closing_time import ClosingTime
from model_foundry.server.problems import Problem
from model_foundry.server.stats import Stats
from model_foundry.server.text import StopStrings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to answer, as a client asked. `max_tokens` None takes what the context and the limits leave."""

    max_tokens: int | None
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of the answer numbered `index`: prompt 0's answers first."""

    index: int
    piece: Piece


class Answering:
    """Turns prompts into answers, one at a time for each place in the batch."""

    def __init__(
        self,
        backend: Backend,
        catalog: Catalog,
        admission: Admission,
        limits: LimitsSection,
        stats: Stats,
        closing: ClosingTime | None = None,
    ) -> None:
        self.backend, self.catalog, self.admission, self.limits = backend, catalog, admission, limits
        self.stats, self.closing = stats, closing or ClosingTime()

    async def open(
        self, model: ServedModel, prompts: Sequence[np.ndarray], sampling: Sampling, *, client: str
    ) -> Answers:
        """Check, and wait for a place.

        Raises:
            Problem: the request passes a limit, the queue is full, the time is over, or the model has been removed.
        """
        started = time.monotonic()
        model = self.catalog.find(model.name)  # its prompt took time, and its adapter may be another one by now
        requests = self._requests(model, prompts, sampling, client=client)
        deadline = started + self.limits.request_seconds
        self.catalog.hold(model)
        try:
            async with self.closing.until(deadline, seconds=self.limits.request_seconds):
                ticket = await self.admission.enter(client, len(requests))
        except BaseException as error:
            self.catalog.release(model)
            if isinstance(error, OverloadedError):
                raise self._overloaded(error) from None
            raise
        return Answers(self, model, prompts, requests, sampling, ticket, started=started, deadline=deadline)

    def _requests(
        self, model: ServedModel, prompts: Sequence[np.ndarray], sampling: Sampling, *, client: str
    ) -> list[TokenRequest]:
        count = sampling.n * len(prompts)
        most = min(self.limits.n, self.admission.places)
        if count > most:
            raise Problem(422, f"a request may ask for {most} answers, not {count}", param="n", code="too_many_answers")
        first_seed = secrets.randbits(32) if sampling.seed is None else sampling.seed % 2**32
        requests = []
        for prompt in prompts:
            request = TokenRequest(
                prompt=prompt,
                max_tokens=self._room(prompt, sampling.max_tokens),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=first_seed,
                stop_token_ids=model.renderer.stop_token_ids,
                adapter=model.adapter,
                top_logprobs=sampling.top_logprobs,
                client=client,
            )
            requests += [replace(request, seed=_nth_seed(first_seed, number)) for number in range(sampling.n)]
        return requests

    def _room(self, prompt: np.ndarray, asked: int | None) -> int:
        """How long the answer may become."""
        context, length = self.backend.context, len(prompt)
        if length == 0:
            raise Problem(422, "the prompt has no tokens", param="prompt", code="empty_prompt")
        most = min(self.limits.prompt_tokens or context, context - 1)
        if length > most:
            what = f"the prompt has {length} tokens, and {most} is the most"
            raise Problem(422, what, param="prompt", code="context_length_exceeded")
        if asked is None:
            return min(self.limits.max_tokens, context - length)
        if asked > self.limits.max_tokens:
            what = f"max_tokens is {asked}, and {self.limits.max_tokens} is the most"
            raise Problem(422, what, param="max_tokens", code="max_tokens_too_large")
        if length + asked > context:
            what = f"{length} prompt tokens and {asked} new ones exceed the context of {context}"
            raise Problem(422, what, param="max_tokens", code="context_length_exceeded")
        return asked

    def _overloaded(self, error: OverloadedError) -> Problem:
        waiting = self.admission.num_waiting
        seconds = self.stats.average_latency * (1 + waiting / self.admission.places)
        status = 429 if error.scope == "client" else 503
        return Problem(
            status, f"{error.what}; try again later", code="queue_full", retry_after=min(60.0, max(1.0, seconds))
        )


class Answers:
    """Answers under way. `deltas` yields them as they come; leaving it frees their places, and so does `close`."""

    def __init__(
        self,
        answering: Answering,
        model: ServedModel,
        prompts: Sequence[np.ndarray],
        requests: Sequence[TokenRequest],
        sampling: Sampling,
        ticket: Ticket,
        *,
        started: float,
        deadline: float,
    ) -> None:
        self._answering, self._requests, self._ticket = answering, requests, ticket
        self._stops, self._started, self._deadline = sampling.stop, started, deadline
        self.model = model
        self.count = len(requests)
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.completion_tokens = self.cached_tokens = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = self._has_left = False

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Raises: Problem: the back end failed or refuses, or the time is over."""
        queue: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        self._tasks = [
            asyncio.create_task(self._pump(index, request, queue)) for index, request in enumerate(self._requests)
        ]
        for task in self._tasks:
            task.add_done_callback(self._leave_when_all_are_done)
        left, first = len(self._tasks), True
        closing, seconds = self._answering.closing, self._answering.limits.request_seconds
        try:
            while left:
                async with closing.until(self._deadline, seconds=seconds):
                    item = await queue.get()
                if isinstance(item, BaseException):
                    raise _as_problem(item)
                if first and item.piece.text:
                    self._answering.stats.first_text(self.model.name, time.monotonic() - self._started)
                    first = False
                self.completion_tokens += item.piece.num_tokens
                self.cached_tokens += item.piece.cached_tokens
                left -= item.piece.finish is not None
                yield item
        finally:
            await self.close()

    async def close(self) -> None:
        """Stop what still runs. Places are given back when it has stopped. Doing it twice does no harm."""
        if self._closed:
            return
        self._closed = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
        self._leave()
        self._answering.stats.generated(
            self.model.name, prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens
        )

    async def _pump(self, index: int, request: TokenRequest, queue: asyncio.Queue[Delta | BaseException]) -> None:
        stops = StopStrings(self._stops)
        try:
            async with aclosing(self._answering.backend.stream(request)) as pieces:
                async for piece in pieces:
                    text, hit = stops.push(piece.text)
                    if hit:
                        queue.put_nowait(Delta(index, replace(piece, text=text, finish="stop")))
                        return
                    if piece.finish is not None:
                        text += stops.finish()
                    queue.put_nowait(Delta(index, replace(piece, text=text)))
        except FoundryError as error:
            queue.put_nowait(error)
        except Exception as error:
            logger.exception("an answer failed")
            queue.put_nowait(error)

    def _leave_when_all_are_done(self, _: asyncio.Task[None]) -> None:
        """A client that reads slowly, or no more, holds neither a place nor an adapter for that."""
        if self._tasks and all(task.done() for task in self._tasks):
            self._leave()

    def _leave(self) -> None:
        if not self._has_left:
            self._has_left = True
            self._answering.admission.leave(self._ticket)
            self._answering.catalog.release(self.model)


def _nth_seed(seed: int, number: int) -> int:
    """Seeds of several answers to one prompt; the first is the seed itself."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")


def _as_problem(error: BaseException) -> Problem:
    if isinstance(error, PromptRefusedError):
        return Problem(422, str(error), param="prompt", code="prompt_refused")
    if isinstance(error, BackendError):
        return Problem(503, f"{error.what}; the request may be sent again", code="backend_failed", retry_after=1.0)
    if isinstance(error, BrokenModelError):
        return Problem(500, str(error), code="model_broken")
    return Problem(500, "the server failed on this request; its log says why", code="internal_error")
