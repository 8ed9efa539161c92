"""What a sampling request wants to know beside its samples: how likely the prompt's tokens are, and others there.

Shapes: T tokens of the prompt, K tokens asked for at each place, S tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model_foundry.engine.next_tokens import drawn, likeliest
from model_foundry.engine.torch_engine import TorchEngine
from model_foundry.errors import DataError
from model_foundry.service.tensors import Room, json_indices, json_tensor
from model_foundry.types import Datum, SampledSequence

NOTHING = -99999.0
"""The log-probability that stands where there is none, beside token 0."""
Pairs = tuple[np.ndarray, np.ndarray]
"""(token ids int32 [N, K], log-probabilities float32 [N, K])."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Tokens whose log-probabilities are asked for, in place of the prompt's second to last.

    Attributes:
        ids: int64 [T - 1, K]; -1 asks for nothing.
        crow, col: where they were listed row by row (CSR), the protocol's indices: the reply is in the same layout.
        shape: as it was given.
    """

    ids: np.ndarray
    shape: tuple[int, int]
    crow: np.ndarray | None = None
    col: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to score. `last`: of so many tokens at the prompt's end."""

    prompt: bool = False
    last: int | None = None
    likeliest_of_prompt: int = 0
    likeliest_of_samples: int = 0
    drawn_of_prompt: int = 0
    targets: Targets | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Of a prompt and its samples; None, or empty, where it was not asked for.

    Attributes:
        prompt: float32 [T], NaN where there is none.
        prompt_likeliest: T places. drawn: T - 1 places.
        targets: float32, one a cell or one a listed value.
        samples_likeliest: one [S, K] a sample.
    """

    prompt: np.ndarray | None = None
    prompt_likeliest: Pairs | None = None
    drawn: Pairs | None = None
    asked: Targets | None = None
    targets: np.ndarray | None = None
    samples_likeliest: Sequence[Pairs] = ()


def read_targets(value: Mapping[str, Any], num_tokens: int) -> Targets:
    """`target_prompt_logprobs` of a request.

    Raises:
        DataError: it is no int64 tensor of [T - 1, K].
    """
    where = "target_prompt_logprobs"
    given = value.get("shape")
    shape: list[int] = given if isinstance(given, list) and all(type(size) is int for size in given) else []
    if len(shape) != 2 or shape[0] != max(0, num_tokens - 1) or shape[1] < 0 or value.get("dtype") != "int64":
        raise DataError(f"it must be int64 of [{max(0, num_tokens - 1)}, K], a row for each token but the first",
                        where=where)  # fmt: skip
    # Where it is sparse, laid out for the checks alone: a listed -1 is not an empty cell.
    laid_out = json_tensor(value, where, Room())
    if value.get("sparse_crow_indices") is None:
        return Targets(laid_out, (shape[0], shape[1]))
    crow, col = json_indices(value, where)
    listed, lengths = np.asarray(value.get("data"), dtype=np.int64).reshape(-1), np.diff(crow)
    ids = np.full((shape[0], int(lengths.max(initial=0))), -1, dtype=np.int64)
    ids[_listed(lengths)] = listed
    return Targets(ids, (shape[0], shape[1]), crow, col)


def _listed(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and places of values that are packed to the left, in the order of their list."""
    rows = np.repeat(np.arange(lengths.size), lengths)
    return rows, np.arange(rows.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def score(
    engine: TorchEngine,
    model: Callable[[], str],
    wanted: Wanted,
    prompt: np.ndarray,
    samples: Sequence[SampledSequence],
    *,
    temperature: float,
    seed: int,
) -> Scores:
    """Everything that is wanted of a prompt (int32 [T]) and of what came after it.

    Args:
        model: the engine's model, loaded where something is to be scored.

    Raises:
        EngineError: tokens outside the vocabulary. DataError: a target is.
    """
    if wanted == Wanted():
        return Scores()
    name = model()
    language_model, device = engine.language_model(name), engine.device
    before = prompt[:-1]
    likely = alternatives = None
    if wanted.likeliest_of_prompt:
        found = likeliest(language_model, before, k=wanted.likeliest_of_prompt, device=device)
        likely = _with_first(found, skipped=0 if wanted.last is None else len(prompt) - wanted.last)
    if wanted.drawn_of_prompt:
        alternatives = drawn(language_model, before, k=wanted.drawn_of_prompt, temperature=temperature, seed=seed,
                             device=device)  # fmt: skip
    return Scores(
        prompt=prompt_logprobs(engine, name, prompt, wanted.last) if wanted.prompt else None,
        prompt_likeliest=likely,
        drawn=alternatives,
        asked=wanted.targets,
        targets=None if wanted.targets is None else _of_targets(engine, name, before, wanted.targets),
        samples_likeliest=[
            _after_prompt(likeliest(language_model, np.concatenate([prompt, sample.tokens[:-1]]),
                                    k=wanted.likeliest_of_samples, device=device), len(sample.tokens))
            for sample in (samples if wanted.likeliest_of_samples else ())
        ],
    )  # fmt: skip


def _with_first(found: Pairs, *, skipped: int) -> Pairs:
    """Places of the whole prompt: nothing comes before its first token."""
    ids, logprobs = (np.concatenate([np.zeros((1, part.shape[1]), part.dtype), part]) for part in found)
    first = max(1, skipped)
    ids[:first], logprobs[:first] = 0, NOTHING
    return ids, logprobs


def _after_prompt(found: Pairs, num_tokens: int) -> Pairs:
    """The last `num_tokens` places."""
    return found[0][len(found[0]) - num_tokens :], found[1][len(found[1]) - num_tokens :]


def _of_targets(engine: TorchEngine, model: str, before: np.ndarray, asked: Targets) -> np.ndarray:
    if asked.ids.size and not -1 <= int(asked.ids.min()) <= int(asked.ids.max()) < 2**31:
        raise DataError("a token is below -1, which asks for nothing, or beyond every vocabulary",
                        where="target_prompt_logprobs")  # fmt: skip
    values = np.zeros(asked.ids.shape, dtype=np.float32)
    if asked.ids.size:
        inputs = {"target_tokens": np.maximum(asked.ids, 0).astype(np.int32), "weights": np.ones_like(values)}
        found = engine.forward(model, [Datum(before, inputs)], logprobs="all").logprobs[0]
        values = np.where(asked.ids < 0, np.float32(0), found)
    return values if asked.crow is None else values[_listed(np.diff(asked.crow))]


def prompt_logprobs(engine: TorchEngine, model: str, prompt: np.ndarray, last: int | None) -> np.ndarray:
    """Float32 [T]. Nothing comes before the first token, so it has none (NaN), nor those before the `last`."""
    out = np.full(len(prompt), np.nan, dtype=np.float32)
    if len(prompt) > 1:
        inputs = {"target_tokens": prompt[1:], "weights": np.ones(len(prompt) - 1, dtype=np.float32)}
        out[1:] = engine.forward(model, [Datum(prompt[:-1], inputs)], logprobs="all").logprobs[0]
    if last is not None:
        out[: len(out) - last] = np.nan
    return out
