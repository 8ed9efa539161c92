"""A merged model as one GGUF file of the Llama family: f32, f16, bf16, and the block formats that numpy can pack.

Written on the `gguf` package: its names of tensors, its container, its quantisation. What is ours is the order (one
tensor in memory at a time), the row order of query and key projections that llama.cpp expects of Llama, and the refusal
of models that llama.cpp would compute otherwise. It reads nothing back: `export.parity` does, and judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.errors import MissingExtraError, ModelError, UsageError
from model_foundry.export.merge import Merge
from model_foundry.models.config import ModelConfig
from model_foundry.models.rope import rope_frequencies
from model_foundry.tokenizer import Tokenizer
from model_foundry.tokenizer.gguf_fields import gguf_fields

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
"""model_type -> llama.cpp's name."""
PERMUTED = {"llama"}
"""Architectures of llama.cpp that rotate neighbouring channels; Hugging Face rotates halves, so rows change places."""
FORMATS = {
    "f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"), "q5_1": ("Q5_1", "MOSTLY_Q5_1"), "q5_0": ("Q5_0", "MOSTLY_Q5_0"),
    "q4_1": ("Q4_1", "MOSTLY_Q4_1"), "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}  # fmt: skip
"""Format -> (type of the matrices, file type)."""
_STOPS = ("eos", "eot", "eom")


@dataclass(frozen=True, slots=True)
class Layout:
    """One tensor of the file.

    Attributes:
        sources: Hugging Face names; several where experts are stacked.
        shape: logical, as numpy has it.
        kind: name of a `GGMLQuantizationType`.
        num_heads: of a projection whose rows change places, else 0.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str
    num_heads: int = 0


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What was written, with what a person should know about it."""

    path: Path
    format: str
    layouts: tuple[Layout, ...]
    notes: tuple[str, ...]


def check_format(name: str) -> str:
    """A format that can be written here.

    Raises:
        UsageError: it is none, or one that only llama.cpp can make.
    """
    key = name.lower()
    if key in FORMATS:
        return key
    if "_k" in key or key.startswith(("iq", "tq")):
        hint = f"Export --quant f16, then run: llama-quantize MODEL-f16.gguf MODEL-{key}.gguf {key.upper()}"
        what = f"{name} needs llama.cpp's own quantiser, which no Python package here offers"
        raise UsageError(what, hint=hint)
    raise UsageError(f"there is no format {name!r}", hint=f"Formats: {', '.join(FORMATS)}")


def gguf_obstacle(config: ModelConfig) -> str | None:
    """Why llama.cpp would not compute this model, or we could not tell that it does; None where it does."""
    if config.hidden_act != "silu":
        return f"llama.cpp computes silu in this architecture, and the model's hidden_act is {config.hidden_act}"
    if config.mlp_bias or config.attention_output_bias or (config.attention_bias and config.architecture != "qwen2"):
        return "it has biases that llama.cpp does not read in this architecture"
    if config.experts is not None and config.num_sparse_layers < config.num_hidden_layers:
        return "only some of its layers have experts, and llama.cpp knows all or none"
    if config.experts is not None and not config.experts.norm_topk_prob:
        return "its expert weights are not normalised (norm_topk_prob), and llama.cpp always does that"
    rope = config.rope_scaling
    if rope is not None and rope.rope_type == "yarn":
        own = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}
        own |= {"beta_fast": None, "beta_slow": None}
        changed = [key for key, plain in own.items() if getattr(rope, key) not in (plain, _YARN_USUAL.get(key, plain))]
        if changed:
            return f"its YaRN scaling sets {changed[0]}, which a GGUF does not carry over"
    return None


_YARN_USUAL = {"beta_fast": 32.0, "beta_slow": 1.0}


