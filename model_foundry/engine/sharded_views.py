"""How a model that lies on several ranks looks on rank 0: tensors gathered when they are read, sampling step by step,
and rows of a batch as the arrays of a message. It knows the engine that it asks, and nothing of processes.

Shapes: T tokens of a row, K targets of a token, B sequences being decoded, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from model_foundry.engine.ranks import Said
from model_foundry.models.language_model import LanguageModel
from model_foundry.models.sharding import Shard
from model_foundry.types import Datum


class GatheredTensor:
    """A tensor whose rows lie on all ranks; its values are gathered each time they are asked for.

    It has what savers and comparers ask of a tensor, and nothing else.
    """

    def __init__(self, gather: Callable[[], torch.Tensor], shard: Shard) -> None:
        self._gather = gather
        self.shape, self.dtype = shard.shape, shard.holder.dtype
        self.nbytes = self.shape.numel() * self.dtype.itemsize

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    def detach(self) -> torch.Tensor:
        return self._gather()

    cpu = contiguous = detach


Decode = Callable[[str, Mapping[str, np.ndarray], Mapping[str, Any]], torch.Tensor]
"""(start, step or keep; its arrays; its numbers) → the logits of the sequences being continued, [B, V]."""


class LedModel:
    """What sampling asks of a model, done by all ranks step by step; rank 0 alone chooses the tokens."""

    def __init__(self, model: LanguageModel, decode: Decode) -> None:
        self._decode = decode
        self.vocab_size, self.max_position_embeddings = model.vocab_size, model.max_position_embeddings

    def decoding(self, num_sequences: int, capacity: int) -> LedModel:
        self._size = {"num_sequences": num_sequences, "capacity": capacity}
        return self

    def start(self, prompts: list[torch.Tensor]) -> torch.Tensor:
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        return self._decode("start", {"tokens": torch.cat(prompts).cpu().numpy(), "lengths": lengths}, self._size)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._decode("step", {"tokens": tokens.cpu().numpy()}, {})

    def keep(self, rows: torch.Tensor) -> None:
        self._decode("keep", {"rows": rows.cpu().numpy()}, {})


def rows_as_arrays(data: Sequence[Datum], inputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows end to end."""
    arrays = {f"inputs.{name}": np.concatenate([datum.loss_inputs[name] for datum in data]) for name in inputs}
    lengths = np.array([datum.num_tokens for datum in data], dtype=np.int64)
    forks = [np.array(datum.branches, dtype=np.int64) for datum in data]
    arrays |= {"branches": np.concatenate(forks), "num_branches": np.array([fork.size for fork in forks])}
    return {"lengths": lengths, "tokens": np.concatenate([datum.tokens for datum in data]), **arrays}


def rows_of_arrays(arrays: Mapping[str, np.ndarray]) -> list[Datum]:
    ends = np.cumsum(arrays["lengths"])[:-1]
    inputs = {name.removeprefix("inputs."): np.split(array, ends) for name, array in arrays.items() if "." in name}
    tokens = np.split(arrays["tokens"], ends)
    forks = np.split(arrays["branches"], np.cumsum(arrays["num_branches"])[:-1])
    return [
        Datum(row, {name: parts[at] for name, parts in inputs.items()}, tuple(forks[at].tolist()))
        for at, row in enumerate(tokens)
    ]


def logprobs_by_row(part: Said, data: Sequence[Datum]) -> Iterator[tuple[int, np.ndarray]]:
    place = 0
    for row in part.fields["rows"]:
        shape = np.shape(data[row].loss_inputs["target_tokens"])
        size = int(np.prod(shape))
        yield row, part.arrays["logprobs"][place : place + size].reshape(shape)
        place += size
