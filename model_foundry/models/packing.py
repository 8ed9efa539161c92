"""Frozen matrices kept in four bits and unpacked where they are used (QLoRA: Dettmers et al. 2023).

The packing itself (NormalFloat-4 in blocks of 64, their scales packed once more) is bitsandbytes'. Adapters are put on
top as on any other layer. Embeddings, head, norms and routers stay as they are: there is little of them, and errors
there cost most. It knows nothing of models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from model_foundry.errors import MissingExtraError, ModelError
from model_foundry.models.experts import ExpertStack, Routing, grouped
from model_foundry.models.lora import Linear

Quantization = Literal["none", "nf4"]
BLOCK_WEIGHTS = 64

Unpack = Callable[[], torch.Tensor]
Packing = Callable[[torch.Tensor], Unpack]
"""Packs a matrix; what it returns gives it back, nearly, in the type it had."""


def choose_packing(quantization: Quantization, device: torch.device) -> Packing | None:
    """The packing of a name, None for `none`.

    Raises:
        MissingExtraError: bitsandbytes is not installed. ModelError: it does not run here.
    """
    if quantization == "none":
        return None
    where, hint = "model.quantization", "Set model.quantization=none."
    if device.type not in ("cpu", "cuda"):
        what = f"nf4 needs bitsandbytes, whose four-bit kernels are for CPU and CUDA, and this is {device.type}"
        raise ModelError(what, where=where, hint=hint)
    quiet = logging.getLogger("bitsandbytes")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it recommends faster kernels for products that we do not ask of it
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "bitsandbytes":
            raise ModelError(f"bitsandbytes cannot be loaded ({error})", where=where, hint=hint) from error
        raise MissingExtraError("bitsandbytes", "quant") from error
    finally:
        quiet.setLevel(level)

    def pack(matrix: torch.Tensor) -> Unpack:
        packed, state = quantize_4bit(
            matrix.contiguous(), blocksize=BLOCK_WEIGHTS, compress_statistics=True, quant_type="nf4"
        )
        return lambda: dequantize_4bit(packed, state)

    try:
        if pack(torch.ones(2, BLOCK_WEIGHTS, device=device))().shape != (2, BLOCK_WEIGHTS):
            raise RuntimeError("a matrix came back in another shape")
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        what = f"this bitsandbytes does not pack on {device.type} ({error})"
        raise ModelError(what, where=where, hint="Install bitsandbytes 0.46 or later, or " + hint.lower()) from error
    return pack


class _Packed(torch.autograd.Function):
    """x Wᵀ, with W unpacked for the forward pass and once more for the backward pass, never kept in between."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> Any:
        ctx.layer = layer
        return functional.linear(x, layer.matrix.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad @ ctx.layer.matrix.to(grad.dtype), None


class PackedLinear(Linear):
    """A `Linear` whose frozen weight is packed."""

    def __init__(
        self,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        packing: Packing,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(torch.empty(0, dtype=dtype, device=device), bias)
        del self.weight
        self._shape, self._packing, self._dtype, self._device = shape, packing, dtype, device
        self._unpack: Unpack | None = None

    def pack(self, matrix: torch.Tensor) -> None:
        """Take in the weight [out, in]."""
        self._unpack = self._packing(matrix.to(self._device, self._dtype))

    @property
    def matrix(self) -> torch.Tensor:
        if self._unpack is None:
            raise ModelError("a packed layer has no weight yet")
        return self._unpack()

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def is_trained(self) -> bool:
        return False

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out: Any = _Packed.apply(x, self)
        return out if bias is None else out + bias


class PackedStack(ExpertStack):
    """An `ExpertStack` whose frozen weights are packed, each expert for itself; only those in use are unpacked."""

    def __init__(self, shape: tuple[int, int, int], packing: Packing, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(torch.empty(0, dtype=dtype, device=device))
        del self.weight
        self._shape, self._packing, self._dtype, self._device = shape, packing, dtype, device
        self._unpack: dict[int, Unpack] = {}

    def pack(self, expert: int, matrix: torch.Tensor) -> None:
        """Take in one expert's weight [out, in]."""
        self._unpack[expert] = self._packing(matrix.to(self._device, self._dtype))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self._device

    def matrix(self, expert: int) -> torch.Tensor:
        return self._unpack[expert]()

    def product(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return grouped(x, None, self.matrix, self._shape[1], routing)


@dataclass(frozen=True, slots=True)
class ParameterMaker:
    """Makes a model's parameters, empty, by their Hugging Face names: dense, or packed where that is asked for."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device
    packing: Packing | None = None

    def tensor(self, name: str) -> torch.Tensor:
        return torch.empty(self.shapes[name], dtype=self.dtype, device=self.device)

    def linear(self, name: str, *, has_bias: bool) -> Linear:
        """The layer of this name (without `.weight`)."""
        bias = self.tensor(f"{name}.bias") if has_bias else None
        if self.packing is None:
            return Linear(self.tensor(f"{name}.weight"), bias)
        num_out, num_in = self.shapes[f"{name}.weight"]
        return PackedLinear((num_out, num_in), bias, self.packing, self.dtype, self.device)

    def router(self, name: str) -> Linear:
        """Never packed."""
        return Linear(self.tensor(f"{name}.weight"), None)

    def stack(self, experts: str, projection: str, num_experts: int) -> ExpertStack:
        """All experts' weights of one projection."""
        num_out, num_in = self.shapes[f"{experts}.0.{projection}.weight"]
        shape = (num_experts, num_out, num_in)
        if self.packing is None:
            return ExpertStack(torch.empty(shape, dtype=self.dtype, device=self.device))
        return PackedStack(shape, self.packing, self.dtype, self.device)
