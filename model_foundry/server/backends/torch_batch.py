"""The torch back end: one thread drives a running batch, which requests join and leave between two steps.

`engine.continuous.ContinuousBatch` computes; this carries tokens from its thread to the event loop and back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from model_foundry.errors import BrokenModelError, FoundryError
from model_foundry.server.backends.base import BackendError, Finish, Piece, PromptRefusedError, TokenProb, TokenRequest
from model_foundry.server.text import Detokenizer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import SamplingParams, check_logprob

logger = logging.getLogger(__name__)


class TokenEvent(Protocol):
    """One token of one sequence, as `ContinuousBatch.step` returns it."""

    @property
    def number(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> Any: ...
    @property
    def finish(self) -> str | None: ...
    @property
    def cached_tokens(self) -> int: ...


class Batch(Protocol):
    """What is needed of `ContinuousBatch`; one thread calls it."""

    def add(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        *,
        adapter: str | None = None,
        top_logprobs: int = 0,
        client: str = "",
    ) -> int: ...
    def cancel(self, number: int) -> None: ...
    def step(self) -> Any: ...
    def add_adapter(self, name: str, folder: Path) -> None: ...
    def remove_adapter(self, name: str) -> None: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def cache_tokens_used(self) -> int: ...


class _Stream:
    """One sequence: tokens on their way from the batch's thread to the event loop."""

    def __init__(self, request: TokenRequest, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.loop = loop
        self.events: asyncio.Queue[TokenEvent | FoundryError] = asyncio.Queue()
        self.place: tuple[Batch, int] | None = None  # its batch and number there; the batch's thread alone
        self.closed = False


class TorchBackend:
    """A model in a running batch.

    Args:
        batch: belongs to this object's thread from now on.
        tokenizer: of the base model.
        context: most tokens of prompt and answer together.
        num_slots: answers computed together.
        facts: what computes, for /stats.
    """

    kind = "torch"

    def __init__(
        self,
        batch: Batch,
        tokenizer: Tokenizer,
        *,
        context: int,
        num_slots: int,
        facts: dict[str, Any],
    ) -> None:
        self.context, self.num_slots, self._facts = context, num_slots, facts
        self._tokenizer = tokenizer
        self._batch = batch
        self._leaving: list[Batch] = []
        self._streams: dict[tuple[Batch, int], _Stream] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="foundry-batch", daemon=True)
        self._thread.start()

    # -- the event loop's side ---------------------------------------------------------------------------------------

    async def stream(self, request: TokenRequest) -> AsyncGenerator[Piece, None]:
        stream = _Stream(request, asyncio.get_running_loop())
        self._do(lambda: self._add(stream))
        detokenizer = Detokenizer(lambda tokens: self._tokenizer.decode(tokens, skip_special=True))
        try:
            while True:
                event = await stream.events.get()
                if isinstance(event, FoundryError):
                    raise event
                check_logprob(event.logprob)
                yield _piece(event, request, detokenizer)
                if event.finish is not None:
                    return
        finally:
            stream.closed = True
            self._do(lambda: self._cancel(stream))

    async def add_adapter(self, name: str, folder: Path) -> None:
        await asyncio.wrap_future(self._ask(lambda: self._batch.add_adapter(name, folder)))

    async def remove_adapter(self, name: str) -> None:
        await asyncio.wrap_future(self._ask(lambda: self._batch.remove_adapter(name)))

    def add_adapter_now(self, name: str, folder: Path) -> None:
        """`add_adapter` where no event loop runs yet."""
        self._ask(lambda: self._batch.add_adapter(name, folder)).result()

    async def go_over(self, batch: Batch) -> None:
        """Answer with another batch from now on; what runs in the one before ends there. Adapters stay behind."""

        def change() -> None:
            self._leaving = [*self._leaving, self._batch]
            self._batch = batch

        await asyncio.wrap_future(self._ask(change))

    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def gauges(self) -> dict[str, int]:
        batches = [*self._leaving, self._batch]
        return {
            "batch_running": sum(batch.num_running for batch in batches),
            "batch_waiting": sum(batch.num_waiting for batch in batches),
            "cache_tokens": sum(batch.cache_tokens_used for batch in batches),
        }

    def describe(self) -> dict[str, Any]:
        return {"backend": self.kind, "context": self.context, **self._facts}

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _do(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _ask(self, command: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._do(run)
        return future

    # -- the batch's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._obey():
            self._advance_all()

    def _advance_all(self) -> None:
        """A step of every batch. A method of its own: while the thread waits, none of its names holds a batch."""
        for batch in {batch for batch, _ in self._streams}:
            self._advance(batch)
        busy = {batch for batch, _ in self._streams}
        self._leaving = [batch for batch in self._leaving if batch in busy]

    def _advance(self, batch: Batch) -> None:
        try:
            events = list(batch.step())
        except Exception as error:
            self._end_all(batch, error)
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, TokenEvent]]] = {}
        for event in events:
            stream = self._streams.get((batch, event.number))
            if stream is None:
                continue
            by_loop.setdefault(stream.loop, []).append((stream, event))
            if event.finish is not None:
                del self._streams[batch, event.number]
        for loop, pairs in by_loop.items():
            _tell(loop, pairs)

    def _obey(self) -> bool:
        """Do what was asked for since the last step; wait where nothing is to be computed. False ends the thread."""
        with self._wake:
            while not (self._commands or self._streams or self._closing):
                self._wake.wait()
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            try:
                command()
            except Exception:  # a command tells its caller; what comes here is a fault of ours, and the batch goes on
                logger.exception("a command to the batch failed")
        return not self._closing

    def _add(self, stream: _Stream) -> None:
        if stream.closed:
            return
        request = stream.request
        params = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
        )
        try:
            number = self._batch.add(
                request.prompt,
                params,
                adapter=request.adapter,
                top_logprobs=request.top_logprobs or 0,
                client=request.client,
            )
        except FoundryError as error:
            _tell(stream.loop, [(stream, PromptRefusedError(error.what, hint=error.hint))])
            return
        stream.place = self._batch, number
        self._streams[stream.place] = stream

    def _cancel(self, stream: _Stream) -> None:
        if stream.place is not None and self._streams.get(stream.place) is stream:
            batch, number = stream.place
            batch.cancel(number)
            del self._streams[stream.place]

    def _end_all(self, batch: Batch, error: Exception) -> None:
        """A step failed: everybody in the batch is told, and the batch goes on with whoever comes next."""
        ended = [(place, stream) for place, stream in self._streams.items() if place[0] is batch]
        logger.error("a step of the batch failed (%s); %s answers end", error, len(ended), exc_info=error)
        what = error.what if isinstance(error, FoundryError) else "the model failed on this batch"
        told = error if isinstance(error, BrokenModelError) else BackendError(what)
        for place, stream in ended:
            batch.cancel(place[1])
            del self._streams[place]
            _tell(stream.loop, [(stream, told)])


def _tell(loop: asyncio.AbstractEventLoop, pairs: list[tuple[_Stream, Any]]) -> None:
    def deliver() -> None:
        for stream, event in pairs:
            stream.events.put_nowait(event)

    try:
        loop.call_soon_threadsafe(deliver)
    except RuntimeError:  # the loop has been closed: nobody listens any more
        logger.debug("nobody waits for %s tokens", len(pairs))


def _piece(event: TokenEvent, request: TokenRequest, detokenizer: Detokenizer) -> Piece:
    ends_turn = event.token in request.stop_token_ids
    text = "" if ends_turn else detokenizer.push(event.token)
    if event.finish is not None:
        text += detokenizer.finish()
    tokens: tuple[TokenProb, ...] = ()
    if request.top_logprobs is not None and not ends_turn:
        tokens = (TokenProb(event.token, event.logprob, tuple(event.top or ())),)
    finish: Finish | None = None if event.finish is None else "stop" if event.finish == "stop" else "length"
    return Piece(text, 1, tokens, finish, event.cached_tokens)
