"""Continuous batching: requests join and leave a running batch, one step at a time.

A step computes some blocks of prompts that have just come and one token of every answer that is under way. Prompts that
begin alike are computed once. The cache is bounded: a request reserves what it may need when it is let in, and waits,
first come first served, while there is no room; so nothing that runs is ever thrown out.

In the invariant mode an answer is a function of its request and the model alone, bit for bit: not of what else is in
the batch, of what was remembered, or of how its prompt was cut. See `continuous_decoder` for how, and docs/decisions.md
for the price. It knows tokens. It does not know text, threads or HTTP.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from model_foundry.engine.continuous_adapters import ServedAdapter, read_served_adapter
from model_foundry.engine.continuous_attention import Span
from model_foundry.engine.continuous_cache import (
    BLOCK_TOKENS,
    SEGMENT_TOKENS,
    Found,
    PromptHashes,
    SegmentStore,
    segments_for,
)
from model_foundry.engine.continuous_decoder import ANSWER_ROWS, Adapted, BatchedDecoder, Pass
from model_foundry.engine.sampling import GREEDY_BELOW, check_params, check_prompts, choose, draw, random_source
from model_foundry.errors import EngineError
from model_foundry.models import fused
from model_foundry.models.language_model import LanguageModel, NativeModel
from model_foundry.types import SamplingParams

BLOCKS_BESIDE_ANSWERS = 4
"""Blocks of prompts in a step while answers wait for their next token."""
BLOCKS_ALONE = 16
"""And while none does."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token.

    Attributes:
        number: the sequence.
        logprob: the model's own, in nats, at temperature 1 and without filters.
        top: the likeliest tokens and their logprobs, as many as were asked for.
        finish: `stop` or `length` with the last token.
        cached_tokens: prompt tokens that were not computed again; on the first event.
    """

    number: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    cached_tokens: int = 0


@dataclass(slots=True)
class _Sequence:
    number: int
    prompt: np.ndarray
    params: SamplingParams
    adapter: ServedAdapter | None
    top_logprobs: int
    source: str
    hashes: PromptHashes
    segments: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    end: torch.Tensor | None = None
    """Hidden state of the last token computed, while its logits are due."""
    num_generated: int = 0
    last_token: int = -1

    @property
    def reads_prompt(self) -> bool:
        return self.num_computed < len(self.prompt)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is chosen from all, and nobody asks for others' logprobs."""
        return not self.params.top_k and self.params.top_p == 1 and not self.top_logprobs

    @property
    def temperature(self) -> float:
        """0 where the likeliest token is asked for."""
        return 0.0 if self.params.temperature < GREEDY_BELOW else self.params.temperature

    @property
    def num_segments(self) -> int:
        # The last token is given away and never read.
        return segments_for(len(self.prompt) + self.params.max_tokens - 1)


