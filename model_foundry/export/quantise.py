"""Block formats of GGUF files: which type each tensor of a mix has, and its bytes.

The plain formats are packed by numpy in the `gguf` package. K-quants are packed by llama.cpp's own code, which the
`xllamacpp` wheel carries (`ggml_quantize_chunk`, called through its C interface). Which tensor of a K-quant gets more
bits is llama.cpp's choice (`llama_tensor_get_type_impl` and `tensor_type_fallback` in `llama-quant.cpp`), restated here
for the architectures that we write and without an importance matrix.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from model_foundry.errors import MissingExtraError, UsageError
from model_foundry.models.config import ModelConfig

FORMATS = {
    "f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"), "q5_1": ("Q5_1", "MOSTLY_Q5_1"), "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"), "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
    "q6_k": ("Q6_K", "MOSTLY_Q6_K"), "q5_k_m": ("Q5_K", "MOSTLY_Q5_K_M"), "q5_k_s": ("Q5_K", "MOSTLY_Q5_K_S"),
    "q4_k_m": ("Q4_K", "MOSTLY_Q4_K_M"), "q4_k_s": ("Q4_K", "MOSTLY_Q4_K_S"), "q3_k_m": ("Q3_K", "MOSTLY_Q3_K_M"),
}  # fmt: skip
"""Format -> (type of most matrices, file type)."""
K_BLOCK = 256
_NARROW = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that do not divide into blocks of 256."""
_LAYER = re.compile(r"blk\.(\d+)\.")


def check_format(name: str) -> str:
    """A format that can be written here.

    Raises:
        UsageError: it is none, or one that only llama.cpp's own program makes.
    """
    key = name.strip().lower()
    if key in FORMATS:
        return key
    if "_k" in key or key.startswith(("iq", "tq", "mxfp")):
        hint = f"Export --quant f16, then run: llama-quantize MODEL-f16.gguf MODEL-{key}.gguf {key.upper()}"
        raise UsageError(f"{name} is not written here", where="--quant", hint=hint)
    raise UsageError(f"there is no format {name!r}", where="--quant", hint=f"Formats: {', '.join(FORMATS)}")


def check_formats(names: str) -> tuple[str, ...]:
    """The formats of a comma-separated list, each once.

    Raises:
        UsageError: the list is empty, or one of them cannot be written.
    """
    found = tuple(dict.fromkeys(check_format(name) for name in names.split(",") if name.strip()))
    if not found:
        raise UsageError("no format is named", where="--quant", hint=f"Formats: {', '.join(FORMATS)}")
    return found


@dataclass(frozen=True, slots=True)
class Mix:
    """What decides the types of a file's tensors, beside their names and shapes.

    Attributes:
        format: a key of `FORMATS`.
        tied: the file has no matrix of its own for the head.
        shares_values: it is what llama.cpp calls 70B, where a value projection is small and gets more bits.
    """

    format: str
    num_layers: int
    num_experts: int
    tied: bool
    shares_values: bool

    @staticmethod
    def of(format: str, config: ModelConfig, *, tied: bool) -> Mix:
        # llama.cpp's "70B": 80 layers in which several query heads share one value head.
        shares = config.num_hidden_layers == 80 and config.num_key_value_heads < config.num_attention_heads
        shares = shares and not config.architecture.startswith("qwen3")
        experts = 0 if config.experts is None else config.experts.num_experts
        return Mix(format, config.num_hidden_layers, experts, tied, shares)

    def kind(self, name: str, shape: tuple[int, ...]) -> str:
        """The type of a tensor, a name of `GGMLQuantizationType`.

        Args:
            shape: logical; of one expert where they are stacked.
        """
        plain = FORMATS[self.format][0]
        if len(shape) < 2 or name.endswith("ffn_gate_inp.weight"):
            return "F32"
        if not plain.startswith("Q"):
            return plain
        kind = self._preferred(name, plain, shape[-1]) if plain.endswith("_K") else plain
        if kind.endswith("_K") and shape[-1] % K_BLOCK:
            kind = _NARROW[kind]
        return "F16" if shape[-1] % 32 else kind

    def _preferred(self, name: str, plain: str, num_columns: int) -> str:
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return "Q8_0" if num_columns % K_BLOCK else "Q6_K"
        found = _LAYER.match(name)
        if found is None:
            return plain
        layer, role = int(found[1]), name[found.end() :].split(".")[0]
        if role == "attn_v":
            return self._values(layer, plain)
        if role == "attn_k" and self.num_experts == 8:
            return "Q8_0"
        if role.startswith("ffn_down"):
            return self._down(layer, plain)
        if role == "attn_output":
            if self.num_experts == 8:
                return "Q5_K" if plain in ("Q3_K", "Q4_K") else plain
            return "Q4_K" if plain == "Q3_K" else plain
        return plain

    def _values(self, layer: int, plain: str) -> str:
        if self.num_experts == 8:
            return "Q8_0"
        kind = plain
        if self.format == "q3_k_m":
            kind = "Q5_K" if layer < 2 else "Q4_K"
        elif self.format in ("q4_k_m", "q5_k_m") and self._gets_more(layer):
            kind = "Q6_K"
        elif self.format == "q4_k_s" and layer < 4:
            kind = "Q5_K"
        return "Q5_K" if self.shares_values and kind in ("Q3_K", "Q4_K") else kind

    def _down(self, layer: int, plain: str) -> str:
        if self.format == "q3_k_m":
            return "Q5_K" if layer < self.num_layers // 16 else "Q4_K"
        if self.format in ("q4_k_m", "q5_k_m") and self._gets_more(layer):
            return "Q6_K"
        return "Q5_K" if self.format == "q4_k_s" and layer < self.num_layers // 8 else plain

    def _gets_more(self, layer: int) -> bool:
        eighth = self.num_layers // 8
        return layer < eighth or layer >= 7 * self.num_layers // 8 or (layer - eighth) % 3 == 2


def pack(weight: np.ndarray, kind: str) -> np.ndarray:
    """A float32 tensor as its bytes lie in the file, rounded once.

    Raises:
        MissingExtraError: a K-quant, and llama.cpp is not installed.
    """
    import gguf
    from gguf.quants import quantize

    type_ = gguf.GGMLQuantizationType[kind]
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    if not kind.endswith("_K"):
        return quantize(weight, type_)
    block, size = gguf.GGML_QUANT_SIZES[type_]
    packed = np.empty((*weight.shape[:-1], weight.shape[-1] // block * size), dtype=np.uint8)
    rows = weight.size // weight.shape[-1]
    _quantiser()(int(type_), weight.ctypes.data, packed.ctypes.data, 0, rows, weight.shape[-1], None)
    return packed


def require_quantiser(formats: tuple[str, ...]) -> None:
    """Raises: MissingExtraError where one of the formats needs llama.cpp's quantiser, and it is not here."""
    if any(FORMATS[format][0].endswith("_K") for format in formats):
        _quantiser()


@cache
def _quantiser() -> Any:
    try:
        import xllamacpp.xllamacpp as library  # pyright: ignore[reportMissingImports]

        function = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError) as error:
        raise MissingExtraError("xllamacpp", "gguf") from error
    function.restype = ctypes.c_size_t
    numbers = [ctypes.c_int64] * 3
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *numbers, ctypes.c_void_p]
    return function
