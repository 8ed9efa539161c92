"""The shape of a decoder of the Llama family, read from and written to a Hugging Face `config.json`.

It knows how transformers reads each key, old and new (`rope_theta` + `rope_scaling`, or `rope_parameters`), refuses
what the native decoder does not compute, and counts parameters exactly. It does not know torch, weights or folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from model_foundry.errors import ModelError
from model_foundry.models.json_fields import JsonFields
from model_foundry.models.mixture import MixtureConfig, read_mixture

HEAD_LAYER = "lm_head"
"""The output head's name as a layer that an adapter is put on."""
FULL = "full_attention"
SLIDING = "sliding_attention"
HIDDEN_ACTS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rope types the native decoder computes. `dynamic` and `longrope` depend on the longest row of a batch."""


@dataclass(frozen=True, slots=True)
class Family:
    """What transformers assumes for a `model_type` where `config.json` is silent."""

    class_name: str
    defaults: Mapping[str, Any]
    qk_norm: bool = False
    sliding: str = "none"  # none | all | switched (all, where use_sliding_window says so) | by_layer
    experts: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048, "bos_token_id": 1,
         "eos_token_id": 2, "num_key_value_heads": None},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 4096 * 32, "bos_token_id": 1,
         "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096},
        sliding="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
         "num_key_value_heads": 32, "sliding_window": 4096},
        sliding="by_layer",
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
         "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
        qk_norm=True,
        sliding="by_layer",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
         "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096, "num_experts": 128,
         "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        qk_norm=True,
        sliding="switched",
        experts=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched; fields that a type does not use are None.

    linear: Chen et al. 2023. llama3: Llama 3.1. yarn: Peng et al. 2023. `factor` and
    `original_max_position_embeddings` are already resolved the way transformers resolves missing ones.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def to_hf(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class LinearKind:
    """All linear layers of a model that have one place in their layer, experts counted singly."""

    num_out: int
    num_in: int
    count: int

    @property
    def num_weights(self) -> int:
        return self.num_out * self.num_in * self.count


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's shape and constants.

    Attributes:
        attention_bias: bias on the query, key and value projections.
        attention_output_bias: bias on the attention's output projection (Llama's and Qwen3's `attention_bias`
            puts it there too; Qwen2 never does).
        qk_norm: RMS norm over head_dim on queries and keys, before the rotation.
        sliding_window: tokens a query sees in a sliding layer, itself included; None where no layer slides.
        layer_types: `full_attention` or `sliding_attention` for each layer; see `window`.
        attention_dropout: share of attention probabilities dropped in training.
        dropout: share of the embeddings and of what each block adds to the residual stream that is dropped in
            training, as in GPT-2. A key of ours: transformers does not know it, and computes the same without it.
        experts: None where every layer has a plain MLP.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    layer_types: tuple[str, ...] = ()
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    dropout: float = 0.0
    experts: MixtureConfig | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, where: str = "config.json") -> ModelConfig:
        """Read a parsed `config.json`.

        Args:
            where: the file's name, for errors.

        Raises:
            ModelError: a key is missing or impossible, or asks for something the native decoder does not compute.
        """
        obstacle = native_obstacle(config)
        if obstacle is not None:
            raise ModelError(obstacle, where=where, hint="Use model.implementation=transformers for such a model.")
        family = FAMILIES[config["model_type"]]
        return _read(JsonFields(config, where, family.defaults), family)

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        mixture = self.experts
        if mixture is None or layer in mixture.mlp_only_layers:
            return False
        return (layer + 1) % mixture.decoder_sparse_step == 0

    @property
    def num_sparse_layers(self) -> int:
        return sum(self.is_sparse(layer) for layer in range(self.num_hidden_layers))

    @property
    def linear_kinds(self) -> dict[str, LinearKind]:
        """Every linear layer of the model but the head, by its name inside a layer (`mlp.experts.up_proj`)."""
        width, queries = self.hidden_size, self.num_attention_heads * self.head_dim
        keys, inner = self.num_key_value_heads * self.head_dim, self.intermediate_size
        num_layers, num_sparse = self.num_hidden_layers, self.num_sparse_layers
        kinds = {
            "self_attn.q_proj": LinearKind(queries, width, num_layers),
            "self_attn.k_proj": LinearKind(keys, width, num_layers),
            "self_attn.v_proj": LinearKind(keys, width, num_layers),
            "self_attn.o_proj": LinearKind(width, queries, num_layers),
        }
        if num_sparse < num_layers:
            kinds |= {
                "mlp.gate_proj": LinearKind(inner, width, num_layers - num_sparse),
                "mlp.up_proj": LinearKind(inner, width, num_layers - num_sparse),
                "mlp.down_proj": LinearKind(width, inner, num_layers - num_sparse),
            }
        if self.experts is not None and num_sparse:
            inner, num_experts = self.experts.moe_intermediate_size, num_sparse * self.experts.num_experts
            kinds |= {
                "mlp.gate": LinearKind(self.experts.num_experts, width, num_sparse),
                "mlp.experts.gate_proj": LinearKind(inner, width, num_experts),
                "mlp.experts.up_proj": LinearKind(inner, width, num_experts),
                "mlp.experts.down_proj": LinearKind(width, inner, num_experts),
            }
        return kinds

    def layer_linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear layer inside one decoder layer, by its name there; one entry an expert."""
        sparse = self.is_sparse(layer)
        found: dict[str, tuple[int, int]] = {}
        for name, kind in self.linear_kinds.items():
            shape = (kind.num_out, kind.num_in)
            if name.startswith("mlp.experts."):
                last, num_experts = name.rpartition(".")[2], self.experts.num_experts if self.experts and sparse else 0
                found |= {f"mlp.experts.{expert}.{last}": shape for expert in range(num_experts)}
            elif name.startswith("self_attn.") or sparse == (name == "mlp.gate"):
                found[name] = shape
        return found

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer, by its name inside a layer, has a bias."""
        if linear.startswith("mlp."):
            return self.mlp_bias
        return self.attention_output_bias if linear.endswith("o_proj") else self.attention_bias

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        total = embeddings + self.num_hidden_layers * norms + self.hidden_size
        for name, kind in self.linear_kinds.items():
            total += kind.num_weights + (kind.num_out * kind.count if self.has_bias(name) else 0)
        return total

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token meets: all but the experts it is not sent to."""
        if self.experts is None:
            return self.num_parameters
        share = 1 - self.experts.num_experts_per_tok / self.experts.num_experts
        idle = sum(kind.num_weights for name, kind in self.linear_kinds.items() if name.startswith("mlp.experts."))
        return self.num_parameters - round(share * idle)

    def window(self, layer: int) -> int | None:
        """Tokens a query of this layer sees, itself included; None for all before it."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == SLIDING else None

    def to_hf(self, *, dtype: str | None = None) -> dict[str, Any]:
        """A `config.json` that old and new readers understand: `rope_theta` stands at the top and in `rope_parameters`.

        Args:
            dtype: how the weights beside it are stored, such as `float32`.
        """
        rope = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling.to_hf()
        eos = self.eos_token_ids
        out: dict[str, Any] = {
            "architectures": [FAMILIES[self.architecture].class_name],
            "model_type": self.architecture,
            **{key: getattr(self, key) for key in _PLAIN_KEYS},
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, **rope},
            "rope_scaling": None if self.rope_scaling is None else rope,
            "use_cache": True,
        }
        family = FAMILIES[self.architecture]
        if family.sliding != "none":
            out["sliding_window"] = self.sliding_window
        if family.sliding in ("by_layer", "switched"):
            out["use_sliding_window"] = self.sliding_window is not None
        if family.sliding == "by_layer":
            out |= {"max_window_layers": self.max_window_layers, "layer_types": list(self.layer_types)}
        if family.experts:
            out |= {"num_experts": 0} if self.experts is None else self.experts.to_hf()
        if self.dropout:
            out["dropout"] = self.dropout
        if self.architecture in _ATTENTION_BIAS:
            out["attention_bias"] = self.attention_bias
        if self.architecture == "llama":
            out["mlp_bias"] = self.mlp_bias
        if dtype is not None:
            out |= {"dtype": dtype, "torch_dtype": dtype}
        return out


_ATTENTION_BIAS = ("llama", "qwen3", "qwen3_moe")
_NOT_PLAIN = {
    "architecture", "rope_theta", "rope_scaling", "attention_bias", "attention_output_bias", "mlp_bias", "qk_norm",
    "sliding_window", "max_window_layers", "layer_types", "eos_token_ids", "experts", "dropout",
}  # fmt: skip
_PLAIN_KEYS = tuple(f.name for f in fields(ModelConfig) if f.name not in _NOT_PLAIN)


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether the native decoder computes this model; if not, `native_obstacle` says why."""
    return native_obstacle(config) is None


