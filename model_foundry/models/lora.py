"""Linear layers with a low-rank adapter beside a frozen weight: y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

LoRA (Hu et al. 2021), rank-stabilised scaling (Kalajdzievski 2023), DoRA (Liu et al. 2024), by PEFT's names. Layers
that read the same input share one product with all their A's. No gradient work is done for a frozen weight, and
adapters are float32 whatever the compute type. Randomness is counted (seed, step, row), never drawn from hidden state.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from model_foundry.errors import ModelError
from model_foundry.types import LoraConfig


@dataclass(slots=True)
class DropoutCounter:
    """Which row of which step stands where in a batch, so that a dropout mask is a function of the row alone."""

    seed: int = 0
    step: int = 0
    rows: tuple[tuple[int, int], ...] = ()
    """(datum number within the step, number of tokens), in packed order."""


class Linear(nn.Module):
    """A linear layer, [.., in] → [.., out], that may carry one adapter.

    Attributes:
        weight: [out, in]; the compute type when frozen, float32 when it is trained.
        transposed: the weight is stored [in, out] as GPT-2's Conv1D does.
        lora_A: [r, in] float32, lora_B: [out, r] float32; None without an adapter.
        lora_magnitude: [out] float32 with DoRA.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.transposed = transposed
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.lora_magnitude: nn.Parameter | None = None
        self.scaling = 0.0
        self.dropout = 0.0
        self.salt = 0
        self.counter: DropoutCounter | None = None

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as [out, in]."""
        return self.weight.t() if self.transposed else self.weight

    def adapt(self, lora: LoraConfig, *, name: str, seed: int, counter: DropoutCounter) -> None:
        """Add an adapter that changes nothing yet: A Kaiming-uniform (a = √5) by (seed, name), B zero, as PEFT does."""
        num_out, num_in = self.matrix.shape
        device = self.weight.device
        bound = 1.0 / math.sqrt(num_in)
        first = torch.empty(lora.r, num_in).uniform_(-bound, bound, generator=generator(seed, name))
        self.lora_A = nn.Parameter(first.to(device))
        self.lora_B = nn.Parameter(torch.zeros(num_out, lora.r, device=device))
        if lora.use_dora:
            self.lora_magnitude = nn.Parameter(self.matrix.detach().float().norm(dim=1))
        self.scaling, self.dropout, self.counter = lora.scaling, lora.lora_dropout, counter
        self.salt = salt(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(x, (self,))[0]


def project(x: torch.Tensor, layers: Sequence[Linear]) -> tuple[torch.Tensor, ...]:
    """Apply several layers to one input x [.., in]; one [.., out] each."""
    plain = all(
        layer.lora_A is not None
        and layer.lora_magnitude is None
        and not (layer.dropout and layer.training)
        and not layer.weight.requires_grad
        for layer in layers
    )
    if not plain:
        return tuple(_composed(x, layer) for layer in layers)
    flat = x.reshape(-1, x.shape[-1])
    weights = [layer.matrix for layer in layers]
    biases = [layer.bias for layer in layers]
    adapters = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
    if not torch.is_grad_enabled() or not any(p is not None and p.requires_grad for p in adapters):
        outs = [_composed(flat, layer) for layer in layers]
    else:
        scalings = tuple(layer.scaling for layer in layers)
        outs = _LoraProject.apply(flat, weights, biases, scalings, *adapters)
    return tuple(out.view(*x.shape[:-1], -1) for out in outs)  # pyright: ignore[reportOptionalIterable]


class _LoraProject(torch.autograd.Function):
    """The fast path: frozen weights, no dropout, no DoRA. Saves x, x Aᵀ and nothing else of the batch's size."""

    @staticmethod
    def forward(ctx: Any, x: Any, weights: Any, biases: Any, scalings: Any, *adapters: Any) -> Any:
        down = torch.cat(adapters[0::2]).to(x.dtype)
        ups = [(b * s).to(x.dtype) for b, s in zip(adapters[1::2], scalings, strict=True)]
        hidden = x @ down.t()
        outs, place = [], 0
        for weight, bias, up in zip(weights, biases, ups, strict=True):
            out = functional.linear(x, weight, bias)
            out.addmm_(hidden[:, place : place + up.shape[1]], up.t())
            outs.append(out)
            place += up.shape[1]
        ctx.save_for_backward(x, hidden, down, *ups, *weights)
        ctx.scalings = scalings
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        num = len(ctx.scalings)
        x, hidden, down, *rest = ctx.saved_tensors
        ups, weights = rest[:num], rest[num:]
        d_hidden = torch.empty_like(hidden)
        d_ups, dx, place = [], None, 0
        for grad, up, weight, scaling in zip(grads, ups, weights, ctx.scalings, strict=True):
            part = slice(place, place + up.shape[1])
            torch.mm(grad, up, out=d_hidden[:, part])
            d_ups.append((grad.t() @ hidden[:, part]).float().mul_(scaling))
            if ctx.needs_input_grad[0]:
                dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
            place += up.shape[1]
        d_down = (d_hidden.t() @ x).float().split([up.shape[1] for up in ups])
        if dx is not None:
            dx.addmm_(d_hidden, down)
        return (dx, None, None, None, *(g for pair in zip(d_down, d_ups, strict=True) for g in pair))


