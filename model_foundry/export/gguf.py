"""A merged model as one GGUF file of the Llama family, in any format of `export.quantise`.

Written on the `gguf` package: its names of tensors, its container. What is ours is the order (one
tensor in memory at a time), the row order of query and key projections that llama.cpp expects of Llama, and the refusal
of models that llama.cpp would compute otherwise. It reads nothing back: `export.parity` does, and judges.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.errors import MissingExtraError, ModelError
from model_foundry.export.merge import Merge
from model_foundry.export.quantise import FORMATS, K_BLOCK, Mix, check_format, pack
from model_foundry.models.config import ModelConfig
from model_foundry.models.rope import rope_frequencies
from model_foundry.tokenizer import Tokenizer
from model_foundry.tokenizer.gguf_fields import gguf_fields

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
"""model_type -> llama.cpp's name."""
PERMUTED = {"llama"}
"""Architectures of llama.cpp that rotate neighbouring channels; Hugging Face rotates halves, so rows change places."""
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


def gguf_config(merge: Merge) -> ModelConfig:
    """The configuration of a model that llama.cpp computes.

    Raises:
        ModelError: it does not, and why.
    """
    where = str(merge.base / "config.json")
    kind = merge.config.get("model_type")
    if kind not in ARCHITECTURES:
        what = f"a {kind!r} is not written as a GGUF here; {', '.join(ARCHITECTURES)} are"
        raise ModelError(what, where=where, hint="Export it with --to merged.")
    config = ModelConfig.from_hf(merge.config, where=where)
    if (obstacle := gguf_obstacle(config)) is not None:
        raise ModelError(obstacle, where=str(merge.base), hint="Export it with --to merged.")
    return config


def gguf_context(config: ModelConfig) -> int:
    """Tokens that llama.cpp computes as the model does: it slides over none."""
    return min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)


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
    config = gguf_config(merge)
    notes: list[str] = []
    layouts = plan_layout(config, merge.shapes, format, notes)
    writer = _writer(path, ARCHITECTURES[config.architecture])
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
        with naming_short_writes(path):
            if divisors is not None:
                writer.write_tensor_data(divisors)
            for layout in layouts:
                writer.write_tensor_data(_values(merge, layout))
    finally:
        writer.close()
    return GgufFile(path, format, layouts, tuple(notes))


@contextmanager
def naming_short_writes(path: Path) -> Iterator[None]:
    """numpy tells of a write that was cut short in words alone; it means that the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.ENOSPC, f"a write was cut short: {error}", str(path)) from error


def plan_layout(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], format: str, notes: list[str]
) -> tuple[Layout, ...]:
    """Every tensor of the file, in order; what is kept in another type than asked for is noted.

    Raises:
        ModelError: a weight that llama.cpp has no name for.
    """
    stacked = stack_names(config, [name for name in shapes if not name.endswith("rotary_emb.inv_freq")])
    mix = Mix.of(format, config, tied="output.weight" not in stacked)
    layouts: list[Layout] = []
    for name, ordered in stacked.items():
        shape: tuple[int, ...] = shapes[ordered[0]]
        kind = mix.kind(name, shape)
        shape = (len(ordered), *shape) if ".experts." in ordered[0] else shape
        layouts.append(Layout(name, ordered, shape, kind, permuted_heads(config, name)))
    notes += _exceptions(layouts, format)
    return tuple(layouts)


def stack_names(config: ModelConfig, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """llama.cpp's name of a tensor -> ours, several of them where experts are stacked, in their order.

    Raises:
        ModelError: a weight that llama.cpp has no name for.
    """
    import gguf

    architecture = ARCHITECTURES[config.architecture]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    stacked: dict[str, list[str]] = {}
    for name in names:
        before, _, after = name.partition(".experts.")
        general = f"{before}.experts.{after.partition('.')[2]}" if after else name
        found = known.get_name(general, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"llama.cpp has no place for {name}", hint="Export it with --to merged.")
        stacked.setdefault(found, []).append(name)
    return {name: tuple(sorted(sources, key=_expert_number)) for name, sources in stacked.items()}


def permuted_heads(config: ModelConfig, name: str) -> int:
    """How many heads change the order of their rows in this tensor; 0 where none does."""
    if ARCHITECTURES[config.architecture] not in PERMUTED:
        return 0
    return {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2], 0)


def _exceptions(layouts: Sequence[Layout], format: str) -> list[str]:
    """What is kept in another type than the format's own because its rows do not divide into blocks."""
    plain = FORMATS[format][0]
    if not plain.startswith("Q"):
        return []
    odd = [each for each in layouts if each.kind == "F16"]
    size = K_BLOCK if plain.endswith("_K") else 32
    narrow = [each for each in layouts if each.kind != "F32" and each.shape[-1] % size and each not in odd]
    notes = []
    if odd:
        first = odd[0].name
        notes.append(f"{len(odd)} tensors are kept in F16, {first} first: their rows do not divide into blocks of 32")
    if narrow:
        kinds = ", ".join(sorted({each.kind for each in narrow}))
        notes.append(
            f"{len(narrow)} tensors are {kinds}, as llama-quantize makes them too: their rows do not divide into "
            f"blocks of {size}"
        )
    return notes


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


def _writer(path: Path, architecture: str) -> Any:
    """The package's, with lists that may be empty: llama.cpp wants that of merges where a vocabulary has none, too."""
    import gguf

    array = gguf.GGUFValueType.ARRAY

    class Writer(gguf.GGUFWriter):
        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            if vtype != array or len(val):
                return super()._pack_val(val, vtype, add_vtype, sub_type)
            kind = self._pack("I", array) if add_vtype else b""
            return bytes(kind + self._pack("I", gguf.GGUFValueType.STRING) + self._pack("Q", 0))

        def add_array(self, key: str, val: Sequence[Any]) -> None:
            self.add_key_value(key, val, array)

    return Writer(path, architecture)


def _add_model_fields(writer: Any, config: ModelConfig, notes: list[str]) -> None:
    context = gguf_context(config)
    if context < config.max_position_embeddings:
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
        else:
            writer.add_array(key, value)


def _num_bytes(layout: Layout) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[layout.kind]]
    return int(np.prod(layout.shape, dtype=np.int64)) // block * size


def _values(merge: Merge, layout: Layout) -> np.ndarray:
    """A tensor as its bytes lie in the file; rounded once, from float32."""
    parts = []
    for source in layout.sources:
        weight = merge.weight(source).numpy()
        weight = permuted(weight, layout.num_heads) if layout.num_heads else weight
        packed = pack(weight, layout.kind)
        if layout.kind == "F16" and not bool(np.isfinite(packed).all()):
            what = f"{source} holds values that float16 cannot, up to {float(np.abs(weight).max()):g}"
            raise ModelError(what, where=str(merge.base), hint="Use --quant bf16 or f32.")
        parts.append(packed)
    return parts[0] if len(parts) == 1 else np.stack(parts)
