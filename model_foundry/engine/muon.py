"""Muon: the momentum of each hidden matrix, made orthogonal, is its update (Jordan et al. 2024).

Five Newton-Schulz iterations bring every singular value of the momentum near one, so that no direction of a matrix is
learnt much faster than another. The update is scaled by 0.2 √max(out, in), which gives it the root mean square that
AdamW's updates have: learning rates and weight decay carry over (Liu et al. 2025, Moonlight, section 2.2). Embeddings,
the head, routers, norms and biases take AdamW's steps.

Matrices of one shape lie side by side and are done in one product each, a stack of experts as the matrices it is made
of. It knows nothing of models: who calls says which parameters are hidden matrices.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from model_foundry.engine.optimizer import FlatOptimizer, adamw_update
from model_foundry.errors import EngineError
from model_foundry.types import MuonParams, OptimizerKind

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of x ← a x + b (x xᵀ) x + c (x xᵀ)² x, chosen by Jordan for a steep slope at zero: singular values end
up between 0.7 and 1.2 rather than at one."""
NUM_ITERATIONS = 5
RMS_OF_ADAMW = 0.2
STACK_ELEMENTS = 1 << 24
"""Matrices are orthogonalised at most so many elements at a time: what bounds the memory of an update."""


class FlatMuon(FlatOptimizer):
    """Muon on the parameters named in `hidden`, AdamW on the others.

    Args:
        hidden: matrices [out, in], or stacks of them [E, out, in]; transposed ones (GPT-2) come to the same.
        dtype: the type of the Newton-Schulz iterations; bfloat16 is enough (Jordan) where it is native.
    """

    kind = "muon"
    takes = MuonParams

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, hidden: Collection[str], dtype: torch.dtype = torch.float32
    ) -> None:
        def place(item: tuple[str, nn.Parameter]) -> tuple[int, tuple[int, ...]]:
            name, parameter = item
            return (0, tuple(parameter.shape[-2:])) if name in hidden else (1 + (parameter.ndim < 2), ())

        super().__init__(dict(sorted(parameters.items(), key=place)))
        self.dtype = dtype
        self.hidden = [name for name in self.parameters if name in hidden]
        self.num_hidden = sum(self.parameters[name].numel() for name in self.hidden)
        self.momentum = torch.zeros_like(self.flat[: self.num_hidden])
        self.exp_avg = torch.zeros_like(self.flat[self.num_hidden :])
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)

    def update(self, params: MuonParams) -> None:
        for part, shape in self._stacks():
            grad, momentum, weight = (x[part].view(shape) for x in (self.grad, self.momentum, self.flat))
            momentum.lerp_(grad, 1 - params.momentum)
            # Nesterov's momentum: look one step ahead.
            direction = orthogonalised(grad.lerp_(momentum, params.momentum), self.dtype)
            rate = params.learning_rate * update_size(shape)
            weight.mul_(1 - params.learning_rate * params.weight_decay).add_(direction, alpha=-rate)
        adamw_update(self, self.num_hidden, (self.exp_avg, self.exp_avg_sq), params)

    def _stacks(self) -> list[tuple[slice, tuple[int, int, int]]]:
        """Stretches of the buffers that hold matrices of one shape, and their shape [B, out, in]."""
        sizes: dict[tuple[int, int], int] = {}
        for name in self.hidden:
            num_out, num_in = self.parameters[name].shape[-2:]
            sizes[num_out, num_in] = sizes.get((num_out, num_in), 0) + self.parameters[name].numel()
        stacks, first = [], 0
        for (num_out, num_in), size in sizes.items():
            one = num_out * num_in
            step = max(1, STACK_ELEMENTS // one) * one
            for start in range(0, size, step):
                stop = min(start + step, size)
                stacks.append((slice(first + start, first + stop), ((stop - start) // one, num_out, num_in)))
            first += size
        return stacks

    def moments(self) -> tuple[torch.Tensor, ...]:
        return self.momentum, self.exp_avg, self.exp_avg_sq

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """`momentum.NAME` of a hidden matrix; `exp_avg.NAME` and `exp_avg_sq.NAME` of the rest; views, not copies."""
        out: dict[str, torch.Tensor] = {}
        for name, part in self.places.items():
            shape = self.parameters[name].shape
            if part.stop <= self.num_hidden:
                out[f"momentum.{name}"] = self.momentum[part].view(shape)
                continue
            own = slice(part.start - self.num_hidden, part.stop - self.num_hidden)
            out[f"exp_avg.{name}"] = self.exp_avg[own].view(shape)
            out[f"exp_avg_sq.{name}"] = self.exp_avg_sq[own].view(shape)
        return out


def update_size(shape: Sequence[int]) -> float:
    """What an orthogonal update [.., out, in] is multiplied by, to be as large as AdamW's."""
    return RMS_OF_ADAMW * math.sqrt(max(shape[-2:]))


def require_whole_matrices(kind: OptimizerKind, *, whole: bool) -> None:
    """Raises EngineError: Muon for an adapter."""
    if kind == "muon" and not whole:
        # What is applied is the product of the two factors, and that is not orthogonal when they are.
        what = "muon makes the updates of whole matrices orthogonal, and an adapter holds factors of them"
        raise EngineError(what, where="optimizer", hint="Train the adapter with adamw, or every weight with muon.")


def orthogonalised(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to each of matrices float32 [B, m, n], roughly; in `dtype`.

    A matrix of zeros, an expert that no token came to, stays zeros.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_min(1e-12)
    x = (x if wide else x.transpose(1, 2)).to(dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.transpose(1, 2)
