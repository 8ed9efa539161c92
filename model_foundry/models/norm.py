"""The norm of the Llama family, alone and of a sum: one pass over memory on a CPU, each way.

It knows nothing of layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from model_foundry.models import fused


class RMSNorm(nn.Module):
    """x / rms(x) × weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():  # an autograd function costs more than the norm of a few rows
            return _normed(x, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """Saves its input alone; the normalised value is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normed(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        if fused.fits(x, weight, grad):
            dx, d_weight = fused.rms_norm_backward(x, weight, ctx.eps, grad, weight_too=wanted)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            inverse = _inverse_rms(x, ctx.eps)
            normed, scaled = x.to(wide) * inverse, grad.to(wide)
            both = scaled * normed
            d_weight = both.flatten(0, -2).sum(0) if wanted else None
            shared = (both @ weight.to(wide)).div_(-x.shape[-1])
            dx = torch.addcmul(scaled * weight, normed, shared[..., None]).mul_(inverse).to(x.dtype)
        return dx, None if d_weight is None else d_weight.to(weight.dtype), None


def add_and_norm(x: torch.Tensor, more: torch.Tensor, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """x + more, [N, D], and the norm of that."""
    if fused.fits(x, more, norm.weight) and x.dtype == more.dtype:
        return _AddRMSNorm.apply(x, more, norm.weight, norm.eps)  # pyright: ignore[reportReturnType]
    total = x + more
    return total, norm(total)


class _AddRMSNorm(torch.autograd.Function):
    """A sum and its norm, and the gradients of both, in one pass over memory each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        total, normed = fused.add_rms_norm(x, more, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        total, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2]
        dx, d_weight = fused.rms_norm_backward(total, weight, ctx.eps, grad, weight_too=wanted, more=d_total)
        return dx, dx, None if d_weight is None else d_weight.to(weight.dtype), None


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if fused.fits(x, weight):
        return fused.rms_norm(x, weight, eps)
    return (x * _inverse_rms(x, eps)).to(x.dtype).mul_(weight.to(x.dtype))


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """[.., 1], float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