def write_gguf(
    path: Path,
    merge: Merge,
    *,
    format: str,
    tokenizer: Tokenizer,
    chat_template: str,
    stop_token_ids: tuple[int, ...],
    name: str,
) -> GgufFile:
    """Write one file; atomicity is the caller's.

    Args:
        merge: the weights, each read when its turn comes.
        chat_template: what the file carries; empty for none.
        stop_token_ids: tokens that end an answer; the file names three at most.
        name: `general.name`.

    Raises:
        ModelError: llama.cpp would compute another model, the tokenizer has no GGUF form, or a value overflows float16.
        UsageError: the format cannot be written. MissingExtraError: gguf is not installed.
    """
    format = check_format(format)
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "train") from error
    config = ModelConfig.from_hf(merge.config, where=str(merge.base / "config.json"))
    if (obstacle := gguf_obstacle(config)) is not None:
        raise ModelError(obstacle, where=str(merge.base), hint="Export it with --to merged.")
    notes: list[str] = []
    layouts = plan_layout(config, merge.shapes, format, notes)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.architecture])
    try:
        _add_model_fields(writer, config, notes)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[FORMATS[format][1]])
        if format.startswith("q"):
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        fields = gguf_fields(tokenizer, num_rows=config.vocab_size) | stop_fields(tokenizer, stop_token_ids, notes)
        _add_tokenizer_fields(writer, fields, chat_template)
        divisors = rope_divisors(config)
        if divisors is not None:
            writer.add_tensor_info("rope_freqs.weight", divisors.shape, divisors.dtype, divisors.nbytes)
        for layout in layouts:
            kind = gguf.GGMLQuantizationType[layout.kind]
            writer.add_tensor_info(layout.name, layout.shape, np.dtype(np.float32), _num_bytes(layout), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for layout in layouts:
            writer.write_tensor_data(_values(merge, layout))
    finally:
        writer.close()
    return GgufFile(path, format, layouts, tuple(notes))


def plan_layout(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], format: str, notes: list[str]
) -> tuple[Layout, ...]:
    """Every tensor of the file, in order; what is kept in another type than asked for is noted.

    Raises:
        ModelError: a weight that llama.cpp has no name for.
    """
    import gguf

    architecture = ARCHITECTURES[config.architecture]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stacked: dict[str, list[str]] = {}
    for name in shapes:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        before, _, after = name.partition(".experts.")
        general = f"{before}.experts.{after.partition('.')[2]}" if after else name
        found = names.get_name(general, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"llama.cpp has no place for {name}", hint="Export it with --to merged.")
        stacked.setdefault(found, []).append(name)
    layouts: list[Layout] = []
    kept: list[str] = []
    for name, sources in stacked.items():
        ordered = tuple(sorted(sources, key=_expert_number))
        shape: tuple[int, ...] = shapes[ordered[0]]
        shape = (len(ordered), *shape) if ".experts." in ordered[0] else shape
        kind = FORMATS[format][0] if len(shapes[ordered[0]]) > 1 and not name.endswith("ffn_gate_inp.weight") else "F32"
        if kind.startswith("Q") and shapes[ordered[0]][-1] % 32:
            kind = "F16"
            kept.append(name)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        layouts.append(Layout(name, ordered, shape, kind, heads if architecture in PERMUTED else 0))
    if kept:
        notes.append(
            f"{len(kept)} tensors are kept in F16, {kept[0]} first: their rows do not divide into blocks of 32"
        )
    return tuple(layouts)


def _expert_number(name: str) -> int:
    after = name.partition(".experts.")[2]
    return int(after.partition(".")[0]) if after else 0


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection (or its bias) from Hugging Face's order, halves, to Llama's, neighbours."""
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """Llama 3's scaling as llama.cpp reads it: how much slower each frequency turns, float32 [head_dim / 2]."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    from dataclasses import replace

    plain, _ = rope_frequencies(replace(config, rope_scaling=None))
    scaled, _ = rope_frequencies(config)
    return (plain.double() / scaled.double()).numpy().astype(np.float32)


def stop_fields(tokenizer: Tokenizer, stop_token_ids: tuple[int, ...], notes: list[str]) -> dict[str, int]:
    """The tokens that end an answer by the names llama.cpp has for them; the tokenizer's own end first."""
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    stops = list(dict.fromkeys([*own, *stop_token_ids]))
    if len(stops) > len(_STOPS):
        notes.append(f"a GGUF names {len(_STOPS)} stop tokens; set these in the server too: {stops[len(_STOPS) :]}")
    return {f"tokenizer.ggml.{role}_token_id": stop for role, stop in zip(_STOPS, stops, strict=False)}


def _add_model_fields(writer: Any, config: ModelConfig, notes: list[str]) -> None:
    context = config.max_position_embeddings
    if config.sliding_window is not None and config.sliding_window < context:
        context = config.sliding_window
        notes.append(f"context cut to the sliding window of {context}: llama.cpp does not slide in this architecture")
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    rope = config.rope_scaling
    if rope is not None and rope.rope_type in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(rope.rope_type))
        writer.add_rope_scaling_factor(rope.factor)
        if rope.original_max_position_embeddings is not None:
            writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    if config.experts is not None:
        writer.add_expert_count(config.experts.num_experts)
        writer.add_expert_used_count(config.experts.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.experts.moe_intermediate_size)


def _add_tokenizer_fields(writer: Any, fields: Mapping[str, Any], chat_template: str) -> None:
    fields = {key: value for key, value in fields.items() if key != "tokenizer.chat_template" and value is not None}
    if chat_template:
        fields["tokenizer.chat_template"] = chat_template
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif len(value):
            writer.add_array(key, value)


def _num_bytes(layout: Layout) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[layout.kind]]
    return int(np.prod(layout.shape, dtype=np.int64)) // block * size


def _values(merge: Merge, layout: Layout) -> np.ndarray:
    """A tensor as its bytes lie in the file; rounded once, from float32."""
    import gguf
    from gguf.quants import quantize

    parts = []
    for source in layout.sources:
        weight = merge.weight(source).numpy()
        weight = permuted(weight, layout.num_heads) if layout.num_heads else weight
        packed = quantize(np.ascontiguousarray(weight), gguf.GGMLQuantizationType[layout.kind])
        if layout.kind == "F16" and not bool(np.isfinite(packed).all()):
            what = f"{source} holds values that float16 cannot, up to {float(np.abs(weight).max()):g}"
            raise ModelError(what, where=str(merge.base), hint="Use --quant bf16 or f32.")
        parts.append(packed)
    return parts[0] if len(parts) == 1 else np.stack(parts)
