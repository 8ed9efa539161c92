"""The gated MLP of the Llama family: down(act(gate(x)) × up(x)) (Shazeer 2020).

It knows linear layers and activations. It does not know attention, experts or configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model_foundry.models import fused
from model_foundry.models.lora import Linear, project

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


class GatedSilu(torch.autograd.Function):
    """silu(gate) × up, keeping only its two inputs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> Any:
        ctx.save_for_backward(gate, up)
        return _gated_silu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        if fused.fits(gate, up, grad):
            return fused.gated_silu_backward(gate, up, grad)
        d_up = functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), d_up


def _gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return fused.gated_silu(gate, up) if fused.fits(gate, up) else functional.silu(gate).mul_(up)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) × up, by the activation's name in `config.json`."""
    if activation == "silu":
        if not torch.is_grad_enabled():
            return _gated_silu(gate, up)
        return GatedSilu.apply(gate, up)  # pyright: ignore[reportReturnType]
    return ACTIVATIONS[activation](gate) * up


class GatedMLP(nn.Module):
    """One MLP for every token. Parameter names are those of a Hugging Face folder.

    Args:
        linear: makes the layer of a name in `PROJECTIONS`.
    """

    def __init__(self, activation: str, linear: Callable[[str], Linear]) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj, self.up_proj, self.down_proj = (linear(name) for name in PROJECTIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., D] → [.., D]."""
        gate, up = project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(gated(gate, up, self.activation))