def native_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why the native decoder cannot run this model, or None. Only about kind; numbers are checked by `from_hf`."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        return f"model_type {config.get('model_type')!r} is not one of the native architectures ({known})"
    names = config.get("architectures") or [family.class_name]
    if not any(str(name).lower() == family.class_name.lower() for name in names):
        return f"architectures {names!r} is not {family.class_name}"
    if config.get("quantization_config"):
        return "the weights are quantised (quantization_config)"
    if (act := config.get("hidden_act", "silu")) not in HIDDEN_ACTS:
        return f"hidden_act {act!r} is not one of {', '.join(HIDDEN_ACTS)}"
    return _rope_obstacle(config) or _layer_obstacle(config, family)


def _rope_obstacle(config: Mapping[str, Any]) -> str | None:
    rope = _rope_dict(config)
    if any(isinstance(value, Mapping) for value in rope.values()):
        return "rope_parameters differ by layer type"
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) not in ROPE_TYPES:
        return f"rope type {rope_type!r} is not one of {', '.join(ROPE_TYPES)}"
    if (partial := rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1, 1.0):
        return f"partial_rotary_factor {partial!r} rotates only part of each head"
    return None


def _layer_obstacle(config: Mapping[str, Any], family: Family) -> str | None:
    types = config.get("layer_types") if family.sliding == "by_layer" else None
    unknown = sorted({str(kind) for kind in types or ()} - {FULL, SLIDING})
    return f"layer_types holds {', '.join(unknown)}" if unknown else None


