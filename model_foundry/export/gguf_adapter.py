"""A LoRA adapter as a GGUF file, which llama.cpp puts on top of the base's GGUF when it loads.

The layout is that of llama.cpp's `convert_lora_to_gguf.py` and `llama-adapter.cpp`: `NAME.lora_a` [r, in] and
`NAME.lora_b` [out, r] beside `adapter.lora.alpha`; experts stacked; rows of B in the order of the base's rows.
llama.cpp scales by alpha / r, so a rank-stabilised scale is written as a plain one of the same value (its own converter
writes lora_alpha as it stands, and the adapter is then too weak by √r).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_foundry.errors import MissingExtraError, ModelError, UsageError
from model_foundry.export.gguf import (
    ARCHITECTURES,
    gguf_config,
    naming_short_writes,
    permuted,
    permuted_heads,
    stack_names,
)
from model_foundry.export.merge import HEAD, Merge
from model_foundry.export.quantise import pack

FORMATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class GgufAdapter:
    """What was written: llama.cpp's names of the weights that it changes, and the type of its factors."""

    path: Path
    format: str
    changed: tuple[str, ...]


def write_gguf_adapter(path: Path, merge: Merge, *, format: str, name: str) -> GgufAdapter:
    """Write one file; atomicity is the caller's.

    Args:
        merge: the base and the adapter, held against each other.
        format: of the factors, one of `FORMATS`.

    Raises:
        ModelError: llama.cpp cannot put this adapter on this base. UsageError: there is no such format.
    """
    if format not in FORMATS:
        hint = f"Formats of an adapter: {', '.join(FORMATS)}. The base may be quantised all the same."
        raise UsageError(f"an adapter is not written as {format}", where="--quant", hint=hint)
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "train") from error
    config = gguf_config(merge)
    _refuse_impossible(merge)
    stacked = stack_names(config, list(merge.updates))
    scalings = {update.scaling for update in merge.updates.values()}
    ranks = {update.down.shape[0] for update in merge.updates.values()}
    if len(scalings) > 1 or len(ranks) > 1:
        raise ModelError("its layers have several ranks or scales, and a GGUF names one", where=str(merge.adapter))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.architecture])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(name)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scalings.pop() * ranks.pop())
        kind = gguf.GGMLQuantizationType[format.upper()]
        for stack, sources in stacked.items():
            if config.experts is not None and ".experts." in sources[0] and len(sources) < config.experts.num_experts:
                what = f"it adapts {len(sources)} experts of {stack} only, and a GGUF stacks all of them"
                raise ModelError(what, where=str(merge.adapter), hint="Export it merged: --to gguf")
            heads = permuted_heads(config, stack)
            factors: dict[str, list[np.ndarray]] = {"lora_a": [], "lora_b": []}
            for source in sources:
                update = merge.updates[source]
                up = update.up.float().numpy()
                factors["lora_a"].append(update.down.float().numpy())
                factors["lora_b"].append(permuted(up, heads) if heads else up)
            for part, values in factors.items():
                value = np.stack(values) if ".experts." in sources[0] else values[0]
                packed = pack(value, format.upper())
                if format == "f16" and not bool(np.isfinite(packed).all()):
                    what = f"{part} of {sources[0]} holds values that float16 cannot"
                    raise ModelError(what, where=str(merge.adapter), hint="Use --quant bf16 or f32.")
                writer.add_tensor(f"{stack}.{part}", packed, raw_shape=packed.shape, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        with naming_short_writes(path):
            writer.write_tensors_to_file()
    finally:
        writer.close()
    return GgufAdapter(path, format, tuple(stacked))


def _refuse_impossible(merge: Merge) -> None:
    where, hint = str(merge.adapter), "Export it merged: --to gguf"
    if not merge.updates:
        raise UsageError("it has no adapter to export", where=str(merge.base), hint=hint)
    if any(update.magnitude is not None for update in merge.updates.values()):
        raise ModelError("llama.cpp has no DoRA: it would leave the magnitudes out", where=where, hint=hint)
    if HEAD in merge.updates and HEAD not in merge.tensors:
        what = "it adapts a head that is tied to the embedding, and the base's GGUF has no tensor for it"
        raise ModelError(what, where=where, hint=hint)
