"""Linear layers with a low-rank adapter beside a frozen weight: y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

LoRA (Hu et al. 2021), rank-stabilised scaling (Kalajdzievski 2023), DoRA (Liu et al. 2024), by PEFT's names. Layers
that read the same input share one product with all their A's. No gradient work is done for a frozen weight, and
adapters are float32 whatever the compute type. Frozen weights are read from their layer when they are needed, so they
may be kept packed in fewer bits. It knows nothing of models, nor which layers are adapted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model_foundry.models import fused
from model_foundry.models.randomness import DropoutCounter, drop, generator, salt
from model_foundry.types import LoraConfig


class Adaptable(Protocol):
    """A linear map that can carry an adapter: a `Linear`, or one expert of many.

    Attributes:
        is_router: it chooses experts; adapted only where it is named.
        is_head: it is the output head; adapted only where it is named.
        group: what is adapted whole or not at all, such as all experts of a layer; None where it stands alone.
    """

    transposed: bool
    dropout: float
    is_router: bool
    is_head: bool

    @property
    def group(self) -> object | None: ...

    @property
    def lora_A(self) -> torch.Tensor | None: ...

    @property
    def lora_B(self) -> torch.Tensor | None: ...

    @property
    def lora_magnitude(self) -> torch.Tensor | None: ...

    def adapt(self, lora: LoraConfig, *, name: str, seed: int, counter: DropoutCounter) -> None: ...


class Together(Protocol):
    """Applies layers to x [N, in] whose rows belong to several adapters."""

    def __call__(self, x: torch.Tensor, layers: Sequence[Linear]) -> tuple[torch.Tensor, ...]: ...


class Linear(nn.Module):
    """A linear layer, [.., in] → [.., out], that may carry one adapter.

    Attributes:
        weight: [out, in]; the compute type when frozen, float32 when it is trained.
        transposed: the weight is stored [in, out] as GPT-2's Conv1D does.
        lora_A: [r, in] float32, lora_B: [out, r] float32; None without an adapter.
        lora_magnitude: [out] float32 with DoRA.
        together: applies this layer and its neighbours in `project`'s place, where rows have several adapters.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.transposed = transposed
        self.is_router = self.is_head = False
        self.group = None
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_magnitude: nn.Parameter | None = None
        self.scaling = 0.0
        self.dropout = 0.0
        self.salt = 0
        self.counter: DropoutCounter | None = None
        self.together: Together | None = None

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as [out, in]."""
        return self.weight.t() if self.transposed else self.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        num_out, num_in = self.matrix.shape
        return num_out, num_in

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def is_trained(self) -> bool:
        """Whether the weight itself is, beside any adapter."""
        return self.weight.requires_grad

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + bias in the type of x, without the adapter."""
        return functional.linear(x, self.matrix.to(x.dtype), bias)

    def adapt(self, lora: LoraConfig, *, name: str, seed: int, counter: DropoutCounter) -> None:
        """Add an adapter that changes nothing yet: A Kaiming-uniform (a = √5) by (seed, name), B zero, as PEFT does."""
        num_out, num_in = self.shape
        device = self.device
        self.lora_A = nn.Parameter(fresh_A(lora.r, num_in, seed=seed, name=name).to(device))
        self.lora_B = nn.Parameter(torch.zeros(num_out, lora.r, device=device))
        if lora.use_dora:
            self.lora_magnitude = nn.Parameter(self.matrix.detach().float().norm(dim=1))
        self.scaling, self.dropout, self.counter = lora.scaling, lora.lora_dropout, counter
        self.salt = salt(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(x, (self,))[0]


def fresh_A(rank: int, num_in: int, *, seed: int, name: str) -> torch.Tensor:
    """Kaiming-uniform with a = √5, as PEFT starts: [r, in] float32, a function of (seed, name) alone."""
    bound = 1.0 / math.sqrt(num_in)
    return torch.empty(rank, num_in).uniform_(-bound, bound, generator=generator(seed, name))


def project(x: torch.Tensor, layers: Sequence[Linear]) -> tuple[torch.Tensor, ...]:
    """Apply several layers to one input x [.., in]; one [.., out] each."""
    if (together := layers[0].together) is not None:
        return together(x, layers)
    plain = all(
        layer.lora_A is not None
        and layer.lora_magnitude is None
        and not (layer.dropout and layer.training)
        and not layer.is_trained
        for layer in layers
    )
    if not plain:
        return _trained(x, layers) if _all_trained(x, layers) else tuple(_composed(x, layer) for layer in layers)
    flat = x.reshape(-1, x.shape[-1])
    adapters = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
    if not torch.is_grad_enabled() or not any(p is not None and p.requires_grad for p in adapters):
        outs = [_composed(flat, layer) for layer in layers]
    else:
        outs = _LoraProject.apply(flat, layers, *adapters)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)  # pyright: ignore[reportOptionalIterable]