def _rope_dict(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_scaling` wins where both are given, as in transformers 5."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope if isinstance(rope, Mapping) else {"rope_type": repr(rope)}


def _read(reader: JsonFields, family: Family) -> ModelConfig:
    architecture = reader.values["model_type"]
    num_layers, num_heads = reader.integer("num_hidden_layers", 32), reader.integer("num_attention_heads", 32)
    hidden_size = reader.integer("hidden_size", 4096)
    num_kv = num_heads if reader.get("num_key_value_heads") is None else reader.integer("num_key_value_heads")
    if num_heads % num_kv:
        raise reader.wrong("num_key_value_heads", num_kv, f"a divisor of num_attention_heads ({num_heads})")
    head_dim = hidden_size // num_heads if reader.get("head_dim") is None else reader.integer("head_dim")
    if head_dim < 2 or head_dim % 2:
        raise reader.wrong("head_dim", head_dim, "even, for the rotary embedding")
    sliding_window, layer_types = _sliding(reader, family, num_layers)
    bias = reader.flag("attention_bias") if architecture in _ATTENTION_BIAS else False
    rope_theta, rope_scaling = _rope(reader)
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv,
        head_dim=head_dim,
        max_position_embeddings=reader.integer("max_position_embeddings"),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=bias or architecture == "qwen2",
        attention_output_bias=bias,
        mlp_bias=reader.flag("mlp_bias") if architecture == "llama" else False,
        qk_norm=family.qk_norm,
        sliding_window=sliding_window,
        max_window_layers=int(reader.number("max_window_layers", 28)) if family.sliding == "by_layer" else 28,
        layer_types=layer_types,
        hidden_act=reader.get("hidden_act", "silu"),
        bos_token_id=reader.token_id("bos_token_id"),
        eos_token_ids=reader.token_ids("eos_token_id"),
        pad_token_id=reader.token_id("pad_token_id"),
        initializer_range=reader.number("initializer_range", 0.02),
        attention_dropout=_rate(reader, "attention_dropout"),
        dropout=_rate(reader, "dropout"),
        experts=read_mixture(reader) if family.experts else None,
    )


def _rate(reader: JsonFields, key: str) -> float:
    rate = reader.optional_number(key) or 0.0
    if rate >= 1:
        raise reader.wrong(key, rate, "below 1")
    return rate


def _sliding(reader: JsonFields, family: Family, num_layers: int) -> tuple[int | None, tuple[str, ...]]:
    """The window and each layer's type, by the family's own rule."""
    kind = family.sliding
    active = kind == "all" or (kind != "none" and reader.flag("use_sliding_window"))
    window = reader.integer("sliding_window") if active and reader.get("sliding_window") is not None else None
    if kind != "by_layer":
        return window, (FULL if window is None else SLIDING,) * num_layers
    types = reader.get("layer_types")
    if types is None:
        first_sliding = num_layers if window is None else int(reader.number("max_window_layers", 28))
        return window, tuple(FULL if layer < first_sliding else SLIDING for layer in range(num_layers))
    if len(types) != num_layers:
        raise reader.wrong("layer_types", f"{len(types)} entries", f"one entry a layer ({num_layers})")
    if SLIDING in types and window is None:
        raise reader.wrong("sliding_window", None, "set, with use_sliding_window, where layer_types has sliding layers")
    return window, tuple(types)


def _rope(reader: JsonFields) -> tuple[float, RopeScaling | None]:
    """Theta and scaling; `rope_theta` inside the rope dictionary wins over the one at the top."""
    given = {key: value for key, value in _rope_dict(reader.values).items() if value is not None}
    rope = JsonFields(given, reader.where, {"rope_theta": reader.get("rope_theta", 10_000.0)})
    theta = rope.number("rope_theta")
    if theta <= 1:
        raise rope.wrong("rope_theta", theta, "above 1")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", rope.number("factor", least=1.0))
    trained = reader if reader.get("original_max_position_embeddings") is not None else rope
    original = trained.integer("original_max_position_embeddings", reader.integer("max_position_embeddings"))
    if rope_type == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low or low == 0:
            raise rope.wrong("high_freq_factor", high, f"above low_freq_factor ({low:g}), and that above 0")
        scaling = RopeScaling("llama3", rope.number("factor", least=1.0), original)
        return theta, replace(scaling, low_freq_factor=low, high_freq_factor=high)
    factor = rope.number("factor", reader.integer("max_position_embeddings") / original)
    names = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers = {name: rope.optional_number(name) for name in names}
    return theta, RopeScaling("yarn", factor, original, truncate=bool(rope.get("truncate", True)), **numbers)
