"""Optimizers over parameters laid end to end, so that a step, a norm and a snapshot are one operation each.

AdamW: Loshchilov and Hutter 2019, torch's semantics; Muon is in `muon`. Weight decay acts on every matrix, embeddings
and experts included, and not on vectors. It knows nothing of models; hyper-parameters come with every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from model_foundry.errors import ArchitectureMismatchError, EngineError
from model_foundry.types import AdamParams, MuonParams, OptimizerKind, OptimParams, OptimStepOutput

_FLOAT32 = torch.finfo(torch.float32)
"""What the weights are: a hyper-parameter beyond it would be an infinity to them, or nothing."""
_NORM_ROW = 1024
_SAFE_NORMS = (1e-10, 1e18)
"""No square that counts beside such a norm is lost in float32, and none is too large for it."""


class FlatOptimizer:
    """Owns the storage of `parameters` (float32 leaves) and of their gradients, laid out in the order given.

    After construction each parameter's `.data` and `.grad` are views into flat buffers. The last ones, from
    `num_decayed` on, are vectors.
    """

    kind: ClassVar[OptimizerKind]
    takes: ClassVar[type]

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.num_decayed = sum(p.numel() for p in self.parameters.values() if p.ndim >= 2)
        first = next(iter(self.parameters.values()))
        self.flat = torch.empty(sum(p.numel() for p in self.parameters.values()), device=first.device)
        self.grad = torch.zeros_like(self.flat)
        self.step = 0
        self.places: dict[str, slice] = {}
        place = 0
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                part = slice(place, place + parameter.numel())
                view = self.flat[part].view(parameter.shape)
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = self.grad[part].view(parameter.shape)
                parameter.requires_grad_(True)
                self.places[name], place = part, part.stop

    @property
    def num_parameters(self) -> int:
        return self.flat.numel()

    @property
    def num_remembered(self) -> int:
        """Numbers kept from step to step."""
        return sum(buffer.numel() for buffer in self.moments())

    def zero_grad(self) -> None:
        self.grad.zero_()

    @torch.no_grad()
    def apply(self, params: OptimParams, *, gradient_scale: float = 1.0) -> OptimStepOutput:
        """One step; the gradients are cleared. Not finite: nothing changes but that, and it says so.

        Args:
            gradient_scale: the gradients are so many times too large; they are divided by it first.

        Raises:
            EngineError: hyper-parameters of another optimizer, or one that would ruin the weights; nothing was changed.
        """
        check_params(params, kind=self.kind, takes=self.takes)
        norm = norm_of(self.grad) / gradient_scale
        if not math.isfinite(norm):
            self.zero_grad()
            return OptimStepOutput(grad_norm=norm, skipped=True, step=self.step)
        factor = 1.0 / gradient_scale
        if params.grad_clip_norm > 0 and norm > params.grad_clip_norm:
            factor *= params.grad_clip_norm / (norm + 1e-6)
        if factor != 1.0:
            self.grad.mul_(factor)
        self.step += 1
        self.update(params)
        self.zero_grad()
        return OptimStepOutput(grad_norm=norm, skipped=False, step=self.step)

    def update(self, params: Any) -> None:
        """Change the weights by the gradients, which are finite and clipped."""
        raise NotImplementedError

    def moments(self) -> tuple[torch.Tensor, ...]:
        """The flat buffers of what is remembered from step to step."""
        raise NotImplementedError

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """What is remembered of every parameter, by `exp_avg.NAME` and the like; views, not copies."""
        raise NotImplementedError

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
        for buffer in self.moments():
            buffer.zero_()
        self.step = 0


class FlatAdamW(FlatOptimizer):
    """AdamW on every parameter."""

    kind = "adamw"
    takes = AdamParams

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(dict(sorted(parameters.items(), key=lambda item: item[1].ndim < 2)))
        self.exp_avg = torch.zeros_like(self.flat)
        self.exp_avg_sq = torch.zeros_like(self.flat)

    def update(self, params: AdamParams) -> None:
        adamw_update(self, 0, (self.exp_avg, self.exp_avg_sq), params)

    def moments(self) -> tuple[torch.Tensor, ...]:
        return self.exp_avg, self.exp_avg_sq

    def state_tensors(self) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for name, part in self.places.items():
            out[f"exp_avg.{name}"] = self.exp_avg[part].view(self.parameters[name].shape)
            out[f"exp_avg_sq.{name}"] = self.exp_avg_sq[part].view(self.parameters[name].shape)
        return out


def adamw_update(
    state: FlatOptimizer, first: int, moments: tuple[torch.Tensor, torch.Tensor], params: AdamParams | MuonParams
) -> None:
    """torch's fused AdamW kernel on the buffers from `first` on; moments begin there. Matrices decay, vectors don't."""
    total = state.flat.numel()
    for start, stop, decay in (
        (first, max(first, state.num_decayed), params.weight_decay),
        (max(first, state.num_decayed), total, 0.0),
    ):
        if start == stop:
            continue
        part, own = slice(start, stop), slice(start - first, stop - first)
        torch._fused_adamw_(
            [state.flat[part]], [state.grad[part]], [moments[0][own]], [moments[1][own]], [],
            [torch.tensor(float(state.step), device=state.flat.device)],
            lr=params.learning_rate, beta1=params.beta1, beta2=params.beta2, weight_decay=decay, eps=params.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip


def check_params(params: OptimParams, *, kind: OptimizerKind, takes: type) -> None:
    """Raises EngineError: hyper-parameters of another optimizer, or one that would ruin the weights."""
    if not isinstance(params, takes):
        raise EngineError(
            f"the model was made to be trained by {kind}, and the step brings {type(params).__name__}",
            where="optim_step", hint=f"Bring {takes.__name__}, or create the model with another optimizer.",
        )  # fmt: skip
    ranges = {
        "learning_rate": params.learning_rate >= 0,
        "beta1": 0 <= params.beta1 < 1,
        "beta2": 0 <= params.beta2 < 1,
        "eps": params.eps >= _FLOAT32.tiny,
        "weight_decay": params.weight_decay >= 0,
        "grad_clip_norm": params.grad_clip_norm >= 0,
    }
    if isinstance(params, MuonParams):
        ranges["momentum"] = 0 <= params.momentum < 1
    for name, is_possible in ranges.items():
        value = getattr(params, name)
        if not (is_possible and value <= _FLOAT32.max):
            raise EngineError(f"{name} is {value}", where="optim_step")


def norm_of(values: torch.Tensor) -> float:
    """L2 norm of a vector.

    On a CPU float32 sums up a thousand squares at a time, and float64 the rest: within 1e-8 of float64 throughout, and
    five times as fast. What might overflow or vanish in a square is done in float64, part by part, for torch copies
    what it widens.
    """
    if not values.is_cpu:
        return float(torch.linalg.vector_norm(values))
    num_rows = values.numel() // _NORM_ROW
    whole, rest = values[: num_rows * _NORM_ROW], values[num_rows * _NORM_ROW :]
    rows = torch.linalg.vector_norm(whole.view(num_rows, _NORM_ROW), dim=1)
    norm = float(torch.linalg.vector_norm(torch.cat([rows.double(), rest.double()])))
    if _SAFE_NORMS[0] < norm < _SAFE_NORMS[1]:
        return norm
    parts = (torch.linalg.vector_norm(part, dtype=torch.float64) for part in values.split(2**20))
    return math.sqrt(sum(float(part) ** 2 for part in parts))