class ContinuousBatch:
    """Requests join and leave a running batch. Not thread-safe: one thread calls it.

    Args:
        model: a native one without an adapter of its own; nothing else may change its weights meanwhile. The linear
            layers are kept a second time, joined and in the order that few rows are multiplied fastest in.
        device: where the model is.
        max_sequences: how many are computed together; more wait.
        max_cache_tokens: keys and values kept, of running sequences and remembered prompts; the memory is taken when
            it is first needed and not given back.
        invariant: the same bits in every company; default on a CPU.

    Raises:
        EngineError: transformers runs the model, it carries an adapter, the sizes mean nothing, or this machine's
            products cannot be made invariant.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        device: torch.device,
        max_sequences: int = 64,
        max_cache_tokens: int = 65536,
        invariant: bool | None = None,
    ) -> None:
        if not isinstance(model, NativeModel):
            what = "only models that the native decoder runs are batched continuously"
            raise EngineError(what, hint="Ask TorchEngine.sample instead, which asks transformers one by one.")
        if any(layer.lora_A is not None for layer in model.linears().values()):
            raise EngineError("the model carries an adapter already", hint="Load the base, then call add_adapter.")
        decoder = model.decoder
        if decoder.embed_tokens.device.type != device.type:
            raise EngineError(f"the model is on {decoder.embed_tokens.device}, not on {device}")
        if max_sequences < 1 or max_cache_tokens < SEGMENT_TOKENS:
            what = f"{max_sequences} sequences with {max_cache_tokens} tokens of cache"
            raise EngineError(what, hint=f"At least one sequence and {SEGMENT_TOKENS} tokens are needed.")
        model.eval()
        self.invariant = device.type == "cpu" if invariant is None else invariant
        self._model, self._max_sequences = model, max_sequences
        self._store = SegmentStore(max_cache_tokens // SEGMENT_TOKENS)
        room = self._store.num_segments * SEGMENT_TOKENS
        longest = min(model.max_position_embeddings or room, room)
        self._decoder = BatchedDecoder(
            decoder, num_segments=self._store.num_segments, invariant=self.invariant,
            num_positions=-(-longest // BLOCK_TOKENS) * BLOCK_TOKENS,
        )  # fmt: skip
        self._adapters: dict[str, ServedAdapter] = {}
        self._numbers, self._adapter_numbers = itertools.count(), itertools.count(1)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def cache_tokens_used(self) -> int:
        """Tokens of cache that running sequences hold, in whole segments; remembered prompts make room when needed."""
        return self._store.num_held * SEGMENT_TOKENS

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def add_adapter(self, name: str, folder: Path) -> None:
        """Read an adapter in PEFT's layout, to be asked for by name.

        Raises:
            EngineError: there is one of this name.
            ModelError: it cannot be read, or does not fit the base.
        """
        if name in self._adapters:
            raise EngineError(f"there is an adapter {name!r} already", hint="Remove it first, or choose another name.")
        self._adapters[name] = read_served_adapter(
            name, folder, number=next(self._adapter_numbers), layers=self._model.linears(), dtype=self._decoder.dtype
        )

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for it; those that have been added are answered with it to their end.

        Raises:
            EngineError: there is none of this name.
        """
        if self._adapters.pop(name, None) is None:
            raise self._no_adapter(name)

    def add(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        *,
        adapter: str | None = None,
        top_logprobs: int = 0,
        copy: int = 0,
        client: str = "",
    ) -> int:
        """Queue a prompt int32 [T], T ≥ 1; returns the sequence's number.

        `copy` tells samples of one prompt and seed apart, which are drawn differently. What one `client` has asked is
        computed anew for another, who could tell by the time it takes that it was asked before.

        Raises:
            EngineError: parameters that mean nothing, a prompt that is empty, too long or outside the vocabulary, one
                that the cache could never hold with its answer, or an adapter that is not there.
        """
        check_params(params)
        check_prompts(self._model, [prompt], params)
        if params.max_tokens == 0:
            raise EngineError("max_tokens is 0", where="sampling")
        if not 0 <= top_logprobs <= self._model.vocab_size:
            raise EngineError(f"top_logprobs is {top_logprobs}", where="sampling")
        if adapter is not None and adapter not in self._adapters:
            raise self._no_adapter(adapter)
        weights = None if adapter is None else self._adapters[adapter]
        hashes = PromptHashes.of(prompt, 0 if weights is None else weights.number, client)
        sequence = _Sequence(
            next(self._numbers), prompt, params, weights, top_logprobs, random_source(prompt, copy), hashes
        )
        if sequence.num_segments > self._store.num_segments:
            room = self._store.num_segments * SEGMENT_TOKENS
            raise EngineError(
                f"{len(prompt)} prompt tokens and {params.max_tokens} new ones exceed the cache of {room}",
                hint="Shorten the prompt, lower max_tokens, or give the cache more tokens.",
            )
        self._waiting.append(sequence)
        return sequence.number

    def cancel(self, number: int) -> None:
        """Forget a sequence and give its room back; nothing happens where it has finished."""
        for queue in (self._waiting, self._running):
            for sequence in list(queue):
                if sequence.number == number:
                    queue.remove(sequence)
                    self._store.release(sequence.segments)

    def step(self) -> list[TokenEvent]:
        """At most one new token for every running sequence; [] when there is nothing to do or prompts are being read.

        A step that fails, out of memory say, has lost nothing: it may be called again.
        """
        self._admit()
        answering = [sequence for sequence in self._running if sequence.num_generated and sequence.end is None]
        self._read_prompts(beside_answers=bool(answering))
        self._continue(answering)
        return self._choose([sequence for sequence in self._running if sequence.end is not None])

    def _no_adapter(self, name: str) -> EngineError:
        return EngineError(f"there is no adapter {name!r}; there is: {', '.join(self._adapters) or 'none'}")

    def _admit(self) -> None:
        """Let in who waits, in their order, while there is room. Who will find more of the prompt soon waits for it."""
        coming = {digest for sequence in self._running if sequence.reads_prompt for digest in _due(sequence)}
        passed: list[_Sequence] = []
        while self._waiting and len(self._running) < self._max_sequences:
            sequence = self._waiting.popleft()
            found = self._store.find(sequence.hashes, len(sequence.prompt))
            if found.end is None and _next_digest(sequence.hashes, found) in coming:
                passed.append(sequence)
                continue
            num_new = sequence.num_segments - len(found.shared)
            segments = self._store.take(found, num_new)
            if segments is None and found.num_copied:
                found = found.without_copy()
                segments = self._store.take(found, num_new)
            if segments is None:
                self._waiting.appendleft(sequence)
                break
            if found.num_copied:
                self._decoder.copy(found.copied_from, segments[len(found.shared)], found.num_copied)
            sequence.segments, sequence.end = segments, found.end
            sequence.num_computed = sequence.num_cached = found.num_tokens
            self._running.append(sequence)
            if sequence.reads_prompt:
                coming.update(_due(sequence))
        self._waiting.extendleft(reversed(passed))

    def _read_prompts(self, *, beside_answers: bool) -> None:
        """Compute some blocks of the prompts: the oldest's next one, then of those that have got least."""
        reading = [sequence for sequence in self._running if sequence.reads_prompt]
        if not reading:
            return
        planned = {sequence.number: sequence.num_computed for sequence in reading}
        blocks: list[tuple[_Sequence, int]] = []
        for turn in range(BLOCKS_BESIDE_ANSWERS if beside_answers else BLOCKS_ALONE):
            left = [sequence for sequence in reading if planned[sequence.number] < len(sequence.prompt)]
            if not left:
                break
            chosen = left[0] if turn == 0 else min(left, key=lambda s: planned[s.number] - s.num_cached)
            blocks.append((chosen, planned[chosen.number]))
            planned[chosen.number] += BLOCK_TOKENS
        hidden = self._decoder.run(self._prompt_pass(blocks))
        for place, (sequence, first) in enumerate(blocks):
            last = min(first + BLOCK_TOKENS, len(sequence.prompt))
            segment = sequence.segments[first // SEGMENT_TOKENS]
            sequence.num_computed = last
            if last - first == BLOCK_TOKENS:
                self._store.remember_block(sequence.hashes.blocks[first // BLOCK_TOKENS], segment)
            if not sequence.reads_prompt:
                sequence.end = hidden[place * BLOCK_TOKENS + last - first - 1].clone()
                self._store.remember_whole(sequence.hashes.whole, segment, sequence.end)

    def _prompt_pass(self, blocks: Sequence[tuple[_Sequence, int]]) -> Pass:
        num_rows = len(blocks) * BLOCK_TOKENS
        tokens = np.zeros(num_rows, dtype=np.int64)
        positions = np.zeros(num_rows, dtype=np.int64)
        spans, owners = [], []
        for place, (sequence, first) in enumerate(blocks):
            row, part = place * BLOCK_TOKENS, sequence.prompt[first : first + BLOCK_TOKENS]
            tokens[row : row + len(part)] = part
            # Beyond a prompt's end the block is filled up; nobody sees those keys before an answer overwrites them.
            positions[row : row + BLOCK_TOKENS] = np.arange(first, first + BLOCK_TOKENS)
            spans.append(Span(row, BLOCK_TOKENS, first, sequence.segments))
            owners += [sequence.adapter] * BLOCK_TOKENS
        together = 1 if any(owner is not None for owner in owners) else self._decoder.blocks_together
        return self._pass(
            tokens, positions, spans, owners, BLOCK_TOKENS * together if self.invariant else num_rows
        )  # fmt: skip

    def _continue(self, answering: Sequence[_Sequence]) -> None:
        """Append each one's last token and keep the hidden state after it."""
        if (loop := self._decoder.answers) is not None:
            # Rows of some adapters go another way, and whose company an answer has must not choose its way.
            taken = [sequence for sequence in answering if sequence.adapter is None or loop.takes(sequence.adapter)]
            self._append(taken, in_loop=True)
            answering = [sequence for sequence in answering if sequence.end is None]
        self._append(answering, in_loop=False)

    def _append(self, answering: Sequence[_Sequence], *, in_loop: bool) -> None:
        if not answering:
            return
        num_rows = len(answering) if in_loop else self._padded(len(answering))
        tokens = np.zeros(num_rows, dtype=np.int64)
        positions = np.zeros(num_rows, dtype=np.int64)
        spans: list[Span] = []
        owners: list[ServedAdapter | None] = [None] * num_rows
        for row, sequence in enumerate(answering):
            position = len(sequence.prompt) + sequence.num_generated - 1
            tokens[row], positions[row], owners[row] = sequence.last_token, position, sequence.adapter
            spans.append(Span(row, 1, position, sequence.segments))
        if in_loop:
            hidden = self._decoder.answer(torch.from_numpy(tokens), spans, owners)
        else:
            hidden = self._decoder.run(
                self._pass(tokens, positions, spans, owners, ANSWER_ROWS if self.invariant else num_rows)
            )
        for row, sequence in enumerate(answering):
            sequence.end = hidden[row]

    def _padded(self, num_rows: int) -> int:
        """Rows to compute for so many: in steps, for on a CPU every size costs kernels that stay in memory."""
        step = ANSWER_ROWS if self.invariant else min(8, 1 << (num_rows - 1).bit_length())
        return -(-num_rows // step) * step

    def _pass(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        spans: Sequence[Span],
        owners: Sequence[ServedAdapter | None],
        piece_rows: int,
    ) -> Pass:
        device = self._decoder.device
        adapted = [
            _by_adapter(owners[first : first + piece_rows], device) for first in range(0, len(tokens), piece_rows)
        ]
        to = torch.from_numpy
        return Pass(to(tokens).to(device), to(positions).to(device), spans, piece_rows, adapted)

    def _choose(self, due: Sequence[_Sequence]) -> list[TokenEvent]:
        """The next token of everyone whose last hidden state is there."""
        events: list[TokenEvent] = []
        size = ANSWER_ROWS if self.invariant else self._padded(len(due)) if due else 1
        for first in range(0, len(due), size):
            some = due[first : first + size]
            hidden = torch.stack([sequence.end for sequence in some])  # pyright: ignore[reportArgumentType, reportCallIssue]
            owners = [sequence.adapter for sequence in some]
            if self._decoder.fills_up(owners, size):
                hidden = torch.nn.functional.pad(hidden, (0, 0, 0, size - len(some)))
                owners += [None] * (size - len(some))
            logits = self._decoder.logits(hidden, _by_adapter(owners, self._decoder.device))[: len(some)]
            events += _next_tokens(some, logits)
        # Not before all are there: where memory runs out over one of them, none may have moved on.
        for sequence, event in zip(due, events, strict=True):
            sequence.num_generated += 1
            sequence.last_token, sequence.end = event.token, None
            if event.finish is not None:
                self._running.remove(sequence)
                self._store.release(sequence.segments)
        return events


def _next_tokens(sequences: Sequence[_Sequence], logits: torch.Tensor) -> list[TokenEvent]:
    """logits: [R, V]. Row by row: sums over the vocabulary must not depend on how many rows there are."""
    plain = [row for row, sequence in enumerate(sequences) if sequence.is_plain] if fused.fits(logits) else []
    events: dict[int, TokenEvent] = {}
    if plain:
        temperatures = [sequences[row].temperature for row in plain]
        draws = [draw(each.params, each.source, each.num_generated) for each in (sequences[row] for row in plain)]
        tokens, logprobs = fused.choose_tokens(
            logits if len(plain) == len(logits) else logits[plain], temperatures, draws
        )  # fmt: skip
        found = zip(plain, tokens.tolist(), logprobs.tolist(), strict=True)
        events = {row: _event(sequences[row], token, logprob) for row, token, logprob in found}
    return [
        events[row] if row in events else _next_token(sequence, logits[row].float())
        for row, sequence in enumerate(sequences)
    ]


def _next_token(sequence: _Sequence, logits: torch.Tensor) -> TokenEvent:
    """logits: float32 [V]."""
    token = int(choose(logits[None], sequence.params, [sequence.source], sequence.num_generated)[0])
    total = torch.logsumexp(logits, dim=0)
    top: tuple[tuple[int, float], ...] = ()
    if sequence.top_logprobs:
        values, tokens = (logits - total).topk(sequence.top_logprobs)
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return _event(sequence, token, float(logits[token] - total), top)


def _event(
    sequence: _Sequence, token: int, logprob: float, top: tuple[tuple[int, float], ...] = ()
) -> TokenEvent:  # fmt: skip
    finish = "stop" if token in sequence.params.stop_token_ids else None
    if finish is None and sequence.num_generated + 1 == sequence.params.max_tokens:
        finish = "length"
    cached = sequence.num_cached if sequence.num_generated == 0 else 0
    return TokenEvent(sequence.number, token, logprob, top, finish, cached)


def _due(sequence: _Sequence) -> Iterable[bytes]:
    """What of a prompt is still to be computed."""
    return (*sequence.hashes.blocks[sequence.num_computed // BLOCK_TOKENS :], sequence.hashes.whole)


def _next_digest(hashes: PromptHashes, found: Found) -> bytes:
    number = found.num_tokens // BLOCK_TOKENS
    return hashes.blocks[number] if number < len(hashes.blocks) else hashes.whole


def _by_adapter(owners: Sequence[ServedAdapter | None], device: torch.device) -> Adapted:
    adapters = {owner.number: owner for owner in owners if owner is not None}
    if len(adapters) == 1 and all(owner is not None for owner in owners):
        return [(adapter, None) for adapter in adapters.values()]
    return [
        (adapter, torch.tensor([owner is adapter for owner in owners], device=device)[:, None])
        for adapter in adapters.values()
    ]
