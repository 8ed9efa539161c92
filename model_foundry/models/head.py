"""The output head as a layer that can carry an adapter: logits + s (h Aᵀ) Bᵀ beside those of the frozen weight.

The weight is the decoder's, and may be its embedding: an adapter changes what the head says and not what the embedding
does, as PEFT's does on `lm_head`. It knows nothing of losses.

Shapes: N tokens, D width, V vocabulary, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from model_foundry.errors import ModelError
from model_foundry.models.lora import fresh_A
from model_foundry.models.randomness import DropoutCounter
from model_foundry.types import LoraConfig


@dataclass(frozen=True, slots=True)
class HeadUpdate:
    """What an adapter adds to the logits.

    Attributes:
        down: A, [r, D] float32. up: B, [V, r] float32. Gradients are added to their `grad`, where they ask for them.
    """

    down: nn.Parameter
    up: nn.Parameter
    scaling: float

    @property
    def is_trained(self) -> bool:
        return self.down.requires_grad

    @property
    def num_parameters(self) -> int:
        return self.down.numel() + self.up.numel()

    def apart(self) -> HeadUpdate:
        """The same values, with gradients of their own."""
        down, up = (nn.Parameter(part.detach(), requires_grad=self.is_trained) for part in (self.down, self.up))
        return HeadUpdate(down, up, self.scaling)

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, D], and B with the scale in it, [V, r], as logits of this type are computed."""
        return self.down.detach().to(dtype), (self.up.detach() * self.scaling).to(dtype)

    def add(self, logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of hidden states [N, D], changed in place."""
        down, up = self.factors(hidden.dtype)
        return logits.addmm_(hidden @ down.t(), up.t())


class HeadLayer(nn.Module):
    """Takes an adapter in the head's place.

    Attributes:
        shape: (V, D).
    """

    transposed = False
    dropout = 0.0
    is_router = False
    is_head = True
    group = None
    lora_magnitude = None

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.shape, self.device = shape, device
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.scaling = 0.0

    @property
    def update(self) -> HeadUpdate | None:
        """None without an adapter."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return HeadUpdate(self.lora_A, self.lora_B, self.scaling)

    def adapt(self, lora: LoraConfig, *, name: str, seed: int, counter: DropoutCounter) -> None:
        """Add an adapter that changes nothing yet, as `Linear.adapt`.

        Raises:
            ModelError: with DoRA or dropout, which are not computed on the head.
        """
        for key, name_of_it in {"use_dora": "DoRA", "lora_dropout": "an adapter's dropout"}.items():
            if getattr(lora, key):
                hint = "Switch it off, or leave lm_head out of lora.target_modules."
                raise ModelError(f"{name_of_it} is not computed on the output head", where=f"lora.{key}", hint=hint)
        num_out, num_in = self.shape
        self.lora_A = nn.Parameter(fresh_A(lora.r, num_in, seed=seed, name=name).to(self.device))
        self.lora_B = nn.Parameter(torch.zeros(num_out, lora.r, device=self.device))
        self.scaling = lora.scaling
