"""The loss alone: hidden states of 4,096 tokens through the head to a loss and its gradient, one way a process.

`full-logits` is what transformers computes when it is given labels; `trl` is the function that SFTTrainer's loss calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from benchmarks.workers.process import resident_bytes, run_worker, settle_memory

WIDTH, VOCABULARY = 576, 49_152


def ours(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    from model_foundry.engine.losses import LOSSES, head_pass

    inputs = {"target_tokens": targets, "weights": torch.full(targets.shape, 1 / len(targets))}
    result = head_pass(hidden.detach(), head, LOSSES["cross_entropy"], inputs, backward=True)
    assert result.d_hidden is not None
    return result.loss, result.d_hidden


def full_logits(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    loss = functional.cross_entropy((hidden @ head.t()).float(), targets)
    loss.backward()
    assert hidden.grad is not None
    return float(loss.detach()), hidden.grad


def trl(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    outputs: Any = ChunkedLogProbFunction.apply(
        hidden, head, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy", "is_top1")
    )
    loss = -outputs[0].sum() / len(targets)
    loss.backward()
    assert hidden.grad is not None
    return float(loss.detach()), hidden.grad


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[float, torch.Tensor]]] = {
    "ours": ours,
    "full-logits": full_logits,
    "trl": trl,
}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec["num_threads"])
    generator = torch.Generator().manual_seed(spec["seed"])
    dtype = getattr(torch, spec["dtype"])
    hidden = torch.randn(spec["num_tokens"], WIDTH, generator=generator).to(dtype).requires_grad_()
    head = (torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
    targets = torch.randint(VOCABULARY, (spec["num_tokens"],), generator=generator)
    way = WAYS[spec["way"]]
    # A few tokens first: imports and kernel choice are no part of the loss.
    way(hidden[:8].detach().requires_grad_(), head, targets[:8])
    before = settle_memory()
    started = time.perf_counter()
    loss, gradient = way(hidden, head, targets)
    seconds = time.perf_counter() - started
    return {
        "loss": loss,
        "grad_norm": float(gradient.float().norm()),
        "seconds": seconds,
        "peak_bytes": resident_bytes("VmHWM") - before,
    }


if __name__ == "__main__":
    run_worker(measure)