def _composed(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """The same layer in plain operations: every case, no speed."""
    weight = layer.matrix.to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if layer.lora_A is None or layer.lora_B is None:
        return functional.linear(x, weight, bias)
    dropped = _drop(x, layer) if layer.dropout and layer.training else x
    update = functional.linear(functional.linear(dropped, layer.lora_A.to(x.dtype)), layer.lora_B.to(x.dtype))
    if layer.lora_magnitude is None:
        return functional.linear(x, weight, bias) + layer.scaling * update
    # DoRA: the direction is W + s B A, its length a parameter; the norm is a constant for the gradient (section 4.3).
    with torch.no_grad():
        norm = torch.addmm(layer.matrix.float(), layer.lora_B, layer.lora_A, alpha=layer.scaling).norm(dim=1)
    gain = (layer.lora_magnitude / norm).to(x.dtype)
    out = gain * (functional.linear(dropped, weight) + layer.scaling * update)
    if dropped is not x:
        # As PEFT: the base path sees the undropped input, the DoRA correction the dropped one.
        out = out + functional.linear(x, weight) - functional.linear(dropped, weight)
    return out if bias is None else out + bias


def _drop(x: torch.Tensor, layer: Linear) -> torch.Tensor:
    """Inverted dropout whose mask depends on (seed, step, row, layer), not on how the batch was packed or split."""
    counter, width = layer.counter, x.shape[-1]
    lengths = [] if counter is None else [tokens for _, tokens in counter.rows]
    num_places, longest = x.numel() // width, max(lengths, default=0)
    if counter is None or num_places not in (sum(lengths), longest * len(lengths)):
        raise ModelError("dropout was asked for on a batch whose rows are not known", hint="Set lora.lora_dropout=0.")
    padded = num_places != sum(lengths)
    masks = []
    for row, tokens in counter.rows:
        masks.append(torch.rand(tokens, width, generator=generator(counter.seed, counter.step, row, layer.salt)))
        if padded:
            masks.append(torch.ones(longest - tokens, width))
    keep = torch.cat(masks).to(x.device) >= layer.dropout
    return x * (keep.view(x.shape).to(x.dtype) / (1.0 - layer.dropout))


def salt(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A generator that is a function of its arguments alone."""
    text = "/".join(str(part) for part in (seed, *parts))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little"))


def select_targets(
    names: Iterable[str], target_modules: str | Sequence[str], *, every_target: bool = True
) -> list[str]:
    """The linear layers that `target_modules` names, by PEFT's rules.

    Args:
        names: full names of the linear layers that can be adapted.
        target_modules: `all-linear`, a regular expression over the full name, or name endings.
        every_target: each name ending must match a layer. PEFT asks only that one of them does, so a stored adapter
            may name more.

    Raises:
        ModelError: a name that matches nothing; the choices are listed.
    """
    names = list(names)
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return names
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    hint = f"Name some of {', '.join(endings)}, or use all-linear."
    if isinstance(target_modules, str):
        try:
            chosen = [name for name in names if re.fullmatch(target_modules, name)]
        except re.error as error:
            raise ModelError(f"not a regular expression ({error})", where="lora.target_modules", hint=hint) from error
        if not chosen:
            raise ModelError(f"{target_modules!r} matches no linear layer", where="lora.target_modules", hint=hint)
        return chosen
    chosen_set: set[str] = set()
    for target in target_modules:
        found = {name for name in names if name == target or name.endswith("." + target)}
        if not found and every_target:
            raise ModelError(f"{target!r} matches no linear layer", where="lora.target_modules", hint=hint)
        chosen_set |= found
    if not chosen_set:
        what = f"{', '.join(map(repr, target_modules)) or 'an empty list'} matches no linear layer"
        raise ModelError(what, where="lora.target_modules", hint=hint)
    return [name for name in names if name in chosen_set]


def adapt(
    layers: Mapping[str, Linear], lora: LoraConfig, *, seed: int, counter: DropoutCounter, every_target: bool = True
) -> dict[str, Linear]:
    """Put a fresh adapter on every layer that `lora.target_modules` names; returns those layers by name."""
    chosen = select_targets(layers, lora.target_modules, every_target=every_target)
    for name in chosen:
        layers[name].adapt(lora, name=name, seed=seed, counter=counter)
    return {name: layers[name] for name in chosen}
