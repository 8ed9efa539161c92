"""AdamW on MLX by the formula of torch's fused kernel (Loshchilov and Hutter 2019): matrices decay, vectors do not.

It knows names and arrays, and nothing of models; hyper-parameters come with every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
import torch

from model_foundry.engine.mlx_arrays import to_mlx, to_torch
from model_foundry.engine.optimizer import check_params
from model_foundry.errors import ArchitectureMismatchError
from model_foundry.types import AdamParams, OptimizerKind, OptimParams, OptimStepOutput


class MlxAdamW:
    """Steps on entries of a dict of float32 arrays, replaced by new ones.

    Attributes:
        names: the entries that are trained.
        grad: pending gradients by name.
    """

    kind: OptimizerKind = "adamw"

    def __init__(self, weights: dict[str, mx.array], names: Sequence[str]) -> None:
        self._weights, self.names, self.step = weights, tuple(names), 0
        self.grad = self._zeros()
        self.exp_avg, self.exp_avg_sq = self._zeros(), self._zeros()

    def _zeros(self) -> dict[str, mx.array]:
        return {name: mx.zeros(self._weights[name].shape) for name in self.names}

    @property
    def trained(self) -> dict[str, mx.array]:
        return {name: self._weights[name] for name in self.names}

    @property
    def num_parameters(self) -> int:
        return sum(self._weights[name].size for name in self.names)

    @property
    def num_remembered(self) -> int:
        """Numbers kept from step to step."""
        return 2 * self.num_parameters

    def zero_grad(self) -> None:
        self.grad = self._zeros()

    def add(self, gradients: Mapping[str, mx.array]) -> None:
        """Add to what is pending, and have it computed."""
        self.grad = {name: self.grad[name] + gradients[name].astype(mx.float32) for name in self.names}
        mx.eval(self.grad)

    def apply(self, params: OptimParams) -> OptimStepOutput:
        """One step; the gradients are cleared. Not finite: nothing changes but that, and it says so.

        Raises:
            EngineError: hyper-parameters of another optimizer, or one that would ruin the weights; nothing was changed.
        """
        check_params(params, kind=self.kind, takes=AdamParams)
        assert isinstance(params, AdamParams)
        norm = self._norm()
        if not math.isfinite(norm):
            self.zero_grad()
            return OptimStepOutput(grad_norm=norm, skipped=True, step=self.step)
        factor = 1.0
        if params.grad_clip_norm > 0 and norm > params.grad_clip_norm:
            factor = params.grad_clip_norm / (norm + 1e-6)
        self.step += 1
        for name in self.names:
            self._update(name, factor * self.grad[name] if factor != 1.0 else self.grad[name], params)
        mx.eval(self.trained, self.exp_avg, self.exp_avg_sq)
        self.zero_grad()
        return OptimStepOutput(grad_norm=norm, skipped=False, step=self.step)

    def _norm(self) -> float:
        """L2 norm over all gradients; summed in float64, which does not overflow."""
        flats = (np.array(self.grad[name], copy=False).ravel() for name in self.names)
        return math.sqrt(math.fsum(float(np.dot(wide, wide)) for wide in (flat.astype(np.float64) for flat in flats)))

    def _update(self, name: str, grad: mx.array, params: AdamParams) -> None:
        weight = self._weights[name]
        if weight.ndim >= 2 and params.weight_decay:
            weight = weight * (1 - params.learning_rate * params.weight_decay)
        mean = self.exp_avg[name] + (1 - params.beta1) * (grad - self.exp_avg[name])
        square = params.beta2 * self.exp_avg_sq[name] + (1 - params.beta2) * grad * grad
        step_size = params.learning_rate / (1 - params.beta1**self.step)
        scale = math.sqrt(1 - params.beta2**self.step)
        self._weights[name] = weight - step_size * (mean / (mx.sqrt(square) / scale + params.eps))
        self.exp_avg[name], self.exp_avg_sq[name] = mean, square

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What is remembered of every parameter, by `exp_avg.NAME` and the like; views."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{kind}.{name}": to_torch(each[name]) for name in self.names for kind, each in moments.items()}

    def fit_state(self, tensors: Mapping[str, torch.Tensor], *, where: str) -> None:
        """Raises ArchitectureMismatchError: names or shapes differ from those of `state_tensors`."""
        kinds = ("exp_avg", "exp_avg_sq")
        shapes = {f"{kind}.{name}": self._weights[name].shape for name in self.names for kind in kinds}
        wrong = sorted(shapes.keys() ^ tensors.keys()) or [n for n in shapes if shapes[n] != tuple(tensors[n].shape)]
        if wrong:
            what = f"the optimizer state does not fit this model, {wrong[0]} first"
            raise ArchitectureMismatchError(what, where=where)

    def load_state(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Take moments that `fit_state` has found to fit."""
        self.exp_avg = {name: to_mlx(tensors[f"exp_avg.{name}"]) for name in self.names}
        self.exp_avg_sq = {name: to_mlx(tensors[f"exp_avg_sq.{name}"]) for name in self.names}
        self.step = step

    def reset(self) -> None:
        """Start afresh: moments zero, step zero."""
        self.exp_avg, self.exp_avg_sq, self.step = self._zeros(), self._zeros(), 0
