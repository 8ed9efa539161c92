"""Mixture of experts: a router sends each token to a few of many MLPs (Shazeer et al. 2017), as Qwen3-MoE does.

Tokens are sorted by expert, so that each expert is one product over its own tokens and an expert without tokens costs
nothing. All experts of a projection lie in one stack; files and adapters name them one by one. It knows nothing of
attention, rows or losses.

Shapes: N tokens, D width, E experts, k chosen for each token, M = N · k places, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from model_foundry.models import fused
from model_foundry.models.balance import RouterBalance
from model_foundry.models.lora import Linear, fresh_A
from model_foundry.models.mixture import MixtureConfig
from model_foundry.models.mlp import PROJECTIONS, gated
from model_foundry.models.randomness import DropoutCounter
from model_foundry.types import LoraConfig


class Routing:
    """Where each choice goes.

    Attributes:
        order: int64 [M], choice (token · k + slot) at each place, sorted by expert.
        inverse: int64 [M], place of each choice.
        ends: int32 [E], end of each expert's places.
    """

    def __init__(self, chosen: torch.Tensor, num_experts: int) -> None:
        """chosen: int64 [N, k], the experts of each token."""
        flat = chosen.flatten()
        self.num_chosen = chosen.shape[1]
        self.order = flat.argsort(stable=True)
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(flat.shape[0], device=flat.device)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=flat.device)
        self.ends = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first place, end) of each expert that has any."""
        ends = self.ends.tolist()
        pairs = enumerate(zip([0, *ends[:-1]], ends, strict=True))
        return [(expert, first, last) for expert, (first, last) in pairs if last > first]


