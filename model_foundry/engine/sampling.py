"""Choosing the next token, and continuing many prompts at once with a key/value cache.

Randomness is a function of (seed, prompt, how often the prompt stood in the batch before, position): the same whatever
else is in the batch, and different for copies of one prompt.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from model_foundry.engine.platform import is_out_of_memory
from model_foundry.errors import EngineError, OutOfMemoryError
from model_foundry.models.language_model import LanguageModel
from model_foundry.models.randomness import generator
from model_foundry.types import SampledSequence, SamplingParams, check_logprob

GREEDY_BELOW = 1e-30
"""Temperatures below it are 0: a float32 difference of logits divided by it must stay a number."""


def stream_beside_training(
    model: LanguageModel, prompts: Sequence[np.ndarray], params: SamplingParams, device: torch.device
) -> Iterator[tuple[int, int, float]]:
    """`stream_tokens` of a model that may be in training, and goes on with it afterwards.

    Raises:
        OutOfMemoryError: memory ran out. EngineError: as `stream_tokens`.
    """
    was_training = model.training
    model.eval()
    try:
        yield from stream_tokens(model, prompts, params, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "Ask for fewer answers at once (evaluation.batch_size), or for shorter ones."
        raise OutOfMemoryError(f"memory ran out over {len(prompts)} answers", hint=hint) from error
    finally:
        model.train(was_training)


def stream_tokens(
    model: LanguageModel, prompts: Sequence[np.ndarray], params: SamplingParams, device: torch.device
) -> Iterator[tuple[int, int, float]]:
    """Continue prompts (int32 [T], T ≥ 1) together; yields (prompt number, token, logprob in nats).

    The logprob is the model's own, at temperature 1 and without filters.

    Raises:
        EngineError: an empty prompt, one longer than the model's context or with a token outside the vocabulary,
            parameters that mean nothing. BrokenModelError: logits that are no numbers.
    """
    check_params(params)
    check_prompts(model, prompts, params)
    if not prompts or params.max_tokens == 0:
        return
    sources = random_sources(prompts)
    capacity = max(len(prompt) for prompt in prompts) + params.max_tokens
    decoding = model.decoding(len(prompts), capacity)
    logits = decoding.start([torch.from_numpy(prompt.astype(np.int64)).to(device) for prompt in prompts])
    active = list(range(len(prompts)))
    done: set[int] = set()
    for position in range(params.max_tokens):
        chosen = choose(logits, params, [sources[row] for row in active], position)
        logprobs = logits.gather(1, chosen[:, None])[:, 0] - torch.logsumexp(logits, dim=1)
        for row, token, logprob in zip(active, chosen.tolist(), logprobs.tolist(), strict=True):
            if row not in done:
                check_logprob(logprob)
                yield row, token, logprob
                if token in params.stop_token_ids:
                    done.add(row)
        going = [place for place, row in enumerate(active) if row not in done]
        if not going or position + 1 == params.max_tokens:
            return
        # The batch is halved, not thinned row by row: on a CPU every size costs compiled kernels that stay in memory.
        if len(going) <= len(active) // 2:
            kept = torch.tensor(going, device=device)
            decoding.keep(kept)
            chosen = chosen[kept]
            active = [active[place] for place in going]
        logits = decoding.step(chosen)


def collect(
    tokens: Iterator[tuple[int, int, float]], num_prompts: int, params: SamplingParams
) -> tuple[SampledSequence, ...]:
    """Gather a token stream by prompt."""
    rows: list[list[tuple[int, float]]] = [[] for _ in range(num_prompts)]
    for row, token, logprob in tokens:
        rows[row].append((token, logprob))
    return tuple(
        SampledSequence(
            tokens=np.array([token for token, _ in row], dtype=np.int32),
            logprobs=np.array([logprob for _, logprob in row], dtype=np.float32),
            stop_reason="stop" if row and row[-1][0] in params.stop_token_ids else "length",
        )
        for row in rows
    )


def random_sources(prompts: Sequence[np.ndarray]) -> list[str]:
    """A name for each prompt's randomness, from its tokens and how many equal ones come before it."""
    seen: Counter[bytes] = Counter()
    sources = []
    for prompt in prompts:
        tokens = prompt.astype("<i4").tobytes()
        sources.append(random_source(prompt, seen[tokens]))
        seen[tokens] += 1
    return sources


def random_source(prompt: np.ndarray, copy: int) -> str:
    """The name for a prompt's randomness where `copy` equal ones come before it."""
    return f"{hashlib.sha256(prompt.astype('<i4').tobytes()).hexdigest()}-{copy}"


def check_params(params: SamplingParams) -> None:
    """Raises EngineError for parameters that mean nothing."""
    wrong = {
        "temperature": not (math.isfinite(params.temperature) and params.temperature >= 0),
        "top_p": not 0 < params.top_p <= 1,
        "top_k": params.top_k < 0,
        "max_tokens": params.max_tokens < 0,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise EngineError(f"{name} is {getattr(params, name)}", where="sampling")


def check_prompts(model: LanguageModel, prompts: Sequence[np.ndarray], params: SamplingParams) -> None:
    """Raises EngineError for prompts that the model cannot read or continue so far."""
    limit = model.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise EngineError("the prompt has no tokens", where=f"prompt {number}")
        if limit is not None and len(prompt) + params.max_tokens > limit:
            raise EngineError(
                f"{len(prompt)} prompt tokens and {params.max_tokens} new ones exceed the context of {limit}",
                where=f"prompt {number}",
                hint="Shorten the prompt or lower max_new_tokens.",
            )
        for token in (int(prompt.min()), int(prompt.max())):
            if not 0 <= token < model.vocab_size:
                what = f"token {token} is not in the vocabulary of {model.vocab_size}"
                raise EngineError(what, where=f"prompt {number}")


def draw(params: SamplingParams, source: str, position: int) -> float:
    """In [0, 1), for the token at a position of a prompt's answer."""
    return float(torch.rand((), generator=generator(params.seed, source, position)))


def choose(logits: torch.Tensor, params: SamplingParams, sources: Sequence[str], position: int) -> torch.Tensor:
    """int64 [B] from float32 [B, V]."""
    if params.temperature < GREEDY_BELOW:
        return logits.argmax(dim=1)
    if params.temperature != 1:
        # The largest logit first, so that dividing by a small temperature overflows towards certainty.
        logits = (logits - logits.amax(dim=1, keepdim=True)) / params.temperature
    cumulative = torch.softmax(filtered(logits, params), dim=1).cpu().cumsum(1, dtype=torch.float64)
    draws = [draw(params, source, position) for source in sources]
    thresholds = torch.tensor(draws, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp(max=logits.shape[1] - 1).to(logits.device)


def filtered(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits with everything outside top_k and the top_p nucleus (Holtzman et al. 2020) at -inf."""
    if params.top_k:
        kth = logits.topk(min(params.top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        mass = torch.softmax(ordered, dim=1)
        outside = mass.cumsum(1) - mass >= params.top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits
