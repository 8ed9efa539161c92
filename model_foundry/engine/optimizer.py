"""AdamW over parameters laid end to end, so that a step, a norm and a snapshot are one operation each.

AdamW: Loshchilov and Hutter 2019, torch's semantics. Weight decay acts on matrices, not on vectors. It knows nothing of
models; hyper-parameters come with every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from model_foundry.errors import ArchitectureMismatchError, EngineError
from model_foundry.types import AdamParams, OptimStepOutput


class FlatAdamW:
    """Owns the storage of `parameters` (float32 leaves), their gradients and both moments.

    After construction each parameter's `.data` and `.grad` are views into flat buffers.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(sorted(parameters.items(), key=lambda item: item[1].ndim < 2))
        self.num_decayed = sum(p.numel() for p in self.parameters.values() if p.ndim >= 2)
        first = next(iter(self.parameters.values()))
        self.flat = torch.empty(sum(p.numel() for p in self.parameters.values()), device=first.device)
        self.grad = torch.zeros_like(self.flat)
        self.step = 0
        place = 0
        with torch.no_grad():
            for parameter in self.parameters.values():
                end = place + parameter.numel()
                view = self.flat[place:end].view(parameter.shape)
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = self.grad[place:end].view(parameter.shape)
                parameter.requires_grad_(True)
                place = end
        groups = (slice(0, self.num_decayed), slice(self.num_decayed, place))
        self._groups = [part for part in groups if part.stop > part.start]
        self.exp_avg = torch.zeros_like(self.flat)
        self.exp_avg_sq = torch.zeros_like(self.flat)

    def zero_grad(self) -> None:
        self.grad.zero_()

    @torch.no_grad()
    def apply(self, params: AdamParams) -> OptimStepOutput:
        """One step; the gradients are cleared. Not finite: nothing changes but that, and it says so.

        Raises:
            EngineError: a hyper-parameter that would ruin the weights; nothing was changed.
        """
        _check(params)
        norm = _norm(self.grad)
        if not math.isfinite(norm):
            self.zero_grad()
            return OptimStepOutput(grad_norm=norm, skipped=True, step=self.step)
        if params.grad_clip_norm > 0 and norm > params.grad_clip_norm:
            self.grad.mul_(params.grad_clip_norm / (norm + 1e-6))
        self.step += 1
        for part in self._groups:
            decay = params.weight_decay if part.start < self.num_decayed else 0.0
            _adamw(self, part, params, decay)
        self.zero_grad()
        return OptimStepOutput(grad_norm=norm, skipped=False, step=self.step)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Both moments of every parameter, by `exp_avg.NAME` and `exp_avg_sq.NAME`; views, not copies."""
        out: dict[str, torch.Tensor] = {}
        place = 0
        for name, parameter in self.parameters.items():
            end = place + parameter.numel()
            out[f"exp_avg.{name}"] = self.exp_avg[place:end].view(parameter.shape)
            out[f"exp_avg_sq.{name}"] = self.exp_avg_sq[place:end].view(parameter.shape)
            place = end
        return out

    def fitting_state(
        self, tensors: Mapping[str, torch.Tensor], *, where: str
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of (moment, stored value); nothing is changed.

        Raises:
            ArchitectureMismatchError: names or shapes differ.
        """
        mine = self.state_tensors()
        wrong = sorted(mine.keys() ^ tensors.keys()) or [n for n in mine if mine[n].shape != tensors[n].shape]
        if wrong:
            what = f"the optimizer state does not fit this model, {wrong[0]} first"
            raise ArchitectureMismatchError(what, where=where)
        return [(value, tensors[name]) for name, value in mine.items()]

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor], step: int, *, where: str) -> None:
        """Copy moments in; all or nothing.

        Raises:
            ArchitectureMismatchError: names or shapes differ.
        """
        for mine, stored in self.fitting_state(tensors, where=where):
            mine.copy_(stored)
        self.step = step

    def reset(self) -> None:
        """Start afresh: moments zero, step zero."""
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()
        self.step = 0


def _check(params: AdamParams) -> None:
    ranges = {
        "learning_rate": params.learning_rate >= 0,
        "beta1": 0 <= params.beta1 < 1,
        "beta2": 0 <= params.beta2 < 1,
        "eps": params.eps > 0,
        "weight_decay": params.weight_decay >= 0,
        "grad_clip_norm": params.grad_clip_norm >= 0,
    }
    for name, is_possible in ranges.items():
        value = getattr(params, name)
        if not (is_possible and math.isfinite(value)):
            raise EngineError(f"{name} is {value}", where="optim_step")


def _norm(values: torch.Tensor) -> float:
    """L2 norm; on a CPU in float64, which does not overflow, and part by part, for torch copies what it widens."""
    if not values.is_cpu:
        return float(torch.linalg.vector_norm(values))
    parts = (torch.linalg.vector_norm(part, dtype=torch.float64) for part in values.split(2**20))
    return math.sqrt(sum(float(part) ** 2 for part in parts))


def _adamw(state: FlatAdamW, part: slice, params: AdamParams, weight_decay: float) -> None:
    """torch's fused AdamW kernel on one stretch of the buffers."""
    torch._fused_adamw_(
        [state.flat[part]], [state.grad[part]], [state.exp_avg[part]], [state.exp_avg_sq[part]], [],
        [torch.tensor(float(state.step), device=state.flat.device)],
        lr=params.learning_rate, beta1=params.beta1, beta2=params.beta2, weight_decay=weight_decay, eps=params.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
