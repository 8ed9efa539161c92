"""What a model thinks comes next at each place of a row: its likeliest tokens, or draws from its distribution.

One pass over the row; logits exist for a piece of it at a time. Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from model_foundry.engine.losses import CHUNK_LOGITS
from model_foundry.engine.sampling import GREEDY_BELOW
from model_foundry.errors import EngineError
from model_foundry.models.language_model import LanguageModel
from model_foundry.models.randomness import generator

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Logits float32 [N, V] -> token ids int64 [N, k]."""


def likeliest(
    model: LanguageModel, tokens: np.ndarray, *, k: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """The k likeliest tokens after each of `tokens` (int32 [T]), likeliest first: ids int32 [T, k], and their
    log-probabilities in nats, float32 [T, k].

    Raises:
        EngineError: the model knows fewer tokens than k, or not these.
    """
    if k > model.vocab_size:
        raise EngineError(f"{k} tokens are asked for, and the model knows {model.vocab_size}")
    return _at_each(model, tokens, k, lambda logits: logits.topk(k, dim=1).indices, device)


def drawn(
    model: LanguageModel, tokens: np.ndarray, *, k: int, temperature: float, seed: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """k independent draws after each of `tokens`, at a temperature (0: the likeliest); as `likeliest`.

    The log-probabilities are the model's own, at temperature 1.
    """
    dice = generator(seed, "draws")

    def choose(logits: torch.Tensor) -> torch.Tensor:
        if temperature < GREEDY_BELOW:
            return logits.argmax(dim=1, keepdim=True).expand(-1, k)
        shares = torch.softmax((logits - logits.amax(dim=1, keepdim=True)) / temperature, dim=1).cpu()
        return torch.multinomial(shares, k, replacement=True, generator=dice).to(logits.device)

    return _at_each(model, tokens, k, choose, device)


@torch.no_grad()
def _at_each(
    model: LanguageModel, tokens: np.ndarray, k: int, choose: Choose, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    row = torch.as_tensor(tokens, dtype=torch.int64, device=device)
    if row.numel() and (int(row.min()) < 0 or int(row.max()) >= model.vocab_size):
        raise EngineError(f"a token is outside the vocabulary of {model.vocab_size}")
    if not row.numel():
        return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
    was_training = model.training
    model.eval()
    try:
        hidden = model.hidden([row])
    finally:
        model.train(was_training)
    ids, logprobs = [], []
    for part in hidden.split(max(1, CHUNK_LOGITS // model.vocab_size)):
        logits = model.logits(part).float()
        chosen = choose(logits)
        ids.append(chosen.cpu())
        logprobs.append(torch.log_softmax(logits, dim=1).gather(1, chosen).cpu())
    return torch.cat(ids).numpy().astype(np.int32), torch.cat(logprobs).numpy().astype(np.float32)
