"""Peak memory of a training step, by part, from a model's shape and the longest batch. Arithmetic only: no tensors.

The terms follow what `decoder`, `lora`, `attention` and `engine.losses` keep for the backward pass, one line each, so
that a change there is a change of one line here. Measured against the peak resident set of fresh processes by
tests/recipes. It does not know the transformers fallback, nor other devices than the CPU.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from model_foundry.models.config import ModelConfig
from model_foundry.types import LoraConfig

QUERY_BLOCK_TOKENS = 256
KEEP_PROBABILITIES_TOKENS = 512
CHUNK_LOGITS = 12_500_000
"""The same constants as in `attention` and `engine.losses`; a test holds them together."""
PROCESS_BYTES = 235_000_000
"""Resident set of an interpreter that has imported torch and the engine, before a model is loaded."""
LIBRARY_BYTES = 130_000_000
"""What the first step brings in: kernels of torch and its libraries, and their buffers."""
HOLES_LAYERS = 6
"""Holes that glibc's heap keeps between freed tensors, in layers' worth of activations; 2 to 9 were measured."""
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes at the peak of a step.

    Attributes:
        weights: base weights and adapters.
        gradients: of everything trained, float32.
        optimizer: AdamW's two moments, float32.
        activations: what the forward pass keeps for the backward pass, and the holes between its tensors.
        logits: the head's pieces, and the gradient it hands back.
        other: the interpreter, torch and its libraries; memory that loading needed and nothing else fills.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


def estimate_memory(
    config: ModelConfig,
    *,
    lora: LoraConfig | None,
    rows: Sequence[int],
    dtype_bytes: int = FLOAT32_BYTES,
    adapted: Collection[str] | None = None,
    num_due_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    process_bytes: int = PROCESS_BYTES,
) -> MemoryEstimate:
    """Peak memory of one forward, backward and optimizer step.

    Args:
        lora: None trains every weight (kept in float32 whatever the compute type).
        rows: tokens of each row of the largest batch computed at once.
        dtype_bytes: of the compute type: 4 for float32, 2 for bfloat16.
        adapted: names out of `config.layer_linears` that carry an adapter; default all.
        num_due_tokens: tokens with a loss due; default all of them.
        process_bytes: resident set before the model is loaded, where the caller has measured it.
    """
    names = set(config.layer_linears) if adapted is None else set(adapted)
    due = sum(rows) if num_due_tokens is None else num_due_tokens
    num_trained = config.num_parameters if lora is None else num_adapter_parameters(config, lora, adapted=names)
    base = config.num_parameters * (FLOAT32_BYTES if lora is None else dtype_bytes)
    weights = base + (0 if lora is None else num_trained * FLOAT32_BYTES)
    kept = _kept_elements(config, rows, lora=lora, num_adapted=len(names)) * dtype_bytes + _kept_casts(
        config, num_trained, lora=lora, dtype_bytes=dtype_bytes
    )
    boundaries = config.num_hidden_layers * sum(rows) * config.hidden_size * dtype_bytes
    activations = boundaries + kept if gradient_checkpointing else config.num_hidden_layers * kept
    activations += HOLES_LAYERS * kept
    logits = _head_bytes(config, due, trained=lora is None, dtype_bytes=dtype_bytes)
    moments = 2 * num_trained * FLOAT32_BYTES
    fixed = weights + num_trained * FLOAT32_BYTES + moments
    # Training every weight copies them into one stretch; the first copy's place is left to what comes.
    loading = fixed + (base if lora is None else 0)
    step = fixed + activations + logits + LIBRARY_BYTES
    return MemoryEstimate(
        weights=weights,
        gradients=num_trained * FLOAT32_BYTES,
        optimizer=moments,
        activations=activations,
        logits=logits,
        other=process_bytes + LIBRARY_BYTES + max(0, loading - step),
    )


def num_adapter_parameters(config: ModelConfig, lora: LoraConfig, *, adapted: Collection[str] | None = None) -> int:
    """Parameters of A and B on the named linears of every layer, with DoRA's magnitudes."""
    per_layer = 0
    for name, (num_out, num_in) in config.layer_linears.items():
        if adapted is None or name in adapted:
            per_layer += lora.r * (num_out + num_in) + (num_out if lora.use_dora else 0)
    return config.num_hidden_layers * per_layer


def _kept_elements(config: ModelConfig, rows: Sequence[int], *, lora: LoraConfig | None, num_adapted: int) -> int:
    """Elements of the compute type that one layer keeps for its backward pass."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    per_token = {
        "residual before attention, read by the norm": width,
        "normed input of q, k, v": width,
        "rotated q and k, v": queries + 2 * keys,
        "q and k before their norms": queries + keys if config.qk_norm else 0,
        "attention's output, read by o": queries,
        "residual before the MLP, read by the norm": width,
        "normed input of gate and up": width,
        "gate and up": 2 * inner,
        "their product, read by down": inner,
        "activation of gate, outside the fused SiLU": inner if config.hidden_act != "silu" else 0,
        "x A of each adapter": 0 if lora is None else num_adapted * lora.r,
    }
    probabilities = sum(
        config.num_attention_heads * _scores(length, config.sliding_window)
        for length in rows
        if length <= KEEP_PROBABILITIES_TOKENS
    )
    return sum(rows) * sum(per_token.values()) + probabilities


def _kept_casts(config: ModelConfig, num_trained: int, *, lora: LoraConfig | None, dtype_bytes: int) -> int:
    """Bytes of copies of trained weights that one layer keeps: scaled adapters, or linears in the compute type."""
    if lora is not None:
        return num_trained // config.num_hidden_layers * dtype_bytes
    linears = sum(num_out * num_in for num_out, num_in in config.layer_linears.values())
    return 0 if dtype_bytes == FLOAT32_BYTES else linears * dtype_bytes


def _scores(length: int, window: int | None) -> int:
    """Query-key pairs computed for one head of one row: blocks of queries, each with the keys up to its end."""
    pairs = 0
    for first in range(0, length, QUERY_BLOCK_TOKENS):
        last = min(first + QUERY_BLOCK_TOKENS, length)
        pairs += (last - first) * (last - (0 if window is None else max(0, first - window + 1)))
    return pairs


def _head_bytes(config: ModelConfig, num_due_tokens: int, *, trained: bool, dtype_bytes: int) -> int:
    """Pieces of logits and probabilities, the hidden states and their gradient, and a trained head's gradient."""
    piece = max(1, CHUNK_LOGITS // config.vocab_size)
    # Probabilities are float32; in bfloat16 logits and their gradient are half of that each. While a second piece is
    # computed, the first one's probabilities are still there.
    num_pieces = 2 if num_due_tokens <= piece else 3
    total = num_pieces * min(num_due_tokens, piece) * config.vocab_size * FLOAT32_BYTES
    total += 2 * num_due_tokens * config.hidden_size * dtype_bytes
    if trained:
        head = config.vocab_size * config.hidden_size
        total += head * FLOAT32_BYTES + (0 if dtype_bytes == FLOAT32_BYTES else 2 * head * dtype_bytes)
    return total
