"""Adapters of one base that are applied row by row, so that a batch may mix them.

They are read and checked as those that are trained, onto stand-ins for the layers; the base itself is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional

from model_foundry.models.adapter import load_adapter_tensors, read_adapter_config, read_adapter_tensors
from model_foundry.models.experts import ExpertLinear, ExpertStack
from model_foundry.models.head import HeadLayer
from model_foundry.models.lora import Adaptable, Linear
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.targets import adapt

RANK_STEP = 16
"""Ranks are filled up with zeros to a multiple of this: products of two or three columns were seen (MKL, float32) to
add up in another order in the last rows than in the first."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one layer, or to one expert.

    Attributes:
        down: [r, in], up: [out, r] with the scale in it; r filled up with zeros.
        gain: [out] with DoRA: base and update, without the bias, are multiplied by it.
    """

    down: torch.Tensor
    up: torch.Tensor
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def apply(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """x [N, in] and the base's answer [N, out] → [N, out]."""
        update = functional.linear(functional.linear(x, self.down), self.up)
        if self.gain is None:
            return base + update
        plain = base if self.bias is None else base - self.bias
        out = self.gain * (plain + update)
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter's parts by the layer's Hugging Face name; `number` tells it from every other, also of its name.

    Attributes:
        rescales: whether a layer has a gain (DoRA).
    """

    name: str
    number: int
    parts: Mapping[str, LowRank]
    rescales: bool


class _StandIn(Linear):
    """Has a layer's shape and takes an adapter in its place."""

    def __init__(self, layer: Linear) -> None:
        super().__init__(torch.empty(0), None, transposed=layer.transposed)
        self.is_router = layer.is_router
        self._layer = (layer,)  # in a tuple, or it would become a part of this module

    @property
    def matrix(self) -> torch.Tensor:
        return self._layer[0].matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self._layer[0].shape

    @property
    def device(self) -> torch.device:
        return self._layer[0].device


class _StackStandIn(ExpertStack):
    def __init__(self, stack: ExpertStack) -> None:
        super().__init__(torch.empty(0))
        self._stack = (stack,)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._stack[0].shape

    @property
    def device(self) -> torch.device:
        return self._stack[0].device


def _stand_ins(layers: Mapping[str, Adaptable]) -> dict[str, Adaptable]:
    stacks: dict[int, _StackStandIn] = {}
    found: dict[str, Adaptable] = {}
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            stack = stacks.setdefault(id(layer.stack), _StackStandIn(layer.stack))
            found[name] = ExpertLinear(stack, layer.expert)
        elif isinstance(layer, HeadLayer):
            found[name] = HeadLayer(layer.shape, layer.device)
        elif isinstance(layer, Linear):
            found[name] = _StandIn(layer)
    return found


@torch.no_grad()
def read_served_adapter(
    name: str, folder: Path, *, number: int, layers: Mapping[str, Adaptable], dtype: torch.dtype
) -> ServedAdapter:
    """Read an adapter in PEFT's layout for a base with these layers.

    Raises:
        ModelError: it cannot be read, or uses options that are not computed here.
        ArchitectureMismatchError: it was made for another model.
    """
    config = replace(read_adapter_config(folder), lora_dropout=0.0)  # nothing is dropped outside training
    adapted = adapt(_stand_ins(layers), config, seed=0, counter=DropoutCounter(), every_target=False)
    load_adapter_tensors(adapted, read_adapter_tensors(folder), where=str(folder))
    parts = {}
    for layer_name, layer in adapted.items():
        down, up, gain, bias = layer.lora_A, layer.lora_B, None, None
        assert down is not None
        assert up is not None
        if isinstance(layer, Linear) and layer.lora_magnitude is not None:
            norm = torch.addmm(layer.matrix.float(), up, down, alpha=config.scaling).norm(dim=1)
            gain = (layer.lora_magnitude / norm).to(dtype)
            original = layers[layer_name]
            bias = original.bias if isinstance(original, Linear) else None
            bias = None if bias is None else bias.detach().to(dtype)
        spare = -down.shape[0] % RANK_STEP
        down = functional.pad(down.detach(), (0, 0, 0, spare)).to(dtype)
        up = functional.pad(up.detach() * config.scaling, (0, spare)).to(dtype)
        parts[layer_name] = LowRank(down, up, gain, bias)
    return ServedAdapter(name, number, parts, any(part.gain is not None for part in parts.values()))
