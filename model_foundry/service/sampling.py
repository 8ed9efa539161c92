"""A sampling request read and checked, and what the engine makes of it where a base cannot be batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import DataError
from model_foundry.models.folder import read_json
from model_foundry.service.requests import Sample, SamplingBody
from model_foundry.service.scoring import Wanted, read_targets
from model_foundry.service.tensors import json_chunks
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import SampledSequence, SamplingParams


class Texts:
    """What sampling needs of the base's tokenizer: which tokens end a text, and how tokens read."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.end_ids = _end_ids(folder, self.tokenizer)

    def holds(self, tokens: Sequence[int], stops: Sequence[str]) -> bool:
        """Whether the last token completed one of the strings."""
        # A string of so many bytes ends within as many tokens; a few more for what a decoder trims at the start.
        window = max(len(stop.encode()) for stop in stops) + 4
        text = self.tokenizer.decode(list(tokens[-window:]))
        return any(stop in text for stop in stops)


def _end_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ends that the model's files and its tokenizer name."""
    found = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        found += [value] if isinstance(value, int) else [item for item in value or () if isinstance(item, int)]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request in the engine's terms.

    Attributes:
        stops: strings to stop at.
        wanted: what is to be scored beside.
    """

    prompt: np.ndarray
    params: SamplingParams
    stops: list[str]
    num_samples: int
    wanted: Wanted


def prepare(request: Sample, texts: Texts, *, seed: int, longest: int | None) -> Prepared:
    """Check a request.

    Args:
        seed: where the client named none.
        longest: tokens, prompt and answer, where the client named no end.

    Raises:
        DataError: something that is not offered, or means nothing.
    """
    if request.record_stability_info:
        raise DataError("record_stability_info is for a loss that is not published", where="asample")
    tokens = [token for chunk in json_chunks(request.prompt, "prompt") for token in chunk]
    params, stops = sampling_params(request.sampling_params, texts, seed=seed, num_tokens=len(tokens), context=longest)
    wanted = _wanted(request, len(tokens))
    return Prepared(np.asarray(tokens, dtype=np.int32), params, stops, request.num_samples, wanted)


def _wanted(request: Sample, num_tokens: int) -> Wanted:
    last = request.prompt_logprobs_last_n
    if last is not None and not request.prompt_logprobs:
        raise DataError("prompt_logprobs_last_n needs prompt_logprobs", where="asample")
    if last is not None and last >= num_tokens:
        raise DataError(f"prompt_logprobs_last_n is {last}, of {num_tokens} tokens", where="asample")
    targets = request.target_prompt_logprobs
    return Wanted(
        prompt=bool(request.prompt_logprobs),
        last=last,
        likeliest_of_prompt=request.topk_prompt_logprobs,
        likeliest_of_samples=request.topk_sample_logprobs,
        drawn_of_prompt=request.prompt_alt_tokens_k,
        targets=None if targets is None else read_targets(targets, num_tokens),
    )


def sampling_params(
    asked: SamplingBody, texts: Texts, *, seed: int, num_tokens: int, context: int | None
) -> tuple[SamplingParams, list[str]]:
    """The engine's parameters, and the strings to stop at; no `stop` means the model's own end, [] no end at all."""
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    stop_ids = texts.end_ids if stop is None else tuple(token for token in stop if isinstance(token, int))
    strings = [text for text in stop or () if isinstance(text, str)]
    if "" in strings:
        raise DataError("an empty string to stop at", where="sampling_params.stop")
    if strings:
        stop_ids = texts.end_ids
    if asked.max_tokens is None and context is None:
        raise DataError("max_tokens is missing, and this model names no longest text", where="sampling_params")
    if asked.top_k < -1:
        raise DataError(f"top_k is {asked.top_k}", where="sampling_params")
    params = SamplingParams(
        max_tokens=max(0, (context or 0) - num_tokens) if asked.max_tokens is None else asked.max_tokens,
        temperature=asked.temperature,
        top_k=max(asked.top_k, 0),
        top_p=asked.top_p,
        seed=seed if asked.seed is None else asked.seed,
        stop_token_ids=stop_ids,
    )
    return params, strings


def sample_alone(engine: TorchEngine, model: str, asked: Prepared, texts: Texts) -> list[SampledSequence]:
    """All of it at once, and nothing else meanwhile.

    Raises:
        EngineError: tokens outside the vocabulary, or too many.
    """
    prompts = [asked.prompt] * asked.num_samples
    rows: list[list[tuple[int, float]]] = [[] for _ in prompts]
    stopped: set[int] = set()
    stream = engine.stream(model, prompts, asked.params)
    for row, token, logprob in stream:
        if row in stopped:
            continue
        rows[row].append((token, logprob))
        is_text_over = bool(asked.stops) and texts.holds([token for token, _ in rows[row]], asked.stops)
        if token in asked.params.stop_token_ids or is_text_over:
            stopped.add(row)
            if len(stopped) == len(rows):
                break
    stream.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    return sequences_of(rows, stopped)


def sequences_of(rows: Sequence[Sequence[tuple[int, float]]], stopped: set[int]) -> list[SampledSequence]:
    """Samples from their (token, logprob) pairs; `stopped` are those that ended before their length."""
    return [
        SampledSequence(
            tokens=np.array([token for token, _ in pairs], dtype=np.int32),
            logprobs=np.array([logprob for _, logprob in pairs], dtype=np.float32),
            stop_reason="stop" if row in stopped else "length",
        )
        for row, pairs in enumerate(rows)
    ]