def _all_trained(x: torch.Tensor, layers: Sequence[Linear]) -> bool:
    """Whether the weights are, there is nothing else to a product, and nobody else chooses its type."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and all(
            each.is_trained and each.lora_A is None and each.bias is None and not each.transposed for each in layers
        )
    )


def _trained(x: torch.Tensor, layers: Sequence[Linear]) -> tuple[torch.Tensor, ...]:
    outs = _TrainedProject.apply(x.reshape(-1, x.shape[-1]), *(layer.weight for layer in layers))
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)  # pyright: ignore[reportOptionalIterable]


class _TrainedProject(torch.autograd.Function):
    """Layers of one input whose weights are trained: what flows back to it is summed within the products."""

    @staticmethod
    def forward(ctx: Any, x: Any, *weights: Any) -> Any:
        narrow = [weight.to(x.dtype) for weight in weights]
        ctx.save_for_backward(x, *narrow)
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(functional.linear(x, weight) for weight in narrow)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *weights = ctx.saved_tensors
        dx = None
        for grad, weight in zip(grads, weights, strict=True) if ctx.needs_input_grad[0] else ():
            dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
        return dx, *(fused.weight_gradient(grad, x).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))


class _LoraProject(torch.autograd.Function):
    """The fast path: frozen weights, no dropout, no DoRA. Saves x, x Aᵀ and nothing else of the batch's size.

    Weights are not saved but read again from their layers, in the backward pass too: a packed one is unpacked twice
    rather than kept unpacked in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, layers: Any, *adapters: Any) -> Any:
        down = torch.cat(adapters[0::2]).to(x.dtype)
        ups = [(b * layer.scaling).to(x.dtype) for b, layer in zip(adapters[1::2], layers, strict=True)]
        hidden = x @ down.t()
        outs, place = [], 0
        for layer, up in zip(layers, ups, strict=True):
            out = functional.linear(x, layer.matrix, layer.bias)
            out.addmm_(hidden[:, place : place + up.shape[1]], up.t())
            outs.append(out)
            place += up.shape[1]
        ctx.save_for_backward(x, hidden, down, *ups)
        ctx.layers = layers
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, hidden, down, *ups = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_ups, dx, place = [], None, 0
        for grad, up, layer in zip(grads, ups, ctx.layers, strict=True):
            part = slice(place, place + up.shape[1])
            torch.mm(grad, up, out=d_hidden[:, part])
            d_ups.append((grad.t() @ hidden[:, part]).float().mul_(layer.scaling))
            if ctx.needs_input_grad[0]:
                dx = grad @ layer.matrix if dx is None else dx.addmm_(grad, layer.matrix)
            place += up.shape[1]
        d_down = (d_hidden.t() @ x).float().split([up.shape[1] for up in ups])
        if dx is not None:
            dx.addmm_(d_hidden, down)
        return (dx, None, *(g for pair in zip(d_down, d_ups, strict=True) for g in pair))


def _composed(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """The same layer in plain operations: every case, no speed."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if layer.lora_A is None or layer.lora_B is None:
        return layer.product(x, bias)
    dropped = x
    if layer.dropout and layer.training:
        dropped = drop(x, layer.dropout, layer.counter, layer.salt, field="lora.lora_dropout")
    update = functional.linear(functional.linear(dropped, layer.lora_A.to(x.dtype)), layer.lora_B.to(x.dtype))
    if layer.lora_magnitude is None:
        return layer.product(x, bias) + layer.scaling * update
    # DoRA: the direction is W + s B A, its length a parameter; the norm is a constant for the gradient (section 4.3).
    with torch.no_grad():
        norm = torch.addmm(layer.matrix.float(), layer.lora_B, layer.lora_A, alpha=layer.scaling).norm(dim=1)
    gain = (layer.lora_magnitude / norm).to(x.dtype)
    out = gain * (layer.product(dropped) + layer.scaling * update)
    if dropped is not x:
        # As PEFT: the base path sees the undropped input, the DoRA correction the dropped one.
        out = out + layer.product(x) - layer.product(dropped)
    return out if bias is None else out + bias
