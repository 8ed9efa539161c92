"""Randomness that is counted (seed, step, row, place), never drawn from hidden state.

So a run can be repeated bit for bit, and a dropout mask is a function of its row: packing or splitting a batch, or
computing a layer a second time, draws the same mask again. It knows nothing of layers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from model_foundry.errors import ModelError


@dataclass(slots=True)
class DropoutCounter:
    """Which row of which step stands where in a batch, so that a dropout mask is a function of the row alone."""

    seed: int = 0
    step: int = 0
    rows: tuple[tuple[int, int], ...] = ()
    """(datum number within the step, number of tokens), in packed order."""


def salt(name: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A generator that is a function of its arguments alone."""
    text = "/".join(str(part) for part in (seed, *parts))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little"))


def drop(x: torch.Tensor, rate: float, counter: DropoutCounter | None, place: int, *, field: str) -> torch.Tensor:
    """Inverted dropout whose mask depends on (seed, step, row, place), not on how the batch was packed or split.

    Args:
        x: [.., width]; packed tokens, or rows padded to the longest.
        place: salt of the layer.
        field: where the rate was set, for the error.

    Raises:
        ModelError: the batch's rows are not those of the counter.
    """
    width = x.shape[-1]
    lengths = [] if counter is None else [tokens for _, tokens in counter.rows]
    num_places, longest = x.numel() // width, max(lengths, default=0)
    if counter is None or num_places not in (sum(lengths), longest * len(lengths)):
        raise ModelError("dropout was asked for on a batch whose rows are not known", hint=f"Set {field}=0.")
    padded = num_places != sum(lengths)
    masks = []
    for row, tokens in counter.rows:
        masks.append(torch.rand(tokens, width, generator=generator(counter.seed, counter.step, row, place)))
        if padded:
            masks.append(torch.ones(longest - tokens, width))
    keep = torch.cat(masks).to(x.device) >= rate
    return x * (keep.view(x.shape).to(x.dtype) / (1.0 - rate))


@dataclass(frozen=True, slots=True)
class AttentionDropout:
    """Inverted dropout on one layer's attention probabilities; a mask belongs to a row's block of queries."""

    rate: float
    counter: DropoutCounter
    place: int

    def mask(self, row: int, heads: tuple[int, int], queries: tuple[int, int], keys: tuple[int, int]) -> torch.Tensor:
        """0 or 1 / (1 - rate) for each probability: [K, G, queries, keys], both ranges cut to the row's length.

        Args:
            row: its place in the packed batch.
            heads: key/value heads, and query heads of each.
            queries: first and end.
            keys: first and end.
        """
        datum, length = self.counter.rows[row]
        shape = (*heads, max(0, min(queries[1], length) - queries[0]), max(0, min(keys[1], length) - keys[0]))
        chosen = generator(self.counter.seed, self.counter.step, datum, self.place, queries[0])
        return (torch.rand(shape, generator=chosen) >= self.rate).float() / (1.0 - self.rate)
