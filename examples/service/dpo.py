"""Preference training (DPO) through a training service: in this process, or behind a URL. The losses are the same bits.

    .venv/bin/python examples/service/dpo.py     # examples/preference/preference.yaml, over smollm2-135m-instruct
    ... dpo.py mine.yaml training.max_steps=40
    ... dpo.py --url http://127.0.0.1:8000 mine.yaml

Pairs and batches are the recipe's own (a configuration with `method: dpo`, whose model is a base and not a run). The
loss is computed here, of the log-probabilities that the service sends; it gets the gradient of each back. The service
reads each answer with its prompt, which the recipe reads once for both: the losses are the recipe's but for rounding.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model_foundry import Datum, FoundryError, ServiceClient, load_config
from model_foundry.config.preference import DpoConfig
from model_foundry.engine.losses import choose_loss
from model_foundry.recipes.preference import prepare_pairs
from model_foundry.run.directory import utc_now
from model_foundry.service.importing import service_shape

CONFIG = Path(__file__).parents[1] / "preference" / "preference.yaml"
BASE = "model.name=smollm2-135m-instruct"
"""There the pairs are a second stage, over a run's adapter; a service trains over a base."""


def answers(pair: Datum) -> list[tuple[Datum, np.ndarray]]:
    """The better answer and the worse one, each behind the prompt, with the weights of its tokens [T]."""
    start, found = pair.num_shared, []
    for size in pair.branches:
        places = np.r_[0 : pair.num_shared, start : start + size]
        row = Datum(pair.tokens[places], {"target_tokens": pair.loss_inputs["target_tokens"][places]})
        found.append((row, pair.loss_inputs["weights"][places]))
        start += size
    return found


class PairLoss:
    """A recipe's loss of whole answers, as the client calls it.

    Args:
        reference: float64 [R, 2], log-probabilities of the answers where training began; None where it has none.
    """

    def __init__(self, pairs: Sequence[Datum], reference: np.ndarray | None, objective: Any) -> None:
        split = [answer for pair in pairs for answer in answers(pair)]
        self.rows = [row for row, _ in split]
        self.loss = choose_loss(objective.loss_fn, objective.loss_config)
        self._due = [torch.from_numpy(weights != 0) for _, weights in split]
        weights = torch.tensor([float(weights.sum()) for _, weights in split], dtype=torch.float64)
        self._num_tokens = torch.tensor([float(due.sum()) for due in self._due], dtype=torch.float64)
        self._weights = (weights / self._num_tokens).view(-1, 2)[:, 0]
        self._reference = torch.zeros(len(pairs), 2) if reference is None else torch.from_numpy(reference)

    def sums(self, logprobs: Sequence[Any]) -> torch.Tensor:
        """float64 [R, 2]: of each answer."""
        tensors = (row if isinstance(row, torch.Tensor) else torch.tensor(row) for row in logprobs)
        rows = [row[due].double().sum() for row, due in zip(tensors, self._due, strict=True)]
        return torch.stack(rows).view(-1, 2)

    def __call__(self, rows: Sequence[Any], logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = {"logprobs": self._reference, "num_tokens": self._num_tokens.view(-1, 2)}
        loss = (self._weights * self.loss.terms(self.sums(logprobs), inputs, self.loss.settings)).sum()
        return loss, {"dpo": float(loss.detach())}


def train(client: ServiceClient, config: DpoConfig, *, log_steps: int = 10) -> tuple[list[float], str]:
    """The loss of every step, and the path of the last checkpoint."""
    work = prepare_pairs(config, now=utc_now())
    assert work.lora is not None
    service_shape(work.lora, where="lora")
    model = client.create_lora_training_client(
        config.model.name, rank=work.lora.r, seed=config.seed, train_unembed=False
    ).result()
    reference: dict[bytes, np.ndarray] = {}
    if work.has_reference:
        # A fresh adapter changes nothing yet, so the model is its own reference.
        for pair in work.train.datums:
            loss = PairLoss([pair], None, work.objective)
            reference[pair.tokens.tobytes()] = loss.sums(model.forward(_weighted(loss.rows)).result().logprobs).numpy()
    losses = []
    for step in range(1, work.total_steps + 1):
        passes = []
        for pairs in work.micro_batches(step):
            before = np.concatenate([reference[pair.tokens.tobytes()] for pair in pairs]) if reference else None
            loss = PairLoss(pairs, before, work.objective)
            passes.append(model.forward_backward_custom(loss.rows, loss))
        update = model.optim_step(work.adam_params(step))
        losses.append(math.fsum(done.result().metrics["dpo"] for done in passes))
        norm = update.result().grad_norm
        if step % log_steps == 0 or step == work.total_steps:
            print(f"step {step} of {work.total_steps}: loss {losses[-1]:.4f}, gradient {norm:.3f}")
    return losses, model.save_state("dpo", overwrite=True).result().path


def _weighted(rows: Sequence[Datum]) -> list[Datum]:
    """As a cross entropy reads them."""
    ones = (np.ones(row.num_tokens, dtype=np.float32) for row in rows)
    return [Datum(row.tokens, {**row.loss_inputs, "weights": one}) for row, one in zip(rows, ones, strict=True)]


def chosen_config(path: Path | None, overrides: Sequence[str]) -> DpoConfig:
    """The configuration given, else the example's with a base of its own."""
    settings = [BASE, *overrides] if path is None else overrides
    return load_config(DpoConfig, path=path or CONFIG, overrides=settings).config


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn a preference through a training service.")
    parser.add_argument("config", nargs="?", type=Path, help="default: examples/preference/preference.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--url", help="of a service; default: one in this process")
    given = parser.parse_args()
    config = chosen_config(given.config, given.overrides)
    with ServiceClient(base_url=given.url, base_model=None if given.url else config.model.name) as client:
        _, path = train(client, config)
    print(f"saved as {path}")
    print(f"talk to it: foundry chat {path}")


if __name__ == "__main__":
    try:
        main()
    except FoundryError as error:
        raise SystemExit(str(error)) from None