class _Spread(torch.autograd.Function):
    """x [N, D] → [M, D]: each token once for each of its experts. The gradient is a sum in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, routing: Routing) -> Any:
        ctx.routing, ctx.shape = routing, x.shape
        return x[routing.order // routing.num_chosen]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        num_tokens, width = ctx.shape
        return grad[ctx.routing.inverse].view(num_tokens, -1, width).sum(1), None


class _Combine(torch.autograd.Function):
    """y [M, D] and weights [N, k] → [N, D]: the weighted sum over each token's experts."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, weights: torch.Tensor, routing: Routing) -> Any:
        ctx.save_for_backward(y, weights)
        ctx.routing = routing
        return torch.bmm(weights[:, None], y[routing.inverse].view(*weights.shape, -1))[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, weights = ctx.saved_tensors
        order, inverse = ctx.routing.order, ctx.routing.inverse
        d_weights = torch.bmm(y[inverse].view(*weights.shape, -1), grad[:, :, None])[:, :, 0]
        d_y = grad[order // weights.shape[1]] * weights.flatten()[order, None]
        return d_y, d_weights, None


class _GroupedProduct(torch.autograd.Function):
    """x [M, in] times the matrix of each place's expert: [M, out]. No gradient work for frozen matrices."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, trained: Any, matrix: Callable[[int], torch.Tensor], num_out: int, spans: Any
    ) -> Any:
        out = x.new_empty(x.shape[0], num_out)
        for expert, first, last in spans:
            torch.mm(x[first:last], matrix(expert).to(x.dtype).t(), out=out[first:last])
        ctx.save_for_backward(x)
        ctx.trained, ctx.matrix, ctx.spans = trained, matrix, spans
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_x else None
        d_weight = torch.zeros_like(ctx.trained) if needs_weight else None
        for expert, first, last in ctx.spans:
            if dx is not None:
                torch.mm(grad[first:last], ctx.matrix(expert).to(x.dtype), out=dx[first:last])
            if d_weight is not None:
                d_weight[expert] = fused.weight_gradient(grad[first:last], x[first:last])
        return dx, d_weight, None, None, None


def grouped_product(x: torch.Tensor, stack: torch.Tensor, routing: Routing) -> torch.Tensor:
    """x [M, in] with a stack [E, out, in]: [M, out]. On CUDA one kernel, where torch has it for these sizes."""
    if x.is_cuda and _has_kernel(x.dtype, stack.shape):
        return torch._grouped_mm(x, stack.to(x.dtype).transpose(-2, -1), offs=routing.ends)
    trained = stack if stack.requires_grad else None
    return grouped(x, trained, lambda expert: stack[expert], stack.shape[1], routing)


def grouped(
    x: torch.Tensor,
    trained: torch.Tensor | None,
    matrix: Callable[[int], torch.Tensor],
    num_out: int,
    routing: Routing,
) -> torch.Tensor:
    """x [M, in] → [M, out], expert by expert; `matrix` gives [out, in] of one, `trained` the stack to differentiate."""
    return _GroupedProduct.apply(x, trained, matrix, num_out, routing.spans)  # pyright: ignore[reportReturnType]


def _has_kernel(dtype: torch.dtype, shape: torch.Size) -> bool:
    """torch's grouped product takes bfloat16 and rows of whole 16 bytes."""
    return hasattr(torch, "_grouped_mm") and dtype == torch.bfloat16 and not any(size % 8 for size in shape[1:])


class ExpertStack(nn.Module):
    """One projection of all experts, with an adapter on each of them or on none.

    Attributes:
        weight: [E, out, in]; the compute type when frozen, float32 when it is trained.
        lora_A: [E, r, in] float32, lora_B: [E, out, r] float32; None without adapters.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.scaling = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        num_experts, num_out, num_in = self.weight.shape
        return num_experts, num_out, num_in

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def matrix(self, expert: int) -> torch.Tensor:
        """One expert's weight [out, in]."""
        return self.weight[expert]

    def product(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x [M, in] → [M, out], without the adapters."""
        return grouped_product(x, self.weight, routing)

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """x [M, in] → [M, out]."""
        out = self.product(x, routing)
        if self.lora_A is None or self.lora_B is None:
            return out
        return out + grouped_product(grouped_product(x, self.lora_A, routing), self.lora_B, routing) * self.scaling

    def adapt_expert(self, expert: int, lora: LoraConfig, *, name: str, seed: int) -> None:
        """As `Linear.adapt`, for one expert; `targets.adapt` sees to it that all of them follow."""
        num_experts, num_out, num_in = self.shape
        if self.lora_A is None:
            self.lora_A = nn.Parameter(torch.zeros(num_experts, lora.r, num_in, device=self.device))
            self.lora_B = nn.Parameter(torch.zeros(num_experts, num_out, lora.r, device=self.device))
        with torch.no_grad():
            self.lora_A[expert] = fresh_A(lora.r, num_in, seed=seed, name=name)
        self.scaling = lora.scaling


class ExpertLinear:
    """One expert of a stack as a layer of its own: what adapters and files speak of."""

    transposed = False
    dropout = 0.0
    is_router = is_head = False
    lora_magnitude = None

    def __init__(self, stack: ExpertStack, expert: int) -> None:
        self.stack, self.expert = stack, expert

    @property
    def group(self) -> ExpertStack:
        return self.stack

    @property
    def lora_A(self) -> torch.Tensor | None:
        return None if self.stack.lora_A is None else self.stack.lora_A[self.expert]

    @property
    def lora_B(self) -> torch.Tensor | None:
        return None if self.stack.lora_B is None else self.stack.lora_B[self.expert]

    def adapt(self, lora: LoraConfig, *, name: str, seed: int, counter: DropoutCounter) -> None:
        self.stack.adapt_expert(self.expert, lora, name=name, seed=seed)


class ExpertMLP(nn.Module):
    """The router and its experts. Parameter names, experts numbered, are those of a Hugging Face folder.

    Args:
        router: [E, D] without bias.
        stack: makes the stack of a name in `mlp.PROJECTIONS`.
    """

    def __init__(
        self, mixture: MixtureConfig, activation: str, router: Linear, stack: Callable[[str], ExpertStack]
    ) -> None:
        super().__init__()
        self.mixture, self.activation = mixture, activation
        self.gate = router
        self.gate.is_router = True
        self.experts = nn.ModuleDict({name: stack(name) for name in PROJECTIONS})
        self.balance: RouterBalance | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, D] → [N, D]."""
        probabilities = torch.softmax(self.gate(x), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
        if self.balance is not None and self.training:
            probabilities = self.balance.attach(probabilities)
        weights, chosen = probabilities.topk(self.mixture.num_experts_per_tok, dim=-1)
        if self.balance is not None and self.training:
            self.balance.record(probabilities, chosen)
        if self.mixture.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        routing = Routing(chosen, self.mixture.num_experts)
        spread: Any = _Spread.apply(x, routing)
        gate, up = self.experts["gate_proj"](spread, routing), self.experts["up_proj"](spread, routing)
        inner = gated(gate, up, self.activation)
        return _Combine.apply(self.experts["down_proj"](inner, routing), weights.to(x.dtype), routing)  # pyright: ignore[reportReturnType]

    def expert_linears(self) -> Iterator[tuple[str, ExpertLinear]]:
        """Every expert's projections by name inside the MLP (`experts.3.up_proj`), in the order of the files."""
        for expert in range(self.mixture.num_experts):
            for name in PROJECTIONS:
                yield f"experts.{expert}.{name}", ExpertLinear(self.experts[name], expert)  # pyright: ignore[reportArgumentType]
