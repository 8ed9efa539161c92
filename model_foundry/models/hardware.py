"""What training a model takes, by its configuration alone, and which machines have it. Arithmetic; nothing is measured.

It knows shapes, memory and machines by name. It does not know torch, weights or recipes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from model_foundry.models.config import ModelConfig
from model_foundry.models.memory import EXPERTS, ROUTER, MemoryEstimate, default_targets, estimate_memory
from model_foundry.types import LoraConfig

GB = 1_000_000_000
BFLOAT16_BYTES = 2
APPLE_SHARE = 0.75
"""The part of a Mac's memory that macOS lets its GPU take."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device; `memory_bytes` is what a program may use. `packs`: four-bit weights run there."""

    name: str
    memory_bytes: int
    packs: bool = True


DEVICES: tuple[Device, ...] = (
    *(Device(f"{size} GB GPU", size * GB) for size in (24, 48, 80, 141, 192)),
    *(Device(f"Apple {size} GB", int(size * APPLE_SHARE) * GB, packs=False) for size in (64, 128)),
)
"""Nominal sizes in gigabytes of 10⁹ bytes; cards that count in 2³⁰ have a little more."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to train: what is trained, whether the rest is packed in four bits, and what that takes."""

    name: str
    num_trained: int
    packed: bool
    memory: MemoryEstimate

    def spare_bytes(self, device: Device) -> int | None:
        """What is left on a device, negative where it does not fit; None where this way does not run at all."""
        return None if self.packed and not device.packs else device.memory_bytes - self.memory.total

    def as_dict(self) -> dict[str, Any]:
        return {
            "way": self.name,
            "trained_parameters": self.num_trained,
            "memory": self.memory.as_dict(),
            "spare_bytes": {device.name: self.spare_bytes(device) for device in DEVICES},
        }


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part; they add up to all of them."""
    parts = {"embedding": config.vocab_size * config.hidden_size, "attention": 0, "mlp": 0, "experts": 0, "routers": 0}
    for name, kind in config.linear_kinds.items():
        part = "attention" if name.startswith("self_attn.") else "mlp"
        part = "routers" if name == ROUTER else "experts" if name.startswith(EXPERTS) else part
        parts[part] += kind.num_weights + (kind.num_out * kind.count if config.has_bias(name) else 0)
    if not config.tie_word_embeddings:
        parts["head"] = config.vocab_size * config.hidden_size
    parts["norms"] = config.num_parameters - sum(parts.values())
    return {name: count for name, count in parts.items() if count}


def ways_to_train(
    config: ModelConfig,
    *,
    rows: Sequence[int],
    lora: LoraConfig,
    adapted: Collection[str] | None = None,
    gradient_checkpointing: bool = True,
) -> tuple[Way, ...]:
    """LoRA on bfloat16 and on four-bit weights, and every weight, on an accelerator.

    Args:
        rows: tokens of each row of the largest batch computed at once.
        lora: its rank and options.
        adapted: kinds of linear layers with an adapter; default all but routers, and for a mixture of experts also
            attention alone, for the adapters of many experts are many.
    """
    targets: dict[str, Collection[str]] = {"": default_targets(config) if adapted is None else adapted}
    attention = {name for name in config.linear_kinds if name.startswith("self_attn.")}
    if adapted is None and config.num_sparse_layers:
        targets = {" on every linear layer": targets[""], " on attention alone": attention}

    def way(name: str, *, lora: LoraConfig | None, adapted: Collection[str] | None, packed: bool) -> Way:
        memory = estimate_memory(
            config,
            lora=lora,
            rows=rows,
            dtype_bytes=BFLOAT16_BYTES,
            adapted=adapted,
            gradient_checkpointing=gradient_checkpointing,
            packed=packed,
            machine="accelerator",
        )
        return Way(name, memory.gradients // 4, packed, memory)

    ways = [
        way(f"{name} r={lora.r}{where}", lora=lora, adapted=kinds, packed=packed)
        for name, packed in (("bf16 LoRA", False), ("nf4 QLoRA", True))
        for where, kinds in targets.items()
    ]
    return (*ways, way("every weight", lora=None, adapted=None, packed=False))
